"""How fast images come, beside a plain Pillow + ImageFolder + DataLoader loop on the same files; prints ratios.

    python scripts/bench_data.py                     one thread, no workers: what one core does
    python scripts/bench_data.py --images 2000 --repeats 7

Both sides run in turn within one process, and seconds of the processor are counted, not of the clock: what one core
does, also on a busy machine. Medians are compared. The files are 500x375 JPEGs made on the spot, in the page cache of
the system.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torchvision import datasets, transforms

from finetune.config import AugmentConf, CacheKind, DataConf, Recipe, SourceKind
from finetune.core.preprocess import Preprocess
from finetune.data import Loader, open_source
from finetune.data.checks.examine import examine
from finetune.data.checks.known_images import KnownImages
from finetune.system.memory import keep_freed_memory

MEAN, STD = (0.481, 0.458, 0.408), (0.269, 0.261, 0.276)
MODEL = Preprocess(224, MEAN, STD, interpolation="bicubic", resize="crop")
BATCH = 64
CLASSES = 4


def make_images(root: Path, count: int) -> None:
    """JPEGs with the size and about the weight of ImageNet's, in a train, a val and a test folder."""
    for i in range(count + 2 * CLASSES):
        split = "train" if i < count else ("val", "test")[i % 2]
        random = np.random.default_rng(i)
        coarse = Image.fromarray(random.integers(0, 255, (25, 33, 3), dtype=np.uint8)).resize((500, 375), 3)
        grain = random.normal(0, 8, (375, 500, 1))
        pixels = (np.asarray(coarse) + grain).clip(0, 255).astype(np.uint8)
        folder = root / split / f"class{i // 2 % CLASSES if split != 'train' else i % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=85)


def plain(root: Path, crop: bool) -> Iterable[Any]:
    """What most scripts do."""
    first = (
        [
            transforms.RandomResizedCrop(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
        ]
        if crop
        else [transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(224)]
    )
    transform = transforms.Compose([*first, transforms.ToTensor(), transforms.Normalize(MEAN, STD)])
    data = datasets.ImageFolder(str(root / "train"), transform)
    return torch.utils.data.DataLoader(data, batch_size=BATCH, shuffle=True)


def ours(root: Path, cache_dir: Path, crop: bool, cache: CacheKind) -> Loader:
    """This project's loader on the same files."""
    conf = DataConf(
        source=SourceKind.folder,
        root=str(root),
        batch_size=BATCH,
        workers="0",
        cache=cache,
        cache_dir=str(cache_dir),
    )
    augment = AugmentConf(recipe=Recipe.crop if crop else Recipe.none)
    split = open_source(conf).splits["train"]
    return Loader(split, MODEL, conf=conf, augment=augment, seed=0, device=torch.device("cpu"))


def timed(work: Callable[[], int]) -> float:
    """Images a second of one core."""
    began = time.process_time()
    images = work()
    return images / (time.process_time() - began)


def count(batches: Iterable[Any]) -> int:
    """Go through an epoch; how many images it had."""
    return sum(len(batch[0]) for batch in batches)


def compare(root: Path, cache_dir: Path, crop: bool, repeats: int) -> dict[str, list[float]]:
    """Rates of both sides, `repeats` epochs each, in turn."""
    # Squares on the device are no start for a random crop: the configuration refuses that.
    kinds = [kind for kind in CacheKind if not (crop and kind == CacheKind.device)]
    loaders = {kind: ours(root, cache_dir, crop, kind) for kind in kinds}
    theirs = plain(root, crop)
    rates: dict[str, list[float]] = {}
    for kind in (CacheKind.ram, CacheKind.disk):
        rates[f"epoch that builds cache={kind}"] = [timed(lambda kind=kind: count(loaders[kind].epoch(0)))]  # type: ignore[misc]
    for epoch in range(repeats):
        rates.setdefault("plain", []).append(timed(lambda: count(theirs)))
        for kind, loader in loaders.items():
            rates.setdefault(f"cache={kind}", []).append(
                timed(lambda loader=loader, epoch=epoch: count(loader.epoch(epoch)))
            )  # type: ignore[misc]
    return rates


def check_rates(root: Path, repeats: int) -> dict[str, list[float]]:
    """Rates of decoding files with Pillow, and of the check, which reads, hashes and decodes."""
    files = sorted((root / "train").rglob("*.jpg"))
    conf = DataConf(source=SourceKind.folder, root=str(root))
    source = open_source(conf)
    total = sum(map(len, source.splits.values()))
    rates: dict[str, list[float]] = {"plain": [], "check, first look": [], "check, second look": []}

    def read_all() -> int:
        for file in files:
            with Image.open(file) as image:
                image.convert("RGB")
        return len(files)

    def look(cache_dir: str) -> int:
        examine(source, KnownImages(cache_dir, source.location))
        return total

    for _ in range(repeats):
        rates["plain"].append(timed(read_all))
        with tempfile.TemporaryDirectory() as cache_dir:
            rates["check, first look"].append(timed(lambda cache_dir=cache_dir: look(cache_dir)))  # type: ignore[misc]
            rates["check, second look"].append(timed(lambda cache_dir=cache_dir: look(cache_dir)))  # type: ignore[misc]
    return rates


def show(title: str, rates: dict[str, list[float]]) -> None:
    """Medians, their spread, and how many times the plain loop."""
    print(f"\n{title}")
    base = statistics.median(rates["plain"])
    for name, values in rates.items():
        middle = statistics.median(values)
        spread = f"{min(values):,.0f} to {max(values):,.0f}"
        print(f"  {name:<28} {middle:>9,.0f} images/s  ({spread})  {middle / base:6.2f} x plain")


def main() -> None:
    """Make the files, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as a run on a CPU does; the plain loop gains by it, too
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "images"
        make_images(root, arguments.images)
        size = statistics.mean(path.stat().st_size for path in root.rglob("*.jpg"))
        print(f"{arguments.images} JPEGs of 500x375, {size / 1000:.0f} kB each; one thread, no workers")
        cache_dir = Path(folder) / "cache"
        show("resize and centre crop to 224", compare(root, cache_dir, False, arguments.repeats))
        show("random resized crop to 224 and flip", compare(root, cache_dir, True, arguments.repeats))
        show("looking at every file", check_rates(root, arguments.repeats))


if __name__ == "__main__":
    main()
