"""The look before a fit, against plain labels and on files that lack something."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers import MINI_TASKS, label
from mnemoscope import check
from mnemoscope.behaviour import Asking
from mnemoscope.check import check_task
from mnemoscope.tasks import Example, build_task, draw


def test_counts_are_those_of_plain_labels(mini: Callable[[str], Asking]) -> None:
    asking, task = mini("addition"), build_task("addition", MINI_TASKS["addition"], 0)
    found = check_task(asking, task)
    rng, examples = np.random.default_rng(0), []
    for split, n in (("fit", 500), ("tune", 250), ("test", 500)):
        examples = draw(task, rng, n, "conflict", split)[:160]  # type: ignore[arg-type]
        assert found.splits[split].conflicts == len(examples)
        if split != "test":
            list(task.rephrase(example, rng) for example in examples)
    labels = label(asking, examples).behaviour_N
    for family, counts in found.families.items():
        mine = Counter(labels[[i for i, example in enumerate(examples) if example.family == family]])
        assert counts == {behaviour: mine[behaviour] for behaviour in ("memorized", "generalized", "other")}
    assert found.splits["test"].pairs <= found.splits["test"].candidates
    assert found.minutes > 0
    assert 0 < found.half_width < 0.5
    assert "pairs of" in str(found)


def test_what_is_missing_is_said(mini: Callable[[str], Asking], tmp_path: Path) -> None:
    asking, task = mini("addition"), build_task("addition", MINI_TASKS["addition"], 0)
    examples = task.examples(np.random.default_rng(0), 12, "conflict")
    path = tmp_path / "few.jsonl"
    fields = ("prompt", "memorized", "generalized")
    rows = [{"item": str(n)} | {field: getattr(e, field) for field in fields} for n, e in enumerate(examples)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = check_task(replace(asking, boundary=("",)), build_task("jsonl", {"file": str(path)}, 0))
    told = "\n".join(found.missing)
    assert "test groups" in told
    assert "phrasings in the fit split" in told
    assert "agreeing or bare lines" in told
    assert str(found).startswith("not yet to be fitted, it seems: no pairs in the split fit, tune, test")
    assert np.isnan(found.half_width) or found.half_width > 0.2


@pytest.mark.parametrize("split", ["fit", "tune", "test"])
def test_groups_of_pairs_are_among_those_of_the_sample(
    mini: Callable[[str], Asking], split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking, task, asked = mini("addition"), build_task("addition", MINI_TASKS["addition"], 0), list[Example]()
    labelled = check._labels

    def seen(asking: Asking, examples: Sequence[Example]) -> np.ndarray:
        asked.extend(examples)
        return labelled(asking, examples)

    monkeypatch.setattr(check, "_labels", seen)
    found = check_task(asking, task).splits[split]
    assert 0 < found.pair_groups <= found.groups <= found.conflicts
    of_item = defaultdict[str, set[str]](set)
    mine = [e for e in dict.fromkeys(asked) if e.kind == "conflict" and e.split == split]
    for example, shown in zip(mine, labelled(asking, mine), strict=True):
        of_item[example.item].add(shown)
    flips = {item for item, labels in of_item.items() if {"memorized", "generalized"} <= labels}
    assert flips
    assert found.pairs >= len(flips & {e.item for e in mine}) / 2, "most items that flip were paired"
    assert found.pair_groups <= len(flips)
