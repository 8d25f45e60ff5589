"""Steering vectors, the hooks that apply them, and what a model writes under them; the only write hook."""

from mnemoscope.steering.binding import Binding, check_both, only_accepted, reading
from mnemoscope.steering.hooks import Gate, Positions, ablated, patched, shifted
from mnemoscope.steering.vector import OPPOSITE, SteeringVector, Toward, find_vector, scaled_to
from mnemoscope.steering.writing import complete, continued

__all__ = [
    "OPPOSITE",
    "Binding",
    "Gate",
    "Positions",
    "SteeringVector",
    "Toward",
    "ablated",
    "check_both",
    "complete",
    "continued",
    "find_vector",
    "only_accepted",
    "patched",
    "reading",
    "scaled_to",
    "shifted",
]
