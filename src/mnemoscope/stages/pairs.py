"""Mine pairs, stream their contrast, and fit probes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Asking, PairBatch, draw_candidates, mine_pairs
from mnemoscope.cells import Cell
from mnemoscope.contrast import ContrastAccumulator
from mnemoscope.errors import StudyError
from mnemoscope.files import write_atomically
from mnemoscope.probes import LayerProbe, fit_input_probe, fit_layer_probes, input_features, shuffled
from mnemoscope.stages.common import Tell, cell_model, cell_task, rng_of, write_json, write_table
from mnemoscope.tasks import SPLITS, Example, draw

PROBED_PAIRS = 4000  # pairs of a split whose states are kept in memory for the probes
SHUFFLES = 10  # of the labels, for the probe that has nothing to learn


def pairs_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Mine pairs in every split; stream the contrast of the fit pairs; fit probes and judge them on the test pairs."""
    task, asking, config = cell_task(cell), cell_model(cell), cell.config.pairs
    rng = rng_of(cell, "pairs")
    # All lists are drawn before anything is labelled, so that the yield has an honest denominator.
    candidates = {
        split: draw_candidates(
            task, draw(task, rng, getattr(config, f"{split}_examples"), "conflict", split), rng, config.rephrasings
        )
        for split in SPLITS
    }
    total = sum(map(len, candidates.values()))
    done = 0
    tables: list[pd.DataFrame] = []
    kept: dict[str, _KeptPairs] = {split: _KeptPairs() for split in SPLITS}
    contrast: ContrastAccumulator | None = None
    for split in SPLITS:
        for batch in mine_pairs(asking, candidates[split], config.site):
            done += len(batch.candidates)
            tell(0.9 * done, total, f"mining {split} pairs")
            tables.append(_pairs_table(batch, split))
            kept[split].add(batch)
            if split == "fit" and batch.is_pair_N.any():
                contrast = contrast or _no_contrast(cell, batch)
                groups = [pair[0].group for pair in batch.pairs()]
                contrast.add(batch.states_generalized_PLD, batch.states_memorized_PLD, groups)
    table = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    files = [write_table(cell.records / "pairs.parquet", table)]
    for split in SPLITS:
        if not kept[split].pairs:
            raise StudyError(f"{cell.name}: no pairs found in the {split} split: {_why_no_pairs(table, split)}")
    assert contrast is not None
    files.append(write_atomically(cell.folder / "contrast.safetensors", contrast.result().save))
    tell(9, 10, "fitting probes")
    return [*files, *_probe_files(cell, asking, kept)]


def _no_contrast(cell: Cell, batch: PairBatch) -> ContrastAccumulator:
    layers, neurons = batch.states_generalized_PLD.shape[1:]
    config = cell.config.pairs
    return ContrastAccumulator.empty(config.site, layers, neurons, config.permutations, cell.seed)


def _pairs_table(batch: PairBatch, split: str) -> pd.DataFrame:
    columns: dict[str, Any] = {
        field: [getattr(a, field) for a, _ in batch.candidates]
        for field in ("item", "group", "memorized", "generalized")
    }
    columns["split"] = split
    for side, scores in enumerate((batch.scores_a, batch.scores_b)):
        letter = "ab"[side]
        columns[f"prompt_{letter}"] = [pair[side].prompt for pair in batch.candidates]
        columns[f"family_{letter}"] = [pair[side].family for pair in batch.candidates]
        columns[f"behaviour_{letter}"] = scores.behaviour_N
        columns[f"margin_{letter}"] = scores.margin_N
    columns["is_pair"] = batch.is_pair_N
    return pd.DataFrame(columns)


def _why_no_pairs(table: pd.DataFrame, split: str) -> str:
    part = table[table["split"] == split] if len(table) else table
    if not len(part):
        return "the task gave no candidate; every item needs two phrasings, in each split"
    counts = pd.concat([part["behaviour_a"], part["behaviour_b"]]).value_counts()
    seen = ", ".join(f"{name} {count}" for name, count in counts.items())
    return (
        f"none of {len(part)} candidates flips ({seen}); raise pairs.{split}_examples, or train to a more even "
        "mixture (training.stop.conflict_each)"
    )


class _KeptPairs:
    """Pairs of a split with the states of at most ``PROBED_PAIRS`` of them."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Example, Example]] = []
        self._states: list[np.ndarray] = []

    def add(self, batch: PairBatch) -> None:
        room = PROBED_PAIRS - len(self.pairs)
        if room > 0 and batch.is_pair_N.any():
            self.pairs += batch.pairs()[:room]
            self._states.append(np.stack([batch.states_generalized_PLD, batch.states_memorized_PLD], axis=1)[:room])

    def states_NLD(self) -> np.ndarray:
        """States of both sides in turn, two per pair."""
        states_PSLD = np.concatenate(self._states)
        return states_PSLD.reshape(-1, *states_PSLD.shape[2:])

    def labels_N(self) -> np.ndarray:
        """1 for the generalized side, 0 for the memorized one."""
        return np.tile([1, 0], len(self.pairs))

    def groups_N(self) -> list[str]:
        return [example.group for pair in self.pairs for example in pair]

    def prompts_N(self) -> list[str]:
        return [example.prompt for pair in self.pairs for example in pair]


def _probe_files(cell: Cell, asking: Asking, kept: dict[str, _KeptPairs]) -> list[Path]:
    fit, tune, test = (kept[split] for split in SPLITS)
    states_NLD, labels_N = fit.states_NLD(), fit.labels_N()
    tune_NLD, test_NLD, tune_labels_N = tune.states_NLD(), test.states_NLD(), tune.labels_N()
    probes = fit_layer_probes(states_NLD, labels_N, tune_NLD, tune_labels_N)
    tokens = {split: asking.tokenizer(kept[split].prompts_N()).input_ids for split in SPLITS}
    features = {split: input_features(tokens[split], len(asking.tokenizer)) for split in SPLITS}
    input_probe = fit_input_probe(features["fit"], labels_N, features["tune"], tune_labels_N)
    common = {"group": test.groups_N(), "label": test.labels_N()}
    tables = [
        pd.DataFrame(
            {"kind": "input_only", "layer": -1, **common, "score": input_probe.decision_function(features["test"])}
        )
    ]
    pair_N, rng = np.repeat(np.arange(len(fit.pairs)), 2), rng_of(cell, "shuffle")
    for layer, probe in enumerate(probes):
        scores_N = probe.decision_function(test_NLD[:, layer])
        tables.append(pd.DataFrame({"kind": "state", "layer": layer, **common, "score": scores_N}))
        # One shuffle says little: its accuracy scatters widely around one half.
        for _ in range(SHUFFLES):
            blind = LayerProbe(probe.regularization).fit(states_NLD[:, layer], shuffled(labels_N, pair_N, rng))
            scores_N = blind.decision_function(test_NLD[:, layer])
            tables.append(pd.DataFrame({"kind": "shuffled", "layer": layer, **common, "score": scores_N}))
    weights = {
        "site": cell.config.pairs.site,
        "positive": "generalized",
        "layers": [
            {"layer": layer, "weights": probe.weights_D_.tolist(), "bias": float(probe.bias_)}
            for layer, probe in enumerate(probes)
        ],
    }
    return [
        write_table(cell.records / "probes.parquet", pd.concat(tables, ignore_index=True)),
        write_json(cell.folder / "probe.json", weights),
    ]
