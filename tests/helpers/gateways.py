"""Gateways over servers with fake engines, and requests to them. An output is (the input's first value, the subnet's rank)."""

import asyncio
import contextlib
import http.client
import json
import pathlib
import socket
import threading

import fakes
import numpy as np

from superserve_jax import gateway
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.gateway.app import App
from superserve_jax.gateway.failures import RequestError
from superserve_jax.gateway.limits import Limits
from superserve_jax.gateway.messages import Request
from superserve_jax.gateway.model import ServedModel
from superserve_jax.gateway.repository import Repository
from superserve_jax.gateway.threads import LongWork

DATA = pathlib.Path(__file__).parents[1] / "data"
TLS = {"tls_cert": str(DATA / "tls_cert.pem"), "tls_key": str(DATA / "tls_key.pem")}
INFER = "/v2/models/supernet/infer"


class LogitsEngine(FakeEngine):
    """A `FakeEngine` with the outputs of a network: float32 vectors."""

    class_names = ("cat", "dog")

    def _outputs(self, subnet, inputs):
        return [np.float32(output) for output in super()._outputs(subnet, inputs)]


class Valve:
    """An `on_run` hook. While it is shut, batches wait."""

    def __init__(self):
        self._open, self.batches = threading.Event(), 0
        self._open.set()

    def __call__(self, subnet, batch_size, inputs):
        self.batches += 1
        assert self._open.wait(fakes.WAIT_S)

    def open(self):
        """Lets the batches go on."""
        self._open.set()

    @contextlib.contextmanager
    def shut(self, server, x):
        """Keeps the server's worker busy with the query `x` until the end of the block."""
        self._open.clear()
        before = self.batches
        try:
            busy = server.submit(x)
            fakes.wait_until(lambda: self.batches > before)
            yield busy
        finally:
            self.open()


def engine(on_run=None, **options):
    """An engine for uint8 inputs of shape (2, 2), unless the options say otherwise."""
    return fakes.fake(on_run, make=LogitsEngine, **{"input_shape": (2, 2), "input_dtype": np.uint8, **options})


@contextlib.contextmanager
def opened(*engines, profile=fakes.PROFILE, limits=None, gateway_options=None, **options):
    """A server with a gateway in front of it, with these limits. Yields both."""
    options = {"policy": "fixed:2", **options}
    with (
        fakes.serve(*(engines or [engine(profile=profile)]), profile=profile, **options) as server,
        gateway.Gateway(server, port=0, limits=Limits(**(limits or {})), **(gateway_options or {})) as door,
    ):
        yield server, door


def tensor(array, form="flat", **fields):
    """The input of a request, with its data "flat", "nested", or left out."""
    array = np.asarray(array)
    made = {"name": "input", "shape": [*array.shape], "datatype": array.dtype.name.upper().replace("FLOAT", "FP")}
    if form is not None:
        made["data"] = array.tolist() if form == "nested" else array.ravel().tolist()
    return {**made, **fields}


def body(array, **fields):
    """The JSON of a request for an array (N, ...)."""
    return json.dumps({"inputs": [tensor(array)], **fields}).encode()


def binary_body(array, **fields):
    """A request with a binary input: the body, and the length of its JSON."""
    given = tensor(array, None, parameters={"binary_data_size": array.nbytes})
    head = json.dumps({"inputs": [given], **fields}).encode()
    return head + array.tobytes(), len(head)


def tried(read, *arguments):
    """(What a function returns, None), or (None, its RequestError)."""
    try:
        return read(*arguments), None
    except RequestError as error:
        return None, error


class Answer:
    """A response: its status, its headers with names in lower case, and its body."""

    def __init__(self, status, headers, content):
        self.status, self.headers, self.content = status, headers, content

    @property
    def json(self):
        """The body as JSON, without the binary data behind it."""
        length = self.headers.get("inference-header-content-length")
        return json.loads(self.content[: None if length is None else int(length)])

    @property
    def error(self):
        """The text of an error."""
        assert self.headers["content-type"] == "application/json"
        assert [*self.json] == ["error"]
        return self.json["error"]


def request(door, method, path, content=None, connection=None, **headers):
    """Sends a request over HTTP, on a new connection unless one is given. Underscores in names of headers become hyphens."""
    one = connection or http.client.HTTPConnection(door.url.removeprefix("http://"), timeout=fakes.WAIT_S)
    try:
        named = {name.replace("_", "-"): str(value) for name, value in headers.items()}
        one.request(method, path, content, named, encode_chunked=not isinstance(content, bytes | None))
        response = one.getresponse()
        found = {name.lower(): value for name, value in response.getheaders()}
        return Answer(response.status, found, response.read())
    finally:
        if connection is None:
            one.close()


def infer(door, content, path=INFER, **headers):
    return request(door, "POST", path, content, **headers)


def app(server, name="supernet", **limits):
    models = Repository({name: ServedModel(name, server, Limits(**{"max_body_bytes": 1 << 20, **limits}))})
    return App(models, LongWork())


def message(method, path, content=b"", headers=()):
    """A request, as a connection makes it. Headers are (name, value) in bytes."""
    made = Request()
    made.method, made.target, made.body, made.headers = method, path.encode(), content, dict(headers)
    return made


def call(application, method, path, content=b"", headers=()):
    """Calls an application without a socket."""
    made = asyncio.run(application.answer(message(method, path, content, headers)))
    found = {name.decode(): value.decode() for name, value in made.headers}
    return Answer(made.status, found, made.body)


def connect(door):
    host, port = door.url.rpartition("://")[2].rsplit(":", 1)
    return socket.create_connection((host.strip("[]"), int(port)), timeout=fakes.WAIT_S)


class _Stream:
    """A socket for `http.client`, which makes a file for each response. This file stays, with what it has read ahead."""

    def __init__(self, sock):
        self._file = sock.makefile("rb")

    def __getattr__(self, name):
        return getattr(self._file, name)

    def makefile(self, *_):
        return self

    def close(self):
        pass


def answers(sock, count=1):
    """Reads responses from a socket, which stays open."""
    found, stream = [], _Stream(sock)
    for _ in range(count):
        response = http.client.HTTPResponse(stream)
        response.begin()
        headers = {name.lower(): value for name, value in response.getheaders()}
        found.append(Answer(response.status, headers, response.read()))
    return found


def is_closed(sock):
    try:
        return sock.recv(1) == b""
    except ConnectionResetError:
        return True
