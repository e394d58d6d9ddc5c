import json
import math
import random
import subprocess
import sys
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.bleu_score import corpus_bleu as nltk_corpus_bleu
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.rouge.rouge import Rouge

from imcap_ray.errors import DatasetError
from imcap_ray.scoring import metrics, ngram_statistics
from imcap_ray.scoring.cider import CiderD, DocumentFrequencies
from imcap_ray.scoring.evaluation_report import SEED_NOTE, EvaluationReport, evaluate
from imcap_ray.scoring.metrics import Scores, cider_d, corpus_bleu, rouge_l, score, scored_tokens
from imcap_ray.text.tokenizers import tokenize
from tests import slow_scores

WHO = ["a dog", "a brown dog", "two dogs", "a man", "a man in a red shirt", "a little girl", "two children"]
DOES = [
    "runs",
    "is running",
    "jumps",
    "plays with a ball",
    "stands",
    "is standing and looks at a dog",
    "sits",
]
WHERE = [
    "through the grass",
    "in the snow",
    "on a street",
    "on the beach",
    "near the water",
    "in a field",
    "",
]


def make_references(num_images: int, references_per_image: int = 5, seed: int = 0) -> dict[str, list[str]]:
    """Return sentences, of which those about the same scene share two of three parts with most others."""
    generator = random.Random(seed)

    def reference(scene: list[str]) -> str:
        parts = [
            part if generator.random() < 0.7 else generator.choice(parts)
            for part, parts in zip(scene, (WHO, DOES, WHERE), strict=True)
        ]
        return f"{' '.join(parts).capitalize()} .".replace("  ", " ")

    references = {}
    for image in range(num_images):
        scene = [generator.choice(parts) for parts in (WHO, DOES, WHERE)]
        references[f"image-{image}.jpg"] = [reference(scene) for _ in range(references_per_image)]
    return references


def to_tokens(references: Mapping[str, Sequence[str]]) -> list[list[list[str]]]:
    return [[tokenize(text) for text in texts] for texts in references.values()]


def in_coco_form(hypotheses: list[list[str]], references: list[list[list[str]]]) -> tuple[dict, dict]:
    """Return references and hypotheses in the order of the coco-caption scorers."""
    return (
        {index: [" ".join(reference) for reference in image] for index, image in enumerate(references)},
        {index: [" ".join(hypothesis)] for index, hypothesis in enumerate(hypotheses)},
    )


@pytest.fixture(params=["plain", "with empty and short hypotheses", "single references"])
def corpus(request: pytest.FixtureRequest) -> tuple[list[list[str]], list[list[list[str]]]]:
    images = to_tokens(make_references(60))
    hypotheses = [references[0] for references in images]
    references = [references[1:] for references in images]
    if request.param == "with empty and short hypotheses":
        hypotheses[3], hypotheses[4], hypotheses[5] = [], ["dog"], ["a", "dog"]
    if request.param == "single references":
        references = [image_references[:1] for image_references in references]
    return hypotheses, references


def test_bleu_equals_that_of_coco_caption(corpus):
    expected, _ = Bleu(4).compute_score(*in_coco_form(*corpus), verbose=0)

    assert corpus_bleu(*corpus) == pytest.approx(expected, abs=1e-6)


def test_rouge_l_equals_that_of_coco_caption(corpus):
    expected_mean, expected = Rouge().compute_score(*in_coco_form(*corpus))

    mean, per_image = rouge_l(*corpus)

    assert mean == pytest.approx(expected_mean, abs=1e-9)
    assert per_image == pytest.approx(list(expected), abs=1e-9)


def test_cider_d_equals_that_of_coco_caption(corpus):
    hypotheses, references = corpus
    expected_mean, expected = Cider().compute_score(*in_coco_form(*corpus))

    mean, per_image = cider_d(hypotheses, references)

    assert mean == pytest.approx(expected_mean, abs=1e-9)
    assert per_image == pytest.approx(list(expected), abs=1e-9)
    one_by_one = CiderD(references)
    assert [one_by_one.score(index, hypothesis) for index, hypothesis in enumerate(hypotheses)] == pytest.approx(
        list(expected), abs=1e-9
    )


