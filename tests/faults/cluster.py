"""Run 80 SAEs on a Ray cluster of which a node is killed, and hold the results against one process.

    python tests/faults/cluster.py                                # eighty.yaml on three nodes
    python tests/faults/cluster.py --study demo --nodes 2

All nodes are on this machine. Exit code 0 if every file of the results is byte-identical and
nothing is left over.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import shutil
import sys
import tempfile
import time

from kill import (
    POLL_SECONDS,
    Timeline,
    differences,
    leftovers,
    num_artifacts,
    results_of,
    run_undisturbed,
    start,
)

from prunelens.study import cluster as executor

STUDY = str(pathlib.Path(__file__).with_name("eighty.yaml"))
HERE = {"node_ip_address": "127.0.0.1", "object_store_memory": 80_000_000}
NODE = {"num_cpus": 1, "memory": 8e9, **HERE}


def run_on_a_cluster(study: str, folder: pathlib.Path, alone: Timeline, *, nodes: int) -> list[str]:
    """Run `study` on a head that computes nothing and `nodes` that do, one of which dies halfway.

    Another one takes its place.

    Args:
        study: a file, or the name of a shipped study.
        folder: a new one, for its results.
        alone: an earlier run of the same study, without Ray.
        nodes: at least two, of one processor each.
    Returns: what is wrong, one line each; nothing if all is well.
    """
    from ray.cluster_utils import Cluster

    head = {**NODE, "num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        workers = [cluster.add_node(**NODE) for _ in range(nodes)]
        on_ray = ("--executor", "ray", "--address", cluster.address)
        process = start(study, folder, *on_ray, workers=nodes, stderr=None)
        while process.poll() is None and num_artifacts(folder) < len(alone.published) // 2:
            time.sleep(POLL_SECONDS)
        if process.poll() is not None:
            return [f"the run ended with exit code {process.returncode} before a node was killed"]
        print(f"a node is killed at {num_artifacts(folder)} artifacts", flush=True)
        cluster.remove_node(workers[0], allow_graceful=False)
        cluster.add_node(**NODE)
        if process.wait() != 0:
            return [f"the run ended with exit code {process.returncode}"]
    finally:
        cluster.shutdown()
    start(study, folder).wait()  # finds nothing to do, and sweeps what the dead node left
    return [*differences(alone.results, results_of(folder)), *leftovers(folder)]


def main() -> None:
    """See the head of this file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--study", default=STUDY, help="a file or a shipped study; default: ours")
    parser.add_argument("--nodes", type=int, default=3, help="that compute, beside the head")
    parser.add_argument("--keep", action="store_true", help="do not delete what was made")
    given = parser.parse_args()
    os.environ.update(executor.NO_TELEMETRY | executor.LOOPBACK)  # before Ray is imported
    folder = pathlib.Path(tempfile.mkdtemp(prefix="prunelens-faults-"))
    alone = run_undisturbed(given.study, folder / "alone")
    saes = len(list(folder.glob("alone/artifacts/sae/*/meta.json")))
    print(
        f"alone: {alone.seconds:.1f} s, {len(alone.published)} artifacts, {saes} SAEs", flush=True
    )
    started = time.monotonic()
    problems = run_on_a_cluster(given.study, folder / "cluster", alone, nodes=given.nodes)
    print(f"on {given.nodes} nodes: {time.monotonic() - started:.1f} s", flush=True)
    if given.keep or problems:
        print(f"see {folder}")
    else:
        shutil.rmtree(folder)
    print("\n".join(problems) or f"{len(alone.results)} files are identical, nothing is left")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
