"""The stages of a cell, in order: train, behaviour, pairs, steering. Each writes raw records and returns its files."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mnemoscope.behaviour import (
    Asking,
    Batch,
    PairBatch,
    Scores,
    cache_prefixes,
    draw_candidates,
    mark_confabulations,
    mine_pairs,
    prepare,
    score,
)
from mnemoscope.contrast import Contrast, ContrastAccumulator
from mnemoscope.directions import CONTROLS, SOURCE, TOWARD, Setting, choose, control_draws, shift_rate, steered
from mnemoscope.errors import InputError, StudyError
from mnemoscope.files import write_atomically
from mnemoscope.models import blocks_of, build_gpt2, load_model, word_tokenizer
from mnemoscope.probes import LayerProbe, fit_input_probe, fit_layer_probes, input_features, shuffled
from mnemoscope.study import Cell, git_state
from mnemoscope.tasks import KINDS, SPLITS, Example, Split, Task, build_task, draw
from mnemoscope.training import how_to_mix, train

if TYPE_CHECKING:
    from mnemoscope.steering import SteeringVector

Tell = Callable[[float, float, str], None]
Stage = Callable[[Cell, Tell], list[Path]]
PROBED_PAIRS = 4000  # pairs of a split whose states are kept in memory for the probes
SHUFFLES = 10  # of the labels, for the probe that has nothing to learn


def train_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Train from scratch until both behaviours are there, or check the folder of a trained model."""
    task = cell_task(cell)
    facts = {"task": task.name, "label": cell.label, "seed": cell.seed, "site": cell.config.pairs.site}
    facts |= {"memory_is_conflict": bool(getattr(task, "memory_is_conflict", False)), "options": cell.config.options}
    if cell.config.model.folder:
        model, _ = load_model(cell.config.model.folder)
        facts |= {"layers": len(blocks_of(model)), "width": model.config.hidden_size, "trained": False}
        return [write_json(cell.folder / "cell.json", facts)]
    asking = _untrained(cell, task)
    config = cell.config.training
    trained = train(
        asking, task, config, rng_of(cell, "train"), lambda step, now: tell(step, config.steps, _in_words(now))
    )
    files = [
        write_table(cell.records / "training.parquet", pd.DataFrame(trained.curve)),
        write_json(cell.records / "training_time.json", {"seconds": round(trained.seconds, 2), "steps": trained.steps}),
    ]
    if trained.unmet:
        raise StudyError(f"{cell.name}: {how_to_mix(trained)}")
    files += _save_model(cell, asking)
    facts |= {"layers": len(blocks_of(asking.model)), "width": cell.config.model.width, "trained": True}
    # Times differ between equal runs, so their file is no part of what is checked.
    return [*(f for f in files if f.name != "training_time.json"), write_json(cell.folder / "cell.json", facts)]


def behaviour_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Label test examples of every kind."""
    task, asking = cell_task(cell), cell_model(cell)
    rng = rng_of(cell, "behaviour")
    tables = []
    for done, kind in enumerate(KINDS):
        tell(done, len(KINDS), f"labelling {kind} examples")
        examples = draw(task, rng, cell.config.pairs.behaviour_examples, kind, "test")
        if not examples:
            continue
        scores = score(asking, prepare(asking, examples))
        has_format = getattr(task, "has_memorized_format", None)
        if kind == "conflict" and has_format:
            mark_confabulations(asking, examples, scores, has_format)
        tables.append(_behaviour_table(examples, scores))
    if not tables:
        raise InputError(f"task: {task.name} has no example in the test split")
    return [write_table(cell.records / "behaviour.parquet", pd.concat(tables, ignore_index=True))]


def pairs_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Mine pairs in every split; stream the contrast of the fit pairs; fit probes and judge them on the test pairs."""
    task, asking, config = cell_task(cell), cell_model(cell), cell.config.pairs
    rng = rng_of(cell, "pairs")
    tables: list[pd.DataFrame] = []
    kept: dict[str, _KeptPairs] = {}
    contrast: ContrastAccumulator | None = None
    for split in SPLITS:
        wanted = getattr(config, f"{split}_candidates")
        candidates = draw_candidates(task, draw(task, rng, wanted, "conflict", split), rng)
        kept[split] = _KeptPairs()
        for batch in mine_pairs(asking, candidates, config.site):
            tell(len(tables) * 512, 512 * len(tables) + len(candidates), f"mining {split} pairs")
            tables.append(_pairs_table(batch, split))
            kept[split].add(batch)
            if split == "fit" and batch.is_pair_N.any():
                contrast = contrast or ContrastAccumulator.empty(
                    config.site, *batch.states_generalized_PLD.shape[1:], config.permutations, cell.seed
                )
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


