"""A training's settings and scores -> the model card, in Markdown."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from imcap_ray.config import Recipe, to_mapping
from imcap_ray.models.decoders import find_decoder
from imcap_ray.scoring.evaluation_report import HALF
from imcap_ray.text.escaping import markdown, markdown_code, printable
from imcap_ray.text.tokenizers import scoring_tokenizer
from imcap_ray.training.phases import num_epochs

_CARD = """\
# {{ name | text }}

An image captioner of imcap_ray: {{ recipe.encoder.name | text }} ({{ recipe.encoder.layer | text }}) and {{ decoder }}.

| | |
|---|---|
| trained on | {{ data_format | text }}: {{ num_images | number }} images, {{ num_captions | number }} captions |
| data | {{ (data_terms or "see where they came from") | text }} |
| recipe | {{ recipe_name | code }}, seed {{ seed }} |
{% if start_from %}| started from | {{ started_from | text }} |
{% endif %}| kept | epoch {{ metrics.epoch }} of {{ num_epochs }} at most, the best CIDEr-D on the validation split |
| vocabulary | {{ vocabulary_size | number }} tokens, tokenizer `{{ recipe.vocabulary.tokenizer }}` |
| CNN weights | {{ encoder_weights | text }} |
| image | squashed to {{ recipe.preprocessing.image_size }} x {{ recipe.preprocessing.image_size }} pixels |
| search | beam {{ recipe.search.beam_size }}, length penalty {{ recipe.search.length_penalty }} |

## Scores on the validation split

{{ metrics.num_images }} images; the epoch was chosen on these same images, so expect a little less on others.

| BLEU-1 | BLEU-2 | BLEU-3 | BLEU-4 | ROUGE-L | CIDEr-D |
|---|---|---|---|---|---|
|{% for name in percent %} {{ "%.1f" | format(100 * metrics[name]) }} |{% endfor -%}
{{ " %.3f" | format(metrics.cider_d) }} |

The {{ "%.0f" | format(100 * half) }} % most confident captions, those of confidence
{{ "%.3f" | format(metrics.half_min_confidence) }} and more, have CIDEr-D {{ "%.3f" | format(metrics.half_cider_d) }}.

Protocol: corpus BLEU with the closest reference length and no smoothing, ROUGE-L and CIDEr-D as coco-caption defines
them, all references, `{{ protocol_tokenizer }}` tokens; computed by `imcap train` with the moving average's or the
decoder's float32 weights. `imcap evaluate` scores any captions again.

## Limits

The captioner says what its training captions say. On photographs unlike those it will describe the nearest thing
it knows, with a confidence that is lower but not zero; it repeats the habits of its captions, among them guesses of
people's sex and age from clothes, and it cannot count far or read text. Do not use it where a wrong caption harms.

## Train it again

    imcap train {{ data | word }} {{ name | word }} --recipe {{ recipe_name | word }} --seed {{ seed }}
{%- for model in start_from %} --start-from {{ model | word }}{% endfor %}
{%- for option in recipe_options %} --set {{ option | word }}{% endfor %}
"""


def write_card(
    *,
    name: str,
    recipe: Recipe,
    recipe_name: str,
    recipe_options: Sequence[str] = (),
    start_from: Sequence[str] = (),
    seed: int,
    data: str,
    data_format: str,
    data_terms: str,
    num_images: int,
    num_captions: int,
    vocabulary_size: int,
    encoder_weights: str,
    metrics: Mapping[str, Any],
) -> str:
    """The card of a model folder; `metrics` are those of the epoch that was kept, `recipe_options` those of `--set`."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    environment.filters |= {
        "text": markdown,
        "code": markdown_code,
        "word": lambda text: printable(shlex.quote(text)),
        "number": "{:,}".format,
    }
    card: str = environment.from_string(_CARD).render(
        name=name,
        recipe=to_mapping(recipe),
        num_epochs=num_epochs(recipe),
        half=HALF,
        recipe_name=recipe_name,
        recipe_options=recipe_options,
        start_from=start_from,
        started_from="the mean of " * (len(start_from) > 1) + " and ".join(start_from),
        decoder=find_decoder(recipe.decoder).description,
        seed=seed,
        data=data,
        data_format=data_format,
        data_terms=data_terms,
        num_images=num_images,
        num_captions=num_captions,
        vocabulary_size=vocabulary_size,
        encoder_weights=encoder_weights,
        metrics=metrics,
        percent=("bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"),
        protocol_tokenizer=scoring_tokenizer(recipe.vocabulary.tokenizer),
    )
    return card
