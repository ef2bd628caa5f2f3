"""Loads what a run learned as a `Predictor`: from a run, a weights file, an exported folder, or without training.

A weights file may be a stranger's. It holds numbers and texts. The network that its texts describe is first built
without memory and compared with the numbers, so that a small file cannot ask for a large network.
"""

import dataclasses
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from msgspec import Meta

from finetune.config import Conf, ModelConf, OptimConf, Precision, TrainConf, find_problems, member_of
from finetune.config.words.configuration import read_settings
from finetune.core.device import WIDE, pick_device, pick_precision, set_kernels
from finetune.core.freezing import set_up_layers
from finetune.core.layers import LayeredModel
from finetune.core.preprocess import Preprocess, as_asked
from finetune.models import BuiltModel, build_model
from finetune.models.patches import place, products_dominate
from finetune.models.upstream.network import HUB
from finetune.models.upstream.skip_init import SkipInit
from finetune.models.upstream.transformers_config import Network
from finetune.models.upstream.weight_files import check_finite
from finetune.runs.finished import BEST_WEIGHTS, compare_with_result
from finetune.runs.records import read_result
from finetune.runs.weights import checksum, fill, metadata_of, misfit_of, threshold_of
from finetune.system.errors import UserError
from finetune.system.ours import FolderKind, read_marker
from finetune.system.reading import DamagedError, UnfitError, parse_json
from finetune.system.seals import check_checksum, checksum_in
from finetune.system.terminal import printable
from finetune.use.predictor import Predictor

MAX_SIDE = 16_384  # pixels, as of model.image_size
# What other folders of ours are.
NO_RUNS = {
    FolderKind.check: "what `finetune check` wrote",
    FolderKind.sweep: "a sweep, whose folders are runs",
    FolderKind.cache: "a cache",
    FolderKind.table: "a table that `finetune predict` or `embed` wrote",
    FolderKind.sorted: "a folder of sorted images",
}
# The weights files of an exported folder, by its format. The first one says what the model is.
EXPORTED = {"timm": ("model.safetensors",), "open_clip": ("classifier.safetensors", "open_clip_model.safetensors")}


@dataclass(frozen=True, eq=False)
class Learned:
    """What training left: the network with its weights, and what a prediction needs besides."""

    built: BuiltModel
    classes: tuple[str, ...]  # in the order of the logits
    threshold: float | None  # from which probability on a label counts; None: one label an image
    conf: ModelConf  # the settings that the network was built with; `pretrained` may be a place on another machine
    checksum: str = ""  # of the first weights file; empty: not known


def load(
    source: str | os.PathLike[str],
    *,
    device: str = "auto",
    precision: str = "auto",
    classes: Sequence[str] | None = None,
) -> Predictor:
    """The model of a run, ready to predict with the preprocessing, the classes and the thresholds of its validation.

    `source` is a run directory, whose best weights are taken, a `.safetensors` file of a run, or a folder that
    `finetune export` wrote for timm, open_clip, or, unless it is a CLIP, for transformers. With `classes` it is the
    settings of a model that reads class names, such as `model=clip_b16`: a zero-shot classifier without training.
    `device` and `precision` are words of the settings of these names.

    Raises:
        FileNotFoundError: There is nothing at `source`.
        DamagedError: A file is not what a run wrote.
        UserError: `source` is no run, or has no finished epoch; or another mistake that a person can mend.
    """
    if problems := find_problems(Conf(device=device)):
        raise UserError(problems[0])
    where = pick_device(device)
    learned = read_learned(source, classes)
    return predictor_of(learned, str(source), where, precision)


def predictor_of(learned: Learned, name: str, device: torch.device, precision: str) -> Predictor:
    """The model on its device, ready to predict; `name` says where it came from."""
    model, word = learned.built.model, member_of(Precision, precision, "precision")
    dtype = pick_precision(word, device, is_wide=products_dominate(model.net, WIDE))
    set_kernels(word, dtype)
    set_up_layers(model, OptimConf(), train=TrainConf())
    model.requires_grad_(False).eval()
    checksum_of = learned.checksum or checksum(model.net.state_dict())
    place(model, device, dtype)
    preprocess, threshold = learned.built.preprocess, learned.threshold
    return Predictor(model, learned.classes, preprocess, device, dtype, threshold, name, checksum_of)


