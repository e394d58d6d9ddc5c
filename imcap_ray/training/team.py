"""A worker of a data-parallel training, and the values that it exchanges with the others. Knows nothing of Ray."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Team:
    """One worker's view of all workers of a training; by default it is alone.

    All workers must call the same methods in the same order, because each call waits for the others.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """The worker's device, which is also where tensors are exchanged."""

    def share(self, value: Any) -> list[Any]:
        """Every worker's value on every worker, by rank. Values must be JSON.

        torch's own calls for objects unpickle whatever arrives, and workers do not authenticate each other.
        """
        if self.size == 1:
            return [value]
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        lengths = [int(length) for length in self._gather(torch.tensor([len(data)], device=self.device))]
        padded = functional.pad(data, (0, max(lengths) - len(data)))
        texts = zip(self._gather(padded), lengths, strict=True)
        return [json.loads(text[:length].cpu().numpy().tobytes()) for text, length in texts]

    def agree(self, condition: bool) -> bool:
        """Whether the condition is true on every worker."""
        return all(self.share(condition))

    def first_step(self, step: int) -> int:
        """The smallest step that any worker names; 0 means that a worker names none."""
        return min((other for other in self.share(step) if other), default=0)

    def _gather(self, tensor: Tensor) -> list[Tensor]:
        """Every worker's tensor by rank; all have the same shape."""
        tensors = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(tensors, tensor)
        return tensors
