import copy
import dataclasses
import math

import numpy as np
import pandas as pd
import pytest
import torch
import transformers

from conftest import ARCHITECTURES, tiny_language_model
from independent import transfer as independent
from prunelens.activations import Activations, Statistics, capture, statistics
from prunelens.analyses import recovered
from prunelens.analyses import transfer as transfer_module
from prunelens.analyses.noise import fit_common_change
from prunelens.analyses.null_states import NullSource, NullStates
from prunelens.analyses.positions import members_of
from prunelens.analyses.refit import first_equal, refit, threshold_factor
from prunelens.analyses.statistics.estimates import t_quantile
from prunelens.analyses.transfer import (
    POSITIONS,
    TRANSFER_RULE,
    DenseReference,
    transfer,
    transfer_verdicts,
)
from prunelens.analyses.verdict import (
    LIMITS,
    NULL_AGREES,
    Recovery,
    drop_estimate,
    ratio_estimate,
)
from prunelens.config import (
    ActivationConfig,
    CorpusConfig,
    ModelConfig,
    PruningConfig,
    TransferConfig,
)
from prunelens.errors import UserError
from prunelens.model import as_language_model, logits, replace_at_site, run_to_site
from prunelens.sae.exchange.formats import GivenSae, check_fits, check_l0, given
from prunelens.sae.exchange.own_folder import own_sae
from prunelens.sae.topk import TopKSAE

D, LATENTS, LAYER, CONTEXT = 16, 40, 1, 24
NUMBERS = ["fvu", "fvu_raw", "fvu_dense_var", "l0", "ce_recovered", "ce_model", "ce_sae"]


@dataclasses.dataclass(frozen=True, eq=False)
class JumpReluCoder:
    """A JumpReLU SAE as small as it can be."""

    w_enc: torch.Tensor
    b_enc: torch.Tensor
    w_dec: torch.Tensor
    b_dec: torch.Tensor
    threshold: torch.Tensor

    def encode(self, x, threshold_scale):
        pre = x @ self.w_enc + self.b_enc
        return torch.where(pre > threshold_scale * self.threshold, pre, 0.0).relu()

    def decode(self, latents):
        return latents @ self.w_dec + self.b_dec

    def directions(self):
        return self.w_dec