def read_learned(source: str | os.PathLike[str], classes: Sequence[str] | None = None) -> Learned:
    """What the run, the file or the exported folder `source` holds, on the CPU; `classes` and errors as of `load`."""
    if classes is not None:
        return _zero_shot(shlex.split(str(source)), classes)
    return _from_files(_weights_files(Path(source).expanduser()))


def _zero_shot(words: Sequence[str], classes: Sequence[str]) -> Learned:
    """A CLIP under a head made from `classes`; `words` are settings."""
    names = list(classes)
    if len(names) < 2 or len({*names}) < len(names) or not all(name.strip() for name in names):
        raise UserError(f"classes {','.join(names)}: expected two or more different names, such as cat,dog")
    conf = read_settings(words).conf
    with torch.random.fork_rng(devices=[]):
        built = build_model(conf.model, names)
    if not built.has_zeroshot:
        problem = f"{conf.model.name} reads no class names, so it classifies only after training"
        raise UserError(f"{' '.join(words)}: {problem}; use a CLIP, such as model=clip_b16, with model.head=auto")
    built = dataclasses.replace(built, preprocess=as_asked(built.preprocess, conf.data))
    return Learned(built, tuple(names), None, conf.model)


def _weights_files(source: Path) -> list[Path]:
    """The weights files that a run directory or an exported folder holds, or the one that `source` is."""
    shown = printable(str(source))
    example = "a run directory such as outputs/<date>/<time>, or its checkpoints/best.safetensors"
    if not source.exists():
        raise FileNotFoundError(f"{shown}: there is no such file or folder; expected {example}")
    if not source.is_dir():
        if source.suffix != ".safetensors":
            raise UserError(f"{shown} is no weights file of a run: expected {example}")
        return [source]
    path = source / BEST_WEIGHTS
    if not path.exists():
        if (source / "classifier.safetensors").exists() and (source / "preprocessor_config.json").exists():
            problem = f"{shown} is a CLIP exported to transformers, which finetune does not load again"
            raise UserError(f"{problem}; take the run, or its export to open_clip")
        for names in EXPORTED.values():
            if all(os.path.lexists(source / name) for name in names):
                return [source / name for name in names]
        marker = read_marker(source)
        if marker is not None and marker.kind in NO_RUNS:
            raise UserError(f"{shown} is {NO_RUNS[marker.kind]}, and no run directory; expected {example}")
        if os.path.lexists(source / "config.yaml"):
            mend = f"wait for one, or continue it with resume={shown}"
            raise UserError(f"{shown}: no epoch of this run is finished, so there are no weights yet; {mend}")
        raise UserError(f"{shown} is no run directory, since it has no {BEST_WEIGHTS}; expected {example}")
    if (source / "result.json").exists():
        compare_with_result(source, BEST_WEIGHTS, read_result(source / "result.json"))
    return [path]


def _from_files(files: Sequence[Path]) -> Learned:
    """The model with the weights of the files; the metadata of the first one say everything else."""
    for file in files:
        check_checksum(file)
    path = files[0]
    texts = metadata_of(path)
    if missing := [key for key in ("classes", "preprocess", "model", "is_multilabel") if key not in texts]:
        mend = f"to fine-tune from it, use model.pretrained={printable(str(path))}"
        raise UserError(f"{printable(str(path))} says no {missing[0]}, so no run of finetune wrote it; {mend}")
    names = _part(texts, "classes", Annotated[list[str], Meta(min_length=1)], path)
    if len({*names}) < len(names):
        raise DamagedError.because(path, "two of its classes have the same name")
    changes, conf = _part(texts, "changes", Network | None, path), _model_conf(texts, path)
    preprocess = _part(texts, "preprocess", Preprocess, path)
    # Several labels have a threshold that validation chose, or a half where there was no validation.
    threshold = threshold_of(texts, path)
    if _part(texts, "is_multilabel", bool, path) and threshold is None:
        threshold = 0.5
    with torch.random.fork_rng(devices=[]):
        empty = _described(conf, names, path)
        _check_fits(files, empty, preprocess, len(names))
        with SkipInit():  # the file replaces every value
            built = build_model(conf, names, load=False)
    (changes or Network()).put_into(built.model.net)
    fill(built.model, files)
    check_finite(built.model.net, printable(str(path)))
    built = dataclasses.replace(built, preprocess=preprocess, changes=(changes or Network()).as_dict())
    given = _part(texts, "model", ModelConf, path)
    conf = dataclasses.replace(conf, pretrained=given.pretrained, pretrained_key=given.pretrained_key)
    return Learned(built, tuple(names), threshold, conf, checksum_in(path) or "")


