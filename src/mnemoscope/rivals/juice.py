"""Scaled heads in two passes: what is added to heads comes from a first, unchanged pass.

Li et al. (2025), "Taming knowledge conflicts in language models", arXiv 2503.10996 (ICML 2025).

Shapes: N prompts, T tokens (columns), D numbers of all heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from mnemoscope.behaviour import capturing
from mnemoscope.interventions import Edit, Gate, Intervention, SteeringVector, Toward, edited
from mnemoscope.interventions.contract import Bench
from mnemoscope.models import cache_argument, cache_of, core_of, forked, replaced_forward
from mnemoscope.rivals.june import scaled_heads
from mnemoscope.runs.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every number of heads and pair of factors; InputError for a model whose heads are not found."""
    return scaled_heads(bench, toward, "juice", TwoRuns)


@dataclass(frozen=True, repr=False)
class TwoRuns(SteeringVector):
    """What edits add to the states of a first, unchanged pass is added to those of a second one.

    Prompts may be read behind a prefix: it belongs to both runs, as nothing acts before the decision position.
    """

    KIND: ClassVar[str] = "two-runs"
    passes: ClassVar[int] = 2
    in_one_go: ClassVar[bool] = True

    @contextmanager
    def edited(
        self, model: PreTrainedModel, edits: Mapping[int, tuple[Edit, ...]], start: int | None, gate: Gate | None
    ) -> Iterator[None]:
        """Inside the context every pass runs twice: unchanged, with a cache of its own, then with what it gave."""
        if gate is not None:
            raise InputError("gate: it would be read in either run; give one alpha for each prompt, 0 or 1")
        first, core, name = _FirstRun(), core_of(model), cache_argument(model)

        def adding(layer: int) -> Callable[[Tensor], Tensor]:
            def add(states_NTD: Tensor) -> Tensor:
                if first.runs:
                    return states_NTD
                given_NTD = first.given[layer][:, -states_NTD.shape[1] :].to(states_NTD)
                rows = (one.to(states_NTD.device).of_rows(len(states_NTD)) for one in edits[layer])
                return sum((one.added(given_NTD).to(states_NTD) for one in rows), states_NTD)

            return add

        def twice(forward: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(forward)
            def run(*args: Any, **kwargs: Any) -> Any:
                with first.running(kwargs.get(name)), capturing(model, self.site, list(edits), offsets=None) as given:
                    first.cache = cache_of(forward(*args, **kwargs | {name: first.cache, "use_cache": True}))
                first.given = dict(zip(edits, given, strict=True))
                output = forward(*args, **kwargs)
                first.behind = kwargs.get(name) if kwargs.get(name) is not None else output.get(name)
                return output

            return run

        adders = {layer: adding(layer) for layer in edits}
        with edited(model, adders, self.site, start=start), replaced_forward([core], twice):
            yield


class _FirstRun:
    """The unchanged run: its cache, what its states were, and the cache of the second run that it belongs to."""

    def __init__(self) -> None:
        self.runs = False
        self.cache: Any = None
        self.behind: Any = None
        self.given: dict[int, Tensor] = {}

    @contextmanager
    def running(self, second: Any) -> Iterator[None]:
        """While it runs; a pass behind another cache than that of the pass before begins a prompt."""
        if second is None or second is not self.behind:
            self.cache = None if second is None else forked(second)
        self.runs = True
        try:
            yield
        finally:
            self.runs = False
