"""The paired activation store: written once as a stream, read in random batches.

A store is one safetensors file with one tensor, `activations` [tokens, d_model]. Dense and pruned
models see the same windows in the same order, so row i of one store and row i of another are the
same token. Rows that no one may use (attention sinks of the dense model) stay in the file; which
rows count is a separate index, made once from the dense model and shared by all conditions.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from prunelens.config import ActivationConfig, Site
from prunelens.errors import UserError
from prunelens.finite import where_not_finite
from prunelens.model import LanguageModel, forward_tokens, run_to_sites

STORAGE = {
    "float32": (torch.float32, "F32"),
    "bfloat16": (torch.bfloat16, "BF16"),
    "float16": (torch.float16, "F16"),
}
READ_TOKENS = 8192  # rows per sequential read


class Statistics(NamedTuple):
    """Mean and standard deviation per dimension, computed in float64 (methods §4)."""

    mean: Float[Tensor, " d_model"]
    sigma: Float[Tensor, " d_model"]

    def save(self, path: pathlib.Path) -> None:
        """Write both as safetensors."""
        save_file({"mean": self.mean, "sigma": self.sigma}, path)

    @classmethod
    def load(cls, path: pathlib.Path) -> Statistics:
        """Read what `save` wrote."""
        return cls(**load_file(path))


def capture(
    lm: LanguageModel,
    windows: Int[Tensor, "windows context_tokens"],
    path: pathlib.Path,
    *,
    site: Site,
    layer: int,
    config: ActivationConfig,
    progress: Callable[[int], None] | None = None,
) -> Float[Tensor, " tokens"]:
    """Run `windows` up to the site and stream what is there to `path`; returns each row's norm.

    The first `skip_first` positions of every window are left out. Peak memory is that of one batch,
    whatever the number of tokens (but for the norms, 4 bytes per token).
    Raises: UserError where an activation is NaN or infinite, or overflows the storage precision.
    """
    place = (site, layer)
    return capture_sites(lm, windows, {place: path}, config=config, progress=progress)[place]


def capture_sites(
    lm: LanguageModel,
    windows: Int[Tensor, "windows context_tokens"],
    paths: Mapping[tuple[Site, int], pathlib.Path],
    *,
    config: ActivationConfig,
    progress: Callable[[int], None] | None = None,
) -> dict[tuple[Site, int], Float[Tensor, " tokens"]]:
    """`capture` of several (site, layer) places in one pass: a file and its rows' norms for each.

    Every file is, bit for bit, what `capture` writes.
    Raises: UserError as `capture`.
    """
    skip = config.skip_first
    if skip >= windows.shape[1]:
        raise UserError(
            f"activations.skip_first: {skip} leaves nothing of a window of"
            f" {windows.shape[1]} tokens; make it smaller"
        )
    at_once = max(1, forward_tokens(lm.device.type) // windows.shape[1])
    num_rows = len(windows) * (windows.shape[1] - skip)
    with contextlib.ExitStack() as stack:
        streams = {
            place: stack.enter_context(_Stream(path, num_rows, config.storage))
            for place, path in paths.items()
        }
        for first in range(0, len(windows), at_once):
            batch = windows[first : first + at_once]
            found = run_to_sites(lm, batch, list(streams))
            for (place, stream), states in zip(streams.items(), found, strict=True):
                states = stream.stored(states[:, skip:])
                _refuse_non_finite(states, batch, first, lm, place, config.storage)
                stream.write(states)
            if progress:
                progress((first + len(batch)) * windows.shape[1])
    return {place: stream.norms for place, stream in streams.items()}


def usable_rows(
    norms: Float[Tensor, " tokens"], *, median: float, multiple: float | None
) -> Int[Tensor, " kept"]:
    """Indices of the rows whose dense norm is at most `multiple` times the dense `median`."""
    if multiple is None:
        return torch.arange(len(norms))
    return (norms <= multiple * median).nonzero().squeeze(1)


def statistics(data: Activations, *, num_tokens: int, seed: int = 0) -> Statistics:
    """Mean and deviation of `num_tokens` rows drawn without replacement, in float64.

    A dimension that never varies gets deviation 1: it normalises to 0 instead of to NaN.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(data.num_tokens, generator=generator)[:num_tokens].sort().values
    total = torch.zeros(data.d_model, dtype=torch.float64)
    for part in drawn.split(READ_TOKENS):
        total += data.raw_rows(part).double().sum(0).cpu()
    mean = total / len(drawn)
    squares = torch.zeros_like(total)
    for part in drawn.split(READ_TOKENS):
        squares += (data.raw_rows(part).double().cpu() - mean).square().sum(0)
    sigma = (squares / len(drawn)).sqrt()
    return Statistics(mean.float(), torch.where(sigma > 0, sigma, 1.0).float())


def covariance(data: Activations) -> Float[Tensor, "d_model d_model"]:
    """Covariance of the raw activations over all tokens, in float64.

    Its trace times the number of tokens is the sum of ||x - mean(x)||^2, what FVU is relative to.
    """
    total = torch.zeros(data.d_model, dtype=torch.float64)
    for batch in data.raw_batches(READ_TOKENS):
        total += batch.double().sum(0).cpu()
    mean = total / data.num_tokens
    products = torch.zeros(data.d_model, data.d_model, dtype=torch.float64)
    for batch in data.raw_batches(READ_TOKENS):
        centred = batch.double().cpu() - mean
        products += centred.T @ centred
    return products / data.num_tokens


def participation_ratio(covariance: Float[Tensor, "d_model d_model"]) -> float:
    """(sum of eigenvalues)^2 / sum of their squares: how many directions share the variance.

    From 1 (one direction has it all) to d_model (all alike); NaN where nothing varies.
    """
    squares = float(covariance.square().sum())
    return float(covariance.trace()) ** 2 / squares if squares else math.nan


