"""One cell of a finished run, opened: asked one prompt at a time, by itself and turned, and looked into."""

from mnemoscope.bench.asking import Answered, Bench
from mnemoscope.bench.neurons import Neurons, Watched
from mnemoscope.bench.turns import CancelledError, Turns
from mnemoscope.bench.vectors import Turning, Vectors

__all__ = ["Answered", "Bench", "CancelledError", "Neurons", "Turning", "Turns", "Vectors", "Watched"]
