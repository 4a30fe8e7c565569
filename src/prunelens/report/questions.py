"""What the page says about each question, and which figures and tables answer it."""

from __future__ import annotations

from typing import NamedTuple

from prunelens.analyses.sufficiency import FALL_LIMIT, RETENTION_LIMIT
from prunelens.analyses.transfer import TRANSFER_RULE


class Question(NamedTuple):
    """A section of the page."""

    anchor: str
    title: str
    asks: str
    paper: str
    """How the paper answers it."""
    controlled: str
    """The control that could falsify that answer."""
    figures: tuple[str, ...] = ()
    tables: tuple[str, ...] = ()
    """Shown in full."""
    more: tuple[str, ...] = ()
    """Shown on request."""
    needs: tuple[str, ...] = ()
    """Results without any of which the question was not asked."""
    moved_by_sinks: bool = True
    """Whether it reads activations that sinks of the compressed model alone can change."""


QUESTIONS = (
    Question(
        "selftest",
        "Self-test: do the measures tell the truth?",
        "In this planted world it is known what became of every feature. AUC: are survived features"
        " (kept, rescaled) told from destroyed ones (removed, rotated)? False survival: the share"
        " of destroyed ones that the measure calls survived. Bias: how far it is from the planted"
        " angle or scale. Its rank correlation with firing rate belongs beside that of the truth:"
        " a measure that depends on firing rate where the truth does not invents a pattern. Split"
        " and merged features, and those of which a part survived, are in the correlations alone;"
        " to matching by activations a rotated one has survived, because it fires where it did."
        " Where nothing is, nothing may be found; and intervals should hold the truth.",
        "",
        "",
        figures=("fig9_selftest",),
        tables=(
            *("selftest independent", "selftest by_rate", "selftest none", "selftest by step"),
            *("selftest null", "coverage"),
        ),
        more=("selftest", "selftest_null"),
        needs=("selftest",),
        moved_by_sinks=False,
    ),
    Question(
        "perplexity",
        "The models themselves",
        "How much did each pruning hurt the model as a whole?",
        "Perplexity on windows of 256 tokens, where most tokens have little context.",
        "Perplexity on the longest windows, as the pruning literature measures it.",
        tables=("table1_perplexity",),
        needs=("perplexity",),
        moved_by_sinks=False,
    ),
    Question(
        "sufficiency",
        "Were the SAEs trained enough to compare?",
        "Dictionaries that hardly left a shared start agree because of the start, and dictionaries"
        " that would still change with more steps differ because they were stopped.",
        "Nearly every latent is alive at the end of training. That says nothing about how far"
        " latents have come.",
        f"The mean cosine of latents to their start: above {RETENTION_LIMIT} they hardly left it."
        " And what twice the steps change, from one seed of the dense and of the followed condition"
        f" trained twice as long: an FVU that falls by more than {100 * FALL_LIMIT:g} % between the"
        " two ends (fvu_fall_beyond_schedule) was not settled. At both ends the learning rate has"
        " come down. That replaces the fall from the last checkpoint to the end (fvu_fall), which"
        " is shown but not judged: the learning rate coming down there makes it large in a training"
        " that is long enough too. fvu_fall_schedule compares the two trainings at equal steps, the"
        " end of ours: there they differ in the learning rate, and in that the longer one still"
        " restarted dead latents where ours no longer did.",
        figures=("fig7_training",),
        tables=("training by run",),
        more=("training_curves", "survival_by_step"),
    ),
    Question(
        "stability",
        "RQ1: do two seeds find the same features?",
        "Two SAEs of the same model that differ only in their seed: what share of their features"
        " do they have in common?",
        "The share of mutual nearest neighbours between seeds, for every condition.",
        "The same share for dictionaries that start from equal weights, with nothing pruned and"
        " with no feature in common. It tells how much agreement the start alone makes.",
        figures=("fig1_seed_stability",),
        tables=("stability by run",),
        more=("stability",),
        needs=("stability",),
    ),
    Question(
        "survival",
        "RQ2: which features are found again after pruning?",
        "Of the features of the dense model, how many does an SAE of the pruned model also have?",
        "The SAEs of both models start from the same weights and see the data in the same order. So"
        " a latent that hardly moved from its start counts as one that survived.",
        "Corrected: 0 is what a shared start shows where no feature is shared, 1 what it shows"
        " where nothing was pruned. Persistence needs no second SAE: the dense SAE reads the"
        " activations of both models on the same tokens. Beside it stands noise of the same size:"
        " pruning moves and scales all activations alike (common_change), which harms no feature"
        " and is kept; the rest of a token's change is another token's. The ratio of the two is"
        " 1 where pruning does what noise does; on the null, a further draw of that noise in the"
        " place of the pruned activations, it is 1 but for chance.",
        figures=("fig2_survival",),
        tables=("survival by run",),
        more=("survival_corrected", "common_change", "persistence"),
        needs=("survival", "persistence"),
    ),
    Question(
        "identity",
        "Is it the same feature? Other ways to ask",
        "A direction that is found again need not mean that the feature is, nor the reverse.",
        "Decoder directions alone: the mutual nearest neighbour at a cosine of 0.7.",
        "By activations: do two latents fire alike on the same tokens, wherever they point? A"
        " rotated feature counts as the same here; null: the pruned SAE reads noise in the place of"
        " pruning's particular doing. Latent scaling: how many times its own size is"
        " a dense direction in pruned activations, by regression on paired tokens? A multiple of"
        " the direction, not a share: a gain common to all activations raises every latent's, so"
        " read one latent's beside the null's, where that gain is all there is. 0 is expected of"
        " unpaired tokens. Subspace overlap: does the direction lie in the span"
        " of its four nearest in the pruned SAE, as that of a split feature would? Among many"
        " directions chance alone finds much of it there. Warm start: the dense SAE trained on with"
        " pruned activations, between the same on dense ones and on a rotated space.",
        figures=("fig8_identity",),
        tables=("identity by run", "warm start by run"),
        more=("activation_matching", "scaling", "subspace"),
    ),
    Question(
        "transfer",
        "RQ3: can SAEs of the dense model still be used?",
        "An SAE that was trained on the dense model reads activations of the pruned one.",
        "FVU over all positions. One position with a huge norm can decide it, and a variance that"
        " shrinks or grows moves it. The paper's numbers are of the official SAEs.",
        "Filtered, that is without the first position and unusual norms: how many times the dense"
        " model's the error is, over the dense variance and over the pruned model's own, and how"
        " much less of the cross-entropy the model recovers from the reconstruction; each with its"
        f" interval, on the same tokens of both models. The verdict: {TRANSFER_RULE}. Beside it"
        " what noise of equal size does; where that gets the same verdict, because says so.",
        figures=("fig3_transfer",),
        tables=("table2_transfer",),
        more=("transfer",),
        needs=("transfer",),
    ),
    Question(
        "fragility",
        "RQ4: are rare latents harmed less than frequent ones?",
        "The living latents of the dense SAE are sorted by firing rate into five groups.",
        "Survival by group, with a shared start. Rare latents are trained least and stay nearest to"
        " their start, which this measure counts as survival.",
        "Persistence by group, and its mean as a share of what noise of equal size leaves: noise"
        " alone lowers the correlation of a rare latent more than that of a frequent one. Dotted,"
        " the same on the null, where firing rate changes nothing: what is seen there too says"
        " nothing of pruning. Rank correlations over single latents with intervals, also given each"
        " latent's distance from its start.",
        figures=("fig4_fragility", "fig5_fragility_by_method"),
        tables=("table3_fragility",),
        more=("fragility_contrasts", "fragility_tests", "fragility"),
        needs=("fragility",),
    ),
    Question(
        "predictor",
        "Predictor: can the fate of a latent be told before pruning?",
        "A logistic model of the logarithm of the firing rate and of the sparsity.",
        "Judged on the data that it was fitted to, with survival under a shared start as the truth."
        " The paper pools its three models.",
        "Judged on conditions and models that it has not seen; the truth is who persists better"
        " than under noise, even odds for every latent where nothing is there (source: null)."
        " Beside it what the distance from the start alone predicts; gain is what is left beyond.",
        tables=("predictor at 0.7",),
        more=("predictor", "predictor_calibration"),
        needs=("predictor",),
    ),
    Question(
        "causal",
        "RQ5: does the model rely on what survives?",
        "One latent at a time is taken out; how far does the model's output move?",
        "The latent is zeroed in the SAE's reconstruction and the output compared with the"
        " original's. The shaded part is the SAE's own error, which is there without ablation.",
        "Isolated: the reconstruction with against without the latent. Error-preserving: the latent"
        " is subtracted from the model's own activation. Both are read where the latent fires,"
        " beside robust latents of the same firing rate, random latents and random directions. The"
        " latents of a group are a sample, as the documents are: intervals resample both, over all"
        " seeds, and are left out where a group has too few of either. A group whose largest latent"
        " holds more than a third of its mean says so.",
        figures=("fig6_causal",),
        tables=("table4_causal",),
        more=("causal",),
        needs=("causal",),
    ),
    Question(
        "depth",
        "Over depth, and emerging features",
        "What each layer shows, as means. Emerging: the share of the pruned SAE's features that no"
        " dense feature matches.",
        "",
        "",
        tables=("depth",),
    ),
    Question(
        "quality",
        "Quality of the SAEs",
        "Means over seeds. fvu_dense_var divides by the variance of the dense activations, which"
        " pruning cannot change.",
        "",
        "",
        tables=("tableB1_quality",),
        more=("sae_training", "sinks"),
        needs=("sae_quality",),
    ),
)

