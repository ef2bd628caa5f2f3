"""The two small models that come with the package, made by `scripts/pretrain_glyphs.py` from rendered glyphs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config import ModelConf
from finetune.models.heads.zeroshot import Tokenizer
from finetune.models.upstream.weight_files import is_path, path_of
from finetune.system.errors import UserError

FOLDER = Path(__file__).parent.parent / "bundled"
CLIP = "glyph_clip"
VIT = "glyph_vit"
# The library of each bundled model, and an example of a real model of that library.
LIBRARIES = {
    CLIP: ("an open_clip", "model.name=ViT-B-16 model.pretrained=openai"),
    VIT: ("a timm", "model.name=vit_base_patch16_224 model.pretrained=augreg_in21k"),
}


@dataclass(frozen=True)
class Bundle:
    """A bundled model."""

    name: str  # `glyph_clip` or `glyph_vit`
    config: dict[str, Any]  # the content of its json file: arguments of the network, preprocessing, class names
    weights: Path  # half-precision tensors under upstream's names

    @property
    def description(self) -> str:
        """The line about the model with which a run starts."""
        kind = "CLIP" if self.name == CLIP else "ViT"
        origin = f"a small {kind} pretrained on rendered glyphs, bundled for offline use"
        return f"{self.name}: {origin}; real ones: {LIBRARIES[self.name][1]}"

    def weights_for(self, conf: ModelConf, *, load: bool) -> Path | None:
        """The file that `model.pretrained` names; None for random weights or, unless `load`, for a person's file.

        A tag is a UserError, and a missing file a FileNotFoundError.
        """
        if conf.pretrained in ("bundled", "none"):
            return self.weights if conf.pretrained == "bundled" else None
        if not is_path(conf.pretrained):
            library, example = LIBRARIES[self.name]
            problem = f"{self.name} has the weights bundled, none (random), or a file's"
            mend = f"for {library} model say its name too, such as {example}"
            raise UserError(f"model.pretrained={conf.pretrained}: {problem}; {mend}")
        return path_of(conf.pretrained) if load else None


def read_bundle(name: str) -> Bundle:
    """The bundled model of this name; a FileNotFoundError where the package was installed without its data files."""
    path = FOLDER / f"{name}.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: this installation lacks its weights; install finetune again")
    return Bundle(name, json.loads(path.read_text(encoding="utf-8")), FOLDER / f"{name}.safetensors")


def clip_tokenizer(context_length: int) -> Tokenizer:
    """open_clip's tokenizer with the bundled CLIP's small vocabulary: texts -> int64 (texts, context_length)."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer: Tokenizer = SimpleTokenizer(bpe_path=str(FOLDER / "glyph_bpe.txt.gz"), context_length=context_length)
    return tokenizer
