"""Text of a caption -> tokens, by named tokenizers, and back; captions -> the tokenizer for their language.

Knows nothing of vocabularies or scores.

ptb      for English: lower case, split like the Penn Treebank, no punctuation except brackets
unicode  for languages other than English: runs of letters and digits; one token per character in scripts
         without spaces between words
arabic   like unicode, without diacritics and tatweel, and with one form of alef, of ya and of ta marbuta
jieba    Chinese words instead of characters, for scores that can be compared with publications
seed     the cleaning of the Keras tutorials, for comparison with scores that are based on it
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache, lru_cache
from importlib.metadata import version
from itertools import islice
from typing import Final, Protocol

from imcap_ray.errors import ConfigError

# Punctuation that coco-caption drops, unlike "#" and "&". A comma or a colon between digits is part of the number.
_PUNCTUATION: Final = re.compile(r"""["`?!;]|''+|--+|\.\.\.|[,:](?!\d)|(?<!\d)[,:]""")

# coco-caption keeps brackets by these names: it drops them in capitals, after its tokenizer has made them lower case.
_BRACKETS: Final = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}

_SPACED_BRACKETS: Final = str.maketrans({bracket: f" {name} " for bracket, name in _BRACKETS.items()})

# The quotation mark of 'stop', but not the apostrophe of 's, 'tis or '90s.
_OPENING_QUOTE: Final = re.compile(r"'(?!(?:s|m|d|t|n|ye|ll|re|ve|em|tis|twas|cause|til|bout)\b)(?=[^\W\d_])")

# Dropped only as separate tokens, because mostly they are part of a word.
PUNCTUATION_ALONE: Final = frozenset(["'", "-", "."])

# Words with a period; so are initials ("p.") and letters with periods ("d.c.").
ABBREVIATIONS: Final = frozenset(["mr.", "mrs.", "ms.", "dr.", "jr.", "sr.", "st.", "vs."])

# Words without punctuation that the treebank tokenizer splits.
_RUN_TOGETHER: Final = frozenset(["cannot", "gimme", "gonna", "gotta", "lemme", "wanna"])

CONTRACTIONS: Final = frozenset(["'s", "'m", "'d", "'ll", "'re", "'ve", "n't"])

