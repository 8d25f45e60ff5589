"""A study and its cells."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from mnemoscope.config.measuring import (
    DetectionConfig,
    EffectsConfig,
    NeutralConfig,
    PairsConfig,
    ProbesConfig,
    SamplesConfig,
    SteeringConfig,
)
from mnemoscope.config.model import Frozen, ModelConfig, TrainingConfig


class CellConfig(Frozen):
    """One task with its model; every seed of it is a cell."""

    task: str = Field(
        description="inference, addition, addition-digits, cipher, joint, facts, jsonl, or package.module:Class"
    )
    options: dict[str, Any] = Field({}, description="options of the task")
    model: ModelConfig = ModelConfig()
    training: TrainingConfig = TrainingConfig()
    pairs: PairsConfig = PairsConfig()
    probes: ProbesConfig = ProbesConfig()
    steering: SteeringConfig = SteeringConfig()
    effects: EffectsConfig = EffectsConfig()
    detection: DetectionConfig = DetectionConfig()
    neutral: NeutralConfig = NeutralConfig()
    samples: SamplesConfig = SamplesConfig()
    analysed: bool = Field(True, description="False: a model for other cells (model.cell), which is only trained")
    max_seeds: int | None = Field(None, ge=1, description="fewer seeds than the study, where a cell costs much")

    @model_validator(mode="after")
    def _neutral_text_fits(self) -> CellConfig:
        own, most = not (self.model.folder or self.model.cell or self.model.opened), self.model.context - 1
        if own and self.neutral.cuts and self.neutral.length > most:
            raise ValueError(
                f"neutral.length {self.neutral.length} does not fit into model.context; at most {most} does"
            )
        return self


class StudyConfig(Frozen):
    """A study: what is run, with how many seeds."""

    study: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", description="name of the study and of its run folder")
    seeds: int = Field(1, ge=1, le=1000, description="how many, from first_seed on, each a cell of its own")
    first_seed: int = Field(0, ge=0, le=900, description="the first, as for seeds on which no setting was developed")
    threads: int = Field(1, ge=1, le=256, description="threads of a cell; results depend on it in the last bits")
    cells: dict[str, CellConfig] = Field(min_length=1, description="by the name shown in results and report")

    @model_validator(mode="after")
    def _cells_exist(self) -> StudyConfig:
        for label, cell in self.cells.items():
            donor = cell.model.cell
            if donor is None:
                continue
            if cell.model.folder:
                raise ValueError(f"cells.{label}.model: folder and cell are both given")
            if donor not in self.cells or self.cells[donor].model.cell or donor == label:
                owners = [name for name, other in self.cells.items() if not other.model.cell]
                raise ValueError(f"cells.{label}.model.cell: {donor!r} is not one of {', '.join(owners)}")
            most = self.seeds_of(donor)
            if self.seeds_of(label) > most:
                raise ValueError(f"cells.{label}.max_seeds: at most {most} are allowed, as many as {donor} has")
        return self

    def seeds_of(self, label: str) -> int:
        """How many seeds a cell has."""
        return min(self.seeds, self.cells[label].max_seeds or self.seeds)
