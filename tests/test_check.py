"""The look before a fit, against plain labels and on files that lack something."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from families import tiny, tokenizer
from helpers import MINI_TASKS, label
from mnemoscope.behaviour import Asking, Prompting
from mnemoscope.face import check
from mnemoscope.face.check import _missing, check_task
from mnemoscope.tasks import SPLITS, Example, Split, build_task, draw


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
    for family, shown in found.others.items():
        assert len(shown) == min(check.SHOWN, found.families[family]["other"])
        for prompt, answer in shown:
            (asked,) = [n for n, example in enumerate(examples) if example.prompt == prompt]
            assert labels[asked] == "other"
            assert f"neither: {answer!r} to ...{prompt[-check.LONGEST :]!r}" in str(found)
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
    assert all(part in told for part in ("judged groups", "phrasings in the fit split", "agreeing or bare lines"))
    assert str(found).startswith("not yet to be fitted, it seems: no pairs in the split fit, tune, test")
    assert np.isnan(found.half_width) or found.half_width > 0.2
    lean = {"plain": {"memorized": 0, "generalized": 60, "other": 1}}
    assert "generalized as they are" in _missing({}, {}, lean, True)[0]


@pytest.mark.parametrize("split", ["fit", "tune", "test"])
def test_pairs_are_those_of_plain_labels(
    mini: Callable[[str], Asking], split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    asking, task, drawn = mini("addition"), build_task("addition", MINI_TASKS["addition"], 0), []
    draw_them = check.draw_candidates

    def kept(*arguments: Any) -> list[tuple[Example, Example]]:
        drawn.append(list(draw_them(*arguments)))
        return drawn[-1]

    monkeypatch.setattr(check, "draw_candidates", kept)
    found, candidates = check_task(asking, task).splits[split], drawn[SPLITS.index(split)]
    first, second = (label(asking, [pair[side] for pair in candidates]).behaviour_N for side in (0, 1))
    shown = zip(candidates, first, second, strict=True)
    groups = [pair[0].group for pair, one, other in shown if {one, other} == {"memorized", "generalized"}]
    assert (found.pairs, found.pair_groups) == (len(groups), len(set(groups)))
    assert 0 < found.pair_groups <= found.groups <= found.conflicts


def test_what_makes_answers_neither_is_said(tmp_path: Path) -> None:
    words = tokenizer()
    words.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    rows = [{"item": f"i{n}", "prompt": f"w{n} ", "memorized": " w40", "generalized": " w41"} for n in range(8)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task, model = build_task("jsonl", {"file": str(tmp_path / "x.jsonl")}, 0), tiny("gpt2")
    for prompting, said in ((Prompting(), False), (Prompting(True), True), (Prompting(True, reply="w3"), False)):
        missing = "\n".join(check_task(Asking(model, words, prompting=prompting), task).missing)
        assert "prompts: 2 of 2 end in a space; leave it to the answer" in missing
        assert ("give it (--reply 'The answer is')" in missing) == said
