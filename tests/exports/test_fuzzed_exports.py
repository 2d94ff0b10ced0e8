"""Damaged, forged and impossible exports: each is refused with an ExportError, or loads as its manifest describes it."""

import io
import json
import pathlib
import resource
import zipfile

import bad
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_exports import IMAGES, TEXTS, WORDS, payload_of, write
from tiny import TINY

import superserve_jax as ss
from superserve_jax import errors, exports, families, files
from superserve_jax.exports import statistics
from superserve_jax.manifest import MANIFEST_NAME

pytestmark = pytest.mark.usefixtures("no_test_hangs")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write(tmp_path_factory.mktemp("images") / "export", IMAGES)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    return write(tmp_path_factory.mktemp("texts") / "export", TEXTS, WORDS)


@pytest.fixture(scope="module")
def model(images):
    return exports.load(images)


def manifest_of(path):
    return json.loads((path / MANIFEST_NAME).read_text())


def load_forged(path, manifest):
    """Loads an export with another manifest. Its digest fits, as an attacker would make it."""
    file = path / MANIFEST_NAME
    good = file.read_text()
    if isinstance(manifest, dict):
        manifest["sha256"] = files.digest(manifest)
    file.write_text(json.dumps(manifest))
    try:
        return exports.load(path)
    finally:
        file.write_text(good)


@bad.fuzzed
@given(choose=st.data())
def test_a_forged_manifest_is_refused_or_loads_as_it_describes(exported, choose):
    whole = manifest_of(exported)
    part = choose.draw(st.sampled_from(["config", "served", "files", None]))
    if part is None:
        whole = choose.draw(bad.damaged(whole))
    else:
        whole[part] = choose.draw(bad.damaged(whole[part]))
    loaded = bad.attempt(lambda: load_forged(exported, whole), errors.ExportError)
    if isinstance(loaded, errors.ExportError):
        assert str(exported) in str(loaded)
        assert "\n" not in str(loaded)
    else:
        assert all(0 <= s.accuracy <= 1 for s in loaded.served)
        assert [loaded.space.validate(s) for s in loaded.subnets] == list(loaded.subnets)
        assert loaded.config.num_classes == whole["config"]["num_classes"]


def serve_again_in_another_form(manifest):
    smallest = manifest["served"][0]
    assert smallest["subnet"]["expand"] == [0.5]
    again = {**smallest["subnet"], "expand": [1.0]}  # its only block is dropped, so this choice does not matter
    manifest["served"].append({**smallest, "subnet": again})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=99), "upgrade superserve-jax"),
        (lambda m: m.update(payload=7), "damaged"),
        (lambda m: m.pop("files"), "damaged"),
        (lambda m: m["files"].update(a={"bytes": 1 << 60, "sha256": ""}), "damaged"),
        (lambda m: m.update(files={k: None for k in m["files"]}), "damaged"),
        (lambda m: m.update(files={k: "\ud800" for k in m["files"]}), "damaged"),
        (lambda m: m.update(class_names=None), "damaged"),
        (lambda m: m["config"].update(family="other"), "unknown family 'other'.*import the module that registers it"),
        (lambda m: m["config"].update(num_classes=5), "does not fit the config"),
        (lambda m: m["config"].update(image_size="x"), "image_size must be a whole number"),
        (lambda m: m["served"][0].update(subnet={"gates": [1]}), "gates must be 2 values"),
        (lambda m: m["served"].append(3), "not a served subnet"),
        (serve_again_in_another_form, "none of them twice"),
        (lambda m: [file.update(bytes=0) for file in m["files"].values()] and None, "but its files have"),
        (lambda m: [file.update(bytes=1 << 30) for file in m["files"].values()] and None, "but its files have"),
    ],
)
def test_a_manifest_that_lies_is_refused_even_with_a_fitting_digest(images, change, message):
    manifest = manifest_of(images)
    change(manifest)
    with pytest.raises(errors.ExportError, match=message):
        load_forged(images, manifest)


@pytest.mark.parametrize(
    "change",
    [
        {"vocabulary": {"scheme": "nonsense", "lowercase": True}},
        {"vocabulary": {"scheme": ["wordpiece"], "lowercase": True}},
        {"vocabulary": {"scheme": "wordpiece", "lowercase": 7}},
        {"vocabulary": {"surplus": 1}},
        {"vocabulary": [1]},
        {"config": {**families.config_to_json(TEXTS), "pad_id": 2}},
    ],
)
def test_a_manifest_that_lies_about_the_vocabulary_is_refused(texts, change):
    with pytest.raises(errors.ExportError, match="vocabulary"):
        load_forged(texts, manifest_of(texts) | change)


def test_an_older_export_without_a_vocabulary_still_loads(images):
    manifest = manifest_of(images)
    del manifest["vocabulary"]
    assert load_forged(images, manifest).vocabulary == ()


