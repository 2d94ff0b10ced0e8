"""A profile that does not fit the network is refused before anything is compiled, from a file and as an argument."""

import dataclasses

import jax
import pytest
from small_exports import IMAGES, TEXTS, WORDS, write

from superserve_jax import errors, exports, machine
from superserve_jax.engines import prepare
from superserve_jax.profile import Profile, Row
from superserve_jax.subnet import Subnet

DEVICE, KIND = jax.devices()[0], machine.device_kind(jax.devices()[0])
SMALLEST, LARGEST = IMAGES.space().smallest(), IMAGES.space().largest()
SHORTEST = TEXTS.space().smallest()


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return {
        "images": exports.load(write(folder / "images", IMAGES)),
        "texts": exports.load(write(folder / "texts", TEXTS, WORDS)),
    }


def with_envelope(axis="expand", **change):
    changed = {axis if name == "expand" else name: v for name, v in (LARGEST.to_json() | change).items()}
    return Profile((1, 2), (Row(SMALLEST, 0.5, (1.0, 2.0), envelope=Subnet.from_json(changed)),), KIND)


def with_lengths(subnet, *lengths):
    return Profile((1, 2), device=KIND, rows_at=dict.fromkeys(lengths, (Row(subnet, 0.5, (1.0, 2.0)),)))


BEYOND = {
    "a wider subnet bucket": ("images", with_envelope(width=[1.0, 8.0]), "larger than the network"),
    "a choice between two": ("images", with_envelope(expand=[0.75]), "axis 'expand' has no choice 0.75"),
    "an axis of another name": ("images", with_envelope(axis="x"), "larger than the network"),
    "lengths of inputs without any": ("images", with_lengths(SMALLEST, 2, 4), "one shape and no lengths"),
    "inputs that are too long": ("texts", with_lengths(SHORTEST, 2, 8), "length 8 exceeds"),
}


@pytest.mark.parametrize(("name", "profile", "message"), BEYOND.values(), ids=BEYOND)
def test_a_profile_beyond_the_network_is_refused(models, name, profile, message, compilations):
    model = models[name]
    path = exports.profile_path(model.path, KIND)
    profile.save(path)
    before = len(compilations())
    with pytest.raises(errors.ProfileError, match=message) as caught:
        prepare.stored_profile(model, KIND, (1, 2), profile.lengths if name == "texts" else ())
    assert str(path) in str(caught.value)
    with pytest.raises(errors.ProfileError, match=message):
        prepare.make_engine(model, DEVICE, profile)
    assert len(compilations()) == before


def test_a_profile_of_another_network_is_refused_as_an_argument(models):
    for subnet in (SHORTEST, Subnet((1,)), dataclasses.replace(SMALLEST, gates=(1,) * 9)):
        with pytest.raises(errors.ProfileError, match="the profile does not fit the network"):
            prepare.make_engine(models["images"], DEVICE, Profile((1,), (Row(subnet, 0.5, (1.0,)),)))
