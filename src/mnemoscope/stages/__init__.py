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
from mnemoscope.stages.probe import probes_stage
from mnemoscope.stages.steer import steering_stage
from mnemoscope.stages.texts import neutral_stage, samples_stage
from mnemoscope.stages.train import behaviour_stage, pairs_stage, train_stage

IN_ORDER: tuple[Callable[[Cell, Tell], list[Path]], ...] = (
    *(train_stage, behaviour_stage, pairs_stage, probes_stage, steering_stage),
    *(effects_stage, detection_stage, neutral_stage, samples_stage, cards_stage),
)
STAGES = {stage.__name__.removesuffix("_stage"): stage for stage in IN_ORDER}
