"""May I keep my pretrained SAE when its model is pruned?

`transfer_sae` reads the pruned model's activations with the SAE as it is, then refitted, and says
keep, refit or retrain. Needs `pip install 'prunelens[saelens]'`. Nobody has published an SAE of the
bundled model, so one is trained and written as SAELens would save it, in place of a pretrained one.
About 30 s of one CPU core; writes runs/example_2.
"""

import pathlib

import pandas as pd

import prunelens as pl

MODEL, LAYER = "bundled", 2  # for example "google/gemma-2-2b", 12
SAE = None  # and "gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical", or a folder
OUT = pathlib.Path("runs/example_2")
PRUNINGS = (
    pl.PruningConfig(criterion="wanda", scope="row", sparsity=0.3),
    pl.PruningConfig(criterion="magnitude", scope="global", sparsity=0.5),
)
TEXT = pl.CorpusConfig(train_tokens=40_960, eval_tokens=10_240, calibration_tokens=10_240)
SIZES = pl.TransferConfig(ce_tokens=2_048, refit_tokens=5_120)  # small; without it, the defaults


def main() -> None:
    """Try the SAE under each pruning."""
    sae = SAE or str(stand_in(OUT / "saelens"))
    model = pl.ModelConfig(name=MODEL, layers=(LAYER,))
    for pruning in PRUNINGS:
        table = pl.transfer_sae(sae, model, TEXT, layer=LAYER, pruning=pruning, sizes=SIZES)
        tell(table.query("positions == 'norm_filtered'"), pruning.label)


def stand_in(folder: pathlib.Path) -> pathlib.Path:
    """Train an SAE on the dense model and write it in SAELens' format."""
    if folder.exists():
        return folder
    study = {
        "models": [{"name": MODEL, "layers": [LAYER]}],
        "questions": ["persistence"],  # nothing is pruned: the dense SAE is all that is made
        "corpus": TEXT.model_dump(),
        "sae": {"expansion": 4, "k": 8, "steps": 150, "batch_tokens": 512, "learning_rate": 4e-3,
                "seeds": [0]},
        "perplexity": {"context_tokens": [256], "max_tokens": 5_000},
        "threads_per_stage": 1,
    }  # fmt: skip
    made = OUT / "study"
    pl.run_and_report(pl.study_from_data(study), made, quiet=True)
    trained = pd.read_csv(made / "tables" / "sae_training.csv")
    return pl.export_sae(made / trained["folder"][0], folder, format="saelens", model=MODEL).folder


def tell(rows: pd.DataFrame, label: str) -> None:
    """The two numbers that the verdict rests on, dense beside pruned."""
    print(f"\n{label}: {next(word for word in rows['verdict'] if word)}")
    print("  condition              refit      error / dense variance  cross-entropy recovered")
    for row in rows.itertuples():
        numbers = f"{row.fvu_dense_var:<23.3f} {row.ce_recovered:.3f}"
        print(f"  {row.condition:<22} {row.refit:<10} {numbers}")


if __name__ == "__main__":
    main()
