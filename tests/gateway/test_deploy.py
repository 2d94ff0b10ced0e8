"""The files in docs/deploy: the board names metrics that exist, and the commands in Dockerfile and YAML parse.

Nothing is built or deployed here.
"""

import itertools
import json
import re
import shlex
import shutil
import subprocess

import gateways
import numpy as np
import pytest
import tyro
import yaml
from fakes import WAIT_S
from program import ROOT
from prometheus_client import parser

from superserve_jax.commands.serve import Options

FOLDER = ROOT / "docs" / "deploy"
BOARD = json.loads((FOLDER / "grafana.json").read_text())
PANELS = BOARD["panels"]
RUNTIME, SERVICE = yaml.safe_load_all((FOLDER / "kserve.yaml").read_text())
METRIC = re.compile(r"(superserve_\w+)(?:\{(.*?)\})?")


@pytest.fixture(scope="module")
def samples():
    """The labels of each sample that a gateway exports after a query."""
    with gateways.opened() as (server, door):
        server.submit(np.zeros((2, 2), np.uint8)).result(WAIT_S)
        text = gateways.request(door, "GET", "/metrics").content.decode()
    return {s.name: {*s.labels} for family in parser.text_string_to_metric_families(text) for s in family.samples}


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: f"{panel['type']}: {panel['title']}")
def test_a_panel_names_metrics_and_labels_that_exist(panel, samples):
    assert panel["targets"]
    for target in panel["targets"]:
        found = METRIC.findall(target["expr"])
        assert found
        for name, matchers in found:
            assert name in samples
            assert {*re.findall(r"(\w+)(?:=~?|!=)\"", matchers)} <= samples[name]
            assert 'model=~"$model"' in matchers
        shown = re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
        assert all(label in samples[found[0][0]] for label in shown)


def test_the_board_is_complete():
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    assert [variable["name"] for variable in BOARD["templating"]["list"]] == ["source", "model"]
    assert {panel["datasource"]["uid"] for panel in PANELS} == {"${source}"}


def test_no_panel_covers_another_one():
    def cells(panel):
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        return {*itertools.product(range(at["x"], at["x"] + at["w"]), range(at["y"], at["y"] + at["h"]))}

    taken = [cells(panel) for panel in PANELS]
    assert len(set.union(*taken)) == sum(map(len, taken))


def instructions():
    """The instructions of the Dockerfile: (name, arguments)."""
    lines = [line for line in (FOLDER / "Dockerfile").read_text().splitlines() if line and not line.startswith("#")]
    return [tuple(line.split(" ", 1)) for line in "\n".join(lines).replace("\\\n", " ").splitlines()]


def test_the_image_starts_the_gateway():
    found = dict(instructions())
    assert instructions()[0][0] == "FROM"
    assert re.fullmatch(r"python:3\.\d+-slim", found["FROM"])
    assert found["USER"].isdecimal()  # Kubernetes refuses a name if the container must not run as root
    assert json.loads(found["ENTRYPOINT"]) == ["superserve", "serve"]
    options = tyro.cli(Options, args=json.loads(found["CMD"]))
    assert (options.exports, options.host) == (("digits",), "0.0.0.0")
    assert f"{options.port} {options.grpc_port}" == found["EXPOSE"]
    assert f":{options.port}/v2/health/ready" in found["HEALTHCHECK"]


def test_the_image_copies_files_that_exist():
    copied = [shlex.split(rest) for name, rest in instructions() if name == "COPY"]
    assert copied
    for *sources, target in copied:
        assert target.startswith("/src/")
        assert all((ROOT / source).exists() for source in sources)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="needs hadolint")
def test_hadolint_finds_nothing():
    subprocess.run(["hadolint", str(FOLDER / "Dockerfile")], check=True)


def test_kserve_starts_the_gateway():
    assert (RUNTIME["kind"], SERVICE["kind"]) == ("ServingRuntime", "InferenceService")
    [container] = RUNTIME["spec"]["containers"]
    assert container["name"] == "kserve-container"
    options = tyro.cli(Options, args=[arg.replace("{{.Name}}", "digits") for arg in container["args"]])
    assert (options.exports, options.host) == (("digits=/mnt/models",), "0.0.0.0")
    assert [port["containerPort"] for port in container["ports"]] == [options.port]
    for probe, path in (("startupProbe", "ready"), ("readinessProbe", "ready"), ("livenessProbe", "live")):
        assert container[probe]["httpGet"] == {"path": f"/v2/health/{path}", "port": options.port}
    assert {mount["name"] for mount in container["volumeMounts"]} == {each["name"] for each in RUNTIME["spec"]["volumes"]}
    predictor = SERVICE["spec"]["predictor"]
    limits = options.limits
    assert predictor["terminationGracePeriodSeconds"] > limits.lame_duck_s + limits.drain_s
    model = predictor["model"]
    assert model["runtime"] == RUNTIME["metadata"]["name"]
    assert model["modelFormat"]["name"] in {each["name"] for each in RUNTIME["spec"]["supportedModelFormats"]}
    assert model["protocolVersion"] in RUNTIME["spec"]["protocolVersions"]
