"""TopK sparse autoencoders: the module, its training and its quality (methods §5)."""

from prunelens.sae.kernels import SparseLatents
from prunelens.sae.quality import SaeQuality, evaluate_sae
from prunelens.sae.topk import TopKSAE
from prunelens.sae.train import StepLog, TokenActivations, TrainedSae, train_sae

__all__ = [
    "SaeQuality",
    "SparseLatents",
    "StepLog",
    "TokenActivations",
    "TopKSAE",
    "TrainedSae",
    "evaluate_sae",
    "train_sae",
]
