"""Captions <-> token ids."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence

from imcap_ray.config import parse_json
from imcap_ray.errors import ModelError
from imcap_ray.text.tokenizers import TOKENIZERS, detokenize, tokenize_words

SPECIAL_TOKENS = ("<padding>", "<start>", "<end>", "<unknown>")

PADDING_ID, START_ID, END_ID, UNKNOWN_ID = range(4)

SUPPRESSED_TOKEN_IDS = (PADDING_ID, START_ID, UNKNOWN_ID)
"""Tokens that a caption must not contain."""


class Vocabulary:
    """The two-way table between tokens and ids. The first four ids are the special tokens.

    Args:
        tokens: the words without the special tokens, in the order of their ids.
        tokenizer: a name of `tokenizers.TOKENIZERS`.
    """

    def __init__(self, tokens: Sequence[str], *, tokenizer: str = "ptb") -> None:
        self.tokens: list[str] = [*SPECIAL_TOKENS, *tokens]
        self.tokenizer = tokenizer
        self._ids = {token: token_id for token_id, token in enumerate(self.tokens)}
        if len(self._ids) != len(self.tokens):
            repeated = [token for token, count in Counter(self.tokens).items() if count > 1]
            raise ModelError(f"the vocabulary repeats {len(repeated)} tokens, the first is {repeated[0][:100]!r}")

    @classmethod
    def build(cls, captions: Iterable[str], *, tokenizer: str = "ptb", min_count: int = 1) -> Vocabulary:
        """A vocabulary of the tokens that occur at least `min_count` times, the most frequent first."""
        counts = Counter(token for caption in captions for token in tokenize_words(caption, tokenizer))
        kept = sorted((token for token, count in counts.items() if count >= min_count), key=lambda t: (-counts[t], t))
        return cls([token for token in kept if token not in SPECIAL_TOKENS], tokenizer=tokenizer)

    def extend(self, captions: Iterable[str], *, tokenizer: str, min_count: int) -> Vocabulary:
        """This vocabulary with the tokens appended that occur at least `min_count` times in the captions."""
        others = Vocabulary.build(captions, tokenizer=tokenizer, min_count=min_count)
        added = [token for token in others.tokens if token not in self._ids]
        return Vocabulary([*self.tokens[len(SPECIAL_TOKENS) :], *added], tokenizer=tokenizer)

    def __len__(self) -> int:
        return len(self.tokens)

    def to_ids(self, caption: str, *, max_length: int) -> list[int]:
        """Token ids of at most `max_length` words, with start and end; words outside the vocabulary become unknown."""
        words = tokenize_words(caption, self.tokenizer)[:max_length]
        return [START_ID, *(self._ids.get(word, UNKNOWN_ID) for word in words), END_ID]

    def to_text(self, token_ids: Iterable[int]) -> str:
        """The caption of these ids, up to the first end token, without special tokens."""
        words = []
        for token_id in token_ids:
            if token_id == END_ID:
                break
            if token_id >= len(SPECIAL_TOKENS):
                words.append(self.tokens[token_id])
        return detokenize(words)

    def to_json(self) -> str:
        """JSON for `from_json`."""
        words = self.tokens[len(SPECIAL_TOKENS) :]
        return json.dumps({"tokenizer": self.tokenizer, "tokens": words}, ensure_ascii=False, indent=0)

    @classmethod
    def from_json(cls, text: str | bytes) -> Vocabulary:
        """A vocabulary from the output of `to_json`."""
        try:
            values = parse_json(text)
            tokens, tokenizer = values["tokens"], values["tokenizer"]
            if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
                raise ValueError("tokens must be a list of strings")
            for token in tokens:
                token.encode()  # JSON may hold half of a surrogate pair, which no file can be written with
            if tokenizer not in TOKENIZERS:
                raise ValueError(f"no tokenizer {repr(tokenizer)[:100]}")
            return cls(tokens, tokenizer=tokenizer)
        except (ValueError, KeyError, TypeError) as error:
            reason = repr(error)[:300]
            raise ModelError(f"vocabulary.json must hold `tokenizer` and `tokens`: {reason}") from error
