"""Training until one model shows both behaviours."""

from mnemoscope.training.checkpoints import Checkpoint
from mnemoscope.training.loop import MEASURED, Evaluation, Trained, batches, how_to_mix, train, tune_examples, unmet
from mnemoscope.training.optimizers import Float32Muon, optimizers_for
