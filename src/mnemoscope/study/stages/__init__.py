"""The stages of a cell, in order. Each writes raw records and returns its files."""

from collections.abc import Callable
from pathlib import Path

from mnemoscope.study.cells import Cell, Tell
from mnemoscope.study.stages.common import cell_model, check_cell, with_kept_data
from mnemoscope.study.stages.detect import cards_stage, detection_stage
from mnemoscope.study.stages.effects import effects_stage, neutral_stage, samples_stage
from mnemoscope.study.stages.lists import Records
from mnemoscope.study.stages.probe import probes_stage
from mnemoscope.study.stages.steer import judged_splits, steering_stage
from mnemoscope.study.stages.train import behaviour_stage, pairs_stage, train_stage

IN_ORDER: tuple[Callable[[Cell, Tell], list[Path]], ...] = (
    *(train_stage, behaviour_stage, pairs_stage, probes_stage, steering_stage),
    *(effects_stage, detection_stage, neutral_stage, samples_stage, cards_stage),
)
# All that a stage could write, as patterns in the folder of its cell: deleted before it begins, so that what an earlier
# attempt left behind is not read as its result.
WRITES: dict[str, tuple[str, ...]] = {
    "train": ("model", "adapter", "cell.json", "data", "records/training*", "records/known.json"),
    "behaviour": ("records/behaviour.parquet",),
    "pairs": ("records/pairs*.parquet", "contrast.safetensors"),
    "probes": ("probe.json", *(f"records/{name}.parquet" for name in ("probes", "learning", "halves"))),
    "steering": ("vectors", "records/steering.parquet", "records/sweep.parquet", "records/chosen.json"),
    "effects": ("records/effects.parquet",),
    "detection": ("detector*", "records/detection.parquet", "records/gate.parquet", "records/no_detector.json"),
    "neutral": ("records/neutral.parquet",),
    "samples": ("records/samples.parquet",),
}
STAGES = {stage.__name__.removesuffix("_stage"): stage for stage in IN_ORDER}
