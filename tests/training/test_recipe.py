"""The parts of a recipe, one by one: phases, ties, teachers, averages, half precision."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from mlp_family import MLPConfig
from tiny import TINY, random_images, random_params, random_statistics

from superserve_jax import errors, exports
from superserve_jax.exports import Served
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.supernets import programs
from superserve_jax.supernets.supernet import SuperNet
from superserve_jax.training import losses, sampling, step, teacher
from superserve_jax.training.config import Phase, TrainConfig
from superserve_jax.training.data import DataConfig
from superserve_jax.training.sampling import Sampler
from superserve_jax.training.step import Recipe, SandwichStep

pytestmark = pytest.mark.usefixtures("quick_compilation")

BERT = DynaBERTConfig(
    num_classes=3, vocab_size=20, max_length=6, token_types=1, hidden_size=8, depths=(1, 2), heads=(1, 2), ffn=(4, 8)
)
CONFIG = TrainConfig(name="tiny", model=TINY, data=DataConfig(), buckets=3, random_subnets=1)
MLP = MLPConfig(num_classes=3)
LABELS = np.array([0, 1, 2, 1], np.int32)


def tokens(seed=0):
    return np.random.default_rng(seed).integers(1, 20, (4, 6), dtype=np.int32)


def sandwich_of(config, **options):
    sampler = Sampler(config, buckets=2, random_subnets=1, seed=0)
    return SandwichStep(optax.sgd(1.0), **options), sampler.step(3)


def copied(params):
    return {name: jnp.array(p) for name, p in params.items()}


# -- phases ----------------------------------------------------------------------------------------------------------------


def test_phases_share_the_steps_of_a_run():
    config = dataclasses.replace(
        CONFIG, phases=(Phase(share=1, elastic=()), Phase(share=2, elastic=("depth",)), Phase(share=1))
    )
    parts = sampling.plan(config, 40)
    assert [p.first for p in parts] == [0, 10, 30]
    assert [sampling.at(parts, k).first for k in (0, 9, 10, 29, 30, 39)] == [0, 0, 10, 10, 30, 30]


def test_progressive_shrinking_opens_one_axis_after_another():
    config = dataclasses.replace(CONFIG, random_subnets=2, phases=(Phase(elastic=()), Phase(elastic=("depth",)), Phase()))
    space = TINY.space()
    frozen, depth, everything = sampling.plan(config, 30)
    assert frozen.sampler.step(0) == (frozen.sampler.largest,)
    assert frozen.sampler.largest.subnet == space.largest()
    drawn = {c.subnet for k in range(40) for c in depth.sampler.step(k)}
    assert len(drawn) > 2
    for s in drawn:
        assert space.validate(s) == s
        assert TINY.sizes(s)["stage0.out"] == TINY.sizes(space.largest())["stage0.out"]
    assert depth.sampler.smallest.subnet == space.subnet(depth=[d[0] for d in space.depths])
    assert everything.sampler.smallest.subnet == space.smallest()


def test_the_number_of_open_choices_counts_from_the_largest():
    space = dataclasses.replace(TINY, width_mults=(0.5, 0.75, 1.0)).space().narrowed(("width",), choices=2)
    assert space.smallest()["width"] == (0.75,) * len(space.smallest()["width"])
    assert space.smallest().gates == space.largest().gates


def test_tied_phases_draw_only_subnets_whose_blocks_follow_their_stages_depth():
    config = dataclasses.replace(CONFIG, random_subnets=3, phases=(Phase(tied=True),))
    (part,) = sampling.plan(config, 10)
    space = TINY.space()
    drawn = {c.subnet for k in range(40) for c in part.sampler.step(k)}
    assert len(drawn) > 4
    for s in drawn:
        assert space.tied(s) == s
        stage = space.stages[-1]
        depth = sum(s.gates[b] for b in stage)
        place = space.depths[-1].index(depth)
        axis = next(a for a in space.axes if a.name == "expand")
        kept = [v for v, b in zip(s["expand"], axis.blocks, strict=True) if b in stage and s.gates[b]]
        assert set(kept) == {axis.choices[0][place]}


def test_a_tied_bucket_runs_its_members_as_they_are():
    """Tied choices may lie several steps below an envelope's: the program must trace every size in which they differ."""
    model = dataclasses.replace(TINY, expand_ratios=(0.25, 0.5, 0.75, 1.0), divisor=8, stage_widths=(16, 32), stem_width=16)
    sampler = Sampler(model, buckets=3, random_subnets=2, seed=1, tied=True)
    params, images = random_params(model), random_images(model, 2)
    for choice in {c for k in range(12) for c in sampler.step(k)}:
        sliced = programs.sliced(model, choice.subnet)
        expected, _ = sliced.train(params, images, sliced.active(choice.subnet))
        found, _ = choice.program.train(params, images, choice.program.active(choice.subnet))
        np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4 * np.abs(expected).max())


