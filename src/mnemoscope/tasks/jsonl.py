"""Tasks from JSONL files: one example a line, no code."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mnemoscope.runs.errors import InputError
from mnemoscope.runs.strict import parse_json, read_text
from mnemoscope.tasks.base import INSTRUCTIONS, Example, Kind, Split, Task, assign_splits, checked_boundary

FIELDS = ("item", "prompt", "memorized", "generalized", "answer", "kind", "group", "family", "split", "bare")


@dataclass(kw_only=True, eq=False)
class JsonlTask(Task):
    """Examples read from a JSONL file; several lines with one ``item`` are its phrasings.

    Args:
        file: path of the file. Each line has ``item``, ``prompt`` and either ``memorized`` and ``generalized`` or
            ``answer``; optionally ``kind`` (default: conflict with two answers, else memory), ``group`` (default: the
            item), ``family``, ``split`` (default: groups are dealt 2 : 1 : 1) and, for context-aware decoding,
            ``bare``: the prompt of a conflict without the text that contradicts memory.
        boundary: texts of which one closes every answer, each a token; by default an answer ends with its last word.
        seed: deals the groups to the splits.

    Raises InputError where a line is malformed or gives an item other answers (its number is named), a group is in two
    splits, or the file has no conflict.
    """

    name = "jsonl"
    instructions = INSTRUCTIONS

    file: str
    boundary: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.boundary = checked_boundary(self.boundary)
        read = _read(Path(self.file), self.seed)
        self.examples_read = [example for example, _ in read]
        self._bare = {example.prompt: bare for example, bare in read if example.kind == "conflict"}
        self._phrasings: dict[str, list[Example]] = defaultdict(list)
        for example in self.examples_read:
            if example.kind == "conflict":
                self._phrasings[example.item].append(example)
        if not self._phrasings:
            raise InputError(f"file: {self.file} has no conflict, no line with 'memorized' and 'generalized'")

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        """At most ``n`` of the file's examples of a kind, in random order."""
        of_kind = [example for example in self.examples_read if example.kind == kind]
        return [of_kind[i] for i in rng.permutation(len(of_kind))[:n]]

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        """Another conflict with the same item, of the same family if possible; the example itself without any."""
        others = [other for other in self._phrasings[example.item] if other.prompt != example.prompt]
        others = [other for other in others if other.family == example.family] or others
        return others[rng.integers(len(others))] if others else example

    def without_context(self, example: Example) -> Example | None:
        """The same question without the context; None where the file has none."""
        bare = self._bare.get(example.prompt)
        return replace(example, prompt=bare) if bare else None


def write_jsonl(examples: list[Example]) -> str:
    """The lines that ``JsonlTask`` reads back as the same examples."""
    rows = ({k: v for k, v in example.to_row().items() if v is not None} for example in examples)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _read(path: Path, seed: int) -> list[tuple[Example, str | None]]:
    """Each line's example, and its prompt without the context."""
    lines = read_text(path, encoding="utf-8-sig").split("\n")
    parsed = {n: _parsed(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()}
    given = {row["group"]: row["split"] for row in parsed.values() if "split" in row}
    undealt = sorted({row["group"] for row in parsed.values()} - set(given))
    split_of: dict[str, Split] = assign_splits(undealt, np.random.default_rng([seed, 3]))
    found, first, asked = [], dict[str, tuple[int, Example]](), dict[str, tuple[int, str]]()
    for number, row in parsed.items():
        where, bare, group = f"{path}, line {number}", row.pop("bare", None), row["group"]
        try:
            example = Example(**{**row, "split": row.get("split") or given.get(group) or split_of[group]})
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if split_of.setdefault(group, example.split) != example.split:
            raise InputError(
                f"{where}: split is {example.split!r}, but group {group!r} is in {split_of[group]!r} as well; "
                "all examples of a group belong to one split"
            )
        line, other = asked.setdefault(example.prompt, (number, group))
        if other != group:
            raise InputError(
                f"{where}: the prompt is that of line {line}, whose group is {other!r}, and here it is {group!r}; what "
                "is asked twice belongs to one group, or it is fitted on and judged"
            )
        if example.kind == "conflict":
            before, known = first.setdefault(example.item, (number, example))
            if known.options != example.options:
                raise InputError(
                    f"{where}: item {example.item!r} has the answers {known.options} in line {before} and "
                    f"{example.options} here; give it an item of its own (a 'group' keeps items in one split)"
                )
        found.append((example, bare))
    return found


def _parsed(where: str, line: str) -> dict[str, Any]:
    """The fields of a line that have a value, all of them text, with the group and kind that it has by default."""
    row = parse_json(line, where)
    if not isinstance(row, dict):
        raise InputError(f"{where}: {type(row).__name__} where an object with 'item' and 'prompt' is wanted")
    row = {field: value for field, value in row.items() if value is not None}
    for field, value in row.items():
        if field not in FIELDS:
            raise InputError(f"{where}: field {field!r} is unknown; known are {', '.join(FIELDS)}")
        if not isinstance(value, str):
            raise InputError(f"{where}: {field} is {value!r}; text is wanted")
        if field in ("memorized", "generalized", "answer") and value != value.rstrip():
            raise InputError(
                f"{where}: {field} is {value!r}; an answer ends with a word, and 'boundary' says what closes it"
            )
    for field in ("item", "prompt"):
        if not row.get(field):
            raise InputError(f"{where}: field {field!r} is missing or empty")
    kind = "conflict" if {"memorized", "generalized"} & set(row) else "memory"
    return {"group": row["item"], "kind": kind} | row
