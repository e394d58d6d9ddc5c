"""Small realistic test data: a photograph, a data set as distributed, a model folder."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from PIL import Image

if TYPE_CHECKING:
    from torch import Tensor, nn

    from imcap_ray.config import SearchConfig

WORDS = (
    *("a", "the", "two", "in", "on", "of", "and", "with", "dog", "cat", "man", "woman", "child", "ball", "grass"),
    *("water", "snow", "red", "blue", "black", "white", "runs", "jumps", "sits", "plays", "holds", "is", "at"),
)
IMAGE_SIZE = 64
FEATURE_SIZE = 48
ODD_KEY = "odd.jpg.1"
"""A key of the token file that, as in the real one, is in no split and has no file."""

TINY_TRAINING: Final[dict[str, object]] = {
    "encoder.name": "efficientnet_lite0",
    "preprocessing.image_size": 64,
    "vocabulary.min_count": 1,
    "decoder.embedding_size": 32,
    "decoder.hidden_size": 32,
    "decoder.num_heads": 4,
    "training.batch_size": 4,
}
"""Settings of a recipe for data as small as these."""


def jpeg(number: int = 0, *, width: int = 80, height: int = 60) -> bytes:
    """A photograph of coloured rectangles, a different one for each number."""
    random = np.random.default_rng(number)
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    pixels[:] = random.integers(0, 256, 3)
    for _ in range(6):
        top, left = random.integers(0, height - 10), random.integers(0, width - 10)
        pixels[top : top + random.integers(8, height), left : left + random.integers(8, width)] = random.integers(
            0, 256, 3
        )
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def captions_of(number: int) -> list[str]:
    """Return five captions of the photograph of this number."""
    noun = WORDS[8 + number % 6]
    return [f"A {WORDS[17 + (number + k) % 4]} {noun} {WORDS[21 + (number + k) % 5]} in the grass ." for k in range(5)]


def write_flickr8k(folder: Path, *, num_train: int = 8, num_validation: int = 2, num_test: int = 2) -> Path:
    """Write a small Flickr8k as distributed: the token file, the split lists and the folder of images."""
    names = [f"{number:04}_photo.jpg" for number in range(num_train + num_validation + num_test)]
    (folder / "Flicker8k_Dataset").mkdir(parents=True)
    lines = []
    for number, name in enumerate(names):
        (folder / "Flicker8k_Dataset" / name).write_bytes(jpeg(number))
        lines += [f"{name}#{k}\t{caption}" for k, caption in enumerate(captions_of(number))]
    lines += [f"{ODD_KEY}#{k}\tA dog of which there is no photograph ." for k in range(5)]
    (folder / "Flickr8k.token.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    starts = {"train": 0, "dev": num_train, "test": num_train + num_validation}
    for split, count in (("train", num_train), ("dev", num_validation), ("test", num_test)):
        chosen = names[starts[split] : starts[split] + count]
        (folder / f"Flickr_8k.{split}Images.txt").write_text("\n".join(chosen) + "\n", encoding="utf-8")
    return folder


def randomise_batch_normalisation(cnn: nn.Module) -> None:
    """Randomise statistics, scales and shifts, because a new batch normalisation has no effect."""
    import torch
    from torch import nn

    generator = torch.Generator().manual_seed(0)
    for module in cnn.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            for tensor, scale, shift in (
                (module.running_mean, 0.1, 0.0),
                (module.bias.data, 0.1, 0.0),
                (module.running_var, 0.5, 0.75),
                (module.weight.data, 0.5, 0.75),
            ):
                tensor.copy_(torch.rand(module.num_features, generator=generator) * scale + shift)


def write_model_folder(
    folder: Path,
    *,
    seed: int = 0,
    decoder: str = "attention",
    words: tuple[str, ...] = WORDS,
    search: SearchConfig | None = None,
    **changes: Any,
) -> Path:
    """Write a tiny untrained model whose random weights, including the CNN, are large enough to distinguish images."""
    from dataclasses import fields

    import torch

    from imcap_ray.config import DecoderConfig, EncoderConfig, PreprocessingConfig, SearchConfig
    from imcap_ray.models.decoders import build_decoder
    from imcap_ray.models.encoder_weights import EncoderWeights
    from imcap_ray.models.encoders import build_encoder, resolve_preprocessing
    from imcap_ray.models.model_folder import ModelSettings, save_model_folder
    from imcap_ray.text.vocabulary import Vocabulary

    encoder_config = EncoderConfig(name="timm:test_efficientnet")
    decoder_config = DecoderConfig(name=decoder, embedding_size=16, hidden_size=16, num_heads=2)
    preprocessing = resolve_preprocessing(encoder_config, PreprocessingConfig(image_size=IMAGE_SIZE))
    vocabulary = Vocabulary(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = build_encoder(encoder_config, preprocessing, load_weights=False)
        built = build_decoder(decoder_config, num_channels=encoder.num_channels, vocabulary_size=len(vocabulary))
    decoder_tensors: dict[str, Tensor] = {name: 3 * tensor for name, tensor in built.state_dict().items()}
    for name in ("project_features.weight", "project_features.0.weight"):
        if name in decoder_tensors:
            decoder_tensors[name] *= 100  # an untrained CNN's features are small
    arguments: dict[str, Any] = {
        "encoder": encoder_config,
        "encoder_weights": EncoderWeights(source="random", sha256=""),
        "preprocessing": preprocessing,
        "decoder": decoder_config,
        "decoder_tensors": decoder_tensors,
        "search": search or SearchConfig(beam_size=3, max_length=8),
        "vocabulary": vocabulary,
        "metrics": {"cider_d": 0.5},
        "card": "# A tiny model\n",
        "encoder_tensors": encoder.cnn.state_dict(),
    }
    arguments |= changes
    settings = ModelSettings(**{field.name: arguments.pop(field.name) for field in fields(ModelSettings)})
    save_model_folder(folder, settings, **arguments)
    return folder


def write_tar(path: Path, members: dict[str, bytes] | list[tuple[str, bytes]]) -> Path:
    """Write a tar of these members in order and create its folder. A list can repeat a name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def features_of(number: int, *, seed: int, kind: int = 0) -> np.ndarray:
    """Return features of images of a kind, which lie near a subspace of their own."""
    random = np.random.default_rng(seed)
    basis = np.random.default_rng(100 + kind).normal(size=(4, FEATURE_SIZE))
    noise = 0.1 * random.normal(size=(number, FEATURE_SIZE))
    return (3 + random.normal(size=(number, 4)) @ basis + noise).astype(np.float32)
