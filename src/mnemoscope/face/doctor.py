"""The self-check: a model must give the same numbers in every way in which Mnemoscope reads and steers it.

Shapes: N prompts, T tokens of a left-padded batch, V vocabulary, L layers, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour import (
    Asking,
    Encoded,
    as_batch,
    cache_prefixes,
    capturing,
    left_padded,
    log_probabilities,
    states_at_the_end,
)
from mnemoscope.interventions import SteeringVector, Toward, edited
from mnemoscope.models import (
    PLAINLY,
    SITES,
    Site,
    cache_of,
    context_length,
    layout_of,
    pass_inputs,
    site_module,
    states_of,
)
from mnemoscope.runs.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# Prompts of different lengths, so that a batch of them is padded.
PROMPTS = (
    "The capital of France is",
    "Question: what color is the sky on a clear day? Answer:",
    "2 + 2 =",
    "Once upon a time there was a king who had three daughters, and the youngest of them",
)
# The largest difference that counts as equal, by precision; of logits above 10 it grows with a tenth of the largest.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-9}
DECODED = 6  # tokens behind each prompt
STRENGTH = 0.3  # of the random shift, relative to the norm of the states
Applied = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True, slots=True)
class Check:
    """One property: the largest absolute difference of logits or states, and the largest that passes (0: equal bits).

    ``flips`` are top tokens that differ although they lead by more than twice ``allowed``; ``least`` is the smallest
    difference that passes, where one is expected.
    """

    name: str
    difference: float
    allowed: float
    flips: int = 0
    least: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether it holds; a difference of NaN does not pass."""
        return self.least <= self.difference <= self.allowed and not self.flips


@torch.no_grad()
def examine(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str] = PROMPTS
) -> Iterator[Check]:
    """Check a model, one property after another, on at least two prompts of different lengths in tokens.

    Raises InputError where a prompt is empty or too long, all have one length, or the model has no known layout.
    """
    layout_of(model)
    patient = _Patient(model, tokenizer, [tokenizer(prompt).input_ids for prompt in prompts])
    limit = context_length(model) - DECODED
    for prompt, ids in zip(prompts, patient.prompts, strict=True):
        if not 0 < len(ids) <= limit:
            raise InputError(f"prompts: {prompt[:60]!r} has {len(ids)} tokens; allowed are 1 to {limit}")
    if len({len(ids) for ids in patient.prompts}) < 2:
        raise InputError("prompts: all have one length; padding shows only where lengths differ")
    plain = patient.read()
    yield patient.compare("batched and padded = single", plain, patient.read(single=True))
    yield patient.compare("cached = uncached", plain, patient.read(cached=True))
    yield _same_states(patient)
    yield _sums(patient)
    if layout_of(model).down:
        yield _down_ends_mlp(patient)
    yield _labels(patient)
    yield _prefixes(patient)
    for site in SITES:
        if site != "neuron" or layout_of(model).down:
            yield from _steered(patient, site, plain)
    yield patient.compare("afterwards = before", plain, patient.read(), exact=True)


