import copy
import math

import pytest
import torch

from prunelens.config import SaeConfig
from prunelens.errors import UserError
from prunelens.sae import SaeRequest, TopKSAE, evaluate_sae, train_sae, train_saes
from prunelens.sae.order import TokenOrder, derived_generator
from prunelens.sae.resample import draw_by_weight, restart_dead
from prunelens.sae.state import Training
from test_sae import InMemory, inputs

SMALL = SaeConfig(
    expansion=4,
    k=3,
    steps=40,
    batch_tokens=64,
    learning_rate=3e-3,
    resample_every=8,
    checkpoint_every=5,
)


class StopHereError(Exception):
    """Stands for a kill."""


def clustered(tokens=600, d_model=12):
    """Activations in a few clusters, so that many latents die."""
    generator = torch.Generator().manual_seed(5)
    centres = 4 * torch.randn(3, d_model, generator=generator)
    which = torch.randint(3, (tokens,), generator=generator)
    return InMemory(centres[which] + 0.1 * torch.randn(tokens, d_model, generator=generator))


def train(data, config=SMALL, *, init_seed=0, data_seed=0, **options):
    return train_sae(data, config, init_seed=init_seed, data_seed=data_seed, **options)


@pytest.fixture(scope="module")
def straight():
    """A training that nothing interrupts."""
    return train(clustered())


@pytest.fixture(scope="module")
def warm_start():
    """An SAE trained on other data from another start."""
    return train(InMemory(inputs(600)), init_seed=5).sae


