"""`train.compile`: the layers that training steps run, as one program that torch compiles."""

import logging
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from finetune.config import CompileMode
from finetune.core.layers import LayeredModel
from finetune.system.errors import UserError

logger = logging.getLogger("finetune")


def compiled(
    model: LayeredModel, mode: CompileMode, *, batch_size: int, device: torch.device
) -> Callable[[Tensor, int], Tensor] | None:
    """The function of `train.compile` that runs the model in training steps; None for `none`.

    Batches of `batch_size` images run compiled, and a short last batch uncompiled: another size would be compiled anew,
    which takes a minute. On CUDA `max-autotune` also records CUDA graphs. Freeze the model first. Code for a CPU needs
    a C++ compiler; without one there is a UserError.
    """
    if mode == CompileMode.none:
        return None
    wanted = os.environ.get("CXX", "g++")
    if device.type == "cpu" and not (shutil.which(wanted) or shutil.which("clang++")):
        mend = "install one (such as the package g++), set CXX, or use train.compile=none"
        raise UserError(f"train.compile={mode} on a CPU needs a C++ compiler, and there is no {wanted}: {mend}")
    # Torch compiles at most eight variants of a function and then runs it uncompiled without a word. Without a reset
    # the ninth job of a sweep would train uncompiled.
    torch.compiler.reset()
    logger.info("train.compile=%s: the first steps take a minute or more", mode)
    records_graphs = mode == CompileMode.max_autotune
    forward = torch.compile(model.forward, mode="max-autotune" if records_graphs else None, dynamic=False)

    def run(inputs: Tensor, start: int) -> Tensor:
        if len(inputs) != batch_size:
            return model(inputs, start=start)  # type: ignore[no-any-return]
        if records_graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return forward(inputs, start)

    return run