HUGE = {
    "blocks": {"depths": [[0, 10**9]]},
    "layers": {"depths": [10**9]},
    "classes": {"num_classes": 10**12},
    "more classes than an array can have": {"num_classes": 1 << 70},
    "channels": {"stem_width": 10**9, "stage_widths": [10**9]},
    "channels by a ratio": {"width_mults": [1e300], "expand_ratios": [1e300]},
    "tokens": {"vocab_size": 10**12},
    "nested lists": {"family": [[[[]]]] * 1000},
}


@pytest.mark.parametrize("change", HUGE.values(), ids=HUGE)
def test_huge_sizes_are_refused_before_memory_is_allocated(exported, change):
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = manifest_of(exported)
    manifest["config"].update(change)
    with pytest.raises(errors.ExportError, match="does not describe a SuperNet that this version can build"):
        load_forged(exported, manifest)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 300_000


@pytest.mark.parametrize(
    "payload", ["../outside", "/etc", "payload-../../../etc", "payload-0123456789abcde/", "payload-0123456789abcdeg", "", "."]
)
def test_a_payload_outside_the_export_is_refused(images, payload):
    with pytest.raises(errors.ExportError, match="impossible payload folder"):
        load_forged(images, manifest_of(images) | {"payload": payload})


@pytest.mark.parametrize("name", ["../manifest.json", "/etc/passwd", "weights/../../x", "", ".", "a\nb", "\0", "a" * 5000])
def test_a_file_outside_the_payload_is_refused(images, name):
    manifest = manifest_of(images)
    manifest["files"][name] = {"bytes": 0, "sha256": ""}
    with pytest.raises(errors.ExportError, match=r"missing|impossible names"):
        load_forged(images, manifest)


NESTED = ['{"nested": ' + "[" * depth + "]" * depth + "}" for depth in (100, 980, 5000)]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', *NESTED])
def test_a_foreign_manifest_is_refused(tmp_path, content):
    (tmp_path / MANIFEST_NAME).write_text(content)
    with pytest.raises(errors.ExportError):
        exports.load(tmp_path)


def npz(**entries):
    """A zip archive with the given bytes as entries."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return buffer.getvalue()


def npy(array, **header):
    """A NumPy file. With `header`, only that header and no values."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    if header:
        buffer = io.BytesIO()
        np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": (1,), **header})
    return buffer.getvalue()


class Pickled:
    """Unpickling this object makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return pathlib.Path.touch, (self.file,)


def test_statistics_that_do_not_fit_are_refused_and_nothing_is_unpickled(tmp_path, model):
    good = (payload_of(model.path)[0] / "statistics.npz").read_bytes()
    file, trap = tmp_path / "statistics.npz", tmp_path / "trap"
    file.write_bytes(good)
    assert statistics.read(file, IMAGES).keys() == model.statistics.keys()
    listed = np.array(json.dumps([s.to_json() for s in model.statistics]))
    widths = np.array([values.shape[1] for values in model.statistics.values()])
    whole = np.concatenate(list(model.statistics.values()), axis=1)
    fitting = {"subnets": npy(listed), "widths": npy(widths), "rows": npy(whole)}
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


def test_statistics_that_unpack_to_more_than_their_file_holds_are_refused_unread(tmp_path):
    file = tmp_path / "statistics.npz"
    file.write_bytes(npz(rows=npy(np.zeros((2, 10**6), np.float32))))
    with pytest.raises(errors.ExportError, match=r"claims the shape \(2, 1000000\)"):
        statistics.read(file, IMAGES)


@bad.fuzzed
@given(choose=st.data())
def test_statistics_with_damaged_bytes_are_refused_or_have_the_right_shapes(tmp_path_factory, model, choose):
    content = bytearray((payload_of(model.path)[0] / "statistics.npz").read_bytes())
    for _ in range(choose.draw(st.integers(1, 4))):
        content[choose.draw(st.integers(0, len(content) - 1))] = choose.draw(st.integers(0, 255))
    file = tmp_path_factory.mktemp("statistics") / "statistics.npz"
    file.write_bytes(bytes(content[: choose.draw(st.integers(len(content) - 3, len(content)))]))
    read = bad.attempt(lambda: statistics.read(file, IMAGES), errors.ExportError)
    if not isinstance(read, errors.ExportError):
        assert [r.shape for r in read.values()] == [(2, sum(IMAGES.norm_sizes(IMAGES.sizes(s)).values())) for s in read]


@pytest.mark.parametrize("path", [None, 5, 1.5, b"x", [], {}, object(), "\0", "a" * 5000, "", "/", "/dev/null", "/etc/passwd"])
def test_something_else_than_the_path_of_an_export_is_refused(path):
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
def test_exporting_something_else_is_refused_before_anything_is_written(tmp_path, model, change):
    good = {"path": tmp_path / "e", "model": model, "served": model.served, "measured": "made up", **change}
    path, what, served = (good.pop(name) for name in ("path", "model", "served"))
    with pytest.raises((errors.ConfigError, errors.ExportError)):
        ss.export(path, what, served, **good)
    assert not list(tmp_path.iterdir())
