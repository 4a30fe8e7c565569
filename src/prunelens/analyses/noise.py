"""What pruning does to all activations alike, and noise of the size of the rest.

In the dense model's normalised space a token's pruned activation is y = m + A x + r: a shift and a
map that are common to all tokens, and a remainder. A gain of all activations harms no feature, so
the noise controls keep m and A and disturb only as much as r does (methods §10).
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol, get_args, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float, Float64, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunelens.columns import meanings_of

Kind = Literal["scalar", "diagonal", "low_rank"]
KINDS: tuple[Kind, ...] = get_args(Kind)
RANK = 8  # of what `low_rank` adds to a gain
GAIN_PRECISION = 1e-9  # of the gain beside what is of low rank, which is searched for
SMALLEST_GAIN = 0.05  # of the dense scale; a map that leaves less cannot be undone
COLUMNS = """
kind: Of A: `scalar` (a gain), `diagonal`, `low_rank` (a gain plus a matrix of rank 8).
gain: How many times its size A makes an activation; 1 is no gain.
difference: Mean square of y - x, in mean squares of x.
share_shift: What taking m from the difference takes away of its square.
share_map: What taking (A - I)(x - mean) takes away beyond that.
share_remainder: What is left; the three add up to 1, and the first two may be a little below 0,
    for the change was fitted on other tokens.
"""
BATCH_TOKENS = 2048
NULL_SEED = 999_999  # beside the seeds of the noise controls, which are 1,000 for each SAE's


@runtime_checkable
class Rows(Protocol):
    """Normalised activations by row number, as `Activations` gives them."""

    def rows(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_model"]:
        """Rows in the order of `index`."""
        ...


class CommonChange(NamedTuple):
    """y = shift + A x + remainder, of one condition."""

    shift: Float64[Tensor, " d_model"]
    matrix: Float64[Tensor, "d_model d_model"] | Float64[Tensor, " d_model"]
    """A; its diagonal alone where it has nothing else."""
    seed: Int[Tensor, ""]
    """Of the noise that is drawn around it. Every condition has its own: the same draw in two would
    make them agree where nothing is."""

    def of(self, x: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """What the change makes of dense activations."""
        shift, matrix = self.shift.to(x), self.matrix.to(x)
        return shift + (x * matrix if matrix.ndim == 1 else x @ matrix.T)

    def undone(self, y: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "tokens d_model"]:
        """What dense activations would have given `y`."""
        y = y - self.shift.to(y)
        if self.matrix.ndim == 1:
            return y / self.matrix.to(y)
        return torch.linalg.solve(self.matrix, y.double().cpu().T).T.to(y)

    @property
    def gain(self) -> float:
        """What activations are multiplied by: the mean of A's diagonal."""
        return float((self.matrix if self.matrix.ndim == 1 else self.matrix.diagonal()).mean())

    @property
    def can_be_undone(self) -> bool:
        """Whether A leaves enough of every direction."""
        if self.matrix.ndim == 1:
            return bool((self.matrix.abs() >= SMALLEST_GAIN).all())
        return bool(torch.linalg.svdvals(self.matrix).min() >= SMALLEST_GAIN)

    def save(self, path: pathlib.Path) -> None:
        """Write it as one safetensors file."""
        save_file({name: part.contiguous() for name, part in self._asdict().items()}, path)

    @classmethod
    def load(cls, path: pathlib.Path) -> CommonChange:
        """Read what `save` wrote."""
        return cls(**load_file(path))


def fit_common_change(
    dense: Rows,
    pruned: Rows,
    tokens: Int[Tensor, " tokens"],
    *,
    kind: Kind = "scalar",
    seed: int = 0,
) -> CommonChange:
    """Least squares over some tokens: no m and A of that kind leaves a smaller remainder.

    Args:
        dense, pruned: paired rows, both normalised with the dense mean and deviation.
        tokens: the rows that it is fitted on; what follows is measured on others.
        kind: of A. `scalar`: a gain; `diagonal`: one per dimension; `low_rank`: a gain plus a
            matrix of rank 8.
        seed: of the noise around it.
    Source: methods §10.
    """
    sums = _Sums(dense, pruned, tokens, products=kind == "low_rank")
    if kind == "scalar":
        matrix = (sums.xy.sum() / sums.xx.sum()).expand(len(sums.xy)).contiguous()
    elif kind == "diagonal":
        matrix = torch.where(sums.xx > 0, sums.xy / sums.xx, 1.0)
    else:
        matrix = _gain_and_low_rank(sums.products_xx, sums.products_xy)
    change = CommonChange(torch.zeros_like(sums.mean_x), matrix, torch.tensor(seed))
    return change._replace(shift=sums.mean_y - change.of(sums.mean_x[None])[0])


def common_change_table(
    dense: Rows,
    pruned: Rows,
    changes: dict[Kind, CommonChange],
    tokens: Int[Tensor, " tokens"],
) -> pd.DataFrame:
    """How much of the squared difference of paired activations is common to all tokens.

    Args: tokens: others than those that the changes were fitted on.
    Returns: a row per kind, with COLUMNS.
    """
    sums = _Sums(dense, pruned, tokens)
    middle = sums.mean_x[None]
    means = {kind: (change.of(middle) - middle)[0] for kind, change in changes.items()}
    size = total = 0.0
    left = {kind: [0.0, 0.0] for kind in changes}
    for x, y in _pairs(dense, pruned, tokens):
        size += float(x.double().square().sum())
        total += float((y - x).double().square().sum())
        for kind, change in changes.items():
            left[kind][0] += float(((y - x).double() - means[kind].to(x.device)).square().sum())
            left[kind][1] += float((y - change.of(x)).double().square().sum())
    rows = []
    for kind, (shifted, rest) in left.items():
        parts = (total - shifted, shifted - rest, rest)
        shares = [part / total if total > 0 else float("nan") for part in parts]
        rows.append([kind, changes[kind].gain, total / size, *shares])
    return pd.DataFrame(rows, columns=[*meanings_of(COLUMNS)])


