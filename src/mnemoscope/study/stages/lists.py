"""The lists of examples that directions are made from, chosen on and judged on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Asking, prepare, score
from mnemoscope.bench.lists import Bench, Lists, each_once, fit_lists
from mnemoscope.bench.prompts import Prompts, bare_of
from mnemoscope.interventions import Toward
from mnemoscope.interventions.sources import FitLists, Sources, Tried, read_sources
from mnemoscope.models import Site
from mnemoscope.study.cells import Cell
from mnemoscope.study.stages.common import cell_task, kept_states, rng_of
from mnemoscope.tasks import SPLITS, Example, Split, Task, draw

LEAST_OF_A_FAMILY = 20  # examples, below which one of them that is lost would decide alone


@dataclass(frozen=True)
class Records:
    """Tables of a cell that earlier stages wrote: every candidate of every split, and test examples of every kind.

    ``held_out``: by name, test candidates of what nothing was fitted on.
    """

    task: Task
    pairs: pd.DataFrame
    behaviour: pd.DataFrame
    held_out: Mapping[str, pd.DataFrame]

    @classmethod
    def of(cls, cell: Cell) -> Records:
        """Read the records of a cell."""
        pairs, behaviour = (pd.read_parquet(cell.records / f"{name}.parquet") for name in ("pairs", "behaviour"))
        path = cell.records / "pairs_held_out.parquet"
        held_out = dict(iter(pd.read_parquet(path).groupby("held_out"))) if path.exists() else {}
        return cls(cell_task(cell), pairs, behaviour, {str(name): table for name, table in held_out.items()})

    def both_sides(self, split: Split, limit: int) -> list[tuple[Example, Example]]:
        """Pairs as (answered generalized, answered memorized)."""
        return [(phrasing(row, "generalized"), phrasing(row, "memorized")) for row in self._pairs(split, limit)]

    def targets(self, split: Split, toward: Toward, limit: int, reachable: bool = True) -> list[Example]:
        """Of each pair, the phrasing that shows the behaviour to steer away from, each phrasing once.

        Only a phrasing that keeps the stored key in place is ``reachable`` by steering to memory; the others are judged
        apart. Every phrasing can be steered to the rule.
        """
        phrasings = (phrasing(row, toward.opposite) for row in self._pairs(split, None))
        wanted = (e for e in phrasings if (toward == "generalized" or self.task.keeps_key(e)) == reachable)
        return each_once(wanted, limit)

    def conflicts(self, split: Split, behaviour: str, limit: int, reachable: bool = False) -> list[Example]:
        """Examples as drawn, before any rephrasing, that show a behaviour; ``reachable``: that keep the key."""
        part = self.pairs[(self.pairs["split"] == split) & (self.pairs["behaviour_a"] == behaviour)]
        examples = (Example.from_row(row, "a") for row in _rows(part))
        return each_once((e for e in examples if not reachable or self.task.keeps_key(e)), limit)

    def drawn(self, split: Split, limit: int) -> list[Example]:
        """Conflicts as drawn, whatever they show."""
        part = self.pairs[self.pairs["split"] == split]
        return each_once((Example.from_row(row, "a") for row in _rows(part)), limit)

    def _pairs(self, split: Split, limit: int | None) -> Iterator[Mapping[str, Any]]:
        chosen = self.pairs[self.pairs["is_pair"] & (self.pairs["split"] == split)]
        return _rows(chosen.head(len(chosen) if limit is None else limit))


@dataclass(frozen=True, eq=False, kw_only=True)
class RecordedBench(Bench):
    """The bench of a cell: lists from the records that earlier stages wrote."""

    cell: Cell
    records: Records
    prepared: dict[tuple[Toward, bool], Lists] = field(default_factory=dict)  # whose cached prefixes need memory
    exchanged: bool = False

    @classmethod
    def of(cls, cell: Cell, asking: Asking) -> RecordedBench:
        """Open the records of a cell."""
        config, records = cell.config.steering, Records.of(cell)
        grids: Any = config.grids
        tried = Tried(grids, config.unit, config.positions, config.low_rank)
        return cls(asking, records.task, cell.seed, tried, cell=cell, records=records)

    def exchange(self) -> RecordedBench:
        """The same with the tune and test splits exchanged, to judge on tune what is chosen on test."""
        limit, rng = self.cell.config.pairs.behaviour_examples, rng_of(self.cell, "steering/exchanged")
        examples = self.records.drawn("tune", limit)
        for kind in ("memory", "novel"):
            examples += draw(self.task, rng, limit, kind, "tune")
        found = score(self.asking, prepare(self.asking, examples))
        behaviour = pd.DataFrame([example.to_row() for example in examples])
        behaviour = behaviour.assign(behaviour=found.behaviour_N, margin=found.margin_N)
        pairs = self.records.pairs.replace({"split": {"tune": "test", "test": "tune"}})
        records = replace(self.records, pairs=pairs, behaviour=behaviour, held_out={})
        return replace(self, records=records, exchanged=True, prepared={})

    @cached_property
    def judged(self) -> dict[str, dict[str, JudgedList]]:
        """What is judged on, by direction and name."""
        limit = self.cell.config.steering.judged_examples
        return {toward.direction: judged_lists(self.records, toward, limit) for toward in Toward}

    @cached_property
    def pairs(self) -> list[tuple[Example, Example]]:
        """Fit pairs."""
        return self.records.both_sides("fit", self.cell.config.steering.fit_pairs)

    def _read(self, site: Site) -> Sources:
        return read_sources(site, self.pairs, self.asking, lambda: self.lists, kept_states(self.cell))

    @cached_property
    def fit_conflicts(self) -> Prompts:
        """Conflicts of the fit split."""
        return self.prompts(self.records.drawn("fit", self.cell.config.steering.fit_others))

    @cached_property
    def fit_agreeing(self) -> Prompts:
        """Memory examples of the fit split that are answered right."""
        right = self._answered_right("fit", self.cell.config.steering.fit_others, ("memory",))
        return self.prompts(right["memory"])

    @cached_property
    def tune_conflicts(self) -> Prompts:
        """Conflicts of the tune split."""
        return self.prompts(self.records.drawn("tune", self.cell.config.steering.tune_others))

    @cached_property
    def lists(self) -> FitLists:
        """Fit lists, prepared with prefixes."""
        config, records = self.cell.config.steering, self.records
        # Memory examples that are conflicts give away the memorized answer, which shuffled labels must not know.
        known = () if records.task.memory_is_conflict else ("memory",)
        kinds = [kind for kind in (*known, "novel") if kind in config.kept_kinds]
        right = self._answered_right("fit", config.fit_others, kinds)
        return fit_lists(
            replace(self.asking, batch_size=config.fit_batch),  # a learned vector takes one batch a step
            records.task,
            {toward: records.targets("fit", toward, config.fit_pairs) for toward in Toward},
            {to: records.conflicts("fit", to.opposite, config.fit_others, to == "memorized") for to in Toward},
            {toward: [right[kind] for kind in _kept(records, toward) if kind in right] for toward in Toward},
            kept_weight=config.kept_weight,
            steps=config.learned_steps,
            low_rank_steps=config.low_rank.steps,
        )

    def choosing(self, toward: Toward, few: bool = False) -> Lists:
        """What settings of a direction are chosen on: tune examples of the study's aim; ``few``: of each list some."""
        if (toward, few) not in self.prepared:
            self.prepared[toward, few] = self._choosing(toward, few)
        return self.prepared[toward, few]

    def _choosing(self, toward: Toward, few: bool) -> Lists:
        config, records = self.cell.config.steering, self.records
        if config.aim == "pairs":
            targets = records.targets("tune", toward, config.tune_pairs)
        else:
            targets = records.conflicts("tune", toward.opposite, config.tune_others, toward == "memorized")
        kinds = _kept(records, toward)
        right = {name: prompts for name, prompts in self._tune_right.items() if name.split(",")[0] in kinds}
        kept = {name: (prompts, "correct") for name, prompts in right.items()}
        if config.aim == "conflict":
            kept["conflict_rest"] = self.prompts(records.conflicts("tune", toward, config.tune_others)), toward
        size = config.screened if few else None
        found = {name: (_first(prompts, size), label) for name, (prompts, label) in kept.items() if len(prompts)}
        return Lists(_first(self.prompts(targets), size), found)

    @cached_property
    def _tune_right(self) -> dict[str, Prompts]:
        """Tune examples that are answered right: new questions, and facts to recall, by phrasing where these are many.

        A fact that is asked for without context and one that the prompt repeats are lost in different ways.
        """
        found = self._answered_right("tune", self.cell.config.steering.tune_others, ("memory", "novel"))
        families = Counter(example.family for example in found["memory"])
        if len(families) > 1 and min(families.values()) >= LEAST_OF_A_FAMILY:
            memory = found.pop("memory")
            found |= {f"memory, {name}": [e for e in memory if e.family == name] for name in sorted(families)}
        return {name: self.prompts(examples) for name, examples in found.items()}

    def prompts(self, examples: Sequence[Example]) -> Prompts:
        """A list of examples with their bare questions; of a fit those that its user will have, if all can be seen."""
        bares = [self.task.without_context(example) for example in examples]
        if self._as_used:
            bares = [bare_of(example) for example in examples]
        return Prompts(self.asking, examples, bares)

    @cached_property
    def _as_used(self) -> bool:
        """Whether every conflict quotes a text that can be told from its question."""
        drawn = (e for split in SPLITS for e in self.records.drawn(split, len(self.records.pairs)))
        return bool(self.cell.config.steering.screened) and all(map(bare_of, drawn))

    def _answered_right(self, split: Split, limit: int, kinds: Sequence[str]) -> dict[str, list[Example]]:
        """Memory and novel examples of a split that the model answers right, of the kinds that are needed."""
        rng, found = rng_of(self.cell, f"steering/{split}"), {}
        split = "test" if self.exchanged and split == "tune" else split
        for kind in ("memory", "novel"):
            examples = draw(self.task, rng, limit, kind, split)  # of all kinds: no list depends on which are needed
            if kind in kinds:
                labels = score(self.asking, prepare(self.asking, examples), margins=False).behaviour_N
                found[kind] = [e for e, label in zip(examples, labels, strict=True) if label == "correct"]
        return found


