"""An encoder -> an equivalent one that computes faster."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from imcap_ray.models.efficientnet_lite import EfficientNetLite, MirroredEfficientNetLite
from imcap_ray.models.encoders import Encoder, EncoderEnsemble

FLOAT16_HEADROOM: Final = 16
"""How many times larger than those of three images a CNN's maps may become, of others, without leaving float16."""

AnyEncoder = TypeVar("AnyEncoder", bound="Encoder | EncoderEnsemble")


@torch.inference_mode()
def optimize_for_inference(encoder: AnyEncoder, device: torch.device) -> AnyEncoder:
    """The same encoder, faster on this device; not to be trained, and not on the device yet.

    Convolutions do the work of the batch normalisations behind them, for a quarter less time on a CPU
    (EfficientNet-lite2, float32); there an EfficientNet-lite is turned into a `MirroredEfficientNetLite` besides, for
    another quarter. The features are the same but for rounding. For a GPU the CNN computes in float16, if no feature
    differs by more than 2 % of the largest: those of the package's model differ by 1 %, and of the captions of
    Flickr8k's 1,000 development images 13 (rounded so on a CPU; CIDEr-D 0.636 instead of 0.638). A CNN in which what
    stands behind a convolution is not what comes next stays as it is, as does one for which this torch lacks an
    operator, or whose maps come near to what float16 can hold: noise, black and white tell.
    """
    size = encoder.image_size
    pixels = torch.randint(0, 256, (1, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = encoder(pixels)
    attempts: list[tuple[list[Callable[[nn.Module], None]], float]] = [([_fold_children], 1e-3)]
    if device.type == "cuda":
        largest = _largest_output(encoder, torch.cat([pixels, torch.zeros_like(pixels), torch.full_like(pixels, 255)]))
        if largest < torch.finfo(torch.float16).max / FLOAT16_HEADROOM:
            attempts.insert(0, ([_fold_children, _halve], 0.02))
    elif device.type == "cpu" and size % 32 == 0:
        attempts.insert(0, ([_fold_children, _mirror_children], 1e-3))
    tried_on = device if torch.cuda.is_available() else torch.device("cpu")
    for changes, tolerance in attempts:
        changed = copy.deepcopy(encoder)
        try:
            for change in changes:
                change(changed)
            found = changed.to(tried_on)(pixels.to(tried_on)).cpu()
        except (AttributeError, RuntimeError):  # of an operator that is not there
            continue
        if torch.allclose(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())):
            return changed
    return encoder


def _largest_output(module: nn.Module, input: Tensor) -> float:
    """The largest number, without its sign, in what the module or any in it returns."""
    largest = 0.0

    def look(_: nn.Module, __: object, output: object) -> None:
        nonlocal largest
        if isinstance(output, Tensor):
            largest = max(largest, float(output.abs().max()))

    handles = [part.register_forward_hook(look) for part in module.modules()]
    module(input)
    for handle in handles:
        handle.remove()
    return largest


class _HalfPrecision(nn.Module):
    """A CNN in float16: for tensor cores, and with maps of half the size."""

    def __init__(self, cnn: nn.Module) -> None:
        super().__init__()
        self.cnn = cnn.half()

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.cnn(pixels.half())
        return features.float()


def _halve(module: nn.Module) -> None:
    for encoder in module.modules():
        if isinstance(encoder, Encoder):
            encoder.cnn = _HalfPrecision(encoder.cnn)


def _mirror_children(module: nn.Module) -> None:
    for name, child in list(module.named_children()):
        if isinstance(child, EfficientNetLite):
            setattr(module, name, MirroredEfficientNetLite(child))
        else:
            _mirror_children(child)


def _fold_children(module: nn.Module) -> None:
    children = list(module.named_children())
    for _, child in children:
        _fold_children(child)
    for (name, convolution), (next_name, normalisation) in itertools.pairwise(children):
        if isinstance(convolution, nn.Conv2d) and isinstance(normalisation, nn.BatchNorm2d):
            setattr(module, name, fuse_conv_bn_eval(convolution, normalisation))
            # timm's batch normalisation has the activation in it.
            setattr(module, next_name, getattr(normalisation, "act", nn.Identity()))
