"""A model quantised to int8 gives an image the same caption in any batch, thread, process and kernel."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from imcap_ray.cli.demo_images import sample_photographs
from imcap_ray.config import DecoderConfig, EncoderConfig, PreprocessingConfig, SearchConfig
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.errors import ConfigError, ModelError, OutputError
from imcap_ray.models.caption import COMPUTE_BATCH_SIZE, Caption
from imcap_ray.models.captioner import Captioner, load_captioner
from imcap_ray.models.decoders import Decoder, build_decoder
from imcap_ray.models.encoders import Encoder, build_encoder
from imcap_ray.models.familiarity import Familiarity
from imcap_ray.models.int8_captioner import Int8Captioner, Int8Networks
from imcap_ray.models.model_folder import Network, QuantizedModel, read_model_folder, save_with_int8
from imcap_ray.models.quantization import quantize_networks
from imcap_ray.models.torch_captioner import load_decoder, load_encoder
from tests.small_data import IMAGE_SIZE, jpeg, randomise_batch_normalisation, write_model_folder

NUM_IMAGES = COMPUTE_BATCH_SIZE + 2

Pixels = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def pixels() -> Pixels:
    return np.stack([decode_image(jpeg(number), image_size=IMAGE_SIZE).pixels for number in range(NUM_IMAGES)])


def quantize(model: Path, pixels: Pixels, location: Path) -> Path:
    """A copy of the model, quantised with some of the images."""
    folder = read_model_folder(model)
    encoder = load_encoder(folder)
    decoder = load_decoder(folder, num_channels=encoder.num_channels)
    image, step = quantize_networks(
        encoder, decoder, list(pixels[:4]), search=folder.search, vocabulary_size=folder.vocabulary_size
    )
    save_with_int8(folder, QuantizedModel(image, step, None), location)
    return location


@pytest.fixture(scope="module")
def int8_dir(model_dir: Path, pixels: Pixels, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantize(model_dir, pixels, tmp_path_factory.mktemp("models") / "int8")


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


VOCABULARY_SIZE = 30


@pytest.fixture(scope="module")
def networks(lite: Encoder, pixels: Pixels) -> tuple[Network, Network]:
    return quantize_networks(
        lite, small_decoder(lite), list(pixels[:4]), search=SearchConfig(), vocabulary_size=VOCABULARY_SIZE
    )


def small_decoder(encoder: Encoder) -> Decoder:
    config = DecoderConfig(embedding_size=16, hidden_size=16, num_heads=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_decoder(config, num_channels=encoder.num_channels, vocabulary_size=VOCABULARY_SIZE).eval()


def load_networks(networks: tuple[Network, Network], *, vocabulary_size: int = VOCABULARY_SIZE) -> Int8Networks:
    return Int8Networks(*networks, vocabulary_size=vocabulary_size)


# ---- the same captions


@pytest.mark.parametrize("numbers", [[0], [NUM_IMAGES - 1], [7, 3, 11], list(range(NUM_IMAGES))[::-1]])
def test_int8_captions_are_bit_identical_in_any_batch(
    captioner: Captioner, pixels: Pixels, all_together: list[list[Caption]], numbers: list[int]
) -> None:
    assert captioner.caption_pixels(pixels[numbers]) == [all_together[number] for number in numbers]


def test_every_decoder_captions_in_int8_almost_as_in_float32(int8_dir: Path, tmp_path: Path, pixels: Pixels) -> None:
    merge = quantize(write_model_folder(tmp_path / "float32", decoder="lstm"), pixels, tmp_path / "int8")

    for model in (int8_dir, merge):
        search = replace(read_model_folder(model).search, beam_size=5, num_captions=5)
        in_int8, in_float32 = (
            Captioner.load(model, precision=precision).caption_pixels(pixels, search)
            for precision in ("int8", "float32")
        )
        for few, many in zip(in_int8, in_float32, strict=True):
            assert isinstance(few, list) and isinstance(many, list)
            assert len(few) == len({caption.text for caption in few}) == 5
            assert few[0].confidence == pytest.approx(many[0].confidence, abs=0.1)


def test_the_bundled_model_captions_in_int8_without_quantising_it_first() -> None:
    captioner = Captioner.load(precision="int8")
    data = jpeg(1)

    [caption] = captioner.caption([data])

    assert isinstance(caption, Caption) and caption.text.startswith("a ")
    assert 0 <= caption.familiarity <= 1
    assert captioner.fingerprint != Captioner.load().fingerprint


def test_the_bundled_model_captions_in_int8_as_on_an_amd_processor_without_vnni() -> None:
    """The captions were recorded on an AMD EPYC with AVX2 and no AVX-512; other processors use other kernels."""
    recorded = {
        "astronaut.png": ("a man in a red shirt is standing in front of a crowd", -11.263),
        "camera.png": ("a man in a black hat is holding a camera", -9.773),
        "chelsea.png": ("a person is sitting on a table", -8.024),
        "coffee.png": ("a black and white dog is sitting on a red carpet", -12.201),
        "hubble_deep_field.jpg": ("a person is standing in front of a crowd", -9.455),
        "rocket.jpg": ("a black and white dog is standing in front of a lake", -11.695),
    }
    samples = sample_photographs()

    captions = Captioner.load(precision="int8").caption([sample.path.read_bytes() for sample in samples])

    assert [sample.file_name for sample in samples] == list(recorded)
    for caption, (text, logprob) in zip(captions, recorded.values(), strict=True):
        assert caption.text == text
        assert caption.logprob == pytest.approx(logprob, abs=0.02)


_HASH_FEATURES = """
import sys, hashlib, numpy
from pathlib import Path
from imcap_ray.models.int8_captioner import Int8Networks
from imcap_ray.models.model_folder import Network
networks = [Network(Path(f"{name}.graph").read_bytes(), Path(f"{name}.weights").read_bytes()) for name in ("0", "1")]
features, *_ = Int8Networks(*networks, vocabulary_size=30).encode(numpy.load("pixels.npy"))
assert "torch" not in sys.modules
print(hashlib.sha256(features.tobytes()).hexdigest())
"""


def run_python(code: str, networks: Sequence[Network], *, folder: Path, **environment: str) -> str:
    """Run a program in a process of its own, which finds the networks in its folder; returns what it prints."""
    for number, network in enumerate(networks):
        (folder / f"{number}.graph").write_bytes(network.graph)
        (folder / f"{number}.weights").write_bytes(network.weights)
    variables = {name: value for name, value in os.environ.items() if name != "ONEDNN_MAX_CPU_ISA"}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        env=variables | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize("kernels", ["AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"])
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="kernels of x86 processors")
def test_int8_features_are_bit_identical_in_other_processes_with_other_threads_and_kernels(
    networks: tuple[Network, Network], pixels: Pixels, tmp_path: Path, kernels: str
) -> None:
    here, *_ = load_networks(networks).encode(pixels)
    np.save(tmp_path / "pixels.npy", pixels)

    there = run_python(_HASH_FEATURES, networks, folder=tmp_path, ONEDNN_MAX_CPU_ISA=kernels, OMP_NUM_THREADS="2")

    assert there == hashlib.sha256(here.tobytes()).hexdigest()


def test_kernels_for_amx_are_not_used_because_they_round_differently(
    networks: tuple[Network, Network], tmp_path: Path
) -> None:
    # Only trained weights show the difference, so the kernels' names are compared. Fails only on a processor with AMX.
    code = """
