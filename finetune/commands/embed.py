"""`finetune embed RUN PATH... --out FILE`: the features of images, by any layer of a model."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from finetune.commands.predict import (
    base_parser,
    check_out,
    images_at,
    loaded,
    prepare_torch,
    take,
    tell_end,
    tell_start,
)  # fmt: skip


def main(words: Sequence[str]) -> int:
    """Run a command line; the exit code: 0, or 1 where an image could not be read."""
    given = _parse(words)
    check_out(given.out, (".npy", ".parquet"))
    prepare_torch()
    from finetune.use.writing import Options, opened_sink, request_of, write_features

    predictor = loaded(given)
    options = Options(batch_size=given.batch_size, on_error=given.on_error)
    options.check(predictor)
    predictor.check_layer(given.layer)
    split = images_at(given.paths, given.path_column)
    request = request_of(predictor, split, options, f"embed {given.layer}")
    with opened_sink(given.out, ["path", "embedding"], request, overwrite=given.overwrite) as sink:
        tell_start(sink, len(split))
        write_features(predictor, split, options, sink, layer=given.layer)
    return tell_end(sink, len(split), given.out, given.out, given.on_error)


def _parse(words: Sequence[str]) -> argparse.Namespace:
    parser = base_parser("embed", "Compute the features of images.")
    out = "a .npy, with the paths in FILE.paths.csv, or a .parquet (numbered files in a folder)"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out)
    layer = "stem, block.1 to block.L, readout (default: what the classifier reads) or head"
    parser.add_argument("--layer", default="readout", metavar="NAME", help=layer)
    given = take(parser, words)
    if given.out is None:
        parser.error("--out FILE is missing: a .npy or .parquet for the features")
    return given
