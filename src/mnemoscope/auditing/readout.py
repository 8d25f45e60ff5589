"""P(recited) before the answer: a probe on how an original's states differ from those of its variants.

It is fitted where it is known which items were planted, and read elsewhere: on other items, or of another checkpoint.

Shapes: N items, L layers, D neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mnemoscope.auditing.items import Item, Variant
from mnemoscope.auditing.replies import Form, decision_states
from mnemoscope.behaviour import Asking
from mnemoscope.runs.errors import InputError

FOLDS, STRENGTHS = 5, (1e-3, 1e-2, 1e-1)  # of cross-validation, and of the ridge that is chosen by it


@dataclass(frozen=True)
class Readout:
    """A probe of one layer on states in spreads: P(recited) = sigmoid(``weight_D`` . x + ``bias``)."""

    layer: int
    weight_D: np.ndarray
    bias: float

    @classmethod
    def fitted(cls, asking: Asking, form: Form, items: Sequence[Item], planted_N: Sequence[bool]) -> Readout:
        """On items of which some were planted, layer and ridge by cross-validation; InputError for one kind alone."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import StratifiedKFold, cross_val_predict

        labels_N = np.asarray(planted_N, dtype=int)
        least = int(np.bincount(labels_N, minlength=2).min())
        if least < 2:
            raise InputError(f"readout: {least} items of one kind; at least 2 that were planted and 2 that were not")
        states_NLD = differences(asking, form, items)
        folds = StratifiedKFold(min(FOLDS, least), shuffle=True, random_state=0)
        found = list[tuple[float, int, int, float]]()
        for layer in range(states_NLD.shape[1]):
            for strength in STRENGTHS:
                probe = LogisticRegression(C=strength, max_iter=1000)
                scores_N = cross_val_predict(
                    probe, states_NLD[:, layer], labels_N, cv=folds, method="decision_function"
                )
                found.append((roc_auc_score(labels_N, scores_N), -len(found), layer, strength))
        _, _, layer, strength = max(found)
        probe = LogisticRegression(C=strength, max_iter=1000).fit(states_NLD[:, layer], labels_N)
        return cls(layer, probe.coef_[0], float(probe.intercept_[0]))

    def p_recited(self, asking: Asking, form: Form, items: Sequence[Item]) -> np.ndarray:
        """P(recited) of items, float64 (N,)."""
        logits_N = differences(asking, form, items)[:, self.layer] @ self.weight_D + self.bias
        return 1 / (1 + np.exp(-logits_N))


def differences(asking: Asking, form: Form, items: Sequence[Item]) -> np.ndarray:
    """States of originals at the decision position minus their variants' mean, in the variants' spreads, (N, L, D).

    The spread is that of each neuron among the variants of an item, pooled over all items.
    """
    every = [(item.item, one) for item in items for one in (Variant(item.prompt, item.answer), *item.variants)]
    states_NLD = decision_states(asking, form, every)
    found, within, start = [], np.zeros(states_NLD.shape[1:]), 0
    for item in items:
        original_LD, variants_NLD = states_NLD[start], states_NLD[start + 1 : start + 1 + len(item.variants)]
        found.append(original_LD - variants_NLD.mean(0))
        within += variants_NLD.var(0) / len(items)
        start += 1 + len(item.variants)
    return np.stack(found) / np.sqrt(np.maximum(within, 1e-12))
