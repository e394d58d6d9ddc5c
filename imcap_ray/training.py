"""Features or pixels and captions -> weights, on one process. Knows nothing of Ray.

A training has up to three kinds of phases, each starting from the best weights so far: the decoder alone by
cross-entropy on cached features; the CNN with it, on pixels; the decoder on captions that it draws itself, by their
scores. The last two can be repeated: the second from where it began, and the mean of these is what follows starts from.

I images and N captions of a batch, T positions of the longest caption, P positions of all captions together,
R regions, F channels, S pixels a side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from imcap_ray.config import Recipe, TrainingConfig
from imcap_ray.decoders import Decoder
from imcap_ray.encoders import Encoder
from imcap_ray.metrics import CiderD
from imcap_ray.search import sample
from imcap_ray.text.tokenizers import tokenize
from imcap_ray.text.vocabulary import END_ID, NEVER_SAID, PADDING_ID, START_ID, Vocabulary

CROSS_ENTROPY: Final = "cross_entropy"
FINETUNE: Final = "finetune"
SELF_CRITICAL: Final = "self_critical"

LENGTHS_ALIKE: Final = 16
"""So many captions in a row are padded to one length, so that a position has 16, 32, ... captions and few shapes come
up: for each shape of a matrix product oneDNN compiles a kernel, which takes longer than the product, and keeps it. A
step of the default recipe takes half of the time so, for 8 % more positions (torch 2.14, two cores with AMX)."""

SCORE: Final = "cider_d"
"""What a training is stopped by, and its best epoch chosen by."""


def phases(recipe: Recipe) -> dict[str, TrainingConfig]:
    """The phases of a training in their order, with the settings of each: `finetune`, and `finetune_2` if repeated."""
    settings = {}
    for kind, config, smoothing, repetitions in (
        (CROSS_ENTROPY, recipe.training, recipe.training.label_smoothing, 1),
        (FINETUNE, recipe.finetune, recipe.training.label_smoothing, recipe.finetune.repetitions),
        (SELF_CRITICAL, recipe.self_critical, 0.0, recipe.self_critical.repetitions),
    ):
        for number in range(1, repetitions + 1 if config.epochs else 1):
            settings[kind if number == 1 else f"{kind}_{number}"] = replace(
                recipe.training,
                epochs=config.epochs,
                learning_rate=config.learning_rate,
                patience=config.patience,
                label_smoothing=smoothing,
            )
    return settings


def kind_of(phase: str) -> str:
    """Which kind a phase is of, `CROSS_ENTROPY`, `FINETUNE` or `SELF_CRITICAL`."""
    return next(kind for kind in (CROSS_ENTROPY, FINETUNE, SELF_CRITICAL) if phase.startswith(kind))


def reads_pixels(phase: str) -> bool:
    """Whether a phase is trained on photographs, another view of each at every step, or else on cached features.

    A decoder knows the features of its training images by heart in the end, and what it draws for those tells little
    of what it would draw for others.
    """
    return kind_of(phase) in (FINETUNE, SELF_CRITICAL)


def num_epochs(recipe: Recipe) -> int:
    """The most epochs that a training has, over all phases."""
    return sum(settings.epochs for settings in phases(recipe).values())


def next_phase(history: Sequence[Mapping[str, Any]], recipe: Recipe) -> str | None:
    """The phase of the next epoch after these, given each one's `phase` and score; None when the training is done.

    A phase ends after its epochs, or when the last `patience` of them brought no better score.
    """
    for phase, settings in phases(recipe).items():
        scores = [row[SCORE] for row in history if row["phase"] == phase]
        patience = settings.patience
        is_stuck = 0 < patience < len(scores) and max(scores[-patience:]) <= max(scores[:-patience])
        if len(scores) < settings.epochs and not is_stuck:
            return phase
    return None


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """Images with all their captions, the longest caption first."""

    inputs: Tensor
    """Features (I, R, F), or pixels (I, 3, S, S)."""
    token_ids: Tensor
    """(N, T) from the start token to the last word."""
    lengths: Tensor
    """(N,) on the CPU, falling; `LENGTHS_ALIKE` in a row are the same."""
    image_of_caption: Tensor
    """(N,) index into `inputs`."""
    targets: Tensor
    """(P,) the token that follows each, in the order of a packed sequence; `PADDING_ID` where its caption has ended."""
    weights: Tensor
    """(P,) how much each target counts: 1, or its caption's advantage."""
    num_tokens: int
    """Targets that are no padding."""


