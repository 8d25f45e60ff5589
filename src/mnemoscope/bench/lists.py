"""The lists of an arena: what is fitted on, chosen on, and the frozen test set, on which every method is judged.

Shapes: N examples, L layers, D neurons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from mnemoscope.behaviour import Asking, Batch, PairBatch, draw_candidates, mine_pairs, prepare, score
from mnemoscope.bench.known import Known, ask_known
from mnemoscope.bench.prompts import Prompts
from mnemoscope.config import ArenaConfig
from mnemoscope.interventions import Toward
from mnemoscope.interventions.sources import (
    FitLists,
    Sources,
    Tried,
    Unit,
    in_turn,
    read_sources,
    spread_groups,
    with_prefixes,
)
from mnemoscope.models import Site
from mnemoscope.runs.errors import InputError
from mnemoscope.statistics import LEAST_GROUPS
from mnemoscope.tasks import Example, Split, Task, as_bare, draw

KEPT = ("agreeing", "bare")  # lists whose answers should stay
LISTS = ("conflict", *KEPT)  # of every split
ANOTHER = 1_000_003  # added to the seed of each further fit
Examples = Sequence[Example]
ByToward = Mapping[Toward, Examples]


@dataclass(frozen=True)
class Lists:
    """What settings of one direction are chosen on.

    Attributes:
        targets: prompts that are to be steered.
        kept: by name, prompts whose answers should stay, all with the same label unsteered.
    """

    targets: Prompts
    kept: Mapping[str, tuple[Prompts, str]]


@dataclass(frozen=True, eq=False)
class Bench:
    """What methods are fitted on: a model, a task, and the lists of the fit and tune splits.

    Attributes:
        seed: of whatever methods draw.
        tried: what they try, where it is not their own choice.
        places: where and how strongly a shift is learned, by what was tried without learning; none: at all places.
    """

    asking: Asking
    task: Task
    seed: int
    tried: Tried = field(default_factory=Tried)
    places: dict[Toward, tuple[Site, tuple[int, ...], float]] = field(default_factory=dict)
    _sources: dict[tuple[Site, Unit], Sources] = field(default_factory=dict, repr=False)

    @property
    def pairs(self) -> list[tuple[Example, Example]]:
        """(answered generalized, answered memorized) of the fit split; InputError where there are too few."""
        raise NotImplementedError

    @property
    def lists(self) -> FitLists:
        """The fit lists of methods that learn by gradients, with prefixes."""
        raise NotImplementedError

    @property
    def fit_conflicts(self) -> Prompts:
        """Conflicts of the fit split, as drawn."""
        raise NotImplementedError

    @property
    def fit_agreeing(self) -> Prompts:
        """Prompts of the fit split whose text agrees with memory, of those that are answered right."""
        raise NotImplementedError

    @property
    def tune_conflicts(self) -> Prompts:
        """Conflicts of the tune split, as drawn."""
        raise NotImplementedError

    @property
    def has_bares(self) -> bool:
        """Whether every tune conflict has a bare question."""
        return all(bare is not None for bare in self.tune_conflicts.bares)

    def sources(self, site: Site, unit: Unit = "norm") -> Sources:
        """States of the fit pairs at a site, with the lists that are learned on; ``unit`` of the strengths."""
        if (site, "norm") not in self._sources:
            self._sources[site, "norm"] = self._read(site)
        return self._sources.setdefault((site, unit), replace(self._sources[site, "norm"], unit=unit))

    def _read(self, site: Site) -> Sources:
        return read_sources(site, self.pairs, self.asking, lambda: self.lists)


def fit_lists(
    asking: Asking,
    task: Task,
    targets: ByToward,
    conflicts: ByToward,
    kept: Mapping[Toward, Sequence[Examples]],
    **facts: Any,
) -> FitLists:
    """Fit lists with prefixes; a list that is given for both directions is prepared once.

    Args:
        targets, conflicts: phrasings of pairs that answer the other way, and other conflicts.
        kept: lists whose answers should stay, which are learned from in turn.
        facts: other fields of ``FitLists``.
    """
    prepared: dict[int, list[Batch]] = {}

    def ready(examples: Examples) -> list[Batch]:
        if id(examples) not in prepared:
            prepared[id(examples)] = with_prefixes(asking, examples)
        return prepared[id(examples)]

    asked = targets[Toward.MEMORIZED], conflicts[Toward.MEMORIZED]
    first, second = ([bare for e in examples if (bare := task.without_context(e))] for examples in asked)
    return FitLists(
        asking,
        {toward: ready(examples) for toward, examples in targets.items()},
        {toward: ready(examples) for toward, examples in conflicts.items()},
        {toward: in_turn(map(ready, lists)) for toward, lists in kept.items()},
        items={toward: ([e.item for e in targets[toward]], [e.item for e in conflicts[toward]]) for toward in targets},
        bare=(first, second) if (len(first), len(second)) == tuple(map(len, asked)) else None,
        **facts,
    )


@dataclass(frozen=True, eq=False, kw_only=True)
class DrawnBench(Bench):
    """The bench of an arena: lists of known items, drawn and frozen; what is fitted on takes all items.

    Attributes:
        known: what the model answers by heart; ``of_known``: the task of these items.
        tune, test: by name, the lists of ``LISTS``; those of the test split are frozen before anything is applied.
    """

    config: ArenaConfig
    known: Known
    of_known: Task
    tune: Mapping[str, Prompts]
    test: Mapping[str, Prompts]

    @classmethod
    def of(cls, asking: Asking, task: Task, config: ArenaConfig, known: Known | None = None) -> DrawnBench:
        """Draw and freeze the lists of what is known, which is asked unless given; InputError where too little is."""
        asking = replace(asking, from_prompt=True, batch_size=config.batch_size)
        known = known or ask_known(asking, task)
        of_known = task.knowing(set(known.items)) if known.asked else task
        draws = {"tune": (config.tune_conflicts, config.tune_kept), "test": (config.conflicts, config.kept)}
        found = {split: _lists(asking, of_known, split, *sizes, config.seed) for split, sizes in draws.items()}  # type: ignore[arg-type]
        for split, lists in found.items():
            groups = len(set(lists["conflict"].groups))
            if groups < LEAST_GROUPS:
                raise InputError(
                    f"task: the {split} split has conflicts of {groups} groups whose items the model knows; at least "
                    f"{LEAST_GROUPS} are needed"
                )
        tune, test = found["tune"], found["test"]
        return cls(asking, task, config.seed, config=config, known=known, of_known=of_known, tune=tune, test=test)

    def again(self, number: int) -> DrawnBench:
        """The same for one more fit: other draws of the fit split, and other first weights."""
        return replace(self, seed=self.seed + ANOTHER * number, _sources={}) if number else self

    @property
    def tune_conflicts(self) -> Prompts:
        """The tune conflicts."""
        return self.tune["conflict"]

    @property
    def fit_conflicts(self) -> Prompts:
        """The fit conflicts; InputError where there is none."""
        if not len(self.fit["conflict"]):
            raise InputError("task: its fit split has no conflict")
        return self.fit["conflict"]

    @property
    def fit_agreeing(self) -> Prompts:
        """The fit prompts that agree with memory."""
        return self.fit["agreeing"]

    @property
    def has_bares(self) -> bool:
        """Whether every test conflict has a bare question."""
        return None not in self.test["conflict"].bares

    def choosing(self) -> Lists:
        """What settings are chosen on, the same in both directions."""
        kept = {name: (self.tune[name], "correct") for name in KEPT if len(self.tune[name])}
        return Lists(self.tune["conflict"], kept)

    @cached_property
    def fit(self) -> Mapping[str, Prompts]:
        """The lists of ``LISTS`` of the fit split; of the latter two those that are answered right."""
        config = self.config
        return _lists(self.asking, self.task, "fit", config.fit_conflicts, config.fit_kept, self.seed)

    @cached_property
    def mined(self) -> PairBatch:
        """Labelled phrasings of the fit split, with states at the decision position."""
        return self.mine("fit", 31)

    def mine(self, split: Literal["fit", "tune"], stream: int) -> PairBatch:
        """Labelled phrasings of a split's conflicts; InputError where these have no other phrasing."""
        config, conflicts = self.config, self.fit_conflicts if split == "fit" else self.tune_conflicts
        most = config.fit_conflicts if split == "fit" else config.tune_conflicts
        rng = np.random.default_rng([self.seed, stream])
        candidates = draw_candidates(self.task, conflicts.examples, rng, config.rephrasings)
        mined = next(mine_pairs(self.asking, candidates, chunk=most * config.rephrasings), None)
        if mined is None:
            raise InputError(f"task: its {split} conflicts have no other phrasing, so there are no pairs")
        return mined

    @cached_property
    def lists(self) -> FitLists:
        """The fit lists of methods that learn by gradients, with prefixes."""
        config = self.config
        found = spread_groups(self.mined.pairs(), lambda pair: pair[0].group)[: config.pairs]
        sides = {"generalized": [one for one, _ in found], "memorized": [other for _, other in found]}
        targets = {toward: each_once(sides[toward.opposite]) for toward in Toward}
        asking = replace(self.asking, batch_size=config.batch)  # one batch a step
        conflicts, kept = self.fit_conflicts.examples, [self.fit[name].examples for name in KEPT]
        stays = _drawn(self.task, "fit", config.fit_conflicts, config.fit_kept, self.seed)
        held = [with_prefixes(asking, spread_groups(stays[name])[: 2 * config.fit_kept]) for name in KEPT]
        return fit_lists(
            asking,
            self.task,
            targets,
            dict.fromkeys(Toward, conflicts),
            dict.fromkeys(Toward, kept),
            held=in_turn(held),
            steps=config.steps,
            low_rank_steps=config.steps,
        )

    @cached_property
    def pairs(self) -> list[tuple[Example, Example]]:
        """Pairs of the fit split; InputError where less than two groups flip."""
        pairs = spread_groups(self.mined.pairs(), lambda pair: pair[0].group)[: self.config.pairs]
        if len({one.group for one, _ in pairs}) < 2:
            raise InputError(f"task: {len(pairs)} of its fit candidates flip; pairs of 2 groups are needed")
        return pairs


