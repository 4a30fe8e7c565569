"""What the columns of tables mean, told once, in the text that declares their names and order.

A line is a name, or several, and after a colon the sentence about them; what is indented goes on
with the line above. A name without a sentence has that of SHARED, and `…_low` and `…_high` that of
an interval where the table has the column that it is of.
"""

from __future__ import annotations

import inspect
import re


def meanings_of(declared: str) -> dict[str, str]:
    """Name -> sentence, in their order; "" where nobody says what a column means."""
    told: dict[str, str] = {}
    for entry in re.split(r"\n(?! )", inspect.cleandoc(declared)):
        names, _, sentence = " ".join(entry.split()).partition(": ")
        told |= dict.fromkeys(names.split(), sentence)
    return {name: sentence or _shared(name, told) for name, sentence in told.items()}


def _shared(name: str, table: dict[str, str]) -> str:
    of = re.sub("_(low|high)$", "", name)
    if of != name and of in table:
        return f"Ends of the 95 % interval of `{of}`; empty where it has none."
    return SHARED.get(name, "")


SHARED = meanings_of("""
    run: `<model>/L<layer>/<condition>`; `all` in rows about the whole study.
    model: Name of the model in the study.
    layer: Decoder block at whose site activations are read, from 0.
    method: Criterion of the pruning; `dense` in the dense run.
    scope: Which weights compete: all (`global`), of one `matrix` or one `row`; empty of dense.
    pattern: `unstructured`, or `n:m`: n of every m neighbours in a row go; empty of dense.
    sparsity: Share of weights asked for; of a checkpoint of others the share found; 0 of dense.
    seed: Seed of the SAE's start.
    step: Training steps taken by then.
    steps: Steps that the SAE was trained for.
    fvu: Fraction of variance unexplained, over eval tokens in normalised space; 0 is perfect.
    fvu_raw: `fvu` in raw space.
    fvu_dense_var: Raw error over the *dense* condition's variance.
    l0: Mean number of latents that fire per token.
    mean_init_retention: Mean cosine of each decoder row to the row that it started from.
    arm: Which SAEs A and B are compared.
    init_a init_b: Seed of the start of A and of B.
    order_a order_b: Seed of the data order of A and of B.
    tau: The least cosine of a match; empty where nothing is matched.
    one_way: Share of latents of A whose best match in B reaches tau.
    mnn: Share of latents of A that reach tau with one of B, mutual best matches.
    greedy: Share of latents of A matched one to one, from the most similar pair down to tau.
    one_way_reverse: Share of latents of B whose best match in A reaches tau.
    low high: Ends of the 95 % interval; empty where there is none.
    reason: Why a number or an interval is empty.
    concept: Name of the concept.
    frequency: Share of the labelled eval tokens that have the concept.
    measure: By what a latent's survival is measured.
    source: `pruned`; `null`, noise of equal size in the place of pruned activations; `dense`, the
        control arms of the dense run.
    num_latents: Latents that have a value.
    num_dropped: Of those latents, the ones that noise leaves too little of.
    resampled: What the interval rests on.
    error: Standard error.
    df: Degrees of freedom of the interval.
    num_documents: Documents that the row is measured on.
    mark: What the row has to reach; empty where nothing is asked of it.
    passed: Whether the row reaches its mark; empty without one.
""")
