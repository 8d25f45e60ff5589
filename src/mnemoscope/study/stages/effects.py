"""Dose-response of chosen vectors, necessity of their neurons, and upper bounds, on test pairs."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mnemoscope.behaviour import Asking, Batch, Scores, read_states, score, score_contrasted
from mnemoscope.bench.answers import steered
from mnemoscope.interventions import OPPOSITE, SteeringVector, ablated, patched
from mnemoscope.interventions.controls import control_draws
from mnemoscope.interventions.shifts import rho, top_neurons
from mnemoscope.interventions.sources import SOURCE, TOWARD, with_prefixes
from mnemoscope.models import SITES, Site, blocks_of
from mnemoscope.runs.errors import InputError
from mnemoscope.study.cells import Cell, Tell
from mnemoscope.study.stages.common import cell_model, kept_states, read_all, read_best, write_table
from mnemoscope.study.stages.lists import RecordedBench, Records, judged_lists
from mnemoscope.tasks import Example

CONTRASTS = {"to_generalized": (0.5, 1.0), "to_memorized": (-0.5, -1.0)}  # of context-aware decoding; -1: no context


def effects_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Measure dose-response, necessity, upper bounds by patching, and prompts that ask for the behaviour."""
    asking = cell_model(cell)
    bench = RecordedBench.of(cell, asking)
    sides = _Sides.of(cell, asking, bench.records)
    aimed = sides if cell.config.steering.aim == "pairs" else _Sides.aimed(cell, asking, bench.records)
    chosen = read_best(cell) if cell.config.effects.methods == "best" else read_all(cell)
    vectors = [one for one in chosen if isinstance(one, SteeringVector) and one.layers]
    rows: list[pd.DataFrame] = []
    parts: dict[str, Iterable[Iterator[pd.DataFrame]]] = {
        "doses": (_doses(cell, sides, bench, one) for one in vectors),
        "ablations": (_ablations(cell, sides, bench, one) for one in vectors),
        "patches": [_patches(cell, sides)] if cell.config.effects.patched else [],
        "prompts": (part(bench.records, aimed) for part in (_prompts, _contrasts)),
    }
    for done, (name, found) in enumerate(parts.items()):
        tell(done, len(parts), name)
        rows += chain.from_iterable(found)
    return [write_table(cell.records / "effects.parquet", pd.concat(rows, ignore_index=True))]


@dataclass(frozen=True)
class _Sides:
    """Test pairs by behaviour shown, prepared with prefixes, with unsteered scores; row n of both sides is one pair.

    ``reachable_N``: bool, whether the side answered generalized leaves the stored key where it was stored.
    """

    asking: Asking
    examples: Mapping[str, Sequence[Example]]
    batches: Mapping[str, Sequence[Batch]]
    unsteered: Mapping[str, Scores]
    reachable_N: np.ndarray

    @classmethod
    def of(cls, cell: Cell, asking: Asking, records: Records) -> _Sides:
        pairs = records.both_sides("test", cell.config.effects.pairs)
        examples = {"generalized": [a for a, _ in pairs], "memorized": [b for _, b in pairs]}
        return cls._read(asking, records, examples)

    @classmethod
    def aimed(cls, cell: Cell, asking: Asking, records: Records) -> _Sides:
        """Test conflicts as drawn, of either behaviour, which the vectors of that aim are for."""
        limit = cell.config.effects.pairs
        lists = (judged_lists(records, direction, limit) for direction in TOWARD)
        found = {SOURCE[d]: of.get("conflict") for d, of in zip(TOWARD, lists, strict=True)}
        return cls._read(asking, records, {side: list(one.examples) if one else [] for side, one in found.items()})

    @classmethod
    def _read(cls, asking: Asking, records: Records, examples: dict[str, list[Example]]) -> _Sides:
        batches = {side: with_prefixes(asking, found) for side, found in examples.items()}
        reachable_N = np.array([records.task.keeps_key(example) for example in examples["generalized"]], bool)
        unsteered = {side: score(asking, found) for side, found in batches.items()}
        return cls(asking, examples, batches, unsteered, reachable_N)

    def states(self, cell: Cell, side: str, site: Site) -> np.ndarray:
        """States of one side, float32 (N, L, D): those that mining kept, else read behind the cached prefixes."""
        if site == cell.config.pairs.site:
            return read_states(self.asking, self.examples[side], site, kept=kept_states(cell)).at_decision_NLD
        found_NLD = score(self.asking, self.batches[side], margins=False, capture=site).states_NLD
        assert found_NLD is not None
        return found_NLD

    def table(self, side: str, scores: Scores, one: SteeringVector | None = None, **facts: Any) -> pd.DataFrame:
        """One row per pair of one side's scores; of shifts to memory only for pairs that keep the key in place."""
        columns: dict[str, Any] = {"direction": f"to_{one.toward}" if one else ""}
        columns |= {name: getattr(one, name, "") for name in ("method", "site")}
        columns |= {"layers": "", "role": "", "dose": np.nan, "draw": 0, **facts, "side": side}
        columns |= {"example": np.arange(len(self.examples[side])), "group": [e.group for e in self.examples[side]]}
        columns |= {"after": scores.behaviour_N, "margin_before": self.unsteered[side].margin_N}
        table = pd.DataFrame(columns | {"margin": scores.margin_N})
        whole = columns["what"] == "ablation" or columns["direction"] != "to_memorized"
        return table if whole else table[self.reachable_N]


