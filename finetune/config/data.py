"""The settings of the data: where images come from, which are used, how batches are made. Standard library only."""

import re
from dataclasses import asdict, dataclass

from finetune.config.fields import Choice, ignored, not_read_by, setting


class SourceKind(Choice):
    """Where images and labels come from."""

    digits = "digits"
    folder = "folder"
    table = "table"
    torchvision = "torchvision"
    hf = "hf"
    webdataset = "webdataset"


class OnError(Choice):
    """How a run treats an image that cannot be read."""

    stop = "stop"
    skip = "skip"


class Balance(Choice):
    """How a run treats classes of different sizes."""

    none = "none"
    weights = "weights"
    sampling = "sampling"


class CacheKind(Choice):
    """Where decoded images are stored between epochs."""

    none = "none"
    ram = "ram"
    disk = "disk"
    device = "device"


class Resize(Choice):
    """How an image of any shape becomes the square that the model sees, where no random crop does."""

    auto = "auto"
    shortest = "shortest"
    squash = "squash"
    pad = "pad"


@dataclass
class DataConf:
    """Images, labels, splits, batches and caches."""

    source: SourceKind = setting(
        SourceKind.digits, "digits: bundled handwriting; folder: one folder a class; table, torchvision, hf, webdataset"
    )
    root: str | None = setting(
        None,
        "folder of images (folder), a data set (torchvision) or tar shards (also https://, s3://, pipe:COMMAND)",
        place=True,
    )
    table: str | None = setting(
        None, "table: a .csv, .tsv, .jsonl or .parquet with a line an image; or a folder or pattern of such", place=True
    )
    path_column: str = setting("path", "table: column of image paths, from data.root or the table's own folder")
    path_suffix: str | None = setting(
        None, "table: ending behind each path that lacks it, such as .jpg; auto: that of the image with this name"
    )
    label_column: str = setting("label", "column (table, hf) or json key (webdataset) that holds the label")
    split_column: str | None = setting(None, "table: column that says train, val or test; null: cut by data.split_seed")
    label_separator: str | None = setting(None, "table: separator of the labels in a cell (multi-label)")
    name: str | None = setting(None, "torchvision: the class, such as CIFAR10; hf: a hub id or a local path")
    subset: str | None = setting(None, "hf: which configuration of the data set")
    image_column: str = setting("image", "hf: column that holds the image")
    download: bool = setting(False, "torchvision, hf, webdataset: true allows the download of missing files")
    allow_pipe: bool = setting(
        True, "whether pipe:COMMAND may run; with resume= only if it is true on the command line"
    )
    classes: list[str] = setting([], "use these classes only, by name; empty: all")
    shots: int = setting(0, "training images of each class; 0: all", ge=0)
    fraction: float = setting(1.0, "share of each class's training images that is used", gt=0, le=1)
    shots_seed: int = setting(0, "which images data.shots and data.fraction draw", ge=0)
    balance: Balance = setting(Balance.none, "weights: rare classes weigh more; sampling: classes come equally often")
    epoch_images: int = setting(0, "images an epoch, drawn with replacement; 0: every image once", ge=0)
    folds: int = setting(0, "cut train and val anew into this many folds; 0: no folds", ge=0)
    fold: int = setting(0, "which fold is val, from 0", ge=0)
    val_fraction: float = setting(
        0.1, "share of each class's training images that is cut off for validation; 0: no validation", ge=0, lt=1
    )
    test_fraction: float = setting(
        0.1, "share that is cut off for the final test, where the data gives neither val nor test; 0: none", ge=0, lt=1
    )
    group: str | None = setting(
        None, "what no cut separates: a column, a json key, a pattern on paths such as '(p\\d+)_', or similar: by looks"
    )
    split_seed: int = setting(0, "seed of the split, apart from `seed`: every run is compared on the same images", ge=0)
    resize: Resize = setting(
        Resize.auto,
        "shortest: shorter side, then the middle; squash: both sides; pad: longer side, then black; auto: as weights",
    )
    eval_resize: int = setting(
        0, "pixels of the shorter side before the middle is cut out; 0: as the weights", ge=0, le=16_384
    )
    drop_last: bool = setting(
        False, "true: leave out an epoch's last images that fill no whole step, but not its only ones"
    )
    batch_size: int = setting(64, "images a micro-batch; fit: the most that the GPU holds", ge=0, le=2**20)
    workers: str = setting("auto", "loader processes: a number, or auto, by measurement; only changes the speed")
    on_error: OnError = setting(OnError.stop, "an image that cannot be read: stop with the list, or skip and list it")
    max_image_mib: int = setting(
        512, "MiB of one decoded image, 3 bytes a pixel; its file may have 4 times as many", ge=1, le=2**20
    )
    max_text_mib: int = setting(
        16, "MiB of one row of a table, one json of a shard, one list of class names", ge=1, le=2**20
    )
    check_budget_s: float = setting(15.0, "seconds in which the check at the start decodes new images", ge=0)
    cache: CacheKind = setting(CacheKind.none, "where to store decoded images: same images, faster epochs")
    cache_gib: float = setting(
        500.0, "cache=disk: GiB that decoded images may take; as many for fetched shards", gt=0, le=2**30
    )
    cache_dir: str | None = setting(
        None,
        "its folder finetune-cache holds the caches; null: ~/.cache or $XDG_CACHE_HOME",
        place=True,
    )


