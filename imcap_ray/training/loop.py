"""The training loop of one worker: every epoch of a phase is learned, validated and saved. Knows nothing of Ray.

To read it from top to bottom: `Learner` is what is trained, `train_phase` is the loop, and its steps follow.

I images, R regions, F channels, S pixels a side.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Final, NamedTuple, TypeAlias, cast

import numpy as np
import torch
from torch import Tensor, nn

from imcap_ray.config import Recipe, TrainingConfig
from imcap_ray.errors import ConfigError, ImcapError
from imcap_ray.models.caption import Caption
from imcap_ray.models.decoders import Decoder, build_decoder
from imcap_ray.models.encoders import Encoder
from imcap_ray.models.model_weights import select_tensors
from imcap_ray.models.torch_captioner import search_captions
from imcap_ray.runs.training_run import EpochMetrics
from imcap_ray.scoring.evaluation_report import HALF, confidence_curve
from imcap_ray.scoring.metrics import score
from imcap_ray.text.tokenizers import scoring_tokenizer
from imcap_ray.text.vocabulary import SUPPRESSED_TOKEN_IDS, Vocabulary
from imcap_ray.training.batches import CaptionBatch, augmentation, make_batch
from imcap_ray.training.optimization import EndToEnd, Optimization
from imcap_ray.training.phases import (
    CROSS_ENTROPY,
    FINETUNE,
    SELF_CRITICAL,
    kind_of,
    next_phase,
    phases,
    reads_pixels,
)
from imcap_ray.training.rewards import CaptionReward, advantages_of, draw_captions
from imcap_ray.training.team import Team

STEPS_BETWEEN_CHECKS: Final = 50
"""How often workers ask each other whether a loss is not finite. Each time they wait for the device."""

_RATES_TO_LOWER: Final = {
    CROSS_ENTROPY: "training.learning_rate",
    FINETUNE: "finetune.learning_rate and finetune.encoder_learning_rate",
    SELF_CRITICAL: "self_critical.learning_rate",
}
"""The settings to change when a phase of this kind diverges."""

ImageBatch: TypeAlias = tuple[Tensor, list[str]]
"""Features (I, views, R, F) or pixels (I, 3, S, S) of images, and their ids."""

BatchSource: TypeAlias = Callable[..., Iterator[ImageBatch]]
"""Called with `batch_size` and `seed`: one epoch of this worker's training images, shuffled."""

BatchMaker: TypeAlias = Callable[[Tensor, list[str]], tuple[CaptionBatch, dict[str, float]]]
"""Features or pixels of images, and their ids -> the batch of a step, and numbers to average over the epoch."""


class StoppedError(ImcapError):
    """The workers stopped for a reason that would stop them again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A phase of a training."""

    name: str
    recipe: Recipe
    seed: int

    @property
    def kind(self) -> str:
        """`CROSS_ENTROPY`, `FINETUNE` or `SELF_CRITICAL`."""
        return kind_of(self.name)

    @property
    def settings(self) -> TrainingConfig:
        """The recipe's settings for this phase."""
        return phases(self.recipe)[self.name]

    @property
    def advice(self) -> str:
        """What to do if the phase diverges."""
        return f"lower {_RATES_TO_LOWER[self.kind]}. Epochs before it are kept"


@dataclass(frozen=True, slots=True, kw_only=True)
class Learner:
    """The model of a phase with its optimizer, in one worker."""

    phase: Phase
    vocabulary: Vocabulary
    encoder: Encoder
    optimization: Optimization
    batch_size: int
    """Images that this worker takes for a step."""
    steps_per_epoch: int


