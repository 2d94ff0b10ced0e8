"""The load generator of serve/bench/gateway.py: it finds lost, late and wrong answers, over HTTP/1.1 and over gRPC."""

import asyncio
import contextlib
import json
import struct
import threading
import time
from concurrent import futures

import grpc
import numpy as np
import pytest
from gateway_load import cases, http1, http2, messages, open_loop, running

COUNT, WAIT_S = 40, 0.05
DUE_S = np.linspace(0.0, 0.2, COUNT)


def outputs(number):
    return [number, *[3.0] * 9]


def http_answer(number, status=b"200 OK", *, chunked=False):
    content = {"parameters": {"subnet": "3", "accuracy": 0.75}, "outputs": [{"data": outputs(number)}]}
    body = json.dumps(content).encode()
    if chunked:
        return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    return b"HTTP/1.1 %b\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body)


def grpc_answer(number):
    field, double = messages.field, struct.pack("<d", 0.75)
    subnet = field(1, b"subnet") + field(2, field(3, b"3"))
    accuracy = field(1, b"accuracy") + field(2, b"\x21" + double)
    return field(4, subnet) + field(4, accuracy) + field(6, np.array(outputs(number), np.float32).tobytes())


@contextlib.contextmanager
def http_server(answer):
    """A server of HTTP/1.1 in a thread. `answer(number)` returns the bytes to send, in one or two pieces."""

    async def serve(reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                body = await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))
                for piece in answer(json.loads(body)["inputs"][0]["data"][0]):
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.001)
                if not piece:
                    writer.close()
                    return

    async def start(ready, stop):
        async with await asyncio.start_server(serve, "127.0.0.1", 0, backlog=200) as server:
            ready.append(server.sockets[0].getsockname()[1])
            while not stop.is_set():
                await asyncio.sleep(0.01)

    ready, stop = [], threading.Event()
    thread = threading.Thread(target=lambda: asyncio.run(start(ready, stop)))
    thread.start()
    try:
        while not ready:
            time.sleep(0.001)
        yield ready[0]
    finally:
        stop.set()
        thread.join()


def play_http(answer, connections=8, slo_ms=10_000):
    requests = [messages.json_request(messages.SMALL, i, 36.0) for i in range(messages.NUMBERS)]
    with http_server(answer) as port:
        played = open_loop.play(lambda epoll: http1.Http1(port, epoll, connections), DUE_S, requests, patience_s=1)
    return open_loop.figures(played, slo_ms, messages.read_http, messages.NUMBERS), played


@pytest.mark.parametrize("chunked", [False, True])
def test_all_answers_are_counted_though_they_come_in_pieces(chunked):
    def in_pieces(number):
        whole = http_answer(number, chunked=chunked)
        return whole[:50], whole[50:]

    found, played = play_http(in_pieces)
    assert (found["queries"], found["attainment"], found["wrong"], found["lost"]) == (COUNT, 1.0, 0, 0)
    assert found["accuracy"] == 0.75
    assert (played.sent_s >= played.due_s).all()
    assert (played.done_s > played.sent_s).all()


@pytest.mark.parametrize(
    ("answer", "wrong", "lost"),
    [
        (lambda number: (http_answer(number + (number == 5)),), 1, 0),
        (lambda number: (http_answer(number, b"500 No" if number == 5 else b"200 OK"),), 1, 0),
        (lambda number: (http_answer(number)[: -1 if number == 5 else None], *([b""] * (number == 5))), 0, 1),
        (lambda number: (b"" if number == 5 else http_answer(number),), 0, 1),
    ],
    ids=["of another query", "an error", "a part of it", "none"],
)
def test_a_wrong_answer_and_a_lost_one_are_seen(answer, wrong, lost):
    found, _ = play_http(answer)
    assert (found["wrong"], found["lost"]) == (wrong, lost)
    assert found["attainment"] == 1 - lost / COUNT


