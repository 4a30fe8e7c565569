"""Which model, where to look at it, and whose SAEs to try on it."""

from __future__ import annotations

from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from prunelens.config.frozen import Frozen
from prunelens.config.names import Place, last_part, refuse_as_name

Site = Literal["resid_post", "mlp_out", "attn_out"]
Memory: TypeAlias = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(K|M|G)(iB|B)$")]  # 20GiB, 500MB
PLANTED = "planted"  # the name of the self-test's world, as a model and as a criterion


class PretrainedSaeConfig(Frozen):
    """An SAE that someone else trained on the dense model, to be tried on the pruned ones (RQ3)."""

    layer: int = Field(ge=0)
    """The decoder block at whose site it was trained; one of the model's `layers`."""
    release: Place | None = None
    """A release that SAELens knows, e.g. gemma-scope-2b-pt-res-canonical."""
    sae_id: Place | None = None
    """The SAE's id within the release, e.g. layer_12/width_16k/canonical."""
    folder: Place | None = None
    """A local folder instead: one that prunelens, SAELens or sparsify saved."""
    name: str | None = Field(None, min_length=1)
    """What tables call it; null: `release/sae_id`, or the folder's last part."""
    nominal_l0: float | None = Field(None, gt=0)
    """The L0 that its makers state; null: as the release, or the SAE's own k, says."""

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.folder is None) == (self.release is None):
            raise ValueError("release: give either release and sae_id, or folder")
        if self.release is not None and self.sae_id is None:
            raise ValueError(f"sae_id: release {self.release!r} needs the SAE's id within it")
        refuse_as_name(self.label, field="name", fix="give a name")
        return self

    @property
    def label(self) -> str:
        """As in tables."""
        if self.name is not None:
            return self.name
        if self.folder is not None:
            return last_part(self.folder)
        return f"{self.release}/{self.sae_id}"


class ModelConfig(Frozen):
    """A Hugging Face causal language model and where to look at it."""

    name: Place = "bundled"
    """`bundled` (the small model that ships with prunelens), a hub id, or a local folder.

    `planted` is no model but the self-test's world with known truth (methods §9).
    """
    revision: Place | None = None
    """A hub commit, branch or tag; null means the default branch."""
    short_name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """What run names and tables call it; null: the last part of `name`; of `.`, its folder."""
    layers: tuple[int, ...] = Field((3,), min_length=1)
    """Decoder blocks to look at, counted from 0."""
    site: Site = "resid_post"
    """Where in the block: its output, its MLP's output or its attention's output."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The precision that the model runs in."""
    device_map: Literal["auto"] | None = None
    """`auto` spreads a model over devices through accelerate; null puts it on one."""
    max_memory: dict[str, Memory] | None = None
    """With `device_map: auto`: how much of it each place takes, as {0: 20GiB, cpu: 60GiB}.

    Keys are GPU numbers and `cpu`; a place that is not named takes nothing, what is left over stays
    on disk. null: what is free.
    """
    offload_folder: str | None = None
    """With `device_map: auto`: where weights that prunelens changes wait on disk.

    null: the system's temporary folder. They are gone with the process.
    """
    pretrained: tuple[PretrainedSaeConfig, ...] = ()
    """SAEs of others whose transfer to the pruned models is measured beside that of our own."""

    @field_validator("max_memory", mode="before")
    @classmethod
    def _names_of_places(cls, given: object) -> object:
        """YAML reads a GPU's number as one."""
        return {str(k): v for k, v in given.items()} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _places_fit(self) -> Self:
        for field in ("max_memory", "offload_folder"):
            if getattr(self, field) is not None and self.device_map is None:
                raise ValueError(f"{field}: says nothing without device_map: auto; add that")
        odd = [place for place in self.max_memory or {} if place != "cpu" and not place.isdigit()]
        if odd:
            raise ValueError(f"max_memory: {odd[0]!r} is neither cpu nor the number of a GPU")
        return self

    @model_validator(mode="after")
    def _has_a_label(self) -> Self:
        refuse_as_name(self.label, field="name", fix="give a short_name")
        return self

    @model_validator(mode="after")
    def _pretrained_fit(self) -> Self:
        labels = [(sae.layer, sae.label) for sae in self.pretrained]
        for sae in self.pretrained:
            if sae.layer not in self.layers:
                raise ValueError(
                    f"pretrained: {sae.label} is for layer {sae.layer}, which is not among layers"
                    f" {list(self.layers)}; add it or remove the SAE"
                )
            if labels.count((sae.layer, sae.label)) > 1:
                raise ValueError(
                    f"pretrained: two SAEs of layer {sae.layer} are called {sae.label}; remove one"
                    " or rename its folder"
                )
        return self

    @property
    def is_planted(self) -> bool:
        """There is no language model: activations come from the planted world."""
        return self.name == PLANTED

    @property
    def label(self) -> str:
        """As in run names and tables."""
        return self.short_name or last_part(self.name)
