"""Training until one model shows both behaviours."""

from mnemoscope.training.checkpoints import Checkpoint
from mnemoscope.training.instances import batches
from mnemoscope.training.loop import Trained, how_to_mix, train
from mnemoscope.training.optimizers import Float32Muon, optimizers_for
from mnemoscope.training.rule import MEASURED, Evaluation, tune_examples, unmet
