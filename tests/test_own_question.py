"""A question that somebody else declares in one file, and shows in another, is everywhere."""

from __future__ import annotations

import importlib
import json
import pathlib
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest

from own_question import co_firing, on_the_page
from prunelens.config import NEEDS, study_from_data
from prunelens.errors import UserError
from prunelens.report.explorer.collect import _others
from prunelens.report.explorer.study import write_study_explorer
from prunelens.report.questions import SECTIONS
from prunelens.report.write import run_and_report
from prunelens.sae.topk import TopKSAE
from prunelens.study.folder import open_study
from prunelens.study.parents import Sae
from prunelens.study.preflight.preview import preflight
from prunelens.study.questions import QUESTIONS
from prunelens.study.stages import STAGES, register
from tiny_study import tiny_study, write_text


@pytest.fixture
def declared() -> Iterator[None]:
    register(co_firing.CO_FIRING)
    SECTIONS.append(on_the_page.CO_FIRING)
    yield
    QUESTIONS.remove(co_firing.CO_FIRING)
    SECTIONS.remove(on_the_page.CO_FIRING)
    del STAGES["co_firing"], NEEDS["co_firing"]


def test_it_is_in_plan_tables_latents_page_explorer_and_docs(
    declared: None,
    checkpoint_folder: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    data = tiny_study(checkpoint_folder, write_text(tmp_path / "text.txt"))
    data |= {"questions": ["evidence", "co_firing"], "prunings": data["prunings"][:1]}
    study = study_from_data({**data, "keep_activations": True})
    assert preflight(study, calibration_seconds=0).stages["co_firing"] == 1

    out = tmp_path / "out"
    assert {run.status for run in run_and_report(study, out, quiet=True).results} == {"done"}
    table = pd.read_csv(out / "tables" / "co_firing.csv")
    assert table["run"].str.endswith("magnitude-global-0.50").all()
    latents = pd.read_parquet(out / "latents.parquet").query("method != 'dense'")
    found = latents.groupby("seed")["co_firing"].mean()
    np.testing.assert_allclose(table.set_index("seed")["mean_share"], found, rtol=1e-6)
    assert latents["co_firing"].between(0, 1).sum() > 10

    page = (out / "report.html").read_text()
    assert "Do latents fire where they fired?" in page and "Co-firing of every seed" in page
    assert (out / "figures" / "fig_co_firing.png").is_file()
    texts = [path.read_text() for path in write_study_explorer(out).rglob("data/**/*.js")]
    assert any('"fires again"' in text for text in texts)

    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parents[1] / "tools"))
    tool = importlib.import_module("write_tables")
    text = tool.page("<!-- tables: begin -->\n<!-- tables: end -->\n")
    assert "| `tables/co_firing.csv` | pruned run, seed | do latents fire where" in text
    assert "- `mean_share`: Mean over latents" in text.split("## co_firing")[1]
    assert "- `co_firing`: Share of its dense" in text.split("## latents")[1]

    names = ["persistence", "co_firing", "co_firing_shared_init", "mutual_shared_init", "mine"]
    assert _others(pd.DataFrame(columns=names)) == ["co_firing", "co_firing_shared_init"]

    plan, store = open_study(out)  # and its number is what it says, counted one by one
    dense, pruned = plan.runs
    sae = TopKSAE.load(store.read(dense.saes[Sae(0, 0)]))
    both = pruned.stages["co_firing"].parents
    assert both["common_change"] is pruned.stages["common_change"]  # which nobody else asked for
    normal, rows = co_firing_rows(store, both)
    fires = [sae.dense_latents(sae.encode((x - normal[0]) / normal[1])) > 0 for x in rows]
    latent = int(fires[0].sum(0).argmax())
    pairs = zip(*(on[:, latent].tolist() for on in fires), strict=True)
    shared = sum(a and b for a, b in pairs)
    own = latents.query(f"seed == 0 and latent == {latent}")["co_firing"].item()
    assert own == pytest.approx(shared / int(fires[0][:, latent].sum()))


def co_firing_rows(store, parents):
    """Mean and deviation, and the rows of the second half of eval, read anew."""
    from safetensors.torch import load_file

    statistics = load_file(store.read(parents["statistics"]) / "statistics.safetensors")
    kept = load_file(store.read(parents["screening"]) / "kept.safetensors")["eval"]
    folders = [store.read(parents[name]) for name in ("dense", "pruned")]
    first = json.loads((folders[0] / "rows.json").read_text())["eval_first_rows"]
    rows = [
        load_file(folder / "eval.safetensors")["activations"][kept[kept >= first]].float()
        for folder in folders
    ]
    return (statistics["mean"].float(), statistics["sigma"].float()), rows


def test_a_name_that_is_taken_is_refused() -> None:
    with pytest.raises(UserError, match="a stage 'sae' already"):
        register(co_firing.CO_FIRING.__class__("sae", 1))
