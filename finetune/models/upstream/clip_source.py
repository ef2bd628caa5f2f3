"""Where an open_clip model comes from: the package itself, open_clip's list, a hub or a folder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict

from msgspec import Meta

from finetune.config import ModelConf, nearest
from finetune.core.preprocess import Deviation, Mean
from finetune.models.heads.zeroshot import Tokenizer
from finetune.models.upstream import glyphs, weight_files
from finetune.models.upstream.downloads import downloads, quiet_upstream
from finetune.models.upstream.network import FOLDER, HUB, unknown_tag
from finetune.models.upstream.torchscript import is_openais
from finetune.models.upstream.transformers_config import NetworkConfig
from finetune.system.errors import UserError
from finetune.system.reading import UnfitError, parse_json, read_file

HUB_CONFIG = "open_clip_config.json"
MAX_CONFIG = 2**20  # bytes; real ones have two thousand


Blocks = Annotated[int, Meta(ge=1, le=1000)]  # the deepest published tower has 64


class _Tower(TypedDict, total=False):
    """The entries of a tower that make its construction long; others make it large, and it has no memory at first."""

    width: Annotated[int, Meta(ge=1)]
    head_width: Annotated[int, Meta(ge=1)]
    layers: Blocks | list[Blocks]  # blocks, or those of each stage of a ResNet
    image_size: Annotated[int, Meta(ge=1, le=16_384)] | list[Annotated[int, Meta(ge=1, le=16_384)]]


class _ModelConfig(TypedDict):
    """The entries that every model of open_clip needs; it may have more."""

    embed_dim: Annotated[int, Meta(ge=1)]
    vision_cfg: _Tower
    text_cfg: _Tower


class _Images(TypedDict, total=False):
    """How the weights expect their images; what is missing is open_clip's default."""

    mean: Annotated[list[Mean], Meta(min_length=3, max_length=3)]
    std: Annotated[list[Deviation], Meta(min_length=3, max_length=3)]
    interpolation: str
    resize_mode: Literal["shortest", "longest", "squash"]


class _HubImages(TypedDict, total=False):
    """The part of `HUB_CONFIG` that may be missing."""

    preprocess_cfg: _Images


class _HubConfig(_HubImages):
    """The content of `HUB_CONFIG`."""

    model_cfg: _ModelConfig


@dataclass(frozen=True)
class ClipSource:
    """The configuration of an open_clip model, and the file of its weights."""

    name: str  # as the user wrote it
    model_cfg: dict[str, Any]  # open_clip's configuration of both towers
    preprocess_cfg: dict[str, Any]  # how the weights expect their images, in open_clip's words; may lack keys
    weights: Path | None  # None for random weights
    label: str  # the name of the weights in messages
    tokenizer: Callable[[], Tokenizer]  # makes the tokenizer, so that only a zero-shot head needs its package
    theirs: dict[str, Any] | None = None  # the content of `HUB_CONFIG` beside the weights, where `name` is another's


def locate(conf: ModelConf, *, load: bool) -> ClipSource:
    """Find the configuration of `conf.name` and, if `load`, its weights; download what no cache has.

    An unknown name or tag is a UserError that says the known ones; a file that cannot be had is a FileNotFoundError.
    """
    if conf.name == glyphs.CLIP:
        return _bundled(conf, load=load)
    if conf.name.startswith(HUB):
        return _from_hub(conf, load=load)
    return _from_folder(conf, load=load) if conf.name.startswith(FOLDER) else _built_in(conf, load=load)


def _bundled(conf: ModelConf, *, load: bool) -> ClipSource:
    bundle = glyphs.read_bundle(glyphs.CLIP)
    cfg = bundle.config["model_cfg"]
    path = bundle.weights_for(conf, load=load)
    tokenizer = partial(glyphs.clip_tokenizer, cfg["text_cfg"]["context_length"])
    return ClipSource(conf.name, cfg, bundle.config["preprocess_cfg"], path, str(path or "random"), tokenizer)


