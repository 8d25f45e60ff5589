"""Us and the peers on the same work in one run: interleaved rounds, medians, ratios.

    pip install '.[bench]'
    OMP_NUM_THREADS=1 python benchmarks/peers.py RUN CELL [--work capture label ...] [--write FILE]

``CELL`` is one of a finished run, for example ``inference-0`` of the quickstart (``sweep``: of that task). Each work
has a section of its own in FILE (``docs/results/benchmarks.json``), which the next run of it replaces. A peer that is
not installed, or that does not run with the other versions, is named with what it said. Before anything is timed, what
a peer reads or answers is held against ours.

Shapes: N prompts, T tokens, L layers, D neurons, P pairs.
"""

from __future__ import annotations

import argparse
import copy
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rounds import Way, ratios, seconds_of
from tables import origin, put
from torch import Tensor

from mnemoscope.behaviour import Asking, cache_prefixes, decode, prepare, score, states_at_the_end
from mnemoscope.bench.answers import steered
from mnemoscope.config import load_study
from mnemoscope.interventions import SteeringVector
from mnemoscope.models import backbone_of, blocks_of, load_model
from mnemoscope.runs.processes import settle
from mnemoscope.statistics.contrast import PairedMoments
from mnemoscope.study.cells import cells_of
from mnemoscope.study.stages.common import cell_task
from mnemoscope.tasks import Example, build_task, draw

OURS = "Mnemoscope"
CELLS = 60  # of the sweep
STRENGTH = 0.2  # norm of a layer's shift over that of its states
NEW_TOKENS = 24


@dataclass(frozen=True)
class Work:
    """Something that all do.

    Attributes:
        what: a line that says it.
        base: the way that the others are compared with.
        bar: what is aimed for.
        ways: by name; what each returns is compared with ours by ``agrees``.
        agrees: whether something is what ours gave; None where there is nothing to compare.
        failed: peers that could not do it, and why.
    """

    what: str
    base: str
    bar: str
    ways: dict[str, Way]
    agrees: Callable[[Any, Any], bool] | None
    failed: dict[str, str]