def build_learner(
    phase: Phase,
    *,
    vocabulary: Vocabulary,
    encoder: Encoder,
    start_weights: Mapping[str, Tensor] | None,
    num_images: int,
    team: Team,
    distribute: Callable[[nn.Module], nn.Module] = lambda module: module,
) -> Learner:
    """Build the model and the optimizer of a phase. Batch size and schedule depend on the number of workers.

    Args:
        start_weights: weights to start from; None: random ones.
        num_images: training images of this worker.
        distribute: wraps the module so that workers exchange gradients.
    """
    recipe, settings = phase.recipe, phase.settings
    torch.manual_seed(phase.seed)
    decoder = build_decoder(recipe.decoder, num_channels=encoder.num_channels, vocabulary_size=len(vocabulary))
    if start_weights is not None:
        decoder.load_state_dict(select_tensors("decoder.", start_weights))
    trained: Decoder | EndToEnd = decoder
    if phase.kind == FINETUNE:
        unfreeze(encoder, recipe.finetune.first_layer)
        trained = EndToEnd(encoder, decoder)
    trained.to(team.device)
    batch_size = max(1, settings.batch_size // team.size)
    steps_per_epoch = -(-num_images // batch_size)
    optimization = Optimization(
        distribute(trained),
        trained,
        settings,
        total_steps=settings.epochs * steps_per_epoch,
        encoder_learning_rate=recipe.finetune.encoder_learning_rate,
        temperature=recipe.self_critical.temperature if phase.kind == SELF_CRITICAL else 1.0,
        forbidden_ids=SUPPRESSED_TOKEN_IDS if phase.kind == SELF_CRITICAL else (),
    )
    return Learner(
        phase=phase,
        vocabulary=vocabulary,
        encoder=encoder,
        optimization=optimization,
        batch_size=batch_size,
        steps_per_epoch=steps_per_epoch,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningData:
    """The images and captions of one worker."""

    batches: BatchSource
    captions: Mapping[str, list[str]]
    """Captions of all training images."""
    validation: list[ImageBatch]
    """This worker's part of the validation images."""
    references: Mapping[str, list[str]]
    """Captions of all validation images."""
    validation_ids: Sequence[str]
    """The validation images of all workers, on which every epoch is scored."""


def train_phase(
    learner: Learner,
    data: LearningData,
    history: list[EpochMetrics],
    *,
    team: Team,
    save: Callable[[list[EpochMetrics]], None],
) -> None:
    """Train the epochs of a phase that are left, and add their metrics to the history.

    Args:
        save: called after each epoch with the history.

    Raises:
        StoppedError: on all workers, if the training diverges on one of them.
    """
    phase, device = learner.phase, team.device
    learner.encoder.to(device)
    validation = data.validation
    if phase.kind == SELF_CRITICAL:  # the CNN does not change, and neither do its features
        validation = [
            (encode_images(learner.encoder, pixels.to(device)).unsqueeze(1), ids) for pixels, ids in validation
        ]
    make = batch_maker(learner, data.captions, device)
    while next_phase(history, phase.recipe) == phase.name:
        start, epoch = time.time(), len(history) + 1
        epoch_seed = phase.seed * 1_000_003 + epoch * 1009 + team.rank
        torch.manual_seed(epoch_seed)  # dropout, views, crops and samples differ between workers and epochs
        batches = data.batches(batch_size=learner.batch_size, seed=epoch_seed)
        learned = run_epoch(learner.optimization, make, batches, team)
        stop_if(_describe_divergence(learned, learner, epoch), team)
        captions = _gather(caption_images(learner, validation, device), team)
        stop_if(_describe_missing_captions(data.validation_ids, captions, learner, epoch), team)
        metrics = {}
        if team.rank == 0:
            references = {image_id: data.references[image_id] for image_id in captions}
            scores = score_captions(captions, references, scoring_tokenizer(learner.vocabulary.tokenizer))
            first = {"epoch": epoch, "phase": phase.name, "num_workers": team.size}
            metrics = {**first, **learned.averages, **scores, "seconds": time.time() - start}
        # All workers use those of rank 0, so that they stop after the same epoch.
        history.append(cast("EpochMetrics", team.share(metrics)[0]))
        save(history)


def stop_if(problem: str, team: Team) -> None:
    """Raise StoppedError on all workers if any of them has a problem; "" is none."""
    if problems := [other for other in team.share(problem) if other]:
        raise StoppedError(problems[0])


# ---- An epoch


class LearningResult(NamedTuple):
    """The result of one pass over a worker's images."""

    averages: dict[str, float]
    """Mean cross-entropy of a token in nats, other means over images, and the duration in seconds."""
    num_images: int
    bad_step: int
    """The first step, from 1, whose loss is not finite on some worker; the pass ends soon after it. 0: none."""


def run_epoch(
    optimization: Optimization, make: BatchMaker, batches: Iterator[ImageBatch], team: Team
) -> LearningResult:
    """Pass once over this worker's images."""
    start = time.time()
    loss_sum, num_tokens, num_images = torch.zeros((), dtype=torch.float64), 0, 0
    sums: dict[str, float] = {}
    bad_step = torch.zeros((), dtype=torch.long)  # on the device: reading each step's loss would wait for it
    for step, (inputs, image_ids) in enumerate(batches, start=1):
        batch, numbers = make(inputs, image_ids)
        loss, count = optimization.step(batch)
        bad_step = bad_step.to(loss.device)
        bad_step = torch.where(~torch.isfinite(optimization.loss) & (bad_step == 0), step, bad_step)
        if step % STEPS_BETWEEN_CHECKS == 0 and team.first_step(int(bad_step)):
            break
        loss_sum = loss_sum.to(loss.device) + loss
        num_tokens, num_images = num_tokens + count, num_images + len(image_ids)
        for name, value in numbers.items():
            sums[name] = sums.get(name, 0.0) + value * len(image_ids)
    means = {name: value / max(1, num_images) for name, value in sums.items()}
    averages = {"train_loss": float(loss_sum) / max(1, num_tokens), **means, "train_seconds": time.time() - start}
    return LearningResult(averages, num_images, team.first_step(int(bad_step)))


def _describe_divergence(learned: LearningResult, learner: Learner, epoch: int) -> str:
    """Why the weights after this epoch cannot be used; "" if they can."""
    if learned.bad_step:
        return f"the loss is not finite at step {learned.bad_step} of epoch {epoch}; {learner.phase.advice}"
    if not learned.num_images:
        return f"in epoch {epoch} no training images can be read, or fewer than there are workers"
    if not all(bool(torch.isfinite(parameter).all()) for parameter in learner.optimization.kept.parameters()):
        return f"the weights are not finite after epoch {epoch}; {learner.phase.advice}"
    return ""


# ---- Batches


def batch_maker(learner: Learner, captions: Mapping[str, list[str]], device: torch.device) -> BatchMaker:
    """Return the function that makes the batches of this phase."""
    recipe, vocabulary = learner.phase.recipe, learner.vocabulary
    max_length = recipe.training.max_caption_length
    view: Callable[[Tensor], Tensor] = _draw_view
    if reads_pixels(learner.phase.name):
        augment = augmentation(learner.encoder.image_size, min_crop_area=recipe.finetune.min_crop_area)

        def view(pixels: Tensor) -> Tensor:
            return augment(pixels.to(device))

    if learner.phase.kind != SELF_CRITICAL:
        ids = {
            image_id: [vocabulary.to_ids(text, max_length=max_length) for text in texts]
            for image_id, texts in captions.items()
        }
        return lambda inputs, image_ids: (make_batch(view(inputs), [ids[id_] for id_ in image_ids], device), {})

    reward = CaptionReward(captions, vocabulary, bleu_weight=recipe.self_critical.bleu_weight)

    def draw(inputs: Tensor, image_ids: list[str]) -> tuple[CaptionBatch, dict[str, float]]:
        with torch.autocast(device.type, torch.bfloat16, enabled=learner.optimization.uses_bfloat16):
            features = encode_images(learner.encoder, view(inputs))
        samples = draw_captions(
            decoder_of(learner.optimization.trained),
            features.float(),
            num_samples=recipe.self_critical.num_samples,
            max_length=max_length,
            temperature=recipe.self_critical.temperature,
            bfloat16=learner.optimization.uses_bfloat16,
        )
        rewards = [
            [reward(image_id, ids) for ids in image_samples]
            for image_id, image_samples in zip(image_ids, samples, strict=True)
        ]
        batch = make_batch(features, samples, device, advantages=advantages_of(rewards))
        return batch, {"train_reward": float(np.mean(rewards))}

    return draw


def _draw_view(views: Tensor) -> Tensor:
    """Draw one of the views of each image: features (I, views, R, F) -> (I, R, F)."""
    return views[torch.arange(len(views)), torch.randint(views.shape[1], (len(views),))]


@torch.no_grad()
def encode_images(encoder: Encoder, pixels: Tensor) -> Tensor:
    """Float16 features (I, R, F), as a cache stores them."""
    features: Tensor = encoder(pixels)
    return features.half()


# ---- Validation


@torch.inference_mode()
def caption_images(learner: Learner, batches: Sequence[ImageBatch], device: torch.device) -> dict[str, Caption]:
    """The best caption of each image; images for which the model computes a number that is not finite have none."""
    kept = learner.optimization.kept
    kept.eval()
    captions = {}
    for inputs, image_ids in batches:
        inputs = inputs.to(device)
        features = kept.encoder(inputs) if isinstance(kept, EndToEnd) else inputs[:, 0].float()
        results = search_captions(decoder_of(kept), learner.vocabulary, features, learner.phase.recipe.search)
        captions.update({image_id: best[0] for image_id, best in zip(image_ids, results, strict=True) if best})
    return captions


def _gather(captions: Mapping[str, Caption], team: Team) -> dict[str, Caption]:
    """The captions of all workers, on every worker."""
    parts = team.share({image_id: asdict(caption) for image_id, caption in captions.items()})
    return {image_id: Caption(**fields) for part in parts for image_id, fields in part.items()}


def _describe_missing_captions(
    image_ids: Sequence[str], captions: Mapping[str, Caption], learner: Learner, epoch: int
) -> str:
    """Why images have no caption; "" if each has one."""
    missing = [image_id for image_id in image_ids if image_id not in captions]
    if not missing:
        return ""
    return (
        f"the model's outputs for {len(missing):,} validation images are not finite after epoch {epoch}, the first is "
        f"{missing[0]}; {learner.phase.advice}"
    )


def score_captions(
    captions: Mapping[str, Caption], references: Mapping[str, Sequence[str]], tokenizer: str
) -> dict[str, float]:
    """Score validation captions by BLEU, ROUGE-L and CIDEr-D, and the more confident half of them by CIDEr-D."""
    texts = {image_id: caption.text for image_id, caption in captions.items()}
    confidences = {image_id: caption.confidence for image_id, caption in captions.items()}
    curve = confidence_curve(texts, references, confidences, tokenizer=tokenizer)
    half = next(point for point in curve if point.share == HALF)
    return {
        **score(texts, references, tokenizer=tokenizer).to_dict(),
        "half_cider_d": half.cider_d,
        "half_min_confidence": half.min_confidence,
    }


# ---- The trained parts


def decoder_of(module: nn.Module) -> Decoder:
    """The decoder in a module that is trained or kept."""
    decoder = module.decoder if isinstance(module, EndToEnd) else module
    assert isinstance(decoder, Decoder)
    return decoder


def unfreeze(encoder: Encoder, first_layer: str) -> None:
    """Make the CNN trainable from this layer on.

    The filters of depthwise convolutions stay frozen. They are 5 % of EfficientNet-lite2's weights and have the slowest
    gradients on a CPU: from `cnn.blocks.3` on, an image takes 38 ms forward and backward with them and 23 ms without
    (torch 2.14, two cores, AVX512-BF16). Layers that do not influence the features stay frozen as well.

    Raises:
        ConfigError: the CNN has no such layer.
    """
    require_layer(encoder, first_layer)
    is_reached = False
    for name, parameter in encoder.cnn.named_parameters():
        is_reached = is_reached or name.startswith(first_layer)
        parameter.requires_grad_(is_reached)
    for module in encoder.cnn.modules():
        if isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1:
            module.weight.requires_grad_(False)
    for parameter in _parameters_without_gradient(encoder):
        parameter.requires_grad_(False)


def require_layer(encoder: Encoder, first_layer: str) -> None:
    """Raise ConfigError unless the CNN has a layer with this name."""
    layers = [name for name, _ in encoder.cnn.named_parameters()]
    if not any(name.startswith(first_layer) for name in layers):
        names = dict.fromkeys(".".join(name.split(".")[:3]) for name in layers)
        raise ConfigError(
            f"finetune.first_layer must be one of the CNN's layers, got {first_layer!r}: expected one of "
            f"{', '.join(names)}"
        )


def _parameters_without_gradient(encoder: Encoder) -> list[nn.Parameter]:
    """Trainable parameters that do not influence the features, such as layers of a timm CNN after its last feature map.

    Workers that exchange gradients would wait for these forever.
    """
    parameters = [parameter for parameter in encoder.cnn.parameters() if parameter.requires_grad]
    if not parameters:
        return []
    blank = torch.zeros(1, 3, encoder.image_size, encoder.image_size, dtype=torch.uint8, device=encoder.mean.device)
    with torch.enable_grad():
        gradients = torch.autograd.grad(encoder(blank).sum(), parameters, allow_unused=True)
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is None]
