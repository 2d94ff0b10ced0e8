"""Bad input, systematically: whatever is handed in, a failure is one of the documented errors, and nothing hangs.

Files are fuzzed as JSON or CSV that was changed in a few places and as bytes of any kind, arguments as values that do not
belong. `bad.attempt` lets every other error through, which then fails the test; `bad.within` ends what hangs.
"""

import dataclasses
import io
import json
import math
import os
import pathlib
import resource
import zipfile

import bad
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from small_exports import IMAGES, TEXTS, WORDS, payload_of, write
from tiny import TINY

import superserve_jax as ss
from superserve_jax import errors, exports, files
from superserve_jax.engines.fake import FakeEngine
from superserve_jax.exports import Served, statistics
from superserve_jax.families.subset import SingleSubnetConfig
from superserve_jax.manifest import MANIFEST_NAME
from superserve_jax.profile import Profile, Row
from superserve_jax.scheduling import policies
from superserve_jax.scheduling.policies import Decision
from superserve_jax.serving.server import Server
from superserve_jax.simulation import azure, traces
from superserve_jax.simulation.traces import Trace
from superserve_jax.space import Axis, SearchSpace
from superserve_jax.subnet import Subnet, envelope_of
from superserve_jax.training import data
from superserve_jax.training.config import Phase, TrainConfig, config_from_json, config_to_json, load_config
from superserve_jax.training.data import DataConfig, FolderConfig, TextConfig
from superserve_jax.vocabulary import Vocabulary

WAIT_S = 10.0


def examples(count):
    """Another sample in every run; FUZZ=20 in the environment tries twenty times as many."""
    return settings(
        max_examples=count * int(os.environ.get("FUZZ", "1")),
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(autouse=True)
def no_test_hangs():
    with bad.within(60 * int(os.environ.get("FUZZ", "1"))):
        yield


# -- exports ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["images", pytest.param("texts", marks=pytest.mark.slow)])
def exported(request, tmp_path_factory):
    config, words = {"images": (IMAGES, None), "texts": (TEXTS, WORDS)}[request.param]
    return write(tmp_path_factory.mktemp("bad") / request.param, config, words)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return exports.load(write(tmp_path_factory.mktemp("model") / "export", IMAGES))


def forge(path, manifest):
    """Writes a manifest whose digest fits, as somebody with bad intent would; `manifest` may be any JSON value."""
    if isinstance(manifest, dict):
        manifest["sha256"] = files.digest(manifest)
    (path / MANIFEST_NAME).write_text(json.dumps(manifest))


@pytest.fixture
def forging(exported):
    text = (exported / MANIFEST_NAME).read_text()
    yield lambda manifest: forge(exported, manifest)
    (exported / MANIFEST_NAME).write_text(text)


@examples(37)
@given(choose=st.data())
def test_a_forged_manifest_is_refused_or_serves_what_it_says(exported, choose):
    text = (exported / MANIFEST_NAME).read_text()
    whole = json.loads(text)
    part = choose.draw(st.sampled_from(["config", "served", "files", None]))
    if part is None:
        whole = choose.draw(bad.damaged(whole))
    else:
        whole[part] = choose.draw(bad.damaged(whole[part]))
    try:
        forge(exported, whole)
        loaded = bad.attempt(lambda: exports.load(exported), errors.ExportError)
    finally:
        (exported / MANIFEST_NAME).write_text(text)
    if isinstance(loaded, errors.ExportError):
        assert str(exported) in str(loaded)
        assert "\n" not in str(loaded)
    else:
        assert all(0 <= s.accuracy <= 1 for s in loaded.served)
        assert [loaded.space.validate(s) for s in loaded.subnets] == list(loaded.subnets)
        assert loaded.config.num_classes == whole["config"]["num_classes"]


HUGE = {
    "blocks": lambda m: m["config"].update(depths=[[0, 10**9]]),
    "layers": lambda m: m["config"].update(depths=[10**9]),
    "classes": lambda m: m["config"].update(num_classes=10**12),
    "classes past what an array may have": lambda m: m["config"].update(num_classes=1 << 70),
    "channels": lambda m: m["config"].update(stem_width=10**9, stage_widths=[10**9]),
    "channels by a ratio": lambda m: m["config"].update(width_mults=[1e300], expand_ratios=[1e300]),
    "tokens": lambda m: m["config"].update(vocab_size=10**12),
    "a nest": lambda m: m.update(training={"x": [[[[]]]] * 1000}, config={"a": m["config"]}),
}


@pytest.mark.parametrize("change", HUGE.values(), ids=HUGE)
def test_sizes_that_no_machine_has_are_refused_before_memory_is_taken(exported, forging, change):
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    whole = json.loads((exported / MANIFEST_NAME).read_text())
    change(whole)
    forging(whole)
    with pytest.raises(errors.ExportError, match="does not describe a SuperNet that this version can build"):
        exports.load(exported)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 300_000


@pytest.mark.parametrize(
    "payload", ["../outside", "/etc", "payload-../../../etc", "payload-0123456789abcde/", "payload-0123456789abcdeg", "", "."]
)
def test_a_payload_outside_the_export_is_refused(exported, forging, payload):
    forging({**json.loads((exported / MANIFEST_NAME).read_text()), "payload": payload})
    with pytest.raises(errors.ExportError, match="cannot be one"):
        exports.load(exported)


@pytest.mark.parametrize("name", ["../manifest.json", "/etc/passwd", "weights/../../x", "", ".", "a\nb", "\0", "a" * 5000])
def test_a_file_outside_the_payload_is_refused(exported, forging, name):
    whole = json.loads((exported / MANIFEST_NAME).read_text())
    whole["files"][name] = {"bytes": 0, "sha256": ""}
    forging(whole)
    with pytest.raises(errors.ExportError, match=r"missing|impossible names"):
        exports.load(exported)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "9" * 5000 + "}", "NaN", '"\ud800"', "\0"])
