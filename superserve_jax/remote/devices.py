"""Devices in other processes: what users give to a server. Ray is imported late."""

import itertools
import logging
import threading
import uuid
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from superserve_jax import errors
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile
from superserve_jax.remote import actors, host
from superserve_jax.remote.engine import RemoteEngine, drop
from superserve_jax.remote.host import Failed, Opened
from superserve_jax.serving.makers import Source

_log = logging.getLogger(__name__)

_WARN_S = 60  # after so long, a log message says that an engine is not ready yet
_SILENT_S = 60  # an actor that has answered a ping, and answers none for so long, is lost. Ray does not notice it
_BEGIN_S = 600  # the longest wait for the first answer: for a free host, and until the process runs
_OPEN_S = 3600  # the longest wait for the engine: until it has compiled everything and measured a profile
_PROCESS = uuid.uuid4().hex  # names this process in tokens
_tokens = itertools.count()
_THREADS = 8  # one for pings. Each server takes two for batches, and one while an engine is made, as in a swap


class RayDevice:
    """A process that Ray starts, and the device in it. See `ray_device`.

    Attributes:
      label: the name of its workers: its own name, or "ray:" and a number.
    """

    _numbers = itertools.count()

    def __init__(self, options: dict[str, Any], name: str = ""):
        self.options, self.name = options, name
        self.label = name or f"ray:{next(self._numbers)}"
        self._source: Source | None = None  # of the last engine
        self._latest: Callable[[], RemoteEngine | None] = lambda: None  # a weak reference to the last engine
        self._actor: Any = None
        self._ping: Any = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        given = [f"{key}={value!r}" for key, value in {**self.options, **({"name": self.name} if self.name else {})}.items()]
        return f"ray_device({', '.join(given)})"

    @property
    def actor(self) -> Any:
        """Ray's handle of the actor. The first use starts the actor."""
        with self._lock:
            if self._actor is None:
                self._actor = actors.start(host.Host, options=self.options, name=self.name, at_once=_THREADS)
            return self._actor

    def open_server(self, path: Any, devices: Sequence[Any], options: dict[str, Any]) -> Any:
        """See `serving.makers.Place`."""
        from superserve_jax.remote.maker import RemoteMaker  # here, since it imports this module

        return RemoteMaker.open(path, devices, options)

    def make_engine(self, source: Any) -> tuple[Engine, Profile]:
        """See `serving.makers.Place`. `source` is a `Source` or None.

        Raises what opening the export raised there, EngineLostError, and ConfigError if versions differ.
        """
        try:
            return self._made(self.actor, source or self._source)
        except _ActorGone:  # for good, for example by `ray.kill`; the next one starts anew
            with self._lock:
                self._actor = None
            return self._made(self.actor, source or self._source)

    def _made(self, actor: Any, source: Source | None) -> tuple[Engine, Profile]:
        if source is None:
            raise errors.ConfigError(f"{self} has no export; open a server with it, or add it to a server with an export")
        token = f"{_PROCESS}:{next(_tokens)}"
        try:
            opened = self._opened(actor, source, token)
        except BaseException:
            drop(actor, token)  # the actor may still be making the engine
            raise
        engine = RemoteEngine(self, actor, token, opened)
        self._source, self._latest = source.at(engine.profile), weakref.ref(engine)
        return engine, engine.profile

    def _opened(self, actor: Any, source: Source, token: str) -> Opened:
        import ray
        from ray import exceptions

        before = self._latest()
        if before is not None and before.is_lost:
            before = None  # the process has started again since
        try:
            begun = actor.open.remote(source, token, alone=bool(self.name))
            self._wait(begun, actor, before)
            opened: Any = ray.get(begun)
        except exceptions.ActorDiedError as error:
            raise _ActorGone(f"{self} cannot be started: {errors.one_line(error)}") from error
        except exceptions.RayError as error:
            raise errors.EngineLostError(f"{self} cannot be started: {errors.one_line(error)}") from error
        if isinstance(opened, Failed):
            raise opened.exception()
        _check_versions(opened)
        return opened

    def _wait(self, begun: Any, actor: Any, before: RemoteEngine | None) -> None:
        """Waits until the actor has opened an export.

        Raises EngineLostError if the actor takes too long or falls silent, or if the engine that it had `before` is lost.
        """
        import ray

        ping, heard_s = None, 0  # when it last answered a ping; 0 before it runs
        for waited_s in itertools.count(1):
            done, _ = ray.wait([begun], timeout=1.0)
            if done:
                return
            ping = ping or actor.ping.remote()
            if ray.wait([ping], timeout=0.0)[0]:
                ray.get(ping)  # it may be an error
                ping, heard_s = None, waited_s
            if (before is not None and before.is_lost) or 0 < heard_s <= waited_s - _SILENT_S:
                raise errors.EngineLostError(f"{self} was lost while it opened an export")
            why = "it is making its engine" if heard_s else "`ray status` shows whether the cluster has room for it"
            if waited_s >= (_OPEN_S if heard_s else _BEGIN_S):
                raise errors.EngineLostError(f"{self} is not ready after {waited_s} s; {why}")
            if waited_s == _WARN_S:
                _log.warning("still waiting for %s; %s", self, why)

    def is_up(self, timeout_s: float) -> bool:
        """See `serving.makers.Place`."""
        import ray
        from ray import exceptions

        try:
            self._ping = self._ping or self.actor.ping.remote()
            done, _ = ray.wait([self._ping], timeout=timeout_s)
            if done:
                ping, self._ping = self._ping, None
                ray.get(ping)
            return bool(done)
        except exceptions.ActorUnavailableError:
            self._ping = None
        except exceptions.RayError:  # the actor is dead for good, for example killed by `ray.kill`
            self._ping = None
            with self._lock:
                self._actor = None
        return False


class _ActorGone(errors.EngineLostError):
    """Ray does not start the actor again."""


def ray_device(*, name: str = "", **options: Any) -> RayDevice:
    """A device in a process that Ray starts, as a worker of a server.

    Args:
      name: with a name, the process outlives this one. If this process dies, another router that gives the same name takes
        it over, with the engine that it holds, and the engines of other exports are freed. Only one router at a time may use
        a name.
      **options: options of the actor in Ray's own terms: num_gpus, num_cpus, resources, runtime_env, scheduling_strategy.

    Raises ConfigError for an option that this library sets itself.

    >>> ray_device(num_gpus=1)
    ray_device(num_gpus=1)
    """
    ours = {"max_restarts", "max_task_retries", "max_concurrency", "lifetime", "get_if_exists", "namespace"}
    if odd := sorted(ours & options.keys()):
        raise errors.ConfigError(f"superserve_jax sets {odd[0]} itself; leave it out")
    return RayDevice(options, name)


def ray_devices(count: int, *, name: str = "", **options: Any) -> list[RayDevice]:
    """Several devices with the same options, see `ray_device`. A name gets a number: "cell-0", "cell-1", ...

    >>> [device.name for device in ray_devices(2, name="cell")]
    ['cell-0', 'cell-1']
    """
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise errors.ConfigError(f"count must be a whole number from 1 up, got {count!r}")
    return [ray_device(name=f"{name}-{i}" if name else "", **options) for i in range(count)]


def _check_versions(opened: Opened) -> None:
    for name, version in host.versions().items():
        if opened.versions.get(name) != version:
            raise errors.ConfigError(
                f"{opened.host} has {name} {opened.versions.get(name)}, this process has {version}; install the same version"
            )
