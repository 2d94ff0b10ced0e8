"""serve/ray_app.py: its replicas without Ray Serve, and the whole program with it."""

import asyncio
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request

import numpy as np
import pytest
from pages import ROOT

from superserve_jax import errors
from superserve_jax.remote.calls import About, Answers, RouterLostError
from superserve_jax.remote.host import Failed
from superserve_jax.remote.packing import unpack
from superserve_jax.serving.futures import Reply
from superserve_jax.subnet import Subnet

SUBNETS = Subnet((1,)), Subnet((2,))


@pytest.fixture(scope="module")
def app():
    pytest.importorskip("httptools", reason="needs the extra serve")
    spec = importlib.util.spec_from_file_location("ray_app", ROOT / "serve" / "ray_app.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


class Cell:
    """A router that answers with twice the input, and fails for 9."""

    name, gone, opened = "cell", False, "None"

    async def about(self):
        return About((2,), "<i4", (), 100, SUBNETS, self.opened)

    async def infer(self, parts):
        if self.gone:
            raise RouterLostError("gone")
        failed = Failed.of(errors.InferenceError("bad"))
        reply = Reply(None, SUBNETS[1], 0.75, True, 3.0, 1.0, 2.0, 4)
        found = [x for part in parts for x in unpack(part.inputs)]
        return Answers.of([failed if x[0] == 9 else reply._replace(output=np.float32(2 * x)) for x in found])


def asked(app, *requests, cell=None, others=()):
    """The statuses, headers and bodies of the answers to requests (method, path, headers, body)."""

    async def ask():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(app, "routers", lambda options, open_server: [cell or Cell(), *others])
            replica = app.Ingress.__new__(app.Ingress)
            await replica.__init__(app.Options(name="small", slo_ms=1_000), None)
        return [await call(replica, *request) for request in requests]

    async def call(replica, method, path, headers, body):
        async def read():
            return body

        url, raw = types.SimpleNamespace(path=path), types.SimpleNamespace(raw=list(headers.items()))
        return await replica(types.SimpleNamespace(method=method, url=url, headers=raw, body=read))

    class Response(tuple):
        def __new__(cls, body, status, headers):
            return super().__new__(cls, (status, headers, body))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "starlette", types.ModuleType("starlette"))
        patch.setitem(sys.modules, "starlette.responses", types.SimpleNamespace(Response=Response))
        return asyncio.run(ask())


def body(*rows, **parameters):
    given = {"name": "input", "datatype": "INT32", "shape": [len(rows), 2], "data": rows}
    return json.dumps({"inputs": [given], "parameters": parameters}).encode()


INFER = "POST", "/v2/models/small/infer"


def test_a_replica_answers_as_the_gateway_does(app):
    [(status, headers, content)] = asked(app, (*INFER, {}, body([1, 2], [3, 4])))
    answer = json.loads(content)
    assert (status, headers["content-type"]) == (200, "application/json")
    assert answer["outputs"] == [{"name": "output", "datatype": "FP32", "shape": [2, 2], "data": [2, 4, 6, 8]}]
    assert answer["parameters"]["subnet"] == "1,1"
    assert answer["parameters"]["met_slo"] is True


def test_a_replica_takes_raw_bytes(app):
    raw = {b"inference-header-content-length": b"0"}
    [(status, headers, content)] = asked(app, (*INFER, raw, np.int32([5, 6]).tobytes()))
    assert status == 200
    assert np.frombuffer(content[int(headers["inference-header-content-length"]) :], np.float32).tolist() == [10, 12]


@pytest.mark.parametrize(
    ("request_", "status", "text"),
    [
        ((*INFER, {}, b"{}"), 400, "is not an inference request"),
        ((*INFER, {}, body([1, 2], slo_ms=-1)), 400, "slo_ms must be a positive"),
        ((*INFER, {b"content-encoding": b"gzip"}, b""), 415, "Content-Encoding"),
        ((*INFER, {}, body([1, 2], [9, 9])), 500, ""),
        (("POST", "/v2/other", {}, b""), 405, "POST to /v2/models/small/infer"),
        (("GET", "/v2/other", {}, b""), 404, "no path '/v2/other'"),
    ],
)
def test_a_wrong_request_gets_its_status_and_a_reason(app, request_, status, text):
    [(found, _, content)] = asked(app, request_)
    assert found == status
    assert text in json.loads(content)["error"]


