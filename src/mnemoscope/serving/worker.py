"""Reads and shifts states inside a vLLM worker. Imports no vLLM: the model is given, and what each pass holds.

A pass holds tokens of many requests, one request behind the other.

Shapes: N requests in a pass, T rows (tokens) of it, R shifted rows, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mnemoscope.interventions import Toward
from mnemoscope.interventions.detect import Reading
from mnemoscope.models import site_module, with_states
from mnemoscope.serving.admission import ADMITTED, Admitted, Offered

Place = tuple[nn.Module, bool]  # a module, and whether states are its input
Added = Callable[[Tensor], Tensor]  # states (R, D) -> what is added to them, float32
NEVER = 2**62  # a position


def rows_of(
    counts: Sequence[int], computed: Sequence[int], starts: Sequence[int], decisions: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Find the rows of N requests.

    Args:
        counts: their tokens in this pass; ``computed``: those before it, computed or taken from a cache.
        starts: the first positions that are shifted; ``decisions``: the positions of the last prompt tokens.

    Returns rows that are shifted (R,), the requests that they belong to (R,), and the row of each decision position
    (N,), -1 where this pass does not hold it; int64.
    """
    owner_T = np.repeat(np.arange(len(counts)), counts)
    position_T = np.arange(len(owner_T)) + (np.array(computed) - np.cumsum(counts) + counts)[owner_T]
    rows_R = np.flatnonzero(position_T >= np.array(starts)[owner_T])
    decided = np.flatnonzero(position_T == np.array(decisions)[owner_T])
    decision_N = np.full(len(counts), -1)
    decision_N[owner_T[decided]] = decided
    return rows_R, owner_T[rows_R], decision_N


@dataclass(eq=False, slots=True)
class Followed:
    """A request that asks for something, from its first pass to its last.

    Attributes:
        acts: whether its shift acts; None until its gate has decided.
        readings: by detector, of its decision position.
        report: what is told about it, once its decision position was read.
    """

    admitted: Admitted
    acts: bool | None
    readings: dict[str, Reading] = field(default_factory=dict)
    report: dict[str, Any] | None = None


@dataclass(slots=True)
class Pass:
    """What the hooks of one pass have to do.

    Attributes:
        requests: all of the pass; None for those that ask for nothing. ``decision_N``: see ``rows_of``.
        shifted: by direction, rows (R,), the requests they belong to (R,), and factors float32 (R, 1).
        left: modules that did not run yet.
    """

    requests: list[Followed | None]
    decision_N: np.ndarray
    shifted: dict[str, list[Tensor]]
    left: int


