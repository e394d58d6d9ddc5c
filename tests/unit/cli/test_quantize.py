"""`imcap quantize`, and `--precision` of the commands that caption."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from imcap_ray.cli.main import main
from imcap_ray.models.captioner import Captioner
from imcap_ray.models.familiarity import MIN_IMAGES, Familiarity
from imcap_ray.models.model_folder import read_model_folder
from tests.small_data import jpeg, write_model_folder


def imcap(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def flickr8k(tmp_path_factory: pytest.TempPathFactory, make_flickr8k: Callable[..., Path]) -> Path:
    return make_flickr8k(tmp_path_factory.mktemp("data") / "flickr8k", num_train=24, num_validation=MIN_IMAGES)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_dir: Path) -> Path:
    """A model that can tell how familiar an image is."""
    encoder = Captioner.load(model_dir)
    features = [encoder.encode(encoder.read_pixels(jpeg(number))[None])[0].mean(0).numpy() for number in range(40)]
    return write_model_folder(
        tmp_path_factory.mktemp("models") / "float32", familiarity=Familiarity.fit(features[:20], features[20:])
    )


@pytest.fixture(scope="module")
def quantized(model: Path, flickr8k: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = imcap("quantize", model, flickr8k, output := tmp_path_factory.mktemp("models") / "int8", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert (facts["output"], facts["images"]) == (str(output), 24)
    return output


def test_the_copy_captions_in_int8_and_is_the_same_model_in_float32(quantized: Path, model: Path) -> None:
    copy, original = read_model_folder(quantized), read_model_folder(model)

    assert (copy.precision, original.precision) == ("int8", "float32")
    assert copy.fingerprint == original.fingerprint
    assert copy.int8 and copy.int8.familiarity and copy.familiarity and original.familiarity
    assert (copy.familiarity.residuals == original.familiarity.residuals).all()
    assert (copy.int8.familiarity.residuals != original.familiarity.residuals).any()


def test_a_model_is_described_with_its_precision(quantized: Path, model: Path) -> None:
    described = [json.loads(imcap("model", folder, "--json").stdout) for folder in (quantized, model)]

    assert [facts["precision"] for facts in described] == ["int8", "float32"]
    assert described[0]["fingerprint"] == Captioner.load(quantized).fingerprint


@pytest.mark.parametrize("precision", ["auto", "int8", "float32"])
def test_the_precision_can_be_chosen(quantized: Path, tmp_path: Path, precision: str) -> None:
    (image := tmp_path / "one.jpg").write_bytes(jpeg(1))
    expected = Captioner.load(quantized, precision=precision).caption([image])[0]

    result = imcap("caption", image, "--model", quantized, "--precision", precision, "--json")

    assert json.loads(result.stdout)["confidence"] == expected.confidence  # type: ignore[union-attr]


def test_without_openvino_captioning_ends_with_one_line(
    quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    (image := tmp_path / "one.jpg").write_bytes(jpeg(1))

    result = imcap("caption", image, "--model", quantized)

    assert result.exit_code == 2
    assert result.stderr.startswith("imcap: captioning in int8 needs OpenVINO: pip install openvino")
    assert result.stderr.count("\n") == 1


def test_without_nncf_quantising_ends_with_one_line(
    model: Path, flickr8k: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)

    result = imcap("quantize", model, flickr8k, tmp_path / "int8", "--quiet")

    assert result.exit_code == 2
    assert result.stderr.startswith("imcap: quantising a model needs NNCF: pip install 'imcap_ray[quantize]'")
    assert result.stderr.count("\n") == 1


def test_an_existing_output_is_refused(model: Path, flickr8k: Path, tmp_path: Path) -> None:
    result = imcap("quantize", model, flickr8k, tmp_path, "--quiet")

    assert (result.exit_code, result.stderr) == (2, f"imcap: {tmp_path} exists: choose another OUTPUT\n")


def test_too_few_training_images_are_refused(model: Path, tmp_path: Path, make_flickr8k: Callable[..., Path]) -> None:
    result = imcap("quantize", model, make_flickr8k(tmp_path / "flickr8k", num_train=3), tmp_path / "int8", "--quiet")

    assert result.exit_code == 2
    assert "expected at least 20 training images to quantise with, 3 can be read" in result.stderr


def test_a_captioner_of_others_has_no_precision(tmp_path: Path) -> None:
    (image := tmp_path / "one.jpg").write_bytes(jpeg(1))

    result = imcap("caption", image, "--model", "tests.fakes:NoSuchFactory", "--precision", "int8")

    assert result.exit_code == 2
    assert "--precision is for model folders" in result.stderr
