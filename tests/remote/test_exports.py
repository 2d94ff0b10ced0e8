"""A server on actors of Ray that open an export: logits, swaps, another router, and what is refused."""

import asyncio
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
from typing import Any

import actors
import jax
import numpy as np
import pytest
from pages import ROOT
from tiny import TINY, random_images, random_params, random_statistics, write_export

import superserve_jax as ss
from superserve_jax import errors, exports, machine, remote
from superserve_jax.profile import Profile, Row
from superserve_jax.serving.makers import Source
from superserve_jax.supernets.supernet import SuperNet

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("cluster", "quick_compilation", "module_cache")]

WAIT_S = 60.0
ROUTER = """
import json, os, pathlib, sys
sys.modules["jax"] = None  # a router needs no jax
import numpy as np, ray
import superserve_jax as ss

address, before, path, images = sys.argv[1:]
ray.init(address, log_to_driver=False, logging_level=40)
server = ss.Server(before, devices=ss.ray_devices(1, name="kept", num_cpus=0), policy="fixed:0", slo_ms=60_000.0)
server.swap(path)
outputs = [future.result(60.0).output.tolist() for future in server.submit_many(list(np.load(images)))]
print(json.dumps([server.pool.members.workers[0].engine.pid, outputs]), flush=True)
os._exit(9)
"""


def export_of(folder, seed, config=TINY):
    """A tiny export with a profile of this machine."""
    chosen = [config.space().smallest(), config.space().largest()]
    statistics = {s: random_statistics(config, s) for s in chosen}
    path = write_export(folder, SuperNet(config, random_params(config, seed), statistics))
    kind = machine.device_kind(jax.devices()[0])
    rows = tuple(Row(s, 0.5 + 0.1 * i, (5.0 + i, 9.0 + i)) for i, s in enumerate(chosen))
    Profile((1, 4), rows, kind).save(exports.profile_path(path, kind))
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return [export_of(tmp_path_factory.mktemp("exports") / f"export{seed}", seed) for seed in (0, 1)]


def assert_answers(found, path, images):
    """Checks outputs of the smallest subnet."""
    model = ss.load(path)
    np.testing.assert_allclose(found, model(images, model.subnets[0]), rtol=1e-4, atol=1e-4)


def engine_of(server) -> Any:
    return server.pool.members.workers[0].engine


def outputs(server, images):
    return [f.result(WAIT_S).output for f in server.submit_many(images)]


def test_a_real_export_gives_the_logits_of_a_local_engine_also_after_a_swap_and_a_kill(paths, tmp_path):
    images = random_images(TINY, 24)
    other_inputs = dataclasses.replace(TINY, image_size=TINY.image_size + 4)
    first, second = paths
    with ss.Server(first, devices=ss.ray_devices(1, num_cpus=0), policy="fixed:0", slo_ms=60_000.0) as s:
        assert s.model is None
        assert_answers(outputs(s, images), first, images)
        s.swap(second)
        with pytest.raises(errors.ConfigError, match="they must agree"):
            s.swap(export_of(tmp_path / "other", 0, other_inputs))
        assert_answers(outputs(s, images), second, images)
        [name] = [w["name"] for w in s.health()["per_worker"]]
        os.kill(engine_of(s).pid, signal.SIGKILL)
        assert_answers(outputs(s, images), second, images)
        assert [w["name"] for w in s.health()["per_worker"] if w["state"] != "lost"] == [name]
        with pytest.raises(errors.ConfigError, match=r"expected an engine or ss\.ray_device"):
            s.add_worker(jax.devices()[0])


def test_an_actor_beside_a_device_of_this_process(paths, monkeypatch):
    images = random_images(TINY, 24)
    monkeypatch.chdir(paths[0].parent)
    with ss.Server(paths[0].name, devices=jax.devices()[:1], policy="fixed:0", slo_ms=60_000.0) as s:
        name = s.add_worker(ss.ray_device(num_cpus=0))
        for path in paths:
            if path is paths[1]:
                s.swap(path)
            assert_answers(outputs(s, images), path, images)
        [first, second] = s.pool.members.workers
        s.remove_worker(first.name)
        assert second.name == name
        assert_answers(outputs(s, images), paths[1], images)


