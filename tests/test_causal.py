import numpy as np
import pandas as pd
import pytest
import torch
from tests.independent import causal as slow

from conftest import ARCHITECTURES, VOCABULARY, tiny_language_model
from prunelens.activations import Statistics
from prunelens.analyses.causal import Ablations, ablate, nothing_ablated
from prunelens.analyses.causal_groups import (
    LARGEST_SPREAD,
    SeedAblations,
    causal_summary,
    latent_groups,
)
from prunelens.analyses.statistics import Estimate, crossed, ratio_of_means
from prunelens.analyses.synthetic import _ablations
from prunelens.errors import UserError
from prunelens.model import run_to_site
from prunelens.sae.topk import TopKSAE
from prunelens.upper_blocks import UpperBlocks

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
    upper = UpperBlocks(lm, tokens(), site=site, layer=layer)
    return ablate(upper, sae, statistics_of(lm, site, layer), **given)


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


def test_saes_that_share_the_blocks_above_find_the_same(tiny_llama):
    upper = UpperBlocks(tiny_llama, tokens(), site="resid_post", layer=1)
    given = {"latents": [12], "random_direction_latents": [], "contexts_per_latent": 3, "seed": 5}
    normalisation, sae = statistics_of(tiny_llama, "resid_post", 1), sparse_sae()
    own = ablate(upper, sae, normalisation, **given)
    ablate(upper, sparse_sae(k=7), normalisation, **given)
    pd.testing.assert_frame_equal(ablate(upper, sae, normalisation, **given).kl, own.kl)


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


NUM, SIZE = 160, 80  # latents of a made-up dictionary, and of a group
NUM_DOCUMENTS, PER_DOCUMENT = 6, 2


def made_up(latents, seed, scale=1.0, num_prompts=NUM_DOCUMENTS * PER_DOCUMENT):
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
                    if protocol != "paper" and prompt != 1 and generator.random() < 0.3:
                        kl = scale * (latent + generator.exponential())
                        rows.append((latent, kind, protocol, "firing", prompt, 4, kl, True))
    columns = ["latent", "kind", "protocol", "contexts", "prompt", "position", "kl", "fires_final"]
    return Ablations(pd.DataFrame(rows, columns=columns), np.full(num_prompts, 2.0))


