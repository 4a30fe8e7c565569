"""Write docs/models.md: what works for every causal language model that transformers has.

.venv/bin/python tools/write_models.py

Of each class a tiny random model is made, saved, loaded as a user's would be, and tried. What
stands between `<!-- models: begin -->` and `<!-- models: end -->` is written anew. Takes about 10
minutes.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import pathlib
import re
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
import transformers
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers import PreTrainedConfig as Config
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

from prunelens.config import ModelConfig, PruningConfig, study_from_data
from prunelens.errors import UserError
from prunelens.model import LanguageModel, load_model, logits, run_to_site
from prunelens.prune import prune_model
from prunelens.study.run import run_study
from prunelens.upper_blocks import UpperBlocks

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "models.md"
BEGIN, END = "<!-- models: begin -->\n", "<!-- models: end -->\n"
LONGEST, MOST_BLOCKS, MOST_WEIGHTS = 64, 8, 50_000_000
SIZES = {  # what a number's name matches -> what it becomes, if it is larger
    r"pad_token_id": 0,
    r"bos_token_id": 1,
    r".*_token_id|.*_index": 2,
    r".*vocab.*": 128,
    r".*(key_value|kv|key)_heads|kv_n_heads": 2,
    r"mamba_n_heads|n_mamba_heads|mamba_num_heads": 8,
    r".*heads|n_head|num_query_groups": 4,
    r".*(rope|nope)_head_dim|rotary_dim|.*rank": 4,
    r".*head_dim|.*d_head|.*headdim|attention_head_size|kv_channels|dim_head": 8,
    r".*state_size|.*d_state": 8,
    r".*d_ssm|mamba_intermediate": 64,
    r".*(hidden_size|embedding_size|embedding_dim|embed_dim).*": 32,
    r"d_model|n_embd|emb_dim|lru_width": 32,
    r".*(intermediate_size|ffn_dim|ffn_hidden_size).*|d_inner|dff|dim_ff|feed_forward_size": 48,
    r"n_groups?|topk_group|num_expert_group|num_shared_experts|n_shared_experts": 1,
    r".*(experts_per_tok|topk|moe_k|top_k|experts_per_token|zero_expert_num)": 2,
    r".*experts": 4,
    r".*window.*": 16,
    r".*(max_position|_positions|max_seq_len|context_length|model_max_length|n_ctx).*": LONGEST,
    r".*chunk_size": 8,
}
DEPTH = r"n_layers?|num_layers|num_hidden_layers|num_blocks|(num_)?(en|de)coder_layers"
GIVEN: dict[
    str, dict[str, Any]
] = {  # what a class needs beside: mostly what its default leaves out
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma3n_text": {"num_hidden_layers": 10, "num_kv_shared_layers": 5},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 4},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [8, 8],
        "axial_pos_embds_dim": [16, 16],
        "attn_layers": ["local", "lsh"],
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 12, "attention_hidden_size": 64, "attention_head_dim": 16},
}


CODES = {  # what a refusal says -> how the table calls it
    "mixtures of experts": "experts",
    "the stacked matrices": "stacked",
    "calibration never reached": "unreached",
    "'sequential' needs blocks": "takes more",
    "is not found": "none",
    "is not supported": "shape",
    "of its forward pass": "not run",
    "forward pass fails": "fails",
    "of decoder blocks": "blocks",
    "no number of decoder blocks": "blocks",
    "cannot be run from block": "no cache",
    "cannot load": "not loaded",
}


class Row(NamedTuple):
    """What works for one class, cell by cell: `yes`, or a sentence that says what does not."""

    prunes: str
    """By magnitude, and by Wanda with dense norms: exactly half of every matrix is zero then."""
    block_by_block: str
    """By SparseGPT: the blocks can be run one after the other."""
    resid_post: str
    """Captured, and equal to transformers' `output_hidden_states`."""
    mlp_out: str
    """Captured in every block; with attn_out it adds up to what the block adds."""
    attn_out: str
    """Captured in every block."""
    causal: str
    """Whether ablations can run from a block on; for the question `causal`."""
    longest: str
    """The longest window that its config names, run; or that more than the others' runs."""


# --- one class ----------------------------------------------------------------------------------


def tiny_config(kind: str) -> Config:
    """The default config of a model type, made small."""
    return _shrunk(CONFIG_MAPPING[kind]())


