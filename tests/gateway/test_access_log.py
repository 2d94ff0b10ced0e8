"""The access log: a line for each answer, whatever the disk or the reader does."""

import json
import os
import subprocess
import sys
import threading
import time

import fakes
import gateways
import numpy as np
import pytest
from gateways import INFER, answers, connect, infer, opened, request

from superserve_jax import errors, gateway
from superserve_jax.gateway import access_log
from superserve_jax.gateway.messages import Answer, Request

CONTENT = gateways.body(np.uint8([[[7, 2], [3, 4]]]))
TOKEN = "a-secret-of-many-letters"


def test_the_access_log_has_a_line_for_each_answer(tmp_path):
    file = tmp_path / "access.jsonl"
    with opened(gateway_options={"access_log": str(file), "token": TOKEN}) as (_, door):
        token = {"Authorization": f"Bearer {TOKEN}"}
        traced = {"traceparent": "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"}
        infer(door, CONTENT, **token, **traced)
        request(door, "GET", "/v2?key=secret", **token)
        request(door, "GET", "/nothing", **token)
        infer(door, CONTENT)
        with connect(door) as sock:
            sock.sendall(b"nonsense\r\n\r\n")
            answers(sock)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["method"], line["path"], line["status"], line["received"]) for line in lines] == [
        ("POST", INFER, 200, len(CONTENT)),
        ("GET", "/v2", 200, 0),
        ("GET", "/nothing", 404, 0),
        ("POST", INFER, 401, 0),
        ("", "", 400, 0),
    ]
    assert lines[0]["trace"] == "0af7651916cd43dd8448eb211c80319c"
    assert {line["client"] for line in lines} == {"127.0.0.1"}
    assert all(0 <= line["ms"] < 1e4 and line["sent"] > 80 and abs(line["time"] - time.time()) < 60 for line in lines)
    assert "secret" not in file.read_text()


def test_the_access_log_may_be_the_standard_output(capfd):
    with opened(gateway_options={"access_log": "-"}) as (_, door):
        request(door, "GET", "/v2")
    assert json.loads(capfd.readouterr().out)["path"] == "/v2"


def test_a_full_disk_does_not_stop_the_gateway(caplog):
    with opened(gateway_options={"access_log": "/dev/full"}) as (_, door):
        assert infer(door, CONTENT).status == 200
    assert "1 lines of the access log are lost" in caplog.text


def test_an_access_log_that_cannot_be_written_is_refused(tmp_path):
    with fakes.serve(gateways.engine()) as s, pytest.raises(errors.ConfigError, match="cannot write the access log"):
        gateway.Gateway(s, port=0, access_log=str(tmp_path))


@pytest.fixture
def blocked():
    """The path of a pipe that nobody reads, and that is full."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    try:
        while True:
            os.write(writing, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(writing, True)
    yield f"/proc/self/fd/{writing}"
    os.close(reading)  # ends the write that waits
    os.close(writing)


def test_a_pipe_that_nobody_reads_does_not_keep_a_gateway_open(blocked, caplog):
    with opened(gateway_options={"access_log": blocked}) as (_, door):
        assert infer(door, CONTENT).status == 200
        door.close()
        assert not door.is_open
        assert "nobody reads the access log" in caplog.text
        assert "does not end" not in caplog.text


BLOCKED = """
import os, sys
sys.path[:0] = ["tests/helpers"]
import gateways
reading, writing = os.pipe()
os.dup2(writing, 1)
os.set_blocking(1, False)
try:
    while True:
        os.write(1, b"x")
except BlockingIOError:
    os.set_blocking(1, True)
with gateways.opened(gateway_options={"access_log": "-"}) as (_, door):
    gateways.request(door, "GET", "/v2")
print("ended", file=sys.stderr)
"""


@pytest.mark.slow
def test_a_pipe_that_nobody_reads_does_not_keep_the_process():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], stderr=subprocess.PIPE, text=True, timeout=fakes.WAIT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("ended\n")


def added(log, path):
    made = Request()
    made.method, made.target = "GET", path
    log.add("127.0.0.1", made, Answer(), sent=1, seconds=1.0)


def test_no_line_is_lost_while_lines_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(access_log, "_EVERY_S", 0.0)
    log = access_log.AccessLog(str(tmp_path / "log"))
    count, end_s = 0, time.monotonic() + 0.5
    while time.monotonic() < end_s:
        added(log, b"/%d" % count)
        count += 1
    log.close()
    paths = [json.loads(line)["path"] for line in (tmp_path / "log").read_text().splitlines()]
    assert paths == [f"/{i}" for i in range(count)]


def test_lines_beyond_the_limit_are_counted(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(access_log, "_MOST_LINES", 2)
    log = access_log.AccessLog(str(tmp_path / "log"))
    for i in range(5):
        added(log, b"/%d" % i)
    log.close()
    assert len((tmp_path / "log").read_text().splitlines()) == 2
    assert "3 lines of the access log are lost" in caplog.text


def test_a_closed_log_leaves_no_thread(tmp_path):
    log = access_log.AccessLog(str(tmp_path / "log"))
    log.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "superserve-access-log"]
