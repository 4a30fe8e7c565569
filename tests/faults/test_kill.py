"""Killed at any moment, a study ends with the results of an undisturbed run."""

import random

import pytest

from faults.kill import STUDY, kill_again_and_again, run_undisturbed


@pytest.mark.timeout(1800)
def test_killed_at_random_moments_it_ends_with_the_same_files(request, tmp_path):
    seed = request.config.getoption("--fault-seed", 0)
    moments = request.config.getoption("--moments", 6)
    undisturbed = run_undisturbed(STUDY, tmp_path / "undisturbed")
    assert len(undisturbed.results) > 20
    problems = kill_again_and_again(
        STUDY,
        tmp_path / "killed",
        undisturbed,
        moments=moments,
        generator=random.Random(seed),
    )
    assert not problems, problems
