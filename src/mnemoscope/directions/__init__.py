"""From pairs to steering vectors: methods, controls of the same norm, and the choice of a setting."""

from mnemoscope.directions.choose import Choice, Limits, TuneLists, control_means, damage, final, ranked
from mnemoscope.directions.controls import CONTROLS, control_draws, control_exists, gaussian_like
from mnemoscope.directions.learned import Budget, learn
from mnemoscope.directions.methods import METHODS, Method, Wanted, margin_gradients
from mnemoscope.directions.settings import (
    SOURCE,
    TOWARD,
    Setting,
    alpha_of,
    ranked_neurons,
    share_of,
    steered,
    vector_of,
)
from mnemoscope.directions.sources import FitLists, Sources, in_turn, read_sources, with_prefixes

__all__ = [
    "CONTROLS",
    "METHODS",
    "SOURCE",
    "TOWARD",
    "Budget",
    "Choice",
    "FitLists",
    "Limits",
    "Method",
    "Setting",
    "Sources",
    "TuneLists",
    "Wanted",
    "alpha_of",
    "control_draws",
    "control_exists",
    "control_means",
    "damage",
    "final",
    "gaussian_like",
    "in_turn",
    "learn",
    "margin_gradients",
    "ranked",
    "ranked_neurons",
    "read_sources",
    "share_of",
    "steered",
    "vector_of",
    "with_prefixes",
]
