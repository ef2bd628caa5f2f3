"""`finetune schema`: the JSON schema accepts every yaml file of ours and refuses what the settings refuse."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from omegaconf import OmegaConf

from finetune.__main__ import main
from finetune.commands.schema import json_schema
from finetune.config import Conf, as_dict
from finetune.config.words.choices import builtin_folder
from finetune.config.words.settings import SECTIONS, SETTINGS

KINDS = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None), "integer": int}
BOUNDS = {
    "minimum": float.__ge__,
    "exclusiveMinimum": float.__gt__,
    "maximum": float.__le__,
    "exclusiveMaximum": float.__lt__,
}


def refused(schema: dict[str, Any], value: Any) -> list[str]:
    """Why a validator of JSON schemas refuses `value`; knows only the keywords that the schema uses."""
    if "anyOf" in schema:
        found = [refused(part, value) for part in schema["anyOf"]]
        return [] if [] in found else found[0]
    kind = schema.get("type", "any")
    if kind != "any" and not isinstance(value, (int, float) if kind == "number" else KINDS[kind]):
        return [f"{value!r} is no {kind}"]
    if ("enum" in schema and value not in schema["enum"]) or (
        "pattern" in schema and not re.search(schema["pattern"], value)
    ):
        return [f"{value!r} is no such word"]
    bounds = [name for name in BOUNDS if name in schema]
    found = [name for name in bounds if not BOUNDS[name](float(value), float(schema[name]))]
    if isinstance(value, dict) and "properties" in schema:
        for name, item in value.items():
            found += refused(schema["properties"][name], item) if name in schema["properties"] else [name]
    if isinstance(value, list):
        found += ["length"] * (not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", 10**9))
        found += [problem for item in value for problem in refused(schema.get("items", {}), item)]
    return found


def test_it_fits_the_defaults_and_every_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema"]) == 0
    whole = json.loads(capsys.readouterr().out)
    assert whole["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert refused(whole, as_dict(Conf())) == []
    for path in builtin_folder().rglob("*.yaml"):
        tree, group = OmegaConf.to_container(OmegaConf.load(path)), path.parent.name
        assert refused(json_schema(group) if group in SECTIONS else whole, tree) == [], path


def test_a_section_is_the_content_of_a_file_of_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schema", "--section", "optim"]) == 0
    optim = json.loads(capsys.readouterr().out)
    assert list(optim["properties"]) == ["defaults", *(name[6:] for name in SETTINGS if name.startswith("optim."))]
    assert optim["properties"]["layer_decay"]["default"] == "auto"
    assert optim["properties"]["layer_decay"]["description"] == SETTINGS["optim.layer_decay"].meaning


@pytest.mark.parametrize(
    "tree",
    [{"optim": {"lr": 0}}, {"optim": {"lrr": 1}}, {"sched": {"mode": "cosin"}}, {"train": {"epochs": 1.5}}, {"sede": 1},
     {"optim": {"betas": [0.9]}}, {"data": {"batch_size": "many"}}, {"deterministic": "maybe"}, {"device": None}],
    ids=str,
)  # fmt: skip
def test_it_refuses_mistakes(tree: dict[str, Any]) -> None:
    assert refused(json_schema(), tree)


def test_it_takes_references_null_and_words_for_numbers() -> None:
    assert refused(json_schema(), {"optim": {"lr": "auto"}, "data": {"batch_size": "auto"}}) == []
    data = {"root": None, "batch_size": "fit"}
    assert refused(json_schema(), {"optim": {"lr": "${optim.eps}"}, "data": data, "defaults": [{"model": "vit"}]}) == []