from pathlib import Path
from imcap_ray.models.int8_captioner import Int8Networks
from imcap_ray.models.model_folder import Network
networks = [Network(Path(f"{name}.graph").read_bytes(), Path(f"{name}.weights").read_bytes()) for name in ("0", "1")]
loaded = Int8Networks(*networks, vocabulary_size=30)
for request in (loaded._image_request, loaded._step_request):
    model = request.get_compiled_model().get_runtime_model()
    print({node.get_rt_info()["primitiveType"].astype(str) for node in model.get_ops()})
"""
    kernels = run_python(code, networks, folder=tmp_path)

    assert "i8" in kernels.lower()
    assert "amx" not in kernels


def test_int8_features_are_close_to_those_of_float32(
    lite: Encoder, networks: tuple[Network, Network], pixels: Pixels
) -> None:
    with torch.inference_mode():
        expected = lite(torch.from_numpy(pixels)).mean(1).numpy()

    features, *_ = load_networks(networks).encode(pixels)

    assert features.shape == expected.shape
    assert np.linalg.norm(features - expected) < 0.25 * np.linalg.norm(expected)


def test_captioning_in_int8_does_not_import_torch(int8_dir: Path, pixels: Pixels, tmp_path: Path) -> None:
    np.save(tmp_path / "pixels.npy", pixels)
    code = f"""
