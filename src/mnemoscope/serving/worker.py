"""Reads and shifts states inside a vLLM worker. Imports no vLLM: the model and its runner are given.

Shapes: T rows (tokens) of a pass, N requests in it, R shifted rows, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from mnemoscope.interventions import Toward
from mnemoscope.interventions.detect import Reading
from mnemoscope.models import site_module
from mnemoscope.serving.asking import ADMITTED, Admitted
from mnemoscope.serving.rows import Rows, rows_of

if TYPE_CHECKING:
    from mnemoscope.serving.offered import Offered

Place = tuple[nn.Module, bool]  # a module, and whether states are its input
Added = Callable[[Tensor], Tensor]  # states (R, D) -> what is added to them, float32


@dataclass(eq=False, slots=True)
class Followed:
    """A request that asks for something, from its first pass to its last.

    Attributes:
        acts: whether its shift acts; None until its gate has decided.
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
        requests: all of the pass; None for those that ask for nothing.
        shifted: by direction, rows (R,), the requests they belong to (R,), and factors float32 (R, 1).
        left: modules that did not run yet.
    """

    requests: list[Followed | None]
    rows: Rows
    shifted: dict[Toward, tuple[Tensor, np.ndarray, Tensor]]
    left: int


class Steerer:
    """Hooks on a model, and the requests that they concern; without such a request the hooks return at once."""

    def __init__(self, offered: Offered, model: nn.Module, device: torch.device) -> None:
        """Raises InputError where a vector or detector does not fit the model."""
        self.offered, self.device = offered, device
        self.followed: dict[str, Followed] = {}
        self.now: Pass | None = None
        reads: dict[Place, list[str]] = {}
        shifts: dict[Place, list[tuple[Toward, Added]]] = {}
        for name, detector in offered.detectors.items():
            detector.check_shape(model)
            reads.setdefault(site_module(model, detector.layer, detector.site), []).append(name)
        for toward, vector in offered.vectors.items():
            vector.check_shape(model)
            for layer in vector.layers:
                place = site_module(model, layer, vector.site)
                shifts.setdefault(place, []).extend((toward, one.to(device).added) for one in vector.edits[layer])
        self.places = len({*reads, *shifts})
        for place in {*reads, *shifts}:
            module, is_input = place
            act = partial(self._act, reads.get(place, []), shifts.get(place, []))
            if is_input:
                module.register_forward_pre_hook(lambda _, inputs, act=act: act(inputs))
            else:
                module.register_forward_hook(lambda _, inputs, output, act=act: act(output))

    def forget(self, names: Iterable[str]) -> None:
        """Drop requests that have ended."""
        for name in names:
            self.followed.pop(name, None)

    def begin(
        self,
        names: list[str],
        extra_args: Callable[[str], Mapping[str, Any] | None],
        begins: list[int],
        counts: list[int],
        computed: list[int],
    ) -> None:
        """Prepare a pass; see ``rows_of`` for its rows.

        Raises RuntimeError where a request was admitted for another vector than this worker has.
        """
        requests = [self._follow(name, extra_args) for name in names]
        if not any(requests):
            return
        # A gate that has decided against a shift leaves all rows alone; one that has not yet keeps them.
        starts = [one.admitted.start if one and one.acts is not False else None for one in requests]
        rows = rows_of(begins, counts, computed, starts, [one.admitted.decision if one else -1 for one in requests])
        shifted: dict[Toward, tuple[Tensor, np.ndarray, Tensor]] = {}
        factors_N = np.array([one.admitted.asked.alpha if one else 0.0 for one in requests], np.float32)
        ways = [one.admitted.asked.steer if one else None for one in requests]
        for toward in {way for way in ways if way}:
            mine_R = np.array([way == toward for way in ways])[rows.owner_R]
            if mine_R.any():
                owner_R, rows_R = rows.owner_R[mine_R], torch.from_numpy(rows.shifted_R[mine_R]).to(self.device)
                shifted[toward] = rows_R, owner_R, torch.from_numpy(factors_N[owner_R, None]).to(self.device)
        self.now = Pass(requests, rows, shifted, self.places)

    def end(self) -> None:
        """Close a pass; RuntimeError where a hook did not run, so that no request is answered unsteered."""
        done, self.now = self.now, None
        if done is None:
            return
        if done.left:
            raise RuntimeError(
                f"mnemoscope: {done.left} of {self.places} read or steered parts did not run in this pass"
            )
        for one, row in zip(done.requests, done.rows.decision_N, strict=True):
            if one and row >= 0 and one.report is None:
                one.report = _report(one, self.offered)

    def reports(self) -> dict[str, dict[str, Any]]:
        """By request, all that is told of those that are being followed."""
        return {name: one.report for name, one in self.followed.items() if one.report}

    def _follow(self, name: str, extra_args: Callable[[str], Mapping[str, Any] | None]) -> Followed | None:
        found = self.followed.get(name)
        facts = None if found else (extra_args(name) or {}).get(ADMITTED)
        if facts:
            admitted = Admitted.of(facts)
            asked = admitted.asked
            if asked.steer and self.offered.digests.get(asked.steer) != admitted.vector:
                raise RuntimeError(f"mnemoscope: this worker has another vector to {asked.steer} than the server")
            for detector, digest in admitted.detectors.items():
                if self.offered.digests.get(detector) != digest:
                    raise RuntimeError(f"mnemoscope: this worker has another {detector} than the server")
            found = self.followed[name] = Followed(
                admitted, None if asked.gate is not None else admitted.start is not None
            )
        return found

    def _act(self, reads: list[str], shifts: list[tuple[Toward, Added]], value: Any) -> Any:
        """Read, then shift, the states in an output (or in the inputs) of a module."""
        now = self.now
        if now is None:
            return None
        now.left -= 1
        if (value[0] if isinstance(value, tuple) else value).ndim != 2:
            raise RuntimeError("mnemoscope: states of this model are not one row a token")
        for name in reads:
            self._read(now, name, value)
        added = [(now.shifted[toward], part) for toward, part in shifts if toward in now.shifted]
        if not added:
            return None
        first = value[0] if isinstance(value, tuple) else value
        changed = first
        for (rows_R, _, factors_R1), part in added:
            states_RD = _sum(value, rows_R)
            changed = changed.index_add(0, rows_R, (factors_R1 * part(states_RD)).to(first.dtype))
        return (changed, *value[1:]) if isinstance(value, tuple) else changed

    def _read(self, now: Pass, name: str, value: Any) -> None:
        """Read the requests whose decision position this pass holds; gates decide."""
        wanted = [
            n
            for n, one in enumerate(now.requests)
            if one and now.rows.decision_N[n] >= 0 and name in (one.admitted.gate_by, one.admitted.read_by)
        ]
        if not wanted:
            return
        rows = torch.from_numpy(now.rows.decision_N[wanted]).to(self.device)
        reading = self.offered.detectors[name].read_verdict(_sum(value, rows).float().cpu().numpy())
        closed = set()
        for place, n in enumerate(wanted):
            one = now.requests[n]
            assert one is not None
            asked = one.admitted.asked
            one.readings[name] = _one_of(reading, place)
            if one.acts is None and one.admitted.gate_by == name and asked.steer and asked.gate is not None:
                one.acts = bool(one.readings[name].acts(asked.steer, asked.gate)[0])
                closed |= set() if one.acts else {n}
        for toward, (rows_R, owner_R, factors_R1) in now.shifted.items() if closed else ():
            open_R = torch.from_numpy(~np.isin(owner_R, list(closed))).to(self.device)
            now.shifted[toward] = rows_R[open_R], owner_R[open_R.cpu().numpy()], factors_R1[open_R]


def _sum(value: Any, rows_R: Tensor) -> Tensor:
    """States (R, D) of some rows: the first entry, and the residual where a block gives both."""
    if not isinstance(value, tuple):
        return value[rows_R]
    states, *rest = value
    residual = rest[0] if rest and isinstance(rest[0], Tensor) and rest[0].shape == states.shape else None
    return states[rows_R] if residual is None else states[rows_R] + residual[rows_R]


def _one_of(reading: Reading, n: int) -> Reading:
    parts = (reading.p_memorized_by_layer, reading.p_conflict, reading.distance)
    return Reading(reading.layer, *(part[n : n + 1] for part in parts))


def _report(one: Followed, offered: Offered) -> dict[str, Any]:
    """What is told of a request."""
    asked = one.admitted.asked
    facts: dict[str, Any] = {
        "steer": asked.steer,
        "alpha": asked.alpha if asked.steer else 0.0,
        "acted": bool(one.acts),
    }
    name = one.admitted.read_by or one.admitted.gate_by
    if name:
        reading, detector = one.readings[name], offered.detectors[name]
        numbers = {n: float(getattr(reading, n)[0]) for n in ("p_memorized", "p_conflict", "distance")}
        facts |= {n: None if math.isnan(value) else value for n, value in numbers.items()}
        facts |= {"unlike": bool(reading.unlike[0]), "site": detector.site, "layer": detector.layer}
    return facts
