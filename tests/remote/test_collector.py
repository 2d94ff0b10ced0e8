"""A collector, with routers that are no actors. One file because all tests share the fake router."""

import asyncio
import functools

import ml_dtypes
import numpy as np
import pytest

from superserve_jax import errors
from superserve_jax.remote import router
from superserve_jax.remote.calls import Answers, NotSentError, RouterLostError
from superserve_jax.remote.collector import Collector
from superserve_jax.remote.host import Failed
from superserve_jax.remote.packing import unpack
from superserve_jax.serving.futures import Reply
from superserve_jax.subnet import Subnet

BAD = 99.0


class Fake:
    """A router that answers with twice the input."""

    def __init__(self, name="a"):
        self.name, self.calls, self.gone = name, [], False
        self.go = asyncio.Event()
        self.go.set()

    async def infer(self, parts):
        self.calls.append(parts)
        await self.about()
        found = [x for part in parts for x in unpack(part.inputs)]
        return Answers.of([self.answer(x) for x in found])

    async def about(self):
        await self.go.wait()
        if self.gone:
            raise RouterLostError(f"the router {self.name} is lost")

    @staticmethod
    def answer(x):
        if x.item(0) == BAD:
            return Failed.of(errors.InferenceError("bad input"))
        return Reply(2 * x, Subnet((1,)), 0.7, True, 3.0, 1.0, 2.0, 4)