def _doses(cell: Cell, sides: _Sides, bench: RecordedBench, one: SteeringVector) -> Iterator[pd.DataFrame]:
    """A chosen vector from minus to plus twice its strength, and Gaussian shifts of the same norm."""
    config, side = cell.config.effects, OPPOSITE[one.toward]
    stream = zlib.crc32(f"to_{one.toward}/{one.method}".encode())  # draws of its own
    draws = list(control_draws("gaussian", bench, one, config.draws, [cell.seed, 7, stream]))
    shifts = [("vector", 0, one), *(("gaussian", n, drawn) for n, drawn in draws)]
    for dose, (role, draw, shift) in product(config.doses, shifts):
        known = not dose and shift.positions == "decision"  # with "all", prompts are read without prefixes
        scores = sides.unsteered[side] if known else steered(sides.asking, sides.batches[side], shift * dose)
        yield sides.table(side, scores, one, what="dose", dose=dose, role=role, draw=draw)


def _ablations(cell: Cell, sides: _Sides, bench: RecordedBench, one: SteeringVector) -> Iterator[pd.DataFrame]:
    """Ablate, to their mean, the neurons that a vector moves most, and as many at random in each layer."""
    sources = bench.sources(one.site, one.unit)
    mean_LD = sources.states_P2LD.mean((0, 1))
    for top in cell.config.effects.ablated:
        kept_LD = strongest(bench, one, top)
        rng = np.random.default_rng([cell.seed, 8, int(1000 * top)])
        drawn = [rng.permuted(kept_LD, axis=1) for _ in range(cell.config.effects.draws)]
        for draw, chosen_LD in enumerate((kept_LD, *drawn)):
            layers = np.flatnonzero(chosen_LD.any(axis=1)).tolist()
            means = {layer: torch.from_numpy(mean_LD[layer]).float() for layer in layers}
            neurons = {layer: torch.from_numpy(chosen_LD[layer]) for layer in layers}
            applied = partial(ablated, sides.asking.model, means, neurons, one.site)
            facts = {"what": "ablation", "role": "random_neurons" if draw else "vector", "draw": max(0, draw - 1)}
            for side, batches in sides.batches.items():
                scores = score(sides.asking, batches, applied=applied)
                yield sides.table(side, scores, one, **facts, dose=top)


def strongest(bench: RecordedBench, one: SteeringVector, top: float) -> np.ndarray:
    """The share ``top`` of the neurons in a vector's layers that it moves most; bool (L, D).

    Of NMD those of the largest |rho|, as they were chosen; of what acts by the state those that are written most.
    """
    sources = bench.sources(one.site, one.unit)
    moved_LD = sources.relative(one.dense(*sources.shape_LD).astype(np.float64))
    for layer, edit in one.low_rank.items():
        moved_LD[layer] += np.linalg.norm(edit.write_KD.double().numpy(), axis=0)
    rank_LD = rho(bench, one.site) if one.method.endswith("nmd") else moved_LD
    return top_neurons(rank_LD, list(one.setting.get("layers", one.layers)), top)


def _patches(cell: Cell, sides: _Sides) -> Iterator[pd.DataFrame]:
    """Patch each layer's state at the decision position from one side of a pair into the other."""
    model = sides.asking.model
    for site in SITES:
        states = {side: sides.states(cell, side, site) for side in sides.batches}
        for direction, toward in TOWARD.items():
            side, donor_NLD = SOURCE[direction], states[toward]
            for layer in range(len(blocks_of(model))):
                # Batches are scored in order, each once.
                donors = (torch.from_numpy(donor_NLD[b.examples_N, layer]) for b in sides.batches[side])
                patches = (patched(model, layer, donor_ND, site) for donor_ND in donors)
                scores = score(sides.asking, sides.batches[side], applied=partial(next, patches))
                facts: dict[str, Any] = {"what": "patch", "direction": direction, "site": site, "layers": str(layer)}
                yield sides.table(side, scores, **facts)


def _prompts(records: Records, sides: _Sides) -> Iterator[pd.DataFrame]:
    """Prompts that ask for the behaviour, in a chat's system message or in the text, where the task has them."""
    for direction, toward in TOWARD.items():
        side, asking = SOURCE[direction], sides.asking
        wanted, instruction = list(sides.examples[side]), records.task.instruction(toward)
        if asking.prompting.chat and instruction:
            asking = replace(asking, prompting=replace(asking.prompting, system=instruction))
        else:
            wanted = [other for example in wanted if (other := records.task.prompted(example, toward))]
        if len(wanted) < len(sides.examples[side]):
            continue
        try:
            batches = with_prefixes(asking, wanted)
        except InputError:  # a tokenizer without these words
            continue
        yield sides.table(side, score(asking, batches), what="prompt", direction=direction)


def _contrasts(records: Records, sides: _Sides) -> Iterator[pd.DataFrame]:
    """Context-aware decoding, where the task has the prompts without context."""
    for direction, weights in CONTRASTS.items():
        examples = sides.examples[SOURCE[direction]]
        others = [other for example in examples if (other := records.task.without_context(example))]
        if len(others) < len(examples):
            return
        for weight, scores in zip(weights, score_contrasted(sides.asking, examples, others, weights), strict=True):
            yield sides.table(SOURCE[direction], scores, what="contrast", direction=direction, dose=weight)
