"""A quick look at a model and a task before anything is fitted: what it answers, what flips, what `fit` will take.

A sample of every kind and split is labelled, without any shift. Nothing is written.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from mnemoscope.behaviour import Asking, decode, draw_candidates, prepare, score
from mnemoscope.face.fitting import full_draw, seconds_of, tokens_in
from mnemoscope.face.recipe import MEASURED, STEERING
from mnemoscope.interventions import Toward
from mnemoscope.runs.errors import InputError
from mnemoscope.statistics import LEAST_GROUPS
from mnemoscope.study.stages import judged_splits
from mnemoscope.tasks import SPLITS, Example, Split, Task, draw

SAMPLE = 160  # conflicts of a split, at most
FACTS = 400  # bare questions, at most
SHOWN, LONGEST = 3, 80  # other answers of a family; last characters of their prompts
GROUPS_NEEDED = 30  # with which a share is known to about 18 points to either side
JUDGED = STEERING["judged_examples"]  # conflicts of a behaviour that a fit judges, at most
FULL = {split: MEASURED["pairs"][f"{split}_examples"] for split in SPLITS}  # conflicts that a fit draws, at most


@dataclass(frozen=True)
class OfSplit:
    """Pairs found in a sample of a split."""

    conflicts: int
    groups: int
    candidates: int
    pairs: int
    pair_groups: int


@dataclass(frozen=True)
class Checked:
    """What a model does with a task.

    Attributes:
        families: by family, how many sampled conflicts of the test split were answered ``memorized``, ``generalized``
            and ``other``.
        others: by family, some prompts with other answers, and these.
        known, asked: facts that the model knows bare, of those asked; 0 of 0 where the task has none.
        kept: by family, how many memory examples of the test split are right, of how many.
        splits: pairs by split.
        minutes: estimated time of a fit with ``threads``, while the machine is as busy as during the check.
        half_width: about half the width of the test interval of a share of one half, of the rarer behaviour.
        missing: what to add, a line each.
    """

    families: dict[str, dict[str, int]]
    others: dict[str, list[tuple[str, str]]]
    known: int
    asked: int
    kept: dict[str, tuple[int, int]]
    splits: dict[str, OfSplit]
    minutes: float
    threads: int
    half_width: float
    missing: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        unpaired = [split for split, found in self.splits.items() if not found.pairs]
        lines = [f"not yet to be fitted, it seems: no pairs in the split {', '.join(unpaired)}"] if unpaired else []
        lines += [f"known bare: {self.known} of {self.asked}"] if self.asked else []
        for family, counts in self.families.items():
            told = ", ".join(f"{count} {behaviour}" for behaviour, count in counts.items())
            lines.append(f"{family}, test split: {told}")
            lines += [f"  neither: {answer!r} to ...{prompt[-LONGEST:]!r}" for prompt, answer in self.others[family]]
        lines += [f"{family}, test split: {right} of {n} answered right" for family, (right, n) in self.kept.items()]
        for split, found in self.splits.items():
            told = f"{found.pairs} pairs of {found.pair_groups} groups among {found.candidates} candidates"
            lines.append(f"{split}: {found.conflicts} conflicts of {found.groups} groups sampled, {told}")
        width = "none" if math.isnan(self.half_width) else f"about {100 * self.half_width:.0f} points to either side"
        now = f"{self.threads} thread{'s' * (self.threads > 1)}, the machine as busy as now"
        lines += [f"a fit takes about {self.minutes:.0f} minutes ({now}); test intervals: {width}"]
        return "\n".join([*lines, *(f"missing: {line}" for line in self.missing)])


def check_task(asking: Asking, task: Task, seed: int = 0) -> Checked:
    """Label a sample of a task.

    Raises:
        InputError: nothing is known bare where conflicts need it, or the test split has no conflict.
    """
    begun, tokens = time.perf_counter(), 0
    rng = np.random.default_rng(seed)
    facts = task.facts_to_know()
    more = max(1.0, len(facts) / FACTS)  # times the facts that are asked, and so about the conflicts
    facts = [facts[i] for i in rng.permutation(len(facts))[:FACTS]]
    if facts:
        known = {e.item for e, label in zip(facts, _labels(asking, facts), strict=True) if label == "correct"}
        tokens += tokens_in(asking, facts)
        task = task.knowing(known)
    sampled, labels, splits = dict[Split, list[Example]](), dict[Split, np.ndarray](), dict[str, OfSplit]()
    for split in SPLITS:
        sampled[split] = draw(task, rng, FULL[split], "conflict", split)[:SAMPLE]
        labels[split], splits[split], candidates = _pairs(asking, task, sampled[split], rng)
        tokens += tokens_in(asking, candidates)
    if not sampled["test"]:
        raise InputError("task: it has no conflict in the test split, so nothing can be judged")
    kept = draw(task, rng, SAMPLE, "memory", "test")
    tokens += tokens_in(asking, kept)
    families, others = _families(asking, sampled["test"], labels["test"])
    by_family = {f: [e for e in kept if e.family == f] for f in dict.fromkeys(e.family for e in kept)}
    right = {f: (int((_labels(asking, some) == "correct").sum()), len(some)) for f, some in by_family.items()}
    each = (time.perf_counter() - begun) / max(1, tokens)
    seconds = seconds_of(each, tokens_in(asking, full_draw(task, seed)))
    groups = dict.fromkeys(Toward, 0)
    for split in judged_splits(len({example.group for sample in sampled.values() for example in sample})):
        whole = draw(task, rng, FULL[split], "conflict", split)
        fitted = min(FULL[split], round(more * len(whole)))
        for side in groups:
            groups[side] += _groups_judged(fitted, sampled[split], labels[split], side)
    fewest = min(groups.values())
    width = math.nan if fewest < LEAST_GROUPS else 1.0 / math.sqrt(fewest)
    missing = _missing(splits, groups, families, bool(kept))
    if (spaces := sum(example.prompt.endswith(" ") for example in sampled["test"])) and any(map(len, others.values())):
        missing.append(f"prompts: {spaces} of {len(sampled['test'])} end in a space; leave it to the answer behind it")
    if asking.prompting.chat and not asking.prompting.begun and any(map(len, others.values())):
        missing.append("the beginning of the reply: this chat model words its own; give it (--reply 'The answer is')")
    counts = (len(known), len(facts)) if facts else (0, 0)
    return Checked(families, others, *counts, right, splits, seconds / 60, torch.get_num_threads(), width, missing)


def _groups_judged(drawn: int, sample: Sequence[Example], labels: np.ndarray, behaviour: str) -> int:
    """About how many groups that show a behaviour a fit judges, where it draws so many conflicts of a split.

    Groups of the sample that is labelled grow as conflicts do; of a behaviour only some conflicts are judged.
    """
    shown = [example for example, label in zip(sample, labels, strict=True) if label == behaviour]
    judged = min(JUDGED, round(len(shown) * drawn / max(1, len(sample))))
    among = len({example.group for example in shown[:judged]})
    return round(min(judged, among * max(1.0, judged / max(1, len(shown)))))


def _labels(asking: Asking, examples: Sequence[Example]) -> np.ndarray:
    return score(asking, prepare(asking, examples), margins=False).behaviour_N


def _pairs(
    asking: Asking, task: Task, sample: Sequence[Example], rng: np.random.Generator
) -> tuple[np.ndarray, OfSplit, list[Example]]:
    """Labels of a sample, its pairs with one rephrasing each, and all that was asked."""
    candidates = list(draw_candidates(task, sample, rng))
    asked = list(dict.fromkeys([*sample, *(other for _, other in candidates)]))
    label = dict(zip(asked, _labels(asking, asked), strict=True))
    flips = [a for a, b in candidates if {label[a], label[b]} == {"memorized", "generalized"}]
    found = OfSplit(
        len(sample), len({e.group for e in sample}), len(candidates), len(flips), len({e.group for e in flips})
    )
    return np.array([label[example] for example in sample], dtype=object), found, asked


def _families(
    asking: Asking, examples: Sequence[Example], labels: np.ndarray
) -> tuple[dict[str, dict[str, int]], dict[str, list[tuple[str, str]]]]:
    """Answers by family, and some of the other ones."""
    counts: dict[str, dict[str, int]] = {}
    others: dict[str, list[tuple[str, str]]] = {}
    for family in dict.fromkeys(example.family for example in examples):
        mine = [i for i, example in enumerate(examples) if example.family == family]
        found = Counter(labels[mine])
        counts[family] = {behaviour: found[behaviour] for behaviour in ("memorized", "generalized", "other")}
        strange = [examples[i] for i in mine if labels[i] == "other"][:SHOWN]
        answers = (text.strip() for text in decode(asking, strange))
        others[family] = list(zip((one.prompt for one in strange), answers, strict=True))
    return counts, others


def _missing(
    splits: dict[str, OfSplit], groups: dict[Toward, int], families: dict[str, dict[str, int]], kept: bool
) -> list[str]:
    """What to add, a line each."""
    lines = []
    for side, count in groups.items():
        if count < GROUPS_NEEDED:
            lines.append(
                f"judged groups answered {side}: about {count}; {GROUPS_NEEDED} show a share to about 18 points"
            )
    for split, found in splits.items():
        if not found.conflicts:
            lines.append(f"conflicts in the {split} split: none")
        elif not found.candidates:
            lines.append(f"phrasings in the {split} split: every item has one; give each several lines")
        elif not found.pairs:
            lines.append(f"pairs in the {split} split: no sampled item flips; add phrasings that lean the other way")
    whole = Counter[str]()
    for counts in families.values():
        whole.update(counts)
    total = sum(whole.values())
    for behaviour in ("memorized", "generalized"):
        if whole[behaviour] < 0.05 * total:
            instead = Toward(behaviour).opposite
            enough = f"these prompts are answered {instead} as they are, which needs no steering; phrasings that lean"
            why = f"{enough} the other way would show both" if whole[instead] > 0.9 * total else "nothing shows it"
            lines.append(f"{behaviour} answers: {whole[behaviour]} of {total}; {why}")
    if whole["other"] > 0.3 * total:
        lines.append(f"answers: {whole['other']} of {total} are neither; look at them above")
    if not kept:
        lines.append("agreeing or bare lines (kind memory): without them nothing shows what steering costs")
    return lines