def main() -> None:
    """Measure, print, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("cell", help="one of its cells")
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--rounds", type=int, default=7, help="how often everything is measured, in turn")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", type=Path, help="file for the tables")
    arguments = parser.parse_args()
    settle(arguments.threads)  # as in a study; what the C library keeps of freed memory is the same for all ways
    torch.set_grad_enabled(False)
    for name in arguments.work:
        title = f"{name}, {arguments.cell.rsplit('-', 1)[0]}" if name == "label" else name
        part = _table(title, WORKS[name](arguments), arguments.rounds, origin(arguments.rounds, arguments.threads))
        print("\n".join(part), flush=True)
        if arguments.write:
            put(arguments.write, title, part)


def _table(name: str, work: Work, rounds: int, origin: str) -> list[str]:
    """A section: what was measured, seconds and ratios of each way, and who could not."""
    ways, failed, notes = dict(work.ways), dict(work.failed), {}
    first = ways[OURS]()
    for who, way in list(ways.items()):
        try:
            found = way()
        except Exception as error:  # whatever a peer raises: it is reported, the others go on
            if who in (OURS, work.base):
                raise
            failed[who] = (str(error).splitlines() or [type(error).__name__])[0][:200]
            del ways[who]
            continue
        if work.agrees and found is not None and who != OURS:
            if not work.agrees(first, found):  # it has done something else, so its time says nothing
                failed[who] = "its result differs from ours"
                del ways[who]
                continue
            notes[who] = "same"
    seconds = seconds_of(ways, rounds)
    of_base = ratios(seconds, work.base)
    lines = [f"## {name}", "", textwrap.fill(f"{work.what} {work.bar}", 150), ""]
    lines += [f"| | seconds | times {work.base} | result, against ours |", "|---|---|---|---|"]
    for who, (middle, least, most) in of_base.items():
        ratio = "1" if who == work.base else f"{middle:.2f} ({least:.2f} to {most:.2f})"
        lines.append(f"| {who} | {np.median(seconds[who]):.3f} | {ratio} | {notes.get(who, '-')} |")
    lines += [f"| {who} | could not: {why} | | |" for who, why in failed.items()]
    return [*lines, "", origin, ""]


# --- What the works share


def _opened(arguments: argparse.Namespace, n: int) -> tuple[Asking, list[Example]]:
    """The model of the cell, and conflicts of one length, so that nobody needs padding."""
    cells = cells_of(load_study(str(arguments.run / "study.yaml")), arguments.run)
    cell = next(cell for cell in cells if cell.name == arguments.cell)
    task = cell_task(cell)
    model, tokenizer = load_model(cell.model_folder)
    asking = Asking(model, tokenizer, task.boundary)
    examples = draw(task, np.random.default_rng(5), 3 * n, "conflict", "test")
    lengths = [len(row) for row in asking.tokens([example.prompt for example in examples])]
    usual = max(set(lengths), key=lengths.count)
    chosen = [example for example, length in zip(examples, lengths, strict=True) if length == usual][:n]
    assert len(chosen) >= n // 4, f"only {len(chosen)} prompts of one length"  # small tasks have no more
    return asking, chosen


def _batches(asking: Asking, examples: list[Example], size: int) -> list[Tensor]:
    ids_NT = torch.tensor(asking.tokens([example.prompt for example in examples]))
    return list(ids_NT.split(size))


def _peers(**ways: Callable[[], Way]) -> tuple[dict[str, Way], dict[str, str]]:
    """Ways of those peers that can be set up, and what the others said."""
    made, failed = {}, {}
    for who, build in ways.items():
        try:
            made[who] = build()
        except Exception as error:
            failed[who] = (str(error).splitlines() or [type(error).__name__])[0][:200]
    return made, failed


def _copied(asking: Asking) -> Any:
    """The same model in a copy: peers put parts of their own around it, or take away all hooks that they find."""
    return copy.deepcopy(asking.model)


def _bridge(asking: Asking) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers("gpt2", hf_model=_copied(asking), tokenizer=asking.tokenizer)


def _near(ours: np.ndarray, theirs: Any) -> bool:
    return bool(np.allclose(ours, np.asarray(theirs), rtol=1e-3, atol=1e-4))


def _same(ours: np.ndarray, theirs: Any) -> bool:
    return bool((np.asarray(ours) == np.asarray(theirs)).mean() > 0.995)  # ties may fall either way


# --- Capture


def capture(arguments: argparse.Namespace) -> Work:
    """States of all blocks at the decision position, and their mean over prompts."""
    asking, examples = _opened(arguments, 2048)
    batches = _batches(asking, examples, 256)
    backbone = backbone_of(asking.model)

    def bare() -> None:
        for ids_NT in batches:
            backbone(input_ids=ids_NT, use_cache=False)

    def ours() -> np.ndarray:
        moments: PairedMoments | None = None
        for ids_NT in batches:
            states_NLD = states_at_the_end(asking.model, ids_NT, torch.ones_like(ids_NT), "block")
            moments = moments or PairedMoments.empty(states_NLD.shape[1:])
            moments.add(states_NLD[0::2], states_NLD[1::2])
        assert moments
        return moments.means_2LD.mean(0)

    def library() -> np.ndarray:
        passes = (backbone(input_ids=ids, use_cache=False, output_hidden_states=True) for ids in batches)
        return _mean([h[:, -1] for h in out.hidden_states[1:]] for out in passes)

    peers, failed = _peers(
        nnsight=partial(_nnsight_states, asking, batches),
        pyvene=partial(_pyvene_states, asking, batches),
        TransformerLens=partial(_bridged_states, asking, batches),
    )
    ways: dict[str, Way] = {"bare backbone": bare, OURS: ours, "transformers, output_hidden_states": library, **peers}
    what = (
        f"{len(examples):,} prompts of {batches[0].shape[1]} tokens: the states of all blocks at the last one, and "
        "their means (ours: streamed in float64, with squares). TransformerLens goes on to the logits. The library "
        "norms its last hidden state, so the last block is not compared."
    )
    bar = "Bar: at most 1.03 times, and every peer at least 1.2 times as long as ours."
    return Work(what, "bare backbone", bar, ways, lambda a, b: _near(a[:-1], b[:-1]), failed)


def _nnsight_states(asking: Asking, batches: list[Tensor]) -> Way:
    from nnsight import NNsight

    wrapped = NNsight(backbone_of(_copied(asking)))

    def states(ids_NT: Tensor) -> list[Tensor]:
        with wrapped.trace(input_ids=ids_NT, use_cache=False):
            found = [block.output[:, -1] for block in wrapped.h].save()
        return found

    return lambda: _mean(map(states, batches))


def _pyvene_states(asking: Asking, batches: list[Tensor]) -> Way:
    import pyvene

    backbone, seen = backbone_of(_copied(asking)), list[Tensor]()

    def keep(base: Tensor, source: Any) -> Tensor:
        seen.append(base[:, -1].clone())
        return base

    parts = [{"component": f"h[{n}].output", "intervention": keep} for n in range(len(backbone.h))]
    wrapped = pyvene.IntervenableModel(parts, model=backbone)

    def states(ids_NT: Tensor) -> list[Tensor]:
        seen.clear()
        wrapped(base={"input_ids": ids_NT, "use_cache": False})
        return list(seen)

    return lambda: _mean(map(states, batches))


def _bridged_states(asking: Asking, batches: list[Tensor]) -> Way:
    bridge = _bridge(asking)
    names = [f"blocks.{n}.hook_out" for n in range(len(blocks_of(asking.model)))]

    def states(ids_NT: Tensor) -> list[Tensor]:
        _, cache = bridge.run_with_cache(ids_NT, names_filter=names, pos_slice=-1, return_type=None)
        return [cache[name].reshape(len(ids_NT), -1) for name in names]

    return lambda: _mean(map(states, batches))


def _mean(batches: Iterable[list[Tensor]]) -> np.ndarray:
    """Mean over all rows of batches, each a list of (N, D), one of each layer; (L, D)."""
    total, n = np.float64(0), 0
    for states in batches:
        total, n = total + torch.stack(states, dim=1).double().sum(0).numpy(), n + len(states[0])
    return total / n


# --- Contrast


def contrast(arguments: argparse.Namespace) -> Work:
    """NMD and rho over states that are there."""
    rng = np.random.default_rng(0)
    states_P2LD = rng.standard_normal((50_000, 2, 4, 128), dtype=np.float32) + np.float32(3)

    def ours() -> np.ndarray:
        moments = PairedMoments.of(states_P2LD)
        return np.stack([moments.nmd_LD, moments.rho_LD])

    def two_passes() -> np.ndarray:
        nmd_LD = states_P2LD[:, 0].mean(0, dtype=np.float64) - states_P2LD[:, 1].mean(0, dtype=np.float64)
        return np.stack([nmd_LD, nmd_LD / 2 / states_P2LD.std((0, 1), dtype=np.float64)])

    def tensors() -> np.ndarray:
        states = torch.from_numpy(states_P2LD)
        nmd_LD = states[:, 0].mean(0) - states[:, 1].mean(0)
        return torch.stack([nmd_LD, nmd_LD / 2 / states.flatten(0, 1).std(0, correction=0)]).numpy()

    ways: dict[str, Way] = {OURS: ours, "numpy, two passes in float64": two_passes, "torch, float32": tensors}
    what = "NMD and rho of 100,000 states of 4 x 128 neurons; ours never holds more than 256 pairs in float64."
    agrees = partial(np.allclose, rtol=1e-3, atol=1e-5)
    return Work(what, OURS, "", ways, lambda a, b: bool(agrees(a, b)), {})


# --- Labels


def label(arguments: argparse.Namespace) -> Work:
    """Which of its answers a model gives."""
    asking, examples = _opened(arguments, 1000)
    return _labels(asking, examples, "Bar: `generate` takes at least 2 times as long.")


def label_smollm2(arguments: argparse.Namespace) -> Work:
    """The same on the packaged model, with answers of several tokens."""
    task = build_task("facts", {"relations": ["capital"]}, 0)
    model, tokenizer = load_model("smollm2")
    asking = Asking(model, tokenizer, task.boundary, batch_size=32)
    drawn = draw(task, np.random.default_rng(5), 96, "conflict", "test")
    # What is generated ends where an answer may be closed, so one with a full stop in it cannot be told from its start.
    examples = [e for e in drawn if not set(".,") & set("".join(e.options))][:64]
    return _labels(asking, examples, "Bar: not slower than `generate`.")


def _labels(asking: Asking, examples: list[Example], bar: str) -> Work:
    def ours() -> np.ndarray:
        return score(asking, prepare(asking, examples), margins=False).behaviour_N.astype(str)

    def generated() -> np.ndarray:
        said = decode(asking, examples)
        return np.array([_named(example, text) for example, text in zip(examples, said, strict=True)])

    what = f"{len(examples):,} conflicts labelled memorized, generalized or other, texts in, labels out."
    return Work(what, OURS, bar, {OURS: ours, "transformers, generate": generated}, _same, {})


def _named(example: Example, said: str) -> str:
    for name, option in zip(("memorized", "generalized"), example.options, strict=True):
        if said.strip() == option.strip():
            return name
    return "other"


# --- A sweep


def sweep(arguments: argparse.Namespace) -> Work:
    """A cell of a sweep on 500 prompts: what is answered under a shift of every block from the decision on."""
    asking, examples = _opened(arguments, 500)
    batches = prepare(asking, examples)
    states_NLD = score(asking, batches, margins=False, capture="block").states_NLD
    assert states_NLD is not None
    vectors = list(_drawn(states_NLD, 4))
    cells = list(islice(cycle(vectors), CELLS))
    again, ids_NT = prepare(asking, examples), _batches(asking, examples, len(examples))[0]
    closing = asking.boundary_ids()

    def ours() -> np.ndarray:
        cache_prefixes(asking, batches)
        found = [steered(asking, batches, vector, margins=False).behaviour_N for vector in cells]
        return np.concatenate(found[: len(vectors)]).astype(str)

    def whole() -> np.ndarray:
        found = [steered(asking, again, vector, margins=False).behaviour_N for vector in cells]
        return np.concatenate(found[: len(vectors)]).astype(str)

    def generated() -> np.ndarray:
        width, found = ids_NT.shape[1], []
        for vector in cells:
            with _plain_hooks(asking, vector):
                said = asking.model.generate(
                    input_ids=ids_NT,
                    attention_mask=torch.ones_like(ids_NT),
                    max_new_tokens=2,
                    eos_token_id=None,
                    do_sample=False,
                    pad_token_id=asking.tokenizer.pad_token_id,
                )[:, width:]
            found.append(_of_two(asking, examples, said, closing))
        return np.concatenate(found[: len(vectors)])

    ways: dict[str, Way] = {
        OURS: ours,
        "Mnemoscope, whole prompts": whole,
        "transformers, hooks and generate": generated,
    }
    what = f"{CELLS} settings on {len(examples)} conflicts of {ids_NT.shape[1]} tokens, labels under each."
    return Work(what, OURS, "Bar: whole prompts take at least 8 times as long.", ways, _same, {})


def _drawn(states_NLD: np.ndarray, n: int) -> Iterator[SteeringVector]:
    rng, norm_L1 = np.random.default_rng(0), np.linalg.norm(states_NLD, axis=2).mean(0)[:, None]
    for _ in range(n):
        drawn_LD = rng.standard_normal(states_NLD.shape[1:])
        drawn_LD *= STRENGTH * norm_L1 / np.linalg.norm(drawn_LD, axis=1, keepdims=True)
        yield SteeringVector("generalized", {}).with_dense(drawn_LD)


@contextmanager
def _plain_hooks(asking: Asking, vector: SteeringVector) -> Iterator[None]:
    """What a user writes who has hooks only: the shift is added at the last token of the prompt and at all after it."""

    def hook(module: Any, inputs: Any, output: Any, shift_D: Tensor) -> Any:
        _shifted(output[0] if isinstance(output, tuple) else output, shift_D)
        return output

    blocks = blocks_of(asking.model)
    handles = [
        blocks[layer].register_forward_hook(partial(hook, shift_D=shift_D)) for layer, shift_D in vector.shifts.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _of_two(asking: Asking, examples: list[Example], said_N2: Tensor, closing: list[int]) -> np.ndarray:
    words = asking.tokenizer.batch_decode(said_N2[:, :1])
    closed = torch.isin(said_N2[:, 1], torch.tensor(closing)).tolist()
    return np.array([_named(e, word) if end else "other" for e, word, end in zip(examples, words, closed, strict=True)])


# --- Generation


def generate(arguments: argparse.Namespace) -> Work:
    """Greedy text under a shift of every block from the last token of the prompt on."""
    asking, examples = _opened(arguments, 64)
    ids_NT = _batches(asking, examples, 64)[0]
    states_NLD = score(asking, prepare(asking, examples), margins=False, capture="block").states_NLD
    assert states_NLD is not None
    vector, width = next(_drawn(states_NLD, 1)), ids_NT.shape[1]
    inputs = {"input_ids": ids_NT, "attention_mask": torch.ones_like(ids_NT)}

    def plain() -> None:
        asking.model.generate(**inputs, **_greedily(asking))

    def ours() -> np.ndarray:
        with vector.apply(asking.model):
            return asking.model.generate(**inputs, **_greedily(asking))[:, width:].numpy()

    def hooked() -> np.ndarray:
        with _plain_hooks(asking, vector):
            return asking.model.generate(**inputs, **_greedily(asking))[:, width:].numpy()

    peers, failed = _peers(
        nnsight=partial(_nnsight_text, asking, vector, inputs),
        pyvene=partial(_pyvene_text, asking, vector, inputs),
        TransformerLens=partial(_bridged_text, asking, vector, inputs),
    )
    ways: dict[str, Way] = {"plain generate": plain, OURS: ours, "transformers, own hooks": hooked, **peers}
    what = f"{NEW_TOKENS} tokens behind {len(ids_NT)} prompts of {width} tokens, every block shifted."
    return Work(what, "plain generate", "Bar: at most 1.05 times.", ways, _same, failed)


def _greedily(asking: Asking) -> dict[str, Any]:
    """Always as many tokens, so that all do the same number of passes."""
    ends = {"eos_token_id": None, "pad_token_id": asking.tokenizer.pad_token_id}
    return {"max_new_tokens": NEW_TOKENS, "do_sample": False, **ends}


def _nnsight_text(asking: Asking, vector: SteeringVector, inputs: dict[str, Tensor]) -> Way:
    from nnsight import TransformersModel

    wrapped = TransformersModel(_copied(asking), tokenizer=asking.tokenizer)
    shifts = list(vector.shifts.items())

    def run() -> np.ndarray:
        with wrapped.generate(inputs, **_greedily(asking)) as tracer:
            for _ in tracer.iter[0:NEW_TOKENS]:
                for layer, shift_D in shifts:
                    wrapped.transformer.h[layer].output[:, -1] += shift_D
            said = tracer.result.save()
        return said[:, inputs["input_ids"].shape[1] :].numpy()

    return run


def _pyvene_text(asking: Asking, vector: SteeringVector, inputs: dict[str, Tensor]) -> Way:
    import pyvene

    parts = [
        {
            "component": f"transformer.h[{layer}].output",
            "intervention": lambda base, source, shift_D=shift_D: _shifted(base, shift_D),
        }
        for layer, shift_D in vector.shifts.items()
    ]
    wrapped = pyvene.IntervenableModel(parts, model=_copied(asking))

    def run() -> np.ndarray:
        _, said = wrapped.generate(dict(inputs), intervene_on_prompt=True, **_greedily(asking))
        return said[:, inputs["input_ids"].shape[1] :].numpy()

    return run


def _bridged_text(asking: Asking, vector: SteeringVector, inputs: dict[str, Tensor]) -> Way:
    bridge = _bridge(asking)
    hooks = [
        (f"blocks.{layer}.hook_out", lambda states, hook, shift_D=shift_D: _shifted(states, shift_D))
        for layer, shift_D in vector.shifts.items()
    ]
    options = {"max_new_tokens": NEW_TOKENS, "stop_at_eos": False, "do_sample": False, "return_type": "tokens"}

    def run() -> np.ndarray:
        with bridge.hooks(fwd_hooks=hooks):
            said = bridge.hf_generate(inputs["input_ids"], **options)
        return said[:, inputs["input_ids"].shape[1] :].numpy()

    return run


def _shifted(states_NTD: Tensor, shift_D: Tensor) -> Tensor:
    states_NTD[:, -1] += shift_D
    return states_NTD


WORKS: dict[str, Callable[[argparse.Namespace], Work]] = {
    "capture": capture,
    "contrast": contrast,
    "label": label,
    "label-smollm2": label_smollm2,
    "sweep": sweep,
    "generate": generate,
}

if __name__ == "__main__":
    main()
