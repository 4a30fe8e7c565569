"""Sparse autoencoders: their architectures, training and quality (methods §5);
and SAEs as they are given, ours or others'."""

from prunelens.sae.architectures import load_sae
from prunelens.sae.batchtopk import BatchTopKSAE
from prunelens.sae.exchange.formats import GivenSae
from prunelens.sae.exchange.pretrained import load_given_sae
from prunelens.sae.kernels import SparseLatents
from prunelens.sae.quality import SaeQuality, evaluate_sae
from prunelens.sae.state import StepLog, TokenActivations
from prunelens.sae.topk import TopKSAE
from prunelens.sae.train import SaeRequest, TrainedSae, train_sae, train_saes

__all__ = [
    "BatchTopKSAE",
    "GivenSae",
    "SaeQuality",
    "SaeRequest",
    "SparseLatents",
    "StepLog",
    "TokenActivations",
    "TopKSAE",
    "TrainedSae",
    "evaluate_sae",
    "load_given_sae",
    "load_sae",
    "train_sae",
    "train_saes",
]
