"""open_clip's models: where their configuration and weights come from, and a classifier made of their image tower.

Bundled, built in, from a hub or a folder, all end as an `Origin`; everything after it is one path.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config import HeadKind, ModelConf, Pool, nearest
from finetune.core.preprocess import Preprocess
from finetune.models.heads.head import Head, Tokenizer, read_class_names, zeroshot_head
from finetune.models.heads.pooling import mean_pool_open_clip
from finetune.models.layering.clip import ClipClassifier, classifier_layers
from finetune.models.layering.towers import open_clip_layers
from finetune.models.upstream import glyphs, weights
from finetune.models.upstream.built import (
    BuiltModel,
    check_patches,
    head_kind,
    layered,
    path_of,
    read_saved,
    square,
    unknown_tag,
)
from finetune.models.upstream.undrawn import Undrawn
from finetune.system.errors import UserError

RESIZE = {"shortest": "crop", "longest": "pad", "squash": "squash"}
HUB = ("hf-hub:", "hf_hub:")
FOLDER = "local-dir:"
HUB_CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
        name: As the user wrote it.
        model_cfg: open_clip's description of both towers.
        preprocess_cfg: What the weights say of their preprocessing, in open_clip's words; may be partial.
        weights: The file, or None for random weights.
        label: What to call the weights in messages.
        tokenizer: Makes the tokenizer.
    """

    name: str
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    weights: Path | None
    label: str
    tokenizer: Callable[[], Tokenizer]


def build(conf: ModelConf, classes: Sequence[str], *, load: bool, device: torch.device) -> BuiltModel:
    """A classifier over the image tower of `conf.name`; the text tower is gone once the head is made.

    Args:
        conf: Which model, weights and head.
        classes: Class names in the order of the labels.
        load: Whether to read the weights; else they, and the head, stay random.
        device: Where the text tower runs and the model ends up; `meta` gives shapes only.

    Raises:
        ValueError: A setting that does not fit this model, or weights that do not.
        FileNotFoundError: Weights that are nowhere to be found.
    """
    kind = head_kind(conf, has_text=True)
    origin = locate(conf, load=load)
    reads_text = kind == HeadKind.zeroshot and load
    names_file = Path(conf.class_names).expanduser() if conf.class_names and reads_text else None
    names = read_class_names(names_file, classes)
    tokenizer = origin.tokenizer() if reads_text else None  # first: it may be missing, and what follows takes long
    whole = reads_text or (load and is_big_vision(origin))
    is_replaced = load and origin.weights is not None and not is_big_vision(origin)  # all of it, see `_load`
    with Undrawn() if is_replaced else contextlib.nullcontext():
        clip = _construct(_with_drop_path(origin.model_cfg, conf), conf.image_size, whole=whole, device=device)
    if load and origin.weights is not None:
        _load(clip, origin)
    _set_size(clip, conf.image_size)
    visual: Any = clip.visual
    if tokenizer is not None:
        head = zeroshot_head(
            clip.to(device), tokenizer, names, conf.templates, dropout=conf.head_dropout, bias=conf.head_bias
        )
    else:
        plain = kind != HeadKind.zeroshot
        with torch.device("meta" if device.type == "meta" else "cpu"):
            width = origin.model_cfg["embed_dim"]
            if conf.pool == Pool.mean:
                width = mean_pool_open_clip(visual, conf.name)
            head = Head(
                width, len(classes), bias=plain or conf.head_bias, normalize=not plain, dropout=conf.head_dropout
            )
    net = ClipClassifier(visual, head)
    model = layered(net, classifier_layers(open_clip_layers(visual))).to(device)
    preprocess = _preprocess(origin, conf)
    return BuiltModel(model.train(), preprocess, _describe(origin, preprocess), has_zeroshot=reads_text)


def locate(conf: ModelConf, *, load: bool) -> Origin:
    """Find configuration and weights of `conf.name` and `conf.pretrained`, downloading what is not in the cache.

    Raises:
        ValueError: A name or tag that open_clip does not know; says which it does.
        FileNotFoundError: What cannot be found or downloaded.
    """
    if conf.name == glyphs.CLIP:
        return _bundled(conf, load=load)
    if conf.name.startswith(HUB):
        return _from_hub(conf, load=load)
    if conf.name.startswith(FOLDER):
        return _from_folder(conf, load=load)
    return _built_in(conf, load=load)


