"""Bad options, queries, policies and engines: the server refuses them with a documented error, or fails only their queries."""

import math
import pathlib

import bad
import numpy as np
import pytest
from fakes import PROFILE, SUBNETS, WAIT_S, fake, outcomes, serve
from hypothesis import example, given
from hypothesis import strategies as st
from small_exports import IMAGES, write

import superserve_jax as ss
from superserve_jax import errors, exports
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling import policies
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.server import Server

pytestmark = pytest.mark.usefixtures("no_test_hangs")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return exports.load(write(tmp_path_factory.mktemp("model") / "export", IMAGES))


@bad.fuzzed
@given(
    name=st.sampled_from(
        ["slo_ms", "max_queue", "max_queue_bytes", "admission", "max_tries", "max_failures", "stall_s", "clock", "policy"]
    ),
    value=bad.objects,
)
def test_a_server_opens_and_answers_or_refuses_its_options(name, value):
    if callable(value):  # a policy or a clock may be any function, so an unsuitable one fails later
        return
    kinds = errors.ConfigError, errors.DeadlineError, errors.UnknownNameError
    opened = bad.attempt(lambda: serve(**{name: value}), *kinds)
    if isinstance(opened, Server):
        with opened as s:
            assert outcomes([s.submit(np.float32(5), slo_ms=1e4)]) == [5]


@pytest.mark.parametrize("engines", [None, 5, [], [None], "x", [...]], ids=str)
def test_a_server_without_engines_or_without_a_profile_is_refused(engines):
    with pytest.raises(errors.ConfigError, match="engines"):
        Server.from_engines(engines, PROFILE)
    with pytest.raises(errors.ConfigError, match="profile"):
        Server.from_engines([fake()], engines)


@pytest.mark.parametrize("devices", [5, "cpu", [], [None], ["cpu"], [0]], ids=str)
def test_a_server_without_devices_is_refused(model, devices):
    with pytest.raises(errors.ConfigError, match="devices"):
        ss.Server(model, devices=devices)


@pytest.mark.parametrize("sizes", [5, "x", [], [0], [1.5], [2, 1], [True], [None], [-1], [math.nan]], ids=str)
def test_a_server_with_impossible_batch_sizes_is_refused(model, sizes):
    with pytest.raises(errors.ConfigError, match="batch_sizes"):
        ss.Server(model, batch_sizes=sizes)
    with pytest.raises(errors.ConfigError, match="no lengths" if sizes else "lengths|batch_sizes"):
        ss.Server(model, lengths=sizes or [3], batch_sizes=(1,))


@pytest.fixture(scope="module")
def opened():
    with serve() as s:
        yield s


@bad.fuzzed
@given(
    x=bad.objects
    | st.builds(np.zeros, st.sampled_from([(), 1, (0,), (1, 1)]), st.sampled_from([np.float32, object, "U3", float])),
    slo=bad.objects | st.just(1e4),
    floor=bad.objects | st.floats(),
    many=st.booleans(),
)
@example(x=[[1], [1, 2]], slo=None, floor=0.0, many=False)
@example(x=np.float32(1), slo=np.array([1.0, 2.0]), floor=np.array([0.1, 0.2]), many=False)
def test_a_query_is_answered_or_refused(opened, x, slo, floor, many):
    kinds = errors.InputError, errors.DeadlineError, errors.AccuracyFloorError
    submit = opened.submit_many if many else opened.submit
    for options in ({"slo_ms": 1e4}, {"slo_ms": slo}, {"min_accuracy": floor}):
        for value in (x, [np.float32(1)] if many else np.float32(1)):
            asked = bad.attempt(lambda: submit(value, **options), *kinds)  # noqa: B023
            for future in asked if isinstance(asked, list) else [asked]:
                if not isinstance(future, errors.SuperServeError):
                    assert len(future.result(WAIT_S).output) == 2


