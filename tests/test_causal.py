import numpy as np
import pandas as pd
import pytest
import torch
from tests.independent import causal as slow

from conftest import ARCHITECTURES, VOCABULARY, tiny_language_model
from prunelens.activations import Statistics
from prunelens.analyses.causal import Ablations, ablate, nothing_ablated
from prunelens.analyses.causal_groups import causal_summary, latent_groups
from prunelens.analyses.statistics import PromptTerm, interval_over_prompts
from prunelens.errors import UserError
from prunelens.model import run_to_site
from prunelens.sae.topk import TopKSAE

PROMPTS, CONTEXT, LATENTS, NEVER = 4, 24, 48, 47  # the context is longer than conftest's window


def tokens():
    return torch.randint(VOCABULARY, (PROMPTS, CONTEXT), generator=torch.Generator().manual_seed(0))


def statistics_of(lm, site, layer):
    x = run_to_site(lm, tokens(), site, layer).flatten(0, 1)
    return Statistics(x.mean(0), x.std(0))


def sparse_sae(d_model=16, k=3):
    """Random, with biases; the last latent never fires, the others rarely."""
    sae = TopKSAE.initialise(d_model, LATENTS, k, init_seed=3)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(4)
        sae.decoder_bias.copy_(0.1 * torch.randn(d_model, generator=generator))
        sae.encoder_bias.copy_(-0.3 * torch.rand(LATENTS, generator=generator))
        sae.encoder_bias[NEVER] = -1e3
    return sae


def ablations(lm, sae=None, *, site="resid_post", layer=1, **changes):
    given = {
        "latents": [*range(0, LATENTS, 12), NEVER],
        "random_direction_latents": [12, 24, NEVER],
        "contexts_per_latent": 3,
        "seed": 5,
        **changes,
    }
    sae = sparse_sae() if sae is None else sae
    statistics = statistics_of(lm, site, layer)
    return ablate(lm, sae, statistics, tokens(), site=site, layer=layer, **given)


PLACES = [(architecture, "resid_post", 0) for architecture in ARCHITECTURES]
PLACES += [("gemma2", "mlp_out", 1), ("gemma3", "attn_out", 1)]


@pytest.mark.parametrize(("architecture", "site", "layer"), PLACES)
def test_every_number_equals_one_forward_pass_for_each(architecture, site, layer):
    lm, sae = tiny_language_model(architecture), sparse_sae()
    found = ablations(lm, sae, site=site, layer=layer)
    world = slow.World(lm, sae, *statistics_of(lm, site, layer), tokens(), site, layer)
    rec = [world.reconstruction_kl(prompt) for prompt in range(PROMPTS)]
    np.testing.assert_allclose(found.reconstruction, rec, rtol=1e-4)
    own = found.kl[found.kl["kind"] == "latent"]
    firings = [
        sum(int((z[:, latent] > 0).sum()) for z in world.z) for latent in own["latent"].unique()
    ]
    num_contexts = 2 * sum(min(3, number) for number in firings)
    assert num_contexts >= 10
    sizes = own.groupby("contexts").size().to_dict()
    assert sizes == {"final": 5 * 3 * PROMPTS, "firing": num_contexts}
    for row in own.itertuples():
        z = world.z[row.prompt][:, row.latent]
        assert row.fires_final == (z[row.position] > 0)
        if row.contexts == "final":
            assert row.position == CONTEXT - 1
            expected = world.final(row.protocol, row.latent, row.prompt)
        else:
            assert z[row.position] > 0
            expected = world.firing(row.protocol, row.latent, row.prompt, row.position)
        assert row.kl == pytest.approx(expected, rel=2e-3, abs=1e-9), row


def test_a_random_direction_has_the_norm_of_the_latents_own(tiny_llama, monkeypatch):
    directions = {}

    def spy(sae, sigma, kind, latent, seed):
        directions[kind, latent] = original(sae, sigma, kind, latent, seed)
        return directions[kind, latent]

    from prunelens.analyses import ablation

    original = ablation._direction
    monkeypatch.setattr(ablation, "_direction", spy)
    sae = sparse_sae()
    with torch.no_grad():
        sae.decoder_weight[12] *= 3
    found = ablations(tiny_llama, sae).kl
    own, other = directions["latent", 12], directions["random_direction", 12]
    place = ("resid_post", 1)
    mean, sigma = statistics_of(tiny_llama, *place)
    torch.testing.assert_close(own, sae.decoder_weight[12].detach() * sigma)
    assert other.norm() == pytest.approx(float(own.norm()), rel=1e-5)
    assert abs(torch.cosine_similarity(own, other, dim=0)) < 0.8
    world = slow.World(tiny_llama, sae, mean, sigma, tokens(), *place)
    other = other / sigma
    rows = found[(found["kind"] == "random_direction") & (found["latent"] == 12)]
    assert len(rows) == 3 * PROMPTS + 2 * 3
    for row in rows.itertuples():
        where = [row.protocol, 12, row.prompt]
        if row.contexts == "firing":
            expected = world.firing(*where, row.position, direction=other.double().numpy())
        else:
            expected = world.final(*where, direction=other.double().numpy())
        assert row.kl == pytest.approx(expected, rel=2e-3, abs=1e-9)
    firing = found[(found["contexts"] == "firing") & (found["latent"] == 12)]
    places = [part[["prompt", "position"]].to_numpy() for _, part in firing.groupby("kind")]
    assert np.array_equal(*places)


