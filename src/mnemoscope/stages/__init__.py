"""The stages of a cell, in order. Each writes raw records and returns its files."""

from mnemoscope.stages.common import Stage
from mnemoscope.stages.pairs import pairs_stage
from mnemoscope.stages.steer import steering_stage
from mnemoscope.stages.train import behaviour_stage, train_stage

STAGES: dict[str, Stage] = {
    "train": train_stage,
    "behaviour": behaviour_stage,
    "pairs": pairs_stage,
    "steering": steering_stage,
}

__all__ = ["STAGES"]
