"""Workers in other processes and on other hosts, by Ray. Ray is imported late, and jax only in the other processes.

    ray.init("auto")                                            # join a cluster, or address="local" for this machine alone
    server = ss.Server("runs/demo/export", devices=ss.ray_devices(15, num_gpus=1), slo_ms=36)
    server.add_worker(ss.ray_device(num_gpus=1))                # the 16th

The server, its queue and its policy stay in this process, the **router**. Each device is an actor, a process that Ray starts
where its options say. It opens the export by its path there, and holds weights and executables.

| to learn about | read |
|---|---|
| what users write: devices, their options, their actors | `devices.py` |
| what runs in an actor | `host.py` |
| the engine in the router: calls, patience, lost actors | `engine.py` |
| how a server makes engines from an export on such devices | `maker.py` |
| inputs and outputs as few arrays | `packing.py` |
| routers that are actors themselves, side by side | `router.py` |
| what a call to such a router carries | `calls.py` |
| the processes in front of them, which gather queries | `collector.py` |
| how actors are started | `actors.py` |

`serving/lost.py` says what a server does when an actor is lost, and how its worker comes back.
"""

from superserve_jax.remote.calls import RouterLostError
from superserve_jax.remote.collector import Collector
from superserve_jax.remote.devices import RayDevice, ray_device, ray_devices
from superserve_jax.remote.engine import RemoteEngine
from superserve_jax.remote.router import open_cell, start_router, stop_router

__all__ = [
    "Collector",
    "RayDevice",
    "RemoteEngine",
    "RouterLostError",
    "open_cell",
    "ray_device",
    "ray_devices",
    "start_router",
    "stop_router",
]