def test_a_latent_that_never_fires_changes_nothing(tiny_llama):
    found = ablations(tiny_llama)
    rows = found.kl[found.kl["latent"] == NEVER]
    assert set(rows["contexts"]) == {"final"}
    paper = rows[(rows["protocol"] == "paper") & (rows["kind"] == "latent")]
    assert paper["kl"].to_numpy() == pytest.approx(found.reconstruction, abs=0)
    assert (rows.loc[rows["protocol"] != "paper", "kl"] == 0).all()
    assert not rows["fires_final"].any()


def test_a_perfect_sae_reconstructs_without_loss(tiny_llama):
    sae = TopKSAE(16, 32, 32)
    with torch.no_grad():  # ReLU(x) - ReLU(-x) = x
        both = torch.cat([torch.eye(16), -torch.eye(16)])
        sae.encoder_weight.copy_(both)
        sae.decoder_weight.copy_(both)
    found = ablations(tiny_llama, sae, latents=[0, 17], random_direction_latents=[])
    assert found.reconstruction.max() < 1e-9
    final = found.kl[found.kl["contexts"] == "final"].set_index(["latent", "prompt"])
    by_protocol = {name: part["kl"] for name, part in final.groupby("protocol")}
    assert by_protocol["paper"].min() > 1e-6  # its latents do matter
    for protocol in ("isolated", "error_preserving"):
        np.testing.assert_allclose(by_protocol[protocol], by_protocol["paper"], rtol=1e-3)


def test_latents_with_the_same_activation_and_direction_matter_the_same(tiny_llama):
    sae = sparse_sae(k=LATENTS)
    with torch.no_grad():
        for weights in (sae.encoder_weight, sae.encoder_bias, sae.decoder_weight):
            weights[7] = weights[6]
    found = ablations(tiny_llama, sae, latents=[6, 7], random_direction_latents=[]).kl
    final = found[found["contexts"] == "final"]
    one, other = (part["kl"].to_numpy() for _, part in final.groupby("latent"))
    assert one.max() > 0
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_batches_and_other_latents_do_not_change_a_result(tiny_llama, monkeypatch):
    alone = ablations(tiny_llama, latents=[12], random_direction_latents=[24]).kl
    monkeypatch.setattr("prunelens.model.FORWARD_TOKENS", {"cpu": 30})
    shares = []
    found = ablations(tiny_llama, progress=shares.append)
    key = ["latent", "kind", "protocol", "contexts", "prompt", "position"]
    both = alone.merge(found.kl, on=key, suffixes=("", "_among_others"))
    assert len(both) == len(alone)
    np.testing.assert_allclose(both["kl"], both["kl_among_others"], rtol=1e-3, atol=1e-10)
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert len(shares) > 10


def test_skipped_positions_are_neither_reconstructed_nor_changed(tiny_llama):
    whole = ablations(tiny_llama, skip_first=0)
    skipped = ablations(tiny_llama, skip_first=CONTEXT - 1, latents=range(LATENTS))
    assert (skipped.reconstruction != whole.reconstruction).all()
    assert set(skipped.kl["position"]) == {CONTEXT - 1}
    # With one position left, changing everything and changing that one are the same.
    wide = skipped.kl[skipped.kl["fires_final"]].pivot_table(
        index=["latent", "kind", "protocol", "prompt"], columns="contexts", values="kl"
    )
    assert len(wide.dropna())
    np.testing.assert_allclose(wide.dropna()["final"], wide.dropna()["firing"], rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": [], "random_direction_latents": []}, "latents: there are none"),
        ({"latents": [LATENTS]}, f"latents: {LATENTS} is not one of the SAE's {LATENTS}"),
        ({"contexts_per_latent": 0}, "causal.contexts_per_latent: 0"),
        ({"skip_first": CONTEXT}, "activations.skip_first: 24"),
        ({"sae": sparse_sae(d_model=8)}, "sae: made for d_model 8"),
    ],
)
def test_what_ablate_refuses(tiny_llama, changes, message):
    with pytest.raises(UserError, match=message):
        ablations(tiny_llama, **changes)