def jump_relu(*, bias=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    w_dec = torch.nn.functional.normalize(draw(LATENTS, D), dim=1)
    coder = JumpReluCoder(
        0.5 * w_dec.T, bias * draw(LATENTS), w_dec, bias * draw(D), 0.3 + draw(LATENTS).abs()
    )
    cpu = torch.device("cpu")
    return GivenSae("jump", "jumprelu", D, LATENTS, math.nan, coder, cpu), coder


def linear_sae(rows, mean, *, name="linear"):
    """mean + the projection on orthonormal `rows`, as a TopK SAE with each row and its opposite."""
    sae = TopKSAE(rows.shape[1], 2 * len(rows), 2 * len(rows))
    with torch.no_grad():
        sae.decoder_weight.copy_(torch.cat([rows, -rows]))
        sae.encoder_weight.copy_(sae.decoder_weight)
    return given(sae, Statistics(mean, torch.ones_like(mean)), name=name)


def tokens(lm, count, seed, context=CONTEXT):
    """Text that the model knows how to go on: drawn from itself, so that ablation does harm."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(0, 128, (count, 1), generator=generator)
    for _ in range(context - 1):
        chances = logits(lm, found)[:, -1].softmax(-1)
        found = torch.cat([found, chances.multinomial(1, generator=generator)], dim=1)
    return found


def disturbed(lm, share=0.2):
    """The model with a share of block 0's smallest weights zeroed."""
    other = as_language_model(copy.deepcopy(lm.model), label="pruned")
    with torch.no_grad():
        for parameter in other.blocks[0].parameters():
            if parameter.ndim == 2:
                bound = parameter.abs().flatten().quantile(share)
                parameter[parameter.abs() <= bound] = 0
    return other


def measured(lm, saes, *, dense=None, windows=None, refit_windows=None, documents=None, **options):
    windows = tokens(lm, 5, 1) if windows is None else windows
    return transfer(
        lm,
        saes,
        windows,
        tokens(lm, 4, 2) if refit_windows is None else refit_windows,
        torch.arange(len(windows)) if documents is None else documents,
        site="resid_post",
        layer=LAYER,
        dense=dense,
        **{"ce_windows": 5, **options},
    )


def row(table, positions, refit_kind="none", sae=None):
    chosen = table[(table["positions"] == positions) & (table["refit"] == refit_kind)]
    chosen = chosen[chosen["source"] == "pruned"] if len(chosen) > 1 else chosen
    return (chosen if sae is None else chosen[chosen["sae"] == sae]).iloc[0]


def null_source(folder, dense, pruned, text, *, skip_first=1, kind="scalar"):
    """Stores of both models, as a study has them, and what is common to all tokens."""
    config = ActivationConfig(skip_first=skip_first, storage="float32")
    folder.mkdir(exist_ok=True)
    stores, stats = {}, None
    for name, windows in (("refit", text["refit_windows"]), ("evaluation", text["windows"])):
        paths = [folder / f"{name}-{number}.safetensors" for number in range(2)]
        for lm, path in zip((dense, pruned), paths, strict=True):
            capture(lm, windows, path, site="resid_post", layer=LAYER, config=config)
        stats = stats or statistics(Activations(paths[0]), num_tokens=100)
        stores[name] = tuple(Activations(path, statistics=stats) for path in paths)
    pair = stores["evaluation"]
    change = fit_common_change(*pair, torch.arange(pair[0].num_tokens), kind=kind)
    return NullSource(change, **stores, skip_first=skip_first)


def slow_null(source, null_states):
    """What `independent.measure` asks for; the draw of partners is the code's own."""
    width = CONTEXT // 2

    def null(which, x, dense_x, chosen):
        store = (source.evaluation, source.refit)[which][0]
        partners = null_states[which]._null._partner

        def place(row):
            return row // (width - 1), row % (width - 1) + 1

        partner = {(w, t): place(int(partners[w * (width - 1) + t - 1])) for w, t in chosen}
        stats = (store.mean.double().numpy(), store.sigma.double().numpy())
        shift, gain = source.change.shift.numpy(), source.change.gain
        return independent.null_states(x, dense_x, chosen, partner, stats, shift, gain)

    return null


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_every_number_is_that_of_the_slow_implementation(architecture, tmp_path):
    lm = tiny_language_model(architecture)
    pruned = disturbed(lm)
    sae, coder = jump_relu()
    slow = independent.JumpRelu(coder.w_enc, coder.b_enc, coder.w_dec, coder.b_dec, coder.threshold)
    windows, refit_windows = tokens(lm, 6, 1, CONTEXT // 2), tokens(lm, 3, 2, CONTEXT // 2)
    documents = torch.tensor([3, 0, 1, 0, 2, 4])
    groups = [[0], [1, 3], [2], [4], [5]]
    text = {"windows": windows, "refit_windows": refit_windows}
    options = {**text, "documents": documents, "ce_windows": 6}
    norms = torch.tensor((independent.states(lm, refit_windows, LAYER)[:, 1:] ** 2).sum(-1)).sqrt()
    multiple = float(norms.quantile(0.8) / norms.median())
    dense = measured(lm, [sae], max_norm_multiple=multiple, **options)
    source = null_source(tmp_path, lm, pruned, text)
    ours = measured(pruned, [sae], dense=dense.reference, null=source, **options)
    limit = dense.reference.norm_limit
    assert limit == pytest.approx(multiple * float(norms.median()), rel=1e-5)
    filtered = row(ours.rows, "norm_filtered")["num_tokens"]
    assert 10 < filtered < row(ours.rows, "without_first")["num_tokens"] == 6 * (CONTEXT // 2 - 1)
    reference = dense.reference
    at = [members_of(part, limit)[2].view(part.shape)
          for part in (reference.refit_norms, reference.eval_norms)]  # fmt: skip
    null = slow_null(source, source.states(*at)[::-1])
    given = (slow, windows, refit_windows, LAYER, limit, lm)
    l0 = dict(zip(POSITIONS, reference.refit_l0[0].tolist(), strict=True))
    expected = {
        "dense": independent.measure(lm, *given, None),
        "pruned": independent.measure(pruned, *given, l0),
        "null": independent.measure(pruned, *given, l0, null),
    }
    for source_name, found in (("dense", dense.rows), ("pruned", ours.rows), ("null", ours.rows)):
        rows = found[found["source"] == source_name.replace("dense", "pruned")]
        assert len(rows) == len(expected[source_name]) == (3 if source_name == "null" else 9)
        for (positions, kind), numbers in expected[source_name].items():
            got, parts = row(rows, positions, kind), numbers.pop("parts")
            for name, value in numbers.items():
                assert got[name] == pytest.approx(value, rel=2e-4), (positions, kind, name)
            if source_name == "dense":
                numbers["kept parts"] = parts
                continue
            of_dense = expected["dense"][positions, "none"]["kept parts"]
            compared = independent.comparison(parts, of_dense, groups)
            for name, (value, error) in compared.items():
                assert got[name] == pytest.approx(value, rel=1e-3, abs=2e-4), name
                assert got[f"{name}_error"] == pytest.approx(error, rel=5e-3, abs=1e-5), name
                half = t_quantile(4) * got[f"{name}_error"]
                assert got[f"{name}_low"] == pytest.approx(got[name] - half)
                assert got[f"{name}_high"] == pytest.approx(got[name] + half)
    assert (row(ours.rows, "all", "threshold")["threshold_factor"]) != 1.0
    assert set(ours.rows["num_windows"]) == {6} and set(ours.rows["num_documents"]) == {5}


def test_zero_pruning_changes_nothing_and_the_verdict_is_keep(tiny_llama, tmp_path):
    states = run_to_site(tiny_llama, tokens(tiny_llama, 4, 2), "resid_post", LAYER).flatten(0, 1)
    basis = torch.linalg.svd(states - states.mean(0)).Vh[:-2]
    saes = [jump_relu()[0], linear_sae(basis, states.mean(0))]
    dense = measured(tiny_llama, saes)
    dense.reference.save(tmp_path / "reference.safetensors")
    reference = DenseReference.load(tmp_path / "reference.safetensors")
    again = measured(tiny_llama, saes, dense=reference)
    pd.testing.assert_frame_equal(dense.rows, again.rows, check_exact=True)
    rows = transfer_verdicts(again.rows)
    assert rows["ce_recovered"].notna().all()
    assert set(rows["verdict"]) == {"keep"}
    assert set(dense.rows["verdict"]) == {""}
    as_it_is = rows[rows["refit"] == "none"]
    assert set(as_it_is["fvu_dense_var_ratio"]) == set(as_it_is["fvu_raw_ratio"]) == {1.0}
    assert set(as_it_is["ce_drop"]) == {0.0} and set(as_it_is["reason"]) == {""}
    assert as_it_is["ce_drop_low"].isna().all()  # an interval of no width claims too much
    assert list(rows["refit"].value_counts()[["none", "b_dec", "threshold"]]) == [6, 6, 3]
    assert dense.notes and "jump" in dense.notes[0] and not again.notes


def test_a_perfect_sae_loses_nothing(tiny_lm):
    rows = measured(tiny_lm, [linear_sae(torch.eye(D), torch.zeros(D))]).rows
    assert (rows["fvu"].abs() < 1e-10).all() and (rows["fvu_raw"].abs() < 1e-10).all()
    assert torch.allclose(torch.tensor(rows["ce_recovered"]), torch.ones(6).double(), atol=1e-4)


def test_a_constant_is_worth_nothing(tiny_llama):
    """No latent ever fires; refitted, the bias is the mean: FVU 1, nothing recovered."""
    sae = linear_sae(torch.zeros(1, D), torch.zeros(D))
    text = tokens(tiny_llama, 5, 1)
    both = {"windows": text, "refit_windows": text}
    rows = measured(tiny_llama, [sae], **both).rows
    refitted = rows[rows["refit"] == "b_dec"]
    assert refitted["fvu_raw"].tolist() == pytest.approx([1] * 3)
    assert refitted["fvu"].tolist() == pytest.approx([1] * 3)
    assert refitted["ce_recovered"].tolist() == pytest.approx([0] * 3, abs=1e-4)
    assert (rows["l0"] == 0).all()


def test_a_shifted_mean_is_mended_by_the_decoder_bias():
    """The SAE is blind to one direction, along which all activations move by a constant."""
    lm = tiny_language_model("gpt2")
    text = {"windows": tokens(lm, 5, 1), "refit_windows": tokens(lm, 8, 2)}
    states = run_to_site(lm, text["refit_windows"], "resid_post", LAYER).flatten(0, 1)
    basis = torch.linalg.svd(states - states.mean(0)).Vh
    blind = basis[-1]
    sae = linear_sae(basis[:-1], states.mean(0))
    shifted = as_language_model(copy.deepcopy(lm.model), label="shifted")
    with torch.no_grad():
        shifted.blocks[LAYER].mlp.c_proj.bias += 3 * blind
    dense = measured(lm, [sae], **text)
    rows = measured(shifted, [sae], dense=dense.reference, **text).rows
    rows = transfer_verdicts(rows)
    for positions in POSITIONS:
        before, after = row(rows, positions), row(rows, positions, "b_dec")
        reference = row(dense.rows, positions, "b_dec")
        assert before["fvu_dense_var"] > 2 * reference["fvu_dense_var"]
        assert after["fvu_dense_var"] == pytest.approx(reference["fvu_dense_var"], rel=1e-3)
        assert after["verdict"] == before["verdict"] == "refit"


def test_scaled_activations_get_scaled_thresholds():
    """Everything that is added to the residual stream halved: the norms undo it, the SAE cannot."""
    lm = tiny_language_model("llama")
    halved = as_language_model(copy.deepcopy(lm.model), label="halved")
    with torch.no_grad():
        halved.model.get_input_embeddings().weight *= 0.5
        for block in halved.blocks:
            block.self_attn.o_proj.weight *= 0.5
            block.mlp.down_proj.weight *= 0.5
        for norm in halved.model.modules():
            if hasattr(norm, "variance_epsilon"):
                norm.variance_epsilon *= 0.25
    sae, _ = jump_relu(bias=0.0)
    text = {"windows": tokens(lm, 5, 1), "refit_windows": tokens(lm, 4, 2)}
    dense = measured(lm, [sae], **text)
    rows = measured(halved, [sae], dense=dense.reference, **text).rows
    for positions in POSITIONS:
        scaled, reference = row(rows, positions, "threshold"), row(dense.rows, positions, "b_dec")
        assert row(rows, positions)["l0"] < 0.8 * reference["l0"]
        assert scaled["threshold_factor"] == pytest.approx(0.5, rel=0.02)
        assert scaled["l0"] == pytest.approx(reference["l0"], rel=0.02)
        assert scaled["fvu_raw"] == pytest.approx(reference["fvu_raw"], rel=0.02)


@pytest.mark.parametrize("target", [0, 1, 7, 300, 10**6])
def test_the_factor_gives_exactly_the_wanted_number(target):
    sae, _ = jump_relu()
    states = 3 * torch.randn(50, D, generator=torch.Generator().manual_seed(3))
    factor = threshold_factor(sae, states, target)
    active = int((sae.with_threshold_scale(factor).encode(states) != 0).sum())
    positive = int((sae.with_threshold_scale(0.0).encode(states) != 0).sum())
    assert positive > 300
    assert active == min(target, positive)
    now = int((sae.encode(states) != 0).sum())
    assert threshold_factor(sae, states, now) == 1.0


def test_many_batches_find_the_same_factor(monkeypatch):
    sae, _ = jump_relu()
    states = 3 * torch.randn(60, D, generator=torch.Generator().manual_seed(3))
    members = torch.ones(2, 60, dtype=torch.bool)
    members[1, :20] = False
    whole = refit(sae, states, members, dense_l0=[2.0, 3.0])
    monkeypatch.setattr("prunelens.analyses.refit._BATCH_TOKENS", 7)
    parts = refit(sae, states, members, dense_l0=[2.0, 3.0])
    for a, b in zip(whole, parts, strict=True):
        assert a.l0 == b.l0
        x, y = a.variants["threshold"], b.variants["threshold"]
        assert x.threshold_scale == y.threshold_scale != 1.0
        assert torch.allclose(x.decoder_shift, y.decoder_shift, atol=1e-6)


def test_equal_sets_share_their_work(tiny_llama, monkeypatch):
    """Without sinks norm_filtered is without_first: same rows, fewer forward passes."""
    passes = []
    original = recovered.Runs.replaced
    monkeypatch.setattr(recovered.Runs, "replaced", lambda *a: passes.append(1) or original(*a))
    shares = []
    options = {"max_norm_multiple": 1e9, "progress": shares.append}
    rows = measured(tiny_llama, [jump_relu()[0]], **options).rows
    # Two different sets: the mean, the SAE as it is, and with its bias refitted (thresholds stay).
    assert len(passes) == 6
    assert shares == sorted(shares) and shares[-1] == 1.0
    a, b = (rows[rows["positions"] == p][NUMBERS] for p in ("without_first", "norm_filtered"))
    assert a.to_numpy() == pytest.approx(b.to_numpy(), rel=1e-12)
    members = torch.tensor([[True, True], [False, True], [False, True]])
    assert [first_equal(members, n) for n in range(3)] == [0, 1, 1]


def assert_runs_equal_whole_passes(lm, site, layer, *, restarts):
    """The model as it is and with the site changed, in two batches, bit for bit."""
    runs = recovered.Runs((lm, site, layer))
    for seed in (1, 2):
        text = torch.randint(0, 64, (3, CONTEXT), generator=torch.Generator().manual_seed(seed))
        assert torch.equal(runs.whole(text), logits(lm, text))
        assert runs._restarts is restarts
        for factor in (0.5, 2.0, 1.0):  # the last change leaves what it is given as it is
            expected = replace_at_site(lm, text, site, layer, lambda x, by=factor: x * by + 1)
            assert torch.equal(runs.replaced(lambda x, by=factor: x * by + 1), expected)
    assert torch.equal(runs.whole(text), logits(lm, text))
    assert not any(module._forward_hooks for module in lm.model.modules())
    assert not any("forward" in module.__dict__ for module in lm.model.modules())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(
    ("site", "layer"),
    [("resid_post", 0), ("resid_post", 1), ("resid_post", 2), ("mlp_out", 0), ("attn_out", 2)],
)
def test_restarting_at_the_site_gives_what_whole_passes_give(architecture, site, layer):
    lm = tiny_language_model(architecture)
    assert_runs_equal_whole_passes(lm, site, layer, restarts=True)


OTHERS = {
    "gptj": {"n_embd": 16, "n_layer": 3, "n_head": 2, "rotary_dim": 4},  # blocks give tuples
    "falcon": {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 3},  # no keys and values: as good as any
    "rwkv": {"hidden_size": 16, "num_hidden_layers": 3},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_architecture_restarts(kind):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(kind, vocab_size=64, **OTHERS[kind])
        model = transformers.AutoModelForCausalLM.from_config(config)
    lm = as_language_model(model, label=kind)
    assert_runs_equal_whole_passes(lm, "resid_post", 1, restarts=True)


class Twice(torch.nn.Module):
    """A block that runs again what stands below it, as models with shared blocks do."""

    def __init__(self, block, below):
        super().__init__()
        self.block, self.below = block, [below]

    def forward(self, x, **kwargs):
        return self.block(self.below[0](x, **kwargs), **kwargs)


class Remembering(torch.nn.Module):
    """A block that adds a number which it is not handed."""

    def __init__(self, block, memory):
        super().__init__()
        self.block, self.memory = block, memory

    def forward(self, x, **kwargs):
        return self.block(x, **kwargs) + self.memory[0]


def test_what_cannot_be_restarted_runs_whole(caplog):
    caplog.set_level("INFO", logger="prunelens")
    for site, layer in (("resid_post", 0), ("resid_post", 1)):
        lm = tiny_language_model("llama")
        lm.blocks[2] = Twice(lm.blocks[2], lm.blocks[0])  # site or what is below runs twice
        assert_runs_equal_whole_passes(lm, site, layer, restarts=False)
    lm, memory = tiny_language_model("llama"), [0.0]
    lm.blocks[2] = Remembering(lm.blocks[2], memory)

    def forgetful(x, before=lm.blocks[0].forward, **kwargs):  # hands on more than its output
        memory[0] = float(x.abs().max())
        return before(x, **kwargs)

    runs = recovered.Runs((lm, "resid_post", 1))
    lm.blocks[0].forward = forgetful
    lm.model.register_forward_hook(lambda *_: memory.__setitem__(0, 0.0))  # gone with the pass
    text = torch.randint(0, 64, (3, CONTEXT), generator=torch.Generator().manual_seed(1))
    runs.whole(text)
    expected = replace_at_site(lm, text, "resid_post", 1, lambda x: 2 * x)
    assert torch.equal(runs.replaced(lambda x: 2 * x), expected)
    assert lm.blocks[0].forward is forgetful
    said = [record.message for record in caplog.records if "every run is whole" in record.message]
    assert runs._restarts is False and len(said) == 3  # once per model and site


def test_batches_of_windows_change_nothing(tiny_llama, monkeypatch):
    sae, _ = jump_relu()
    whole = measured(tiny_llama, [sae]).rows
    monkeypatch.setattr(recovered, "LOGITS_AT_ONCE", {"cpu": 2 * CONTEXT * 128})
    parts = measured(tiny_llama, [sae]).rows
    numbers = [name for name in NUMBERS if name.startswith("ce")]
    assert parts[numbers].to_numpy() == pytest.approx(whole[numbers].to_numpy(), rel=1e-5)


def test_dense_token_sets_and_sigma_serve_every_condition(tiny_llama):
    sae, _ = jump_relu()
    sigma = torch.full((D,), 2.0)
    text = {"windows": tokens(tiny_llama, 5, 1), "refit_windows": tokens(tiny_llama, 4, 2)}
    dense = measured(tiny_llama, [sae], sigma=sigma, **text)
    assert torch.equal(dense.reference.sigma, sigma.double())
    pruned = disturbed(tiny_llama, 0.5)
    rows = measured(pruned, [sae], dense=dense.reference, **text).rows
    # A sigma that is the same for all dimensions cancels.
    assert rows["fvu"].to_numpy() == pytest.approx(rows["fvu_raw"].to_numpy())
    assert rows["num_tokens"].tolist() == dense.rows["num_tokens"].tolist()
    ratio = rows["fvu_dense_var"] / rows["fvu_raw"]
    x = independent.states(pruned, text["windows"], LAYER).reshape(-1, D)
    variance = ((x - x.mean(0)) ** 2).sum()
    assert ratio[0] == pytest.approx(variance / float(dense.reference.variance[0].sum()), rel=1e-4)


def test_no_prediction_no_number(tiny_llama):
    """In windows of two tokens nothing is predicted at positions after the first."""
    text = [tokens(tiny_llama, 40, seed, 2) for seed in (1, 2)]
    two = {"windows": text[0], "refit_windows": text[1], "ce_windows": 40}
    dense = measured(tiny_llama, [jump_relu()[0]], **two)
    rows = transfer_verdicts(dense.rows)
    later = row(rows, "without_first")
    assert math.isnan(later["ce_recovered"]) and "no prediction" in later["reason"]
    assert later["verdict"] == "undecided" and "ce_drop has no interval" in later["reason"]
    assert row(rows, "all")["reason"] == "" and row(rows, "all")["verdict"] == "keep"


WIDTH = {"fvu_dense_var_ratio": 0.05, "fvu_raw_ratio": 0.05, "ce_drop": 0.005}


def table(source="pruned", **values):
    """Rows (refit -> the three numbers) of one SAE and position set; None: no interval."""
    rows = []
    for kind, numbers in values.items():
        rows.append(
            {"sae": "s", "positions": "norm_filtered", "source": source, "refit": kind,
             "verdict": "", "reason": ""}
        )  # fmt: skip
        for name, value in zip(LIMITS, numbers, strict=True):
            width = math.nan if isinstance(value, str) else WIDTH[name]
            value = float(value)
            rows[-1] |= {name: value, f"{name}_low": value - width, f"{name}_high": value + width}
    return pd.DataFrame(rows)


GOOD, POOR, BAD = (1.1, 1.1, 0.01), (1.25, 1.1, 0.01), (1.1, 1.5, 0.018)


@pytest.mark.parametrize(
    ("rows", "verdict", "because"),
    [
        ({"none": GOOD, "b_dec": BAD}, "keep", ""),
        ({"none": (1.2, 1.2, 0.015), "b_dec": BAD}, "keep", ""),  # the interval ends at the limit
        ({"none": BAD, "b_dec": GOOD}, "refit", ""),
        ({"none": BAD, "b_dec": POOR, "threshold": GOOD}, "refit", ""),
        ({"none": BAD, "b_dec": BAD, "threshold": (1.0, 1.0, 0.026)}, "retrain", ""),
        ({"none": POOR, "b_dec": GOOD}, "undecided", "as it is, fvu_dense_var_ratio may lie"),
        ({"none": (1.25, 1.1, 0.2), "b_dec": BAD}, "retrain", ""),  # one beyond is enough
        ({"none": BAD, "b_dec": POOR}, "undecided", "b_dec refitted, fvu_dense_var_ratio may"),
        ({"none": (1.1, 1.1, "nan"), "b_dec": GOOD}, "undecided", "ce_drop has no interval"),
        ({"none": (1.5, 1.1, "nan"), "b_dec": BAD}, "retrain", ""),
        (
            {"none": (1.1, "1.1", "0.0"), "b_dec": GOOD},
            "undecided",
            "fvu_raw_ratio has no",
        ),
        ({"none": ("1.0", "1.0", "0.0"), "b_dec": BAD}, "keep", ""),  # nothing differs
    ],
)
def test_the_verdict_follows_the_rule(rows, verdict, because):
    result = transfer_verdicts(table(**rows))
    assert set(result["verdict"]) == {verdict}
    assert all((because in reason) if because else not reason for reason in result["reason"])
    assert "1.25" in TRANSFER_RULE and "0.02" in TRANSFER_RULE


def test_a_verdict_that_noise_gets_as_well_says_so():
    both = [table(none=BAD, b_dec=BAD), table(source="null", none=BAD, b_dec=BAD)]
    result = transfer_verdicts(pd.concat(both, ignore_index=True))
    assert result["reason"].tolist() == [NULL_AGREES] * 2 + [""] * 2
    both[1] = table(source="null", none=GOOD, b_dec=BAD)
    result = transfer_verdicts(pd.concat(both, ignore_index=True))
    assert result["verdict"].tolist() == ["retrain"] * 2 + ["keep"] * 2
    assert not any(result["reason"])


def sums(rng, documents=20):
    """Errors, variances and nats by document; what is hard for one model is for the other."""
    size, fvu, loss = (rng.uniform(1, 3, documents) * scale for scale in (1, 0.1, 0.05))
    error, dense_error = (size * fvu * rng.normal(by, 0.02, documents) for by in (1.1, 1.0))
    recoveries = [
        Recovery(size, 3 * size, size * (1 + loss * rng.normal(by, 0.02, documents)))
        for by in (1.2, 1.0)
    ]
    return error, size, dense_error, size, *recoveries


def test_paired_with_the_dense_model_intervals_are_narrow():
    rng = np.random.default_rng(0)
    error, variance, dense_error, dense_variance, recovery, dense = sums(rng)
    other = rng.permutation(20)
    paired = ratio_estimate(error, dense_variance, dense_error, dense_variance)
    unpaired = ratio_estimate(error, dense_variance, dense_error[other], dense_variance[other])
    assert unpaired.value == pytest.approx(paired.value)
    assert paired.error < unpaired.error / 3
    drop = drop_estimate(recovery, dense)
    of_others = drop_estimate(recovery, Recovery(*(part[other] for part in dense)))
    assert drop.value == pytest.approx(of_others.value) == pytest.approx(0.01, rel=0.1)
    assert drop.error < of_others.error / 3
    raw = ratio_estimate(error, variance, dense_error, dense_variance)
    assert ratio_estimate(*sums(rng, documents=320)[:4]).error < raw.error / 2


@pytest.mark.parametrize("documents", [[0, 0, 1, 1, 2], [0, 0, 0, 0, 0]])
def test_too_few_documents_decide_nothing(tiny_llama, documents):
    sae, _ = jump_relu()
    documents = torch.tensor(documents)
    dense = measured(tiny_llama, [sae], documents=documents)
    rows = measured(
        disturbed(tiny_llama), [sae], dense=dense.reference, documents=documents,
        windows=tokens(tiny_llama, 5, 1), refit_windows=tokens(tiny_llama, 4, 2),
    ).rows  # fmt: skip
    rows = transfer_verdicts(rows)
    few = f"{len(documents.unique())} groups of documents, fewer than 5"
    assert set(rows["verdict"]) == {"undecided"}
    assert all(few in reason and "undecided: as it is" in reason for reason in rows["reason"])
    again = measured(tiny_llama, [sae], dense=dense.reference, documents=documents).rows
    assert set(transfer_verdicts(again)["verdict"]) == {"keep"}  # one document is enough for that


def test_a_ruined_model_wants_another_sae(tiny_llama):
    states = run_to_site(tiny_llama, tokens(tiny_llama, 8, 2), "resid_post", LAYER).flatten(0, 1)
    basis = torch.linalg.svd(states - states.mean(0)).Vh[:6]
    sae = linear_sae(basis, states.mean(0))
    text = {"windows": tokens(tiny_llama, 20, 1), "refit_windows": tokens(tiny_llama, 8, 2)}
    dense = measured(tiny_llama, [sae], ce_windows=20, **text)
    noisy = as_language_model(copy.deepcopy(tiny_llama.model), label="noisy")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = noisy.blocks[LAYER].mlp.down_proj.weight
        weight += 3 * weight.std() * torch.randn(weight.shape, generator=generator)
    rows = measured(noisy, [sae], dense=dense.reference, ce_windows=20, **text).rows
    assert set(transfer_verdicts(rows)["verdict"]) == {"retrain"}


def test_cross_entropy_is_measured_on_as_many_windows_as_are_needed(tiny_llama, monkeypatch):
    monkeypatch.setattr(transfer_module, "FIRST_WINDOWS", 8)
    sizes = transfer_module._sizes
    assert sizes(7, doubling=True) == [7] and sizes(70, doubling=False) == [70]
    assert sizes(70, doubling=True) == [8, 16, 32, 64, 70]
    assert sizes(64, doubling=True) == [8, 16, 32, 64]
    sae, _ = jump_relu()
    text = {"windows": tokens(tiny_llama, 40, 1), "refit_windows": tokens(tiny_llama, 4, 2)}
    text["documents"] = torch.arange(40) // 2
    dense = measured(tiny_llama, [sae], ce_windows=40, **text)
    assert set(dense.rows["num_windows"]) == {40} and set(dense.rows["num_documents"]) == {20}
    pruned, counts = disturbed(tiny_llama), []
    for margin in (1e9, 0.0):
        monkeypatch.setattr(transfer_module, "CE_MARGIN", margin)
        rows = measured(pruned, [sae], dense=dense.reference, ce_windows=40, **text).rows
        counts += rows["num_windows"].unique().tolist()
        if margin:  # the windows are the first of those that were drawn, and no others
            some = measured(tiny_llama, [sae], ce_windows=8, **text)
            same = measured(pruned, [sae], dense=some.reference, ce_windows=8, **text).rows
            pd.testing.assert_frame_equal(rows, same)
            assert set(rows["num_documents"]) == {8}  # evenly drawn: no two of one document
    assert counts == [8, 40]


@pytest.mark.parametrize("skip_first", [0, 1, 3])
def test_the_null_keeps_what_is_common_to_all_tokens(tiny_llama, tmp_path, skip_first):
    """Where that is all that pruning does, the null is the pruned model."""
    halved = as_language_model(copy.deepcopy(tiny_llama.model), label="halved")
    with torch.no_grad():  # embedding and block 0 halved: activations are half as large, and that
        halved.model.get_input_embeddings().weight *= 0.5  # is all (block 1 is block 0 here)
        for block in halved.blocks:
            block.self_attn.o_proj.weight *= 0.5
            block.mlp.down_proj.weight *= 0.5
        for norm in halved.model.modules():
            if hasattr(norm, "variance_epsilon"):
                norm.variance_epsilon *= 0.25
    text = {"windows": tokens(tiny_llama, 6, 1), "refit_windows": tokens(tiny_llama, 4, 2)}
    source = null_source(tmp_path, tiny_llama, halved, text, skip_first=skip_first)
    assert source.change.gain == pytest.approx(0.5, rel=1e-3)
    sae, _ = jump_relu(bias=0.0)
    dense = measured(tiny_llama, [sae], ce_windows=6, **text)
    rows = measured(halved, [sae], dense=dense.reference, null=source, ce_windows=6, **text).rows
    null = rows[rows["source"] == "null"].reset_index(drop=True)
    own = rows[(rows["source"] == "pruned") & (rows["positions"] == "norm_filtered")]
    assert set(null["positions"]) == {"norm_filtered"} and len(null) == 3
    columns = [*NUMBERS, "fvu_dense_var_ratio", "ce_drop", "ce_mean_ablated", "num_tokens"]
    assert null[columns].to_numpy() == pytest.approx(own[columns].to_numpy(), rel=2e-3, abs=2e-4)


def test_the_null_shuffles_what_is_left(tiny_llama, tmp_path):
    pruned = disturbed(tiny_llama, 0.5)
    text = {"windows": tokens(tiny_llama, 6, 1), "refit_windows": tokens(tiny_llama, 4, 2)}
    source = null_source(tmp_path, tiny_llama, pruned, text)
    at = torch.zeros(6, CONTEXT, dtype=torch.bool)
    at[1:, 2:20] = True
    null = NullStates(*source.evaluation, source.change, at, skip_first=1)
    own = run_to_site(pruned, text["windows"], "resid_post", LAYER)
    made = null.of(own, torch.arange(6))
    assert torch.equal(made[~at], own[~at]) and not torch.isclose(made[at], own[at]).all(1).any()
    # Each has the remainder of one that is replaced; any order of windows gives the same.
    dense = run_to_site(tiny_llama, text["windows"], "resid_post", LAYER)
    mean, sigma = source.evaluation[0].mean, source.evaluation[0].sigma
    common = source.change.of((dense[at] - mean) / sigma)
    remainder, drawn = ((each[at] - mean) / sigma - common for each in (own, made))
    apart = torch.cdist(drawn, remainder)
    assert apart.min(1).values.max() < 0.01
    assert not (apart.argmin(1) == torch.arange(len(drawn))).any()
    order = torch.tensor([4, 2])
    assert torch.allclose(null.of(own[order], order), made[order], atol=1e-6)


def test_what_does_not_fit_is_refused(tiny_llama):
    sae, _ = jump_relu()
    wide = dataclasses.replace(sae, d_model=17)
    with pytest.raises(UserError, match="made for d_model 17, tiny-llama has 16"):
        measured(tiny_llama, [wide])
    with pytest.raises(UserError, match=r"models.pretrained.layer: 1, but jump .* layer 5"):
        measured(tiny_llama, [dataclasses.replace(sae, layer=5)])
    with pytest.raises(UserError, match=r"models.site: 'resid_post', but jump .* 'mlp_out'"):
        measured(tiny_llama, [dataclasses.replace(sae, site="mlp_out")])
    check_fits(
        dataclasses.replace(sae, layer=3, site="mlp_out"), "m", d_model=D, site="mlp_out", layer=3
    )
    with pytest.raises(UserError, match=r"nominal L0 is 400: wrong activation function"):
        measured(tiny_llama, [dataclasses.replace(sae, nominal_l0=400.0)])
    text = tokens(tiny_llama, 2, 1)
    broken = as_language_model(copy.deepcopy(tiny_llama.model), label="broken")
    with torch.no_grad():
        broken.blocks[0].mlp.down_proj.weight[0, 0] = math.inf
    with pytest.raises(UserError, match="broken layer 1 in float32 gives NaN"):
        measured(broken, [sae], windows=text, refit_windows=text)


def test_the_l0_may_be_off_by_a_factor_of_two():
    sae = dataclasses.replace(jump_relu()[0], nominal_l0=80.0)
    for measured_l0 in (40.0, 80.0, 160.0):
        assert check_l0(sae, measured_l0) == ""
    for measured_l0 in (39.9, 160.1, 0.0, math.nan):
        with pytest.raises(UserError, match=f"L0 of {measured_l0:.1f} .* nominal L0 is 80"):
            check_l0(sae, measured_l0)


def assert_rebuilds_as_it_decodes(sae, x):
    latents, (states, num_active) = sae.encode(x), sae.rebuild(x)
    assert torch.allclose(states, sae.decode(latents), rtol=1e-5, atol=1e-4)
    assert torch.equal(num_active, (latents != 0).sum(1)) and 0 < num_active.max() < LATENTS


def test_our_own_sae_in_raw_space(tmp_path):
    sae = TopKSAE.initialise(D, LATENTS, 5, init_seed=0)
    mean, sigma = torch.arange(D) / 4.0, 1 + torch.arange(D) / 8.0
    sae.save(tmp_path)
    with pytest.raises(UserError, match=r"lacks normalisation.safetensors"):
        own_sae(tmp_path, name="own")
    Statistics(mean, sigma).save(tmp_path / "normalisation.safetensors")
    ours = own_sae(tmp_path, name="own")
    x = 4 * torch.randn(33, D, generator=torch.Generator().manual_seed(1))
    latents = ours.encode(x)
    x_hat = (x - mean) / sigma
    assert torch.equal(latents, sae.dense_latents(sae.encode(x_hat)).detach())
    expected = sigma * sae(x_hat).detach() + mean
    assert torch.allclose(ours.decode(latents), expected, atol=1e-5)
    assert_rebuilds_as_it_decodes(ours, x)
    assert_rebuilds_as_it_decodes(ours.with_decoder_shift(mean), x)
    assert_rebuilds_as_it_decodes(jump_relu()[0].with_threshold_scale(0.7), x)
    assert ours.nominal_l0 == 5 and ours.threshold is None
    shift = torch.arange(D).float()
    shifted = ours.with_decoder_shift(shift)
    assert torch.equal(shifted.encode(x), latents)
    assert torch.allclose(shifted.decode(latents), expected + shift, atol=1e-5)
    with pytest.raises(UserError, match="'topk' SAE, which has no thresholds"):
        ours.with_threshold_scale(2.0)
    (tmp_path / "quality.json").write_text('{"l0": 4.5}', encoding="utf-8")
    assert own_sae(tmp_path, name="own").nominal_l0 == 4.5
    (tmp_path / "quality.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match=r"quality.json cannot be read"):
        own_sae(tmp_path, name="own")


@pytest.fixture
def own_folder(tmp_path):
    """An SAE of width 16 with a normalisation."""
    folder = tmp_path / "sae"
    TopKSAE.initialise(D, LATENTS, 5, init_seed=0).save(folder)
    Statistics(torch.zeros(D), torch.ones(D)).save(folder / "normalisation.safetensors")
    return folder


def test_one_sae_on_one_model(own_folder, checkpoint_folder, tmp_path):
    from prunelens.study.single import transfer_sae

    text = tmp_path / "text.txt"
    lines = [f"def f{i}(x):\n    return x + {i * i}  # number {i}\n" for i in range(1500)]
    text.write_text("\n".join(lines), encoding="utf-8")
    corpus = CorpusConfig(
        source="files",
        paths=(str(text),),
        document="blank_line",
        context_tokens=32,
        train_tokens=2048,
        eval_tokens=1024,
        calibration_tokens=512,
    )
    model = ModelConfig(name=str(checkpoint_folder))
    sizes = TransferConfig(ce_tokens=256, refit_tokens=512)
    pruning = PruningConfig(criterion="wanda", scope="row", sparsity=0.3)
    run = {"sizes": sizes, "device": "cpu"}
    shares = []
    rows = transfer_sae(
        str(own_folder), model, corpus, layer=1, pruning=pruning, progress=shares.append, **run
    )
    assert rows["condition"].unique().tolist() == ["dense", "wanda-row-0.30"]
    assert len(rows) == 12 and shares[-1] == 1.0
    assert set(rows.loc[rows["condition"] == "dense", "verdict"]) == {""}
    verdicts = set(rows.loc[rows["condition"] != "dense", "verdict"])
    assert verdicts and verdicts <= {"keep", "refit", "retrain", "undecided"}
    # The model itself as the compressed checkpoint: nothing changed.
    same = transfer_sae(
        str(own_folder), model, corpus, layer=1, pruned=str(checkpoint_folder), **run
    )
    dense, again = (part for _, part in same.groupby("condition", sort=False))
    columns = [c for c in same.columns if c not in ("condition", "verdict", "reason")]
    pd.testing.assert_frame_equal(
        dense[columns].reset_index(drop=True), again[columns].reset_index(drop=True)
    )
    assert set(again["verdict"]) == {"keep"}
    with pytest.raises(UserError, match=r"--layer: .* do not say"):
        transfer_sae(str(own_folder), model, corpus, layer=None, pruning=pruning, **run)
    with pytest.raises(UserError, match="neither a folder nor release:sae_id"):
        transfer_sae("nowhere", model, corpus, layer=1, pruning=pruning, **run)
    with pytest.raises(UserError, match="--pruned: give either"):
        transfer_sae(str(own_folder), model, corpus, layer=1, **run)


def test_the_sae_in_the_folder_that_one_stands_in(own_folder, tmp_path, monkeypatch):
    from prunelens import transfer_sae

    run = {"layer": None, "pruned": "never-read"}
    monkeypatch.chdir(own_folder)
    with pytest.raises(UserError, match=r"--layer: the files of '\.' do not say"):
        transfer_sae(".", ModelConfig(), CorpusConfig(), **run)
    monkeypatch.chdir(own_folder.rename(tmp_path / "=1+1"))
    with pytest.raises(UserError, match=r"'=1\+1' begins as a spreadsheet's formula does"):
        transfer_sae(".", ModelConfig(), CorpusConfig(), **run)
