"""open_clip's models: build both towers or the image tower alone, and load their weights."""

import contextlib
import copy
import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from finetune.config import ModelConf
from finetune.core.preprocess import Preprocess
from finetune.models.upstream import glyphs, network, weight_files
from finetune.models.upstream.beside import Beside, read_beside
from finetune.models.upstream.candidates import Converted, Found, find_weights, has_complete
from finetune.models.upstream.clip_source import ClipSource, check_beside, misfit_beside
from finetune.models.upstream.comparing import differences
from finetune.models.upstream.downloads import quiet_upstream
from finetune.models.upstream.jax_archives import is_archive, whole_archive
from finetune.models.upstream.layouts import Layout, StateDict, Wanted, shown
from finetune.models.upstream.network import Upstream
from finetune.models.upstream.skip_init import SkipInit
from finetune.models.upstream.stems import check_archive_stem, first_convolution, fit_stem, set_channels
from finetune.models.upstream.tracing import traced
from finetune.models.upstream.transformers_tables import transformers_layouts
from finetune.system.errors import UserError


def read(conf: ModelConf, source: ClipSource, *, load: bool, with_text: bool) -> Upstream:
    """An open_clip model with the weights of `source`, or random ones unless `load`; see `build_model` for the errors.

    Without `with_text` only the image tower is built; `net` holds it as `visual`.
    """
    from open_clip.timm_model import TimmModel

    path = source.weights if load else None
    is_jax = path is not None and is_archive(path)
    # A file replaces every value, except a JAX archive: that is read without a check for missing names.
    with SkipInit() if path is not None and not is_jax else contextlib.nullcontext():
        cfg = _with_drop_path(source.model_cfg, conf)
        # open_clip's reader of a JAX archive fills both towers.
        clip = _constructed(source, cfg, conf.image_size, whole=with_text or is_jax)
        set_channels(clip.get_submodule("visual"), conf.in_channels)
    saved, note = weight_files.read_metadata(path), ""
    beside = Beside(saved.changes)
    beside.network.put_into(clip)
    if path is not None and is_jax:
        _load_jax(clip, path, source)
    elif path is not None:
        with weight_files.fitting(source.label, source.name):
            found = _find(clip, weight_files.read_state_dict(path), conf.pretrained_key, source.label)
            state = _as_open_clip(clip, found.state)
            stem = fit_stem(state, clip.get_submodule("visual"), "visual.")
            weight_files.load_strictly(clip, state, source=source.label)
        if found.program:
            beside = read_beside(path, found.program, clip, beside)
        elif saved.preprocess is None:
            check_beside(source, conf)
            _check_structure(source, conf, with_text=with_text)
        note = found.note + stem + beside.note
    if path is not None:
        weight_files.check_finite(clip, source.label)
    if conf.image_size and isinstance(clip.visual, TimmModel):
        clip.visual.set_input_size(conf.image_size)  # timm resizes the position embeddings that were loaded
    preprocess = beside.preprocess(_preprocess(source, conf), conf.image_size)
    text = network.describe(source.name, "an image tower of open_clip", source.label, preprocess) + note
    if source.weights is not None and source.weights.parent == glyphs.FOLDER and source.name == glyphs.CLIP:
        text = glyphs.read_bundle(glyphs.CLIP).description
    return Upstream(clip, preprocess, text, changes=beside.network)


def _with_drop_path(cfg: dict[str, Any], conf: ModelConf) -> dict[str, Any]:
    """The configuration with `model.drop_path` in it; only image towers from timm, SigLIP's for example, have it."""
    if not conf.drop_path:
        return cfg
    if "timm_model_name" not in cfg["vision_cfg"]:
        problem = f"the image tower of {conf.name} is open_clip's own and has no drop path; leave it 0"
        raise UserError(f"model.drop_path={conf.drop_path} would be ignored: {problem}")
    return {**cfg, "vision_cfg": {**cfg["vision_cfg"], "timm_drop_path": conf.drop_path}}


def _constructed(source: ClipSource, cfg: dict[str, Any], image_size: int, *, whole: bool) -> nn.Module:
    """`_construct`; a UserError where a configuration from elsewhere describes no model."""
    try:
        return _construct(cfg, image_size, whole=whole)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError) as error:
        if not source.name.startswith((*network.HUB, network.FOLDER)):
            raise
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{source.name}: its configuration describes no model of open_clip ({reason})") from error


def _construct(cfg: dict[str, Any], image_size: int, *, whole: bool) -> nn.Module:
    """The model without loaded weights: both towers where `whole`, else the image tower alone as `visual`."""
    from open_clip.coca_model import CoCa
    from open_clip.model import CLIP, CLIPVisionCfg, CustomTextCLIP, _build_vision_tower

    cfg = copy.deepcopy(cfg)
    vision = CLIPVisionCfg(**cfg["vision_cfg"])
    if image_size:
        if not vision.timm_model_name and isinstance(vision.layers, int):
            network.check_patches(image_size, vision.patch_size)
        vision.image_size = cfg["vision_cfg"]["image_size"] = image_size
    network.side_of(vision.image_size, "this model")
    vision.timm_model_pretrained = cfg["vision_cfg"]["timm_model_pretrained"] = False  # our own reader loads weights
    vision.output_tokens = cfg["vision_cfg"]["output_tokens"] = False  # else CoCa's image tower returns a tuple
    custom = cfg.pop("custom_text", False) or "hf_model_name" in cfg["text_cfg"]
    if not whole:
        tower = nn.Module()
        tower.visual = _build_vision_tower(cfg["embed_dim"], vision, cfg.get("quick_gelu", False))
        return tower
    if "hf_model_name" in cfg["text_cfg"]:
        cfg["text_cfg"]["hf_model_pretrained"] = False  # the file of the whole model has the text tower's weights too
    kind = CoCa if custom and "multimodal_cfg" in cfg else CustomTextCLIP if custom else CLIP
    return kind(**cfg)  # type: ignore[no-any-return]


