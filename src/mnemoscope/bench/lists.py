"""The lists of an arena: what is fitted on, chosen on, and the frozen test set, on which every method is judged.

Shapes: N examples, L layers, D neurons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from mnemoscope.behaviour import (
    Asking,
    Batch,
    PairBatch,
    Scores,
    as_batch,
    cache_prefixes,
    draw_candidates,
    encode,
    mine_pairs,
    prepare,
    score,
)
from mnemoscope.config import ArenaConfig
from mnemoscope.interventions import OPPOSITE, Contrast, Quoted, Toward
from mnemoscope.interventions.sources import (
    TOWARD,
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


class Prompts:
    """A list of examples, prepared once for all interventions, with cached prefixes where they fit into memory.

    ``bares``: the same questions without their texts, or None where the task does not know them.
    """

    def __init__(self, asking: Asking, examples: Sequence[Example], bares: Sequence[Example | None]) -> None:
        self.asking, self.examples, self.bares = asking, list(examples), list(bares)
        self._contrasted: dict[Contrast, list[Batch]] = {}

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def groups(self) -> list[str]:
        """The group of each example."""
        return [example.group for example in self.examples]

    @cached_property
    def quoted(self) -> list[Quoted]:
        """The parts of each prompt."""
        pairs = zip(self.examples, self.bares, strict=True)
        return [Quoted.of(example.prompt, bare.prompt if bare else None) for example, bare in pairs]

    @cached_property
    def batches(self) -> list[Batch]:
        """The prompts with their options."""
        return with_prefixes(self.asking, self.examples)

    def contrast(self, which: Contrast) -> list[Example]:
        """What each prompt is contrasted with; a prompt without it stands for itself."""
        found = []
        for example, bare, quoted in zip(self.examples, self.bares, self.quoted, strict=True):
            cut = replace(example, prompt=quoted.before + quoted.behind)
            found.append(cut if which == "cut" and quoted.text else bare or example)
        return found

    def contrast_batches(self, which: Contrast) -> list[Batch]:
        """What prompts are contrasted with, row by row those of ``batches``."""
        if which not in self._contrasted:
            encoded = encode(self.asking, self.contrast(which))
            batches = [as_batch(self.asking, encoded, batch.examples_N) for batch in self.batches]
            cache_prefixes(self.asking, batches)
            self._contrasted[which] = batches
        return self._contrasted[which]

    @cached_property
    def unsteered(self) -> Scores:
        """Labels without any intervention."""
        return score(self.asking, self.batches)

    def of(self, chosen: Sequence[int] | np.ndarray) -> Prompts:
        """Some of the prompts."""
        return Prompts(self.asking, [self.examples[n] for n in chosen], [self.bares[n] for n in chosen])


@dataclass(frozen=True, slots=True)
class Known:
    """How many items were asked bare, and those that the model answers by heart.

    ``asked`` is 0 where the task has no such questions; then what it says is known counts as known.
    """

    asked: int
    items: Sequence[str]


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
    """

    asking: Asking
    task: Task
    seed: int
    tried: Tried = field(default_factory=Tried)
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
        """Whether every conflict has a bare question."""
        return all(bare is not None for bare in self.tune_conflicts.bares)

    def place(self, toward: Toward) -> tuple[Site, tuple[int, ...], float] | None:
        """Where and how strongly a shift is learned, by what was tried without learning; None: at all places."""
        return None

    def sources(self, site: Site, unit: Unit = "norm") -> Sources:
        """States of the fit pairs at a site, with the lists that are learned on; ``unit`` of the strengths."""
        if (site, "norm") not in self._sources:
            self._sources[site, "norm"] = self._read(site)
        return self._sources.setdefault((site, unit), replace(self._sources[site, "norm"], unit=unit))

    def _read(self, site: Site) -> Sources:
        return read_sources(site, self.pairs, self.asking, lambda: self.lists)


@dataclass(frozen=True, eq=False)
class Fit:
    """What is fitted on.

    Attributes:
        mined: labelled phrasings of the fit split, with states at the decision position.
        prompts: by name, lists of ``LISTS``; of the latter two those that are answered right.
    """

    mined: PairBatch
    prompts: Mapping[str, Prompts]


