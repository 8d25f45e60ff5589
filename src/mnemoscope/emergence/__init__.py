"""Memorizing and generalizing while a model is trained, by whatever trainer: what it shows at a step, and the curve."""

from mnemoscope.emergence.curve import Curve, reached
from mnemoscope.emergence.measuring import Watcher, undisturbed