def test_bleu_equals_that_of_nltk_which_takes_the_references_first():
    images = to_tokens(make_references(60))
    hypotheses = [[*references[0], "near", "by"] for references in images]  # none is shorter than four tokens
    references = [references[1:] for references in images]

    weights = [(1 / order,) * order for order in (1, 2, 3, 4)]
    expected = nltk_corpus_bleu(references, hypotheses, weights=weights)

    assert corpus_bleu(hypotheses, references) == pytest.approx(expected, abs=1e-12)


def test_bleu_and_rouge_l_computed_by_hand():
    hypothesis = ["a", "dog", "runs"]
    reference = ["a", "brown", "dog", "runs", "fast"]

    bleu_1, bleu_2, bleu_3, bleu_4 = corpus_bleu([hypothesis], [[reference]])
    mean, _ = rouge_l([hypothesis], [[reference]])

    brevity_penalty = math.exp(1 - 5 / 3)
    assert bleu_1 == pytest.approx(brevity_penalty)  # 3 of 3 words
    assert bleu_2 == pytest.approx(brevity_penalty * math.sqrt(1 * 1 / 2))  # "dog runs", not "a dog"
    assert (bleu_3, bleu_4) == (0.0, 0.0)
    precision, recall = 3 / 3, 3 / 5
    assert mean == pytest.approx((1 + 1.44) * precision * recall / (recall + 1.44 * precision))


def test_the_closest_reference_length_is_the_shorter_one_in_a_tie():
    two, four = ["a", "dog"], ["a", "dog", "runs", "fast"]

    assert corpus_bleu([["a", "dog", "runs"]], [[four, two]])[0] == 1.0


def test_rouge_l_takes_the_best_precision_and_the_best_recall_of_different_references():
    short, long = ["dog"], ["a", "big", "dog", "runs", "by"]

    mean, _ = rouge_l([["dog", "runs"]], [[short, long]])

    assert mean == 1.0  # the recall of the short one, the precision of the long one


def test_cider_d_of_one_shared_rare_word_computed_by_hand():
    references = [[["dog"]], [["cat"]]]

    # Of the four orders the unigrams agree exactly and the others do not exist.
    assert cider_d([["dog"], ["dog"]], references)[1] == pytest.approx([10 / 4, 0.0])
    assert CiderD(references).score(0, ["dog"]) == pytest.approx(10 / 4)


def test_cider_d_does_not_reward_a_repeated_word():
    of_images = CiderD(to_tokens(make_references(20)))

    once, twice = of_images.score(0, ["a", "dog"]), of_images.score(0, ["a", "dog", "dog", "dog"])

    assert twice < once


def test_cider_d_accepts_document_frequencies_of_another_corpus():
    training = to_tokens(make_references(100, seed=1))
    references = to_tokens(make_references(20))
    frequencies = DocumentFrequencies.of(training)

    # A batch of the training split is scored as in the complete split, for any batch.
    of_the_split = CiderD(training)
    of_a_batch = CiderD(training[30:40], frequencies)

    hypothesis = references[0][0]
    assert of_a_batch.score(5, hypothesis) == of_the_split.score(35, hypothesis)
    assert of_a_batch.score(5, hypothesis) != CiderD(training[30:40]).score(5, hypothesis)


def judged(report: EvaluationReport, references: Mapping[str, Sequence[str]], captions: Mapping[str, str]) -> None:
    """Check that the report equals the reference implementation."""
    tokens = to_tokens(references)
    hypotheses = [tokenize(captions[image_id]) for image_id in references]
    rows = slow_scores.image_rows(hypotheses, tokens)
    columns = list(report.image_scores.values())[1:]
    assert np.column_stack([*columns[2:10], columns[6], columns[10], columns[1], columns[0]]) == pytest.approx(
        rows, abs=1e-9
    )
    assert values_of(report.scores) == pytest.approx(slow_scores.corpus_scores(rows), abs=1e-9)
    for name, interval in slow_scores.intervals(rows).items():
        assert report.intervals[name] == pytest.approx(interval, abs=1e-9)
    floor_tokens, floor = slow_scores.floor(tokens)
    assert tuple(tokenize(report.floor_caption)) == floor_tokens
    assert values_of(report.floor) == pytest.approx(floor, abs=1e-9)
    if report.human is not None:
        assert values_of(report.human) == pytest.approx(slow_scores.human(tokens), abs=1e-9)


