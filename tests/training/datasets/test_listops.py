"""The dataset listops: its labels against an independent evaluator, its texts, and making it."""

import hashlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from small_datasets import assert_resumes, sizes

from superserve_jax import errors, exports
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.training import data, loop, stages
from superserve_jax.training.config import SearchConfig, TrainConfig
from superserve_jax.training.data import TextConfig, halves
from superserve_jax.training.datasets.listops import grammar

ROOT = pathlib.Path(__file__).parents[3]


@pytest.fixture(scope="module")
def examples():
    return list(grammar.generate())


def work_out(text):
    """The value and depth of an expression, from its text only, with a stack as in a pocket calculator."""
    stack, deepest = [], 0
    for token in text.split(" "):
        if token == "]":
            operator, *values = stack.pop()
            values.sort()
            half = len(values) // 2
            middle = values[half] if len(values) % 2 else (values[half - 1] + values[half]) // 2
            value = {"[MIN": values[0], "[MAX": values[-1], "[SM": sum(values) % 10, "[MED": middle}[operator]
            if not stack:
                return value, deepest
            stack[-1].append(value)
        elif token.startswith("["):
            stack.append([token])
            deepest = max(deepest, len(stack))
        else:
            stack[-1].append(int(token))
    raise AssertionError(f"an operator is not closed: {text}")


@pytest.mark.parametrize(
    ("text", "value"),
    [("[MAX 2 9 [MIN 4 7 ] 0 ]", 9), ("[MED 1 4 ]", 2), ("[MED 3 1 8 ]", 3), ("[SM 9 [SM 5 5 ] 4 ]", 3)],
)
def test_the_evaluator_of_this_test_knows_the_published_examples(text, value):
    assert work_out(text)[0] == value


def test_no_text_is_there_twice_and_an_independent_evaluator_finds_every_label(examples):
    assert len({text for _, text, _ in examples}) == len(examples) == sum(grammar.NUM_EXAMPLES.values())
    assert [work_out(text)[0] for _, text, _ in examples] == [value for _, _, value in examples]


def test_the_texts_are_the_same_on_every_machine(examples):
    digest = hashlib.sha256("\n".join(" ".join(map(str, e)) for e in examples).encode()).hexdigest()
    assert digest == "a8942e7d72085c3015dba964e80d160fcd67e0b7ed966bf4be268757e0cffda8"


def test_the_test_split_does_not_depend_on_the_number_of_training_examples(examples, monkeypatch):
    monkeypatch.setattr(grammar, "NUM_EXAMPLES", {"train": 10, "test": grammar.NUM_EXAMPLES["test"]})
    few = [e for e in grammar.generate() if e[0] == "test"]
    assert few == [e for e in examples if e[0] == "test"]


def test_depth_arguments_and_lengths_are_as_described_and_each_is_there(examples):
    texts = [text.split() for _, text, _ in examples]
    assert {work_out(" ".join(t))[1] for t in texts} == set(range(1, grammar.MAX_DEPTH + 1))
    lengths = [len(t) for t in texts]
    assert (min(lengths), max(lengths)) == (grammar.MIN_LENGTH, grammar.MAX_LENGTH)
    assert {token for t in texts for token in t} == set(grammar.TOKENS) - {"[PAD]", "[CLS]"}


def test_no_value_is_so_frequent_that_guessing_it_helps(examples):
    counts = np.bincount([value for _, _, value in examples], minlength=10) / len(examples)
    assert counts.min() > 0.05
    assert counts.max() < 0.15


def test_inputs_are_token_ids_behind_cls_padded_to_the_length(listops_dir):
    dataset = data.open(TextConfig("listops", listops_dir, validation=50, max_length=32))
    assert sizes(dataset) == [250, 50, 60]
    batch = next(dataset.train(8, seed=0))
    assert (batch["inputs"].shape, batch["inputs"].dtype, batch["label"].dtype) == ((8, 32), np.int32, np.int32)
    assert (batch["inputs"][:, 0] == grammar.TOKENS.index("[CLS]")).all()
    for ids, label in zip(*dataset.arrays("test"), strict=True):
        tokens = [grammar.TOKENS[i] for i in ids]
        text = " ".join(tokens[1:]).replace(" [PAD]", "")
        assert work_out(text)[0] == label


def test_a_resumed_stream_goes_on_exactly(listops_dir):
    assert_resumes(data.open(TextConfig("listops", listops_dir, validation=50)), 33, 9)


def test_an_expression_longer_than_the_inputs_is_refused_and_not_cut_off(listops_dir):
    with pytest.raises(errors.InputError, match="a text may have 7 tokens here"):
        data.open(TextConfig("listops", listops_dir, validation=50, max_length=8)).arrays("train")


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_run_ends_in_an_export_that_reads_expressions(listops_dir, tmp_path):
    config = TrainConfig(
        name="tiny",
        model=DynaBERTConfig(
            num_classes=10, vocab_size=17, max_length=32, token_types=1, hidden_size=8, depths=(1, 2), heads=(1, 2), ffn=(8,)
        ),
        data=TextConfig("listops", listops_dir, validation=50),
        epochs=0.1,
        batch_size=8,
        buckets=1,
        search=SearchConfig(candidates=2, calibration_examples=8, examples=50, served=2),
    )
    run = loop.train(config, tmp_path / "run")
    stages.search(run)
    subprocess.run([sys.executable, ROOT / "train/calibrate.py", run.workdir], check=True)  # for which there are no statistics
    stages.evaluate(run)
    model = exports.load(stages.export(run))
    assert model.vocabulary == grammar.TOKENS
    assert "60 test examples of listops" in model.manifest["measured"]
    inputs, labels = data.open(config.data).arrays("test")
    texts = [" ".join(grammar.TOKENS[i] for i in ids[1:]).replace(" [PAD]", "") for ids in inputs]
    assert np.array_equal(model.encode(texts), inputs)
    right = np.argmax(model(model.encode(texts), model.subnets[-1]), -1) == labels
    assert model.served[-1].accuracy == pytest.approx(right[halves.profiling_half(labels)].mean())
    with pytest.raises(errors.InputError, match="is not a token"):
        model.encode("[MAXIMUM 1 2 ]")
