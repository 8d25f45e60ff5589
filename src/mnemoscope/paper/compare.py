"""Compare cells: seeds of one label, and labels that share one model.

Shapes: N examples, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain, combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.linalg import orthogonal_procrustes, svd

from mnemoscope.behaviour import Asking, read_states
from mnemoscope.bench.answers import steered
from mnemoscope.interventions import SteeringVector, Toward, load_intervention
from mnemoscope.interventions.controls import gaussian
from mnemoscope.interventions.sources import with_prefixes
from mnemoscope.runs.processes import Map
from mnemoscope.runs.schemas import CellFacts, ProbeFacts, read_chosen
from mnemoscope.runs.strict import read_json
from mnemoscope.statistics import cosine, rank_correlation
from mnemoscope.statistics.contrast import Contrast
from mnemoscope.study.cells import Cell, Tell, grouped
from mnemoscope.study.stages.common import cell_model, kept_states, write_table
from mnemoscope.study.stages.lists import Records
from mnemoscope.study.stages.probe import CHANCE, TOPS, overlap_row
from mnemoscope.tasks import Example

ALIGNING_PROMPTS = 400  # on which the states of one model are rotated onto those of another
SHUFFLES = 20  # for the value of an alignment or a rank correlation by chance
TRANSFERRED_PAIRS = 300
GAUSSIAN_DRAWS = 5


def compare_stage(cells: Sequence[Cell], run: Path, parallel: Map, tell: Tell) -> list[Path]:
    """Compare seeds and, where labels share a model, tasks."""
    tell(0, 2, "seeds")
    files = []
    twos = [two for seeds in grouped(cells, "label") for two in combinations(seeds, 2)]
    if twos:
        seeds = list(chain.from_iterable(parallel(_compared_seeds, twos)))
        files.append(write_table(run / "records" / "seeds.parquet", pd.DataFrame(seeds)))
    tell(1, 2, "tasks that share a model")
    onto = [(target, group) for group in grouped(cells, "model") if len(group) > 1 for target in group]
    if onto:
        steering, probes = zip(*parallel(_transferred, onto), strict=True)
        for name, tables in (("transfer_steering", steering), ("transfer_probes", probes)):
            files.append(write_table(run / "records" / f"{name}.parquet", pd.concat(tables, ignore_index=True)))
    return files


def _compared_seeds(two: tuple[Cell, Cell]) -> list[dict[str, Any]]:
    """Two seeds of a label: rows of ``records/seeds.parquet``."""
    a, b = two
    opened = [cell_model(cell) for cell in two]
    both = [Contrast.load(cell.folder / "contrast.safetensors") for cell in two]
    # A further attempt begins with other weights.
    shared = a.config.model.shares_first_weights and _attempt(a) == _attempt(b)
    common = {"label": a.label, "seed_a": a.seed, "seed_b": b.seed, "site": both[0].site}
    common |= {"shared_initialization": shared, "top": np.nan}
    rng = np.random.default_rng([a.seed, b.seed])
    # Test conflicts of one cell that the tokenizer of the other can read.
    examples = [example for pair in Records.of(a).both_sides("test", ALIGNING_PROMPTS) for example in pair]
    tokenizer, unknown = opened[1].tokenizer, opened[1].tokenizer.unk_token_id
    examples = [e for e in examples if unknown not in tokenizer(e.prompt).input_ids][:ALIGNING_PROMPTS]
    states = [_states(cell, asking, examples, both[0].site) for cell, asking in zip(two, opened, strict=True)]
    # Neurons of large |rho| sit in late layers, so two seeds share many by chance; within layers that is left out.
    shapes = {"overlap": (1, -1), "overlap_in_layers": both[0].rho_LD.shape}
    overlaps = (
        {"what": what, "layer": -1, "top": top}
        | overlap_row(*(contrast.top_neurons(top).reshape(shape) for contrast in both))
        for top, (what, shape) in product(TOPS, shapes.items())
    )
    rows = chain(overlaps, _rank_correlations(both, rng), _alignments(states, both, rng))
    return [common | row for row in rows]


def _attempt(cell: Cell) -> int:
    """Which training of the cell's model, or of its lender's, was kept."""
    within_study = cell.config.model.is_trained or cell.lender
    return read_json(cell.model_folder.parent / "cell.json", CellFacts).get("attempt", 0) if within_study else 0


def _rank_correlations(both: Sequence[Contrast], rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Of rho: which neurons matter. Neurons are the same ones in two models only where they began alike."""
    for layer in range(-1, len(both[0].rho_LD)):
        first, second = (contrast.rho_LD if layer < 0 else contrast.rho_LD[layer] for contrast in both)
        drawn = [rank_correlation(rng.permuted(first, axis=-1), second) for _ in range(SHUFFLES)]
        yield {"what": "rank_correlation", "layer": layer, "value": rank_correlation(first, second), **_range(drawn)}


