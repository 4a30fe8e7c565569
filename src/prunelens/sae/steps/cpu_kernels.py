"""Compiled loops for a TopK SAE's training step on a CPU, for `cpu_descent` alone.

PyTorch's own operators write what one of them hands to the next to memory, and wait for all
threads after each. Here a row is read, used for all that it is needed for, and done with. numba
compiles the loops when they are first called, seconds per process: what it could keep on disk
would be pickles.

A factor of a product is a float32 or a bfloat16 (see `cpu_numbers`). Sums are float32. Each
function but `by_latent` works on items first..last-1 of tokens or latents, and no item's result
depends on which others are in its share; what `errors` sums over its tokens does.

Shapes: B tokens, D d_model, F latents, K active latents per token. An entry is one active latent
of one token; entries stand latent by latent, and in the order of tokens within each.
"""

from __future__ import annotations

from typing import no_type_check

import numpy as np

from prunelens.sae.steps.cpu_numbers import compiled, factor_of, keep_rounded, number_of
from prunelens.sae.steps.descent import BETA_MEAN, BETA_SQUARE, EPSILON

# Constants of compiled code have to be of the precision that they are used in.
_NEW_MEAN, _NEW_SQUARE = np.float32(1 - BETA_MEAN), np.float32(1 - BETA_SQUARE)
_KEPT_SQUARE, _EPSILON = np.float32(BETA_SQUARE), np.float32(EPSILON)


@compiled
@no_type_check
def _bound(integers, count, k, at_least):
    """The k-th largest of the first `count` integers; `at_least` where fewer reach that."""
    found = integers.dtype.type(0)
    for bit in range(8 * integers.itemsize - 2, -1, -1):
        tried = integers.dtype.type(found | (1 << bit))
        if tried <= at_least:
            found = tried
            continue
        reach = np.int32(0)
        for i in range(count):
            reach = np.int32(reach + np.int32(integers[i] >= tried))
        if reach >= k:
            found = tried
    return found


@compiled
@no_type_check
def select(first, last, pre, size, indices, values):
    """TopK(ReLU(pre), K) of some tokens: distinct latents and their values, in no order.

    Args:
        pre: [B, F] pre-activations, their bits read as integers: positive floats keep their order.
        size: latents of a group, which divides F; group g holds the latents g, g + F / size, ….
        indices: [B, K] int32, written.
        values: [B, K] float32, written.
    """
    F, K = pre.shape[1], indices.shape[1]
    num_groups = F // size
    zero = pre.dtype.type(0)
    largest = np.empty(num_groups, pre.dtype)
    found, where = np.empty(F, pre.dtype), np.empty(F, np.int32)
    for token in range(first, last):
        row = pre[token]
        largest[:] = row[:num_groups]
        for member in range(1, size):
            part = row[member * num_groups : (member + 1) * num_groups]
            for g in range(num_groups):
                largest[g] = part[g] if part[g] > largest[g] else largest[g]
        # As many latents as groups reach the K-th largest of the groups' maxima: at least K.
        low = _bound(largest, num_groups, K, zero)
        count = 0
        for g in range(num_groups):
            if largest[g] >= low:
                for at in range(g, F, num_groups):
                    if row[at] >= low:
                        found[count], where[count] = row[at], at
                        count += 1
        cut = _bound(found, count, K, low)
        taken = 0
        for i in range(count):
            if found[i] > cut:
                indices[token, taken], values[token, taken] = where[i], number_of(found[i])
                taken += 1
        for i in range(count):
            if found[i] == cut and taken < K:
                indices[token, taken], values[token, taken] = where[i], number_of(found[i])
                taken += 1
        at = 0
        while taken < K:  # fewer than K are positive or zero: any others, at 0
            if row[at] < low:
                indices[token, taken], values[token, taken] = at, np.float32(0)
                taken += 1
            at += 1


@compiled
@no_type_check
def by_latent(indices, values, starts, tokens, entries):
    """Entries latent by latent, from [B, K] token by token.

    Args:
        starts: [F + 2] int64, written: entries of latent j are starts[j]..starts[j + 1]-1.
        tokens: [B K] int32, written: whose each is.
        entries: [B K] float32, written.
    """
    starts[:] = 0
    for token in range(indices.shape[0]):
        for i in range(indices.shape[1]):
            starts[indices[token, i] + 2] += 1
    for j in range(2, len(starts)):
        starts[j] += starts[j - 1]
    for token in range(indices.shape[0]):
        for i in range(indices.shape[1]):
            j = indices[token, i] + 1
            tokens[starts[j]], entries[starts[j]] = token, values[token, i]
            starts[j] += 1


@compiled
@no_type_check
def _add(total, v0, row0, v1, row1, v2, row2, v3, row3):
    for d in range(len(total)):
        total[d] += (
            v0 * number_of(row0[d])
            + v1 * number_of(row1[d])
            + v2 * number_of(row2[d])
            + v3 * number_of(row3[d])
        )


@compiled
@no_type_check
def _add_one(total, value, row):
    for d in range(len(total)):
        total[d] += value * number_of(row[d])


