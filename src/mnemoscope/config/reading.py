"""Read configurations from YAML files and overrides; errors are one line."""

from __future__ import annotations

from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

from mnemoscope.config.arena import ArenaConfig
from mnemoscope.config.audit import AuditConfig
from mnemoscope.config.model import ModelConfig
from mnemoscope.config.study import StudyConfig
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.strict import read_text, validated
from mnemoscope.runs.yaml import MOST_YAML, dump_yaml, parse_yaml

Config = TypeVar("Config", StudyConfig, ModelConfig, ArenaConfig, AuditConfig)
STUDIES = resources.files("mnemoscope.config") / "studies"


def built_in_studies() -> list[str]:
    """Names of the studies that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in STUDIES.iterdir() if path.name.endswith(".yaml"))


def load_study(study: str, overrides: list[str] | None = None, seeds: int | None = None) -> StudyConfig:
    """Read a built-in study or a YAML file; ``overrides`` are ``a.b=c`` each, with a YAML value.

    Raises:
        InputError: the study is unknown, is no YAML, or a field has a value that is not allowed.
    """
    if study in built_in_studies():
        text = (STUDIES / f"{study}.yaml").read_text()
    elif Path(study).is_file():
        text = read_text(Path(study), "study", MOST_YAML)
    else:
        raise InputError(f"study: {study!r} is neither a file nor one of {', '.join(built_in_studies())}")
    raw = parse_yaml(text, study)
    if not isinstance(raw, dict):
        raise InputError(f"study: {study} holds {type(raw).__name__}, not a mapping of fields")
    for override in overrides or []:
        _override(raw, override)
    return parse_study(raw if seeds is None else raw | {"seeds": seeds})


def _parsed(kind: type[Config], where: str, raw: dict[str, Any]) -> Config:
    """Validate fields; InputError names the first at fault, its value and what is allowed."""
    return validated(raw, kind, where)


parse_study = partial(_parsed, StudyConfig, "study")
parse_model = partial(_parsed, ModelConfig, "model")
parse_arena = partial(_parsed, ArenaConfig, "arena")
parse_audit = partial(_parsed, AuditConfig, "audit")


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
