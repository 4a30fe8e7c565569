"""`export`: SAEs and pruned models in other people's files, and on the hub."""

from __future__ import annotations

import pathlib
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prunelens.cli.options import AsJson, Remembered
from prunelens.cli.printing import print_json
from prunelens.errors import UserError
from prunelens.terminal import say

if TYPE_CHECKING:
    from prunelens.cards import Sharing

FORMATS = ("saelens", "sparsify", "hub", "checkpoint")
FOR_THE_HUB = ("hub", "checkpoint")

License = Annotated[
    str | None, typer.Option(help="For the card, as the hub names it: apache-2.0, mit, …")
]
Push = Annotated[
    str | None, typer.Option(metavar="USER/REPO", help="Upload the folder to the hub as well.")
]
Private = Annotated[bool, typer.Option("--private", help="With --push: a private repository.")]


def export(
    source: Annotated[
        pathlib.Path,
        typer.Argument(
            metavar="SAE", help="Folder of an SAE of ours, runs/demo:dense:0, or a study's."
        ),
    ],
    file_format: Annotated[
        str,
        typer.Option("--format", help="saelens, sparsify, hub or checkpoint (a study's model)"),
    ],
    out: Annotated[pathlib.Path, typer.Option("--out", help="A new folder for its files.")],
    model: Annotated[
        str | None, typer.Option(help="The dense model's name on the hub, to be noted.")
    ] = None,
    condition: Annotated[
        str | None, typer.Option(help="For checkpoint: which pruning, e.g. wanda-row-0.50.")
    ] = None,
    license: License = None,
    push: Push = None,
    private: Private = False,
    artifacts: Remembered = None,
    as_json: AsJson = False,
) -> None:
    """Write an SAE for SAELens or sparsify, or SAEs or a pruned model for the Hugging Face hub."""
    from prunelens.study.artifacts.disk import stopped_by_disk

    _check(file_format, condition, {"--license": license, "--push": push, "--artifacts": artifacts})
    sharing = checked_sharing(license, push, private, model)
    with stopped_by_disk(out.parent):
        told = _write(source, file_format, out, condition, sharing, artifacts)
    address = push_if_asked(out, push, private)
    if as_json:
        shown = {"out": str(out), "format": file_format, **told}
        print_json({**shown, "pushed": address} if file_format in FOR_THE_HUB else shown)
        return
    say(_in_words(file_format, told, out))
    tell_pushed(address)


def checked_sharing(
    license: str | None, push: str | None, private: bool, base_model: str | None = None
) -> Sharing:
    """What cards say of license and repository; refuses early what cannot be uploaded."""
    from prunelens.cards import Sharing
    from prunelens.hub import check_push

    if push is not None:
        check_push(push)
    elif private:
        raise UserError("--private: it is about --push USER/REPO; give that too, or leave it out")
    return Sharing(license, push, base_model)


def push_if_asked(folder: pathlib.Path, push: str | None, private: bool) -> str | None:
    """Upload a finished folder; the repository's address."""
    if push is None:
        return None
    from prunelens.hub import push_folder

    try:
        return push_folder(folder, push, private=private)
    except UserError as error:
        raise UserError(f"{error} (the files are in {folder})") from None


def tell_pushed(address: str | None) -> None:
    """Say where the files went."""
    if address is not None:
        say(f"uploaded to {address}")


def _check(file_format: str, condition: str | None, for_the_hub: dict[str, str | None]) -> None:
    if file_format not in FORMATS:
        raise UserError(
            f"--format: {file_format!r} is none of {', '.join(FORMATS)}; give one of them"
        )
    if file_format == "checkpoint" and condition is None:
        raise UserError(
            "--condition: a checkpoint is of one pruning; give its label, e.g. wanda-row-0.50"
        )
    if file_format != "checkpoint" and condition is not None:
        raise UserError("--condition: it goes with --format checkpoint; leave it out")
    for option, value in for_the_hub.items():
        if value is not None and file_format not in FOR_THE_HUB:
            raise UserError(f"{option}: it goes with --format hub or checkpoint; leave it out")


def _write(
    source: pathlib.Path,
    file_format: str,
    out: pathlib.Path,
    condition: str | None,
    sharing: Sharing,
    artifacts: str | None,
) -> dict[str, Any]:
    """Write the files; what to tell of them."""
    if file_format == "checkpoint":
        from prunelens.study.exports import export_checkpoint

        assert condition is not None
        checkpoint = export_checkpoint(source, condition, out, sharing=sharing, artifacts=artifacts)
        record = checkpoint.record
        return {
            "condition": checkpoint.condition,
            "achieved_sparsity": record.achieved_sparsity,
            "masks_sha256": record.masks_sha256,
        }
    if file_format == "hub":
        from prunelens.study.exports import export_hub

        return {"saes": list(export_hub(source, out, sharing=sharing, artifacts=artifacts).saes)}
    from prunelens.sae.exchange.export import export_format, export_sae
    from prunelens.study.finished import sae_place

    exported = export_sae(
        sae_place(source), out, format=export_format(file_format), model=sharing.base_model
    )
    return {"hook": exported.hook}


def _in_words(file_format: str, told: dict[str, Any], out: pathlib.Path) -> str:
    if file_format == "checkpoint":
        achieved = told["achieved_sparsity"]
        return f"{told['condition']}, achieved sparsity {achieved:.4f}; checkpoint saved in {out}"
    if file_format == "hub":
        num = len(told["saes"])
        return f"{num} SAE{'s' if num > 1 else ''} with a card for the hub saved in {out}"
    hook = told["hook"]
    place = f", for {hook}" if hook else "; its files do not say for which place"
    return f"{file_format} SAE saved in {out}{place}"
