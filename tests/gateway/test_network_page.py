"""What docs/network.md and docs/grpc.md say about the gateway: paths, calls, statuses, limits, and the requests with curl."""

import dataclasses
import pathlib
import re
import shutil
import subprocess
import urllib.request

import fakes
import gateways
import numpy as np
import pytest
from gateways import opened, request

import superserve_jax
from superserve_jax.gateway import Limits
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.grpc import statuses
from superserve_jax.gateway.grpc.service import Service
from superserve_jax.gateway.grpc.standard import Health, reflection
from superserve_jax.gateway.threads import LongWork

ROOT = pathlib.Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "network.md").read_text()
GRPC_PAGE = (ROOT / "docs" / "grpc.md").read_text()
TABLES = {
    table.partition("\n")[0]: [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    for table in re.findall(r"(?:^\|.*\n)+", PAGE + GRPC_PAGE, re.MULTILINE)
}
PATHS, STATUSES = TABLES["| path | method | answer |"], TABLES["| status | when |"]
LIMITS = TABLES["| flag | default | meaning |"]
SERVICES, GRPC_STATUSES = TABLES["| service | calls |"], TABLES["| status | HTTP | when |"]


@pytest.fixture(scope="module")
def door():
    engine = gateways.engine(input_shape=(32, 32, 1))
    with fakes.serve(engine, policy="fixed:2") as s, gateways.gateway.Gateway(s, port=0, name="digits") as door:
        yield door


def test_every_path_is_there(door):
    # An empty request, and paths that only --demo and --models open.
    others = {"/v2/models/digits/infer": 400, "/demo": 404, "/v2/repository/models/digits/load": 400}
    for cell, method, _ in PATHS:
        path = cell.strip("`").replace("NAME", "digits")
        if path == "/events":  # an endless answer
            with urllib.request.urlopen(door.url + path, timeout=5) as answer:
                assert answer.status == 200
        else:
            answer = request(door, method, path, b"" if method == "POST" else None)
            assert answer.status == others.get(path, 200), path


def test_every_status_is_in_the_table():
    sources = "".join(path.read_text() for path in pathlib.Path(superserve_jax.__file__).parent.glob("gateway/*.py"))
    known = {*re.findall(r"status=(\d{3})", sources), *re.findall(r"Error, (\d{3})\)", sources), "400", "500"}
    assert {status for status, _ in STATUSES} == known


def test_every_call_of_grpc_is_in_the_table(door):
    inference = Service(door.models, Limits(), LongWork())
    paths = {*inference.methods(), *Health(inference, door.models).methods(), *reflection("v1", 1.0)}
    told = {f"/{service.split('`')[1]}/{call}" for service, calls in SERVICES for call in re.findall(r"`([A-Z]\w+)`", calls)}
    assert {path.replace(".v1.ServerReflection", ".v1") for path in paths} == told


def test_every_status_of_grpc_has_its_status_of_http():
    for code, status, _ in GRPC_STATUSES:
        assert statuses.code_of(RequestError("wrong", status=int(status))).name == code.strip("`")
    assert {status for _, status, _ in GRPC_STATUSES} < {status for status, _ in STATUSES}


def test_every_limit_has_its_default():
    shown = {"64 KiB": 64 << 10, "256 MiB": 256 << 20, "by input": None}
    found = {f.name: f.default for f in dataclasses.fields(Limits)}
    told = {flag.strip("`").removeprefix("--").replace("-", "_"): default for flag, default, _ in LIMITS}
    assert {k: shown[v] if v in shown else float(v.replace(",", "")) for k, v in told.items()} == found


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl")
def test_the_requests_with_curl_are_answered(door, tmp_path):
    [block] = [block for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) if "image.bin" in block]
    script = block.replace("localhost:8000", door.url.removeprefix("http://")).replace("curl ", "curl -sSf ")
    done = subprocess.run(["bash", "-e", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert '"datatype":"FP32","shape":[1, 2],"data":[0.0,2.0]' in done.stdout
    assert '"inference_count":' in done.stdout
    head, _, data = (tmp_path / "answer.bin").read_bytes().partition(b"}]}")
    assert head.startswith(b'{"model_name":"digits"')
    assert np.frombuffer(data, np.float32).tolist() == [0, 2]


def test_the_other_forms_of_a_name_are_there():
    with opened() as (_, door):
        assert request(door, "GET", "/v2/models/supernet/versions/1/config").status == 200
