"""What is asked of every run; what several questions read is in `arms` and `paired`.

Questions are answered in this order, and so stand their columns in `latents.parquet`.
"""

from prunelens.study.kind import Question
from prunelens.study.questions.activation_matching import ACTIVATION_MATCHING
from prunelens.study.questions.causal import CAUSAL
from prunelens.study.questions.common_change import COMMON_CHANGE
from prunelens.study.questions.evidence import EVIDENCE
from prunelens.study.questions.fates import FATES
from prunelens.study.questions.fragility import FRAGILITY
from prunelens.study.questions.grades import COVERAGE, GRADES
from prunelens.study.questions.persistence import PERSISTENCE
from prunelens.study.questions.probes import PROBE_GRADES, PROBES
from prunelens.study.questions.scaling import SCALING
from prunelens.study.questions.sinks import SINKS
from prunelens.study.questions.stability import STABILITY
from prunelens.study.questions.subspace import SUBSPACE
from prunelens.study.questions.sufficiency import SUFFICIENCY
from prunelens.study.questions.survival import CORRECTED, SURVIVAL
from prunelens.study.questions.transfer import TRANSFER

QUESTIONS: list[Question] = [
    SINKS,
    STABILITY,
    SURVIVAL,
    CORRECTED,
    COMMON_CHANGE,
    ACTIVATION_MATCHING,
    SUBSPACE,
    SCALING,
    PERSISTENCE,
    SUFFICIENCY,
    TRANSFER,
    EVIDENCE,
    FATES,
    FRAGILITY,
    CAUSAL,
    GRADES,
    COVERAGE,
    PROBES,
    PROBE_GRADES,
]