def _described(conf: ModelConf, names: Sequence[str], path: Path) -> LayeredModel:
    """The network that the texts of a file describe, without memory; a UserError names the file."""
    try:
        return build_model(conf, names, load=False, device="meta").model
    except (UserError, FileNotFoundError) as error:
        raise UserError(f"{printable(str(path))} describes a model that cannot be built: {error}") from error


def _part(texts: Mapping[str, str], key: str, kind: Any, path: Path) -> Any:
    """A part of the metadata as a value of the type `kind`."""
    try:
        return parse_json(texts.get(key, "null").encode("utf-8", "surrogatepass"), kind)
    except UnfitError as error:
        raise DamagedError.because(path, f"its metadata {key!r}: {error}") from None


def _model_conf(texts: Mapping[str, str], path: Path) -> ModelConf:
    """The settings that the network was built with, without those that only the start of training reads."""
    given: dict[str, Any] = _part(texts, "model", dict[str, Any], path)
    conf: ModelConf = _part(texts, "model", ModelConf, path)
    known = {field.name for field in dataclasses.fields(ModelConf)}
    if new := sorted(given.keys() - known):
        raise UserError(f"{printable(str(path))}: model.{new[0]} is unknown here: another version of finetune wrote it")
    pretrained = conf.pretrained
    if pretrained.startswith(HUB) and not conf.name.startswith(HUB):
        pretrained = "/weights.safetensors"  # not read: it only says that the run had some, and no network is asked
    # A path of the run's machine; `head_scale` and the names made the first values of the head.
    conf = dataclasses.replace(conf, pretrained=pretrained, pretrained_key=None, class_names=None, head_scale=1.0)
    if problems := find_problems(Conf(model=conf)):
        raise DamagedError.because(path, f"its metadata 'model': {problems[0]}")
    return conf


def _check_fits(files: Sequence[Path], empty: LayeredModel, preprocess: Preprocess, num_classes: int) -> None:
    """Raise a UserError unless the numbers of the files are those of this network, which has no memory yet."""
    path = files[0]
    shown, size = printable(str(path)), preprocess.size
    if problem := misfit_of(files, empty):
        raise UserError(f"{shown} does not fit the model that it describes: {problem}")
    needed = sum(t.numel() * t.element_size() for t in (*empty.net.parameters(), *empty.net.buffers()))
    if needed > 2 * sum(file.stat().st_size for file in files):
        raise UserError(f"{shown} describes a model of {needed:,} bytes, more than twice as many as it has itself")
    if max(size, preprocess.shorter_side) > MAX_SIDE:
        raise DamagedError.because(path, f"its images would have more than {MAX_SIDE:,} pixels a side")
    if preprocess.channels != empty.channels:
        raise DamagedError.because(path, f"its images have {preprocess.channels} channels, its model {empty.channels}")
    try:
        logits = empty.eval()(torch.empty(1, empty.channels, size, size, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{shown}: images of {size} pixels a side do not fit its model ({reason})") from error
    if tuple(logits.shape) != (1, num_classes):
        raise UserError(f"{shown} names {num_classes} classes, and its model gives {tuple(logits.shape)[1:]} scores")
