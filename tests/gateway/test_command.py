"""`superserve serve`: it opens the port when the engines are warm, and SIGTERM loses no request."""

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import fakes
import gateways
import jax
import pytest
from fakes import WAIT_S
from program import ROOT
from tiny import TINY, random_images, write_export

from superserve_jax import exports, machine
from superserve_jax.commands import serve
from superserve_jax.engines import prepare
from superserve_jax.profile import Profile, Row

CLIENTS = 4


@pytest.fixture
def path(tiny, tmp_path):
    """A tiny export with a latency profile."""
    path = write_export(tmp_path / "mine" / "export", tiny, tiny.calibrated[:1])
    kind, [served] = machine.device_kind(jax.devices()[0]), exports.load(path).served
    Profile((1,), (Row(served.subnet, served.accuracy, (1.0,)),), kind).save(exports.profile_path(path, kind))
    return path


@contextlib.contextmanager
def program(*arguments):
    """Starts the program. Yields the process, and the first line that it prints."""
    command = [sys.executable, "serve/gateway.py", *map(str, arguments), "--port", "0", "--grpc-port", "0", "--slo-ms", "500"]
    command += ["--batch-sizes", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "SUPERSERVE_CACHE": ""}
    with subprocess.Popen(command, cwd=ROOT, env=environment, **pipes) as process:
        try:
            yield process, process.stdout.readline()
        finally:
            process.kill()


def send_until_refused(url, answers, wrong, stopping):
    """Sends requests on one connection after the other, until the port is closed. Collects answers and errors.

    The system may reset a connection that opens while the port closes.
    """
    address, body = url.removeprefix("http://"), gateways.body(random_images(TINY, 1))
    closed = False
    while not closed:
        with contextlib.closing(http.client.HTTPConnection(address, timeout=WAIT_S)) as connection:
            last, opens_late = False, stopping.is_set()
            try:
                while not last:
                    connection.request("POST", "/v2/models/mine/infer", body)
                    response = connection.getresponse()
                    content, last = json.loads(response.read()), response.getheader("connection") == "close"
                    answers.append((response.status, *(len(output["data"]) for output in content.get("outputs", []))))
                    opens_late = False
            except ConnectionError as error:
                closed = True
                if not (opens_late or (isinstance(error, ConnectionRefusedError) and stopping.is_set())):
                    wrong.append(error)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_under_load_without_a_lost_request(path, number):
    with program(path) as (process, line):
        check_that_it_ends(process, re.search(r"at (\S+)/v2/models/mine ", line)[1], number)


def check_that_it_ends(process, url, number):
    answers, wrong, stopping = [], [], threading.Event()
    arguments = url, answers, wrong, stopping
    clients = [threading.Thread(target=send_until_refused, args=arguments) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    fakes.wait_until(lambda: len(answers) >= 100 or process.poll() is not None)
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


SWALLOWS = """
import time

def policy(profile, state):
    pass

print("starting", flush=True)
try:
    time.sleep(60)
except Exception:
    pass
"""


DROPS = """
import gc
import os
import signal

def policy(profile, state):
    pass

def collected(*_):
    gc.callbacks.remove(collected)
    os.kill(os.getpid(), signal.SIGTERM)
    for _ in range(100):
        pass

print("starting", flush=True)
gc.callbacks.append(collected)
gc.collect()
"""


@pytest.mark.slow
@pytest.mark.parametrize("code", [SWALLOWS, DROPS])
def test_a_signal_ends_it_while_it_starts(path, tmp_path, code):
    (tmp_path / "slow.py").write_text(code)
    with program(path, "--policy", f"{tmp_path}/slow.py:policy") as (process, line):
        assert line == "starting\n"
        if code == SWALLOWS:
            process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=WAIT_S)
    assert (process.returncode, out) == (0, "ended before the port was open\n"), err
    assert ("Exception ignored in" if code == DROPS else "") in err
    assert ("Traceback" in err) == (code == DROPS)  # Python prints the error that it drops