@dataclass(frozen=True)
class _Patient:
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    prompts: list[list[int]]

    def read(self, applied: Applied = nullcontext, single: bool = False, cached: bool = False) -> list[Tensor]:
        """Logits from the decision position on, float32 (1 + DECODED, V) for every prompt, repeated behind itself."""
        found: list[Tensor] = []
        rows = [prompt + (prompt * DECODED)[:DECODED] for prompt in self.prompts]
        for ids_NT, mask_NT in [self.padded([row]) for row in rows] if single else [self.padded(rows)]:
            prompt, cache, start = ids_NT.shape[1] - DECODED, None, 0
            read: list[Tensor] = []
            with applied():
                # First the prompt alone, where a vector finds the decision position; then what follows it.
                for end in range(prompt, prompt + DECODED + 1, 1 if cached else DECODED):
                    inputs = pass_inputs(self.model, ids_NT[:, start:end], mask_NT[:, :end], cache)
                    output = self.model(**inputs | {"use_cache": cached})
                    logits_NMV = output.logits[:, max(prompt - 1 - start, 0) :]
                    read = [*read, logits_NMV] if cached else [logits_NMV]
                    cache, start = (cache_of(output), end) if cached else (None, 0)
            found += [logits_MV.float().cpu() for logits_MV in torch.cat(read, dim=1)]
        return found

    def padded(self, rows: list[list[int]]) -> tuple[Tensor, Tensor]:
        return left_padded(rows, self.tokenizer.pad_token_id or 0, self.model.device)

    def states(self, site: Site) -> Tensor:
        """States of all prompts at the decision position, float32 (L, N, D)."""
        return torch.from_numpy(states_at_the_end(self.model, *self.padded(self.prompts), site)).transpose(0, 1)

    def random_vector(self, site: Site) -> SteeringVector:
        """A random shift of every layer, relative to the norm of its states."""
        generator, states_LND = torch.Generator().manual_seed(0), self.states(site)
        shifts = {}
        for layer, states_ND in enumerate(states_LND):
            shift_D = torch.randn(states_ND.shape[-1], generator=generator)
            norm = float(states_ND.norm(dim=-1).mean())
            shifts[layer] = shift_D * STRENGTH * norm / float(shift_D.norm()) / math.sqrt(len(states_LND))
        return SteeringVector(Toward.GENERALIZED, shifts, site=site)

    def check(self, name: str, difference: Any, size: Any = 1.0) -> Check:
        """A check of numbers of some size."""
        return Check(name, float(difference), TOLERANCE.get(self.model.dtype, 1e-4) * max(1.0, float(size)))

    def compare(self, name: str, first: list[Tensor], second: list[Tensor], exact: bool = False) -> Check:
        """Compare two readings of all prompts."""
        found = self.check(name, _difference(first, second), max(logits_MV.abs().max() for logits_MV in first) / 10)
        allowed, flips = 0.0 if exact else found.allowed, 0
        for a_MV, b_MV in zip(first, second, strict=True):
            top_M2 = a_MV.topk(2).values
            clear_M = top_M2[:, 0] - top_M2[:, 1] > 2 * allowed
            flips += int((clear_M & (a_MV.argmax(-1) != b_MV.argmax(-1))).sum())
        return replace(found, allowed=allowed, flips=flips)


def _difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    """The largest absolute difference; NaN where any is NaN, which Python's own ``max`` would skip."""
    largest = [(a_MV - b_MV).abs().max() for a_MV, b_MV in zip(first, second, strict=True)]
    return float(torch.stack(largest).max()) if largest else 0.0


def _steered(patient: _Patient, site: Site, plain: list[Tensor]) -> Iterator[Check]:
    """Checks of a shift at a site."""
    vector = patient.random_vector(site)
    apply = partial(vector.apply, patient.model)
    nothing = {layer: torch.zeros_like(shift) for layer, shift in vector.shifts.items()}
    untouched = patient.read(partial(edited, patient.model, nothing, site))  # with its hooks in place
    yield patient.compare(f"{site}: alpha 0 = untouched", plain, untouched, exact=True)
    steered = patient.read(apply)
    yield Check(f"{site}: a shift arrives", _difference(plain, steered), math.inf, least=TOLERANCE[torch.float32])
    yield patient.compare(f"{site}: steered batch = steered single", steered, patient.read(apply, single=True))
    yield patient.compare(f"{site}: steered uncached = steered cached", steered, patient.read(apply, cached=True))
    factors = [row % 2 for row in range(len(patient.prompts))]
    wanted = [(steered if on else plain)[row] for row, on in enumerate(factors)]
    mixed = patient.read(partial(apply, alpha=factors))
    yield patient.compare(f"{site}: a factor for each prompt = each alone", wanted, mixed)