def test_json_that_cannot_be_read_is_refused(tmp_path, text):
    raw = text.encode("utf-8", "surrogatepass")
    for name, load, kind in (
        (MANIFEST_NAME, lambda: exports.load(tmp_path), errors.ExportError),
        ("profile.json", lambda: Profile.load(tmp_path / "profile.json"), errors.ProfileError),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(kind):
            load()


@pytest.mark.parametrize("depth", [100, 800, 980, 1000, 5000])
def test_a_deeply_nested_manifest_is_refused(exported, depth):
    text = (exported / MANIFEST_NAME).read_text()
    nest = "[" * depth + "]" * depth
    (exported / MANIFEST_NAME).write_text(text.replace('"measured"', f'"nest": {nest}, "measured"'))
    try:
        with pytest.raises(errors.ExportError):
            exports.load(exported)
    finally:
        (exported / MANIFEST_NAME).write_text(text)


def npz(**entries):
    """A zip archive of raw entries, whatever they hold."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(array, **header):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    if header:
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (1,), **header})
    return buffer.getvalue()


class Pickled:
    """Whoever unpickles it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return pathlib.Path.touch, (self.file,)


def test_no_statistics_but_fitting_ones_are_taken_and_nothing_is_unpickled(tmp_path, model):
    good = (payload_of(model.path)[0] / "statistics.npz").read_bytes()
    file, trap = tmp_path / "statistics.npz", tmp_path / "trap"
    file.write_bytes(good)
    assert statistics.read(file, IMAGES).keys() == model.statistics.keys()
    order = np.array(json.dumps([s.to_json() for s in model.statistics]))
    widths = np.array([r.shape[1] for r in model.statistics.values()])
    whole = np.concatenate(list(model.statistics.values()), axis=1)
    fitting = {"subnets": npy(order), "widths": npy(widths), "rows": npy(whole)}
    file.write_bytes(npz(**fitting))
    assert statistics.read(file, IMAGES).keys() == model.statistics.keys()
    pickled = npy(np.array([Pickled(trap)], object))
    for content in (
        *(b"", b"PK", b"\x80\x04.", good[:-30], npz(), npz(**{**fitting, "rows": b""}), pickled),
        *(npz(**{**fitting, name: pickled}) for name in fitting),
        *(npz(**{**fitting, "rows": npy(None, shape=shape)}) for shape in ((2, 10**12), (1 << 62, 1 << 62), (2, 0), (-1, 4))),
        npz(**{**fitting, "rows": npy(whole.astype(np.float64))}),
        npz(**{**fitting, "rows": npy(whole[:, 1:])}),
        npz(**{**fitting, "widths": npy(widths[::-1] * -1)}),
        npz(**{**fitting, "widths": npy(widths.astype(float) + 0.5)}),
        npz(**{**fitting, "subnets": npy(np.array("[" * 100_000))}),
        npz(**{**fitting, "subnets": npy(np.array('[{"gates": [1, 1, 1, 1]}]'))}),
    ):
        file.write_bytes(content)
        with pytest.raises(errors.ExportError, match=r"statistics\.npz"):
            statistics.read(file, IMAGES)
    assert not trap.exists()


@examples(37)
@given(choose=st.data())
def test_statistics_with_damaged_bytes_are_refused_or_of_the_right_shapes(tmp_path_factory, model, choose):
    content = bytearray((payload_of(model.path)[0] / "statistics.npz").read_bytes())
    for _ in range(choose.draw(st.integers(1, 4))):
        content[choose.draw(st.integers(0, len(content) - 1))] = choose.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("rows") / "statistics.npz"
    file.write_bytes(bytes(content[: choose.draw(st.integers(len(content) - 3, len(content)))]))
    read = bad.attempt(lambda: statistics.read(file, IMAGES), errors.ExportError)
    if not isinstance(read, errors.ExportError):
        assert [r.shape for r in read.values()] == [(2, sum(IMAGES.norm_sizes(IMAGES.sizes(s)).values())) for s in read]


@pytest.mark.parametrize("path", [None, 5, 1.5, b"x", [], {}, object(), "\0", "a" * 5000, "", "/", "/dev/null", "/etc/passwd"])
def test_loading_what_is_no_path_of_an_export_is_refused(path):
    with pytest.raises(errors.ExportError):
        ss.load(path)
    with pytest.raises(errors.ExportError):
        ss.Server(path)


@pytest.mark.parametrize(
    "change",
    [
        *({"model": v} for v in (None, 5, "x", TINY)),
        *({"served": v} for v in (None, 5, "x", [None], [5], [], {"a": 1})),
        *({"measured": v} for v in (None, 5, b"x")),
        *({"class_names": v} for v in (None, 5, [1, 2], [b"x"])),
        *({"vocabulary": v} for v in (5, "x", WORDS)),
        *({"training": v} for v in (5, "x", {"a": ...}, {"a": {1}}, [1])),
        *({"path": v} for v in (None, 5, b"x", "/dev/null", "/dev/null/x", "/proc/nowhere")),
    ],
    ids=str,
)
def test_an_export_of_something_else_is_refused_before_anything_is_written(tmp_path, model, change):
    good = {"path": tmp_path / "e", "model": model, "served": model.served, "measured": "made up", **change}
    path, what, served = (good.pop(name) for name in ("path", "model", "served"))
    with pytest.raises((errors.ConfigError, errors.ExportError)):
        ss.export(path, what, served, **good)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("field", ["subnet", "accuracy", "accuracy_shared", "flops", "params"])
@examples(20)
@given(value=bad.objects)
def test_a_served_subnet_holds_numbers_that_can_be(field, value):
    good = {"subnet": TINY.space().smallest(), "accuracy": 0.5, "accuracy_shared": None, "flops": 1, "params": 1}
    made = bad.attempt(lambda: Served(**{**good, field: value}), errors.ConfigError)
    if not isinstance(made, errors.ConfigError):
        json.dumps(made.to_json())


@examples(25)
@given(inputs=bad.objects | st.builds(np.zeros, st.sampled_from([(), 0, (1, 4), (1, 4, 4, 1), (0, 4, 4, 1), (1, 4, 4, 2)])))
@example([[1], [1, 2]])
def test_a_model_answers_inputs_of_its_kind_and_refuses_others(model, inputs):
    with pytest.raises(errors.InputError):
        model(inputs, model.subnets[0])


@examples(20)
@given(chosen=bad.objects | st.builds(Subnet, st.sampled_from([(), (1,), (1, 0), ("x",), 5, "ab"])))
def test_a_model_refuses_what_is_no_subnet_of_its_space(model, chosen):
    with pytest.raises(errors.SubnetError):
        model(np.zeros((1, 4, 4, 1), np.uint8), chosen)


# -- profiles -----------------------------------------------------------------------------------------------------------------

SUBNETS = tuple(Subnet((i,)) for i in (0, 1))
TABLE = Profile(
    (1, 2, 4),
    tuple(Row(s, a, (1.0 + i, 1.5 + i, 2.0 + i)) for i, (s, a) in enumerate(zip(SUBNETS, (0.7, 0.8), strict=True))),
)
TEXT = Profile(TABLE.batch_sizes, rows_at=dict.fromkeys((4, 8), TABLE.rows))
PROFILES = (TABLE.to_json(), TEXT.to_json())


@examples(100)
@given(st.sampled_from(PROFILES).flatmap(bad.damaged) | bad.json_values)
def test_a_profile_out_of_any_json_is_one_or_refused(values):
    made = bad.attempt(lambda: Profile.from_json(values), errors.ProfileError)
    if isinstance(made, Profile):
        assert Profile.from_json(json.loads(json.dumps(made.to_json()))) == made


@examples(37)
@given(st.binary(max_size=200) | bad.json_values.map(lambda v: bad.dumps(v).encode()))
def test_a_profile_file_of_any_bytes_is_refused(tmp_path_factory, content):
    file = tmp_path_factory.getbasetemp() / "profile.json"
    file.write_bytes(content)
    assert isinstance(bad.attempt(lambda: Profile.load(file), errors.ProfileError), errors.ProfileError)


def test_a_profile_that_was_edited_is_refused_unless_its_digest_is_removed(tmp_path):
    TABLE.save(tmp_path / "p.json")
    values = json.loads((tmp_path / "p.json").read_text())
    values["rows"][0]["latency_ms"][0] = 0.5
    (tmp_path / "p.json").write_text(json.dumps(values))
    with pytest.raises(errors.ProfileError, match="remove its sha256"):
        Profile.load(tmp_path / "p.json")
    del values["sha256"]
    (tmp_path / "p.json").write_text(json.dumps(values))
    assert Profile.load(tmp_path / "p.json").rows[0].latency_ms[0] == 0.5


@pytest.mark.parametrize("what", ["subnet", "accuracy", "latency_ms", "p99_ms", "batch_sizes", "rows", "rows_at"])
@examples(20)
@given(value=bad.objects)
def test_a_profile_out_of_any_objects_is_one_or_refused(what, value):
    row = {"subnet": SUBNETS[0], "accuracy": 0.5, "latency_ms": (1.0,), "p99_ms": (1.0,)}
    if what in row:
        bad.attempt(lambda: Row(**{**row, what: value}), errors.ProfileError)
    else:
        made = {"batch_sizes": (1,), "rows": (Row(**row),), what: value}
        bad.attempt(lambda: Profile(**made), errors.ProfileError, errors.ConfigError)


@pytest.mark.parametrize("ms", [0.0, -1.0, 5e-324, 1e300, math.inf, math.nan])
def test_a_latency_that_cannot_be_is_refused(ms):
    for latency_ms, p99_ms in (((ms,), ()), ((1.0,), (ms,))):
        with pytest.raises(errors.ProfileError, match="positive and finite"):
            Row(SUBNETS[0], 0.5, latency_ms, p99_ms)


latencies = st.floats(1e-9, 1e12)


@examples(20)
@given(
    table=st.lists(st.tuples(st.floats(0, 1), st.tuples(latencies, latencies, latencies)), min_size=1, max_size=4),
    slos=st.lists(st.floats(1e-300, 1e11) | st.just(5e-324), min_size=1, max_size=5),
    floor=st.floats(-1, 1),
    policy=st.sampled_from(policies.NAMES),
)
def test_a_server_answers_every_query_with_any_profile_slo_and_floor(table, slos, floor, policy):
    made = Profile((1, 2, 4), tuple(Row(Subnet((i,)), a, ms) for i, (a, ms) in enumerate(table)))
    fake = FakeEngine(
        dataclasses.replace(made, rows=tuple(dataclasses.replace(r, latency_ms=(1.0,) * 3) for r in made.rows)), speed=math.inf
    )
    with Server.from_engines([fake], made, policy=policy, tune_runtime=False) as s:
        waiting = [s.submit(np.float32(i), slo_ms=ms) for i, ms in enumerate(slos)]
        asked = bad.attempt(lambda: s.submit(np.float32(9), min_accuracy=floor), errors.AccuracyFloorError)
        waiting += [] if isinstance(asked, errors.AccuracyFloorError) else [asked]
        assert [f.result(WAIT_S).output[0] for f in waiting] == [*range(len(slos)), 9][: len(waiting)]


# -- traces and the Azure reader ----------------------------------------------------------------------------------------------

cells = st.sampled_from(
    [
        "",
        "0",
        "1",
        "2.5",
        "-1",
        "nan",
        "inf",
        "-inf",
        "1e308",
        "1e400",
        "9" * 400,
        "x",
        "0x10",
        "1_0",
        "٣",
        " 7 ",
        "\0",
        '"',
        "é",
    ]
) | st.text(max_size=5)
headers = st.sampled_from(
    [
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
        "m",
        "",
        "f",
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


@pytest.fixture(scope="module")
def csv_file(tmp_path_factory):
    return tmp_path_factory.mktemp("csv") / "a.csv"


@examples(100)
@given(contents)
def test_recorded_arrivals_of_any_bytes_are_a_trace_or_refused(csv_file, content):
    csv_file.write_bytes(content)
    trace = bad.attempt(lambda: traces.load(csv_file), errors.DataError)
    if isinstance(trace, Trace):
        assert np.isfinite(trace.deadlines_s).all()
        assert (np.diff(trace.arrivals_s) >= 0).all()
        assert (np.asarray(trace.lengths) >= 0).all()
    else:
        assert str(csv_file) in str(trace)


@examples(100)
@given(contents)
def test_invocations_of_any_bytes_are_counts_or_refused(csv_file, content):
    csv_file.write_bytes(content)
    minutes = bad.attempt(lambda: azure.invocations_per_minute(csv_file), errors.DataError)
    if isinstance(minutes, np.ndarray):
        assert minutes.dtype == np.int64
        assert (minutes >= 0).all()
        assert len(minutes) > 0
        made = bad.attempt(lambda: azure.trace(csv_file, mean_qps=50.0, duration_s=1.0), errors.DataError)
        assert isinstance(made, errors.DataError) != (minutes.sum() > 0)
    else:
        assert str(csv_file) in str(minutes)


@examples(37)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3)), min_size=1, max_size=4))
def test_a_day_of_invocations_with_damaged_bytes_is_counts_or_refused(csv_file, damages):
    header = "HashOwner,HashApp,HashFunction,Trigger," + ",".join(map(str, range(1, 61)))
    lines = [f"o{i},a{i},f{i},http," + ",".join(str(i * m % 7) for m in range(60)) for i in range(12)]
    content = bytearray("\n".join([header, *lines]).encode())
    for place, change in damages:
        place %= len(content)
        content[place : place + 1] = change
    csv_file.write_bytes(bytes(content))
    minutes = bad.attempt(lambda: azure.invocations_per_minute(csv_file), errors.DataError)
    assert isinstance(minutes, errors.DataError) or (minutes.dtype == np.int64 and (minutes >= 0).all())