@dataclass(frozen=True, eq=False, kw_only=True)
class DrawnBench(Bench):
    """The bench of an arena: lists of known items, drawn and frozen.

    Attributes:
        known: what the model answers by heart.
        tune, test: by name, the lists of ``LISTS``; those of the test split are frozen before anything is applied.
    """

    config: ArenaConfig
    known: Known
    tune: Mapping[str, Prompts]
    test: Mapping[str, Prompts]

    @classmethod
    def of(cls, asking: Asking, task: Task, config: ArenaConfig, known: Known | None = None) -> DrawnBench:
        """Draw the lists and freeze them; InputError where too little is left. ``known``: default: it is asked."""
        asking = replace(asking, from_prompt=True, batch_size=config.batch_size)
        known = known or ask_known(asking, task)
        task = task.knowing(set(known.items)) if known.asked else task
        draws = {"tune": (config.tune_conflicts, config.tune_kept), "test": (config.conflicts, config.kept)}
        found = {split: _lists(asking, task, split, *sizes, config.seed) for split, sizes in draws.items()}  # type: ignore[arg-type]
        for split, lists in found.items():
            groups = len(set(lists["conflict"].groups))
            if groups < LEAST_GROUPS:
                raise InputError(
                    f"task: the {split} split has conflicts of {groups} groups whose items the model knows; at least "
                    f"{LEAST_GROUPS} are needed"
                )
        return cls(asking, task, config.seed, config=config, known=known, tune=found["tune"], test=found["test"])

    @property
    def tune_conflicts(self) -> Prompts:
        """The tune conflicts."""
        return self.tune["conflict"]

    @property
    def fit_conflicts(self) -> Prompts:
        """The fit conflicts."""
        return self.fit.prompts["conflict"]

    @property
    def fit_agreeing(self) -> Prompts:
        """The fit prompts that agree with memory."""
        return self.fit.prompts["agreeing"]

    @property
    def has_bares(self) -> bool:
        """Whether every test conflict has a bare question."""
        return all(bare is not None for bare in self.test["conflict"].bares)

    def choosing(self) -> Lists:
        """What settings are chosen on, the same in both directions."""
        kept = {name: (self.tune[name], "correct") for name in KEPT if len(self.tune[name])}
        return Lists(self.tune["conflict"], kept)

    @cached_property
    def fit(self) -> Fit:
        """What is fitted on; InputError where no pair is among it."""
        config, rng = self.config, np.random.default_rng([self.config.seed, 31])
        prompts = _lists(self.asking, self.task, "fit", config.fit_conflicts, config.fit_kept, config.seed)
        candidates = draw_candidates(self.task, prompts["conflict"].examples, rng, config.rephrasings)
        chunk = config.fit_conflicts * config.rephrasings
        mined = next(mine_pairs(self.asking, candidates, chunk=chunk), None)
        if mined is None:
            raise InputError("task: its fit conflicts have no other phrasing, so there are no pairs")
        return Fit(mined, prompts)

    @cached_property
    def lists(self) -> FitLists:
        """The fit lists of methods that learn by gradients, with prefixes."""
        return _fit_lists(self, self.fit.mined, self.fit.prompts)

    @cached_property
    def pairs(self) -> list[tuple[Example, Example]]:
        """Pairs of the fit split; InputError where less than two groups flip."""
        pairs = spread(self.fit.mined.pairs())[: self.config.pairs]
        if len({one.group for one, _ in pairs}) < 2:
            raise InputError(f"task: {len(pairs)} of its fit candidates flip; pairs of 2 groups are needed")
        return pairs


def ask_known(asking: Asking, task: Task) -> Known:
    """Ask every item bare, where the task has such questions."""
    asked = task.facts_to_know()
    labels = score(asking, prepare(asking, asked), margins=False).behaviour_N
    return Known(len(asked), [e.item for e, label in zip(asked, labels, strict=True) if label == "correct"])


