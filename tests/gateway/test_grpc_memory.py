"""What requests over gRPC hold in memory: one limit for both ports, and clients that do not read their answers."""

import contextlib
import itertools
import socket
import threading
import tracemalloc

import fakes
import gateways
import grpcs
import numpy as np
import pytest
from grpc import RpcError, StatusCode
from grpcs import Client, message, opened, refused, values

from superserve_jax.gateway import bodies, connections, sockets
from superserve_jax.gateway.grpc import calls, service
from superserve_jax.gateway.reader import Buffered

ROW = np.uint8([[[7, 2], [3, 4]]])
PATH = f"/{service.NAME}/ModelInfer".encode()
ALONE = {"grpc.use_local_subchannel_pool": 1, "grpc.max_receive_message_length": -1}


class Large(gateways.LogitsEngine):
    """An engine with long outputs."""

    def _outputs(self, subnet, inputs):
        return [np.zeros(100_000, np.float32) for _ in inputs]


@pytest.fixture
def buffered(monkeypatch):
    """What the gateways of a test hold in memory."""
    made = []

    class Kept(Buffered):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    monkeypatch.setattr(connections, "Buffered", Kept)
    yield made
    fakes.wait_until(lambda: not any(each.nbytes for each in made))


def large(**limits):
    return opened(fakes.fake(make=Large, input_shape=(2, 2), input_dtype=np.uint8), limits=limits)


@contextlib.contextmanager
def idle(first):
    """Requests of a stream that then stays open."""
    stop = threading.Event()

    def requests():
        yield from first
        stop.wait(fakes.WAIT_S)

    try:
        yield requests()
    finally:
        stop.set()


def test_both_ports_share_the_limit(buffered):
    valve, large_row = gateways.Valve(), np.zeros((1, 100, 100), np.uint8)
    limits = {"max_buffered_bytes": 30_000, "max_body_bytes": 20_000}
    content, length = gateways.binary_body(large_row)
    header = {"inference_header_content_length": length}
    with (
        opened(gateways.engine(valve, input_shape=(100, 100)), limits=limits) as (server, door),
        Client(door) as client,
    ):
        with valve.shut(server, large_row[0]):
            started = [client.start(message(large_row)) for _ in range(2)]
            fakes.wait_until(lambda: server.health()["waiting"] == 2)
            assert buffered[0].nbytes > 20_000
            assert refused(client.infer, message(large_row))[0] is StatusCode.UNAVAILABLE
            assert gateways.request(door, "POST", gateways.INFER, content, **header).status == 503
            assert client.call("ServerReady").ready
            for call in started:
                call.cancel()
            fakes.wait_until(lambda: buffered[0].nbytes == 0)
            answers = []
            thread = threading.Thread(
                target=lambda: answers.append(gateways.request(door, "POST", gateways.INFER, content, **header))
            )
            thread.start()
            fakes.wait_until(lambda: buffered[0].nbytes > 10_000)
            made = message(np.zeros((2, 100, 100), np.uint8))
            assert refused(client.infer, made)[0] in (StatusCode.UNAVAILABLE, StatusCode.RESOURCE_EXHAUSTED)
            assert "in memory" in refused(client.infer, message(np.zeros((1, 195, 100), np.uint8)))[1]
        thread.join(fakes.WAIT_S)
        assert answers[0].status == 200


def test_small_requests_of_a_stream_count(buffered):
    valve, limits = gateways.Valve(), {"max_buffered_bytes": 20_000, "max_body_bytes": 5000}
    with (
        opened(gateways.engine(valve), limits=limits) as (server, door),
        Client(door) as client,
        idle(itertools.repeat(message(ROW), 50)) as requests,
    ):
        with valve.shut(server, ROW[0]):
            stream = client.stream(requests)
            fakes.wait_until(lambda: buffered[0].nbytes > 19_000)
            assert server.health()["waiting"] < 20
            assert "in memory" in refused(client.infer, message(ROW))[1]
        found = [next(stream) for _ in range(50)]
        assert values(found[0].infer_response).tolist() == [[7, 2]]
        assert all("in memory" in each.error_message for each in found if each.error_message)
        stream.cancel()


