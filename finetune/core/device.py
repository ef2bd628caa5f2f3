"""Which device computes, and in which precision."""

from __future__ import annotations

import os
import platform
from contextlib import AbstractContextManager, nullcontext

import torch

from finetune.config import Precision
from finetune.system.errors import UserError

# From here on bfloat16 is faster than float32 on a CPU that has it (1.5 to 1.9 times at 384, measured with AMX).
WIDE = 256


def pick_device(word: str) -> torch.device:
    """The device that `device=` names; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        ValueError: This machine has no such device.
    """
    if word == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(word)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise UserError(f"device={word}: torch sees no CUDA GPU on this machine; use device=cpu, or device=auto")
        if device.index is not None and device.index >= count:
            raise UserError(f"device={word}: this machine has cuda:0 to cuda:{count - 1}")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("device=mps: torch sees no Apple GPU on this machine; use device=cpu, or device=auto")
    return device


def pick_precision(word: Precision, device: torch.device, *, is_wide: bool) -> torch.dtype:
    """What forward and backward compute in: torch.float32, bfloat16 or float16.

    Args:
        word: `precision`.
        device: Where it is computed.
        is_wide: Whether the model consists of matrices at least `WIDE` wide: on a CPU narrower ones lose more by the
            casts than they gain.

    Raises:
        ValueError: fp16 or tf32 off CUDA: torch has no loss scaling for the one, and nothing else knows the other.
    """
    if word == Precision.auto:
        on_cpu = device.type == "cpu" and is_wide and cpu_has_bf16()
        return torch.bfloat16 if on_cpu or (device.type == "cuda" and _gpu_has_bf16(device)) else torch.float32
    if word in (Precision.fp16, Precision.tf32) and device.type != "cuda":
        raise UserError(
            f"precision={word} needs a CUDA GPU, and this run is on {device.type}; use precision=bf16 or fp32"
        )
    return {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}.get(word, torch.float32)


def computed_in(word: Precision, dtype: torch.dtype) -> str:
    """What products are computed in, for the record: float32, tf32, bfloat16 or float16.

    Args:
        word: `precision`.
        dtype: What `pick_precision` has made of it; it cannot tell tf32 from float32.
    """
    return str(word) if word == Precision.tf32 else str(dtype).removeprefix("torch.")


def _gpu_has_bf16(device: torch.device) -> bool:
    """Older ones (T4, V100) only emulate it, and are slower by it than in float32. Torch tells of the current GPU."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 matrices by instructions of its own: AVX-512 BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def set_kernels(word: Precision, dtype: torch.dtype) -> None:
    """Settle what torch leaves to chance, for this process.

    On CUDA, fp32 products are computed in full, or with `tf32` by 10 bits of mantissa; torch's own defaults are mixed:
    convolutions in TF32, matrix products in full. And `nn.MultiheadAttention` has a fast path in evaluation, of which
    autocast on a CPU knows nothing: it would compute in fp32 what training computes in bfloat16.

    Args:
        word: `precision`.
        dtype: What `pick_precision` has made of it.
    """
    is_tf32 = word == Precision.tf32
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    torch.backends.cudnn.allow_tf32 = is_tf32
    torch.backends.mha.set_fastpath_enabled(dtype == torch.float32)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host under torch, ran out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass; weights and optimizer stay fp32."""
    if dtype == torch.float32:
        return nullcontext()
    return torch.autocast(device.type, dtype=dtype)


def set_deterministic(wanted: bool) -> None:
    """Whether only kernels run that give the same bits every time; for each run, as the next may not want it.

    cuBLAS needs its workspace fixed before its first use.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)


def environment(device: torch.device) -> dict[str, str]:
    """What the last bits of a computation depend on beside program and settings, in words."""
    from importlib.metadata import version

    import finetune

    processor = f"{_processor() or platform.machine()} ({torch.backends.cpu.get_cpu_capability()})"
    return {
        "finetune": finetune.__version__,
        "torch": str(torch.__version__),
        **{name: version(name) for name in ("torchvision", "timm", "open_clip_torch", "numpy", "pillow")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": processor,
        "threads": str(torch.get_num_threads()),
    }


def _processor() -> str:
    """The processor's name as Linux tells it; empty elsewhere."""
    from pathlib import Path

    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