def _check_structure(source: ClipSource, conf: ModelConf, *, with_text: bool) -> None:
    """Raise a UserError where the configuration of the weights describes towers that compute something else.

    Towers of other heads, pooling or activation may have the same tensors.
    """
    if source.theirs is None or source.theirs["model_cfg"] == source.model_cfg:
        return
    cfgs = [source.theirs["model_cfg"], source.model_cfg]
    whole = with_text and not any("hf_model_name" in cfg["text_cfg"] for cfg in cfgs)
    elsewhere = dataclasses.replace(source, name=f"{network.FOLDER}{source.label}")
    with torch.device("meta"):
        theirs, ours = (_constructed(elsewhere, cfg, conf.image_size, whole=whole) for cfg in cfgs)
    if found := differences(theirs, ours):
        raise misfit_beside(source, conf, f"describes other towers than {conf.name} has: {shown(found, 3)}")


def _load_jax(clip: nn.Module, path: Path, source: ClipSource) -> None:
    """Read both towers from a big_vision archive, the format in which Google publishes SigLIP."""
    from open_clip.convert import load_big_vision_weights

    if first_convolution(clip.get_submodule("visual"))[1].in_channels != 3:
        raise UserError(f"{source.label} is for images of three channels, so leave model.in_channels at 3")
    check_archive_stem(weight_files.check_npz(path), clip.get_submodule("visual"), path)
    with weight_files.fitting(source.label, source.name), whole_archive(path) as reading:
        load_big_vision_weights(clip, str(path))
    reading.check(clip)


def _find(clip: nn.Module, tensors: StateDict, key: str | None, label: str) -> Found:
    """The weights of both towers, or of the image tower alone where `clip` has no other, under open_clip's names."""
    from open_clip.convert import convert_state_dict

    visual = clip.get_submodule("visual")
    tower = Wanted.by(visual).under("visual.")
    # Below any prefix: that of a whole CLIP (`visual.`) or none, where a file holds model.visual.state_dict() alone.
    tower_layouts = [Layout.own(tower, lambda name: name.removeprefix("visual.")), *transformers_layouts(tower)]

    def convert(group: StateDict) -> Converted | None:
        """The tensors of Apple's MobileCLIP, whose names open_clip changes by itself."""
        if not any(name.startswith("image_encoder.") for name in group):
            return None

        def kept(state: StateDict) -> list[Tensor]:
            return [tensor for name, tensor in state.items() if name in wanted.shapes]

        state, used = traced(group, partial(convert_state_dict, clip, group), kept)
        state = {name: tensor for name, tensor in state.items() if name in wanted.shapes}
        return Converted(state, used) if state.keys() == wanted.shapes.keys() else None

    if {name for name, _ in clip.named_children()} == {"visual"}:
        wanted = tower
        return find_weights(tensors, tower, tower_layouts, key=key, source=label, convert=convert)
    wanted = Wanted.by(clip)
    layouts = [Layout.own(wanted), *transformers_layouts(wanted)]
    if "text" in wanted.known:
        # Older files of such models have the text tower's tensors beside the image tower.
        layouts.append(Layout.own(wanted, lambda name: name.removeprefix("text.")))
    if not has_complete(tensors, wanted, layouts) and has_complete(tensors, tower, tower_layouts):
        raise UserError(f"{label} has an image tower only, so no zero-shot head can be made: use model.head=random")
    return find_weights(tensors, wanted, layouts, key=key, source=label, convert=convert)


def _as_open_clip(clip: nn.Module, state: StateDict) -> StateDict:
    """The weights with position embeddings resized to the model's grid."""
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    # The steps are those of open_clip's `load_checkpoint`, which takes a file and no tensors.
    _resize_attention_pool(state, clip)
    # A table that cannot be resized belongs to another model: the strict load that follows reports it with its name.
    misfit = contextlib.suppress(AssertionError, RuntimeError)
    with quiet_upstream():
        with misfit:
            resize_pos_embed(state, clip)
        if {name for name, _ in clip.named_children()} == {"visual"}:
            return state
        state.pop("text.transformer.embeddings.position_ids", None)  # old versions of transformers wrote this
        with misfit:
            resize_text_pos_embed(state, clip)
    for name, parameter in clip.named_parameters(recurse=False):
        if name in ("logit_scale", "logit_bias") and name in state:
            state[name] = state[name].reshape(parameter.shape)
    return state


def _resize_attention_pool(state: StateDict, clip: nn.Module) -> None:
    """Resize the position embeddings in the pooling of CLIP's ResNets, in place; bicubic, as open_clip does in ViTs."""
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


def _preprocess(source: ClipSource, conf: ModelConf) -> Preprocess:
    from open_clip.model import CLIPVisionCfg
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    saved = weight_files.read_metadata(source.weights).preprocess
    size = conf.image_size or network.side_of(CLIPVisionCfg(**source.model_cfg["vision_cfg"]).image_size, conf.name)
    if saved is not None:
        return dataclasses.replace(saved, size=size)
    cfg = merge_preprocess_dict(PreprocessCfg(), source.preprocess_cfg)
    mean, std = (tuple(float(value) for value in cfg[key]) for key in ("mean", "std"))
    interpolation = network.interpolation_of(cfg["interpolation"])
    return Preprocess(size, mean, std, interpolation, network.RESIZE[cfg["resize_mode"]])  # type: ignore[arg-type]