def is_async(test):
    """Runs a coroutine function as a test."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 30.0))

    return run


def x(value):
    return np.float32([value, 0])


def submit_all(collector, values, **options):
    return asyncio.gather(*(collector.submit(x(v), **options) for v in values), return_exceptions=True)


def values(replies):
    return [reply.output.item(0) for reply in replies]


@is_async
async def test_queries_of_several_requests_are_one_call_and_get_their_own_answers():
    fake = Fake()
    collector = Collector([fake], wait_ms=5)
    one, many = await asyncio.gather(submit_all(collector, range(5)), collector.submit_many([x(10), x(11)]))
    assert values(one) == [0, 2, 4, 6, 8]
    assert values(many) == [20, 22]
    [[part]] = fake.calls
    assert len(unpack(part.inputs)) == 7


@is_async
async def test_a_full_group_does_not_wait():
    fake = Fake()
    collector = Collector([fake], wait_ms=3_600_000, most=3)
    assert values(await submit_all(collector, range(6))) == [0, 2, 4, 6, 8, 10]
    assert len(fake.calls) == 2


@is_async
async def test_the_error_of_one_query_is_its_own():
    replies = await submit_all(Collector([Fake()]), [1, BAD, 3])
    assert values(replies[::2]) == [2, 6]
    assert isinstance(replies[1], errors.InferenceError)
    with pytest.raises(errors.InferenceError, match="bad input"):
        await Collector([Fake()]).submit_many([x(1), x(BAD)])


@is_async
async def test_deadlines_count_from_arrival():
    fake = Fake()
    collector = Collector([fake], wait_ms=60)
    first = asyncio.create_task(collector.submit(x(1), slo_ms=1_000))
    await asyncio.sleep(0.03)
    late = await collector.submit(x(2), slo_ms=10)
    in_time = await first
    [[short], [long]] = fake.calls
    assert (short.slo_ms, long.slo_ms) == (10, 1_000)  # also if the deadline has passed
    assert short.waited_ms > 10
    assert long.waited_ms >= 60
    assert not late.met_slo  # although the router says so
    assert late.latency_ms > 10
    assert in_time.met_slo
    assert in_time.latency_ms >= 60
    assert in_time.queue_ms == pytest.approx(in_time.latency_ms - in_time.compute_ms)


@is_async
async def test_queries_with_other_deadlines_or_floors_have_their_own_calls_and_dtypes_their_own_parts():
    fake = Fake()
    collector = Collector([fake], wait_ms=5, slo_ms=36)
    both = (submit_all(collector, [1, 2]), submit_all(collector, [3], min_accuracy=0.5), submit_all(collector, [4], slo_ms=99))
    *floats, other = await asyncio.gather(*both, collector.submit(np.int8([5, 0])))
    assert [values(replies) for replies in floats] == [[2, 4], [6], [8]]
    assert other.output.dtype == np.int8
    assert sorted([(len(unpack(p.inputs)), p.floor, p.slo_ms) for p in parts] for parts in fake.calls) == [
        [(1, 0.0, 99)],
        [(1, 0.5, 36)],
        [(2, 0.0, 36), (1, 0.0, 36)],
    ]


@is_async
async def test_each_query_is_answered_when_its_own_answer_is_there():
    class Slow(Fake):
        """It has the answer to the second query later, and then that to the first."""

        asked = ()

        async def infer(self, parts):
            return Answers.of([None, None, self.answer(x(3))], ticket="7")

        async def rest(self, ticket):
            self.asked = (*self.asked, ticket)
            if ticket == "7":
                return Answers.of([None, self.answer(x(2))], ticket="8")
            await self.go.wait()
            return Answers.of([self.answer(x(1))])

    slow = Slow()
    slow.go.clear()
    collector = Collector([slow], wait_ms=5)
    first, *others = [asyncio.create_task(collector.submit(x(i))) for i in (1, 2, 3)]
    assert values(await asyncio.gather(*others)) == [4, 6]
    assert not first.done()
    slow.go.set()
    assert values([await first]) == [2]
    assert slow.asked == ("7", "8")


@is_async
async def test_a_slow_call_does_not_make_a_router_lost_that_says_it_is_up():
    class Slow(Fake):
        async def infer(self, parts):
            await asyncio.sleep(0.2)
            return await super().infer(parts)

    collector = Collector([Slow()], wait_ms=0, patience_s=0.03)
    assert values(await submit_all(collector, [1])) == [2]
    assert not collector.lost()


@pytest.mark.parametrize("whole", [True, False])
@is_async
async def test_a_router_that_serves_nothing_gets_no_queries_until_it_can(whole):
    class Broken(Fake):
        broken = True

        async def infer(self, parts):
            if whole:
                await self.about()
            return await super().infer(parts)

        async def about(self):
            if self.broken and (whole or self.lost):
                raise errors.ExportError("no such export")

        def answer(self, x):
            self.lost = True
            return Failed.of(errors.WorkersLostError("no workers")) if self.broken else Fake.answer(x)

        lost = False

    broken, good = Broken("broken"), Fake("good")
    collector = Collector([broken, good], wait_ms=0, pause_s=0.01)
    found: list = []
    while not collector.lost():  # a router is chosen by chance
        found += await submit_all(collector, [1])
    assert isinstance(found[-1], errors.ExportError if whole else errors.WorkersLostError)
    assert collector.lost() == ["broken"]
    assert values(await submit_all(collector, range(20))) == [2 * i for i in range(20)]
    broken.broken = False
    while collector.lost():
        await asyncio.sleep(0.01)
    await collector.close()


@is_async
async def test_a_router_can_count_as_lost_from_the_beginning():
    first, second = Fake("first"), Fake("second")
    first.gone = True
    collector = Collector([first, second], wait_ms=0, pause_s=0.01)
    collector.lose(first)
    assert values(await submit_all(collector, range(5))) == [0, 2, 4, 6, 8]
    assert not first.calls
    first.gone = False
    while collector.lost():
        await asyncio.sleep(0.01)


@is_async
async def test_clients_of_a_lost_router_get_an_error_and_the_next_calls_go_to_another_one():
    first, second = Fake("first"), Fake("second")
    first.gone = second.gone = True
    collector = Collector([first, second], wait_ms=0, pause_s=0.01)
    [error] = await submit_all(collector, [1])
    assert isinstance(error, RouterLostError)
    [name] = collector.lost()
    (second if name == "first" else first).gone = False
    assert values(await submit_all(collector, range(3))) == [0, 2, 4]
    first.gone = second.gone = False
    while collector.lost():
        await asyncio.sleep(0.01)
    await collector.close()


@is_async
async def test_without_a_router_the_error_says_so_until_one_is_back():
    fake = Fake("only")
    fake.gone = True
    collector = Collector([fake], wait_ms=0, pause_s=0.01)
    await submit_all(collector, [1])
    with pytest.raises(RouterLostError, match=r"no router answers \(only\)"):
        await collector.submit(x(1))
    fake.gone = False
    while collector.lost():
        await asyncio.sleep(0.01)
    assert values(await submit_all(collector, [4])) == [8]


@is_async
async def test_a_silent_router_gets_no_more_than_its_share_and_counts_as_lost_in_the_end():
    silent, good = Fake("silent"), Fake("good")
    silent.go.clear()
    collector = Collector([silent, good], wait_ms=0, patience_s=0.2)
    answers = []
    for i in range(20):  # until it has one query, it is chosen by chance
        answers.append(asyncio.create_task(collector.submit(x(i))))
        await asyncio.sleep(0.002)
    found = await asyncio.gather(*answers, return_exceptions=True)
    assert len(silent.calls) == 1
    assert [isinstance(each, RouterLostError) for each in found].count(True) == 1
    assert collector.lost() == ["silent"]


@is_async
async def test_a_client_that_leaves_costs_the_others_nothing():
    collector = Collector([Fake()], wait_ms=5)
    leaving = asyncio.create_task(collector.submit(x(1)))
    staying = asyncio.create_task(collector.submit(x(2)))
    await asyncio.sleep(0)
    leaving.cancel()
    assert (await staying).output.item(0) == 4


@is_async
async def test_a_router_that_answers_nonsense_costs_no_more_than_its_call():
    fake = Fake()
    fake.answer = lambda x: None
    found = await submit_all(Collector([fake]), [1, 2])
    assert all(isinstance(error, Exception) for error in found)


@is_async
async def test_wrong_queries_are_refused_at_once():
    collector = Collector([Fake()])
    with pytest.raises(errors.DeadlineError):
        await collector.submit(x(1), slo_ms=-1)
    with pytest.raises(errors.InputError, match="2 inputs of 2 kinds"):
        await collector.submit_many([x(1), np.int8([1])])
    with pytest.raises(errors.ConfigError, match="at least one router"):
        Collector([])


@pytest.mark.parametrize(
    ("wrong", "options", "kind", "message"),
    [
        (np.ma.masked_array([1.0, 2.0], [False, True]), {}, errors.InputError, "masked array"),
        ([[1.0, 2.0], [3.0]], {}, errors.InputError, "list cannot be made one"),
        (np.array([object(), None]), {}, errors.InputError, "dtype object; expected numbers"),
        (np.zeros(2, "i4,f4"), {}, errors.InputError, "expected numbers"),
        (x(1), {"min_accuracy": None}, errors.AccuracyFloorError, "must be a fraction of 1, got None"),
        (x(1), {"min_accuracy": "high"}, errors.AccuracyFloorError, "must be a fraction of 1, got 'high'"),
        (x(1), {"min_accuracy": float("nan")}, errors.AccuracyFloorError, "got nan"),
    ],
)
@is_async
async def test_a_query_that_no_server_takes_fails_alone(wrong, options, kind, message):
    collector = Collector([Fake()], wait_ms=5)
    good, [error] = await asyncio.gather(
        submit_all(collector, range(3)), asyncio.gather(collector.submit(wrong, **options), return_exceptions=True)
    )
    assert values(good) == [0, 2, 4]
    assert isinstance(error, kind)
    assert message in str(error)
    assert not collector.lost()


@is_async
async def test_queries_that_cannot_be_sent_say_nothing_about_the_router():
    class Unsent(Fake):
        async def infer(self, parts):
            raise NotSentError("the queries cannot be sent")

    collector = Collector([Unsent()], wait_ms=0)
    [error] = await submit_all(collector, [1])
    assert isinstance(error, errors.InputError)
    assert not collector.lost()


@is_async
async def test_dtypes_of_the_same_size_and_kind_have_their_own_parts():
    one, other = (np.ones(2, dtype) for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e4m3fnuz))
    assert one.dtype.str == other.dtype.str
    collector = Collector([Fake()], wait_ms=5)
    replies = await asyncio.gather(collector.submit(one), collector.submit(other))
    assert [reply.output.dtype for reply in replies] == [one.dtype, other.dtype]


@is_async
async def test_closing_waits_for_answers():
    collector = Collector([Fake()], wait_ms=3_600_000)
    waiting = asyncio.create_task(collector.submit(x(1)))
    await asyncio.sleep(0)
    await collector.close()
    assert (await waiting).output.item(0) == 2


@is_async
async def test_image_files_travel_as_their_bytes():
    class Server:
        def _admit(self, xs, *options):
            return xs

    fake = Fake()
    collector = Collector([fake], wait_ms=5)
    await asyncio.gather(collector.submit(b"one"), collector.submit(b"three"), collector.submit(np.uint8([1, 2])))
    [arrays, files] = fake.calls[0]
    assert router.submit(Server(), files) == [b"one", b"three"]
    assert [x.tolist() for x in router.submit(Server(), arrays)] == [[1, 2]]


def test_answers_are_unpacked():
    found = [Fake.answer(x(1)), Fake.answer(x(BAD)), Fake.answer(x(3))]
    back = Answers.of(found).unpacked()
    assert [type(each) for each in back] == [Reply, Failed, Reply]
    assert values(back[::2]) == [2, 6]
    assert Answers.of(found[1:2]).unpacked() == found[1:2]