class Steerer:
    """Hooks on a model, and the requests that they concern; without such a request the hooks return at once."""

    def __init__(
        self, offered: Offered, model: nn.Module, device: torch.device, held: Callable[[], tuple[Any, ...]]
    ) -> None:
        """``held``: arguments of ``begin`` for the pass that begins.

        Raises InputError where a vector or detector does not fit the model.
        """
        self.offered, self.device = offered, device
        self.followed: dict[str, Followed] = {}
        self.now: Pass | None = None
        places: dict[Place, tuple[list[str], list[tuple[Toward, Added]]]] = {}
        for artefact in offered.artefacts.values():
            artefact.check_shape(model)
        for name, detector in offered.detectors.items():
            places.setdefault(site_module(model, detector.layer, detector.site), ([], []))[0].append(name)
        for toward, vector in offered.vectors.items():
            for layer, edits in vector.edits.items():
                place = site_module(model, layer, vector.site)
                places.setdefault(place, ([], []))[1].extend((toward, one.to(device).added) for one in edits)
        self.places = len(places)
        for (module, is_input), (reads, shifts) in places.items():
            act = partial(self._act, reads, shifts)
            if is_input:
                module.register_forward_pre_hook(lambda _, inputs, act=act: act(inputs))
            else:
                module.register_forward_hook(lambda _, inputs, output, act=act: act(output))
        model.register_forward_pre_hook(lambda *_: self.begin(*held()))
        model.register_forward_hook(lambda *_: self.end())

    def begin(
        self, names: Sequence[str], requests: Mapping[str, Any], counts: Sequence[int], computed: Sequence[int]
    ) -> None:
        """Prepare a pass of requests; ``requests``: all of vLLM's runner that have not ended. See ``rows_of``."""
        self.now = None
        self.followed = {name: one for name, one in self.followed.items() if name in requests}
        asking = [self._follow(name, requests[name]) for name in names]
        if not any(asking):
            return
        # A gate that has decided against a shift leaves all rows alone; one that has not yet keeps them.
        starts = [
            NEVER if not one or one.acts is False or one.admitted.start is None else one.admitted.start
            for one in asking
        ]
        decisions = [one.admitted.decision if one else -1 for one in asking]
        rows_R, owner_R, decision_N = rows_of(counts, computed, starts, decisions)
        ways_R = np.array([one.admitted.steer or "" if one else "" for one in asking])[owner_R]
        factors_R1 = np.array([one.admitted.alpha if one else 0.0 for one in asking], np.float32)[owner_R, None]
        shifted = {}
        for toward in {*ways_R.tolist()}:
            parts = (part[ways_R == toward] for part in (rows_R, owner_R, factors_R1))
            shifted[toward] = [torch.from_numpy(part).to(self.device) for part in parts]
        self.now = Pass(asking, decision_N, shifted, self.places)

    def end(self) -> None:
        """Close a pass; RuntimeError where a hook did not run, so that no request is answered unsteered."""
        done, self.now = self.now, None
        if done and done.left:
            parts = f"{done.left} of {self.places} read or steered parts"
            raise RuntimeError(f"mnemoscope: {parts} did not run in this pass")
        for one, row in zip(done.requests, done.decision_N, strict=True) if done else ():
            if one and row >= 0 and one.report is None:
                one.report = report_of(one, self.offered)

    def _follow(self, name: str, request: Any) -> Followed | None:
        facts = (getattr(request.sampling_params, "extra_args", None) or {}).get(ADMITTED)
        if facts and name not in self.followed:
            admitted = Admitted(**facts)
            self.followed[name] = Followed(admitted, None if admitted.gate is not None else admitted.start is not None)
        return self.followed.get(name)

    def _act(self, reads: list[str], shifts: list[tuple[Toward, Added]], value: Any) -> Any:
        """Read, then shift, the states in an output (or in the inputs) of a module."""
        now = self.now
        if now is None:
            return None
        now.left -= 1
        first = changed = value[0] if isinstance(value, tuple) else value
        if first.ndim != 2:
            raise RuntimeError("mnemoscope: states of this model are not one row a token")
        for name in reads:
            self._read(now, name, value)
        for toward, added in shifts:
            if toward in now.shifted:
                rows_R, _, factors_R1 = now.shifted[toward]
                changed = changed.index_add(0, rows_R, (factors_R1 * added(_sum(value, rows_R))).to(first.dtype))
        return None if changed is first else with_states(value, changed)

    def _read(self, now: Pass, name: str, value: Any) -> None:
        """Read the requests whose decision position this pass holds; gates decide."""
        held = [(one, n) for n, one in enumerate(now.requests) if one and now.decision_N[n] >= 0]
        wanted = [(one, n) for one, n in held if name in (one.admitted.gate_by, one.admitted.read_by)]
        if not wanted:
            return
        rows = torch.from_numpy(now.decision_N[[n for _, n in wanted]]).to(self.device)
        reading = self.offered.detectors[name].read_verdict(_sum(value, rows).float().cpu().numpy())
        parts = (reading.p_memorized_by_layer, reading.p_conflict, reading.distance)
        for place, (one, n) in enumerate(wanted):
            asked = one.admitted
            one.readings[name] = Reading(reading.layer, *(part[place : place + 1] for part in parts))
            if one.acts is None and asked.gate_by == name and asked.steer and asked.gate is not None:
                one.acts = bool(one.readings[name].acts(asked.steer, asked.gate)[0])
                if not one.acts:
                    open_R = now.shifted[asked.steer][1] != n
                    now.shifted[asked.steer] = [part[open_R] for part in now.shifted[asked.steer]]


def _sum(value: Any, rows_R: Tensor) -> Tensor:
    """States (R, D) of some rows: the first entry, and the residual where a block gives both."""
    if not isinstance(value, tuple):
        return value[rows_R]
    states, *rest = value
    residual = rest[0] if rest and isinstance(rest[0], Tensor) and rest[0].shape == states.shape else None
    return states[rows_R] if residual is None else states[rows_R] + residual[rows_R]


def report_of(one: Followed, offered: Offered) -> dict[str, Any]:
    """What is told of a request."""
    asked = one.admitted
    facts: dict[str, Any] = {"steer": asked.steer, "alpha": asked.alpha if asked.steer else 0.0}
    facts |= {"acted": bool(one.acts)}
    if name := asked.read_by or asked.gate_by:
        reading, detector = one.readings[name], offered.detectors[name]
        numbers = {n: float(getattr(reading, n)[0]) for n in ("p_memorized", "p_conflict", "distance")}
        facts |= {n: None if math.isnan(value) else value for n, value in numbers.items()}
        facts |= {"unlike": bool(reading.unlike[0]), "site": detector.site, "layer": detector.layer}
    return facts
