"""Which weights of a model may be pruned, as matrices of [output, input]."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from prunelens.errors import UserError
from prunelens.model import LanguageModel
from prunelens.offload import is_offloaded, weight_of


def prunable_matrices(lm: LanguageModel, *, lm_head: bool = False) -> dict[str, nn.Module]:
    """`linear_matrices` whose weights can be edited.

    Raises: UserError as `linear_matrices`, or where a weight is quantised.
    """
    found = linear_matrices(lm, lm_head=lm_head)
    for name, module in found.items():
        assert isinstance(module, nn.Linear | Conv1D)
        _check_editable(name, module)
    return found


def linear_matrices(lm: LanguageModel, *, lm_head: bool = False) -> dict[str, nn.Module]:
    """Every nn.Linear and Conv1D inside the decoder blocks (methods §3), by full name.

    The order is that of `model.named_modules()`, which is the order of ties. Embeddings and the
    output head lie outside the blocks. Two modules that share one weight count once, under the
    first name; a weight shared with an embedding or the head does not count.

    Args:
        lm: the model.
        lm_head: whether the output head counts too; tied to the embedding, its weight is the same.
    Raises: UserError where the blocks hold no such module, or stacked matrices (the experts of a
        mixture, gates of RecurrentGemma), which are no linear layers; where the head is asked for
        and is none.
    """
    inside = {id(module) for block in lm.blocks for module in block.modules()}
    outside = [lm.model.get_input_embeddings(), lm.model.get_output_embeddings()]
    if lm_head:
        if not head_names(lm):
            raise UserError(
                f"prunings.lm_head: true, and {lm.label} has no linear output head; leave it out"
            )
        inside.add(id(outside[1]))
        outside.clear()
    ties = getattr(lm.model, "all_tied_weights_keys", {})
    names = {module: name for name, module in lm.model.named_modules()}

    def identity(module: nn.Module) -> int | str:
        """Of its weight; between two calls an offloaded one is not the object that others are."""
        name = f"{names[module]}.weight"
        return ties.get(name, name) if is_offloaded(module) else id(module.weight)

    seen = {identity(module) for module in outside if module is not None}
    found: dict[str, nn.Module] = {}
    for name, module in lm.model.named_modules():
        if id(module) not in inside:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            if identity(module) not in seen:
                found[name] = module
                seen.add(identity(module))
        else:
            _check_no_stacks(name, module)
    if not found:
        raise UserError(
            f"pruning: the blocks of {lm.label} hold no nn.Linear or Conv1D; nothing can be pruned"
        )
    return found


def head_names(lm: LanguageModel) -> list[str]:
    """The output head's name, then the token embedding's where both are one weight.

    Empty where the head is no linear layer.
    """
    if not isinstance(lm.model.get_output_embeddings(), nn.Linear):
        return []
    names = {module: name for name, module in lm.model.named_modules()}
    head = names[lm.model.get_output_embeddings()]
    is_tied = f"{head}.weight" in getattr(lm.model, "all_tied_weights_keys", {})
    return [head, names[lm.model.get_input_embeddings()]] if is_tied else [head]


def as_matrix(module: nn.Module) -> Float[Tensor, "output input"]:
    """The weight as a view [output, input] (Conv1D stores the transpose); edits reach the model.

    Those of a weight that is offloaded to disk do so once `offload.make_editable` has seen it.
    """
    assert isinstance(module, nn.Linear | Conv1D)
    weight = weight_of(module).detach()
    return weight.T if isinstance(module, Conv1D) else weight


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """The shape of `as_matrix`, without reading what is offloaded."""
    assert isinstance(module, nn.Linear | Conv1D)
    rows, columns = module.weight.shape
    return (columns, rows) if isinstance(module, Conv1D) else (rows, columns)


def kind_of(name: str) -> str:
    """What follows the last number in a module's name, which is its block's: `mlp.down_proj`."""
    parts = name.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :])


def _check_editable(name: str, module: nn.Linear | Conv1D) -> None:
    weight = module.weight
    assert not weight.is_meta or is_offloaded(module), f"{name} has no values"
    own_kind = type(weight.data) is not Tensor  # torchao's say that they are of a float dtype
    if own_kind or not weight.is_floating_point():
        stored = type(weight.data).__name__ if own_kind else weight.dtype
        raise UserError(
            f"pruning: {name} is quantised ({stored}); prune the float checkpoint instead"
        )


def _check_no_stacks(name: str, module: nn.Module) -> None:
    """Stacked matrices would stay dense unnoticed; kernels and vectors are no linear layers."""
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return
    of_experts = "expert" in f"{name} {type(module).__name__}".lower()
    kind = (
        "mixtures of experts" if of_experts else f"the stacked matrices of {type(module).__name__}"
    )
    for own, parameter in module.named_parameters(recurse=False):
        shape = list(parameter.shape)
        # Some stack experts along the rows of one matrix (DBRX).
        if min(shape[-2:]) > 1 and (len(shape) >= 3 or (of_experts and len(shape) == 2)):
            raise UserError(
                f"pruning: {name}.{own} has shape {shape}, and {kind} cannot be pruned; use an"
                " architecture of linear layers, or study the dense model alone"
            )
