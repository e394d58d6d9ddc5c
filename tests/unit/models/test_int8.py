"""A model quantised to int8 gives an image the same caption in any batch, thread, process and kernel."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imcap_ray.config import EncoderConfig, PreprocessingConfig
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.errors import ConfigError, ModelError, OutputError
from imcap_ray.models.caption import COMPUTE_BATCH_SIZE, Caption
from imcap_ray.models.captioner import Captioner, load_captioner, load_encoder
from imcap_ray.models.encoders import Encoder, build_encoder
from imcap_ray.models.familiarity import Familiarity
from imcap_ray.models.model_folder import Int8Encoder, read_model_folder, save_with_int8
from imcap_ray.models.quantization import quantize_encoder
from imcap_ray.models.quantized_encoder import QuantizedEncoder, QuantizedNetwork
from tests.small_data import IMAGE_SIZE, jpeg, randomise_batch_normalisation

NUM_IMAGES = COMPUTE_BATCH_SIZE + 2

Pixels = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return np.stack([decode_image(jpeg(number), image_size=IMAGE_SIZE).pixels for number in range(NUM_IMAGES)])


@pytest.fixture(scope="module")
def int8_dir(model_dir: Path, pixels: Pixels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model_dir`, quantised with the images of the tests."""
    folder = read_model_folder(model_dir)
    network = quantize_encoder(load_encoder(folder), list(pixels[:4]))
    save_with_int8(folder, Int8Encoder(network, None), location := tmp_path_factory.mktemp("models") / "int8")
    return location


@pytest.fixture(scope="module")
def captioner(int8_dir: Path) -> Captioner:
    return Captioner.load(int8_dir)


@pytest.fixture(scope="module")
def all_together(captioner: Captioner, pixels: Pixels) -> list[list[Caption]]:
    captions = captioner.caption_pixels(pixels)
    assert len({found[0].text for found in captions}) > 3, "the tests below would prove nothing"
    return captions


@pytest.fixture(scope="module")
def lite() -> Encoder:
    """A CNN of the bundled model's kind, all of which is computed in int8."""
    config = EncoderConfig(name="efficientnet_lite0")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = build_encoder(config, PreprocessingConfig(image_size=IMAGE_SIZE), load_weights=False)
    randomise_batch_normalisation(encoder)
    return encoder


@pytest.fixture(scope="module")
def lite_network(lite: Encoder, pixels: Pixels) -> QuantizedNetwork:
    return quantize_encoder(lite, list(pixels[:4]))


# ---- the same captions


@pytest.mark.parametrize("numbers", [[0], [NUM_IMAGES - 1], [7, 3, 11], list(range(NUM_IMAGES))[::-1]])
def test_int8_captions_are_bit_identical_in_any_batch(
    captioner: Captioner, pixels: Pixels, all_together: list[list[Caption]], numbers: list[int]
) -> None:
    assert captioner.caption_pixels(pixels[numbers]) == [all_together[number] for number in numbers]


_HASH_FEATURES = """
import sys, hashlib, numpy, torch
from pathlib import Path
from imcap_ray.models.quantized_encoder import QuantizedEncoder, QuantizedNetwork
torch.set_num_threads(int(sys.argv[1]))
network = QuantizedNetwork(Path("graph").read_bytes(), Path("weights").read_bytes())
pixels = torch.from_numpy(numpy.load("pixels.npy"))
features = QuantizedEncoder(network, image_size=pixels.shape[-1])(pixels)
print(hashlib.sha256(features.numpy().tobytes()).hexdigest())
"""


def run_python(code: str, network: QuantizedNetwork, *arguments: str, folder: Path, **environment: str) -> str:
    """Run a program in a process of its own, which finds the network in its folder; returns what it prints."""
    (folder / "graph").write_bytes(network.graph)
    (folder / "weights").write_bytes(network.weights)
    variables = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=folder,
        env=variables | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize("kernels", ["AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"])
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="kernels of x86 processors")
def test_int8_features_are_bit_identical_in_other_processes_with_other_threads_and_kernels(
    lite_network: QuantizedNetwork, pixels: Pixels, tmp_path: Path, kernels: str
) -> None:
    here = QuantizedEncoder(lite_network, image_size=IMAGE_SIZE)(torch.from_numpy(pixels))
    np.save(tmp_path / "pixels.npy", pixels)

    there = run_python(_HASH_FEATURES, lite_network, "2", folder=tmp_path, ONEDNN_MAX_CPU_ISA=kernels)

    assert there == hashlib.sha256(here.numpy().tobytes()).hexdigest()


def test_kernels_for_amx_are_not_used_because_they_round_differently(
    lite_network: QuantizedNetwork, tmp_path: Path
) -> None:
    # Only trained weights show the difference, so the kernels' names are compared. Fails only on a processor with AMX.
    code = """
from pathlib import Path
from imcap_ray.models.quantized_encoder import QuantizedEncoder, QuantizedNetwork
network = QuantizedNetwork(Path("graph").read_bytes(), Path("weights").read_bytes())
model = QuantizedEncoder(network, image_size=%d)._request.get_compiled_model().get_runtime_model()
print({node.get_rt_info()["primitiveType"].astype(str) for node in model.get_ops()})
"""
    kernels = run_python(code % IMAGE_SIZE, lite_network, folder=tmp_path)

    assert "i8" in kernels.lower()
    assert "amx" not in kernels


