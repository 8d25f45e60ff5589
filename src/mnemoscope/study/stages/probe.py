"""Probes on the pairs' states by layer and position, with baselines from the input and the output.

Shapes: N phrasings (two per pair, the one answered generalized first), P pairs, O offsets, L layers, D neurons,
T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from mnemoscope.behaviour import Asking, encode, read_states
from mnemoscope.models import blocks_of, width_of
from mnemoscope.statistics import (
    cosine,
    half_of_groups,
    in_group_order,
    overlap,
    overlap_by_chance,
    rank_correlation,
    top_by_magnitude,
)
from mnemoscope.statistics.contrast import PairedMoments
from mnemoscope.statistics.probes import (
    LayerProbe,
    fit_input_probe,
    fit_layer_probes,
    input_features,
    repeat_features,
    share_right,
    shuffled,
)
from mnemoscope.study.cells import Cell, Tell
from mnemoscope.study.stages.common import cell_model, kept_states, rng_of, write_json, write_table
from mnemoscope.study.stages.lists import phrasing
from mnemoscope.tasks import SPLITS, Example, Split

MEMORY = 2**30  # bytes of states that are held at once; one offset of all pairs, if that is more
UNCERTAINTIES = ("entropy", "top_gap")
SHUFFLES = 10  # of the labels, for probes that have nothing to learn
TOPS = (0.05, 0.1, 0.3)  # shares of all neurons whose overlap between halves is counted
ALL = -1  # the layer of what belongs to none, or to all together

PROBES = ["kind", "layer", "offset", "group", "label", "score", "draw"]
LEARNING = ["pairs", "draw", "groups", "what", "layer", "value", "n"]

BySplit = dict[Split, np.ndarray]  # states (N, L, D)
Parts = Mapping[Split, Sequence[Example]]


def probes_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Fit probes on fit pairs, choose on tune pairs, score test pairs; measure how stable the contrast is."""
    asking, config = cell_model(cell), cell.config.probes
    table = pd.read_parquet(cell.records / "pairs.parquet", filters=[("is_pair", "==", True)])
    rng = rng_of(cell, "probes")
    parts = {split: phrasings(table, split, config.pairs, rng) for split in SPLITS}
    if not all(parts.values()):  # of few groups none may flip in a split, and then no probe is chosen or judged
        empty = {"probes": PROBES, "learning": LEARNING, "halves": HALVES}
        tables = {name: pd.DataFrame(columns=columns) for name, columns in empty.items()}
        return [write_table(cell.records / f"{name}.parquet", table) for name, table in tables.items()]
    offsets = readable_offsets(asking, config.offsets, [*chain.from_iterable(parts.values())])
    labels = {split: _labels(part) for split, part in parts.items()}
    scores = input_scores(asking, parts, labels)
    rows, files = [_rows(kind, ALL, 0, parts["test"], scores_N) for kind, scores_N in scores.items()], list[Path]()
    site, done = cell.config.pairs.site, 0
    # The widest site, MLP activations, has four times the width of the states in the architectures we know.
    states_N = sum(map(len, parts.values())) * len(blocks_of(asking.model))
    for held in _that_fit(offsets, 16 * width_of(asking.model) * states_N):
        tell(done, len(offsets), f"reading states {', '.join(map(str, held))} tokens before the decision")
        read = {split: read_states(asking, parts[split], site, held, kept_states(cell)) for split in SPLITS}
        for place, offset in enumerate(held):
            tell(done, len(offsets), f"fitting probes {offset} tokens before the decision")
            states: BySplit = {split: read[split].states_ONLD[place] for split in SPLITS}
            probes = fit_layer_probes(states["fit"], labels["fit"], states["tune"], labels["tune"])
            rows += _state_rows(probes, states["test"], parts["test"], offset)
            if offset == 0:
                scores = uncertainty_scores({split: read[split].uncertainty_N2 for split in SPLITS}, labels)
                rows += [_rows(kind, ALL, 0, parts["test"], scores_N) for kind, scores_N in scores.items()]
                rows += _shuffled_rows(cell, probes, states, parts)
                files += _files_at_the_decision(cell, probes, states, parts)
            done += 1
    return [write_table(cell.records / "probes.parquet", pd.concat(rows, ignore_index=True)), *files]


def phrasings(table: pd.DataFrame, split: Split, limit: int, rng: np.random.Generator) -> list[Example]:
    """Of each pair, or of ``limit`` drawn at random, the phrasing answered generalized and the other one, in turn."""
    rows = table[table["is_pair"] & (table["split"] == split)]
    if len(rows) > limit:
        rows = rows.iloc[np.sort(rng.choice(len(rows), limit, replace=False))]
    return [phrasing(row, side) for row in rows.to_dict("records") for side in ("generalized", "memorized")]


