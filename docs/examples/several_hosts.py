"""Serves the demo's export on a cluster of Ray, with one worker for each of 16 GPUs."""

import numpy as np
import ray

import superserve_jax as ss

ray.init("auto")  # joins the cluster on this host; without one, first run `ray start --head`
with ss.Server("runs/demo/export", devices=ss.ray_devices(15, num_gpus=1), slo_ms=36) as server:
    server.add_worker(ss.ray_device(num_gpus=1))  # the 16th
    image = np.zeros((32, 32, 1), np.uint8)
    print(server.submit(image).result())
