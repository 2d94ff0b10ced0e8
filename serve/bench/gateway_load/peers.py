"""Servers of other projects, with the same sleeping model. Each runs in a process of its own, in any Python environment."""

import contextlib
import dataclasses
import json
import pathlib
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator

from gateway_load import children
from gateway_load.children import Child
from superserve_jax import errors
from superserve_jax.simulation.paper_profile import paper_profile


@dataclasses.dataclass(frozen=True)
class Peer:
    """A server of another project.

    Args:
      module: the name of its package.
      path: the path of its requests.
    """

    module: str
    path: str


PEERS = {"mosec": Peer("mosec", "/inference"), "litserve": Peer("litserve", "/predict"), "ray": Peer("ray", "/")}
WORKERS = 4


def version(name: str, python: pathlib.Path | str) -> str:
    """The version of a peer in an environment. Raises ConfigError if it is not installed there."""
    code = f"import importlib.metadata as m; print(m.version({PEERS[name].module!r}))"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise errors.ConfigError(
            f"{name} is not installed in {python}: pip install 'superserve-jax[peers]', or name another environment with "
            "--peer-python"
        )
    return done.stdout.strip()


@contextlib.contextmanager
def started(name: str, subnet: int, *, batch: int, wait_ms: int, python: pathlib.Path | str) -> Iterator[tuple[Child, int]]:
    """Starts a peer. Yields its process and its port.

    Args:
      name: one of `PEERS`.
      subnet: the rank of the subnet as which the model sleeps.
      batch: the peer's largest batch.
      wait_ms: how long the peer waits for a batch to be full.
      python: the interpreter of the environment with the peer.
    """
    latency_ms, sizes = paper_profile().rows[subnet].latency_ms, paper_profile().batch_sizes
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sleeps = {"first_ms": latency_ms[0], "next_ms": (latency_ms[-1] - latency_ms[0]) / (sizes[-1] - 1), "rank": subnet}
    options = json.dumps({**sleeps, "port": port, "batch": batch, "wait_ms": wait_ms, "workers": WORKERS})

    def is_ready(_: Child) -> bool:
        request = urllib.request.Request(f"http://127.0.0.1:{port}{PEERS[name].path}", b'{"x": 5}')
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request, timeout=1) as response:
                return json.load(response)[0] == 5
        except (urllib.error.URLError, OSError, ValueError):
            return False

    environment = {"PEER_OPTIONS": options, "RAY_USAGE_STATS_ENABLED": "0", "LITSERVE_DISABLE_TELEMETRY": "1"}
    with children.started(f"peer_{name}.py", python=python, environment=environment, ready=is_ready) as child:
        yield child, port
