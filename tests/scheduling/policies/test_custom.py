"""Policies of users, named as `my_file.py:my_policy` or `package.module:name`."""

import fakes
import numpy as np
import pytest
from fakes import PROFILE, SUBNETS

from superserve_jax import errors
from superserve_jax.scheduling import policies
from superserve_jax.scheduling.policies import State

FILE = """
import functools
from superserve_jax.scheduling.policies import Decision, SlackFit
import beside

def function(profile, state):
    return Decision(profile.rows[1].subnet, beside.BATCH)

class Made:
    def __init__(self, profile, rank=2):
        self.subnet = profile.rows[rank].subnet

    def __call__(self, profile, state):
        return Decision(self.subnet, 4)

class Plain:
    def __call__(self, profile, state):
        return function(profile, state)

instance = Plain()
partial = functools.partial(Made, rank=0)
cautious = functools.partial(SlackFit, reserve=0.5)
number = 3

class Broken:
    def __init__(self, profile):
        self.subnet = profile.rows[99]

class NotCallable:
    def __init__(self, profile):
        pass

def three(a, b, c):
    pass

def one(state):
    return Decision(state.last_subnet, 1)

def nothing(state):
    pass
"""
STATE = State(0.0, 1000.0, 9)


@pytest.fixture
def file(tmp_path, monkeypatch):
    (tmp_path / "my file.py").write_text(FILE)
    (tmp_path / "beside.py").write_text("BATCH = 2\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "mine_for_tests.py").write_text(FILE.replace("import beside", "from package import beside"))
    (tmp_path / "package" / "beside.py").write_text("BATCH = 2\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return "my file.py"


@pytest.mark.parametrize("where", ["my file.py", "./my file.py", "~/my file.py", "package.mine_for_tests"])
@pytest.mark.parametrize(
    ("name", "rank", "batch"), [("function", 1, 2), ("Made", 2, 4), ("Plain", 1, 2), ("instance", 1, 2), ("partial", 0, 4)]
)
def test_a_function_a_class_or_an_instance_may_be_named(file, where, name, rank, batch):
    decision = policies.create(f"{where}:{name}", PROFILE)(PROFILE, STATE)
    assert (decision.subnet, decision.batch) == (SUBNETS[rank], batch)


def test_a_class_makes_one_policy_for_each_profile(file):
    slower = PROFILE.scaled(2.0)
    policy = policies.create(f"{file}:Made", PROFILE, slower)
    third = PROFILE.only(SUBNETS[:3]).scaled(3.0)
    assert [policy(p, STATE).subnet for p in (PROFILE, slower, third)] == [SUBNETS[2]] * 3
    assert policies.create(f"{file}:cautious", PROFILE).name == "slackfit"


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("my file.py:functoin", errors.UnknownNameError, "unknown policy in my file.py: 'functoin': did you mean 'function'"),
        ("my file.py:number", errors.UnknownNameError, "'number'; known: .*Broken"),
        ("my file.py", errors.ConfigError, r"name a policy of the file, such as my file\.py:function"),
        ("my file.py:", errors.ConfigError, r"name a policy of the file, such as my file\.py:function"),
        ("my file.py:Broken", errors.ConfigError, r"cannot be made for a profile of 3 subnets, see my file\.py:\d+, `self"),
        ("my file.py:NotCallable", errors.ConfigError, r"cannot be called; it needs __call__\(self, profile, state\)"),
        (
            "my file.py:one",
            errors.ConfigError,
            r"AttributeError.*; a policy is a function \(profile, state\), or a class made with",
        ),
        ("my file.py:nothing", errors.ConfigError, r"makes None, which cannot.*; a policy is a function \(profile, state\)"),
        ("my_fil.py:function", errors.ConfigError, "there is no file my_fil.py in"),
        ("wrong.py:function", errors.ConfigError, r"wrong\.py fails, see wrong\.py:1, `def function\(:`: SyntaxError"),
        ("fails.py:function", errors.ConfigError, r"fails\.py fails, see fails\.py:2, `1 / 0`: ZeroDivisionError"),
        ("lacks.py:function", errors.ConfigError, r"lacks\.py fails, see lacks\.py:1, .*ModuleNotFoundError.*no_such_thing"),
        ("package.nothing:function", errors.UnknownNameError, "there is no module package.nothing"),
        ("slakfit:largest", errors.UnknownNameError, "there is no module slakfit, and no built-in policy has this name"),
        ("fixed:first", errors.UnknownNameError, "did you mean 'fixed:largest'.*my_file.py:my_policy"),
    ],
)
def test_a_wrong_name_or_file_is_refused_with_the_place(file, tmp_path, name, error, message):
    (tmp_path / "wrong.py").write_text("def function(:\n")
    (tmp_path / "fails.py").write_text("\n1 / 0\n")
    (tmp_path / "lacks.py").write_text("import no_such_thing\n")
    with pytest.raises(error, match=message):
        policies.create(name, PROFILE)


def test_a_policy_that_takes_three_arguments_fails_at_its_first_decision(file):
    with fakes.serve(policy=f"{file}:three") as s, pytest.raises(errors.PolicyError, match="missing 1 required"):
        s.submit(fakes.ZERO).result(fakes.WAIT_S)


def test_a_server_takes_such_a_name_and_keeps_the_policy_outside_of_its_lock(file):
    with fakes.serve(policy=f"{file}:Made") as s:
        assert callable(s.pool.options.policy)  # a server trusts only names of its own policies
        assert s.submit(np.float32(3)).result(fakes.WAIT_S).output == (3.0, 2)
    with fakes.serve(policy="fixed:largest") as s:
        assert s.pool.options.policy == "fixed:largest"
    with pytest.raises(errors.ConfigError, match="cannot be made"):
        fakes.serve(policy=f"{file}:Broken")
