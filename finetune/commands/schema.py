"""`finetune schema`: the settings as a JSON schema, with which an editor completes and checks a person's yaml files.

An editor with the YAML language server reads it from a first line such as
`# yaml-language-server: $schema=optim.schema.json`.
"""

import argparse
import json
import typing
from collections.abc import Sequence
from typing import Any

from finetune.config.conf import AUTO, RULED
from finetune.config.words.settings import NUMBER_WORDS, SECTIONS, SETTINGS, Setting

# A bound in a setting's metadata and the keyword of JSON schema that says the same.
_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
_TYPES = {int: "integer", float: "number", bool: "boolean", str: "string"}


def main(words: Sequence[str]) -> int:
    """Print the schema; the exit code, 0."""
    parser = argparse.ArgumentParser(prog="finetune schema", description="Print the settings as a JSON schema.")
    files = "for a file of this group, such as conf/optim/mine.yaml; without it: for an experiment or conf/config.yaml"
    parser.add_argument("--section", choices=SECTIONS, help=files)
    section: str | None = parser.parse_args(words).section
    print(json.dumps(json_schema(section), indent=2, ensure_ascii=False))
    return 0


def json_schema(section: str | None = None) -> dict[str, Any]:
    """The settings of a section, or of a whole configuration, as a JSON schema, draft 2020-12."""
    properties = _properties(section or "")
    if section is None:
        properties |= {name: _closed(_properties(name)) for name in SECTIONS}
        properties["hydra"] = {"type": "object", "description": "Hydra's own settings"}
    defaults = {"type": "array", "description": "the choices and files that this file builds on"}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"finetune: {section or 'all settings'}",
        **_closed({"defaults": defaults, **properties}),
    }


def _closed(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


def _properties(section: str) -> dict[str, Any]:
    """Name to schema of every setting of a section; for an empty name, of the settings outside all sections."""
    own = [setting for setting in SETTINGS.values() if setting.name.rpartition(".")[0] == section]
    return {setting.name.rpartition(".")[2]: _schema(setting) for setting in own}


def _schema(setting: Setting) -> dict[str, Any]:
    metadata = setting.field.metadata
    bounds = {word: metadata[name] for name, word in _BOUNDS.items() if name in metadata}
    alternatives = [_kind(setting) | bounds]
    if setting.name in NUMBER_WORDS:
        words = NUMBER_WORDS[setting.name]
        alternatives[0]["minimum"] = max(words.values()) + 1  # below, only the word may stand
        alternatives.append({"enum": list(words)})
    if setting.name in RULED:
        alternatives.append({"enum": [AUTO]})
    if setting.optional:
        alternatives.append({"type": "null"})
    if setting.kind is not str:  # a reference such as ${optim.lr}, which is filled in when the files are composed
        alternatives.append({"type": "string", "pattern": r"\$\{.*\}"})
    allowed = alternatives[0] if len(alternatives) == 1 else {"anyOf": alternatives}
    return {"description": setting.meaning, "default": setting.shown, **allowed}


def _kind(setting: Setting) -> dict[str, Any]:
    if setting.words:
        return {"enum": setting.words}
    if setting.kind in _TYPES:
        return {"type": _TYPES[setting.kind]}
    parts = typing.get_args(setting.kind)
    size = {"minItems": len(parts), "maxItems": len(parts)} if typing.get_origin(setting.kind) is tuple else {}
    return {"type": "array", "items": {"type": _TYPES[parts[0]]}, **size}
