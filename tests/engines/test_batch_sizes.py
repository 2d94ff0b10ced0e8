"""The default batch sizes: up to 16 on a CPU, and up to 64 on a GPU that gains."""

import types

import jax
import pytest
from small_exports import IMAGES, write

from superserve_jax import exports, machine
from superserve_jax.engines import default_batch_sizes, measuring, prepare
from superserve_jax.profile import Profile, Row

UP_TO_16, UP_TO_64 = (1, 2, 4, 8, 16), (1, 2, 4, 8, 16, 32, 64)
CPU = jax.devices()[0]


def card(kind="NVIDIA H100"):
    return types.SimpleNamespace(platform="gpu", device_kind=kind, id=0)


def default(model, *devices):
    return default_batch_sizes.to_serve(model.path, {device.device_kind: device for device in devices})


@pytest.fixture
def model(tmp_path):
    return exports.load(write(tmp_path / "export", IMAGES))


def profile(model, batch_sizes, *, kind="NVIDIA H100", gains_up_to=64):
    """A profile in which larger batches than `gains_up_to` take as much longer as they are larger."""
    ms = tuple(max(1.0, size / gains_up_to) for size in batch_sizes)
    rows = [Row(s.subnet, s.known_accuracy, tuple(i * t for t in ms)) for i, s in enumerate(model.served, 1)]
    return Profile(batch_sizes, tuple(rows), kind)


def test_only_gpus_have_batch_sizes_above_16(model):
    assert default_batch_sizes.candidates([CPU]) == default_batch_sizes.candidates([card(), CPU]) == UP_TO_16
    assert default_batch_sizes.candidates([card()]) == default(model, card(), card()) == UP_TO_64


@pytest.mark.parametrize(
    ("measured", "expected"), [((1, 2, 4, 8, 16, 32), UP_TO_64[:-1]), (UP_TO_16, UP_TO_16), ((1, 2), UP_TO_64)]
)
def test_a_stored_profile_decides_unless_it_lacks_small_batch_sizes(model, measured, expected):
    profile(model, measured).save(exports.profile_path(model.path, "NVIDIA H100"))
    assert default(model, card()) == expected
    assert default(model, card("NVIDIA A100")) == UP_TO_64


@pytest.mark.parametrize(("gains_up_to", "expected"), [(64, UP_TO_64), (32, UP_TO_64[:-1]), (16, UP_TO_16), (4, UP_TO_16)])
@pytest.mark.parametrize("given", [None, UP_TO_64])
def test_batch_sizes_that_gain_nothing_are_dropped_if_nobody_asked_for_them(model, monkeypatch, given, gains_up_to, expected):
    made = []

    def make(*_, batch_sizes, **__):
        made.append(batch_sizes)
        return types.SimpleNamespace(command_buffers=False)

    monkeypatch.setattr(prepare, "DeviceEngine", make)
    monkeypatch.setattr(prepare, "make_engine", lambda model, device, profile, **_: make(batch_sizes=profile.batch_sizes))
    monkeypatch.setattr(measuring, "measure", lambda *_, **__: profile(model, UP_TO_64, gains_up_to=gains_up_to))
    monkeypatch.setattr(default_batch_sizes, "candidates", lambda devices: UP_TO_64)
    monkeypatch.setattr(measuring, "worth_serving", lambda profile: profile)
    kept = UP_TO_64 if given else expected
    _, _, [first, second] = prepare.prepare(model, batch_sizes=given, devices=[CPU, CPU])
    assert first.batch_sizes == second.batch_sizes == kept
    assert made == [UP_TO_64, kept]


def test_batch_sizes_of_a_stored_profile_that_gain_nothing_are_not_served(model, monkeypatch):
    made = []
    stored = profile(model, UP_TO_64, kind=machine.device_kind(CPU), gains_up_to=32)
    stored.save(exports.profile_path(model.path, stored.device))
    monkeypatch.setattr(default_batch_sizes, "candidates", lambda devices: UP_TO_64)
    monkeypatch.setattr(prepare, "make_engine", lambda model, device, profile, **_: made.append(profile.batch_sizes))
    for given, kept in ((None, UP_TO_64[:-1]), (UP_TO_64, UP_TO_64)):
        _, _, [served] = prepare.prepare(model, batch_sizes=given, devices=[CPU])
        assert served.batch_sizes == made.pop() == kept
