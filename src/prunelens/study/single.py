"""What the command line does outside a study: prune one checkpoint, match two SAEs."""

from __future__ import annotations

import pathlib

from prunelens.activations import Statistics
from prunelens.config import CorpusConfig, ModelConfig, PruningConfig, StudyConfig
from prunelens.corpus import split_tokens, windows
from prunelens.errors import UserError
from prunelens.match import MatchRates, match_dictionaries, match_rates
from prunelens.model import load_model
from prunelens.prune.apply import Pruned, prune_model
from prunelens.prune.calibrate import input_norms
from prunelens.prune.checkpoint import check_target, save_checkpoint
from prunelens.sae.topk import TopKSAE
from prunelens.study.run import resolve_device


def prune_checkpoint(
    model: ModelConfig,
    pruning: PruningConfig,
    corpus: CorpusConfig,
    out: pathlib.Path,
    device: str,
) -> Pruned:
    """Load, prune and save a model as a Hugging Face checkpoint.

    Raises: UserError for a wrong model or text, or where `out` is not empty.
    """
    check_target(out)
    lm = load_model(model, device=resolve_device(device))
    norms, tokens = None, None
    if pruning.criterion == "wanda":
        splits = split_tokens(corpus, lm.tokenizer, only=("calibration",))
        tokens = windows(splits.calibration, corpus.context_tokens, splits.bos_token)
        if pruning.calibration == "dense":
            norms, tokens = input_norms(lm, tokens), None
    pruned = prune_model(lm, pruning, calibration=tokens, input_norms=norms)
    save_checkpoint(lm, out)
    return pruned


def match_saes(folder_a: pathlib.Path, folder_b: pathlib.Path) -> list[MatchRates]:
    """Match rates of two SAE folders at the default taus, in raw coordinates where both say theirs.

    Raises: UserError where a folder holds no SAE or the widths differ.
    """
    decoders = []
    for folder in (folder_a, folder_b):
        decoder = TopKSAE.load(folder).decoder_weight.detach()
        path = folder / "normalisation.safetensors"
        decoders.append(decoder * Statistics.load(path).sigma if path.exists() else decoder)
    a, b = decoders
    if a.shape[1] != b.shape[1]:
        raise UserError(
            f"SAE_B: {str(folder_b)!r} has d_model {b.shape[1]}, SAE_A has {a.shape[1]};"
            " match SAEs of the same width"
        )
    taus = StudyConfig().taus
    matches = match_dictionaries(a, b, lowest_tau=taus[0])
    return [match_rates(matches, tau) for tau in taus]
