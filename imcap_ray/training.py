"""Features and captions -> a decoder's weights, on one process. Knows nothing of Ray.

I images and N captions of a batch, T positions of the longest caption, P positions of all captions together,
R regions, F channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from imcap_ray.config import TrainingConfig
from imcap_ray.vocabulary import PADDING_ID


@dataclass(frozen=True, slots=True)
class CaptionBatch:
    """Images with all their captions, the longest caption first."""

    features: Tensor
    """(I, R, F)."""
    token_ids: Tensor
    """(N, T) from the start token to the last word."""
    lengths: Tensor
    """(N,) on the CPU, falling."""
    image_of_caption: Tensor
    """(N,) index into `features`."""
    targets: Tensor
    """(P,) the token that follows each, in the order of a packed sequence."""


def make_batch(features: Tensor, captions: Sequence[Sequence[Sequence[int]]], device: torch.device) -> CaptionBatch:
    """The batch of these images: features (I, R, F), and for each image its captions as ids from start to end."""
    flat = [(image, ids) for image, of_image in enumerate(captions) for ids in of_image]
    flat.sort(key=lambda pair: -len(pair[1]))
    padded = nn.utils.rnn.pad_sequence(
        [torch.tensor(ids) for _, ids in flat], batch_first=True, padding_value=PADDING_ID
    )
    lengths = torch.tensor([len(ids) - 1 for _, ids in flat])
    return CaptionBatch(
        features=features.to(device, torch.float32),
        token_ids=padded[:, :-1].to(device),
        lengths=lengths,
        image_of_caption=torch.tensor([image for image, _ in flat], device=device),
        targets=pack_padded_sequence(padded[:, 1:], lengths, batch_first=True).data.to(device),
    )


class Optimization:
    """The optimizer, its schedule and the moving average of one training."""

    def __init__(self, model: nn.Module, decoder: nn.Module, config: TrainingConfig, *, total_steps: int) -> None:
        self.model = model  # what is called: the decoder, or DDP around it
        self.config = config
        optimizer_class = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        options: dict[str, Any] = {"weight_decay": config.weight_decay} if config.optimizer == "adamw" else {}
        self.optimizer = optimizer_class(decoder.parameters(), lr=config.learning_rate, fused=True, **options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: learning_rate_factor(step, total_steps, config)
        )
        self.average = None
        if config.ema_decay:
            update = get_ema_multi_avg_fn(config.ema_decay)  # type: ignore[no-untyped-call]
            self.average = AveragedModel(decoder, multi_avg_fn=update)
        self.decoder = decoder

    def step(self, batch: CaptionBatch) -> tuple[float, int]:
        """One optimizer step; the summed cross-entropy in nats, without smoothing, and the number of its tokens."""
        self.model.train()
        with torch.autocast(
            batch.features.device.type, torch.bfloat16, enabled=prefers_bfloat16(batch.features.device)
        ):
            logits = self.model(batch.features, batch.token_ids, batch.lengths, batch.image_of_caption)
        log_probs = functional.log_softmax(logits.float(), dim=-1)
        cross_entropy = functional.nll_loss(log_probs, batch.targets)
        smoothing = self.config.label_smoothing  # Szegedy et al. 2016, arXiv 1512.00567, section 7
        loss = (1 - smoothing) * cross_entropy - smoothing * log_probs.mean()
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        if self.config.gradient_clip:
            nn.utils.clip_grad_norm_(self.decoder.parameters(), self.config.gradient_clip)
        self.optimizer.step()
        self.scheduler.step()
        if self.average is not None:
            self.average.update_parameters(self.decoder)
        num_tokens = len(batch.targets)
        return float(cross_entropy.detach()) * num_tokens, num_tokens

    @property
    def kept(self) -> nn.Module:
        """The decoder that is validated and kept: the moving average, where there is one."""
        return self.decoder if self.average is None else self.average.module

    def state_dict(self) -> dict[str, object]:
        """All that a later process needs to go on."""
        return {
            "decoder": self.decoder.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from what `state_dict` returned."""
        self.decoder.load_state_dict(state["decoder"])  # type: ignore[arg-type]
        self.optimizer.load_state_dict(state["optimizer"])  # type: ignore[arg-type]
        self.scheduler.load_state_dict(state["scheduler"])  # type: ignore[arg-type]
        if self.average is not None:
            self.average.load_state_dict(state["average"])  # type: ignore[arg-type]


def learning_rate_factor(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The learning rate of a step as a share of its peak."""
    if config.schedule == "constant":
        return 1.0
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
