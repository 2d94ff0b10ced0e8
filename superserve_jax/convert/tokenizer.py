"""Reads the tokenizer of a directory of Hugging Face's `save_pretrained` as a vocabulary.

`Vocabulary` has BERT's WordPiece scheme and no other. A tokenizer with another setting would give other token ids for the same
text, so it is refused.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import msgspec

from superserve_jax import errors
from superserve_jax.convert import folder
from superserve_jax.vocabulary import CLS, PAD, SEP, UNKNOWN, Vocabulary

_CLASSES = (None, "BertTokenizer", "BertTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend")
_SPECIAL = {"pad_token": PAD, "unk_token": UNKNOWN, "cls_token": CLS, "sep_token": SEP}
_ADDED = {*_SPECIAL.values(), "[MASK]"}
_LONGEST = 1 << 20  # tokens; a tokenizer without a limit has the limit 1e30
_FILES = "tokenizer.json or vocab.txt"


class _Tokenizer(msgspec.Struct):
    """The parts of tokenizer.json that change token ids."""

    model: dict[str, Any]
    normalizer: dict[str, Any] | None = None
    pre_tokenizer: dict[str, Any] | None = None
    post_processor: dict[str, Any] | None = None
    added_tokens: list[dict[str, Any]] = []


class _Settings(msgspec.Struct):
    """The fields of tokenizer_config.json that change token ids, with Hugging Face's defaults."""

    tokenizer_class: str | None = None
    do_lower_case: bool | None = None
    strip_accents: bool | None = None
    tokenize_chinese_chars: bool | None = True
    do_basic_tokenize: bool | None = True
    never_split: list[str] | None = None
    padding_side: str | None = "right"
    truncation_side: str | None = "right"
    model_max_length: float | None = None
    pad_token: Any = PAD
    unk_token: Any = UNKNOWN
    cls_token: Any = CLS
    sep_token: Any = SEP


def read(path: pathlib.Path) -> tuple[Vocabulary | None, int | None]:
    """The vocabulary of a directory, and the longest sequence in tokens that its tokenizer allows.

    Both are None if they are not there.

    Raises:
      ConversionError: a file is damaged, two files differ, or the tokenizer is not one of BERT's.
    """
    fast, plain, settings = path / "tokenizer.json", path / "vocab.txt", _Settings()
    if (path / "tokenizer_config.json").exists():
        settings = _settings(path / "tokenizer_config.json")
    if not fast.exists() and not plain.exists():
        if settings.tokenizer_class is not None:
            raise errors.ConversionError(f"{path} has the settings of a tokenizer but no {_FILES}; save the tokenizer again")
        return None, None
    lowercase = settings.do_lower_case
    if fast.exists():
        tokens, lowercases = _read_fast(fast, settings)
        if lowercase not in (None, lowercases):
            raise errors.ConversionError(
                f"{path}: tokenizer_config.json has do_lower_case={lowercase}, but the normalizer in tokenizer.json has "
                f"lowercase={lowercases}; make them equal, as in the tokenizer that the classifier was trained with"
            )
        lowercase = lowercases
    else:
        tokens = Vocabulary.read(plain).tokens
    if fast.exists() and plain.exists() and (other := Vocabulary.read(plain).tokens) != tokens:
        raise errors.ConversionError(
            f"{path}: the tokens in vocab.txt ({len(other)}) and in tokenizer.json ({len(tokens)}) are not the same; remove "
            "the file that does not belong to the classifier"
        )
    lowercase = True if lowercase is None else lowercase  # Hugging Face's default
    _demand(path / "tokenizer_config.json", "strip_accents", settings.strip_accents, (None, lowercase))
    longest = settings.model_max_length
    try:
        vocabulary = Vocabulary(tuple(tokens), lowercase=lowercase)
    except errors.ConfigError as e:
        raise errors.ConversionError(f"the tokenizer in {path} is not supported: {e}") from e
    return vocabulary, int(longest) if longest is not None and 1 <= longest <= _LONGEST else None


