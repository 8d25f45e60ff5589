"""Training until one model shows both behaviours."""

from mnemoscope.training.loop import Trained, how_to_mix, measure, prepare_evaluation, train, unmet
from mnemoscope.training.optimizers import Float32Muon, optimizers_for
from mnemoscope.training.reading import batches
