"""Labels under context-aware decoding, a baseline: the logits of a prompt set against those of another prompt.

Shapes: W weights, N examples, T tokens of a left-padded batch, M tokens of an answer, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mnemoscope.behaviour.asking import Asking, encode
from mnemoscope.behaviour.labels import Scores
from mnemoscope.models import pass_inputs
from mnemoscope.tasks import Example


@torch.no_grad()
def score_contrasted(
    asking: Asking, examples: Sequence[Example], others: Sequence[Example], weights: Sequence[float]
) -> list[Scores]:
    """What conflicts are answered when each token is chosen by ``(1 + weight) * logits - weight * other logits``.

    With a positive weight what the prompt says counts for more, with a negative one for less (Shi et al. 2023,
    "Trusting your evidence: hallucinate less with context-aware decoding", arXiv 2305.14739).

    Args:
        others: the same questions without what is said about them, one for each example, with the same answers.
        weights: both prompts are read once for all of them.

    Returns:
        Scores of N examples for each weight; margins in nats, of whole answers without what closes them; no ties, no
        states.
    """
    total = len(examples)
    encode(asking, [*examples, *others])  # refuses what cannot be asked, by name
    closing = torch.tensor(asking.boundary_ids(), device=asking.model.device)
    fits_W2N, logp_W2N = np.zeros((len(weights), 2, total), bool), np.zeros((len(weights), 2, total))
    for option in (0, 1):
        answers = [example.options[option] for example in examples]
        read = zip(_read(asking, examples, answers), _read(asking, others, answers), strict=True)
        for (chosen, ids_NM, length_N, mine_NMV), (*_, theirs_NMV) in read:
            for number, weight in enumerate(weights):
                logits_NMV = (1 + weight) * mine_NMV - weight * theirs_NMV
                judged = _judged(logits_NMV, ids_NM, length_N, closing)
                fits_W2N[number, option, chosen], logp_W2N[number, option, chosen] = judged
    return [_scores(fits_2N, logp_2N) for fits_2N, logp_2N in zip(fits_W2N, logp_W2N, strict=True)]


def _scores(fits_2N: np.ndarray, logp_2N: np.ndarray) -> Scores:
    total = fits_2N.shape[1]
    behaviour_N = np.where(fits_2N[0], "memorized", np.where(fits_2N[1], "generalized", "other")).astype(object)
    return Scores(behaviour_N, logp_2N[1] - logp_2N[0], np.zeros(total, bool), np.full(total, np.nan))


def _read(
    asking: Asking, examples: Sequence[Example], answers: Sequence[str]
) -> Iterator[tuple[np.ndarray, Tensor, Tensor, Tensor]]:
    """Per batch: which examples, their answers' tokens (N, M), how many, and the logits (N, M + 1, V).

    Answers end at the last column, so that column m of the logits is what is said before token m, counted from the end.
    """
    device = asking.model.device
    for start in range(0, len(examples), asking.batch_size):
        chosen = np.arange(start, min(start + asking.batch_size, len(examples)))
        mine = examples[start : start + asking.batch_size]
        texts = [asking.whole(e, answer) for e, answer in zip(mine, answers[start:], strict=False)]
        prompts = asking.tokens([asking.text(example.prompt) for example in mine])
        inputs = asking.padded(texts)
        whole_N = inputs.attention_mask.sum(1)
        length_N = whole_N - torch.tensor([len(prompt) for prompt in prompts], device=device)
        longest = int(length_N.max())
        passed = pass_inputs(asking.model, inputs.input_ids, inputs.attention_mask)
        logits_NMV = asking.model(**passed, logits_to_keep=longest + 1).logits.float()
        yield chosen, inputs.input_ids[:, -longest:], length_N, logits_NMV


def _judged(logits_NMV: Tensor, ids_NM: Tensor, length_N: Tensor, closing: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Whether greedy decoding gives each answer and closes it, and the answer's log probability in nats; (N,) each."""
    longest = ids_NM.shape[1]
    before_NM = torch.arange(longest, device=ids_NM.device) < (longest - length_N)[:, None]  # belongs to the prompt
    top_NM = logits_NMV.argmax(-1)
    goes_on_N = ((top_NM[:, :-1] == ids_NM) | before_NM).all(1)
    logp_NM = logits_NMV[:, :-1].log_softmax(-1).gather(2, ids_NM[..., None])[..., 0]
    fits_N = goes_on_N & torch.isin(top_NM[:, -1], closing)
    return fits_N.cpu().numpy(), logp_NM.masked_fill(before_NM, 0.0).sum(1).double().cpu().numpy()
