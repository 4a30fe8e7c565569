"""Which code trains an SAE: kernels that were never on a device are tried before they are used."""

import math

import pytest
import torch

from prunelens.config import SaeConfig
from prunelens.sae.steps import engine
from prunelens.sae.steps.descent import Descent
from prunelens.sae.train import train_sae
from test_sae import InMemory

D, LATENTS, K = 12, 48, 4
CONFIG = SaeConfig(expansion=LATENTS // D, k=K, steps=4, batch_tokens=32, learning_rate=1e-3)


class Faithful(Descent):
    """Kernels of a device, which do what PyTorch does."""


class WrongForward(Descent):
    def step(self, x_hat, *, rate, number):
        found = super().step(x_hat, rate=rate, number=number)
        return found._replace(loss=found.loss * 1.01)


class WrongBackward(Descent):
    """Of one weight alone."""

    def adam(self, names, gradients, rate, number, some):
        if names[0] == "encoder_bias":
            gradients = (-gradients[0], gradients[1])
        super().adam(names, gradients, rate, number, some)


class WrongUpdate(Descent):
    """The rows are not scaled back."""

    def step(self, x_hat, *, rate, number):
        found = super().step(x_hat, rate=rate, number=number)
        self.weights.decoder_weight.mul_(1.01)
        return found


class WrongOnReplay(Descent):
    """As a graph that was captured with something missing."""

    def step(self, x_hat, *, rate, number):
        return super().step(x_hat if number == 1 else x_hat * 0, rate=rate, number=number)


class NotANumber(Descent):
    def step(self, x_hat, *, rate, number):
        found = super().step(x_hat, rate=rate, number=number)
        self.mean.encoder_weight[3, 3] = math.nan
        return found


class NoCompiler(Descent):
    def step(self, x_hat, *, rate, number):
        raise RuntimeError("ptxas fatal:\nno such architecture")


@pytest.fixture(autouse=True)
def fresh():
    engine._problem.cache_clear()
    yield
    engine._problem.cache_clear()


def trained(monkeypatch, kernels, dtype="float32"):
    monkeypatch.setattr(engine, "_kernels_for", lambda device: kernels)
    data = InMemory(torch.randn(256, D, generator=torch.Generator().manual_seed(1)))
    config = CONFIG.model_copy(update={"dtype": dtype})
    return train_sae(data, config, init_seed=0, data_seed=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_that_agree_are_used(monkeypatch, caplog, dtype):
    assert trained(monkeypatch, Faithful, dtype).engine == "triton"
    assert trained(monkeypatch, None, dtype).engine == "pytorch"
    assert not caplog.records


@pytest.mark.parametrize(
    ("kernels", "said"),
    [
        (WrongForward, "the loss of step 1 is 0.01 off (allowed: 0.001)"),
        (WrongBackward, "the gradient of encoder_bias of step 1 is 2 off"),
        (WrongUpdate, "decoder_weight of step 1 is 0.01 off"),
        (WrongOnReplay, "of step 2 is"),
        (NotANumber, "the gradient of encoder_weight of step 1 is nan off"),
        (NoCompiler, "they fail (RuntimeError: ptxas fatal: no such architecture)"),
    ],
)
def test_others_are_not_and_one_line_says_so(monkeypatch, caplog, kernels, said):
    plain = trained(monkeypatch, None)
    for _ in range(2):  # a second training in the same process
        found = trained(monkeypatch, kernels)
        assert found.engine == "pytorch"
        for a, b in zip(found.sae.weights, plain.sae.weights, strict=True):
            assert torch.equal(a, b)
    (record,) = caplog.records
    assert said in record.message and "\n" not in record.message


def test_the_trial_disturbs_no_random_number(monkeypatch):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    trained(monkeypatch, Faithful)
    assert torch.equal(torch.rand(2), expected)