# The start of a place that is not on this machine. A drive letter of Windows (C:) is none.
REMOTE = re.compile(r"pipe:|[a-z][a-z0-9+.-]+://")

# The settings that only some sources read, with these sources.
_READERS: dict[str, tuple[SourceKind, ...]] = {
    "root": (SourceKind.folder, SourceKind.table, SourceKind.torchvision, SourceKind.webdataset),
    "table": (SourceKind.table,),
    "path_column": (SourceKind.table,),
    "path_suffix": (SourceKind.table,),
    "label_column": (SourceKind.table, SourceKind.hf, SourceKind.webdataset),
    "split_column": (SourceKind.table,),
    "label_separator": (SourceKind.table,),
    "name": (SourceKind.torchvision, SourceKind.hf),
    "subset": (SourceKind.hf,),
    "group": tuple(kind for kind in SourceKind if kind != SourceKind.digits),
    "image_column": (SourceKind.hf,),
    "max_text_mib": (SourceKind.table, SourceKind.webdataset),
    "download": (SourceKind.torchvision, SourceKind.hf, SourceKind.webdataset),
}

# The settings that a source needs, each with its meaning.
_NEEDS: dict[SourceKind, dict[str, str]] = {
    SourceKind.digits: {},
    SourceKind.folder: {"root": "PATH, the folder that holds one folder of images a class"},
    SourceKind.table: {"table": "PATH, a .csv, .tsv, .jsonl or .parquet with a line an image, or a folder of such"},
    SourceKind.torchvision: {
        "name": "CLASS, a data set of torchvision.datasets such as CIFAR10",
        "root": "PATH, the folder that the data set lies in or is downloaded to",
    },
    SourceKind.hf: {"name": "NAME, a data set of the Hugging Face hub or a local path"},
    SourceKind.webdataset: {"root": "PATH, a folder of .tar shards, a pattern (train-*.tar), a URL or pipe:COMMAND"},
}


def data_problems(data: DataConf) -> list[str]:
    """What is wrong with the settings of the data beyond their ranges, one line each."""
    values = asdict(data)
    given = {name: f"data.{name}={value}" for name, value in values.items()}
    problems = ignored("data", data, _ignored_reasons(data))
    for name, meaning in _NEEDS[data.source].items():
        if not values[name]:
            problems.append(f"data={data.source} needs data.{name}={meaning}")
    if data.label_separator == "":
        problems.append("data.label_separator is empty: give what stands between two labels, such as '|', or null")
    if data.val_fraction + data.test_fraction >= 1:
        both = f"{given['val_fraction']} and {given['test_fraction']}"
        problems.append(f"{both} leave nothing to learn: their sum must be less than 1")
    problems += _group_problems(data)
    if data.folds == 1:
        problems.append("data.folds=1: one fold leaves nothing to learn; expected 0 (no folds) or at least 2")
    if 0 < data.folds <= data.fold:
        problems.append(f"{given['fold']}: expected 0 to {data.folds - 1}, with {given['folds']}")
    if data.shots and data.fraction != 1:
        problems.append(f"{given['shots']} and {given['fraction']} exclude each other: keep one")
    if data.eval_resize and data.resize in (Resize.squash, Resize.pad):
        reason = f"data.resize={data.resize} cuts nothing out; use data.resize=shortest"
        problems.append(f"{given['eval_resize']} would be ignored: {reason}")
    if data.label_separator and data.balance != Balance.none:
        problems.append(f"{given['balance']} works with one label an image; remove it or data.label_separator")
    if data.epoch_images and data.balance == Balance.sampling:
        mend = "keep one (data.balance=weights goes with either)"
        problems.append(f"{given['epoch_images']} and {given['balance']} both say how often images come: {mend}")
    if len(data.classes) == 1:
        problems.append(f"{given['classes']}: one class leaves nothing to tell apart; name two or more")
    if len(set(data.classes)) < len(data.classes):
        problems.append(f"{given['classes']}: names a class twice")
    if not re.fullmatch(r"auto|\d{1,4}", str(data.workers)) or (data.workers != "auto" and int(data.workers) > 1024):
        problems.append(f"{given['workers']}: expected auto or a number from 0 to 1024, such as 8")
    return problems