def steering_stage(cell: Cell, tell: Tell) -> list[Path]:
    """Choose settings on the tune pairs; judge them with their controls on the test split."""
    asking, config = cell_model(cell), cell.config.steering
    contrast = Contrast.load(cell.folder / "contrast.safetensors")
    pairs = pd.read_parquet(cell.records / "pairs.parquet")
    behaviour = pd.read_parquet(cell.records / "behaviour.parquet")
    tables: list[pd.DataFrame] = []
    chosen: dict[str, dict[str, Any]] = {method: {} for method in config.methods}
    best: dict[str, str] = {}
    files: list[Path] = []
    commit = git_state()["commit"] or ""
    for number, direction in enumerate(TOWARD):
        tell(number, len(TOWARD), f"{direction}: choosing on the tune split")
        settings = _swept(
            cell, asking, contrast, _sources(pairs, "tune", direction, config.tune_pairs), direction, tables
        )
        best[direction] = max(settings, key=lambda method: settings[method][1])
        lists = _test_lists(pairs, behaviour, direction, config.test_examples)
        prepared = {name: _with_prefixes(asking, examples) for name, (examples, _) in lists.items()}
        for method, (setting, _) in settings.items():
            tell(number + 0.5, len(TOWARD), f"{direction}: {method} beside its controls on the test split")
            vector = setting.vector(contrast)
            chosen[method][direction] = _chosen(setting, vector)
            tables += _judged(cell, asking, contrast, setting, vector, lists, prepared)
            files += _save_vector(cell, asking, vector, direction, method, commit)
    files.append(write_table(cell.records / "steering.parquet", pd.concat(tables, ignore_index=True)))
    files.append(write_json(cell.records / "chosen.json", {"best": best, "methods": chosen}))
    return files


STAGES: dict[str, Stage] = {
    "train": train_stage,
    "behaviour": behaviour_stage,
    "pairs": pairs_stage,
    "steering": steering_stage,
}


def rng_of(cell: Cell, stage: str) -> np.random.Generator:
    """The generator of a stage; no stage's draws depend on another's."""
    return np.random.default_rng([cell.seed, zlib.crc32(stage.encode())])


def cell_task(cell: Cell) -> Task:
    """The cell's task, with the cell's seed."""
    return build_task(cell.config.task, cell.config.options, cell.seed)


def cell_model(cell: Cell) -> Asking:
    """The cell's trained model, ready to be asked.

    Raises:
        InputError: its folder is missing or damaged.
    """
    model, tokenizer = load_model(cell.config.model.folder or cell.folder / "model")
    return Asking(model, tokenizer, cell_task(cell).boundary, cell.config.pairs.batch_size)


def write_table(path: Path, table: pd.DataFrame) -> Path:
    """Write a Parquet file atomically; equal tables give equal bytes."""
    return write_atomically(path, lambda temporary: table.to_parquet(temporary, index=False))