def _alignments(
    states: Sequence[np.ndarray], contrasts: Sequence[Contrast], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """Cosine of two models' NMD after one model's states are rotated onto the other's on the same prompts.

    The rotation is the orthogonal Procrustes solution (Schoenemann 1966); chance: the one fitted to shuffled prompts.
    """
    for layer in range(states[0].shape[1] if len(states[0]) > 1 else 0):
        first_ND, second_ND = (s[:, layer] - s[:, layer].mean(0) for s in states)
        nmd_D, other_D = (contrast.nmd_LD[layer] for contrast in contrasts)
        prompts = chain([first_ND], (rng.permutation(first_ND) for _ in range(SHUFFLES)))
        value, *drawn = [cosine(nmd_D @ rotation(states_ND, second_ND), other_D) for states_ND in prompts]
        yield {"what": "aligned_cosine", "layer": layer, "value": value, **_range(drawn)}


def rotation(first_ND: np.ndarray, second_ND: np.ndarray) -> np.ndarray:
    """The orthogonal (D, D) that brings ``first_ND`` closest to ``second_ND``."""
    try:
        return orthogonal_procrustes(first_ND, second_ND)[0]
    except np.linalg.LinAlgError:  # divide and conquer gives up on some processors, where QR iterations do not
        return np.matmul(*svd(first_ND.T @ second_ND, lapack_driver="gesvd")[::2])


def _states(cell: Cell, asking: Asking, examples: Sequence[Example], site: Any) -> np.ndarray:
    """States at the decision position in the cell's model, float64 (N, L, D)."""
    return read_states(asking, examples, site, kept=kept_states(cell)).at_decision_NLD.astype(np.float64)


def _transferred(onto: tuple[Cell, Sequence[Cell]]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Answers under the vectors, and scores of the probes, of all cells that share a target's model."""
    asking, records = cell_model(onto[0]), Records.of(onto[0])
    both = _transferred_steering(*onto, asking, records), _transferred_probes(*onto, asking, records)
    steering, probes = (pd.concat(tables, ignore_index=True) for tables in both)
    return steering, probes


def _transferred_steering(
    target: Cell, group: Sequence[Cell], asking: Asking, records: Records
) -> Iterator[pd.DataFrame]:
    """Answers to a cell's test pairs under every cell's NMD and best vectors, and Gaussian shifts of the same norm."""
    for toward in Toward:
        examples = records.targets("test", toward, TRANSFERRED_PAIRS)
        batches = with_prefixes(asking, examples) if examples else []
        for source in group if examples else ():
            for method, role, draw, vector in _vectors(source, toward.direction, asking):
                columns = {"source": source.label, "target": target.label, "seed": source.seed}
                columns |= {"direction": toward.direction, "method": method, "role": role, "draw": draw}
                columns |= {"example": np.arange(len(examples)), "group": [e.group for e in examples]}
                after_N = steered(asking, batches, vector, margins=False).behaviour_N
                yield pd.DataFrame({**columns, "after": after_N})


def _vectors(source: Cell, direction: str, asking: Asking) -> Iterator[tuple[str, str, int, SteeringVector]]:
    best = read_chosen(source.records / "chosen.json")["pairs"]["best"][direction]  # type: ignore[index]
    for method in dict.fromkeys((best, "nmd")):
        path = source.folder / "vectors" / f"{direction}-{method}.safetensors"
        vector = load_intervention(path, asking.model, asking.tokenizer) if path.exists() else None
        if not isinstance(vector, SteeringVector):
            continue
        name = "best" if method == best else method
        yield name, "vector", 0, vector
        if vector.is_constant:  # others have no norm of their own
            shift_LD = vector.dense(max(vector.layers) + 1, len(next(iter(vector.shifts.values()))))
            for draw in range(GAUSSIAN_DRAWS):
                rng = np.random.default_rng([source.seed, draw])
                yield name, "gaussian", draw, vector.with_dense(gaussian(shift_LD, rng))


def _transferred_probes(
    target: Cell, group: Sequence[Cell], asking: Asking, records: Records
) -> Iterator[pd.DataFrame]:
    """Scores of every cell's probes on a cell's test states."""
    examples = [e for pair in records.both_sides("test", TRANSFERRED_PAIRS) for e in pair]
    states_NLD = _states(target, asking, examples, target.config.pairs.site)
    for source in group:
        for probe in read_json(source.folder / "probe.json", ProbeFacts)["layers"]:
            scores_N = states_NLD[:, probe["layer"]] @ np.array(probe["weights"]) + probe["bias"]
            columns = {"source": source.label, "target": target.label, "seed": source.seed, "layer": probe["layer"]}
            columns |= {"group": [e.group for e in examples], "label": np.tile([1, 0], len(examples) // 2)}
            yield pd.DataFrame({**columns, "score": scores_N})


def _range(drawn: Sequence[float]) -> dict[str, float]:
    low, high = np.quantile(drawn, [0.025, 0.975])
    return dict(zip(CHANCE, (float(low), float(np.mean(drawn)), float(high)), strict=True))
