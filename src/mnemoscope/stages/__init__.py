"""The stages of a cell, in order. Each writes raw records and returns its files."""

from collections.abc import Callable
from pathlib import Path

from mnemoscope.cells import Cell, Tell
from mnemoscope.models import check_peft
from mnemoscope.stages.cards import cards_stage
from mnemoscope.stages.common import cell_model
from mnemoscope.stages.compare import compare_stage
from mnemoscope.stages.detect import detection_stage
from mnemoscope.stages.effects import effects_stage
from mnemoscope.stages.lists import Records
from mnemoscope.stages.pairs import pairs_stage
from mnemoscope.stages.probe import probes_stage
from mnemoscope.stages.steer import steering_stage
from mnemoscope.stages.texts import neutral_stage, samples_stage
from mnemoscope.stages.train import behaviour_stage, train_stage

STAGES: dict[str, Callable[[Cell, Tell], list[Path]]] = {
    "train": train_stage,
    "behaviour": behaviour_stage,
    "pairs": pairs_stage,
    "probes": probes_stage,
    "steering": steering_stage,
    "effects": effects_stage,
    "detection": detection_stage,
    "neutral": neutral_stage,
    "samples": samples_stage,
    "cards": cards_stage,
}
