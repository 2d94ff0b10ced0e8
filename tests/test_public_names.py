"""`ss.__all__` names everything that a user receives, passes in or catches."""

import inspect
import typing

import pytest

import superserve_jax as ss
from superserve_jax import errors


def test_every_error_is_public():
    found = {name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, ss.SuperServeError)}
    assert found <= set(ss.__all__)


def test_every_public_name_is_there_and_in_order():
    assert sorted(ss.__all__) == ss.__all__
    assert all(hasattr(ss, name) for name in ss.__all__)
    with pytest.raises(AttributeError, match="Sever"):
        ss.Sever  # noqa: B018


def classes_in(hint):
    """The library's classes in a type hint. Classes of training are left out: users import them from that package."""
    module = hint.__module__ if isinstance(hint, type) else ""
    if module.startswith("superserve_jax") and not module.startswith("superserve_jax.training"):
        yield hint.__name__
    for part in typing.get_args(hint):
        yield from classes_in(part)


@pytest.mark.parametrize("name", ss.__all__)
def test_types_in_public_signatures_are_public(name):
    public = getattr(ss, name)
    if type(public).__module__.startswith("superserve_jax"):  # a callable object, such as ss.elastic
        public = type(public)
    members = [m for n, m in vars(public).items() if not n.startswith("_")] if inspect.isclass(public) else []
    members = (getattr(m, "fget", None) or getattr(m, "func", None) or getattr(m, "__func__", m) for m in members)
    for signature in (public, *filter(inspect.isfunction, members)):
        for hint in typing.get_type_hints(signature).values():
            assert set(classes_in(hint)) <= set(ss.__all__), signature
