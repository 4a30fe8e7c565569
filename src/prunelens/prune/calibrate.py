"""What criteria need to know of the inputs: norms (Wanda) or products (SparseGPT) over all tokens.

`input_norms` takes them from the model as it is, in one pass. `norms_upwards` and
`products_upwards` take them block by block while the caller prunes each block before the next is
looked at (methods §3, `sequential`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunelens import offload
from prunelens.errors import UserError
from prunelens.model import LanguageModel, hidden_of, run_to_site
from prunelens.prune.matrices import as_matrix, matrix_shape, prunable_matrices

log = logging.getLogger(__name__)

BATCH_TOKENS = 4096
"""Calibration tokens per forward pass. Fixed, because sums depend on it in the last bit."""


CACHED = 1 << 17
"""Inputs that are squared at a time on a CPU (512 KiB). Fixed, as the batch is."""


@torch.no_grad()
def input_norms(
    lm: LanguageModel,
    calibration: Int[Tensor, "windows context"],
    progress: Callable[[int], None] | None = None,
) -> dict[str, Float32[Tensor, " _input"]]:
    """The Euclidean norm of every input of every prunable matrix over all calibration tokens.

    Squares are summed in float32 over a batch (at most 4,096 tokens) and in float64 over batches,
    so that 300,000 tokens lose no small terms; the norm is rounded to float32.

    Of a model with offloaded parts each block is brought in once and sees all windows before the
    next one is, where blocks can be run so; the norms are the same, bit for bit, and the memory is
    that of `norms_upwards`.

    Args:
        lm: the model as it is; one forward pass, without the output head.
        calibration: token windows; every position counts.
        progress: called after each batch with the number of windows done.
    Raises: UserError where inputs are NaN or infinite, a matrix is never used, or windows do not
        fit the model (token ids, length).
    """
    if offload.any_offloaded(lm.model):
        changed = _not_replayable(lm, calibration)
        if changed is None:
            blocks = _upwards(lm, calibration, _summing_squares, progress)
            return {name: norm for squares in blocks for name, norm in _norms(lm, squares).items()}
        log.info("%s: %s; every batch brings in every block", lm.label, changed)
    done = 0
    with _summing_squares(prunable_matrices(lm)) as squares:
        for batch in _batches(calibration):
            run_to_site(lm, batch, "resid_post", len(lm.blocks) - 1)
            done += len(batch)
            if progress:
                progress(done)
    return _norms(lm, squares)


@torch.no_grad()
def norms_upwards(
    lm: LanguageModel,
    calibration: Int[Tensor, "windows context"],
    progress: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Float32[Tensor, " _input"]]]:
    """The norms of one block after the other, to be pruned by the caller before the next is taken.

    All matrices of a block are seen with that block unpruned and the blocks below as the caller
    left them. In memory at a time: the inputs of one block for all windows, in the model's dtype
    and on its device, besides the model, or one block of it where it is offloaded. What a block is
    called with beside its input (masks, rotary embeddings) is caught once per batch size, from the
    model's own forward pass.

    Args: as `input_norms`; `progress` counts up to the number of windows over all blocks together.
    Raises: UserError as `input_norms`, and where blocks take more than the block before gives.
    """
    check_replayable(lm, calibration)
    for squares in _upwards(lm, calibration, _summing_squares, progress):
        yield _norms(lm, squares)


@torch.no_grad()
def products_upwards(
    lm: LanguageModel,
    calibration: Int[Tensor, "windows context"],
    progress: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Float32[Tensor, "_input _input"]]]:
    """Each matrix's inputs times themselves, X Xᵀ summed over all tokens, one block after another.

    As `norms_upwards`, in float32 throughout: SparseGPT adds a hundredth of its mean diagonal,
    which is far above what rounding takes.
    """
    check_replayable(lm, calibration)
    for products in _upwards(lm, calibration, _summing_products, progress):
        _check_sums(lm, products)
        yield products


def _upwards(
    lm: LanguageModel,
    calibration: Tensor,
    summing: Callable[[Mapping[str, nn.Module]], AbstractContextManager[dict[str, Tensor]]],
    progress: Callable[[int], None] | None,
) -> Iterator[dict[str, Tensor]]:
    """What `summing` adds up of each block's inputs, with the blocks below as they now are."""
    batches = _batches(calibration)
    by_size = {len(batch): batch for batch in batches}
    calls = {size: _calls(lm, batch) for size, batch in by_size.items()}
    hidden = [_forward(lm, batch, lm.blocks[:1]).inputs[0] for batch in batches]
    matrices = prunable_matrices(lm)
    for index, block in enumerate(lm.blocks):
        own = {id(module) for module in block.modules()}
        names = {name: module for name, module in matrices.items() if id(module) in own}
        with offload.resident(block), summing(names) as sums:
            for inputs in hidden:
                calls[len(inputs)][index].run(block, inputs)
        yield sums
        del sums
        if index + 1 < len(lm.blocks):
            with offload.resident(block):
                for position, inputs in enumerate(hidden):
                    hidden[position] = calls[len(inputs)][index].run(block, inputs)
        if progress:
            progress(len(calibration) * (index + 1) // len(lm.blocks))


class _Call(NamedTuple):
    """What the model hands to a block beside its input."""

    arguments: tuple[Any, ...]
    """The positional arguments after the input."""
    keywords: dict[str, Any]
    """The keyword arguments."""

    def run(self, block: nn.Module, inputs: Tensor) -> Float[Tensor, "windows context d_model"]:
        """The block's output."""
        return hidden_of(block(inputs, *self.arguments, **self.keywords))


class _Forward(NamedTuple):
    """How a forward pass called some blocks."""

    inputs: list[Tensor]
    """Each block's input [windows, context, d_model]."""
    calls: list[_Call]
    """Each block's other arguments."""


class _Reached(Exception):  # noqa: N818 (no error: it ends a forward pass early)
    """The last block of interest was called."""


class _ByKeywordError(Exception):
    """A block is not handed its input first, so it is not known which argument that is."""


def _calls(lm: LanguageModel, tokens: Tensor) -> list[_Call]:
    """What every block is called with besides its input."""
    return _forward(lm, tokens, lm.blocks, keep_inputs=False).calls


def _forward(
    lm: LanguageModel, tokens: Tensor, blocks: nn.ModuleList, *, keep_inputs: bool = True
) -> _Forward:
    """Run the model until the last of `blocks` is called."""
    record = _Forward([], [])

    def catch(block: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not arguments:
            raise _ByKeywordError
        inputs, *others = arguments
        if keep_inputs:
            record.inputs.append(inputs)
        record.calls.append(_Call(tuple(others), dict(keywords)))
        if block is blocks[-1]:
            raise _Reached

    with contextlib.ExitStack() as stack:
        for block in blocks:
            handle = block.register_forward_pre_hook(catch, with_kwargs=True)
            stack.callback(handle.remove)
        with contextlib.suppress(_Reached):
            run_to_site(lm, tokens, "resid_post", len(lm.blocks) - 1)
    return record


def check_replayable(lm: LanguageModel, calibration: Tensor) -> None:
    """Raises UserError where blocks cannot be run one by one."""
    if problem := _not_replayable(lm, calibration):
        raise UserError(
            f"pruning.calibration: 'sequential' needs blocks that take only the output of the"
            f" block before, and {problem}; use dense"
        )


def _not_replayable(lm: LanguageModel, calibration: Tensor) -> str | None:
    """Replay two texts block by block with one text's calls; it must give what the model gives.

    It does not where a block's other arguments depend on the text, or blocks share state.
    Returns: which block takes more; None where all is well.
    """
    texts = [calibration[:1], calibration[:1].flip(1)]
    try:
        truth = [_forward(lm, text, lm.blocks) for text in texts]
    except _ByKeywordError:
        return f"those of {lm.label} are not handed it as their first argument"
    calls = _calls(lm, texts[1])
    hidden = [forward.inputs[0] for forward in truth]
    for index, block in enumerate(lm.blocks[:-1]):
        hidden = [calls[index].run(block, inputs) for inputs in hidden]
        for ours, forward in zip(hidden, truth, strict=True):
            theirs = forward.inputs[index + 1]
            scale = float(theirs.nan_to_num().abs().amax())  # NaN has its own line later
            if not torch.allclose(ours, theirs, atol=0.01 * scale, rtol=0.01, equal_nan=True):
                return f"block {index + 1} of {lm.label} takes more"
    return None


def _summing_squares(
    modules: Mapping[str, nn.Module],
) -> AbstractContextManager[dict[str, Tensor]]:
    """While open, add up the squares of every module's inputs: float64 [input] by name."""
    return _summing(modules, lambda inputs: _squares(inputs), dimensions=1, dtype=torch.float64)


def _summing_products(
    modules: Mapping[str, nn.Module],
) -> AbstractContextManager[dict[str, Tensor]]:
    """While open, add up every module's inputs times themselves: float32 [input, input] by name."""
    return _summing(modules, _products, dimensions=2, dtype=torch.float32)


@contextlib.contextmanager
def _summing(
    modules: Mapping[str, nn.Module],
    of_tokens: Callable[[Tensor], Tensor],
    *,
    dimensions: int,
    dtype: torch.dtype,
) -> Iterator[dict[str, Tensor]]:
    """While open, add up `of_tokens` of every module's inputs [tokens, input], by name.

    Raises: UserError, on closing, where a module was given no token.
    """
    sums: dict[str, Tensor] = {}
    reached: set[str] = set()
    last: _Sum | None = None

    def adder(name: str, num_inputs: int, device: torch.device) -> Callable[..., None]:
        sums[name] = torch.zeros([num_inputs] * dimensions, dtype=dtype, device=device)

        def add(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            nonlocal last
            inputs = arguments[0]
            if last is None or not last.is_of(inputs):
                last = _Sum(inputs, _version(inputs), of_tokens(inputs.flatten(0, -2)))
            sums[name] += last.total.to(device)
            if inputs.numel():
                reached.add(name)

        return add

    products: dict[nn.Module, Callable[..., None]] = {}
    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            hook = adder(name, matrix_shape(module)[1], offload.execution_device(module))
            stack.callback(module.register_forward_pre_hook(hook).remove)
            products[module] = hook
        stack.enter_context(_Products(products))
        yield sums
    if unreached := [name for name in modules if name not in reached]:
        raise UserError(
            f"pruning: calibration never reached {unreached[0]}, so its inputs are not known; prune"
            " by magnitude"
        )


class _Products(TorchFunctionMode):
    """While open, a linear layer's inputs are seen where its weight is multiplied without it, too.

    Mamba's blocks do so with dt_proj: weight @ inputs, whose bias is added later on.
    """

    def __init__(self, hooks: Mapping[nn.Module, Callable[..., None]]) -> None:
        super().__init__()
        self._hooks = hooks

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _MATMULS and isinstance(args[0], nn.Parameter):
            for module, hook in self._hooks.items():
                # Looked up anew: of an offloaded layer it is another one in every call.
                if isinstance(module, nn.Linear) and module._parameters["weight"] is args[0]:
                    hook(module, (args[1].transpose(-2, -1),))
        return func(*args, **(kwargs or {}))


_MATMULS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)


class _Sum(NamedTuple):
    """The sum over the tensor that a module was called with last.

    Queries, keys and values are made from one input, gate and up from another: one sum for each.
    """

    inputs: Tensor
    """The tensor itself."""
    version: int | None
    """How often it had been written to; None where torch does not count that."""
    total: Float32[Tensor, "..."]
    """Summed over tokens."""

    def is_of(self, inputs: Tensor) -> bool:
        """Whether `inputs` is that tensor and still holds what was summed."""
        return inputs is self.inputs and self.version == _version(inputs) is not None


def _version(inputs: Tensor) -> int | None:
    return None if inputs.is_inference() else inputs._version


def _squares(inputs: Float[Tensor, "tokens input"]) -> Float32[Tensor, " input"]:
    """The sum of squares of every input; on a CPU by the dozen rows, which stay in its cache."""
    at_once = max(1, CACHED // inputs.shape[1]) if inputs.device.type == "cpu" else len(inputs)
    total = torch.zeros(inputs.shape[1], device=inputs.device)
    for rows in inputs.split(max(1, at_once)):
        squares = rows.float()
        squares = squares.square_() if squares is not rows else squares.square()
        total += squares.sum(0)
    return total


def _products(inputs: Float[Tensor, "tokens input"]) -> Float32[Tensor, "input input"]:
    """X Xᵀ of the inputs."""
    rows = inputs.float()
    return rows.T @ rows


def _norms(lm: LanguageModel, squares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float32 norms from summed squares."""
    _check_sums(lm, squares)
    return {name: sums.sqrt().float() for name, sums in squares.items()}


def _check_sums(lm: LanguageModel, sums: Mapping[str, Tensor]) -> None:
    """Refuse what would make every score meaningless; the matrix that is to blame is named."""
    broken = [name for name, total in sums.items() if not bool(total.isfinite().all())]
    if not broken:
        return
    for name, module in prunable_matrices(lm).items():
        if not bool(as_matrix(module).isfinite().all()):
            raise UserError(
                f"pruning: weights of {name} are NaN or infinite; load the model in bfloat16 or"
                " float32, or mend the checkpoint"
            )
    raise UserError(
        f"pruning: calibration inputs of {broken[0]} are NaN or infinite; load the model in"
        " bfloat16 or float32, or mend the checkpoint"
    )


def _batches(calibration: Tensor) -> tuple[Tensor, ...]:
    """Windows in batches of at most BATCH_TOKENS tokens (at least one window)."""
    if not len(calibration):
        raise UserError("pruning: no calibration windows; raise corpus.calibration_tokens")
    return calibration.split(max(1, BATCH_TOKENS // calibration.shape[1]))
