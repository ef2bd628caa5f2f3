"""`train.compile`: the layers that training steps run, as one program that torch compiles."""

from __future__ import annotations

import logging
import os
import shutil

import torch
from torch import Tensor

from finetune.config import CompileMode
from finetune.core.layers import LayeredModel
from finetune.system.errors import UserError

logger = logging.getLogger("finetune")


class CompiledModel:
    """Runs a model in training steps: full batches compiled, a short last batch uncompiled.

    Another batch size would be compiled anew, which takes a minute. On CUDA `max-autotune` also records CUDA graphs.
    """

    def __init__(self, model: LayeredModel, mode: CompileMode, batch_size: int) -> None:
        """Compile `model`, frozen as it will train, for batches of `batch_size` images, at the first call."""
        self._model = model
        self._batch_size = batch_size
        self._graphs = mode == CompileMode.max_autotune
        self._compiled = torch.compile(model.forward, mode=None if not self._graphs else "max-autotune", dynamic=False)

    def __call__(self, inputs: Tensor, start: int = 0) -> Tensor:
        """As `LayeredModel.forward`."""
        if len(inputs) != self._batch_size:
            return self._model(inputs, start=start)  # type: ignore[no-any-return]
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        return self._compiled(inputs, start)


def compiled(model: LayeredModel, mode: CompileMode, *, batch_size: int, device: torch.device) -> CompiledModel | None:
    """The compiled model of `train.compile`; None for `none`.

    Raises:
        UserError: There is no C++ compiler, which code for a CPU needs.
    """
    if mode == CompileMode.none:
        return None
    if device.type == "cpu":
        wanted = os.environ.get("CXX", "g++")
        if shutil.which(wanted) is None and shutil.which("clang++") is None:
            raise UserError(
                f"train.compile={mode} on a CPU needs a C++ compiler, and there is no {wanted}: install one (such as"
                " the package g++), set CXX, or use train.compile=none"
            )
    # Torch compiles at most eight variants of a function and then runs it uncompiled without a word. Without a reset
    # the ninth job of a sweep would train uncompiled.
    torch.compiler.reset()
    logger.info("train.compile=%s: the first steps take a minute or more", mode)
    return CompiledModel(model, mode, batch_size)