def test_a_phase_of_an_unknown_axis_is_refused_with_the_nearest():
    with pytest.raises(errors.UnknownNameError, match="did you mean 'width'"):
        dataclasses.replace(CONFIG, phases=(Phase(elastic=("widht",)),))


def test_rewiring_a_family_without_units_is_refused():
    with pytest.raises(errors.ConfigError, match=r"phases\.rewire: family 'mlp' has no units to sort"):
        dataclasses.replace(CONFIG, model=MLPConfig(), phases=(Phase(rewire=True),))


# -- teachers --------------------------------------------------------------------------------------------------------------


def saved_teacher(tmp_path, config, seed=3):
    space = config.space()
    model = SuperNet(config, random_params(config, seed), {space.largest(): random_statistics(config, space.largest())})
    served = [Served(space.largest(), 0.5, None, 1, 1)]
    return exports.export(tmp_path / "teacher", model, served, measured="random weights")


@pytest.mark.parametrize(
    ("config", "recipe", "taught"),
    [(MLP, Recipe(smoothing=0.1), False), (MLP, Recipe(teacher_weight=0.5), True), (BERT, Recipe(hidden_weight=2.0), False)],
    ids=["the largest subnet teaches", "an outside teacher", "hidden states"],
)
def test_a_step_sums_the_gradients_of_the_sandwich(tmp_path, config, recipe, taught):
    """Compares the step with the gradient of the same losses written as one function."""
    sandwich, choices = sandwich_of(config, recipe=recipe)
    params, inputs = random_params(config), tokens() if config is BERT else random_images(config, 4)
    lesson = teacher.load(saved_teacher(tmp_path, config), config)(recipe, inputs) if taught else None
    state, scalars = sandwich(sandwich.init(copied(params)), inputs, LABELS, choices, lesson=lesson)

    def total(params):
        train = "train_hidden" if recipe.hidden_weight else "train"
        answers = [getattr(c.program, train)(params, inputs, c.program.active(c.subnet)) for c in choices]
        (own, states), *others = answers
        first = losses.cross_entropy(own, LABELS, smoothing=recipe.smoothing)
        if lesson:
            first += recipe.teacher_weight * losses.distillation(own, lesson.logits)
        result = first + sum(losses.distillation(logits, lesson.logits if lesson else own) for logits, _ in others)
        if recipe.hidden_weight:
            for choice, (_, hidden) in zip(choices[1:], others, strict=True):
                kept = [i for i, gate in enumerate(choice.subnet.gates) if gate]
                distances = [jnp.mean((hidden[i][1] - jax.lax.stop_gradient(states[i][1])) ** 2) for i in kept]
                result += recipe.hidden_weight * sum(distances) / len(kept)
        return result, first

    grads, first = jax.jit(jax.grad(total, has_aux=True))(params)
    assert scalars["loss"] == pytest.approx(float(first), rel=1e-5)
    largest = max(float(np.abs(g).max()) for g in grads.values())
    for name, g in grads.items():
        np.testing.assert_allclose(params[name] - state.params[name], g, rtol=0, atol=2e-4 * largest, err_msg=name)


