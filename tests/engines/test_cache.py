"""The cache of executables: its safety, its size and its place."""

import dataclasses
import functools
import logging
import os
import pathlib
import types

import jax
import numpy as np
import pytest
from cached import answer, smallest
from tiny import TINY, random_images

from superserve_jax import errors
from superserve_jax.engines import cache, executables
from superserve_jax.engines.device import DeviceEngine
from superserve_jax.supernets import compiler

# -- safety -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [lambda c: c[:100], lambda c: c[:-1] + bytes([c[-1] ^ 1]), lambda c: b""])
def test_a_damaged_entry_is_compiled_again(root, damage, caplog):
    first = answer()
    [entry] = root.glob("*.bin")
    entry.write_bytes(damage(entry.read_bytes()))
    np.testing.assert_array_equal(answer(), first)
    assert "is damaged" in caplog.text
    caplog.clear()
    answer()
    assert "is damaged" not in caplog.text


def writable_by_others(entry):
    entry.chmod(0o666)


def a_link(entry):
    entry.rename(entry.with_name("elsewhere"))
    entry.symlink_to(entry.with_name("elsewhere"))


def a_pipe(entry):
    entry.unlink()
    os.mkfifo(entry)


def of_another_user(entry):
    os.chown(entry, 12345, -1)


@pytest.mark.parametrize(
    "change",
    [
        writable_by_others,
        a_link,
        a_pipe,
        pytest.param(of_another_user, marks=pytest.mark.skipif(os.getuid() != 0, reason="only root can give a file away")),
    ],
)
@pytest.mark.usefixtures("no_test_hangs")
def test_an_entry_that_others_may_have_written_is_not_unpickled(root, change, caplog, monkeypatch):
    first = answer()
    [entry] = root.glob("*.bin")
    change(entry)
    with monkeypatch.context() as patch:
        patch.setattr(cache.pickle, "loads", lambda _: pytest.fail("the entry was unpickled"))
        np.testing.assert_array_equal(answer(), first)
    assert "compiling again" in caplog.text
    assert not entry.is_symlink()
    assert entry.stat().st_mode & 0o177 == 0
    caplog.clear()
    answer()
    assert not [r for r in caplog.records if r.name.startswith("superserve_jax")]


def test_an_entry_that_fails_at_its_first_call_is_compiled_again(root, tiny, caplog, monkeypatch):
    """For example, it may choose an algorithm that another version of a kernel library does not have."""
    calls = {"device": jax.devices()[0], "subnet_list": tiny.calibrated, "batch_sizes": (1, 2)}
    images = list(random_images(TINY, 2))

    def outputs():
        engine = DeviceEngine(tiny, **calls)
        return [engine.run(s, 2, images) for s in tiny.calibrated], engine

    expected, _ = outputs()
    entries = {path: path.read_bytes() for path in root.glob("*.bin")}

    def fail(*arguments):
        raise RuntimeError("no engine with this id")

    monkeypatch.setattr(cache.serialize_executable, "deserialize_and_load", lambda *_, **__: functools.partial(fail))
    with caplog.at_level(logging.WARNING):
        found, engine = outputs()
    np.testing.assert_array_equal(found, expected)
    assert "no engine with this id" in caplog.text
    assert len(engine.executables) == len(tiny.calibrated) * 2
    assert set(root.glob("*.bin")) == set(entries)


def test_without_command_buffers_if_an_executable_with_them_fails(root, tiny, caplog, monkeypatch):
    """XLA may be unable to record a kernel of a GPU. Here an option of the CPU stands for command buffers."""
    extra, compile = {"xla_cpu_enable_fast_min_max": False}, cache.Traced.compile
    monkeypatch.setattr(compiler, "options", lambda _, command_buffers=True: extra if command_buffers else {})

    def fail(*arguments):
        raise RuntimeError("cannot be captured")

    def compile_or_fail(traced, *options):
        made = compile(traced, *options)
        return dataclasses.replace(made, call=fail) if extra.items() <= traced.options.items() else made

    monkeypatch.setattr(cache.Traced, "compile", compile_or_fail)
    monkeypatch.setenv("SUPERSERVE_CACHE", "")
    images = random_images(TINY, 1)
    with caplog.at_level(logging.WARNING):
        engine = DeviceEngine(tiny, jax.devices()[0], subnet_list=tiny.calibrated, batch_sizes=(1,))
    assert "cannot be captured" in caplog.text
    assert "without command buffers" in caplog.text
    for subnet in tiny.calibrated:
        np.testing.assert_allclose(engine.run(subnet, 1, list(images)), tiny(images, subnet), rtol=1e-4, atol=1e-5)


def test_out_of_memory_at_the_start_is_an_error_at_once(tiny, monkeypatch):
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory")

    monkeypatch.setattr(cache.Traced, "compile", lambda self, *_: cache.Executable(fail, self.leaves, is_from_cache=True))
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        DeviceEngine(tiny, jax.devices()[0], subnet_list=tiny.calibrated, batch_sizes=(1,))
    assert len(calls) == 1


