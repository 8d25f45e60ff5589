"""Tasks from files of your own: one example a line or row, no code."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mnemoscope.runs.errors import InputError, meant
from mnemoscope.tasks.base import INSTRUCTIONS, Example, Kind, Split, Task, assign_splits
from mnemoscope.tasks.tables import Row, read_rows

ANSWERS = ("memorized", "generalized", "answer")
INDEX = ("", "Unnamed: 0", "__index_level_0__")  # columns in which tables keep the numbers of their rows
FIELDS = ("item", "prompt", *ANSWERS, "kind", "group", "family", "split", "bare")


@dataclass(kw_only=True, eq=False)
class JsonlTask(Task):
    """Examples read from a file (JSONL, CSV, Parquet, JSON); several lines with one ``item`` are its phrasings.

    Args:
        file: path of the file. Each line or row has ``item``, ``prompt`` and either ``memorized`` and ``generalized``
            or ``answer``; optionally ``kind`` (default: conflict with two answers, else memory), ``group`` (default:
            the item), ``family``, ``split`` (default: groups are dealt 2 : 1 : 1) and, for context-aware decoding,
            ``bare``: the prompt of a conflict without the text that contradicts memory.
        boundary: texts of which one closes every answer, each a token; by default an answer ends with its last word.
        seed: deals the groups to the splits.

    Raises InputError where lines are malformed or give an item other answers (their numbers are named), a group is in
    two splits, or the file has no conflict.
    """

    name = "jsonl"
    instructions = INSTRUCTIONS

    file: str
    boundary: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        self.boundary = None if self.boundary is None else tuple(self.boundary)
        self.examples_read: list[Example] = []
        self._bare: dict[str, str] = {}
        self._phrasings: dict[str, list[Example]] = defaultdict(list)
        first: dict[tuple[str, str], tuple[str, Any]] = {}
        rows = read_rows(self.file, (), lambda where, row: _read(where, row, first))
        given: dict[str, Split] = {example.group: example.split for example, has_split, _ in rows if has_split}
        undealt = sorted({example.group for example, *_ in rows} - set(given))
        split_of = given | assign_splits(undealt, np.random.default_rng([self.seed, 3]))
        for example, _, bare in rows:
            example = replace(example, split=split_of[example.group])
            self.examples_read.append(example)
            if example.kind == "conflict":
                self._phrasings[example.item].append(example)
                self._bare |= {example.prompt: bare} if bare else {}
        if not self._phrasings:
            raise InputError(f"file: {self.file} has no conflict, no line with 'memorized' and 'generalized'")
        conflicts = [example for phrasings in self._phrasings.values() for example in phrasings]
        stated = sum(str(one.generalized).strip().lower() in one.prompt.lower() for one in conflicts)
        self.documents = bool(self._bare) or 2 * stated > len(conflicts)  # a text says its answer, a sum does not

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


def _read(where: str, row: Row, first: dict[tuple[str, str], tuple[str, Any]]) -> tuple[Example, bool, str | None]:
    """The example in a line, whether its split is given, and its bare prompt; see ``_check_agrees``."""
    fields = _parsed(where, row)
    bare = fields.pop("bare", None)
    try:
        example = Example(**fields)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    _check_agrees(where, example, "split" in fields, first)
    return example, "split" in fields, bare


def _parsed(where: str, row: Row) -> dict[str, Any]:
    """The fields of a line that have a value, all of them text, with the group and kind that it has by default."""
    # Cells without a value are empty in CSV, None or NaN in Parquet; numbers may name items.
    row = {field: value for field, value in row.items() if value not in (None, "") and value == value}
    row = {field: value for field, value in row.items() if field not in INDEX}
    row |= {name: str(row[name]) for name in ("item", "group") if type(row.get(name)) is int}
    for field, value in row.items():
        if field not in FIELDS:
            raise InputError(
                f"{where}: field {field!r} is unknown; known are {', '.join(FIELDS)}{meant(field, FIELDS)}"
            )
        if not isinstance(value, str):
            raise InputError(f"{where}: {field} is {value!r}; text is wanted")
        if field in ANSWERS and value != value.rstrip():
            why = "an answer ends with a word, and 'boundary' says what closes it"
            raise InputError(f"{where}: {field} is {value!r}; {why}")
    for field in ("item", "prompt"):
        if not row.get(field):
            raise InputError(f"{where}: field {field!r} is missing or empty")
    kind = "conflict" if {"memorized", "generalized"} & set(row) else "memory"
    return {"group": row["item"], "kind": kind} | row


def _check_agrees(where: str, example: Example, has_split: bool, first: dict[tuple[str, str], tuple[str, Any]]) -> None:
    """Raises InputError where a line contradicts one before it; ``first`` has what the first line of each name said."""
    said: list[tuple[str, str, Any, str]] = [
        ("prompt", example.prompt, f"group {example.group!r}", "what is asked twice belongs to one group")
    ]
    if has_split:
        why = "all examples of a group belong to one split"
        said.append(("group", example.group, f"split {example.split!r}", why))
    if example.kind == "conflict":
        why = "give it an item of its own (a 'group' keeps items in one split)"
        said.append(("item", example.item, f"answers {example.options}", why))
    for what, name, mine, why in said:
        before, other = first.setdefault((what, name), (where, mine))
        if other != mine:
            raise InputError(f"{where}: {what} {name!r} has {mine} here and {other} in {before.split(', ')[-1]}; {why}")