def test_a_lesson_is_what_the_teachers_largest_subnet_answers(tmp_path):
    path = saved_teacher(tmp_path, MLP)
    model, images = exports.load(path), random_images(MLP, 4)
    lesson = teacher.load(path, MLP)(Recipe(), images)
    np.testing.assert_allclose(
        lesson.logits, model(images, model.space.largest()), rtol=0, atol=1e-5 * np.abs(lesson.logits).max()
    )


def test_hidden_states_of_a_family_without_or_of_another_shape_are_refused(tmp_path):
    recipe = Recipe(hidden_weight=1.0)
    with pytest.raises(errors.ConfigError, match=r"distill\.hidden is 1\.0, but family 'ofa_resnet' has no hidden states"):
        teacher.check_hidden(recipe, TINY, None)
    wider = teacher.load(saved_teacher(tmp_path, dataclasses.replace(BERT, hidden_size=16)), BERT)
    with pytest.raises(errors.ConfigError, match="hidden states have the student's shapes"):
        teacher.check_hidden(recipe, BERT, wider)
    teacher.check_hidden(recipe, BERT, None)


def test_a_teacher_of_other_classes_or_inputs_is_refused(tmp_path):
    path = saved_teacher(tmp_path, MLP)
    with pytest.raises(errors.ConfigError, match="num_classes 3, the SuperNet to train has 4"):
        teacher.load(path, dataclasses.replace(MLP, num_classes=4))
    with pytest.raises(errors.ConfigError, match="has inputs"):
        teacher.load(path, dataclasses.replace(MLP, image_size=10))
    with pytest.raises(errors.ConfigError, match="there is no folder"):
        teacher.load(tmp_path / "nothing", MLP)


# -- averages and half precision -------------------------------------------------------------------------------------------


def test_the_average_follows_the_parameters():
    sandwich, choices = sandwich_of(MLP, ema=0.2)
    params, images = random_params(MLP), random_images(MLP, 4)
    state = sandwich.init(copied(params))
    expected = dict(params)
    for k in range(3):
        state, _ = sandwich(state, images, LABELS, choices, step=k)
        decay = min(0.2, (1 + k) / (10 + k))  # the first two steps average over fewer
        expected = {name: decay * old + (1 - decay) * np.asarray(state.params[name]) for name, old in expected.items()}
    for name, average in expected.items():
        np.testing.assert_allclose(state.ema[name], average, rtol=1e-4, atol=1e-6)


def test_half_precision_keeps_float32_parameters_and_comes_near():
    params, images = random_params(MLP), random_images(MLP, 4)
    found = {}
    for dtype in ("float32", "bfloat16"):
        sandwich, choices = sandwich_of(MLP, recipe=Recipe(compute_dtype=dtype))
        state, scalars = sandwich(sandwich.init(copied(params)), images, LABELS, choices)
        assert {p.dtype for p in state.params.values()} == {jnp.dtype("float32")}
        found[dtype] = float(scalars["loss"])
    assert found["bfloat16"] != found["float32"]
    assert found["bfloat16"] == pytest.approx(found["float32"], rel=0.1)


@pytest.mark.parametrize("config", [TINY, BERT], ids=["ofa_resnet", "dynabert"])
def test_half_precision_multiplies_in_bfloat16(config):
    """Checks the dtype of every convolution and matrix product of the gradient, not only the casts around it."""
    program = programs.sliced(config, config.space().largest())
    recipe = Recipe(compute_dtype="bfloat16")
    inputs = random_images(config, 4) if config is TINY else tokens()
    text = step.largest_grad.lower(program, recipe, programs.param_spec(config), inputs, LABELS, None).as_text()
    products = [line for line in text.splitlines() if "stablehlo.convolution" in line or "stablehlo.dot_general" in line]
    assert len(products) > 5
    assert not [line for line in products if re.search(r"\(tensor<[^>]*xf32>, tensor<[^>]*xf32>\)", line)]
