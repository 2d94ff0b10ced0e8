"""serve/bench/actuation.py and memory.py on a minute network: all figures are there and agree with each other."""

import dataclasses
import gc
import math
import os
import pathlib
import runpy
import types

import extracted
import jax
import numpy as np
import pytest
from jax.experimental.layout import Layout
from tiny import TINY, assert_close, random_images

from superserve_jax import exports
from superserve_jax.engines import executables
from superserve_jax.experiments import hand_tuned
from superserve_jax.subnet import evenly_spaced
from superserve_jax.training import random_export

ACTUATION = pathlib.Path(__file__).parents[2] / "serve" / "bench" / "actuation.py"
ONE_BLOCK = dataclasses.replace(  # these tests compile thirty programs
    TINY, image_size=8, stem_depths=(1,), stage_widths=(16,), strides=(1,), depths=((1,),), expand_ratios=(0.25, 0.5, 1.0)
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    """An export of the tiny network with made-up values, six subnets of it."""
    return random_export.export(ONE_BLOCK, tmp_path_factory.mktemp("made_up") / "export", subnets=6)


@pytest.fixture
def run(run_program, monkeypatch, export):
    """Runs a program on the export, in this process only. Returns its figures and what it printed."""

    def in_this_process(function, *arguments):
        gc.collect()
        return function(*arguments)

    def run(name, *options):
        patches = {"in_fresh_process": in_this_process} if name == "memory.py" else {}
        done = run_program(f"serve/bench/{name}", export, *options, json_file=True, patches=patches)
        return done.json, done.stdout

    monkeypatch.setenv("SUPERSERVE_CACHE", str(export.parent / "cache"))
    return run


def numbers(value):
    """All numbers in a JSON value."""
    if isinstance(value, dict):
        return [n for v in value.values() for n in numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in numbers(v)]
    return [value] if isinstance(value, int | float) else []


def test_actuation_is_measured_beside_extracted_networks_and_loading(run, export, tmp_path):
    chosen, plot = evenly_spaced(exports.load(export).subnets, ONE_BLOCK.flops, 4), tmp_path / "plots" / "loading.png"
    budget = 4 * ONE_BLOCK.num_params(chosen[2])  # of two of the smaller three
    found, printed = run("actuation.py", *f"--subnets 4 --rounds 3 --loads 2 --slice-bytes {budget} --plot {plot}".split())
    assert all(map(math.isfinite, numbers(found)))
    copied = 0
    for s, of in zip(chosen, found["subnets"], strict=True):
        assert (of["flops"], of["weights_bytes"]) == (ONE_BLOCK.flops(s), 4 * ONE_BLOCK.num_params(s))
        [at] = of["batches"]
        events = at["events"]
        copied += events.pop("kept_copied", {"count": 0})["count"]
        assert {f"{way}_same" for way in ("in_call", "kept", "extracted")} <= set(events)
        assert events["extracted_same"]["over_extracted"] == 1
        assert events["kept_same"]["count"] == events["in_call_other"]["count"] == 3
        assert all(0 < e["median_ms"] <= e["p99_ms"] for e in events.values())
        assert (of["copy_ms"] is None) == (s == chosen[-1])  # the largest is never copied
        assert min(of["copy_ms"] or math.inf, *of["loading_ms"].values(), *at["loading_over_inference"].values()) > 0
    others = sum(of["batches"][0]["events"].get("kept_other", {"count": 0})["count"] for of in found["subnets"])
    assert copied + others == 12
    assert copied > 0 < others  # the largest is never copied
    assert plot.stat().st_size > 0
    assert "not measured: fresh weights; sizes are real" in printed
    assert "kept, same subnet again: " in printed


@pytest.mark.parametrize("prepared", [False, True])
def test_extracted_networks_give_the_logits_of_their_subnet(tiny, monkeypatch, prepared):
    """Prepared ones have folded statistics, and layouts that the executables choose: here all axes reversed."""
    monkeypatch.setattr(executables, "free_layout", lambda axes: Layout(tuple(range(axes))[::-1]))
    images, device, chosen = random_images(TINY, 2), jax.devices()[0], tiny.calibrated[:2]
    networks = extracted.extract(tiny, chosen, device, batch_sizes=(1, 2), length=0, prepared=prepared)
    for subnet, network in networks.items():
        network.place(device)
        assert any("scale" in name for name in network.host) != prepared
        for batch in (1, 2):
            assert_close(network(images[:batch]), tiny(images[:batch], subnet))


def test_loading_copies_the_weights(export, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ACTUATION.parent)
    program = runpy.run_path(str(ACTUATION))
    model = exports.load(export)
    host = {name: np.asarray(value) for name, value in model.params.items()}
    weights = program["Weights"](host, jax.devices()[0], tmp_path / "weights")
    for load in (weights.load_from_host, weights.load_from_disk):
        loaded = load()
        for name, value in host.items():
            np.testing.assert_array_equal(loaded[name], value)
            assert loaded[name].unsafe_buffer_pointer() != value.ctypes.data
    assert weights.drop_pages() == hasattr(os, "posix_fadvise")


def test_published_resnets_have_the_sizes_of_their_architecture():
    def params(bottleneck, blocks):
        total, width_in = 3 * 64 * 49 + 2 * 64, 64
        for count, width in zip(blocks, (64, 128, 256, 512), strict=True):
            width_out = 4 * width if bottleneck else width
            for _ in range(count):
                convs = [(1, width_in, width), (3, width, width), (1, width, width_out)]
                convs = convs if bottleneck else [(3, width_in, width), (3, width, width)]
                convs += [(1, width_in, width_out)] * (width_in != width_out)
                total += sum(k * k * c_in * c_out + 2 * c_out for k, c_in, c_out in convs)
                width_in = width_out
        return total + (width_in + 1) * 1000

    sizes = [(False, (2, 2, 2, 2)), (False, (3, 4, 6, 3)), (True, (3, 4, 6, 3)), (True, (3, 4, 23, 3))]
    assert [network.params for network in hand_tuned.RESNETS] == [params(*size) for size in sizes]


def test_published_resnets_stand_beside_a_network_with_imagenets_classes(monkeypatch):
    monkeypatch.syspath_prepend(ACTUATION.parent)
    program = runpy.run_path(str(ACTUATION.parent / "memory.py"))
    of = [
        program["hand_tuned_resnets"](types.SimpleNamespace(config=types.SimpleNamespace(num_classes=n))) for n in (10, 1000)
    ]
    name = "ResNet-18, 34, 50, 101 (computed)"
    assert of == [[], [{"name": name, "subnets": 4, "live_bytes": 4 * 103_593_376}]]


def test_memory_of_all_variants_adds_up(run, export):
    found, printed = run("memory.py", "--executables", "2", "--extracted", "2", "--repeats", "2")
    assert all(map(math.isfinite, numbers(found)))
    in_call, kept, small, extracts, everything = found["variants"]
    model = exports.load(export)
    weights = 4 * ONE_BLOCK.num_params(model.space.largest())
    for of in (in_call, kept, small):
        assert (of["subnets"], of["executables"], of["weights_bytes"]) == (6, 2, weights)
        beside = of["live_bytes"] - weights - of["statistics_bytes"] - of["slices_bytes"]
        assert 0 < beside < 128  # sizes that are traced in shared executables
        assert of["host_statistics_bytes"] == sum(model.statistics_of(s).nbytes for s in model.subnets)
    assert in_call["slices_bytes"] == 0
    assert kept["live_bytes"] - in_call["live_bytes"] == kept["slices_bytes"] > 0
    chosen = [model.space.smallest(), model.space.largest()]
    assert extracts["live_bytes"] == sum(4 * ONE_BLOCK.num_params(s) + model.statistics_of(s).nbytes for s in chosen)
    assert everything["live_bytes"] == sum(4 * ONE_BLOCK.num_params(s) + model.statistics_of(s).nbytes for s in model.subnets)
    for of in (in_call, kept, small, extracts):
        assert min(of["temporary_bytes"], of["code_bytes"], *of["latency_ms"]) > 0
    assert found["ratios"][in_call["name"]]["live"] == pytest.approx(extracts["live_bytes"] / in_call["live_bytes"])
    assert "not measured: fresh weights; sizes are real" in printed
