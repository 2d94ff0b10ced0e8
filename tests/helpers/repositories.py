"""Gateways with a folder of exports, whose servers have fake engines."""

import contextlib
import pathlib
import shutil
import threading
import types

import fakes
import gateways
import small_exports

from superserve_jax import gateway
from superserve_jax.manifest import read_manifest


def write(folder):
    """Fills a folder: two exports, and what may not be loaded."""
    first, elsewhere = folder / "exports" / "first", folder / "elsewhere"
    small_exports.write(first, small_exports.IMAGES)
    for other in (first.with_name("second"), elsewhere):
        shutil.copytree(first, other)
    exports = first.parent
    (exports / "link").symlink_to(elsewhere)
    (exports / "loop").symlink_to(exports / "loop")
    (exports / "file").write_text("")
    (exports / "empty").mkdir()
    (exports / "damaged").mkdir()
    (exports / "damaged" / "manifest.json").write_text("{}")
    return exports


class Opener:
    """Opens servers with fake engines for exports, as the option `open_model`.

    Args:
      on_run: the hook of the engines.

    Attributes:
      opened: the servers, in their order.
      entered: set when a server is about to open.
      gate: a server opens only when it is set.
      error: raised instead, unless it is None.
    """

    def __init__(self, on_run=None):
        self._on_run, self.opened, self.error = on_run, [], None
        self.entered, self.gate = threading.Event(), threading.Event()
        self.gate.set()

    def __call__(self, path):
        self.entered.set()
        assert self.gate.wait(fakes.WAIT_S)
        if self.error is not None:
            raise self.error
        server = fakes.serve(gateways.engine(self._on_run), policy="fixed:2")
        config = types.SimpleNamespace(num_classes=2, family="fake")
        server.model = types.SimpleNamespace(
            path=pathlib.Path(path), manifest=read_manifest(path), vocabulary=(), config=config
        )
        self.opened.append(server)
        return server

    @contextlib.contextmanager
    def shut(self):
        """Lets no server open until the end of the block."""
        self.entered.clear()
        self.gate.clear()
        try:
            yield
        finally:
            self.gate.set()


class Background:
    """Calls a function in a thread. It is a context, at whose end the thread must end soon."""

    def __init__(self, function, *arguments, **options):
        self._call = lambda: setattr(self, "result", function(*arguments, **options))
        self._thread = threading.Thread(target=self._call, daemon=True)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._thread.join(fakes.WAIT_S)
        assert not self._thread.is_alive()

    @property
    def is_running(self):
        return self._thread.is_alive()


@contextlib.contextmanager
def opened(folder, opener=None, servers=(), **options):
    """A gateway of a folder, with the servers of these names. Yields it."""
    with contextlib.ExitStack() as stack:
        given = {name: stack.enter_context(fakes.serve(gateways.engine(), policy="fixed:2")) for name in servers}
        more = {"port": 0, "models_dir": str(folder), "open_model": opener or Opener(), **options}
        yield stack.enter_context(gateway.Gateway(given, **more))


def change(door, name, what="load", content=b"", **headers):
    """Asks for a load or an unload. Returns the answer."""
    return gateways.request(door, "POST", f"/v2/repository/models/{name}/{what}", content, **headers)


def states(door, content=b""):
    """The states of all models in the index, by name, without the damaged export."""
    found = gateways.request(door, "POST", "/v2/repository/index", content).json
    return {entry["name"]: entry["state"] for entry in found if entry["name"] != "damaged"}
