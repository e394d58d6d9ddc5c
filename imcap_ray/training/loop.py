"""The training loop of one process: batches, an epoch, validation captions and their scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from imcap_ray.config import Recipe
from imcap_ray.errors import ConfigError
from imcap_ray.models.caption import Caption
from imcap_ray.models.captioner import search_captions
from imcap_ray.models.decoders import Decoder
from imcap_ray.models.encoders import Encoder
from imcap_ray.scoring.evaluation_report import HALF, confidence_curve
from imcap_ray.scoring.metrics import score
from imcap_ray.text.vocabulary import Vocabulary
from imcap_ray.training.batches import CaptionBatch, augmentation, make_batch
from imcap_ray.training.optimization import EndToEnd, Optimization, prefers_bfloat16
from imcap_ray.training.phases import SELF_CRITICAL, kind_of, reads_pixels
from imcap_ray.training.rewards import CaptionReward, advantages_of, draw_captions

STEPS_BETWEEN_CHECKS: Final = 50
"""The workers ask each other so often whether a loss is not finite; each time they wait for the device."""

BatchMaker = Callable[[Tensor, list[str]], tuple[CaptionBatch, dict[str, float]]]
"""What was read of images, and their ids -> the batch of a step, and numbers to be averaged over an epoch."""


def unfreeze(encoder: Encoder, first_layer: str) -> None:
    """Let the CNN be trained from this layer on, but for the filters of its depthwise convolutions, and for layers that
    its features do not depend on.

    Those are 5 % of EfficientNet-lite2's weights, and the slowest gradients on a CPU: 38 ms an image forward and
    backward with them, 23 without, from `cnn.blocks.3` on (torch 2.14, two cores, AVX512-BF16).

    Raises:
        ConfigError: it has no such layer.
    """
    require_layer(encoder, first_layer)
    is_reached = False
    for name, parameter in encoder.cnn.named_parameters():
        is_reached = is_reached or name.startswith(first_layer)
        parameter.requires_grad_(is_reached)
    for module in encoder.cnn.modules():
        if isinstance(module, torch.nn.Conv2d) and module.groups == module.in_channels > 1:
            module.weight.requires_grad_(False)
    for parameter in _without_gradient(encoder):
        parameter.requires_grad_(False)


def require_layer(encoder: Encoder, first_layer: str) -> None:
    """Raise ConfigError unless the CNN has a layer of this name."""
    layers = [name for name, _ in encoder.cnn.named_parameters()]
    if not any(name.startswith(first_layer) for name in layers):
        names = dict.fromkeys(".".join(name.split(".")[:3]) for name in layers)
        raise ConfigError(f"finetune.first_layer {first_layer!r} is none of the CNN's: {', '.join(names)}")


def _without_gradient(encoder: Encoder) -> list[torch.nn.Parameter]:
    """Those of the parameters to be trained on which the features do not depend, such as the layers of a timm CNN
    behind its last feature map. Workers that exchange gradients would wait for theirs."""
    parameters = [parameter for parameter in encoder.cnn.parameters() if parameter.requires_grad]
    if not parameters:
        return []
    blank = torch.zeros(1, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8, device=encoder.mean.device)
    with torch.enable_grad():
        gradients = torch.autograd.grad(encoder(blank).sum(), parameters, allow_unused=True)
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is None]


def batch_maker(
    phase: str,
    recipe: Recipe,
    vocabulary: Vocabulary,
    captions: Mapping[str, list[str]],
    optimization: Optimization,
    encoder: Encoder,
    device: torch.device,
) -> BatchMaker:
    """What a phase learns from the images of a step."""
    settings = recipe.training
    view: Callable[[Tensor], Tensor] = _draw_view
    if reads_pixels(phase):
        augment = augmentation(encoder.image_size, min_crop_area=recipe.finetune.min_crop_area)

        def view(pixels: Tensor) -> Tensor:
            return augment(pixels.to(device))

    if kind_of(phase) != SELF_CRITICAL:
        ids = {id_: vocabulary_ids(vocabulary, texts, settings.max_caption_length) for id_, texts in captions.items()}
        return lambda inputs, image_ids: (make_batch(view(inputs), [ids[id_] for id_ in image_ids], device), {})

    reward = CaptionReward(captions, vocabulary, bleu_weight=recipe.self_critical.bleu_weight)

    def draw(inputs: Tensor, image_ids: list[str]) -> tuple[CaptionBatch, dict[str, float]]:
        with torch.autocast(device.type, torch.bfloat16, enabled=prefers_bfloat16(device)):
            features = encode_images(encoder, view(inputs))
        drawn = draw_captions(
            decoder_of(optimization.trained),
            features.float(),
            num_samples=recipe.self_critical.num_samples,
            max_length=settings.max_caption_length,
            temperature=recipe.self_critical.temperature,
        )
        rewards = [
            [reward(image_id, ids) for ids in of_image] for image_id, of_image in zip(image_ids, drawn, strict=True)
        ]
        batch = make_batch(features, drawn, device, advantages=advantages_of(rewards))
        return batch, {"train_reward": float(np.mean(rewards))}

    return draw


@torch.no_grad()
def encode_images(encoder: Encoder, pixels: Tensor) -> Tensor:
    """Float16 features (I, R, F) as a cache has them."""
    features: Tensor = encoder(pixels)
    return features.half()


def vocabulary_ids(vocabulary: Vocabulary, captions: list[str], max_length: int) -> list[list[int]]:
    """The captions of an image as token ids from start to end."""
    return [vocabulary.to_ids(caption, max_length=max_length) for caption in captions]


def _draw_view(views: Tensor) -> Tensor:
    """Features (I, views, R, F) -> (I, R, F), one of the views of each image."""
    return views[torch.arange(len(views)), torch.randint(views.shape[1], (len(views),))]


class LearningState(NamedTuple):
    """What came of one pass over a worker's images."""

    averages: dict[str, float]
    """The mean cross-entropy of a token, in nats, other means over images, and the seconds it took."""
    num_images: int
    bad_step: int
    """The first step, from 1, whose loss is not finite on some worker, after which the pass ends early; 0: none is."""


