"""Serves exports over the network, by the Open Inference Protocol over HTTP and gRPC.

    superserve serve runs/digits_resnet/export --port 8000 --grpc-port 8001 --slo-ms 36
    superserve serve digits --host 0.0.0.0 --policy fixed:largest
    superserve serve digits --demo
    superserve serve digits other=runs/demo/export
    superserve serve --models exports

Each argument is EXPORT or NAME=EXPORT. NAME is the name of the model in paths. By default, it is the name of the folder. If
that is called `export`, it is the name of the folder around it. All models get the same options, and share the devices.

With `--models DIR`, clients may load the exports right below DIR while the command runs, and unload models.

The ports open when the executables are compiled and warm. Then the command prints their addresses. A browser shows a live page
there. `--demo` sends traffic to look at. docs/network.md lists the calls and shows requests with curl and Python.
`pip install 'superserve-jax[serve]'` installs what it needs.

SIGTERM or Ctrl-C ends it: it closes the ports, answers the requests that have arrived, and exits with status 0. A second
Ctrl-C ends it at once. Library: gateway.Gateway, serving.server.
"""

import contextlib
import dataclasses
import functools
import logging
import math
import os
import signal
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any

import tyro

import superserve_jax as ss
from superserve_jax import cli, errors
from superserve_jax.dtypes import ComputeDtype
from superserve_jax.gateway.limits import Limits
from superserve_jax.manifest import read_manifest
from superserve_jax.serving.options import check_options, check_slo
from superserve_jax.serving.server import Server


@dataclasses.dataclass(frozen=True)
class Options:
    """Options.

    Args:
      exports: exports, each as EXPORT or NAME=EXPORT. EXPORT is a directory, or the name of an export in the package.
      models: a folder. Clients may load the exports right below it by name, and unload models. Without a token, they may do so
        only if the host is an address of this machine only.
      host: the address to listen at; 0.0.0.0 takes connections from other machines.
      port: the port of HTTP; 0 takes a free one.
      grpc_port: the port of gRPC; 0 takes a free one, and None opens none.
      slo_ms: latency objective of requests without one.
      policy: the policy, such as slackfit, fixed:largest, or my_file.py:my_policy (see docs/policies.md).
      batch_sizes: batch sizes to serve with; by default 1, 2, 4, 8 and 16, and on GPUs also 32 and 64 if throughput rises.
      lengths: length buckets of texts; by default powers of two from 16 up to the model's longest length.
      compute_dtype: the dtype to compute in; bfloat16 is for GPUs, and the export needs accuracies in it.
      max_queue: how many queries may wait; more are refused with status 429.
      expire: drop a query that can no longer meet its deadline, with status 504, instead of answering it late.
      demo: send steady traffic while the live page is open, and show controls for bursts on it.
      limits: what clients may do.
      token_file: a file with a token, which clients must send as `Authorization: Bearer TOKEN`. Without it, the environment
        variable SUPERSERVE_TOKEN may hold the token. Health probes need no token.
      tls_cert: a file in PEM with the certificate of this server and its chain, for TLS.
      tls_key: a file in PEM with the key of the certificate.
      access_log: a file to which a line of JSON is appended for each answer, or - for the standard
        output. Messages then go to the standard error.
    """

    exports: Annotated[tuple[str, ...], tyro.conf.Positional] = ()
    models: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = 8001
    slo_ms: float = 36.0
    policy: str = "slackfit"
    batch_sizes: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    compute_dtype: ComputeDtype = "float32"
    max_queue: int = 10_000
    expire: bool = False
    demo: bool = False
    limits: tyro.conf.OmitArgPrefixes[Limits] = dataclasses.field(default_factory=Limits)
    token_file: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    access_log: str | None = None


_CHECK_S = 0.5  # the time between two checks for a signal
_REPEAT_S = 0.5
"""A signal that comes sooner after another one is a copy of it. The program `timeout`, for example, can send a copy."""


class _StopError(KeyboardInterrupt):
    """A signal asked the command to end. No `except Exception` on the way swallows it."""


