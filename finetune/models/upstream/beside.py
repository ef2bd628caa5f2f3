"""What the files beside weights say: config.json of timm or transformers, and transformers' preprocessor_config.json.

They name the classes of the classifier's rows, say how images are prepared, and what shapes do not show of a network.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, TypeVar

import torch
from msgspec import Meta
from torch import nn

from finetune.core.preprocess import CropFraction, Deviation, Mean, Preprocess
from finetune.models.upstream.class_names import Labels, Named, names_by_row, names_in, names_of
from finetune.models.upstream.clip_source import tower_of_weights
from finetune.models.upstream.comparing import differences
from finetune.models.upstream.downloads import quiet_upstream
from finetune.models.upstream.layouts import shown
from finetune.models.upstream.network import FOLDER, RESIZE, interpolation_of
from finetune.models.upstream.transformers_config import Network, NetworkConfig, fit_network
from finetune.models.upstream.transformers_tables import OPEN_CLIP, table_of
from finetune.system.errors import UserError
from finetune.system.reading import UnfitError, parse_json, read_file

MAX_CONFIG = 2**24  # bytes; the names of 21,000 classes take one megabyte
RESAMPLING = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers


class _Config(TypedDict, total=False):
    id2label: Labels  # transformers' word
    label2id: Any  # the same from the other side
    label_names: Labels  # timm's
    label_descriptions: dict[str, str] | None  # of timm's names, where these are ids
    labels: Any  # that of timm's first hub folders
    architecture: Any  # a name of timm
    pretrained_cfg: Any


class _Processor(TypedDict, total=False):
    image_mean: list[Mean]
    image_std: list[Deviation]
    resample: int | None
    do_normalize: bool | None
    do_rescale: bool | None
    rescale_factor: Annotated[float, Meta(gt=0, le=1)] | None
    rescale_offset: bool | None  # as EfficientNet's, whose rescaled pixels lie around 0


class _TimmConfig(TypedDict, total=False):
    """The entries of timm's `pretrained_cfg` that are read; those that are missing or null are timm's defaults."""

    mean: list[Mean] | None
    std: list[Deviation] | None
    interpolation: str | None
    crop_pct: CropFraction | None
    crop_mode: Literal["center", "squash", "border"] | None
    input_size: Annotated[list[Annotated[int, Meta(ge=1)]], Meta(min_length=3, max_length=3)] | None
    label_names: Labels
    label_descriptions: dict[str, str] | None
    labels: Labels


class _TimmFile(TypedDict):
    pretrained_cfg: _TimmConfig


_Depth = Annotated[int, Meta(ge=1, le=1000)]


class _TimmArgs(TypedDict, total=False):
    depth: _Depth
    depths: Annotated[list[_Depth], Meta(max_length=16)]
    layers: _Depth | Annotated[list[_Depth], Meta(max_length=16)]
    img_size: Annotated[int, Meta(ge=1, le=16_384)] | list[Annotated[int, Meta(ge=1, le=16_384)]]


class _TimmNamed(TypedDict):
    architecture: str


class _TimmFolder(_TimmNamed, total=False):
    """What timm builds a network by from a folder."""

    model_args: _TimmArgs
    num_classes: Annotated[int, Meta(ge=0, le=10**6)]


@dataclass(frozen=True)
class Beside:
    """What is known of weights beyond their tensors."""

    network: Network = Network()
    named: Named = field(default_factory=dict)  # names of the classifier's classes, by the place that says them
    note: str = ""  # for the line about the model
    images: Mapping[str, Any] = field(default_factory=dict)  # entries of `Preprocess` in the place of the model's own
    sides: tuple[int, ...] = ()  # height and width of the images that the weights expect; empty where nothing says it
    place: Path = Path()  # the file that says so

    def preprocess(self, own: Preprocess, image_size: int) -> Preprocess:
        """The model's own preprocessing with what the files say; `image_size` is the setting, 0 where there is none.

        Raises:
            UserError: The weights expect images of another size than the model takes, and no setting decides.
        """
        if self.sides and not image_size and {*self.sides} != {own.size}:
            # No silent change: the network of a run is built again from its settings, without this file.
            problem = f"its input_size is {' x '.join(map(str, self.sides))} pixels and that of the model is {own.size}"
            choice = f"model.image_size={self.sides[0]} (as the weights) or model.image_size={own.size}"
            raise UserError(f"{self.place}: {problem}; say which with {choice}")
        return replace(own, **self.images)


def read_beside(path: Path, program: str, net: nn.Module, own: Beside) -> Beside:
    """What is known of the weights `path`: `own` is what they say themselves, and goes before what stands beside them.

    `program` is that of their layout, see `Layout`. Where it is another one than the network's library, activation and
    norms of `net` are changed in place; `net` has both towers of a CLIP, or the image tower alone.

    Raises:
        UserError: A file cannot be read, or does not fit the network.
    """
    place = path.with_name("config.json")
    config: _Config = _read(place, _Config) or {}
    network, note = own.network, ""
    if program:
        is_clip = program == OPEN_CLIP.program
        towers, teller = tower_of_weights(path) if is_clip else (_read(place, NetworkConfig), place)
        network = own.network if towers is None else fit_network(net, towers, table_of(program), teller)
        note = f"; {network} as its {teller.name} says" if str(network) else ""
        if towers is None:
            note = f"; no {teller.name} beside them says their activation, so that of model.name is used"
    timm = _timm_config(config, place)
    named = own.named or _named(config, timm, place)
    images = _timm_images(timm) or _processor_images(path.with_name("preprocessor_config.json"))
    if not program:
        told = ["class names"] * (named is not own.named and bool(named)) + ["preprocessing"] * bool(images)
        note = f"; {' and '.join(told)} as the files beside them say" if told else ""
    return Beside(network, named, note, images, tuple((timm.get("input_size") or [])[1:]), place)


def _named(config: _Config, timm: _TimmConfig, place: Path) -> dict[str, list[str]]:
    """The names of the classes in a config.json, in the order of the rows, by the entry that has them."""
    labels = config.get("label_names") or timm.get("label_names") or timm.get("labels")
    described = config.get("label_descriptions") or timm.get("label_descriptions")
    id2label = names_of(config.get("id2label"))
    found = {
        "label_names": names_of(labels, described),
        "id2label": names_by_row(config.get("label2id")) if id2label is None else id2label,
    }
    named = {f"{place}: {entry}": names for entry, names in found.items() if names is not None}
    return named or names_in({"labels": config.get("labels")}, str(place))


class _Names(TypedDict):
    label_names: Labels
    label_descriptions: dict[str, str] | None


def names_of_folder(folder: Path) -> Named:
    """The names of the classes in the config.json of a folder with a model of timm; a UserError where it is odd."""
    place = folder / "config.json"
    config: _Config = _read(place, _Config) or {}
    return _named(config, _timm_config(config, place), place)


def names_of_hub(config: Mapping[str, Any], place: str) -> Named:
    """The names of the classes in timm's configuration of weights, which a stranger wrote; a UserError where odd."""
    try:
        text = json.dumps({key: config.get(key) for key in _Names.__annotations__})
        found = parse_json(text.encode(), _Names)
    except UnfitError as error:
        raise UserError(f"{place}: the names of its classes cannot be used: {error}") from error
    names = names_of(found["label_names"], found["label_descriptions"])
    return {} if names is None else {f"{place}: label_names": names}


