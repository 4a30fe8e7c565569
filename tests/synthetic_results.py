"""Results of a study that was never run: plausible tables for the tests of the report.

Every number is drawn from a seed; none stands for anything.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from prunelens.analyses.claims import CLAIMS
from prunelens.analyses.grades import DECIDES, NULL_MARK, WITH_RATE
from prunelens.analyses.grades import MEASURES as GRADED
from prunelens.config import StudyConfig, study_from_data
from prunelens.study.results import table_columns

NAN = float("nan")
TAUS = (0.5, 0.7, 0.9)
MEASURES = [("shared_init", t) for t in TAUS] + [
    (name, NAN)
    for name in ("persistence", "excess_isotropic", "relative_isotropic", "relative_shuffled")
]
WARM = ("ceiling_warm", "floor_warm")
ARMS = {
    "dense": ("ceiling_shared", "floor_shared", "ceiling_cross", "chance", *WARM),
    "pruned": ("shared_init", "shared_start", "cross_init", "warm_start"),
}
FAR = ("cross_init", "chance", "floor_warm")  # arms that find little
STEPS = (60, 125, 250, 500)


def synthetic_study(
    models: tuple[str, ...] = ("gemma-3-1b",),
    layers: tuple[int, ...] = (6, 12),
    sparsities: tuple[float, ...] = (0.3, 0.5),
) -> StudyConfig:
    """One that the tables of `synthetic_tables` could be the results of."""
    prunings = [
        {"criterion": "magnitude", "scope": "global", "sparsities": list(sparsities)},
        {"criterion": "wanda", "scope": "row", "sparsities": list(sparsities)},
    ]
    named = [{"name": f"x/{name}", "layers": list(layers)} for name in models]
    return study_from_data({"models": named, "prunings": prunings if sparsities else []})


def synthetic_tables(
    study: StudyConfig, *, seed: int = 0, retention: float = 0.95
) -> dict[str, pd.DataFrame]:
    """Every table of the output contract; `retention` decides whether SAEs are trained enough."""
    draw = np.random.default_rng(seed)
    rows: dict[str, list[dict]] = {name: [] for name in table_columns()}
    for model in study.models:
        for layer, pruning in itertools.product(model.layers, (None, *study.conditions())):
            site = {"model": model.label, "layer": layer}
            label = pruning.label if pruning else "dense"
            run = {
                "run": f"{model.label}/L{layer}/{label}",
                **site,
                "method": pruning.criterion if pruning else "dense",
                "scope": pruning.scope if pruning else "",
                "pattern": pruning.pattern if pruning else "",
                "sparsity": pruning.sparsity if pruning else 0.0,
            }
            _add_run(rows, run, draw)
            followed = study.conditions()[:1]
            _add_training(rows, run, retention, pruning is None or pruning in followed)
    _add_study(rows, draw)
    _add_selftest(rows, draw)
    return {
        name: pd.DataFrame(found).reindex(columns=table_columns()[name])
        for name, found in rows.items()
        if found
    }


def synthetic_runs(study: StudyConfig, failed: str | None = None) -> pd.DataFrame:
    """The table of runs; one of them failed."""
    tables = synthetic_tables(study)
    keys = ["run", "model", "layer", "method", "sparsity"]
    runs = tables["sae_quality"][keys].drop_duplicates()
    runs = runs.assign(scope="", pattern="", status="done", reason="", wall_seconds=1.0)
    if failed:
        names = {"run": failed, "model": "m", "layer": 0, "method": "wanda", "sparsity": 0.3}
        extra = {"status": "failed", "reason": f"NaN in {failed}"}
        runs = pd.concat([runs, pd.DataFrame([{**names, **extra}])], ignore_index=True)
    return runs


def _add_concepts(rows: dict[str, list[dict]], run: dict) -> None:
    """Rarer ones are harmed more."""
    for number in range(8):
        concept = {"concept": f"concept {number}", "frequency": 0.5 / 2**number}
        for source, harm in (("pruned", 0.05 * number), ("noise_shuffled", 0.02), ("null", 0.02)):
            left, read = 1 - harm * run["sparsity"], 0.1 * number
            found = concept | {
                "source": source,
                "verdict": "kept",
                "auc_dense": 0.9,
                "sae": "reads",
            }
            for name, value in (("left", left), ("left_refit", left + 0.01), ("sae_reads", read)):
                found |= {name: value, f"{name}_low": value - 0.1, f"{name}_high": value + 0.1}
            beyond = {"beyond_noise": 0.02 - harm, "beyond_noise_low": -1, "beyond_noise_high": 1}
            rows["concepts"].append(run | found | (beyond if source != "noise_shuffled" else {}))
        reading = {
            "reader": "probe",
            "source": "dense",
            "fit": "dense",
            "auc": 0.9 + number / 1000,
        }
        rows["probes"].append(run | concept | reading)
    for source in ("pruned", "null"):
        rows["concept_rarity"].append(
            run | {"source": source, "rho": 0.1, "low": -0.3, "high": 0.5}
        )


def _add_run(rows: dict[str, list[dict]], run: dict, draw: np.random.Generator) -> None:
    damage = run["sparsity"] * (1.0 if run["method"] == "wanda" else 1.6)
    if run["method"] != "dense":
        _add_concepts(rows, run)
    for context in (256, 2048):
        rows["perplexity"].append(
            run | {"corpus": "c", "context_tokens": context, "perplexity": 14 * np.exp(5 * damage)}
        )
    for seed in range(3):
        noise = 0.01 * draw.random()
        rows["sae_quality"].append(
            run
            | {"seed": seed, "fvu": 0.2 + noise, "fvu_raw": 0.2, "fvu_dense_var": 0.2 + damage / 5}
            | {"l0": 16.0, "alive": 1000 + seed, "num_latents": 1024, "steps": 500}
        )
        for tau in TAUS:
            pair = {"seed_a": seed, "seed_b": (seed + 1) % 3, "tau": tau}
            rates = {"one_way": 0.05, "mnn": 0.03 * (1 - tau) + noise, "greedy": 0.04}
            rows["stability"].append(run | pair | rates)
            for arm in ARMS["pruned" if run["method"] != "dense" else "dense"]:
                rate = max(0.0, 1 - damage) * (0.1 if arm in FAR else 1 - noise)
                starts = {"init_a": seed, "order_a": seed, "init_b": seed, "order_b": seed}
                row = run | {"arm": arm, "coordinates": "normalised", "tau": tau, **starts}
                row |= {"one_way": rate, "mnn": rate, "greedy": rate, "one_way_reverse": rate / 2}
                rows["survival"].append(row)
                read = "dense" if run["method"] == "dense" else "pruned"
                rows["activation_matching"].append(row | {"mnn": 0.9 * rate, "source": read})
                if arm in ("shared_init", "cross_init"):
                    rows["activation_matching"].append(row | {"mnn": 0.95 * rate, "source": "null"})
                if tau == TAUS[0]:
                    rows["subspace"].append(row | {"overlap": 0.3 + 0.6 * rate})
    _add_transfer(rows["transfer"], run, damage, draw)
    if run["method"] != "dense":
        _add_pruned(rows, run, damage, draw)


def _add_training(rows: dict[str, list[dict]], run: dict, retention: float, followed: bool) -> None:
    """Plain, control, warm and doubled SAEs; curves of the followed; the verdict."""
    dense = run["method"] == "dense"
    same = {"mean_init_retention": retention, "folder": "f"}
    kinds = [(seed, seed, False, 500, "own") for seed in range(3)]
    kinds += [(0, 1, True, 500, "own"), (0, 1, False, 125, "warm")]
    for init_seed, data_seed, rotated, steps, training in kinds:
        which = {"init_seed": init_seed, "data_seed": data_seed, "rotated": rotated}
        numbers = {"fvu": 0.2, "fvu_raw": 0.25 if training == "own" else 0.27, **same}
        rows["sae_training"].append(run | which | {"steps": steps, "training": training} | numbers)
    for seed, step in itertools.product(range(3), STEPS if followed else STEPS[-1:]):
        far = {"fvu": 0.2 + 10 / step + seed / 100, "mean_init_retention": retention}
        rows["training_curves"].append(
            run | {"seed": seed, "total_steps": STEPS[-1], "step": step} | far
        )
    for step in (500, 1000) if followed else ():
        far = {"fvu": 0.2 + 9 / step, "mean_init_retention": retention}
        rows["training_curves"].append(run | {"seed": 0, "total_steps": 1000, "step": step} | far)
    for step, (a, b), tau in itertools.product(STEPS, ((0, 0), (0, 1)), TAUS):
        if followed and not dense:
            pair = {"arm": "shared_init" if a == b else "cross_init", "init_a": a, "init_b": b}
            rate = 60 / step if a == b else step / 1000
            row = run | {"step": step, "tau": tau, "mnn": rate, "one_way": rate, "greedy": rate}
            rows["survival_by_step"].append(row | pair)
    verdict = False if retention > 0.9 else True if followed else None
    beyond = {"fvu_fall_beyond_schedule": 0.011 if followed else NAN}
    rows["sufficiency"].append(
        run
        | {"trained_enough": verdict, "mean_init_retention": retention, "fvu_fall": 0.05}
        | {"fvu_fall_schedule": 0.04 if followed else NAN, "reason": f"judged: {verdict}", **beyond}
    )


def _add_selftest(rows: dict[str, list[dict]], draw: np.random.Generator) -> None:
    """Three planted worlds; one measure misses its mark, and so does one interval."""
    worlds = {"independent": "synthetic", "by_rate": "by_rate", "none": "none"}
    for world, simulated in worlds.items():
        run = {"run": f"planted/L0/planted-{world}-0.30", "model": "planted", "layer": 0}
        run |= {"method": "planted", "sparsity": 0.3}
        for step in (NAN, *STEPS):
            for measure in GRADED if step != step else ("shared_init",):
                rows["selftest"].append(run | _grade(world, measure, step, draw))
        for source in ("pruned", "null") if world == "none" else ("null",):
            rows["selftest_null"] += [run | row for row in _nothing(source, draw)]
        rows["coverage"] += [{"run": run["run"]} | row for row in _covered(simulated)]


def _grade(world: str, measure: str, step: float, draw: np.random.Generator) -> dict:
    rho, missed = draw.uniform(-0.3, 0.3), measure == "scaling"
    grade = {"measure": measure, "step": step, "false_survival": 1 / (1 + step)}
    if step != step:
        grade |= {"precision": 0.9, "recall": 0.8, "auc": 0.9 + 0.1 * draw.random()}
        grade |= {"rate_rho": rho, "rate_low": rho - 0.1, "rate_high": rho + 0.1}
        grade |= {"share_defined": 0.97, "follows_rate": True}
        grade |= {"truth_rho": 0.01, "false_survival": 0.02, "mark": "AUC >= 0.95"}
        grade |= {"passed": not missed, "reason": "misses: AUC >= 0.95" * missed}
        if world == "none":  # nothing is destroyed
            grade |= {"auc": NAN, "false_survival": NAN}
    return grade


def _nothing(source: str, draw: np.random.Generator) -> list[dict]:
    """What is found where nothing is."""
    found = []
    for measure, statistics in {**DECIDES, "persistence": (WITH_RATE,)}.items():
        for statistic in statistics:
            nothing = float(statistic == "all")
            value = nothing + draw.uniform(-0.02, 0.02)
            row = {"measure": measure, "source": source, "statistic": statistic, "value": value}
            row |= {"low": value - 0.03, "high": value + 0.03, "nothing": nothing}
            row |= {"says_nothing": True}
            if measure in DECIDES:
                row |= {"mark": NULL_MARK, "passed": True, "reason": ""}
            found.append(row)
    return found


def _covered(world: str) -> list[dict]:
    """Of two intervals one holds the truth too seldom; a verdict."""
    sets = {"world": world, "num_sets": 100, "num_undefined": 0}
    interval = {**sets, "kind": "interval", "truth": 0.0, "mark": "holds the truth in 92% to 98%"}
    missed = {"measured": 0.8, "low": 0.68, "high": 0.89, "passed": False}
    missed |= {"reason": f"misses: {interval['mark']}"}
    verdict = {"kind": "verdict", "name": "claim 1 holds", "measured": 0.02, "low": 0.0}
    verdict |= {"high": 0.09, "mark": "wrong in at most 5%", "passed": True, "reason": ""}
    right = {"measured": 0.95, "low": 0.87, "high": 0.99, "passed": True, "reason": ""}
    return [
        interval | right | {"name": f"{world}, Q1"},
        interval | missed | {"name": f"{world}, Q1 - Q5"},
        sets | verdict,
    ]


def _add_transfer(rows: list[dict], run: dict, damage: float, draw: np.random.Generator) -> None:
    dense = run["method"] == "dense"
    for sae, (positions, source), refit in itertools.product(
        ("seed 0", "seed 1", "scope/layer_12"),
        (("all", "pruned"), ("norm_filtered", "pruned"), ("norm_filtered", "null")),
        ("none", "b_dec"),
    ):
        error = 0.2 + damage / 4 + 0.01 * draw.random()
        verdict = "keep" if damage < 0.4 else "undecided" if damage < 0.5 else "retrain"
        ratios = {"fvu_dense_var_ratio": error / 0.2, "fvu_raw_ratio": error / 0.2}
        row = run | {"sae": sae, "positions": positions, "source": source, "refit": refit}
        row |= {"fvu": error, "fvu_raw": error, "fvu_dense_var": error, "l0": 80.0}
        row |= {"ce_recovered": 1 - error, "verdict": "" if dense else verdict}
        row |= {"num_windows": 32, "num_documents": 20}
        for name, value in (ratios | {"ce_drop": damage / 4}).items():
            half = NAN if dense else 0.02
            row |= {name: value, f"{name}_low": value - half, f"{name}_high": value + half}
        if source == "pruned" or not dense:
            rows.append(row)


def _add_pruned(
    rows: dict[str, list[dict]], run: dict, damage: float, draw: np.random.Generator
) -> None:
    for arm, tau in itertools.product(("shared", "cross", "warm"), TAUS):
        known = arm != "cross"
        value = 1 - damage if known else NAN
        rows["survival_corrected"].append(
            run
            | {"arm": arm, "tau": tau, "corrected": value, "low": value, "high": value}
            | {"interval": "range", "reason": "" if known else "ceiling - floor is below 0.02"}
        )
    for seed, source in itertools.product(
        range(3), ("pruned", "null", "noise_isotropic", "noise_shuffled")
    ):
        numbers = {"mean_correlation": 1 - damage / 2}
        numbers["relative_shuffled"] = {"pruned": 1 - damage / 4, "null": 1.0}.get(source, NAN)
        rows["persistence"].append(run | {"seed": seed, "source": source, **numbers})
    lost = {"dense": 0, "pruned": damage, "null": 0.1, "noise_isotropic": 0, "unpaired": 1}
    for seed, (source, left) in itertools.product(range(3), lost.items()):
        numbers = {"mean_scaling": 1 - left, "median_scaling": 0.9 * (1 - left)}
        numbers |= {"share_above_half_median": 1 - left / 4, "num_undefined": seed}
        rows["scaling"].append(run | {"seed": seed, "source": source, **numbers})
    for measure, tau in MEASURES:
        for quintile in range(1, 6):
            which = {"measure": measure, "tau": tau, "quintile": quintile}
            which |= {"firing_rate": 0.01 * quintile, "source": "pruned"}
            rates = [1 - damage - 0.05 * quintile + 0.01 * draw.random() for _ in range(3)]
            rows["fragility_by_seed"] += [
                run | which | {"seed": seed, "survival_rate": rate, "num_latents": 67}
                for seed, rate in enumerate(rates)
            ]
            mean = {"survival_rate": sum(rates) / 3, "num_latents": 201}
            rows["fragility"].append(run | which | mean)
            if tau != tau:
                nothing = {"source": "null", "survival_rate": 1.0, "num_latents": 201}
                rows["fragility"].append(run | which | nothing)
        rho = draw.uniform(-0.8, 0.2)
        rows["fragility_tests"].append(
            run
            | {
                "measure": measure,
                "source": "pruned",
                "tau": tau,
                "rho": -1.0,
                "p_exact": 2 / 120,
                "p_holm": 0.067,
            }
            | {"latent_rho": rho, "ci_low": rho - 0.1, "ci_high": rho + 0.1, "partial_rho": NAN}
            | {"num_latents": 1000, "resampled": "seeds, latents", "reason": "constant"}
            | (
                {
                    "partial_rho": rho / 2,
                    "partial_low": rho / 2 - 0.1,
                    "partial_high": rho / 2 + 0.1,
                }
            )
        )
    for group, source in itertools.product(("Q1", "Q5", "all", "Q1 - Q5"), ("pruned", "null")):
        value = 0.0 if " - " in group else 1.0 if source == "null" else 1 - damage / 4
        rows["fragility_contrasts"].append(
            run
            | {"measure": "relative_shuffled", "source": source, "group": group, "value": value}
            | {"low": value - 0.02, "high": value + 0.02, "error": 0.01, "df": 19.0}
            | {"num_latents": 201, "num_dropped": 3, "resampled": "documents and latents"}
        )
    for kind, rest in (("scalar", 0.5), ("diagonal", 0.45), ("low_rank", 0.3)):
        rows["common_change"].append(
            run
            | {"kind": kind, "gain": 1 + damage, "difference": damage, "share_shift": 0.1}
            | {"share_map": 0.9 - rest, "share_remainder": rest}
        )
    _add_causal(rows["causal"], run, draw)


def _add_causal(rows: list[dict], run: dict, draw: np.random.Generator) -> None:
    groups = ("robust", "fragile", "matched", "random", "random_direction", "robust_minus_fragile")
    views = (("paper", "final"), ("isolated", "firing"), ("error_preserving", "firing"))
    for where, grouping, group, (protocol, contexts) in itertools.product(
        ("dense", "pruned", "pruned_minus_dense"), ("cosine", "persistence"), groups, views
    ):
        kl = (0.32 if protocol == "paper" else 0.01) * draw.uniform(0.9, 1.1)
        rows.append(
            run
            | {"ablated_in": where, "grouping": grouping, "group": group, "protocol": protocol}
            | {"contexts": contexts, "kl_mean": kl, "ci_low": 0.9 * kl, "ci_high": 1.1 * kl}
            | {"reconstruction_share": 0.97 if protocol == "paper" else NAN, "num_latents": 300}
            | {"error": 0.05 * kl, "df": 40.0, "least": 0.98 * kl, "most": 1.02 * kl, "skew": 0.1}
            | {"num_seeds": 3, "num_documents": 64, "largest_share": draw.uniform(0.02, 0.5)}
            | {"resampled": "documents and latents of every seed"}
        )


def _add_study(rows: dict[str, list[dict]], draw: np.random.Generator) -> None:
    targets = (("shared_init", 0.7), ("quintile", 0.7), ("persistence", NAN), ("beyond_noise", NAN))
    for target, tau in targets:
        for evaluation, features in itertools.product(
            ("in_sample", "held_out_condition", "held_out_model"),
            ("rate_sparsity", "init_retention"),
        ):
            which = {"target": target, "tau": tau, "evaluation": evaluation, "features": features}
            which["source"] = "pruned"
            known = evaluation != "held_out_model"
            auc = draw.uniform(0.6, 0.9) if known else NAN
            rows["predictor"].append(
                {"run": "all", **which, "auc": auc, "accuracy": auc, "num_rows": 4000}
                | {"reason": "" if known else "one model only"}
            )
            rows["predictor_calibration"] += [
                {"run": "all", **which, "bin": b, "predicted": b / 10, "observed": b / 11}
                for b in range(10)
            ]
    verdicts = itertools.cycle(("holds", "fails", "undecided"))
    for number, claim in CLAIMS.items():
        rows["claims"].append(
            {"run": "all", "claim": number, "statement": claim.statement}
            | {"paper_protocol": next(verdicts), "controlled": next(verdicts)}
            | {"paper_rule": claim.paper_rule, "controlled_rule": claim.controlled_rule}
            | {"why": f"paper: number {number} = 1; controlled: number {number} = 2"}
            | {"paper_contrasts": "a = 1; b = 2", "controlled_contrasts": "c = 3"}
        )
        rows["claims"][-1]["verdict"] = rows["claims"][-1]["controlled"]