SLEEPS = """
import pathlib
import time

def policy(profile, state):
    pass

if (pathlib.Path(__file__).parent / "sleeps").exists():
    print("sleeping", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_models_are_loaded_while_it_runs_and_a_signal_ends_it_during_a_load(path, tmp_path):
    for name in ("one", "other"):
        shutil.copytree(path, tmp_path / "exports" / name)
    (tmp_path / "slow.py").write_text(SLEEPS)

    def load(name):
        with contextlib.suppress(ConnectionError), contextlib.closing(http.client.HTTPConnection(address)) as connection:
            connection.request("POST", f"/v2/repository/models/{name}/load")
            found.append(connection.getresponse().status)

    with program("--models", tmp_path / "exports", "--policy", f"{tmp_path}/slow.py:policy") as (process, line):
        assert line.startswith(f"clients may load the exports in {tmp_path / 'exports'} at http://")
        address, found = re.search(r"http://([^/]+)/", line)[1], []
        load("one")
        assert found == [200]
        (tmp_path / "sleeps").touch()
        other = threading.Thread(target=load, args=("other",))
        other.start()
        while process.stdout.readline() != "sleeping\n":
            pass
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=WAIT_S)
        other.join()
    assert (process.returncode, found) == (0, [200, 503]), err
    assert out == "one: ended after 0 answers, 0 of them in time\n"
    assert "Traceback" not in err


@pytest.mark.slow
def test_it_serves_several_exports_and_says_what_each_has_answered(path):
    with program(f"first={path}", path) as (process, line):
        url = re.search(r"serving first at (\S+)/v2/models/first ", line)[1]
        for name, count in (("first", 2), ("mine", 1)):
            for _ in range(count):
                request = urllib.request.Request(f"{url}/v2/models/{name}/infer", gateways.body(random_images(TINY, 1)))
                with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                    assert json.load(answer)["model_name"] == name
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0, err
    assert re.findall(r"(\w+): ended after (\d+) answers", out) == [("first", "2"), ("mine", "1")]
    assert "first, mine share cpu:0, and each is scheduled as if it were alone" in err


class Dropped:
    """Its end brings a signal, whose error Python drops."""

    def __init__(self, number):
        self._number = number

    def __del__(self):
        os.kill(os.getpid(), self._number)
        for _ in range(100):
            pass


@pytest.fixture
def restored():
    """Sets the handlers of signals back after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield before
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_python_drops_is_noticed_and_the_next_one_raises(restored, monkeypatch, number):
    monkeypatch.setattr(serve, "_REPEAT_S", 0.0)
    with serve.stopped_by_signals() as signals:
        signals.check()
        Dropped(number)
        with pytest.raises(KeyboardInterrupt):
            signals.check()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt), signals.noticed():
            pytest.fail("the signal is not noticed")
        os.kill(os.getpid(), signal.SIGTERM)  # it is ignored now
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def two_signals():
    """Gets two signals at once, and then takes a moment in a `finally`, as functions of Python's library do."""
    both = (signal.SIGTERM, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, both)
    try:
        for number in both:
            os.kill(os.getpid(), number)
    finally:
        try:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        finally:
            time.sleep(0.01)


def test_a_signal_that_comes_twice_raises_once(restored):
    with serve.stopped_by_signals(), pytest.raises(KeyboardInterrupt) as caught:
        two_signals()
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere is not an export"),
        (["digits", "--slo-ms", "0"], "slo_ms must be a positive"),
        (["digits", "--port", "70000"], "cannot listen"),
        (["stats=digits"], "'stats' cannot be the name of a model"),
        (["=digits"], "'' cannot be the name of a model"),
        (["digits", "a=digits", "a=runs/other"], "digits and runs/other would both have the name 'a'"),
        (["digits", "digits"], "would both have the name 'digits'"),
        (["digits", "other=nowhere"], "nowhere is not an export"),
        ([], "give an export, such as digits, or --models"),
        (["--models", "nowhere"], "there is no folder 'nowhere'"),
        (["digits", "--drain-s", "-1"], "drain_s must be"),
        (["digits", "--token-file", "nothing"], "cannot read the token"),
        (["digits", "--tls-cert", "nothing"], "give both"),
        (["digits", "--access-log", "nothing/log"], "cannot write the access log"),
        (["digits", "--policy", "slackfi"], "unknown policy 'slackfi'"),
        (["digits", "--policy", "nothing.py:policy"], "there is no file"),
        (["--models", "/", "--policy", "slackfi", "--port", "70000"], "unknown policy 'slackfi'"),
        (["--models", "/", "--max-queue", "0", "--port", "70000"], "max_queue must be"),
    ],
)
def test_a_wrong_option_ends_it_with_one_line_before_it_compiles(run_program, monkeypatch, arguments, message):
    monkeypatch.setattr(prepare, "prepare", lambda *_, **__: pytest.fail("it compiles"))
    before = signal.getsignal(signal.SIGTERM)
    error = run_program("serve/gateway.py", *arguments, status=2).stderr
    assert message in error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before
