"""OFA-MobileNetV3: its published sizes, its choices, and impossible configs. Logits: `convert/test_ofa_mobilenet.py`."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import assert_close, random_images, random_params, random_statistics, write_export

import superserve_jax as ss
from superserve_jax import errors, exports, machine, supernets
from superserve_jax.families.ofa_mobilenet import OFAMobileNetConfig
from superserve_jax.profile import Profile, Row
from superserve_jax.supernets.supernet import SuperNet

TINY = OFAMobileNetConfig(image_size=32, width_mult=0.1, depths=(1, 2), expand_ratios=(3.0, 6.0), kernel_sizes=(3, 5))


def test_the_default_config_is_the_published_network():
    """The numbers are those of once-for-all's own subnets of width 1.0, from `get_active_subnet`."""
    config = OFAMobileNetConfig()
    space = config.space()
    largest, smallest = space.largest(), space.smallest()
    assert (config.num_params(largest), config.flops(largest)) == (7_664_760, 566_170_656)
    assert (config.num_params(smallest), config.flops(smallest)) == (3_410_792, 121_278_672)
    assert space.size == pytest.approx(2.2e19, rel=0.02)  # once-for-all: more than 1e19
    assert config.subnet(kernel_sizes=7, expand_ratios=6, depths=4) == largest
    assert config.subnet(kernel_sizes=[3] * 20, expand_ratios=3, depths=(2,) * 5) == smallest


def test_the_width_of_squeeze_and_excite_follows_the_expand_ratio():
    config = OFAMobileNetConfig()
    sizes = config.sizes(config.subnet(kernel_sizes=7, expand_ratios=4, depths=4))
    assert (sizes["stages.4.1.depthwise"], sizes["stages.4.1.squeeze.reduce"]) == (640, 160)
    assert (sizes["stages.1.0.depthwise"], sizes["stages.1.0.squeeze.reduce"]) == (96, 24)


def test_a_network_without_choices_of_one_kind_is_possible():
    config = dataclasses.replace(TINY, kernel_sizes=(3,), depths=(1,))
    assert [axis.name for axis in config.space().axes] == ["expand"]
    assert config.space().depths == ()


def test_a_small_network_passes_the_checks_of_families():
    supernets.check(TINY, run=False)


@pytest.mark.usefixtures("quick_compilation")
def test_it_is_exported_measured_and_served(run_program, tmp_path, monkeypatch):
    monkeypatch.setenv("SUPERSERVE_CACHE", str(tmp_path / "cache"))  # so that only `measure` compiles
    config = dataclasses.replace(TINY, image_size=16)
    mixed = config.subnet(kernel_sizes=[3, 5] * 5, expand_ratios=3, depths=(1, 2, 1, 2, 1))
    subnets = [mixed, config.space().largest()]
    model = SuperNet(config, random_params(config), {s: random_statistics(config, s) for s in subnets})
    path = write_export(tmp_path / "export", model)
    options = ("--batch-sizes", 2, "--repeats", 2, "--slicing", "kept", "--keep-all", "--no-load")
    whole_batches = {"choose_cores": lambda *_, **__: (1, {})}
    found = run_program("serve/measure.py", path, *options, patches=whole_batches, json_file=True).json
    assert {len(row["latency_ms"]) for row in found["rows"]} == {1}  # on a busy machine, one subnet may beat the other
    kind = machine.device_kind(jax.devices()[0])
    rows = tuple(Row(subnet, 0.5 + 0.1 * i, (1.0 + i,)) for i, subnet in enumerate(subnets))
    Profile((2,), rows, kind).save(exports.profile_path(path, kind))
    loaded, images = ss.load(path), random_images(config, 2)
    assert loaded.config == config
    for i, subnet in enumerate(subnets):
        with ss.Server(path, slo_ms=10_000, batch_sizes=(2,), tune_runtime=False, policy=f"fixed:{i}") as server:
            replies = [future.result(timeout=60) for future in server.submit_many(list(images))]
        assert [reply.subnet for reply in replies] == [subnet, subnet]
        assert_close(np.stack([reply.output for reply in replies]), loaded(images, subnet))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_sizes": (4, 6)}, "kernel_sizes must be odd"),
        ({"kernel_sizes": (5, 3)}, "kernel_sizes"),
        ({"expand_ratios": ()}, "expand_ratios must be positive and ascending"),
        ({"depths": (0, 2)}, "depths"),
        ({"width_mult": 0.0}, "width_mult must be positive"),
        ({"width_mult": 0.05}, "two stages of stride 1 have .* channels"),
        ({"strides": (2, 2)}, "strides needs 5 whole numbers"),
        ({"std": (1.0, 0.0, 1.0)}, "std must be positive"),
        ({"mean": (0.5,)}, "mean needs 3 values"),
        ({"num_classes": 0}, "num_classes must be a whole number from 1 up"),
    ],
)
def test_an_impossible_config_is_refused(change, message):
    with pytest.raises(errors.ConfigError, match=message):
        dataclasses.replace(TINY, **change)
