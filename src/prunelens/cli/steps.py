"""Commands about single steps: prune, match, transfer."""

from __future__ import annotations

import pathlib
from typing import Annotated

import typer

from prunelens.cli.export import (
    License,
    Private,
    Push,
    checked_sharing,
    push_if_asked,
    tell_pushed,
)
from prunelens.cli.options import (
    AsJson,
    Criterion,
    Device,
    Dtype,
    Pattern,
    RandomSeed,
    Scope,
    Site,
    Sparsity,
    single_step,
)
from prunelens.cli.printing import (
    print_json,
    print_table,
    progress_bar,
    records,
    say_whole,
    with_intervals,
)
from prunelens.terminal import say

TEXT = {  # of `transfer`: enough for its sums, and there in any corpus
    "train_tokens": 50_000,
    "eval_tokens": 50_000,
    "calibration_tokens": 50_000,
}

MEANING = {  # of a verdict that is reached
    "keep": "on the pruned model the SAE passes as it is",
    "refit": "on the pruned model the SAE fails as it is, and passes after refitting",
    "retrain": "on the pruned model the SAE fails, refitted or not",
}


def prune(
    model: Annotated[str, typer.Argument(help="bundled, a hub id or a local folder.")],
    out: Annotated[pathlib.Path, typer.Option("--out", help="Folder of the new checkpoint.")],
    criterion: Criterion = "wanda",
    scope: Scope = None,
    sparsity: Sparsity = 0.5,
    pattern: Pattern = "unstructured",
    calibration: Annotated[
        str | None, typer.Option(help="wanda's norms: dense or sequential; default dense")
    ] = None,
    random_seed: RandomSeed = None,
    lm_head: Annotated[
        bool,
        typer.Option(
            "--lm-head",
            help="magnitude, random: the output head too, with the embedding that is tied to it.",
        ),
    ] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", help="Calibration text: corpus.source=files …; models.0.short_name=NAME"
        ),
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="What the model runs in and the files hold: float32, bfloat16 or float16. Default:"
            " float32, and files in the checkpoint's own."
        ),
    ] = None,
    block_by_block: Annotated[
        bool,
        typer.Option(
            "--block-by-block",
            help="Never load the whole model: calibrate and prune one block of it after the other,"
            " in the new files.",
        ),
    ] = False,
    license: License = None,
    push: Push = None,
    private: Private = False,
    as_json: AsJson = False,
) -> None:
    """Prune a model and save it as a Hugging Face checkpoint, with its card and masks."""
    from prunelens.prune.masks import masks_sha256
    from prunelens.study.artifacts.disk import stopped_by_disk
    from prunelens.study.single import prune_checkpoint

    sharing = checked_sharing(license, push, private)
    study, pruning = single_step(
        model,
        dtype,
        criterion,
        scope,
        sparsity,
        calibration,
        settings,
        pattern=pattern,
        random_seed=random_seed,
        lm_head=lm_head,
    )
    with stopped_by_disk(out.parent):
        pruned = prune_checkpoint(
            study.models[0],
            pruning,
            study.corpus,
            out,
            device,
            sharing=sharing,
            block_by_block=block_by_block,
        )
    address = push_if_asked(out, push, private)
    if as_json:
        told = {"out": str(out), "achieved_sparsity": pruned.achieved_sparsity}
        print_json({**told, "masks_sha256": masks_sha256(pruned.masks), "pushed": address})
    else:
        say(f"achieved sparsity {pruned.achieved_sparsity:.4f}; checkpoint saved in {out}")
        tell_pushed(address)


def match(
    sae_a: Annotated[
        str, typer.Argument(metavar="SAE_A", help="A folder, or runs/demo:dense:0; or a study's.")
    ],
    sae_b: Annotated[
        str | None,
        typer.Argument(metavar="SAE_B", help="Likewise; left out, a study's SAEs are listed."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Match the features of two SAEs: one-way, mutual and greedy rates at every tau."""
    if sae_b is None:
        _list_saes(sae_a, as_json)
        return
    from prunelens.study.finished import match_saes

    rates = match_saes(sae_a, sae_b)
    if as_json:
        print_json([row._asdict() for row in rates])
        return
    names = ("one-way", "MNN", "greedy", "one-way, B to A")
    print_table(
        "Share of the features of A that are found in B, by threshold tau on the cosine",
        [
            {"tau": row.tau, **{n: f"{rate:.4f}" for n, rate in zip(names, row[1:], strict=True)}}
            for row in rates
        ],
    )


def _list_saes(study: str, as_json: bool) -> None:
    from prunelens.study.finished import Study

    saes = {f"{study}:{name}": str(folder) for name, folder in Study(study).saes().items()}
    if as_json:
        print_json(saes)
        return
    rows = [{"SAE": name, "folder": folder} for name, folder in saes.items()]
    print_table(f"{study}: {len(rows)} SAEs; match two of them", rows)


def transfer(
    sae: Annotated[
        str,
        typer.Argument(metavar="SAE", help="A folder, RELEASE:SAE_ID, or runs/demo:dense:0."),
    ],
    model: Annotated[str, typer.Argument(help="bundled, a hub id or a local folder.")],
    layer: Annotated[int | None, typer.Option(help="Decoder block that the SAE is for.")] = None,
    site: Site = "resid_post",
    criterion: Criterion = "wanda",
    scope: Scope = None,
    sparsity: Sparsity = 0.5,
    pattern: Pattern = "unstructured",
    random_seed: RandomSeed = None,
    pruned: Annotated[
        str | None, typer.Option(help="A compressed checkpoint to test instead of pruning.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="corpus.source=files, transfer.ce_tokens=64 …"),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    as_json: AsJson = False,
) -> None:
    """May a dense model's SAE still be used after pruning? keep, refit, retrain or undecided."""
    from prunelens.analyses.verdict import LIMITS, TRANSFER_RULE
    from prunelens.study.single import transfer_sae

    study, pruning = single_step(
        model,
        dtype,
        criterion,
        scope,
        sparsity,
        None,
        settings,
        layer,
        site,
        TEXT,
        pattern=pattern,
        random_seed=random_seed,
    )
    with progress_bar("transfer", quiet=as_json) as progress:
        table = transfer_sae(
            sae,
            study.models[0],
            study.corpus,
            layer=layer,
            pruning=None if pruned else pruning,
            pruned=pruned,
            sizes=study.transfer,
            device=device,
            progress=progress,
        )
    if as_json:
        print_json({"rule": TRANSFER_RULE, "rows": records(table)})
        return
    answer = table[(table["positions"] == "norm_filtered") & (table["verdict"] != "")].iloc[0]
    say_whole(answer["reason"] or f"{answer['verdict']}: {MEANING[answer['verdict']]}", "bold")
    columns = ["condition", "positions", "refit", "verdict", "ce_recovered", *LIMITS]
    print_table(
        "The SAE on the dense and on the pruned model (believe norm_filtered)",
        with_intervals(table, LIMITS)[columns].to_dict("records"),
    )
    say_whole(f"The rule: {TRANSFER_RULE}")