def test_a_replica_is_ready_as_long_as_a_router_answers(app):
    cell, ready = Cell(), ("GET", "/v2/health/ready", {}, b"")
    assert [found[0] for found in asked(app, ready, ("GET", "/v2/models/small", {}, b""))] == [200, 200]
    cell.gone = True
    assert [found[0] for found in asked(app, (*INFER, {}, body([1, 2])), ready, cell=cell)] == [503, 503]


class Broken(Cell):
    """A router without a server."""

    async def about(self):
        raise errors.ExportError("no such export")

    async def infer(self, parts):
        raise AssertionError("a query for a router without a server")


class Slow(Broken):
    async def about(self):
        await asyncio.Event().wait()


def test_one_router_is_enough_to_begin_with(app):
    others = Broken(), Slow()
    assert {found[0] for found in asked(app, *[(*INFER, {}, body([1, 2]))] * 5, others=others)} == {200}
    with pytest.raises(errors.ConfigError, match="no server could be opened: no such export"):
        asked(app, cell=Broken())


def test_routers_of_another_export_are_not_used(app):
    cell = Cell()
    cell.opened = "another export"
    with pytest.raises(errors.ConfigError, match=r"have opened another export, and not None; run this first: .* --stop"):
        asked(app, cell=cell)


def test_arguments_of_serve_run_are_those_of_the_program(app, monkeypatch):
    monkeypatch.setattr(app, "bound", lambda options, open_server: options)
    assert app.app({"export": "digits", "cells": "2", "wait_ms": "1.5"}) == app.Options("digits", cells=2, wait_ms=1.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cell": "4"}, "unknown argument of the app 'cell': did you mean 'cells'"),
        ({"exprt": "runs/x"}, "unknown argument of the app 'exprt': did you mean 'export'"),
        ({"port": "9000"}, "unknown argument of the app 'port'"),
        ({"cells": "two"}, "an argument of the app is not possible .*cells"),
        ({"wait_ms": "-3"}, "wait_ms must be a finite number from 0 up, got -3"),
        ({"num_cpus": "nan"}, "num_cpus must be a finite number from 0 up, got nan"),
        ({"num_gpus": "-1"}, "num_gpus must be a finite number from 0 up, got -1"),
    ],
)
def test_wrong_arguments_of_serve_run_are_refused(app, monkeypatch, arguments, message):
    monkeypatch.setattr(app, "bound", lambda options, open_server: options)
    with pytest.raises(errors.SuperServeError, match=message):
        app.app(arguments)


@pytest.mark.slow
def test_the_whole_program_answers_over_http(tmp_path):
    pytest.importorskip("ray.serve", reason="needs Ray Serve: pip install 'ray[serve]'", exc_type=ImportError)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = (sys.executable, "serve/ray_app.py", "digits", "--cells", "2", "--port", str(port))
    with open(tmp_path / "out", "w+") as out, subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out) as program:
        while '"port"' not in (tmp_path / "out").read_text():
            assert program.poll() is None, (tmp_path / "out").read_text()
            time.sleep(0.1)
        given = {"name": "input", "datatype": "UINT8", "shape": [1, 32, 32, 1], "data": [0] * 1024}
        url = f"http://127.0.0.1:{port}/v2/models/supernet/infer"
        with urllib.request.urlopen(url, json.dumps({"inputs": [given]}).encode(), timeout=30) as response:
            assert len(json.load(response)["outputs"][0]["data"]) == 10
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/nothing", timeout=30)
        program.send_signal(signal.SIGTERM)
        assert program.wait(60) == 0
