"""Forms of weights that no network takes as they are: with adapters, in pieces, in few bits, with joined matrices.

Their names give them away. Without this page such a file would be 'another model', or, worse, the part that changes
what the network computes would be left out.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from finetune.models.upstream.layouts import StateDict, shown


@dataclass(frozen=True)
class Form:
    """A form of weights, how its names look, and what a person can do."""

    pattern: re.Pattern[str]
    what: str  # after 'holds'
    mend: str
    is_learned: bool = False  # tensors of whole numbers, such as the ids of a text, are not meant


def _named(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern, re.IGNORECASE)


WITHOUT = "if the network is meant without them, save a file without these names"
ZERO = "run `python zero_to_fp32.py . FOLDER`, which DeepSpeed has put beside it, and name that folder"
WHOLE = " for real numbers"  # ends the words about a tensor of whole numbers
FEW_BITS = "save the model dequantized, such as by model.dequantize() of transformers, in half or single precision"
# Wherever these stand in a file, the weights beside them are not the whole of what was trained.
ALWAYS = (
    Form(
        _named(r"(^|\.)lora_\w+(\.|$)"),
        "LoRA adapters beside the weights, which would be left out",
        "merge them into the weights first (peft: model.merge_and_unload()) and save those",
    ),
    Form(
        _named(r"(^|\.)(hada_w\d|lokr_w\d|ia3_l|vera_lambda|vera_[ab]|oft_\w+|boft_\w+|ssf_(scale|shift))\w*(\.|$)"),
        "adapters beside the weights, which would be left out",
        "merge them into the weights first (peft: model.merge_and_unload()) and save those",
    ),
    # SAM's encoder of a person's clicks is a network of its own, which changes no image.
    Form(
        _named(r"(?<![a-z])prompts?(?![a-z])(?!_?encoder)|promptlearner|(^|\.)(ctx\w*|token_prefix|token_suffix)$"),
        "prompts (as those of VPT, CoOp and MaPLe), which change what the network computes and would be left out",
        f"no model here takes them; {WITHOUT}",
        is_learned=True,
    ),
    Form(
        _named(r"(?<![a-z])adapt(ers?|mlp|former)(?![a-z])"),
        "adapters, which change what the network computes and would be left out",
        f"no model here takes them; {WITHOUT}",
        is_learned=True,
    ),
    Form(
        _named(r"(^|\.)_?flat_param(_\d+)?(\.|$)"),
        "weights that FSDP has joined into flat rows, or a part of them",
        "save it again where it was trained, with StateDictType.FULL_STATE_DICT",
    ),
    Form(
        _named(
            r"\.(SCB|weight_format|(nested_)?absmax|(nested_)?quant_map|quant_state(\.\w+)?|qweight|qzeros|g_idx"
            r"|weight_packed|(weight|input|output)_(scale|zero_point)(_inv)?|zero_point|_packed_params|fake_quant_enabled)"
            r"(\.|$)|_fake_quant\."
        ),
        "numbers in few bits with their scales beside them (as bitsandbytes, GPTQ and torchao keep them)",
        FEW_BITS,
    ),
)
# These stand in parts that are left out, too: they explain only why nothing fits.
UNFIT = (
    Form(
        _named(r"(^|\.)parametrizations\.|\.weight_[gv]$"),
        "weights that are computed from other tensors (weight or spectral normalisation)",
        "take it off before saving: torch.nn.utils.parametrize.remove_parametrizations or remove_weight_norm",
    ),
    Form(
        _named(r"\.(weight|bias)_(orig|mask|u)$"),
        "weights that are computed from other tensors (pruning or spectral normalisation)",
        "take it off before saving: torch.nn.utils.prune.remove or remove_spectral_norm",
    ),
)
# Query, key and value: each a matrix of its own, or the three in one.
_EACH = r"(to_|w_?)?(q|k|v|query|key|value)(_proj|_projection|_lin|_linear)?"
APART = _named(rf"(^|\.)({_EACH}\.(weight|bias)|[qkv]_proj_weight|[qkv]_bias)$")
JOINED = _named(r"(^|\.)((to_|w_?)?qkv(_proj)?\.(weight|bias)|in_proj_(weight|bias)|(in_proj|c_attn)\.(weight|bias))$")
# `model-00001-of-00002.safetensors`
SHARD = re.compile(r"-\d+-of-0*(?P<number>\d+)\.\w+$")


def altered(tensors: StateDict, own: Collection[str]) -> str | None:
    """The form of a file whose tensors are not the whole of what was trained, and what to do; None for others.

    `own` are the network's names: a word that they have themselves means nothing in a file.
    """
    for form in ALWAYS:
        if not any(form.pattern.search(name) for name in own):
            for name, tensor in tensors.items():
                if form.pattern.search(name) and (tensor.is_floating_point() or not form.is_learned):
                    return f"holds {form.what} ({shown([name])}): {form.mend}"
    return None


def unfit(tensors: StateDict, missing: Sequence[str], shapes: Sequence[str], source: str) -> str | None:
    """Why the nearest part of a file is not the network, and what to do, where its form is the reason; else None.

    `tensors` are those under the nearest prefix, `missing` the names that the network needs beside them, `shapes` its
    misshapen tensors in words, `source` the file.
    """
    if 2 * sum(tensor.numel() == 0 for tensor in tensors.values()) > len(tensors):
        return f"holds tensors without numbers, as ZeRO 3 leaves them ({shown(list(tensors), 1)}): {ZERO}"
    if shapes and all(words.endswith(WHOLE) for words in shapes):
        return f"holds weights in few bits, without what they mean ({shown(shapes, 1)}): {FEW_BITS}"
    for needed, there, what, mend in (
        (JOINED, APART, "apart", "join them, in this order, by torch.cat along the first dimension"),
        (APART, JOINED, "in one", "divide it by tensor.chunk(3), in this order"),
    ):
        other = next((name for name in tensors if there.search(name)), "")
        if missing and other and all(needed.search(name) for name in missing):
            ours = "in one" if what == "apart" else "apart"
            return f"holds query, key and value {what} ({other}), and this model has them {ours} ({missing[0]}): {mend}"
    for form in UNFIT:
        name = next((name for name in tensors if form.pattern.search(name)), "")
        if missing and name:
            return f"holds {form.what} ({shown([name])}): {form.mend}"
    if missing and (shard := SHARD.search(source)) and int(shard["number"]) > 1:
        return f"is one of {shard['number']} files that hold one set of weights: name their folder or their index"
    return None
