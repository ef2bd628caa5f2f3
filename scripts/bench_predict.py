"""How fast `finetune predict` is, beside the evaluation loop, timm's inference loop and a pipeline of transformers.

    python scripts/bench_predict.py                               ViT-B/32, 768 JPEGs of 500x375, medians of five
    python scripts/bench_predict.py --images 64 --runs 1          does it work at all?

The rivals predict the same files with the same weights: an export of ours to timm, which transformers reads too. Each
measurement is a process of its own: it loads the model, warms up on a batch, and times one pass over all files, with
the start of its workers and the writing of its table. First every rival is measured once with each of its flags, and
keeps those that were fastest. Then all run in turn; the machine should do nothing else.
timm's `inference.py` is no part of its package, so its steps are written anew here, from version 1.0.31.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BATCH, CLASSES, TOP_K = 64, 10, 1
RIVALS: dict[str, dict[str, tuple[Any, ...]]] = {
    "timm": {"workers": (0, 1, 2), "threads": (1, 2), "channels_last": (False, True)},
    "transformers": {"workers": (0, 1, 2), "threads": (1, 2), "batch_size": (1, 8, BATCH)},
}
OURS = ("predict", "evaluation")


def predict(folder: Path, images: Path, out: Path, flags: dict[str, Any]) -> Callable[[], int]:
    """What `finetune predict FOLDER IMAGES --out OUT` does after loading."""
    import finetune
    from finetune.data.sources.unlabelled import find_images
    from finetune.system.memory import keep_freed_memory
    from finetune.use.writing import Options, columns_of, opened_sink, request_of, write_predictions

    predictor, options = finetune.load(folder, device=flags["device"]), Options(batch_size=BATCH)
    keep_freed_memory()

    def one_pass() -> int:
        split = find_images([str(images)])
        request = request_of(predictor, split, options, "predict")
        with opened_sink(out, columns_of(predictor, TOP_K), request, overwrite=True) as sink:
            write_predictions(predictor, split, options, sink)
        return len(split)

    return one_pass


def evaluation(folder: Path, images: Path, out: Path, flags: dict[str, Any]) -> Callable[[], int]:
    """What a run does to score a split: the loader and `validate`."""
    import finetune
    from finetune.config import DataConf
    from finetune.core.device import autocast
    from finetune.core.fit import validate
    from finetune.data import Loader
    from finetune.data.sources.unlabelled import find_images
    from finetune.system.memory import keep_freed_memory

    predictor = finetune.load(folder, device=flags["device"])
    keep_freed_memory()

    def one_pass() -> int:
        split, conf = find_images([str(images)]), DataConf(batch_size=BATCH)
        loader = Loader(split, predictor.preprocess, conf=conf, augment=None, seed=0, device=predictor.device)
        validate(predictor.model, loader.epoch(0), autocast(predictor.dtype, predictor.device))
        loader.close()
        return len(split)

    return one_pass


def timm(folder: Path, images: Path, out: Path, flags: dict[str, Any]) -> Callable[[], int]:
    """The steps of timm's inference.py: loader, forward passes, softmax, the best classes, and a table at the end."""
    import torch
    from timm import create_model
    from timm.data import create_dataset, create_loader, resolve_data_config

    device = torch.device(flags["device"])
    torch.set_num_threads(flags["threads"])
    model = create_model(f"local-dir:{folder}", pretrained=True).to(device).eval()
    if flags["channels_last"]:
        model = model.to(memory_format=torch.channels_last)
    config = resolve_data_config({}, model=model)

    def one_pass() -> int:
        data = create_dataset(root=str(images), name="", class_map="")
        workers, on_gpu = flags["workers"], device.type == "cuda"
        words = {"batch_size": BATCH, "use_prefetcher": on_gpu, "num_workers": workers, "device": device, **config}
        loader = create_loader(data, **words)
        names, labels, values = loader.dataset.filenames(basename=False), [], []
        with torch.inference_mode():
            for batch, _ in loader:
                if not on_gpu:
                    batch = batch.to(device)
                if flags["channels_last"]:
                    batch = batch.contiguous(memory_format=torch.channels_last)
                found, indices = model(batch).softmax(-1).topk(TOP_K)
                values.append(found.cpu().numpy())
                labels.append(indices.cpu().numpy())
        _write(out, names, [row for part in labels for row in part], [row for part in values for row in part])
        return len(names)

    return one_pass


