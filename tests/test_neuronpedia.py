"""Which SAEs have pages on Neuronpedia: told without a connection, and by plain names alone."""

from __future__ import annotations

import json
import socket

import pytest

from prunelens.config import PretrainedSaeConfig
from prunelens.sae.exchange.neuronpedia import neuronpedia_id


def test_neuronpedia_names_from_files_alone(tmp_path):
    def name(described):
        (tmp_path / "cfg.json").write_text(json.dumps(described))
        return neuronpedia_id(PretrainedSaeConfig(layer=0, folder=str(tmp_path)))

    assert (
        name({"metadata": {"neuronpedia_id": "gemma-2-2b/12-res_16k"}}) == "gemma-2-2b/12-res_16k"
    )
    assert name({"neuronpedia_id": "gpt2-small/0-res-jb"}) == "gpt2-small/0-res-jb"
    for described in (
        {}, [], {"metadata": None}, {"metadata": {"neuronpedia_id": None}}, {"neuronpedia_id": 3},
        {"neuronpedia_id": "../x"}, {"neuronpedia_id": "a/b/c"}, {"neuronpedia_id": "a/b?c"},
        {"neuronpedia_id": "a/b\n"}, {"neuronpedia_id": "javascript:alert(1)//x"},
    ):  # fmt: skip
        assert name(described) is None
    (tmp_path / "cfg.json").unlink()
    assert neuronpedia_id(PretrainedSaeConfig(layer=0, folder=str(tmp_path))) is None


def test_neuronpedia_names_from_the_registry_and_without_a_connection(monkeypatch):
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: pytest.fail("the network was asked")
    )

    def name(release, sae_id):
        return neuronpedia_id(PretrainedSaeConfig(layer=0, release=release, sae_id=sae_id))

    assert name("gpt2-small-res-jb", "blocks.8.hook_resid_pre") == "gpt2-small/8-res-jb"
    assert name("gpt2-small-res-jb", "nothing") is None
    assert name("nothing", "x") is None
    assert name("someone/nothing-of-theirs", "x") is None