CAPTIONS = {
    "table1_perplexity": "Table 1: perplexity",
    "table2_transfer": "Table 2: SAEs of the dense model",
    "table3_fragility": "Table 3: survival of the rarest and the most frequent fifth, tau 0.7",
    "table4_causal": "Table 4: mean KL (nats) when one latent is ablated",
    "tableA1_matrix": "Table A.1: the runs of this study",
    "tableB1_quality": "Table B.1: reconstruction",
    "depth": "The questions over layers",
    "stability by run": "Seed stability at tau 0.7, means over pairs of seeds",
    "survival by run": "Survival at tau 0.7 and persistence, means",
    "identity by run": "Other measures of identity: rates at tau 0.7, and means",
    "warm start by run": "SAEs trained on from the dense ones, at tau 0.7; fvu in raw space",
    "training by run": "Verdict on the SAEs of every run",
    "selftest independent": "Grades where fates do not depend on firing rate",
    "selftest by_rate": "Grades where rare features are destroyed more often",
    "selftest none": "Grades where nothing happened to any feature",
    "selftest null": "What is found where nothing is, by measures that decide claims",
    "coverage": "Intervals and verdicts by simulation: how often they are right, and wrong",
    "selftest by step": "False survival by a shared start, by training step",
    "predictor at 0.7": "Predictor by evaluation; tau 0.7, or none for persistence",
    "stability": "Every pair of seeds",
    "survival_corrected": "Corrected survival",
    "common_change": "What pruning did to all activations alike, and the share of the rest",
    "persistence": "Persistence of every seed",
    "transfer": "Every SAE, set of positions and refit",
    "fragility_contrasts": "Groups of latents and their differences, with intervals",
    "fragility_tests": "Rank correlations of firing rate and fate",
    "fragility": "Survival by fifth",
    "predictor": "Every predictor",
    "predictor_calibration": "Calibration",
    "causal": "Every group and protocol",
    "sae_training": "Every SAE",
    "sinks": "Tokens left out for their dense norm, and sinks of one condition alone",
    "activation_matching": "Matching by activations, every pair",
    "scaling": "Latent scaling of every seed",
    "subspace": "Subspace overlap of every pair",
    "training_curves": "Every SAE that was judged",
    "survival_by_step": "Survival by training step, every pair",
    "selftest": "Every grade",
    "selftest_null": "What every measure finds where nothing is",
}

