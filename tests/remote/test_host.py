"""What an actor does with engines, called here without Ray."""

import threading

import fakes
import pytest
from fakes import WAIT_S

from superserve_jax.engines.fake import FakeEngine
from superserve_jax.remote.host import Failed, Host, Opened


class Source:
    """Makes an engine, perhaps slowly."""

    def __init__(self, gate=None):
        self.made, self._gate, self.begun = 0, gate, threading.Event()

    def open(self):
        self.begun.set()
        assert self._gate is None or self._gate.wait(WAIT_S)
        self.made += 1
        return FakeEngine(fakes.PROFILE), fakes.PROFILE


@pytest.fixture
def host():
    return Host()


def opened(host, key, source, token, *, alone=False):
    found = host.open(key, source, token, alone=alone)
    assert isinstance(found, Opened), found
    return found


def test_an_engine_is_freed_when_all_that_opened_it_have_dropped_it(host):
    source = Source()
    for token in ("a:0", "b:0"):
        opened(host, "key", source, token)
    assert source.made == 1
    host.drop("key", "a:0")
    host.drop("key", "a:0")
    assert host.keys() == ["key"]
    host.drop("key", "b:0")
    assert host.keys() == []


def test_an_engine_that_was_dropped_before_it_was_made_is_not_kept(host):
    host.drop("key", "a:0")
    opened(host, "key", Source(), "a:0")
    assert host.keys() == []


def test_a_router_that_is_alone_frees_the_engines_of_dead_ones_except_its_own(host):
    same, other = Source(), Source()
    opened(host, "same", same, "dead:0")
    opened(host, "other", other, "dead:1")
    opened(host, "same", same, "new:0", alone=True)
    assert host.keys() == ["same"]
    assert same.made == 1
    host.drop("same", "new:0")
    assert host.keys() == []


def test_what_exists_is_opened_and_dropped_while_another_engine_is_made(host):
    gate, here = threading.Event(), Source()
    slow = Source(gate)
    opened(host, "here", here, "a:0")
    thread = threading.Thread(target=host.open, args=("slow", slow, "a:1"), kwargs={"alone": False})
    thread.start()
    assert slow.begun.wait(WAIT_S)
    opened(host, "here", here, "a:2")
    host.drop("here", "a:0")
    assert host.keys() == ["here"]
    gate.set()
    thread.join(WAIT_S)
    assert sorted(host.keys()) == ["here", "slow"]


def test_an_error_is_an_answer(host):
    class Broken:
        def open(self):
            raise ValueError("no")

    assert isinstance(host.open("key", Broken(), "a:0", alone=False), Failed)
    assert host.keys() == []