def test_an_executable_that_fails_after_it_was_compiled_ends_the_start(tiny, monkeypatch):
    def fail(*arguments):
        raise RuntimeError("out of order")

    monkeypatch.setattr(cache.Traced, "compile", lambda self, *_: cache.Executable(fail, self.leaves))
    with pytest.raises(RuntimeError, match="out of order"):
        DeviceEngine(tiny, jax.devices()[0], subnet_list=tiny.calibrated, batch_sizes=(1,))


def test_a_directory_that_others_may_write_to_is_not_trusted(root, caplog):
    root.mkdir()
    root.chmod(0o777)
    answer()
    assert "chmod 700" in caplog.text
    assert not list(root.glob("*"))


# -- size and place -----------------------------------------------------------------------------------------------------------


def test_the_least_recently_used_entries_are_deleted_first(root, monkeypatch):
    configs = [dataclasses.replace(TINY, num_classes=n) for n in (3, 4, 5)]
    paths = []
    for age, config in enumerate(configs):
        answer(config)
        [path] = set(root.glob("*.bin")) - set(paths)
        os.utime(path, (1e9 + age, 1e9 + age))
        paths.append(path)
    answer(configs[0])  # a use, so the second entry is now the oldest
    monkeypatch.setenv("SUPERSERVE_CACHE_MB", "1")
    monkeypatch.setattr(
        cache, "limit_bytes", lambda: sum(path.stat().st_size for path in paths) + paths[0].stat().st_size // 2
    )
    answer(dataclasses.replace(TINY, num_classes=6))
    assert [path.exists() for path in paths] == [True, False, True]


def test_a_cache_that_cannot_be_emptied_is_used_and_says_so(root, monkeypatch, caplog, run_program):
    first = answer()

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "limit_bytes", lambda: 0)
        patch.setattr(pathlib.Path, "unlink", refuse)
        patch.setattr(os, "utime", refuse)
        np.testing.assert_array_equal(answer(), first)
        assert "stays larger than its limit" in caplog.text
        assert "compiling again" not in caplog.text
        assert "cannot be deleted: [Errno 30]" in run_program("serve/cache.py", "--clear", status=2).stderr
    assert len(list(root.glob("*.bin"))) == 1


def test_a_program_shows_and_clears_the_cache_and_leaves_other_files(root, run_program):
    answer()
    [entry] = root.glob("*.bin")
    unfinished, other = entry.with_name(f"{entry.name}.0123456789abcdef.part"), root / "weights.bin"
    unfinished.touch()
    other.write_text("mine")
    assert f"{root}" in run_program("serve/cache.py").stdout
    assert entry.exists()
    assert "deleted 2 files" in run_program("serve/cache.py", "--clear").stdout
    assert list(root.glob("*")) == [other]


def card(number, kind="NVIDIA H100", driver="580.1"):
    """A stand-in for a GPU."""
    client = types.SimpleNamespace(platform_version=driver)
    return types.SimpleNamespace(platform="gpu", device_kind=kind, id=number, client=client)


def test_equal_cards_share_the_results_of_tuning_but_no_executables(root, run_program):
    traced, folders = executables.trace_program(smallest(TINY), 1, jax.devices()[0]), []

    class Recorder(cache.Traced):
        def compile(self, options=None):
            folders.append(pathlib.Path(options[cache.TUNING_OPTION]))
            return super().compile(options)

    for device in (card(0), card(1), card(0, kind="NVIDIA A100"), card(0, driver="590.2")):
        cache.ExecutableCache(TINY, device).get({}, lambda _: Recorder(traced.traced, traced.leaves))
    assert len(list(root.glob("*.bin"))) == len(folders) == 4
    assert folders[0] == folders[1]
    assert len(set(folders)) == 3
    for folder in folders:
        assert folder.parent == root
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "fusion.textproto").touch()
    assert "deleted 4 files" in run_program("serve/cache.py", "--clear").stdout
    assert not list(root.iterdir())


def test_the_program_says_that_the_cache_is_off(monkeypatch, run_program):
    monkeypatch.setenv("SUPERSERVE_CACHE", "")
    assert "the cache is off" in run_program("serve/cache.py").stdout


@pytest.mark.parametrize("value", ["", "-1", "1.5", "1 GB"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch, value):
    monkeypatch.setenv("SUPERSERVE_CACHE_MB", value)
    with pytest.raises(errors.ConfigError, match="SUPERSERVE_CACHE_MB must be a whole number of megabytes"):
        answer()


def test_without_a_home_directory_only_the_variable_gives_a_cache(root, monkeypatch, caplog):
    def no_home(_):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(cache.platformdirs, "user_cache_path", no_home)
    answer()
    assert len(list(root.glob("*.bin"))) == 1
    monkeypatch.delenv("SUPERSERVE_CACHE")
    answer()
    assert "set SUPERSERVE_CACHE" in caplog.text


def test_an_empty_variable_turns_the_cache_off(root, monkeypatch):
    monkeypatch.setenv("SUPERSERVE_CACHE", "")
    answer()
    assert not root.exists()