def test_counts_that_overflow_are_refused(csv_file):
    csv_file.write_text("f,1,2\n" + f"a,{2**52},{2**52}\n" * 3000)
    with pytest.raises(errors.DataError, match="cannot be"):
        azure.invocations_per_minute(csv_file)


MAKERS = {
    traces.bursty: {"duration_s": 0.5},
    traces.gamma: {"duration_s": 0.5, "rate_qps": 10.0},
    traces.accelerating: {"duration_s": 0.5, "ramp_at_s": 0.1},
    traces.steps: {"rates_qps": (5.0, 0.0), "step_s": 0.5},
}
FIELDS = ["duration_s", "cv2", "slo_ms", "seed", "rate_qps", "base_qps", "burst_qps", "step_s"]


@pytest.mark.parametrize("make", MAKERS, ids=lambda f: f.__name__)
@examples(20)
@given(choose=st.data())
def test_a_trace_is_made_or_refused_before_memory_is_taken(make, choose):
    known = [*MAKERS[make], *make.__kwdefaults__] if make.__kwdefaults__ else list(MAKERS[make])
    name = choose.draw(st.sampled_from(sorted(set(known))))
    value = choose.draw(bad.objects | st.floats() | st.floats(1e-9, 100.0))
    made = bad.attempt(lambda: make(**{**MAKERS[make], name: value}), errors.ConfigError, errors.DeadlineError)
    if isinstance(made, Trace):
        assert np.isfinite(made.arrivals_s).all()


