"""Settings: the cells of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mnemoscope.models import Site
from mnemoscope.steering import Positions, Toward

TOWARD: dict[str, Toward] = {"to_generalized": "generalized", "to_memorized": "memorized"}
SOURCE: dict[str, Toward] = {"to_generalized": "memorized", "to_memorized": "generalized"}


@dataclass(frozen=True, slots=True)
class Setting:
    """One cell of a sweep.

    Attributes:
        direction: a key of ``TOWARD``.
        method: a key of ``METHODS``.
        layers: the layers that are shifted, 0-based.
        top: share of these layers' neurons that are shifted, in (0, 1].
        strength: total relative norm: the root of the summed squares of each layer's shift over its states' norm.
        positions: ``decision``, or ``all`` tokens; norms and differences are those at the decision position either way.
    """

    direction: str
    method: str
    site: Site
    layers: tuple[int, ...]
    top: float
    strength: float
    positions: Positions = "decision"

    @property
    def toward(self) -> Toward:
        """The behaviour to steer to."""
        return TOWARD[self.direction]

    def same_direction(self) -> tuple[Setting, int]:
        """The setting with all fixed that the direction does not depend on, and its sign (1 or -1) there.

        A learned direction depends on all but ``top``; the others are one for the whole site, whose negative steers the
        other way.
        """
        if self.method == "learned":
            return replace(self, top=1.0), 1
        fixed = Setting("to_generalized", self.method, self.site, (), top=1.0, strength=1.0)
        return fixed, 1 if self.direction == fixed.direction else -1