def _bundled(conf: ModelConf, *, load: bool) -> Origin:
    bundle = glyphs.read_bundle(glyphs.CLIP)
    cfg = bundle.config["model_cfg"]
    if conf.pretrained not in ("bundled", "none") and not weights.is_path(conf.pretrained):
        raise UserError(
            f"model.pretrained={conf.pretrained}: {glyphs.CLIP} has the weights bundled, none (random), or a file's;"
            " for an open_clip model say its name too, such as model.name=ViT-B-16 model.pretrained=openai"
        )
    files: dict[str, Path | None] = {"bundled": bundle.weights, "none": None}
    path = files[conf.pretrained] if conf.pretrained in files else path_of(conf.pretrained) if load else None
    length = cfg["text_cfg"]["context_length"]
    label = str(path or "random")
    return Origin(conf.name, cfg, bundle.config["preprocess_cfg"], path, label, lambda: glyphs.clip_tokenizer(length))


def _built_in(conf: ModelConf, *, load: bool) -> Origin:
    import open_clip
    from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg

    name = conf.name.replace("/", "-")  # OpenAI's own names have a slash: ViT-B/16
    cfg = open_clip.get_model_config(name)
    if cfg is None:
        raise UserError(_unknown_name(conf.name, open_clip.list_models()))
    tags = open_clip.list_pretrained_tags_by_model(name)
    preprocess: dict[str, Any] = get_pretrained_cfg(name, tags[0]) if tags else {}
    path, label = None, conf.pretrained
    if conf.pretrained == "none":
        label = "random"
    elif open_clip.pretrained.is_pretrained_cfg(name, conf.pretrained):
        preprocess = get_pretrained_cfg(name, conf.pretrained)
        # The name alone does not tell: OpenAI's weights under ViT-B-16 need it, LAION's under the same name do not.
        cfg["quick_gelu"] = cfg.get("quick_gelu", False) or preprocess.get("quick_gelu", False)
        if load:
            with weights.downloads(f"weights '{conf.pretrained}' of {name}"):
                path = Path(download_pretrained(preprocess))
    elif conf.pretrained.startswith(HUB):
        repository = conf.pretrained.partition(":")[2]
        preprocess = _read_hub_config(repository)["preprocess_cfg"]
        if load:
            with weights.downloads(f"weights of {repository}"):
                path = Path(download_pretrained_from_hf(repository))
    elif weights.is_path(conf.pretrained):
        path = path_of(conf.pretrained) if load else None
        if path is not None and weights.is_torchscript(path) and not cfg.get("quick_gelu", False):
            # Said and not done in silence: the name must tell the same model when the file has gone.
            raise UserError(
                f"{path} is one of OpenAI's own archives, whose models use the quick GELU: model.name={name}-quickgelu"
            )
    else:
        raise UserError(unknown_tag(conf, conf.pretrained, [*tags, "hf-hub:OWNER/NAME"]))
    return Origin(conf.name, cfg, preprocess, path, label, _tokenizer_of(name))


def _from_hub(conf: ModelConf, *, load: bool) -> Origin:
    from open_clip.pretrained import download_pretrained_from_hf

    repository = conf.name.partition(":")[2]
    config = _read_hub_config(repository)
    path, label = None, "random"
    if conf.pretrained != "none":
        # The name says which weights; `bundled` is what an unset model.pretrained reads as.
        if conf.pretrained != "bundled" and not weights.is_path(conf.pretrained):
            raise UserError(
                f"model.pretrained={conf.pretrained} would be ignored: model.name={conf.name} brings its own weights;"
                " leave it out, or use none or a path"
            )
        label = conf.pretrained if conf.pretrained != "bundled" else repository
        if load and conf.pretrained != "bundled":
            path = path_of(conf.pretrained)
        elif load:
            with weights.downloads(f"weights of {repository}"):
                path = Path(download_pretrained_from_hf(repository))
    return Origin(
        conf.name, config["model_cfg"], config["preprocess_cfg"], path, label, _tokenizer_of(f"hf-hub:{repository}")
    )


def _from_folder(conf: ModelConf, *, load: bool) -> Origin:
    from open_clip.factory import _find_checkpoint_in_dir

    folder = Path(conf.name.partition(":")[2]).expanduser()
    if not (folder / HUB_CONFIG).is_file():
        raise FileNotFoundError(
            f"model.name={conf.name}: {folder / HUB_CONFIG} not found; such a folder holds it and the weights"
        )
    config = json.loads((folder / HUB_CONFIG).read_text(encoding="utf-8"))
    path = None
    if load and conf.pretrained != "none":
        with weights.quiet_upstream():
            found = (
                str(path_of(conf.pretrained)) if weights.is_path(conf.pretrained) else _find_checkpoint_in_dir(folder)
            )
        if found is None:
            raise FileNotFoundError(f"model.name={conf.name}: no .safetensors, .bin or .pth file in {folder}")
        path = Path(found)
    label = str(path or "random")
    return Origin(
        conf.name, config["model_cfg"], config["preprocess_cfg"], path, label, _tokenizer_of(f"{FOLDER}{folder}")
    )


