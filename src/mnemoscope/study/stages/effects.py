"""What chosen vectors do beyond the shift: dose-response, needed neurons and upper bounds on test pairs, and to text.

Text is neutral, where the divergence is measured, gated and not; or what the model writes behind test prompts.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mnemoscope.behaviour import Scores, read_states, score
from mnemoscope.bench.answers import EARLIEST, NOTHING, Neutral, scores, texts_of
from mnemoscope.bench.prompts import Prompts
from mnemoscope.interventions import Held, SteeringVector, Toward, edited
from mnemoscope.interventions.controls import control_draws
from mnemoscope.interventions.decoding import Decoding
from mnemoscope.interventions.detect import Detector, Reading
from mnemoscope.interventions.shifts import rho, top_neurons
from mnemoscope.models import SITES, blocks_of, context_length
from mnemoscope.runs.errors import InputError, StudyError
from mnemoscope.study.cells import Cell, Tell
from mnemoscope.study.stages import common
from mnemoscope.study.stages.lists import RecordedBench, judged_lists

CONTRASTS = {Toward.GENERALIZED: (0.5, 1.0), Toward.MEMORIZED: (-0.5, -1.0)}  # of cad; -1: no context
Sides = Mapping[str, Prompts]  # by the behaviour that they show
Part = tuple[Callable[..., Iterator[pd.DataFrame]], tuple[SteeringVector, ...]]  # an effect, and of which vector


def effects_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Measure dose-response, necessity, upper bounds by patching, and prompts that ask for the behaviour."""
    config = cell.config.effects
    chosen = common.read_interventions(cell, config.methods)
    vectors = [one for one in chosen if isinstance(one, SteeringVector) and one.layers]
    parts: list[Part] = [(effect, (one,)) for effect in (_doses, _ablations) for one in vectors]
    parts += [(_patches, ())] if config.patched else []
    # A fit judges words and decoding as levers.
    parts += [] if cell.config.steering.screened else [(_asked, ()), (_contrasts, ())]
    rows: list[pd.DataFrame] = []
    for done, tables in enumerate(cell.map(_Effects(cell), parts)):
        tell(done, len(parts), parts[done][0].__name__.strip("_"))
        rows += tables
    return [common.write_table(cell.records / "effects.parquet", pd.concat(rows, ignore_index=True))]


class _Effects(common.PerProcess):
    """A cell's test pairs, beside its model."""

    def __call__(self, part: Part) -> list[pd.DataFrame]:
        """Tables of a kind of effect, of a vector where it is one's."""
        effect, of = part
        return list(effect(self.bench, self.aimed if effect in (_asked, _contrasts) else self.sides, *of))

    @cached_property
    def bench(self) -> RecordedBench:
        """Lists of the cell."""
        return RecordedBench.of(self.cell, self.asking)

    @cached_property
    def sides(self) -> Sides:
        """Row n of both sides is one pair."""
        pairs = self.bench.records.both_sides("test", self.cell.config.effects.pairs)
        return {side: self.bench.prompts([pair[n] for pair in pairs]) for n, side in enumerate(Toward)}

    @cached_property
    def aimed(self) -> Sides:
        """What is to be steered, by the behaviour that it shows."""
        if self.cell.config.steering.aim != "conflict":
            return self.sides
        limit, found = self.cell.config.effects.pairs, dict[str, Prompts]()
        for toward in Toward:
            of = judged_lists(self.bench.records, toward, limit)
            found[toward.opposite] = self.bench.prompts(of["conflict"].examples if "conflict" in of else [])
        return found


def _table(
    bench: RecordedBench, sides: Sides, side: str, found: Scores, one: SteeringVector | None = None, **facts: Any
) -> pd.DataFrame:
    """One row per pair of one side's scores; of shifts to memory only for pairs that keep the key in place."""
    examples = sides[side].examples
    columns: dict[str, Any] = {"direction": f"to_{one.toward}" if one else ""}
    columns |= {name: getattr(one, name, "") for name in ("method", "site")}
    columns |= {"layers": "", "role": "", "dose": np.nan, "draw": 0, **facts, "side": side}
    columns |= {"example": np.arange(len(examples)), "group": [e.group for e in examples]}
    columns |= {"after": found.behaviour_N, "margin_before": sides[side].unsteered.margin_N, "margin": found.margin_N}
    table = pd.DataFrame(columns)
    if columns["what"] == "ablation" or columns["direction"] != "to_memorized":
        return table
    return table[np.array([bench.task.keeps_key(example) for example in examples], bool)]


