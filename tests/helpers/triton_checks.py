"""Calls a gateway with tritonclient, unchanged, and checks the answers. It runs in the environment of `make clients`.

    python triton_checks.py http|http-aio|grpc|grpc-aio|http-repository|grpc-repository ADDRESS

It prints the name of each check that has passed. The gateway has a model "supernet", whose inputs are UINT8 (2, 2), and whose
output is (the input's first value, the subnet's rank). An input that begins with `SLOW` takes a second. With "-repository", it
has no model, and may load a model "first".
"""

import asyncio
import importlib
import queue
import sys
import time

import numpy as np
from tritonclient.utils import InferenceServerException

SLOW = 99
MODEL = "supernet"


def images(*values):
    return np.uint8([[[value, 2], [3, 4]] for value in values])


def given(client, *values):
    """An input, as the module `tritonclient.http` or `tritonclient.grpc` has it."""
    array = images(*values)
    made = client.InferInput("input", array.shape, "UINT8")
    made.set_data_from_numpy(array)
    return [made]


def check_first_values(result, *values):
    assert result.as_numpy("output")[:, 0].tolist() == list(values)


def fails(text, call, *arguments, **options):
    error = None
    try:
        call(*arguments, **options)
    except Exception as e:  # the clients raise errors of several kinds
        error = e
    assert text in str(error), error


async def fails_async(text, awaited):
    error = None
    try:
        await awaited
    except InferenceServerException as e:
        error = e
    assert text in str(error), error


def done(*names):
    for name in names:
        print(name)


