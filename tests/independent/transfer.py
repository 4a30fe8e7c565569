"""RQ3 token by token in numpy float64, from methods §7 (site resid_post, JumpReLU)."""

import numpy as np
import torch


class JumpRelu:
    """z_i = pre_i where pre_i > factor * threshold_i and pre_i > 0, else 0."""

    def __init__(self, w_enc, b_enc, w_dec, b_dec, threshold):
        self.parts = [np.asarray(p, dtype=np.float64) for p in (w_enc, b_enc, w_dec, b_dec)]
        self.threshold = np.asarray(threshold, dtype=np.float64)

    def encode(self, x, factor=1.0):
        w_enc, b_enc, _, _ = self.parts
        pre = x @ w_enc + b_enc
        return np.where((pre > 0) & (pre > factor * self.threshold), pre, 0.0)

    def rebuild(self, x, factor=1.0):
        _, _, w_dec, b_dec = self.parts
        z = self.encode(x, factor)
        return b_dec + sum(z[i] * w_dec[i] for i in np.flatnonzero(z))

    def active(self, xs, factor=1.0):
        return sum(int((self.encode(x, factor) != 0).sum()) for x in xs)

    def factor_for(self, xs, wanted):
        """The middle of the factors that leave `wanted` active; 1 if it is one of them."""

        def least(enough):
            """By bisection: fewer are active as the factor rises."""
            low, high = 0.0, 100.0
            for _ in range(50):
                middle = (low + high) / 2
                low, high = (low, middle) if self.active(xs, middle) <= enough else (middle, high)
            return high

        low, high = least(wanted), least(wanted - 1)
        return 1.0 if low <= 1 < high else (low + high) / 2


def states(lm, windows, layer):
    """[windows, context, d_model]: hidden states after block `layer`."""
    out = [lm.model(w[None], output_hidden_states=True).hidden_states[layer + 1] for w in windows]
    return torch.cat(out).double().numpy()


def places(norms, limit):
    """Position set -> list of (window, position)."""
    num_windows, context = norms.shape
    every = [(w, t) for w in range(num_windows) for t in range(context)]
    later = [(w, t) for w, t in every if t > 0]
    return {
        "all": every,
        "without_first": later,
        "norm_filtered": [(w, t) for w, t in later if norms[w, t] <= limit],
    }


def null_states(x, dense_x, chosen, partner, stats, shift, gain):
    """A copy of `x` in which each chosen token has m + g x_hat + the remainder of its partner."""
    mean, sigma = stats
    found = x.copy()

    def normalised(states, place):
        return (states[place] - mean) / sigma

    for place in chosen:
        other = partner[place]
        remainder = normalised(x, other) - shift - gain * normalised(dense_x, other)
        found[place] = mean + sigma * (shift + gain * normalised(dense_x, place) + remainder)
    return found


def cross_entropy(lm, windows, layer, chosen, rebuild, x=None):
    """Per window: sum of -log p(next) over predictions made at `chosen`, and their number.

    There activations are those of `x` (None: the model's own), rebuilt.
    """
    sums = []
    for w, tokens in enumerate(windows):
        here = [t for v, t in chosen if v == w]
        losses = []

        def swap(_module, _inputs, output, here=here, w=w):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.clone()
            for t in here:
                value = hidden[0, t].double().numpy() if x is None else x[w, t]
                if rebuild or x is not None:
                    hidden[0, t] = torch.tensor(rebuild(value) if rebuild else value)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = lm.blocks[layer].register_forward_hook(swap)
        scores = lm.model(tokens[None]).logits[0].double().numpy()
        handle.remove()
        for t in here:
            if t + 1 < len(tokens):
                row = scores[t] - scores[t].max()
                losses.append(float(np.log(np.exp(row).sum()) - row[int(tokens[t + 1])]))
        sums.append((sum(losses), len(losses)))
    return np.array(sums)


def jackknifed(statistic, groups):
    """A statistic of lists of windows, and its standard error by leaving out each list in turn."""
    everything = [window for group in groups for window in group]
    without = [statistic([w for w in everything if w not in group]) for group in groups]
    mean = sum(without) / len(without)
    scale = (len(without) - 1) / len(without)
    return statistic(everything), (scale * sum((value - mean) ** 2 for value in without)) ** 0.5