def run_epoch(
    optimization: Optimization,
    make: BatchMaker,
    batches: Iterator[tuple[Tensor, list[str]]],
    first_of: Callable[[int], int],
) -> LearningState:
    """One pass over this worker's images.

    Args:
        first_of: called with this worker's first bad step, or 0; returns the first of all workers.
    """
    start = time.time()
    loss_sum, num_tokens, num_images = torch.zeros((), dtype=torch.float64), 0, 0
    sums: dict[str, float] = {}
    bad_step = torch.zeros((), dtype=torch.long)  # on the device: to look at each step's loss would be to wait for it
    for step, (inputs, image_ids) in enumerate(batches, start=1):
        batch, numbers = make(inputs, image_ids)
        loss, count = optimization.step(batch)
        bad_step = bad_step.to(loss.device)
        bad_step = torch.where(~torch.isfinite(optimization.loss) & (bad_step == 0), step, bad_step)
        if step % STEPS_BETWEEN_CHECKS == 0 and first_of(int(bad_step)):
            break
        loss_sum = loss_sum.to(loss.device) + loss
        num_tokens, num_images = num_tokens + count, num_images + len(image_ids)
        for name, value in numbers.items():
            sums[name] = sums.get(name, 0.0) + value * len(image_ids)
    means = {name: value / max(1, num_images) for name, value in sums.items()}
    averages = {"train_loss": float(loss_sum) / max(1, num_tokens), **means, "train_seconds": time.time() - start}
    return LearningState(averages, num_images, first_of(int(bad_step)))


@torch.inference_mode()
def caption_split(
    kept: torch.nn.Module,
    vocabulary: Vocabulary,
    batches: list[tuple[Tensor, list[str]]],
    recipe: Recipe,
    device: torch.device,
) -> dict[str, Caption]:
    """The best caption of each image; none where what is computed for it is not finite."""
    kept.eval()
    captions = {}
    for inputs, image_ids in batches:
        inputs = inputs.to(device)
        features = kept.encoder(inputs) if isinstance(kept, EndToEnd) else inputs[:, 0].float()
        found = search_captions(decoder_of(kept), vocabulary, features, recipe.search)
        captions.update({image_id: best[0] for image_id, best in zip(image_ids, found, strict=True) if best})
    return captions


def decoder_of(module: torch.nn.Module) -> Decoder:
    """The decoder of what is trained or kept."""
    decoder = module.decoder if isinstance(module, EndToEnd) else module
    assert isinstance(decoder, Decoder)
    return decoder


def score_captions(
    captions: Mapping[str, Caption], references: Mapping[str, Sequence[str]], tokenizer: str
) -> dict[str, Any]:
    """Validation scores of captions: BLEU, ROUGE-L, CIDEr-D, and CIDEr-D of the more confident half."""
    texts = {image_id: caption.text for image_id, caption in captions.items()}
    confidences = {image_id: caption.confidence for image_id, caption in captions.items()}
    curve = confidence_curve(texts, references, confidences, tokenizer=tokenizer)
    half = next(point for point in curve if point.share == HALF)
    return {
        **score(texts, references, tokenizer=tokenizer).to_dict(),
        "half_cider_d": half.cider_d,
        "half_min_confidence": half.min_confidence,
    }
