"""Memorizing and generalizing while a model is trained, by whatever trainer: what it shows at a step, and the curve."""

from typing import TYPE_CHECKING

from mnemoscope.runs.lazily import handed_on

if TYPE_CHECKING:
    from mnemoscope.watch.curve import Curve, reached
    from mnemoscope.watch.measuring import Asked, Watcher, undisturbed

__getattr__, __all__ = handed_on(__name__, __file__)