def _settings(path: pathlib.Path) -> _Settings:
    """What tokenizer_config.json says. Raises ConversionError for settings that `Vocabulary` does not have."""
    with errors.refusing(errors.ConversionError, f"{path} is not the config of a BERT tokenizer; save it again"):
        settings = msgspec.convert(folder.read_json(path), _Settings)
    _demand(path, "tokenizer_class", settings.tokenizer_class, _CLASSES)
    _demand(path, "tokenize_chinese_chars", settings.tokenize_chinese_chars, (True, None))
    _demand(path, "do_basic_tokenize", settings.do_basic_tokenize, (True, None))
    _demand(path, "never_split", settings.never_split, (None, []))
    _demand(path, "padding_side", settings.padding_side, ("right", None))
    _demand(path, "truncation_side", settings.truncation_side, ("right", None))
    for name, token in _SPECIAL.items():
        found = getattr(settings, name)
        _demand(path, name, found.get("content") if isinstance(found, dict) else found, (token, None))
    return settings


def _read_fast(path: pathlib.Path, settings: _Settings) -> tuple[tuple[str, ...], bool]:
    """The tokens in tokenizer.json, and whether it changes text to lower case."""
    with errors.refusing(errors.ConversionError, f"{path} is not a tokenizer; save it again"):
        found = msgspec.convert(folder.read_json(path), _Tokenizer)
        model, normalizer = found.model, found.normalizer or {}
        _demand(path, "model.type", model.get("type"), ("WordPiece",))
        _demand(path, "model.unk_token", model.get("unk_token"), (UNKNOWN,))
        _demand(path, "model.continuing_subword_prefix", model.get("continuing_subword_prefix", "##"), ("##",))
        _demand(path, "model.max_input_chars_per_word", model.get("max_input_chars_per_word", 100), (100,))
        _demand(path, "normalizer.type", normalizer.get("type"), ("BertNormalizer",))
        lowercase = msgspec.convert(normalizer.get("lowercase", True), bool)
        _demand(path, "normalizer.clean_text", normalizer.get("clean_text", True), (True,))
        _demand(path, "normalizer.handle_chinese_chars", normalizer.get("handle_chinese_chars", True), (True,))
        _demand(path, "normalizer.strip_accents", normalizer.get("strip_accents"), (None, lowercase))
        _demand(path, "pre_tokenizer.type", (found.pre_tokenizer or {}).get("type"), ("BertPreTokenizer",))
        _check_processor(path, found.post_processor or {})
        ids = msgspec.convert(model["vocab"], dict[str, int])
        if sorted(ids.values()) != list(range(len(ids))):
            raise errors.ConversionError(f"{path}: the ids of the tokens must be 0 to {len(ids) - 1}, each once")
        tokens = tuple(sorted(ids, key=ids.__getitem__))
        added = [msgspec.convert(token["content"], str) for token in found.added_tokens]
    if odd := [token for token in added if token not in _ADDED]:
        raise errors.ConversionError(
            f"{path} has the added tokens {', '.join(odd[:5])}, which are not split into word pieces. Only BERT's own special "
            f"tokens are supported: {', '.join(sorted(_ADDED))}"
        )
    return tokens, lowercase


def _check_processor(path: pathlib.Path, processor: Mapping[str, Any]) -> None:
    """Raises ConversionError unless the tokenizer puts [CLS] before the first text and [SEP] after each text."""
    _demand(path, "post_processor.type", processor.get("type"), ("TemplateProcessing", "BertProcessing"))
    if processor["type"] == "BertProcessing":
        return
    for name, expected in (("single", [CLS, "A", SEP]), ("pair", [CLS, "A", SEP, "B", SEP])):
        pieces = [next(iter(piece.values())) for piece in processor[name]]
        _demand(path, f"post_processor.{name}", [piece["id"] for piece in pieces], (expected,))
        kinds = [int("B" in expected[:i]) or int(token == "B") for i, token in enumerate(expected)]
        _demand(path, f"the token types of post_processor.{name}", [piece["type_id"] for piece in pieces], (kinds,))


def _demand(path: pathlib.Path, name: str, found: Any, supported: tuple[Any, ...]) -> None:
    if found not in supported:
        known = " or ".join(repr(value) for value in supported if value is not None) or "None"
        raise errors.ConversionError(
            f"{path}: {name} is {found!r}, which would give other token ids; only BERT's WordPiece is supported, with {known}"
        )
