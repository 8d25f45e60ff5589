"""What a reader tells of tokens while they are written, in passes that hold those of many requests. Imports no vLLM.

The state at a token is there in the pass behind it, so a token's numbers are known when the next one is. A token with
which an answer is cut is read by no pass, so it has none.

Shapes: N requests of a pass, S of these whose answer is read, L layers of the reader, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mnemoscope.auditing.origins.labels import ORIGINS
from mnemoscope.auditing.origins.reader import Origins, Reader, features, sure_of

Told = dict[str, float | bool]  # probabilities of ``ORIGINS``, and ``unlike``, see ``Origins``


@dataclass(eq=False, slots=True)
class Written:
    """An answer that is read while it is written.

    Attributes:
        decision: position of the last prompt token; ``document``: whether the prompt has one.
        seen: tokens whose states were read, from that one on; ``state_LD``: those of the last of them.
        logits_V, total: of what may follow it, whose log probabilities are their difference; ``entropy``.
        fresh: what is known of tokens and was not told yet.
    """

    decision: int
    document: bool
    seen: int = 0
    state_LD: np.ndarray = field(default_factory=lambda: np.empty(0))
    logits_V: Tensor = field(default_factory=lambda: torch.empty(0))
    total: float = 0.0
    entropy: float = 0.0
    fresh: list[Told] = field(default_factory=list)


class Writing:
    """Reads the answers of a pass: ``begin``, ``keep`` at each of the reader's layers, ``end``, then ``see``."""

    def __init__(self, reader: Reader, device: torch.device) -> None:
        self.reader, self.device = reader, device
        self.read: list[tuple[Written, int]] = []  # with its place in the pass
        self.rows_S = self.ids_S = torch.empty(0, dtype=torch.long)
        self.states: dict[int, np.ndarray] = {}

    def begin(
        self, answers: Sequence[Written | None], counts: Sequence[int], computed: Sequence[int], ids_T: Tensor
    ) -> None:
        """Find what a pass adds to answers, None for requests without one; see ``worker.rows_of``. ``ids_T``: tokens.

        RuntimeError where a pass skips a token.
        """
        ends_N, self.read, rows = np.cumsum(counts), [], []
        for n, one in enumerate(answers):
            if one is None:
                continue
            ahead = computed[n] + counts[n] - 1 - one.decision - one.seen
            if ahead > 0:
                raise RuntimeError(f"mnemoscope: a pass skips {ahead} tokens of an answer that is read")
            if ahead == 0:  # else a part of the prompt, or what was read before the request was put off
                self.read.append((one, n))
                rows.append(ends_N[n] - 1)
        self.rows_S = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.ids_S = ids_T[self.rows_S].long() if rows else self.rows_S

    def keep(self, layer: int, whole: Callable[[Tensor], Tensor]) -> None:
        """Read the states of a layer, which ``whole`` gives for rows."""
        if self.read:
            self.states[layer] = whole(self.rows_S).float().cpu().numpy()

    def end(self) -> None:
        """Tell of each token of an answer that this pass has read; of a prompt's last token nothing is told."""
        if not self.read:
            return
        states_SLD = np.stack([self.states[layer] for layer in self.reader.layers], axis=1)
        told = [(n, one) for n, (one, _) in enumerate(self.read) if one.seen]
        if told:
            places = [n for n, _ in told]
            said_S = torch.stack([one.logits_V[self.ids_S[n]] for n, one in told]).cpu().numpy()
            before_SLD = np.stack([one.state_LD for _, one in told])
            sure_S2 = np.array([(said - one.total, one.entropy) for said, (_, one) in zip(said_S, told, strict=True)])
            x_SF = features(np.stack([before_SLD, states_SLD[places]], axis=2), sure_S2)
            p_S3 = self.reader.p_of(x_SF, np.array([one.document for _, one in told]))
            unlike_S = self.reader.unlike(before_SLD[:, 0]).tolist()
            for (_, one), p_3, unlike in zip(told, p_S3.tolist(), unlike_S, strict=True):
                one.fresh.append({**dict(zip(ORIGINS, p_3, strict=True)), "unlike": unlike})
        for (one, _), state_LD in zip(self.read, states_SLD, strict=True):
            one.state_LD, one.seen = state_LD, one.seen + 1

    def see(self, logits_NV: Tensor) -> None:
        """Keep how sure the model is of what follows; ``logits_NV``: of a pass, before anything is sampled."""
        for one, n in self.read:  # copies, which sampling does not change, each in the place of the one before
            row_V, old_V = logits_NV[n], one.logits_V
            one.logits_V = old_V.copy_(row_V) if len(old_V) else row_V.to(torch.float32, copy=True)
            one.total, one.entropy = sure_of(one.logits_V)
        self.read = []


def shares_of(tokens: Sequence[Told]) -> dict[str, dict[str, float]]:
    """``shares`` of an answer by what was told of its tokens, see ``Origins``; empty without any."""
    if not tokens:
        return {}
    p_T3 = np.array([[one[name] for name in ORIGINS] for one in tokens])
    return {"shares": Origins("", (), p_T3, np.array([one["unlike"] for one in tokens], bool)).shares}