def transformers(folder: Path, images: Path, out: Path, flags: dict[str, Any]) -> Callable[[], int]:
    """`pipeline("image-classification")` over the paths, and a table at the end."""
    import torch
    from transformers import pipeline

    torch.set_num_threads(flags["threads"])
    classify = pipeline("image-classification", str(folder), device=flags["device"])

    def one_pass() -> int:
        paths = sorted(str(path) for path in images.rglob("*.jpg"))
        words = {"batch_size": flags["batch_size"], "num_workers": flags["workers"], "top_k": TOP_K}
        with torch.inference_mode():
            found = list(classify(paths, **words))
        _write(out, paths, [[each[0]["label"]] for each in found], [[each[0]["score"]] for each in found])
        return len(paths)

    return one_pass


def _write(out: Path, names: Any, labels: Any, values: Any) -> None:
    with out.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "probability"])
        for name, label, value in zip(names, labels, values, strict=True):
            writer.writerow([name, label[0], round(float(value[0]), 6)])


ARMS = {"predict": predict, "evaluation": evaluation, "timm": timm, "transformers": transformers}


def measure(given: argparse.Namespace) -> float:
    """Images a second of the arm that the command line names, in this process."""
    work, flags = Path(given.work), json.loads(given.flags)
    with tempfile.TemporaryDirectory() as name:
        one_pass = ARMS[given.arm](work / "model", work / "images", Path(name) / "x.csv", flags)
        warm = ARMS[given.arm](work / "model", work / "few", Path(name) / "few.csv", flags)
        warm()
        start = time.perf_counter()
        count = one_pass()
        return count / (time.perf_counter() - start)


def rate(arm: str, work: Path, flags: dict[str, Any]) -> float:
    """The same, in a process of its own."""
    command = [sys.executable, __file__, "--arm", arm, "--work", str(work), "--flags", json.dumps(flags)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm} {flags} failed:\n{done.stderr[-2000:]}")
    return float(done.stdout.split()[-1])


def prepare(work: Path, model: str, count: int) -> None:
    """Images, and the model with random weights as a folder that timm and transformers load."""
    import torch
    from bench_data import make_images

    from finetune.config.words.configuration import read_settings
    from finetune.models import build_model
    from finetune.use.exporting.timm_folder import write_files
    from finetune.use.loading import Learned

    make_images(work / "made", count)
    (work / "made" / "train").rename(work / "images")
    (work / "few").mkdir()
    files = sorted((work / "images").rglob("*.jpg"))
    for number, path in enumerate(files[:BATCH]):
        (work / "few" / f"{number}.jpg").symlink_to(path)
    conf = read_settings(["model=vit", f"model.name={model}", "model.pretrained=none", "model.head=random"]).conf
    torch.manual_seed(0)
    names = tuple(f"class{number}" for number in range(CLASSES))
    learned = Learned(build_model(conf.model, names, load=False), names, None, conf.model)
    (work / "model").mkdir()
    write_files(learned, work / "model")


def best_flags(arm: str, work: Path, device: str, *, all_flags: bool) -> dict[str, Any]:
    """The flags with which a rival was fastest, measured once each; the first ones without `all_flags`."""
    choices = RIVALS[arm]
    grid = [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]
    found = {}
    for flags in grid if all_flags else grid[:1]:
        found[json.dumps(flags | {"device": device})] = each = rate(arm, work, flags | {"device": device})
        print(f"  {arm} {flags}: {each:.1f} images/s", flush=True)
    best: dict[str, Any] = json.loads(max(found, key=lambda key: found[key]))
    return best


def compare(given: argparse.Namespace) -> None:
    """Measure all arms in turn, and print medians and ratios."""
    rivals = [name for name in RIVALS if find_spec(name) is not None]
    for name in RIVALS.keys() - {*rivals}:
        print(f"{name} is not installed, and is left out")
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        prepare(work, given.model, given.images)
        arms = {arm: {"device": given.device} for arm in OURS}
        arms |= {arm: best_flags(arm, work, given.device, all_flags=given.runs > 1) for arm in rivals}
        rates: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(given.runs):
            for arm, flags in arms.items():
                rates[arm].append(rate(arm, work, flags))
    ours = statistics.median(rates["predict"])
    print(f"\n{given.model}, {given.images} JPEGs of 500x375, medians of {given.runs}, images/s:")
    for arm, values in rates.items():
        middle = statistics.median(values)
        spread = f"{min(values):.1f} to {max(values):.1f}"
        print(f"  {arm:13s} {middle:7.1f} ({spread}); predict is {ours / middle:.2f} times as fast  {arms[arm]}")


def main() -> None:
    """Compare all arms, or measure the one that `--arm` names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_base_patch32_224", help="a name of timm")
    parser.add_argument("--images", type=int, default=768)
    parser.add_argument("--runs", type=int, default=5, help="of each arm; with 1 the flags are not searched")
    parser.add_argument("--device", default="cpu")
    for flag in ("--arm", "--work", "--flags"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.arm:
        print(measure(given))
    else:
        compare(given)


if __name__ == "__main__":
    main()