def make_batch(
    inputs: Tensor,
    captions: Sequence[Sequence[Sequence[int]]],
    device: torch.device,
    *,
    advantages: Sequence[Sequence[float]] | None = None,
) -> CaptionBatch:
    """The batch of these images: features or pixels, and for each image its captions as ids from start to end.

    Args:
        advantages: of each caption of each image, how much it is to be said more often, or less.
    """
    weights = [[1.0] * len(of_image) for of_image in captions] if advantages is None else advantages
    flat = [
        (image, ids, weight)
        for image, of_image in enumerate(captions)
        for ids, weight in zip(of_image, weights[image], strict=True)
    ]
    flat.sort(key=lambda caption: -len(caption[1]))
    padded = nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for _, ids, _ in flat], batch_first=True, padding_value=PADDING_ID
    )
    lengths = torch.tensor([len(ids) - 1 for _, ids, _ in flat])
    num_tokens = int(lengths.sum())
    lengths = lengths[::LENGTHS_ALIKE].repeat_interleave(LENGTHS_ALIKE)[: len(flat)]
    weight_of_caption = torch.tensor([weight for _, _, weight in flat]).unsqueeze(1)
    weights_of_tokens = weight_of_caption.expand(len(flat), padded.shape[1] - 1)
    return CaptionBatch(
        inputs=inputs.to(device).to(inputs.dtype if inputs.dtype == torch.uint8 else torch.float32),
        token_ids=padded[:, :-1].to(device),
        lengths=lengths,
        image_of_caption=torch.tensor([image for image, _, _ in flat], device=device),
        targets=pack_padded_sequence(padded[:, 1:], lengths, batch_first=True).data.to(device),
        weights=pack_padded_sequence(weights_of_tokens, lengths, batch_first=True).data.to(device),
        num_tokens=num_tokens,
    )


