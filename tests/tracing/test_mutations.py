"""The comparison with small networks finds a broken rule: a mask, a count, a join, a cut or a gate that is missing."""

import jax
import pytest
from elastic_nets import make
from tracing_checks import check, random_params, random_sizes
from tracing_models import EQUAL, MODELS

from superserve_jax import errors, supernets, tracing
from superserve_jax.tracing import evaluation, relations, sizes
from superserve_jax.tracing.rules import contractions, elementwise, rule_of


def compare(name):
    function, shapes, inputs = MODELS[name]
    params = random_params(shapes)
    traced = tracing.trace(function, params, inputs)
    check(function, params, inputs, random_sizes(traced, seed=1, equal=EQUAL.get(name, ())), traced=traced)


def test_nothing_is_found_in_the_code_as_it_is():
    compare("mlp")


def no_mask(self, x, operand, axes, neutral):
    return x


def no_count(self, node):
    return None


def first_entries(self, x, dims):
    return jax.lax.slice(x, (0,) * x.ndim, tuple(map(self.limit, dims)))


@pytest.mark.parametrize(
    ("owner", "attribute", "broken", "model"),
    [
        (evaluation.Evaluation, "mask", no_mask, "mlp"),
        (evaluation.Evaluation, "count", no_count, "mlp"),
        (evaluation.Evaluation, "is_zero_beyond", lambda self, operand: True, "mlp"),
        (sizes.Sizes, "cut", first_entries, "attention_three_heads_features"),
        (elementwise, "tie_all", lambda a, b, node: None, "mlp"),
        (contractions, "unify", lambda a, b, where: None, "mlp"),
    ],
)
def test_a_broken_part_is_found(monkeypatch, owner, attribute, broken, model):
    monkeypatch.setattr(owner, attribute, broken)
    with pytest.raises(Exception):  # noqa: B017 - other numbers, or arrays that do not fit
        compare(model)


def test_a_wrong_join_is_found(monkeypatch):
    """Axes that are joined without need change together, so fewer sizes can be chosen."""
    function, shapes, inputs = MODELS["mlp"]
    shapes = shapes | {"w1": (6, 10), "b1": (10,), "scale": (10,), "bias": (10,), "w2": (10, 10)}
    params = random_params(shapes)
    assert len(tracing.trace(function, params, inputs).groups) == 2
    right = contractions.relate_dot

    def relate(node):
        right(node)
        a, b = (operand.dims[-1] for operand in node.inputs)
        if a.size == b.size:
            contractions.unify(a, b, node.where)

    rules = contractions.RULES | {"dot_general": contractions.Rule(relate, contractions.evaluate_dot)}
    monkeypatch.setattr(relations, "rule_of", lambda name: rules.get(name) or rule_of(name))
    assert len(tracing.trace(function, params, inputs).groups) == 1


def test_a_gate_that_is_ignored_is_found(monkeypatch):
    monkeypatch.setattr(evaluation.ops, "layer_select", lambda gate, block, x, *, skip: block(x))
    with pytest.raises(errors.ConfigError):
        supernets.check(make(name="ignores_gates").config, run=False)
