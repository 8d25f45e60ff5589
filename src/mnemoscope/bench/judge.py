"""Judge an intervention on the frozen lists: tables of labels, texts and divergence, one row for each prompt.

Shapes: N prompts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd

from mnemoscope.behaviour import Scores
from mnemoscope.bench.answers import NOTHING, Neutral, is_exact, is_said, scores, texts_of
from mnemoscope.bench.gate import Gates
from mnemoscope.bench.lists import LISTS, DrawnBench
from mnemoscope.bench.prompts import Prompts
from mnemoscope.bench.varied import varied_lists
from mnemoscope.interventions import Intervention, SteeringVector, Toward
from mnemoscope.interventions.controls import has_equal_norm, of_equal_norm, shuffles
from mnemoscope.interventions.methods import nulls, refitted
from mnemoscope.interventions.sources import PERMUTED
from mnemoscope.models import context_length

TABLES = ("answers", "texts", "neutral")
UNSTEERED = "unsteered"


@dataclass(frozen=True)
class Frame:
    """What all interventions are judged on.

    Attributes:
        lists: the frozen lists, then those of changed prompts.
    """

    bench: DrawnBench
    lists: Mapping[str, Prompts]
    neutral: Neutral

    @classmethod
    def of(cls, bench: DrawnBench) -> Frame:
        """Draw it."""
        config, context = bench.config, context_length(bench.asking.model)
        length = min(64, context - 1 - config.following - 32)  # room for a sentence before it
        rng = np.random.default_rng([config.seed, 34])
        neutral = Neutral(bench.asking, config.cuts, 16, length, config.following, rng)
        return cls(bench, {**bench.test, **varied_lists(bench)}, neutral)

    @cached_property
    def gates(self) -> Gates:
        """What decides where an intervention acts."""
        return Gates.fitted(self.bench)

    @cached_property
    def _tune_acts(self) -> Mapping[str, Mapping[str, np.ndarray]]:
        return {name: self.gates.acts(prompts) for name, prompts in self.bench.tune.items() if len(prompts)}

    def table(self) -> pd.DataFrame:
        """Every prompt of every list with its unsteered label; of the frozen ones also where a gate acts."""
        parts = []
        for name, prompts in self.lists.items():
            rows = pd.DataFrame([example.to_row() for example in prompts.examples])
            found = prompts.unsteered
            columns: dict[str, Any] = {"unsteered": found.behaviour_N, "margin": found.margin_N, "tie": found.tie_N}
            columns |= self.gates.acts(prompts) if name in LISTS and len(prompts) else {}
            parts.append(rows.assign(list=name, example=np.arange(len(rows)), **columns))
        return pd.concat([part for part in parts if len(part)], ignore_index=True)

    def by_gate(self, one: Intervention) -> dict[str, float]:
        """By gate, "" for none, the share of right answers on tune, of its lists in equal parts."""
        found: dict[str, list[float]] = {gate: [] for gate in ("", *self.gates.names)}
        for name, acts in self._tune_acts.items():
            prompts, side = self.bench.tune[name], one.toward if name == "conflict" else "correct"
            with_N, own_N = (labels.behaviour_N == side for labels in (scores(one, prompts), prompts.unsteered))
            for gate, shares in found.items():
                acts_N = acts[f"{gate}_{one.toward}"] if gate else np.ones(len(prompts))
                shares.append(float(np.where(acts_N == 1, with_N, own_N).mean()))
        return {gate: float(np.mean(shares)) for gate, shares in found.items()}

    def judged(self, one: Intervention | None, toward: str, bench: DrawnBench | None = None) -> dict[str, pd.DataFrame]:
        """Tables by name of an intervention, or of none, towards a behaviour; ``bench``: what it was fitted on.

        Of further fits the frozen lists alone, without changed prompts and neutral text.
        """
        bench = bench or self.bench
        first = bench.seed == self.bench.seed
        parts = [
            self._answers(name, scores(one, prompts) if one else prompts.unsteered, toward)
            for name, prompts in self.lists.items()
            if first or name in LISTS
        ]
        for role, number, control in self._controls(bench, one) if one else ():
            parts.append(self._answers("conflict", scores(control, self.lists["conflict"]), toward, number, role))
        plain = one or NOTHING
        neutral = self.neutral.measured(plain) if first else self.neutral.unmeasured()
        return {
            "answers": pd.concat(parts, ignore_index=True),
            "texts": self._texts(plain, toward),
            "neutral": neutral[["kl_first", "kl_next"]].assign(toward=toward),
        }

    def _controls(self, bench: DrawnBench, one: Intervention) -> Iterator[tuple[str, int, Intervention]]:
        """Draws of equal norm, and the same method taught answers of other items, where there are such."""
        config = bench.config
        for number in range(config.controls if has_equal_norm(one) else 0):
            assert isinstance(one, SteeringVector)
            yield "gaussian", number, of_equal_norm(one, bench.sources(one.site), config.seed, number)
        first = bench.seed == config.seed  # one fit is enough for what costs as much as a fit
        if first and config.refits and PERMUTED in nulls(one.method) and bench.lists.can_permute():
            (several,) = shuffles(config.refits, bench.seed, permuted=True)
            for number, control in enumerate(refitted(bench, one, several[: config.refits])):
                yield PERMUTED, number, control

    def _answers(self, name: str, found: Scores, toward: str, draw: int = -1, role: str = "") -> pd.DataFrame:
        """``draw``: of a control; -1: the intervention itself. ``role``: what the control is."""
        columns: dict[str, Any] = {"toward": toward, "list": name, "role": role, "draw": draw}
        columns |= {"example": np.arange(len(found.behaviour_N)), "behaviour": found.behaviour_N, "tie": found.tie_N}
        return pd.DataFrame(columns)

    def _texts(self, one: Intervention, toward: str) -> pd.DataFrame:
        config, conflict = self.bench.config, self.lists["conflict"]
        first = conflict.of(np.arange(min(config.written, len(conflict))))
        made = texts_of(one, first, config.tokens, config.cuts)
        columns: dict[str, Any] = {"toward": toward, "example": np.arange(len(first)), "text": made.texts}
        for way in Toward:
            two = [(str(getattr(e, way)), str(getattr(e, way.opposite))) for e in first.examples]
            told = list(zip(made.texts, two, strict=True))
            columns[f"exact_{way}"] = [is_exact(text, answer) for text, (answer, _) in told]
            columns[f"said_{way}"] = [is_said(text, *both) for text, both in told]
        columns |= {"nats": made.nats_N, "repeated": made.repeated_N, "seconds": made.seconds}
        return pd.DataFrame(columns)
