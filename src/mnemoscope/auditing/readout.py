"""P(recited) before the answer: how sure a model's states are of an original's prompt, beside its variants' prompts.

Read are the last states at every token of the prompt, through the model's own head, so that a read-out means the same
in another checkpoint. Probes of blocks' states, at the decision position or over the prompt, told nothing.

Shapes: N items, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mnemoscope.auditing.items import Item
from mnemoscope.auditing.replies import Form, likelihoods, places_of
from mnemoscope.behaviour import Asking
from mnemoscope.runs.errors import InputError

FOLDS, STRENGTHS = 5, (1e-2, 1e-1, 1.0)  # of cross-validation, and of the ridge that is chosen by it
FEATURES = ("nats", "standard", "entropy")  # of the prompt alone


@dataclass(frozen=True)
class Readout:
    """P(recited) = sigmoid(``weight_F`` . x + ``bias``), x as of ``differences``."""

    weight_F: np.ndarray
    bias: float

    @classmethod
    def fitted(cls, asking: Asking, form: Form, items: Sequence[Item], planted_N: Sequence[bool]) -> Readout:
        """On items of which some were planted, its ridge by cross-validation; InputError for one kind alone."""
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import roc_auc_score
        from sklearn.model_selection import StratifiedKFold, cross_val_predict

        labels_N = np.asarray(planted_N, dtype=int)
        least = int(np.bincount(labels_N, minlength=2).min())
        if least < 2:
            raise InputError(f"readout: {least} items of one kind; at least 2 that were planted and 2 that were not")
        x_NF = differences(asking, form, items)
        folds = StratifiedKFold(min(FOLDS, least), shuffle=True, random_state=0)
        found = list[tuple[float, float]]()
        for strength in STRENGTHS:
            probe = LogisticRegression(C=strength, max_iter=1000)
            scores_N = cross_val_predict(probe, x_NF, labels_N, cv=folds, method="decision_function")
            found.append((roc_auc_score(labels_N, scores_N), -strength))
        probe = LogisticRegression(C=-max(found)[1], max_iter=1000).fit(x_NF, labels_N)
        return cls(probe.coef_[0], float(probe.intercept_[0]))

    def p_recited(self, asking: Asking, form: Form, items: Sequence[Item]) -> np.ndarray:
        """P(recited) of items, float64 (N,)."""
        return 1 / (1 + np.exp(-(differences(asking, form, items) @ self.weight_F + self.bias)))


def differences(asking: Asking, form: Form, items: Sequence[Item]) -> np.ndarray:
    """Features of originals' prompts minus their variants' mean, in spreads of variants, float64 (N, F).

    The spread is that of each feature among the variants of an item, pooled over all items.
    """
    every = [form.asked(one) for item in items for one in places_of(item)]
    read_MF = np.array([[row[name] for name in FEATURES] for row in likelihoods(asking, every)])
    found, within_F, start = list[np.ndarray](), np.zeros(len(FEATURES)), 0
    for item in items:
        variants_MF = read_MF[start + 1 : start + 1 + len(item.variants)]
        found.append(read_MF[start] - variants_MF.mean(0))
        within_F += variants_MF.var(0) / len(items)
        start += 1 + len(item.variants)
    return np.stack(found) / np.sqrt(np.maximum(within_F, 1e-12))
