"""What `plan` promises: counts of work, disk and memory, checked on the code that does the work."""

import importlib
import json
import pathlib
import shutil

import huggingface_hub
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from conftest import ARCHITECTURES, tiny_language_model
from prunelens import checkpoint
from prunelens.analyses import persistence as persistence_module
from prunelens.analyses.noise import CommonChange
from prunelens.analyses.survival import Dictionary, control_arms, pruned_arms
from prunelens.checkpoint import model_shape
from prunelens.cli.app import app
from prunelens.cli.plan_view import show_preflight
from prunelens.config import ModelConfig, SaeConfig, study_from_data
from prunelens.errors import UserError
from prunelens.model import logits, run_to_site
from prunelens.prune.masks import save_masks
from prunelens.sae import kernels
from prunelens.sae.state import Training
from prunelens.sae.topk import TopKSAE
from prunelens.study.cost import Costed, forward_flops, training_flops
from prunelens.study.footprint import disk_use, memory_use
from prunelens.study.kind import WORK_KINDS
from prunelens.study.plan import plan_study
from prunelens.study.preflight import calibrate as calibrate_module
from prunelens.study.preflight import preview as preview_module
from prunelens.study.preflight.calibrate import Rate, calibrate
from prunelens.study.preflight.preview import preflight
from prunelens.study.stages import STAGES
from prunelens.study_file import read_study

CONTEXT = 16


@pytest.fixture
def data(checkpoint_folder, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"the quick brown fox number {n}" for n in range(800)))
    return {
        "models": [{"name": str(checkpoint_folder), "short_name": "tiny", "layers": [1]}],
        "corpus": {
            "source": "files",
            "paths": [str(text)],
            "document": "line",
            "context_tokens": CONTEXT,
            "train_tokens": 3200,
            "eval_tokens": 1600,
            "calibration_tokens": 800,
        },
        "perplexity": {"context_tokens": [16, 64, 2048]},
        "prunings": [
            {"criterion": "magnitude", "scope": "global", "sparsities": [0.5]},
            {"criterion": "wanda", "scope": "row", "sparsities": [0.3, 0.5], "seeds": [0, 1]},
        ],
        "sae": {"expansion": 4, "k": 4, "steps": 24, "batch_tokens": 64, "seeds": [0, 1, 2]},
        "questions": ["stability", "survival", "persistence"],
        "threads_per_stage": 1,
    }


@pytest.fixture
def study(data):
    return study_from_data(data)


def shape_of(study):
    return model_shape(study.models[0])


def all_stages(plan):
    found = {}

    def walk(stage):
        if stage.identity not in found:
            found[stage.identity] = stage
            for parent in stage.parents.values():
                walk(parent)

    for stage in plan.targets().values():
        walk(stage)
    return list(found.values())


def counted(study, name):
    stages = [stage for stage in all_stages(plan_study(study)) if stage.name == name]
    shape = shape_of(study)
    return [cost(stage, shape, study) for stage in stages]


def cost(stage, shape, study):
    return STAGES[stage.name].cost(Costed(stage.config, stage.parents, shape, study))