def fates(num=10):
    return pd.DataFrame(
        {
            "latent": np.arange(100, 100 + num),
            "match": np.arange(num)[::-1],
            "match_alive": np.arange(num) % 4 != 0,
            "cosine": np.linspace(0, 0.9, num),
            "persistence": np.linspace(0.9, 0, num),
            "firing_rate": np.geomspace(0.001, 0.5, num),
            "mean_activation": 1.0,
        }
    )


def members(groups, group):
    return groups.loc[groups["group"] == group, "latent"].tolist()


def test_groups_are_the_ends_of_the_measure():
    groups = latent_groups(fates(), grouping="cosine", group_size=2, seed=0)
    assert members(groups, "fragile") == [100, 101]
    assert members(groups, "robust") == [108, 109]
    assert members(groups, "matched") == [105, 106]  # the rarest of the upper half
    assert members(groups, "random") == members(groups, "random_direction")
    assert groups.set_index("latent")["match"].to_dict()[109] == 0
    other = latent_groups(fates(), grouping="persistence", group_size=2, seed=0)
    assert members(other, "fragile") == [109, 108]


def test_small_tables_ties_and_undefined_measures():
    table = fates(5).assign(cosine=0.5, persistence=[np.nan, 1, 1, 0, np.nan])
    groups = latent_groups(table, grouping="cosine", group_size=100, seed=0)
    assert members(groups, "fragile") == [100, 101]  # half of five, rounded down
    assert members(groups, "robust") == [103, 104]
    groups = latent_groups(table, grouping="persistence", group_size=100, seed=0)
    assert members(groups, "fragile") == [103]
    assert set(groups["latent"]) <= {101, 102, 103}
    assert latent_groups(table[:1], grouping="cosine", group_size=3, seed=0).empty


def test_matched_latents_are_the_nearest_that_are_left():
    generator = np.random.default_rng(0)
    table = fates(40).assign(
        cosine=generator.random(40),
        firing_rate=np.exp(generator.normal(size=40)) / 50,
        mean_activation=np.exp(generator.normal(size=40)),
    )
    groups = latent_groups(table, grouping="cosine", group_size=12, seed=0)
    matched = dict(zip(members(groups, "fragile"), members(groups, "matched"), strict=True))
    by_latent = table.set_index("latent")
    logs = np.log(by_latent[["firing_rate", "mean_activation"]])
    logs /= logs.std(ddof=0)
    left = set(by_latent.sort_values("cosine").index[20:])
    for latent in sorted(matched, key=lambda i: by_latent.loc[i, "firing_rate"]):
        distance = {i: float(((logs.loc[i] - logs.loc[latent]) ** 2).sum()) for i in left}
        assert matched[latent] == min(distance, key=distance.get)
        left.remove(matched[latent])


def test_what_groups_refuse():
    with pytest.raises(UserError, match="no column 'match_alive'"):
        latent_groups(fates().drop(columns="match_alive"), grouping="cosine", group_size=1, seed=0)
    with pytest.raises(UserError, match=r"causal\.group_size: 0"):
        latent_groups(fates(), grouping="cosine", group_size=0, seed=0)


def made_up(latents, num_prompts, seed, scale=1.0):
    """Ablations with numbers from a hat, each latent at its own level."""
    generator = np.random.default_rng(seed)
    rows = []
    for kind in ("latent", "random_direction"):
        for latent in latents:
            for prompt in range(num_prompts):
                for protocol in ("paper", "isolated", "error_preserving"):
                    kl = scale * (latent + generator.exponential())
                    fires = prompt % 2 == 0
                    rows.append((latent, kind, protocol, "final", prompt, 9, kl, fires))
                    if protocol != "paper" and prompt != 1:
                        kl = scale * (latent + generator.exponential())
                        rows.append((latent, kind, protocol, "firing", prompt, 4, kl, True))
    columns = ["latent", "kind", "protocol", "contexts", "prompt", "position", "kl", "fires_final"]
    return Ablations(pd.DataFrame(rows, columns=columns), np.full(num_prompts, 2.0))


def summary(num_prompts=8):
    groups = {"cosine": latent_groups(fates(), grouping="cosine", group_size=3, seed=0)}
    dense = made_up(range(100, 110), num_prompts, 1)
    pruned = made_up(range(10), num_prompts, 2, scale=2.0)
    table = causal_summary(groups, dense, pruned, seed=0)
    key = ["ablated_in", "group", "protocol", "contexts"]
    return groups["cosine"], dense, pruned, table.set_index(key).sort_index()


def mean_kl(found, kind, protocol, contexts, latents):
    rows = found.kl.query("kind == @kind and protocol == @protocol and contexts == @contexts")
    return np.mean([rows.loc[rows["latent"] == latent, "kl"].mean() for latent in latents])


