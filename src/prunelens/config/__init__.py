"""The description of a study: frozen data, checked on reading, no torch.

Unknown keys are refused with the nearest valid name; every message names the field, its value and
the fix.
"""

from prunelens.config.features import (
    ActivationConfig,
    CausalConfig,
    EvidenceConfig,
    ProbesConfig,
    SaeConfig,
    SufficiencyConfig,
    TransferConfig,
)
from prunelens.config.model import ModelConfig, PretrainedSaeConfig, Site
from prunelens.config.pruning import (
    CheckpointConfig,
    CheckpointEntry,
    Condition,
    PruningConfig,
    PruningGrid,
)
from prunelens.config.study import NEEDS, StudyConfig, part_from_data, study_from_data
from prunelens.config.text import SOURCES, CorpusConfig, PerplexityConfig

__all__ = [
    "NEEDS",
    "SOURCES",
    "ActivationConfig",
    "CausalConfig",
    "CheckpointConfig",
    "CheckpointEntry",
    "Condition",
    "CorpusConfig",
    "EvidenceConfig",
    "ModelConfig",
    "PerplexityConfig",
    "PretrainedSaeConfig",
    "ProbesConfig",
    "PruningConfig",
    "PruningGrid",
    "SaeConfig",
    "Site",
    "StudyConfig",
    "SufficiencyConfig",
    "TransferConfig",
    "part_from_data",
    "study_from_data",
]