@examples(50)
@given(
    field=st.sampled_from(["arrivals_s", "slo_ms", "floors", "lengths", "mixed slo_ms", "mixed floors", "mixed lengths"]),
    value=bad.objects
    | st.lists(st.floats(), min_size=2, max_size=2)
    | st.dictionaries(bad.odd.filter(lambda v: v.__hash__), bad.odd),
)
def test_a_trace_of_any_values_is_one_or_refused(field, value):
    plain = {"arrivals_s": [0.0, 1.0]}
    *mixed, name = field.split()
    kinds = errors.ConfigError, errors.DeadlineError
    if mixed:
        made = bad.attempt(lambda: Trace(**plain).mixed(**{name: value}), *kinds)
    else:
        made = bad.attempt(lambda: Trace(**{**plain, name: value}), *kinds)
    if isinstance(made, Trace):
        assert np.asarray(made.deadlines_s, np.float64).shape == made.arrivals_s.shape


@pytest.mark.parametrize("path", [None, 5, b"x", [None], [5], object(), "\0", "/", ["a" * 5000], [], ""])
def test_what_is_no_path_of_a_csv_file_is_refused(path):
    with pytest.raises((errors.ConfigError, errors.DataError)):
        azure.invocations_per_minute(path)
    with pytest.raises(errors.DataError):
        traces.load(path)


