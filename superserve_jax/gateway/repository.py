"""The models of a gateway, and the folder from which clients may load others, as the protocol's extension model_repository.

The models change in the event loop only. Threads open, swap and close the servers, since this takes long. Loads and unloads of
one name wait for each other. Only one server is opened at a time: to compile for two at once would slow down both.

A load that has begun goes on if its client goes away. If the gateway closes, clients that wait for a load or an unload get an
error at once.
The thread that opens a server cannot be interrupted; it closes the server when it is open.
"""

import functools
import logging
import pathlib
import threading
from collections.abc import Callable, Coroutine, ItemsView, Iterator, Mapping, ValuesView
from typing import Any

from superserve_jax import errors
from superserve_jax.gateway.failures import ClosingError, RequestError
from superserve_jax.gateway.folder import Folder
from superserve_jax.gateway.limits import MOST_BODY_BYTES, Limits, body_limit
from superserve_jax.gateway.model import VERSION, ServedModel, check_name
from superserve_jax.gateway.threads import Threads
from superserve_jax.gateway.turns import Turns
from superserve_jax.manifest import read_manifest
from superserve_jax.serving.server import Server

_log = logging.getLogger(__name__)

OpenModel = Callable[[str], Server]
"""Opens a server of an export's directory."""

_CLOSE_S = 1.0  # how long a loaded server may take to close, when the gateway has closed
_THREADS = 8  # that look at the folder, swap, and close servers
_NO_LIMITS = Limits()
# Errors that the operator can do something about. The client reads their text, too.
_REFUSALS = (
    *(errors.ConfigError, errors.DataError, errors.ExportError, errors.NotCalibratedError, errors.ProfileError),
    errors.UnknownNameError,
)