# What a caller of timm's `create_model` says of training, of size or of classes, and not of the network.
NEUTRAL_ARGS = re.compile(
    r"drop|^(num_classes|in_chans|img_size|pretrained|dynamic_img|strict_img|weight_init|fix_init)"
)


def check_architecture(path: Path, name: str, args: Mapping[str, Any], net: nn.Module) -> None:
    """Raise a UserError where timm's config.json beside the weights `path` describes another network than `net`.

    Networks of other heads, pooling or activation may have the same tensors. `args` are those of size, of channels and
    of training with which timm made `net`.
    """
    from timm import create_model

    place, (architecture, theirs) = path.with_name("config.json"), _described(path)
    if not architecture or (architecture == name.partition(".")[0] and not theirs):
        return
    try:
        with torch.device("meta"), quiet_upstream():
            found = differences(create_model(architecture, **{**theirs, **args}), net)
    except (TypeError, ValueError, LookupError, AttributeError, AssertionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{place} describes no model of timm ({reason}); mend it, or move it away") from error
    if found:
        problem = f"{place} describes another network than {name}, though its tensors fit: {shown(found, 3)}"
        raise UserError(f"{problem}; use model.name={FOLDER}{path.parent}, without model.pretrained")


def _described(path: Path) -> tuple[str, dict[str, Any]]:
    """Timm's name in the config.json beside the weights `path`, and the arguments that change the network.

    The name is empty where there is none that timm knows.
    """
    from timm import is_model

    place = path.with_name("config.json")
    if "architecture" not in (_read(place, _Config) or {}):
        return "", {}
    folder = _read(place, _TimmFolder) or _TimmFolder(architecture="")
    architecture = folder["architecture"].partition(".")[0]
    args = {key: value for key, value in folder.get("model_args", {}).items() if not NEUTRAL_ARGS.search(key)}
    return (architecture, args) if is_model(architecture) else ("", {})


def check_not_timms(path: Path, name: str) -> None:
    """Raise a UserError where timm's config.json beside the weights `path` describes no network that torchvision has.

    Both libraries have ResNets with the same names and tensors, and timm's may have another pooling or activation.
    """
    architecture, args = _described(path)
    if architecture and (architecture != name or args):
        what = ", ".join([architecture, *(f"{key}={value}" for key, value in args.items())])
        problem = f"{path.with_name('config.json')} describes timm's {what}, and {name} is torchvision's"
        raise UserError(f"{problem}; use model.name={FOLDER}{path.parent}, without model.pretrained")


def check_timm_folder(folder: Path) -> None:
    """Raise a UserError where the config.json of a folder with a model of timm names none, or one without end."""
    from timm import is_model

    config = _read(folder / "config.json", _TimmFolder)
    if config is not None and not is_model(config["architecture"].partition(".")[0]):
        raise UserError(f"{folder / 'config.json'} cannot be used: timm knows no such architecture; mend it")


def _timm_config(config: _Config, place: Path) -> _TimmConfig:
    """Timm's `pretrained_cfg`; timm's first hub folders have its entries at the top. Empty where there is none."""
    if config.get("pretrained_cfg") is not None:
        file = _read(place, _TimmFile)
        return {} if file is None else file["pretrained_cfg"]
    return (_read(place, _TimmConfig) or {}) if "architecture" in config else {}


def _timm_images(config: _TimmConfig) -> dict[str, Any]:
    """How timm prepares the images of these weights; empty where nothing says it, or for other numbers of channels."""
    from timm.data import config as data_config

    keys = ("mean", "std", "interpolation", "crop_pct", "crop_mode")
    given = {key: value for key, value in config.items() if key in keys and value is not None}
    if not given:
        return {}
    resolve: Callable[..., dict[str, Any]] = data_config.resolve_data_config
    found = resolve(pretrained_cfg=given)
    mean, std = (tuple(found[key]) * (3 if len(found[key]) == 1 else 1) for key in ("mean", "std"))
    if not len(mean) == len(std) == 3:
        return {}
    resize = RESIZE[found["crop_mode"]]
    crop_fraction = float(found["crop_pct"]) if resize == "crop" else 1.0
    interpolation = interpolation_of(found["interpolation"])
    return {"mean": mean, "std": std, "interpolation": interpolation, "resize": resize, "crop_fraction": crop_fraction}


def _processor_images(place: Path) -> dict[str, Any]:
    """Mean, deviation and interpolation of a preprocessor_config.json; empty without one for three channels.

    Both are told for pixels from 0 to 1, and there for those that the processor has rescaled by its own factor.
    """
    found: _Processor = _read(place, _Processor) or {}
    mean, std = tuple(found.get("image_mean", ())), tuple(found.get("image_std", ()))
    factor = 1.0 if found.get("do_rescale") is False else found.get("rescale_factor") or 1 / 255
    if found.get("do_normalize") is False:
        mean, std = (0.0,) * 3, (1.0,) * 3
    if not len(mean) == len(std) == 3:
        return {}
    offset, whole = float(found.get("rescale_offset") or 0), round(255 * factor, 6)
    mean, std = tuple((value + offset) / whole for value in mean), tuple(value / whole for value in std)
    resample = RESAMPLING.get(found.get("resample") or 0)
    return {"mean": mean, "std": std} | ({"interpolation": resample} if resample else {})


C = TypeVar("C")


def _read(path: Path, kind: type[C]) -> C | None:
    try:
        return parse_json(read_file(path, limit=MAX_CONFIG, follow=True), kind)
    except FileNotFoundError:
        return None
    except UnfitError as error:
        raise UserError(f"{path} cannot be used: {error}; mend it, or move it away") from error
