"""How a server makes engines from an export on devices in other processes. No jax."""

import contextlib
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from superserve_jax import errors, foreign, manifest
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile
from superserve_jax.remote import host
from superserve_jax.remote.devices import RayDevice

if TYPE_CHECKING:
    from superserve_jax.serving.makers import Maker
    from superserve_jax.serving.worker import Worker


class RemoteMaker:
    """The maker of a server on devices of other processes, see `serving.makers.Maker`.

    Args:
      path: the directory of the export, here and on the hosts of the devices.
      options: arguments of `prepare.prepare` in the other processes.
    """

    model = None

    def __init__(self, path: Any, options: dict[str, Any]):
        if hasattr(path, "params"):
            raise errors.ConfigError("devices in other processes need the path of an export, got a model; give model.path")
        self.path, self._options = manifest.find(path).absolute(), options
        self._digest = manifest.read_manifest(self.path)["sha256"]

    @classmethod
    def open(cls, path: Any, given: Sequence[RayDevice], **options: Any) -> tuple["RemoteMaker", list[Engine], list[Profile]]:
        """The maker, and an engine and a profile for each device."""
        if odd := [device for device in given if not isinstance(device, RayDevice)]:
            raise errors.ConfigError(
                f"expected devices of ss.ray_devices, got {foreign.text_of(odd[0])}; open the server with one sort, and add "
                "the other devices with add_worker"
            )
        maker = cls(path, options)
        return maker, *maker._engines(given)

    def engine(self, device: Any, profile: Profile) -> tuple[Engine, Profile]:
        """See `Maker.engine`."""
        if not isinstance(device, RayDevice):
            raise errors.ConfigError(f"expected an engine or ss.ray_device, got {foreign.text_of(device)}")
        [engine], [own] = self._engines([device])
        return engine, own

    def successor(
        self, path_or_model: Any, workers: "Sequence[Worker]", profile: Profile
    ) -> "tuple[Maker, Sequence[Engine], list[Profile]]":
        """See `Maker.successor`."""
        same = {"batch_sizes": profile.batch_sizes, "lengths": profile.lengths or None}
        maker = RemoteMaker(path_or_model, {**self._options, **same})
        places = [getattr(getattr(worker, "engine", None), "place", None) for worker in workers]
        if odd := [worker.name for worker, place in zip(workers, places, strict=True) if not isinstance(place, RayDevice)]:
            raise errors.ConfigError(f"worker {odd[0]} was added as an engine; remove it first. If it has left, swap again")
        return maker, *maker._engines([place for place in places if isinstance(place, RayDevice)])

    def settings(self) -> contextlib.AbstractContextManager[None]:
        """Changes nothing: this process has no jax."""
        return contextlib.nullcontext()

    def _engines(self, devices: Sequence[RayDevice]) -> tuple[list[Engine], list[Profile]]:
        make = functools.partial(host.open_export, str(self.path), self._digest, self._options)
        key = f"{self._digest} {sorted(self._options.items())}"
        begun = [device.begin(key, make) for device in devices]  # all of them open the export at the same time
        made = [device.finish(one) for device, one in zip(devices, begun, strict=True)]
        return [engine for engine, _ in made], [profile for _, profile in made]
