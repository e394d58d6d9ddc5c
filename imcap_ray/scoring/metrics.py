"""Tokens -> corpus BLEU, ROUGE-L and CIDEr-D."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from imcap_ray.errors import DatasetError
from imcap_ray.scoring.cider import Tokens
from imcap_ray.scoring.ngram_statistics import (
    HYPOTHESIS_LENGTH,
    MATCHES,
    MAX_ORDER,
    MEANS,
    REFERENCE_LENGTH,
    TOTALS,
    Corpus,
    SentenceCollector,
)
from imcap_ray.text.tokenizers import tokenize

SEED: Final = "seed"  # name of a tokenizer; its start and end markers count as tokens

SCORE_FORMATS: Final = {
    "bleu_1": ("BLEU-1", 100, ".1f"),
    "bleu_2": ("BLEU-2", 100, ".1f"),
    "bleu_3": ("BLEU-3", 100, ".1f"),
    "bleu_4": ("BLEU-4", 100, ".1f"),
    "rouge_l": ("ROUGE-L", 100, ".1f"),
    "cider_d": ("CIDEr-D", 1, ".3f"),
    "length_ratio": ("length ratio", 1, ".2f"),
}
"""Name in `Scores`: label, factor and format, for people."""

SCORE_NAMES: Final = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d")


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one caption per image against the references."""

    bleu_1: float
    """0 to 1, like all BLEU scores and ROUGE-L."""
    bleu_2: float
    bleu_3: float
    bleu_4: float
    rouge_l: float
    cider_d: float
    """0 to 10, as in coco-caption; on Flickr8k a constant caption scores 0.1 and people score 0.8."""
    num_images: int
    length_ratio: float
    """Tokens of the captions divided by tokens of the references closest in length; below 1, BLEU is penalised."""
    num_distinct_captions: int

    def to_dict(self) -> dict[str, float | int]:
        """The scores by name."""
        return asdict(self)


def score(captions: Mapping[str, str], references: Mapping[str, Sequence[str]], *, tokenizer: str = "ptb") -> Scores:
    """Score captions (image_id to text) against references. Empty captions count.

    Raises:
        DatasetError: the image_ids are not those of the references, or an image has no reference.
    """
    corpus, hypotheses = collect_mappings(captions, references, tokenizer)
    return summarize_rows(corpus.rows(hypotheses, corpus.inverse_frequencies()), corpus, hypotheses)


def corpus_bleu(
    hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]
) -> tuple[float, float, float, float]:
    """BLEU-1 to BLEU-4 of the corpus, 0 to 1, unsmoothed.

    Equal to nltk's `corpus_bleu`, except that a hypothesis of fewer than n tokens has no n-grams, as in coco-caption;
    nltk counts one n-gram that does not match.
    """
    bleu_1, bleu_2, bleu_3, bleu_4 = _bleu(compute_rows(hypotheses, references).sum(axis=0)).tolist()
    return bleu_1, bleu_2, bleu_3, bleu_4


