"""The configuration of a study: frozen data that validate and do nothing else."""

from mnemoscope.config.arena import ArenaConfig
from mnemoscope.config.audit import AuditConfig
from mnemoscope.config.model import HoldConfig, LayoutConfig, LoraConfig, ModelConfig, StopConfig, TrainingConfig
from mnemoscope.config.reading import (
    built_in_studies,
    dump_study,
    load_study,
    parse_arena,
    parse_audit,
    parse_model,
    parse_study,
)
from mnemoscope.config.study import (
    NAME,
    CellConfig,
    GridConfig,
    LowRankConfig,
    ProbesConfig,
    SteeringConfig,
    StudyConfig,
)