@pytest.mark.parametrize("value", ["file.png", pathlib.Path("file.png"), np.str_("file.png")], ids=repr)
def test_the_name_of_a_file_is_refused_with_the_function_that_reads_it(opened, value):
    images = fake(input_shape=(28, 28, 1), input_dtype=np.uint8)
    with serve(images) as s:
        for submit in (lambda: s.submit(value), lambda: s.submit_many([value])):
            with pytest.raises(
                errors.InputError, match=r"data\.read_image\(path, image_size=28, channels=1\), and submit the"
            ):
                submit()
        with pytest.raises(errors.InputError, match="never cast: convert it"):
            s.submit(np.zeros((28, 28, 1)))
    with pytest.raises(errors.InputError, match="never cast: convert it"):  # not a model of images
        opened.submit(value)


latencies = st.floats(1e-9, 1e12)


@bad.fuzzed
@given(
    table=st.lists(st.tuples(st.floats(0, 1), st.tuples(latencies, latencies, latencies)), min_size=3, max_size=3),
    slos=st.lists(st.floats(1e-300, 1e11) | st.just(5e-324), min_size=1, max_size=5),
    floor=st.floats(-1, 1),
    policy=st.sampled_from(policies.NAMES),
)
def test_a_server_answers_every_query_with_any_profile_slo_and_floor(table, slos, floor, policy):
    rows = tuple(Row(s, accuracy, ms) for s, (accuracy, ms) in zip(SUBNETS, table, strict=True))
    with serve(policy=policy, profile=Profile((1, 2, 4), rows)) as s:
        waiting = [s.submit(np.float32(i), slo_ms=ms) for i, ms in enumerate(slos)]
        asked = bad.attempt(lambda: s.submit(np.float32(9), min_accuracy=floor), errors.AccuracyFloorError)
        waiting += [] if isinstance(asked, errors.AccuracyFloorError) else [asked]
        assert outcomes(waiting) == [*range(len(slos)), 9][: len(waiting)]


rubbish = st.builds(Decision, st.sampled_from([*SUBNETS, None, 5, []]), bad.objects, bad.objects) | bad.objects


@bad.fuzzed
@given(decision=rubbish, floor=st.sampled_from([0.0, 0.75]), count=st.integers(1, 6))
@example(decision=Decision(SUBNETS[0], math.nan), floor=0.75, count=3)
@example(decision=Decision(SUBNETS[0], math.nan, math.nan), floor=0.0, count=3)
def test_queries_are_answered_or_fail_if_the_policy_decides_rubbish(decision, floor, count):
    with serve(policy=lambda profile, state: decision) as s:
        waiting = [s.submit(np.float32(i), min_accuracy=floor) for i in range(count)]
        for future in waiting:
            answered = bad.attempt(lambda: future.result(WAIT_S), errors.InferenceError)  # noqa: B023
            assert isinstance(answered, errors.InferenceError) or answered.output[0] < count


@pytest.mark.parametrize(
    "name",
    [
        *("", "slakfit", "a\nb", "proteus:1", "fixed:", "fixed:99", "fixed:-1", "fixed:" + "9" * 5000),
        *("slackfit-paper:0", "slackfit-paper:x", "slackfit-paper:" + "9" * 60, "slackfit-paper:8:" * 2000),
    ],
    ids=lambda name: name[:20],
)
def test_an_unknown_policy_is_refused_with_a_short_message(name):
    with pytest.raises((errors.ConfigError, errors.UnknownNameError)) as caught:
        serve(policy=name)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("output", [None, 5, [], [1, 2, 3, 4, 5], {}, "x"], ids=str)
def test_queries_fail_if_the_engine_returns_rubbish(output):
    engine = fake()
    engine.run = lambda *_: output
    with serve(engine) as s:
        for answered in outcomes(s.submit_many(np.arange(2, dtype=np.float32))):
            assert isinstance(answered, errors.InferenceError | errors.WorkersLostError) or output == "x"
            assert output != [] or "0 outputs for" in str(answered)