def world(seed):
    """Latents 100 and up, whose matches are 0 and up; every fourth match is dead."""
    table = fates(NUM).assign(match=lambda t: (t["match"] // 2) * 2)  # two and two have the same
    groups = {"cosine": latent_groups(table, grouping="cosine", group_size=SIZE, seed=0)}
    dense = made_up(range(100, 100 + NUM), 10 * seed + 1)
    return SeedAblations(groups, dense, made_up(range(NUM), 10 * seed + 2, scale=2.0))


def documents(num_prompts=NUM_DOCUMENTS * PER_DOCUMENT):
    return np.arange(num_prompts) // PER_DOCUMENT


KEY = ["ablated_in", "group", "protocol", "contexts"]


def summary(seeds, where=None):
    table = causal_summary(seeds, documents() if where is None else where)
    return table.set_index(KEY).sort_index()


def contexts(world, model, group, protocol, contexts):
    """(document, KL) of every context, by member of a group; none where the match is dead."""
    kl = getattr(world, model).kl
    kind = "random_direction" if group == "random_direction" else "latent"
    kl = kl[(kl["kind"] == kind) & (kl["protocol"] == protocol) & (kl["contexts"] == contexts)]
    by_latent = {
        latent: list(zip(documents()[own["prompt"]], own["kl"], strict=True))
        for latent, own in kl.groupby("latent")
    }
    members = world.groups["cosine"].query("group == @group")
    if model == "dense":
        return [by_latent.get(latent, []) for latent in members["latent"]]
    pairs = zip(members["match"], members["match_alive"], strict=True)
    return [by_latent.get(match, []) if alive else [] for match, alive in pairs]


def test_groups_and_contrasts_equal_latents_and_documents_left_out_one_by_one():
    worlds = [world(seed) for seed in range(3)]
    table = summary(worlds)
    assert len(table) == 3 * (5 + 1 + 2) * 5
    for group in ("robust", "fragile", "matched", "random", "random_direction"):
        for where in (("paper", "final"), ("isolated", "firing")):
            sides = [[slow.Side(contexts(w, "dense", group, *where))] for w in worlds]
            assert_same(table.loc[("dense", group, *where)], slow.group_interval(sides))
    where = ("isolated", "firing")
    both = [
        [slow.Side(contexts(w, "dense", name, *where), sign) for name, sign in SIDES]
        for w in worlds
    ]
    assert_same(table.loc[("dense", "robust_minus_fragile", *where)], slow.group_interval(both))
    one = table.loc[("dense", "robust", *where)]
    assert one["num_seeds"] == 3
    assert one["num_documents"] == NUM_DOCUMENTS
    assert one["num_prompts"] == NUM_DOCUMENTS * PER_DOCUMENT - 1
    assert one["resampled"] == "documents and latents of every seed"
    assert one["reason"] == ""


SIDES = (("robust", 1), ("fragile", -1))


def assert_same(row, expected):
    names = ["kl_mean", "error", "df", "ci_low", "ci_high"]
    assert row[names].tolist() == pytest.approx(expected, rel=1e-6)


def latent_means(world, model, group, where):
    pairs = contexts(world, model, group, *where)
    return np.array([np.mean([kl for _, kl in each]) if each else np.nan for each in pairs])


def test_the_same_latent_in_two_models_and_matched_latents_are_paired():
    worlds = [world(seed) for seed in range(2)]
    table = summary(worlds)
    where = ("isolated", "firing")

    def of(model, group):
        return [latent_means(w, model, group, where) for w in worlds]

    def change(group):
        return [p - d for p, d in zip(of("pruned", group), of("dense", group), strict=True)]

    for name, change_in in (("dense", lambda g: of("dense", g)), ("pruned_minus_dense", change)):
        pairs = [m - f for m, f in zip(change_in("matched"), change_in("fragile"), strict=True)]
        row = table.loc[(name, "matched_minus_fragile", *where)]
        assert row["kl_mean"] == pytest.approx(np.mean([np.nanmean(pair) for pair in pairs]))
        assert row["num_latents"] == sum(np.isfinite(pair).sum() for pair in pairs)
    row = table.loc[("pruned_minus_dense", "robust", *where)]
    expected = np.mean([np.nanmean(c) for c in change("robust")])
    assert row["kl_mean"] == pytest.approx(expected)
    assert np.isnan(row["firing_share"])
    dead = 1 - table.loc[("pruned", "robust", "paper", "final"), "num_latents"] / (2 * SIZE)
    assert 0.2 < dead < 0.3


def test_a_constant_more_in_the_pruned_model_leaves_only_what_varies():
    """Pairing by latent: what a latent's level adds to the spread is no part of the difference."""
    first = world(0)
    alone = {"match": lambda t: t["latent"] - 100, "match_alive": True}
    groups = {"cosine": first.groups["cosine"].assign(**alone)}
    kl = first.dense.kl.copy()
    noise = np.random.default_rng(9).normal(size=len(kl))
    moved = kl.assign(latent=kl["latent"] - 100, kl=kl["kl"] + 5 + 0.01 * noise)
    table = summary([first._replace(groups=groups, pruned=first.dense._replace(kl=moved))])
    row = table.loc[("pruned_minus_dense", "robust", "paper", "final")]
    assert row["kl_mean"] == pytest.approx(5, abs=2e-3)
    assert row["ci_high"] - row["ci_low"] < 0.01
    of_dense = table.loc[("dense", "robust", "paper", "final")]
    assert of_dense["ci_high"] - of_dense["ci_low"] > 1


def test_matches_that_are_one_latent_count_as_one_draw():
    first = world(0)
    table = summary([first])
    groups = {"cosine": first.groups["cosine"].assign(match=lambda t: t["latent"] - 100)}
    apart = summary([first._replace(groups=groups)])
    where = ("pruned", "robust", "paper", "final")
    assert table.loc[where, "df"] < 0.7 * apart.loc[where, "df"]


def test_a_latent_that_holds_much_of_a_mean_is_told():
    first = world(0)
    members = first.groups["cosine"].query("group == 'robust'")["latent"].tolist()
    kl = first.dense.kl.copy()
    huge = kl["latent"] == members[3]
    kl.loc[huge, "kl"] *= 100
    table = summary([first._replace(dense=first.dense._replace(kl=kl))])
    own = kl[(kl["kind"] == "latent") & (kl["protocol"] == "isolated")]
    means = own[own["contexts"] == "firing"].groupby("latent")["kl"].mean()
    means = means.reindex(members).dropna()
    row = table.loc[("dense", "robust", "isolated", "firing")]
    assert row["largest_share"] == pytest.approx(means.max() / means.sum())
    assert row["reason"] == f"one latent of each seed holds {row['largest_share']:.0%} of a mean"
    contrast = table.loc[("dense", "robust_minus_fragile", "isolated", "firing")]
    assert contrast["largest_share"] == row["largest_share"]
    assert table.loc[("dense", "fragile", "isolated", "firing"), "reason"] == ""
    # What may lie beyond such a sample lies above it.
    assert row["ci_high"] - row["kl_mean"] > 2 * (row["kl_mean"] - row["ci_low"])


def test_summary_without_living_matches_few_documents_or_few_latents_is_undefined():
    first = world(0)
    dead = first.groups["cosine"].assign(match_alive=False)
    few = np.arange(NUM_DOCUMENTS * PER_DOCUMENT) % 4
    table = summary([first._replace(groups={"cosine": dead})], few)
    of_dense = table.loc["dense"]
    assert of_dense["kl_mean"].notna().all()
    numbers = ["ci_low", "ci_high", "error", "df", "least", "most"]
    assert of_dense[numbers].isna().all().all()
    assert (of_dense["reason"] == "no interval: 4 documents, fewer than 5").all()
    for name in ("pruned", "pruned_minus_dense"):
        others = table.loc[name]
        columns = ["kl_mean", *numbers, "firing_share", "reconstruction_share", "largest_share"]
        assert others[columns].isna().all().all()
        assert (others["num_latents"] == 0).all()
        assert (others["reason"] == "no latent of the group was measured").all()
    small = latent_groups(fates(NUM), grouping="cosine", group_size=3, seed=0)
    table = summary([first._replace(groups={"cosine": small})]).loc["dense"]
    assert table["kl_mean"].notna().all()
    assert table[numbers].isna().all().all()
    robust = table.loc[("robust", "paper", "final")]
    assert robust["reason"].startswith("no interval: 3 latents of all seeds, fewer than ")
    empty = summary([first._replace(groups={"cosine": small[:0]})])
    assert empty["kl_mean"].isna().all()


def test_nothing_to_ablate_in_the_pruned_model_is_undefined_with_a_reason():
    first = world(0)
    groups = {"cosine": first.groups["cosine"].assign(match_alive=False)}
    nothing = nothing_ablated(NUM_DOCUMENTS * PER_DOCUMENT)
    table = summary([first._replace(groups=groups, pruned=nothing)])
    assert table.loc["pruned", "kl_mean"].isna().all()
    assert (table.loc["pruned", "reason"] == "no latent of the group was measured").all()
    assert table.loc["dense", "kl_mean"].notna().all()
    assert (table.loc["dense", "reason"] == "").all()


def test_no_interval_has_zero_width():
    first = world(0)
    same = first.dense._replace(kl=first.dense.kl.assign(kl=1.0))
    row = summary([first._replace(dense=same)]).loc[("dense", "robust", "paper", "final")]
    assert row["kl_mean"] == 1.0
    assert np.isnan(row["ci_low"])
    assert row["reason"].startswith("no interval: the same without any")


@pytest.mark.parametrize(("size", "spread"), [(30, 0.8), (100, 1.5)])
def test_intervals_of_heavy_tailed_groups_cover_the_mean_and_plain_ones_do_not(size, spread):
    """Lognormal latents on documents that all measure alike; the self-test has more of them."""
    generator = np.random.default_rng(0)
    truth, draws, hits = np.exp(spread**2 / 2), 400, np.zeros(2)
    for _ in range(draws):
        latents = np.exp(spread * generator.normal(size=size))
        means = latents[:, None] * np.exp(0.1 * generator.normal(size=(size, 9)))
        sample = ratio_of_means(means[:, 0], means[:, 1:], np.ones(size), np.ones((size, 8)))
        found = [crossed([sample], heavy_tails=heavy, fewest=30) for heavy in (True, False)]
        hits += [each.low <= truth <= each.high for each in found]
    heavy, plain = hits / draws
    assert 0.92 <= heavy <= 0.98
    assert plain < heavy - 0.02


def test_beyond_the_largest_spread_a_contrast_of_unequal_groups_covers_too_seldom():
    """Why there is such a limit: the same latents of three seeds, less those of a fifth."""
    shares = []
    for spread in (0.8, 1.5):
        draw, generator = _ablations(10, 0.2, shared=True, spread=spread), np.random.default_rng(0)
        drawn = [draw(generator) for _ in range(600)]
        shares.append(np.mean([found.low <= truth <= found.high for found, truth in drawn]))
    assert 0.8 < LARGEST_SPREAD < 1.5
    assert shares[0] > 0.9 > shares[1]


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_what_spreads_over_orders_of_magnitude_has_no_interval(spread):
    first = world(0)
    latents = first.dense.kl["latent"]
    effect = np.exp(spread * np.random.default_rng(0).normal(size=latents.max() + 1))[latents]
    noise = np.exp(0.1 * np.random.default_rng(1).normal(size=len(latents)))
    spread_out = first.dense._replace(kl=first.dense.kl.assign(kl=effect * noise))
    changed = first._replace(dense=spread_out)
    row = summary([changed]).loc[("dense", "robust", "isolated", "final")]
    assert np.isfinite(row["kl_mean"])
    assert np.isfinite(row["ci_low"]) == (spread < 1)
    logs = np.log(latent_means(changed, "dense", "robust", ("isolated", "final")))
    told = f"the log of a latent's KL deviates by {logs.std(ddof=1):.2g}, more than 1.2"
    assert (told in row["reason"]) == (spread > 1)


def test_an_interval_is_skewed_as_its_p_values_are():
    found = Estimate(1.0, 0.2, 7.0, "", skew=0.4)
    assert found.high - 1 > 1 - found.low
    assert found.p_below(found.high) == pytest.approx(0.025)
    assert found.p_above(found.low) == pytest.approx(0.025)
    even = found._replace(skew=0.0)
    assert even.high - 1 == pytest.approx(1 - even.low)
    mirrored = found._replace(skew=-0.4)
    assert 1 - mirrored.low == pytest.approx(found.high - 1)