def assert_same(a, b):
    for ours, theirs in zip(a.sae.weights, b.sae.weights, strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(a.init_retention, b.init_retention)
    assert torch.equal(a.resampled, b.resampled)
    assert a.log == b.log


def test_a_planted_dictionary_is_recovered():
    generator = torch.Generator().manual_seed(0)
    planted = torch.linalg.qr(torch.randn(16, 16, generator=generator)).Q
    on = torch.rand(6000, 16, generator=generator) < 0.1
    raw = (on * (0.5 + torch.rand(6000, 16, generator=generator))) @ planted
    data = InMemory(raw, mean=torch.zeros(16), sigma=torch.full((16,), 0.2))
    config = SaeConfig(expansion=2, k=3, steps=200, batch_tokens=256, learning_rate=2e-2)
    trained = train(data, config)
    best = (planted @ trained.sae.decoder_weight.detach().T).amax(1)
    assert (best > 0.95).float().mean() > 0.9
    untrained = TopKSAE.initialise(16, 32, 3, init_seed=0)
    before = evaluate_sae(untrained, data, dense_variance=1.0).fvu
    after = evaluate_sae(trained.sae, data, dense_variance=1.0).fvu
    assert after < 0.1 < before
    torch.testing.assert_close(trained.sae.decoder_weight.norm(dim=1), torch.ones(32))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_seeds_give_the_same_bits(dtype):
    config = SMALL.model_copy(update={"dtype": dtype})
    assert_same(train(clustered(), config), train(clustered(), config))


class CountedReads(InMemory):
    """Counts how often rows were asked for, by how many."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.reads = []

    def rows(self, index):
        self.reads.append(len(index))
        return super().rows(index)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_several_at_once_equal_one_by_one_and_read_a_shared_order_once(dtype):
    config = SMALL.model_copy(update={"dtype": dtype, "resample_every": 1000})
    seeds = [(0, 0), (1, 0), (2, 0), (0, 1)]
    longer = config.model_copy(update={"steps": config.steps + 5})
    data = CountedReads(clustered().raw)
    requests = [SaeRequest(config, *pair) for pair in seeds] + [SaeRequest(longer, 3, 0)]
    together = train_saes(data, requests)
    batches = [read for read in data.reads if read == config.batch_tokens]
    assert len(batches) == longer.steps + config.steps  # two orders, not five
    for request, trained in zip(requests, together, strict=True):
        alone = train(
            clustered(), request.config, init_seed=request.init_seed, data_seed=request.data_seed
        )
        assert_same(trained, alone)


def test_one_of_several_resumes_from_its_own_checkpoint(tmp_path, straight):
    """Killed at different steps, they meet again and end as if nothing had happened."""
    ahead, behind = tmp_path / "ahead", tmp_path / "behind"

    def stop_at(last):
        def stop(step):
            if step == last:
                raise StopHereError

        return stop

    for path, last in ((ahead, 21), (behind, 11)):
        with pytest.raises(StopHereError):
            train(clustered(), checkpoint=path, progress=stop_at(last))
    steps = {ahead: [], behind: []}
    requests = [
        SaeRequest(SMALL, 0, 0, checkpoint=path, progress=steps[path].append)
        for path in (ahead, behind)
    ]
    for trained in train_saes(clustered(), requests):
        assert_same(trained, straight)
    assert steps[ahead][0] == 21
    assert steps[behind][0] == 11


def test_bfloat16_ends_at_the_fvu_of_float32():
    found = {}
    data = InMemory(inputs(600))
    for dtype in ("float32", "bfloat16"):
        config = SMALL.model_copy(update={"dtype": dtype, "steps": 150})
        found[dtype] = evaluate_sae(train(data, config).sae, data, dense_variance=1.0).fvu
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.01)


def test_the_two_seeds_are_independent():
    starts = {}

    def remember(key):
        return {0: lambda step, sae: starts.update({key: sae.decoder_weight.detach().clone()})}

    first = train(clustered(), observe=remember("a"))
    other_order = train(clustered(), data_seed=1, observe=remember("b"))
    other_start = train(clustered(), init_seed=1, observe=remember("c"))
    assert torch.equal(starts["a"], starts["b"])
    assert not torch.equal(starts["a"], starts["c"])
    assert not torch.equal(first.sae.decoder_weight, other_order.sae.decoder_weight)
    assert not torch.equal(first.sae.decoder_weight, other_start.sae.decoder_weight)


def test_one_epoch_visits_every_token_once_and_batches_cross_epochs():
    order = TokenOrder(50, 20, data_seed=4)
    seen = torch.cat([order.batch(step) for step in range(1, 6)])
    assert seen[:50].sort().values.tolist() == list(range(50))
    assert seen[50:].sort().values.tolist() == list(range(50))
    assert seen[:50].tolist() != seen[50:].tolist()
    assert torch.equal(TokenOrder(50, 20, data_seed=4).batch(3), seen[40:60])
    assert len(TokenOrder(7, 20, data_seed=4).batch(2)) == 20


@pytest.mark.parametrize("stop_at", [1, 4, 5, 6, 8, 9, 15, 16, 17, 35, 39])
def test_a_killed_training_resumes_to_the_same_bits(tmp_path, straight, stop_at):
    checkpoint = tmp_path / "checkpoint.safetensors"
    assert straight.resampled.any()

    def stop(step):
        if step == stop_at:
            raise StopHereError

    with pytest.raises(StopHereError):
        train(clustered(), checkpoint=checkpoint, progress=stop)
    assert checkpoint.exists() == (stop_at >= 5)
    steps = []
    resumed = train(clustered(), checkpoint=checkpoint, progress=steps.append)
    assert steps[0] == stop_at - stop_at % 5 + 1
    assert_same(straight, resumed)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint.safetensors"]


def test_checkpoints_change_nothing(tmp_path, straight):
    often = train(clustered(), checkpoint=tmp_path / "checkpoint.safetensors")
    assert_same(often, straight)
    sparse = SMALL.model_copy(update={"checkpoint_every": 1000, "warm_steps": 3})
    assert_same(train(clustered(), sparse), straight)


def test_a_checkpoint_of_another_training_or_a_damaged_one_is_refused(tmp_path, warm_start):
    path = tmp_path / "checkpoint.safetensors"
    train(clustered(), checkpoint=path)
    for options in ({"init_seed": 1}, {"data_seed": 1}, {"start": warm_start}):
        with pytest.raises(UserError, match="another training"):
            train(clustered(), checkpoint=path, **options)
    with pytest.raises(UserError, match="another training"):
        train(clustered(tokens=601), checkpoint=path)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(UserError, match="cannot be read"):
        train(clustered(), checkpoint=path)


def test_dead_latents_restart_and_are_flagged():
    weights = {}
    observe = {
        step: lambda step, sae: weights.update({step: sae.decoder_weight.detach().clone()})
        for step in (0, 8, 40)
    }
    trained = train(clustered(), observe=observe)
    assert trained.resampled.any()
    untouched = ~trained.resampled
    from_start = torch.cosine_similarity(weights[40], weights[0], dim=1)
    torch.testing.assert_close(trained.init_retention[untouched], from_start[untouched])
    restarted = trained.resampled
    assert not torch.allclose(trained.init_retention[restarted], from_start[restarted])
    checks = {entry.step: entry.num_dead for entry in trained.log}
    assert checks[8] > 0


# ---- warm starts ----


def test_a_warm_start_is_copied_and_nothing_else_fixes_the_initial_weights(warm_start):
    before, seen = [w.detach().clone() for w in warm_start.weights], []

    def remember(_step, sae):
        seen.extend(w.detach().clone() for w in sae.weights)

    trained = train(clustered(), start=warm_start, observe={0: remember})
    assert_same(trained, train(clustered(), start=warm_start, init_seed=7))
    for now, then, initial in zip(warm_start.weights, before, seen, strict=True):
        assert torch.equal(now, then)
        assert torch.equal(initial, then)
    assert not torch.equal(trained.sae.decoder_weight, warm_start.decoder_weight)


def test_retention_of_a_warm_start_is_to_the_given_weights(warm_start):
    trained = train(clustered(), start=warm_start)
    untouched = ~trained.resampled
    assert untouched.any()
    rows = trained.sae.decoder_weight.detach()[untouched]
    given = torch.cosine_similarity(rows, warm_start.decoder_weight.detach()[untouched], dim=1)
    torch.testing.assert_close(trained.init_retention[untouched], given)
    assert given.min() > 0.9
    assert given.max() < 1


def test_a_start_that_explains_everything_stays_as_it_is():
    """Inputs of whole numbers along the axes: every error is exactly 0, so every gradient is."""
    start = TopKSAE(6, 12, 2)
    with torch.no_grad():
        for weight in (start.encoder_weight, start.decoder_weight):
            weight.copy_(torch.cat([torch.eye(6), -torch.eye(6)]))
    generator = torch.Generator().manual_seed(2)
    on = torch.rand(400, 6, generator=generator).topk(2).indices
    whole = torch.randint(1, 9, (400, 2), generator=generator)
    raw = torch.zeros(400, 6).scatter(1, on, whole.float())
    data = InMemory(raw, mean=torch.zeros(6), sigma=torch.ones(6))
    config = SMALL.model_copy(update={"expansion": 2, "k": 2})
    trained = train(data, config, start=start)
    for now, then in zip(trained.sae.weights, start.weights, strict=True):
        assert torch.equal(now, then)
    assert torch.equal(trained.init_retention, torch.ones(12))
    assert not trained.resampled.any()


@pytest.mark.parametrize("stop_at", [6, 17])
def test_a_killed_warm_training_resumes_to_the_same_bits(tmp_path, warm_start, stop_at):
    checkpoint = tmp_path / "checkpoint.safetensors"

    def stop(step):
        if step == stop_at:
            raise StopHereError

    with pytest.raises(StopHereError):
        train(clustered(), start=warm_start, checkpoint=checkpoint, progress=stop)
    other = copy.deepcopy(warm_start)
    with torch.no_grad():
        other.encoder_bias[3] += 1e-6
    for start in (None, other):
        with pytest.raises(UserError, match="another training"):
            train(clustered(), start=start, checkpoint=checkpoint)
    resumed = train(clustered(), start=warm_start, checkpoint=checkpoint)
    assert_same(train(clustered(), start=warm_start), resumed)


def test_a_start_that_does_not_fit_is_one_line():
    def refused(start, message):
        with pytest.raises(UserError, match=message) as error:
            train(clustered(), start=start)
        assert "\n" not in str(error.value)

    for shape in ((11, 48, 3), (12, 24, 3), (12, 48, 4)):
        d_model, latents, k = shape
        start = TopKSAE.initialise(*shape, init_seed=0)
        refused(start, rf"^start: .* d_model {d_model}, {latents} latents and k {k}, but .* k 3;")
    for factor in (0.0, 2.0, math.nan):
        start = TopKSAE.initialise(12, 48, 3, init_seed=0)
        with torch.no_grad():
            start.decoder_weight[5] *= factor
        refused(start, r"^start: decoder row 5 has norm")


def test_the_log_follows_retention():
    seen = {}

    def remember(step, sae):
        seen[step] = sae.decoder_weight.detach().clone()

    config = SMALL.model_copy(update={"resample_every": 20})
    trained = train(clustered(), config, observe=dict.fromkeys((0, 7, 14, 20), remember))
    log = {entry.step: entry.mean_init_retention for entry in trained.log}
    cosines = {
        step: torch.cosine_similarity(rows.double(), seen[0].double(), dim=1)
        for step, rows in seen.items()
    }
    for step in (7, 14):
        assert log[step] == pytest.approx(float(cosines[step].mean()), rel=1e-12)
    assert 1 > log[7] > log[14]
    assert trained.resampled.any()
    cosines[20][trained.resampled] = 1.0  # what the observer sees has just restarted
    assert log[20] == pytest.approx(float(cosines[20].mean()), rel=1e-12)
    assert log[40] == pytest.approx(float(trained.init_retention.mean()))


def test_an_observed_step_is_in_the_log(tmp_path):
    path, config = tmp_path / "checkpoint", SMALL.model_copy(update={"steps": 1000})

    def stop(step):
        if step == 5:
            raise StopHereError

    with pytest.raises(StopHereError):
        train(
            clustered(), config, checkpoint=path, progress=stop, observe={3: lambda step, sae: None}
        )
    training = Training(clustered(), config, init_seed=0, data_seed=0)
    training.load(path)
    assert [entry.step for entry in training.log] == [1, 3]


def test_observing_changes_nothing_but_the_log(straight):
    observed = train(clustered(), observe={13: lambda step, sae: None})
    assert_same(observed._replace(log=straight.log), straight)


def test_no_restart_in_the_last_quarter():
    config = SMALL.model_copy(update={"resample_every": 30})
    assert not train(clustered(), config).resampled.any()


def test_restart_sets_what_methods_say():
    sae = TopKSAE.initialise(12, 48, 3, init_seed=0)
    dead = torch.zeros(48, dtype=torch.bool)
    dead[[4, 9, 40]] = True
    before = [w.detach().clone() for w in sae.weights]
    data = inputs(100)
    restarted = restart_dead(
        sae,
        dead,
        torch.arange(100),
        lambda index: data[index],
        batch_tokens=32,
        generator=derived_generator("test", 0, 0),
    )
    assert torch.equal(restarted, dead)
    encoder, encoder_bias, decoder, decoder_bias = (w.detach() for w in sae.weights)
    for now, then in zip((encoder, encoder_bias, decoder), before[:3], strict=True):
        assert torch.equal(now[~dead], then[~dead])
    assert torch.equal(decoder_bias, before[3])
    torch.testing.assert_close(encoder[dead], 0.2 * decoder[dead])  # the living have norm 1
    directions = data / data.norm(dim=1, keepdim=True)
    match = (decoder[dead] @ directions.T).max(1)
    torch.testing.assert_close(match.values, torch.ones(3))
    assert len(set(match.indices.tolist())) == 3


def test_inputs_are_drawn_by_weight_without_replacement():
    weight = torch.tensor([0.0, 1.0, 2.0, 3.0, 0.0, 4.0])
    counts = torch.zeros(6)
    for position in range(3000):
        drawn = draw_by_weight(weight, 1, generator=derived_generator("test", 0, position))
        counts[drawn] += 1
    torch.testing.assert_close(counts / 3000, weight / weight.sum(), atol=0.03, rtol=0)
    drawn = draw_by_weight(weight, 6, generator=derived_generator("test", 0, 0))
    assert sorted(drawn.tolist()) == [1, 2, 3, 5]


def test_everything_dead_and_inputs_without_error():
    sae = TopKSAE.initialise(12, 24, 3, init_seed=0)
    with torch.no_grad():
        sae.encoder_bias -= 1e3
    generator = derived_generator("test", 0, 0)
    dead = torch.ones(24, dtype=torch.bool)
    zeros = torch.zeros(30, 12)
    options = {"batch_tokens": 8, "generator": generator}
    assert not restart_dead(sae, dead, torch.arange(30), lambda i: zeros[i], **options).any()
    data = inputs(10)
    restarted = restart_dead(sae, dead, torch.arange(10), lambda i: data[i], **options)
    assert int(restarted.sum()) == 10
    torch.testing.assert_close(sae.encoder_weight[:10].norm(dim=1), torch.full((10,), 0.2))


def test_retention_is_one_where_nothing_moves():
    config = SMALL.model_copy(update={"learning_rate": 1e-12, "resample_every": 40})
    torch.testing.assert_close(train(clustered(), config).init_retention, torch.ones(48))


def test_the_curve_falls_and_the_rate_follows_a_cosine():
    trained = train(clustered())
    by_step = {entry.step: entry for entry in trained.log}
    assert by_step[40].fvu < by_step[1].fvu
    assert by_step[1].learning_rate == pytest.approx(3e-3)
    assert by_step[21].learning_rate == pytest.approx(1.5e-3)
    assert by_step[40].learning_rate == pytest.approx(1.5e-3 * (1 + math.cos(math.pi * 39 / 40)))


def test_fast_training_ends_where_dense_autograd_with_torch_adam_ends():
    data, config = clustered(), SMALL.model_copy(update={"resample_every": 40})
    ours = train(data, config).sae
    theirs = TopKSAE.initialise(12, 48, 3, init_seed=0)
    optimizer = torch.optim.Adam(theirs.parameters(), lr=config.learning_rate)
    order = TokenOrder(data.num_tokens, config.batch_tokens, data_seed=0)
    for step in range(config.steps):
        x_hat = data.rows(order.batch(step + 1))
        pre = torch.relu(x_hat @ theirs.encoder_weight.T + theirs.encoder_bias)
        values, indices = pre.topk(3)
        z = torch.zeros_like(pre).scatter(1, indices, values)
        loss = (z @ theirs.decoder_weight + theirs.decoder_bias - x_hat).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = (
            config.learning_rate * (1 + math.cos(math.pi * step / config.steps)) / 2
        )
        optimizer.step()
        with torch.no_grad():
            theirs.decoder_weight /= theirs.decoder_weight.norm(dim=1, keepdim=True)
    for a, b in zip(ours.weights, theirs.weights, strict=True):
        torch.testing.assert_close(a, b, atol=2e-3, rtol=1e-2)


def test_a_loss_that_is_no_number_names_the_step():
    data = clustered()
    broken = TokenOrder(600, 64, data_seed=0).batch(3)[0]
    data.raw[broken] = math.nan
    data.mean, data.sigma = torch.zeros(12), torch.ones(12)
    with pytest.raises(UserError, match=r"sae\.learning_rate: the loss is nan at step 3"):
        train(data)


def test_bad_input_is_one_line():
    with pytest.raises(UserError, match=r"sae\.k: 64 is more than the 48"):
        train(clustered(), SaeConfig(expansion=4, k=64, steps=2))
    with pytest.raises(UserError, match="no activations to train on"):
        train(InMemory(torch.zeros(0, 12), sigma=torch.ones(12)))