# -- configs, subnets and vocabularies ----------------------------------------------------------------------------------------

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
WHOLE = {name: load_config(CONFIGS / f"{name}.py") for name in ("debug", "listops_dynabert", "dynabert_mnli")}
FAMILIES = (TINY, TEXTS, SingleSubnetConfig(TINY, TINY.space().smallest()))


@examples(100)
@given(st.sampled_from([config_to_json(c) for c in WHOLE.values()]).flatmap(bad.damaged) | bad.json_values)
def test_a_config_out_of_any_json_is_one_or_refused(values):
    made = bad.attempt(lambda: config_from_json(values), errors.ConfigError, errors.UnknownNameError, errors.SubnetError)
    if isinstance(made, TrainConfig):
        json.dumps(config_to_json(made))


PARTS = [WHOLE["debug"], WHOLE["debug"].optim, WHOLE["debug"].search, WHOLE["debug"].distill, Phase(), *FAMILIES]
PARTS += [DataConfig(), TextConfig(), FolderConfig(path="x")]


@pytest.mark.parametrize("part", PARTS, ids=lambda p: type(p).__name__)
@examples(37)
@given(choose=st.data())
def test_a_part_of_a_config_with_any_value_is_one_or_refused(part, choose):
    field = choose.draw(st.sampled_from([f.name for f in dataclasses.fields(part)]))
    value = choose.draw(bad.objects | bad.objects.map(lambda v: (v,)) | bad.objects.map(lambda v: ((1, v),)))
    bad.attempt(
        lambda: dataclasses.replace(part, **{field: value}), errors.ConfigError, errors.UnknownNameError, errors.SubnetError
    )


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
def test_a_config_file_that_is_no_file_is_refused(path):
    with pytest.raises(errors.ConfigError):
        load_config(path)


