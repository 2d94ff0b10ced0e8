"""Files that a user writes, with bad content: profiles, CSV files, configs, subnets, vocabularies and the command line.

Each is accepted, or refused with one of the documented errors. Nothing hangs. `bad.attempt` does not catch other errors, so
they fail the test. exports/test_fuzzed_exports.py and serving/test_bad_requests.py do the same for exports and requests.
"""

import json
import math
import pathlib

import bad
import fakes
import numpy as np
import pytest
import tyro
from fakes import SUBNETS
from hypothesis import given
from hypothesis import strategies as st
from tiny import TINY

import superserve_jax as ss
from superserve_jax import errors, exports
from superserve_jax.manifest import MANIFEST_NAME
from superserve_jax.profile import Profile, Row
from superserve_jax.simulation import azure, recorded
from superserve_jax.subnet import Subnet
from superserve_jax.training import data
from superserve_jax.training.config import TrainConfig, config_from_json, config_to_json, load_config
from superserve_jax.vocabulary import Vocabulary

pytestmark = pytest.mark.usefixtures("no_test_hangs")

PROFILE = fakes.PROFILE.only(SUBNETS[:2])  # the third subnet has no valid JSON


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The path of a file that each example overwrites."""
    return tmp_path_factory.mktemp("files") / "file"


# -- JSON ---------------------------------------------------------------------------------------------------------------------

FOLDER = pathlib.Path(__file__).parent.parent / "configs"
CONFIGS = {name: load_config(FOLDER / f"{name}.py") for name in ("debug", "listops_dynabert", "dynabert_mnli")}
SPACE = TINY.space()
JSON = {
    "subnet": (
        [s.to_json() for s in (SPACE.smallest(), SPACE.largest())],
        lambda values: SPACE.validate(Subnet.from_json(values)),
        Subnet.to_json,
        [errors.SubnetError],
    ),
    "config": (
        [config_to_json(config) for config in CONFIGS.values()],
        config_from_json,
        config_to_json,
        [errors.ConfigError, errors.UnknownNameError, errors.SubnetError],
    ),
}


@pytest.mark.parametrize("kind", JSON)
@bad.fuzzed
@given(data=st.data())
def test_any_json_is_valid_or_refused(kind, data):
    examples, read, write, kinds = JSON[kind]
    values = data.draw(st.sampled_from(examples).flatmap(bad.damaged) | bad.json_values)
    made = bad.attempt(lambda: read(values), *kinds)
    if not isinstance(made, errors.SuperServeError):
        assert read(json.loads(json.dumps(write(made)))) == made


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


@pytest.mark.parametrize(
    "value", ["x" * 10**6, "\x1b[2J", "a\nb", "\u202e", "\ud800", [[0] * 10**5]], ids=lambda value: ascii(value)[:9]
)
def test_a_value_in_a_file_neither_floods_nor_changes_a_terminal(tmp_path, value):
    about = {"schema": 1, "device": "cpu", "batch_sizes": [1], "rows": []}
    for key in about:
        (tmp_path / "profile.json").write_text(json.dumps({**about, key: value}))
        with pytest.raises(errors.ProfileError) as caught:
            Profile.load(tmp_path / "profile.json")
        assert len(str(caught.value)) < 2_000
        assert str(caught.value).isprintable()
        assert "measure" in str(caught.value)


# -- CSV files: recorded arrivals, and invocations as Azure publishes them ----------------------------------------------------


def test_counts_that_overflow_are_refused(file):
    file.write_text("f,1,2\n" + f"a,{2**52},{2**52}\n" * 3000)
    with pytest.raises(errors.DataError, match="which is impossible"):
        azure.invocations_per_minute(file)


@pytest.mark.parametrize("path", [None, 5, b"x", [None], [5], object(), "\0", "/", ["a" * 5000], [], ""])
def test_something_else_than_the_path_of_a_csv_or_config_file_is_refused(path):
    with pytest.raises((errors.ConfigError, errors.DataError)):
        azure.invocations_per_minute(path)
    with pytest.raises(errors.DataError):
        recorded.trace(path)
    with pytest.raises(errors.ConfigError):
        load_config(path)


# -- config files, the command line, and vocabularies -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.py", "def get_config(:", r"a\.py:1"),
        ("a.py", "import nowhere_at_all", r"a\.py:1"),
        ("a.py", "def get_config():\n    return 1 / 0", r"a\.py:2"),
        ("a.py", "def get_config(x):\n    return x", r"a\.py"),
        ("a.py", "", r"a\.py has no function get_config"),
        ("a.py", "get_config = 5", r"a\.py has no function get_config"),
        ("a.py", "def get_config():\n    return {}", r"a\.py must return a TrainConfig, got dict"),
        ("a.py", "\0", r"a\.py"),
        ("a.txt", "", r"a\.txt is no Python file"),
        ("a", "", r"a is no Python file"),
    ],
)
def test_a_config_file_that_fails_is_refused_by_its_path_and_line(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(errors.ConfigError, match=message):
        load_config(tmp_path / name)


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


@bad.fuzzed
@given(content=st.binary(max_size=60), tail=st.binary(max_size=20))
def test_a_vocabulary_file_with_any_bytes_is_valid_or_refused(file, content, tail):
    for whole in (content, b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n" + tail):
        file.write_bytes(whole)
        made = bad.attempt(lambda: Vocabulary.read(file), errors.DataError)
        if isinstance(made, Vocabulary):
            file.write_bytes(made.to_text().encode())
            assert Vocabulary.read(file) == made