def random_rotation(d_model: int, *, seed: int) -> Float[Tensor, "d_model d_model"]:
    """A random orthogonal matrix (Haar): the space of the `floor_shared` arm (methods §7)."""
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(d_model, d_model, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).float()


class Activations:
    """A view of one store: which rows count, how they are normalised, on which device.

    `rows` and `batches` give x_hat = (x - mean) / sigma in float32, `raw_rows` and `raw_batches`
    give x. The file stays on disk; the operating system pages in what is read. On a GPU that has
    room for it the store is held there, so that a batch need not cross over for every step.
    """

    def __init__(
        self,
        path: pathlib.Path,
        *,
        statistics: Statistics | None = None,
        kept: Int[Tensor, " kept"] | None = None,
        rotation: Float[Tensor, "d_model d_model"] | None = None,
        device: str = "cpu",
    ) -> None:
        self._device = torch.device(device)
        self._stored: Tensor = load_file(path)["activations"]  # mapped, not read
        self.d_model: int = self._stored.shape[1]
        self.num_tokens: int = len(self._stored) if kept is None else len(kept)
        if _has_room(self._device, self._stored):
            self._stored = self._stored.to(self._device)
        self._kept = None if kept is None else kept.to(self._stored.device)
        given = statistics or Statistics(torch.zeros(self.d_model), torch.ones(self.d_model))
        self.mean, self.sigma = (part.to(self._device) for part in given)
        self._rotation = None if rotation is None else rotation.to(self._device)

    def rows(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_model"]:
        """Normalised rows, in the order of `index` (into the rows that count)."""
        return self._normalise(self._read(index))

    def raw_rows(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch d_model"]:
        """Rows as captured; under a rotation, the rotated rows scaled back by sigma and mean."""
        return self._restore(self._read(index))

    def batches(self, batch_tokens: int) -> Iterator[Float[Tensor, "batch d_model"]]:
        """All normalised rows in order."""
        for index in torch.arange(self.num_tokens).split(batch_tokens):
            yield self.rows(index)

    def raw_batches(self, batch_tokens: int) -> Iterator[Float[Tensor, "batch d_model"]]:
        """All raw rows in order."""
        for index in torch.arange(self.num_tokens).split(batch_tokens):
            yield self.raw_rows(index)

    def _read(self, index: Tensor) -> Tensor:
        """A copy in float32 that belongs to the caller."""
        where = index.to(self._stored.device)
        where = where if self._kept is None else self._kept[where]
        return self._stored[where].to(self._device, torch.float32)

    def _normalise(self, raw: Tensor) -> Tensor:
        """In place: fresh memory for every batch would cost as much as reading it."""
        normal = raw.sub_(self.mean).div_(self.sigma)
        return normal if self._rotation is None else normal @ self._rotation

    def _restore(self, raw: Tensor) -> Tensor:
        if self._rotation is None:
            return raw
        return self._normalise(raw) * self.sigma + self.mean


def _has_room(device: torch.device, stored: Tensor) -> bool:
    """Whether a GPU can hold the store in half of what is free there."""
    if device.type != "cuda":
        return False
    return 2 * stored.nbytes <= torch.cuda.mem_get_info(device)[0]


class _Stream:
    """One store being written, batch by batch; flushed to disk when its block ends well."""

    def __init__(self, path: pathlib.Path, num_rows: int, storage: str) -> None:
        self._path, self._written = path, 0
        self._dtype, self._code = STORAGE[storage]
        # At once and not bit by bit: small tensors that stay would scatter the heap, and it grows.
        self.norms = torch.empty(num_rows)

    def __enter__(self) -> _Stream:
        self._file = self._path.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._file:
            if kind is None:
                self._file.flush()
                os.fsync(self._file.fileno())

    def stored(self, states: Tensor) -> Tensor:
        """[windows, positions, d_model] as they will be read: in the store's precision, here."""
        return states.to(self._dtype).cpu()

    def write(self, states: Tensor) -> None:
        """Append what `stored` gave."""
        rows = states.flatten(0, 1).contiguous()
        if self._written == 0:
            _write_header(self._file, (len(self.norms), rows.shape[1]), self._code, rows.itemsize)
        self._file.write(rows.view(torch.uint8).numpy().data)
        here = slice(self._written, self._written + len(rows))
        torch.linalg.vector_norm(rows.float(), dim=1, out=self.norms[here])
        self._written = here.stop


def _write_header(file: BinaryIO, shape: tuple[int, int], code: str, itemsize: int) -> None:
    """The safetensors header for one tensor whose rows follow.

    By hand because safetensors' own writer wants the whole tensor in memory.
    """
    size = shape[0] * shape[1] * itemsize
    entry = {"activations": {"dtype": code, "shape": list(shape), "data_offsets": [0, size]}}
    header = json.dumps(entry).encode()
    header += b" " * (-len(header) % 8)
    file.write(len(header).to_bytes(8, "little") + header)


def _refuse_non_finite(
    states: Tensor,
    batch: Tensor,
    first_window: int,
    lm: LanguageModel,
    place: tuple[Site, int],
    storage: str,
) -> None:
    finite = states.isfinite().flatten(1).all(1)
    if not finite.all():
        found = int((~finite).nonzero()[0])
        site, layer = place
        dtype = str(lm.model.dtype).removeprefix("torch.")
        raise UserError(
            f"activations: {lm.label} layer {layer} in {dtype} (stored as {storage}) gives NaN or"
            f" infinity at {site}, first in window {first_window + found}:"
            f" {where_not_finite(lm, batch[found : found + 1])}; set models.dtype and"
            " activations.storage to bfloat16 or float32"
        )
