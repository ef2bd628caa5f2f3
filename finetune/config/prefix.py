"""Every setting of the frozen prefix: where its activations are stored between epochs, and in which precision.

Standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.fields import Choice, ignored, setting


class PrefixCache(Choice):
    """Where the output of the frozen layers is stored, so that they run once and not in every epoch."""

    auto = "auto"
    none = "none"
    ram = "ram"
    device = "device"
    disk = "disk"


class PrefixDtype(Choice):
    """The number format of activations between the frozen and the learning layers, stored or not."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


@dataclass
class PrefixConf:
    """The frozen layers, run once an image and view instead of once an epoch; see `optim.fix_layer`."""

    cache: PrefixCache = setting(PrefixCache.auto, "where to store the frozen layers' output; never changes a bit")
    dtype: PrefixDtype = setting(PrefixDtype.auto, "of the frozen layers' output; auto: 32 bit in fp32 runs, else 16")
    max_gib: float = setting(50.0, "activations of all runs may take so much on disk, GiB; see `finetune cache`", gt=0)


def prefix_problems(prefix: PrefixConf, fix_layer: int) -> list[str]:
    """Settings that would be ignored, one line each."""
    reasons: dict[str, str] = {}
    if fix_layer < 0:
        why = "nothing is frozen; set optim.fix_layer, such as optim.fix_layer=9"
        reasons = {"dtype": why} if prefix.cache == PrefixCache.none else {"cache": why, "dtype": why}
    if fix_layer < 0 or prefix.cache not in (PrefixCache.auto, PrefixCache.disk):
        reasons["max_gib"] = "only a cache on disk is bounded by it"
    return ignored("prefix", prefix, reasons)
