"""A disk that is full, and a folder that is read-only, while a run writes its files."""

import logging

import pytest
from full_disk import disk_full_after
from noise import assert_same_state

from superserve_jax import errors
from superserve_jax.training import loop, metrics_log
from superserve_jax.training.metrics_log import MetricsLog

pytestmark = pytest.mark.usefixtures("on_noise", "no_test_hangs")


def scalars(k):
    return {name: float(k) for name in ("loss", "accuracy", "loss_smallest")}


def test_metrics_that_cannot_be_written_neither_stop_training_nor_damage_those_before_and_after(tmp_path, caplog):
    record = MetricsLog(tmp_path / "run", 0)
    for step in range(1, 9):
        record.add(scalars(step))
        with disk_full_after(10 if 3 <= step < 7 else 1 << 30), caplog.at_level(logging.WARNING):
            record.flush(step, examples=1)
    assert [line["step"] for line in metrics_log.read(tmp_path / "run")] == [1, 2, 7, 8]
    assert "the metrics of step 3 could not be written" in caplog.text
    assert "Training goes on" in caplog.text
    assert record.note == "loss 8.000, accuracy 8.000"


def test_a_disk_that_is_too_full_for_tensorboard_does_not_hang_training(tmp_path, caplog):
    record = MetricsLog(tmp_path / "run", 0)
    with disk_full_after(15_000):
        for step in range(1, 121):
            record.add(scalars(step))
            record.flush(step, examples=1)
    assert len(metrics_log.read(tmp_path / "run")) == 120
    assert "could not be written" in caplog.text
    [board] = (tmp_path / "run" / "tensorboard").iterdir()
    assert 14_000 < board.stat().st_size <= 15_000


@pytest.mark.parametrize("limit", [0, 3000])
def test_a_full_disk_at_the_start_of_a_run_is_a_documented_error(config, finished, tmp_path, limit):
    with disk_full_after(limit), pytest.raises((errors.WriteError, errors.DataError), match=r"free space|make room"):
        loop.train(config, tmp_path / "run")
    assert not list(tmp_path.rglob("*.part"))
    assert not list((tmp_path / "run").glob("checkpoints/*"))
    assert_same_state(loop.train(config, tmp_path / "run"), finished)
