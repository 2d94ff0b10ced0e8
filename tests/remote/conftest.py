"""One cluster of Ray on this machine, for the tests of this folder. Without Ray, the tests that need it are skipped."""

import os
import time

import psutil
import pytest


def ray_processes():
    """The processes of Ray below this one."""
    return [p.name() for p in psutil.Process().children(recursive=True) if p.name().startswith(("ray", "gcs_server"))]


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """The cluster's address. Its processes share one cache of executables, and compile in less time."""
    ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'superserve-jax[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERSERVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=40,
            object_store_memory=200 << 20,
        )
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
    end_s = time.monotonic() + 30
    while left := ray_processes():
        assert time.monotonic() < end_s, left
        time.sleep(0.1)