def test_latencies_count_from_when_a_request_was_due_also_if_no_connection_is_free():
    def slowly(number):
        time.sleep(0.02)  # the server's loop stands still
        return (http_answer(number),)

    found, played = play_http(slowly, connections=1, slo_ms=100)
    waited_s = played.done_s - played.due_s
    assert waited_s[-1] >= 0.02 * COUNT - 0.2 - 1e-3
    assert found["attainment"] < 1
    assert found["most_open"] == 1
    assert (played.lateness_s <= played.sent_s - played.due_s + 1e-9).all()


@contextlib.contextmanager
def grpc_server(answer):
    def infer(request, context):
        fields = dict(messages.fields(request))
        number = int(np.frombuffer(fields[7], "<i4")[0])
        if number == 5 and answer is not grpc_answer:
            context.abort(grpc.StatusCode.INTERNAL, "broken")
        return answer(number)

    class Handler(grpc.GenericRpcHandler):
        def service(self, details):
            assert details.method == messages.GRPC_PATH
            return grpc.unary_unary_rpc_method_handler(infer)

    server = grpc.server(futures.ThreadPoolExecutor(4), handlers=(Handler(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield port
    finally:
        server.stop(0).wait()


@pytest.mark.parametrize("wrong", [0, 1])
def test_calls_of_grpc_are_answered_by_another_implementation_of_it(wrong):
    requests = [messages.grpc_request(messages.SMALL, i, 36.0) for i in range(messages.NUMBERS)]
    with grpc_server((lambda number: grpc_answer(number)) if wrong else grpc_answer) as port:
        played = open_loop.play(lambda epoll: http2.Http2(port, epoll, 2), DUE_S, requests, patience_s=1)
    found = open_loop.figures(played, 10_000, messages.read_grpc, messages.NUMBERS)
    assert (found["queries"], found["wrong"], found["lost"]) == (COUNT, wrong, 0)
    assert found["accuracy"] == 0.75


def test_a_run_counts_only_if_it_was_quiet_and_the_median_is_over_the_runs_that_count():
    run = {**dict.fromkeys(running.MEDIANS, 0.0), "wrong": 1, "lost": 0}
    runs = [{**run, "attainment": a, "other_cores": c} for a, c in ((0.5, 0.5), (0.9, 0.1), (0.99, 0.1), (1.0, 0.0))]
    found = running.result(runs, 3)
    assert (found["attainment"], found["counted"], found["runs"], found["quiet"], found["wrong"]) == (0.99, 3, 4, True, 4)
    assert not running.result(runs[:2], 3)["quiet"]
    assert not running.counts({**run, "lateness_p99_ms": 1.1})


def test_every_bound_belongs_to_a_case_of_the_default_run():
    run = cases.of_bounds(())
    assert {bound.case for bound in cases.BOUNDS} <= {*run}
    assert len({case.name for case in (*run, *cases.of_bursts(("mosec",)))}) == len({*run, *cases.of_bursts(("mosec",))})
    bound = cases.BOUNDS[0]
    assert bound.holds(0.99)
    assert not bound.holds(float("nan"))


def test_in_the_simulation_only_the_engines_take_time():
    [case] = [each for each in cases.of_bounds(()) if each.server == cases.SIMULATED and each.subnet is None]
    found = running.simulated(case, case.trace(seconds=8.0, seed=0))
    assert running.counts(found)
    assert found["attainment"] > 0.999
    assert 0.792 < found["accuracy"] < 0.8016


def test_bursts_are_the_last_of_every_four_steps():
    [case] = {bound.case for bound in cases.BOUNDS if bound.case.server == "HTTP" and bound.case.subnet is None}
    arrivals = case.trace(seconds=8.0, seed=0).arrivals_s
    per_step = np.bincount(arrivals.astype(int), minlength=8)
    assert (per_step[[3, 7]] > 2500).all()
    assert (np.delete(per_step, [3, 7]) < 900).all()


def test_the_part_of_a_run_that_belongs_to_some_queries():
    due_s = np.arange(4.0)
    played = open_loop.Played(due_s, due_s + 1, due_s + 2, due_s / 8, [b"a", b"b", b"c", b""], 5.0, 2)
    part = played.of(np.array([False, True, False, True]))
    assert (part.due_s.tolist(), part.answers, part.done_s.tolist()) == ([1.0, 3.0], [b"b", b""], [3.0, 5.0])