# --- operations ---------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_forward_pass_has_the_operations_that_torch_counts(architecture, monkeypatch):
    lm = tiny_language_model(architecture)
    lm.model.set_attn_implementation("eager")
    monkeypatch.setattr(checkpoint, "text_config", lambda _config: lm.model.config)
    shape = model_shape(ModelConfig())
    assert shape.parameters == sum(p.numel() for p in lm.model.parameters())
    tokens = torch.zeros(2, CONTEXT, dtype=torch.long)
    for blocks, head in ((2, False), (3, True)):
        with FlopCounterMode(display=False) as counter:
            logits(lm, tokens) if head else run_to_site(lm, tokens, "resid_post", blocks - 1)
        expected = forward_flops(
            shape, tokens.numel(), context_tokens=CONTEXT, blocks=blocks, head=head
        )
        # Rotary angles are a matrix product too, small even beside these tiny blocks.
        assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_training_has_the_operations_of_its_products():
    """With k = all latents the sparse count must be that of the dense reference."""
    tokens, d_model, num_latents = 8, 6, 24
    sae = TopKSAE.initialise(d_model, num_latents, num_latents, init_seed=0)
    x = torch.randn(tokens, d_model, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        latents = kernels.top_k(kernels.pre_activations(x, *sae.weights[:2]), num_latents)
        kernels.reference_gradients(x, sae.weights, latents)
    expected = training_flops(d_model, num_latents, num_latents, tokens)
    assert counter.get_total_flops() == expected


def test_survival_counts_the_comparisons_that_are_made(study):
    def dictionaries(pairs):
        row = torch.ones(1, 1)
        return [Dictionary(row, row[0], *pair) for pair in pairs]

    latents = 4 * shape_of(study).d_model
    each = 2 * latents**2 * shape_of(study).d_model * 2  # two coordinates
    same3, same2 = dictionaries([(0, 0), (1, 1), (2, 2)]), dictionaries([(0, 0), (1, 1)])
    control = dictionaries([(0, 1)])
    expected = [
        len(control_arms(same3, control, control, same3)),
        len(pruned_arms(same3, same3, control)),
        len(pruned_arms(same2, same2, control)),
        len(pruned_arms(same2, same2, control)),
    ]
    assert [work.flops / each for work in counted(study, "survival")] == expected
    pairs = [work.flops / (each / 2) for work in counted(study, "stability")]
    assert pairs == [3, 3, 1, 1]


def test_persistence_counts_the_tokens_that_are_encoded(study, monkeypatch):
    encoded = 0
    real = TopKSAE.encode

    def counting(sae, x, **options):
        nonlocal encoded
        encoded += len(x)
        return real(sae, x, **options)

    class Rows:
        def rows(self, index):
            return torch.randn(len(index), 4, generator=torch.Generator().manual_seed(1))

    monkeypatch.setattr(TopKSAE, "encode", counting)
    sae = TopKSAE.initialise(4, 8, 2, init_seed=0)
    change = CommonChange(*torch.zeros(2, 4, dtype=torch.float64), torch.tensor(0))
    change = change._replace(matrix=torch.ones(4, dtype=torch.float64))
    persistence_module.persistence(
        sae, Rows(), Rows(), torch.arange(50), change=change, groups=torch.arange(50) // 10, seed=0
    )
    d_model = shape_of(study).d_model
    per_token = 2 * d_model * (4 * d_model + 4)
    half = study.corpus.eval_tokens // 2
    works = counted(study, "persistence")
    assert [w.flops / per_token / half for w in works] == [
        3 * encoded / 50,
        *[2 * encoded / 50] * 2,
    ]


def test_tokens_of_a_stage(study):
    assert {w.forward_tokens for w in counted(study, "activations")} == {4800}
    assert [w.forward_tokens for w in counted(study, "calibration")] == [800]
    # Windows of 64 and 2,048 are the same: the model takes 64.
    assert {w.forward_tokens for w in counted(study, "perplexity")} == {2 * 1600}
    assert {w.sae_tokens for w in counted(study, "sae")} == {24 * 64}


# --- totals -------------------------------------------------------------------------------------


def test_shared_stages_count_once(study):
    found = preflight(study, calibration_seconds=0)
    stages = all_stages(plan_study(study))
    works = [cost(stage, shape_of(study), study) for stage in stages]
    for field in ("flops", "forward_tokens", "sae_tokens"):
        expected = sum(getattr(work, field) for work in works)
        assert found.totals[field] == pytest.approx(expected)
        assert sum(row[field] for row in found.runs) == pytest.approx(expected)
    assert found.totals["stages"] == sum(found.stages.values()) == len(stages)
    assert sum(row["stages"] - row["shared"] for row in found.runs) == len(stages)
    assert (found.totals["saes"], found.totals["control_saes"]) == (3 + 3 + 2 + 2, 2 + 1 + 1 + 1)
    assert found.stages["sae"] == 15
    assert found.hours is None
    assert any("not calibrated" in note for note in found.notes)


def test_one_more_condition_adds_only_its_own_row(data):
    before = preflight(study_from_data(data), calibration_seconds=0)
    data["prunings"][1]["sparsities"].append(0.7)
    after = preflight(study_from_data(data), calibration_seconds=0)
    assert after.runs[:-1] == before.runs
    assert after.runs[-1]["run"] == "tiny/L1/wanda-row-0.70"
    grown = after.totals["sae_tokens"] - before.totals["sae_tokens"]
    assert grown == after.runs[-1]["sae_tokens"] == 3 * 24 * 64


def test_hours_are_work_over_rate(study, monkeypatch, capsys):
    speeds = {kind: 1e6 * (1 + n) for n, kind in enumerate(WORK_KINDS)}
    rates = {kind: Rate(speed, 0.5) for kind, speed in speeds.items()}
    monkeypatch.setattr(preview_module, "calibrate", lambda *_args, **_options: rates)
    found = preflight(study, settings={"sae.steps": "24"}, device="cpu")
    for kind, speed in speeds.items():
        names = [name for name, stage_kind in STAGES.items() if stage_kind.work_kind == kind]
        flops = sum(work.flops for name in names for work in counted(study, name))
        assert found.hours[kind] == pytest.approx(flops / speed / 3600)
    assert found.hours["total"] == pytest.approx(sum(row["hours"] for row in found.runs))
    assert found.hours["total"] == pytest.approx(sum(found.hours[kind] for kind in speeds))
    assert found.settings == {"sae.steps": "24"}
    assert sum("50% of a batch" in note for note in found.notes) == len(speeds)
    show_preflight("tiny", found)
    shown = capsys.readouterr().out
    for words in ("tiny/L1/wanda-row-0.30", "total", "sae.steps=24", "time: ", "disk:", "memory:"):
        assert words in shown


def test_an_absent_device_is_the_users_mistake(study):
    with pytest.raises(UserError, match=r"device: 'cuda:99'"):
        preflight(study, device="cuda:99", calibration_seconds=0)


# --- schedule, checks and exit codes ------------------------------------------------------------

RATES = {kind: 1e6 * (1 + n) for n, kind in enumerate(WORK_KINDS)}


@pytest.fixture
def rates_file(tmp_path):
    path = tmp_path / "rates.yaml"
    path.write_text("".join(f"{kind}: {rate}\n" for kind, rate in RATES.items()))
    return path


def run_plan(data, tmp_path, *arguments):
    path = tmp_path / "study.yaml"
    path.write_text(json.dumps(data))
    out = ["--out", str(tmp_path / "out")]
    return CliRunner().invoke(app, ["plan", str(path), *out, *map(str, arguments)])


def test_plan_simulates_the_schedule_at_given_rates(data, tmp_path, rates_file):
    given = ["--no-calibration", "--rates", rates_file, "--workers", "1,2,1000"]
    result = run_plan(data, tmp_path, *given, "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    assert [row["workers"] for row in plan["schedule"]] == [1, 2, 1000]
    alone, two, many = plan["schedule"]
    assert alone["makespan_hours"] == pytest.approx(plan["hours"]["total"])
    assert alone["idle_share"] == pytest.approx(0, abs=1e-9)
    assert alone["total_hours"] / 2 <= two["makespan_hours"] < alone["makespan_hours"]
    assert many["makespan_hours"] == pytest.approx(many["critical_path_hours"])
    assert plan["device"]["calibration_seconds"] == 0
    assert any("at the given rates" in note for note in plan["notes"])
    result = run_plan(data, tmp_path, *given)
    assert "critical path: " in result.output
    assert "warning (SAE sizes): sae.steps" in result.output
    assert not (tmp_path / "out").exists()
    taken_along = tmp_path / "plan.json"
    taken_along.write_text(json.dumps(plan))
    again = run_plan(data, tmp_path, *given[:1], "--rates", taken_along, *given[3:], "--json")
    assert json.loads(again.output)["schedule"] == plan["schedule"]


def test_an_error_in_a_check_ends_with_exit_code_2(data, checkpoint_folder, tmp_path):
    copy = shutil.copytree(checkpoint_folder, tmp_path / "copy")
    data["models"].append({"name": str(copy), "layers": [1]})
    result = run_plan(data, tmp_path, "--no-calibration")
    assert result.exit_code == 2
    assert "error (duplicates): models: copy/L1/dense" in result.output
    listed = json.loads(run_plan(data, tmp_path, "--no-calibration", "--json").output)["checks"]
    assert {"level", "check", "what", "fix"} == set(listed[0])


def test_a_plan_that_may_load_models_sees_a_random_one(study, monkeypatch):
    rates = {kind: Rate(1e9, 1.0) for kind in RATES}
    monkeypatch.setattr(preview_module, "calibrate", lambda *_args, **_options: rates)
    (check,) = [c for c in preflight(study, device="cpu").checks if c["check"] == "perplexity"]
    assert check["level"] == "error"


@pytest.mark.parametrize("workers", ["0", "1,,2", "x", "-1", "1.5"])
def test_wrong_numbers_of_workers(workers, data, tmp_path, rates_file):
    result = run_plan(data, tmp_path, "--rates", rates_file, "--workers", workers)
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith("--workers:")


def test_a_schedule_needs_hours(data, tmp_path):
    result = run_plan(data, tmp_path, "--no-calibration", "--workers", "2")
    assert str(result.exception).startswith("--workers: hours are needed")


def test_the_page_on_scaling_has_what_its_tool_writes(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "tools"))
    tool = importlib.import_module("write_scaling")
    text = tool.PAGE.read_text(encoding="utf-8")
    assert tool.page(text) == text
    assert sum(len(plan_study(read_study(s), resolve=False).runs) for s in tool.STUDIES) == 24


# --- disk and memory ----------------------------------------------------------------------------


def size(path: pathlib.Path) -> int:
    return path.stat().st_size


def test_disk_is_what_the_files_take(data, tmp_path):
    """Sizes where the tensors outweigh the headers: an SAE of 16 x 512."""
    data["sae"]["expansion"] = 32
    study = study_from_data(data)
    shape = shape_of(study)
    stages = all_stages(plan_study(study))
    disk = disk_use(study, {"tiny": shape}, stages)
    sae = TopKSAE.initialise(16, 512, 4, init_seed=0)
    sae.save(tmp_path / "sae")
    saes = sum(stage.name == "sae" for stage in stages)
    assert disk.saes == pytest.approx(saes * size(tmp_path / "sae" / "sae.safetensors"), rel=0.02)
    training = _training(shape.d_model, 32)
    training.save(tmp_path / "checkpoint.safetensors")
    one = size(tmp_path / "checkpoint.safetensors")
    assert disk.checkpoint == pytest.approx(2 * one, rel=0.04)  # (1, 1) and (0, 1) share an order
    lm = tiny_language_model("llama", vocabulary=200)
    weights = {n: p for n, p in lm.blocks.named_parameters() if p.dim() == 2}
    assert disk.masks == 3 * sum(w.numel() for w in weights.values()) / 8
    save_masks({"m": torch.ones(512, 512, dtype=torch.bool)}, tmp_path / "masks.safetensors")
    assert size(tmp_path / "masks.safetensors") == pytest.approx(512 * 512 / 8, rel=0.01)
    assert disk.store == 4800 // CONTEXT * (CONTEXT - 1) * 16 * 4
    assert disk.stores == 2 * disk.store  # the dense one, and that of the pruned run in work
    assert disk.kept == disk.saes + disk.masks + disk.contexts
    assert disk.downloads == 0
    kept = study.model_copy(update={"keep_activations": True})
    assert disk_use(kept, {"tiny": shape}, stages).stores == 4 * disk.store


def _training(d_model, expansion):
    class Rows:
        num_tokens, sigma = 64, torch.ones(d_model)

        def __init__(self):
            self.d_model = d_model

        def rows(self, index):
            return torch.randn(len(index), d_model, generator=torch.Generator().manual_seed(0))

        def batches(self, _batch_tokens):
            yield self.rows(torch.arange(64))

    config = SaeConfig(expansion=expansion, k=4, steps=4, batch_tokens=64)
    return Training(Rows(), config, init_seed=0, data_seed=0)


def test_memory_holds_what_a_training_holds(study):
    shape = shape_of(study)
    training = _training(shape.d_model, 4)
    tensors = [t for t in training.tensors().values() if t.is_floating_point()]
    gradients = list(training.sae.weights)
    held = sum(t.numel() * 4 for t in (*tensors, *gradients))
    batch = 64 * 4 * shape.d_model * 4
    memory = memory_use(study, {"tiny": shape}, "cpu")
    assert memory.sae_training == pytest.approx(held + 2 * batch, rel=0.01)
    assert memory.model == shape.parameters * 4
    assert memory.host > memory.device >= max(memory.forward, memory.perplexity)
    half = study.model_copy(
        update={"models": (study.models[0].model_copy(update={"dtype": "bfloat16"}),)}
    )
    assert memory_use(half, {"tiny": shape}, "cuda").model == shape.parameters * 2


# --- calibration --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gemma4_text", "roberta"])
def test_one_block_is_made_of_configs_that_list_their_blocks_or_need_a_padding(tmp_path, kind):
    fields = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    fields |= {"num_key_value_heads": 1, "head_dim": 8} if kind == "gemma4_text" else {}
    transformers.AutoConfig.for_model(kind, **fields).save_pretrained(tmp_path)
    model = ModelConfig(name=str(tmp_path))
    assert model_shape(model).attention_width > 0
    lm = calibrate_module._one_block(model, "cpu")
    assert len(lm.blocks) == 1
    assert run_to_site(lm, torch.zeros(1, 5, dtype=torch.long), "resid_post", 0).isfinite().all()


def test_what_has_no_model_of_one_block_can_be_planned_without_times(tmp_path):
    transformers.RwkvConfig(hidden_size=16).save_pretrained(tmp_path)  # divides by its depth - 1
    with pytest.raises(UserError, match=r"of one block .* plan with --no-calibration or --rates"):
        calibrate_module._one_block(ModelConfig(name=str(tmp_path)), "cpu")


def test_calibration_times_every_kind_and_leaves_threads_and_randomness_alone(study):
    threads, state = torch.get_num_threads(), torch.random.get_rng_state()
    rates = calibrate(study, study.models[0], device="cpu", seconds=0.5)
    assert list(rates) == list(WORK_KINDS)
    for rate in rates.values():
        assert 1e4 < rate.flops_per_second < 1e15
        assert 0 < rate.share_of_batch <= 1
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.random.get_rng_state(), state)


