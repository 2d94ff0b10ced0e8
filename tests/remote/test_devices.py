"""Devices of Ray, without a cluster."""

import builtins
import pathlib

import numpy as np
import pytest

import superserve_jax as ss
from superserve_jax import errors, manifest, remote
from superserve_jax.remote import devices, packing
from superserve_jax.remote.maker import RemoteMaker
from superserve_jax.serving.makers import Source
from superserve_jax.simulation.paper_profile import paper_profile


@pytest.mark.parametrize("options", [{"max_restarts": 1}, {"lifetime": "detached"}])
def test_options_that_the_library_sets_are_refused(options):
    with pytest.raises(errors.ConfigError, match=next(iter(options))):
        ss.ray_device(num_gpus=1, **options)


@pytest.mark.parametrize("count", [0, -1, 1.5, "2", True])
def test_a_count_that_is_none_is_refused(count):
    with pytest.raises(errors.ConfigError, match="count must be a whole number from 1 up"):
        ss.ray_devices(count)


def test_without_ray_the_error_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without_ray(name, *args):
        if name == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_ray)
    with pytest.raises(errors.ConfigError, match=r"need Ray: pip install 'superserve-jax\[ray\]'"):
        remote.ray_device().make_engine(Source.of("digits", "0" * 64))


def test_without_a_cluster_the_error_says_how_to_join_one(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(errors.ConfigError, match=r'call ray\.init\("auto"\)'):
        remote.ray_device().make_engine(Source.of("digits", "0" * 64))


def test_devices_of_two_kinds_are_refused(tmp_path):
    with pytest.raises(errors.ConfigError, match=r"expected devices of ss\.ray_devices, got 'gpu:0'"):
        ss.Server("digits", devices=[ss.ray_device(), "gpu:0"])


@pytest.mark.parametrize("change", [{"files": {"vocabulary.txt": {"sha256": "b"}}}, {"vocabulary": {"lowercase": True}}])
def test_a_swap_to_another_vocabulary_or_other_settings_of_it_is_refused(monkeypatch, tmp_path, change):
    about = {"sha256": "0" * 64, "files": {"vocabulary.txt": {"sha256": "a"}}, "vocabulary": {"lowercase": False}}
    monkeypatch.setattr(manifest, "find", pathlib.Path)
    monkeypatch.setattr(manifest, "read_manifest", lambda _: about)
    old = RemoteMaker(tmp_path / "old", {})
    assert old.successor(tmp_path / "same", (), paper_profile())[1:] == ([], [])
    about = {**about, **change}
    with pytest.raises(errors.ConfigError, match=r"new has another vocabulary than .*old"):
        old.successor(tmp_path / "new", (), paper_profile())


def test_packed_inputs_are_unpacked():
    same, other = [np.ones((2, 3)), np.zeros((2, 3))], [np.ones((2, 3)), np.zeros((4, 3))]
    for inputs in (same, other):
        for found, wanted in zip(packing.unpack(packing.pack(inputs)), inputs, strict=True):
            np.testing.assert_array_equal(found, wanted)


def test_names_are_numbered():
    assert [d.name for d in devices.ray_devices(2, name="cell")] == ["cell-0", "cell-1"]
