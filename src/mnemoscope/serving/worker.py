"""Reads and shifts states inside a vLLM worker. Imports no vLLM: the model is given, and what each pass holds.

A pass holds tokens of many requests, one request behind the other. At each place that is read or shifted stands one
operator, in the model's own graph where that is compiled; what it does is looked up when it runs, so the graph is the
same for all requests.

Shapes: N requests in a pass, T rows (tokens) of it, R shifted rows, D neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor, nn

from mnemoscope.interventions import Toward
from mnemoscope.interventions.detect import Reading
from mnemoscope.models import site_module
from mnemoscope.serving.admission import ADMITTED, TOKENS, Admitted, Offered
from mnemoscope.serving.written import Writing, Written

Place = tuple[nn.Module, bool]  # a module, and whether states are its input
Seen = Callable[["Pass", Callable[[Tensor], Tensor]], None]  # of a pass, and what gives the states (R, D) of rows
Added = Callable[[Tensor], Tensor]  # states (R, D) -> what is added to them, float32
NEVER = 2**62  # a position
OPERATOR = "mnemoscope::act"
_steerers: WeakValueDictionary[int, Steerer] = WeakValueDictionary()  # by number, as graphs hold plain values
_numbers = count()


@torch.library.custom_op(OPERATOR, mutates_args=("states_TD",))
def act(states_TD: Tensor, residual_TD: Tensor | None, steerer: int, place: int) -> None:
    """Read and shift rows of a pass; a compiler sees that states may change here, and nothing else."""
    _steerers[steerer].act(place, states_TD, residual_TD)


def _acting(steerer: int, place: int, value: Any) -> None:
    """The operator, on the output (or the inputs) of a module: states, and the residual where a block gives both."""
    states_TD, *rest = value if isinstance(value, tuple) else (value,)
    both = rest and isinstance(rest[0], Tensor) and rest[0].shape == states_TD.shape
    act(states_TD, rest[0] if both else None, steerer, place)


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
        written: its answer, where that is read.
    """

    admitted: Admitted
    acts: bool | None
    readings: dict[str, Reading] = field(default_factory=dict)
    report: dict[str, Any] | None = None
    written: Written | None = None

    def told(self) -> dict[str, Any] | None:
        """The report, with what became known of tokens since it was told last."""
        if not self.written or not self.report:
            return self.report
        fresh, self.written.fresh = self.written.fresh, []
        return self.report | {TOKENS: fresh}


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
        self.writing = Writing(offered.reader, device) if offered.reader else None
        places: dict[Place, tuple[list[Seen], list[tuple[Toward, Added]]]] = {}
        for artefact in offered.artefacts.values():
            artefact.check_shape(model)
        for name, detector in offered.detectors.items():
            place = site_module(model, detector.layer, detector.site)
            places.setdefault(place, ([], []))[0].append(partial(self._read, name))
        for layer in offered.reader.layers if self.writing and offered.reader else ():
            place = site_module(model, layer, "block")
            places.setdefault(place, ([], []))[0].append(partial(self._keep, layer))
        for toward, vector in offered.vectors.items():
            for layer, edits in vector.edits.items():
                place = site_module(model, layer, vector.site)
                places.setdefault(place, ([], []))[1].extend((toward, one.to(device).added) for one in edits)
        self.places = list(places.values())
        number = next(_numbers)
        _steerers[number] = self
        for n, (module, is_input) in enumerate(places):
            acting = partial(_acting, number, n)
            if is_input:
                module.register_forward_pre_hook(lambda _, inputs, acting=acting: acting(inputs))
            else:
                module.register_forward_hook(lambda _, inputs, output, acting=acting: acting(output))
        model.register_forward_pre_hook(lambda *_: self.begin(*held()))
        model.register_forward_hook(lambda *_: self.end())

    def begin(
        self,
        names: Sequence[str],
        requests: Mapping[str, Any],
        counts: Sequence[int],
        computed: Sequence[int],
        ids_T: Tensor,
    ) -> None:
        """Prepare a pass of requests; ``requests``: all of vLLM's runner that have not ended. See ``rows_of``.

        ``ids_T``: the tokens, in a buffer that may be longer.
        """
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
        if self.writing:
            self.writing.begin([one.written if one else None for one in asking], counts, computed, ids_T)
        self.now = Pass(asking, decision_N, shifted, len(self.places))

    def end(self) -> None:
        """Close a pass; RuntimeError where a hook did not run, so that no request is answered unsteered."""
        done, self.now = self.now, None
        if done and done.left:
            parts = f"{done.left} of {len(self.places)} read or steered parts"
            raise RuntimeError(f"mnemoscope: {parts} did not run in this pass")
        for one, row in zip(done.requests, done.decision_N, strict=True) if done else ():
            if one and row >= 0 and one.report is None:
                one.report = report_of(one, self.offered)
        if done and self.writing:
            self.writing.end()

    def _follow(self, name: str, request: Any) -> Followed | None:
        facts = (getattr(request.sampling_params, "extra_args", None) or {}).get(ADMITTED)
        if facts and name not in self.followed:
            admitted = Admitted(**facts)
            if admitted.adapted:
                check_adapted(request)
            acts = None if admitted.gate is not None else admitted.adapted or admitted.start is not None
            reads = Written(admitted.decision, admitted.has_document) if admitted.read == TOKENS else None
            self.followed[name] = Followed(admitted, acts, written=reads)
        return self.followed.get(name)

    def act(self, place: int, states_TD: Tensor, residual_TD: Tensor | None) -> None:
        """Read, then shift in place, the states at a place; of blocks that give two parts these are their sum."""
        now, (reads, shifts) = self.now, self.places[place]
        if now is None:
            return
        now.left -= 1
        if states_TD.ndim != 2:
            raise RuntimeError("mnemoscope: states of this model are not one row a token")

        def whole(rows_R: Tensor) -> Tensor:
            return states_TD[rows_R] if residual_TD is None else states_TD[rows_R] + residual_TD[rows_R]

        for read in reads:
            read(now, whole)
        several = list[tuple[Tensor, Tensor]]()  # all of them from the states before
        for toward, added in shifts:
            if toward in now.shifted:
                rows_R, _, factors_R1 = now.shifted[toward]
                several.append((rows_R, factors_R1 * added(whole(rows_R))))
        for rows_R, more_RD in several:
            states_TD.index_add_(0, rows_R, more_RD.to(states_TD.dtype))

    def _keep(self, layer: int, now: Pass, whole: Callable[[Tensor], Tensor]) -> None:
        if self.writing:
            self.writing.keep(layer, whole)

    def _read(self, name: str, now: Pass, whole: Callable[[Tensor], Tensor]) -> None:
        """Read the requests whose decision position this pass holds; gates decide."""
        held = [(one, n) for n, one in enumerate(now.requests) if one and now.decision_N[n] >= 0]
        wanted = [(one, n) for one, n in held if name in (one.admitted.gate_by, one.admitted.read_by)]
        if not wanted:
            return
        rows = torch.from_numpy(now.decision_N[[n for _, n in wanted]]).to(self.device)
        reading = self.offered.detectors[name].read_verdict(whole(rows).float().cpu().numpy())
        parts = (reading.p_memorized_by_layer, reading.p_conflict, reading.distance)
        for place, (one, n) in enumerate(wanted):
            asked = one.admitted
            one.readings[name] = Reading(reading.layer, *(part[place : place + 1] for part in parts))
            if one.acts is None and asked.gate_by == name and asked.steer and asked.gate is not None:
                one.acts = bool(one.readings[name].acts(asked.steer, asked.gate)[0])
                if not one.acts and asked.steer in now.shifted:
                    open_R = now.shifted[asked.steer][1] != n
                    now.shifted[asked.steer] = [part[open_R] for part in now.shifted[asked.steer]]


def check_adapted(request: Any) -> None:
    """Raises RuntimeError where a request of vLLM's runner that an adapter steers has none of ours."""
    adapter = getattr(request, "lora_request", None)
    if not adapter or not adapter.lora_name.startswith(ADMITTED):
        raise RuntimeError("mnemoscope: a request that an adapter steers came without it")


def report_of(one: Followed, offered: Offered) -> dict[str, Any]:
    """What is told of a request."""
    asked = one.admitted
    facts: dict[str, Any] = {"steer": asked.steer, "alpha": asked.alpha if asked.steer else 0.0}
    facts |= {"lever": asked.lever, "acted": bool(one.acts)}
    if name := asked.read_by or asked.gate_by:
        reading, detector = one.readings[name], offered.detectors[name]
        numbers = {n: float(getattr(reading, n)[0]) for n in ("p_memorized", "p_conflict", "distance")}
        facts |= {n: None if math.isnan(value) else value for n, value in numbers.items()}
        facts |= {"unlike": bool(reading.unlike[0]), "site": detector.site, "layer": detector.layer}
    return facts