def _same_states(patient: _Patient) -> Check:
    """Compare block outputs with the library's next hidden states, of which the last one is after the final norm."""
    with capturing(patient.model, "block") as states:
        inputs = pass_inputs(patient.model, *patient.padded(patient.prompts))
        output = patient.model(**inputs, output_hidden_states=True)
    ours = [state_NOD[:, 0].float().cpu() for state_NOD in states[:-1]]
    theirs = [states_of(state_NTD)[:, -1].float().cpu() for state_NTD in output.hidden_states[1 : len(states)]]
    return Check("block output = the library's hidden state", _difference(ours, theirs), 0.0)


def _sums(patient: _Patient) -> Check:
    """Block output against block input + attention + MLP; some families scale what is added, all layers alike."""
    block, attention, mlp = (patient.states(site) for site in ("block", "attention", "mlp"))
    added = (block[1:] - block[:-1]).reshape(-1, 1)
    parts = torch.stack([part[1:].flatten() for part in (attention, mlp)], dim=1)
    scales = torch.linalg.lstsq(parts.double(), added.double()).solution.float()
    return patient.check(
        "block output = input + attention + MLP", (parts @ scales - added).abs().max(), added.abs().max()
    )


def _down_ends_mlp(patient: _Patient) -> Check:
    """The down projection of its captured input, and the norm of that where one follows, against the MLP's output."""
    activations, wanted = (
        patient.states(site)[0].to(patient.model.device, patient.model.dtype) for site in ("neuron", "mlp")
    )
    down, mlp = (site_module(patient.model, 0, site)[0] for site in ("neuron", "mlp"))
    ends = [down(activations)]
    if "norm" in type(mlp).__name__.lower() and ends[0].shape == wanted.shape:
        ends.append(mlp(ends[0]))
    differences = (float((end - wanted).abs().max()) for end in ends if end.shape == wanted.shape)
    return patient.check("the down projection ends the MLP", min(differences, default=math.inf))


def _labels(patient: _Patient) -> Check:
    """By how much a token of ``generate``, cached or not, was not the best in one pass over prompt and answer."""
    model, (ids_NT, mask_NT) = patient.model, patient.padded(patient.prompts)
    behind, sizes = [], []
    for cached in (True, False):
        options = {"max_new_tokens": DECODED, "do_sample": False, "use_cache": cached, "eos_token_id": None, **PLAINLY}
        text_NT = model.generate(input_ids=ids_NT, attention_mask=mask_NT, pad_token_id=0, **options)
        all_mask_NT = torch.nn.functional.pad(mask_NT, (0, DECODED), value=1)
        logits_NMV = model(**pass_inputs(model, text_NT, all_mask_NT)).logits[:, -DECODED - 1 : -1].float()
        behind.append(logits_NMV.max(-1).values - logits_NMV.gather(2, text_NT[:, -DECODED:, None])[..., 0])
        sizes.append(logits_NMV.abs().max())
    return patient.check("labels = generate, whole and cached", torch.stack(behind).max(), max(sizes) / 10)


def _prefixes(patient: _Patient) -> Check:
    """Answers under a shift of the last layer: log probabilities by cached prefixes and replayed blocks, and whole."""
    asking = Asking(patient.model, patient.tokenizer)
    answers = [(prompt[:2], [0 if prompt[0] else 1]) for prompt in patient.prompts]
    encoded = [Encoded(prompt, 0, two) for prompt, two in zip(patient.prompts, answers, strict=True)]
    whole, kept = (as_batch(asking, encoded, np.arange(len(encoded))) for _ in range(2))
    cache_prefixes(asking, [kept])
    last = max((vector := patient.random_vector("block")).shifts)
    with replace(vector, edits={last: vector.shifts[last]}).apply(patient.model):
        found, *again = (log_probabilities(asking, batch) for batch in (whole, kept, kept))
    difference = _difference(again, [found, found])
    return patient.check("cached prefixes and replayed blocks = whole passes", difference, found.abs().max() / 10)
