"""Forged and impossible exports: each is refused with an ExportError. programs/test_fuzz.py tries random ones."""

import json
import resource
import struct

import pytest
import tensorstore
from small_exports import IMAGES, TEXTS, WORDS, payload_of, write
from tiny import TINY

import superserve_jax as ss
from superserve_jax import errors, exports, families, files
from superserve_jax.manifest import MANIFEST_NAME, files_of

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
        (lambda m: m["config"].update(family="other"), "unknown family 'other'(?!.*export again).*--import my_module"),
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


def test_huge_images_are_refused(images):
    manifest = manifest_of(images)
    manifest["config"]["image_size"] = 100_000
    with pytest.raises(errors.ExportError, match="inputs of 10,000,000,000 bytes"):
        load_forged(images, manifest)


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


# -- weights ------------------------------------------------------------------------------------------------------------------


def run_of_zeros(nbytes):
    """Zeros, packed by Zstandard: 4 bytes for up to 128 KB of them."""
    runs = [min(1 << 17, nbytes - start) for start in range(0, nbytes, 1 << 17)]
    blocks = [(size << 3 | 2 | (i == len(runs) - 1)).to_bytes(3, "little") + b"\0" for i, size in enumerate(runs)]
    return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", nbytes) + b"".join(blocks)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunks": [1 << 28]}, "chunks larger than itself"),
        ({"shape": [1 << 28], "chunks": [1 << 28]}, "268435456"),
        ({"dtype": "<f8"}, "float64"),
    ],
    ids=["chunks", "shape", "dtype"],
)
def test_weights_that_differ_from_the_config_are_refused_before_memory_is_taken(tmp_path, change, message, capfd):
    export = write(tmp_path / "export", IMAGES)
    payload = payload_of(export)[0]
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": f"file://{payload / 'weights'}/"}).result()
    about = json.loads(store["classifier.bias/.zarray"])
    store["classifier.bias/.zarray"] = json.dumps(about | change).encode()
    store["classifier.bias/0"] = run_of_zeros(1 << 30)
    manifest = manifest_of(export)
    manifest["files"] = {
        str(f.relative_to(payload)): {"bytes": f.stat().st_size, "sha256": files.sha256(f)} for f in files_of(payload)
    }
    before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(errors.ExportError, match=message):
        load_forged(export, manifest)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 300_000
    assert not capfd.readouterr().err


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
