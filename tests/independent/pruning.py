"""Pruning as methods §3 words it, one weight at a time."""

import hashlib
import math
import re
from decimal import Decimal

import numpy as np

IN_A_BLOCK = re.compile(r"(^|\.)(layers|h)\.\d+\.")


def prunable_weights(model, lm_head=False):
    """name -> float32 array [output, input], found by class name, in named_modules order.

    With `lm_head` also what is called so, wherever else its weight is used.
    """
    weights = {}
    for name, module in model.named_modules():
        kind = type(module).__name__
        wanted = IN_A_BLOCK.search(name) or (lm_head and name == "lm_head")
        if kind in ("Linear", "Conv1D") and wanted:
            array = module.weight.detach().float().numpy().copy()
            weights[name] = array.transpose() if kind == "Conv1D" else array
    return weights


def scores_of(weights, criterion, norms=None):
    """name -> scores [output, input], each rounded to float32."""
    scores = {}
    for name, array in weights.items():
        scores[name] = np.abs(array)
        if criterion == "wanda":
            for j, norm in enumerate(norms[name]):
                scores[name][:, j] = scores[name][:, j] * np.float32(norm)
    return scores


def masks_of(scores, scope, sparsities):
    """For each sparsity (decimal text): name -> bool array, False where the weight goes."""
    ranking = {group: sorted(entries) for group, entries in _groups(scores, scope).items()}
    results = []
    for sparsity in sparsities:
        keep = {name: np.ones(np.shape(matrix), dtype=bool) for name, matrix in scores.items()}
        for entries in ranking.values():
            count = math.floor(Decimal(sparsity) * len(entries))
            for _, _, i, j, name in entries[:count]:
                keep[name][i, j] = False
        results.append(keep)
    return results


def _groups(scores, scope):
    """The weights that compete: (score, order of the matrix, row, column, name).

    A number as scope: so many neighbours in a row.
    """
    groups = {}
    for order, (name, matrix) in enumerate(scores.items()):
        for i, row in enumerate(np.asarray(matrix).tolist()):
            for j, score in enumerate(row):
                if isinstance(scope, int):
                    group = (order, i, j // scope)
                else:
                    group = {"global": 0, "matrix": order, "row": (order, i)}[scope]
                groups.setdefault(group, []).append((score, order, i, j, name))
    return groups


def lot(seed, name, index):
    """The 30-bit number that weight `index` of a matrix draws: SplitMix64, its highest bits."""
    digest = hashlib.sha256(f"{seed}".encode() + b"\0" + name.encode()).digest()
    state = int.from_bytes(digest[:8], "little")
    state = (state + (index + 1) * 0x9E3779B97F4A7C15) % 2**64
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) % 2**64
    return (state ^ (state >> 31)) >> 34


def norms_of(inputs):
    """Euclidean norm of each column of [tokens, input], summed one token at a time in float64."""
    total = np.zeros(inputs.shape[1], dtype=np.float64)
    for token in inputs:
        total += token.astype(np.float64) ** 2
    return np.sqrt(total)


def inputs_of(model, windows):
    """name -> [tokens, input]: what every prunable module is given in whole forward passes."""
    caught = {name: [] for name in prunable_weights(model)}
    handles = []
    for name, module in model.named_modules():
        if name in caught:

            def catch(_, arguments, name=name):
                rows = arguments[0].detach().float().numpy()
                caught[name].append(rows.reshape(-1, rows.shape[-1]).copy())

            handles.append(module.register_forward_pre_hook(catch))
    for window in windows:
        model(window[None])
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in caught.items()}


def prune_sequentially(model, windows, scope, sparsity_text):
    """Wanda block by block with a whole forward pass of the model for every block, in place."""
    keep = {}
    for block in dict.fromkeys(block_of(name) for name in prunable_weights(model)):
        inputs = inputs_of(model, windows)
        own = {n: w for n, w in prunable_weights(model).items() if block_of(n) == block}
        norms = {name: norms_of(inputs[name]) for name in own}
        [masks] = masks_of(scores_of(own, "wanda", norms), scope, [sparsity_text])
        for name, mask in masks.items():
            zero(model, name, mask)
        keep.update(masks)
    return keep


def block_of(name):
    """The number of the block that a module lies in."""
    return int(IN_A_BLOCK.search(name).group(0).strip(".").split(".")[1])


def zero(model, name, mask):
    """Set the weights to zero where mask [output, input] is False."""
    module = model.get_submodule(name)
    transposed = type(module).__name__ == "Conv1D"
    for i, j in zip(*np.nonzero(~mask), strict=True):
        module.weight.data[(j, i) if transposed else (i, j)] = 0
