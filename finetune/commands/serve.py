"""`finetune serve RUN`: a page on this machine to try a model with images, and a JSON endpoint beside it."""

import argparse
import contextlib
import sys
from collections.abc import Sequence

from finetune.commands.flags import command_parser
from finetune.commands.predict import add_model_flags, prepare_torch, take_source
from finetune.system.log import say
from finetune.system.terminal import printable

EPILOG = """\
RUN is a run directory or its best.safetensors. With --classes it is settings of a model that reads class names:
  finetune serve model=clip_b16 --classes cat,dog
The page is for this machine alone. A program sends images to /predict:
  curl --data-binary @cat.jpg 'http://127.0.0.1:8000/predict?top_k=3'
Ctrl-C ends it."""


def main(words: Sequence[str]) -> int:
    """Run a command line until Ctrl-C; the exit code, 0."""
    given = _parse(words)
    prepare_torch()
    from finetune.use.loading import load
    from finetune.use.serving import ADDRESS, Server
    from finetune.use.serving_answers import Answers

    server = Server(given.port)  # ahead of the model, whose loading takes seconds
    with server:
        predictor = load(given.source, device=given.device, precision=given.precision, classes=given.classes)
        with contextlib.suppress(KeyboardInterrupt):
            say(f"http://{ADDRESS}:{server.server_port}/ shows {predictor.name}; Ctrl-C ends it")
            sys.stdout.flush()
            server.serve(Answers(predictor))
    say("ended")
    return 0


def _parse(words: Sequence[str]) -> argparse.Namespace:
    text = "Show a page to try a model with images, on this machine alone."
    parser = command_parser("serve", "RUN [FLAG ...]", text, EPILOG)
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="default: 8000; 0 takes a free one")
    add_model_flags(parser)
    given = parser.parse_intermixed_args(list(words))
    if rest := take_source(parser, given):
        parser.error(f"one RUN is served; {printable(rest[0])} is too much: images are given on the page")
    if not 0 <= given.port < 2**16:
        parser.error(f"--port {given.port}: expected 0 to 65535")
    return given
