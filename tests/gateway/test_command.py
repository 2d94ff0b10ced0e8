"""`superserve serve`: it opens the port when the engines are warm, and SIGTERM loses no request."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading

import gateways
import jax
import pytest
from fakes import WAIT_S
from program import ROOT
from tiny import TINY, random_images, write_export

from superserve_jax import exports
from superserve_jax.engines import keys
from superserve_jax.profile import Profile, Row

CLIENTS = 4


@pytest.fixture
def started(tiny, tmp_path):
    """Starts the program on a tiny export. Yields the process, and its address."""
    path = write_export(tmp_path / "mine" / "export", tiny, tiny.calibrated[:1])
    kind, [served] = keys.device_kind(jax.devices()[0]), exports.load(path).served
    Profile((1,), (Row(served.subnet, served.accuracy, (1.0,)),), kind).save(exports.profile_path(path, kind))
    command = [sys.executable, "serve/gateway.py", str(path), "--port", "0", "--batch-sizes", "1", "--slo-ms", "500"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env={**os.environ, "SUPERSERVE_CACHE": ""}, **pipes) as process:
        try:
            line = process.stdout.readline()
            yield process, re.search(r"at (\S+)/v2/models/mine ", line)[1]
        finally:
            process.kill()


def send_until_refused(url, answers, wrong, stopping):
    """Sends requests on one connection after the other, until the port is closed. Collects the answers, and what went wrong.

    When the port closes, the system resets connections that the gateway has not accepted yet.
    """
    address, body = url.removeprefix("http://"), gateways.body(random_images(TINY, 1))
    closed = False
    while not closed:
        with contextlib.closing(http.client.HTTPConnection(address, timeout=WAIT_S)) as connection:
            count, last = 0, False
            try:
                while not last:
                    connection.request("POST", "/v2/models/mine/infer", body)
                    response = connection.getresponse()
                    content, last = json.loads(response.read()), response.getheader("connection") == "close"
                    answers.append((response.status, *(len(output["data"]) for output in content.get("outputs", []))))
                    count += 1
            except ConnectionError as error:
                closed = True
                if count or not stopping.is_set():
                    wrong.append(error)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_under_load_without_a_lost_request(started, number):
    process, url = started
    answers, wrong, stopping = [], [], threading.Event()
    arguments = url, answers, wrong, stopping
    clients = [threading.Thread(target=send_until_refused, args=arguments) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    while len(answers) < 100:
        assert process.poll() is None
    stopping.set()
    process.send_signal(number)
    out, err = process.communicate(timeout=WAIT_S)
    for client in clients:
        client.join()
    assert process.returncode == 0, err
    assert not wrong
    assert set(answers) == {(200, TINY.num_classes)}
    assert f"ended after {len(answers):,} answers" in out
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not an export"),
        (["digits", "--slo-ms", "0"], "slo_ms must be a positive"),
        (["digits", "--port", "70000"], "cannot listen"),
    ],
)
def test_a_wrong_option_ends_it_with_one_line(run_program, arguments, message):
    before = signal.getsignal(signal.SIGTERM)
    error = run_program("serve/gateway.py", *arguments, status=2).stderr
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before