@pytest.mark.parametrize("value", bad.ODD, ids=lambda v: repr(v)[:30])
def test_training_takes_a_config_and_a_folder_only(tmp_path, value):
    with pytest.raises(errors.ConfigError):
        ss.train(value, tmp_path / "run")
    if value is not None:
        with pytest.raises(errors.ConfigError):
            ss.train(WHOLE["debug"], tmp_path / "run", dataset=value)
    if not isinstance(value, str):
        images, labels = np.zeros((4, 32, 32, 1), np.uint8), np.arange(4) % 10
        mine = data.from_arrays(train=(images, labels), test=(images, labels), validation=0, class_names=list("0123456789"))
        with pytest.raises(errors.ConfigError):
            ss.train(dataclasses.replace(WHOLE["debug"], eval_every=0), value, dataset=mine)
    assert not (tmp_path / "run").exists()


SPACE = TINY.space()


@examples(75)
@given(st.sampled_from([s.to_json() for s in (SPACE.smallest(), SPACE.largest())]).flatmap(bad.damaged) | bad.json_values)
def test_a_subnet_out_of_any_json_is_one_or_refused(values):
    made = bad.attempt(lambda: SPACE.validate(Subnet.from_json(values)), errors.SubnetError)
    if isinstance(made, Subnet):
        assert SPACE.validate(Subnet.from_json(json.loads(json.dumps(made.to_json())))) == made


