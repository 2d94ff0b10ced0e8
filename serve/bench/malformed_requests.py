"""Sends many malformed requests to the gateway, and checks that it answers each one as documented, or closes the connection.

    python serve/bench/malformed_requests.py --json runs/malformed.json
    python serve/bench/malformed_requests.py --case codings 17

Over HTTP: odd headers, methods and paths; JSON with odd values; tensors and parameters that do not fit; damaged bytes; bodies
that are too long, compressed bombs, wrong chunks; connections that end in the middle, slow clients, and garbage behind valid
requests. Over gRPC: odd frames, headers and prefaces of HTTP/2, floods, and messages that are damaged or do not fit. Every
attempt has a number, and `--case KIND NUMBER` repeats it. The gateway runs in a process of its own, over engines that sleep. A
finding is:
- status 500 (gRPC: INTERNAL, UNKNOWN), or another one that malformed requests must not get; an error that is not JSON with one
  line of text,
- no answer, or a connection that stays open after the client has closed its side, for --limit-s seconds,
- a wrong answer to a valid request, or a valid request that gets none,
- a traceback in the log, or the end of the process,
- memory that has grown by more than --limit-mb MB since a fifth of the attempts were made,
- a lower attainment afterwards: before and after, valid requests arrive at --rate per second.
The exit status is 1 if there is one. Ctrl-C prints the counts so far.
Library: gateway.Gateway, serving.server.
"""

import asyncio
import collections
import dataclasses
import math
import pathlib
import sys
import time
from collections.abc import Mapping, Sequence

import grpc
from gateway_load import attempts, attempts_grpc, child, children, http1, malformed, malformed_grpc, messages, odd, open_loop
from gateway_load.attempts import BrokenRuleError
from gateway_load.findings import Findings, Outcome, Watch
from gateway_load.malformed import Attempt
from gateway_load.malformed_grpc import Call

from superserve_jax import cli, errors, progress
from superserve_jax.simulation import traces

