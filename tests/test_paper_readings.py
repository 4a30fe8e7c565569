"""What the paper leaves open is read as docs/methods.md says."""

import numpy as np
import pandas as pd
import pytest

from independent import paper as independent
from prunelens.analyses.predictor import quintile_rows
from prunelens.checkpoint import model_shape
from prunelens.config import ModelConfig
from prunelens.paper import published


def test_the_papers_accuracies_are_of_95_rows():
    """19 conditions x 5 quintiles; rows of single latents would be thousands."""
    accuracies = (100 * published("predictor")["accuracy"]).round(1)
    assert sorted(accuracies) == [69.5, 76.8, 83.2]
    assert independent.row_counts_that_give(accuracies, 189) == [95]
    assert [round(share * 95 / 100) for share in sorted(accuracies)] == [66, 73, 79]


def test_rows_of_the_predictor_are_conditions_and_quintiles_of_one_seed():
    draw = np.random.default_rng(0)
    latents = pd.DataFrame(
        {"model": m, "condition": f"{m}/{s}", "sparsity": s, "seed": seed, "latent": latent}
        for m in ("a", "b") for s in (0.3, 0.5) for seed in (3, 2, 7) for latent in range(23)
    )  # fmt: skip
    latents["firing_rate"] = draw.integers(1, 9, len(latents)) / 10  # with ties
    latents["matched"] = draw.integers(0, 2, len(latents)).astype(float)
    latents["init_retention"] = 0.5
    slow = independent.quintile_rows(latents.to_dict("records"))
    fast = quintile_rows(latents)
    assert len(fast) == len(slow) == 2 * 2 * 5
    for row in fast.to_dict("records"):
        expected = slow[row["model"], row["condition"], row["quintile"]]
        assert {name: row[name] for name in expected} == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "million", "share"),
    [
        ("google/gemma-3-1b-pt", 302.0, 0.30),
        ("google/gemma-2-2b", 589.8, 0.23),
        ("meta-llama/Llama-3.2-1B", 262.7, 0.21),
    ],
)
def test_the_head_is_a_good_part_of_what_global_magnitude_prunes(name, million, share, monkeypatch):
    """The numbers of docs/methods.md and of the study files' heads."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    shape = model_shape(ModelConfig(name=name))
    head = shape.d_model * shape.vocabulary_size
    assert round(head / 1e6, 1) == million
    assert round(head / (head + shape.linear_weights), 2) == share
