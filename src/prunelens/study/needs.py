"""What a stage occupies of a machine in a cluster, and whether any machine there has that much."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from prunelens.checkpoint import model_shape
from prunelens.config import ModelConfig
from prunelens.errors import UserError
from prunelens.study.artifacts.store import Stage
from prunelens.study.footprint import PROCESS_BYTES, Memory, memory_use
from prunelens.study.matrix import Plan, parents_first
from prunelens.study.preflight.room import GIGABYTE, SURELY_TOO_LITTLE
from prunelens.study.stages import STAGES

ON_DEVICE = {"language model", "SAE training", "SAE encoding"}  # rates of what uses a GPU


class Needs(NamedTuple):
    """What a stage occupies."""

    num_cpus: int
    """As many as its threads."""
    num_gpus: int
    """0 for a stage that computes on the CPU wherever it is made."""
    memory: int
    """Bytes of the machine's memory, as `footprint` estimates them."""

    def __str__(self) -> str:
        parts = [f"{self.num_cpus} CPU"]
        if self.num_gpus:
            parts.append(f"{self.num_gpus} GPU")
        return ", ".join([*parts, f"{self.memory / GIGABYTE:.1f} GB of memory"])


def needs_of(plan: Plan, nodes: Sequence[Needs], *, gpu: bool) -> dict[str, Needs]:
    """The needs of every stage of a plan, by identity, where the machines of a cluster bear them.

    Args:
        plan: the study's.
        nodes: what each machine has.
        gpu: what can run on a GPU gets one; else everything runs on CPUs.
    Raises: UserError for a stage that would wait for ever.
    """
    study = plan.study
    models = {model.label: model for model in study.models}
    shapes = {label: model_shape(model) for label, model in models.items()}
    memory = {
        label: memory_use(study.model_copy(update={"models": (model,)}), shapes, "cpu")
        for label, model in models.items()
    }
    most_gpus = max((node.num_gpus for node in nodes), default=0)
    found = {}
    for stage in parents_first(plan.targets().values()):
        assert stage.source
        model = stage.source.model
        gpus = _gpus(stage, model, most_gpus) if gpu else 0
        bytes_held = _memory(stage, memory[model.label], on_gpu=gpus > 0)
        need = Needs(study.threads_per_stage, gpus, bytes_held)
        found[stage.identity] = _bearable(stage, need, nodes)
    return found


def node_needs(resources: Iterable[Mapping[str, float]]) -> list[Needs]:
    """What machines have, from Ray's names for it."""
    return [
        Needs(*(int(node.get(name, 0)) for name in ("CPU", "GPU", "memory"))) for node in resources
    ]


def borne_by(need: Needs, nodes: Sequence[Needs]) -> list[Needs]:
    """The machines that have all of it, if nothing else runs there."""
    return [node for node in nodes if all(map(operator.ge, node, need))]


def no_node(stage: Stage, need: Needs, nodes: Sequence[Needs]) -> UserError:
    """That a stage would wait for ever."""
    there = "; ".join(sorted({str(node) for node in nodes}, reverse=True)[:3]) or "none"
    return UserError(
        f"--executor: no node of the Ray cluster can make {stage.label!r}, which needs {need}"
        f" (nodes have: {there}); add a node that can, or lower threads_per_stage or the size"
    )


def _gpus(stage: Stage, model: ModelConfig, most: int) -> int:
    """A model that is spread over GPUs takes those that it names, else all that a machine has."""
    rate = STAGES[stage.name].work_kind
    if rate not in ON_DEVICE:
        return 0
    if rate != "language model" or model.device_map is None:
        return 1
    if model.max_memory is None:
        return most
    return max(1, len([place for place in model.max_memory if place != "cpu"]))


def _memory(stage: Stage, memory: Memory, *, on_gpu: bool) -> int:
    """On the CPU a model is there twice while it is loaded; on a GPU the machine passes it on."""
    kind = STAGES[stage.name]
    if kind.work_kind is None:
        held = 0.0  # tables
    elif on_gpu:
        held = memory.model
    elif kind.work_kind != "language model":
        held = memory.sae_training  # more than what reads SAEs and compares them
    elif stage.name == "prune":
        held = max(2 * memory.model, memory.pruning)
    else:
        batch = memory.perplexity if kind.has_logits else memory.forward
        held = max(2 * memory.model, batch)
    return int(PROCESS_BYTES + held)


def _bearable(stage: Stage, need: Needs, nodes: Sequence[Needs]) -> Needs:
    """The need, or all the memory of a machine that has about as much: needs are estimates."""
    least = need._replace(memory=int(SURELY_TOO_LITTLE * need.memory))
    enough = borne_by(least, nodes)
    if not enough:
        raise no_node(stage, need, nodes)
    return need._replace(memory=min(need.memory, max(node.memory for node in enough)))
