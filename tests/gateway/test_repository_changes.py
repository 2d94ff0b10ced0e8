"""Models are loaded again, and loaded or unloaded while others are served, clients leave, or the gateway closes."""

import asyncio
import shutil

import fakes
import gateways
import numpy as np
from gateways import connect, infer, request
from repositories import Background, Opener, change, opened, states

from superserve_jax import files
from superserve_jax.gateway.repository import Repository
from superserve_jax.manifest import read_manifest
from superserve_jax.serving.server import Server

ROW = np.uint8([[[7, 2], [3, 4]]])
CONTENT = gateways.body(ROW)
FIRST = "/v2/models/first/infer"


def test_a_load_disturbs_no_other_model(folder):
    opener = Opener()
    with opened(folder, opener, servers=["other"]) as door, opener.shut(), Background(change, door, "first") as load:
        assert opener.entered.wait(fakes.WAIT_S)
        assert states(door)["first"] == "LOADING"
        assert infer(door, CONTENT, "/v2/models/other/infer").status == 200
        assert infer(door, CONTENT, FIRST).status == 404
        assert request(door, "GET", "/v2/health/ready").status == 200
        opener.gate.set()
    assert load.result.status == 200


def test_a_second_load_waits_for_the_first_one(folder):
    opener = Opener()
    with opened(folder, opener) as door:
        with opener.shut(), Background(change, door, "first") as first, Background(change, door, "first") as second:
            assert opener.entered.wait(fakes.WAIT_S)
            opener.gate.set()
        assert [first.result.status, second.result.status] == [200, 200]
        assert len(opener.opened) == 1


def test_a_load_goes_on_if_its_client_goes_away(folder):
    opener = Opener()
    with opened(folder, opener) as door, opener.shut():
        with connect(door) as sock:
            sock.sendall(b"POST /v2/repository/models/first/load HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n")
            assert opener.entered.wait(fakes.WAIT_S)
        opener.gate.set()
        fakes.wait_until(lambda: states(door)["first"] == "READY")


def test_what_still_waits_is_dropped_if_its_client_goes_away(folder):
    opener = Opener()

    async def run():
        models = Repository({}, str(folder), opener, may_change=True)
        await models.load("first", {})
        with opener.shut():
            second = asyncio.create_task(models.load("second", {}))
            assert await asyncio.to_thread(opener.entered.wait, fakes.WAIT_S)
            again = asyncio.create_task(models.load("first", {}))
            while "LOADING" not in [entry["state"] for entry in await models.index() if entry["name"] == "first"]:
                await asyncio.sleep(0.01)
            unload = asyncio.create_task(models.unload("first", {}))
            await asyncio.sleep(0)
            unload.cancel()
        await asyncio.gather(second, again)
        assert {*models} == {"first", "second"}
        models.close()

    asyncio.run(run())


def test_the_gateway_closes_during_a_load(folder):
    opener = Opener()
    with opened(folder, opener, servers=["other"]) as door, opener.shut():
        with Background(change, door, "first") as first, Background(change, door, "second") as second:
            assert opener.entered.wait(fakes.WAIT_S)
            fakes.wait_until(lambda: [*states(door).values()] == ["LOADING", "READY", "LOADING"])
            door.close()
        assert [each.result.status for each in (first, second)] == [503, 503]
        assert "shutting down" in first.result.error
        opener.gate.set()
        fakes.wait_until(lambda: opener.opened and opener.opened[0].health()["closed"])
    assert len(opener.opened) == 1


def test_an_unload_answers_the_queries_that_were_accepted(folder):
    valve = gateways.Valve()
    opener = Opener(valve)
    with opened(folder, opener) as door:
        change(door, "first")
        [server] = opener.opened
        with valve.shut(server, ROW[0]), Background(infer, door, CONTENT, FIRST) as waiting:
            fakes.wait_until(lambda: server.health()["waiting"] == 1)
            with Background(change, door, "first", "unload") as unload:
                fakes.wait_until(lambda: states(door)["first"] == "UNLOADING")
                assert infer(door, CONTENT, FIRST).status == 404
                assert unload.is_running
                valve.open()
        assert (waiting.result.status, unload.result.status) == (200, 200)
        assert server.health()["closed"]


def test_models_that_are_loaded_at_once_are_all_there(folder):
    opener = Opener()
    with opened(folder, opener, servers=["other"]) as door:
        with opener.shut(), Background(change, door, "first") as first, Background(change, door, "second") as second:
            fakes.wait_until(lambda: [*states(door).values()] == ["LOADING", "READY", "LOADING"])
            assert change(door, "other", "unload").status == 200
            opener.gate.set()
        assert [first.result.status, second.result.status] == [200, 200]
        assert {*door.models} == {"first", "second"}


def test_a_link_that_leads_to_another_export_is_like_a_changed_export(folder, tmp_path, monkeypatch):
    exports, link, swapped = tmp_path / "exports", tmp_path / "exports" / "live", []
    shutil.copytree(folder / "first", exports / "first")
    shutil.copytree(folder / "first", exports / "second")
    changed = {**read_manifest(exports / "second"), "training": {"lr": 7}}
    files.write_json(exports / "second" / "manifest.json", {**changed, "sha256": files.digest(changed)})
    link.symlink_to("first")
    monkeypatch.setattr(Server, "swap", lambda _, path: swapped.append(path.name))
    with opened(exports) as door:
        for target, expected in (("first", []), ("first", []), ("second", ["second"])):
            link.unlink()
            link.symlink_to(target)
            assert change(door, "live").status == 200
            assert swapped == expected
        link.unlink()
        link.symlink_to(folder / "second")  # below another folder
        assert change(door, "live").status == 404
