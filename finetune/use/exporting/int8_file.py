"""The format `int8`: the network of the format `onnx` with products and convolutions of 8-bit integers.

Weights have a scale for each output channel. Activations have one for each tensor, from the range that they take on
images of training ("static quantization" of onnxruntime). What lies between products, such as norms, stays float32.
"""

import tempfile
from pathlib import Path

import numpy as np
from torch import Tensor, split

from finetune.system.files import sync_file
from finetune.use.exporting.onnx_file import FILE

OPERATIONS = ["Conv", "Gemm", "MatMul"]
BATCH = 16


def quantise(folder: Path, images: Tensor) -> tuple[str, ...]:
    """Replace the network in `folder`; the ranges are those on prepared `images`. What to know of it."""
    from onnxruntime import quantization
    from onnxruntime.quantization import shape_inference

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        """Gives the images in batches, then None."""

        def __init__(self) -> None:
            """Start with the first batch."""
            self._batches = iter(split(images, BATCH))

        def get_next(self) -> dict[str, np.ndarray] | None:
            """The inputs of the network."""
            batch = next(self._batches, None)
            return None if batch is None else {"pixels": batch.numpy()}

    with tempfile.TemporaryDirectory() as name:
        prepared = Path(name) / FILE
        is_large = (folder / f"{FILE}.data").exists()
        shape_inference.quant_pre_process(
            folder / FILE, prepared, skip_symbolic_shape=True, save_as_external_data=is_large
        )
        for path in folder.glob(f"{FILE}*"):
            path.unlink()
        quantization.quantize_static(
            prepared,
            folder / FILE,
            Reader(),
            op_types_to_quantize=OPERATIONS,
            per_channel=True,
            use_external_data_format=is_large,
        )
    for path in folder.glob(f"{FILE}*"):
        sync_file(path)
    return (
        "Products are of 8-bit integers, so scores differ from the run's; what that costs was measured, see below.",
        "On processors of x86 without VNNI sums of these products may overflow: measure it there.",
    )
