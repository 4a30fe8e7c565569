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


def cross_entropy(lm, windows, layer, chosen, rebuild):
    """Mean of -log p(next) over predictions made at `chosen`, where activations are rebuilt."""
    losses = []
    for w, tokens in enumerate(windows):
        here = [t for v, t in chosen if v == w]

        def swap(_module, _inputs, output, here=here):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden.clone()
            for t in here if rebuild else ():
                hidden[0, t] = torch.tensor(rebuild(hidden[0, t].double().numpy()))
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = lm.blocks[layer].register_forward_hook(swap)
        scores = lm.model(tokens[None]).logits[0].double().numpy()
        handle.remove()
        for t in here:
            if t + 1 < len(tokens):
                row = scores[t] - scores[t].max()
                losses.append(float(np.log(np.exp(row).sum()) - row[int(tokens[t + 1])]))
    return sum(losses) / len(losses)


def measure(lm, sae, windows, refit_windows, layer, limits, dense, l0):
    """Rows by (positions, refit). `dense`: the dense model; `l0`: its L0 per set, or None."""
    x, x_refit = states(lm, windows, layer), states(lm, refit_windows, layer)
    dense_x = states(dense, windows, layer)
    dense_refit = states(dense, refit_windows, layer)
    norms, refit_norms = (np.sqrt((s**2).sum(-1)) for s in (dense_x, dense_refit))
    chosen, chosen_refit = places(norms, limits), places(refit_norms, limits)
    sigma = np.array([dense_refit[p] for p in chosen_refit["norm_filtered"]]).std(0)
    rows = {}
    for name, tokens in chosen.items():
        xs = np.array([x[p] for p in tokens])
        fit = np.array([x_refit[p] for p in chosen_refit[name]])
        dense_xs = np.array([dense_x[p] for p in tokens])
        factor = 1.0 if l0 is None else sae.factor_for(fit, round(l0[name] * len(fit)))

        def shift(factor, fit=fit):
            return np.mean([v - sae.rebuild(v, factor) for v in fit], axis=0)

        kinds = {
            "none": (1.0, np.zeros(len(sigma))),
            "b_dec": (1.0, shift(1.0)),
            "threshold": (factor, shift(factor)),
        }
        ce_model = cross_entropy(lm, windows, layer, tokens, None)
        ce_mean = cross_entropy(lm, windows, layer, tokens, lambda v, fit=fit: fit.mean(0))
        for kind, (scale, delta) in kinds.items():

            def rebuild(v, scale=scale, delta=delta):
                return sae.rebuild(v, scale) + delta

            error = np.array([v - rebuild(v) for v in xs])
            centred = xs - xs.mean(0)
            ce_sae = cross_entropy(lm, windows, layer, tokens, rebuild)
            rows[name, kind] = {
                "fvu": ((error / sigma) ** 2).sum() / ((centred / sigma) ** 2).sum(),
                "fvu_raw": (error**2).sum() / (centred**2).sum(),
                "fvu_dense_var": (error**2).sum() / ((dense_xs - dense_xs.mean(0)) ** 2).sum(),
                "l0": sae.active(xs, scale) / len(xs),
                "ce_model": ce_model,
                "ce_mean_ablated": ce_mean,
                "ce_sae": ce_sae,
                "ce_recovered": (ce_mean - ce_sae) / (ce_mean - ce_model),
            }
    return rows
