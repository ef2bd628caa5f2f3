"""The answers of `finetune serve`: one thread runs the model for all requests, one request after another."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from finetune.data import ImageError
from finetune.data.sources.unlabelled import encoded_in_memory
from finetune.use.predictor import BATCH_SIZE, Predictor
from finetune.use.serving_maps import heat_maps
from finetune.use.serving_uploads import MOST_BYTES, MOST_IMAGES, RefusedError

MOST_WAITING = 64  # requests that are read, wait or are computed; each holds at most `MOST_BYTES`


class Answers:
    """Answers requests. Threads may call it at once.

    The model runs in a thread of its own: torch keeps a pool of threads for each thread that computes. The images of a
    request are batches of their own, so the answer does not depend on what others send, and has the bits of `predict`.
    """

    def __init__(self, predictor: Predictor) -> None:
        """Take the model."""
        self._predictor = predictor
        self._places = threading.Semaphore(MOST_WAITING)
        self._is_closed = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="model")

    @contextmanager
    def place(self) -> Generator[None]:
        """A place in the queue, which a request takes before its body is read; a RefusedError where all are taken."""
        if not self._places.acquire(blocking=False):
            raise RefusedError(503, f"{MOST_WAITING} requests are waiting already; try again in a second")
        try:
            yield
        finally:
            self._places.release()

    def close(self) -> None:
        """Drop what waits, and wait for the request that is computed."""
        self._is_closed = True
        self._thread.shutdown(cancel_futures=True)

    def about(self) -> dict[str, Any]:
        """What the model is, as JSON has it."""
        predictor = self._predictor
        return {
            "model": predictor.name,
            "checksum": predictor.checksum,
            "classes": list(predictor.classes),
            "threshold": predictor.threshold,
            "preprocess": predictor.preprocess.as_dict(),
            "device": str(predictor.device),
            "precision": str(predictor.dtype).removeprefix("torch."),
            "limits": {"bytes": MOST_BYTES, "images": MOST_IMAGES, "waiting": MOST_WAITING},
        }

    def predict(self, files: Sequence[tuple[str, bytes]], *, top_k: int, has_view: bool) -> list[dict[str, Any]]:
        """What the model says of each file, (name, bytes), as JSON has it; `error` where it cannot be read.

        With `has_view` each also has `seen`, a PNG of the pixels that the model reads, and `heat_map`, see `heat_maps`.
        """
        if self._is_closed:
            raise RefusedError(503, "the server is ending")
        try:
            return self._thread.submit(self._predict, files, top_k, has_view).result()
        except CancelledError:
            raise RefusedError(503, "the server is ending") from None

    def _predict(self, files: Sequence[tuple[str, bytes]], top_k: int, has_view: bool) -> list[dict[str, Any]]:
        split = encoded_in_memory(files)
        found: list[dict[str, Any]] = [{"name": name} for name, _ in files]

        def on_error(index: int, error: ImageError) -> None:
            found[index]["error"] = f"cannot be read as an image ({error.reason})"

        inputs: list[Tensor] = []
        passes = self._predictor.probabilities(
            split, batch_size=BATCH_SIZE, on_error=on_error, on_inputs=inputs.append if has_view else None
        )
        for ids, probabilities in passes:
            names = [split.name_of(index) for index in ids]
            for index, prediction in zip(
                ids, self._predictor.described(names, probabilities, top_k=top_k), strict=True
            ):
                found[index] |= {
                    "label": prediction.label,
                    "probability": prediction.probability,
                    "labels": list(prediction.labels),
                    "probabilities": list(prediction.probabilities),
                }
                if self._predictor.threshold is not None:
                    found[index]["scores"] = dict(prediction.scores)
            if has_view:
                self._add_views(inputs.pop(), [found[index] for index in ids])
        return found

    def _add_views(self, inputs: Tensor, found: Sequence[dict[str, Any]]) -> None:
        """Add what the model saw, and where it looked, to the answers of a batch."""
        preprocess = self._predictor.preprocess
        mean, std = torch.tensor((preprocess.mean, preprocess.std))[:, :, None, None]
        pixels = (inputs.cpu().float() * std + mean).mul(255).round().clamp(0, 255).to(torch.uint8)
        maps = heat_maps(self._predictor.model, inputs, self._predictor.dtype)
        for index, answer in enumerate(found):
            answer["seen"] = _as_png(pixels[index])
            answer["heat_map"] = None if maps is None else [[round(v, 4) for v in row] for row in maps[index].tolist()]


def _as_png(pixels: Tensor) -> str:
    """A data address of pixels uint8 (3, height, width)."""
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