_TYPOGRAPHIC: Final = str.maketrans(
    {"\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "\u2013": "--", "\u2014": "--"} | {"\u2026": "..."}
)

_KANA_AND_CHINESE: Final = (
    "\u3005-\u3007\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)

SCRIPTS_WITHOUT_SPACES: Final = f"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff{_KANA_AND_CHINESE}"
"""Ranges of a character class: Thai, Lao, Myanmar, Khmer, kana and Chinese, which have no spaces between words."""

# Diacritics and the tatweel are dropped, forms of a letter become one: the normalisation of ElJundi et al. 2020,
# "Resources and End-to-End Neural Network Models for Arabic Image Captioning", without that of hamza.
_ARABIC_FORMS: Final = str.maketrans(
    dict.fromkeys("\u0622\u0623\u0625\u0671", "\u0627")  # alef with madda, hamza or wasla
    | {"\u0649": "\u064a", "\u0629": "\u0647"}  # alef maqsura to ya, ta marbuta to ha
    | dict.fromkeys(map(chr, [0x640, 0x670, *range(0x64B, 0x653)]))  # tatweel and diacritics
)

_KANA_OR_CHINESE: Final = re.compile(f"[{_KANA_AND_CHINESE}]")

_LETTER: Final = re.compile(r"[^\W\d_]")

_ARABIC_LETTER: Final = re.compile(r"[\u0620-\u064a\u066e-\u06d3\u06d5\u06fa-\u06fc\u0750-\u077f]")

_ENGLISH_WORDS: Final = frozenset(["the", "with", "of", "and", "on", "to", "at", "by", "from", "his", "her", "are"])

MIN_ENGLISH_WORDS: Final = 0.05
"""Share of the captions' words that are among `_ENGLISH_WORDS`, below which they do not seem to be English."""

_NUM_READ: Final = 10_000
"""Captions that are enough to recognise their language."""


class _TreebankTokenizer(Protocol):
    def tokenize(self, text: str) -> list[str]: ...


def choose_tokenizer(captions: Iterable[str]) -> tuple[str, str]:
    """The tokenizer for captions in their language, and the reason for the choice."""
    texts = list(islice(captions, _NUM_READ))
    text = " ".join(texts)
    num_letters = max(1, len(_LETTER.findall(text)))
    unspaced, arabic = (len(script.findall(text)) / num_letters for script in (_unspaced_character(), _ARABIC_LETTER))
    if unspaced > 0.5:
        reason = f"{unspaced:.0%} of the letters are of scripts without spaces between words; each is a token"
        return "unicode", reason
    if arabic > 0.5:
        reason = f"{arabic:.0%} of the letters are Arabic; words keep their spelling, which `arabic` would normalise"
        return "unicode", reason
    counts = Counter(token for caption in texts for token in tokenize_ptb(caption))
    share = share_of_english(counts)
    if share >= MIN_ENGLISH_WORDS:
        return "ptb", f"{share:.0%} of the words are common English ones"
    return "unicode", f"only {share:.0%} of the words are common English ones"


def share_of_english(counts: Counter[str]) -> float:
    """The share of common English words among counted tokens."""
    return sum(counts[word] for word in _ENGLISH_WORDS) / max(1, counts.total())


def tokenize(text: str, tokenizer: str = "ptb") -> list[str]:
    """Tokens of the text, without punctuation. Raises `ConfigError` for an unknown tokenizer."""
    if tokenizer not in TOKENIZERS:
        raise ConfigError(f"tokenizer must be one of {', '.join(TOKENIZERS)}, got {tokenizer!r}")
    return TOKENIZERS[tokenizer](text)


def tokenize_words(text: str, tokenizer: str) -> list[str]:
    """Tokens of the text without brackets: those that a captioner learns."""
    return [token for token in tokenize(text, tokenizer) if token not in _BRACKETS.values()]


def scoring_tokenizer(tokenizer: str) -> str:
    """The tokenizer for scoring the captions of a model with this tokenizer.

    Chinese is scored by characters even if the model learned words, so that such models can be compared.
    """
    return {"unicode": "unicode", "arabic": "arabic", "jieba": "unicode"}.get(tokenizer, "ptb")


def tokenizer_package(tokenizer: str) -> str:
    """The package that segments the words, and its version; "" if it is nltk or ours."""
    return f"rjieba {version('rjieba')}" if tokenizer == "jieba" else ""


def detokenize(tokens: Sequence[str]) -> str:
    """Readable text of these tokens.

    There is no space before "'s", between characters of scripts without spaces, or next to kana and Chinese.
    """
    text = ""
    previous = ""
    for token in tokens:
        text += token if not previous or _is_joined(previous, token) else f" {token}"
        previous = token
    return text


def tokenize_ptb(text: str) -> list[str]:
    """Lower-case Penn Treebank tokens ("do n't", "dog 's", "can not", "-lrb-") without coco-caption's punctuation."""
    tokens: list[str] = []
    for word in split_words(text):
        if word.isalnum() and word not in _RUN_TOGETHER:
            tokens.append(word)
        elif word:
            tokens += _split_word(word)
    return tokens


def split_words(text: str) -> list[str]:
    """Lower-case words and brackets of the text, without coco-caption's punctuation, opening quotation marks and the
    periods that end sentences."""
    text = unicodedata.normalize("NFC", text.translate(_TYPOGRAPHIC).lower()).translate(_SPACED_BRACKETS)
    if not text.isascii():
        text = _unspaced_character().sub(r" \g<0> ", text)
    return [word if word.isalnum() else _clean(word) for word in _PUNCTUATION.sub(" ", text).split()]


def tokenize_unicode(text: str) -> list[str]:
    """Case-folded runs of letters and digits, with the apostrophes and hyphens inside them."""
    text = unicodedata.normalize("NFC", text.translate(_TYPOGRAPHIC).casefold())
    return [match.group() for match in _unicode_token().finditer(text)]


def tokenize_arabic(text: str) -> list[str]:
    """The tokens of `tokenize_unicode` after the normalisation of Arabic letters."""
    return tokenize_unicode(unicodedata.normalize("NFC", text).translate(_ARABIC_FORMS))


def tokenize_jieba(text: str) -> list[str]:
    """Chinese words, segmented by jieba's dictionary and hidden Markov model; Latin letters are case-folded.

    For Chinese only: the vowel signs of other scripts are dropped. Raises `ConfigError` if rjieba is not installed.
    """
    text = unicodedata.normalize("NFC", text.translate(_TYPOGRAPHIC)).encode("utf-8", "replace").decode()
    tokens: list[str] = []
    for piece in _jieba_cut()(text.upper()):  # in capitals, like "T\u6064" (T-shirt) in jieba's dictionary
        words = tokenize_unicode(piece)
        tokens += ["".join(words)] if _unspaced_character().search(piece) else words
    return tokens


def tokenize_seed(text: str) -> list[str]:
    """Lower-case words of two or more letters from a to z: "a", "'s" and numbers are dropped."""
    words = re.sub(r"[^a-z\s]", "", text.lower()).split()
    return [word for word in words if len(word) > 1]


TOKENIZERS: Final[Mapping[str, Callable[[str], list[str]]]] = {
    "ptb": tokenize_ptb,
    "unicode": tokenize_unicode,
    "arabic": tokenize_arabic,
    "jieba": tokenize_jieba,
    "seed": tokenize_seed,
}


def _is_joined(previous: str, token: str) -> bool:
    if token in CONTRACTIONS:
        return previous[-1].isalnum() and previous not in CONTRACTIONS
    before, after = previous[-1], token[0]
    if before.isascii() and after.isascii():
        return False
    is_unspaced = _unspaced_end().search(previous) and _unspaced_character().match(token)
    return bool(is_unspaced or _KANA_OR_CHINESE.match(before) or _KANA_OR_CHINESE.match(after))


def _clean(word: str) -> str:
    """The word without an opening quotation mark and the period that ends a sentence."""
    word = word[1:] if _OPENING_QUOTE.match(word) else word
    stem = word.rstrip(".")
    is_abbreviation = len(stem) == 1 or "." in stem or word in ABBREVIATIONS
    return word if is_abbreviation else stem


@lru_cache(maxsize=100_000)
def _split_word(word: str) -> tuple[str, ...]:
    """The treebank tokens of a word without the end of a sentence. Without quotation marks, they do not depend on other
    words.

    Cached, because the tokenizer takes milliseconds (nltk 3.10 guards each of its patterns with a timeout).
    """
    # The tokenizer takes the last period for the end of the sentence, so that it needs one.
    tokens = _treebank_tokenizer().tokenize(f"{word} .")
    return tuple(token for token in tokens if token not in PUNCTUATION_ALONE)


@cache
def _treebank_tokenizer() -> _TreebankTokenizer:
    from nltk.tokenize.treebank import TreebankWordTokenizer  # takes 1.5 s

    tokenizer: _TreebankTokenizer = TreebankWordTokenizer()
    return tokenizer


@cache
def _jieba_cut() -> Callable[[str], list[str]]:
    try:
        from rjieba import cut
    except ImportError as error:
        raise ConfigError(f"the tokenizer jieba needs rjieba: pip install 'imcap_ray[chinese]' ({error})") from error
    cut_words: Callable[[str], list[str]] = cut
    return cut_words


@cache
def _combining_marks() -> str:
    """A character class of accents and vowel signs, which belong to the letter before them and are not in `\\w`."""
    marks = (chr(code) for code in range(0x300, 0x20000) if unicodedata.category(chr(code)).startswith("M"))
    return f"[{''.join(marks)}\u200c\u200d]"


@cache
def _unspaced_character() -> re.Pattern[str]:
    return re.compile(rf"(?=\w)[{SCRIPTS_WITHOUT_SPACES}]{_combining_marks()}*")


@cache
def _unspaced_end() -> re.Pattern[str]:
    return re.compile(rf"(?:{_unspaced_character().pattern})\Z")


@cache
def _unicode_token() -> re.Pattern[str]:
    unspaced = _unspaced_character().pattern
    run = rf"(?:(?!{unspaced})[^\W_]{_combining_marks()}*)+"
    return re.compile(rf"{unspaced}|{run}(?:['-]{run})*")
