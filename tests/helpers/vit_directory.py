"""Reads the fixture of vision transformers, and writes directories as Hugging Face's `save_pretrained` does."""

import functools
import json
import pathlib

import numpy as np
import pytest

from superserve_jax import convert

DATA = pathlib.Path(__file__).parents[1] / "data"
META = json.loads((DATA / "vit_small.json").read_text())
NETWORKS = META["networks"]


@functools.cache
def arrays():
    """All arrays of the fixture."""
    with np.load(DATA / "vit_small.npz") as content:
        return dict(content)


def state_of(name):
    """The weights of a network."""
    prefix = f"{name}/state/"
    return {key.removeprefix(prefix): value for key, value in arrays().items() if key.startswith(prefix)}


def converted(name, **changes):
    """The SuperNet of a network, for the images of the fixture."""
    image_size, pool = NETWORKS[name]["image_size"], "mean" if name == "timm_mean" else None
    channels = arrays()[f"{name}/images"].shape[-1]
    sizes = {"num_heads": META["num_heads"], **{key: META[key][:channels] for key in ("mean", "std")}}
    return convert.vit(state_of(name), **{**sizes, "image_size": image_size, "pool": pool, **changes})


def write(name, path, *, config=(), processor=()):
    """Writes a directory as `save_pretrained` does, with changed fields. None removes a field."""
    path.mkdir()
    for file, fields, changes in (
        ("config.json", NETWORKS[name]["config"], config),
        ("preprocessor_config.json", NETWORKS[name]["processor"], processor),
    ):
        values = {**fields, **dict(changes)}
        (path / file).write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    save(name, path / "model.safetensors")
    return path


def save(name, path):
    """Writes the weights of a network into a .safetensors file."""
    pytest.importorskip("safetensors.numpy").save_file(state_of(name), path)
