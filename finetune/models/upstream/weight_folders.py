"""Find the weights in a folder that another program, or a run of ours, left behind, and the shards of an index."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypedDict

from finetune.models.upstream.layouts import shown
from finetune.system.errors import UserError
from finetune.system.reading import UnfitError, parse_json, read_file
from finetune.system.terminal import counted

INDEX = ".index.json"
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")
# What programs keep beside the weights in files with the same endings, by how the names begin.
BESIDE = ("optimizer", "scheduler", "rng_state", "scaler", "training_args", "random_states", "tf_model", "events.")
MAX_INDEX = 64 * 2**20  # bytes; a large model's index has a few hundred kilobytes


# Programs that keep a set of weights in pieces, by files in the folder or in one inside it, and what makes a whole.
PIECES = (
    (
        re.compile(r".*(mp_rank_\d+_(model|optim)_states\.pt|zero_to_fp32\.py)$"),
        "a checkpoint of DeepSpeed, whose weights may lie in pieces: run `python zero_to_fp32.py . FOLDER` in it",
    ),
    (
        re.compile(r".*\.distcp$"),
        "a checkpoint of torch.distributed.checkpoint, in pieces: run `python -m"
        " torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE`",
    ),
    (
        re.compile(r"(saved_model\.pb|.*\.ckpt\.index|checkpoint\.index)$"),
        "a checkpoint of TensorFlow: convert it where it came from",
    ),
)
# `model-00001-of-00002.safetensors`
SHARD = re.compile(r"(?P<stem>.+)-\d+-of-0*(?P<number>\d+)(?P<suffix>\.\w+)$")


class _Index(TypedDict):
    weight_map: dict[str, str]  # name of a tensor -> file


def weights_in(folder: Path) -> Path:
    """The file of weights in a folder, or the index of its shards; of a run of ours, in its `checkpoints`.

    The same weights are often there twice, as `.safetensors` and as a pickle; then the former are meant.

    Raises:
        FileNotFoundError: There are none.
        UserError: There are several, or pieces that are no weights by themselves.
    """
    found = _files(folder) or _files(folder / "checkpoints")
    if not found:
        _check_whole(folder)
        raise FileNotFoundError(f"model.pretrained={folder}: no weights in this folder; expected {', '.join(SUFFIXES)}")
    safe = [path for path in found if ".safetensors" in path.suffixes]
    if len(found) > 1 and len(safe) == 1 and all(_stem(path) in ("pytorch_model", _stem(safe[0])) for path in found):
        found = safe
    shards = [match for path in found if (match := SHARD.match(path.name))]
    if shards:
        first = shards[0]
        problem = f"it has {len(shards)} of {first['number']} shards of one set of weights, and no index of them"
        index = f"{first['stem']}{first['suffix']}{INDEX}"
        raise UserError(f"model.pretrained={folder}: {problem}: fetch {index} too, which stands beside them")
    if len(found) > 1:
        # A tensor file of ours stands beside the state of its run, which has no use without the run.
        names = [str(path.relative_to(folder)) for path in found]
        mend = f"name one, such as model.pretrained={found[0]}"
        raise UserError(
            f"model.pretrained={folder}: it has {counted(len(found), 'file')} of weights: {shown(names)}; {mend}"
        )
    return found[0]


def _check_whole(folder: Path) -> None:
    """Raise a UserError for a folder whose pieces another program must join first."""
    for path in sorted([*folder.iterdir(), *folder.glob("*/*")]):
        for pattern, what in PIECES:
            if pattern.match(path.name) and not path.parent.name.startswith(BESIDE):
                raise UserError(f"model.pretrained={folder}: {path.parent} is {what}, and name what it writes")


def _files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith((*BESIDE, ".")))
    files = [path for path in files if not any(pattern.match(path.name) for pattern, _ in PIECES)]
    indices = [path for path in files if path.name.endswith(tuple(f"{suffix}{INDEX}" for suffix in SUFFIXES))]
    shards = {path.name.removesuffix(INDEX).rpartition(".")[0] for path in indices}
    whole = [path for path in files if path.suffix in SUFFIXES]
    # `model-00001-of-00002.safetensors` belongs to `model.safetensors.index.json`.
    return indices + [path for path in whole if path.name.partition("-0")[0] not in shards]


def _stem(path: Path) -> str:
    name = path.name.removesuffix(INDEX).rpartition(".")[0]
    return name.replace("open_clip_model", "open_clip_pytorch_model")


def shards_of(index: Path) -> dict[str, set[str]]:
    """The files that an index names, in its folder, each with the names of the tensors that it must hold.

    A UserError where it is no index, a FileNotFoundError where a file is missing.
    """
    try:
        content = parse_json(read_file(index, limit=MAX_INDEX, follow=True), _Index)
    except UnfitError as error:
        raise UserError(f"{index} is no index of shards: {error}") from error
    held: dict[str, set[str]] = {}
    for tensor, file in content["weight_map"].items():
        held.setdefault(file, set()).add(tensor)
    strange = [name for name in sorted(held) if Path(name).name != name or Path(name).suffix not in SUFFIXES]
    if strange or not held:
        problem = f"{shown(strange)} is no name of a weights file beside it" if strange else "it names no files"
        raise UserError(f"{index} is no index of shards: {problem}")
    missing = [name for name in sorted(held) if not (index.parent / name).is_file()]
    if missing:
        problem = f"{len(missing)} of its {len(held)} files are missing: {shown(missing)}"
        raise FileNotFoundError(f"{index}: {problem}; fetch them too")
    return dict(sorted(held.items()))


def check_shard(index: Path, held: Mapping[str, set[str]], file: str, names: Collection[str]) -> None:
    """Raise a UserError where the tensors of a shard, `names`, are not those that its index names.

    `held` is what `shards_of` gives: a tensor that stands in two files is in the index once.
    """
    if lost := sorted(held[file] - set(names)):
        problem = f"{shown(lost)} is not in {file}, as the index says"
    elif more := sorted(set(names) - held[file]):
        listed = any(more[0] in own for own in held.values())
        problem = f"{shown(more)} stands in {file} too" if listed else f"{shown(more)} in {file} is not in the index"
    else:
        return
    raise UserError(f"{index} disagrees with its files: {problem}; fetch the index and its files again, from one place")
