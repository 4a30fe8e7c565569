"""My own checkpoint, on my own text.

A folder that `save_pretrained` wrote is a model like any other, and text comes from local files.
This asks what Wanda does to its features, without training an SAE of the pruned model, and saves
a pruned checkpoint. About 40 s of one CPU core.

    python examples/4_my_own_checkpoint.py [--out FOLDER]
    python examples/4_my_own_checkpoint.py --checkpoint my_model --text 'notes/*.txt' --layer 8

Without arguments it makes both: a copy of the bundled model, and some modules of Python's standard
library as text files. (That model was trained on the standard library; use text that yours has not
seen.) Files may be .txt, .jsonl or .parquet. Token ids that you have already go in as
`{"source": "tokens", "paths": ["ids.safetensors"]}`, one tensor `tokens` [windows, context_tokens].
"""

import argparse
import json
import pathlib

import pandas as pd

import prunelens as pl


def main(checkpoint: pathlib.Path | None, text: str | None, layer: int, out: pathlib.Path) -> None:
    """Plan, run and read a study of the checkpoint, then save one of its pruned models."""
    checkpoint = checkpoint or some_checkpoint(out / "my_model")
    study = pl.study_from_data(
        {
            "models": [{"name": str(checkpoint), "layers": [layer]}],
            "corpus": {"source": "files", "paths": [text or some_text(out / "text")],
                       "document": "file", "context_tokens": 256, "train_tokens": 80_000,
                       "eval_tokens": 20_000, "calibration_tokens": 20_000},
            "prunings": [{"criterion": "wanda", "scope": "row", "sparsities": [0.3, 0.5]}],
            "sae": {"expansion": 4, "k": 8, "steps": 300, "batch_tokens": 512,
                    "learning_rate": 4e-3, "seeds": [0]},
            "questions": ["persistence"],
            "threads_per_stage": 1,
        }
    )  # fmt: skip
    plan = pl.preflight(study, calibration_seconds=0.0)
    print(f"planned: {len(plan.runs)} runs, {plan.disk['peak_gigabytes']:.2f} GB on disk at most")
    pl.run_and_report(study, out / "study", quiet=True)
    tell(out / "study" / "tables")
    pruned = out / "my_model_pruned"
    if not pruned.exists():
        pl.export_checkpoint(out / "study", "wanda-row-0.30", pruned)
    print(f"\nWanda 30 % as a checkpoint that transformers loads, with its masks: {pruned}")


def tell(tables: pathlib.Path) -> None:
    """What each pruning did to the model, and to the latents of the dense SAE."""
    perplexity = pd.read_csv(tables / "perplexity.csv").query("context_tokens == 256")
    kept = pd.read_csv(tables / "persistence.csv")
    by_source = kept.pivot_table(index="run", columns="source", values="mean_correlation")
    print("run                              perplexity   persistence   noise of equal size leaves")
    for run, value in zip(perplexity["run"], perplexity["perplexity"], strict=True):
        cells = "(the reference)"
        if run in by_source.index:
            row = by_source.loc[run]
            cells = f"{row['pruned']:<13.3f} {row['noise_shuffled']:.3f}"
        print(f"{run:<32} {value:<12.1f} {cells}")


def some_checkpoint(folder: pathlib.Path) -> pathlib.Path:
    """A checkpoint as a user has one: config, tokenizer, safetensors."""
    if not folder.exists():
        pl.save_checkpoint(pl.load_model("bundled"), folder)
    return folder


def some_text(folder: pathlib.Path) -> str:
    """Text files, one document each; returns the pattern that finds them."""
    folder.mkdir(parents=True, exist_ok=True)
    library = pathlib.Path(json.__file__).parents[1]
    for source in [*library.glob("[a-m]*.py"), *library.glob("asyncio/*.py")]:
        name = f"{source.parent.name}_{source.stem}.txt"
        (folder / name).write_text(source.read_text(encoding="utf-8", errors="replace"), "utf-8")
    return str(folder / "*.txt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=pathlib.Path, help="a folder; default: a copy is made")
    parser.add_argument("--text", help="files, globs allowed; default: some are made")
    parser.add_argument("--layer", type=int, default=2)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("runs/example_4"))
    main(**vars(parser.parse_args()))
