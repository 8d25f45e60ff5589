"""What a model does when asked: labels, decision margins and states at the decision position.

Nothing is generated to find a label: greedy decoding yields an answer exactly when, in one teacher-forced pass, the
argmax before each of its tokens is that token and the argmax after it closes the answer. The prompt is read once;
each revealing answer is a short pass on a copy of its cache.

Shapes: N examples, T tokens of a left-padded context, R rows (one per example and option), M tokens of an answer,
V vocabulary, L layers, D neurons.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour.asking import Asking, Batch
from mnemoscope.models import Site, blocks_of, cache_argument, cache_of, position_ids, site_module, states_of
from mnemoscope.tasks import Example

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TIE = 1e-4  # two logits closer than this may swap places with the batch size

Applied = Callable[[], AbstractContextManager[Any]]


@dataclass(slots=True)
class Scores:
    """What a model did with N examples.

    Attributes:
        behaviour_N: ``memorized``, ``generalized`` or ``other`` for conflicts, else ``correct`` or ``wrong``.
        margin_N: float64, ``log p(generalized) - log p(memorized)`` in nats over the whole answers without what closes
            them; NaN for examples with one answer, or where margins were not asked for.
        tie_N: bool, the top two logits lay within 1e-4 where it mattered.
        confabulated_N: float64, 1 where the behaviour is ``other`` and the answer has the memorized format, else 0; NaN
            where both formats are the same or where formats were not asked for.
        states_NLD: float32 states at the decision position, or None.
    """

    behaviour_N: np.ndarray
    margin_N: np.ndarray
    tie_N: np.ndarray
    confabulated_N: np.ndarray
    states_NLD: np.ndarray | None = None


@torch.no_grad()
def cache_prefixes(asking: Asking, batches: Sequence[Batch]) -> None:
    """Read every context up to, not including, its decision position, and keep the caches in the batches.

    A shift that starts at the decision position leaves these keys and values as they are, so every later ``score`` of
    the same batches costs the decision token and the answers only.
    """
    for batch in batches:
        ids_NT, mask_NT = batch.ids_NT[:, :-1], batch.mask_NT[:, :-1]
        keep = int(batch.shared_N.max())
        if ids_NT.shape[1] == 0:
            continue
        inputs = {
            "input_ids": ids_NT,
            "attention_mask": mask_NT,
            "position_ids": position_ids(mask_NT),
            "use_cache": True,
        }
        if keep:
            output = asking.model(**inputs, logits_to_keep=keep)
            batch.prefix_fits_N = _shared_fits(batch, output.logits)
        else:
            output = asking.model.base_model(**inputs)  # no head where no logits are needed
            batch.prefix_fits_N = torch.ones_like(batch.shared_N, dtype=torch.bool)
        batch.prefix = cache_of(output)


def _shared_fits(batch: Batch, logits_NKV: Tensor) -> Tensor:
    """Whether the model produces the shared beginning of the options itself; bool (N,).

    ``logits_NKV`` are those of the K context tokens before the last one.
    """
    keep = logits_NKV.shape[1]
    if keep == 0:
        return torch.ones_like(batch.shared_N, dtype=torch.bool)
    matches_NK = logits_NKV.argmax(-1) == batch.ids_NT[:, -keep:]
    counts_NK = torch.arange(keep, 0, -1, device=matches_NK.device) <= batch.shared_N[:, None]
    return (matches_NK | ~counts_NK).all(1)


@contextmanager
def read_states(model: PreTrainedModel, site: Site) -> Iterator[list[Tensor]]:
    """Inside the context every pass fills the list with one (N, D) state per layer, at the last column.

    The only hook of the package that reads. It is gone when the context ends, however it ends.
    """
    layers = len(blocks_of(model))
    states: list[Tensor] = [torch.empty(0)] * layers
    handles = []

    def reader(layer: int, is_input: bool) -> Callable[..., None]:
        def read(module: torch.nn.Module, inputs: Any, output: Any = None) -> None:
            states[layer] = states_of(inputs if is_input else output)[:, -1].detach()

        return read

    try:
        for layer in range(layers):
            module, is_input = site_module(model, layer, site)
            register = module.register_forward_pre_hook if is_input else module.register_forward_hook
            handles.append(register(reader(layer, is_input)))
        yield states
    finally:
        for handle in handles:
            handle.remove()


def score(
    asking: Asking,
    batches: Sequence[Batch],
    *,
    margins: bool = True,
    capture: Site | None = None,
    applied: Applied = nullcontext,
) -> Scores:
    """Label prepared examples, in the order in which they were given to ``prepare``.

    Args:
        margins: whether decision margins are wanted; without them an option is not read on once its first token
            does not fit.
        capture: a site whose states at the decision position are returned as well.
        applied: makes the context in which each batch is read, for example a steering vector's.

    Returns:
        Scores with N entries; ``confabulated_N`` is NaN (see ``mark_confabulations``).
    """
    total = sum(len(batch.examples_N) for batch in batches)
    scores = Scores(
        np.full(total, "other", dtype=object), np.full(total, np.nan), np.zeros(total, bool), np.full(total, np.nan)
    )
    closing = torch.tensor(asking.boundary_ids(), device=asking.model.device)
    for batch in batches:
        with torch.no_grad(), applied():
            states = _score_batch(asking.model, batch, closing, scores, margins, capture)
        if capture and scores.states_NLD is None:
            scores.states_NLD = np.empty((total, *states.shape[1:]), dtype=np.float32)
        if capture and scores.states_NLD is not None:
            scores.states_NLD[batch.examples_N] = states
    return scores


def log_probabilities(asking: Asking, batch: Batch) -> Tensor:
    """Log probability of each example's options in nats, float32 (N, 2), through which gradients flow back.

    Column 0 is the memorized answer, or the only one, column 1 the generalized one (NaN where there is one answer).
    """
    logits_NV, _, cache = _read_contexts(asking.model, batch)
    closing = torch.tensor(asking.boundary_ids(), device=asking.model.device)
    _, logp_R, _ = _read_answers(asking.model, batch, logits_NV, cache, closing, margins=True)
    empty_N2 = torch.full((len(batch.examples_N), 2), torch.nan, device=logp_R.device)
    return empty_N2.index_put((batch.example_R, batch.option_R), logp_R)


def _score_batch(
    model: PreTrainedModel, batch: Batch, closing: Tensor, scores: Scores, margins: bool, capture: Site | None
) -> np.ndarray:
    reading: AbstractContextManager[list[Tensor]] = read_states(model, capture) if capture else nullcontext([])
    with reading as states:
        logits_NV, fits_N, cache = _read_contexts(model, batch)
    fits_R, logp_R, tie_R = _read_answers(model, batch, logits_NV, cache, closing, margins)
    fits_R &= fits_N[batch.example_R]
    top_N2 = logits_NV.topk(2).values
    tie_N = (top_N2[:, 0] - top_N2[:, 1]) < TIE
    tie_N = tie_N.index_put((batch.example_R[tie_R],), torch.tensor(True, device=tie_N.device))
    _record(batch, scores, fits_R.cpu().numpy(), logp_R.double().cpu().numpy(), margins)
    scores.tie_N[batch.examples_N] = tie_N.cpu().numpy()
    return torch.stack(states, dim=1).float().cpu().numpy() if states else np.empty((len(batch.examples_N), 0, 0))


def _read_contexts(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Any]:
    """Logits (N, V) at the decision position, whether the shared beginning fits (N,), and the contexts' cache."""
    positions_NT = position_ids(batch.mask_NT)
    if batch.prefix is not None:
        output = model(
            input_ids=batch.ids_NT[:, -1:],
            attention_mask=batch.mask_NT,
            position_ids=positions_NT[:, -1:],
            use_cache=True,
            **{cache_argument(model): select_rows(batch.prefix, None)},
        )
        assert batch.prefix_fits_N is not None
        return output.logits[:, -1], batch.prefix_fits_N, cache_of(output)
    output = model(
        input_ids=batch.ids_NT,
        attention_mask=batch.mask_NT,
        position_ids=positions_NT,
        use_cache=True,
        logits_to_keep=int(batch.shared_N.max()) + 1,
    )
    return output.logits[:, -1], _shared_fits(batch, output.logits[:, :-1]), cache_of(output)