def values_of(scores: Scores) -> dict[str, float]:
    return {name: getattr(scores, name) for name in slow_scores.NAMES}


@pytest.mark.parametrize(("references_per_slice", "positions_per_slice"), [(3, 7), (40_000, 4_000_000)])
def test_every_number_of_a_report_equals_the_reference_implementation(
    references_per_slice: int, positions_per_slice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ngram_statistics, "REFERENCES_PER_SLICE", references_per_slice)
    monkeypatch.setattr(ngram_statistics, "POSITIONS_PER_SLICE", positions_per_slice)
    references = make_references(60)
    for number, image_id in enumerate(references):  # one to five references, some without a word, some long
        references[image_id] = references[image_id][: 1 + number % 5]
    references["image-7.jpg"] = [" .", "a dog " * 40]
    captions = {image_id: f"{references[f'image-{(i // 2) * 2}.jpg'][0]} dog" for i, image_id in enumerate(references)}
    captions |= {"image-3.jpg": "", "image-4.jpg": "zebra", "image-7.jpg": "a dog and " * 30}
    # As many tokens as there are bits in a word, and one more.
    captions |= {"image-8.jpg": "a dog in snow " * 16, "image-9.jpg": "a dog in snow " * 16 + "runs"}
    others = {image_id: texts[-1] for image_id, texts in references.items()}

    report = evaluate(captions, references, against=("others", others))

    judged(report, references, captions)
    tokens = to_tokens(references)
    rows, other_rows = (
        slow_scores.image_rows([tokenize(texts[image_id]) for image_id in references], tokens)
        for texts in (captions, others)
    )
    assert report.comparison is not None
    for name, interval in slow_scores.intervals(rows, other_rows).items():
        assert report.comparison.intervals[name] == pytest.approx(interval, abs=1e-9)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(*[st.lists(st.sampled_from("abc"), max_size=8)] * 3), min_size=1, max_size=5))
def test_the_rows_of_any_sentences_equal_the_reference_implementation(images: list[tuple[list[str], ...]]) -> None:
    hypotheses, references = [image[0] for image in images], [image[1:] for image in images]

    rows = metrics.compute_rows(hypotheses, references)

    assert rows == pytest.approx(slow_scores.image_rows(hypotheses, references), abs=1e-9)


def test_the_only_reference_repeated_is_a_perfect_caption():
    references = make_references(30, references_per_image=1)
    captions = {image_id: texts[0].upper() for image_id, texts in references.items()}  # case is not scored

    scores = score(captions, references)

    assert (scores.bleu_1, scores.bleu_4, scores.rouge_l) == pytest.approx((1, 1, 1))
    assert scores.length_ratio == 1.0
    assert 5 < scores.cider_d <= 10


def test_references_as_captions_score_worse_than_captions_as_references():
    long = {"a": "a dog runs through the tall grass", "b": "two men stand on a street"}
    short = {"a": "a dog runs", "b": "two men"}

    brief = score(short, {image_id: [text] for image_id, text in long.items()})
    wordy = score(long, {image_id: [text] for image_id, text in short.items()})

    assert (brief.length_ratio, wordy.length_ratio) == pytest.approx((5 / 13, 13 / 5))
    assert brief.bleu_1 == pytest.approx(math.exp(1 - 13 / 5))  # nothing wrong, but too short
    assert wordy.bleu_1 == pytest.approx(5 / 13)  # too long


def test_an_empty_caption_is_scored_and_not_skipped():
    references = make_references(10)
    captions = {image_id: texts[0] for image_id, texts in references.items()}
    complete = score(captions, references)

    scores = score({**captions, "image-3.jpg": " ."}, references)

    assert scores.num_images == 10
    assert scores.rouge_l < complete.rouge_l
    assert scores.bleu_1 < complete.bleu_1  # through the brevity penalty


def test_captions_that_are_all_empty_score_zero():
    references = make_references(10)

    scores = score(dict.fromkeys(references, ""), references)

    assert scores.to_dict() == {
        **dict.fromkeys(["bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l", "cider_d", "length_ratio"], 0.0),
        "num_images": 10,
        "num_distinct_captions": 1,
    }


def test_the_order_of_the_images_does_not_matter():
    references = make_references(20)
    captions = {image_id: texts[1] for image_id, texts in references.items()}
    reversed_captions = dict(reversed(captions.items()))

    assert score(reversed_captions, references) == score(captions, references)


