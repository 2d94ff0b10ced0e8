"""`superserve measure --cpu-workers` and `superserve replay`, with two workers on the cores of a CPU."""

import jax
import numpy as np
import pytest
from tiny import TINY, random_images
from two_workers import SIZES, SUBNETS, write

from superserve_jax import machine
from superserve_jax.commands import replay_setup
from superserve_jax.exports import profile_path
from superserve_jax.profile import Profile, Row

IMAGES = random_images(TINY, 12)
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch):
    monkeypatch.setattr(machine, "cores", lambda: 2)


@pytest.mark.slow
def test_measure_writes_the_given_number_of_workers_and_a_replay_follows_it(tmp_path, run_program, monkeypatch):
    monkeypatch.setenv("SUPERSERVE_CACHE", str(tmp_path / "cache"))
    path = write(tmp_path / "measured", 6)
    kind = machine.device_kind(jax.devices()[0])
    profile_path(path, kind).unlink()
    sizes = ("--batch-sizes", *SIZES)
    done = run_program("serve/measure.py", path, *sizes, "--repeats", 2, "--cpu-workers", 2, json_file=True)
    assert "cores: " in done.stdout
    stored = Profile.load(profile_path(path, kind))
    assert (stored.cpu_workers, done.json["cpu_workers"]) == (2, 2)
    images = IMAGES, np.zeros(len(IMAGES), int)
    monkeypatch.setattr(replay_setup, "test_examples", lambda model: images)
    monkeypatch.setattr(replay_setup, "TIMING_S", 0.1)
    for asked, workers in ((None, 2), (1, 1)):
        options = replay_setup.Options(path, batch_sizes=SIZES, seconds=4.0, cpu_workers=asked)
        work = replay_setup.prepare_work(options)
        assert len(work.engines) == len({e.name for e in work.engines}) == workers
        assert [p.cpu_workers for p in work.profiles] == [workers] * workers


def test_measure_refuses_workers_that_cannot_be(tmp_path, run_program):
    done = run_program("serve/measure.py", tmp_path, "--cpu-workers", 3, status=2)
    assert "cpu_workers must be from 1 to 2, the number of cores, got 3" in done.stderr


@pytest.mark.parametrize("workers", [1, 2])
def test_engines_that_share_the_cores_are_measured_beside_each_other(monkeypatch, workers):
    beside = []

    def measure_again(engine, profile, **options):
        beside.append((engine, options["beside"]))
        return profile

    monkeypatch.setattr(replay_setup.profiling, "measure_again", measure_again)
    profile = Profile(SIZES, (Row(SUBNETS[0], 0.5, (1.0, 2.0)),), cpu_workers=workers)
    assert replay_setup.measure_all(["a", "b"], [profile, profile], 1.0) == [profile, profile]
    assert beside == ([("a", ["b"]), ("b", ["a"])] if workers > 1 else [("a", []), ("b", [])])
