"""Vocabularies: how text becomes token ids, the same in training and in serving.

There are two schemes:

- `wordpiece` is BERT's scheme (Devlin et al., NAACL 2019). It splits words into pieces from a vocabulary file. It puts [CLS]
  before the first text and [SEP] after each text. It needs the package tokenizers.
- `words` splits text at whitespace, and puts [CLS] before it.

Axis letters: B batch, T tokens.
"""

import collections
import dataclasses
import difflib
import functools
import numbers
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from superserve_jax import errors, files

PAD, UNKNOWN, CLS, SEP = "[PAD]", "[UNK]", "[CLS]", "[SEP]"
_NEEDED = {"wordpiece": (PAD, UNKNOWN, CLS, SEP), "words": (PAD, CLS)}


@runtime_checkable
class TokenConfig(Protocol):
    """The part of a family's config that describes token ids."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    @property
    def pad_id(self) -> int:
        """The token id of padding."""
        ...


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Tokens by id, and how text is split into tokens.

    Args:
      tokens: the token of each id.
      scheme: "wordpiece" or "words".
      lowercase: for wordpiece: convert text to lower case and remove accents first, as for BERT's uncased models.

    >>> words = Vocabulary(("[PAD]", "[CLS]", "1", "2", "+"), scheme="words")
    >>> words.encode(["1 + 2", "2"], length=5).tolist()
    [[1, 2, 4, 3, 0], [1, 3, 0, 0, 0]]
    """

    tokens: tuple[str, ...]
    scheme: Literal["wordpiece", "words"] = "wordpiece"
    lowercase: bool = True

    @errors.refusing(errors.ConfigError, "a vocabulary needs a tuple of tokens and the name of a scheme")
    def __post_init__(self):
        errors.check_name("scheme of a vocabulary", self.scheme, _NEEDED)
        if not isinstance(self.lowercase, bool):
            raise errors.ConfigError(f"lowercase must be True or False, got {self.lowercase!r}")
        if not all(isinstance(token, str) and token and not {"\n", "\r"} & set(token) for token in self.tokens):
            raise errors.ConfigError("every token of a vocabulary must be one line of text, and not empty")
        "".join(self.tokens).encode()  # raises for half of a surrogate pair, which no file can hold
        if len(self._ids) < len(self.tokens):
            twice = next(t for i, t in enumerate(self.tokens) if self._ids[t] != i)
            raise errors.ConfigError(f"a vocabulary must hold every token once; it holds {twice!r} twice")
        if missing := [token for token in _NEEDED[self.scheme] if token not in self._ids]:
            raise errors.ConfigError(f"a vocabulary for {self.scheme} needs the tokens {', '.join(missing)}; add them")

    @staticmethod
    def read(path: str | os.PathLike[str], **settings: Any) -> "Vocabulary":
        """A vocabulary from a file such as BERT's vocab.txt: line i holds the token of id i.

        Args:
          path: the file.
          **settings: see `settings`.

        Raises DataError if the file is not a vocabulary.
        """
        try:
            text = files.read_bytes(path).decode().replace("\r\n", "\n")
            # Not splitlines(): it also splits at some characters that are tokens of BERT.
            return Vocabulary(tuple(text.removesuffix("\n").split("\n")), **settings)
        except (OSError, TypeError, ValueError) as e:
            raise errors.DataError(
                f"{path} cannot be read as a vocabulary file (UTF-8, one token a line, such as BERT's vocab.txt): {e}"
            ) from e

    @staticmethod
    def build(texts: Iterable[str], *, size: int = 8000, lowercase: bool = True) -> "Vocabulary":
        """A wordpiece vocabulary of the most frequent words and punctuation marks of texts. Other words become [UNK].

        Words that occur only once are left out, so that a model learns what an unknown word means.

        Args:
          texts: the texts, usually the training texts.
          size: the largest number of tokens, with the four special ones.
          lowercase: whether to convert texts to lower case and remove accents first.

        Raises DataError if the package tokenizers is missing.

        >>> Vocabulary.build(["A cat, a dog.", "The cat."]).tokens
        ('[PAD]', '[UNK]', '[CLS]', '[SEP]', '.', 'a', 'cat')
        """
        special = Vocabulary(_NEEDED["wordpiece"], lowercase=lowercase)
        tokenizer, counts = special._tokenizer, collections.Counter[str]()
        for text in texts:
            words = tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
            counts.update(word for word, _ in words)
        frequent = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
        return Vocabulary((*special.tokens, *frequent[: size - len(special.tokens)]), lowercase=lowercase)

    def to_text(self) -> str:
        """The text of a vocabulary file."""
        return "".join(token + "\n" for token in self.tokens)

    @property
    def settings(self) -> dict[str, Any]:
        """What `read` needs besides the file, as a dict for `json.dump`."""
        return {"scheme": self.scheme, "lowercase": self.lowercase}

    @property
    def pad_id(self) -> int:
        """Token id of padding."""
        return self._ids[PAD]

    @errors.refusing(errors.InputError, "texts and second must be lists of strings")
    def encode(
        self, texts: Sequence[str], second: Sequence[str] | None = None, *, length: int, token_types: int = 1
    ) -> np.ndarray:
        """Makes inputs of a transformer from B texts, or from B pairs of texts.

        Args:
          texts: B texts.
          second: the second text of each pair, such as a hypothesis.
          length: T. Shorter inputs are padded. wordpiece cuts longer inputs at the end; of a pair, the longer text first.
          token_types: with 2, the result holds the token type (1 in the second text) next to each id.

        Returns:
          int32 (B, T), or (B, T, 2) with token types, as from `DynaBERTConfig.pack`.

        Raises:
          InputError: an argument is not possible, or `words` finds a pair, an unknown token or too many tokens.
          DataError: the package tokenizers is missing.
        """
        if isinstance(texts, str) or isinstance(second, str):
            raise errors.InputError("texts must be a list; give a single text as [text]")
        if not isinstance(length, numbers.Integral) or length < 1:
            raise errors.InputError(f"length must be a whole number of tokens from 1 up, got {length!r}")
        if second is not None and len(second) != len(texts):
            raise errors.InputError(f"every text needs its second text, got {len(texts)} texts and {len(second)} second ones")
        for text in [*texts, *(second or ())]:
            if not isinstance(text, str):
                raise errors.InputError(f"a text must be a str, got {type(text).__name__}")
        inputs = np.zeros((len(texts), length, 2), np.int32)
        inputs[:, :, 0] = self.pad_id
        for i, text in enumerate(texts):
            ids, types = self._sequence(text, None if second is None else second[i], length)
            inputs[i, : len(ids)] = np.stack([ids, types], axis=-1)
        return inputs if token_types > 1 else inputs[:, :, 0]

    def check_fit(self, config: object) -> None:
        """Raises ConfigError unless the network of a family's config knows every token and has the same id of padding."""
        if not isinstance(config, TokenConfig):
            raise errors.ConfigError(f"a vocabulary needs a model that reads token ids, got {type(config).__name__}")
        if len(self.tokens) > config.vocab_size or self.pad_id != config.pad_id:
            raise errors.ConfigError(
                f"the vocabulary has {len(self.tokens)} tokens and its padding has the id {self.pad_id}, but the model has "
                f"vocab_size={config.vocab_size} and pad_id={config.pad_id}; make them agree"
            )

    def _sequence(self, text: str, second: str | None, length: int) -> tuple[list[int], list[int]]:
        """Token ids and types of one input, not padded."""
        if self.scheme == "words":
            return self._word_sequence(text, second, length)
        texts = [text] if second is None else [text, second]
        parts = [self._tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
        while sum(map(len, parts)) > max(length - 1 - len(parts), 0):
            max(reversed(parts), key=len).pop()  # with equal lengths the second one, as in BERT's code
        ids, types = [self._ids[CLS]], [0]
        for kind, part in enumerate(parts):
            ids += [*part, self._ids[SEP]]
            types += [kind] * (len(part) + 1)
        return ids[:length], types[:length]

    def _word_sequence(self, text: str, second: str | None, length: int) -> tuple[list[int], list[int]]:
        if second is not None:
            raise errors.InputError("this vocabulary takes single texts, not pairs")
        words = text.split()
        if len(words) >= length:
            raise errors.InputError(f"a text may have {length - 1} tokens here, got {len(words)}: '{text[:80]}'")
        for word in words:
            if word not in self._ids:
                near = difflib.get_close_matches(word, self.tokens, n=1)
                hint = f"did you mean '{near[0]}'?" if near else f"its tokens are {' '.join(self.tokens)[:200]}"
                raise errors.InputError(f"'{word}' is not a token of this vocabulary (put blanks between tokens); {hint}")
        return [self._ids[CLS], *(self._ids[word] for word in words)], [0] * (len(words) + 1)

    @functools.cached_property
    def _ids(self) -> Mapping[str, int]:
        return {token: i for i, token in enumerate(self.tokens)}

    @functools.cached_property
    def _tokenizer(self) -> Any:
        try:
            import tokenizers
        except ImportError as e:
            raise errors.DataError(
                f"splitting text into word pieces needs '{e.name}': pip install 'superserve-jax[text]'"
            ) from e
        # The special tokens are not registered. So "[SEP]" in a user's text becomes several pieces, not a separator.
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(dict(self._ids), unk_token=UNKNOWN))
        tokenizer.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=self.lowercase)
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
        return tokenizer
