"""The settings of the frozen prefix: where its activations are cached, in which precision. Standard library only."""

from dataclasses import dataclass

from finetune.config.fields import Choice, ignored, setting
from finetune.config.optim import OptimConf


class PrefixCache(Choice):
    """Where the activations of the frozen layers are cached, so that these layers do not run in every epoch."""

    auto = "auto"
    none = "none"
    ram = "ram"
    device = "device"
    disk = "disk"


class PrefixDtype(Choice):
    """The number format of the activations that the frozen layers pass to the layers that learn, cached or not."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


@dataclass
class PrefixConf:
    """The frozen layers, which run once for each view of an image where their activations are cached."""

    cache: PrefixCache = setting(PrefixCache.auto, "where to cache the frozen layers' activations; changes no result")
    dtype: PrefixDtype = setting(PrefixDtype.auto, "of these activations; auto: 32 bit in fp32 runs, else 16")
    max_gib: float = setting(50.0, "cache=disk: GiB that the cached activations of all runs may take", gt=0, le=2**30)


def prefix_problems(prefix: PrefixConf, optim: OptimConf) -> list[str]:
    """Settings that would be ignored, one line each."""
    reasons: dict[str, str] = {}
    freezes = optim.fix_layer >= 0 or bool(optim.freeze)
    if not freezes:
        why = "nothing is frozen; set optim.fix_layer, such as optim.fix_layer=9"
        reasons = {"dtype": why} if prefix.cache == PrefixCache.none else {"cache": why, "dtype": why}
    if not freezes or prefix.cache not in (PrefixCache.auto, PrefixCache.disk):
        reasons["max_gib"] = "it bounds a cache on disk only"
    return ignored("prefix", prefix, reasons)
