"""Interventions: data that change what a model answers, how they are stored, and the only hooks that write."""

from typing import TYPE_CHECKING

from mnemoscope.runs.lazily import handed_on

if TYPE_CHECKING:
    from mnemoscope.interventions.artefact import Artefact, Binding, Card, best_paths, chosen_paths, read_artefact
    from mnemoscope.interventions.contract import Contrast, Intervention, load_intervention
    from mnemoscope.interventions.edits import Edit, Held, LowRank, Scale, Shift
    from mnemoscope.interventions.hooks import Gate, Positions, edited
    from mnemoscope.interventions.vector import SteeringVector
    from mnemoscope.interventions.words import Quoted
    from mnemoscope.runs.toward import Toward

__getattr__, __all__ = handed_on(__name__, __file__)