class Clock:
    """Time passes only where work is done: one second per unit."""

    def __init__(self, monkeypatch):
        self.now, self.sizes = 0.0, []
        monkeypatch.setattr(calibrate_module.time, "perf_counter", lambda: self.now)

    def work(self, units):
        self.sizes.append(units)
        self.now += units


def test_what_does_not_grow_with_the_batch_is_not_multiplied(monkeypatch):
    """Three seconds for a step, and one for each token: 4 and 7 are timed, 103 is told."""
    times = {1: 4.0, 4: 7.0}
    assert calibrate_module._seconds_at(100, times) == 103.0
    assert calibrate_module._seconds_at(4, times) == 7.0
    assert calibrate_module._seconds_at(8, {4: 7.0}) == 14.0


def test_more_threads_than_cores_are_told(study):
    many = study.model_copy(update={"threads_per_stage": 10_000})
    notes = preflight(many, calibration_seconds=0).notes
    assert any("threads_per_stage: 10000 is more than" in note for note in notes)


def test_a_rate_grows_its_pieces_within_the_budget(monkeypatch):
    clock = Clock(monkeypatch)
    rate = calibrate_module._rate(clock.work, lambda n: 7.0 * n, [1, 4, 100], 60.0)
    assert rate == Rate(7.0, 0.04)  # 100 units would not have fitted
    assert clock.sizes[:4] == [1, 1, 4, 4]
    assert clock.now <= 60
    clock = Clock(monkeypatch)
    rate = calibrate_module._rate(clock.work, lambda n: 7.0 * n, [1, 4], 1000.0)
    assert rate == Rate(7.0, 1.0)
    assert len(clock.sizes) == 2 + 2 + calibrate_module.REPEATS - 1
    clock = Clock(monkeypatch)
    assert calibrate_module._rate(clock.work, lambda n: 7.0 * n, [5, 10], 0.0) == Rate(7.0, 0.5)
    assert clock.sizes == [5, 5]