def main() -> None:
    """The command."""
    options = cli.parse(Options, __doc__)
    from superserve_jax import gateway  # here, since it needs the extra `serve`, and --help does not

    def chosen(*names: str) -> dict[str, Any]:
        return {name: getattr(options, name) for name in names}

    check_slo(options.slo_ms)
    # With --models, a server may open much later.
    check_options({"policy": options.policy, "max_queue": options.max_queue, "expire": options.expire})
    paths = gateway.named(options.exports)
    if not paths and options.models is None:
        raise errors.ConfigError("give an export, such as digits, or --models with a folder of exports")
    door = chosen("host", "port", "grpc_port", "limits", "tls_cert", "tls_key", "access_log", "demo")
    door |= {"token": gateway.read_token(options.token_file), "models_dir": options.models}
    gateway.check_options(**door)
    for path in paths.values():
        read_manifest(path)  # or a wrong path would be seen only when the models before it are compiled
    serving = chosen("slo_ms", "policy", "max_queue", "expire", "batch_sizes", "lengths", "compute_dtype")
    door["open_model"] = functools.partial(ss.Server, **serving)
    say = functools.partial(print, flush=True, file=sys.stderr if options.access_log == "-" else sys.stdout)
    opened = None
    try:
        with (
            stopped_by_signals() as signals,
            contextlib.ExitStack() as servers,
            signals.noticed(),
            gateway.Gateway(opened_by_name(paths, door["open_model"], servers, signals), **door) as opened,
            signals.noticed(),  # no second signal interrupts the closing, which answers the requests
        ):
            where = "" if options.host in opened.url else f" (and at all addresses of {options.host})"
            for name, model in opened.models.items():
                say(f"serving {name} at {opened.url}/v2/models/{name}{where} with {model.server!r}")
            if options.models is not None:
                say(f"clients may load the exports in {options.models} at {opened.url}/v2/repository/models/NAME/load")
            if opened.grpc_target is not None:
                say(f"gRPC at {opened.grpc_target}")
            # with TLS, curl may not trust the certificate
            hint = "" if options.tls_cert else f"; try also: curl {opened.url}/v2/health/ready"
            say(f"the live page is at {opened.url}{hint}")
            say("SIGTERM or Ctrl-C ends it")
            while not opened.wait(_CHECK_S):
                signals.check()
    except _StopError:
        if opened is None:
            say("ended before the port was open")
            return
    for name, model in opened.models.items():
        queries = model.server.snapshot()["queries"]
        say(f"{name}: ended after {queries['met'] + queries['late']:,} answers, {queries['met']:,} of them in time")
    if opened.models.is_compiling:  # Python would wait for the threads of the compiler, for up to a minute
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def opened_by_name(
    paths: Mapping[str, str], open_model: Callable[[str], Server], servers: contextlib.ExitStack, signals: "Signals"
) -> dict[str, Server]:
    """Opens a server of each export. The stack closes them; it does not keep one that a client has unloaded.

    Raises what `open_model` raises, and _StopError after a signal.
    """
    found = {}
    for name, path in paths.items():
        found[name] = open_model(path)
        servers.callback(_close, weakref.ref(found[name]))
        signals.check()
    return found


def _close(server: Callable[[], Server | None]) -> None:
    if (opened := server()) is not None:
        opened.close(drain=False)  # the gateway has answered the requests


class Signals:
    """What SIGTERM and SIGINT have asked for.

    Attributes:
      came: whether a signal has come.
      last_s: when the last one came, on the clock `time.monotonic`.
    """

    def __init__(self):
        self.came, self.last_s = False, -math.inf

    def check(self) -> None:
        """Raises _StopError if a signal has come."""
        if self.came:
            raise _StopError

    @contextlib.contextmanager
    def noticed(self) -> Iterator[None]:
        """Checks for a signal. After one that ends the block, SIGTERM is ignored, and Ctrl-C interrupts at once."""
        try:
            self.check()
            yield
        except _StopError:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            raise


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[Signals]:
    """Lets SIGTERM and SIGINT raise _StopError in the main thread.

    Python drops an error that is raised in a callback of the garbage collector or in `__del__`. So ask `Signals.check` after
    everything that takes long. If all goes well, the handlers stay until the process has ended: a second SIGTERM must not
    change its status.
    """
    signals = Signals()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def stop(*_: object) -> None:
        before_s, signals.came, signals.last_s = signals.last_s, True, time.monotonic()
        if signals.last_s - before_s > _REPEAT_S:
            raise _StopError

    try:
        for number in before:
            signal.signal(number, stop)
        yield signals
    except errors.SuperServeError:
        for number, handler in before.items():
            signal.signal(number, handler)
        raise
