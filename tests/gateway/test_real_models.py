"""A gateway in front of real networks: images, token ids, texts, and a swap of the export."""

import dataclasses
import functools
import json
import threading

import fakes
import jax
import numpy as np
import pytest
import repositories
from fakes import LONG_MS
from gateways import app, binary_body, body, call, infer
from tiny import TINY, assert_close, random_images, random_params, random_statistics

import superserve_jax as ss
from superserve_jax import gateway, machine
from superserve_jax.exports import Served, export, profile_path
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.gateway.model import ServedModel, default_name
from superserve_jax.profile import Profile, Row
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.vocabulary import Vocabulary

WORDS = Vocabulary(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "good", "bad", "film"))
TEXT = DynaBERTConfig(
    num_classes=3, vocab_size=9, max_length=7, hidden_size=8, depths=(1,), heads=(1,), ffn=(3,), token_types=2, eps=1e-5
)
LENGTHS = {"lengths": (7,)}


def write(folder, config, *, seed=0, accuracy=0.5, vocabulary=None):
    """Writes an export of random weights with one subnet and a latency profile."""
    subnet = config.space().largest()
    statistics = {} if vocabulary else {subnet: random_statistics(config, subnet, seed)}
    model = SuperNet(config, random_params(config, seed), statistics)
    served = [Served(subnet, accuracy, None, 1, 1)]
    export(folder, model, served, measured="random weights", class_names=("a", "b", "c"), vocabulary=vocabulary)
    kind, rows = machine.device_kind(jax.devices()[0]), (Row(subnet, accuracy, (1.0,)),)
    Profile((1,), **({"rows_at": {7: rows}} if vocabulary else {"rows": rows}), device=kind).save(profile_path(folder, kind))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gateway")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERSERVE_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def texts(folder):
    with ss.Server(
        write(folder / "text" / "export", TEXT, vocabulary=WORDS), batch_sizes=(1,), slo_ms=LONG_MS, **LENGTHS
    ) as s:
        yield s


def logits(served, content):
    """What a gateway answers, as an array."""
    answer = call(app(served), "POST", "/v2/models/supernet/infer", content)
    assert answer.status == 200, answer.content
    [output] = answer.json["outputs"]
    return np.float32(output["data"]).reshape(output["shape"])


def test_images_are_answered_as_by_the_model_also_after_a_swap(folder):
    old, new = (write(folder / name, TINY, seed=seed, accuracy=0.5 + seed / 10) for seed, name in enumerate(("old", "new")))
    images = random_images(TINY, 3)
    with ss.Server(old, batch_sizes=(1,), slo_ms=LONG_MS) as s:
        door = app(s, "old")
        for path, accuracy in ((old, 0.5), (new, 0.6)):
            if path != old:
                s.swap(path)
            content, length = binary_body(images)
            header = [(b"inference-header-content-length", b"%d" % length)]
            found = call(door, "POST", "/v2/models/old/infer", content, header).json
            assert_close(np.float32(found["outputs"][0]["data"]).reshape(3, 3), np.asarray(ss.load(path)(images)))
            assert (found["parameters"]["accuracy"], found["parameters"]["subnet"]) == (accuracy, "0,0,0")
        assert call(door, "GET", "/v2/models/old").json["outputs"] == [
            {"name": "output", "datatype": "FP32", "shape": [-1, 3]}
        ]


def test_a_swap_under_load_loses_no_request_and_keeps_the_positions_of_subnets(folder):
    old, new = (write(folder / name, TINY, seed=seed, accuracy=0.5 + seed / 10) for seed, name in ((2, "one"), (3, "other")))
    found, stop = [], threading.Event()

    def client(door):
        content = body(random_images(TINY, 1))
        while not stop.is_set():
            answer = call(door, "POST", "/v2/models/one/infer", content)
            found.append((answer.status, answer.json["parameters"]["subnet"], answer.json["parameters"]["accuracy"]))

    with ss.Server(old, batch_sizes=(1,), slo_ms=LONG_MS) as s:
        clients = [threading.Thread(target=client, args=(app(s, "one"),)) for _ in range(3)]
        for thread in clients:
            thread.start()
        s.swap(new)
        count = len(found)
        fakes.wait_until(lambda: len(found) > count + 10)
        stop.set()
        for thread in clients:
            thread.join()
    assert {status for status, *_ in found} == {200}
    assert {position for _, position, _ in found} == {"0"}
    assert {accuracy for *_, accuracy in found} == {0.7, 0.8}


