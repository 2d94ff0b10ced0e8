"""Makes the folder aac2b73/: an export of images, an export of texts, two profiles, and a training stopped half-way.

Commit aac2b73 is the last one before the packages were rearranged. Files that it wrote must still load with equal bits.
This program only runs with that commit:

    git worktree add /tmp/old aac2b73
    PYTHONPATH=/tmp/old python tests/data/make_aac2b73.py

expected.npz holds what aac2b73 read from these files and computed with them:

    data/*          the arrays that the run is trained on
    middle/NNN      leaves of the state in the run's checkpoint, in jax.tree order
    end/NAME        the averaged parameters after the last step
    run/N           statistics of the run's served subnets, in the order of search.json
    images/*        of the export: weights, statistics, inputs, logits of each served subnet; texts/*: the same
"""

import os
import pathlib
import shutil
import signal
import tempfile

import jax
import numpy as np

from superserve_jax import checkpoint, profile, vocabulary
from superserve_jax.supernets import dynabert, ofa_resnet, programs, supernet
from superserve_jax.training import config as configs
from superserve_jax.training import data, loop, optim, runs, stages, step

FOLDER = pathlib.Path(__file__).with_name("aac2b73")
STEPS, MIDDLE = 12, 7
CONFIG = configs.TrainConfig(
    name="old",
    model=ofa_resnet.OFAResNetConfig(
        num_classes=2,
        image_size=8,
        channels=1,
        block="basic",
        stem_width=4,
        stem_pool=False,
        stem_depths=(1,),
        stage_widths=(8,),
        strides=(2,),
        depths=((1, 2),),
        expand_ratios=(0.5, 1.0),
        width_mults=(0.5, 1.0),
        divisor=4,
        mean=(0.4,),
        std=(0.3,),
    ),
    optim=optim.OptimConfig(clip_norm=5.0),
    phases=(configs.Phase(share=0.4, elastic=("depth",)), configs.Phase(share=0.6)),
    epochs=3.0,
    batch_size=8,
    buckets=1,
    label_smoothing=0.1,
    ema=0.9,
    calibration_examples=16,
    search=configs.SearchConfig(candidates=4, calibration_examples=16, examples=16, served=3, tolerance=0.5),
    checkpoint_every=100,
    log_every=4,
)
TEXTS = dynabert.DynaBERTConfig(
    num_classes=2, vocab_size=9, max_length=4, token_types=1, hidden_size=4, depths=(1,), heads=(1,), ffn=(2, 4)
)
WORDS = vocabulary.Vocabulary(("[PAD]", "[CLS]", "a", "b", "é"), scheme="words")


def arrays(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Noise in two shades."""
    found = {}
    for split, count in (("train", 48), ("test", 24)):
        labels = rng.integers(0, 2, count, dtype=np.int32)
        noise = rng.integers(0, 160, (count, 8, 8, 1))
        found |= {f"{split}_inputs": (noise + 80 * labels[:, None, None, None]).astype(np.uint8), f"{split}_labels": labels}
    return found


class Stopping:
    """A dataset that stops the training, as Ctrl-C does, with the last batch before the middle."""

    def __init__(self, dataset: data.Dataset):
        self._dataset = dataset

    def __getattr__(self, name: str):
        return getattr(self._dataset, name)

    def train(self, *arguments, **options):
        for done, batch in enumerate(self._dataset.train(*arguments, **options), 1):
            if done == MIDDLE:
                os.kill(os.getpid(), signal.SIGINT)
            yield batch


def text_export(path: pathlib.Path) -> pathlib.Path:
    """An export of a text model with random weights."""
    rng = np.random.default_rng(1)
    params = {
        name: np.asarray(rng.normal(0.5, 0.3, spec.shape), np.float32) for name, spec in programs.param_spec(TEXTS).items()
    }
    chosen = [TEXTS.space().smallest(), TEXTS.space().largest()]
    model = supernet.SuperNet(TEXTS, params, {s: np.zeros((2, 0), np.float32) for s in chosen})
    served = [checkpoint.Served(s, 0.5 + i / 8, None, TEXTS.flops(s), TEXTS.num_params(s)) for i, s in enumerate(chosen)]
    return checkpoint.export(path, model, served, measured="made up", training={"lr": 1e-5}, vocabulary=WORDS)


def contents(prefix: str, model: checkpoint.Model, inputs: np.ndarray) -> dict[str, np.ndarray]:
    """What an export holds and computes."""
    return {
        f"{prefix}/inputs": inputs,
        **{f"{prefix}/weights/{name}": np.asarray(value) for name, value in model.params.items()},
        **{f"{prefix}/statistics/{i}": model.row(s) for i, s in enumerate(model.subnets)},
        **{f"{prefix}/logits/{i}": np.asarray(model(inputs, s)) for i, s in enumerate(model.subnets)},
    }


def save_profile(path: pathlib.Path, model: checkpoint.Model, lengths: tuple[int, ...]) -> None:
    """A profile with invented latencies, of one table or of one for each length."""
    tables = [
        profile.Profile(
            (1, 2, 4),
            tuple(
                profile.Row(s.subnet, s.accuracy, (t + 1 / 3, t + i + 0.5, t + 2.7 * i), (t + 1.1, t + i + 1.2, t + 3.3 * i))
                for i, s in enumerate(model.served, 1)
            ),
            "cpu",
            (length,) if length else (),
            slicing="in_call",
        )
        for t, length in enumerate(lengths or (0,), 1)
    ]
    profile.join(tables).save(path)


def main() -> None:
    """Replaces the folder."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    made = arrays(np.random.default_rng(0))
    dataset = data.from_arrays(
        train=(made["train_inputs"], made["train_labels"]), test=(made["test_inputs"], made["test_labels"]), validation=16
    )
    try:
        loop.train(CONFIG, FOLDER / "run", dataset=Stopping(dataset))
    except KeyboardInterrupt as stop:
        print(stop)
    run = runs.Run.open(FOLDER / "run", dataset=dataset)
    stages.search(run)
    stages.calibrate(run)
    stages.evaluate(run)
    shutil.move(stages.export(run), FOLDER / "images")
    text_export(FOLDER / "texts")
    images, texts = (checkpoint.load(FOLDER / name) for name in ("images", "texts"))
    save_profile(FOLDER / "images.json", images, ())
    save_profile(FOLDER / "texts.json", texts, (2, 4))

    sandwich = step.SandwichStep(CONFIG.optim.create(STEPS), ema=CONFIG.ema)
    specs = jax.eval_shape(sandwich.init, programs.param_spec(CONFIG.model))
    with run.checkpoints() as saved:
        middle = step.TrainState(**saved.restore(MIDDLE, **specs._asdict()))
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(FOLDER / "run", folder, dirs_exist_ok=True)
        end = loop.train(CONFIG, folder, dataset=dataset).model()
    np.savez_compressed(
        FOLDER / "expected.npz",
        **{f"data/{name}": value for name, value in made.items()},
        **{f"middle/{i:03}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(middle))},
        **{f"end/{name}": np.asarray(value) for name, value in end.params.items()},
        **{f"run/{i}": run.rows()[s] for i, s in enumerate(run.served())},
        **contents("images", images, made["test_inputs"][:4]),
        **contents("texts", texts, texts.encode(["a b", "é", "b b a"])),
    )
    for name in ("metrics.png", "search.png"):
        (FOLDER / "run" / name).unlink()
    shutil.rmtree(FOLDER / "run" / "tensorboard")


if __name__ == "__main__":
    main()
