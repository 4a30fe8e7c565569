"""A hub that fails for a while, and one that is gone: tried again, then told, then resumed."""

import huggingface_hub
import pytest

from fake_hub import Repository, running_hub
from prunelens import hub as our_hub
from prunelens.config import ModelConfig
from prunelens.errors import UserError
from prunelens.model import load_model

NAME = "someone/tiny-llama"


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited, ours and the client's."""
    waited = []
    monkeypatch.setattr("time.sleep", waited.append)
    return waited


@pytest.fixture
def fake(checkpoint_folder, tmp_path, waits):
    files = {path.name: path.read_bytes() for path in checkpoint_folder.iterdir()}
    with (
        pytest.MonkeyPatch.context() as patch,
        running_hub(patch, tmp_path / "cache") as hub,
    ):
        hub.repositories[NAME] = Repository(private=False, files=files)
        our_hub.snapshot.cache_clear()
        yield hub
        our_hub.snapshot.cache_clear()


@pytest.mark.parametrize(
    "failures",
    [[503, 502], [500], [429, 429, 429], [0], [0, 503, 0]],
    ids=lambda failures: "-".join(map(str, failures)),
)
def test_what_passes_is_waited_for(fake, failures, waits):
    fake.failures = list(failures)
    load_model(ModelConfig(name=NAME, layers=(1,)))
    assert not fake.failures
    assert waits


@pytest.mark.parametrize("status", [401, 403, 404])
def test_what_does_not_pass_is_told_at_once(fake, status, waits):
    fake.failure = status
    with pytest.raises(UserError, match=r"models\.name: 'someone/tiny-llama'|the hub has no"):
        load_model(ModelConfig(name=NAME, layers=(1,)))
    assert not [seconds for seconds in waits if seconds in our_hub.WAITS]


def test_a_lost_network_is_told_in_one_line_and_the_download_resumed(fake, waits):
    fake.broken_file = "model.safetensors"
    with pytest.raises(UserError, match="hub cannot be reached") as told:
        load_model(ModelConfig(name=NAME, layers=(1,)))
    assert "\n" not in str(told.value)
    assert set(our_hub.WAITS) <= set(waits)
    there = set(fake.sent)
    assert "config.json" in there and "model.safetensors" not in there
    fake.failure = 503  # now gone altogether
    with pytest.raises(UserError, match="hub cannot be reached"):
        load_model(ModelConfig(name=NAME, layers=(1,)))
    fake.failure, fake.broken_file = None, None
    fake.sent.clear()
    lm = load_model(ModelConfig(name=NAME, layers=(1,)))
    assert len(lm.blocks) == 3
    assert not there & set(fake.sent), "what was there is not fetched again"
    fake.failure = 503
    our_hub.snapshot.cache_clear()
    load_model(ModelConfig(name=NAME, layers=(1,)))  # without a connection, from the cache
    assert huggingface_hub.constants.HF_HUB_OFFLINE is False