def test_int8_features_are_close_to_those_of_float32(
    lite: Encoder, lite_network: QuantizedNetwork, pixels: Pixels
) -> None:
    batch = torch.from_numpy(pixels)
    with torch.inference_mode():
        expected = lite(batch)

    features = QuantizedEncoder(lite_network, image_size=IMAGE_SIZE)(batch)

    assert features.shape == expected.shape
    assert (features - expected).norm() < 0.25 * expected.norm()


# ---- the folder decides the precision


def test_a_quantised_folder_captions_in_int8_and_on_request_as_its_original_in_float32(
    captioner: Captioner, model_dir: Path, int8_dir: Path, pixels: Pixels
) -> None:
    original, float32 = Captioner.load(model_dir), Captioner.load(int8_dir, precision="float32")

    assert (original.precision, float32.precision, captioner.precision) == ("float32", "float32", "int8")
    assert float32.fingerprint == original.fingerprint != captioner.fingerprint
    assert float32.caption_pixels(pixels) == original.caption_pixels(pixels)


def test_a_folder_without_a_cnn_in_int8_captions_in_float32_only(model_dir: Path) -> None:
    with pytest.raises(ModelError, match="has no CNN in int8: make one with imcap quantize"):
        Captioner.load(model_dir, precision="int8")


def test_familiarity_in_int8_is_calibrated_on_int8_features(
    model_dir: Path, int8_dir: Path, pixels: Pixels, tmp_path: Path
) -> None:
    folder, encoder = read_model_folder(int8_dir), Captioner.load(int8_dir).encoder
    assert folder.int8
    pooled = encoder(torch.from_numpy(pixels)).mean(1).numpy()
    familiarity = Familiarity.fit(np.repeat(pooled, 2, axis=0), np.repeat(pooled, 2, axis=0))
    assert familiarity
    shifted = familiarity.calibrate(pooled + 0.1)
    save_with_int8(read_model_folder(model_dir), Int8Encoder(folder.int8.network, shifted), tmp_path / "known")

    captions = Captioner.load(tmp_path / "known").caption_pixels(pixels)

    assert [found[0].familiarity for found in captions] == shifted.of(pooled).tolist()
    assert np.isnan(Captioner.load(tmp_path / "known", precision="float32").caption_pixels(pixels)[0][0].familiarity)


def test_models_in_int8_caption_together_and_share_a_cnn(int8_dir: Path, pixels: Pixels, captioner: Captioner) -> None:
    together = load_captioner([int8_dir, int8_dir])

    captions = together.caption_pixels(pixels)

    alone = captioner.caption_pixels(pixels)
    assert [found[0].text for found in captions] == [found[0].text for found in alone]
    assert len(list(together.encoder.children())[0]) == 1


def test_models_of_different_precision_do_not_caption_together(model_dir: Path, int8_dir: Path) -> None:
    with pytest.raises(ModelError, match="they differ in their precision"):
        load_captioner([model_dir, int8_dir])


# ---- what cannot work is refused


@pytest.mark.parametrize("name", ["encoder_int8.xml", "encoder_int8.bin"])
def test_a_changed_file_of_the_int8_cnn_is_refused(int8_dir: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(int8_dir, tmp_path / "changed")
    with (folder / name).open("r+b") as file:
        file.write(b"\0\0\0\0")

    with pytest.raises(ModelError, match=f"{name} is corrupt, or was changed"):
        Captioner.load(folder)


def test_a_network_of_another_image_size_is_refused(lite_network: QuantizedNetwork) -> None:
    with pytest.raises(ModelError, match="must take one image of 32 x 32 pixels"):
        QuantizedEncoder(lite_network, image_size=32)


def test_a_corrupt_network_is_refused(lite_network: QuantizedNetwork) -> None:
    with pytest.raises(ModelError, match="the int8 encoder is corrupt"):
        QuantizedEncoder(QuantizedNetwork(b"<net>", lite_network.weights), image_size=IMAGE_SIZE)
    with pytest.raises(ModelError, match="the int8 encoder is corrupt"):
        QuantizedEncoder(QuantizedNetwork(lite_network.graph, b""), image_size=IMAGE_SIZE)


def test_without_openvino_the_error_says_what_to_install(int8_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)

    with pytest.raises(ConfigError, match=r"pip install 'imcap_ray\[int8\]', or give --precision float32"):
        Captioner.load(int8_dir)
    assert Captioner.load(int8_dir, precision="float32").precision == "float32"


def test_int8_takes_no_gpu(int8_dir: Path, captioner: Captioner) -> None:
    assert captioner.needs.gpus == 0
    with pytest.raises(ConfigError, match="captions in int8, which is computed on CPUs"):
        Captioner.load(int8_dir, device="cuda")
    with pytest.raises(ConfigError, match="captions in int8, which is computed on CPUs"):
        captioner.start(gpus=1)


def test_an_existing_folder_is_not_overwritten(model_dir: Path, int8_dir: Path) -> None:
    folder = read_model_folder(int8_dir)
    assert folder.int8

    with pytest.raises(OutputError, match="exists: choose another OUTPUT"):
        save_with_int8(folder, folder.int8, model_dir)


def test_openvino_sends_no_usage_statistics(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    subprocess.run(
        [sys.executable, "-c", "from imcap_ray.models.quantization import import_nncf; import_nncf()"],
        env=environment | {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )

    assert not [path for path in tmp_path.rglob("*") if "openvino" in path.name], "OpenVINO keeps a client's id there"
