"""A training's configuration and scores -> the model card, in Markdown."""

from __future__ import annotations

import shlex

import jinja2

from imcap_ray.config import TrainingRunConfig
from imcap_ray.data.datasets import CaptionedImages
from imcap_ray.models.decoders import find_decoder
from imcap_ray.runs.training_run import EpochMetrics
from imcap_ray.scoring.evaluation_report import HALF
from imcap_ray.text.escaping import markdown, markdown_code, printable
from imcap_ray.text.tokenizers import scoring_tokenizer
from imcap_ray.training.phases import num_epochs

_CARD = """\
# {{ name | text }}

An image captioner trained with imcap_ray: {{ recipe.encoder.name | text }} ({{ recipe.encoder.layer | text }}) and \
{{ decoder }}.

| | |
|---|---|
| trained on | {{ data.format | text }}: {{ num_images | number }} images, {{ num_captions | number }} captions |
| terms of the data | {{ (data.terms or "see the source of the data") | text }} |
| recipe | {{ config.recipe_name | code }}, seed {{ config.seed }} |
{% if config.start_from %}| started from | {{ started_from | text }} |
{% endif %}| kept | epoch {{ metrics.epoch }} of at most {{ num_epochs }}, the best by CIDEr-D on the validation split |
| vocabulary | {{ vocabulary_size | number }} tokens, tokenizer `{{ recipe.vocabulary.tokenizer }}` |
| CNN weights | {{ encoder_weights | text }} |
| image | resized to {{ size }} x {{ size }} pixels without keeping its proportions |
| search | beam size {{ recipe.search.beam_size }}, length penalty {{ recipe.search.length_penalty }} |

## Scores on the validation split

{{ metrics.num_images }} images. The epoch was chosen on these images, so scores on other images will be a little lower.

| BLEU-1 | BLEU-2 | BLEU-3 | BLEU-4 | ROUGE-L | CIDEr-D |
|---|---|---|---|---|---|
|{% for name in percent %} {{ "%.1f" | format(100 * metrics[name]) }} |{% endfor -%}
{{ " %.3f" | format(metrics.cider_d) }} |

The {{ "%.0f" | format(100 * half) }} % most confident captions (confidence \
{{ "%.3f" | format(metrics.half_min_confidence) }} or more) have a CIDEr-D of \
{{ "%.3f" | format(metrics.half_cider_d) }}.

Protocol: corpus BLEU with the closest reference length and no smoothing, ROUGE-L and CIDEr-D as defined by
coco-caption, all references, tokens of `{{ protocol_tokenizer }}`. The scores were computed by `imcap train` with
float32 weights of the decoder, or of its moving average. `imcap evaluate` scores any captions in the same way.

## Known limitations

The captioner can only describe what its training captions describe. For other photographs it describes the most similar
thing it knows, with a confidence that is lower but may look normal. Their `familiarity` gives most of them away, if the
model has it (`imcap model`): below 0.05, an image is unlike the training images. The captioner repeats the habits of
its training captions, such as guessing people's sex and age from their clothes. It cannot count reliably or read text.
Do not use it where a wrong caption does harm.

## Train it again

    imcap train {{ data_name | word }} {{ name | word }} --recipe {{ config.recipe_name | word }} --seed {{ config.seed
    }}
{%- for model in config.start_from %} --start-from {{ model | word }}{% endfor %}
{%- for option in config.recipe_options %} --set {{ option | word }}{% endfor %}
"""


def write_card(
    config: TrainingRunConfig,
    data: CaptionedImages,
    *,
    name: str,
    num_images: int,
    num_captions: int,
    vocabulary_size: int,
    encoder_weights: str,
    metrics: EpochMetrics,
) -> str:
    """Write the card of a model folder.

    Args:
        num_images: readable images of the training split.
        num_captions: their captions.
        encoder_weights: where the CNN's weights come from.
        metrics: those of the epoch that was kept.
    """
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {
        "text": markdown,
        "code": markdown_code,
        "word": lambda text: printable(shlex.quote(text)),
        "number": "{:,}".format,
    }
    recipe, start_from = config.recipe, config.start_from
    card: str = environment.from_string(_CARD).render(
        config=config,
        recipe=recipe,
        data=data,
        name=name,
        data_name=data.location.rstrip("/").rpartition("/")[2],
        num_images=num_images,
        num_captions=num_captions,
        started_from="the average of " * (len(start_from) > 1) + " and ".join(start_from),
        decoder=find_decoder(recipe.decoder).description,
        num_epochs=num_epochs(recipe),
        size=recipe.preprocessing.image_size,
        vocabulary_size=vocabulary_size,
        encoder_weights=encoder_weights,
        metrics=metrics,
        half=HALF,
        percent=("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"),
        protocol_tokenizer=scoring_tokenizer(recipe.vocabulary.tokenizer),
    )
    return card
