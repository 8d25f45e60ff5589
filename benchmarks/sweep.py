"""What a cell of a sweep costs, against one plain forward pass over the same prompts.

    python benchmarks/sweep.py [--model FOLDER] [--threads 1]

See ``benchmarks/README.md`` for what is measured and the latest figures.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from rounds import ratios, seconds_of

from mnemoscope.behaviour import Asking, Batch, Scores, cache_prefixes, prepare, score
from mnemoscope.config import ModelConfig
from mnemoscope.interventions import SteeringVector
from mnemoscope.models import build_gpt2, load_model, states_of, word_tokenizer
from mnemoscope.models.passes import position_ids
from mnemoscope.tasks import Example, build_task

CELLS = 60
PLAIN = "plain pass"
STRENGTHS = (0.05, 0.1, 0.2, 0.3)  # norm of a layer's shift over that of its states


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a model trained on `inference`; default: random weights, options made to fit")
    parser.add_argument("--memorized-names", type=int, default=220, help="of the task that the model was trained on")
    parser.add_argument("--pairs", type=int, default=500)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=11, help="how often everything is measured, in turn")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    asking, examples = _asked(arguments)
    batches = prepare(asking, examples)
    _report_memory(asking, batches)
    vectors = _vectors(asking, batches)
    for name, chosen in vectors.items():
        labels = np.concatenate([_cell(asking, batches, vector, margins=False).behaviour_N for vector in chosen])
        print(f"{name}: {np.mean(labels != 'other'):.0%} of the answers fit an option and are closed")
    _print_ratios(_seconds(asking, examples, batches, vectors, arguments.rounds))


def _asked(arguments: argparse.Namespace) -> tuple[Asking, list[Example]]:
    """A model and conflicts that it answers with one of their options."""
    task = build_task("inference", {"memorized_names": arguments.memorized_names}, 0)
    examples = task.examples(np.random.default_rng(1), 4 * arguments.pairs, "conflict")
    if arguments.model:
        asking = Asking(*load_model(arguments.model), task.boundary, arguments.batch_size)
        labels = score(asking, prepare(asking, examples), margins=False).behaviour_N
        chosen = [example for example, label in zip(examples, labels, strict=True) if label != "other"]
    else:
        tokenizer = word_tokenizer(task.vocabulary, 64)
        model = build_gpt2(tokenizer, ModelConfig(layers=4, width=128, heads=4, context=64), 0)
        # A random model closes nothing; where every word closes, a label tells that the closing token was looked at.
        asking = Asking(model, tokenizer, tuple(task.vocabulary), arguments.batch_size)
        chosen = _with_fitting_options(asking, examples)
    assert len(chosen) >= arguments.pairs, "the model answers too few conflicts"
    return asking, chosen[: arguments.pairs]


@torch.no_grad()
def _with_fitting_options(asking: Asking, examples: list[Example]) -> list[Example]:
    """The two tokens that a random model ranks first as options, so that what closes them is checked as often."""
    inputs = asking.tokenizer([example.prompt for example in examples], return_tensors="pt", padding=True)
    logits_NV = asking.model(**_inputs(inputs.input_ids, inputs.attention_mask)).logits[:, -1]
    top_N2 = logits_NV.topk(2).indices.tolist()
    words = [asking.tokenizer.convert_ids_to_tokens(pair) for pair in top_N2]
    made = [
        replace(example, memorized=" " + first, generalized=" " + second)
        for example, (first, second) in zip(examples, words, strict=True)
    ]
    special = set(asking.tokenizer.all_special_tokens)
    return [example for example, pair in zip(made, words, strict=True) if not special & set(pair)]


def _inputs(ids_NT: torch.Tensor, mask_NT: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"input_ids": ids_NT, "attention_mask": mask_NT, "position_ids": position_ids(mask_NT)}


def _plain_pass(asking: Asking, examples: list[Example], **options: bool) -> Callable[[], object]:
    """One pass of transformers over all prompts at once, left padded, logits of every position."""
    tokens = asking.tokenizer([example.prompt for example in examples], return_tensors="pt", padding=True)
    inputs = _inputs(tokens.input_ids, tokens.attention_mask)
    return torch.no_grad()(lambda: asking.model(**inputs, **options))


def _report_memory(asking: Asking, batches: list[Batch]) -> None:
    started = time.perf_counter()
    cache_prefixes(asking, batches)
    seconds = time.perf_counter() - started
    kept = sum(layer.room[0].nbytes + layer.room[1].nbytes for batch in batches for layer in batch.prefix.layers)
    for batch in batches:
        kept += sum(states_of(x).nbytes for x in [*batch.unshifted.context_L, *batch.unshifted.answers_L])
        kept += sum(tensor.nbytes for columns in batch.unshifted.columns_L for tensor in columns)
    columns = sum(layer.keys.nbytes + layer.values.nbytes for batch in batches for layer in batch.prefix.layers)
    print(f"prefixes: {seconds:.2f} s; {kept / 2**20:.0f} MiB kept, {columns / 2**20:.0f} of them keys and values")


def _vectors(asking: Asking, batches: list[Batch]) -> dict[str, list[SteeringVector]]:
    """Random vectors of every strength, on all layers and on each single one."""
    states_NLD = score(asking, batches, capture="block").states_NLD
    assert states_NLD is not None
    norm_L1 = np.linalg.norm(states_NLD, axis=2).mean(0)[:, None]
    rng, layers = np.random.default_rng(0), len(norm_L1)

    def vector(chosen: list[int], strength: float) -> SteeringVector:
        drawn_LD = rng.standard_normal(states_NLD.shape[1:])
        drawn_LD *= strength * norm_L1 / np.linalg.norm(drawn_LD, axis=1, keepdims=True)
        kept_L1 = np.isin(np.arange(layers), chosen)[:, None]
        return SteeringVector("generalized", {}).with_dense(np.where(kept_L1, drawn_LD, 0.0))

    chosen = {"all layers": list(range(layers)), **{f"layer {n}": [n] for n in range(layers)}}
    return {name: [vector(picked, strength) for strength in STRENGTHS] for name, picked in chosen.items()}


def _cell(asking: Asking, batches: list[Batch], vector: SteeringVector, margins: bool) -> Scores:
    return score(asking, batches, margins=margins, applied=partial(vector.apply, asking.model))


def _cells(asking: Asking, batches: list[Batch], vectors: list[SteeringVector], margins: bool) -> None:
    for vector in vectors:
        _cell(asking, batches, vector, margins)


def _seconds(
    asking: Asking, examples: list[Example], batches: list[Batch], vectors: dict[str, list[SteeringVector]], rounds: int
) -> dict[str, np.ndarray]:
    """Seconds of a plain pass and of a cell, by name; one per round, measured in turn, the first round left out."""
    runs: dict[str, tuple[Callable[[], object], int]] = {
        PLAIN: (_plain_pass(asking, examples), 1),
        "plain, use_cache=False": (_plain_pass(asking, examples, use_cache=False), 1),
    }
    for name, chosen in vectors.items():
        for margins in (True, False):
            cells = partial(_cells, asking, batches, chosen, margins)
            runs[f"{name}, {'with' if margins else 'no'} margins"] = (cells, len(chosen))
    seconds = seconds_of({name: run for name, (run, _) in runs.items()}, rounds)
    measured = {name: values / runs[name][1] for name, values in seconds.items()}
    for margins in ("with margins", "no margins"):
        measured[f"mixed, {margins}"] = np.mean([measured[f"{name}, {margins}"] for name in vectors], axis=0)
    return measured


def _print_ratios(seconds: dict[str, np.ndarray]) -> None:
    print(f"{'':28}{'ms':>8}{'min':>8}{'max':>8}   {CELLS} cells / plain pass: median, min .. max over rounds")
    of_plain = ratios(seconds, PLAIN)
    for name, values in seconds.items():
        line = f"{name:28}{1e3 * np.median(values):8.1f}{1e3 * values.min():8.1f}{1e3 * values.max():8.1f}"
        if "margins" in name:
            middle, least, most = (CELLS * ratio for ratio in of_plain[name])
            line += f"   {middle:5.2f}   {least:.2f} .. {most:.2f}"
        print(line)


if __name__ == "__main__":
    main()
