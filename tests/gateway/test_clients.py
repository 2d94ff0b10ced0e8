"""NVIDIA's clients, unchanged, against a gateway: tritonclient over HTTP and gRPC, and perf_analyzer. See `make clients`."""

import csv
import time

import clients
import gateways
import grpcs
import pytest
import repositories
from clients import ROOT
from pages import PAGES

pytestmark = clients.needed

SLOW = 99  # as in triton_checks.py
COMMON = ["metadata", "infer", "outputs", "compression", "async_infer", "errors", "timeout", "statistics"]
EXAMPLES = [block.text for page in PAGES for block in page.blocks if "tritonclient" in block.text]


def slow_down(subnet, batch_size, inputs):
    """A hook of the engine: some inputs take long."""
    if any(image[0, 0] == SLOW for image in inputs):
        time.sleep(1.0)


@pytest.fixture(scope="module")
def door():
    with grpcs.opened(gateways.engine(slow_down)) as (_, door):
        yield door


def address(door, kind):
    return door.grpc_target if kind.startswith("grpc") else door.url.removeprefix("http://")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "checks"),
    [("http", ["health", *COMMON]), ("http-aio", ["aio"]), ("grpc", ["health", *COMMON, "stream"]), ("grpc-aio", ["aio"])],
)
def test_tritonclient_works_unchanged(door, kind, checks):
    found = clients.run("python", ROOT / "tests/helpers/triton_checks.py", kind, address(door, kind)).split()
    assert sorted(found) == sorted(checks)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["http", "grpc"])
def test_tritonclient_loads_and_unloads_models(kind, tmp_path):
    with repositories.opened(repositories.write(tmp_path), grpc_port=0) as door:
        found = clients.run("python", ROOT / "tests/helpers/triton_checks.py", f"{kind}-repository", address(door, kind))
    assert found.split() == ["repository"]


@pytest.mark.slow
@pytest.mark.parametrize("options", [("-i", "http"), ("-i", "grpc"), ("-i", "grpc", "--streaming")])
def test_perf_analyzer_measures_the_gateway(door, options, tmp_path):
    table = tmp_path / "table.csv"
    where = ("-m", "supernet", "-u", address(door, options[1]), "-f", table)
    clients.run("perf_analyzer", *where, *options, "--concurrency-range", "2", "--request-count", "200")
    with table.open() as file:
        [row] = csv.DictReader(file)
    assert float(row["Inferences/Second"]) > 0
    assert float(row["Server Compute Infer"]) > 0


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(tmp_path):
    [code] = EXAMPLES
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    with gateways.opened(gateways.engine(input_shape=(32, 32, 1)), gateway_options={"grpc_port": 0, "name": "digits"}) as (
        _,
        door,
    ):
        assert "localhost:8001" in code
        program = tmp_path / "example.py"
        program.write_text(code.replace("localhost:8001", door.grpc_target))
        assert clients.run("python", program) == "(2, 2) True\n"
