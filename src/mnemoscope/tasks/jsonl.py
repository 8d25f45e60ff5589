"""A user's own task: one JSON object a line, no code."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from mnemoscope.errors import InputError
from mnemoscope.tasks.base import SPLITS, Example, Instance, Kind, assign_splits, check_groups

FIELDS = ("item", "prompt", "memorized", "generalized", "answer", "kind", "group", "family", "split")


class JsonlTask:
    """Examples read from a JSONL file; several lines with one ``item`` are its phrasings.

    Args:
        file: path of the file. Each line has ``item``, ``prompt`` and either ``memorized`` and ``generalized`` or
            ``answer``; optionally ``kind`` (default: conflict with two answers, else memory), ``group`` (default: the
            item), ``family`` and ``split`` (default: groups are dealt 2 : 1 : 1).
        seed: deals the groups to the splits.

    Raises:
        InputError: a line is malformed or gives an item other answers (its number is named), a group is in two splits,
            or the file has no conflict.
    """

    name = "jsonl"
    # What commonly ends a short answer; "" is the end-of-text token.
    boundary = ("", "\n", ".")
    memory_is_conflict = False

    def __init__(self, *, file: str, seed: int = 0) -> None:
        self.examples_read = read_jsonl(Path(file), seed)
        self._phrasings: dict[str, list[Example]] = defaultdict(list)
        conflicts = [example for example in self.examples_read if example.kind == "conflict"]
        for example in conflicts:
            self._phrasings[example.item].append(example)
        if not conflicts:
            raise InputError(f"file: {file} has no conflict, that is no line with both 'memorized' and 'generalized'")

    def training(self, rng: np.random.Generator) -> Iterator[Instance]:
        """Refused: a file says what to ask, not what to train on."""
        raise InputError(
            "model: task 'jsonl' has nothing to train on; give the folder of a trained model, without lora"
        )

    def examples(self, rng: np.random.Generator, n: int, kind: Kind) -> list[Example]:
        """At most ``n`` of the file's examples of that kind, in random order."""
        of_kind = [example for example in self.examples_read if example.kind == kind]
        return [of_kind[i] for i in rng.permutation(len(of_kind))[:n]]

    def rephrase(self, example: Example, rng: np.random.Generator) -> Example:
        """Another conflict with the same item; the example itself where there is none."""
        others = [other for other in self._phrasings[example.item] if other.prompt != example.prompt]
        return others[rng.integers(len(others))] if others else example


def read_jsonl(path: Path, seed: int) -> list[Example]:
    """Read and check a file of examples.

    Raises:
        InputError: see ``JsonlTask``.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"file: {path} cannot be read ({error})") from error
    parsed = [(number, _example(path, number, line)) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    _check_answers(path, [(number, example) for number, (example, _) in parsed])
    unsplit = sorted({example.group for _, (example, has_split) in parsed if not has_split})
    dealt = assign_splits(unsplit, np.random.default_rng([seed, 3]))
    examples = [ex if has_split else replace(ex, split=dealt[ex.group]) for _, (ex, has_split) in parsed]
    check_groups(examples)
    return examples


def write_jsonl(examples: list[Example]) -> str:
    """The lines that ``read_jsonl`` reads back as the same examples."""
    rows = ({k: v for k, v in asdict(example).items() if v is not None} for example in examples)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _check_answers(path: Path, numbered: Iterable[tuple[int, Example]]) -> None:
    """Phrasings of one item are held against each other, so they must have the same two answers."""
    first: dict[str, tuple[int, Example]] = {}
    for number, example in numbered:
        if example.kind != "conflict":
            continue
        before, known = first.setdefault(example.item, (number, example))
        if known.options != example.options:
            raise InputError(
                f"{path}, line {number}: item {example.item!r} has the answers {known.options} in line {before} and "
                f"{example.options} here; give it an item of its own (a 'group' keeps items in one split)"
            )


def _example(path: Path, number: int, line: str) -> tuple[Example, bool]:
    """The example on a line, and whether the line names its split."""
    where = f"{path}, line {number}"
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{where}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise InputError(f"{where}: {type(row).__name__} where an object with 'item' and 'prompt' is wanted")
    for field, value in row.items():
        if field not in FIELDS:
            raise InputError(f"{where}: field {field!r} is unknown; known are {', '.join(FIELDS)}")
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where}: {field} is {value!r}; text is wanted")
    for field in ("item", "prompt"):
        if not row.get(field):
            raise InputError(f"{where}: field {field!r} is missing")
    row = {field: value for field, value in row.items() if value is not None}
    row.setdefault("kind", "conflict" if "memorized" in row or "generalized" in row else "memory")
    row.setdefault("group", row["item"])
    has_split = "split" in row
    if has_split and row["split"] not in SPLITS:
        raise InputError(f"{where}: split is {row['split']!r}; allowed are {', '.join(SPLITS)}")
    try:
        return Example(**row), has_split
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
