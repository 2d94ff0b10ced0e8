"""Directories of Hugging Face's `save_pretrained`: what is read, and what is refused by name."""

import json
import shutil

import bert_directory
import numpy as np
import pytest
from published import assert_same_model

from superserve_jax import convert, errors

TEXTS = ["The film is good.", "unable, NOT very bad films", "É é 中文 xyz", ""]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return bert_directory.write(tmp_path_factory.mktemp("pretrained") / "classifier")


@pytest.fixture
def copy(written, tmp_path):
    """A copy of the directory that a test may change."""
    return shutil.copytree(written[0], tmp_path / "classifier")


# -- what is read -------------------------------------------------------------------------------------------------------------


def test_sizes_labels_and_vocabulary_come_from_the_directory(written):
    path, model = written
    found = convert.from_pretrained(path)
    assert_same_model(found.model, model)
    assert found.class_names == bert_directory.LABELS
    assert found.vocabulary.tokens == bert_directory.TOKENS
    assert found.vocabulary.lowercase


def test_the_space_and_the_length_can_be_narrowed(written):
    model = convert.from_pretrained(written[0], max_length=8, depths=[2], heads=[2, 4], ffn=[32]).model
    assert (model.config.max_length, model.config.depths, model.config.heads, model.config.ffn) == (8, (2,), (2, 4), (32,))
    with pytest.raises(errors.ConfigError, match="the largest of depths must be the size of the weights, 2"):
        convert.from_pretrained(written[0], depths=[1])
    with pytest.raises(errors.ConversionError, match=r"model\.max_length must be at most 16, got 17"):
        convert.from_pretrained(written[0], max_length=17)


@pytest.mark.parametrize("lowercase", [True, False])
def test_texts_become_the_token_ids_of_the_original_tokenizer(tmp_path, lowercase):
    tokens = (*bert_directory.TOKENS, "The", "NOT", "e", "中", "文")
    config = bert_directory.SIZES
    model = bert_directory.random_model(type(config)(**{**vars(config), "vocab_size": len(tokens)}))
    path, _ = bert_directory.write(tmp_path, model, tokens=tokens, lowercase=lowercase)
    ours, theirs = convert.from_pretrained(path).vocabulary, bert_directory.fast_tokenizer(tokens, lowercase=lowercase)
    theirs.enable_padding(length=32)
    for second in (None, TEXTS[::-1]):
        found = ours.encode(TEXTS, second, length=32, token_types=2)
        expected = theirs.encode_batch(TEXTS if second is None else list(zip(TEXTS, second, strict=True)))
        np.testing.assert_array_equal(found[..., 0], [e.ids for e in expected])
        np.testing.assert_array_equal(found[..., 1], [e.type_ids for e in expected])


def test_weights_in_parts_are_put_together(tmp_path):
    path, model = bert_directory.write(tmp_path, weights="parts")
    assert_same_model(convert.from_pretrained(path).model, model)


@pytest.mark.parametrize("kept", ["tokenizer.json", "vocab.txt"])
def test_one_file_of_the_tokenizer_is_enough(copy, kept):
    for name in {"tokenizer.json", "vocab.txt", "tokenizer_config.json"} - {kept}:
        (copy / name).unlink()
    vocabulary = convert.from_pretrained(copy).vocabulary
    assert (vocabulary.tokens, vocabulary.lowercase) == (bert_directory.TOKENS, True)


def test_without_a_tokenizer_there_is_no_vocabulary(copy):
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        (copy / name).unlink()
    assert convert.from_pretrained(copy).vocabulary is None


def test_a_cased_tokenizer_keeps_its_case(copy):
    (copy / "tokenizer.json").unlink()
    bert_directory.change(copy / "tokenizer_config.json", do_lower_case=False)
    assert not convert.from_pretrained(copy).vocabulary.lowercase


def test_fields_that_hugging_face_leaves_out_have_its_defaults(copy):
    bert_directory.change(copy / "config.json", id2label=None, architectures=None, hidden_act=None, layer_norm_eps=None)
    found = convert.from_pretrained(copy)
    assert (found.class_names, found.model.config.eps) == (("LABEL_0", "LABEL_1"), 1e-12)