class Repository(Mapping[str, ServedModel]):
    """The models by name. It may be read in any thread; only its own methods change it.

    Args:
      models: the models at the start. Their servers stay the caller's.
      folder: the folder with the exports that clients may load; None if they may load none.
      open_model: opens the server of a loaded model.
      limits: the limits of the gateway.
      may_change: whether clients may load and unload models, if there is a folder.

    Attributes:
      now: the models at this moment. Each change replaces this dict by another one.
      by_target: the models at this moment, by the usual targets of their inferences over HTTP.
      can_change: whether clients can load and unload models.
      max_body_bytes: the longest body of an inference, for any model that is there or may be loaded.
      is_compiling: whether a thread opens a server, or swaps an export in.

    Raises ConfigError if there is no such folder, or if a server has two names although clients may unload one of them.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        folder: str | None = None,
        open_model: OpenModel = Server,
        *,
        limits: Limits = _NO_LIMITS,
        may_change: bool = False,
    ):
        self.now, self.by_target = dict[str, ServedModel](), dict[bytes, ServedModel]()
        self._replace(models)
        self._folder = None if folder is None else Folder(folder)
        if folder is not None:
            _check_distinct(models)
        self._open_model, self._limits, self._may_change = open_model, limits, may_change
        self.can_change, self.is_compiling = may_change and folder is not None, False
        bodies = [model.max_body_bytes for model in models.values()]
        self.max_body_bytes = max(bodies) if folder is None else max([*bodies, body_limit(limits, MOST_BODY_BYTES)])
        self._threads, self._compiling, self._turns = Threads(_THREADS), Threads(1), Turns()
        self._states = dict[str, str]()  # what happens to a name
        self._reasons = dict[str, str]()  # why the last load failed
        self._owning, self._owned, self._closed = threading.Lock(), set[Server](), False  # servers that clients have loaded
        self._tell_shared()

    def __getitem__(self, name: str) -> ServedModel:
        return self.now[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.now)

    def items(self) -> ItemsView[str, ServedModel]:
        """The names and the models at this moment."""
        return self.now.items()

    def values(self) -> ValuesView[ServedModel]:
        """The models at this moment."""
        return self.now.values()

    async def index(self, *, ready_only: bool = False) -> list[dict[str, str]]:
        """The document of /v2/repository/index: the models, the exports in the folder, and whether each is ready.

        Args:
          ready_only: whether to leave out what is not ready.
        """
        others = set[str]() if self._folder is None or ready_only else await self._threads.run(self._folder.exports)
        found = [self._entry(name) for name in sorted({*self.now, *self._states, *others})]
        return [entry for entry in found if entry["state"] == "READY" or not ready_only]

    async def load(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Opens a server for an export in the folder. Returns when the server is ready.

        If the model is there already, a changed export is swapped in (see `Server.swap`). With an unchanged export, nothing
        is done, unless the server has no workers any more. Then another server is opened.

        Args:
          name: the name of the folder, and of the model.
          parameters: must be empty.

        Raises RequestError, or ClosingError if the gateway closes.
        """
        folder = self._check(name, parameters)
        path = await self._threads.run(folder.find, name)
        await self._alone(name, functools.partial(self._load, name, path))

    async def unload(self, name: str, parameters: Mapping[str, Any]) -> None:
        """Takes a model away, and closes its server when the queries that it has accepted are answered.

        After `drain_s` seconds, the rest of the queries fail. Nothing is done if the model is not loaded.

        Args:
          name: the name of the model.
          parameters: may have `unload_dependents`, a bool without an effect, since no model depends on another.

        Raises RequestError, or ClosingError if the gateway closes.
        """
        folder = self._check(name, parameters, unload_dependents=bool)
        if name not in self.now:
            await self._threads.run(folder.find, name)
        await self._alone(name, functools.partial(self._unload, name))

    def end(self) -> None:
        """Ends the loads and unloads in progress, because the gateway closes. Called in the event loop."""
        self._turns.end()

    def close(self) -> None:
        """Closes the servers that clients have loaded, also those that open later. Any thread may call it, also twice."""
        with self._owning:
            self._closed = True
            owned = [*self._owned]
        for server in owned:
            server.close(drain=False, timeout_s=_CLOSE_S)

    # -- inside -----------------------------------------------------------------------------------------------------------

    def _replace(self, models: Mapping[str, ServedModel]) -> None:
        self.now = dict(models)
        self.by_target = {
            f"/v2/models/{name}{version}/infer".encode(): model
            for name, model in models.items()
            for version in ("", f"/versions/{VERSION}")
        }

    def _entry(self, name: str) -> dict[str, str]:
        model, state = self.now.get(name), self._states.get(name)
        if state is None and model is not None and model.is_ready():
            state, reason = "READY", ""
        elif state is None:
            state, reason = "UNAVAILABLE", self._reasons.get(name, "it is not loaded")
            reason = reason if model is None else "the server is closed, or has no workers"
        else:
            reason = "the answer to the request tells the result"
        return {"name": name, "version": VERSION, "state": state, "reason": reason}

    def _check(self, name: str, parameters: Mapping[str, Any], **known: type) -> Folder:
        """Returns the folder. Raises RequestError unless clients may load and unload this name with these parameters."""
        if self._folder is None:
            raise RequestError("no models can be loaded or unloaded here; start the gateway with --models DIR")
        if not self._may_change:
            raise RequestError(
                "models can be loaded and unloaded only with a token, or if the gateway listens at 127.0.0.1 or ::1; "
                "start it with --token-file, or with another --host",
                status=403,
            )
        try:
            check_name(name)
        except errors.ConfigError as e:
            raise RequestError(str(e)) from e
        for parameter, value in parameters.items():
            if parameter not in known:
                raise RequestError(f"unknown parameter {parameter[:100]!r}; the export is loaded as it is, so leave it out")
            if not isinstance(value, known[parameter]):
                raise RequestError(f"{parameter} is {str(value)[:50]!r}, expected {known[parameter].__name__}")
        return self._folder

    async def _alone(self, name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Runs a load or an unload after the earlier ones of this name."""

        async def run() -> None:
            try:
                await work()
            finally:
                self._states.pop(name, None)

        await self._turns.run(name, run)

    async def _load(self, name: str, path: pathlib.Path) -> None:
        self._states[name] = "LOADING"
        self._reasons.pop(name, None)
        model = self.now.get(name)
        try:
            if model is not None and model.is_ready():
                return await self._compile(_reload, model, path, model.server in self._owned)
            if model is not None:
                await self._unload(name)
            self._states[name] = "LOADING"
            opened = await self._compile(self._open, name, path)
            self._replace({**self.now, name: opened})  # not in one line: other models may come and go during the `await`
        except _REFUSALS as e:
            self._reasons[name] = errors.one_line(e)
            raise RequestError(f"model '{name}' cannot be loaded: {errors.one_line(e)}") from e
        except Exception as e:
            self._reasons[name] = f"it could not be loaded ({type(e).__name__}); the log of the gateway has the reason"
            raise
        _log.info("model '%s' is loaded", name)
        self._tell_shared()

    def _tell_shared(self) -> None:
        """Warns about devices that several models use."""
        users = dict[str, list[str]]()
        for name, model in self.now.items():
            for device in {worker["name"] for worker in model.server.snapshot()["workers"]}:
                users.setdefault(device, []).append(name)
        for device, names in users.items():
            if len(names) > 1:
                _log.warning(
                    "%s share %s, and each is scheduled as if it were alone (see docs/models.md)", ", ".join(names), device
                )

    async def _compile(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function in the thread that compiles."""

        def run() -> Any:
            self.is_compiling = True
            try:
                return work(*arguments)
            finally:
                self.is_compiling = False

        return await self._compiling.run(run)

    def _open(self, name: str, path: pathlib.Path) -> ServedModel:
        """Opens a server. Called in a thread."""
        server = self._open_model(str(path))
        try:
            model = ServedModel(name, server, self._limits)
            with self._owning:
                if self._closed:
                    raise ClosingError
                self._owned.add(server)
        except BaseException:
            server.close(drain=False)
            raise
        return model

    async def _unload(self, name: str) -> None:
        model = self.now.get(name)
        if model is None:
            return
        self._replace({key: value for key, value in self.now.items() if key != name})
        self._states[name] = "UNLOADING"
        await self._threads.run(functools.partial(model.server.close, timeout_s=self._limits.drain_s))
        with self._owning:
            self._owned.discard(model.server)
        _log.info("model '%s' is unloaded", name)


def _check_distinct(models: Mapping[str, ServedModel]) -> None:
    """Raises ConfigError if a server has two names: to unload one of them would close it for both."""
    names = dict[Server, str]()
    for name, model in models.items():
        if (other := names.setdefault(model.server, name)) != name:
            raise errors.ConfigError(
                f"'{other}' and '{name}' are one server, and an unload of one would close both; open a server for each name"
            )


def _reload(model: ServedModel, path: pathlib.Path, is_loaded: bool) -> None:
    """Swaps an export in, unless it is the one that is served. Called in a thread."""
    served = model.server.model
    # The name of a model that clients have loaded may be a link, which now leads to another export of the folder.
    if served is None or (not is_loaded and served.path.resolve() != path):
        raise errors.ConfigError("a model with this name is served from elsewhere; unload it first")
    if served.manifest["sha256"] != read_manifest(path)["sha256"]:
        model.server.swap(path)
