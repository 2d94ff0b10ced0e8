"""The smallest possible exports, one of images and one of texts. Tests damage every bit of them."""

from tiny import random_params, random_statistics, write_export

from superserve_jax import exports
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.families.ofa_resnet import OFAResNetConfig
from superserve_jax.manifest import read_manifest
from superserve_jax.profile import Profile, Row
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.vocabulary import Vocabulary

IMAGES = OFAResNetConfig(
    num_classes=2,
    image_size=4,
    channels=1,
    block="basic",
    stem_width=4,
    stem_pool=False,
    stem_depths=(1,),
    stage_widths=(4,),
    strides=(1,),
    depths=((0, 1),),
    expand_ratios=(0.5, 1.0),
    width_mults=(1.0,),
    divisor=4,
    mean=(0.4,),
    std=(0.3,),
)
TEXTS = DynaBERTConfig(
    num_classes=2, vocab_size=9, max_length=4, token_types=1, hidden_size=4, depths=(1,), heads=(1,), ffn=(2, 4)
)
WORDS = Vocabulary(("[PAD]", "[CLS]", "a", "b", "é"), scheme="words")


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
