"""How a server makes engines from an export on devices in other processes. No jax."""

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from superserve_jax import errors, foreign, manifest
from superserve_jax.engines.base import Engine
from superserve_jax.profile import Profile
from superserve_jax.remote.devices import RayDevice
from superserve_jax.serving import makers
from superserve_jax.serving.makers import Maker, Source

if TYPE_CHECKING:
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
        found = manifest.find(path).absolute()
        self._options = options
        about = manifest.read_manifest(found)
        self._source = Source.of(found, about["sha256"], **options)
        self._vocabulary = about["files"].get(manifest.VOCABULARY), about.get("vocabulary")  # tokens and settings

    @classmethod
    def open(cls, path: Any, devices: Sequence[Any], options: dict[str, Any]) -> tuple[Maker, Sequence[Engine], list[Profile]]:
        """The maker, and an engine and a profile for each device."""
        if odd := [device for device in devices if not isinstance(device, RayDevice)]:
            raise errors.ConfigError(
                f"expected devices of ss.ray_devices, got {foreign.text_of(odd[0])}; open the server with devices of this "
                "process, and add the others with add_worker"
            )
        maker = cls(path, options)
        return maker, *makers.make_all(devices, maker._source)

    def engine(self, device: Any, profile: Profile) -> tuple[Engine, Profile]:
        """Raises ConfigError: this process has no model."""
        raise errors.ConfigError(f"expected an engine or ss.ray_device, got {foreign.text_of(device)}")

    def source(self, profile: Profile) -> Source:
        """See `Maker.source`."""
        return self._source.at(profile)

    def successor(
        self, path_or_model: Any, workers: "Sequence[Worker]", profile: Profile
    ) -> tuple[Maker, Sequence[Engine], list[Profile]]:
        """See `Maker.successor`."""
        places = makers.places_of(workers)
        maker = RemoteMaker(path_or_model, self._options)
        if maker._vocabulary != self._vocabulary:
            raise manifest.other_vocabulary(maker._source.path, self._source.path)
        return maker, *makers.make_all(places, maker.source(profile))

    def settings(self) -> contextlib.AbstractContextManager[None]:
        """Changes nothing: this process has no jax."""
        return contextlib.nullcontext()