def _doses(bench: RecordedBench, sides: Sides, one: SteeringVector) -> Iterator[pd.DataFrame]:
    """A chosen vector from minus to plus twice its strength, and Gaussian shifts of the same norm."""
    config, side = bench.cell.config.effects, one.toward.opposite
    stream = zlib.crc32(f"to_{one.toward}/{one.method}".encode())  # draws of its own
    draws = list(control_draws("gaussian", bench, one, config.draws, [bench.seed, 7, stream]))
    shifts = [("vector", 0, one), *(("gaussian", n, drawn) for n, drawn in draws)]
    for dose, (role, draw, shift) in product(config.doses, shifts):
        known = not dose and shift.positions == "decision"  # with "all", prompts are read without prefixes
        found = sides[side].unsteered if known else scores(shift * dose, sides[side], margins=True)
        yield _table(bench, sides, side, found, one, what="dose", dose=dose, role=role, draw=draw)


def _ablations(bench: RecordedBench, sides: Sides, one: SteeringVector) -> Iterator[pd.DataFrame]:
    """Ablate, to their mean, the neurons that a vector moves most, and as many at random in each layer."""
    mean_LD, config = bench.sources(one.site, one.unit).states_P2LD.mean((0, 1)), bench.cell.config.effects
    for top in config.ablated:
        kept_LD = strongest(bench, one, top)
        rng = np.random.default_rng([bench.seed, 8, int(1000 * top)])
        for draw, chosen_LD in enumerate((kept_LD, *(rng.permuted(kept_LD, axis=1) for _ in range(config.draws)))):
            layers = np.flatnonzero(chosen_LD.any(axis=1)).tolist()
            means_LD, shares_LD = torch.from_numpy(mean_LD).float(), torch.from_numpy(chosen_LD).float()
            held = {layer: Held(means_LD[layer], shares_LD[layer]) for layer in layers}
            applied = partial(edited, bench.asking.model, held, one.site)
            facts = {"what": "ablation", "role": "random_neurons" if draw else "vector", "draw": max(0, draw - 1)}
            for side, prompts in sides.items():
                found = score(bench.asking, prompts.batches, applied=applied)
                yield _table(bench, sides, side, found, one, **facts, dose=top)


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


def _patches(bench: RecordedBench, sides: Sides) -> Iterator[pd.DataFrame]:
    """Patch each layer's state at the decision position from one side of a pair into the other."""
    asking, kept = bench.asking, common.kept_states(bench.cell)
    for site in SITES:
        states = {side: read_states(asking, of.examples, site, kept=kept).at_decision_NLD for side, of in sides.items()}
        for toward, layer in product(Toward, range(len(blocks_of(asking.model)))):
            side, donor_N1D = toward.opposite, torch.from_numpy(states[toward][:, [layer]])
            # Batches are scored in order, each once.
            batches = sides[side].batches
            held = ({layer: Held(donor_N1D[b.examples_N], torch.ones(1))} for b in batches)
            patches = (edited(asking.model, one, site, "once") for one in held)
            found = score(asking, batches, applied=partial(next, patches))
            facts: dict[str, Any] = {"what": "patch", "direction": toward.direction, "site": site, "layers": str(layer)}
            yield _table(bench, sides, side, found, **facts)


def _asked(bench: RecordedBench, sides: Sides) -> Iterator[pd.DataFrame]:
    """Prompts that ask for the behaviour, in a chat's system message or in the text, where the task has them."""
    for toward in Toward:
        side, asking = toward.opposite, bench.asking
        wanted, instruction = sides[side].examples, bench.task.instruction(toward)
        if asking.prompting.chat and instruction:
            asking = replace(asking, prompting=replace(asking.prompting, system=instruction))
        else:
            wanted = [other for example in wanted if (other := bench.task.prompted(example, toward))]
        if len(wanted) < len(sides[side]):
            continue
        try:
            found = Prompts(asking, wanted, [None] * len(wanted)).unsteered
        except InputError:  # a tokenizer without these words
            continue
        yield _table(bench, sides, side, found, what="prompt", direction=toward.direction)