def _labels(part: Sequence[Example]) -> np.ndarray:
    """1 for the phrasing answered generalized, 0 for the one answered memorized."""
    return np.tile([1, 0], len(part) // 2)


def readable_offsets(asking: Asking, offsets: Sequence[int], examples: Sequence[Example]) -> list[int]:
    """The offsets that exist in every context."""
    shortest = min(len(encoded.context) for encoded in encode(asking, examples))
    return [offset for offset in sorted(offsets) if offset < shortest]


def _that_fit(offsets: Sequence[int], each: int) -> Iterator[Sequence[int]]:
    """Runs of offsets whose states fit in ``MEMORY``, at least one at a time; the decision, already read, first."""
    if 0 in offsets:
        yield [0]
    others, size = [offset for offset in offsets if offset], max(1, MEMORY // max(each, 1))
    yield from (others[start : start + size] for start in range(0, len(others), size))


def _rows(kind: str, layer: int, offset: int, test: Sequence[Example], scores_N: np.ndarray) -> pd.DataFrame:
    columns: dict[str, Any] = {"kind": kind, "layer": layer, "offset": offset, "group": [e.group for e in test]}
    return pd.DataFrame({**columns, "label": _labels(test), "score": scores_N})


def _state_rows(
    probes: Sequence[LayerProbe], test_NLD: np.ndarray, test: Sequence[Example], offset: int, kind: str = "state"
) -> list[pd.DataFrame]:
    return [
        _rows(kind, layer, offset, test, probe.decision_function(test_NLD[:, layer]))
        for layer, probe in enumerate(probes)
    ]


def input_scores(
    asking: Asking, examples: Mapping[Split, Sequence[Example]], labels: Mapping[Split, np.ndarray]
) -> dict[str, np.ndarray]:
    """Test scores of probes on prompts alone, by baseline: tokens and positions, then repeated tokens as well.

    Examples with a label below 0 are not fitted on.
    """
    tokens = {split: asking.tokens([asking.text(e.prompt) for e in part]) for split, part in examples.items()}
    bags = {split: input_features(ids, len(asking.tokenizer)) for split, ids in tokens.items()}
    both = {s: sparse.hstack([bags[s], repeat_features(ids)], format="csr") for s, ids in tokens.items()}
    scores = {}
    for kind, every in {"input_only": bags, "input_repeats": both}.items():
        seen = np.unique(every["fit"][labels["fit"] >= 0].indices)  # of the others, millions, a weight stays 0
        found = {split: features[:, seen] for split, features in every.items()}
        fit, tune = ((found[s][labels[s] >= 0], labels[s][labels[s] >= 0]) for s in ("fit", "tune"))
        scores[kind] = fit_input_probe(*fit, *tune).decision_function(found["test"])
    return scores


def uncertainty_scores(uncertainty: Mapping[Split, np.ndarray], labels: Mapping[Split, np.ndarray]) -> dict[str, Any]:
    """Test scores of probes on one number each: how sure the model is of its next token. Labels: as `input_scores`."""
    scores = {}
    for column, kind in enumerate(UNCERTAINTIES):
        values = {split: found_N2[:, None, [column]] for split, found_N2 in uncertainty.items()}
        fit, tune = ((values[s][labels[s] >= 0], labels[s][labels[s] >= 0]) for s in ("fit", "tune"))
        scores[kind] = fit_layer_probes(*fit, *tune)[0].decision_function(values["test"][:, 0])
    return scores


def _shuffled_rows(cell: Cell, probes: Sequence[LayerProbe], states: BySplit, parts: Parts) -> list[pd.DataFrame]:
    """Rows of probes of shuffled labels, several as the accuracy of one varies widely around one half."""
    rng = rng_of(cell, "shuffle")
    rows: list[pd.DataFrame] = []
    for draw in range(SHUFFLES):
        labels_N = shuffled(len(parts["fit"]) // 2, rng)
        fit_LND = states["fit"].swapaxes(0, 1)
        blind = [LayerProbe(p.regularization).fit(s_ND, labels_N) for p, s_ND in zip(probes, fit_LND, strict=True)]
        found = _state_rows(blind, states["test"], parts["test"], 0, "shuffled")
        rows += [table.assign(draw=draw) for table in found]
    return rows


def _files_at_the_decision(cell: Cell, probes: Sequence[LayerProbe], states: BySplit, parts: Parts) -> list[Path]:
    """Write the probes, the learning curve, and the halves of the fit pairs."""
    scores = (probe.decision_function(states["tune"][:, layer]) for layer, probe in enumerate(probes))
    accuracy = [share_right(scores_N, _labels(parts["tune"])) for scores_N in scores]
    weights = [
        {"layer": layer, "weights": probe.weights_D_.tolist(), "bias": probe.bias_, "tune_accuracy": accuracy[layer]}
        for layer, probe in enumerate(probes)
    ]
    best = int(np.argmax(accuracy))
    head = {"site": cell.config.pairs.site, "positive": "generalized", "best_layer": best, "layers": weights}
    learning = pd.DataFrame(learning_rows(cell, states, parts, best))
    halves = pd.DataFrame(halves_rows(cell, states["fit"], [e.group for e in parts["fit"][::2]]), columns=HALVES)
    return [
        write_json(cell.folder / "probe.json", head),
        write_table(cell.records / "learning.parquet", learning),
        write_table(cell.records / "halves.parquet", halves),
    ]


def learning_rows(cell: Cell, states: BySplit, parts: Parts, layer: int) -> Iterator[dict[str, Any]]:
    """Learning curve over fit pairs: the probe's test accuracy at one layer, and the cosine of NMD with that of all."""
    config, rng, groups_P = cell.config.probes, rng_of(cell, "learning"), [e.group for e in parts["fit"][::2]]
    fit_PSLD = states["fit"].reshape(-1, 2, *states["fit"].shape[1:])
    whole_LD = PairedMoments.of(fit_PSLD).nmd_LD
    one_layer: BySplit = {split: states[split][:, [layer]] for split in SPLITS}
    tune_N, test_N = _labels(parts["tune"]), _labels(parts["test"])
    sizes = [size for size in sorted(config.learning) if size < len(groups_P)]
    for size, draws in [*((size, config.learning_draws) for size in sizes), (len(groups_P), 1)]:
        for draw in range(draws):
            # All pairs in their own order, so that the curve ends exactly at the probe and the NMD of the study.
            chosen = in_group_order(groups_P, rng)[:size] if size < len(groups_P) else np.arange(size)
            nmd_LD = PairedMoments.of(fit_PSLD[chosen]).nmd_LD
            states_NLD = one_layer["fit"][(2 * chosen[:, None] + [0, 1]).ravel()]
            probe = fit_layer_probes(states_NLD, np.tile([1, 0], size), one_layer["tune"], tune_N)[0]
            accuracy = share_right(probe.decision_function(one_layer["test"][:, 0]), test_N)
            common = {"pairs": size, "draw": draw, "groups": len({groups_P[pair] for pair in chosen})}
            yield {**common, "what": "accuracy", "layer": layer, "value": accuracy, "n": len(test_N)}
            for which, one, all_of in ((layer, nmd_LD[layer], whole_LD[layer]), (ALL, nmd_LD, whole_LD)):
                yield {**common, "what": "nmd_cosine", "layer": which, "value": cosine(one, all_of), "n": size}


CHANCE = ("chance_low", "chance", "chance_high")
HALVES = ["halving", "what", "layer", "top", "value", "chance", "chance_low", "chance_high", "n"]


def halves_rows(cell: Cell, fit_NLD: np.ndarray, groups_P: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Likeness of the contrasts of two halves of the fit pairs that share no group; nothing for a single group."""
    config, rng = cell.config.probes, rng_of(cell, "halves")
    fit_PSLD = fit_NLD.reshape(-1, 2, *fit_NLD.shape[1:])
    for halving in range(config.halvings if len(set(groups_P)) > 1 else 0):
        half_P = half_of_groups(groups_P, rng)
        halves = [PairedMoments.of(fit_PSLD[rows]) for rows in (half_P, ~half_P)]
        nmd, rho = [half.nmd_LD for half in halves], [half.rho_LD for half in halves]
        neurons, none = nmd[0][0].size, {"halving": halving, "top": np.nan} | dict.fromkeys(CHANCE, np.nan)
        for layer in range(len(nmd[0])):
            common = {**none, "layer": layer, "n": neurons}
            yield {**common, "what": "rho_rank_correlation", "value": rank_correlation(rho[0][layer], rho[1][layer])}
            yield {**common, "what": "nmd_cosine", "value": cosine(nmd[0][layer], nmd[1][layer])}
        yield {**none, "what": "nmd_cosine", "layer": ALL, "value": cosine(*nmd), "n": nmd[0].size}
        for top in TOPS:
            sets = [top_by_magnitude(rho_LD, top) for rho_LD in rho]
            # Permuted over all neurons, and within layers: the second null knows which layers have the large |rho|.
            nulls = {"overlap": [chosen.reshape(1, -1) for chosen in sets], "overlap_in_layers": sets}
            for what, both in nulls.items():
                common = {"halving": halving, "what": what, "layer": ALL, "top": top, "n": int(sets[0].sum())}
                yield common | overlap_row(*both)


def overlap_row(first: np.ndarray, second: np.ndarray) -> dict[str, float]:
    """Overlap of two sets of neurons, and what it would be by chance."""
    chance = overlap_by_chance(first, second)
    bounds = zip(CHANCE, (chance.low, chance.estimate, chance.high), strict=True)
    return {"value": overlap(first, second), **dict(bounds)}
