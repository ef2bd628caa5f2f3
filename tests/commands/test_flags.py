"""Flags may stand anywhere; one that cannot be used is one line."""

from __future__ import annotations

import itertools

import pytest

from finetune.commands.flags import parse_command_line


def test_flags_may_stand_anywhere() -> None:
    words = ["model=vit", "optim.layer_decay=0.65,0.75", "seed=1"]
    for position, flag in itertools.product(range(4), ("-m", "--multirun")):
        line = parse_command_line([*words[:position], flag, *words[position:]])
        assert line.multirun and line.overrides == words and not line.problems
    assert parse_command_line(["seed=1", "--cfg", "job", "model=vit"]).flags == {"--cfg": "job"}
    assert parse_command_line(["seed=1", "--cfg=job", "-cd", "x"]).flags == {"--cfg": "job", "--config-dir": "x"}


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        ("--lr 3", ["optim.lr=VALUE"]),
        ("--optim.lr=3", ["optim.lr=VALUE"]),
        ("--optim.layer-decay 3", ["optim.layer_decay=VALUE"]),
        ("--multirn", ["--multirun"]),
        ("-x", ["no such flag", "--help"]),
        ("--cfg jb", ["job, hydra, all", "'job'"]),
        ("--cfg", ["needs a value"]),
        ("--config-name x", ["experiment=NAME"]),
        ("--config-path x", ["--config-dir"]),
        ("-m --cfg job", ["exclude each other"]),
        ("--resolve", ["--cfg job"]),
        ("--help=3", ["takes no value"]),
    ],
)
def test_unusable_flags(typed: str, words: list[str]) -> None:
    (problem,) = parse_command_line(typed.split()).problems
    assert all(word in problem for word in words), problem
