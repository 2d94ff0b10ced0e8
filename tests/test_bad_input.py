"""Bad input to whatever a user writes or sends: files, configs, options, policies and queries.

Each is accepted, or refused with one of the documented errors. Nothing hangs. `bad.attempt` lets every other error through,
which fails the test. exports/test_fuzzed_exports.py does the same to exports.
"""

import json
import math
import pathlib

import bad
import numpy as np
import pytest
import tyro
from hypothesis import example, given
from hypothesis import strategies as st
from small_exports import IMAGES, write
from tiny import TINY

import superserve_jax as ss
from superserve_jax import errors, exports
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.manifest import MANIFEST_NAME
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling import policies
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.server import Server
from superserve_jax.simulation import azure, traces
from superserve_jax.simulation.traces import Trace
from superserve_jax.subnet import Subnet
from superserve_jax.training import data
from superserve_jax.training.config import TrainConfig, config_from_json, config_to_json, load_config
from superserve_jax.vocabulary import Vocabulary

pytestmark = pytest.mark.usefixtures("no_test_hangs")

WAIT_S = 10.0
SUBNETS = tuple(Subnet((i,)) for i in (0, 1))
ROWS = tuple(Row(s, a, (1.0 + i, 1.5 + i, 2.0 + i)) for i, (s, a) in enumerate(zip(SUBNETS, (0.7, 0.8), strict=True)))
PROFILE = Profile((1, 2, 4), ROWS)
PROFILES = (PROFILE.to_json(), Profile((1, 2, 4), rows_at={4: ROWS, 8: ROWS}).to_json())


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The path of a file that each example overwrites."""
    return tmp_path_factory.mktemp("files") / "file"


# -- profiles -----------------------------------------------------------------------------------------------------------------


@bad.fuzzed
@given(st.sampled_from(PROFILES).flatmap(bad.damaged) | bad.json_values)
def test_a_profile_from_any_json_is_valid_or_refused(values):
    made = bad.attempt(lambda: Profile.from_json(values), errors.ProfileError)
    if isinstance(made, Profile):
        assert Profile.from_json(json.loads(json.dumps(made.to_json()))) == made


@bad.fuzzed
@given(st.binary(max_size=200) | bad.json_values.map(lambda v: bad.dumps(v).encode()))
def test_a_profile_file_with_any_bytes_is_refused(file, content):
    file.write_bytes(content)
    assert isinstance(bad.attempt(lambda: Profile.load(file), errors.ProfileError), errors.ProfileError)


def test_a_profile_that_was_edited_is_refused_unless_its_digest_is_removed(tmp_path):
    PROFILE.save(tmp_path / "p.json")
    values = json.loads((tmp_path / "p.json").read_text())
    values["rows"][0]["latency_ms"][0] = 0.5
    (tmp_path / "p.json").write_text(json.dumps(values))
    with pytest.raises(errors.ProfileError, match="remove its sha256"):
        Profile.load(tmp_path / "p.json")
    del values["sha256"]
    (tmp_path / "p.json").write_text(json.dumps(values))
    assert Profile.load(tmp_path / "p.json").rows[0].latency_ms[0] == 0.5


@pytest.mark.parametrize("ms", [0.0, -1.0, 5e-324, 1e300, math.inf, math.nan])
def test_a_latency_that_is_impossible_is_refused(ms):
    for latency_ms, p99_ms in (((ms,), ()), ((1.0,), (ms,))):
        with pytest.raises(errors.ProfileError, match="positive and finite"):
            Row(SUBNETS[0], 0.5, latency_ms, p99_ms)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}", "NaN", '"\ud800"', "\0"])
def test_json_that_cannot_be_read_is_refused(tmp_path, text):
    for name, load, kind in (
        (MANIFEST_NAME, lambda: exports.load(tmp_path), errors.ExportError),
        ("profile.json", lambda: Profile.load(tmp_path / "profile.json"), errors.ProfileError),
    ):
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(kind):
            load()


# -- CSV files: recorded arrivals, and invocations as Azure publishes them ----------------------------------------------------

NUMBERS = [*("", "0", "1", "2.5", "-1", "nan", "inf", "-inf", "1e308", "1e400", "9" * 400, "x", "0x10", "1_0", "٣", " 7 ")]
cells = st.sampled_from([*NUMBERS, "\0", '"', "é"]) | st.text(max_size=5)
headers = st.sampled_from(
    [
        *(
            "arrival_s",
            "slo_ms",
            "floor",
            "length",
            "arrival_s ",
            "1",
            "2",
            "minute 7",
            "d2_1",
            "1.1",
            "1_y",
            "9" * 5000,
            "f",
            "",
        )
    ]
)
tables = st.builds(
    lambda header, body, ends: "\n".join(",".join(row) for row in [header, *body]) + ends,
    st.lists(headers, max_size=5),
    st.lists(st.lists(cells, max_size=6), max_size=5),
    st.sampled_from(["", "\n", "\r\n", "\n\n"]),
)
contents = (
    tables.map(lambda text: text.encode("utf-8", "surrogatepass"))
    | tables.map(lambda text: text.encode("utf-16", "surrogatepass"))
    | st.binary(max_size=100)
    | st.binary(max_size=60).map(lambda tail: b"arrival_s,slo_ms\n1,36\n" + tail)
    | st.binary(max_size=60).map(lambda tail: b"f,1,2\nc,3,4\n" + tail)
)


@bad.fuzzed
@given(contents)
def test_recorded_arrivals_with_any_bytes_are_a_trace_or_refused(file, content):
    file.write_bytes(content)
    trace = bad.attempt(lambda: traces.load(file), errors.DataError)
    if isinstance(trace, Trace):
        assert np.isfinite(trace.deadlines_s).all()
        assert (np.diff(trace.arrivals_s) >= 0).all()
        assert (np.asarray(trace.lengths) >= 0).all()
    else:
        assert str(file) in str(trace)


@bad.fuzzed
@given(contents)
def test_invocations_with_any_bytes_are_counts_or_refused(file, content):
    file.write_bytes(content)
    minutes = bad.attempt(lambda: azure.invocations_per_minute(file), errors.DataError)
    if isinstance(minutes, np.ndarray):
        assert minutes.dtype == np.int64
        assert (minutes >= 0).all()
        assert len(minutes) > 0
        made = bad.attempt(lambda: azure.trace(file, mean_qps=50.0, duration_s=1.0), errors.DataError)
        assert isinstance(made, errors.DataError) != (minutes.sum() > 0)
    else:
        assert str(file) in str(minutes)


def test_counts_that_overflow_are_refused(file):
    file.write_text("f,1,2\n" + f"a,{2**52},{2**52}\n" * 3000)
    with pytest.raises(errors.DataError, match="cannot be"):
        azure.invocations_per_minute(file)


@pytest.mark.parametrize("path", [None, 5, b"x", [None], [5], object(), "\0", "/", ["a" * 5000], [], ""])
def test_something_else_than_the_path_of_a_csv_file_is_refused(path):
    with pytest.raises((errors.ConfigError, errors.DataError)):
        azure.invocations_per_minute(path)
    with pytest.raises(errors.DataError):
        traces.load(path)


# -- configs, subnets and vocabularies ----------------------------------------------------------------------------------------

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
CONFIGS = {name: load_config(FOLDER / f"{name}.py") for name in ("debug", "listops_dynabert", "dynabert_mnli")}


@bad.fuzzed
@given(st.sampled_from([config_to_json(c) for c in CONFIGS.values()]).flatmap(bad.damaged) | bad.json_values)
def test_a_config_from_any_json_is_valid_or_refused(values):
    made = bad.attempt(lambda: config_from_json(values), errors.ConfigError, errors.UnknownNameError, errors.SubnetError)
    if isinstance(made, TrainConfig):
        json.dumps(config_to_json(made))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.py", "def get_config(:"),
        ("a.py", "import nowhere_at_all"),
        ("a.py", "def get_config():\n    return 1 / 0"),
        ("a.py", "def get_config(x):\n    return x"),
        ("a.py", "get_config = 5"),
        ("a.py", "def get_config():\n    return {}"),
        ("a.py", "\0"),
        ("a.txt", ""),
        ("a", ""),
    ],
)
def test_a_config_file_that_fails_is_refused_by_its_path_and_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(errors.ConfigError, match=rf"{name}\b"):
        load_config(tmp_path / name)


@pytest.mark.parametrize("path", [None, 5, b"x", [], "\0", "/", ""])
def test_something_else_than_a_config_file_is_refused(path):
    with pytest.raises(errors.ConfigError):
        load_config(path)


@pytest.mark.parametrize("value", [None, True, 7, math.nan, "x", "\0", [], {"a": 1}], ids=repr)
def test_training_takes_only_a_config_a_dataset_and_a_folder(tmp_path, value):
    config = CONFIGS["debug"]
    with pytest.raises(errors.ConfigError):
        ss.train(value, tmp_path / "run")
    if value is not None:
        with pytest.raises(errors.ConfigError):
            ss.train(config, tmp_path / "run", dataset=value)
    if not isinstance(value, str):
        images, labels = np.zeros((4, 32, 32, 1), np.uint8), np.arange(4) % 10
        mine = data.from_arrays(train=(images, labels), test=(images, labels), validation=0, class_names=list("0123456789"))
        with pytest.raises(errors.ConfigError):
            ss.train(config, value, dataset=mine)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options", [*(["--epochs", v] for v in ("nan", "x", "-1", "")), ["--optim.name", "adm"], ["--x", "1"]]
)
def test_the_command_line_ends_with_one_of_our_errors_or_with_its_usage(options, capsys):
    with pytest.raises((errors.ConfigError, errors.UnknownNameError, SystemExit)) as caught:
        tyro.cli(TrainConfig, default=CONFIGS["debug"], args=options)
    assert not isinstance(caught.value, SystemExit) or caught.value.code == 2
    capsys.readouterr()


SPACE = TINY.space()


@bad.fuzzed
@given(st.sampled_from([s.to_json() for s in (SPACE.smallest(), SPACE.largest())]).flatmap(bad.damaged) | bad.json_values)
def test_a_subnet_from_any_json_is_valid_or_refused(values):
    made = bad.attempt(lambda: SPACE.validate(Subnet.from_json(values)), errors.SubnetError)
    if isinstance(made, Subnet):
        assert SPACE.validate(Subnet.from_json(json.loads(json.dumps(made.to_json())))) == made


@bad.fuzzed
@given(content=st.binary(max_size=60), tail=st.binary(max_size=20))
def test_a_vocabulary_file_with_any_bytes_is_valid_or_refused(file, content, tail):
    for whole in (content, b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n" + tail):
        file.write_bytes(whole)
        made = bad.attempt(lambda: Vocabulary.read(file), errors.DataError)
        if isinstance(made, Vocabulary):
            assert Vocabulary.from_text(made.to_text()) == made


# -- the server: its options, queries, policies and engines -------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return exports.load(write(tmp_path_factory.mktemp("model") / "export", IMAGES))


def open_server(policy="slackfit", profile=PROFILE, **options):
    options = {"tune_runtime": False, "slo_ms": 1e4, **options}
    return Server.from_engines([FakeEngine(PROFILE, speed=math.inf)], profile, policy=policy, **options)


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
    opened = bad.attempt(lambda: open_server(**{name: value}), *kinds)
    if isinstance(opened, Server):
        with opened as s:
            assert s.submit(np.float32(5), slo_ms=1e4).result(WAIT_S).output[0] == 5


@pytest.mark.parametrize("engines", [None, 5, [], [None], "x", [...]], ids=str)
def test_a_server_without_engines_or_without_a_profile_is_refused(engines):
    with pytest.raises(errors.ConfigError, match="engines"):
        Server.from_engines(engines, PROFILE)
    with pytest.raises(errors.ConfigError, match="profile"):
        Server.from_engines([FakeEngine(PROFILE)], engines)


@pytest.mark.parametrize("devices", [5, "cpu", [], [None], ["cpu"], [0]], ids=str)
def test_a_server_without_devices_is_refused(model, devices):
    with pytest.raises(errors.ConfigError, match="devices"):
        ss.Server(model, devices=devices)


@pytest.mark.parametrize("sizes", [5, "x", [], [0], [1.5], [2, 1], [True], [None], [-1], None, [math.nan]], ids=str)
def test_a_server_with_impossible_batch_sizes_is_refused(model, sizes):
    with pytest.raises(errors.ConfigError, match="batch_sizes"):
        ss.Server(model, batch_sizes=sizes)
    with pytest.raises(errors.ConfigError, match="no lengths" if sizes else "lengths|batch_sizes"):
        ss.Server(model, lengths=sizes or [3], batch_sizes=(1,))


@pytest.fixture(scope="module")
def opened():
    with open_server() as s:
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


latencies = st.floats(1e-9, 1e12)


@bad.fuzzed
@given(
    table=st.lists(st.tuples(st.floats(0, 1), st.tuples(latencies, latencies, latencies)), min_size=2, max_size=2),
    slos=st.lists(st.floats(1e-300, 1e11) | st.just(5e-324), min_size=1, max_size=5),
    floor=st.floats(-1, 1),
    policy=st.sampled_from(policies.NAMES),
)
def test_a_server_answers_every_query_with_any_profile_slo_and_floor(table, slos, floor, policy):
    rows = tuple(Row(s, accuracy, ms) for s, (accuracy, ms) in zip(SUBNETS, table, strict=True))
    with open_server(policy, Profile((1, 2, 4), rows)) as s:
        waiting = [s.submit(np.float32(i), slo_ms=ms) for i, ms in enumerate(slos)]
        asked = bad.attempt(lambda: s.submit(np.float32(9), min_accuracy=floor), errors.AccuracyFloorError)
        waiting += [] if isinstance(asked, errors.AccuracyFloorError) else [asked]
        assert [f.result(WAIT_S).output[0] for f in waiting] == [*range(len(slos)), 9][: len(waiting)]


rubbish = st.builds(Decision, st.sampled_from([*SUBNETS, None, 5, []]), bad.objects, bad.objects) | bad.objects


@bad.fuzzed
@given(decision=rubbish, floor=st.sampled_from([0.0, 0.75]), count=st.integers(1, 6))
@example(decision=Decision(SUBNETS[0], math.nan), floor=0.75, count=3)
@example(decision=Decision(SUBNETS[0], math.nan, math.nan), floor=0.0, count=3)
def test_queries_are_answered_or_fail_if_the_policy_decides_rubbish(decision, floor, count):
    with open_server(lambda profile, state: decision) as s:
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
        open_server(name)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("output", [None, 5, [], [1, 2, 3, 4, 5], {}, "x"], ids=str)
def test_queries_fail_if_the_engine_returns_rubbish(output):
    engine = FakeEngine(PROFILE, speed=math.inf)
    engine.run = lambda *_: output
    with Server.from_engines([engine], PROFILE, tune_runtime=False, slo_ms=1e4) as s:
        waiting = [s.submit(np.float32(i)) for i in range(2)]
        for future in waiting:
            answered = bad.attempt(lambda: future.result(WAIT_S), errors.InferenceError, errors.WorkersLostError)  # noqa: B023
            assert isinstance(answered, errors.SuperServeError) or output == "x"
