"""Verdicts do not depend on the machine: other threads, another order of float32 sums."""

import pathlib

import numpy as np
import pandas as pd
import pytest
import torch

from prunelens import planted
from prunelens.analyses.claims import judge_claims
from prunelens.analyses.fates import latent_fates
from prunelens.analyses.fragility import fragility_contrasts
from prunelens.analyses.noise import fit_common_change
from prunelens.analyses.persistence import persistence
from prunelens.analyses.predictor import fit_predictor
from prunelens.analyses.verdict import transfer_verdicts
from prunelens.sae.topk import TopKSAE
from prunelens.study.folder import open_study
from prunelens.study.results import study_results

NUM_TOKENS, DOCUMENTS, SEEDS = 8_000, 16, (0, 1)
CONDITIONS = {
    "magnitude-global-0.30": ("magnitude", 0.3),
    "magnitude-global-0.50": ("magnitude", 0.5),
    "wanda-row-0.30": ("wanda", 0.3),
    "wanda-row-0.50": ("wanda", 0.5),
}

DEMO = pathlib.Path(__file__).parents[1] / "runs" / "demo"
NAMES = ("sparsity", "tau", "eps")  # numbers that say which row it is


class Rows:
    """Activations in memory, their axes in some order."""

    def __init__(self, values, axes):
        self.values = values[:, axes].contiguous()

    def rows(self, index):
        return self.values[index].clone()


@pytest.fixture(scope="module")
def world():
    """Dense activations, and pruned ones of four conditions, in which rare features are lost."""
    dense = planted.dense_world()
    x = planted.world_activations(dense, NUM_TOKENS, tokens_seed=2, noise_seed=2)
    mean, sigma = x.mean(0), x.std(0)
    pruned = {}
    for number, label in enumerate(CONDITIONS):
        after, _ = planted.pruned_world(dense, "by_rate", seed=number)
        y = planted.world_activations(after, NUM_TOKENS, tokens_seed=2, noise_seed=100 + number)
        pruned[label] = (y - mean) / sigma
    return dense, (x - mean) / sigma, pruned


def verdicts(world, *, threads, axes):
    """The claims that read pruned activations, and all their numbers."""
    dense, x, pruned = world
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        fates = {label: fates_of(dense, x, y, axes, label) for label, y in pruned.items()}
    finally:
        torch.set_num_threads(before)
    contrasts, rows = [], []
    for label, (method, sparsity) in CONDITIONS.items():
        run = {"run": f"m/L0/{label}", "model": "m", "layer": 0}
        run |= {"method": method, "sparsity": sparsity}
        contrasts.append(fragility_contrasts(fates[label]).assign(**run))
        rows.append(fates[label].assign(model="m", condition=run["run"], sparsity=sparsity))
    predictor = fit_predictor(pd.concat(rows, ignore_index=True), ()).table
    tables = {"fragility_contrasts": pd.concat(contrasts, ignore_index=True)}
    claims = judge_claims({**tables, "predictor": predictor}).set_index("claim")
    return claims.loc[[1, 2, 6, 7, 8]], tables["fragility_contrasts"]


def fates_of(dense, x, y, axes, label):
    second = torch.arange(NUM_TOKENS // 2, NUM_TOKENS)
    both = Rows(x, axes), Rows(y, axes)
    seed = list(CONDITIONS).index(label)
    change = fit_common_change(*both, torch.arange(NUM_TOKENS // 2), seed=seed)
    groups = torch.arange(len(second)) * DOCUMENTS // len(second)
    parts, latents = [], {}
    for seed in SEEDS:
        sae, rates = dictionary(dense, axes, seed)
        table = persistence(sae, *both, second, change=change, groups=groups, seed=seed)
        parts.append(table.assign(seed=seed))
        columns = {"latent": range(len(rates)), "firing_rate": rates}
        columns |= {"firing_rate_first_half": rates, "mean_activation": 1.0}
        columns |= {"init_retention": np.linspace(0.5, 0.9, len(rates)), "resampled": False}
        latents[seed] = pd.DataFrame(columns)
    arm = {"arm": "shared_init", "match": 0, "cosine": 0.8, "mutual": True}
    matches = pd.DataFrame(
        [{**arm, "init_a": s, "init_b": s, "latent": i} for s in SEEDS for i in range(len(rates))]
    )
    return latent_fates(latents, matches, SEEDS, persistence=pd.concat(parts))


def dictionary(dense, axes, seed):
    """Most of the planted directions, as if an SAE had found them."""
    kept = np.random.default_rng(seed).permutation(len(dense.directions))[:200]
    sae = TopKSAE.initialise(len(axes), len(kept), 8, init_seed=seed).requires_grad_(False)
    sae.encoder_weight.copy_(dense.directions[kept, 0][:, axes])
    sae.encoder_bias.fill_(-0.5)
    return sae, dense.firing_rates[kept].numpy()


def test_other_threads_and_another_order_of_sums_give_the_same_verdicts(world):
    width = world[1].shape[1]
    first, numbers = verdicts(world, threads=1, axes=torch.arange(width))
    other, changed = verdicts(world, threads=2, axes=torch.arange(width).flip(0))
    values = numbers["value"].to_numpy(), changed["value"].to_numpy()
    assert not np.array_equal(*values)  # the arithmetic did differ
    np.testing.assert_allclose(*values, atol=0.02)
    assert list(first["verdict"]) == list(other["verdict"])
    assert set(first["verdict"]) - {"undecided"}  # something is decided that could have turned


def test_rounded_tables_give_the_same_verdicts(world):
    """A table that lost its last digits on another machine."""
    _, numbers = verdicts(world, threads=1, axes=torch.arange(world[1].shape[1]))
    generator = np.random.default_rng(0)
    before = judge_claims({"fragility_contrasts": numbers})["verdict"]
    for _ in range(5):
        moved = numbers.copy()
        for column in ("value", "error", "least", "most"):
            moved[column] *= 1 + 1e-5 * generator.standard_normal(len(moved))
        after = judge_claims({"fragility_contrasts": moved})["verdict"]
        assert list(after) == list(before)


@pytest.mark.skipif(not (DEMO / "report.html").exists(), reason="run `make demo` first")
def test_the_demo_is_judged_alike_where_its_last_digits_differ():
    tables = study_results(*open_study(DEMO))
    before = list(tables.pop("claims")["verdict"])
    reuse = tables["transfer"][tables["transfer"]["verdict"] != ""]
    generator = np.random.default_rng(0)
    for _ in range(2):
        moved = {name: perturbed(table, generator) for name, table in tables.items()}
        assert list(judge_claims(moved)["verdict"]) == before
        for _, rows in reuse.groupby("run"):
            again = transfer_verdicts(perturbed(rows, generator).assign(reason=""))
            assert list(again["verdict"]) == list(rows["verdict"])
    assert set(before) - {"undecided"}


def perturbed(table, generator):
    """Every number but those that name a row, off by a part in 100,000."""
    moved = table.copy()
    for name in moved.columns.difference(NAMES):
        if pd.api.types.is_float_dtype(moved[name]):
            moved[name] *= 1 + 1e-5 * generator.standard_normal(len(moved))
        elif moved[name].map(lambda value: isinstance(value, np.ndarray)).any():
            moved[name] = [
                value * (1 + 1e-5 * generator.standard_normal(len(value))) for value in moved[name]
            ]
    return moved
