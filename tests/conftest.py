"""Fixtures that many tests share: tiny SuperNets, an export, a small dataset, and a way to run the programs."""

import os
import signal

os.environ.setdefault("SUPERSERVE_CACHE", "")  # no test reads or fills the user's own cache

import bad
import jax
import markers
import program
import pytest
from hypothesis import HealthCheck, settings
from tiny import TINY, random_params, random_statistics, write_export

from superserve_jax import exports
from superserve_jax.supernets.supernet import SuperNet

collect_ignore = ["helpers", "data", "elastic/models"]
# No time limits, since a machine may stand still in any example. Every run tries the same examples; with
# `--hypothesis-profile long`, it tries many more, and others in each run.
patient = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("suite", patient, derandomize=True)
settings.register_profile("long", patient, max_examples=5_000)
settings.load_profile("suite")


def wants_gpu(config):
    """Whether the option -m selects tests that need a GPU."""
    return markers.needs(config.option.markexpr, "gpu")


def pytest_configure(config):
    """Makes Ctrl-C work in tests, because a shell starts commands in the background without it.

    Without `-m gpu`, everything runs on the CPU: tolerances are for float32, and many processes cannot share a card.
    """
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if wants_gpu(config):
        if getattr(config.option, "numprocesses", None) not in (None, 0):
            raise pytest.UsageError("tests that need a GPU run in one process, because it owns the card; leave out -n")
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # of programs that tests start
        jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config):
    """Tests on a GPU run in one process. None leaves the choice to pytest-xdist."""
    return 0 if wants_gpu(config) else None


def pytest_collection_modifyitems(items):
    """Skips tests that need a GPU if there is none."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and jax.default_backend() == "cpu":
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def run_program():
    """Runs a program of train/ or serve/ as its command line would, see `program.run_program`."""
    return program.run_program


@pytest.fixture
def no_test_hangs():
    """Ends a test after ten minutes. With many more examples than usual, after an hour."""
    with bad.within(600 if settings().max_examples <= 100 else 3600):
        yield


def _small_dataset(folder, name, module, attribute, counts):
    """Makes a dataset with fewer examples in a TFDS folder, and returns the folder."""
    from superserve_jax.training import data  # noqa: F401 - `prepared` cannot be imported before it
    from superserve_jax.training.datasets import prepared

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(f"superserve_jax.training.datasets.{module}.{attribute}", counts)
        prepared.load(name, str(folder))
    return str(folder)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory):
    """A TFDS folder with a small cluttered_digits in it: 300 training images, 90 test images."""
    counts = {"train": 300, "test": 90}
    return _small_dataset(tmp_path_factory.mktemp("tfds"), "cluttered_digits", "cluttered_digits.render", "NUM_IMAGES", counts)


@pytest.fixture(scope="session")
def listops_dir(tmp_path_factory):
    """A TFDS folder with a small listops in it: 300 training texts, 60 test texts."""
    counts = {"train": 300, "test": 60}
    return _small_dataset(tmp_path_factory.mktemp("tfds"), "listops", "listops.grammar", "NUM_EXAMPLES", counts)


@pytest.fixture(scope="module")
def module_cache(tmp_path_factory):
    """One cache of executables for a test file, so that a test loads what an earlier one has compiled."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SUPERSERVE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", autouse=True)
def forget_compiled_functions():
    """A file of tests leaves no traced and compiled functions behind. In the end they would be millions of objects.

    Every garbage collection visits all objects, and hundreds of tests collect garbage.
    """
    yield
    jax.clear_caches()


@pytest.fixture(scope="module")
def quick_compilation(request):
    """XLA compiles in less time, and its code runs slower, in this process and in programs that it starts.

    Not with `-m gpu`: on a GPU, the tests run what users run.

    For files whose tests do not depend on how XLA rounds. Not for tests that compare bits of this process with those of
    another one, because functions that this process has compiled before stay as they are.
    """
    if wants_gpu(request.config):
        yield
        return
    before = jax.config.read("jax_disable_most_optimizations")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def tiny():
    """A SuperNet of basic blocks. Its smallest, a middle and its largest subnet have random statistics."""
    space = TINY.space()
    chosen = [space.smallest(), space.subnet(depth=(1, 1, 1), expand=0.5, width=1.0), space.largest()]
    return SuperNet(TINY, random_params(TINY), {s: random_statistics(TINY, s) for s in chosen})


@pytest.fixture
def export(tiny, tmp_path):
    """An export with one served subnet."""
    return exports.load(write_export(tmp_path / "export", tiny, tiny.calibrated[:1]))


@pytest.fixture
def compilations(caplog):
    """Lists what jax traces and compiles after the fixture is made."""
    events = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, *_, **__: events.append(name))
    yield lambda: [e for e in events if "compile" in e or "trace" in e]
    events.clear()
