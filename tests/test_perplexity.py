from __future__ import annotations

import math
import pathlib

import pytest
import torch

from prunelens.config import CorpusConfig
from prunelens.corpus import joined_stream
from prunelens.errors import UserError
from prunelens.model import LanguageModel
from prunelens.perplexity import Perplexity, measure_perplexity, next_token_nll

WIKITEXT = pathlib.Path(__file__).parents[2] / "shared" / "data" / "wikitext-2"
BOS = 0


@pytest.fixture
def stream() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(1, 128, (100,), generator=generator, dtype=torch.int32)


def slow_nll(lm: LanguageModel, tokens: list[int]) -> list[float]:
    """Every token after the first by its own forward pass, in plain float64."""
    losses = []
    for position in range(1, len(tokens)):
        before = torch.tensor([tokens[:position]])
        with torch.no_grad():
            scores = lm.model(input_ids=before, use_cache=False).logits[0, -1].double()
        losses.append(float(torch.logsumexp(scores, 0) - scores[tokens[position]]))
    return losses


def test_one_window_is_the_models_own_loss(tiny_lm: LanguageModel, stream: torch.Tensor):
    window = torch.cat([torch.tensor([BOS]), stream[:31].long()])[None]
    with torch.no_grad():
        own = float(tiny_lm.model(input_ids=window, labels=window, use_cache=False).loss)
    result = measure_perplexity(tiny_lm, stream[:31], context_tokens=32, bos_token=BOS)
    assert result.num_tokens == 31
    assert result.nll == pytest.approx(own, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(own), rel=1e-5)


@pytest.mark.parametrize("bos_token", [BOS, None])
def test_equals_a_slow_independent_sum(
    tiny_lm: LanguageModel, stream: torch.Tensor, bos_token: int | None
):
    losses: list[float] = []
    step = 7 if bos_token is not None else 8
    for start in (0, step):
        tokens = stream[start : start + step].tolist()
        losses += slow_nll(tiny_lm, tokens if bos_token is None else [bos_token, *tokens])
    result = measure_perplexity(tiny_lm, stream[:17], context_tokens=8, bos_token=bos_token)
    assert result.context_tokens == 8 and result.num_tokens == len(losses) == 14
    assert result.nll == pytest.approx(math.fsum(losses) / len(losses), rel=1e-5)


def test_bos_is_never_predicted(tiny_llama: LanguageModel, stream: torch.Tensor):
    plain = measure_perplexity(tiny_llama, stream, context_tokens=11, bos_token=BOS)
    spelled_out = torch.cat([torch.tensor([BOS], dtype=torch.int32), stream])
    again = measure_perplexity(tiny_llama, spelled_out, context_tokens=11, bos_token=BOS)
    assert again[:4] == plain[:4]
    assert plain.num_tokens == len(stream)


