"""Features or pixels and captions -> weights, on one process. Knows nothing of Ray.

A training has up to three kinds of phases: the decoder alone, by cross-entropy on cached features; the decoder with the
CNN, on pixels; the decoder alone, on captions that it samples itself and that are rewarded by their scores. Each phase
starts from the best weights so far. The last two kinds can be repeated: every repetition of the second starts from the
same weights, and the weights they end with are averaged for the next phase.

I images and N captions of a batch, T positions of the longest caption, P positions of all captions together,
R regions, F channels, S pixels a side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from imcap_ray.config import TrainingConfig
from imcap_ray.models.decoders import Decoder
from imcap_ray.models.encoders import Encoder
from imcap_ray.text.vocabulary import PADDING_ID
from imcap_ray.training.batches import CaptionBatch


class EndToEnd(nn.Module):
    """A CNN and a decoder that are trained together. It is called with pixels instead of features.

    Batch normalisation always works as in captioning, because the batches of fine-tuning are too small for statistics.
    """

    def __init__(self, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, pixels: Tensor, token_ids: Tensor, lengths: Tensor, image_of_caption: Tensor) -> Tensor:
        """Logits (P, V) as in `Decoder.forward`, of pixels (I, 3, S, S)."""
        logits: Tensor = self.decoder(self.encoder(pixels), token_ids, lengths, image_of_caption)
        return logits

    def train(self, mode: bool = True) -> EndToEnd:
        """Switch dropout on or off; the CNN always stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self


class Optimization:
    """The optimizer, its schedule and the moving average of one phase.

    Args:
        model: the module to call: `trained` itself, or DDP around it.
        trained: a decoder, or a CNN and a decoder.
        encoder_learning_rate: the CNN's learning rate.
        temperature: divides the logits, as in sampling.
        forbidden_ids: tokens whose probability is zero, as in sampling. If they were part of the gradient, nothing
            would limit their logits: on Flickr8k the unknown word took all probability within two epochs, and CIDEr-D
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
            of_cnn = [parameter for parameter in trained.encoder.parameters() if parameter.requires_grad]
            groups = [{"params": list(trained.decoder.parameters())}, {"params": of_cnn, "lr": encoder_learning_rate}]
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
        self.uses_bfloat16 = prefers_bfloat16(self._parameters[0].device)
        """Whether the forward pass is computed in bfloat16 where autocast allows it, instead of float32."""
        self.loss = torch.zeros(())
        """The loss of the last step, on its device. If it is not finite, neither are the weights."""

    def step(self, batch: CaptionBatch) -> tuple[Tensor, int]:
        """Take one optimizer step. Return the sum of the cross-entropy in nats, without smoothing and weights, and the
        number of tokens.

        The sum stays on the device, because reading it would wait for the step. If the batch's weights are advantages,
        this is a step of REINFORCE (Rennie et al. 2017, arXiv 1612.00563, equation 7).
        """
        self.model.train()
        self.optimizer.zero_grad()  # before anything is allocated: gradients in between would fragment the heap
        with torch.autocast(batch.inputs.device.type, torch.bfloat16, enabled=self.uses_bfloat16):
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
            uniform = log_probs.mean(dim=-1) * (batch.targets != PADDING_ID)
            loss = loss - smoothing * uniform.sum() / batch.num_tokens
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
        """The module that is validated and kept: the moving average if there is one."""
        return self.trained if self.average is None else self.average.module

    def state_dict(self) -> dict[str, object]:
        """Everything that another process needs to resume."""
        return {
            "trained": self.trained.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "average": self.average.state_dict() if self.average is not None else {},
        }

    def load_state_dict(self, state: dict[str, object], *, step: int) -> None:
        """Resume from what `state_dict` returned.

        Args:
            step: the position in the schedule, because the number of steps in an epoch depends on that of workers.
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
    """Drop parameters that never had a gradient from an optimizer's state if it has more than the optimizer.

    Earlier versions also optimized a CNN's layers after its features.
    """
    groups = []
    for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True):
        used = [number for number in saved["params"] if number in state["state"]]
        has_more = len(saved["params"]) > len(group["params"]) == len(used)
        groups.append({**saved, "params": used} if has_more else saved)
    return {**state, "param_groups": groups}


def learning_rate_factor(step: int, total_steps: int, config: TrainingConfig) -> float:
    """The learning rate of a step, as a share of the peak."""
    if config.schedule == "constant":
        return 1.0
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices faster than float32 ones.

    AMD's processors do with AVX512-BF16, Intel's only with AMX: with AVX512-BF16 alone, an optimizer step there takes
    1.35 times as long as in float32 (a Xeon whose hypervisor hides AMX; a decoder of 384 and 448 units, 32 images).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    is_intel = "intel" in str(capabilities.get("cpu_name", "")).lower()
    return bool(capabilities.get("amx_bf16") or (capabilities.get("avx512_bf16") and not is_intel))