def _built_in(conf: ModelConf, *, load: bool) -> ClipSource:
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

    name = conf.name.replace("/", "-")  # OpenAI's own names have a slash: ViT-B/16
    cfg = open_clip.get_model_config(name)
    if cfg is None:
        raise UserError(_unknown_name(conf.name, open_clip.list_models()))
    tags = open_clip.list_pretrained_tags_by_model(name)
    preprocess: dict[str, Any] = get_pretrained_cfg(name, tags[0]) if tags else {}
    path, label, theirs = None, conf.pretrained, None
    if conf.pretrained == "none":
        label = "random"
    elif open_clip.pretrained.is_pretrained_cfg(name, conf.pretrained):
        preprocess = get_pretrained_cfg(name, conf.pretrained)
        # Two weights of one name may differ in this: OpenAI's of ViT-B-16 need the quick GELU, LAION's do not.
        cfg["quick_gelu"] = cfg.get("quick_gelu", False) or preprocess.get("quick_gelu", False)
        if load:
            with downloads(f"weights '{conf.pretrained}' of {name}"):
                path = Path(download_pretrained(preprocess))
    elif conf.pretrained.startswith(HUB):
        repository = conf.pretrained.partition(":")[2]
        theirs = _read_hub_config(repository)
        path = _hub_weights(repository) if load else None
    elif weight_files.is_path(conf.pretrained):
        path = weight_files.path_of(conf.pretrained) if load else None
        if path is not None and is_openais(path) and not cfg.get("quick_gelu", False):
            # An error, and no silent change: a resumed run may no longer have the file, only the name.
            mend = f"model.name={name}-quickgelu"
            raise UserError(f"{path} is one of OpenAI's own archives, whose models use the quick GELU: {mend}")
        theirs = _config_beside(path)
    else:
        raise UserError(unknown_tag(conf, conf.pretrained, [*tags, "hf-hub:OWNER/NAME"]))
    preprocess = preprocess if theirs is None else theirs["preprocess_cfg"]
    return ClipSource(conf.name, cfg, preprocess, path, label, partial(_tokenizer, name, cfg), theirs)


def _from_hub(conf: ModelConf, *, load: bool) -> ClipSource:
    repository = conf.name.partition(":")[2]
    config = _read_hub_config(repository)
    path, label, theirs = None, "random", None
    # `bundled` is the default of model.pretrained: the user named no other weights than the repository's.
    if conf.pretrained == "bundled":
        path, label = _hub_weights(repository) if load else None, repository
    elif weight_files.is_path(conf.pretrained):
        path, label = weight_files.path_of(conf.pretrained) if load else None, conf.pretrained
        theirs = _config_beside(path)
    elif conf.pretrained != "none":
        problem = f"model.pretrained={conf.pretrained} would be ignored: model.name={conf.name} brings its own weights"
        raise UserError(f"{problem}; leave it out, or use none or a path")
    tokenizer = partial(_tokenizer, f"hf-hub:{repository}", config["model_cfg"])
    images = (theirs or config)["preprocess_cfg"]
    return ClipSource(conf.name, config["model_cfg"], images, path, label, tokenizer, theirs)


def _from_folder(conf: ModelConf, *, load: bool) -> ClipSource:
    from open_clip.factory import _find_checkpoint_in_dir

    folder = Path(conf.name.partition(":")[2]).expanduser()
    if not (folder / HUB_CONFIG).is_file():
        missing = f"{folder / HUB_CONFIG} not found; such a folder holds it and the weights"
        raise FileNotFoundError(f"model.name={conf.name}: {missing}")
    config = _read_config(folder / HUB_CONFIG, str(folder))
    path, theirs = None, None
    if load and weight_files.is_path(conf.pretrained):
        path = weight_files.path_of(conf.pretrained)
        theirs = _config_beside(path)
    elif load and conf.pretrained != "none":
        with quiet_upstream():
            found = _find_checkpoint_in_dir(folder)
        if found is None:
            raise FileNotFoundError(f"model.name={conf.name}: no .safetensors, .bin or .pth file in {folder}")
        path = Path(found)
    tokenizer = partial(_tokenizer, f"{FOLDER}{folder}", config["model_cfg"])
    images, label = (theirs or config)["preprocess_cfg"], str(path or "random")
    return ClipSource(conf.name, config["model_cfg"], images, path, label, tokenizer, theirs)


def _config_beside(path: Path | None) -> dict[str, Any] | None:
    """The `HUB_CONFIG` beside a file of weights; None where there is none."""
    place = None if path is None else path.with_name(HUB_CONFIG)
    return _read_config(place, str(place.parent)) if place is not None and place.is_file() else None


