"""Which of my features survive Wanda pruning at 50 %?

A study of survival, persistence, and of the text on which each latent fires. Every number stands
beside the control that could falsify it; then come the latents that pruning harmed most, with text
that they fire on. About 30 s of one CPU core; writes runs/example_1.
"""

import pathlib

import pandas as pd

import prunelens as pl

MODEL, LAYER = "bundled", 2  # or a hub id or a folder, and one of its layers
OUT = pathlib.Path("runs/example_1")
SEED = 0


def main() -> None:
    """Run what is missing of the study, and read its answer."""
    # With a model of your own delete `corpus`, `sae` and `perplexity`: what a study leaves out has
    # the size of the published one. `prunelens plan` says beforehand how long that takes.
    study = {
        "models": [{"name": MODEL, "layers": [LAYER]}],
        "prunings": [{"criterion": "wanda", "scope": "row", "sparsities": [0.5]}],
        "questions": ["survival", "persistence", "evidence"],
        "corpus": {"train_tokens": 40_000, "eval_tokens": 12_000, "calibration_tokens": 10_000},
        "sae": {"expansion": 4, "k": 8, "steps": 120, "batch_tokens": 512, "learning_rate": 4e-3,
                "seeds": [SEED, 1]},
        "perplexity": {"context_tokens": [256], "max_tokens": 5_000},
        "threads_per_stage": 1,
    }  # fmt: skip
    pl.run_and_report(pl.study_from_data(study), OUT, quiet=True)
    tell_rates(OUT / "tables")
    tell_most_harmed(pd.read_parquet(OUT / "latents.parquet").query("seed == @SEED"))
    print(f"\nThe whole answer: {OUT / 'report.html'}; every latent: prunelens view {OUT}")


def tell_rates(tables: pathlib.Path) -> None:
    """Survival between its controls, and persistence beside noise of equal size."""
    rows = pd.read_csv(tables / "survival.csv")
    rows = rows.query("tau == 0.7 and coordinates == 'normalised'")
    rate = rows.groupby("arm")["mnn"].mean()
    print(f"survival, as published (both SAEs share a start): {rate['shared_init']:.3f}")
    print(f"  the same start, nothing pruned:                 {rate['ceiling_shared']:.3f}")
    print(f"  the same start, no feature in common:           {rate['floor_shared']:.3f}")
    kept = pd.read_csv(tables / "persistence.csv").groupby("source")["mean_correlation"].mean()
    print(f"persistence (the dense SAE before and after):     {kept['pruned']:.3f}")
    print(f"  noise of equal size leaves:                     {kept['noise_shuffled']:.3f}")


def tell_most_harmed(latents: pd.DataFrame) -> None:
    """The dense SAE's latents that kept the smallest share of what noise of equal size leaves."""
    dense = latents.query("method == 'dense'").set_index("latent")
    pruned = latents.query("method == 'wanda'").set_index("latent")
    share = pruned["persistence"] / pruned["persistence_noise_shuffled"]
    frequent = share[dense["firing_rate"] > 0.005]  # of rare ones a few tokens would decide
    contexts = pl.study_contexts(OUT, under=pruned["run"].iloc[0])
    strongest = contexts.query("kind == 'top' and rank == 0").set_index("latent")
    print(f"\nMost harmed of the {len(frequent)} latents that fire on more than 0.5 % of tokens:")
    for latent in frequent.nsmallest(5).index:
        kept, noise = pruned.loc[latent, ["persistence", "persistence_noise_shuffled"]]
        context, rate = strongest.loc[latent], dense["firing_rate"][latent]
        middle = len(context["tokens"]) // 2  # where it fires; the token is set between » and «
        before, after = context["tokens"][:middle], context["tokens"][middle + 1 :]
        text = "".join([*before, "»", context["tokens"][middle], "«", *after])
        fires, left = context["activation"], context["activations_under"][middle]
        print(f"latent {latent}: persistence {kept:.2f}, noise {noise:.2f}; fires on {rate:.1%}")
        print(f"    {text!r}\n    activation there {fires:.1f}, after pruning {left:.1f}")


if __name__ == "__main__":
    main()
