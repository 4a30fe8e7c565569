"""What did pruning do to a model's features, and can you trust the answer?

The public API on one page; importing it loads nothing heavy, names load on first use.

    text      read_study, study_from_data, CorpusConfig, split_tokens, windows
    model     load_model, run_to_site, run_to_sites, replace_at_site, measure_perplexity
    prune     prune_model, input_norms, apply_masks, save_checkpoint, masks_sha256
    SAEs      capture, capture_sites, Activations, statistics, TopKSAE, BatchTopKSAE, load_sae,
              train_sae, train_saes, evaluate_sae, export_sae
    compare   match_dictionaries, match_rates, seed_stability, survival, persistence
    identity  activation_matching, latent_series, latent_scaling, subspace_overlaps
    trust     sufficiency, survival_by_step, dense_world, pruned_world, grades, run_selftest
    transfer  load_given_sae, transfer, transfer_verdicts, transfer_sae
    fragility latent_fates, quintiles, fragility_tests, fit_predictor, predict_survival
    causal    latent_groups, ablate, causal_summary, UpperBlocks
    claims    judge_claims, published
    evidence  collect_contexts, read_contexts, token_effects, study_contexts
    explorer  view_study, write_study_explorer
    share     export_hub, export_checkpoint, push_folder, Sharing
    study     plan_study, preflight, run_and_report, write_report, predict_latents, leftovers,
              clean_study
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prunelens.activations import (
        Activations,
        Statistics,
        capture,
        capture_sites,
        statistics,
        usable_rows,
    )
    from prunelens.analyses.activation_matching import activation_matching, latent_series
    from prunelens.analyses.causal import ablate
    from prunelens.analyses.causal_groups import SeedAblations, causal_summary, latent_groups
    from prunelens.analyses.claims import judge_claims
    from prunelens.analyses.evidence import collect_contexts, read_contexts
    from prunelens.analyses.fates import latent_fates
    from prunelens.analyses.fragility import fragility_tests, quintiles
    from prunelens.analyses.grades import grades
    from prunelens.analyses.persistence import persistence, persistence_summary
    from prunelens.analyses.predictor import fit_predictor, predict_survival
    from prunelens.analyses.scaling import latent_scaling, scaling_summary
    from prunelens.analyses.stability import seed_stability
    from prunelens.analyses.subspace import subspace_overlaps
    from prunelens.analyses.sufficiency import sufficiency, survival_by_step
    from prunelens.analyses.survival import corrected_survival, survival
    from prunelens.analyses.token_effects import token_effects
    from prunelens.analyses.transfer import transfer, transfer_verdicts
    from prunelens.cards import Sharing
    from prunelens.config import (
        ActivationConfig,
        CausalConfig,
        CorpusConfig,
        EvidenceConfig,
        ModelConfig,
        PretrainedSaeConfig,
        PruningConfig,
        SaeConfig,
        StudyConfig,
        SufficiencyConfig,
        TransferConfig,
        study_from_data,
    )
    from prunelens.corpus import split_tokens, windows
    from prunelens.errors import UserError
    from prunelens.hub import push_folder
    from prunelens.match import match_dictionaries, match_rates
    from prunelens.model import (
        LanguageModel,
        load_model,
        replace_at_site,
        run_to_site,
        run_to_sites,
    )
    from prunelens.paper import published
    from prunelens.perplexity import measure_perplexity
    from prunelens.planted import dense_world, pruned_world, world_activations
    from prunelens.prune.apply import apply_masks, prune_model
    from prunelens.prune.calibrate import input_norms
    from prunelens.prune.checkpoint import save_checkpoint
    from prunelens.prune.masks import masks_sha256
    from prunelens.report.explorer.study import view_study, write_study_explorer
    from prunelens.report.selftest import run_selftest
    from prunelens.report.write import run_and_report, write_report
    from prunelens.sae.architectures import load_sae
    from prunelens.sae.batchtopk import BatchTopKSAE
    from prunelens.sae.export import export_sae
    from prunelens.sae.formats import GivenSae
    from prunelens.sae.own_folder import own_sae
    from prunelens.sae.pretrained import load_given_sae
    from prunelens.sae.quality import evaluate_sae
    from prunelens.sae.topk import TopKSAE
    from prunelens.sae.train import SaeRequest, train_sae, train_saes
    from prunelens.study.clean import clean_study, leftovers
    from prunelens.study.contexts import study_contexts
    from prunelens.study.exports import export_checkpoint, export_hub
    from prunelens.study.plan import plan_study
    from prunelens.study.predict import predict_latents
    from prunelens.study.preflight.preview import preflight
    from prunelens.study.single import transfer_sae
    from prunelens.study_file import read_study
    from prunelens.upper_blocks import UpperBlocks

_HOMES = {
    "prunelens.activations": (
        "Activations",
        "Statistics",
        "capture",
        "capture_sites",
        "statistics",
        "usable_rows",
    ),
    "prunelens.analyses.activation_matching": (
        "activation_matching",
        "latent_series",
    ),
    "prunelens.analyses.causal": ("ablate",),
    "prunelens.analyses.causal_groups": (
        "SeedAblations",
        "causal_summary",
        "latent_groups",
    ),
    "prunelens.analyses.claims": ("judge_claims",),
    "prunelens.analyses.evidence": ("collect_contexts", "read_contexts"),
    "prunelens.analyses.fates": ("latent_fates",),
    "prunelens.analyses.fragility": (
        "fragility_tests",
        "quintiles",
    ),
    "prunelens.analyses.grades": ("grades",),
    "prunelens.analyses.persistence": (
        "persistence",
        "persistence_summary",
    ),
    "prunelens.analyses.predictor": (
        "fit_predictor",
        "predict_survival",
    ),
    "prunelens.analyses.scaling": (
        "latent_scaling",
        "scaling_summary",
    ),
    "prunelens.analyses.stability": ("seed_stability",),
    "prunelens.analyses.subspace": ("subspace_overlaps",),
    "prunelens.analyses.sufficiency": (
        "sufficiency",
        "survival_by_step",
    ),
    "prunelens.analyses.survival": (
        "corrected_survival",
        "survival",
    ),
    "prunelens.analyses.token_effects": ("token_effects",),
    "prunelens.analyses.transfer": (
        "transfer",
        "transfer_verdicts",
    ),
    "prunelens.cards": ("Sharing",),
    "prunelens.config": (
        "ActivationConfig",
        "CausalConfig",
        "CorpusConfig",
        "EvidenceConfig",
        "ModelConfig",
        "PretrainedSaeConfig",
        "PruningConfig",
        "SaeConfig",
        "StudyConfig",
        "SufficiencyConfig",
        "TransferConfig",
        "study_from_data",
    ),
    "prunelens.corpus": (
        "split_tokens",
        "windows",
    ),
    "prunelens.errors": ("UserError",),
    "prunelens.hub": ("push_folder",),
    "prunelens.match": (
        "match_dictionaries",
        "match_rates",
    ),
    "prunelens.model": (
        "LanguageModel",
        "load_model",
        "replace_at_site",
        "run_to_site",
        "run_to_sites",
    ),
    "prunelens.paper": ("published",),
    "prunelens.perplexity": ("measure_perplexity",),
    "prunelens.planted": (
        "dense_world",
        "pruned_world",
        "world_activations",
    ),
    "prunelens.prune.apply": (
        "apply_masks",
        "prune_model",
    ),
    "prunelens.prune.calibrate": ("input_norms",),
    "prunelens.prune.checkpoint": ("save_checkpoint",),
    "prunelens.report.explorer.study": ("view_study", "write_study_explorer"),
    "prunelens.prune.masks": ("masks_sha256",),
    "prunelens.report.selftest": ("run_selftest",),
    "prunelens.report.write": (
        "run_and_report",
        "write_report",
    ),
    "prunelens.sae.architectures": ("load_sae",),
    "prunelens.sae.batchtopk": ("BatchTopKSAE",),
    "prunelens.sae.export": ("export_sae",),
    "prunelens.sae.formats": ("GivenSae",),
    "prunelens.sae.own_folder": ("own_sae",),
    "prunelens.sae.pretrained": ("load_given_sae",),
    "prunelens.sae.quality": ("evaluate_sae",),
    "prunelens.sae.topk": ("TopKSAE",),
    "prunelens.sae.train": (
        "SaeRequest",
        "train_sae",
        "train_saes",
    ),
    "prunelens.study.exports": (
        "export_checkpoint",
        "export_hub",
    ),
    "prunelens.study.clean": ("clean_study", "leftovers"),
    "prunelens.study.plan": ("plan_study",),
    "prunelens.study.contexts": ("study_contexts",),
    "prunelens.study.predict": ("predict_latents",),
    "prunelens.study.preflight.preview": ("preflight",),
    "prunelens.study.single": ("transfer_sae",),
    "prunelens.study_file": ("read_study",),
    "prunelens.upper_blocks": ("UpperBlocks",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'prunelens' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