def _read_hub_config(repository: str) -> dict[str, Any]:
    from open_clip.pretrained import download_pretrained_from_hf

    with weights.downloads(f"{HUB_CONFIG} of {repository}"):
        path = download_pretrained_from_hf(repository, filename=HUB_CONFIG)
    config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    if "model_cfg" not in config:
        raise UserError(f"{repository}: its {HUB_CONFIG} has no model_cfg, so this is no open_clip model")
    return {"preprocess_cfg": {}, **config}


def _tokenizer_of(name: str) -> Callable[[], Tokenizer]:
    def make() -> Tokenizer:
        import open_clip

        try:
            with weights.downloads(f"the tokenizer of {name}"):
                tokenizer: Tokenizer = open_clip.get_tokenizer(name)
        except ImportError as error:
            raise UserError(
                f"{name} reads text with a Hugging Face tokenizer, which needs the package transformers:"
                " pip install 'finetune[transformers]', or use model.head=random"
            ) from error
        return tokenizer

    return make


def _unknown_name(name: str, names: list[str]) -> str:
    import timm

    if name == glyphs.VIT or timm.is_model(name.partition(".")[0]):
        return f"model.name={name} is a timm model, not a CLIP: use model=vit model.name={name}"
    families = f"{', '.join(names[:6])}, ... ({len(names)} in all: open_clip.list_models())"
    return (
        f"model.name={name}: open_clip knows no such model{nearest(name, [*names, glyphs.CLIP])}; it knows {families}"
    )


def _with_drop_path(cfg: dict[str, Any], conf: ModelConf) -> dict[str, Any]:
    """The description of a model with `model.drop_path` in it.

    Raises:
        ValueError: A tower of open_clip's own: only trunks that come from timm, SigLIP's among them, have drop path.
    """
    if not conf.drop_path:
        return cfg
    if "timm_model_name" not in cfg["vision_cfg"]:
        raise UserError(
            f"model.drop_path={conf.drop_path} would be ignored: the image tower of {conf.name} is open_clip's own and"
            " has no drop path; leave it 0"
        )
    return {**cfg, "vision_cfg": {**cfg["vision_cfg"], "timm_drop_path": conf.drop_path}}


def _construct(cfg: dict[str, Any], image_size: int, *, whole: bool, device: torch.device) -> nn.Module:
    """The model with random weights: both towers where `whole`, else the image tower alone as `visual`."""
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CLIPVisionCfg, CustomTextCLIP, _build_vision_tower

    cfg = copy.deepcopy(cfg)
    vision = CLIPVisionCfg(**cfg["vision_cfg"])
    if image_size:
        if not vision.timm_model_name and isinstance(vision.layers, int):
            check_patches(image_size, vision.patch_size)
        vision.image_size = cfg["vision_cfg"]["image_size"] = image_size
    square(vision.image_size, "this model")
    vision.output_tokens = cfg["vision_cfg"]["output_tokens"] = False  # CoCa's token outputs would make tuples
    custom = cfg.pop("custom_text", False) or "hf_model_name" in cfg["text_cfg"]
    with torch.device("meta" if device.type == "meta" else "cpu"):
        if not whole:
            tower = nn.Module()
            tower.visual = _build_vision_tower(cfg["embed_dim"], vision, cfg.get("quick_gelu", False))
            return tower
        if "hf_model_name" in cfg["text_cfg"]:
            cfg["text_cfg"]["hf_model_pretrained"] = False  # its weights come with the rest
        kind = CoCa if custom and "multimodal_cfg" in cfg else CustomTextCLIP if custom else CLIP
        return kind(**cfg)  # type: ignore[no-any-return]


def is_big_vision(origin: Origin) -> bool:
    """Whether the weights are a JAX archive of both towers, as Google publishes SigLIP."""
    return origin.weights is not None and origin.weights.suffix in (".npz", ".npy")


