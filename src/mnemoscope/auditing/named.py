"""Items from files of rows, from templates, or from a task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mnemoscope.auditing.items import Item, Variant
from mnemoscope.auditing.templates import read_templates
from mnemoscope.runs.errors import InputError
from mnemoscope.tasks import Task, draw
from mnemoscope.tasks.tables import read_rows

FIELDS = ("item", "prompt", "answer", "variants")


def named_items(named: Any, variants: int, seed: int) -> list[Item]:
    """Items as they are, of a file, of a folder of templates, or of a task; InputError where there are none."""
    if isinstance(named, Task):
        return items_of(named, variants, seed)
    if not isinstance(named, str | Path):
        return list(named)
    path = Path(named)
    if path.is_dir():
        return read_templates(path, variants, seed)
    return read_items(str(path))


def read_items(file: str) -> list[Item]:
    """Items of a file of rows: one with its ``variants`` a row, or rows that share an ``item``, the original first.

    Raises InputError where a row has no item, prompt or answer, or an item stands in several rows of the first kind.
    """
    rows = read_rows(file, FIELDS[:3], _read)
    whole, parts = dict[str, Item](), defaultdict[str, list[Variant]](list)
    for where, name, variant, variants in rows:
        if name in whole or (variants is not None and name in parts):
            raise InputError(f"{where}: item {name!r} stands here again, beside its variants")
        if variants is None:
            parts[name].append(variant)
        else:
            whole[name] = Item(name, variant.prompt, variant.answer, variants)
    shared = (Item(name, first.prompt, first.answer, tuple(rest)) for name, (first, *rest) in parts.items())
    return [*whole.values(), *shared]


def items_of(task: Task, variants: int, seed: int) -> list[Item]:
    """Of a task's conflicts, an item each: its bare question has the memorized answer, its phrasings the other one.

    Raises InputError where its conflicts have no bare question: nothing stands for the original.
    """
    rng, found = np.random.default_rng([seed, 51]), dict[str, Item]()
    for example in draw(task, rng, 10_000, "conflict", "test"):
        bare = task.without_context(example)
        if bare is None:
            raise InputError(f"items: conflicts of task {task.name!r} have no bare question to stand for the original")
        said = Variant(example.prompt, str(example.generalized))
        before = found.get(bare.prompt) or Item(bare.prompt, bare.prompt, str(example.memorized))
        if len(before.variants) < variants and said not in before.variants:
            before = Item(before.item, before.prompt, before.answer, (*before.variants, said))
        found[bare.prompt] = before
    return list(found.values())


def _read(where: str, row: Any) -> tuple[str, str, Variant, tuple[Variant, ...] | None]:
    for name in FIELDS[:3]:
        if not isinstance(row.get(name), str | int) or not str(row[name]).strip():
            raise InputError(f"{where}: {name} is {row.get(name)!r}; text is wanted")
    listed, variants = row.get("variants"), None
    if isinstance(listed, Sequence) and not isinstance(listed, str):
        if not all(isinstance(one, dict) and {"prompt", "answer"} <= set(one) for one in listed):
            raise InputError(f"{where}: variants: each has a prompt and an answer")
        variants = tuple(Variant(str(one["prompt"]), str(one["answer"])) for one in listed)
    elif isinstance(listed, dict) or (isinstance(listed, str) and listed.strip()):
        raise InputError(f"{where}: variants: {str(listed)[:40]!r} is no list")
    return where, str(row["item"]), Variant(str(row["prompt"]), str(row["answer"])), variants
