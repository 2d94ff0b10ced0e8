"""Makers: how a server makes its engines from an export. No jax until a model is loaded.

| maker | of a server that was opened with |
|---|---|
| `GivenEngines` | engines |
| `LocalMaker` | an export, on devices of this process; processes may be added |
| `remote.maker.RemoteMaker` | an export, on processes of Ray |
"""

import contextlib
import functools
import queue
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from superserve_jax import errors, foreign, manifest
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile
from superserve_jax.serving import threads

if TYPE_CHECKING:
    from superserve_jax.serving.worker import Worker


class Source(NamedTuple):
    """An export as other processes open it.

    Args:
      path: the export's directory, the same on every host.
      digest: the SHA-256 in its manifest.
      options: arguments of `prepare.prepare` that the user gave, as sorted pairs.
      sizes: the same of a profile, instead of those in `options`; empty if the process chooses them.
    """

    path: str
    digest: str
    options: tuple[tuple[str, Any], ...]
    sizes: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, path: Any, digest: str, **options: Any) -> "Source":
        """Makes a source."""
        return cls(str(path), digest, tuple(sorted(options.items())))

    def at(self, profile: Profile) -> "Source":
        """The same with the batch sizes, length buckets and dtype of a profile."""
        sizes = {"batch_sizes": profile.batch_sizes, "lengths": profile.lengths or None}
        return self._replace(sizes=(*sizes.items(), ("compute_dtype", profile.compute_dtype)))

    def fits(self, made: "Source", profile: Profile) -> bool:
        """Whether an engine with this profile, made from the source `made`, is what this source asks for."""
        return self._replace(sizes=()) == made._replace(sizes=()) and self.sizes in ((), self.at(profile).sizes)

    def open(self) -> tuple[Engine, Profile]:
        """An engine and its profile, on the first device that jax has in this process.

        Raises ExportError if there is no such export, or if another one is at the path.
        """
        found = manifest.read_manifest(self.path)["sha256"]
        if found != self.digest:
            raise errors.ExportError(
                f"{self.path} on {socket.gethostname()} is another export ({found[:12]}) than on the router "
                f"({self.digest[:12]}); copy the router's export there"
            )
        from superserve_jax.engines import prepare  # here, since it imports jax

        return prepare.on_first_device(self.path, **{**dict(self.options), **dict(self.sizes)})


class Place(Protocol):
    """A process that can hold engines, such as an actor of Ray."""

    def make_engine(self, source: Source | None) -> tuple[Engine, Profile]:
        """An engine and its own profile. Without a source, the engine that the process had last."""
        ...

    def is_up(self, timeout_s: float) -> bool:
        """Whether the process answers. Waits for an answer, at most so long."""
        ...

    def open_server(
        self, path: Any, devices: "Sequence[Any]", options: dict[str, Any]
    ) -> "tuple[Maker, Sequence[Engine], list[Profile]]":
        """A maker for an export, and an engine and a profile for each device. `options` are arguments of `prepare.prepare`."""
        ...


def is_place(device: Any) -> bool:
    """Whether a device is a `Place`."""
    return hasattr(device, "make_engine")


def make_all(places: Sequence[Place], source: Source) -> tuple[list[Engine], list[Profile]]:
    """An engine and a profile for each place, made at the same time. All have the batch sizes of the first one.

    The first error is raised at once. The other places go on to their end, and their engines are then freed.
    """
    made: list[Any] = _at_once([functools.partial(place.make_engine, source) for place in places])
    first: Any = made[0][1] if made else None
    odd = [i for i, (_, own) in enumerate(made) if (own.batch_sizes, own.lengths) != (first.batch_sizes, first.lengths)]
    for i in odd:  # each has chosen its sizes itself
        made[i] = None  # frees the engine
    again = _at_once([functools.partial(places[i].make_engine, source.at(first)) for i in odd])
    for i, one in zip(odd, again, strict=True):
        made[i] = one
    return [engine for engine, _ in made], [profile for _, profile in made]


