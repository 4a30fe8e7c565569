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
    study     Study, plan_study, preflight, run_and_report, write_report, predict_latents,
              leftovers, clean_study, column_meanings
"""

from __future__ import annotations

import ast
import importlib
import pathlib
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
    from prunelens.sae.exchange.export import export_sae
    from prunelens.sae.exchange.formats import GivenSae
    from prunelens.sae.exchange.own_folder import own_sae
    from prunelens.sae.exchange.pretrained import load_given_sae
    from prunelens.sae.quality import evaluate_sae
    from prunelens.sae.topk import TopKSAE
    from prunelens.sae.train import SaeRequest, train_sae, train_saes
    from prunelens.study.clean import clean_study, leftovers
    from prunelens.study.contexts import study_contexts
    from prunelens.study.exports import export_checkpoint, export_hub
    from prunelens.study.finished import Study
    from prunelens.study.plan import plan_study
    from prunelens.study.predict import predict_latents
    from prunelens.study.preflight.preview import preflight
    from prunelens.study.results import column_meanings
    from prunelens.study.single import transfer_sae
    from prunelens.study_file import read_study
    from prunelens.upper_blocks import UpperBlocks


def _home_of() -> dict[str, str]:
    """Public name -> its module: the imports above, which only type checkers carry out."""
    tree = ast.parse(pathlib.Path(__file__).read_text(encoding="utf-8"))
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    found = {alias.name: node.module or "" for node in imports for alias in node.names}
    return {name: module for name, module in found.items() if module.startswith("prunelens.")}


_HOME_OF = _home_of()
__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    """Load a public name from its module on first use."""
    if name not in _HOME_OF:
        raise AttributeError(f"module 'prunelens' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
