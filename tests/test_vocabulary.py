"""Text becomes token ids: word pieces as computed by hand with BERT's rules, and the words of ListOps."""

import numpy as np
import pytest

from superserve_jax import errors
from superserve_jax.families.dynabert import DynaBERTConfig
from superserve_jax.vocabulary import Vocabulary

TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat", "play", "##ing", "##ed", ",", "uber", "E", "##s")
PIECES = Vocabulary(TOKENS)
WORDS = Vocabulary(("[PAD]", "[CLS]", "0", "1", "[MAX", "]"), scheme="words")


def tokens(ids):
    return [TOKENS[i] for i in ids]


def test_a_text_becomes_cls_pieces_sep_and_padding():
    ids = PIECES.encode(["The cat, playing"], length=9)
    assert ids.dtype == np.int32
    assert tokens(ids[0]) == ["[CLS]", "the", "cat", ",", "play", "##ing", "[SEP]", "[PAD]", "[PAD]"]


def test_a_pair_has_types_of_its_own_and_the_second_text_a_separator():
    inputs = PIECES.encode(["the cat"], ["cat played"], length=9, token_types=2)
    assert tokens(inputs[0, :, 0]) == ["[CLS]", "the", "cat", "[SEP]", "cat", "play", "##ed", "[SEP]", "[PAD]"]
    assert inputs[0, :, 1].tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 0]


def test_inputs_equal_the_ones_that_the_model_packs():
    config = DynaBERTConfig(vocab_size=len(TOKENS), max_length=9)
    inputs = PIECES.encode(["the cat"], ["cat"], length=9, token_types=2)
    assert np.array_equal(inputs, config.pack([[2, 4, 5, 3, 5, 3]], [[0, 0, 0, 0, 1, 1]]))


@pytest.mark.parametrize(
    ("first", "second", "length", "expected"),
    [
        ("the cat sat the cat", None, 5, "[CLS] the cat sat [SEP]"),
        ("the cat sat the cat", "sat", 7, "[CLS] the cat sat [SEP] sat [SEP]"),
        ("sat", "the cat sat the cat", 7, "[CLS] sat [SEP] the cat sat [SEP]"),
        # With equal lengths, the second is cut first.
        ("the cat sat", "the cat sat", 8, "[CLS] the cat sat [SEP] the cat [SEP]"),
        ("the cat", None, 2, "[CLS] [SEP]"),
    ],
)
def test_texts_that_are_too_long_are_cut_as_bert_does(first, second, length, expected):
    ids = PIECES.encode([first], None if second is None else [second], length=length)
    assert " ".join(tokens(ids[0])) == expected


def test_lowercasing_strips_accents_and_can_be_turned_off():
    assert tokens(PIECES.encode(["Über"], length=3)[0]) == ["[CLS]", "uber", "[SEP]"]
    cased = Vocabulary(TOKENS, lowercase=False)
    assert tokens(cased.encode(["Es The"], length=5)[0]) == ["[CLS]", "E", "##s", "[UNK]", "[SEP]"]


def test_a_special_token_in_a_users_text_is_only_text():
    ids = PIECES.encode(["the [SEP] cat"], length=12)[0].tolist()
    assert ids.count(TOKENS.index("[SEP]")) == 1


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_a_vocabulary_file_may_end_its_lines_in_any_way(tmp_path, newline, end):
    odd = (*TOKENS, "\u2028")  # a token of BERT that str.splitlines treats as a line end
    (tmp_path / "vocab.txt").write_bytes((newline.join(odd) + end.replace("\n", newline)).encode())
    found = Vocabulary.read(tmp_path / "vocab.txt", lowercase=False)
    assert found == Vocabulary(odd, lowercase=False)
    (tmp_path / "copy.txt").write_bytes(found.to_text().encode())
    assert Vocabulary.read(tmp_path / "copy.txt", **found.settings) == found


def test_words_are_split_at_whitespace_and_follow_cls():
    assert WORDS.encode(["[MAX 0 1 ]", " 1  0 "], length=6).tolist() == [[1, 4, 2, 3, 5, 0], [1, 3, 2, 0, 0, 0]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: WORDS.encode(["[MAXX 0 ]"], length=6), r"did you mean '\[MAX'"),
        (lambda: WORDS.encode(["0 1 0"], length=3), "may have 2 tokens here, got 3"),
        (lambda: WORDS.encode(["0"], ["1"], length=3), "single texts"),
        (lambda: PIECES.encode(["a", "b"], ["c"], length=9), "got 2 texts and 1 second"),
        (lambda: PIECES.encode([b"the"], length=9), "must be a str, got bytes"),
        (lambda: PIECES.encode(["a"], [None], length=9), "must be a str, got NoneType"),
    ],
)
def test_impossible_arguments_of_encode_are_input_errors(call, message):
    with pytest.raises(errors.InputError, match=message):
        call()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": TOKENS[1:]}, r"needs the tokens \[PAD\]"),
        ({"tokens": (*TOKENS, "cat")}, "it holds 'cat' twice"),
        ({"tokens": (*TOKENS, "")}, "not empty"),
        ({"tokens": (*TOKENS, "a\nb")}, "one line"),
        ({"tokens": TOKENS, "scheme": "word"}, "did you mean 'words'"),
        ({"tokens": TOKENS, "lowercase": 1}, "lowercase must be True or False, got 1"),
    ],
)
def test_impossible_vocabularies_are_refused(arguments, message):
    with pytest.raises(errors.SuperServeError, match=message):
        Vocabulary(**arguments)


@pytest.mark.parametrize("content", [None, b"", b"the\ncat\n", b"\xff\xfe"])
def test_a_file_that_is_no_vocabulary_is_a_data_error_that_names_it(tmp_path, content):
    file = tmp_path / "vocab.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(errors.DataError, match=r"vocab\.txt cannot be read"):
        Vocabulary.read(file)


def test_a_missing_tokenizer_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(errors.DataError, match=r"pip install 'superserve-jax\[text\]'"):
        Vocabulary(TOKENS).encode(["the"], length=4)


@pytest.mark.parametrize("changes", [{"vocab_size": 13}, {"pad_id": 1}])
def test_a_network_with_other_tokens_does_not_fit(changes):
    PIECES.check_fit(DynaBERTConfig(vocab_size=14))
    with pytest.raises(errors.ConfigError, match="make them agree"):
        PIECES.check_fit(DynaBERTConfig(**{"vocab_size": 14, **changes}))
