"""Read configurations from YAML files and overrides; errors are one line."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from pydantic_core import PydanticSerializationError, to_json

from mnemoscope.config.arena import ArenaConfig
from mnemoscope.config.model import ModelConfig
from mnemoscope.config.study import StudyConfig
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.strict import MOST_YAML, dump_yaml, parse_yaml, read_text

Config = TypeVar("Config", StudyConfig, ModelConfig, ArenaConfig)


def built_in_studies() -> list[str]:
    """Names of the studies that come with the package."""
    folder = resources.files("mnemoscope.config") / "studies"
    return sorted(p.name.removesuffix(".yaml") for p in folder.iterdir() if p.name.endswith(".yaml"))


def load_study(study: str, overrides: list[str] | None = None, seeds: int | None = None) -> StudyConfig:
    """Read a built-in study or a YAML file; ``overrides`` are ``a.b=c`` each, with a YAML value.

    Raises:
        InputError: the study is unknown, is no YAML, or a field has a value that is not allowed.
    """
    if study in built_in_studies():
        text = (resources.files("mnemoscope.config") / "studies" / f"{study}.yaml").read_text()
    elif Path(study).is_file():
        text = read_text(Path(study), "study", MOST_YAML)
    else:
        raise InputError(f"study: {study!r} is neither a file nor one of {', '.join(built_in_studies())}")
    raw = parse_yaml(text, study)
    if not isinstance(raw, dict):
        raise InputError(f"study: {study} holds {type(raw).__name__}, not a mapping of fields")
    for override in overrides or []:
        _override(raw, override)
    if seeds is not None:
        raw["seeds"] = seeds
    return parse_study(raw)


def parse_study(raw: dict[str, Any]) -> StudyConfig:
    """Validate the fields of a study; InputError names the first at fault, its value and what is allowed."""
    return _validated(StudyConfig, raw, "study")


def parse_model(raw: dict[str, Any]) -> ModelConfig:
    """Validate the fields of a model, with the errors of ``parse_study``."""
    return _validated(ModelConfig, raw, "model")


def parse_arena(raw: dict[str, Any]) -> ArenaConfig:
    """Validate the sizes of an arena, with the errors of ``parse_study``."""
    return _validated(ArenaConfig, raw, "arena")


def _validated(kind: type[Config], raw: dict[str, Any], root: str) -> Config:
    try:
        # As JSON, where each type has its own form: true is no number, a number is no text.
        return kind.model_validate_json(to_json(raw), strict=True)
    except (PydanticSerializationError, UnicodeError, RecursionError) as error:
        raise InputError(f"{root}: {raw!r:.80} cannot be stored ({str(error).splitlines()[0]})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or root
        got = repr(first["input"])
        value = "" if first["type"] == "missing" else f" (got {got if len(got) <= 80 else got[:77] + '...'})"
        raise InputError(f"{where}: {first['msg'].removeprefix('Value error, ')}{value}") from error


def dump_study(config: StudyConfig) -> str:
    """The full resolved configuration as YAML; ``load_study`` reads it back as the same."""
    return dump_yaml(config.model_dump(mode="json"))


def _override(raw: dict[str, Any], override: str) -> None:
    path, equals, value = override.partition("=")
    if not equals or not path:
        raise InputError(f"--set: {override!r} is not of the form a.b=c")
    *parents, last = path.split(".")
    node = raw
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise InputError(f"--set: {path!r} leads through {part!r}, which holds no fields")
    node[last] = parse_yaml(value, f"--set {path}")