def _shrunk(config: Config) -> Config:
    """Only what changes is handed over: the class derives the rest anew."""
    config.allow_global_per_layer_attribute_access = True
    shared = {field.name for field in dataclasses.fields(Config)} - {"pad_token_id"}
    fields = {
        field.name: getattr(config, field.name, None)
        for field in dataclasses.fields(config)
        if field.name not in shared - {"bos_token_id", "eos_token_id"}
    }
    given = GIVEN.get(config.model_type, {})
    old = getattr(config, "num_hidden_layers", None) or 0
    new = given.get("num_hidden_layers") or _depth(fields.values(), old)
    heads = getattr(config, "num_attention_heads", None)
    small = {}
    for name, value in fields.items():
        if isinstance(value, Config):
            small[name] = _shrunk(value)
        elif isinstance(value, list | tuple) and old and len(value) == old:
            small[name] = [_size(name, each) for each in value[:new]]
        elif type(value) is int and re.fullmatch(DEPTH, name):
            small[name] = new if hasattr(config, "vocab_size") else 1  # less deep than the text
        elif name == "num_key_value_heads" and value == heads:
            small[name] = 4
        elif (size := _size(name, value)) != value:
            small[name] = size
    return type(config)(**(small | given))


def _depth(values: Any, old: int) -> int:
    """So many of the first blocks that each kind of block is among them."""
    lists = [v for v in values if isinstance(v, list | tuple) and len(v) == old]
    kinds: dict[str, int] = {}
    for block, kind in enumerate(zip(*lists, strict=True)):
        kinds.setdefault(repr(kind), block)
    return max([2, *(block + 1 for block in kinds.values() if block < MOST_BLOCKS)])


def _size(name: str, value: Any) -> Any:
    if type(value) is not int or value <= 0:
        return value
    return next((min(value, n) for which, n in SIZES.items() if re.fullmatch(which, name)), value)


def row(kind: str) -> Row:
    """What works for the class of one model type.

    Raises: whatever transformers does where no small model can be made.
    """
    with tempfile.TemporaryDirectory() as folder:
        _save(kind, folder)
        config = ModelConfig(name=folder, short_name=kind)
        cells = [_said(folder, attempt, config) for attempt in ATTEMPTS]
    return Row(*cells)