def write_json(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file atomically."""
    return write_atomically(path, (json.dumps(content, indent=1) + "\n").encode())


def _untrained(cell: Cell, task: Task) -> Asking:
    shape = cell.config.model
    vocabulary = getattr(task, "vocabulary", None)
    if vocabulary is None:
        raise InputError(
            f"model.folder: task {task.name!r} has no vocabulary to train on; give the folder of a trained model"
        )
    tokenizer = word_tokenizer(vocabulary, shape.context)
    model = build_gpt2(
        tokenizer, layers=shape.layers, width=shape.width, heads=shape.heads, context=shape.context, seed=cell.seed
    )
    return Asking(model, tokenizer, task.boundary, cell.config.pairs.batch_size)


def _save_model(cell: Cell, asking: Asking) -> list[Path]:
    folder, temporary = cell.folder / "model", cell.folder / ".model.tmp"
    for stale in (folder, temporary):
        shutil.rmtree(stale, ignore_errors=True)
    asking.model.save_pretrained(temporary)
    asking.tokenizer.save_pretrained(temporary)
    temporary.rename(folder)
    return sorted(folder.iterdir())


def _in_words(measured: dict[str, float]) -> str:
    if not measured:
        return "training"
    return (
        f"novel {measured['novel_accuracy']:.2f} recall {measured['recall']:.2f} "
        f"conflict {measured['conflict_memorized']:.2f}/{measured['conflict_generalized']:.2f}"
    )


def _behaviour_table(examples: Sequence[Example], scores: Scores) -> pd.DataFrame:
    fields = ("item", "prompt", "kind", "group", "family", "split", "memorized", "generalized", "answer")
    columns: dict[str, Any] = {field: [getattr(e, field) for e in examples] for field in fields}
    columns |= {"behaviour": scores.behaviour_N, "confabulated": scores.confabulated_N}
    columns |= {"margin": scores.margin_N, "tie": scores.tie_N}
    return pd.DataFrame(columns).astype({field: "str" for field in ("memorized", "generalized", "answer")})


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
        f"none of {len(part)} candidates flips ({seen}); raise pairs.{split}_candidates, or train to a more even mixture "
        "(training.stop.conflict_each)"
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


def _sources(pairs: pd.DataFrame, split: Split, direction: str, limit: int) -> list[Example]:
    """Of each pair, the phrasing that shows the behaviour to be turned."""
    chosen = pairs[pairs["is_pair"] & (pairs["split"] == split)].head(limit)
    examples = []
    for row in chosen.itertuples():
        side = "a" if row.behaviour_a == SOURCE[direction] else "b"
        prompt, family = getattr(row, f"prompt_{side}"), getattr(row, f"family_{side}")
        examples.append(
            Example(row.item, prompt, "conflict", row.group, family, split, row.memorized, row.generalized)  # type: ignore[arg-type]
        )
    return examples


def _test_lists(
    pairs: pd.DataFrame, behaviour: pd.DataFrame, direction: str, limit: int
) -> dict[str, tuple[list[Example], list[str]]]:
    """The lists that steering is judged on, with the unsteered behaviour of each example."""
    sources = _sources(pairs, "test", direction, limit)
    lists = {"pairs": (sources, [SOURCE[direction]] * len(sources))}
    conflict = behaviour[behaviour["kind"] == "conflict"]
    parts = {
        "conflict": conflict[conflict["behaviour"] == SOURCE[direction]],
        "conflict_rest": conflict[conflict["behaviour"] == TOWARD[direction]],
        "memory": behaviour[behaviour["kind"] == "memory"],
        "novel": behaviour[behaviour["kind"] == "novel"],
    }
    for name, part in parts.items():
        lists[name] = (
            [_example_of(row) for row in part.head(limit).to_dict("records")],
            part["behaviour"].head(limit).tolist(),
        )
    return {name: entry for name, entry in lists.items() if entry[0]}


def _example_of(row: dict[str, Any]) -> Example:
    fields = ("item", "prompt", "kind", "group", "family", "split", "memorized", "generalized", "answer")
    return Example(**{field: None if pd.isna(row[field]) else row[field] for field in fields})


def _with_prefixes(asking: Asking, examples: Sequence[Example]) -> list[Batch]:
    batches = prepare(asking, examples)
    cache_prefixes(asking, batches)
    return batches


def _swept(
    cell: Cell,
    asking: Asking,
    contrast: Contrast,
    examples: list[Example],
    direction: str,
    tables: list[pd.DataFrame],
) -> dict[str, tuple[Setting, float]]:
    """Try every setting on tune pairs; per method the chosen one and its margin over the worst control."""
    config = cell.config.steering
    batches = _with_prefixes(asking, examples)
    chosen = {}
    for method in config.methods:
        rated = []
        for top in config.tops:
            for strength in config.strengths[method]:
                setting = Setting(direction, method, top, strength)
                scores = steered(asking, batches, setting.vector(contrast))
                rated.append((setting, shift_rate(scores, direction)))
                before = [SOURCE[direction]] * len(examples)
                tables.append(_steering_table("sweep", setting, ("vector", 0), "pairs", examples, before, scores))
        chosen[method] = choose(asking, batches, contrast, rated, seed=[cell.seed, zlib.crc32(b"choose")])
    return chosen


def _judged(
    cell: Cell,
    asking: Asking,
    contrast: Contrast,
    setting: Setting,
    vector: SteeringVector,
    lists: dict[str, tuple[list[Example], list[str]]],
    prepared: dict[str, list[Batch]],
) -> Iterator[pd.DataFrame]:
    """A chosen vector on every list, and its controls on pairs and conflicts."""
    for name, (examples, before) in lists.items():
        scores = steered(asking, prepared[name], vector)
        yield _steering_table("final", setting, ("vector", 0), name, examples, before, scores)
    for control in CONTROLS:
        seed = [cell.seed, zlib.crc32(f"{setting.direction}/{setting.method}/{control}".encode())]
        for number, drawn in control_draws(control, vector, contrast, cell.config.steering.draws, seed):
            for name in ("pairs", "conflict"):
                if name in lists:
                    scores = steered(asking, prepared[name], drawn, margins=False)
                    yield _steering_table("final", setting, (control, number), name, *lists[name], scores)


def _steering_table(
    purpose: str,
    setting: Setting,
    role: tuple[str, int],
    name: str,
    examples: Sequence[Example],
    before: Sequence[str],
    scores: Scores,
) -> pd.DataFrame:
    table = pd.DataFrame(
        {
            "purpose": purpose,
            "direction": setting.direction,
            "method": setting.method,
            "role": role[0],
            "draw": role[1],
            "top": setting.top,
            "strength": setting.strength,
            "examples": name,
            "example": np.arange(len(examples)),
            "group": [example.group for example in examples],
            "split": "tune" if purpose == "sweep" else "test",
            "before": before,
            "after": scores.behaviour_N,
            "margin": scores.margin_N,
        }
    )
    words = ["purpose", "direction", "method", "role", "examples", "group", "split", "before", "after"]
    return table.astype({word: "str" for word in words})


def _chosen(setting: Setting, vector: SteeringVector) -> dict[str, Any]:
    return {
        "method": setting.method,
        "site": vector.site,
        "layers": vector.layers,
        "positions": vector.positions,
        "top": setting.top,
        "strength": setting.strength,
    }


def _save_vector(
    cell: Cell, asking: Asking, vector: SteeringVector, direction: str, method: str, commit: str
) -> list[Path]:
    from dataclasses import replace

    bound = replace(vector.bound_to(asking.model, asking.tokenizer), task=cell.label, commit=commit)
    folder = cell.folder / "vectors"
    folder.mkdir(exist_ok=True)
    path, temporary = folder / f"{direction}-{method}.safetensors", folder / f".{direction}-{method}.tmp.safetensors"
    bound.save(temporary)
    for suffix in (".json", ".safetensors"):
        temporary.with_suffix(suffix).replace(path.with_suffix(suffix))
    return [path, path.with_suffix(".json")]