@examples(75)
@given(
    name=st.sampled_from(["depth", "gates", "expand", "width", "x"]),
    value=bad.objects | st.lists(bad.objects, max_size=4) | st.lists(st.integers(0, 2), min_size=3, max_size=4),
    call=st.sampled_from(["subnet", "validate", "sample", "narrowed", "covers", "envelope", "tied", "axis", "space", "gates"]),
)
def test_a_space_chooses_a_subnet_or_refuses(name, value, call):
    calls = {
        "subnet": lambda: SPACE.subnet(**{name: value}),
        "validate": lambda: SPACE.validate(Subnet(value, (("expand", value),))),
        "sample": lambda: SPACE.sample(value, value),
        "narrowed": lambda: SPACE.narrowed(**{"elastic" if name == "depth" else "choices": value}),
        "covers": lambda: SPACE.largest().covers(value),
        "envelope": lambda: envelope_of([SPACE.largest(), value]),
        "tied": lambda: SPACE.tied(value),
        "axis": lambda: Axis(*((value, ((1.0,),)) if name == "x" else ("w", value))),
        "space": lambda: SearchSpace(*(((value,),) if name == "x" else (((1,),), value))),
        "gates": lambda: SPACE.gates(value),
    }
    bad.attempt(calls[call], errors.SubnetError, errors.ConfigError, errors.UnknownNameError)


@examples(50)
@given(
    tokens=bad.objects | st.lists(bad.odd | st.sampled_from(["[PAD]", "[CLS]"]), max_size=4).map(tuple),
    texts=bad.objects | st.lists(bad.objects, max_size=2) | st.lists(st.text(max_size=5), max_size=2),
    second=bad.objects,
    length=bad.objects | st.just(4),
    types=st.sampled_from([1, 2]),
)
def test_a_vocabulary_is_made_and_encodes_or_refuses(tokens, texts, second, length, types):
    bad.attempt(lambda: Vocabulary(tokens), errors.ConfigError, errors.UnknownNameError)
    bad.attempt(lambda: Vocabulary(WORDS.tokens, scheme=tokens), errors.ConfigError, errors.UnknownNameError)
    for words in (WORDS, Vocabulary(("[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"))):
        if not (isinstance(length, int) and length > 10**6):
            bad.attempt(lambda: words.encode(texts, length=length, token_types=types), errors.InputError)  # noqa: B023
        bad.attempt(lambda: words.encode(["a"], second, length=4), errors.InputError)  # noqa: B023


