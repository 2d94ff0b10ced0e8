"""Training that is killed, runs out of disk space, finds damaged checkpoints or another number of devices.

One file because every test here resumes the same small run after a fault.
"""

import dataclasses
import json
import logging
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time

import jax
import noise
import numpy as np
import orbax.checkpoint as ocp
import pytest
from noise import DEBUG, RESNET, assert_same_state
from tensorboardX.proto import event_pb2

from superserve_jax import errors
from superserve_jax.training import loop, metrics_log, rewiring, stages
from superserve_jax.training.checkpoints import Checkpoints
from superserve_jax.training.config import Phase, config_to_json
from superserve_jax.training.runs import Run

pytestmark = pytest.mark.usefixtures("on_noise")


def start(folder, name, /, *, devices=1, limit_bytes=None, **spec):
    """Starts a training process in folder/name that logs its steps in a file beside that folder."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"log": str(folder / f"{name}.log"), **spec}))

    def limits():
        if limit_bytes is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing beyond the limit then fails as on a full disk
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))

    # Processes of one test share what they compile, which is most of their time.
    compiled = {"JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    flags = os.environ.get("XLA_FLAGS", "") + f" --xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, noise.__file__, str(folder / name), str(path)],
        env={**os.environ, **compiled, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=limits,
    )


def finish(process):
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 0, stderr


def steps(folder, name):
    """The log entry of each step of a process; of the last run, if the step ran several times."""
    lines = [json.loads(line) for line in (folder / f"{name}.log").read_text().splitlines()]
    return {line["step"]: (line["batch"], line["subnets"]) for line in lines}


# -- killed ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_process_killed_again_and_again_ends_with_bit_equal_state(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles in less time
    settings: dict = {"epochs": 2.4, "checkpoint_every": 3, "log_every": 1, "ema": 0.9, "random_subnets": 2}
    settings["phases"] = [{"share": 1, "elastic": ["depth"]}, {"share": 2, "rewire": True}]
    finish(start(tmp_path, "undisturbed", **settings))
    rng, deaths = np.random.default_rng(0), 0
    for _ in range(20):
        process = start(tmp_path, "killed", pause_s=0.15, **settings)  # else it might be finished before it is killed
        before = done = len(steps(tmp_path, "killed")) if (tmp_path / "killed.log").exists() else 0
        while process.poll() is None and done < before + 6:  # somewhere in the next steps, or in a checkpoint of them
            time.sleep(0.01)
            done = len(steps(tmp_path, "killed")) if (tmp_path / "killed.log").exists() else 0
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0:
            break
        deaths += 1
    finish(start(tmp_path, "killed", **settings))
    assert deaths >= 3
    assert steps(tmp_path, "killed") == steps(tmp_path, "undisturbed")
    killed, undisturbed = (Run.open(tmp_path / name) for name in ("killed", "undisturbed"))
    assert_same_state(killed, undisturbed)
    assert noise.metrics_of(killed) == noise.metrics_of(undisturbed)


@pytest.mark.parametrize("step", [8, 12])
def test_a_kill_right_after_a_checkpoint_loses_no_metrics_and_no_plot(config, tmp_path, monkeypatch, step):
    class Killed(BaseException):
        pass

    real = Checkpoints.save

    def save_and_die(self, done, **items):
        real(self, done, **items)
        if done == step:
            raise Killed

    validated = dataclasses.replace(config, eval_every=4)
    monkeypatch.setattr(Checkpoints, "save", save_and_die)
    with pytest.raises(Killed):
        loop.train(validated, tmp_path / "run")
    monkeypatch.undo()
    run = loop.train(validated, tmp_path / "run")
    assert [line["step"] for line in metrics_log.read(run.workdir, "validation")] == [4, 8, 12]
    assert [line["step"] for line in run.metrics()] == [2, 4, 6, 8, 10, 12]
    assert (run.workdir / "metrics.png").exists()


# -- damaged ---------------------------------------------------------------------------------------------------------------


def test_one_flipped_bit_in_the_last_checkpoint_falls_back_to_the_one_before_and_says_so(config, finished, run, caplog):
    files = [p for p in sorted((run.workdir / "checkpoints" / "12").rglob("*")) if p.is_file() and p.stat().st_size]
    victim = max(files, key=lambda p: p.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with caplog.at_level(logging.WARNING), run.checkpoints() as saved:
        assert saved.latest() == 8
    assert "checkpoint of step 12" in caplog.text
    assert victim.name in caplog.text
    assert_same_state(loop.train(config, run.workdir), finished)


def test_a_run_that_resumes_at_the_start_of_a_phase_is_rewired_as_before(tmp_path, count_calls):
    frozen, elastic = Phase(elastic=()), Phase(rewire=True)
    config = dataclasses.replace(RESNET, epochs=0.8, phases=(frozen, elastic))  # 8 steps, the second phase begins at 4
    calls = count_calls(rewiring, "reorder")
    run = loop.train(config, tmp_path / "run")
    assert len(calls) == 1
    assert any((order != np.arange(len(order))).any() for order in calls[0][2])
    assert "loss_smallest" not in run.metrics()[0]
    expected = noise.state_of(run)
    [victim, *_] = [p for p in (run.workdir / "checkpoints" / "8").rglob("*") if p.is_file()]
    victim.write_bytes(b"torn")
    again = loop.train(config, tmp_path / "run")
    assert len(calls) == 2
    assert_same_state(again, expected)


def test_a_bit_flipped_in_any_file_is_noticed(run):
    folder, saved = run.workdir / "checkpoints" / "12", run.checkpoints()
    files = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) > 5
    for path in files:
        good = path.read_bytes()
        path.write_bytes(bytes([good[0] ^ 4]) + good[1:])
        assert saved.damage(12) == f"file {path.relative_to(folder)}"
        path.write_bytes(good)
    assert saved.damage(12) is None
    (folder / "more").write_text("x")
    assert saved.damage(12) == "file more"
    (folder / "more").unlink()
    files[0].unlink()
    assert saved.damage(12) == f"file {files[0].relative_to(folder)}"
    saved.__exit__()


def test_a_checkpoint_whose_sums_were_not_written_or_are_damaged_does_not_count_and_costs_no_other(run, caplog):
    assert sorted(p.name for p in (run.workdir / "checksums").iterdir()) == ["12.json", "8.json"]
    path = run.workdir / "checksums" / "12.json"
    good = path.read_bytes()
    for spoil in (path.unlink, lambda: path.write_text("{"), lambda: path.write_bytes(bytes([good[0] ^ 32]) + good[1:])):
        spoil()
        with caplog.at_level(logging.WARNING), run.checkpoints() as saved:
            assert saved.latest() == 8
        assert "its checksums cannot be read" in caplog.text
        caplog.clear()
    path.write_bytes(good)
    with run.checkpoints() as saved:
        assert saved.latest() == 12  # who only reads has removed nothing


def test_a_run_without_an_undamaged_checkpoint_has_no_model_and_logs_why(run, caplog):
    shutil.rmtree(run.workdir / "checksums")
    with pytest.raises(errors.ConfigError, match="no checkpoint yet"):
        run.model()
    assert "there is none before it" in caplog.text


@pytest.mark.slow
def test_a_full_disk_loses_only_what_came_after_the_last_checkpoint(config, finished, tmp_path):
    settings = config_to_json(config)
    # Orbax may split arrays into many small files, but it writes this one as a whole.
    limit_bytes = (finished.workdir / "checkpoints" / "12" / "opt_state" / "_METADATA").stat().st_size - 1
    process = start(tmp_path, "full", limit_bytes=limit_bytes, **settings)
    _, stderr = process.communicate(timeout=900)
    assert process.returncode == 1
    assert "the checkpoint of step 4 could not be written" in stderr
    assert "Training goes on" in stderr
    assert stderr.rstrip().splitlines()[-1].startswith("error: the checkpoint of step 12 could not be written")
    assert stderr.rstrip().endswith("make room on the disk and run the same command to go on from step 0 of 12")
    finish(start(tmp_path, "full", **settings))
    assert_same_state(Run.open(tmp_path / "full"), finished)


def test_a_checkpoint_that_cannot_be_written_leaves_the_one_before(config, tmp_path, monkeypatch):
    run = Run.create(config, tmp_path / "run")
    with run.checkpoints() as saved:
        saved.save(1, params={"a": np.arange(3.0)})

        def full(*_, **__):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(ocp.CheckpointManager, "wait_until_finished", full)
        with pytest.raises(errors.DataError, match=r"step 2 .*No space left"):
            saved.save(2, params={"a": np.arange(3.0)})
        monkeypatch.undo()
        assert saved.latest() == 1
        saved.save(2, params={"a": np.arange(3.0)})
        assert saved.latest() == 2


# -- devices ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_one_and_eight_devices_have_the_same_losses(tmp_path, monkeypatch):
    """The recipe has every part: a teacher, phases, rewiring, an average, validation."""
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiles in less time
    settings: dict = {
        "epochs": 1.2,
        "log_every": 1,
        "random_subnets": 2,
        "checkpoint_every": 100,
        "ema": 0.9,
        "eval_every": 10,
    }
    settings["phases"] = [{"share": 1, "elastic": []}, {"share": 3, "rewire": True}]
    teacher = loop.train(dataclasses.replace(DEBUG, epochs=0.2), tmp_path / "teacher")
    stages.calibrate(teacher, [teacher.config.model.space().largest()])
    settings["distill"] = {"teacher": str(teacher.workdir), "weight": 0.5}
    for name, devices in (("one", 1), ("eight", 8)):
        finish(start(tmp_path, name, devices=devices, **settings))
    one, eight = (Run.open(tmp_path / name).metrics() for name in ("one", "eight"))
    assert len(one) == len(eight) == 12
    for a, b in zip(one, eight, strict=True):
        assert a.keys() == b.keys()
        for key in {"loss", "loss_smallest"} & a.keys():
            assert b[key] == pytest.approx(a[key], abs=1e-4), a["step"]
    assert "loss_smallest" in one[-1]
    assert len({m["loss"] for m in one}) == 12


def test_a_batch_that_the_devices_cannot_divide_is_refused(config, monkeypatch, tmp_path):
    monkeypatch.setattr(jax, "devices", lambda: [None] * 3)
    with pytest.raises(errors.ConfigError, match="batch_size must be a multiple of the number of devices, which is 3; got 64"):
        loop.train(config, tmp_path / "run")


# -- the course ------------------------------------------------------------------------------------------------------------


def test_validation_is_written_as_lines_and_for_tensorboard_and_does_not_change_training(config, finished, tmp_path):
    run = loop.train(dataclasses.replace(config, eval_every=6), tmp_path / "run")
    assert_same_state(run, finished)
    lines = [json.loads(line) for line in (run.workdir / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 12]
    assert all(0 <= line[name] <= 1 for line in lines for name in ("smallest", "middle", "largest"))
    [path] = (run.workdir / "tensorboard").iterdir()
    content, tags, place = path.read_bytes(), {}, 0
    while place < len(content):  # TFRecord: length, its checksum, the event, its checksum
        (length,) = struct.unpack_from("<Q", content, place)
        event = event_pb2.Event.FromString(content[place + 12 : place + 12 + length])
        for value in event.summary.value:
            tags[value.tag, event.step] = value.simple_value
        place += 16 + length
    assert tags["validation/largest", 12] == pytest.approx(lines[-1]["largest"])
    assert tags["train/loss", 2] == pytest.approx(run.metrics()[0]["loss"])