def tower_of_weights(path: Path) -> tuple[NetworkConfig | None, Path]:
    """What shapes do not show of the image tower of open_clip's weights, and the file that says it.

    None where that file is missing. OpenAI's own archives say it themselves: their models use the quick GELU.
    """
    if is_openais(path):
        return NetworkConfig(hidden_act="quick_gelu"), path
    config, place = _config_beside(path), path.with_name(HUB_CONFIG)
    if config is None:
        return None, place
    vision = config["model_cfg"]["vision_cfg"]
    found = NetworkConfig(hidden_act="quick_gelu" if config["model_cfg"].get("quick_gelu") else "gelu")
    if "width" in vision and not isinstance(vision.get("layers"), list):
        found["num_attention_heads"] = vision["width"] // vision.get("head_width", 64)
    return found, place


def check_beside(source: ClipSource, conf: ModelConf) -> None:
    """Raise a UserError where the `HUB_CONFIG` of the weights describes another model than the one that is built.

    Only entries are compared that change what a model computes and not the shapes of its tensors.
    """
    if source.theirs is None or source.weights is None:
        return
    theirs, ours = source.theirs["model_cfg"], source.model_cfg
    pairs = [("quick_gelu", bool(theirs.get("quick_gelu")), bool(ours.get("quick_gelu")))]
    if not conf.image_size:
        pairs.append(("image_size", *(cfg["vision_cfg"].get("image_size", 224) for cfg in (theirs, ours))))
    for word, wanted, built in pairs:
        if wanted != built:
            raise misfit_beside(source, conf, f"has {word}={wanted} and {conf.name} has {built}")


def misfit_beside(source: ClipSource, conf: ModelConf, problem: str) -> UserError:
    """The error for weights whose `HUB_CONFIG` describes another model than the one that is built."""
    is_hub = conf.pretrained.startswith(HUB) or source.weights is None
    name = conf.pretrained if is_hub else f"{FOLDER}{source.weights.parent}"  # type: ignore[union-attr]
    mend = f"use model.name={name}, without model.pretrained"
    return UserError(f"model.pretrained={conf.pretrained}: the {HUB_CONFIG} of these weights {problem}; {mend}")


def _hub_weights(repository: str) -> Path:
    from open_clip.pretrained import download_pretrained_from_hf

    with downloads(f"weights of {repository}"):
        return Path(download_pretrained_from_hf(repository))


def _read_hub_config(repository: str) -> dict[str, Any]:
    from open_clip.pretrained import download_pretrained_from_hf

    with downloads(f"{HUB_CONFIG} of {repository}"):
        path = download_pretrained_from_hf(repository, filename=HUB_CONFIG)
    return _read_config(Path(path), repository)


def _read_config(path: Path, place: str) -> dict[str, Any]:
    """The configuration that a stranger wrote for a model; `place` is its repository or folder, for the error."""
    try:
        config = parse_json(read_file(path, limit=MAX_CONFIG, follow=True), _HubConfig)  # a hub's cache holds links
    except UnfitError as error:
        raise UserError(f"{place}: its {HUB_CONFIG} describes no open_clip model: {error}") from error
    return {"preprocess_cfg": {}, **config}


def _tokenizer(name: str, model_cfg: dict[str, Any]) -> Tokenizer:
    """open_clip's tokenizer of a model; code that a repository brings for its tokenizer never runs."""
    import open_clip

    # Ahead of the repository's own `tokenizer_kwargs`, which may ask for the opposite.
    options = {"trust_remote_code": False} if model_cfg["text_cfg"].get("hf_tokenizer_name") else {}
    try:
        with downloads(f"the tokenizer of {name}"):
            return open_clip.get_tokenizer(name, **options)  # type: ignore[no-any-return]
    except ImportError as error:
        problem = f"{name} reads text with a Hugging Face tokenizer, which needs the package transformers"
        raise UserError(f"{problem}: pip install 'finetune[transformers]', or use model.head=random") from error


def _unknown_name(name: str, names: list[str]) -> str:
    import timm

    if name == glyphs.VIT or timm.is_model(name.partition(".")[0]):
        return f"model.name={name} is a timm model, not a CLIP: use model=vit model.name={name}"
    families = f"{', '.join(names[:6])}, ... ({len(names)} in all: open_clip.list_models())"
    problem = f"open_clip knows no such model{nearest(name, [*names, glyphs.CLIP])}"
    return f"model.name={name}: {problem}; it knows {families}"
