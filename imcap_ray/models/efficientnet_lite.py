"""EfficientNet-lite 0 to 2: normalised pixels -> a feature map (Tan & Le 2019, arXiv 1905.11946; tensorflow/tpu,
efficientnet/lite: no squeeze-and-excitation, ReLU6, first and last stage not scaled).

Layers, names and results are those of timm's `tf_efficientnet_lite`, to the last bit; a test compares them. The
network is here because importing timm costs every process 3 s of CPU time, half of what it takes to begin captioning.

B images, S pixels a side, F channels.
"""

from __future__ import annotations

import copy
import itertools
import math
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

HEAD_CHANNELS = 1280

_STEM_CHANNELS = 32

_EPSILON = 1e-3  # TensorFlow's

_WIDTH_AND_DEPTH = {0: (1.0, 1.0), 1: (1.0, 1.1), 2: (1.1, 1.2)}

_STAGES = (  # table 1 of the paper: blocks, kernel, stride, expansion, channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)

_STAGES_WITH_LARGE_MAPS: Final = 3


class EfficientNetLite(nn.Module):
    """Normalised pixels (B, 3, S, S) -> (B, 1280, S / 32, S / 32), rounded up."""

    def __init__(self, number: int) -> None:
        super().__init__()
        width, depth = _WIDTH_AND_DEPTH[number]
        self.conv_stem = _Convolution(3, _STEM_CHANNELS, kernel=3, stride=2)
        self.bn1 = nn.BatchNorm2d(_STEM_CHANNELS, eps=_EPSILON)
        self.act1 = _Activation()
        stages = []
        channels = _STEM_CHANNELS
        for index, (num_blocks, kernel, stride, expansion, stage_channels) in enumerate(_STAGES):
            is_scaled = 0 < index < len(_STAGES) - 1
            blocks: list[nn.Module] = []
            for block in range(math.ceil(num_blocks * depth) if is_scaled else num_blocks):
                after = _round_to_eight(stage_channels * width)
                first_stride = stride if block == 0 else 1
                if expansion == 1:
                    blocks.append(_DepthwiseSeparable(channels, after, kernel=kernel))
                else:
                    blocks.append(_InvertedResidual(channels, after, kernel=kernel, stride=first_stride))
                channels = after
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)
        self.conv_head = _Convolution(channels, HEAD_CHANNELS, kernel=1)
        self.bn2 = nn.BatchNorm2d(HEAD_CHANNELS, eps=_EPSILON)
        self.act2 = _Activation()

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the last feature map."""
        hidden = self.blocks(self.act1(_normalised(self.conv_stem, self.bn1, pixels)))
        features: Tensor = self.act2(_normalised(self.conv_head, self.bn2, hidden))
        return features


class _Convolution(nn.Conv2d):
    """A convolution without bias and with TensorFlow's padding: if the total is odd, the far side gets one more."""

    def __init__(self, before: int, after: int, *, kernel: int, stride: int = 1, groups: int = 1) -> None:
        padding = kernel // 2 if stride == 1 else 0
        super().__init__(before, after, kernel, stride=stride, padding=padding, groups=groups, bias=False)
        # As in TensorFlow: with PyTorch's own initial weights the features of an untrained CNN vanish.
        nn.init.normal_(self.weight, std=math.sqrt(2 * groups / (kernel**2 * after)))

    def forward(self, input: Tensor) -> Tensor:
        return self.convolve(input, self.weight, self.bias)

    def convolve(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Convolve with weights other than its own."""
        stride = self.stride[0]
        if stride > 1:
            padding = [self._padding_of(length) for length in (input.shape[-1], input.shape[-2])]
            input = functional.pad(input, [side for axis in padding for side in axis])
            if self.groups > 1 and input.requires_grad and not input.is_cuda:
                # A CPU is two to nine times slower with the stride, forward and backward (torch 2.14, bfloat16).
                return functional.conv2d(input, weight, bias, groups=self.groups)[..., ::stride, ::stride]
        output: Tensor = self._conv_forward(input, weight, bias)
        return output

    def _padding_of(self, length: int) -> tuple[int, int]:
        kernel, stride = self.kernel_size[0], self.stride[0]
        total = max((math.ceil(length / stride) - 1) * stride + kernel - length, 0)
        return total // 2, total - total // 2


class _DepthwiseSeparable(nn.Module):
    """The first stage's block. Its number of channels changes, so it has no skip connection."""

    def __init__(self, before: int, after: int, *, kernel: int) -> None:
        super().__init__()
        self.conv_dw = _Convolution(before, before, kernel=kernel, groups=before)
        self.bn1 = nn.BatchNorm2d(before, eps=_EPSILON)
        self.act1 = _Activation()
        self.conv_pw = _Convolution(before, after, kernel=1)
        self.bn2 = nn.BatchNorm2d(after, eps=_EPSILON)

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.act1(_normalised(self.conv_dw, self.bn1, input))
        return _normalised(self.conv_pw, self.bn2, hidden)


class _InvertedResidual(nn.Module):
    """Expand, filter each channel and project (Sandler et al. 2018, arXiv 1801.04381, figure 4)."""

    def __init__(self, before: int, after: int, *, kernel: int, stride: int) -> None:
        super().__init__()
        between = 6 * before
        self.conv_pw = _Convolution(before, between, kernel=1)
        self.bn1 = nn.BatchNorm2d(between, eps=_EPSILON)
        self.act1 = _Activation()
        self.conv_dw = _Convolution(between, between, kernel=kernel, stride=stride, groups=between)
        self.bn2 = nn.BatchNorm2d(between, eps=_EPSILON)
        self.act2 = _Activation()
        self.conv_pwl = _Convolution(between, after, kernel=1)
        self.bn3 = nn.BatchNorm2d(after, eps=_EPSILON)
        self._adds_input = stride == 1 and before == after

    def forward(self, input: Tensor) -> Tensor:
        hidden = self.act1(_normalised(self.conv_pw, self.bn1, input))
        hidden = self.act2(_normalised(self.conv_dw, self.bn2, hidden))
        output = _normalised(self.conv_pwl, self.bn3, hidden)
        return output + input if self._adds_input else output


def _normalised(convolution: nn.Module, normalisation: nn.Module, input: Tensor) -> Tensor:
    """Convolve and normalise, or apply whatever modules replace the two for inference: maps (B, C, H, W).

    When a network is fine-tuned with fixed statistics, the normalisation is folded into the convolution's weights, so
    that a step passes over each map once less, forward and backward. (torch's `fuse_conv_bn_weights` has no gradient.)
    It is not folded if the normalisation is trained and the convolution is not, because then the filters would need a
    gradient.
    """
    if (
        not torch.is_grad_enabled()
        or not isinstance(normalisation, nn.BatchNorm2d)
        or normalisation.training
        or (normalisation.weight.requires_grad and not convolution.weight.requires_grad)
    ):
        output: Tensor = normalisation(convolution(input))
        return output
    assert isinstance(convolution, _Convolution)
    assert normalisation.running_mean is not None and normalisation.running_var is not None
    scale = normalisation.weight * (normalisation.running_var + normalisation.eps).rsqrt()
    weight = convolution.weight * scale.view(-1, 1, 1, 1)
    return convolution.convolve(input, weight, normalisation.bias - normalisation.running_mean * scale)


class _Activation(nn.Module):
    """ReLU6, in place unless the input is needed for a gradient."""

    def forward(self, input: Tensor) -> Tensor:
        return functional.relu6(input, inplace=not input.requires_grad)


class MirroredEfficientNetLite(nn.Module):
    """The same network for inference on a CPU, in three quarters of the time or less.

    Normalised pixels (B, 3, S, S) -> (B, 1280, S / 32, S / 32).

    Each ReLU6 is part of the convolution before it, by the oneDNN operator that torch's compiler uses. torch does not
    document it and raises AttributeError or RuntimeError if it is missing. Images and kernels are rotated by 180
    degrees: with a stride of two, TensorFlow pads the far side of a map of even size by one more than the near side,
    which requires a copy of the map. Rotated, the far side is the near one, and the kernel never reads what symmetric
    padding adds at the other. The stages with large maps process one image at a time: such a map has 8 MB at 288 x 288
    pixels, so it stays in the processor's cache.

    Args:
        network: a network whose batch normalisations are folded into the convolutions. S has to be a multiple of 32.
    """

    def __init__(self, network: EfficientNetLite) -> None:
        super().__init__()
        self.network = copy.deepcopy(network)
        for module in list(self.network.modules()):
            children = [pair for pair in module.named_children() if not isinstance(pair[1], nn.Identity)]
            for (name, convolution), (next_name, next_child) in itertools.pairwise([*children, ("", nn.Identity())]):
                if isinstance(convolution, _Convolution):
                    is_activated = isinstance(next_child, _Activation)
                    setattr(module, name, _MirroredConvolution(convolution, is_activated=is_activated))
                    if is_activated:
                        setattr(module, next_name, nn.Identity())

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute the last feature map."""
        network = self.network
        early = nn.Sequential(network.conv_stem, network.bn1, network.act1, network.blocks[:_STAGES_WITH_LARGE_MAPS])
        late = nn.Sequential(network.blocks[_STAGES_WITH_LARGE_MAPS:], network.conv_head, network.bn2, network.act2)
        maps = torch.cat([early(image) for image in torch.split(pixels.flip(2, 3), 1)])
        features: Tensor = late(maps).flip(2, 3)
        return features


class _MirroredConvolution(nn.Module):
    def __init__(self, convolution: _Convolution, *, is_activated: bool) -> None:
        super().__init__()
        assert convolution.bias is not None
        kernels = convolution.weight.flip(2, 3).contiguous(memory_format=torch.channels_last)
        self.register_buffer("weight", kernels)
        self.register_buffer("bias", convolution.bias)
        self._geometry = ([convolution.kernel_size[0] // 2] * 2, list(convolution.stride), [1, 1], convolution.groups)
        self._activation = ("hardtanh", [0.0, 6.0], "") if is_activated else ("none", [], "")

    def forward(self, input: Tensor) -> Tensor:
        output: Tensor = torch.ops.mkldnn._convolution_pointwise(
            input, self.weight, self.bias, *self._geometry, *self._activation
        )
        return output


def _round_to_eight(channels: float) -> int:
    """Round to the nearest multiple of eight, but never down by more than a tenth."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
