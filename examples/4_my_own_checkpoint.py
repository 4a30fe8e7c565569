"""My own checkpoint, on my own text.

A folder that `save_pretrained` wrote is a model like any other, and text may come from local files
(.txt, .jsonl, .parquet). This asks what Wanda does to the latents of the dense SAE, and saves one
of the pruned models as a checkpoint. To have something to work on it makes both: a copy of the
bundled model, and a part of Python's standard library as text files. (The bundled model was trained
on the standard library; take text that your model has not seen.)
About 30 s of one CPU core; writes runs/example_4.
"""

import json
import pathlib

import pandas as pd

import prunelens as pl

OUT = pathlib.Path("runs/example_4")
CHECKPOINT, LAYER = OUT / "my_model", 2
TEXT = OUT / "text" / "*.txt"  # one document per file; or per line, heading, …: see docs/study.md


def main() -> None:
    """Plan, run and read a study of the checkpoint, then save one of its pruned models."""
    make_something_to_work_on()
    study = pl.study_from_data(
        {
            "models": [{"name": str(CHECKPOINT), "layers": [LAYER]}],
            # Ready-made token ids: {"source": "tokens", "paths": ["ids.safetensors"]}, a tensor
            # `tokens` [windows, context_tokens].
            "corpus": {"source": "files", "paths": [str(TEXT)], "document": "file",
                       "train_tokens": 40_000, "eval_tokens": 12_000, "calibration_tokens": 10_000},
            "prunings": [{"criterion": "wanda", "scope": "row", "sparsities": [0.3, 0.5]}],
            "questions": ["persistence"],
            "sae": {"expansion": 4, "k": 8, "steps": 120, "batch_tokens": 512,
                    "learning_rate": 4e-3, "seeds": [0]},
            "perplexity": {"context_tokens": [256], "max_tokens": 5_000},
            "threads_per_stage": 1,
        }
    )  # fmt: skip
    plan = pl.preflight(study, calibration_seconds=0.0)  # above 0 it times the device: hours
    print(f"planned: {len(plan.runs)} runs, {plan.disk['peak_gigabytes']:.2f} GB on disk at most")
    pl.run_and_report(study, OUT / "study", quiet=True)
    tell(OUT / "study" / "tables")
    pruned = OUT / "my_model_pruned"
    if not pruned.exists():
        pl.export_checkpoint(OUT / "study", "wanda-row-0.30", pruned)
    print(f"\nWanda 30 % as a checkpoint that transformers loads, with its card: {pruned}")


def make_something_to_work_on() -> None:
    """A checkpoint and text as a user has them."""
    if not CHECKPOINT.exists():
        pl.save_checkpoint(pl.load_model("bundled"), CHECKPOINT)
    TEXT.parent.mkdir(parents=True, exist_ok=True)
    library = pathlib.Path(json.__file__).parents[1]
    for source in library.glob("[a-m]*.py"):
        text = source.read_text(encoding="utf-8", errors="replace")
        (TEXT.parent / f"{source.stem}.txt").write_text(text, encoding="utf-8")


def tell(tables: pathlib.Path) -> None:
    """What each pruning did to the model, and to the latents of the dense SAE."""
    perplexity = pd.read_csv(tables / "perplexity.csv").query("context_tokens == 256")
    perplexity = perplexity.set_index("run")["perplexity"]
    rows = pd.read_csv(tables / "persistence.csv")
    kept = rows.pivot_table(index="run", columns="source", values="mean_correlation")
    print(f"perplexity of the dense model: {perplexity.iloc[0]:.1f}\n")
    print("run                             perplexity  persistence  noise of equal size leaves")
    for run, row in kept.iterrows():
        print(
            f"{run:<31} {perplexity[run]:<11.1f} {row['pruned']:<12.3f} {row['noise_shuffled']:.3f}"
        )


if __name__ == "__main__":
    main()
