"""What the paper's predictor is read as: a row per condition and quintile of one seed."""


def quintile_rows(latents):
    """(model, condition, quintile) -> mean firing rate, sparsity, share of them that matched.

    `latents`: dicts with model, condition, sparsity, seed, latent, firing_rate, matched. Of the
    lowest seed; five groups by rising firing rate, ties by latent, sizes that differ by one at
    most, the larger ones where counting by fifths puts them.
    """
    seed = min(row["seed"] for row in latents)
    conditions = {}
    for row in latents:
        if row["seed"] == seed:
            conditions.setdefault((row["model"], row["condition"]), []).append(row)
    found = {}
    for condition, rows in conditions.items():
        rows = sorted(rows, key=lambda row: (row["firing_rate"], row["latent"]))
        for quintile in range(5):
            group = [row for place, row in enumerate(rows) if place * 5 // len(rows) == quintile]
            found[(*condition, quintile)] = {
                name: sum(row[name] for row in group) / len(group)
                for name in ("firing_rate", "sparsity", "matched")
            }
    return found


def row_counts_that_give(percentages, most):
    """The numbers of rows up to `most` of which every percentage is a whole number of rows."""
    return [
        rows
        for rows in range(1, most + 1)
        if all(
            any(round(100 * right / rows, 1) == share for right in range(rows + 1))
            for share in percentages
        )
    ]