def test_missing_and_unknown_images_are_counted_and_named():
    references = make_references(4)
    captions = {"image-0.jpg": "a dog", "image-1.jpg": "a dog", "other.jpg": "a dog"}

    with pytest.raises(DatasetError) as raised:
        score(captions, references)

    assert "2 images with references have no caption, for example 'image-2.jpg'" in str(raised.value)
    assert "1 captions have no references, for example 'other.jpg'" in str(raised.value)


def test_an_image_without_references_is_refused():
    with pytest.raises(DatasetError, match="1 images have no reference, for example 'a.jpg'"):
        score({"a.jpg": "a dog"}, {"a.jpg": []})
    with pytest.raises(DatasetError, match="no references"):
        score({}, {})


def test_the_constant_caption_baseline_is_the_best_of_all_constant_captions():
    references = make_references(40)
    tokens = to_tokens(references)
    constants = [reference for image in tokens for reference in image]

    report = evaluate({image_id: texts[0] for image_id, texts in references.items()}, references)
    caption, scores = report.floor_caption, report.floor

    assert scores.cider_d == pytest.approx(max(cider_d([one] * 40, tokens)[0] for one in constants))
    assert scores == score(dict.fromkeys(references, caption), references)
    assert scores.num_distinct_captions == 1


def test_human_agreement_is_the_mean_over_annotators():
    references = make_references(20, references_per_image=3)
    one_out = [
        score(
            {image_id: texts[annotator] for image_id, texts in references.items()},
            {image_id: texts[:annotator] + texts[annotator + 1 :] for image_id, texts in references.items()},
        )
        for annotator in range(3)
    ]

    human = human_line(references)

    for name in ("bleu_1", "bleu_4", "rouge_l", "cider_d", "length_ratio"):
        assert getattr(human, name) == pytest.approx(sum(getattr(scores, name) for scores in one_out) / 3)


def test_human_agreement_uses_only_images_with_two_references():
    references = make_references(20)

    assert human_line({**references, "lonely.jpg": ["A dog ."]}) == human_line(references)
    assert evaluate({"lonely.jpg": "A dog"}, {"lonely.jpg": ["A dog ."]}).human is None


def test_annotators_are_weighted_by_their_number_of_images():
    references = make_references(60)
    before = human_line(references)

    after = human_line(references | {"image-0.jpg": [*references["image-0.jpg"], "A dog runs ."]})

    assert after.cider_d == pytest.approx(before.cider_d, rel=0.02)


def human_line(references: Mapping[str, Sequence[str]]) -> Scores:
    human = evaluate({image_id: texts[0] for image_id, texts in references.items()}, references).human
    assert human is not None
    return human


def test_a_report_contains_what_its_parts_compute():
    references = make_references(30)
    captions = {image_id: texts[0] for image_id, texts in references.items()}

    report = evaluate(captions, references, split="validation", notes="beam 4")

    assert report.scores == score(captions, references)
    assert report.floor == score(dict.fromkeys(references, report.floor_caption), references)
    assert report.protocol.references_per_image == (5, 5)
    assert (report.protocol.split, report.protocol.num_images) == ("validation", 30)


def test_intervals_contain_the_scores_and_are_deterministic():
    references = make_references(60)
    captions = {image_id: references[f"image-{(i // 2) * 2}.jpg"][0] for i, image_id in enumerate(references)}

    report = evaluate(captions, references)

    for name, (low, high) in report.intervals.items():
        assert low < report.scores.to_dict()[name] < high
    assert evaluate(captions, references).intervals == report.intervals


def test_captions_compared_with_themselves_do_not_differ():
    references = make_references(30)
    captions = {image_id: texts[0] for image_id, texts in references.items()}

    comparison = evaluate(captions, references, against=("the same", captions)).comparison

    assert comparison.scores == score(captions, references)
    assert set(comparison.differences.values()) == {0.0}
    assert set(comparison.intervals.values()) == {(0.0, 0.0)}