ASSUMED = {  # of the paper, or where we differ; the whole list is in docs/methods.md
    "table1_perplexity": "Left open by the paper: whether windows open with the BOS (its dense"
    " numbers of Gemma look as if they did not), and whether global magnitude takes weights of the"
    " output head, with the embedding that is tied to it (runs named -head) or not.",
    "table2_transfer": "The paper does not say in which space its FVU is. Official SAEs read raw"
    " activations, so its numbers are set beside fvu_raw; fvu divides errors and variance by the"
    " dense deviations.",
    "table3_fragility": "By the first seed, as the paper compares conditions by its seed 0; mean_*"
    " and all that follows: over seeds. Alive is read as firing at least once on the eval tokens.",
    "table4_causal": "The paper does not say which prompts it took, nor whether latents could"
    " be dead: here windows of the eval documents, and alive latents only.",
    "tableB1_quality": "fvu is in the normalised space that the SAEs are trained in, fvu_raw in"
    " that of the activations; the paper does not say which it prints. Optimiser, unit norm of"
    " decoder rows and the way dead latents restart are assumed too.",
    "survival by run": "The paper's numbers are set beside those of the first seed: it compares"
    " conditions by its seed 0.",
    "predictor at 0.7": "The paper's accuracies are 66, 73 and 79 of 95 = 19 conditions x 5"
    " quintiles, so its numbers are set beside target quintile, a row per condition and quintile.",
}
