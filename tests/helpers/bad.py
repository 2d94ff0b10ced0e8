"""Bad input for tests: odd values and damaged copies of good values. `attempt` checks that a failure is a documented error."""

import contextlib
import copy
import os
import signal
import threading
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from superserve_jax import errors

ODD = [
    *(None, True, False, 0, -1, 1, 2, 7, 1 << 31, 1 << 63, 10**12, 10**400, -(10**400)),
    *(0.5, -0.5, 1.5, 1e-320, 1e12, 1e308, float("nan"), float("inf"), -float("inf")),
    *("", "x", "1", "nan", "../../etc/passwd", "/etc/passwd", "\0", "\ud800", "a\nb", "x" * 10_000),
    *([], [[]], [None], [0], [1, 2, 3], ["x"], [1e400], {}, {"family": "single_subnet"}, {"gates": [1]}),
]
"""Plain values that JSON may hold."""

odd = st.sampled_from(ODD)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | odd,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
objects = st.sampled_from([object(), b"bytes", 1j, {1, 2}, range(3), int, len, ...]) | odd
"""Values that a caller may pass, also ones that JSON cannot hold."""


def fuzzed(test):
    """Decorates a fuzz test. It tries 50 examples, and 2,500 under `pytest --hypothesis-profile long`."""
    health = list(HealthCheck)
    return settings(max_examples=settings().max_examples // 2, deadline=None, database=None, suppress_health_check=health)(
        test
    )


def paths(value, path=()):
    """The path of every value inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from paths(inner, (*path, key))


@st.composite
def damaged(draw, value):
    """Copies of a JSON value with one to three changes: a part is replaced, removed, doubled or added."""
    result = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = list(paths(result))
        if not places:
            return draw(json_values)
        *above, key = draw(st.sampled_from(places))
        inside = result
        for k in above:
            inside = inside[k]
        match draw(st.sampled_from(["replace", "replace", "replace", "remove", "double", "add"])):
            case "replace":
                inside[key] = copy.deepcopy(draw(odd | json_values))
            case "remove":
                del inside[key]
            case "double":
                inside[key] = [copy.deepcopy(inside[key])] * 2
            case "add" if isinstance(inside, dict):
                inside[draw(st.text(max_size=8))] = copy.deepcopy(draw(odd))
            case "add":
                inside.insert(key, copy.deepcopy(draw(odd)))
    return result


def attempt(call, *kinds):
    """Returns what the call returns, or the error that it raises if that is of one of the kinds.

    Every other error is raised. The error must be one of superserve_jax.errors and have a message.
    """
    try:
        return call()
    except kinds as e:
        error = e
    assert type(error) in vars(errors).values(), type(error)
    assert str(error)
    return error


class Trap:
    """Reading its pickle makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


class Hang(BaseException):
    """Raised in a test that hangs. A BaseException, so neither the library nor hypothesis catches it."""


@contextlib.contextmanager
def no_new_threads(*, after=0):
    """In the block the system starts no thread, except for the first ones."""
    name = "_start_joinable_thread" if hasattr(threading, "_start_joinable_thread") else "_start_new_thread"
    start, left = getattr(threading, name), [after]

    def start_few(*arguments, **options):
        if not left[0]:
            raise RuntimeError("can't start new thread")
        left[0] -= 1
        return start(*arguments, **options)

    with mock.patch.object(threading, name, start_few):
        yield


@contextlib.contextmanager
def within(seconds):
    """Raises `Hang` if the block takes longer, even while it waits for a file."""

    def stop(*_):
        raise Hang(f"still busy after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