def test_every_window_has_its_own_nll(tiny_llama: LanguageModel, stream: torch.Tensor):
    whole = measure_perplexity(tiny_llama, stream, context_tokens=11, bos_token=BOS)
    each = [
        measure_perplexity(tiny_llama, part, context_tokens=11, bos_token=BOS).nll
        for part in stream.split(10)
    ]
    torch.testing.assert_close(whole.window_nll, torch.tensor(each, dtype=torch.float64))
    assert whole.nll == pytest.approx(float(whole.window_nll.mean()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_nll_taken_in_pieces_is_that_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
):
    generator = torch.Generator().manual_seed(3)
    scores = (4 * torch.randn(2, 7, 300, generator=generator)).to(dtype)
    tokens = torch.randint(300, (2, 7), generator=generator)
    whole = next_token_nll(scores, tokens)
    for pieces in (1, 300, 1300):  # less than a row, one row, four of the six rows
        monkeypatch.setattr("prunelens.perplexity.SCORES_AT_ONCE", {"cpu": pieces})
        assert torch.equal(next_token_nll(scores, tokens), whole)
    for window, ids, found in zip(scores.tolist(), tokens.tolist(), whole.tolist(), strict=True):
        for row, token, nll in zip(window[:-1], ids[1:], found, strict=True):
            slow = math.log(math.fsum(math.exp(score) for score in row)) - row[token]
            assert nll == pytest.approx(slow, rel=1e-5)


def test_batches_do_not_matter_and_progress_is_told(
    tiny_llama: LanguageModel, stream: torch.Tensor, monkeypatch: pytest.MonkeyPatch
):
    whole = measure_perplexity(tiny_llama, stream, context_tokens=11, bos_token=BOS)
    monkeypatch.setattr("prunelens.perplexity.LOGITS_AT_ONCE", {"cpu": 1})
    told: list[int] = []
    single = measure_perplexity(
        tiny_llama, stream, context_tokens=11, bos_token=BOS, progress=told.append
    )
    assert single.nll == pytest.approx(whole.nll, rel=1e-6)
    assert told == list(range(10, 101, 10))


def test_a_cut_is_drawn_from_all_over_the_text_and_paired(
    tiny_llama: LanguageModel, tiny_lm: LanguageModel
):
    generator = torch.Generator().manual_seed(4)
    text = torch.randint(1, 128, (1030,), generator=generator, dtype=torch.int32)
    whole = measure_perplexity(tiny_llama, text, context_tokens=11, bos_token=BOS)
    assert whole.windows.tolist() == list(range(103))

    def cut(lm: LanguageModel, seed: int = 0) -> Perplexity:
        return measure_perplexity(
            lm, text, context_tokens=11, bos_token=BOS, max_tokens=209, seed=seed
        )

    some = cut(tiny_llama)
    assert some.num_tokens == 200 and len(some.windows) == 20
    stretches = [103 * n // 20 for n in range(21)]
    for window, first, end in zip(some.windows, stretches[:-1], stretches[1:], strict=True):
        assert first <= int(window) < end
    torch.testing.assert_close(some.window_nll, whole.window_nll[some.windows])
    assert some.nll == pytest.approx(float(whole.window_nll[some.windows].mean()))
    assert torch.equal(cut(tiny_lm).windows, some.windows)  # another model reads the same
    assert not torch.equal(cut(tiny_llama, seed=1).windows, some.windows)


def test_limits(tiny_llama: LanguageModel, stream: torch.Tensor):
    cut = measure_perplexity(tiny_llama, stream, context_tokens=2048, bos_token=BOS)
    assert cut.context_tokens == 64 and cut.num_tokens == 63
    some = measure_perplexity(tiny_llama, stream, context_tokens=11, bos_token=BOS, max_tokens=39)
    assert some.num_tokens == 30
    with pytest.raises(UserError, match=r"perplexity.max_tokens: 9 is less than one window"):
        measure_perplexity(tiny_llama, stream, context_tokens=11, bos_token=BOS, max_tokens=9)
    with pytest.raises(UserError, match=r"perplexity.context_tokens: 64 is more than the 20"):
        measure_perplexity(tiny_llama, stream[:20], context_tokens=64, bos_token=BOS)


def test_nan_stays_nan_and_overflow_is_infinite(tiny_llama: LanguageModel, stream: torch.Tensor):
    weight = tiny_llama.model.lm_head.weight
    weight.mul_(1e5)
    assert (
        measure_perplexity(tiny_llama, stream, context_tokens=11, bos_token=BOS).perplexity
        == math.inf
    )
    weight.fill_(math.nan)
    assert math.isnan(
        measure_perplexity(tiny_llama, stream, context_tokens=11, bos_token=BOS).perplexity
    )


@pytest.mark.skipif(not WIKITEXT.is_dir(), reason="the shared WikiText-2 files are not here")
def test_wikitext_through_a_byte_level_tokenizer(checkpoint_folder: pathlib.Path):
    from prunelens.model import load_model

    lm = load_model(str(checkpoint_folder))
    config = CorpusConfig(source="files", paths=(str(WIKITEXT / "test.txt"),), document="heading")
    stream, bos_token = joined_stream(config, lm.tokenizer)
    assert bos_token == BOS and len(stream) > 300_000
    result = measure_perplexity(
        lm, stream, context_tokens=2048, bos_token=bos_token, max_tokens=5_000
    )
    assert result.context_tokens == 64
    assert result.num_tokens == 5_000 // 63 * 63
    assert result.perplexity > 100  # a random model is at best as good as guessing
