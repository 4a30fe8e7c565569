"""Screen the latents that a safety case rests on, before the model is pruned.

A small sweep of prunings fits a predictor (firing rate and sparsity) and measures persistence. Both
are printed for a list of latents, beside other latents that fire as often: one that suffers like
those suffers for being rare, not for what it is about. About 50 s of one CPU core; writes
runs/example_3.
"""

import pathlib

import pandas as pd

import prunelens as pl

MODEL, LAYER = "bundled", 2
WATCHED: list[int] = []  # your latents; without any, those whose strongest contexts match this:
ABOUT = r"eval|exec|subprocess|popen|password|token|permission"  # the bundled model reads Python
SPARSITIES = (0.2, 0.4, 0.6)  # measured
ALSO = (0.5,)  # predicted alone
KEPT = 0.7  # the persistence above which a latent counts as kept, as for the predictor
OUT = pathlib.Path("runs/example_3")
SEED = 0


def main() -> None:
    """Run what is missing of the sweep, and tell what becomes of the latents."""
    study = {
        "models": [{"name": MODEL, "layers": [LAYER]}],
        "prunings": [{"criterion": "wanda", "scope": "row", "sparsities": SPARSITIES}],
        "questions": ["survival", "persistence", "predictor", "evidence"],
        "corpus": {"train_tokens": 40_000, "eval_tokens": 12_000, "calibration_tokens": 10_000},
        "sae": {"expansion": 4, "k": 8, "steps": 120, "batch_tokens": 512, "learning_rate": 4e-3,
                "seeds": [SEED, 1]},
        "perplexity": {"context_tokens": [256], "max_tokens": 5_000},
        "taus": [0.7],
        "threads_per_stage": 1,
    }  # fmt: skip
    pl.run_and_report(pl.study_from_data(study), OUT, quiet=True)
    latents = pd.read_parquet(OUT / "latents.parquet").query("seed == @SEED")
    watched = WATCHED or latents_about(pl.study_contexts(OUT))
    others = as_frequent(latents.query("method == 'dense'"), watched)
    tell(latents, watched, others)


def latents_about(contexts: pd.DataFrame, count: int = 8) -> list[int]:
    """The latents of whose strongest contexts most match ABOUT."""
    text = contexts["tokens"].str.join("").str.lower()
    hits = contexts.assign(hit=text.str.contains(ABOUT)).query("kind == 'top'")
    return sorted(hits.groupby("latent")["hit"].mean().nlargest(count).index)


def as_frequent(dense: pd.DataFrame, watched: list[int], each: int = 5) -> list[int]:
    """For each watched latent the others whose firing rates are nearest to its own."""
    rates = dense.set_index("latent")["firing_rate"]
    others = rates.drop(watched)
    near = ((others - rates[latent]).abs().nsmallest(each).index for latent in watched)
    return sorted({latent for group in near for latent in group})


def tell(latents: pd.DataFrame, watched: list[int], others: list[int]) -> None:
    """What is predicted and what was seen, by sparsity."""
    print(f"watched: {watched}; {len(others)} others fire as often\n")
    print("sparsity  kept, predicted  kept, measured  of the others  lowest persistence")
    safe, lost = 0.0, False
    for sparsity in sorted(SPARSITIES + ALSO):
        chance = pl.predict_latents(OUT, sparsity=sparsity, latents=watched)["persistence"].mean()
        print(f"{sparsity:<9} {chance:<16.2f}", end=" ")
        if sparsity in ALSO:
            print("not pruned so far")
            continue
        seen = latents.query("sparsity == @sparsity").set_index("latent")["persistence"]
        seen = seen.dropna()  # undefined: fired on fewer than 10 of the tokens
        ours, theirs = seen[seen.index.isin(watched)], seen[seen.index.isin(others)]
        shares = f"{(ours > KEPT).mean():<15.2f} {(theirs > KEPT).mean():<14.2f}"
        print(f"{shares} {ours.min():.2f}, latent {ours.idxmin()}")
        lost |= not (ours > KEPT).all()
        safe = safe if lost else sparsity
    print(f"\nAll watched latents that fire often enough were kept up to a sparsity of {safe:g}.")


if __name__ == "__main__":
    main()
