"""Templates of benchmark items: a question with what may be drawn, conditions, and the answer as an expression.

The format is that of GSM-Symbolic (Mirzadeh et al. 2024, arXiv 2410.05229) as TOML files: ``question_annotated`` holds
the question with ``{name, value of the original}``, then ``#init:``, ``#conditions:`` and ``#answer:``.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from mnemoscope.auditing.expressions import Expression, Steps
from mnemoscope.auditing.items import Item, Variant
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.yaml import parse_yaml

PLACE = re.compile(r"\{\s*([A-Za-z_]\w*)\s*,([^{}]*)\}")  # a name and its value in the original
PART = re.compile(r"^#(init|conditions|answer):", re.MULTILINE)
LARGEST = 100_000  # bytes of a file
MOST = 1_000  # numbers in a list
TRIES = 50_000  # draws for one variant, at most
WORDS: dict[str, Any] = parse_yaml((resources.files(__package__) / "lists.yaml").read_text(), "lists")
NUMBERS, SHARES = WORDS["numbers"], {words: Fraction(share) for words, share in WORDS["shares"].items()}
TIMES = {"twice": 2, "thrice": 3, **{f"{word} times": n for n, word in enumerate(NUMBERS[3:11], 3)}}
LISTS: dict[str, list[Any]] = {
    **{name: words for name, words in WORDS.items() if isinstance(words, list)},
    "names": WORDS["names_male"] + WORDS["names_female"],
    "fractions": list(SHARES.values()),
    "fraction_alnum": [[words, share] for words, share in SHARES.items()],
    "multi_times": [[words, Fraction(times)] for words, times in TIMES.items()],
    "numbers": [[words, Fraction(n)] for n, words in enumerate(NUMBERS)],
}


@dataclass(frozen=True)
class Draw:
    """What is drawn in one line: ``count`` of ``options``, which may have to follow each other; None: one of them."""

    options: Sequence[Any]
    count: int | None
    in_order: bool = False

    def one(self, rng: np.random.Generator) -> Any:
        """A draw; InputError where there are too few options."""
        if len(self.options) < (self.count or 1):
            raise InputError(f"sample: {len(self.options)} options, of which {self.count or 1} are wanted")
        if self.in_order:
            first = int(rng.integers(len(self.options)))
            return [self.options[(first + n) % len(self.options)] for n in range(self.count or 1)]
        if self.count is None:
            return self.options[int(rng.integers(len(self.options)))]
        return [self.options[int(i)] for i in rng.choice(len(self.options), self.count, replace=False)]


def _sample(options: Any, count: Fraction | None = None) -> Draw:
    options = list(options) if isinstance(options, list) else options
    if not isinstance(options, list | Steps):
        raise InputError(f"sample: {options!r} is no list")
    return Draw(options, None if count is None else int(count))


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sample": _sample,
    "sample_sequential": lambda options, count: Draw(list(options), int(count), in_order=True),
    "range": Steps,
    "arange": Steps,
    "range_list": lambda *ends: list(Steps(*ends)[:MOST]),
    "range_str": lambda start, stop, step, words: Draw([words[int(n)] for n in Steps(start, stop, step)], None),
}


@dataclass(frozen=True)
class Template:
    """One item as a template.

    Attributes:
        original: by name, the words that stand for it in the original question.
        drawn: names, and what is drawn for them, line by line.
        conditions, answer: of drawn values.
        stated: question and answer of the original; ``steps``: the solution with expressions in braces.
    """

    name: str
    text: str
    original: Mapping[str, str]
    drawn: Sequence[tuple[Sequence[str], Draw]]
    conditions: Sequence[Expression]
    answer: Expression
    stated: tuple[str, str]
    steps: str = ""
    _numbers: frozenset[str] = field(default=frozenset())

    @classmethod
    def read(cls, path: Path) -> Template:
        """Read one; InputError where the file is none, or asks for what is not allowed."""
        try:
            if path.stat().st_size > LARGEST:
                raise InputError(f"items: {path} has more than {LARGEST} bytes")
            content = tomllib.loads(path.read_text())
            annotated, question, said = (content[name] for name in ("question_annotated", "question", "answer"))
            text, *rest = PART.split(annotated)
            stated = question.strip(), said.rsplit("####", 1)[-1].strip().replace(",", "")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"items: {path} is no template ({type(error).__name__}: {error})") from error
        parts = dict(zip(rest[::2], rest[1::2], strict=False))
        if not parts.get("answer", "").strip():
            raise InputError(f"items: {path} has no line '#answer:'")
        try:
            drawn = [_drawn(line) for line in _lines(parts.get("init", ""))]
            conditions = [Expression(line) for line in _lines(parts.get("conditions", ""))]
            answer = Expression(parts["answer"].strip().splitlines()[0])
        except InputError as error:
            raise InputError(f"items: {path}: {error}") from error
        original = {name: value.strip() for name, value in PLACE.findall(text)}
        numbers = frozenset(re.findall(r"\$\s*(\w+)\s*=", parts.get("init", "")))
        if lacking := original.keys() - {name for names, _ in drawn for name in names}:
            raise InputError(f"items: {path}: {min(lacking)} is in the question and in no line of #init")
        steps = str(content.get("answer_annotated", ""))
        return cls(path.stem, text.strip(), original, drawn, conditions, answer, stated, steps, numbers)

    def variant(self, rng: np.random.Generator, taken: set[str]) -> Variant:
        """A question with other values, none of ``taken``, and its answer; InputError where no numbers are found."""
        for _ in range(TRIES):
            values: dict[str, Any] = {}
            for names, draw in self.drawn:
                found = draw.one(rng)
                values |= dict(zip(names, found if len(names) > 1 else [found], strict=True))
            if self._is_met(values):
                said = {name: _said(value) for name, value in values.items()}
                answer, prompt = _shown(self.answer(values)), self._worded(said)
                if answer != self.stated[1] and prompt not in taken:
                    taken.add(prompt)
                    return Variant(prompt, answer)
        raise InputError(f"items: {self.name}: no numbers of {TRIES} draws meet its conditions")

    def _is_met(self, values: Mapping[str, Any]) -> bool:
        try:
            return all(condition(values) for condition in self.conditions)
        except InputError as error:
            if isinstance(error.__cause__, ZeroDivisionError):  # of these values
                return False
            raise

    def _worded(self, said: Mapping[str, str]) -> str:
        return PLACE.sub(lambda at: said[at[1]], self.text)

    def item(self, variants: int, seed: int) -> Item:
        """The original with so many variants, drawn by a seed."""
        rng, taken = np.random.default_rng([seed, *self.name.encode()]), {self.stated[0]}
        return Item(self.name, *self.stated, tuple(self.variant(rng, taken) for _ in range(variants)))


def read_templates(folder: Path, variants: int, seed: int) -> list[Item]:
    """The items of a folder of templates; InputError where it has none."""
    small = (path for path in folder.rglob("*.toml") if path.stat().st_size <= LARGEST)
    paths = sorted(path for path in small if b"question_annotated" in path.read_bytes())
    if not paths:
        raise InputError(f"items: {folder} holds no template (a TOML file with question_annotated)")
    return [Template.read(path).item(variants, seed) for path in paths]


def _lines(part: str) -> list[str]:
    return [line.strip().removeprefix("-").strip() for line in part.splitlines() if line.strip().startswith("-")]


def _drawn(line: str) -> tuple[Sequence[str], Draw]:
    """Names and what is drawn for them, of a line as ``a, b = sample([...], 2)``."""
    left, sign, right = line.partition("=")
    names = [name.strip().removeprefix("$").strip() for name in left.split(",")]
    if not sign or not all(name.isidentifier() for name in names):
        raise InputError(f"#init: {line[:80]!r} is no line as 'name = sample(...)'")
    found = Expression(right, FUNCTIONS)(LISTS)
    draw = found if isinstance(found, Draw) else Draw(found, None) if isinstance(found, list | Steps) else None
    if draw is None:
        raise InputError(f"#init: {line[:80]!r} draws nothing")
    rows = draw.options[:50] if draw.count is None and len(names) > 1 else []
    if any(not isinstance(row, list) or len(row) != len(names) for row in rows) or draw.count not in (None, len(names)):
        several = draw.count is not None and (draw.count < 1 or draw.count != len(names) > 1)
        if rows or several:
            raise InputError(f"#init: {line[:80]!r} draws another number than it has names")
    return names, draw


def _said(value: Any) -> str:
    """A value as a question says it: a share as such, other numbers in decimals."""
    if isinstance(value, Fraction) and value.denominator != 1:
        return f"{value}" if value in LISTS["fractions"] else _shown(value)
    return str(value)


def _shown(value: Any) -> str:
    """A number without needless zeros."""
    try:
        value = Fraction(value)
    except (TypeError, ValueError) as error:
        raise InputError(f"items: an answer is {str(value)[:40]!r}, which is no number") from error
    return str(value.numerator) if value.denominator == 1 else f"{float(value):.10f}".rstrip("0").rstrip(".")
