"""Whether two networks compute the same: those with equal tensors may differ in heads, activations or pooling."""

from enum import Enum
from typing import Any

from torch import nn

from finetune.models.upstream.transformers_config import activation_of

# Attributes that change no output of a trained network at its size; those with `drop` in the name do not either.
NEUTRAL = frozenset(
    [
        "training",
        "inplace",
        "fused_attn",
        "grad_checkpointing",
        "num_classes",
        "dynamic_img_size",
        "dynamic_img_pad",
        "strict_img_size",
    ]
)
PLAIN = (bool, int, float, str, type(None))


def differences(theirs: nn.Module, ours: nn.Module) -> list[str]:
    """In words what one network computes otherwise than the other; empty where they compute the same.

    Their modules are compared by name: kind, and plain values such as the number of heads. Both may be on `meta`.
    """
    first, second = _values(theirs), _values(ours)
    names = [name for name in {**first, **second} if first.get(name, "absent") != second.get(name, "absent")]
    return [f"{name} is {first.get(name, 'absent')} there and {second.get(name, 'absent')} here" for name in names]


def _values(net: nn.Module) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, module in net.named_modules():
        kind = type(module).__name__
        if isinstance(module, nn.Identity) or "Drop" in kind:
            continue
        start = f"{name}." if name else ""
        values[f"{start}type"] = activation_of(module) or kind
        for key, value in vars(module).items():
            is_neutral = key in NEUTRAL or key.startswith("_") or "drop" in key
            if not is_neutral and not activation_of(module) and _is_plain(value):
                values[start + key] = tuple(value) if isinstance(value, list) else value
    return values


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_is_plain(each) for each in value)
    return isinstance(value, (*PLAIN, Enum))
