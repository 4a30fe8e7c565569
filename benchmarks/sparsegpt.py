"""SparseGPT: prunelens against llm-compressor, on one model, the same windows and the same machine.

`python benchmarks/sparsegpt.py`, in an environment with llmcompressor==0.14, prunes a random Llama
to 50 % (each matrix by columns of 128) and to 2:4, block by block with batches of one size.
Compared are time, which weights go, how far what stays is apart, and the error that each leaves in
the model's own output. llm-compressor zeroes one weight more per block of columns than half of
them, and bfloat16 would round both sides: the model is float32.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import tokenizers
import torch
import transformers
from torch import Tensor

from prunelens.config import PruningConfig
from prunelens.model import LanguageModel, as_language_model, logits
from prunelens.prune import as_matrix, calibrate, prunable_matrices, prune_model
from side_by_side import Mark, options, publish, take_turns

PATTERNS = {"unstructured": "0:0", "2:4": "2:4"}  # ours -> theirs


class Result(NamedTuple):
    """A pruned model."""

    weights: dict[str, Tensor]
    """By matrix."""
    output: Tensor
    """Logits of the first windows."""


def main() -> None:
    """Both contenders in turn, for both patterns."""
    parser = options(__doc__)
    parser.set_defaults(rounds=3)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--context", type=int, default=256)
    chosen = parser.parse_args()
    prune_like_peer = _peer()
    torch.set_num_threads(chosen.threads)
    folder = tempfile.TemporaryDirectory()
    lm, tokens = _model(chosen, folder.name), _tokens(chosen)
    dense = {name: value.clone() for name, value in lm.model.state_dict().items()}
    before = logits(lm, tokens[:2])

    def from_dense(work: Callable[[], None]) -> Callable[[], Result]:
        def call() -> Result:
            lm.model.load_state_dict(dense)
            work()
            found = {n: as_matrix(m).clone() for n, m in prunable_matrices(lm).items()}
            return Result(found, logits(lm, tokens[:2]))

        return call

    contenders: dict[str, Callable[[], Result]] = {}
    for ours, theirs in PATTERNS.items():
        contenders[f"prunelens {ours}"] = from_dense(partial(_prune, lm, tokens, ours))
        contenders[f"llmcompressor {ours}"] = from_dense(
            partial(prune_like_peer, lm, tokens, theirs)
        )
    agreement = {
        pattern: _agreement(
            contenders[f"prunelens {pattern}"](), contenders[f"llmcompressor {pattern}"](), before
        )
        for pattern in PATTERNS
    }
    times = take_turns(contenders, rounds=chosen.rounds, device=chosen.device)
    publish(
        "sparsegpt",
        settings={key: value for key, value in vars(chosen).items() if key != "save"},
        results={"milliseconds": times, "agreement": agreement},
        marks=list[Mark](),
        save=chosen.save,
    )


def _agreement(ours: Result, theirs: Result, before: Tensor) -> dict[str, float]:
    """Of all matrices together."""
    equal = total = difference = norm = 0.0
    zeros = [0.0, 0.0]
    for name, weight in ours.weights.items():
        other = theirs.weights[name]
        equal += float(((weight == 0) == (other == 0)).sum())
        total += weight.numel()
        difference += float((weight - other).double().square().sum())
        norm += float(other.double().square().sum())
        for side, matrix in enumerate((weight, other)):
            zeros[side] += float((matrix == 0).sum())
    errors = [float((side.output - before).norm() / before.norm()) for side in (ours, theirs)]
    return {
        "equal_mask_entries": equal / total,
        "relative_difference_of_weights": (difference / norm) ** 0.5,
        "sparsity_prunelens": zeros[0] / total,
        "sparsity_llmcompressor": zeros[1] / total,
        "output_error_prunelens": errors[0],
        "output_error_llmcompressor": errors[1],
    }


def _prune(lm: LanguageModel, tokens: Tensor, pattern: str) -> None:
    scope = "matrix" if pattern == "unstructured" else "row"
    config = {"criterion": "sparsegpt", "scope": scope, "pattern": pattern, "sparsity": 0.5}
    pruning = PruningConfig.model_validate(config)
    prune_model(lm, pruning, calibration=tokens, with_masks=False)


def _peer() -> Callable[[LanguageModel, Tensor, str], None]:
    """llm-compressor's oneshot, with windows that are tokenised already."""
    try:
        from llmcompressor import oneshot
        from llmcompressor.modifiers.pruning.sparsegpt import SparseGPTModifier
        from loguru import logger  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise SystemExit("sparsegpt.py: needs an environment with llmcompressor==0.14") from None
    logger.remove()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"": 0}, unk_token=""))
    unused = transformers.PreTrainedTokenizerFast(tokenizer_object=words)

    def prune(lm: LanguageModel, tokens: Tensor, structure: str) -> None:
        rows: Any = [{"input_ids": window} for window in tokens]
        batch = max(1, calibrate.BATCH_TOKENS // tokens.shape[1])
        recipe = SparseGPTModifier(
            sparsity=0.5, mask_structure=structure, block_size=128, ignore=["re:.*lm_head"]
        )
        with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
            oneshot(
                model=lm.model,
                processor=unused,
                dataset=torch.utils.data.DataLoader(rows, batch_size=batch),
                recipe=recipe,
                pipeline="sequential",
                num_calibration_samples=len(tokens),
            )

    return prune


def _model(chosen: Any, folder: str) -> LanguageModel:
    """A random Llama of usual proportions; the peer asks the folder for its config."""
    config = transformers.LlamaConfig(
        vocab_size=8192,
        hidden_size=chosen.width,
        intermediate_size=chosen.width * 11 // 4,
        num_hidden_layers=chosen.blocks,
        num_attention_heads=chosen.width // 64,
        num_key_value_heads=chosen.width // 128,
        max_position_embeddings=chosen.context,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(chosen.device)
    config.save_pretrained(folder)
    model.config.name_or_path = folder
    return as_language_model(model, label="random Llama")


def _tokens(chosen: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(8192, (chosen.windows, chosen.context), generator=generator)


if __name__ == "__main__":
    main()
