"""Makers: how a server makes its engines from an export. No jax until a model is loaded.

| maker | of a server that was opened with |
|---|---|
| `GivenEngines` | engines |
| `LocalMaker` | an export, on devices of this process |
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from superserve_jax import errors, foreign
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile

if TYPE_CHECKING:
    from superserve_jax.serving.worker import Worker


class Place(Protocol):
    """A process that can hold an engine, such as an actor of Ray."""

    def make_engine(self, profile: Profile) -> tuple[Engine, Profile]:
        """An engine with the subnets, batch sizes and length buckets of a profile, and its own profile."""
        ...

    def is_up(self, timeout_s: float) -> bool:
        """Whether the process answers. Waits for an answer, at most so long."""
        ...


class Maker(Protocol):
    """Makes the engines of one server.

    Attributes:
      model: the model, see `Server.model`.
    """

    model: Any

    def engine(self, device: Any, profile: Profile) -> tuple[Engine, Profile]:
        """An engine on another device, with the subnets, batch sizes and length buckets of a profile, and its own profile."""
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
      devices: the devices. If they are places in other processes, their `open_server` does it.
      **given: the other arguments of `prepare.prepare`.
    """
    if isinstance(devices, Sequence) and devices and hasattr(devices[0], "open_server"):
        return devices[0].open_server(path_or_model, devices, **given)
    return LocalMaker.open(path_or_model, traffic, devices=devices, **given)


class GivenEngines:
    """The maker of a server that was opened with engines. It makes no engines."""

    model = None

    def engine(self, device: Any, profile: Profile) -> tuple[Engine, Profile]:
        """See `Maker.engine`."""
        raise errors.ConfigError(f"expected an engine, got {foreign.text_of(device)}; this server cannot make one")

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

    def successor(
        self, path_or_model: Any, workers: "Sequence[Worker]", profile: Profile
    ) -> tuple[Maker, Sequence[Engine], list[Profile]]:
        """See `Maker.successor`."""
        from superserve_jax.engines import prepare  # here, since it imports jax

        places = [getattr(getattr(worker, "engine", None), "place", None) for worker in workers]
        if odd := [w.name for w, place in zip(workers, places, strict=True) if place is None or hasattr(place, "make_engine")]:
            raise errors.ConfigError(f"worker {odd[0]} was added as an engine; remove it first. If it has left, swap again")
        model = prepare.load(path_or_model)
        prepare.check_same_inputs(self.model, model, profile.lengths)
        same: dict[str, Any] = {"batch_sizes": profile.batch_sizes, "lengths": profile.lengths or None}
        same |= {"compute_dtype": profile.compute_dtype, "devices": places, "background": self._traffic}
        _, engines, profiles = prepare.prepare(model, **same, **self._slicing)
        return LocalMaker(model, self.settings, self._traffic, **self._slicing), engines, profiles