def _save(kind: str, folder: str) -> None:
    config = tiny_config(kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = AutoModelForCausalLM.from_config(config)
    if (size := sum(parameter.numel() for parameter in made.parameters())) > MOST_WEIGHTS:
        raise ValueError(f"{size} weights: its config cannot be made small")
    made.save_pretrained(folder)
    if made.config.model_type not in NAMES:  # a text part; checkpoints have the whole
        config.save_pretrained(folder)


def _said(folder: str, attempt: Callable[[LanguageModel], str], config: ModelConfig) -> str:
    try:
        return attempt(load_model(config))
    except UserError as error:
        return str(error).replace(folder, "…")


def _prunes(lm: LanguageModel) -> str:
    for criterion, scope in (("magnitude", "matrix"), ("wanda", "matrix")):
        fresh = _copy(lm)
        pruning = PruningConfig(criterion=criterion, scope=scope, sparsity=0.5)
        for matrix in prune_model(fresh, pruning, calibration=_tokens(4)).report:
            weight = fresh.model.get_submodule(matrix.name).weight
            assert int((weight == 0).sum()) >= matrix.num_zeroed == weight.numel() // 2
    return "yes"


def _block_by_block(lm: LanguageModel) -> str:
    pruning = PruningConfig(criterion="sparsegpt", scope="matrix", sparsity=0.5)
    prune_model(lm, pruning, calibration=_tokens(8))
    return "yes"


def _resid_post(lm: LanguageModel) -> str:
    tokens = _tokens(2)
    found = [run_to_site(lm, tokens, "resid_post", layer) for layer in range(len(lm.blocks))]
    with torch.no_grad():
        own = lm.model(input_ids=tokens, use_cache=False, output_hidden_states=True).hidden_states
    # Above the last block stands the last norm; of Mamba the embedding is not among them.
    same = own is not None and all(
        any(torch.equal(ours, theirs) for theirs in own[layer : layer + 2])
        for layer, ours in enumerate(found[:-1])
    )
    return "yes" if same else "yes, not among output_hidden_states"


def _mlp_out(lm: LanguageModel) -> str:
    return _sublayer(lm, "mlp_out")


def _attn_out(lm: LanguageModel) -> str:
    return _sublayer(lm, "attn_out")


def _sublayer(lm: LanguageModel, site: Any) -> str:
    """With the other one it has to add up to what the block adds, if there is another one."""
    tokens = _tokens(2)
    other: Any = "attn_out" if site == "mlp_out" else "mlp_out"
    for layer in range(len(lm.blocks)):
        own = run_to_site(lm, tokens, site, layer)
        try:
            beside = run_to_site(lm, tokens, other, layer)
        except UserError:
            continue
        if layer:
            before = run_to_site(lm, tokens, "resid_post", layer - 1)
            after = run_to_site(lm, tokens, "resid_post", layer)
            if not torch.allclose(before + own + beside, after, atol=1e-4, rtol=1e-3):
                return "yes, not what is added"
    return "yes"


def _causal(lm: LanguageModel) -> str:
    tokens = _tokens(2)
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 100 + 3
    before, after = logits(lm, tokens)[:, :-1], logits(lm, changed)[:, :-1]
    if not torch.allclose(before, after, atol=1e-5 * float(before.std())):
        return "tokens see what follows"
    UpperBlocks(lm, tokens, site="resid_post", layer=0)
    return "yes"


def _longest(lm: LanguageModel) -> str:
    limit = lm.max_context_tokens
    logits(lm, _tokens(1, limit or 3 * LONGEST))
    return "named" if limit else "any"


def study_of(kind: str) -> str:
    """A study to its tables: of the dense model and a pruned one, or of the dense model alone."""
    wanda = {"criterion": "wanda", "scope": "row", "sparsities": [0.5]}
    for prunings, answer in (([wanda], "yes"), ([], "dense alone")):
        with tempfile.TemporaryDirectory() as folder:
            _save(kind, folder)
            try:
                _run_study(pathlib.Path(folder), prunings)
            except UserError as error:
                answer = str(error).replace(folder, "…")
                if answer.startswith("pruning:"):
                    continue
        return answer
    return answer


def _run_study(folder: pathlib.Path, prunings: list[dict[str, Any]]) -> None:
    text = folder / "text" / "tokens.safetensors"
    text.parent.mkdir(exist_ok=True)
    save_file({"tokens": _tokens(100)}, text)
    data = {
        "models": [{"name": str(folder), "short_name": "tiny", "layers": [0]}],
        "corpus": {
            "source": "tokens",
            "paths": [str(text)],
            "context_tokens": 16,
            "train_tokens": 640,
            "eval_tokens": 320,
            "calibration_tokens": 160,
        },
        "perplexity": {"context_tokens": [16]},
        "prunings": prunings,
        "sae": {"expansion": 2, "k": 4, "steps": 4, "batch_tokens": 64, "seeds": [0, 1]},
        "questions": ["stability", "survival"] if prunings else ["stability"],
    }
    out = folder / "study"
    outcome = run_study(study_from_data(data), out, device="cpu", quiet=True)
    for reason in (run.reason for run in outcome.results if run.status == "failed"):
        raise UserError(reason)


ATTEMPTS = (_prunes, _block_by_block, _resid_post, _mlp_out, _attn_out, _causal, _longest)


def _copy(lm: LanguageModel) -> LanguageModel:
    return load_model(ModelConfig(name=lm.model.name_or_path, short_name=lm.label))


def _tokens(windows: int, context: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, 100, (windows, context), generator=generator)


# --- the page -----------------------------------------------------------------------------------


def main() -> None:
    """Write what stands between the two marks."""
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(before + BEGIN + table() + END + after, encoding="utf-8")


def table() -> str:
    """Every class, what each word stands for, what could not be made."""
    rows, unmade = _rows()
    lines = [
        f"transformers {transformers.__version__}: {len(rows)} classes.\n\n",
        "| class | prunes | block by block | resid_post | mlp_out | attn_out | causal | window"
        " | study |\n",
        "|" + "---|" * 9 + "\n",
        *(f"{line(name, row)} {_word(study)} |\n" for name, (row, study) in rows.items()),
        "\nThe words, and how one of the models is refused:\n\n",
        *(f"- *{word}*: `{told}`\n" for word, told in _told(rows.values()).items()),
        "\nNo small model could be made of:\n\n",
        *(f"- `{name}`: {why}\n" for name, why in unmade.items()),
    ]
    return "".join(lines)


def line(name: str, found: Row) -> str:
    """A class's line of the table, without its last cell: what became of a study."""
    return f"| `{name}` | {' | '.join(_word(cell) for cell in found)} |"


def _word(cell: str) -> str:
    return next((word for says, word in CODES.items() if says in cell), cell)


def _rows() -> tuple[dict[str, tuple[Row, str]], dict[str, str]]:
    """By class: its row, and what became of a study; why there is none."""
    rows: dict[str, tuple[Row, str]] = {}
    unmade: dict[str, str] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(mp_context=spawn, initializer=_quietly) as pool:
        for kind, found in zip(NAMES, pool.map(_tried, NAMES), strict=True):
            if isinstance(found, str):
                unmade[NAMES[kind]] = found
            else:
                rows.setdefault(NAMES[kind], found)
    rows = dict(sorted(rows.items(), key=lambda each: each[0].lower()))
    return rows, {name: why for name, why in unmade.items() if name not in rows}


def _quietly() -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.set_num_threads(1)


def _tried(kind: str) -> tuple[Row, str] | str:
    """A model type's row and study; why no small model could be made of it."""
    try:
        found = row(kind)
    except Exception as error:  # foreign code: whatever stops it is told on the page
        return _in_a_line(error)
    try:
        return found, study_of(kind)
    except Exception as error:
        return found, _in_a_line(error)


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:150].replace("|", "/")


def _told(rows: Any) -> dict[str, str]:
    """The first refusal behind each word."""
    told: dict[str, str] = {}
    for found, study in rows:
        for cell in (*found, study):
            if (word := _word(cell)) != cell:
                told.setdefault(word, cell)
    return dict(sorted(told.items()))


if __name__ == "__main__":
    main()