def _load(clip: nn.Module, origin: Origin) -> None:
    """Read the weights; names and shapes must be exactly those of the model."""
    from open_clip.convert import load_big_vision_weights

    assert origin.weights is not None
    if is_big_vision(origin):
        weights.check_npz(origin.weights)
        try:
            load_big_vision_weights(clip, str(origin.weights))
        except (KeyError, ValueError, OSError, AttributeError, AssertionError, zipfile.BadZipFile) as error:
            raise UserError(f"{origin.label} is no big_vision archive of {origin.name}: {error}") from error
        return
    state = weights.read_state_dict(origin.weights)
    state = _as_open_clip(clip, state, origin.label)
    weights.load_strictly(clip, state, source=origin.label)


def _as_open_clip(clip: nn.Module, state: dict[str, Tensor], label: str) -> dict[str, Tensor]:
    """Other layouts turned into open_clip's, and position embeddings resized to the model's grid.

    The order of open_clip's own `load_checkpoint`, which reads only files.
    """
    from open_clip.convert import convert_state_dict
    from open_clip.model import CLIP, convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed

    own = {name for name, _ in clip.named_children()}
    tower = {name.removeprefix("visual.") for name in clip.state_dict() if name.startswith("visual.")}
    if tower <= state.keys():
        state = {f"visual.{name}": tensor for name, tensor in state.items()}  # model.visual.state_dict(), by itself
    state = convert_state_dict(clip, state)
    _resize_attention_pool(state, clip)
    # What cannot be resized belongs to another model: the strict load that follows says so, with the names.
    misfit = contextlib.suppress(AssertionError, RuntimeError)
    with weights.quiet_upstream():
        with misfit:
            resize_pos_embed(state, clip)
        if own == {"visual"}:
            # Only the image tower was built; a file of ours may hold nothing else but a classifier.
            return {name: tensor for name, tensor in state.items() if name.startswith("visual.")}
        if all(name.startswith(("visual.", "head.")) for name in state):
            raise UserError(f"{label} has an image tower only, so no zero-shot head can be made: use model.head=random")
        if "positional_embedding" in state and not isinstance(clip, CLIP):
            state = convert_to_custom_text_state_dict(state)
        state.pop("text.transformer.embeddings.position_ids", None)  # written by old versions of transformers
        with misfit:
            resize_text_pos_embed(state, clip)
    for name, parameter in clip.named_parameters(recurse=False):
        if name in ("logit_scale", "logit_bias") and name in state:
            state[name] = state[name].reshape(parameter.shape)
    return state


def _resize_attention_pool(state: dict[str, Tensor], clip: nn.Module) -> None:
    """Bicubic, as for ViTs: CLIP's ResNets have position embeddings in their pooling, which open_clip leaves alone."""
    name = "visual.attnpool.positional_embedding"
    wanted = dict(clip.named_parameters()).get(name)
    if wanted is None or name not in state or state[name].shape[1:] != wanted.shape[1:]:
        return
    old, new = (math.isqrt(len(table) - 1) for table in (state[name], wanted))
    mean, grid = state[name][:1], state[name][1:]
    if old != new and old * old == len(grid):
        square_grid = grid.T.reshape(1, -1, old, old)
        resized = F.interpolate(square_grid, (new, new), mode="bicubic", antialias=True, align_corners=False)
        state[name] = torch.cat([mean, resized.flatten(2)[0].T])


def _set_size(clip: nn.Module, image_size: int) -> None:
    """Towers built by timm take their size after the weights, and resize their own position embeddings."""
    from open_clip.timm_model import TimmModel

    if image_size and isinstance(clip.visual, TimmModel):
        clip.visual.set_input_size(image_size)


def _preprocess(origin: Origin, conf: ModelConf) -> Preprocess:
    from open_clip.model import CLIPVisionCfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    saved = read_saved(origin.weights).preprocess
    size = conf.image_size or square(CLIPVisionCfg(**origin.model_cfg["vision_cfg"]).image_size, conf.name)
    if saved is not None:
        return dataclasses.replace(saved, size=size)
    cfg = merge_preprocess_dict(PreprocessCfg(), origin.preprocess_cfg)
    interpolation = cfg["interpolation"] if cfg["interpolation"] in ("bilinear", "bicubic") else "bicubic"
    mean, std = (tuple(float(value) for value in cfg[key]) for key in ("mean", "std"))
    return Preprocess(size, mean, std, interpolation, RESIZE[cfg["resize_mode"]])  # type: ignore[arg-type]


def _describe(origin: Origin, preprocess: Preprocess) -> str:
    if origin.name == glyphs.CLIP and origin.weights is not None and origin.weights.parent == glyphs.FOLDER:
        return glyphs.DESCRIPTIONS[glyphs.CLIP]
    return (
        f"{origin.name}: an image tower of open_clip, weights {origin.label}, images of {preprocess.size} pixels a side"
    )