def test_long_texts_are_split_in_another_thread(texts, monkeypatch):
    threads, real = [], ServedModel.encoded

    def encoded(self, rows):
        threads.append(threading.current_thread())
        return real(self, rows)

    monkeypatch.setattr(ServedModel, "encoded", encoded)
    for text in ("good film", "good film " * 1000):
        given = {"name": "input", "datatype": "BYTES", "shape": [1], "data": [text]}
        assert logits(texts, json.dumps({"inputs": [given]}).encode()).shape == (1, 3)
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


def test_texts_and_token_ids_are_answered_as_by_the_model(texts):
    for first, second in ((["good film", "bad"], None), (["good"], ["bad film"])):
        ids = texts.model.encode(first, second)
        expected = np.asarray(texts.model(ids))
        given = {"name": "input", "datatype": "BYTES", "shape": [len(first)], "data": first}
        if second is not None:
            given |= {"shape": [len(first), 2], "data": [*zip(first, second, strict=True)]}
        assert_close(logits(texts, json.dumps({"inputs": [given]}).encode()), expected)
        assert_close(logits(texts, body(ids)), expected)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([[[2, 0], [9, 0]]], "token id 9, expected 0 to 8"),
        ([[[2, 0], [-1, 0]]], "token id -1"),
        ([[[2, 2], [4, 0]]], "token type 2, expected 0 to 1"),
        ([[[2, 0]] * 8], "expected 1 to 7"),
    ],
)
def test_token_ids_that_the_model_does_not_have_are_refused(texts, ids, message):
    answer = call(app(texts), "POST", "/v2/models/supernet/infer", body(np.int32(ids)))
    assert answer.status == 400
    assert message in answer.error


def test_a_model_has_the_name_of_its_export(texts):
    assert default_name(texts) == "text"
    found = call(app(texts), "GET", "/v2/models/supernet").json
    assert found["inputs"] == [{"name": "input", "datatype": "INT32", "shape": [-1, -1, 2]}]
    assert ServedModel("x", texts).input.texts == 2


@pytest.mark.slow
def test_clients_load_a_real_export_and_its_successor(folder):
    exports = folder / "exports"
    write(exports / "mine", TINY, seed=0, accuracy=0.5)
    images = random_images(TINY, 2)
    open_model = functools.partial(ss.Server, batch_sizes=(1,), slo_ms=LONG_MS)
    with gateway.Gateway({}, port=0, models_dir=str(exports), open_model=open_model) as door:
        for seed, accuracy in enumerate((0.5, 0.5, 0.6)):
            if accuracy == 0.6:
                write(exports / "mine", TINY, seed=seed, accuracy=accuracy)
            answer = repositories.change(door, "mine")
            assert (answer.status, answer.content) == (200, b"{}")
            server = door.models["mine"].server
            found = infer(door, body(images), "/v2/models/mine/infer").json
            assert_close(np.float32(found["outputs"][0]["data"]).reshape(2, 3), np.asarray(ss.load(exports / "mine")(images)))
            assert found["parameters"]["accuracy"] == accuracy
        assert server.snapshot()["queries"]["met"] == 3 * len(images)  # the swaps have kept the server
        write(exports / "mine", dataclasses.replace(TINY, channels=3, mean=(0.4,) * 3, std=(0.3,) * 3), accuracy=0.7)
        answer = repositories.change(door, "mine")
        assert (answer.status, "model 'mine' cannot be loaded" in answer.error) == (400, True)
        assert infer(door, body(images), "/v2/models/mine/infer").status == 200
        assert repositories.change(door, "mine", "unload").status == 200
        assert repositories.change(door, "mine").status == 200
        assert door.models["mine"].input.dims == [9, 9, 3]