def _first(prompts: Prompts, n: int | None) -> Prompts:
    return prompts if n is None else prompts.of(range(min(n, len(prompts))))


class JudgedList(NamedTuple):
    """Test examples with their unsteered labels and margins in nats, NaN for memory and novel examples."""

    examples: Sequence[Example]
    before: Sequence[str]
    margin_N: np.ndarray


def judged_lists(records: Records, toward: Toward, limit: int) -> dict[str, JudgedList]:
    """The lists that steering is judged on; empty ones are left out."""
    lists = {}
    others = {f"pairs_{name}": replace(records, pairs=table) for name, table in records.held_out.items()}
    for name, found in {"pairs": records, "pairs_unreachable": records, **others}.items():
        examples = found.targets("test", toward, limit, reachable=name != "pairs_unreachable")
        lists[name] = JudgedList(examples, [toward.opposite] * len(examples), _margins(found.pairs, examples))
    table = records.behaviour
    conflict = table[table["kind"] == "conflict"]
    parts = {
        "conflict": conflict[conflict["behaviour"] == toward.opposite],
        "conflict_rest": conflict[conflict["behaviour"] == toward],
        "memory": table[table["kind"] == "memory"],
        "novel": table[table["kind"] == "novel"],
    }
    if toward == "memorized":
        drawn = map(Example.from_row, parts["conflict"].to_dict("records"))
        parts["conflict"] = parts["conflict"][[records.task.keeps_key(example) for example in drawn]]
    for name, part in parts.items():
        first = part.head(limit)
        examples = [Example.from_row(row) for row in first.to_dict("records")]
        lists[name] = JudgedList(examples, first["behaviour"].tolist(), first["margin"].to_numpy())
    return {name: entry for name, entry in lists.items() if entry.examples}