def comparison(parts, dense_parts, groups):
    """The three numbers of the verdict with their errors, from sums per window of `measure`."""

    def total(of, name, windows):
        return sum(of[name][w] for w in windows)

    def fvu(of, variance, windows):
        return total(of, "error", windows) / total(variance, "variance", windows)

    def recovered(of, windows):
        model, mean, sae = (total(of, name, windows) for name in ("model", "mean", "sae"))
        return (mean - sae) / (mean - model)

    def dense_var(ws):
        return fvu(parts, dense_parts, ws) / fvu(dense_parts, dense_parts, ws)

    def raw(ws):
        return fvu(parts, parts, ws) / fvu(dense_parts, dense_parts, ws)

    def drop(ws):
        return recovered(dense_parts, ws) - recovered(parts, ws)

    return {
        "fvu_dense_var_ratio": jackknifed(dense_var, groups),
        "fvu_raw_ratio": jackknifed(raw, groups),
        "ce_drop": jackknifed(drop, groups),
    }


def measure(lm, sae, windows, refit_windows, layer, limits, dense, l0, null=None):
    """Rows by (positions, refit), each with its sums per window.

    `dense`: the dense model; `l0`: its L0 per set, or None. `null`: makes of states, the dense ones
    and the chosen tokens what is read on norm_filtered instead, of eval (0) or refit (1) windows.
    """
    x, x_refit = states(lm, windows, layer), states(lm, refit_windows, layer)
    dense_x = states(dense, windows, layer)
    dense_refit = states(dense, refit_windows, layer)
    norms, refit_norms = (np.sqrt((s**2).sum(-1)) for s in (dense_x, dense_refit))
    chosen, chosen_refit = places(norms, limits), places(refit_norms, limits)
    sigma = np.array([dense_refit[p] for p in chosen_refit["norm_filtered"]]).std(0)
    read, own_refit = None, x_refit
    if null:
        chosen = {"norm_filtered": chosen["norm_filtered"]}
        x = read = null(0, x, dense_x, chosen["norm_filtered"])
        x_refit = null(1, x_refit, dense_refit, chosen_refit["norm_filtered"])
    rows = {}
    for name, tokens in chosen.items():
        xs = np.array([x[p] for p in tokens])
        fit = np.array([x_refit[p] for p in chosen_refit[name]])
        dense_xs = np.array([dense_x[p] for p in tokens])
        ablated = np.mean([own_refit[p] for p in chosen_refit[name]], axis=0)
        factor = 1.0 if l0 is None else sae.factor_for(fit, round(l0[name] * len(fit)))

        def shift(factor, fit=fit):
            return np.mean([v - sae.rebuild(v, factor) for v in fit], axis=0)

        kinds = {
            "none": (1.0, np.zeros(len(sigma))),
            "b_dec": (1.0, shift(1.0)),
            "threshold": (factor, shift(factor)),
        }
        model = cross_entropy(lm, windows, layer, tokens, None, read)
        mean = cross_entropy(lm, windows, layer, tokens, lambda v, ablated=ablated: ablated)
        for kind, (scale, delta) in kinds.items():

            def rebuild(v, scale=scale, delta=delta):
                return sae.rebuild(v, scale) + delta

            error = np.array([v - rebuild(v) for v in xs])
            centred = xs - xs.mean(0)
            with_sae = cross_entropy(lm, windows, layer, tokens, rebuild, read)
            ce = {k: v[:, 0].sum() / v[:, 1].sum() for k, v in
                  (("model", model), ("mean_ablated", mean), ("sae", with_sae))}  # fmt: skip
            of_window = [[n for n, place in enumerate(tokens) if place[0] == w]
                         for w in range(len(windows))]  # fmt: skip
            rows[name, kind] = {
                "fvu": ((error / sigma) ** 2).sum() / ((centred / sigma) ** 2).sum(),
                "fvu_raw": (error**2).sum() / (centred**2).sum(),
                "fvu_dense_var": (error**2).sum() / ((dense_xs - dense_xs.mean(0)) ** 2).sum(),
                "l0": sae.active(xs, scale) / len(xs),
                "ce_model": ce["model"],
                "ce_mean_ablated": ce["mean_ablated"],
                "ce_sae": ce["sae"],
                "ce_recovered": (ce["mean_ablated"] - ce["sae"])
                / (ce["mean_ablated"] - ce["model"]),
                "parts": {
                    "error": [(error[here] ** 2).sum() for here in of_window],
                    "variance": [(centred[here] ** 2).sum() for here in of_window],
                    "model": model[:, 0],
                    "mean": mean[:, 0],
                    "sae": with_sae[:, 0],
                },
            }
    return rows
