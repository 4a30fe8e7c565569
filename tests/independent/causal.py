"""Ablations one by one: a whole forward pass each, states and KL in numpy float64 (methods §7)."""

import numpy as np
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