BLOCK = 200  # attempts between two looks at the process
SLO_MS = 36.0
LESS = 0.02  # attainment that may be lost by chance
TRIES = 3
GRPC = malformed_grpc.KINDS if child.has_grpc() else {}
KINDS = (*malformed.KINDS, *GRPC)
SHARES = {**malformed.SHARES, **malformed_grpc.SHARES}


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      requests: the number of attempts, of all kinds together.
      kinds: the kinds of attempts; by default all.
      seed: determines all attempts.
      at_once: the number of connections at the same time.
      limit_s: the longest time until an answer, or the end of a connection.
      limit_mb: the most memory that the gateway may gain, in MB.
      rate: valid requests per second, before and after.
      rate_s: the seconds of that traffic.
      case: a kind and a number: repeat only this attempt, and print what is sent and received.
      json: write the counts and findings to this file.
    """

    requests: int = 100_000
    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    at_once: int = 32
    limit_s: float = 10.0
    limit_mb: float = 64.0
    rate: float = 2_000.0
    rate_s: float = 3.0
    case: tuple[str, int] | None = None
    json: pathlib.Path | None = None

    def __post_init__(self):
        cli.check_above_zero(self, "requests", "at_once", "limit_s", "limit_mb", "rate", "rate_s")
        for kind in (*self.kinds, *([self.case[0]] if self.case else ())):
            errors.check_name("kind of attempt", kind, KINDS)


def numbered(options: Options) -> list[tuple[str, int]]:
    """Kind and number of each attempt. The kinds take turns."""
    shares = {kind: SHARES.get(kind, 1.0) for kind in options.kinds}
    each = options.requests / sum(shares.values())
    counts = {kind: math.ceil(each * share) for kind, share in shares.items()}
    return sorted(((k, i) for k, n in counts.items() for i in range(n)), key=lambda case: case[1] / counts[case[0]])


class Attempts:
    """Makes attempts in one event loop.

    Args:
      ports: the numbers of the ports, as child.py prints them.
      options: the options.
    """

    def __init__(self, ports: Mapping[str, int], options: Options):
        self._ports, self._options = ports, options
        self._runner = asyncio.Runner()
        self._channel: grpc.aio.Channel | None = None

    def close(self) -> None:
        """Closes the channel of gRPC and the loop."""
        if self._channel is not None:
            self._runner.run(self._channel.close())
        self._runner.close()

    def make(self, block: Sequence[tuple[str, int]]) -> list[Outcome]:
        """Makes the attempts of a block, some at the same time."""
        return self._runner.run(self._make_all(block))

    async def _make_all(self, block: Sequence[tuple[str, int]]) -> list[Outcome]:
        free = asyncio.Semaphore(self._options.at_once)
        return await asyncio.gather(*(self._make(kind, number, free) for kind, number in block))

    async def _make(self, kind: str, number: int, free: asyncio.Semaphore) -> Outcome:
        limit_s, statuses, finding = self._options.limit_s, collections.Counter[str](), ""
        async with free:
            try:
                async with asyncio.timeout(4 * limit_s):
                    statuses = await self.make_one(made(kind, number, self._options.seed), is_grpc=kind in GRPC)
            except BrokenRuleError as e:
                finding = str(e)
            except TimeoutError:
                finding = f"the gateway reads nothing for {4 * limit_s:g} s"
            except OSError as e:
                finding = f"cannot connect: {e}"
        return Outcome(kind, number, statuses, finding)

    async def make_one(self, tried: Attempt | Call, *, is_grpc: bool) -> collections.Counter[str]:
        """Makes one attempt. Returns the statuses of its answers. Raises BrokenRuleError."""
        limit_s = self._options.limit_s
        if isinstance(tried, Call):
            if self._channel is None:
                self._channel = attempts_grpc.channel(self._ports["grpc_port"])
            return await attempts_grpc.call(self._channel, tried, limit_s)
        if is_grpc:
            return await attempts_grpc.attempt(self._ports["grpc_port"], tried, limit_s)
        responses = await attempts.attempt(self._ports["port"], tried, limit_s)
        return collections.Counter(str(response.status) for response in responses)


def made(kind: str, number: int, seed: int) -> Attempt | Call:
    """The attempt of a kind and a number."""
    return (malformed_grpc if kind in GRPC else malformed).make(kind, number, seed)


def attainment(port: int, options: Options, least: float = 1.0) -> float:
    """The attainment of valid traffic: the best of at most three tries, the last of which reaches `least`."""
    best = 0.0
    given = messages.Input(odd.SHAPE, odd.DTYPE)
    requests = [messages.json_request(given, i, SLO_MS) for i in range(messages.NUMBERS)]
    for seed in range(TRIES):
        trace = traces.gamma(rate_qps=options.rate, duration_s=options.rate_s, seed=seed)
        played = open_loop.play(lambda epoll: http1.Http1(port, epoll, 128), trace.arrivals_s, requests, patience_s=5)
        figures = open_loop.figures(played, SLO_MS, messages.read_http, messages.NUMBERS)
        if figures["wrong"] or figures["lost"]:
            raise errors.InferenceError(f"valid requests got wrong answers or none: {figures}")
        best = max(best, figures["attainment"])
        if best >= least - LESS:
            break
    return best


def repeat(ports: Mapping[str, int], options: Options, kind: str, number: int) -> int:
    """Makes one attempt, and prints it. Returns the exit status."""
    tried = made(kind, number, options.seed)
    for step in tried.messages if isinstance(tried, Call) else tried.steps:
        print(f"send {len(step):,} bytes: {step[:3_000]!r}" if isinstance(step, bytes) else f"wait {step:g} s")
    print(dataclasses.replace(tried, messages=()) if isinstance(tried, Call) else dataclasses.replace(tried, steps=()))
    try:
        if kind in malformed.KINDS and isinstance(tried, Attempt):
            for response in asyncio.run(attempts.attempt(ports["port"], tried, options.limit_s)):
                print(f"received {response.status} {response.headers}: {response.body[:1_000]!r}")
        else:
            [outcome] = Attempts(ports, options).make([(kind, number)])
            print(f"received {dict(outcome.statuses)} {outcome.finding}")
    except BrokenRuleError as e:
        print(f"finding: {e}")
        return 1
    return 0


def attack(ports: Mapping[str, int], watch: Watch, findings: Findings, options: Options) -> bool:
    """Makes all attempts. Returns whether Ctrl-C interrupted it."""
    todo, made_by = numbered(options), Attempts(ports, options)
    blocks = [todo[i : i + BLOCK] for i in range(0, len(todo), BLOCK)]
    try:
        for block in progress.track(blocks, f"blocks of {BLOCK} attempts", note=lambda: f"{len(findings.found)} finding(s)"):
            findings.add_all(made_by.make(block))
            for finding in watch.findings():
                findings.add("process", None, finding)
            if watch.has_ended:
                break
    except KeyboardInterrupt:
        return True
    finally:
        made_by.close()
    return False


def main() -> None:
    """The program."""
    options = cli.parse(Options, __doc__)
    shape = ("--shape", *odd.SHAPE, "--dtype", odd.DTYPE)
    with children.started("child.py", *shape, *(["--grpc"] if GRPC else [])) as process:
        ports = process.printed()
        if options.case is not None:
            sys.exit(repeat(ports, options, *options.case))
        watch, findings, began_s = Watch(process), Findings(options.kinds), time.monotonic()
        before, after = attainment(ports["port"], options), math.nan
        interrupted = attack(ports, watch, findings, options)
        if not interrupted and not watch.has_ended:
            after = attainment(ports["port"], options, before)
        if watch.grown_mb() > options.limit_mb:
            findings.add("process", None, f"the memory has grown by {watch.grown_mb():.0f} MB")
        if after < before - LESS:
            findings.add("process", None, f"the attainment is {after:.4f}, and was {before:.4f} before")
        if (status := process.end()) != 0:
            findings.add("process", None, f"it ended with status {status}: {process.said()[-2_000:]}")
    findings.print_table()
    memory = f"{watch.memory_mb[0]:.0f} MB before, {max(watch.memory_mb):.0f} at most, {watch.memory_mb[-1]:.0f} after"
    print(f"memory of the gateway: {memory}")
    print(f"attainment at {options.rate:,.0f} valid requests/s: {before:.4f} before, {after:.4f} after")
    took_s = time.monotonic() - began_s
    print(f"seed {options.seed}: {findings.count:,} attempts in {took_s:.0f} s{', interrupted' if interrupted else ''}")
    about = {"seed": options.seed, "attempts": findings.count, "seconds": took_s, "interrupted": interrupted}
    figures = {"memory_mb": watch.memory_mb, "attainment": {"before": before, "after": after}, "statuses": findings.statuses}
    cli.write_results(options.json, {**about, **figures, "findings": findings.found})
    sys.exit(130 if interrupted else 1 if findings.found else 0)


if __name__ == "__main__":
    cli.run(main)
