import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.tokenize.treebank import TreebankWordTokenizer

from imcap_ray.errors import ConfigError
from imcap_ray.text import tokenizers
from imcap_ray.text.tokenizers import (
    PUNCTUATION_ALONE,
    TOKENIZERS,
    choose_tokenizer,
    detokenize,
    split_words,
    tokenize,
)
from imcap_ray.text.vocabulary import Vocabulary

COCO_PUNCTUATION = "'' ' `` ` . ? ! , : - -- ... ; \""

# In the style of Flickr8k.token.txt, whose captions are tokenized already.
TOKENIZED_CAPTIONS = [
    "A child in a pink dress is climbing up a set of stairs in an entry way .",
    "Two men , one in a red T-shirt , are watching a dog 's ball ...",
    'A man wearing a shirt that says " Crossing Guard " ; he is n\'t smiling !',
    "Soccer player # 14 kicks the ball ( hard ) past number 3 & runs .",
    "The 10 year old boy 's-eye-view of a half-pipe -- at 3:30 o'clock ?",
    "Mr. Brown visits Washington D.C. with his dog",
]

WORDS = (
    "a dog runs can not do 's n't 're 'll u.s. mr. d.c. bench. cannot gonna don't it’s boys' 3:30 1,000 # & "
    "T-shirt é 狗 红 犬が走る สุนัข हिन्दी . , ... -- - ! ? : ; ' \" “ ” … ( )"
)


@pytest.mark.parametrize("caption", TOKENIZED_CAPTIONS)
def test_tokenized_captions_keep_their_tokens_and_lose_their_punctuation(caption: str):
    brackets = {"(": "-lrb-", ")": "-rrb-"}
    tokens = [brackets.get(token, token) for token in caption.lower().split()]
    expected = [token for token in tokens if token not in COCO_PUNCTUATION.split()]

    assert tokenize(caption) == expected


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("The dogs don't run.", ["the", "dogs", "do", "n't", "run"]),
        ("They cannot stop, they won't", ["they", "can", "not", "stop", "they", "wo", "n't"]),
        ("He said “Stop!” — it’s the dog’s.", ["he", "said", "stop", "it", "'s", "the", "dog", "'s"]),
        ("A dog runs. Two cats don't.", ["a", "dog", "runs", "two", "cats", "do", "n't"]),
        ("Mr. Brown of the U.S.", ["mr.", "brown", "of", "the", "u.s."]),
        ("#1 & 1,000 others at 3:30", ["#", "1", "&", "1,000", "others", "at", "3:30"]),
        ("(a) [b]; d:e,f", ["-lrb-", "a", "-rrb-", "-lsb-", "b", "-rsb-", "d", "e", "f"]),
        ("{c}", ["-lcb-", "c", "-rcb-"]),
        ("a 'stop' sign, 'do not enter'", ["a", "stop", "sign", "do", "not", "enter"]),
        ("‘Stop’ 'I'm a 'dog's' 'red", ["stop", "i", "'m", "a", "dog", "'s", "red"]),
        ("'tis a dog of the '90s, 'cause", ["'t", "is", "a", "dog", "of", "the", "'90s", "'cause"]),
        ("the boys' ball", ["the", "boys", "ball"]),
        ("Une tête-à-tête\u00a0d'été", ["une", "tête-à-tête", "d'été"]),
        ("...", []),
        ("", []),
    ],
)
def test_ptb_tokens_of_free_text(text: str, tokens: list[str]):
    assert tokenize(text, "ptb") == tokens


def test_a_captioner_learns_no_brackets():
    assert Vocabulary.build(["a dog (x) [runs]"]).tokens[4:] == ["a", "dog", "runs", "x"]


def words_of_a_whole_sentence(text: str) -> list[str]:
    """Reference: the treebank tokenizer applied to all words at once."""
    tokens = TreebankWordTokenizer().tokenize(" ".join([*split_words(text), "."]))
    return [token for token in tokens if token not in PUNCTUATION_ALONE]


@settings(deadline=None, max_examples=60)
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["cannot", "gimme", "gonna", "gotta", "lemme", "wanna", "more'n", "d'ye", "'tis", "'twas"]),
            st.sampled_from([word for word in WORDS.split() if word.isascii()]),
            st.text("ans't2.,:;-@#$%&<>/`\"d ", max_size=5),
        ),
        max_size=6,
    ).map(" ".join)
)
def test_ptb_tokens_of_a_word_do_not_depend_on_its_neighbours(text: str):
    assert tokenize(text) == words_of_a_whole_sentence(text)


@settings(deadline=None)  # the first example imports nltk
@given(st.lists(st.sampled_from(WORDS.split()), max_size=8).map(" ".join))
def test_ptb_tokens_survive_becoming_text(text: str):
    tokens = tokenize(text)

    assert tokenize(detokenize(tokens)) == tokens
    assert tokenize(" ".join(tokens)) == tokens


@settings(deadline=None)
@given(st.text(), st.sampled_from(sorted(TOKENIZERS)))
def test_tokens_contain_no_spaces_and_do_not_depend_on_the_spacing_of_the_text(text: str, tokenizer: str):
    tokens = tokenize(text, tokenizer)

    assert all(token and not any(map(str.isspace, token)) for token in tokens)
    assert tokenize(f"\t{text}\n", tokenizer) == tokens


