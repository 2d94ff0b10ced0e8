"""One of several cells: a router with workers in processes of Ray, and its gateway."""

import signal

import ray

import superserve_jax as ss
from superserve_jax import gateway

ray.init("auto")
devices = ss.ray_devices(8, name="cell-a", num_gpus=1)
with ss.Server("runs/demo/export", devices=devices, slo_ms=36) as server, gateway.Gateway(server, host="0.0.0.0") as opened:
    print(opened.url, flush=True)
    signal.sigwait({signal.SIGTERM})
