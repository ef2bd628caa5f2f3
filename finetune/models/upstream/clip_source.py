"""Where an open_clip model comes from: the package itself, open_clip's list, a hub or a folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config import ModelConf, nearest
from finetune.models.heads.zeroshot import Tokenizer
from finetune.models.upstream import glyphs, weight_files
from finetune.models.upstream.downloads import downloads, quiet_upstream
from finetune.models.upstream.network import FOLDER, HUB, unknown_tag
from finetune.system.errors import UserError

HUB_CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class ClipSource:
    """The configuration of an open_clip model, and the file of its weights.

    Attributes:
        name: The model's name as the user wrote it.
        model_cfg: open_clip's configuration of both towers.
        preprocess_cfg: How the weights expect their images, in open_clip's words; may lack keys.
        weights: The file, or None for random weights.
        label: The name of the weights in messages.
        tokenizer: Makes the tokenizer.
    """

    name: str
    model_cfg: dict[str, Any]
    preprocess_cfg: dict[str, Any]
    weights: Path | None
    label: str
    tokenizer: Callable[[], Tokenizer]


def locate(conf: ModelConf, *, load: bool) -> ClipSource:
    """Find configuration and weights of `conf.name` and `conf.pretrained`; download them if no cache has them.

    Args:
        conf: The model's settings.
        load: Whether the weights are needed; the configuration is found in any case.

    Raises:
        UserError: A name or tag that open_clip does not know; the error says which ones it knows.
        FileNotFoundError: A file that does not exist or cannot be downloaded.
    """
    if conf.name == glyphs.CLIP:
        return _bundled(conf, load=load)
    if conf.name.startswith(HUB):
        return _from_hub(conf, load=load)
    if conf.name.startswith(FOLDER):
        return _from_folder(conf, load=load)
    return _built_in(conf, load=load)


def _bundled(conf: ModelConf, *, load: bool) -> ClipSource:
    bundle = glyphs.read_bundle(glyphs.CLIP)
    cfg = bundle.config["model_cfg"]
    path = bundle.weights_for(conf, load=load)
    length = cfg["text_cfg"]["context_length"]
    label = str(path or "random")
    preprocess_cfg = bundle.config["preprocess_cfg"]
    return ClipSource(conf.name, cfg, preprocess_cfg, path, label, lambda: glyphs.clip_tokenizer(length))


def _built_in(conf: ModelConf, *, load: bool) -> ClipSource:
    import open_clip
    from open_clip.pretrained import download_pretrained, get_pretrained_cfg

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
        # Two weights of one name may differ in this: OpenAI's of ViT-B-16 need the quick GELU, LAION's do not.
        cfg["quick_gelu"] = cfg.get("quick_gelu", False) or preprocess.get("quick_gelu", False)
        if load:
            with downloads(f"weights '{conf.pretrained}' of {name}"):
                path = Path(download_pretrained(preprocess))
    elif conf.pretrained.startswith(HUB):
        repository = conf.pretrained.partition(":")[2]
        preprocess = _read_hub_config(repository)["preprocess_cfg"]
        path = _hub_weights(repository) if load else None
    elif weight_files.is_path(conf.pretrained):
        path = weight_files.path_of(conf.pretrained) if load else None
        if path is not None and weight_files.is_torchscript(path) and not cfg.get("quick_gelu", False):
            # An error, and no silent change: a resumed run may no longer have the file, only the name.
            raise UserError(
                f"{path} is one of OpenAI's own archives, whose models use the quick GELU: model.name={name}-quickgelu"
            )
    else:
        raise UserError(unknown_tag(conf, conf.pretrained, [*tags, "hf-hub:OWNER/NAME"]))
    return ClipSource(conf.name, cfg, preprocess, path, label, _tokenizer_of(name))


def _from_hub(conf: ModelConf, *, load: bool) -> ClipSource:
    repository = conf.name.partition(":")[2]
    config = _read_hub_config(repository)
    path, label = None, "random"
    # `bundled` is the default of model.pretrained: the user named no other weights than the repository's.
    if conf.pretrained == "bundled":
        path, label = _hub_weights(repository) if load else None, repository
    elif weight_files.is_path(conf.pretrained):
        path, label = weight_files.path_of(conf.pretrained) if load else None, conf.pretrained
    elif conf.pretrained != "none":
        raise UserError(
            f"model.pretrained={conf.pretrained} would be ignored: model.name={conf.name} brings its own weights;"
            " leave it out, or use none or a path"
        )
    return _from_config(conf, config, path, label, f"hf-hub:{repository}")


def _from_folder(conf: ModelConf, *, load: bool) -> ClipSource:
    from open_clip.factory import _find_checkpoint_in_dir

    folder = Path(conf.name.partition(":")[2]).expanduser()
    if not (folder / HUB_CONFIG).is_file():
        raise FileNotFoundError(
            f"model.name={conf.name}: {folder / HUB_CONFIG} not found; such a folder holds it and the weights"
        )
    config = json.loads((folder / HUB_CONFIG).read_text(encoding="utf-8"))
    path = None
    if load and weight_files.is_path(conf.pretrained):
        path = weight_files.path_of(conf.pretrained)
    elif load and conf.pretrained != "none":
        with quiet_upstream():
            found = _find_checkpoint_in_dir(folder)
        if found is None:
            raise FileNotFoundError(f"model.name={conf.name}: no .safetensors, .bin or .pth file in {folder}")
        path = Path(found)
    return _from_config(conf, config, path, str(path or "random"), f"{FOLDER}{folder}")


def _from_config(conf: ModelConf, config: dict[str, Any], path: Path | None, label: str, home: str) -> ClipSource:
    """A model as its `open_clip_config.json` describes it; `home` is where open_clip finds the tokenizer."""
    return ClipSource(conf.name, config["model_cfg"], config["preprocess_cfg"], path, label, _tokenizer_of(home))


def _hub_weights(repository: str) -> Path:
    from open_clip.pretrained import download_pretrained_from_hf

    with downloads(f"weights of {repository}"):
        return Path(download_pretrained_from_hf(repository))


def _read_hub_config(repository: str) -> dict[str, Any]:
    from open_clip.pretrained import download_pretrained_from_hf

    with downloads(f"{HUB_CONFIG} of {repository}"):
        path = download_pretrained_from_hf(repository, filename=HUB_CONFIG)
    config: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    if "model_cfg" not in config:
        raise UserError(f"{repository}: its {HUB_CONFIG} has no model_cfg, so this is no open_clip model")
    return {"preprocess_cfg": {}, **config}


def _tokenizer_of(name: str) -> Callable[[], Tokenizer]:
    """A function that makes the tokenizer, so that only a zero-shot head needs it."""

    def make() -> Tokenizer:
        import open_clip

        try:
            with downloads(f"the tokenizer of {name}"):
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