def test_composed_and_decomposed_letters_are_the_same_token():
    for tokenizer in ("ptb", "unicode"):
        assert tokenize("cafe\u0301", tokenizer) == tokenize("caf\u00e9", tokenizer) == ["caf\u00e9"]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("L'homme, à la T-shirt...", ["l'homme", "à", "la", "t-shirt"]),
        ("Ein GROẞER Hund", ["ein", "grosser", "hund"]),
        ("红色的狗在3只猫旁边。", ["红", "色", "的", "狗", "在", "3", "只", "猫", "旁", "边"]),
        ("犬が走る", ["犬", "が", "走", "る"]),
        ("개가 공원에서 뛰고 있다", ["개가", "공원에서", "뛰고", "있다"]),
        ("हिन्दी में कुत्ता", ["हिन्दी", "में", "कुत्ता"]),
        ("สุนัขวิ่ง", ["สุ", "นั", "ข", "วิ่", "ง"]),
        ("— ! ?", []),
    ],
)
def test_unicode_tokens_are_words_or_characters_of_unspaced_scripts(text: str, tokens: list[str]):
    assert tokenize(text, "unicode") == tokens
    assert tokenize(detokenize(tokens), "unicode") == tokens


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("一个穿着泳装的女人躺在海水里。", ["一个", "穿着", "泳装", "的", "女人", "躺", "在", "海水", "里"]),
        ("3个穿T恤的DJ,在公园", ["3", "个", "穿", "t恤", "的", "dj", "在", "公园"]),
        ("红色t恤衫 \ud800", ["红色", "t恤衫"]),
    ],
)
def test_jieba_tokens_are_chinese_words(text: str, tokens: list[str]):
    assert tokenize(text, "jieba") == tokens


@pytest.mark.parametrize("text", ["穿T恤的男孩", "红色T恤衫", "AA制", "卡拉OK"])
def test_jieba_finds_the_same_words_in_capitals_and_lower_case(text: str):
    assert tokenize(text, "jieba") == tokenize(text.lower(), "jieba")


def test_chinese_words_and_characters_become_the_same_text():
    text = "穿t恤的男孩和2只狗"

    assert detokenize(tokenize(text, "jieba")) == detokenize(tokenize(text, "unicode")) == text


def test_the_error_for_a_missing_rjieba_shows_how_to_install_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "rjieba", None)
    tokenizers._jieba_cut.cache_clear()

    with pytest.raises(ConfigError, match=r"jieba needs rjieba: pip install 'imcap_ray\[chinese\]'"):
        tokenize("狗", "jieba")


def test_seed_tokens_are_words_of_at_least_two_letters():
    assert tokenize("A dog's 2 T-shirts, in the U.S.", "seed") == ["dogs", "tshirts", "in", "the", "us"]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (["the", "dog", "'s", "ball", "is", "n't", "red"], "the dog's ball isn't red"),
        (["'s", "dog"], "'s dog"),
        (["2", "只", "红", "色", "的", "狗", "和", "t", "恤"], "2只红色的狗和t恤"),
        (["t", "シ", "ャ", "ツ", "と", "dj"], "tシャツとdj"),
        (["สุ", "2", "นั", "ข"], "สุ 2 นัข"),
        ([], ""),
    ],
)
def test_detokenized_text_has_normal_punctuation(tokens: list[str], text: str):
    assert detokenize(tokens) == text


def test_the_error_for_an_unknown_tokenizer_lists_the_known_ones():
    with pytest.raises(ConfigError, match="must be one of ptb, unicode, arabic, jieba, seed, got 'moses'"):
        tokenize("a dog", "moses")


def test_importing_loads_neither_nltk_nor_torch_nor_ray():
    code = "import sys, imcap_ray.text.tokenizers; print([m for m in ('nltk', 'torch', 'ray') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert (result.stdout.strip(), result.stderr) == ("[]", "")


CHINESE = "\u4e00\u53ea\u72d7\u5728\u8349\u5730\u4e0a\u8dd1\u3002"
ARABIC = "\u0643\u0644\u0628 \u0623\u0633\u0648\u062f \u0639\u0644\u0649 \u0627\u0644\u0639\u0634\u0628"


@pytest.mark.parametrize(
    ("caption", "tokenizer", "reason"),
    [
        ("A dog runs on the grass", "ptb", "33% of the words are common English ones"),
        ("Ein Hund rennt \u00fcber den Rasen", "unicode", "only 0% of the words are common English ones"),
        (CHINESE, "unicode", "100% of the letters are of scripts without spaces"),
        (ARABIC, "unicode", "100% of the letters are Arabic; words keep their spelling"),
    ],
)
def test_the_tokenizer_is_chosen_by_the_language_of_the_captions(caption: str, tokenizer: str, reason: str):
    chosen, why = choose_tokenizer([caption] * 3)

    assert chosen == tokenizer
    assert why.startswith(reason)


def test_arabic_tokens_have_one_form_of_each_letter_and_no_diacritics():
    caption = (
        "\u0623\u064f\u062e\u0631\u0649 \u0625\u0645\u0631\u0623\u0629\u060c \u062c\u0640\u0645\u064a\u0640\u0644\u064c"
    )

    assert tokenize(caption, "arabic") == [
        "\u0627\u062e\u0631\u064a",
        "\u0627\u0645\u0631\u0627\u0647",
        "\u062c\u0645\u064a\u0644",
    ]


def test_captions_of_right_to_left_words_keep_their_order_and_spaces():
    assert detokenize(tokenize(ARABIC, "unicode")) == ARABIC
