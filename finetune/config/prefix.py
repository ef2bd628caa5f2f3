"""Every setting of the frozen prefix: where its activations are kept between epochs, and in which precision.

Part of the configuration in `config.py`, on a page of its own; standard library only.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetune.config.fields import Choice, changed, setting


class PrefixCache(Choice):
    """Where the output of the frozen layers is kept, so that they run once and not in every epoch."""

    auto = "auto"
    none = "none"
    ram = "ram"
    device = "device"
    disk = "disk"


class PrefixDtype(Choice):
    """What activations are rounded to at the boundary, kept or not."""

    auto = "auto"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


@dataclass
class PrefixConf:
    """The frozen layers, run once an image and view instead of once an epoch; see `optim.fix_layer`."""

    cache: PrefixCache = setting(
        PrefixCache.auto,
        "keep what the frozen layers give, in ram, on the device or on disk; auto: where it fits, if it pays; same run",
    )
    dtype: PrefixDtype = setting(
        PrefixDtype.auto,
        "precision at the boundary, kept or not; auto: fp32 in fp32 runs, else fp16 (bf16 where they overflow or are)",
    )
    max_gib: float = setting(
        50.0, "largest size of all activations kept on disk, GiB; those used longest ago make room", above=0
    )


def prefix_problems(prefix: PrefixConf, fix_layer: int) -> list[str]:
    """Settings that would be ignored, one line each."""
    problems = []
    if fix_layer < 0:
        why = "nothing is frozen; set optim.fix_layer, such as optim.fix_layer=9"
        for name, value in changed(prefix, "cache", "dtype").items():
            if value != PrefixCache.none:
                problems.append(f"prefix.{name}={value} would be ignored: {why}")
    if changed(prefix, "max_gib") and (fix_layer < 0 or prefix.cache not in (PrefixCache.auto, PrefixCache.disk)):
        problems.append(f"prefix.max_gib={prefix.max_gib:g} would be ignored: only a cache on disk is bounded by it")
    return problems
