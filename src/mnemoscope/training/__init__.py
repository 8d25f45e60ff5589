"""Training until one model shows both behaviours."""

from mnemoscope.training.checkpoints import Checkpoint
from mnemoscope.training.loop import Trained, batches, how_to_mix, measure, prepare_evaluation, train, unmet
from mnemoscope.training.optimizers import Float32Muon, optimizers_for
