"""The smallest possible exports, one of images and one of texts. Their configs are those that serve/bench/fuzz.py damages."""

from damaged_files import IMAGES, TEXTS, WORDS
from tiny import random_params, random_statistics, write_export

from superserve_jax import exports
from superserve_jax.manifest import read_manifest
from superserve_jax.profile import Profile, Row
from superserve_jax.supernets.supernet import SuperNet

__all__ = ["IMAGES", "TEXTS", "WORDS", "payload_of", "write"]


def write(folder, config, words=None):
    space = config.space()
    chosen = [space.smallest(), space.largest()]
    model = SuperNet(config, random_params(config), {s: random_statistics(config, s) for s in chosen})
    path = write_export(folder, model, step=1e-7, training={"lr": 1e-5}, vocabulary=words)
    rows = tuple(Row(s, 0.5 + 1e-7 * i, (0.1 + i, 1e-5 + 2 + i)) for i, s in enumerate(chosen))
    Profile((1, 2), rows, "cpu").save(exports.profile_path(path, "cpu"))
    return path


def payload_of(path):
    manifest = read_manifest(path)
    return path / manifest["payload"], manifest["files"]
