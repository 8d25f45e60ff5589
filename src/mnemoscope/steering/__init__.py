"""Steering vectors, the hooks that apply them, the base of stored artefacts; the only write hook."""

from mnemoscope.steering.artefact import Artefact, Binding, Card, best_paths, read_artefact, readable
from mnemoscope.steering.hooks import Edit, Gate, LowRank, Positions, ablated, adding, edited, patched, shifted
from mnemoscope.steering.vector import OPPOSITE, SteeringVector, Toward, scaled_to
