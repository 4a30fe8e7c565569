"""A model as a Hugging Face checkpoint on disk."""

from __future__ import annotations

import pathlib
import tempfile

from prunelens.checkpoint import without_progress_bars
from prunelens.errors import UserError
from prunelens.model import LanguageModel


def save_checkpoint(lm: LanguageModel, folder: pathlib.Path) -> None:
    """Write model (safetensors) and tokenizer so that `AutoModelForCausalLM` loads them.

    They are written beside `folder` and renamed, so `folder` is whole or not there. Zeroed weights
    are stored as zeros: the files are as large as the dense model's.
    Raises: UserError where `folder` exists and is not an empty folder.
    """
    check_target(folder)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        partial = pathlib.Path(scratch) / folder.name
        with without_progress_bars():
            lm.model.save_pretrained(partial)
        if lm.tokenizer is not None:
            lm.tokenizer.save_pretrained(partial)
        partial.replace(folder)


def check_target(folder: pathlib.Path) -> None:
    """Make room for `folder`. Raises UserError where it is not empty or cannot be written."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"out: {str(folder)!r} exists and is not an empty folder; name a new one")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder.parent).close()
    except OSError as error:
        why = f"cannot write to {str(folder)!r} ({error.strerror})"
        raise UserError(f"out: {why}; name a folder that you can write to") from None
