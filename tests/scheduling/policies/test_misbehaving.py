"""A policy that misbehaves gets the same error in the simulator as in the server."""

import functools
import math
import sys
import time

import fakes
import pytest
from fakes import PROFILE, SUBNETS
from policy_cases import simulate

from superserve_jax import errors
from superserve_jax.scheduling.policies import ByProfile, Decision
from superserve_jax.subnet import Subnet


def raises(profile, state):
    return Decision(SUBNETS[0], 1 // (state.waiting - 1))


def exits(profile, state):
    sys.exit("enough")


class BadRepr:
    def __repr__(self):
        raise ValueError("no repr")


class Lazy:
    def __repr__(self):
        return "Lazy()"

    @property
    def subnet(self):
        raise KeyError("lost")


MISBEHAVIOURS = {
    "raises": (raises, r"ZeroDivisionError\(.*\), see .*test_misbehaving\.py:\d+, `return Decision\(SUBNETS\[0\], 1 //.*`;"),
    "exits": (exits, r"SystemExit\('enough'\), see .*`sys.exit"),
    "takes no argument": (lambda: None, r"TypeError\(.*takes 0 positional arguments but 2 were given"),
    "returns nothing": (lambda *_: None, r"it returned None; a policy returns Decision\(subnet, batch\)"),
    "returns a pair": (lambda *_: (SUBNETS[0], 4), r"it returned \(Subnet\(.*\), 4\); a policy returns Decision"),
    "attribute raises": (lambda *_: Lazy(), "it returned .*Lazy.*a policy returns Decision"),
    "bad repr": (lambda *_: BadRepr(), r"it returned BadRepr \(its repr fails\); a policy"),
    "unknown subnet": (
        lambda *_: Decision(Subnet((9,)), 1),
        r"gates 9\).*not in the profile of 3 subnets; take `row.subnet`",
    ),
    "rank as subnet": (lambda *_: Decision(0, 1), "it chose the subnet 0, which is not in the profile"),
    "list as subnet": (lambda *_: Decision([1], 1), r"it chose the subnet \[1\], which is not in the profile"),
    "no batch": (lambda *_: Decision(SUBNETS[0], None), "whole number from 1 up, got None"),
    "empty batch": (lambda *_: Decision(SUBNETS[0], 0), "whole number from 1 up, got 0"),
    "batch is a float": (lambda *_: Decision(SUBNETS[0], 4.0), r"whole number from 1 up, got 4\.0"),
    "batch is NaN": (lambda *_: Decision(SUBNETS[0], math.nan), "whole number from 1 up, got nan"),
    "batch is text": (lambda *_: Decision(SUBNETS[0], "4"), "whole number from 1 up, got '4'"),
    "defer is None": (lambda *_: Decision(SUBNETS[0], 1, None), "defer_ms is a number of milliseconds, got None"),
}


@pytest.mark.parametrize(("policy", "message"), MISBEHAVIOURS.values(), ids=MISBEHAVIOURS)
def test_a_misbehaving_policy_gets_the_same_error_in_server_and_simulator(policy, message):
    with pytest.raises(errors.PolicyError, match=f"^the policy '.*' failed: .*{message}") as simulated:
        simulate(PROFILE, policy, [0.0], slo_ms=5e6)
    with fakes.serve(policy=policy) as s, pytest.raises(errors.PolicyError) as served:
        s.submit(fakes.ZERO, slo_ms=5e6).result(fakes.WAIT_S)
    texts = [str(caught.value).partition(" (it was asked with slack_ms=")[0] for caught in (simulated, served)]
    assert texts[0] == texts[1]
    assert texts[0].endswith("; fix it")


class Nothing:
    def __init__(self, profile=None):
        pass

    def __call__(self, profile, state):
        return None


@pytest.mark.parametrize(
    ("policy", "named", "line"),
    [
        (raises, "raises", "return Decision"),
        (functools.partial(lambda add, profile, state: None, 1), "<lambda>", r".*lambda add"),
        (Nothing(), "Nothing", "def __call__"),
        (Nothing().__call__, "__call__", "def __call__"),
        (ByProfile(Nothing, PROFILE, label="mine"), "mine", "def __call__"),
    ],
)
def test_an_error_names_the_policy_and_where_it_is_defined(policy, named, line):
    with pytest.raises(
        errors.PolicyError, match=rf"^the policy '{named}' failed: .*, see .*test_misbehaving\.py:\d+, `{line}"
    ):
        simulate(PROFILE, policy, [0.0], slo_ms=5e6)


@pytest.mark.parametrize(("batch", "expected"), [(3, 3), (99, 4), (True, 1)])
def test_a_batch_between_the_profiles_sizes_is_padded_and_a_larger_one_cut(batch, expected):
    result = simulate(PROFILE, lambda *_: Decision(SUBNETS[0], batch), [0.0] * 6)
    assert result.batch[0] == expected
    gate = fakes.Gate()
    with fakes.serve(fakes.fake(gate), policy=lambda *_: Decision(SUBNETS[0], batch)) as s:
        futures = s.submit_many(fakes.x(range(6)))
        with gate.holding():
            pass
        fakes.outcomes(futures)
    assert len(gate.batches[0]) == expected


def loops(profile, state):
    while True:
        time.sleep(1e-3)


def sleeps(profile, state):
    time.sleep(60)


@pytest.mark.skipif(sys.gettrace() is not None, reason="under a debugger a policy may take its time")
@pytest.mark.parametrize("policy", [loops, sleeps])
def test_a_policy_that_hangs_in_the_simulator_is_ended(policy):
    expected = r"no decision after 0\.05 s'\), see .*test_misbehaving\.py:\d+, `time\.sleep\("
    start_s = time.monotonic()
    with pytest.raises(errors.PolicyError, match=f"the policy '{policy.__name__}' failed: TimeoutError.*{expected}"):
        simulate(PROFILE, policy, [0.0], stall_s=0.05)
    assert time.monotonic() - start_s < 30  # half of what the policy would take