SIMILAR = "similar"  # the word of data.group for images that look alike


def group_pattern(data: DataConf) -> re.Pattern[str] | None:
    """The pattern in `data.group`: a regular expression, with round brackets around what names a group."""
    has_pattern = data.group is not None and "(" in data.group and data.source != SourceKind.hf
    return re.compile(str(data.group)) if has_pattern else None


def group_column(data: DataConf) -> str | None:
    """The column, or the key, in `data.group`; None if it is a pattern, `similar`, or not set."""
    return data.group if data.group != SIMILAR and group_pattern(data) is None else None


def _group_problems(data: DataConf) -> list[str]:
    """What is wrong with `data.group`."""
    form = "expected a pattern with one pair of round brackets around what names a group, such as '(patient\\d+)_'"
    if data.group in (None, SIMILAR) or data.source == SourceKind.digits:
        return []
    if data.source == SourceKind.torchvision:
        return [f"data.group={data.group}: torchvision gives images no names; expected {SIMILAR}"]
    try:
        pattern = group_pattern(data)
    except re.error as error:
        return [f"data.group={data.group}: is no regular expression ({error}); {form}"]
    if pattern is None:
        is_wrong = data.source == SourceKind.folder or not data.group
        return [f"data.group={data.group}: {form}, or {SIMILAR}"] if is_wrong else []
    several = f"data.group={data.group}: has {pattern.groups} pairs of brackets; {form} ((?:...) groups without a name)"
    return [several] if pattern.groups != 1 else []


def device_cache_problems(data: DataConf, recipe: str) -> list[str]:
    """Why `data.cache=device` cannot work: the host still has to draw a view of each image."""
    if data.cache != CacheKind.device:
        return []
    problems = ignored("data", data, {"workers": "data.cache=device needs no loader processes"})
    if recipe != "none":
        reason = "the host draws and warps a view of each image, so nothing can be fed from the device"
        problems.append(f"data.cache=device with augment={recipe}: {reason}; use data.cache=ram, or augment=none")
    return problems


def pipe_commands(data: DataConf) -> list[str]:
    """The shell commands in `data.root`, each with `pipe:`."""
    parts = (data.root or "").split("::")
    return [part for part in parts if data.source == SourceKind.webdataset and part.startswith("pipe:")]


def _is_fetched(data: DataConf) -> bool:
    """Whether any part of `data.root` is to be fetched."""
    parts = (data.root or "").split("::")
    return data.source == SourceKind.webdataset and any(REMOTE.match(part) for part in parts)


def _ignored_reasons(data: DataConf) -> dict[str, str]:
    """Every setting that nothing reads, given the others, with the reason."""
    reasons = not_read_by("data", data.source, _READERS)
    if data.source == SourceKind.digits:
        reasons["root"] = "data=digits is bundled; use data=folder for your own images"
    if data.source == SourceKind.webdataset and data.root and not _is_fetched(data):
        reasons["download"] = f"data.root={data.root} is neither a URL nor pipe:COMMAND"
    if data.cache != CacheKind.disk and not _is_fetched(data):
        reasons["cache_gib"] = f"data.cache={data.cache}; it bounds data.cache=disk and fetched shards"
    if data.folds:
        reasons["val_fraction"] = f"data.folds={data.folds} cuts val"
    else:
        reasons["fold"] = "data.folds=0; set data.folds, such as data.folds=5"
    if not data.shots and data.fraction == 1:
        reasons["shots_seed"] = "neither data.shots nor data.fraction is set"
    return reasons