def test_a_second_router_takes_over_the_engines_of_one_that_died(paths, cluster, tmp_path):
    import ray

    images = random_images(TINY, 6)
    np.save(tmp_path / "images.npy", images)
    command = [sys.executable, "-c", ROUTER, cluster, str(paths[1]), str(paths[0]), str(tmp_path / "images.npy")]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 9, first.stderr
    pid, found = json.loads(first.stdout.splitlines()[-1])
    assert_answers(found, paths[0], images)

    [device] = ss.ray_devices(1, name="kept", num_cpus=0)
    held = ray.get(device.actor.keys.remote())
    with ss.Server(paths[0], devices=[device], policy="fixed:0", slo_ms=60_000.0) as s:
        engine = engine_of(s)
        assert engine.pid == pid
        [key] = ray.get(device.actor.keys.remote())
        assert key in held, "the engine was made again"
        assert_answers(outputs(s, images), paths[0], images)
    ray.kill(device.actor)


def test_a_router_that_is_an_actor_itself(paths):
    images = random_images(TINY, 24)
    opening = functools.partial(
        remote.open_cell, paths[0], 1, device={"num_cpus": 0}, policy="fixed:0", slo_ms=60_000.0
    )  # no named actors, so they end with the router
    router = remote.start_router(opening)

    async def answers():
        replies = await remote.Collector([router], slo_ms=60_000.0).submit_many(list(images))
        return [reply.output for reply in replies], (await router.about()).subnets

    found, subnets = asyncio.run(answers())
    assert_answers(found, paths[0], images)
    assert subnets == tuple(ss.load(paths[0]).subnets)


def test_an_export_that_differs_on_the_host_is_refused(paths):
    with pytest.raises(errors.ExportError, match="is another export"):
        ss.ray_device(num_cpus=0).make_engine(Source.of(paths[0], "0" * 64))


EXAMPLES = {
    "several_hosts.py": {"15, num_gpus=1": "1, num_cpus=0", "num_gpus=1": "num_cpus=0", "(32, 32, 1)": "SHAPE"},
    "cell.py": {
        "8, name=": "1, name=",
        "num_gpus=1": "num_cpus=0",
        'host="0.0.0.0"': "port=0",
        "signal.sigwait({signal.SIGTERM})": "ray.kill(devices[0].actor)",
    },
    "collector.py": {"8, device": "1, device", "num_gpus": "num_cpus", "range(2)": "range(1)", "32, 32, 1": "*SHAPE"},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_of_the_page_runs(name, paths, tmp_path, monkeypatch, capsys):
    if name == "cell.py":
        pytest.importorskip("httptools")
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "export").symlink_to(paths[0])
    monkeypatch.chdir(tmp_path)
    code = (ROOT / "docs" / "examples" / name).read_text()
    for text, small in {'ray.init("auto")': "", "runs/demo": f"{tmp_path}/runs/demo", **EXAMPLES[name]}.items():
        assert text in code
        code = code.replace(text, small)
    exec(code, {"SHAPE": (TINY.image_size, TINY.image_size, TINY.channels)})
    assert capsys.readouterr().out.startswith(("Reply(", "http://"))
    remote.stop_router("cell-0")


def test_a_model_instead_of_a_path_is_refused(paths):
    with pytest.raises(errors.ConfigError, match=r"give model\.path"):
        ss.Server(ss.load(paths[0]), devices=ss.ray_devices(1, num_cpus=0))


def test_versions_that_differ_are_refused_by_name(monkeypatch):
    monkeypatch.setattr("superserve_jax.remote.host.versions", lambda: {"superserve-jax": "9.9"})
    with pytest.raises(errors.ConfigError, match=r"has superserve-jax 0\.1\.0, this process has 9\.9"):
        ss.ray_device(num_cpus=0).make_engine(actors.Fake())
