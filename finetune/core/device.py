"""The device of a run, its precision, and the switches of torch that its kernels depend on."""

import os
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version

import torch

from finetune import __version__
from finetune.config import Precision
from finetune.system.errors import UserError
from finetune.system.processors import processor_name

# Matrices of at least this width multiply faster in bfloat16 on a CPU that has it (1.5 to 1.9 times at 384 with AMX).
WIDE = 256


def pick_device(word: str) -> torch.device:
    """The device that `device=` names; `auto` takes CUDA, else MPS, else the CPU. A missing one is a UserError."""
    if word == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(word)
    lacks_cuda = device.type == "cuda" and not torch.cuda.is_available()
    if lacks_cuda or (device.type == "mps" and not torch.backends.mps.is_available()):
        kind = "CUDA" if lacks_cuda else "Apple"
        raise UserError(f"device={word}: torch sees no {kind} GPU on this machine; use device=cpu, or device=auto")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={word}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return device


def pick_precision(word: Precision, device: torch.device, *, is_wide: bool) -> torch.dtype:
    """The dtype of the forward and backward pass for `precision=word`: torch.float32, bfloat16 or float16.

    `is_wide` says whether most matrices of the model are at least `WIDE` wide: on a CPU, narrower ones lose more time
    by the casts to bfloat16 than they gain. fp16 and tf32 on another device than CUDA are a UserError.
    """
    if word == Precision.auto:
        has_bf16 = device.type == "cpu" and is_wide and cpu_has_bf16()
        if device.type == "cuda":
            with torch.cuda.device(device):  # torch answers for the current GPU
                # Older GPUs (T4, V100) only emulate bfloat16, slower than float32.
                has_bf16 = bool(torch.cuda.is_bf16_supported(including_emulation=False))
        return torch.bfloat16 if has_bf16 else torch.float32
    if word in (Precision.fp16, Precision.tf32) and device.type != "cuda":
        raise UserError(f"precision={word} needs a CUDA GPU, not {device.type}; use precision=bf16 or fp32")
    return {Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}.get(word, torch.float32)


def computed_in(word: Precision, dtype: torch.dtype) -> str:
    """The number format of matrix products: float32, tf32, bfloat16 or float16; `dtype` is that of `pick_precision`."""
    return str(word) if word == Precision.tf32 else str(dtype).removeprefix("torch.")


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 matrices by instructions of its own: AVX-512 BF16 or AMX."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def set_kernels(word: Precision, dtype: torch.dtype) -> None:
    """Set this process's switches for the precision of fp32 products; `dtype` is that of `pick_precision`."""
    # By torch's defaults convolutions use TF32 (10 bits of mantissa) on CUDA, and matrix products full float32.
    is_tf32 = word == Precision.tf32
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    torch.backends.cudnn.allow_tf32 = is_tf32
    # In evaluation the fast path of `nn.MultiheadAttention` ignores autocast on a CPU, and would compute in float32.
    torch.backends.mha.set_fastpath_enabled(dtype == torch.float32)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the device or the host ran out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def autocast(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[object]:
    """The context of a forward pass; weights and optimizer stay fp32."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype=dtype)


def set_deterministic(wanted: bool) -> None:
    """Forbid kernels whose bits differ from call to call, or allow them again for the next run in this process."""
    if wanted:
        # cuBLAS needs a fixed workspace from before its first use.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(wanted)


def environment(device: torch.device) -> dict[str, str]:
    """Everything beside program and settings that the last bits of a computation depend on, by name, in words."""
    return {
        "finetune": __version__,
        "torch": str(torch.__version__),
        **{name: version(name) for name in ("torchvision", "timm", "open_clip_torch", "numpy", "pillow")},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "processor": f"{processor_name()} ({torch.backends.cpu.get_cpu_capability()})",
        "threads": str(torch.get_num_threads()),
    }
