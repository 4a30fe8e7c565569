"""Exported SAEs in plain numpy float64: the files as each library defines them, and ties."""

import json
import pathlib

import numpy as np
from safetensors.numpy import load_file

from independent import sae


def read_exported(folder, library):
    """(w_enc [latents, d], b_enc, w_dec [latents, d], b_dec, k) as float64."""
    folder = pathlib.Path(folder)
    described = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    if library == "saelens":
        t = load_file(folder / "sae_weights.safetensors")
        found = t["W_enc"].T, t["b_enc"], t["W_dec"], t["b_dec"]
        assert described["apply_b_dec_to_input"] and described["normalize_activations"] == "none"
        assert not described["rescale_acts_by_decoder_norm"]
    else:
        t = load_file(folder / "sae.safetensors")
        found = t["encoder.weight"], t["encoder.bias"], t["W_dec"], t["b_dec"]
        assert described["activation"] == "topk" and not described["transcode"]
    return *(part.astype(np.float64) for part in found), described["k"]


def exported_forward(x, w_enc, b_enc, w_dec, b_dec, k):
    """(z, x_rec) of a library that takes b_dec off its input; z is [tokens, latents]."""
    z = sae.encode(x - b_dec, w_enc, b_enc, k)
    return z, sae.decode(z, w_dec, b_dec)


def own_forward(x, mean, sigma, w_enc, b_enc, w_dec, b_dec, k):
    """(z, x_rec) of our SAE on raw activations: normalise, encode, decode, undo."""
    z = sae.encode((x - mean) / sigma, w_enc, b_enc, k)
    return z, sigma * sae.decode(z, w_dec, b_dec) + mean


def gaps(x, mean, sigma, w_enc, b_enc, k):
    """Per token: how far the k-th largest pre-activation is ahead of the next; rounding may swap
    the two where that is little. Infinite where the ReLU drops the k-th, so that none is cut off.
    """
    found = []
    for row in (x - mean) / sigma:
        pre = np.sort(w_enc @ row + b_enc)[::-1]
        found.append(pre[k - 1] - pre[k] if pre[k - 1] > 0 else np.inf)
    return np.array(found)