def rouge_l(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[float, list[float]]:
    """Mean and per-image ROUGE-L, 0 to 1. The best precision and the best recall may come from different references."""
    per_image = compute_rows(hypotheses, references)[:, MEANS.start]
    return float(np.mean(per_image)), per_image.tolist()


def cider_d(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> tuple[float, list[float]]:
    """Mean and per-image CIDEr-D, 0 to 10, equal to pycocoevalcap's `Cider`. A single image scores 0."""
    per_image = compute_rows(hypotheses, references)[:, MEANS.start + 1]
    return float(np.mean(per_image)), per_image.tolist()


def scored_tokens(text: str, tokenizer: str) -> list[str]:
    """The tokens of a text that are scored. With the tokenizer `seed` they include markers of the start and the end."""
    tokens = tokenize(text, tokenizer)
    return ["startseq", *tokens, "endseq"] if tokenizer == SEED else tokens


def _require_references(references: Mapping[str, Sequence[str]]) -> None:
    if not references:
        raise DatasetError("there are no references to score against")
    without = [image_id for image_id, texts in references.items() if not texts]
    if without:
        raise DatasetError(f"{len(without)} images have no reference, for example {without[0]!r}")


def require_same_images(captions: Mapping[str, str], references: Mapping[str, Sequence[str]]) -> None:
    """Raise DatasetError unless captions and references are of the same images."""
    _require_references(references)
    uncaptioned = references.keys() - captions.keys()
    unknown = captions.keys() - references.keys()
    if uncaptioned or unknown:
        examples = [
            f"{len(image_ids)} {problem}, for example {min(image_ids)!r}"
            for problem, image_ids in (
                ("images with references have no caption", uncaptioned),
                ("captions have no references", unknown),
            )
            if image_ids
        ]
        raise DatasetError(
            f"captions and references must be of the same images, got {len(captions)} captions and "
            f"{len(references)} images with references: {'; '.join(examples)}"
        )


def collect_mappings(
    captions: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenizer: str
) -> tuple[Corpus, NDArray[np.int64]]:
    """Build the corpus, and return it with the numbers of the captions in it, in the order of the references."""
    require_same_images(captions, references)
    corpus, [hypotheses] = collect_texts(
        references.values(), [(captions[image_id] for image_id in references)], tokenizer
    )
    return corpus, hypotheses


def collect_texts(
    references: Iterable[Sequence[str]], groups: Sequence[Iterable[str]], tokenizer: str
) -> tuple[Corpus, list[NDArray[np.int64]]]:
    """Build the corpus of the references and these groups of texts, and return it with the numbers of each group's."""
    return _collect(
        ([scored_tokens(text, tokenizer) for text in texts] for texts in references),
        [(scored_tokens(text, tokenizer) for text in texts) for texts in groups],
    )


def _collect(
    references: Iterable[Sequence[Tokens]], groups: Sequence[Iterable[Tokens]]
) -> tuple[Corpus, list[NDArray[np.int64]]]:
    """As `collect_texts`, for texts that are tokenized already."""
    collector = SentenceCollector()
    counts = array("q")
    for image_references in references:
        for tokens in image_references:
            collector.add(tokens)
        counts.append(len(image_references))
    ends = [len(collector)]
    for group in groups:
        for tokens in group:
            collector.add(tokens)
        ends.append(len(collector))
    return collector.to_corpus(counts), [np.arange(*pair) for pair in zip(ends, ends[1:], strict=False)]


def compute_rows(hypotheses: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> NDArray[np.float64]:
    """The row of statistics of each image; for the columns see `imcap_ray.scoring.ngram_statistics`."""
    corpus, [numbers] = _collect(references, [hypotheses])
    return corpus.rows(numbers, corpus.inverse_frequencies())


def summarize_rows(rows: NDArray[np.float64], corpus: Corpus, hypotheses: Iterable[int]) -> Scores:
    """Compute the scores of the corpus from each image's row of statistics."""
    sums = rows.sum(axis=0)
    return Scores(
        **dict(zip(SCORE_NAMES, corpus_scores(sums, len(rows)).tolist(), strict=True)),
        num_images=len(rows),
        length_ratio=float(sums[HYPOTHESIS_LENGTH] / max(1.0, sums[REFERENCE_LENGTH])),
        num_distinct_captions=corpus.count_distinct(hypotheses),
    )


def corpus_scores(sums: NDArray[np.float64], num_images: int) -> NDArray[np.float64]:
    """Compute the scores, in the order of `SCORE_NAMES`, from the sum of all rows."""
    return np.concatenate([_bleu(sums), sums[MEANS] / num_images])


def _bleu(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """The brevity penalty times the geometric mean of the precisions of orders 1 to n, for n = 1 to 4."""
    with np.errstate(divide="ignore"):  # log 0 is -inf, and its exp is 0, as it should be
        log_precisions = np.log(sums[MATCHES] / np.maximum(1, sums[TOTALS]))
    log_brevity = min(0.0, 1 - sums[REFERENCE_LENGTH] / max(1, sums[HYPOTHESIS_LENGTH]))
    bleu: NDArray[np.float64] = np.exp(log_brevity + np.cumsum(log_precisions) / np.arange(1, MAX_ORDER + 1))
    return bleu
