"""The documents of the protocol (metadata, configuration, statistics) as plain values for JSON. No sockets."""

from collections.abc import Iterable, Mapping
from typing import Any

from prometheus_client import core, registry

import superserve_jax
from superserve_jax.gateway.model import VERSION, ServedModel
from superserve_jax.gateway.requests import OUTPUT
from superserve_jax.serving import prometheus

EXTENSIONS = (
    "binary_tensor_data",
    "classification",
    "model_configuration",
    "parameters",
    "statistics",
)
"""The extensions of the protocol that every gateway has."""
_REPOSITORY = "model_repository"
_PLATFORM = "superserve_jax"


def server_metadata(*, can_change: bool = False) -> dict[str, Any]:
    """The document of /v2.

    Args:
      can_change: whether clients can load and unload models.
    """
    extensions = [*EXTENSIONS, *([_REPOSITORY] if can_change else [])]
    return {"name": "superserve-jax", "version": superserve_jax.__version__, "extensions": extensions}


def model_metadata(model: ServedModel) -> dict[str, Any]:
    """The document of /v2/models/NAME: name, datatype and shape of input and output. -1 is a dimension of any size."""
    datatype, shape = model.output()
    return {
        "name": model.name,
        "versions": [VERSION],
        "platform": _PLATFORM,
        "inputs": [{"name": model.input.name, "datatype": model.input.datatype, "shape": [-1, *model.input.dims]}],
        "outputs": [{"name": OUTPUT, "datatype": datatype, "shape": [-1, *shape]}],
    }


def model_config(model: ServedModel) -> dict[str, Any]:
    """The document of /v2/models/NAME/config. Dimensions do not include the batch."""
    datatype, shape = model.output()
    profile = model.server.profile
    return {
        "name": model.name,
        "platform": _PLATFORM,
        "backend": _PLATFORM,
        "max_batch_size": profile.max_batch,
        "input": [{"name": model.input.name, "data_type": f"TYPE_{model.input.datatype}", "dims": model.input.dims}],
        "output": [{"name": OUTPUT, "data_type": f"TYPE_{datatype}", "dims": shape}],
        "dynamic_batching": {"preferred_batch_size": [*profile.batch_sizes]},
        "parameters": {
            "slo_ms": {"string_value": f"{model.server.slo_ms:g}"},
            "accuracies": {"string_value": ",".join(f"{row.accuracy:.6g}" for row in profile.rows)},
        },
    }


def model_statistics(model: ServedModel) -> dict[str, Any]:
    """The document of /v2/models/NAME/stats, an entry of `model_stats`.

    All counts are of rows: a request of 8 rows counts 8 times, also in `success`. The gateway does not measure how long inputs
    and outputs take to copy, so these times are 0. `compute_infer` is the time of the batches. `last_inference` is the end of
    the last batch.
    """
    snapshot = model.server.snapshot()
    queries, last_s = snapshot["queries"], snapshot["last_batch_s"]
    answered = queries["met"] + queries["late"]
    total_s, wait_s = snapshot["latency_s"]["sum"], snapshot["wait_s"]["sum"]
    sizes = {size: count for size, count in snapshot["batch_sizes"].items() if count}
    return {
        "name": model.name,
        "version": VERSION,
        "last_inference": model.last_inference_ms(sum(sizes.values()), last_s),
        "inference_count": answered,
        "execution_count": sum(sizes.values()),
        "inference_stats": {
            "success": _duration(answered, total_s),
            "fail": _duration(queries["failed"] + queries["expired"] + queries["refused"], 0.0),
            "queue": _duration(answered, wait_s),
            "compute_input": _duration(answered, 0.0),
            "compute_infer": _duration(answered, max(total_s - wait_s, 0.0)),
            "compute_output": _duration(answered, 0.0),
            "cache_hit": _duration(0, 0.0),
            "cache_miss": _duration(0, 0.0),
        },
        "batch_stats": [
            {
                "batch_size": int(size),
                "compute_input": _duration(count, 0.0),
                "compute_infer": _duration(count, snapshot["batch_busy_s"][size]),
                "compute_output": _duration(count, 0.0),
            }
            for size, count in sizes.items()
        ],
    }


class Metrics(registry.Collector):
    """The metrics of all models, as `serving.prometheus` makes them, with a label `model`.

    Args:
      models: the models by name. It is read at every scrape.
    """

    def __init__(self, models: Mapping[str, ServedModel]):
        self._models = models

    def collect(self) -> Iterable[core.Metric]:
        """The metrics now. Prometheus takes each metric once, so the samples of all models are in one."""
        found: dict[str, core.Metric] = {}
        for name, model in self._models.items():
            for metric in prometheus.metrics(model.server.snapshot()):
                samples = [sample._replace(labels={**sample.labels, "model": name}) for sample in metric.samples]
                if metric.name in found:
                    found[metric.name].samples += samples
                else:
                    metric.samples = samples
                    found[metric.name] = metric
        return found.values()


def _duration(count: int, seconds: float) -> dict[str, int]:
    """A count of events and the sum of their times, as the extension `statistics` tells them."""
    return {"count": count, "ns": int(1e9 * seconds)}
