"""A model that is ready to use: classes and probabilities, or features, of images of any kind."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from finetune.config import DataConf, OnError, nearest
from finetune.core.device import autocast
from finetune.core.layers import LayeredModel
from finetune.core.preprocess import Preprocess
from finetune.data import ImageError, Loader
from finetune.data.sources.unlabelled import find_images, in_memory
from finetune.data.split import Split
from finetune.models.heads.head import Head, mean_over_positions, read_by
from finetune.system.errors import UserError
from finetune.system.limits import check_memory
from finetune.system.terminal import printable

BATCH_SIZE = 64
PIXEL_BYTES = 5  # of one channel of one pixel: uint8, then float32


@dataclass(frozen=True)
class Prediction:
    """What a model says of one image."""

    path: str  # of its file; `image[N]` for an image in memory
    # One label an image: the most probable classes, as many as were asked for. Several labels an image: those whose
    # probability reaches the threshold, perhaps none. The most probable class comes first.
    labels: tuple[str, ...]
    probabilities: tuple[float, ...]  # of `labels`, in [0, 1]
    scores: Mapping[str, float]  # with several labels an image the probability of every class, else empty

    @property
    def label(self) -> str | None:
        """The most probable class; None where no label of several reaches the threshold."""
        return self.labels[0] if self.labels else None

    @property
    def probability(self) -> float | None:
        """The probability of `label`."""
        return self.probabilities[0] if self.probabilities else None


@dataclass(frozen=True, eq=False)
class Predictor:
    """A model with everything that a prediction needs. `finetune.load` makes it."""

    model: LayeredModel  # on `device`, in eval mode
    classes: tuple[str, ...]  # in the order of the logits
    preprocess: Preprocess  # how an image becomes what the model reads; `predict` and `embed` do it themselves
    device: torch.device
    dtype: torch.dtype  # that forward passes compute in
    threshold: float | None  # from which probability on a label counts; None: one label an image
    name: str  # where the model came from
    checksum: str  # tells the weights from other ones

    def predict(self, images: Any, *, top_k: int = 1, batch_size: int = BATCH_SIZE) -> list[Prediction]:
        """The classes of `images`, in their order.

        `images` is one of these, or a list of them: a path, an image of Pillow, an array uint8 (height, width, 3), a
        tensor uint8 (3, height, width). A path may be that of a folder, a table or a tar shard, see `find_images`.

        Raises:
            ImageError: An image cannot be read.
            UserError: `top_k` is below 1, there are no images, or an image gives NaN.
        """
        if top_k < 1 or batch_size < 1:
            raise UserError(f"top_k={top_k}, batch_size={batch_size}: expected 1 or more")
        split = self.split_of(images)
        found: list[Prediction] = []
        for ids, probabilities in self.probabilities(split, batch_size=batch_size):
            found += self.described([split.name_of(index) for index in ids], probabilities, top_k=top_k)
        return found

    def embed(self, images: Any, *, layer: str = "readout", batch_size: int = BATCH_SIZE) -> Tensor:
        """Features of `images`, as `predict` takes them: float32 (images, width), in host memory.

        `layer` is the name of a layer: `stem`, `block.1` to `block.L`, `readout` (what the classifier reads) or `head`
        (the logits). Where a layer gives tokens or positions, the feature is their mean.

        Raises:
            ImageError: An image cannot be read.
            UserError: There is no such layer, or there are no images. A network that is no plain chain of layers has
            `readout` and `head` only.
        """
        split = self.split_of(images)
        return torch.cat([part for _, part in self.features(split, layer=layer, batch_size=batch_size)])

    def split_of(self, images: Any) -> Split:
        """Whatever `predict` takes as a split without labels."""
        if isinstance(images, (str, Path)):
            return find_images([os.fspath(images)])
        if isinstance(images, Image.Image) or (isinstance(images, (Tensor, np.ndarray)) and images.ndim < 4):
            images = [images]
        images = list(images)
        if not images:
            raise UserError("no images were given: expected a path, an image, or a list of them")
        if not all(isinstance(image, (str, Path)) for image in images):
            return in_memory(images)
        return find_images([os.fspath(image) for image in images])

    def probabilities(
        self,
        split: Split,
        *,
        batch_size: int,
        first: int = 0,
        flip: bool = False,
        on_error: Callable[[int, ImageError], None] | None = None,
        on_inputs: Callable[[Tensor], object] | None = None,
    ) -> Generator[tuple[list[int], Tensor]]:
        """Yield, for each batch from image `first` on, the indices of its images and their probabilities.

        These are float32 (batch, classes) in host memory: the softmax of the logits, or with several labels an image
        the sigmoid of each. Of equal logits the class that comes first counts as the more probable one, as in the
        metrics. With `flip` the probabilities of an image and of its mirror image are averaged. Images that cannot be
        read are in no batch: `on_error` takes the index and the error; without it the error is raised. `on_inputs`
        takes what the model reads of each batch before it is yielded: normalised (batch, channels, size, size), on the
        device.
        """
        convert = torch.sigmoid if self.threshold is not None else _softmax

        def compute(inputs: Tensor) -> Tensor:
            if on_inputs is not None:
                on_inputs(inputs)
            scores = convert(self.model(inputs).float())
            return (scores + convert(self.model(inputs.flip(-1)).float())) / 2 if flip else scores

        return self._passes(compute, split, batch_size=batch_size, first=first, on_error=on_error)

    def features(
        self,
        split: Split,
        *,
        layer: str,
        batch_size: int,
        first: int = 0,
        on_error: Callable[[int, ImageError], None] | None = None,
    ) -> Generator[tuple[list[int], Tensor]]:
        """Yield indices and features, float32 (batch, width), as `probabilities` yields probabilities; see `embed`."""
        index = self.check_layer(layer)

        def compute(inputs: Tensor) -> Tensor:
            if not self.model.is_chain and layer == "readout":
                return self._into_head(inputs)
            # The shorter run of the last block gives the class token alone, and here the mean of all tokens is wanted.
            is_short = self.model.class_token_only
            self.model.class_token_only = is_short and index > self.model.num_blocks
            try:
                return mean_over_positions(self.model(inputs, stop=index + 1)).float()
            finally:
                self.model.class_token_only = is_short

        return self._passes(compute, split, batch_size=batch_size, first=first, on_error=on_error)

    def _into_head(self, inputs: Tensor) -> Tensor:
        """What the classifier of a network that runs only whole reads."""
        heads = [module for module in self.model.net.modules() if isinstance(module, Head)]
        if len(heads) != 1:
            kind = type(self.model.net).__name__
            raise UserError(f"layer readout: {kind} runs only whole, and has no single linear classifier; use head")
        return mean_over_positions(read_by(heads[0], lambda: self.model(inputs))).float()

    def check_layer(self, layer: str) -> int:
        """The id of the layer that is called `layer`; a UserError with the names where there is none."""
        names = [each.name for each in self.model.layers]
        if layer not in names:
            shown = f"{names[0]}, {names[1]} to {names[-3]}, {', '.join(names[-2:])}" if len(names) > 3 else names
            raise UserError(f"layer {layer}: there is no such layer{nearest(layer, names)}; expected {shown}")
        return names.index(layer)

    def described(self, paths: Sequence[str], probabilities: Tensor, *, top_k: int) -> list[Prediction]:
        """A `Prediction` for each path; probabilities float32 (images, classes)."""
        values, order = probabilities.sort(dim=1, descending=True, stable=True)
        count = len(self.classes) if self.threshold is not None else min(top_k, len(self.classes))
        found = []
        for path, row, indices in zip(paths, values[:, :count].tolist(), order[:, :count].tolist(), strict=True):
            names, scores = [self.classes[index] for index in indices], {}
            if self.threshold is not None:
                scores = dict(zip(names, row, strict=True))
                row = [value for value in row if value >= self.threshold]
            found.append(Prediction(path, tuple(names[: len(row)]), tuple(row), scores))
        return found

    def _passes(
        self,
        compute: Callable[[Tensor], Tensor],
        split: Split,
        *,
        batch_size: int,
        first: int,
        on_error: Callable[[int, ImageError], None] | None,
    ) -> Generator[tuple[list[int], Tensor]]:
        """Yield the indices of each batch, and what `compute` makes of its normalised images, in host memory."""
        size = min(batch_size, len(split))
        pixels = size * 3 * self.preprocess.size**2
        check_memory(f"a batch of {size} images of this model", PIXEL_BYTES * pixels, "take a smaller batch size")
        missed: list[ImageError] = []
        conf = DataConf(batch_size=batch_size, on_error=OnError.skip, workers="auto" if split.store.encoded else "0")
        loader = Loader(
            split, self.preprocess, conf=conf, augment=None, seed=0, device=self.device, on_skip=missed.append
        )
        with closing(loader):
            start = first
            for inputs, _, ids in loader.show(loader.showings(0).after(first), 0, empty=True):
                end = min(start + batch_size, len(split))
                for index in sorted({*range(start, end)} - {*ids.tolist()}):
                    error = missed.pop(0) if missed else _error_of(split, index)
                    if on_error is None:
                        raise error
                    on_error(index, error)
                start = end
                if len(ids):
                    values = self._run(compute, inputs)
                    self._check_finite(values, [split.name_of(index) for index in ids.tolist()])
                    yield ids.tolist(), values

    def _check_finite(self, values: Tensor, paths: Sequence[str]) -> None:
        """Raise a UserError where an image gave NaN or infinity: every comparison with it would be false."""
        if values.isfinite().all():
            return
        lost = int((~values.flatten(1).isfinite().all(dim=1)).nonzero()[0])
        mend = "take precision fp32" if self.dtype != torch.float32 else "its weights or its preprocessing are damaged"
        raise UserError(f"{printable(self.name)} gives NaN or infinity for {printable(paths[lost])}; {mend}")

    @torch.inference_mode()
    def _run(self, compute: Callable[[Tensor], Tensor], inputs: Tensor) -> Tensor:
        with autocast(self.dtype, self.device):
            return compute(inputs).cpu()


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(dim=1)


def _error_of(split: Split, index: int) -> ImageError:
    """Why an image could not be read, of a batch without any readable image: that has the first one's error only."""
    try:
        split.load(index)
    except ImageError as error:
        return error
    return ImageError(split.name_of(index), "it could not be read a moment ago")
