"""The model card of a pruned checkpoint, and a recipe in words."""

from __future__ import annotations

from collections.abc import Sequence

from prunelens import cards
from prunelens.cards import Sharing, escaped
from prunelens.prune.masks import MASKS_FILE
from prunelens.prune.record import (
    ModelRecord,
    PerplexityRecord,
    PruningRecord,
    TextRecord,
    hub_dataset,
)
from prunelens.text import reader_of


def checkpoint_card(record: PruningRecord, sharing: Sharing) -> str:
    """The README.md of a pruned checkpoint on the hub."""
    model, pruning = record.model, record.pruning
    address = sharing.address
    body = [
        f"# {escaped(sharing.base_model or model.title)}, pruned: {pruning.label}",
        f"{model_in_words(model, sharing)}, of which {pruning.criterion} pruning has set"
        f" {record.achieved_sparsity:.2%} of the weights of {_prunable(record)}"
        f" to zero{_others(record)}. Zeroed weights are stored as zeros: the files are as"
        " large as the dense model's, and no special code is needed.",
        "## How to load",
        cards.code(
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            f'model = AutoModelForCausalLM.from_pretrained("{address}", dtype="{model.dtype}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{address}")',
        ),
        "## The recipe",
        cards.pairs(recipe_rows(record)),
        "## Sparsity by kind of matrix",
        kinds_table(record),
        "## Perplexity",
        perplexity_table(record.perplexity),
        "## The masks",
        f"`{MASKS_FILE}` holds one bit per weight, 1 where it stayed;"
        f" `prunelens.prune.load_masks` reads it{_use_of_masks(record)}."
        f" `{cards.RECORD_FILE}` holds the numbers of this card in full precision, with every"
        " matrix.",
        closing(sharing),
    ]
    return cards.card(
        body,
        sharing=sharing,
        library="transformers",
        tags=["pruning", "sparsity", pruning.criterion],
        base_models=base_models([model], sharing),
        datasets=data_sets(record.calibration),
        pipeline="text-generation",
    )


def recipe_rows(record: PruningRecord) -> dict[str, str]:
    """How the model was pruned."""
    pruning = record.pruning
    scope = {
        "global": "all prunable weights",
        "matrix": "the weights of one matrix",
        "row": "the weights of one output row",
    }[pruning.scope]
    return {
        "criterion": pruning.criterion,
        "prunable weights": _prunable(record),
        "weights that compete (scope)": f"{scope} ({pruning.scope})",
        "pattern": pruning.pattern,
        "sparsity asked for": f"{pruning.sparsity:g}",
        "sparsity achieved": f"{record.achieved_sparsity:.6f}",
        "calibration": _calibration(record),
        "masks, SHA-256": record.masks_sha256,
    }


def kinds_table(record: PruningRecord) -> str:
    """Achieved sparsity by kind of matrix."""
    rows = [[escaped(kind), f"{achieved:.4f}"] for kind, achieved in record.by_kind().items()]
    return cards.grid(["matrices", "sparsity achieved"], rows)


def perplexity_table(rows: tuple[PerplexityRecord, ...]) -> str:
    """Before and after, or that nobody measured it."""
    if not rows:
        return "Not measured: `prunelens run` measures it, `prunelens prune` does not."
    columns = ["text", "tokens per window", "dense", "pruned"]
    cells = [
        [escaped(row.text), str(row.context_tokens), f"{row.dense:.4f}", f"{row.pruned:.4f}"]
        for row in rows
    ]
    return cards.grid(columns, cells)


def model_in_words(model: ModelRecord, sharing: Sharing) -> str:
    """A model and what its content was."""
    if model.origin == "hub":
        return f"{escaped(model.name)} (commit {model.content})"
    if model.origin == "shipped":
        return f"The small model that ships with prunelens (files' SHA-256 {model.content})"
    stated = f" (of {escaped(sharing.base_model)}, as its exporter says)"
    return (
        f"The local checkpoint {escaped(model.name)}{stated if sharing.base_model else ''}, files'"
        f" SHA-256 {model.content}"
    )


def base_models(models: Sequence[ModelRecord], sharing: Sharing) -> list[str]:
    """Hub ids for the front matter: the stated one, else the models' own."""
    if sharing.base_model_id:
        return [sharing.base_model_id]
    return list(dict.fromkeys(model.name for model in models if model.origin == "hub"))


def text_in_words(text: TextRecord) -> str:
    """A text and what its content was; paths of a machine are not told."""
    corpus = text.corpus
    if dataset := hub_dataset(corpus):
        subset = f", subset {escaped(corpus.subset)}" if corpus.subset else ""
        split = f", split {escaped(corpus.split)}"
        return f"data set {escaped(dataset)}{subset}{split}, revision {text.content}"
    return f"{reader_of(corpus).means} (fingerprint {text.content})"


def data_sets(*texts: TextRecord | None) -> list[str]:
    """The hub's data sets among some texts, each once."""
    found = [hub_dataset(text.corpus) for text in texts if text]
    return [name for name in dict.fromkeys(found) if name]


def closing(sharing: Sharing) -> str:
    """License, and who made the files."""
    return f"{cards.license_line(sharing)} Made by prunelens {cards.version()}."


def _prunable(record: PruningRecord) -> str:
    blocks = "the linear layers in its decoder blocks"
    if not record.pruning.lm_head:
        return blocks
    return f"{blocks} and of its output head (and so of a token embedding that is tied to it)"


def _others(record: PruningRecord) -> str:
    updated = record.pruning.entry.updates_weights
    return ", and changed the others to make up for it" if updated else ""


def _use_of_masks(record: PruningRecord) -> str:
    if record.pruning.entry.updates_weights:
        return "; the weights that stayed are not the dense model's"
    return " and `prunelens.apply_masks` zeroes the dense model's weights by it"


def _calibration(record: PruningRecord) -> str:
    if record.calibration is None:
        seed = record.pruning.random_seed
        if seed is not None:
            return f"none: by lot, seed {seed}"
        return "none: the criterion looks at weights alone"
    corpus = record.calibration.corpus
    what = "products" if record.pruning.entry.updates_weights else "norms"
    how = {
        "dense": f"{what} of the dense model's inputs",
        "sequential": f"{what} of inputs, block by block, of the already pruned model",
    }[record.pruning.calibration]
    return (
        f"{corpus.calibration_tokens} tokens in windows of {corpus.context_tokens} from"
        f" {text_in_words(record.calibration)}; {how}"
    )
