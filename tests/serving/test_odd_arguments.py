"""Arguments of `submit`, `submit_many`, `result` and `close` whose own code raises, or that never end: documented errors.

The server then submits nothing, and goes on.
"""

import decimal
import itertools

import numpy as np
import pytest
from fakes import BUCKETED, held, outcomes, serve, tokens, x
from tiny import TINY

from superserve_jax import errors
from superserve_jax.supernets.supernet import check_inputs

pytestmark = pytest.mark.usefixtures("no_test_hangs")


class Awkward(RuntimeError):
    """An error that cannot be shown."""

    def __str__(self):
        raise self

    __repr__ = __str__


class Raises:
    """Every conversion, comparison and `repr` raises `error`."""

    def __init__(self, error):
        self.error = error

    def _raise(self, *args, **kwargs):
        raise self.error

    __array__ = __len__ = __iter__ = __getitem__ = __float__ = __index__ = __bool__ = __repr__ = __str__ = _raise
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = _raise
    __hash__ = object.__hash__


# Named, since pytest shows the parameters of a test.
RAISING = {
    kind.__name__: Raises(kind())
    for kind in (RuntimeError, OSError, MemoryError, StopIteration, RecursionError, KeyError, Awkward)
}
NO_NUMBERS = {**RAISING, "NaN": decimal.Decimal("NaN"), "sNaN": decimal.Decimal("sNaN")}


@pytest.fixture(scope="module")
def server():
    with serve() as opened:
        yield opened
        assert outcomes([opened.submit(x(5))]) == [5]
        assert opened.snapshot()["queries"]["arrived"] == 1


@pytest.mark.parametrize("name", RAISING)
def test_an_input_whose_conversion_raises_is_refused(server, name):
    value = RAISING[name]
    for submit in (lambda: server.submit(value), lambda: server.submit_many([x(1), value])):
        with pytest.raises(errors.InputError, match="an input is one array, and Raises cannot be made one"):
            submit()
    with pytest.raises(errors.InputError, match="expected several inputs, got Raises"):
        server.submit_many(value)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_that_must_end_the_caller_passes_and_nothing_is_submitted(server, error):
    for submit in (lambda: server.submit(Raises(error())), lambda: server.submit_many([x(1), Raises(error())])):
        with pytest.raises(error):
            submit()


def test_an_error_of_a_generator_passes_and_nothing_is_submitted(server):
    def inputs():
        yield x(1)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        server.submit_many(inputs())


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_a_number_that_cannot_be_compared_is_refused(server, name):
    value = NO_NUMBERS[name]
    with pytest.raises(errors.DeadlineError, match="slo_ms must be a positive, finite number of milliseconds, got "):
        server.submit(x(1), slo_ms=value)
    with pytest.raises(errors.AccuracyFloorError, match="min_accuracy="):
        server.submit(x(1), min_accuracy=value)
    with pytest.raises(errors.DeadlineError, match="slo_ms must be"):
        serve(slo_ms=value)


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_a_time_limit_that_cannot_be_compared_is_refused(server, name):
    value = NO_NUMBERS[name]
    with held() as (_, _, first), pytest.raises(errors.ConfigError, match="timeout must be a number of seconds, or None"):
        first.result(timeout=value)
    with pytest.raises(errors.ConfigError, match="timeout_s must be a number of seconds, or None"):
        server.close(timeout_s=value)
    with pytest.raises(errors.ConfigError, match="stall_s must be a positive number of seconds"):
        serve(stall_s=value)


def test_a_masked_array_is_refused(server):
    masked = np.ma.masked_array(np.float32(3), True)
    for value in (masked, np.ma.masked):
        with pytest.raises(errors.InputError, match=r"masked array.*fill it before: x\.filled\(0\)"):
            server.submit(value)
    spec = TINY.input_spec(2)
    with pytest.raises(errors.InputError, match=r"masked array.*fill it before"):
        check_inputs(TINY, np.ma.masked_array(np.zeros(spec.shape, spec.dtype)))


@pytest.mark.parametrize(("options", "read"), [({"max_queue": 10}, 11), ({"max_queue_bytes": 20}, 6)])
def test_inputs_without_an_end_give_queue_full_error_and_none_is_submitted(options, read):
    given = itertools.count()
    with held(**options) as (s, _, first):
        with pytest.raises(errors.QueueFullError, match=f"0 queries wait and {read} more would exceed {next(iter(options))}"):
            s.submit_many(x(i) for i in given)
        assert next(given) == read
        assert s.health()["waiting"] == 0
        s.submit_many(x(i) for i in range(read - 1))  # as many as fit
    assert first.result().output[0] == 0
    assert (s.snapshot()["queries"]["met"], s.snapshot()["queries"]["refused"]) == (read, read)


def test_texts_without_an_end_give_queue_full_error():
    with held(query=tokens(1), profile=BUCKETED, max_queue=10) as (s, _, _):
        with pytest.raises(errors.QueueFullError, match="max_queue=10"):
            s.submit_many(map(tokens, itertools.repeat(3)))
        assert s.health()["waiting"] == 0


def test_a_generator_may_use_the_server_while_it_is_read():
    with serve(max_queue=10) as s:
        inner = []

        def inputs():
            for i in range(3):
                inner.append(s.submit(x(10 + i)))
                yield x(i)

        assert outcomes(s.submit_many(inputs())) == [0, 1, 2]
        assert outcomes(inner) == [10, 11, 12]


def test_a_generator_that_closes_the_server_ends_with_server_closed_error():
    with serve() as s:

        def inputs():
            yield x(1)
            s.close()
            yield x(2)

        with pytest.raises(errors.ServerClosedError):
            s.submit_many(inputs())
