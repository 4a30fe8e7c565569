"""What every part of a study's description is: frozen, with documented fields."""

from __future__ import annotations

import pydantic


class Frozen(pydantic.BaseModel):
    """Data that cannot change and has no other keys."""

    model_config = pydantic.ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )
