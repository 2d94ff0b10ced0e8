"""Clients of gRPC, with the messages of the gateway's own pool, and calls without a socket."""

import asyncio
import functools
import pathlib
import re
import socket
import struct

import gateways
import grpc
import numpy as np
from fakes import WAIT_S
from google.protobuf import message_factory

from superserve_jax.gateway.grpc import calls, messages, service
from superserve_jax.gateway.limits import Limits
from superserve_jax.gateway.reader import Buffered

opened = functools.partial(gateways.opened, gateway_options={"grpc_port": 0})
Request = messages.named("inference.ModelInferRequest")
StreamResponse = messages.named("inference.ModelStreamInferResponse")


def message(array, *, typed=None, outputs=(), name="supernet", **parameters):
    """A request for an array (N, ...), or for a list of texts.

    Args:
      array: the inputs.
      typed: the field of the contents that holds them; None sends them as raw bytes.
      outputs: the names of the outputs.
      name: the name of the model.
      parameters: the parameters.
    """
    made = Request(model_name=name)
    values = np.asarray(array)
    datatype = values.dtype.name.upper().replace("FLOAT", "FP") if values.dtype.kind not in "US" else "BYTES"
    given = made.inputs.add(name="input", datatype=datatype, shape=values.shape)
    if typed is None:
        made.raw_input_contents.append(values.tobytes())
    else:
        getattr(given.contents, typed).extend(values.ravel().tolist())
    for output in outputs:
        made.outputs.add(name=output)
    for key, value in parameters.items():
        field = {bool: "bool_param", int: "int64_param", float: "double_param", str: "string_param"}[type(value)]
        setattr(made.parameters[key], field, value)
    return made


def values(response, index=0):
    """An output of a response, as an array."""
    output = response.outputs[index]
    dtype = {"FP32": np.float32, "INT32": np.int32, "FP64": np.float64, "BOOL": np.bool_}[output.datatype]
    return np.frombuffer(response.raw_output_contents[index], dtype).reshape(output.shape)


class Client:
    """Calls a gateway over gRPC. It is a context, at whose end the connection closes."""

    def __init__(self, door, certificate=None, **options):
        if certificate is None:
            self.channel = grpc.insecure_channel(door.grpc_target, options=[*options.items()])
        else:
            credentials = grpc.ssl_channel_credentials(pathlib.Path(certificate).read_bytes())
            self.channel = grpc.secure_channel(door.grpc_target, credentials, options=[*options.items()])

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.channel.close()

    def method(self, name, of=service.NAME):
        """A callable of grpc for a call of a service."""
        found = messages.POOL.FindMethodByName(f"{of}.{name}")
        kinds = ("unary", "stream")
        make = getattr(self.channel, f"{kinds[found.client_streaming]}_{kinds[found.server_streaming]}")
        request, response = (message_factory.GetMessageClass(kind) for kind in (found.input_type, found.output_type))
        return make(f"/{of}/{name}", lambda made: made.SerializeToString(), response.FromString), request

    def call(self, name, of=service.NAME, /, **fields):
        """Calls with the fields of a message, and returns the response."""
        method, request = self.method(name, of)
        return method(request(**fields), timeout=WAIT_S)

    def infer(self, made, timeout=WAIT_S, **options):
        return self.method("ModelInfer")[0](made, timeout=timeout, **options)

    def start(self, made, **options):
        """Calls without waiting. Returns a future of grpc."""
        return self.method("ModelInfer")[0].future(made, **options)

    def stream(self, requests, **options):
        return self.method("ModelStreamInfer")[0](requests, timeout=WAIT_S, **options)


def refused(call, *arguments, **options):
    """The code and the text of the error that a call gets."""
    try:
        call(*arguments, **options)
    except grpc.RpcError as error:
        return error.code(), error.details()
    raise AssertionError("the call has an answer")


class _AbortedError(Exception):
    pass


class _Context:
    """What a handler gets with a call, without a socket."""

    def __init__(self, data, left_s, metadata):
        self._data, self._left_s, self._metadata = data, left_s, metadata
        self.error = None

    def time_remaining(self):
        return self._left_s

    def invocation_metadata(self):
        return self._metadata

    async def read(self):
        return self._data

    async def abort(self, code, details):
        self.error = code, details
        raise _AbortedError


def call(methods, name, data, left_s=None, metadata=()):
    """Calls a method with the bytes of a message. Returns the bytes of the response and None, or None and (code, text)."""
    context = _Context(data, left_s, metadata)
    made = calls.Call(methods[f"/{service.NAME}/{name}"], calls.Calls(Buffered(Limits(), 1 << 20)))
    try:
        return asyncio.run(made.stream_unary(None, context)), None
    except _AbortedError:
        return None, context.error


# -- HTTP/2 without a library -------------------------------------------------------------------------------------------------


def http2(door):
    """A socket to the port of gRPC, after the first bytes of HTTP/2."""
    host, port = door.grpc_target.rsplit(":", 1)
    sock = socket.create_connection((host, int(port)), timeout=WAIT_S)
    sock.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, b""))
    return sock


def headers(path, stream=1, **metadata):
    """The bytes that start a call."""
    named = {b":path": path, b":authority": b"localhost", b"content-type": b"application/grpc", b"te": b"trailers"}
    named |= {name.encode(): value for name, value in metadata.items()}
    literals = [b"\0" + bytes((len(name),)) + name + bytes((len(value),)) + value for name, value in named.items()]
    return _frame(1, 4, stream, b"\x83\x86" + b"".join(literals))  # POST, http


def data(content, stream=1, *, ends=True):
    """The bytes of a message."""
    return _frame(0, int(ends), stream, struct.pack(">?I", False, len(content)) + content)


def status(sock):
    """The first status of gRPC that comes, as a number."""
    received = b""
    while not (found := re.search(rb"grpc-status[\x01\x02](\d+)", received)):
        part = sock.recv(1 << 16)
        assert part, received
        received += part
    return int(found[1])


def _frame(kind, flags, stream, content):
    return struct.pack(">I", len(content))[1:] + bytes((kind, flags)) + struct.pack(">I", stream) + content
