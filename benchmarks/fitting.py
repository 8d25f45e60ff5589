"""How many tokens a fit reads, by stage, and whether a stage reads again what an earlier one has read.

    python benchmarks/fitting.py [--items 150] [--write docs/results/benchmarks.json]

A JSONL of countries' capitals and languages that SmolLM2 knows by heart, contradicted in six phrasings of two families,
goes through ``mnemoscope.fit``. Tokens are those that pass the blocks, pads left out; the unit is the number of tokens
of all distinct prompts and answers.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tables import origin, put

import mnemoscope as ms
from mnemoscope.behaviour import Asking, prepare, score, states
from mnemoscope.models import backbone_of
from mnemoscope.study import stages
from mnemoscope.tasks import Example, Task

PHRASINGS = 3  # of each of two families


def main() -> None:
    """Fit, count, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--items", type=int, default=150)
    parser.add_argument("--out", type=Path, help="run folder to keep")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="file for the table")
    arguments = parser.parse_args()
    model, tokenizer = ms.load_model("smollm2")
    with tempfile.TemporaryDirectory() as folder, counting(model) as counted:
        out, data = arguments.out or Path(folder) / "run", Path(folder) / "facts.jsonl"
        lines = written(model, tokenizer, data, arguments.items)
        counted.clear()
        ms.fit(model, tokenizer, data, out=out, threads=arguments.threads, progress=counted.show)
    unit = distinct(tokenizer, lines)
    rows = ["| stage | tokens | of the distinct ones | contexts captured again at a site |", "|---|---|---|---|"]
    for stage in (*stages.STAGES, "all"):
        tokens, again = (sum(c.values()) if stage == "all" else c[stage] for c in (counted.tokens, counted.again))
        rows.append(f"| {stage} | {tokens:,} | {tokens / unit:.2f} | {again} |")
    print("\n".join(rows))
    if arguments.write:
        what = (
            f"Tokens that a fit on SmolLM2 reads: {len(lines)} lines, {unit:,} distinct tokens of prompts and answers."
        )
        put(arguments.write, "fitting", ["## fitting", "", what, "", *rows, "", origin(1, arguments.threads), ""])


def written(model: Any, tokenizer: Any, path: Path, items: int) -> list[dict[str, str]]:
    """The lines of the file: items that the model knows, each in both families."""
    task = ms.build_task("facts", {"relations": ["capital", "language"], "frames": FAMILIES, "wrong_values": 2}, 0)
    asking = Asking(model, tokenizer, task.boundary, 64)
    asked = task.facts_to_know()
    labels = score(asking, prepare(asking, asked), margins=False).behaviour_N
    known = {example.item for example, label in zip(asked, labels, strict=True) if label == "correct"}
    found: dict[str, dict[str, list[Example]]] = {}
    for example in conflicts(task.knowing(known)):
        item, _, family = example.item.rpartition("|")
        found.setdefault(item, {}).setdefault(family, []).append(example)
    chosen = [(item, families) for item, families in found.items() if len(families) == len(FAMILIES)][:items]
    fields = ("prompt", "memorized", "generalized", "group", "family")
    lines = [
        {"item": item, **{field: getattr(example, field) for field in fields}}
        for item, families in chosen
        for examples in families.values()
        for example in examples[:PHRASINGS]
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


FAMILIES = ["context-first", "unlabelled"]


def conflicts(task: Task) -> list[Example]:
    """All conflicts of a task, in an order that is always the same."""
    return task.examples(np.random.default_rng(0), 10**6, "conflict")


def distinct(tokenizer: Any, lines: list[dict[str, str]]) -> int:
    """Tokens of all distinct prompts, and of the answers behind each."""
    prompts = {line["prompt"] for line in lines}
    whole = {(line["prompt"], line[answer]) for line in lines for answer in ("memorized", "generalized")}
    length = {prompt: len(tokenizer(prompt).input_ids) for prompt in prompts}
    return sum(length.values()) + sum(len(tokenizer(p + a).input_ids) - length[p] for p, a in whole)


class Counted:
    """Tokens by stage, and contexts whose states were captured at a site where they had been captured before."""

    def __init__(self) -> None:
        self.tokens, self.again = Counter[str](), Counter[str]()
        self.seen: set[tuple[str, tuple[int, ...]]] = set()
        self.stage, self.site, self.shown = "train", "", 0.0

    def clear(self) -> None:
        """Forget what came before the fit."""
        self.tokens.clear()
        self.seen.clear()

    def show(self, cell: str, stage: str, done: float, total: float, note: str) -> None:
        """Print the progress of the fit now and then."""
        if time.monotonic() > self.shown + 30:
            self.shown = time.monotonic()
            print(f"{stage} {done / max(total, 1e-9):.2f} {note}: {self.tokens[stage]:,} tokens", flush=True)

    def of(self, name: str, stage: Any) -> Any:
        """The same stage; what passes meanwhile is counted as its."""

        def counted(cell: Any, tell: Any) -> Any:
            self.stage = name
            return stage(cell, tell)

        return counted

    def count(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """A forward pre-hook of the part that holds the blocks."""
        ids_NT, mask_NT = args[0] if args else kwargs["input_ids"], kwargs.get("attention_mask")
        mask_NT = torch.ones_like(ids_NT) if mask_NT is None else mask_NT  # ``generate`` leaves out one of ones
        self.tokens[self.stage] += int(mask_NT[:, -ids_NT.shape[1] :].sum())
        if self.site and mask_NT.shape[1] == ids_NT.shape[1]:
            for ids, kept in zip(ids_NT.tolist(), mask_NT.tolist(), strict=True):
                key = self.site, tuple(number for number, here in zip(ids, kept, strict=True) if here)
                self.again[self.stage] += key in self.seen
                self.seen.add(key)


@contextmanager
def counting(model: Any) -> Iterator[Counted]:
    """Count while this is open; the site of a capture is taken from the one place that captures."""
    counted, capturing = Counted(), states.capturing

    @contextmanager
    def capturing_there(model: Any, site: str, *args: Any, **kwargs: Any) -> Iterator[Any]:
        counted.site = site
        try:
            with capturing(model, site, *args, **kwargs) as found:
                yield found
        finally:
            counted.site = ""

    handle = backbone_of(model).register_forward_pre_hook(counted.count, with_kwargs=True)
    plain = dict(stages.STAGES)
    stages.STAGES.update({name: counted.of(name, stage) for name, stage in plain.items()})
    places = [module for module in (states, *_importers()) if hasattr(module, "capturing")]
    try:
        for module in places:
            module.capturing = capturing_there
        yield counted
    finally:
        handle.remove()
        stages.STAGES.update(plain)
        for module in places:
            module.capturing = capturing


def _importers() -> list[Any]:
    from mnemoscope.behaviour import labels

    return [labels]


if __name__ == "__main__":
    main()