class NullRows:
    """The shuffled noise control in the place of pruned activations: nothing particular is there.

    A token's own change is m + A x; its remainder is that of another token, so no latent, rare or
    frequent, fares otherwise than under noise. Whatever a measure says here it says of nothing.
    """

    def __init__(
        self,
        dense: Rows,
        pruned: Rows,
        change: CommonChange,
        tokens: Int[Tensor, " tokens"],
        *,
        seed: int = NULL_SEED,
    ) -> None:
        """`tokens`: the rows that may be asked for; each gets the remainder of another of them.

        `seed`: of the draw, beside that of the change; another one gives the noise control.
        """
        self._dense, self._pruned, self._change = dense, pruned, change
        generator = torch.Generator().manual_seed(int(change.seed) + seed)
        self._partner = torch.full((int(tokens.max()) + 1,), -1)
        self._partner[tokens] = tokens[other_token(len(tokens), generator)]

    def rows(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_model"]:
        """Rows in the order of `index`."""
        partner = self._partner[index]
        assert (partner >= 0).all(), "a row that was not named"
        remainder = remainders(self._dense, self._pruned, self._change, partner)
        return remainder.add_(self._change.of(self._dense.rows(index)))


def remainders(
    dense: Rows, pruned: Rows, change: CommonChange, index: Int[Tensor, " batch"]
) -> Float[Tensor, "batch d_model"]:
    """r = y - m - A x of some rows."""
    return pruned.rows(index) - change.of(dense.rows(index))


def other_token(num_tokens: int, generator: torch.Generator) -> Int[Tensor, " tokens"]:
    """For every token one of the others, each drawn by itself.

    With replacement: if every one were drawn once, what all remainders add up to would be the same
    in each draw of the noise, and leaving out documents would count a variance that is not there.
    """
    ahead = torch.randint(1, max(num_tokens, 2), (num_tokens,), generator=generator)
    return (torch.arange(num_tokens) + ahead) % num_tokens


def isotropic_noise_like(
    difference: Float[Tensor, "tokens d_model"], generator: torch.Generator
) -> Float[Tensor, "tokens d_model"]:
    """Random directions, isotropic, each with the norm of that token's difference.

    Drawn on the CPU, so that the numbers do not depend on the device of `difference`.
    """
    noise = torch.randn(difference.shape, generator=generator).to(difference.device)
    size = difference.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
    return noise.mul_(size)


class _Sums:
    """Means and centred products over tokens, float64 on the CPU."""

    def __init__(
        self, dense: Rows, pruned: Rows, tokens: Int[Tensor, " tokens"], *, products: bool = False
    ) -> None:
        x, y = (part.double().cpu() for part in (dense.rows(tokens[:1]), pruned.rows(tokens[:1])))
        width, self.mean_x, self.mean_y = x.shape[1], torch.zeros_like(x[0]), torch.zeros_like(x[0])
        for x, y in _pairs(dense, pruned, tokens):
            self.mean_x += x.sum(0, dtype=torch.float64).cpu() / len(tokens)
            self.mean_y += y.sum(0, dtype=torch.float64).cpu() / len(tokens)
        self.xx, self.xy = torch.zeros(2, width, dtype=torch.float64)
        shape = (2, width, width) if products else (2, 0, 0)
        self.products_xx, self.products_xy = torch.zeros(shape, dtype=torch.float64)
        for x, y in _pairs(dense, pruned, tokens):
            x, y = x.double().cpu() - self.mean_x, y.double().cpu() - self.mean_y
            self.xx += x.square().sum(0)
            self.xy += (x * y).sum(0)
            if products:
                self.products_xx += x.T @ x
                self.products_xy += x.T @ y


def _pairs(
    dense: Rows, pruned: Rows, tokens: Int[Tensor, " tokens"]
) -> Iterator[tuple[Float[Tensor, "batch d_model"], Float[Tensor, "batch d_model"]]]:
    for batch in tokens.split(BATCH_TOKENS):
        yield dense.rows(batch), pruned.rows(batch)


def _gain_and_low_rank(
    xx: Float64[Tensor, "d_model d_model"], xy: Float64[Tensor, "d_model d_model"]
) -> Float64[Tensor, "d_model d_model"]:
    """g I + B of rank 8, from centred products: B by reduced-rank regression given g."""
    from scipy.optimize import minimize_scalar

    values, vectors = torch.linalg.eigh(xx)
    known = values > 1e-10 * values[-1]
    root = vectors[:, known] * values[known].sqrt()
    inverse = vectors[:, known] / values[known].sqrt()
    size, along, towards = float(xx.trace()), float(xy.trace()), inverse.T @ xy

    def left(gain: float) -> float:  # squared error with the best B, less that of 0
        explained = torch.linalg.svdvals(towards - gain * root.T)[:RANK].square().sum()
        return gain**2 * size - 2 * gain * along - float(explained)

    middle = along / size
    bounds = (middle - 1 - abs(middle), middle + 1 + abs(middle))
    options = {"xatol": GAIN_PRECISION}
    gain = float(minimize_scalar(left, bounds=bounds, method="bounded", options=options).x)
    u, s, v = torch.linalg.svd(towards - gain * root.T, full_matrices=False)
    low = ((inverse @ u[:, :RANK]) * s[:RANK] @ v[:RANK]).T
    return gain * torch.eye(len(xx), dtype=torch.float64) + low