def _drawn(task: Task, split: Split, conflicts: int, kept: int, seed: int) -> dict[str, list[Example]]:
    """The examples of the three lists of a split, whatever is answered."""
    rng = np.random.default_rng([seed, len(split), *split.encode()])
    drawn = draw(task, rng, conflicts, "conflict", split)
    memory = draw(task, rng, 4 * kept, "memory", split) if not task.memory_is_conflict else []
    agreeing = [e for e in memory if (bare := task.without_context(e)) is None or bare.prompt != e.prompt]
    bares = each_once(as_bare(bare) for e in drawn if (bare := task.without_context(e)))
    return {"conflict": drawn, "agreeing": agreeing, "bare": bares}


def _lists(asking: Asking, task: Task, split: Split, conflicts: int, kept: int, seed: int) -> dict[str, Prompts]:
    """The three lists of a split; of those whose answers should stay, what the model answers right."""
    drawn = _drawn(task, split, conflicts, kept, seed)
    lists = {"conflict": Prompts(asking, drawn["conflict"], list(map(task.without_context, drawn["conflict"])))}
    for name in KEPT:
        examples = spread_groups(drawn[name])[: 2 * kept]
        labels = score(asking, prepare(asking, examples), margins=False).behaviour_N
        right = [e for e, label in zip(examples, labels, strict=True) if label == "correct"][:kept]
        lists[name] = Prompts(asking, right, [task.without_context(e) if name == "agreeing" else e for e in right])
    return lists


def told_by_answers(bench: DrawnBench) -> float | None:
    """Share of test conflicts whose memorized answer, of the two, has the higher odds to be memorized in fit conflicts.

    Nothing but the two answers is seen, so 0.5 is what a set should give; None where there is no fit split.
    """
    try:
        fit = bench.fit_conflicts.examples
    except InputError:
        return None
    known, said = (Counter(getattr(e, side) for e in fit) for side in ("memorized", "generalized"))

    def odds(answer: str | None) -> float:
        return (1 + known[answer]) / (1 + said[answer])

    ahead = [odds(e.memorized) - odds(e.generalized) for e in bench.test["conflict"].examples]
    return float(np.mean([(difference > 0) + 0.5 * (difference == 0) for difference in ahead]))


def each_once(examples: Iterable[Example], limit: int | None = None) -> list[Example]:
    """The first examples whose items or prompts differ, at most ``limit``."""
    seen: dict[tuple[str, str], Example] = {}
    for example in examples:
        seen.setdefault((example.item, example.prompt), example)
        if len(seen) == limit:
            break
    return list(seen.values())