@compiled
@no_type_check
def errors(first, last, indices, values, rows, bias, x_hat, scale, grad, bias_grad):
    """Reconstruct some tokens.

    Args:
        indices: [B, K] and `values`, of `select`.
        rows: [F, D] the decoder's, as factors.
        bias: [D] the decoder's.
        x_hat: [B, D] float32.
        scale: what the error is multiplied by to give `grad`: 2 / B.
        grad: [B, D] written: d loss / d x_rec, as factors.
        bias_grad: [D] written: its sum over these tokens, before it is rounded.
    Returns: the squared error, summed.
    """
    K, D = indices.shape[1], rows.shape[1]
    total = np.empty(D, np.float32)
    loss = 0.0
    bias_grad[:] = 0
    for token in range(first, last):
        x, out = x_hat[token], grad[token]
        for d in range(D):
            total[d] = bias[d] - x[d]
        at, v = indices[token], values[token]
        i = 0
        while i + 4 <= K:
            row0, row1, row2, row3 = rows[at[i]], rows[at[i + 1]], rows[at[i + 2]], rows[at[i + 3]]
            _add(total, v[i], row0, v[i + 1], row1, v[i + 2], row2, v[i + 3], row3)
            i += 4
        while i < K:
            _add_one(total, v[i], rows[at[i]])
            i += 1
        squares = np.float32(0)
        for d in range(D):
            squares += total[d] * total[d]
            total[d] *= scale
            bias_grad[d] += total[d]
        loss += squares
        for d in range(D):
            out[d] = factor_of(total[d], out)
    return loss


@compiled
@no_type_check
def _products(weight, total, v0, row0, v1, row1, v2, row2, v3, row3):
    """weight . row of four rows, which are added to `total` at the same time."""
    p0, p1, p2, p3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
    for d in range(len(weight)):
        w = weight[d]
        n0, n1, n2, n3 = (
            number_of(row0[d]),
            number_of(row1[d]),
            number_of(row2[d]),
            number_of(row3[d]),
        )
        p0 += w * n0
        p1 += w * n1
        p2 += w * n2
        p3 += w * n3
        total[d] += v0 * n0 + v1 * n1 + v2 * n2 + v3 * n3
    return p0, p1, p2, p3


@compiled
@no_type_check
def _product(weight, total, value, row):
    p = np.float32(0)
    for d in range(len(weight)):
        n = number_of(row[d])
        p += weight[d] * n
        total[d] += value * n
    return p


@compiled
@no_type_check
def _adam(weight, mean, mean_square, gradient, step_size, spread):
    for d in range(len(weight)):
        g = gradient[d]
        first = mean[d] + (g - mean[d]) * _NEW_MEAN
        second = _KEPT_SQUARE * mean_square[d] + _NEW_SQUARE * g * g
        mean[d], mean_square[d] = first, second
        weight[d] -= step_size * first / (np.sqrt(second) * spread + _EPSILON)


@compiled
@no_type_check
def step_decoder(
    first, last, starts, tokens, z, grad_z, grad, weight, mean, mean_square, copy, step_size, spread
):
    """Adam and unit norm on some of the decoder's rows, and the gradients of their latents.

    Args:
        starts, tokens, z: of `by_latent`.
        grad_z: [B K] written: d loss / d entry, 0 where the latent does not fire.
        grad: [B, D] of `errors`.
        weight, mean, mean_square: [F, D] float32, updated.
        copy: [F, D] uint16, the weights rounded, written; None for none.
        step_size: the learning rate over 1 - beta_mean^n.
        spread: 1 / sqrt(1 - beta_square^n).
    """
    gradient = np.empty(weight.shape[1], np.float32)
    for j in range(first, last):
        row, end, e = weight[j], starts[j + 1], starts[j]
        gradient[:] = 0
        while e + 4 <= end:
            row0, row1 = grad[tokens[e]], grad[tokens[e + 1]]
            row2, row3 = grad[tokens[e + 2]], grad[tokens[e + 3]]
            grad_z[e], grad_z[e + 1], grad_z[e + 2], grad_z[e + 3] = _products(
                row, gradient, z[e], row0, z[e + 1], row1, z[e + 2], row2, z[e + 3], row3
            )
            e += 4
        while e < end:
            grad_z[e] = _product(row, gradient, z[e], grad[tokens[e]])
            e += 1
        for e in range(starts[j], end):
            if not z[e] > 0:  # only active latents learn
                grad_z[e] = 0
        _adam(row, mean[j], mean_square[j], gradient, step_size, spread)
        squares = np.float32(0)
        for d in range(len(row)):
            squares += row[d] * row[d]
        length = np.float32(1) / np.sqrt(squares)
        for d in range(len(row)):
            row[d] *= length
        if copy is not None:
            keep_rounded(copy[j], row)


@compiled
@no_type_check
def step_encoder(
    first, last, starts, tokens, z, grad_z, inputs, weight, mean, mean_square, copy, step_size,
    spread, bias_grad, fires,
):  # fmt: skip
    """Adam on some of the encoder's rows.

    Args: as of `step_decoder`, and
        inputs: [B, at least D] what was encoded, as factors.
        copy: [F, at least D] the weights rounded, written; None for none.
        bias_grad: [F] written: the gradient of the encoder's bias.
        fires: [F] bool, written: whether the latent fired on some token.
    """
    D = weight.shape[1]
    gradient = np.empty(D, np.float32)
    for j in range(first, last):
        end, e = starts[j + 1], starts[j]
        gradient[:] = 0
        while e + 4 <= end:
            row0, row1 = inputs[tokens[e]], inputs[tokens[e + 1]]
            row2, row3 = inputs[tokens[e + 2]], inputs[tokens[e + 3]]
            g0, g1, g2, g3 = grad_z[e], grad_z[e + 1], grad_z[e + 2], grad_z[e + 3]
            _add(gradient, g0, row0, g1, row1, g2, row2, g3, row3)
            e += 4
        while e < end:
            _add_one(gradient, grad_z[e], inputs[tokens[e]])
            e += 1
        of_bias, fired = np.float32(0), False
        for e in range(starts[j], end):
            of_bias += grad_z[e]
            fired |= z[e] > 0
        bias_grad[j], fires[j] = of_bias, fired
        _adam(weight[j], mean[j], mean_square[j], gradient, step_size, spread)
        if copy is not None:
            keep_rounded(copy[j], weight[j])