def test_the_answers_of_requests_count(buffered):
    valve = gateways.Valve()
    engine = fakes.fake(valve, make=Large, input_shape=(2, 2), input_dtype=np.uint8)
    with opened(engine) as (server, door), Client(door, **ALONE) as client, valve.shut(server, ROW[0]):
        call = client.start(message(ROW))
        fakes.wait_until(lambda: buffered[0].nbytes > 400_000)
        valve.open()
        assert values(call.result(fakes.WAIT_S)).shape == (1, 100_000)


@pytest.mark.parametrize("way", ["calls", "stream"])
def test_a_waiting_request_is_in_memory_once(buffered, way):
    size, count, valve = 1000, 8, gateways.Valve()
    rows = np.ones((1, size, size), np.uint8)
    engine = gateways.engine(valve, input_shape=(size, size))
    with opened(engine) as (server, door), Client(door) as client, valve.shut(server, rows[0]):
        made = message(rows)
        with idle(itertools.repeat(made, count)) as requests:
            tracemalloc.start()
            try:
                started = [client.start(made) for _ in range(count)] if way == "calls" else [client.stream(requests)]
                fakes.wait_until(lambda: server.health()["waiting"] == count)
                fakes.wait_until(lambda: tracemalloc.get_traced_memory()[0] < 1.6 * count * rows.nbytes)
            finally:
                tracemalloc.stop()
        for call in started:
            call.cancel()


@pytest.mark.parametrize("name", ["ServerLive", "ServerMetadata"])
def test_a_long_message_that_is_no_inference_is_refused(name):
    with opened() as (_, door), Client(door) as client:
        method = client.channel.unary_unary(f"/{service.NAME}/{name}")
        code, text = refused(method, bytes((130, 1)) + bytes(bodies.MOST_SMALL), timeout=fakes.WAIT_S)
        assert code is StatusCode.RESOURCE_EXHAUSTED
        assert "4,096" in text


def test_the_connection_of_a_client_that_does_not_read_its_answer_ends(buffered, caplog):
    with large(write_s=0.4) as (_, door), Client(door, **ALONE) as client, grpcs.http2(door) as sock:
        sock.sendall(grpcs.headers(PATH) + grpcs.data(message(ROW).SerializeToString()))
        received = b""
        while part := sock.recv(1 << 16):  # it never opens its window of 64 KiB any further
            received += part
        assert len(received) < 100_000
        fakes.wait_until(lambda: buffered[0].nbytes == 0)
        assert values(client.infer(message(ROW))).shape == (1, 100_000)
    assert not caplog.records


def test_a_stream_whose_answers_nobody_reads_keeps_neither_its_place_nor_its_memory(monkeypatch, caplog, buffered):
    monkeypatch.setitem(calls.MOST_OPEN, "inference", 1)
    with (
        large(write_s=0.5) as (server, door),
        Client(door, **ALONE) as client,
        Client(door, **ALONE) as other,
        idle(itertools.repeat(message(ROW), 100)) as requests,
    ):

        def is_full():
            try:
                return not other.infer(message(ROW))
            except RpcError as error:
                return error.details() == "too many calls are in progress; try again later"

        client.stream(requests)
        fakes.wait_until(is_full)
        fakes.wait_until(lambda: not is_full())
        fakes.wait_until(lambda: server.health()["waiting"] == 0)
        fakes.wait_until(lambda: buffered[0].nbytes == 0)
    assert not caplog.records


@pytest.mark.parametrize("host", ["::1", "127.0.0.1"])
def test_the_connections_of_named_peers_end(host):
    """Not those of other clients, and not those to other ports."""
    with sockets.listen(host, 0) as server, sockets.listen(host, 0) as foreign, contextlib.ExitStack() as stack:
        clients = [stack.enter_context(socket.create_connection(each.getsockname()[:2])) for each in (server, server, foreign)]
        for each in (server, server, foreign):
            stack.enter_context(each.accept()[0])
        named = {client.getsockname()[:2] for client in (clients[0], clients[2])}
        sockets.disconnect(server.getsockname()[1], named)
        assert clients[0].recv(1) == b""
        for client in clients[1:]:
            client.settimeout(0.1)
            with pytest.raises(TimeoutError):
                client.recv(1)
