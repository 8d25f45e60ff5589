"""The methods, one file each, here and in ``rivals``; see ``contract`` for what is in it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from mnemoscope.interventions.registry import check_method, method_module, method_names, name_of
from mnemoscope.runs.errors import InputError
from mnemoscope.runs.toward import Toward

if TYPE_CHECKING:
    from mnemoscope.interventions.contract import Bench, Intervention
    from mnemoscope.interventions.sources import Labels

AnyOf = TypeVar("AnyOf", bound="Intervention")


def is_one_direction(method: str) -> bool:
    """Whether both directions of a method come from one fit."""
    return hasattr(method_module(method), "direction")


def nulls(method: str) -> tuple[str, ...]:
    """Names of a method's controls that are fitted as it is, on other labels or answers; none for what is not ours."""
    try:
        module = method_module(method)
    except InputError:  # a vector of somebody's own
        return ()
    return getattr(module, "NULLS", ("shuffled_labels",) if hasattr(module, "direction") else ())


def can_refit(method: str) -> bool:
    """Whether a method can be fitted again in a setting that was chosen."""
    return bool({"again", "direction"} & vars(method_module(method)).keys())


def refitted(bench: Bench, one: AnyOf, several: Sequence[Labels]) -> list[AnyOf]:
    """An intervention fitted again, by its method and in its setting, on other labels or answers."""
    from mnemoscope.interventions import shifts

    again: Any = getattr(method_module(one.method), "again", shifts.again)
    return again(bench, one, several)


def candidates(method: str, bench: Bench, toward: str) -> Sequence[Intervention]:
    """Fit a method and return its settings.

    Raises:
        InputError: this model or task cannot take it; the reason is named.
    """
    from mnemoscope.interventions import decoding, shifts

    module, name, to = method_module(method), name_of(method), Toward.of(toward)
    if hasattr(module, "candidates"):
        found: Sequence[Intervention] = module.candidates(bench, to)
    else:
        found = (shifts if hasattr(module, "direction") else decoding).candidates(bench, name, to)
    if not found:
        raise InputError(f"methods: {method} has nothing to try to {to}")
    for one in found:
        if (one.method, one.toward) != (name, to):
            wrong = f"{one.method!r} to {one.toward}; {name!r} to {to} is wanted"
            raise InputError(f"methods: {method} breaks the contract: a candidate is {wrong}")
    return found