def test_a_difference_is_resampled_on_the_same_images_and_changes_sign_when_swapped():
    references = make_references(60)
    good = {image_id: texts[0] for image_id, texts in references.items()}
    # The same captions except for every tenth image: each varies much more than their difference.
    worse = {image_id: text if i % 10 else "a bird" for i, (image_id, text) in enumerate(good.items())}

    report = evaluate(good, references, against=("worse", worse))
    reverse = evaluate(worse, references, against=("good", good)).comparison

    comparison = report.comparison
    for name, difference in comparison.differences.items():
        low, high = comparison.intervals[name]
        assert difference == pytest.approx(getattr(report.scores, name) - getattr(comparison.scores, name))
        assert low < difference < high
        assert reverse.differences[name] == pytest.approx(-difference)
        assert reverse.intervals[name] == pytest.approx((-high, -low))
    low, high = comparison.intervals["cider_d"]
    assert low > 0, "more than the choice of images"
    own_low, own_high = report.intervals["cider_d"]
    assert high - low < own_high - own_low
    assert f"| difference | +{100 * comparison.differences['bleu_1']:.1f} |" in report.to_markdown()
    assert json.loads(report.to_json())["comparison"]["name"] == "worse"


def test_the_corpus_scores_follow_from_the_scores_of_the_images():
    references = make_references(30)
    captions = {image_id: f"{texts[0]} and a dog" for image_id, texts in references.items()}

    report = evaluate(captions, references)

    columns = report.image_scores
    assert columns["image_id"] == list(references)
    assert sum(columns["cider_d"]) / 30 == pytest.approx(report.scores.cider_d)
    assert sum(columns["rouge_l"]) / 30 == pytest.approx(report.scores.rouge_l)
    precisions = [sum(columns[f"matched_{n}"]) / sum(columns[f"num_{n}"]) for n in (1, 2)]
    brevity = min(1.0, math.exp(1 - sum(columns["reference_length"]) / sum(columns["num_1"])))
    assert brevity * math.prod(precisions) ** 0.5 == pytest.approx(report.scores.bleu_2)
    assert "image_scores" not in json.loads(report.to_json())


def test_a_report_is_available_as_json_markdown_and_text():
    references = make_references(30)
    captions = {image_id: texts[0] for image_id, texts in references.items()}
    report = evaluate(captions, references, split="validation", notes="beam 4")

    as_json = json.loads(report.to_json())
    assert as_json["scores"] == report.scores.to_dict()
    assert as_json["protocol"]["tokenizer"] == "ptb"
    assert as_json["floor_caption"] == report.floor_caption

    *percentages, cider_d = list(report.scores.to_dict().values())[:6]
    model_row = [f"{100 * value:.1f}" for value in percentages]
    model_row += [f"{cider_d:.3f}", f"{report.scores.length_ratio:.2f}"]
    assert f"| this model | {' | '.join(model_row)} |" in report.to_markdown().splitlines()
    assert ["this", "model", *model_row] in [line.split() for line in report.to_text().splitlines()]
    for text in (report.to_markdown(), report.to_text()):
        assert "30 images (validation)" in text
        assert "best constant caption" in text
        assert "human, leave one out" in text
        assert "beam 4" in text


def test_a_report_on_single_references_has_no_human_agreement():
    references = make_references(10, references_per_image=1)
    captions = {image_id: texts[0] for image_id, texts in references.items()}

    report = evaluate(captions, references)

    assert report.human is None
    assert "human" not in report.to_markdown()
    assert json.loads(report.to_json())["human"] is None


def test_importing_loads_neither_nltk_nor_torch_nor_ray():
    code = "import sys, imcap_ray.scoring.metrics; print([m for m in ('nltk', 'torch', 'ray') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert (result.stdout.strip(), result.stderr) == ("[]", "")


def test_the_seed_protocol_counts_its_markers_and_has_a_note() -> None:
    references = {"1": ["A man in a blue shirt .", "The man stands"], "2": ["Two dogs run", "A dog is running"]}
    constant = dict.fromkeys(references, "the bird flies")

    by_seed = evaluate(constant, references, tokenizer="seed")

    assert scored_tokens("A man, 2 dogs's", "seed") == ["startseq", "man", "dogss", "endseq"]
    assert by_seed.scores.bleu_1 == pytest.approx(0.5)  # of five tokens the markers are always right, and once "the"
    assert evaluate(constant, references).scores.bleu_1 == pytest.approx(1 / 6)  # "the", once
    assert SEED_NOTE in by_seed.to_text()
    assert "markers" not in evaluate(constant, references).to_text()
