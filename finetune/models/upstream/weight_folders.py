"""Find the weights in a folder that another program, or a run of ours, left behind, and the shards of an index."""

from pathlib import Path
from typing import TypedDict

from finetune.models.upstream.candidates import shown
from finetune.system.errors import UserError
from finetune.system.reading import UnfitError, parse_json, read_file
from finetune.system.terminal import counted

INDEX = ".index.json"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")
# What programs keep beside the weights in files with the same endings, by how the names begin.
BESIDE = ("optimizer", "scheduler", "rng_state", "scaler", "training_args", "random_states", "tf_model", "events.")
MAX_INDEX = 64 * 2**20  # bytes; a large model's index has a few hundred kilobytes


class _Index(TypedDict):
    weight_map: dict[str, str]  # name of a tensor -> file


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder, or the index of its shards; of a run of ours, in its `checkpoints`.

    The same weights are often there twice, as `.safetensors` and as a pickle; then the former are meant.

    Raises:
        FileNotFoundError: There are none.
        UserError: There are several.
    """
    found = _files(folder) or _files(folder / "checkpoints")
    if not found:
        raise FileNotFoundError(f"model.pretrained={folder}: no weights in this folder; expected {', '.join(SUFFIXES)}")
    safe = [path for path in found if ".safetensors" in path.suffixes]
    if len(found) > 1 and len(safe) == 1 and all(_stem(path) in ("pytorch_model", _stem(safe[0])) for path in found):
        found = safe
    if len(found) > 1:
        # A tensor file of ours stands beside the state of its run, which has no use without the run.
        names = [str(path.relative_to(folder)) for path in found]
        mend = f"name one, such as model.pretrained={found[0]}"
        raise UserError(
            f"model.pretrained={folder}: it has {counted(len(found), 'file')} of weights: {shown(names)}; {mend}"
        )
    return found[0]


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith((*BESIDE, ".")))
    indices = [path for path in files if path.name.endswith(tuple(f"{suffix}{INDEX}" for suffix in SUFFIXES))]
    shards = {path.name.removesuffix(INDEX).rpartition(".")[0] for path in indices}
    whole = [path for path in files if path.suffix in SUFFIXES]
    # `model-00001-of-00002.safetensors` belongs to `model.safetensors.index.json`.
    return indices + [path for path in whole if path.name.partition("-0")[0] not in shards]


def _stem(path: Path) -> str:
    name = path.name.removesuffix(INDEX).rpartition(".")[0]
    return name.replace("open_clip_model", "open_clip_pytorch_model")


def shards_of(index: Path) -> list[Path]:
    """The files that an index names; a UserError where it is no index, or a file is missing or outside the folder."""
    try:
        content = parse_json(read_file(index, limit=MAX_INDEX, follow=True), _Index)
    except UnfitError as error:
        raise UserError(f"{index} is no index of shards: {error}") from error
    names = sorted(set(content["weight_map"].values()))
    strange = [name for name in names if Path(name).name != name or Path(name).suffix not in SUFFIXES]
    if strange or not names:
        problem = f"{shown(strange)} is no name of a weights file beside it" if strange else "it names no files"
        raise UserError(f"{index} is no index of shards: {problem}")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        problem = f"{len(missing)} of its {len(names)} files are missing: {shown(missing)}"
        raise FileNotFoundError(f"{index}: {problem}; fetch them too")
    return [index.parent / name for name in names]