def check_documents(client):
    """The calls that HTTP and gRPC have with the same names. Returned values are dicts."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(MODEL)
    assert client.is_model_ready(MODEL, "1")
    done("health")


def check_http(url):
    from tritonclient import http

    client = http.InferenceServerClient(url, concurrency=4)
    check_documents(client)
    assert not client.is_model_ready("other")
    assert "binary_tensor_data" in client.get_server_metadata()["extensions"]
    assert client.get_model_metadata(MODEL)["inputs"][0]["shape"] == [-1, 2, 2]
    assert client.get_model_config(MODEL)["max_batch_size"] == 4
    assert client.get_model_repository_index()[0]["name"] == MODEL
    done("metadata")
    check_first_values(client.infer(MODEL, given(http, 7)), 7)
    check_first_values(client.infer(MODEL, given(http, 7, 8, 9), request_id="a", model_version="1"), 7, 8, 9)
    result = client.infer(MODEL, given(http, 7), parameters={"slo_ms": 900, "min_accuracy": 0.1}, timeout=10**6, priority=1)
    assert result.get_response()["parameters"]["met_slo"] is True
    done("infer")
    outputs = [http.InferRequestedOutput("output", binary_data=False), http.InferRequestedOutput("subnet")]
    result = client.infer(MODEL, given(http, 7, 8), outputs=outputs)
    check_first_values(result, 7, 8)
    assert result.as_numpy("subnet").tolist() == [2, 2]
    classes = client.infer(MODEL, given(http, 7), outputs=[http.InferRequestedOutput("output", class_count=1)])
    assert classes.as_numpy("output").tolist() == [[b"7:0:cat"]]
    in_json = http.InferInput("input", [1, 2, 2], "UINT8")
    in_json.set_data_from_numpy(images(7), binary_data=False)
    check_first_values(client.infer(MODEL, [in_json]), 7)
    done("outputs")
    for coding in ("gzip", "deflate"):
        options = {"request_compression_algorithm": coding, "response_compression_algorithm": coding}
        check_first_values(client.infer(MODEL, given(http, *range(90)), **options), *range(90))
    done("compression")
    waiting = [client.async_infer(MODEL, given(http, value)) for value in range(20)]
    for value, request in enumerate(waiting):
        check_first_values(request.get_result(), value)
    done("async_infer")
    fails("unknown model 'other'", client.infer, "other", given(http, 7))
    fails("slo_ms", client.infer, MODEL, given(http, 7), parameters={"slo_ms": -1})
    done("errors")
    impatient = http.InferenceServerClient(url, network_timeout=0.2)
    fails("timed out", impatient.infer, MODEL, given(http, SLOW))
    done("timeout")
    assert client.get_inference_statistics(MODEL)["model_stats"][0]["inference_stats"]["success"]["count"] > 100
    done("statistics")


async def check_http_aio(url):
    from tritonclient import http
    from tritonclient.http import aio

    client = aio.InferenceServerClient(url)
    assert await client.is_server_ready()
    assert (await client.get_model_metadata(MODEL))["name"] == MODEL
    found = await asyncio.gather(*(client.infer(MODEL, given(http, value)) for value in range(50)))
    for value, result in enumerate(found):
        check_first_values(result, value)
    options = {"request_compression_algorithm": "gzip", "response_compression_algorithm": "gzip"}
    check_first_values(await client.infer(MODEL, given(http, *range(90)), **options), *range(90))
    await fails_async("unknown model", client.infer("other", given(http, 7)))
    await client.close()
    done("aio")


def check_grpc(target):
    from tritonclient import grpc

    client = grpc.InferenceServerClient(target)
    check_documents(client)
    fails("NOT_FOUND", client.is_model_ready, "other")
    assert "statistics" in client.get_server_metadata().extensions
    assert [*client.get_model_metadata(MODEL).inputs[0].shape] == [-1, 2, 2]
    assert client.get_model_config(MODEL).config.max_batch_size == 4
    assert client.get_model_repository_index().models[0].state == "READY"
    done("metadata")
    check_first_values(client.infer(MODEL, given(grpc, 7)), 7)
    check_first_values(client.infer(MODEL, given(grpc, 7, 8, 9), request_id="a", model_version="1"), 7, 8, 9)
    parameters = {"slo_ms": 900, "min_accuracy": 0.1}
    result = client.infer(MODEL, given(grpc, 7), parameters=parameters, timeout=10**6, priority=1)
    assert result.get_response().parameters["met_slo"].bool_param
    done("infer")
    outputs = [grpc.InferRequestedOutput("output"), grpc.InferRequestedOutput("subnet")]
    assert client.infer(MODEL, given(grpc, 7, 8), outputs=outputs).as_numpy("subnet").tolist() == [2, 2]
    classes = client.infer(MODEL, given(grpc, 7), outputs=[grpc.InferRequestedOutput("output", class_count=1)])
    assert classes.as_numpy("output").tolist() == [[b"7:0:cat"]]
    done("outputs")
    for coding in ("gzip", "deflate"):
        check_first_values(client.infer(MODEL, given(grpc, *range(90)), compression_algorithm=coding), *range(90))
    done("compression")
    found = queue.Queue()
    for value in range(20):
        client.async_infer(MODEL, given(grpc, value), lambda result, error: found.put((result, error)))
    assert {found.get(timeout=10)[0].as_numpy("output")[0, 0] for _ in range(20)} == {*range(20)}
    context = client.async_infer(MODEL, given(grpc, SLOW), lambda result, error: found.put((result, error)))
    context.cancel()
    assert "Locally cancelled" in str(found.get(timeout=10)[1])
    done("async_infer")
    client.start_stream(lambda result, error: found.put((result, error)))
    for value in range(50):
        client.async_stream_infer(MODEL if value != 30 else "other", given(grpc, value))
    for value in range(50):
        result, error = found.get(timeout=10)
        if value == 30:
            assert "unknown model 'other'" in str(error)
        else:
            check_first_values(result, value)
    client.stop_stream()
    done("stream")
    fails("INVALID_ARGUMENT", client.infer, MODEL, given(grpc, 7), parameters={"slo_ms": True})
    done("errors")
    fails("Deadline Exceeded", client.infer, MODEL, given(grpc, SLOW), client_timeout=0.2)
    done("timeout")
    assert client.get_inference_statistics(MODEL).model_stats[0].inference_stats.success.count > 100
    done("statistics")


async def check_grpc_aio(target):
    from tritonclient import grpc
    from tritonclient.grpc import aio

    client = aio.InferenceServerClient(target)
    assert await client.is_server_ready()
    assert (await client.get_model_metadata(MODEL)).name == MODEL
    found = await asyncio.gather(*(client.infer(MODEL, given(grpc, value)) for value in range(50)))
    for value, result in enumerate(found):
        check_first_values(result, value)
    await fails_async("NOT_FOUND", client.infer("other", given(grpc, 7)))
    await fails_async("Deadline Exceeded", client.infer(MODEL, given(grpc, SLOW), client_timeout=0.2))

    async def requests():
        for value in range(20):
            yield {"model_name": MODEL, "inputs": given(grpc, value), "request_id": str(value)}

    value = 0
    async for result, error in client.stream_infer(requests()):
        assert error is None
        check_first_values(result, value)
        value += 1
    assert value == 20
    await client.close()
    done("aio")


def check_repository(module, address):
    """Loads and unloads a model, with the calls that HTTP and gRPC have in common."""
    client = module.InferenceServerClient(address)
    as_json = {"as_json": True} if module.__name__.endswith("grpc") else {}

    def states():
        index = client.get_model_repository_index(**as_json)
        return {model["name"]: model["state"] for model in (index["models"] if as_json else index)}

    assert "model_repository" in client.get_server_metadata(**as_json)["extensions"]
    assert states()["first"] == "UNAVAILABLE"
    fails("unknown model 'first'", client.infer, "first", given(module, 7))
    client.load_model("first")
    assert states()["first"] == "READY"
    assert client.is_model_ready("first")
    check_first_values(client.infer("first", given(module, 7)), 7)
    client.load_model("first")
    client.unload_model("first")
    assert states()["first"] == "UNAVAILABLE"
    client.load_model("first")
    client.unload_model("first", unload_dependents=True)
    fails("unknown model 'nowhere'", client.load_model, "nowhere")
    fails("unknown parameter 'config'", client.load_model, "first", config="{}")
    fails("unknown parameter", client.load_model, "first", config="{}", files={"file:1/model": b"a"})
    done("repository")


if __name__ == "__main__":
    kind, address = sys.argv[1:]
    began_s = time.monotonic()
    check = {"http": check_http, "grpc": check_grpc, "http-aio": check_http_aio, "grpc-aio": check_grpc_aio}.get(kind)
    if kind.endswith("repository"):
        check_repository(importlib.import_module(f"tritonclient.{kind.partition('-')[0]}"), address)
    elif kind.endswith("aio"):
        asyncio.run(check(address))
    else:
        check(address)
    print(f"{time.monotonic() - began_s:.1f} s", file=sys.stderr)