@examples(37)
@given(content=st.binary(max_size=60), tail=st.binary(max_size=20))
def test_a_vocabulary_file_of_any_bytes_is_one_or_refused(tmp_path_factory, content, tail):
    file = tmp_path_factory.getbasetemp() / "vocab.txt"
    for whole in (content, b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n" + tail):
        file.write_bytes(whole)
        made = bad.attempt(lambda: Vocabulary.read(file), errors.DataError)
        if isinstance(made, Vocabulary):
            assert Vocabulary.from_text(made.to_text()) == made


# -- the server ---------------------------------------------------------------------------------------------------------------


def open_server(policy="slackfit", **options):
    fake = FakeEngine(TABLE, speed=math.inf)
    return Server.from_engines([fake], TABLE, policy=policy, **{"tune_runtime": False, "slo_ms": 1e4, **options})


@examples(50)
@given(
    name=st.sampled_from(
        ["slo_ms", "max_queue", "max_queue_bytes", "admission", "max_tries", "max_failures", "stall_s", "clock", "policy"]
    ),
    value=bad.objects,
)
def test_a_server_opens_and_answers_or_refuses_its_arguments(name, value):
    if callable(value):  # any function may be a policy or a clock; those that are none fail when they are asked
        return
    kinds = errors.ConfigError, errors.DeadlineError, errors.UnknownNameError
    opened = bad.attempt(lambda: open_server(**{name: value}), *kinds)
    if isinstance(opened, Server):
        with opened as s:
            assert s.submit(np.float32(5), slo_ms=1e4).result(WAIT_S).output[0] == 5


@pytest.mark.parametrize("engines", [None, 5, [], [None], "x", [...]], ids=str)
def test_a_server_of_no_engines_is_refused(engines):
    with pytest.raises(errors.ConfigError, match="engines"):
        Server.from_engines(engines, TABLE)
    with pytest.raises(errors.ConfigError, match="profile"):
        Server.from_engines([FakeEngine(TABLE)], engines)


@pytest.mark.parametrize("options", [{"devices": v} for v in (5, "cpu", [], [None], ["cpu"], [0])], ids=str)
def test_a_server_on_no_devices_is_refused(model, options):
    with pytest.raises(errors.ConfigError, match="devices"):
        ss.Server(model, **options)


@pytest.mark.parametrize("sizes", [5, "x", [], [0], [1.5], [2, 1], [True], [None], [-1], None, [math.nan]], ids=str)
def test_a_server_of_impossible_batch_sizes_is_refused(model, sizes):
    with pytest.raises(errors.ConfigError, match="batch_sizes"):
        ss.Server(model, batch_sizes=sizes)
    with pytest.raises(errors.ConfigError, match="no lengths" if sizes else "lengths|batch_sizes"):
        ss.Server(model, lengths=sizes or [3], batch_sizes=(1,))


@pytest.fixture(scope="module")
def opened():
    with open_server() as s:
        yield s


@examples(50)
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


rubbish = st.builds(Decision, st.sampled_from([*SUBNETS, None, 5, []]), bad.objects, bad.objects) | bad.objects


@examples(37)
@given(decision=rubbish, floor=st.sampled_from([0.0, 0.75]), count=st.integers(1, 6))
@example(decision=Decision(SUBNETS[0], math.nan), floor=0.75, count=3)
@example(decision=Decision(SUBNETS[0], math.nan, math.nan), floor=0.0, count=3)
def test_queries_of_a_policy_that_decides_rubbish_are_answered_or_fail(decision, floor, count):
    with open_server(lambda profile, state: decision) as s:
        waiting = [s.submit(np.float32(i), min_accuracy=floor) for i in range(count)]
        for future in waiting:
            answered = bad.attempt(lambda: future.result(WAIT_S), errors.InferenceError)  # noqa: B023
            assert isinstance(answered, errors.InferenceError) or answered.output[0] < count


@pytest.mark.parametrize("output", [None, 5, [], [1, 2, 3, 4, 5], {}, "x"], ids=str)
def test_queries_of_an_engine_that_returns_rubbish_fail(output):
    fake = FakeEngine(TABLE, speed=math.inf)
    fake.run = lambda *_: output
    with Server.from_engines([fake], TABLE, tune_runtime=False, slo_ms=1e4) as s:
        waiting = [s.submit(np.float32(i)) for i in range(2)]
        for future in waiting:
            answered = bad.attempt(lambda: future.result(WAIT_S), errors.InferenceError, errors.WorkersLostError)  # noqa: B023
            assert isinstance(answered, errors.SuperServeError) or output == "x"


@pytest.mark.parametrize(
    "name",
    [
        "",
        "slakfit",
        "fixed:",
        "fixed:99",
        "fixed:-1",
        "fixed:" + "9" * 5000,
        "slackfit-paper:8:" * 2000,
        "slackfit-paper:0",
        "slackfit-paper:x",
        "slackfit-paper:" + "9" * 60,
        "a\nb",
        "proteus:1",
    ],
    ids=lambda name: name[:20],
)
def test_a_policy_of_no_such_name_is_refused(name):
    with pytest.raises((errors.ConfigError, errors.UnknownNameError)) as caught:
        open_server(name)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "arguments", [["--epochs", v] for v in ("nan", "x", "-1", "")] + [["--optim.name", "adm"], ["--x", "1"]]
)
def test_the_command_line_ends_in_one_of_our_errors_or_in_its_usage(arguments, capsys):
    tyro = pytest.importorskip("tyro")
    with pytest.raises((errors.ConfigError, errors.UnknownNameError, SystemExit)) as caught:
        tyro.cli(TrainConfig, default=WHOLE["debug"], args=arguments)
    assert not isinstance(caught.value, SystemExit) or caught.value.code == 2
    capsys.readouterr()
