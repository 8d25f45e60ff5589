"""Memorizing and generalizing while a model is trained, by whatever trainer: what it shows at a step, and the curve."""

from mnemoscope.watch.curve import Curve, reached
from mnemoscope.watch.measuring import Asked, Watcher, undisturbed
