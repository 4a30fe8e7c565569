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


def encode_batch(x_hat, encoder_weight, encoder_bias, k):
    """Dense z: of all of a batch's ReLU(W_enc x + b_enc) the k x tokens largest."""
    z = encode(x_hat, encoder_weight, encoder_bias, len(encoder_bias))
    places = [(-z[t, i], t, i) for t in range(len(z)) for i in range(z.shape[1])]
    for _, t, i in sorted(places)[k * len(x_hat) :]:
        z[t, i] = 0.0
    return z


def encode_above(x_hat, encoder_weight, encoder_bias, threshold):
    """Dense z: whatever exceeds the threshold."""
    z = encode(x_hat, encoder_weight, encoder_bias, len(encoder_bias))
    return np.where(z > threshold, z, 0.0)


def train_batchtopk(batches, weights, k, rates):
    """BatchTopK SAE after a step per batch: its four weights, and the threshold after each step.

    Gradients by the chain rule, Adam and unit rows written out. The threshold is the first step's
    smallest kept activation, then moves by a tenth towards each step's.
    """
    weights = [w.copy() for w in weights]
    moments = [[np.zeros_like(w), np.zeros_like(w)] for w in weights]
    thresholds = []
    for n, (x, rate) in enumerate(zip(batches, rates, strict=True), start=1):
        w_enc, b_enc, w_dec, b_dec = weights
        z = encode_batch(x, w_enc, b_enc, k)
        smallest = z[z > 0].min()
        before = thresholds[-1] if thresholds else smallest
        thresholds.append(before + 0.1 * (smallest - before))
        error = 2 * (decode(z, w_dec, b_dec) - x) / len(x)
        back = (error @ w_dec.T) * (z > 0)
        gradients = [back.T @ x, back.sum(0), z.T @ error, error.sum(0)]
        for w, g, (mean, square) in zip(weights, gradients, moments, strict=True):
            mean += 0.1 * (g - mean)
            square += 0.001 * (g * g - square)
            w -= rate * (mean / (1 - 0.9**n)) / (np.sqrt(square / (1 - 0.999**n)) + 1e-8)
        w_dec /= np.linalg.norm(w_dec, axis=1, keepdims=True)
    return weights, thresholds
