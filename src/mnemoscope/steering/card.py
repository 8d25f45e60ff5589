"""Cards: figures that are stored with every vector and detector."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Card:
    """Figures of the test split and their origin; None or empty where not measured.

    Attributes:
        fitted_on: study, task and model.
        shift: share of test prompts that change to the target behaviour: ``estimate``, ``low``, ``high`` (95 %), ``n``.
        control: the strongest control of the same norm: ``name`` and ``estimate``, mean over its draws.
        cost: change in accuracy of each list that steering should not affect.
        divergence: mean KL in nats a token on neutral text, by multiple of the vector.
        auroc: of a detector: ``estimate``, ``low``, ``high``, ``n``, and ``input_only`` beside it.
        pairs, groups: of the fit split.
        versions: of the libraries that made it.
    """

    fitted_on: str
    shift: dict[str, float] | None = None
    control: dict[str, Any] | None = None
    cost: dict[str, float] = field(default_factory=dict)
    divergence: dict[str, float] = field(default_factory=dict)
    auroc: dict[str, float] | None = None
    pairs: int = 0
    groups: int = 0
    versions: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fitted on {self.fitted_on}: {self.pairs} pairs of {self.groups} groups"]
        if self.shift:
            lines.append(f"test shift {_interval(self.shift)}")
        if self.control:
            lines.append(f"strongest control of the same norm: {self.control['name']} {self.control['estimate']:.3f}")
        if self.auroc:
            beside = self.auroc.get("input_only")
            lines.append(f"test AUROC {_interval(self.auroc)}" + (f"; input only {beside:.3f}" if beside else ""))
        if self.cost:
            changes = ", ".join(f"{name} {change:+.3f}" for name, change in self.cost.items())
            lines.append(f"cost, change in accuracy: {changes}")
        if self.divergence:
            doses = ", ".join(f"{kl:.4f} at {dose}" for dose, kl in self.divergence.items())
            lines.append(f"divergence on neutral text, nats a token: {doses} times the vector")
        if self.versions:
            lines.append("made with " + ", ".join(f"{name} {version}" for name, version in self.versions.items()))
        return "\n".join(lines)


def _interval(rate: dict[str, float]) -> str:
    low, high = (rate.get(end, math.nan) for end in ("low", "high"))
    return f"{rate['estimate']:.3f} [{low:.3f}, {high:.3f}], n = {rate['n']:.0f}"