import sys, numpy
from imcap_ray.models.captioner_spec import CaptionerSpec
captioner = CaptionerSpec(models=({str(int8_dir)!r},))()
print(len(captioner.caption_pixels(numpy.load("pixels.npy"))), "torch" in sys.modules)
"""
    assert run_python(code, (), folder=tmp_path) == f"{len(pixels)} False"


# ---- the folder decides the precision


def test_a_quantised_folder_captions_in_int8_and_on_request_as_its_original_in_float32(
    captioner: Captioner, model_dir: Path, int8_dir: Path, pixels: Pixels
) -> None:
    original, float32 = Captioner.load(model_dir), Captioner.load(int8_dir, precision="float32")

    assert (original.precision, float32.precision, captioner.precision) == ("float32", "float32", "int8")
    assert float32.fingerprint == original.fingerprint != captioner.fingerprint
    assert float32.caption_pixels(pixels) == original.caption_pixels(pixels)


def test_a_folder_that_was_not_quantised_captions_in_float32_only(model_dir: Path) -> None:
    with pytest.raises(ModelError, match="has no int8 version: make one with imcap quantize"):
        Captioner.load(model_dir, precision="int8")


def test_familiarity_in_int8_is_calibrated_on_int8_features(
    model_dir: Path, int8_dir: Path, pixels: Pixels, tmp_path: Path
) -> None:
    folder, captioner = read_model_folder(int8_dir), Captioner.load(int8_dir)
    assert folder.int8 and isinstance(captioner, Int8Captioner)
    pooled, *_ = captioner.networks.encode(pixels)
    familiarity = Familiarity.fit(np.repeat(pooled, 2, axis=0), np.repeat(pooled, 2, axis=0))
    assert familiarity
    shifted = familiarity.calibrate(pooled + 0.1)
    known = replace(folder.int8, familiarity=shifted)
    save_with_int8(read_model_folder(model_dir), known, tmp_path / "known")

    captions = Captioner.load(tmp_path / "known").caption_pixels(pixels)

    assert [found[0].familiarity for found in captions] == shifted.of(pooled).tolist()
    assert np.isnan(Captioner.load(tmp_path / "known", precision="float32").caption_pixels(pixels)[0][0].familiarity)


def test_several_models_caption_together_in_float32(model_dir: Path, int8_dir: Path, pixels: Pixels) -> None:
    together = load_captioner([model_dir, int8_dir])

    captions = together.caption_pixels(pixels)

    alone = Captioner.load(model_dir).caption_pixels(pixels)
    assert [found[0].text for found in captions] == [found[0].text for found in alone]
    with pytest.raises(ModelError, match="several models caption together only in float32"):
        load_captioner([int8_dir, int8_dir], precision="int8")


# ---- what cannot work is refused


@pytest.mark.parametrize("name", ["encoder_int8.xml", "encoder_int8.bin", "decoder_int8.xml", "decoder_int8.bin"])
def test_a_changed_file_of_a_network_in_int8_is_refused(int8_dir: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(int8_dir, tmp_path / "changed")
    with (folder / name).open("r+b") as file:
        file.write(b"\0\0\0\0")

    with pytest.raises(ModelError, match=f"{name} is corrupt, or was changed"):
        Captioner.load(folder)


def test_networks_that_do_not_fit_the_folder_are_refused(
    networks: tuple[Network, Network], int8_dir: Path, lite: Encoder, pixels: Pixels
) -> None:
    with pytest.raises(ModelError, match="belong to another vocabulary"):
        load_networks(networks, vocabulary_size=VOCABULARY_SIZE + 1)
    with pytest.raises(ModelError, match="a network in int8 is corrupt"):
        load_networks((networks[1], networks[1]))
    folder = read_model_folder(int8_dir)
    larger = replace(folder.preprocessing, image_size=IMAGE_SIZE + 32)
    with pytest.raises(ModelError, match=f"must take images of {IMAGE_SIZE + 32} x {IMAGE_SIZE + 32} pixels"):
        Int8Captioner(replace(folder, preprocessing=larger))


@pytest.mark.parametrize("number", [0, 1])
def test_a_corrupt_network_is_refused(networks: tuple[Network, Network], number: int) -> None:
    for corrupt in (replace(networks[number], graph=b"<net>"), replace(networks[number], weights=b"")):
        with pytest.raises(ModelError, match="a network in int8 is corrupt"):
            load_networks((corrupt, networks[1]) if number == 0 else (networks[0], corrupt))


def test_without_openvino_the_error_says_what_to_install(int8_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)

    with pytest.raises(ConfigError, match=r"pip install openvino, or give --precision float32"):
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
