"""Tasks from JSONL files: one example a line, no code."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mnemoscope.errors import InputError
from mnemoscope.tasks.base import INSTRUCTIONS, Example, Kind, Split, Task, assign_splits


class Line(BaseModel):
    """A line of the file; ``bare`` is the prompt without the context."""

    model_config = ConfigDict(extra="forbid")

    item: str = Field(min_length=1)
    prompt: str = Field(min_length=1)
    memorized: str | None = None
    generalized: str | None = None
    answer: str | None = None
    kind: Kind | None = None
    group: str | None = None
    family: str | None = None
    split: Split | None = None
    bare: str | None = None

    @property
    def key(self) -> str:
        """The group, by default the item."""
        return self.group or self.item

    def example(self, split: Split) -> Example:
        """The example in a split; raises InputError where its answers do not fit its kind."""
        given = self.model_dump(exclude_none=True, exclude={"bare", "group", "split"})
        has_two = self.memorized is not None or self.generalized is not None
        return Example(**({"kind": "conflict" if has_two else "memory"} | given), group=self.key, split=split)


@dataclass(kw_only=True, eq=False)
class JsonlTask(Task):
    """Examples read from a JSONL file; several lines with one ``item`` are its phrasings.

    Args:
        file: path of the file. Each line has ``item``, ``prompt`` and either ``memorized`` and ``generalized`` or
            ``answer``; optionally ``kind`` (default: conflict with two answers, else memory), ``group`` (default: the
            item), ``family``, ``split`` (default: groups are dealt 2 : 1 : 1) and, for context-aware decoding,
            ``bare``: the prompt of a conflict without the text that contradicts memory.
        seed: deals the groups to the splits.

    Raises:
        InputError: a line is malformed or gives an item other answers (its number is named), a group is in two splits,
            or the file has no conflict.
    """

    name = "jsonl"
    # What commonly ends a short answer; "" is the end-of-text token.
    boundary = ("", "\n", ".")
    instructions = INSTRUCTIONS

    file: str
    seed: int = 0

    def __post_init__(self) -> None:
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
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"file: {path} cannot be read ({error})") from error
    parsed = {n: _parsed(f"{path}, line {n}", line) for n, line in enumerate(lines, 1) if line.strip()}
    undealt = sorted({line.key for line in parsed.values() if not line.split})
    split_of: dict[str, Split] = assign_splits(undealt, np.random.default_rng([seed, 3]))
    found, first = [], dict[str, tuple[int, Example]]()
    for number, line in parsed.items():
        where = f"{path}, line {number}"
        try:
            example = line.example(split_of.setdefault(line.key, line.split or "test"))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        if line.split and line.split != example.split:
            raise InputError(
                f"{where}: split is {line.split!r}, but group {line.key!r} is in {example.split!r} as well; "
                "all examples of a group belong to one split"
            )
        if example.kind == "conflict":
            before, known = first.setdefault(example.item, (number, example))
            if known.options != example.options:
                raise InputError(
                    f"{where}: item {example.item!r} has the answers {known.options} in line {before} and "
                    f"{example.options} here; give it an item of its own (a 'group' keeps items in one split)"
                )
        found.append((example, line.bare))
    return found


def _parsed(where: str, line: str) -> Line:
    try:
        return Line.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"{part}: " for part in first["loc"])
        got = "" if first["type"] == "missing" else f" (got {str(first['input'])[:80]!r})"
        known = f"; known are {', '.join(Line.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise InputError(f"{where}: {field}{first['msg'].replace('at line 1 ', 'at ')}{got}{known}") from error
