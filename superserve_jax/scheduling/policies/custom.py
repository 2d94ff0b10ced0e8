"""Your own policies by name: `my_file.py:my_policy`, or `package.module:my_policy`. No jax.

The name after the colon may be:

    def my_policy(profile, state): return Decision(...)     a policy
    my_policy = MyPolicy()                                  an object that is called like one
    class MyPolicy: def __init__(self, profile): ...        a class; one object is made for each profile
    my_policy = functools.partial(SlackFit, reserve=0.2)    any function of one argument, a profile, that makes a policy

A file is executed anew each time. It may import modules beside it. A module is imported, also from the current folder.
"""

import contextlib
import functools
import importlib
import inspect
import os
import pathlib
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

from superserve_jax import errors, files, foreign
from superserve_jax.profile import Profile
from superserve_jax.scheduling.policies.base import Policy
from superserve_jax.scheduling.policies.by_profile import ByProfile

_FILE = re.compile(r".+\.py(:.*)?", re.DOTALL)
_IN_MODULE = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")


def has_form(name: str) -> bool:
    """Whether this has the form of such a name. So has "fixed:largest", which is built in.

    >>> [has_form(name) for name in ("my_file.py:my_policy", "package.module:name", "slackfit", "slackfit-paper:8")]
    [True, True, False, False]
    """
    return bool(_FILE.fullmatch(name) or _IN_MODULE.fullmatch(name))


def load(name: str, *profiles: Profile) -> Policy:
    """Makes the policy of such a name, for these profiles.

    Raises ConfigError: there is no such file, it fails, or a class fails with a profile. UnknownNameError: there is no such
    module, or nothing in it has this name.
    """
    where, attribute = _parts(name)
    module = _execute(name, _file(name, where)) if where.endswith(".py") else _import(name, where)
    found, is_there = vars(module).get(attribute), callable(vars(module).get(attribute))
    if not is_there:
        own = [n for n, value in vars(module).items() if callable(value) and _is_of(module.__name__, value)]
        if attribute:
            raise errors.unknown_name(f"policy in {where}:", attribute, own)
        raise errors.ConfigError(f"policy '{name}': name a policy of the file, such as {where}:{(own or ['my_policy'])[0]}")
    make = _maker(found)
    return found if make is None else ByProfile(functools.partial(_construct, name, make), *profiles, label=attribute)


def check_file(name: str) -> None:
    """Raises ConfigError if such a name is of a file that does not exist. The file is not executed."""
    where, _ = _parts(name)
    if where.endswith(".py"):
        _file(name, where)


def name_and_place(policy: Policy) -> tuple[str, str]:
    """The name of a policy in errors, and where it is defined, such as ", see mine.py:4, `def mine(profile, state):`".

    The name is that of its function or class. A class that was given by name keeps that name, as in tables.
    """
    name, found = "", policy
    try:
        while isinstance(found := inspect.unwrap(found), functools.partial | ByProfile):
            if isinstance(found, ByProfile):
                name, found = name or found.label, found.example()
            else:
                found = found.func
        is_function = inspect.isroutine(found)
        name = name or (found if is_function else type(found)).__name__
        return name, foreign.definition(found if is_function else inspect.unwrap(type(found).__call__))
    except Exception:  # any exception: the object is the user's
        return name or type(policy).__name__, ""


def _is_of(module: str, value: Any) -> bool:
    return module in (getattr(value, "__module__", None), type(value).__module__)


def _parts(name: str) -> tuple[str, str]:
    """The file or module, and the name in it."""
    where, _, attribute = name.rpartition(":") if not name.endswith(".py") else (name, "", "")
    return where, attribute


def _file(name: str, where: str) -> pathlib.Path:
    path = files.user_path(where)
    if not path.is_file():
        raise errors.ConfigError(f"policy '{name}': there is no file {path} in {os.getcwd()}; expected FILE.py:NAME")
    return path


def _execute(name: str, path: pathlib.Path) -> Any:
    with _importing_from(path.parent), _reporting(f"policy '{name}': {path} fails"):
        return foreign.execute(path)


def _import(name: str, module: str) -> Any:
    try:
        with _importing_from(pathlib.Path.cwd()), _reporting(f"policy '{name}': the module {module} fails"):
            importlib.invalidate_caches()  # the module may be new
            return importlib.import_module(module)
    except errors.ConfigError as e:
        missing = e.__cause__
        if foreign.is_missing(missing, module):
            raise errors.UnknownNameError(
                f"unknown policy '{name}': there is no module {missing.name}, and no built-in policy has this name; see "
                "docs/policies.md for the names"
            ) from None
        raise


@contextlib.contextmanager
def _importing_from(folder: pathlib.Path) -> Iterator[None]:
    """Finds modules in a folder, too."""
    entry = str(folder.absolute())
    sys.path.insert(0, entry)
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the user's code may have removed it
            sys.path.remove(entry)


@contextlib.contextmanager
def _reporting(failed: str, hint: str = "") -> Iterator[None]:
    """Turns any error of the user's code into a ConfigError that says where it arose."""
    try:
        yield
    except (Exception, SystemExit) as e:
        raise errors.ConfigError(f"{failed}{foreign.place(e)}: {foreign.text_of(e)}{hint}") from e


def _maker(found: Any) -> Callable[[Profile], Any] | None:
    """A function that makes the policy for a profile. None if `found` is a policy itself."""
    if not isinstance(found, type) and _takes(found, 2):
        return None
    if _takes(found, 1):
        return found
    return (lambda _: found()) if isinstance(found, type) else None


def _takes(function: Any, count: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * count)
    except TypeError:
        return False
    except ValueError:  # some compiled functions have no signature
        return True
    return True


def _construct(name: str, make: Callable[[Profile], Any], profile: Profile) -> Policy:
    expected = "" if isinstance(make, type) else "; a policy is a function (profile, state), or a class made with (profile)"
    with _reporting(f"policy '{name}' cannot be made for a profile of {len(profile.rows)} subnets", expected):
        policy = make(profile)
    if callable(policy):
        return cast(Policy, policy)
    raise errors.ConfigError(
        f"policy '{name}' makes {foreign.text_of(policy)}, which cannot be called; it needs __call__(self, profile, state)"
        f"{expected}"
    )
