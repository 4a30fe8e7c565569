"""Ablations one by one: a whole forward pass each, states and KL in numpy float64 (methods §7).

And what a group's mean is uncertain by: documents and latents left out one by one (methods §10).
"""

import math

import numpy as np
import scipy.optimize
import scipy.stats
import torch
from tests.independent import sae as slow_sae

from prunelens.model import logits, replace_at_site, run_to_site


class World:
    """A model with its SAE, prompt by prompt; the first `skip_first` positions stay as they are."""

    def __init__(self, lm, sae, mean, sigma, tokens, site, layer, skip_first=0):
        self.lm, self.tokens, self.place = lm, tokens, (site, layer)
        weights = [part.detach().double().numpy() for part in sae.weights]
        self.encoder, self.encoder_bias, self.decoder, self.decoder_bias = weights
        self.mean, self.sigma = mean.double().numpy(), sigma.double().numpy()
        self.x = run_to_site(lm, tokens, site, layer).double().numpy()
        self.z, self.reconstruction = [], []
        for x in self.x:
            x_hat = (x - self.mean) / self.sigma
            z = slow_sae.encode(x_hat, self.encoder, self.encoder_bias, sae.k)
            x_rec = slow_sae.decode(z, self.decoder, self.decoder_bias)
            restored = self.sigma * x_rec + self.mean
            z[:skip_first], restored[:skip_first] = 0, x[:skip_first]
            self.z.append(z)
            self.reconstruction.append(restored)

    def final(self, protocol, latent, prompt, direction=None):
        """KL at the last position, the latent gone at every position."""
        gone = self._part(latent, prompt, direction)
        return self._kl(protocol, prompt, gone, len(gone) - 1)

    def firing(self, protocol, latent, prompt, position, direction=None):
        """KL at `position`, the latent gone there alone."""
        gone = self._part(latent, prompt, direction)
        gone[np.arange(len(gone)) != position] = 0
        return self._kl(protocol, prompt, gone, position)

    def reconstruction_kl(self, prompt):
        """KL(original || SAE) at the last position."""
        nothing = np.zeros_like(self.x[prompt])
        return self._kl("paper", prompt, nothing, len(nothing) - 1)

    def _part(self, latent, prompt, direction):
        direction = self.decoder[latent] if direction is None else direction
        return np.array([z[latent] * direction * self.sigma for z in self.z[prompt]])

    def _kl(self, protocol, prompt, gone, position):
        own = logits(self.lm, self.tokens[prompt][None])[0, position]
        if protocol == "error_preserving":
            return kl(own, self._logits(prompt, self.x[prompt] - gone)[position])
        without = self._logits(prompt, self.reconstruction[prompt] - gone)[position]
        if protocol == "paper":
            return kl(own, without)
        return kl(self._logits(prompt, self.reconstruction[prompt])[position], without)

    def _logits(self, prompt, states):
        new = torch.from_numpy(states).float()[None]
        return replace_at_site(self.lm, self.tokens[prompt][None], *self.place, lambda _: new)[0]


def kl(first, second):
    """KL(softmax(first) || softmax(second)) in nats."""
    p, q = (np.exp(v - v.max()) for v in (first.double().numpy(), second.double().numpy()))
    p, q = p / p.sum(), q / q.sum()
    return float(sum(a * (np.log(a) - np.log(b)) for a, b in zip(p, q, strict=True)))


class Side:
    """One side of a number: latents, each with (document, KL) of its contexts; sign +1 or -1."""

    def __init__(self, contexts, sign=1):
        self.contexts, self.sign = [each for each in contexts if each], sign
        self.documents = {document for each in contexts for document, _ in each}

    def latent_means(self, left_out=None):
        """NaN where no context is left."""
        kept = [[kl for d, kl in each if d != left_out] for each in self.contexts]
        return [self.sign * sum(each) / len(each) if each else math.nan for each in kept]


def _mean(values):
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known)


def _parts(sides, left_out=None):
    """What every latent adds to the difference of the sides' means."""
    parts = []
    for side in sides:
        means = side.latent_means(left_out)
        count = sum(not math.isnan(m) for m in means)
        parts += [(m - _mean(means)) / count for m in means]
    return parts


def group_interval(seeds):
    """Mean over seeds of the sum over sides of the mean over latents: value, error, df, interval.

    `seeds` holds a list of sides for each. Every document is left out in turn.
    """
    documents = sorted(set().union(*(side.documents for sides in seeds for side in sides)))
    num_documents, num_seeds = len(documents), len(seeds)

    def statistic(sides, left_out=None):
        return sum(_mean(side.latent_means(left_out)) for side in sides)

    def jackknife(values):
        centre = sum(values) / num_documents
        return (num_documents - 1) / num_documents * sum((v - centre) ** 2 for v in values)

    values = [statistic(sides) for sides in seeds]
    value = sum(values) / num_seeds
    replicates = [[statistic(sides, d) for d in documents] for sides in seeds]
    by_document = [sum(each) / num_seeds for each in zip(*replicates, strict=True)]
    own = jackknife(by_document)

    beyond, thirds, dfs = [], [], []
    for sides in seeds:
        parts = _parts(sides)
        count = len(parts)
        over_latents = count / (count - 1) * sum(p**2 for p in parts)
        explained = 0.0
        for which in zip(*(_parts(sides, d) for d in documents), strict=True):
            known = [p for p in which if not math.isnan(p)]
            explained += sum((p - sum(known) / len(known)) ** 2 for p in known)
        explained *= (num_documents - 1) / num_documents
        beyond.append(max(0.0, over_latents - explained))
        thirds.append(sum(p**3 for p in parts))
        dfs.append(sum(p**2 for p in parts) ** 2 / sum(p**4 for p in parts))
    beyond = sum(beyond) / num_seeds
    added = beyond
    if num_seeds > 1:
        between = sum((v - value) ** 2 for v in values) / (num_seeds - 1)
        between -= sum(
            jackknife([each[i] - by_document[i] for i in range(num_documents)])
            for each in replicates
        ) / (num_seeds - 1)
        added = min(max(beyond - (1 - 1 / num_seeds) * between, beyond / num_seeds), 2 * beyond)
    variance = own + added
    independent_seeds = max(beyond / added, 1)
    latent_df = independent_seeds * sum(dfs) / num_seeds
    df = variance**2 / (own**2 / (num_documents - 1) + added**2 / latent_df)
    error = math.sqrt(variance)
    skew = sum(thirds) / num_seeds / independent_seeds**2 / error**3
    quantile = scipy.stats.t.ppf(0.975, df)

    def hall(t):
        return t + skew * t**2 / 3 + skew**2 * t**3 / 27 + skew / 6

    down, up = (
        scipy.optimize.brentq(lambda t, end=end: hall(t) - end, -1e4, 1e4)
        for end in (quantile, -quantile)
    )
    return value, error, df, value - down * error, value - up * error
