"""What an actor does with engines, called here without Ray."""

import threading

import fakes
import pytest
from fakes import WAIT_S

from superserve_jax.engines.fake import FakeEngine
from superserve_jax.remote.host import Failed, Host, Opened
from superserve_jax.serving import makers


class Source:
    """Makes an engine, perhaps slowly."""

    def __init__(self, gate=None):
        self.made, self._gate, self.begun = 0, gate, threading.Event()

    def fits(self, made, profile):
        return self is made

    def open(self):
        self.begun.set()
        assert self._gate is None or self._gate.wait(WAIT_S)
        self.made += 1
        return FakeEngine(fakes.PROFILE), fakes.PROFILE


@pytest.fixture
def host():
    return Host()


def opened(host, source, token, *, alone=False):
    found = host.open(source, token, alone=alone)
    assert isinstance(found, Opened), found
    return found.key


def test_an_engine_is_freed_when_all_that_opened_it_have_dropped_it(host):
    source = Source()
    for token in ("a:0", "b:0"):
        key = opened(host, source, token)
    assert source.made == 1
    host.drop("a:0")
    host.drop("a:0")
    assert host.keys() == [key]
    host.drop("b:0")
    assert host.keys() == []


def test_an_engine_that_was_dropped_before_it_was_made_is_not_kept(host):
    host.drop("a:0")
    opened(host, Source(), "a:0")
    assert host.keys() == []


def test_a_router_that_is_alone_frees_the_engines_of_dead_ones_except_its_own(host):
    same, other = Source(), Source()
    key = opened(host, same, "dead:0")
    opened(host, other, "dead:1")
    assert opened(host, same, "new:0", alone=True) == key
    assert host.keys() == [key]
    assert same.made == 1
    host.drop("new:0")
    assert host.keys() == []


def test_what_exists_is_opened_and_dropped_while_another_engine_is_made(host):
    gate, here = threading.Event(), Source()
    slow = Source(gate)
    key = opened(host, here, "a:0")
    thread = threading.Thread(target=host.open, args=(slow, "a:1"), kwargs={"alone": False})
    thread.start()
    assert slow.begun.wait(WAIT_S)
    opened(host, here, "a:2")
    host.drop("a:0")
    assert host.keys() == [key]
    gate.set()
    thread.join(WAIT_S)
    assert len(host.keys()) == 2


def test_two_that_open_the_same_at_once_share_one_engine(host):
    gate = threading.Event()
    source = Source(gate)
    with fakes.threads(lambda: opened(host, source, "a:0"), lambda: opened(host, source, "a:1")):
        assert source.begun.wait(WAIT_S)
        gate.set()
    assert source.made == 1
    host.drop("a:1")
    assert len(host.keys()) == 1


def test_a_new_router_finds_the_engine_of_a_swap_whose_sizes_came_from_the_router():
    asked = makers.Source.of("digits", "0" * 64, batch_sizes=None, lengths=None, compute_dtype="float32")
    profile = fakes.PROFILE
    swapped = asked.at(profile)
    assert asked.fits(swapped, profile)
    assert swapped.fits(asked, profile)
    assert not asked.at(profile.at(profile.batch_sizes[:1])).fits(swapped, profile)
    other = makers.Source.of("digits", "0" * 64, batch_sizes=profile.batch_sizes, lengths=None, compute_dtype="float32")
    assert not other.fits(swapped, profile), "the user asked for sizes, and may get others"


def test_an_error_is_an_answer(host):
    class Broken:
        def open(self):
            raise ValueError("no")

    assert isinstance(host.open(Broken(), "a:0", alone=False), Failed)
    assert host.keys() == []