def _lists(asking: Asking, task: Task, split: Split, conflicts: int, kept: int, seed: int) -> dict[str, Prompts]:
    """The three lists of a split; of those whose answers should stay, what the model answers right."""
    rng = np.random.default_rng([seed, len(split), *split.encode()])
    drawn, bares = known_conflicts(asking, task, split, conflicts, rng)
    alone = _each_once(as_bare(bare) for bare in bares if bare)
    memory = draw(task, rng, 4 * kept, "memory", split) if not task.memory_is_conflict else []
    agreeing = [e for e in memory if (bare := task.without_context(e)) is None or bare.prompt != e.prompt]
    lists = {"conflict": Prompts(asking, drawn, bares)}
    for name, examples in (("agreeing", agreeing), ("bare", alone)):
        examples = spread_groups(examples)[: 2 * kept]
        labels = score(asking, prepare(asking, examples), margins=False).behaviour_N
        right = [e for e, label in zip(examples, labels, strict=True) if label == "correct"][:kept]
        lists[name] = Prompts(asking, right, [task.without_context(e) if name == "agreeing" else e for e in right])
    return lists


def known_conflicts(
    asking: Asking, task: Task, split: Split, n: int, rng: np.random.Generator
) -> tuple[list[Example], list[Example | None]]:
    """At most ``n`` conflicts whose own bare questions the model answers by heart, and these questions.

    That it knows an item in one wording is not enough: what it is contrasted with, and taught by, is this one. Raises
    InputError where none is answered.
    """
    drawn = draw(task, rng, 3 * n, "conflict", split)
    bares = [task.without_context(example) for example in drawn]
    asked = [bare for bare in bares if bare]
    if drawn and len(asked) == len(drawn):
        is_known = score(asking, prepare(asking, asked), margins=False).behaviour_N == "memorized"
        chosen = np.flatnonzero(is_known)
        drawn, bares = [drawn[i] for i in chosen], [bares[i] for i in chosen]
        if not drawn:
            raise InputError(f"model: it answers no bare question of the {split} split by heart, so nothing is known")
    return drawn[:n], bares[:n]


def told_by_answers(bench: DrawnBench) -> float | None:
    """Share of test conflicts whose memorized answer is told by how often answers were that in fit conflicts.

    Nothing but the two answers is seen, so 0.5 is what a set should give; None where there is no fit split.
    """
    try:
        fit = bench.fit.prompts["conflict"].examples
    except InputError:
        return None
    known, said = (Counter(getattr(e, side) for e in fit) for side in ("memorized", "generalized"))

    def odds(answer: str | None) -> float:
        return (1 + known[answer]) / (1 + said[answer])

    ahead = [odds(e.memorized) - odds(e.generalized) for e in bench.test["conflict"].examples]
    return float(np.mean([(difference > 0) + 0.5 * (difference == 0) for difference in ahead]))


def _fit_lists(bench: DrawnBench, mined: PairBatch, prompts: Mapping[str, Prompts]) -> FitLists:
    config = bench.config
    asking = replace(bench.asking, batch_size=config.batch)  # one batch a step
    found = spread(mined.pairs())[: config.pairs]
    sides = {"generalized": [one for one, _ in found], "memorized": [other for _, other in found]}
    pairs, conflicts, items = {}, {}, {}
    ready = with_prefixes(asking, prompts["conflict"].examples)
    kept = [with_prefixes(asking, prompts[name].examples) for name in KEPT]
    for toward in TOWARD.values():
        targets = _each_once(sides[OPPOSITE[toward]])
        pairs[toward], conflicts[toward] = with_prefixes(asking, targets), ready
        items[toward] = [e.item for e in targets], [e.item for e in prompts["conflict"].examples]
    everywhere = {toward: in_turn(kept) for toward in TOWARD.values()}
    asked = [_each_once(sides[OPPOSITE["memorized"]]), prompts["conflict"].examples]
    first, second = ([bench.task.without_context(example) for example in examples] for examples in asked)
    known = [e for e in first if e], [e for e in second if e]
    bare = known if list(map(len, known)) == list(map(len, asked)) else None
    return FitLists(asking, pairs, conflicts, everywhere, 1.0, config.steps, items, bare, config.steps)


def spread(pairs: Sequence[tuple[Example, Example]]) -> list[tuple[Example, Example]]:
    """Pairs as evenly by group as possible."""
    by_group: dict[str, list[tuple[Example, Example]]] = {}
    for pair in pairs:
        by_group.setdefault(pair[0].group, []).append(pair)
    return in_turn(by_group.values())


def _each_once(examples: Iterable[Example]) -> list[Example]:
    """Examples whose prompts differ."""
    return list({example.prompt: example for example in examples}.values())