def _at_once(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """The results of calls, each in a daemon thread: neither an error nor the end of the process waits for the slowest."""
    ended: queue.SimpleQueue[tuple[int, Any, BaseException | None]] = queue.SimpleQueue()

    def run(i: int) -> None:
        try:
            ended.put((i, calls[i](), None))
        except BaseException as error:
            ended.put((i, None, error))

    for i in range(len(calls)):
        threads.start(functools.partial(run, i), f"superserve-make-{i}")
    results: list[Any] = [None] * len(calls)
    for _ in calls:
        i, result, error = ended.get()
        if error is not None:
            raise error
        results[i] = result
    return results


class Maker(Protocol):
    """Makes the engines of one server.

    Attributes:
      model: the model, see `Server.model`.
    """

    model: Any

    def engine(self, device: Any, profile: Profile) -> tuple[Engine, Profile]:
        """An engine on another device, with the subnets, batch sizes and length buckets of a profile, and its own profile."""
        ...

    def source(self, profile: Profile) -> Source | None:
        """What a `Place` needs to make such an engine. None if there is no export."""
        ...

    def successor(
        self, path_or_model: Any, workers: "Sequence[Worker]", profile: Profile
    ) -> "tuple[Maker, Sequence[Engine], list[Profile]]":
        """A maker for another export with the same inputs, and an engine and a profile for each worker."""
        ...

    def settings(self) -> contextlib.AbstractContextManager[None]:
        """Applies the settings that jax had when the server was opened."""
        ...


Settings = Callable[[], contextlib.AbstractContextManager[None]]
Traffic = Callable[[float], contextlib.AbstractContextManager[None]]


def open_export(
    path_or_model: Any, traffic: Traffic, *, devices: Sequence[Any] | None, **given: Any
) -> tuple[Maker, Sequence[Engine], list[Profile]]:
    """A maker for an export, and an engine and a profile for each device.

    Args:
      path_or_model: see `Server`.
      traffic: see `server.background_traffic`.
      devices: the devices. With a `Place` first, all must be places.
      **given: the other arguments of `prepare.prepare`.
    """
    if isinstance(devices, Sequence) and devices and is_place(devices[0]):
        return devices[0].open_server(path_or_model, devices, given)
    return LocalMaker.open(path_or_model, traffic, devices=devices, **given)


def places_of(workers: "Sequence[Worker]") -> list[Any]:
    """The devices and places of workers. Raises ConfigError for a worker that was added as an engine."""
    places = [getattr(getattr(worker, "engine", None), "place", None) for worker in workers]
    if odd := [worker.name for worker, place in zip(workers, places, strict=True) if place is None]:
        raise errors.ConfigError(f"worker {odd[0]} was added as an engine; remove it first. If it has left, swap again")
    return places


class GivenEngines:
    """The maker of a server that was opened with engines. It makes no engines."""

    model = None

    def engine(self, device: Any, profile: Profile) -> tuple[Engine, Profile]:
        """See `Maker.engine`."""
        raise errors.ConfigError(f"expected an engine, got {foreign.text_of(device)}; this server cannot make one")

    def source(self, profile: Profile) -> None:
        """See `Maker.source`."""

    def successor(
        self, path_or_model: Any, workers: "Sequence[Worker]", profile: Profile
    ) -> tuple[Maker, Sequence[Engine], list[Profile]]:
        """Raises ConfigError."""
        raise errors.ConfigError("a server opened with engines has no model to replace; add and remove workers instead")

    def settings(self) -> contextlib.AbstractContextManager[None]:
        """Changes nothing."""
        return contextlib.nullcontext()


class LocalMaker:
    """The maker of a server on devices of this process.

    Args:
      model: the model.
      settings: see `prepare.kept_settings`.
      traffic: see `server.background_traffic`.
      slicing, slice_bytes: options of the server.
    """

    def __init__(self, model: Any, settings: Settings, traffic: Traffic, *, slicing: Any, slice_bytes: int | None):
        self.model, self.settings = model, settings
        self._traffic, self._slicing = traffic, {"slicing": slicing, "slice_bytes": slice_bytes}

    @classmethod
    def open(
        cls, path_or_model: Any, traffic: Traffic, *, slicing: Any, slice_bytes: int | None, **given: Any
    ) -> tuple["LocalMaker", Sequence[Engine], list[Profile]]:
        """The maker, and an engine and a profile for each device. `given` are the other arguments of `prepare.prepare`."""
        from superserve_jax.engines import prepare  # here, since it imports jax

        how = {"slicing": slicing, "slice_bytes": slice_bytes}
        settings = prepare.kept_settings()
        model, engines, profiles = prepare.prepare(path_or_model, background=traffic, **how, **given)
        return cls(model, settings, traffic, **how), engines, profiles

    def engine(self, device: Any, profile: Profile) -> tuple[Engine, Profile]:
        """See `Maker.engine`."""
        if profile.cpu_workers > 1:
            what = foreign.text_of(device)
            raise errors.ConfigError(
                f"expected an engine, got {what}; this server makes none, since its workers divide the cores"
            )
        from superserve_jax.engines import prepare  # here, since it imports jax

        return prepare.make_engine(self.model, device, profile, **self._slicing), profile

    def source(self, profile: Profile) -> Source:
        """See `Maker.source`."""
        return Source.of(self.model.path.absolute(), self.model.manifest["sha256"], **self._slicing).at(profile)

    def successor(
        self, path_or_model: Any, workers: "Sequence[Worker]", profile: Profile
    ) -> tuple[Maker, Sequence[Engine], list[Profile]]:
        """See `Maker.successor`."""
        from superserve_jax.engines import prepare  # here, since it imports jax

        places = places_of(workers)
        model = prepare.load(path_or_model)
        prepare.check_same_inputs(self.model, model, profile.lengths)
        maker = LocalMaker(model, self.settings, self._traffic, **self._slicing)
        same: dict[str, Any] = {"batch_sizes": profile.batch_sizes, "lengths": profile.lengths or None}
        same |= {"compute_dtype": profile.compute_dtype, "background": self._traffic}
        if here := [place for place in places if not is_place(place)]:
            _, engines, profiles = prepare.prepare(model, devices=here, **same, **self._slicing)
        else:
            engines, profiles = [], []
        elsewhere = [place for place in places if is_place(place)]
        more = make_all(elsewhere, maker.source(profile))
        parts = [iter(zip(*made, strict=True)) for made in ((engines, profiles), more)]
        made = [next(parts[is_place(place)]) for place in places]
        return maker, [engine for engine, _ in made], [one for _, one in made]