def augmentation(image_size: int, *, min_crop_area: float) -> Callable[[Tensor], Tensor]:
    """A function from uint8 pixels (I, 3, S, S) to another view of each image."""
    from torchvision.transforms import v2

    transform: Callable[[Tensor], Tensor] = v2.Compose(
        [
            v2.RandomResizedCrop(image_size, scale=(min_crop_area, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
        ]
    )
    return lambda pixels: torch.stack([transform(image) for image in pixels])


class EndToEnd(nn.Module):
    """A CNN and a decoder that are trained together, called with pixels where a decoder is called with features.

    The CNN's batch normalisation stays as in captioning: the batches of a fine-tuning are too small for statistics.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, pixels: Tensor, token_ids: Tensor, lengths: Tensor, image_of_caption: Tensor) -> Tensor:
        """Logits (P, V) as the decoder's; pixels (I, 3, S, S)."""
        logits: Tensor = self.decoder(self.encoder(pixels), token_ids, lengths, image_of_caption)
        return logits

    def train(self, mode: bool = True) -> EndToEnd:
        """Dropout on or off; the CNN has no other mode than captioning's."""
        super().train(mode)
        self.encoder.eval()
        return self


class CaptionReward:
    """CIDEr-D of a caption against those of its image, with document frequencies of all these images.

    To it comes `bleu_weight` times the BLEU-4 of this caption alone, of 0 to 1. An order without a match would make
    that 0, as most captions have one, so one is added to the matches and the n-grams of every order above the first
    (Lin and Och 2004, ORANGE).

    The end counts as a token, or captions are rewarded that stop in the middle of a phrase (Hu et al. 2023,
    arXiv 2305.12254).
    """

    def __init__(
        self, captions: Mapping[str, Sequence[str]], vocabulary: Vocabulary, *, bleu_weight: float = 0.0
    ) -> None:
        end = vocabulary.tokens[END_ID]
        self._tokens = vocabulary.tokens
        self._places = {image_id: number for number, image_id in enumerate(captions)}
        self._references = [
            [[*tokenize(text, vocabulary.tokenizer), end] for text in texts] for texts in captions.values()
        ]
        self._cider_d = CiderD(self._references)
        self._bleu_weight = bleu_weight

    def __call__(self, image_id: str, token_ids: Sequence[int]) -> float:
        """The reward of token ids from the start token to the end token, if there is one."""
        place, tokens = self._places[image_id], [self._tokens[token_id] for token_id in token_ids[1:]]
        reward = self._cider_d.score(place, tokens)
        if self._bleu_weight:
            reward += self._bleu_weight * _sentence_bleu()(self._references[place], tokens)
        return reward


@cache
def _sentence_bleu() -> Callable[..., float]:
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu  # a second and a half

    return partial(sentence_bleu, smoothing_function=SmoothingFunction().method2)


@torch.no_grad()
def draw_captions(
    decoder: Decoder, features: Tensor, *, num_samples: int, max_length: int, temperature: float = 1.0
) -> list[list[list[int]]]:
    """For each image of features (I, R, F) captions drawn from the decoder, as ids from start to end."""
    decoder.eval()
    with torch.autocast(features.device.type, torch.bfloat16, enabled=prefers_bfloat16(features.device)):
        step, state = decoder.start(features.float(), num_samples)
        return sample(
            step,
            state,
            start_id=START_ID,
            end_id=END_ID,
            max_length=max_length,
            temperature=temperature,
            forbidden_ids=NEVER_SAID,
        )


def advantages_of(rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    """Each caption's reward minus the mean of the other captions' of its image (Luo 2020, arXiv 2003.09971)."""
    return [
        [(len(of_image) * reward - sum(of_image)) / (len(of_image) - 1) for reward in of_image] for of_image in rewards
    ]


class Optimization:
    """The optimizer, its schedule and the moving average of one phase.

    Args:
        model: what is called: the module that is trained, or DDP around it.
        trained: a decoder, or a CNN and a decoder.
        encoder_learning_rate: of the CNN.
        temperature: divides the logits, as when captions are drawn.
        forbidden_ids: tokens without any probability, as when captions are drawn. If the gradient knew them, nothing
            would hold their logits: on Flickr8k the unknown word took all probability within two epochs, and CIDEr-D
            fell from 0.54 to 0.48.
    """

    def __init__(
        self,
        model: nn.Module,
        trained: Decoder | EndToEnd,
        config: TrainingConfig,
        *,
        total_steps: int,
        encoder_learning_rate: float | None = None,
        temperature: float = 1.0,
        forbidden_ids: Sequence[int] = (),
    ) -> None:
        self.model = model
        self._temperature = temperature
        self._forbidden_ids = torch.tensor(list(forbidden_ids), dtype=torch.long)
        self.config = config
        groups: list[dict[str, Any]] = [{"params": list(trained.parameters())}]
        if isinstance(trained, EndToEnd):
            learnt = [parameter for parameter in trained.encoder.parameters() if parameter.requires_grad]
            groups = [{"params": list(trained.decoder.parameters())}, {"params": learnt, "lr": encoder_learning_rate}]
        self._parameters = [parameter for group in groups for parameter in group["params"]]
        optimizer_class = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        options: dict[str, Any] = {"weight_decay": config.weight_decay} if config.optimizer == "adamw" else {}
        self.optimizer = optimizer_class(groups, lr=config.learning_rate, fused=True, **options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, total_steps, config)
        )
        self.average = None
        if config.ema_decay:
            update = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(trained, multi_avg_fn=update)
        self.trained = trained
        self.loss = torch.zeros(())
        """What the last step has lowered, on its device. Where it is not finite, the weights are not either."""

    def step(self, batch: CaptionBatch) -> tuple[Tensor, int]:
        """One optimizer step; the summed cross-entropy in nats, without smoothing and weights, and its tokens' number.

        The sum is left on the device: to ask for it is to wait for the step.

        With advantages for weights this is a step of REINFORCE (Rennie et al. 2017, arXiv 1612.00563, equation 7).
        """
        self.model.train()
        self.optimizer.zero_grad()  # first of all: gradients that stand while all else is allocated split the heap
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=prefers_bfloat16(batch.inputs.device)):
            logits = self.model(batch.inputs, batch.token_ids, batch.lengths, batch.image_of_caption)
        logits = logits.float()
        if self._temperature != 1.0:
            logits = logits / self._temperature
        if len(self._forbidden_ids):
            logits = logits.index_fill(-1, self._forbidden_ids.to(logits.device), float("-inf"))
        log_probs = functional.log_softmax(logits, dim=-1)
        nats = functional.nll_loss(log_probs, batch.targets, ignore_index=PADDING_ID, reduction="none")
        smoothing = self.config.label_smoothing  # Szegedy et al. 2016, arXiv 1512.00567, section 7
        loss = (1 - smoothing) * (batch.weights * nats).sum() / batch.num_tokens
        if smoothing:
            of_all_words = log_probs.mean(dim=-1) * (batch.targets != PADDING_ID)
            loss = loss - smoothing * of_all_words.sum() / batch.num_tokens
        self.loss = loss.detach()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.gradient_clip:
            nn.utils.clip_grad_norm_(self._parameters, self.config.gradient_clip)
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.trained)
        return nats.detach().sum(dtype=torch.float64), batch.num_tokens

    @property
    def kept(self) -> nn.Module:
        """What is validated and kept: the moving average, where there is one."""
        return self.trained if self.average is None else self.average.module

    def state_dict(self) -> dict[str, object]:
        """All that a later process needs to go on."""
        return {
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
        }

    def load_state_dict(self, state: dict[str, object], *, step: int) -> None:
        """Go on from what `state_dict` returned.

        Args:
            step: where the schedule stands: another number of workers takes another number of steps for an epoch.
        """
        self.trained.load_state_dict(state["trained"])  # type: ignore[arg-type]
        self.optimizer.load_state_dict(_without_unused(state["optimizer"], self.optimizer))
        self.scheduler.load_state_dict(state["scheduler"])  # type: ignore[arg-type]
        self.scheduler.last_epoch = step
        rates = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
        for group, (peak, factor) in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = peak * factor(step)
        if self.average is not None:
            self.average.load_state_dict(state["average"])  # type: ignore[arg-type]


def _without_unused(state: Any, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimizer's state without the parameters that never had a gradient, where it has more than the optimizer:
    earlier versions kept the layers of a CNN behind its features among those to be trained."""
    groups = []
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        used = [number for number in saved["params"] if number in state["state"]]
        has_more = len(saved["params"]) > len(group["params"]) == len(used)
        groups.append({**saved, "params": used} if has_more else saved)
    return {**state, "param_groups": groups}


def learning_rate_factor(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The learning rate of a step as a share of its peak."""
    if config.schedule == "constant":
        return 1.0
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones.

    AMD's processors do with AVX512-BF16, Intel's with AMX: with AVX512-BF16 alone an optimizer step takes 1.35 times as
    long there as in float32 (a Xeon whose hypervisor hides AMX; a decoder of 384 and 448 units, 32 images).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    is_intel = "intel" in str(capabilities.get("cpu_name", "")).lower()
    return bool(capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and not is_intel))