def test_summary_equals_means_taken_by_hand():
    groups, dense, pruned, table = summary()
    assert len(table) == 3 * (5 + 1 + 2) * 5
    for group in ("robust", "fragile", "matched", "random", "random_direction"):
        kind = "random_direction" if group == "random_direction" else "latent"
        part = groups[groups["group"] == group]
        alive = part[part["match_alive"]]
        for protocol, contexts in (("paper", "final"), ("isolated", "firing")):
            means = [
                mean_kl(dense, kind, protocol, contexts, part["latent"]),
                mean_kl(pruned, kind, protocol, contexts, alive["match"]),
                mean_kl(dense, kind, protocol, contexts, alive["latent"]),
            ]
            rows = [
                table.loc[(where, group, protocol, contexts)]
                for where in ("dense", "pruned", "pruned_minus_dense")
            ]
            found = [row["kl_mean"] for row in rows]
            assert found == pytest.approx([*means[:2], means[1] - means[2]])
            assert [row["num_latents"] for row in rows] == [3, len(alive), len(alive)]
            assert rows[0]["num_prompts"] == (7 if contexts == "firing" else 8)
            assert rows[0]["ci_low"] < found[0] < rows[0]["ci_high"]
            assert rows[0]["firing_share"] == 0.5
            assert np.isnan(rows[2]["firing_share"])
            share = 2.0 / means[0] if protocol == "paper" else np.nan
            assert rows[0]["reconstruction_share"] == pytest.approx(share, nan_ok=True)
    dense_rows = table.loc["dense"]["kl_mean"]
    difference = dense_rows.loc["robust"] - dense_rows.loc["fragile"]
    assert dense_rows.loc["robust_minus_fragile"].to_numpy() == pytest.approx(
        difference.loc[dense_rows.loc["robust_minus_fragile"].index].to_numpy()
    )


def test_summary_without_living_matches_or_with_few_prompts_is_undefined():
    groups = latent_groups(fates(), grouping="cosine", group_size=3, seed=0)
    dense, pruned = made_up(range(100, 110), 4, 1), made_up(range(10), 4, 2)
    table = causal_summary({"cosine": groups.assign(match_alive=False)}, dense, pruned, seed=0)
    of_dense = table[table["ablated_in"] == "dense"]
    assert of_dense["kl_mean"].notna().all()
    assert of_dense["ci_low"].isna().all()  # four prompts
    others = table[table["ablated_in"] != "dense"]
    assert others[["kl_mean", "ci_low", "firing_share", "reconstruction_share"]].isna().all().all()
    assert (others["num_latents"] == 0).all()
    empty = causal_summary({"cosine": groups[:0]}, dense, pruned, seed=0)
    assert empty["kl_mean"].isna().all()


def test_nothing_to_ablate_in_the_pruned_model_is_undefined_with_a_reason():
    groups, dense, _, _ = summary()
    table = causal_summary(
        {"cosine": groups.assign(match_alive=False)}, dense, nothing_ablated(8), seed=0
    ).set_index("ablated_in")
    assert table.loc["pruned", "kl_mean"].isna().all()
    assert (table.loc["pruned", "reason"] == "no latent of the group was measured").all()
    assert table.loc["dense", "kl_mean"].notna().all()
    assert (table.loc["dense", "reason"] == "").all()


def test_interval_over_prompts_equals_a_loop_and_pairs_the_terms():
    generator = np.random.default_rng(3)
    counts = generator.integers(0, 3, (9, 4)).astype(float)
    sums = generator.random((9, 4)) * counts
    term = PromptTerm(1, sums, counts)
    found = interval_over_prompts([term], seed=7, draws=200)
    draws = np.random.default_rng(7).multinomial(9, np.full(9, 1 / 9), 200)
    values = []
    for drawn in draws:
        prompts = np.repeat(np.arange(9), drawn)
        means = [
            sums[prompts, i].sum() / counts[prompts, i].sum()
            for i in range(4)
            if counts[prompts, i].sum()
        ]
        values.append(np.mean(means))
    assert found.mean == pytest.approx(np.mean(sums.sum(0) / counts.sum(0)))
    assert [found.low, found.high] == pytest.approx(np.percentile(values, [2.5, 97.5]))
    # The same thing on both sides, and a constant more of it, vary together: no width is left.
    more = PromptTerm(1, sums + 0.5 * counts, counts)
    paired = interval_over_prompts([more, term._replace(sign=-1)], seed=7)
    assert list(paired) == pytest.approx([0.5, 0.5, 0.5])


def test_interval_over_prompts_covers_the_truth():
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        prompt_effect = generator.normal(size=(40, 1))  # what makes prompts the unit
        values = 1.0 + prompt_effect + generator.normal(size=(40, 6))
        found = interval_over_prompts(
            [PromptTerm(1, values, np.ones((40, 6)))], seed=trial, draws=300
        )
        hits += found.low <= 1.0 <= found.high
    assert 0.88 <= hits / 200 <= 0.99
