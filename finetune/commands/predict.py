"""`finetune predict RUN PATH...`: the classes of images, as a table, a file, or folders of links."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

from finetune.commands.flags import Parser, command_parser
from finetune.system.errors import ConfigError, UserError
from finetune.system.limits import NAME
from finetune.system.log import say
from finetune.system.terminal import counted, printable

if TYPE_CHECKING:
    from finetune.data.split import Split
    from finetune.use.predictor import Predictor
    from finetune.use.sinks import Sink

EPILOG = """\
RUN is a run directory or its best.safetensors. With --classes it is settings of a model that reads class names:
  finetune predict model=clip_b16 --classes cat,dog pictures/
PATH is an image, a folder (looked through at any depth), a pattern, a table with a column of paths, a .tar shard,
or - for paths on the standard input, one a line.
Exit code: 0; 1 where an image could not be read (with --on-error skip 0)."""
ON_ERROR = "an image that cannot be read: go on and end with exit code 1 (go), end there (stop), or leave it out (skip)"


def main(words: Sequence[str]) -> int:
    """Run a command line; the exit code: 0, or 1 where an image could not be read."""
    given = _parse(words)
    check_out(given.out, (".csv", ".jsonl", ".parquet"))
    prepare_torch()
    from finetune.use.sorting import Sorter, check_apart
    from finetune.use.writing import UNKNOWN, Options, columns_of, opened_sink, request_of, write_predictions

    folder: Path | None = given.sort_into
    if folder is not None:
        check_apart(folder, given.paths)
    predictor = loaded(given)
    options = Options(given.top_k, given.batch_size, given.tta == "flip", given.reject, given.on_error)
    options.check(predictor)
    split = images_at(given.paths, given.path_column)
    sorter = None if folder is None else Sorter(folder, [*predictor.classes, UNKNOWN], copy=given.copy)
    columns = columns_of(predictor, options.top_k)
    request = request_of(predictor, split, options, "predict") if given.out else []
    with opened_sink(given.out, columns, request, overwrite=given.overwrite, is_quiet=folder is not None) as sink:
        tell_start(sink, len(split))
        write_predictions(predictor, split, options, sink, sorter=sorter)
    return tell_end(sink, len(split), given.out or folder, given.out, given.on_error)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = base_parser("predict", "Predict the classes of images.")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="a .csv, .jsonl or .parquet (numbered files in a folder)"
    )
    parser.add_argument("--top-k", type=int, default=1, metavar="N", help="so many classes an image, the best first")
    parser.add_argument("--reject", type=float, default=0.0, metavar="P", help="below this probability: unknown")
    parser.add_argument("--tta", choices=("flip",), help="flip: the mean of an image and of its mirror image")
    parser.add_argument("--sort-into", type=Path, metavar="DIR", help="links to the images, in a folder for each class")
    parser.add_argument("--copy", action="store_true", help="with --sort-into: copies, no links")
    given = take(parser, words)
    if given.copy and given.sort_into is None:
        parser.error("--copy would be ignored: it goes with --sort-into DIR")
    return given


def base_parser(name: str, text: str) -> Parser:
    """The flags that `predict` and `embed` share."""
    parser = command_parser(name, "RUN PATH... [FLAG ...]", text, EPILOG)
    parser.add_argument("--overwrite", action="store_true", help="replace a --out that is there")
    parser.add_argument("--on-error", choices=("go", "stop", "skip"), default="go", help=ON_ERROR)
    parser.add_argument("--path-column", default="path", metavar="NAME", help="of a table; default: path")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="images at a time; default: 64")
    add_model_flags(parser)
    return parser


def add_model_flags(parser: Parser) -> None:
    """The words that `take_source` reads, and the flags that `loaded` reads."""
    add_source(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("--precision", default="auto", help="auto, fp32, tf32, bf16 or fp16")


def add_source(parser: Parser) -> None:
    """The words that `take_source` reads."""
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--classes", metavar="A,B,...", help="names for a model without training; RUN is its settings")


def take(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """The flags of a command line, with `source` (the run, or settings) and `paths`."""
    given = parser.parse_intermixed_args(list(words))
    given.paths = take_source(parser, given)
    if not given.paths:
        parser.error("PATH is missing: images, folders, patterns, tables, shards, or - for the standard input")
    if "-" in given.paths and len(given.paths) > 1:
        parser.error("- stands for all paths, so give no others")
    if given.out is not None and any(os.path.realpath(path) == os.path.realpath(given.out) for path in given.paths):
        parser.error(f"--out {printable(str(given.out))} is one of the places that are read; choose another name")
    return given


def take_source(parser: Parser, given: argparse.Namespace) -> list[str]:
    """Set `source`, the run or with `--classes` settings, and the list `classes`; the words behind the source."""
    words: list[str] = given.words
    count = min(1, len(words))
    if given.classes is not None:
        count = next((index for index, word in enumerate(words) if "=" not in word), len(words))
        given.classes = [name.strip() for name in given.classes.split(",")]
    if not count:
        parser.error("RUN is missing: a run directory, a best.safetensors, or settings with --classes")
    given.source = shlex.join(words[:count]) if given.classes is not None else words[0]
    return words[count:]


def check_out(out: Path | None, endings: Sequence[str]) -> None:
    """A ConfigError for an output of another kind."""
    if out is not None and out.suffix not in endings:
        raise ConfigError([f"--out {printable(str(out))}: expected a name that ends in {' or '.join(endings)}"], code=2)


def prepare_torch() -> None:
    """Set what torch reads when it is imported. See `commands/train.py` for the spinning threads."""
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")


def loaded(given: argparse.Namespace) -> Predictor:
    """The model that the command line names."""
    from finetune.system.memory import keep_freed_memory
    from finetune.use.loading import load
    from finetune.use.sinks import check_parquet

    if given.out is not None and given.out.suffix == ".parquet":
        check_parquet()
    predictor = load(given.source, device=given.device, precision=given.precision, classes=given.classes)
    if predictor.device.type == "cpu":
        keep_freed_memory()
    return predictor


def images_at(paths: Sequence[str], path_column: str) -> Split:
    """The images at the paths of a command line."""
    from finetune.data.sources.unlabelled import find_images, given_files

    if list(paths) != ["-"]:
        return find_images(paths, path_column=path_column)
    split = given_files(_lines(sys.stdin.buffer))
    if not len(split):
        raise UserError("-: the standard input has no paths; expected one a line")
    return split


def _lines(file: IO[bytes]) -> Iterator[str]:
    """The lines of a file that are not empty; a LimitError for one that is longer than any path."""
    while line := file.readline(NAME.most + 3):  # with the end of a line
        line = line.rstrip(b"\r\n")
        if len(line) > NAME.most:
            raise NAME.error("-: a line of the standard input")
        if line:
            yield line.decode("utf-8", "surrogateescape")


def tell_start(sink: Sink, images: int) -> None:
    """Say that an output is continued."""
    if sink.first:
        say(f"{sink.first:,} of {counted(images, 'image')} are done already")


def tell_end(sink: Sink, images: int, place: Path | None, out: Path | None, on_error: str) -> int:
    """Say what was written, and where; the exit code."""
    from finetune.use.sinks import unreadable_of

    if place is not None:
        say(f"{counted(images - sink.failed, 'image')}: {printable(str(place))}")
    if not sink.failed:
        return 0
    where = f", listed in {printable(str(unreadable_of(out)))}" if out is not None else ""
    print(f"{counted(sink.failed, 'image')} could not be read{where}", file=sys.stderr)
    return 0 if on_error == "skip" else 1