def _kept(records: Records, toward: Toward) -> list[str]:
    """Kinds whose answers should stay: a model steered to memory has nothing to remember of a novel example."""
    memory = [] if records.task.memory_is_conflict and toward == "generalized" else ["memory"]
    return [*memory, "novel"] if toward == "generalized" else memory


def _margins(pairs: pd.DataFrame, examples: Sequence[Example]) -> np.ndarray:
    """Margins of phrasings that are among the candidates, either side, in nats; float64 (N,)."""
    prompts = {example.prompt for example in examples}
    known: dict[tuple[str, str], float] = {}
    for side in "ab":
        rows = pairs.loc[pairs[f"prompt_{side}"].isin(prompts), ["item", f"prompt_{side}", f"margin_{side}"]]
        known |= {(item, prompt): margin for item, prompt, margin in rows.itertuples(index=False, name=None)}
    return np.array([known[example.item, example.prompt] for example in examples], np.float64)


def _rows(table: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of a table one by one, as few of a long one may be wanted."""
    return (dict(zip(map(str, table), row, strict=True)) for row in table.itertuples(index=False, name=None))


def phrasing(row: Mapping[Any, Any], behaviour: str) -> Example:
    """The phrasing of a pair that shows a behaviour."""
    return Example.from_row(row, "a" if row["behaviour_a"] == behaviour else "b")
