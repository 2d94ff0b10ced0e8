"""Texts of GLUE through a tiny vocabulary: mocks of glue/mnli and glue/sst2.

The mocks are the real TFDS builders, with the features they have upstream, that yield a few sentences instead of downloads.
"""

import types

import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.text import glue

from superserve_jax import errors
from superserve_jax.training import data, evaluation
from superserve_jax.training.data import TextConfig, text
from superserve_jax.vocabulary import Vocabulary

OFFLINE = tfds.download.DownloadConfig(try_download_gcs=False)
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "good", "bad", "film", "not", "##s", "."]
WORDS = ["the", "cat", "sat", "good", "bad", "film", "not", "cats", "films."]


def sentence(rng):
    return " ".join(rng.choice(WORDS, rng.integers(2, 9)))


def prepare_mock(tmp_path_factory, config, keys, sizes):
    """A TFDS folder with a mock of glue/`config`; splits named test have no labels, as in the original."""

    def examples(split, count):
        rng = np.random.default_rng(count)
        for i in range(count):
            label = -1 if split.startswith("test") else i % 2
            yield f"{split}{i}", {**{key: sentence(rng) for key in keys}, "label": label, "idx": i}

    def splits(self, dl_manager):
        return {split: examples(split, count) for split, count in sizes.items()}

    folder = str(tmp_path_factory.mktemp("tfds"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(glue.Glue, "_split_generators", splits)
        glue.Glue(config=config, data_dir=folder).download_and_prepare(file_format="array_record", download_config=OFFLINE)
    return folder


@pytest.fixture(scope="module")
def mnli_dir(tmp_path_factory):
    sizes = {"train": 40, "validation_matched": 7, "validation_mismatched": 9, "test_matched": 3, "test_mismatched": 3}
    return prepare_mock(tmp_path_factory, "mnli", ("premise", "hypothesis"), sizes)


@pytest.fixture(scope="module")
def sst2_dir(tmp_path_factory):
    return prepare_mock(tmp_path_factory, "sst2", ("sentence",), {"train": 40, "validation": 8, "test": 5})


@pytest.fixture(scope="module")
def vocab_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(TOKENS) + "\n")
    return str(path)


def mnli(folder, vocab_file, **changes):
    config = {"validation": 5, "max_length": 12, "token_types": 2, "vocabulary": vocab_file, **changes}
    return data.open(TextConfig("glue/mnli", folder, **config))


def test_mnli_gives_pairs_with_token_types_and_validation_matched_as_test(mnli_dir, vocab_file):
    dataset = mnli(mnli_dir, vocab_file)
    assert [dataset.num_examples(split) for split in ("train", "validation", "test")] == [35, 5, 7]
    assert dataset.class_names == ("entailment", "neutral", "contradiction")
    inputs = next(dataset.train(4, seed=0))["inputs"]
    assert (inputs.shape, inputs.dtype) == ((4, 12, 2), np.int32)
    for ids, kinds in zip(inputs[..., 0], inputs[..., 1], strict=True):
        tokens = [TOKENS[i] for i in ids if i]
        assert tokens[0] == "[CLS]"
        assert tokens[-1] == "[SEP]"
        assert tokens.count("[SEP]") == 2
        second = tokens.index("[SEP]") + 1
        assert kinds.tolist() == [0] * second + [1] * (len(tokens) - second) + [0] * (12 - len(tokens))


def test_the_premise_of_mnli_comes_first(mnli_dir, vocab_file):
    dataset = mnli(mnli_dir, vocab_file, max_length=30)
    record = tfds.builder("glue/mnli", data_dir=mnli_dir).as_data_source("validation_matched")[0]
    both = [[record[key].decode()] for key in ("premise", "hypothesis")]
    expected = dataset.vocabulary.encode(*both, length=30, token_types=2)
    assert np.array_equal(dataset.arrays("test")[0][:1], expected)


def test_sst2_gives_single_sentences_and_its_validation_split_as_test(sst2_dir, vocab_file):
    config = TextConfig("glue/sst2", sst2_dir, validation=4, max_length=10, vocabulary=vocab_file)
    dataset = data.open(config)
    assert [dataset.num_examples(split) for split in ("train", "validation", "test")] == [36, 4, 8]
    assert (dataset.arrays("test")[1] >= 0).all()
    batches = list(dataset.eval("test", 5))
    assert [b["inputs"].shape for b in batches] == [(5, 10)] * 2
    assert sum(b["weight"].sum() for b in batches) == 8
    assert TOKENS[batches[0]["inputs"][0, 0]] == "[CLS]"


def test_a_cased_vocabulary_gives_other_ids(sst2_dir, vocab_file):
    lower, cased = (
        data.open(
            TextConfig("glue/sst2", sst2_dir, validation=4, vocabulary=vocab_file, lowercase=lowercase)
        ).vocabulary.encode(["The film"], length=4)
        for lowercase in (True, False)
    )
    assert [TOKENS[i] for i in lower[0]] == ["[CLS]", "the", "film", "[SEP]"]
    assert [TOKENS[i] for i in cased[0]] == ["[CLS]", "[UNK]", "film", "[SEP]"]


def test_baselines_count_tokens_and_not_their_order():
    rng = np.random.default_rng(0)
    ids = rng.integers(4, 9, (400, 6)).astype(np.int32)
    more, first = (ids == 5).sum(1) > (ids == 6).sum(1), ids[:, 0] < 6
    words = Vocabulary(tuple(TOKENS))

    def baselines(labels):
        pair = ids, labels.astype(np.int32)
        dataset = data.from_arrays(train=pair, test=pair, validation=10)
        dataset.vocabulary = words
        return evaluation.text_baselines(dataset)

    assert baselines(more)["logistic regression on token counts"] > 0.95
    assert baselines(first)["logistic regression on token counts"] < 0.85
    assert baselines(more)["majority class"] == max(np.mean(more), 1 - np.mean(more))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "name must be"),
        ({"max_length": 2}, "max_length must be int >= 3, got 2"),
        ({"validation": -1}, "validation"),
        ({"token_types": 3}, "token_types must be 1 or 2, got 3"),
        ({"lowercase": "yes"}, "lowercase"),
        ({"vocabulary": "vocab.txt"}, "leave it out"),
        ({"name": "glue/mnli"}, r"give the path of a WordPiece file, such as BERT's vocab\.txt"),
    ],
)
def test_a_config_value_that_cannot_work_is_refused(changes, message):
    with pytest.raises(errors.ConfigError, match=message):
        TextConfig(**changes)


def test_a_dataset_that_is_not_prepared_says_how_to_prepare_it(tmp_path, vocab_file):
    with pytest.raises(errors.DataError) as e:
        data.open(TextConfig("glue/mnli", str(tmp_path), vocabulary=vocab_file))
    assert "pip install 'superserve-jax[prepare]'" in str(e.value)
    assert f"tfds.builder('glue/mnli', data_dir='{tmp_path}').download_and_prepare(file_format='array_record')" in str(e.value)


def test_a_dataset_without_texts_and_labels_is_a_data_error(vocab_file):
    features = tfds.features.FeaturesDict({"image": tfds.features.Image(), "label": tfds.features.ClassLabel(num_classes=2)})
    builder = types.SimpleNamespace(info=types.SimpleNamespace(features=features))
    config = TextConfig("cifar10", vocabulary=vocab_file)
    with pytest.raises(errors.DataError, match=r"holds \['image', 'label'\].*premise\+hypothesis"):
        text.from_builder(config, builder, Vocabulary.read(vocab_file))
