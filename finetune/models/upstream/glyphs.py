"""The two small models that come with the package, made by `scripts/pretrain_glyphs.py` from rendered glyphs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.models.heads.head import Tokenizer

FOLDER = Path(__file__).parent.parent / "bundled"
CLIP = "glyph_clip"
VIT = "glyph_vit"
DESCRIPTIONS = {
    CLIP: "glyph_clip: a small CLIP pretrained on rendered glyphs, bundled for offline use;"
    " real ones: model.name=ViT-B-16 model.pretrained=openai",
    VIT: "glyph_vit: a small ViT pretrained on rendered glyphs, bundled for offline use;"
    " real ones: model.name=vit_base_patch16_224 model.pretrained=augreg_in21k",
}


@dataclass(frozen=True)
class Bundle:
    """A bundled model: what to build, and where its weights are.

    Attributes:
        config: What stands in the json file beside the weights.
        weights: Half-precision tensors by upstream's names.
    """

    config: dict[str, Any]
    weights: Path


def read_bundle(name: str) -> Bundle:
    """The bundled model of this name.

    Raises:
        FileNotFoundError: The package was installed without its data files.
    """
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: this installation lacks its bundled weights; install finetune again"
        )
    return Bundle(json.loads(path.read_text(encoding="utf-8")), FOLDER / f"{name}.safetensors")


def clip_tokenizer(context_length: int) -> Tokenizer:
    """open_clip's own tokenizer over the bundled CLIP's small vocabulary; gives (texts, context_length) int64."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer: Tokenizer = SimpleTokenizer(bpe_path=str(FOLDER / "glyph_bpe.txt.gz"), context_length=context_length)
    return tokenizer
