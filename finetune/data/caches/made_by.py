"""What decoded pixels depend on beside the image's bytes: this package's code, the libraries, and the processor.

What was stored by another version of any of these is made again and not believed.
"""

import hashlib
from collections.abc import Collection
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

import finetune

# Files and folders of this package that make pixels, or say which row of a source has which image; see `source_digest`.
# `tests/data/test_made_by.py` finds what is missing.
DECODING = (
    *("core/preprocess.py", "data/caches", "data/checks/looks.py", "data/images", "data/packed.py"),
    *("data/sources", "data/split.py"),
)


def decoded_by() -> str:
    """In words: all that decides which pixels come out of an image file. Two programs with one text agree."""
    libraries = " ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "pillow", "numpy", "imagehash"))
    return f"{source_digest(DECODING)} {libraries} {torch.backends.cpu.get_cpu_capability()}"


@cache
def source_digest(parts: Collection[str], package: Path = Path(finetune.__file__).parent) -> str:
    """Digest of the source code of this package in the files and folders `parts`, 32 hexadecimal digits."""
    state = hashlib.blake2b(digest_size=16, usedforsecurity=False)
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if is_part(name, parts):
            state.update(f"{name}\n".encode())
            state.update(path.read_bytes())
    return state.hexdigest()


def is_part(name: str, parts: Collection[str]) -> bool:
    """Whether the file `name` of this package, such as `core/layers.py`, is one of `parts` or lies in one."""
    return any(name == part or name.startswith(f"{part}/") for part in parts)
