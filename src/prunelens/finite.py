"""Where in a model numbers stop being finite: asked once something has gone wrong."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from prunelens.config import Site
from prunelens.errors import UserError
from prunelens.model import LanguageModel, run_to_sites


def where_not_finite(lm: LanguageModel, windows: Int[Tensor, "windows context"]) -> str:
    """The lowest decoder block whose output holds NaN or infinity on the first such window.

    In words: `block 3 is the first to give NaN`, or that it is none of the blocks.
    """
    places: list[tuple[Site, int]] = [("resid_post", block) for block in range(len(lm.blocks))]
    for window in windows.split(1):
        for (_, block), states in zip(places, run_to_sites(lm, window, places), strict=True):
            if not bool(states.isfinite().all()):
                what = "NaN" if bool(states.isnan().any()) else "infinity"
                return f"block {block} is the first to give {what}"
    return "what every block gives is finite; what came after or beside them is not"


def not_finite(lm: LanguageModel, windows: Int[Tensor, "windows context"], what: str) -> UserError:
    """The error for a model that gives NaN or infinity in `what`, e.g. `its logits`."""
    dtype = str(lm.model.dtype).removeprefix("torch.")
    return UserError(
        f"models: {lm.label} in {dtype} gives NaN or infinity in {what}:"
        f" {where_not_finite(lm, windows)}; set models.dtype to bfloat16 or float32, or mend the"
        " weights"
    )