# -- what is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "roberta", "architectures": ["RobertaForSequenceClassification"]},
            "RobertaFor.* positions from the id",
        ),
        ({"model_type": "distilbert", "architectures": ["DistilBertForSequenceClassification"]}, "DistilBert.*no token types"),
        ({"model_type": "gpt2", "architectures": ["GPT2ForSequenceClassification"]}, "GPT2.*it is a decoder"),
        ({"model_type": "new"}, "'new' is not supported; supported are BertForSequenceClassification"),
        ({"model_type": None}, "of model_type None is not supported"),
        ({"model_type": ["bert"]}, r"of model_type \['bert'\] is not supported"),
        ({"architectures": ["BertForMaskedLM"]}, r"BertForMaskedLM is not supported.*Fine-tune the model"),
        ({"architectures": "Bert"}, "Bert is not supported"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu' instead of 'gelu'"),
        ({"hidden_act": "gelu_new", "is_decoder": True}, "hidden_act is 'gelu_new' .*; is_decoder is True instead of False"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key' instead of 'absolute'"),
        ({"add_cross_attention": True}, "add_cross_attention is True"),
        ({"pruned_heads": {"1": [0, 2]}}, "pruned_heads is .*: save the model before its heads were pruned"),
        ({"problem_type": "regression"}, "problem_type is 'regression'.*regression and several labels"),
        ({"problem_type": "multi_label_classification"}, "problem_type is 'multi_label_classification'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is"),
        ({"id2label": {"0": "LABEL_0"}}, "two or more labels.*regression"),
        ({"id2label": {"0": "no", "2": "yes"}}, "id2label must number the labels from 0 up"),
        ({"id2label": {"0": "a", "1": "b", "2": "c"}}, r"model\.num_classes must be 2, got 3"),
        ({"hidden_size": "big"}, r"is not the config of a BertForSequenceClassification.*hidden_size"),
        ({"hidden_size": 32}, r"model\.hidden_size must be 16, got 32"),
        ({"num_hidden_layers": 4}, r"the largest of model\.depths must be 2, got 4"),
        ({"num_hidden_layers": -4}, r"is not the config of a BertForSequenceClassification.*num_hidden_layers"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ({"num_attention_heads": 3}, "hidden_size must be a multiple of the 3 heads"),
        ({"vocab_size": 10}, "the vocabulary has 20 tokens"),
    ],
)
def test_a_network_that_is_not_dynabert_s_is_refused_by_name(copy, fields, message):
    bert_directory.change(copy / "config.json", **fields)
    with pytest.raises((errors.ConversionError, errors.ConfigError), match=message) as caught:
        convert.from_pretrained(copy)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer_class": "RobertaTokenizer"}, "tokenizer_class is 'RobertaTokenizer', which would give other token ids"),
        ({"do_lower_case": False}, "has do_lower_case=False, but the normalizer in .* has lowercase=True"),
        ({"strip_accents": False}, "strip_accents is False"),
        ({"tokenize_chinese_chars": False}, "tokenize_chinese_chars is False"),
        ({"padding_side": "left"}, "padding_side is 'left'"),
        ({"cls_token": {"content": "<s>"}}, "cls_token is '<s>'"),
        ({"model_max_length": "long"}, "is not the config of a BERT tokenizer"),
    ],
)
def test_a_setting_of_another_tokenizer_is_refused(copy, fields, message):
    bert_directory.change(copy / "tokenizer_config.json", **fields)
    with pytest.raises(errors.ConversionError, match=message):
        convert.from_pretrained(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(type="BPE"), r"model\.type is 'BPE'"),
        (lambda t: t["model"].update(vocab={"a": 0, "b": 2}), "must be 0 to 1, each once"),
        (lambda t: t["model"].update(vocab=[]), "is not a tokenizer"),
        (lambda t: t["normalizer"].update(handle_chinese_chars=False), "handle_chinese_chars is False"),
        (lambda t: t.update(normalizer=None), r"normalizer\.type is None"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), r"pre_tokenizer\.type is 'Whitespace'"),
        (lambda t: t["post_processor"]["single"].pop(), r"post_processor\.single is \['\[CLS\]', 'A'\]"),
        (lambda t: t["post_processor"]["pair"][3]["Sequence"].update(type_id=0), r"the token types of post_processor\.pair"),
        (lambda t: t.update(added_tokens=[{"content": "<user>"}]), "has the added tokens <user>"),
        (lambda t: t["model"]["vocab"].update(extra=20), r"tokens in vocab\.txt \(20\) and in tokenizer\.json \(21\)"),
    ],
)
def test_a_fast_tokenizer_of_another_kind_is_refused(copy, change, message):
    values = json.loads((copy / "tokenizer.json").read_text())
    change(values)
    (copy / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(errors.ConversionError, match=message):
        convert.from_pretrained(copy)


def test_a_directory_without_what_is_needed_says_what_it_lacks(copy, tmp_path):
    with pytest.raises(errors.ConversionError, match=r"has no config\.json \(no such directory\)"):
        convert.from_pretrained(tmp_path / "absent")
    (copy / "model.safetensors").rename(copy / "adapter_model.safetensors")
    with pytest.raises(errors.ConversionError, match=r"only adapter_model.*merge the adapter into its model first"):
        convert.from_pretrained(copy)
    (copy / "tokenizer.json").unlink()
    (copy / "vocab.txt").unlink()
    with pytest.raises(errors.ConversionError, match=r"settings of a tokenizer but no tokenizer\.json or vocab\.txt"):
        convert.from_pretrained(copy)
    (copy / "config.json").write_text("[1]")
    with pytest.raises(errors.ConversionError, match="must hold a JSON object, got list"):
        convert.from_pretrained(copy)
    (copy / "config.json").write_text("{")
    with pytest.raises(errors.ConversionError, match=r"config\.json is damaged"):
        convert.from_pretrained(copy)
    with pytest.raises(errors.ConversionError, match="expected the path of a directory, got None"):
        convert.from_pretrained(None)


@pytest.mark.parametrize("places", [{"a": "../other.safetensors"}, {"a": 1}, {}, []])
def test_an_index_can_only_name_files_of_its_directory(copy, places):
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    with pytest.raises(errors.ConversionError, match="must map each weight to a file of its own directory"):
        convert.from_pretrained(copy)
