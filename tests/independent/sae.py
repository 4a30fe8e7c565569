"""TopK SAE and its measures, token by token in numpy float64, from methods §5."""

import numpy as np


def encode(x_hat, encoder_weight, encoder_bias, k):
    """Dense z [tokens, latents]: per token the k largest of ReLU(W_enc x + b_enc)."""
    z = np.zeros((len(x_hat), len(encoder_bias)))
    for t, x in enumerate(x_hat):
        pre = [
            max(0.0, float(row @ x + b))
            for row, b in zip(encoder_weight, encoder_bias, strict=True)
        ]
        for i in sorted(range(len(pre)), key=lambda i: -pre[i])[:k]:
            z[t, i] = pre[i]
    return z


def decode(z, decoder_weight, decoder_bias):
    """x_rec [tokens, d_model]."""
    out = np.zeros((len(z), len(decoder_bias)))
    for t in range(len(z)):
        out[t] = decoder_bias
        for i in range(z.shape[1]):
            out[t] += z[t, i] * decoder_weight[i]
    return out


def fvu(x, x_rec):
    """Sum of squared errors over sum of squared distances from the mean, over all tokens.

    NaN where no token differs from another.
    """
    spread = variance(x, x.mean(0)) if (x != x[0]).any() else 0.0
    return squared_error(x, x_rec) / spread if spread > 0 else np.nan


def squared_error(x, x_rec):
    """Sum over tokens of |x - x_rec|^2."""
    return sum(float((a - b) @ (a - b)) for a, b in zip(x, x_rec, strict=True))


def variance(x, mean=None):
    """Sum over tokens of |x - mean|^2."""
    mean = x.mean(0) if mean is None else mean
    return sum(float((row - mean) @ (row - mean)) for row in x)


def firing_rate(z):
    """Per latent, the share of tokens on which it fires."""
    return np.array([sum(v > 0 for v in z[:, i]) / len(z) for i in range(z.shape[1])])


def mean_activation(z):
    """Per latent, its mean where it fires; NaN where it never does."""
    return np.array([c[c > 0].mean() if (c > 0).any() else np.nan for c in z.T])


def loss(x_hat, x_rec):
    """Mean over tokens of the squared error summed over d."""
    return squared_error(x_hat, x_rec) / len(x_hat)
