"""Interventions: data that change what a model answers, how they are stored, and the only hooks that write.

Names are imported on first use: what methods there are is asked without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mnemoscope.interventions.artefact import Artefact, Binding, Card, best_paths, read_artefact, readable
    from mnemoscope.interventions.contract import OPPOSITE, Contrast, Intervention, Quoted, Toward, load_intervention
    from mnemoscope.interventions.edits import Edit, LowRank, Scale, Shift
    from mnemoscope.interventions.hooks import Gate, Positions, ablated, adding, edited, patched, shifted
    from mnemoscope.interventions.vector import SteeringVector, scaled_to

_NAMES = {
    "artefact": "Artefact Binding Card best_paths read_artefact readable",
    "contract": "OPPOSITE Contrast Intervention Quoted Toward load_intervention",
    "edits": "Edit LowRank Scale Shift",
    "hooks": "Gate Positions ablated adding edited patched shifted",
    "vector": "SteeringVector scaled_to",
}
_PLACES = {name: place for place, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
