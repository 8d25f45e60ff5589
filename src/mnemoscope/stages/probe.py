"""Probes on the pairs' states: what each layer and position knows, beside the input, the output and too few pairs.

Shapes: N phrasings (two per pair, the one answered generalized first), P pairs, O offsets, L layers, D neurons,
T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from mnemoscope.behaviour import Asking, encode, read_states
from mnemoscope.cells import Cell
from mnemoscope.contrast import PairedMoments
from mnemoscope.models import blocks_of, width_of
from mnemoscope.probes import (
    LayerProbe,
    fit_input_probe,
    fit_layer_probes,
    input_features,
    repeat_features,
    share_right,
    shuffled,
)
from mnemoscope.stages.common import Tell, cell_model, kept_states, rng_of, write_json, write_table
from mnemoscope.statistics import (
    cosine,
    half_of_groups,
    in_group_order,
    overlap,
    overlap_by_chance,
    rank_correlation,
    top_by_magnitude,
)
from mnemoscope.tasks import SPLITS, Example, Side, Split

MEMORY = 2**30  # bytes of states that are held at once; one offset of all pairs, if that is more
UNCERTAINTIES = ("entropy", "top_gap")
SHUFFLES = 10  # of the labels, for probes that have nothing to learn
TOPS = (0.05, 0.1, 0.3)  # shares of all neurons whose overlap between halves is counted
ALL = -1  # the layer of what belongs to none, or to all together

BySplit = dict[Split, np.ndarray]  # states (N, L, D)


def probes_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Fit probes on the fit pairs, choose on the tune pairs, score the test pairs; see how steady the contrast is."""
    asking, config = cell_model(cell), cell.config.probes
    table = pd.read_parquet(cell.records / "pairs.parquet", filters=[("is_pair", "==", True)])
    rng = rng_of(cell, "probes")
    parts = {split: Phrasings.of(table, split, config.pairs, rng) for split in SPLITS}
    offsets = readable_offsets(asking, config.offsets, [e for split in SPLITS for e in parts[split].examples])
    rows, files = _input_rows(asking, parts), []
    site, done = cell.config.pairs.site, 0
    for held in _that_fit(offsets, _bytes_per_offset(asking, parts)):
        tell(done, len(offsets), f"reading states {', '.join(map(str, held))} tokens before the decision")
        read = {split: read_states(asking, parts[split].examples, site, held, kept_states(cell)) for split in SPLITS}
        for place, offset in enumerate(held):
            tell(done, len(offsets), f"fitting probes {offset} tokens before the decision")
            states: BySplit = {split: read[split].states_ONLD[place] for split in SPLITS}
            probes = _fit(states, parts)
            rows += _state_rows(probes, states["test"], parts["test"], offset)
            if offset == 0:
                rows += _uncertainty_rows({split: read[split].uncertainty_N2 for split in SPLITS}, parts)
                rows += _shuffled_rows(cell, probes, states, parts)
                files += _files_at_the_decision(cell, probes, states, parts)
            done += 1
    return [write_table(cell.records / "probes.parquet", pd.concat(rows, ignore_index=True)), *files]


