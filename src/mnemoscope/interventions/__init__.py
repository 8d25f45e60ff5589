"""Interventions: data that change what a model answers, how they are stored, and the only hooks that write."""

from typing import TYPE_CHECKING

from mnemoscope.runs.lazily import handed_on

if TYPE_CHECKING:
    from mnemoscope.interventions.artefact import Artefact, Binding, Card, best_paths, read_artefact, readable
    from mnemoscope.interventions.contract import OPPOSITE, Contrast, Intervention, Quoted, Toward, load_intervention
    from mnemoscope.interventions.edits import Edit, LowRank, Scale, Shift
    from mnemoscope.interventions.hooks import Gate, Positions, ablated, adding, edited, patched, shifted
    from mnemoscope.interventions.vector import SteeringVector, scaled_to

__getattr__, __all__ = handed_on(__name__, __file__)