def _read_answers(
    model: PreTrainedModel, batch: Batch, logits_NV: Tensor, cache: Any, closing: Tensor, margins: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Per option: whether greedy decoding gives it, its log probability (nats), whether a tie decided."""
    first_R = batch.suffix_RM[:, 0]
    logits_RV = logits_NV[batch.example_R]
    logp_R = logits_RV.gather(1, first_R[:, None])[:, 0] - logits_RV.logsumexp(1)
    fits_R = logits_RV.argmax(1) == first_R
    tie_R = torch.zeros_like(fits_R)
    wanted = torch.nonzero(fits_R | ((batch.length_R > 1) & margins))[:, 0]
    if len(wanted) == 0:
        return fits_R, logp_R, tie_R
    longest = int(batch.length_R[wanted].max())
    suffix_RM, length_R = batch.suffix_RM[wanted, :longest], batch.length_R[wanted]
    example_R = batch.example_R[wanted]
    mask_RT = torch.cat([batch.mask_NT[example_R], torch.ones_like(suffix_RM)], dim=1)
    logits_RMV = model(
        input_ids=suffix_RM,
        attention_mask=mask_RT,
        position_ids=position_ids(mask_RT)[:, -longest:],
        use_cache=True,
        **{cache_argument(model): select_rows(cache, example_R)},
    ).logits
    argmax_RM = logits_RMV.argmax(-1)
    step_M = torch.arange(longest, device=argmax_RM.device)
    inside_RM = step_M < length_R[:, None] - 1  # positions that predict a further token of the option
    target_RM = torch.roll(suffix_RM, -1, dims=1)
    right_RM = torch.where(inside_RM, argmax_RM == target_RM, torch.isin(argmax_RM, closing))
    used_RM = step_M < length_R[:, None]
    top_RM2 = logits_RMV.topk(2).values
    token_logp_RM = logits_RMV.gather(2, target_RM[..., None])[..., 0] - logits_RMV.logsumexp(2)
    tie_R[wanted] = fits_R[wanted] & (((top_RM2[..., 0] - top_RM2[..., 1]) < TIE) & used_RM).any(1)
    fits_R[wanted] &= (right_RM | ~used_RM).all(1)
    logp_R[wanted] += (token_logp_RM * inside_RM).sum(1)
    return fits_R, logp_R, tie_R


def _record(batch: Batch, scores: Scores, fits_R: np.ndarray, logp_R: np.ndarray, margins: bool) -> None:
    example_R, option_R = batch.example_R.cpu().numpy(), batch.option_R.cpu().numpy()
    n = len(batch.examples_N)
    options_N = np.bincount(example_R, minlength=n)
    fits_NO = np.zeros((n, 2), bool)
    logp_NO = np.full((n, 2), np.nan)
    fits_NO[example_R, option_R], logp_NO[example_R, option_R] = fits_R, logp_R
    conflict_N = options_N == 2
    label_N = np.where(fits_NO[:, 0], "memorized", np.where(fits_NO[:, 1], "generalized", "other")).astype(object)
    label_N[~conflict_N] = np.where(fits_NO[~conflict_N, 0], "correct", "wrong")
    scores.behaviour_N[batch.examples_N] = label_N
    if margins:
        scores.margin_N[batch.examples_N] = logp_NO[:, 1] - logp_NO[:, 0]


def select_rows(cache: Any, rows_R: Tensor | None) -> Any:
    """A cache of the chosen rows (None: all), which later passes can extend without touching this one."""
    copied = copy.copy(cache)
    # A pass replaces a layer's tensors by longer ones, so sharing them between copies of the layers is safe.
    copied.layers = [copy.copy(layer) for layer in cache.layers]
    if rows_R is not None:
        copied.batch_select_indices(rows_R)
    return copied


def mark_confabulations(
    asking: Asking,
    examples: Sequence[Example],
    scores: Scores,
    has_memorized_format: Callable[[str], bool | None],
    applied: Applied = nullcontext,
) -> None:
    """Decode what answered neither way and mark, in place, the answers that only look memorized.

    Args:
        has_memorized_format: the task's own; None where both formats are the same, which leaves NaN.
    """
    if not examples or has_memorized_format(examples[0].options[0]) is None:
        return
    scores.confabulated_N[:] = 0.0
    others = [i for i, behaviour in enumerate(scores.behaviour_N) if behaviour == "other"]
    for i, text in zip(others, decode(asking, [examples[i] for i in others], applied), strict=True):
        scores.confabulated_N[i] = float(bool(has_memorized_format(text)))


def decode(asking: Asking, examples: Sequence[Example], applied: Applied = nullcontext) -> list[str]:
    """What the model answers, by plain greedy ``generate``, up to what closes the answer."""
    if not examples:
        return []
    tokenizer, closing = asking.tokenizer, asking.boundary_ids()
    longest = max(len(ids) for e in examples for ids in tokenizer(list(e.options), add_special_tokens=False).input_ids)
    texts: list[str] = []
    for start in range(0, len(examples), asking.batch_size):
        prompts = [example.prompt for example in examples[start : start + asking.batch_size]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(asking.model.device)
        with torch.no_grad(), applied():
            output = asking.model.generate(
                input_ids=inputs.input_ids,
                attention_mask=inputs.attention_mask,
                max_new_tokens=longest + 1,
                do_sample=False,
                eos_token_id=closing,
                pad_token_id=tokenizer.pad_token_id,
            )
        answers = output[:, inputs.input_ids.shape[1] :].tolist()
        ends = [next((i for i, token in enumerate(answer) if token in closing), len(answer)) for answer in answers]
        texts += tokenizer.batch_decode([answer[:end] for answer, end in zip(answers, ends, strict=True)])
    return texts
