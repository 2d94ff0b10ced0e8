"""Ends `superserve serve` by SIGTERM under load, again and again, and checks that every accepted request is answered.

    python serve/bench/gateway_stops.py
    python serve/bench/gateway_stops.py --times 500 --clients 64 --json runs/stops.json

The command runs with engines that sleep. --clients connections send one request after the other, and as many more are idle or
wait for events. A quarter as many clients call over gRPC. After a random time, the command gets SIGTERM. The clients go on
until they are refused. A finding is:
- a request without an answer, or with a wrong one. A request counts as accepted if its connection was open before SIGTERM,
  or if an answer has come on it. The system may reset connections that were opened later; they are counted as refused. A call
  of gRPC counts as accepted if it began a tenth of a second before SIGTERM,
- another exit status than 0, no end within --limit-s seconds, or a traceback in the log.
The exit status is 1 if there is one.
Library: commands.serve, gateway.Gateway.
"""

import asyncio
import collections
import contextlib
import dataclasses
import json
import pathlib
import random
import re
import sys
import time

import grpc
from gateway_load import attempts, attempts_grpc, children, messages
from gateway_load.attempts import BrokenRuleError, Responses
from gateway_load.children import Child

from superserve_jax import cli, progress

ADDRESS = re.compile(r"http://\S+?:(\d+)/v2/models.*^SIGTERM or Ctrl-C", re.DOTALL | re.MULTILINE)
GRPC_ADDRESS = re.compile(r"^gRPC at \S+:(\d+)$", re.MULTILINE)
SOON_S, LATE_S = 0.05, 0.4  # SIGTERM comes at a random time between these
SLO_MS = 10_000.0
READ = 1 << 16
JUST_S = 0.1  # a call that began so shortly before SIGTERM may be refused
EVENTS = b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n"


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      times: how many times the command is started and ended.
      clients: the connections that send requests, and the number of idle ones.
      seed: determines the times of SIGTERM.
      limit_s: the longest time from SIGTERM to the end of the process.
      json: write the counts and findings to this file.
    """

    times: int = 50
    clients: int = 16
    seed: int = 0
    limit_s: float = 15.0
    json: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "times", "clients", "limit_s")


class Load:
    """Clients that send requests until the port is closed.

    Args:
      port: the port of HTTP.
      grpc_port: the port of gRPC, or None.
    """

    def __init__(self, port: int, grpc_port: int | None):
        self.port, self.grpc_port = port, grpc_port
        self.counts: collections.Counter[str] = collections.Counter()
        self.findings: list[str] = []
        self._stopped_s = float("inf")
        self._requests = [messages.json_request(messages.SMALL, i, SLO_MS) for i in range(messages.NUMBERS)]

    def stopped(self) -> None:
        """Notes that SIGTERM was sent."""
        self._stopped_s = time.monotonic()

    async def send_all(self, client: int) -> None:
        """Sends requests on one connection after the other. Returns when a connection is refused."""
        number = client
        while True:
            opened_s = time.monotonic()
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                return
            answered = 0
            try:
                while True:
                    number = (number + 1) % messages.NUMBERS
                    writer.write(self._requests[number])
                    closes = await self._answer(reader, number)
                    answered += 1
                    if closes:
                        break
            except (ConnectionError, BrokenRuleError) as e:
                if answered or opened_s < self._stopped_s or isinstance(e, BrokenRuleError):
                    self.findings.append(f"request {number} on a connection with {answered} answers: {type(e).__name__} {e}")
                else:
                    self.counts["refused"] += 1
            finally:
                writer.transport.abort()

    async def call_all(self, client: int) -> None:
        """Calls over gRPC, one call after the other. Returns when a call is refused after SIGTERM."""
        number = client
        async with attempts_grpc.channel(self.grpc_port or 0) as channel:
            infer = channel.unary_unary(messages.GRPC_PATH)  # without coders, messages are bytes
            while True:
                number = (number + 1) % messages.NUMBERS
                began_s = time.monotonic()
                try:
                    answer = await infer(messages.grpc_request(messages.SMALL, number, SLO_MS), timeout=1e-3 * SLO_MS)
                except grpc.aio.AioRpcError as e:
                    if e.code() is not grpc.StatusCode.UNAVAILABLE or began_s < self._stopped_s - JUST_S:
                        self.findings.append(f"call {number}: {e.code().name}, {e.details()}")
                    self.counts["refused calls"] += 1
                    return
                self.counts["calls"] += 1
                first = messages.read_grpc_message(answer).number
                if first != number:
                    self.findings.append(f"call {number} got the answer of another one: {first}")

    async def _answer(self, reader: asyncio.StreamReader, number: int) -> bool:
        """Reads one answer. Returns whether it closes the connection."""
        responses = Responses(is_head=False)
        while not responses.found:
            data = await reader.read(READ)
            if not data:
                raise ConnectionResetError("the connection was closed without an answer")
            responses.feed(data)
        [response] = responses.found
        self.counts[str(response.status)] += 1
        if response.status == 200:
            first = json.loads(response.body)["outputs"][0]["data"][0]
            if first != number:
                raise BrokenRuleError(f"sent {number}, and got the answer of another request: {first}")
        else:
            attempts.check_error(response)
            if response.status != 503:
                raise BrokenRuleError(f"status {response.status}: {response.body[:300]!r}")
        return response.headers.get("connection", "").lower() == "close"


async def stop_under_load(child: Child, wait_s: float, options: Options) -> tuple[Load, float]:
    """Sends requests, and SIGTERM after `wait_s` seconds. Returns the clients and the seconds until the end of the process."""
    [port], grpc_ports = ADDRESS.findall(child.text()), GRPC_ADDRESS.findall(child.text())
    load = Load(int(port), int(grpc_ports[0]) if grpc_ports else None)
    idle = [await asyncio.open_connection("127.0.0.1", load.port) for _ in range(options.clients)]
    for _, writer in idle[::2]:
        writer.write(EVENTS)
    clients = [asyncio.create_task(load.send_all(i)) for i in range(options.clients)]
    if load.grpc_port is not None:
        clients += [asyncio.create_task(load.call_all(i)) for i in range(-(-options.clients // 4))]
    await asyncio.sleep(wait_s)
    load.stopped()
    start_s = time.monotonic()
    status = await asyncio.to_thread(child.end, timeout_s=options.limit_s)
    took_s = time.monotonic() - start_s
    if status != 0:
        load.findings.append("the process has not ended in time" if status is None else f"the exit status is {status}")
    if "Traceback" in child.said():
        load.findings.append(f"the log has a traceback: {child.said()[-2_000:]}")
    for _, writer in idle:
        writer.transport.abort()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(options.limit_s):
            await asyncio.gather(*clients)
    if unanswered := sum(not client.done() for client in clients):
        load.findings.append(f"{unanswered} clients still wait for an answer")
    return load, took_s


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    rng, counts, findings, took_s = random.Random(options.seed), collections.Counter[str](), list[str](), list[float]()
    for time_number in progress.track(range(options.times), "stops", note=lambda: f"{len(findings)} finding(s)"):
        with children.started("command.py", ready=lambda child: ADDRESS.search(child.text())) as child:
            load, seconds = asyncio.run(stop_under_load(child, rng.uniform(SOON_S, LATE_S), options))
        counts += load.counts
        took_s.append(seconds)
        for finding in load.findings:
            findings.append(f"stop {time_number}: {finding}")
            print(findings[-1], flush=True)
    answered = counts["200"] + counts["503"]
    print(f"{options.times} stops under load: {answered:,} requests were answered, {counts['503']:,} of them with 503")
    print(f"{counts['refused']} connections that were opened after SIGTERM were reset")
    print(f"gRPC: {counts['calls']:,} calls were answered, {counts['refused calls']} were refused after SIGTERM")
    print(f"an end took {max(took_s):.2f} s at most; {len(findings)} finding(s)")
    cli.write_results(options.json, {"times": options.times, "counts": counts, "seconds": took_s, "findings": findings})
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    cli.run(main)
