"""A DynaBERT with length buckets: executables, and the server on an export of it."""

import dataclasses

import jax
import numpy as np
import pytest
from tiny import assert_close, random_params

import superserve_jax as ss
from superserve_jax import errors, exports, machine
from superserve_jax.engines import executables, measuring, prepare
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.exports import Served
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.lengths import default_lengths
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet

BATCHES, LENGTHS = (1, 4), (3, 7)
CONFIG = DynaBERTConfig(
    num_classes=3, vocab_size=11, max_length=7, hidden_size=8, depths=(1,), heads=(1, 2), ffn=(3, 5), pad_id=9, eps=1e-5
)


def export(path, config):
    model = SuperNet(config, random_params(config))
    chosen = [model.space.smallest(), model.space.largest()]
    served = [Served(s, 0.6 + 0.2 * i, None, config.flops(s), config.num_params(s)) for i, s in enumerate(chosen)]
    return exports.load(exports.export(path, model, served, measured="random weights"))


pytestmark = pytest.mark.usefixtures("module_cache")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return export(tmp_path_factory.mktemp("text") / "export", CONFIG)


def texts(config, *lengths, seed=0):
    """Inputs of these lengths, as clients send them: some end in padding, and some contain padding."""
    rng = np.random.default_rng(seed)
    made = []
    for i, n in enumerate(lengths):
        ids = rng.integers(0, 9, (1, n))
        ids[0, 1:-1:3] = config.pad_id
        ids[0, -1] = 1 + i % 8
        made.append(config.pack(ids, rng.integers(0, config.token_types, (1, n)), length=n)[0])
    return made


def padded(config, inputs):
    """The inputs with padding up to the longest length."""
    blanks = config.pack(np.zeros((len(inputs), 0), np.int32))
    return [np.concatenate([x, blank[len(x) :]]) for x, blank in zip(inputs, blanks, strict=True)]


def expected(model, subnet, inputs):
    return np.asarray(model(np.stack(padded(model.config, inputs)), subnet))


def test_padded_executables_answer_as_the_model_does_at_every_length(model):
    engine = DeviceEngine(model, jax.devices()[0], subnet_list=model.subnets, batch_sizes=BATCHES, lengths=LENGTHS)
    assert engine.input_shape[0] == 7
    for subnet in model.subnets:
        for seed, lengths in enumerate([(1,), (2,), (3,), (7,), (4,), (2, 1), (5, 1, 3), (1, 7, 2, 4), (1, 3, 2, 2)]):
            inputs = texts(model.config, *lengths, seed=seed)  # after longer ones: nothing of them may be left in the buffer
            assert_close(engine.run(subnet, 4, inputs), expected(model, subnet, inputs))
    with pytest.raises(errors.InputError, match="8 tokens, but the longest length bucket has 7"):
        engine.run(subnet, 1, [np.zeros((8, *engine.input_shape[1:]), np.int32)])


def test_inputs_may_be_ids_without_token_types(tmp_path):
    model = export(tmp_path / "export", dataclasses.replace(CONFIG, token_types=1))
    [subnet, _] = model.subnets
    engine = DeviceEngine(model, jax.devices()[0], subnet_list=[subnet], batch_sizes=(2,), lengths=LENGTHS)
    for lengths in ((7, 2), (1,), (3, 2)):
        inputs = texts(model.config, *lengths)
        assert_close(engine.run(subnet, 2, inputs), expected(model, subnet, inputs))


def test_a_batch_runs_the_program_of_its_own_length_bucket(model):
    engine = DeviceEngine(model, jax.devices()[0], subnet_list=model.subnets, batch_sizes=BATCHES, lengths=LENGTHS)
    ran = []
    engine.calls = {
        key: ([lambda *args, key=key, call=call: (ran.append((key[2], args[1].shape[:2])), call(*args))[1]], *rest)
        for key, ([call], *rest) in engine.calls.items()
    }
    for lengths in ((1, 2), (3,), (2, 4, 1), (7, 1)):
        engine.run(model.subnets[0], 4, texts(model.config, *lengths))
    assert ran == [(3, (4, 3)), (3, (4, 3)), (7, (4, 7)), (7, (4, 7))]


def test_a_server_answers_texts_of_all_lengths_as_the_model_does_and_compiles_nothing(model, caplog, compilations):
    with ss.Server(model.path, slo_ms=2000, batch_sizes=BATCHES, lengths=LENGTHS) as server:
        assert "lengths [3, 7]" in caplog.text
        assert server.profile.lengths == LENGTHS
        inputs = texts(model.config, *np.random.default_rng(0).integers(1, 8, 60))
        inputs += padded(model.config, inputs)
        before = compilations()
        best = server.submit(inputs[0], min_accuracy=0.8).result(timeout=60)
        replies = [f.result(timeout=60) for f in server.submit_many(inputs)]
        assert compilations() == before
    assert best.subnet == model.subnets[-1]
    for x, reply in zip(inputs, replies, strict=True):
        assert_close(reply.output[None], expected(model, reply.subnet, [x]))


def test_lengths_default_to_powers_of_two_and_are_checked_against_the_family(model):
    assert prepare.check_lengths(DynaBERTConfig(), None) == (16, 32, 64, 128) == default_lengths(128)
    assert prepare.check_lengths(CONFIG, (2, 4)) == (2, 4)
    with pytest.raises(errors.ConfigError, match="length 8 exceeds the model's max_length=7"):
        ss.Server(model, lengths=(4, 8))
    with pytest.raises(errors.ConfigError, match="lengths must be ascending"):
        ss.Server(model, lengths=(4, 2))


def test_images_have_no_lengths(tiny):
    assert prepare.check_lengths(tiny.config, None) == ()
    with pytest.raises(errors.ConfigError, match="one shape and no lengths"):
        prepare.check_lengths(tiny.config, (32,))


def test_a_stored_profile_serves_some_of_its_lengths_and_no_others(tmp_path):
    model = export(tmp_path / "export", CONFIG)
    device = jax.devices()[0]
    engine = DeviceEngine(model, device, subnet_list=model.subnets, batch_sizes=(1,), lengths=LENGTHS)
    kind = machine.device_kind(device)
    measured = measuring.measure(model, engine, repeats=2)
    measured.save(exports.profile_path(model.path, kind))
    assert prepare.prepare(model, batch_sizes=(1,), lengths=LENGTHS)[2] == [measured]
    assert prepare.stored_profile(model, kind, (1,), (7,)) == measured.at((1,), (7,)) == measured.each_length[-1]
    assert prepare.stored_profile(model, kind, (1,), (4, 7)) is None


def test_each_length_has_a_cache_entry_of_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv("SUPERSERVE_CACHE", str(tmp_path / "cache"))
    smallest = programs.sliced(CONFIG, CONFIG.space().smallest())
    for _ in range(2):
        made = executables.build([smallest], (1,), jax.devices()[0], lengths=(3, 7))
        assert [key[1:] for key in made] == [(1, 3), (1, 7)]
        assert len(list((tmp_path / "cache").glob("*.bin"))) == 2
