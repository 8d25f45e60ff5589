"""Scaled heads in two passes: what is added to heads comes from a first, unchanged pass.

Li et al. (2025), "Taming knowledge conflicts in language models", arXiv 2503.10996 (ICML 2025).

Shapes: N prompts, T tokens (columns), D numbers of all heads.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor

from mnemoscope.behaviour import capturing
from mnemoscope.interventions import Gate, Intervention, Toward, edited
from mnemoscope.interventions.hooks import Changed
from mnemoscope.models import cache_argument, cache_of, core_of, forked, replaced_forward
from mnemoscope.rivals.heads import SETTINGS, Factors, factors_of, ranked
from mnemoscope.runs.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mnemoscope.bench.lists import Bench

ABOUT = "heads scaled by what they gave in a first pass (arXiv 2503.10996)"


@dataclass(frozen=True, kw_only=True, repr=False)
class TwoRuns(Intervention):
    """Heads get what they gave in a first, unchanged pass, times ``factors``, float32 (D,) by layer."""

    factors: Mapping[int, Tensor]

    KIND: ClassVar[str] = "two-runs"
    STORED: ClassVar[tuple[str, ...]] = ("factors",)
    passes: ClassVar[int] = 2
    in_one_go: ClassVar[bool] = True

    def apply(
        self,
        model: PreTrainedModel,
        alpha: float | Sequence[float] | Tensor = 1.0,
        start: int | None = None,
        gate: Gate | None = None,
    ) -> AbstractContextManager[None]:
        """The context in which every pass runs twice; alpha 0 leaves the model untouched."""
        factor = torch.as_tensor(alpha, dtype=torch.float32)
        if factor.ndim or gate is not None:
            raise InputError("alpha: two runs act on a batch as a whole; give one factor, and no gate")
        return _twice(model, {n: float(factor) * f for n, f in self.factors.items() if factor}, start)

    def scaled(self, alpha: float) -> TwoRuns:
        """The same with other factors."""
        return replace(self, factors={layer: alpha * factor_D for layer, factor_D in self.factors.items() if alpha})

    def tensors(self) -> dict[str, Tensor]:
        """One float32 tensor a layer."""
        return {f"factor.{layer}": factor_D for layer, factor_D in self.factors.items()}

    @classmethod
    def with_tensors(cls, tensors: Mapping[str, Tensor], facts: dict[str, Any]) -> Self:
        """Build one from stored tensors."""
        facts.pop("kind")
        return cls(factors={int(name.removeprefix("factor.")): one for name, one in tensors.items()}, **facts)


def candidates(bench: Bench, toward: Toward) -> list[Intervention]:
    """Every number of heads and pair of factors; InputError for a model whose heads are not found."""
    model, ranks = bench.asking.model, ranked(bench, toward)
    return [
        TwoRuns(
            toward=toward,
            method="juice",
            setting={"heads": count, "up": up, "down": down},
            factors=factors_of(model, ranks, count, up, down),
        )
        for count, up, down in SETTINGS
    ]


@contextmanager
def _twice(model: PreTrainedModel, factors: Factors, start: int | None) -> Iterator[None]:
    """Inside the context every pass runs twice: unchanged, with a cache of its own, then with what its heads gave.

    Prompts may be read behind a prefix: it belongs to both runs, as nothing acts before the decision position.
    """
    if not factors:
        yield
        return
    first, layers = _FirstRun(), sorted(factors)
    core = core_of(model)
    name = cache_argument(model)

    def adding(layer: int) -> Changed:
        def add(states_NTD: Tensor) -> Tensor:
            if first.runs:
                return states_NTD
            given_NTD = first.given[layer][:, -states_NTD.shape[1] :]
            return states_NTD + factors[layer].to(states_NTD) * given_NTD.to(states_NTD)

        return add

    def twice(forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def run(*args: Any, **kwargs: Any) -> Any:
            with first.running(kwargs, name), capturing(model, "head", layers, offsets=None) as given:
                first.cache = cache_of(forward(*args, **kwargs | {name: first.cache, "use_cache": True}))
            first.given = dict(zip(layers, given, strict=True))
            output = forward(*args, **kwargs)
            first.behind = kwargs.get(name) if kwargs.get(name) is not None else output.get(name)
            return output

        return run

    with (
        edited(model, {layer: adding(layer) for layer in layers}, "head", start=start),
        replaced_forward([core], twice),
    ):
        yield


class _FirstRun:
    """The unchanged run: its cache, what its heads gave, and the cache of the second run that it belongs to."""

    def __init__(self) -> None:
        self.runs = False
        self.cache: Any = None
        self.behind: Any = None
        self.given: dict[int, Tensor] = {}

    @contextmanager
    def running(self, kwargs: Mapping[str, Any], name: str) -> Iterator[None]:
        """While it runs; a pass behind another cache than that of the pass before begins a prompt."""
        second = kwargs.get(name)
        if second is None or second is not self.behind:
            self.cache = None if second is None else forked(second)
        self.runs = True
        try:
            yield
        finally:
            self.runs = False