def _contrasts(bench: RecordedBench, sides: Sides) -> Iterator[pd.DataFrame]:
    """Context-aware decoding, where the task has the prompts without context."""
    asking = replace(bench.asking, from_prompt=True)  # two passes have no shared beginnings of answers
    for toward, weights in CONTRASTS.items():
        prompts = Prompts(asking, sides[toward.opposite].examples, sides[toward.opposite].bares)
        if None in prompts.bares:
            return
        for weight in weights:
            one = Decoding(toward=Toward.GENERALIZED, method="cad", setting={"weight": weight})
            found = scores(one, prompts, margins=True)
            yield _table(bench, sides, toward.opposite, found, what="contrast", direction=toward.direction, dose=weight)


def neutral_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Divergence of the best vectors at several doses behind random cuts of neutral text."""
    config = cell.config.neutral
    if not config.cuts:
        return []
    best = [one for one in common.read_interventions(cell) if isinstance(one, SteeringVector)]
    parts = [(one, dose) for one in best for dose in config.doses]
    rows = list[pd.DataFrame]()
    for done, table in enumerate(cell.map(_Neutral(cell), parts)):
        tell(done, len(parts), "reading on behind cuts")
        rows.append(table)
    return [common.write_table(cell.records / "neutral.parquet", pd.concat(rows, ignore_index=True))]


class _Neutral(common.PerProcess):
    """A cell's neutral text, and where a gate acts on it."""

    def __call__(self, part: tuple[SteeringVector, float]) -> pd.DataFrame:
        """Divergence of a vector at a dose."""
        (one, dose), cuts = part, self.cell.config.neutral.cuts
        acts_N = self.reading.acts(one.toward, common.GATE) if self.reading else np.full(cuts, np.nan)
        facts: dict[str, Any] = {"direction": f"to_{one.toward}", "method": one.method, "dose": dose, "acts": acts_N}
        return self.neutral.measured(one * dose).assign(**facts)

    @cached_property
    def neutral(self) -> Neutral:
        """Cuts in text that the model wrote; StudyError where it reads too few tokens."""
        config, asking = self.cell.config.neutral, self.asking
        length = min(config.length, context_length(asking.model) - 1)
        if length < EARLIEST + config.following:
            needed = 1 + EARLIEST + config.following
            raise StudyError(f"{self.cell.name}: neutral: the model reads {length + 1} tokens; {needed} are needed")
        asking, rng = replace(asking, batch_size=config.batch_size), common.rng_of(self.cell, "neutral")
        return Neutral(asking, config.cuts, config.texts, length, config.following, rng)

    @cached_property
    def reading(self) -> Reading | None:
        """Of the detector at the cuts."""
        path = self.cell.folder / "detector.safetensors"
        return self.neutral.read(Detector.load(path)) if path.exists() else None


def samples_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Continue the first test pairs of different groups, none of them picked by its continuation."""
    config = cell.config.samples
    if not config.prompts:
        return []
    bench, best, tables = RecordedBench.of(cell, common.cell_model(cell)), common.read_interventions(cell), []
    for done, one in enumerate(best):
        direction = one.toward.direction
        tell(done, len(best), f"{direction}: writing on")
        targets = bench.records.targets("test", one.toward, len(bench.records.pairs))
        first = {example.group: example for example in reversed(targets)}
        examples = [example for example in targets if first[example.group] is example][: config.prompts]
        plain, steered = (texts_of(each, bench.prompts(examples), config.tokens) for each in (NOTHING, one))
        fields = ("prompt", "group", "memorized", "generalized")
        columns: dict[str, Any] = {key: [getattr(e, key) for e in examples] for key in fields}
        columns |= {"plain": plain.texts, "steered": steered.texts}
        columns |= {"nats_plain": plain.nats_N, "nats_steered": steered.nats_N}
        tables.append(pd.DataFrame({"direction": direction, **columns}))
    return [common.write_table(cell.records / "samples.parquet", pd.concat(tables, ignore_index=True))]