@dataclass(frozen=True)
class Phrasings:
    """The phrasings of a split's pairs: of each pair the one answered generalized, then the one answered memorized."""

    examples: list[Example]

    @classmethod
    def of(cls, table: pd.DataFrame, split: Split, limit: int, rng: np.random.Generator) -> Phrasings:
        """The pairs in ``pairs.parquet``, or ``limit`` of them drawn at random."""
        rows = table[table["is_pair"] & (table["split"] == split)]
        if len(rows) > limit:
            rows = rows.iloc[np.sort(rng.choice(len(rows), limit, replace=False))]
        return cls([Example.from_row(row, side) for row in rows.to_dict("records") for side in _sides(row)])

    @cached_property
    def labels_N(self) -> np.ndarray:
        """1 for the phrasing answered generalized, 0 for the one answered memorized."""
        return np.tile([1, 0], len(self.examples) // 2)

    @cached_property
    def groups_N(self) -> list[str]:
        return [example.group for example in self.examples]

    @cached_property
    def groups_P(self) -> list[str]:
        return self.groups_N[::2]


def _sides(row: Mapping[Any, Any]) -> tuple[Side, Side]:
    return ("a", "b") if row["behaviour_a"] == "generalized" else ("b", "a")


def readable_offsets(asking: Asking, offsets: Sequence[int], examples: Sequence[Example]) -> list[int]:
    """The offsets that exist in every context."""
    shortest = min(len(encoded.context) for encoded in encode(asking, examples))
    return [offset for offset in sorted(offsets) if offset < shortest]


def _bytes_per_offset(asking: Asking, parts: Mapping[Split, Phrasings]) -> int:
    # The widest site, MLP activations, has four times the width of the states in the architectures we know.
    return 16 * width_of(asking.model) * len(blocks_of(asking.model)) * sum(len(p.examples) for p in parts.values())


def _that_fit(offsets: Sequence[int], each: int) -> Iterator[Sequence[int]]:
    """Runs of offsets whose states fit in ``MEMORY``, at least one at a time; earlier stages have read the decision."""
    if 0 in offsets:
        yield [0]
    others, size = [offset for offset in offsets if offset], max(1, MEMORY // max(each, 1))
    yield from (others[start : start + size] for start in range(0, len(others), size))


def _fit(states: BySplit, parts: Mapping[Split, Phrasings]) -> list[LayerProbe]:
    fit, tune = parts["fit"].labels_N, parts["tune"].labels_N
    return fit_layer_probes(states["fit"], fit, states["tune"], tune)


def _rows(kind: str, layer: int, offset: int, test: Phrasings, scores_N: np.ndarray) -> pd.DataFrame:
    columns = {"kind": kind, "layer": layer, "offset": offset, "group": test.groups_N, "label": test.labels_N}
    return pd.DataFrame({**columns, "score": scores_N})


def _state_rows(
    probes: Sequence[LayerProbe], test_NLD: np.ndarray, test: Phrasings, offset: int, kind: str = "state"
) -> list[pd.DataFrame]:
    scores = (probe.decision_function(test_NLD[:, layer]) for layer, probe in enumerate(probes))
    return [_rows(kind, layer, offset, test, scores_N) for layer, scores_N in enumerate(scores)]


def _input_rows(asking: Asking, parts: Mapping[Split, Phrasings]) -> list[pd.DataFrame]:
    """What the prompt tells without any state: its tokens and their places, then which of them it repeats as well."""
    rows = []
    for kind, features in features_of_input(asking, {split: part.examples for split, part in parts.items()}).items():
        probe = fit_input_probe(features["fit"], parts["fit"].labels_N, features["tune"], parts["tune"].labels_N)
        rows.append(_rows(kind, ALL, 0, parts["test"], probe.decision_function(features["test"])))
    return rows


def features_of_input(
    asking: Asking, examples: Mapping[Split, Sequence[Example]]
) -> dict[str, dict[Split, sparse.csr_matrix]]:
    """By baseline and split, what prompts tell without any state: their tokens, then what they repeat as well."""
    tokens = {split: asking.tokens([asking.text(e.prompt) for e in part]) for split, part in examples.items()}
    bags = {split: input_features(ids, len(asking.tokenizer)) for split, ids in tokens.items()}
    both = {s: sparse.hstack([bags[s], repeat_features(ids)], format="csr") for s, ids in tokens.items()}
    return {"input_only": bags, "input_repeats": both}


def _uncertainty_rows(uncertainty: BySplit, parts: Mapping[Split, Phrasings]) -> list[pd.DataFrame]:
    """How sure the model is of its next token: one number, whose sign and threshold are learned on the fit pairs."""
    rows = []
    for column, kind in enumerate(UNCERTAINTIES):
        values: BySplit = {split: uncertainty[split][:, None, [column]] for split in SPLITS}
        scores_N = _fit(values, parts)[0].decision_function(values["test"][:, 0])
        rows.append(_rows(kind, ALL, 0, parts["test"], scores_N))
    return rows


def _shuffled_rows(
    cell: Cell, probes: Sequence[LayerProbe], states: BySplit, parts: Mapping[Split, Phrasings]
) -> list[pd.DataFrame]:
    """Probes of shuffled labels. One shuffle says little: its accuracy scatters widely around one half."""
    fit, rng = parts["fit"], rng_of(cell, "shuffle")
    pair_N = np.repeat(np.arange(len(fit.examples) // 2), 2)
    rows: list[pd.DataFrame] = []
    for _ in range(SHUFFLES):
        labels_N = shuffled(fit.labels_N, pair_N, rng)
        blind = [
            LayerProbe(probe.regularization).fit(states["fit"][:, layer], labels_N)
            for layer, probe in enumerate(probes)
        ]
        rows += _state_rows(blind, states["test"], parts["test"], 0, "shuffled")
    return rows


def _files_at_the_decision(
    cell: Cell, probes: Sequence[LayerProbe], states: BySplit, parts: Mapping[Split, Phrasings]
) -> list[Path]:
    """The probes themselves, the learning curve, and the halves of the fit pairs."""
    right_L = [
        share_right(probe.decision_function(states["tune"][:, layer]), parts["tune"].labels_N)
        for layer, probe in enumerate(probes)
    ]
    best = int(np.argmax(right_L))
    weights = [
        {"layer": layer, "weights": probe.weights_D_.tolist(), "bias": probe.bias_, "tune_accuracy": right_L[layer]}
        for layer, probe in enumerate(probes)
    ]
    head = {"site": cell.config.pairs.site, "positive": "generalized", "best_layer": best, "layers": weights}
    learning = pd.DataFrame(learning_rows(cell, states, parts, best))
    halves = pd.DataFrame(halves_rows(cell, states["fit"], parts["fit"].groups_P), columns=HALVES)
    return [
        write_json(cell.folder / "probe.json", head),
        write_table(cell.records / "learning.parquet", learning),
        write_table(cell.records / "halves.parquet", halves),
    ]


def learning_rows(
    cell: Cell, states: BySplit, parts: Mapping[Split, Phrasings], layer: int
) -> Iterator[dict[str, Any]]:
    """What fewer fit pairs give: the probe's test accuracy at one layer, and how near their NMD is to that of all."""
    config, rng, groups_P = cell.config.probes, rng_of(cell, "learning"), parts["fit"].groups_P
    fit_PSLD = states["fit"].reshape(-1, 2, *states["fit"].shape[1:])
    whole_LD = PairedMoments.of(fit_PSLD).nmd_LD
    one_layer: BySplit = {split: states[split][:, [layer]] for split in SPLITS}
    tune_N, test_N = parts["tune"].labels_N, parts["test"].labels_N
    sizes = [size for size in sorted(config.learning) if size < len(groups_P)]
    for size, draws in [*((size, config.learning_draws) for size in sizes), (len(groups_P), 1)]:
        for draw in range(draws):
            # All pairs are taken in their own order: the curve ends exactly at the probe and the NMD of the study.
            chosen = in_group_order(groups_P, rng)[:size] if size < len(groups_P) else np.arange(size)
            nmd_LD = PairedMoments.of(fit_PSLD[chosen]).nmd_LD
            states_NLD = one_layer["fit"][(2 * chosen[:, None] + [0, 1]).ravel()]
            probe = fit_layer_probes(states_NLD, np.tile([1, 0], size), one_layer["tune"], tune_N)[0]
            accuracy = share_right(probe.decision_function(one_layer["test"][:, 0]), test_N)
            common = {"pairs": size, "draw": draw, "groups": len({groups_P[pair] for pair in chosen})}
            yield {**common, "what": "accuracy", "layer": layer, "value": accuracy, "n": len(test_N)}
            yield {
                **common,
                "what": "nmd_cosine",
                "layer": layer,
                "value": cosine(nmd_LD[layer], whole_LD[layer]),
                "n": size,
            }
            yield {**common, "what": "nmd_cosine", "layer": ALL, "value": cosine(nmd_LD, whole_LD), "n": size}


HALVES = ["halving", "what", "layer", "top", "value", "chance", "chance_low", "chance_high", "n"]


def halves_rows(cell: Cell, fit_NLD: np.ndarray, groups_P: Sequence[str]) -> Iterator[dict[str, Any]]:
    """How alike the contrasts of two halves of the fit pairs are, which share no group; nothing for a single group."""
    config, rng = cell.config.probes, rng_of(cell, "halves")
    fit_PSLD = fit_NLD.reshape(-1, 2, *fit_NLD.shape[1:])
    for halving in range(config.halvings if len(set(groups_P)) > 1 else 0):
        half_P = half_of_groups(groups_P, rng)
        halves = [PairedMoments.of(fit_PSLD[rows]) for rows in (half_P, ~half_P)]
        for row in compare_contrasts(halves):
            yield {"halving": halving, **row}


def compare_contrasts(halves: Sequence[PairedMoments]) -> Iterator[dict[str, Any]]:
    """How alike NMD and rho of two halves are."""
    nmd, rho = [half.nmd_LD for half in halves], [half.rho_LD for half in halves]
    none = {"top": np.nan, "chance": np.nan, "chance_low": np.nan, "chance_high": np.nan}
    layers, neurons = nmd[0].shape
    for layer in range(layers):
        common = {**none, "layer": layer, "n": neurons}
        yield {**common, "what": "rho_rank_correlation", "value": rank_correlation(rho[0][layer], rho[1][layer])}
        yield {**common, "what": "nmd_cosine", "value": cosine(nmd[0][layer], nmd[1][layer])}
    yield {**none, "what": "nmd_cosine", "layer": ALL, "value": cosine(*nmd), "n": layers * neurons}
    for top in TOPS:
        sets = [top_by_magnitude(rho_LD, top) for rho_LD in rho]
        # Permuted over all neurons, and within layers: the second null knows which layers have the large |rho|.
        nulls = {"overlap": [chosen.reshape(1, -1) for chosen in sets], "overlap_in_layers": sets}
        for what, (first, second) in nulls.items():
            chance = overlap_by_chance(first, second)
            bounds = {"chance": chance.estimate, "chance_low": chance.low, "chance_high": chance.high}
            yield {"what": what, "layer": ALL, "top": top, "value": overlap(first, second), **bounds, "n": chance.n}
