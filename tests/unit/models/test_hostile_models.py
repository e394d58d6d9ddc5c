"""A model folder made by a stranger, or damaged on its way, loads or is refused with one line: no traceback, no
network, no memory beyond that of its files."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from imcap_ray.cli.main import main
from imcap_ray.config import EncoderConfig, PreprocessingConfig, Recipe, from_mapping, parse_override
from imcap_ray.errors import ConfigError, ModelError
from imcap_ray.models.captioner import Captioner
from imcap_ray.models.encoder_weights import EncoderWeights
from imcap_ray.models.encoders import build_encoder
from imcap_ray.models.model_folder import default_model_folder, read_model_folder
from tests.small_data import write_model_folder

NESTED = "[" * 100_000
EVIL_VALUES = (
    *("null", "true", '""', '"text"', '"\\ud800"', '"timm:hf-hub:evil/model"', '"timm:local-dir:/etc"', '"timm:"'),
    *("-1", "0", "3", "1.5", "-0.0", "1e-300", "1e300", "1e999", "NaN", "Infinity", "-Infinity", "10000000"),
    *(f"1{'0' * 30}", f"-1{'0' * 400}", f"1{'0' * 5000}", "[]", "{}", "[[]]", "[NaN, 1, 1]", "[1, 2]", '{"a": 1}'),
    *('{"a": 1, "a": 2}', "[" * 500 + "]" * 500, NESTED + "]" * 100_000),
)
MARK = '"THE VALUE"'


@pytest.fixture
def folder(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model folder."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fail any host lookup by a test of this file. Threads left by other tests, such as Ray's, can connect."""
    asked: list[Any] = []
    test_thread = threading.current_thread()
    look_up, connect = socket.getaddrinfo, socket.socket.connect

    def refuse(host: Any) -> Any:
        asked.append(host)
        raise OSError("no network")

    def look_up_or_refuse(host: Any, *others: Any, **options: Any) -> Any:
        return refuse(host) if threading.current_thread() is test_thread else look_up(host, *others, **options)

    def connect_or_refuse(self: socket.socket, address: Any) -> None:
        return refuse(address) if threading.current_thread() is test_thread else connect(self, address)

    monkeypatch.setattr(socket, "getaddrinfo", look_up_or_refuse)
    monkeypatch.setattr(socket.socket, "connect", connect_or_refuse)
    yield
    assert not asked


def error_of(folder: Path) -> str:
    """Return the one-line error with which the folder is refused."""
    with pytest.raises(ModelError) as caught:
        Captioner.load(folder, device="cpu")
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1000
    return message


def edited(path: Path, **values: Any) -> None:
    """Change values of a JSON file by key; None removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}, indent=2))


def fields(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Return the paths of all keys of nested objects."""
    for key, inner in value.items():
        yield (*path, key)
        if isinstance(inner, dict):
            yield from fields(inner, (*path, key))


def with_value(content: dict[str, Any], path: tuple[str, ...], value: str) -> str:
    """Return the object as JSON, with the given JSON text at one path."""
    changed = json.loads(json.dumps(content))
    *outer, last = path
    inner = changed
    for key in outer:
        inner = inner[key]
    inner[last] = json.loads(MARK)
    return json.dumps(changed, indent=2).replace(MARK, value)


def without(content: dict[str, Any], path: tuple[str, ...]) -> str:
    """Return the object as JSON, without one key."""
    changed = json.loads(json.dumps(content))
    *outer, last = path
    inner = changed
    for key in outer:
        inner = inner[key]
    del inner[last]
    return json.dumps(changed, indent=2)


SECTIONS = {
    "config.json": ("format_version", "encoder", "encoder_weights", "preprocessing", "decoder", "search", "sha256"),
    "vocabulary.json": ("tokenizer", "tokens"),
    "metrics.json": ("history", "validation"),
}


@pytest.mark.parametrize(("name", "section"), [(name, section) for name in SECTIONS for section in SECTIONS[name]])
def test_any_field_value_loads_or_is_refused_in_one_line(folder: Path, name: str, section: str) -> None:
    if name != "config.json":
        edited(folder / "config.json", sha256=None)  # otherwise the checksum would reject the changed vocabulary
    history = [{"epoch": 1, "cider_d": 0.5}]
    edited(folder / "metrics.json", history=history, validation={"cider_d": 0.5})
    content = json.loads((folder / name).read_text())
    memory_before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    num_refused = 0

    for path in [path for path in fields(content) if path[0] == section]:
        for text in [*(with_value(content, path, value) for value in EVIL_VALUES), without(content, path)]:
            (folder / name).write_text(text)
            try:
                _ = read_model_folder(folder).tensors
            except ModelError as error:
                num_refused += 1
                assert "\n" not in str(error) and len(str(error)) < 1000, (path, text[:200])
            else:
                if name == "config.json":
                    try:
                        Captioner.load(folder, device="cpu")
                    except ModelError as error:
                        assert "\n" not in str(error) and len(str(error)) < 1000, (path, text[:200])

    assert num_refused > 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory_before < 500_000  # kB


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "metrics.json"])
@pytest.mark.parametrize(
    "content",
    [NESTED, NESTED.replace("[", '{"a":'), "[" * 300 + "]" * 300, "1" * 5000, "NaN", "null", "\0", '{"a": 1, "a": 1}'],
    ids=["brackets", "braces", "nested", "digits", "nan", "null", "zero", "repeated"],
)
def test_a_file_without_valid_settings_is_named(folder: Path, name: str, content: str) -> None:
    (folder / name).write_text(content)

    assert name in error_of(folder)


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "metrics.json", "model.safetensors"])
def test_a_file_of_terabytes_is_refused_unread(folder: Path, name: str) -> None:
    with (folder / name).open("r+b") as file:
        file.truncate(2**40)  # takes no space on the disk

    assert name in error_of(folder)


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("preprocessing", {"mean": [float("nan"), 1, 1]}, "preprocessing.mean must be a finite number, got nan"),
        ("preprocessing", {"std": [1, 0, 1]}, "preprocessing.std must be above 0"),
        ("preprocessing", {"std": [1, 1e-40, 1]}, "preprocessing.std must be 1e-6 to 1e6"),
        ("preprocessing", {"mean": [1, 2]}, "preprocessing.mean must be three numbers"),
        ("decoder", {"hidden_size": 10**7}, "decoder.hidden_size must be at most 65,536, got 10000000"),
        ("decoder", {"hidden_size": 10**30}, "decoder.hidden_size must be at most 65,536"),
        ("decoder", {"hidden_size": 65_536}, "do not match: decoder: its sizes need more than"),
        ("search", {"beam_size": 10**9}, "search.beam_size must be at most 1,000"),
        ("search", {"max_length": 10**9}, "search.max_length must be at most 1,000"),
        ("encoder_weights", {"source": 3}, "encoder_weights.source must be str, got 3"),
        ("encoder", {"name": "timm:hf-hub:evil/model"}, "encoder.name must be timm:NAME"),
        ("encoder", {"name": "timm:vit_gigantic_patch14_224"}, "the weights are not those of the CNN"),
        ("encoder", {"name": "resnet50"}, "the weights are not those of the CNN resnet50: conv1.weight is missing"),
        ("encoder", {"name": "timm:no_such_cnn"}, "timm cannot provide 'no_such_cnn'"),
    ],
)
def test_an_impossible_setting_is_named(folder: Path, section: str, values: dict[str, Any], message: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    edited(folder / "config.json", **{section: config[section] | values})

    assert message in error_of(folder)


# ---- the network


@pytest.mark.parametrize(
    "name",
    ["hf-hub:evil/model", "hf_hub:evil/model", "local-dir:/etc", "https://evil/model", "../model", "a/b", "", "a\nb"],
)
def test_a_name_that_timm_would_fetch_elsewhere_is_refused_in_folders_and_recipes(name: str) -> None:
    with pytest.raises(ConfigError, match=r"encoder\.name must be timm:NAME"):
        EncoderConfig(name=f"timm:{name}")
    with pytest.raises(ConfigError, match=r"encoder\.name must be timm:NAME"):
        from_mapping(Recipe, {"encoder": {"name": f"timm:{name}"}})


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:vit_small_patch16_224.augreg_in21k", "efficientnet_lite2"])
def test_names_that_timm_lists_are_accepted(name: str) -> None:
    assert EncoderConfig(name=name).name == name


@pytest.mark.parametrize("source", ["fine-tuned", "file:mine.pth", "random"])
def test_a_cnn_that_only_the_folder_can_contain_is_not_searched_elsewhere(folder: Path, source: str) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if k.startswith("decoder.")}, folder / "model.safetensors")
    edited(folder / "config.json", sha256=None, encoder_weights={"source": source, "sha256": ""})

    assert "pass them with --encoder-weights FILE" in error_of(folder)


# ---- flipped bits and truncation


@pytest.mark.parametrize("name", ["model.safetensors", "vocabulary.json"])
def test_a_flipped_bit_is_detected(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-6] ^= 1  # a weight, or a letter of a word
    (folder / name).write_bytes(data)

    assert f"{name} is corrupt, or was changed: its sha256 is" in error_of(folder)


def test_a_folder_without_checksums_loads_with_the_same_fingerprint(folder: Path) -> None:
    with_checksums = read_model_folder(folder)
    config = json.loads((folder / "config.json").read_text())
    assert set(config["sha256"]) == {"model.safetensors", "vocabulary.json"}

    edited(folder / "config.json", sha256=None)

    assert "sha256" not in json.loads((folder / "config.json").read_text())
    assert read_model_folder(folder).fingerprint == with_checksums.fingerprint


def test_the_fingerprint_is_that_of_the_files_of_a_folder_without_checksums(folder: Path) -> None:
    edited(folder / "config.json", sha256=None)
    digest = hashlib.sha256()
    for name in ("config.json", "model.safetensors", "vocabulary.json"):
        digest.update(hashlib.sha256((folder / name).read_bytes()).digest())

    assert read_model_folder(folder).fingerprint == digest.hexdigest()


def test_the_bundled_model_has_checksums_and_an_unchanged_fingerprint() -> None:
    assert "sha256" in json.loads(Path(default_model_folder(), "config.json").read_text())
    assert read_model_folder().fingerprint == "70ad2b070027350ee2cce89e1d80a8ed2c09c5b5a05f91c479d502f3b3635bcb"


@pytest.mark.parametrize("sha256", [3, [], "text", {"model.safetensors": 3}, {"vocabulary.json": "0" * 64}])
def test_malformed_checksums_are_named(folder: Path, sha256: Any) -> None:
    edited(folder / "config.json", sha256=sha256)

    assert "sha256" in error_of(folder)


@pytest.mark.parametrize("length", [0, 4, 8, 100, 5000, -1])
def test_truncated_weights_of_a_folder_without_checksums_are_named(folder: Path, length: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:length])
    edited(folder / "config.json", sha256=None)

    assert "model.safetensors is corrupt" in error_of(folder)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("decoder.embedding.weight.scale", torch.ones(3, 3)),
        ("decoder.embedding.weight.scale", torch.tensor(1.0)),
        ("decoder.embedding.weight", torch.ones(1, 2_000_000, dtype=torch.int8)),
        ("decoder.output_bias", torch.ones(3)),
        ("decoder.output_bias", torch.full((32,), torch.inf, dtype=torch.float64)),
        ("decoder.project_features.0.weight", torch.tensor(1.0)),
        ("decoder.project_features.0.weight", torch.ones(16, 3)),
        ("decoder.evil", torch.ones(3)),
        ("encoder.evil", torch.ones(3)),
        ("encoder.cnn.bn1.weight", torch.ones(3, dtype=torch.int64)),
    ],
)
def test_weights_of_other_shapes_are_named(folder: Path, name: str, tensor: torch.Tensor) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {name: tensor}, folder / "model.safetensors")
    edited(folder / "config.json", sha256=None)

    assert "model.safetensors" in error_of(folder) or "the weights are not those of the CNN" in error_of(folder)


# ---- other attacks


@pytest.mark.parametrize("arguments", [["model"], ["caption", "--model"]])
def test_the_command_line_refuses_a_corrupt_model_with_exit_code_2(
    folder: Path, arguments: list[str], tmp_path: Path
) -> None:
    (folder / "config.json").write_text(NESTED)
    (tmp_path / "one.jpg").write_bytes(b"")
    command = ["model", str(folder)] if arguments == ["model"] else ["caption", str(tmp_path / "one.jpg")]
    command += ["--model", str(folder)] if "--model" in arguments else []

    done = CliRunner().invoke(main, command)

    assert done.exit_code == 2, done.output
    assert "config.json is corrupt" in done.output
    assert "Traceback" not in done.output


def test_non_numeric_or_missing_encoder_weights_are_refused(tmp_path: Path) -> None:
    config, preprocessing = EncoderConfig(name="efficientnet_lite0"), PreprocessingConfig(image_size=64)
    good = build_encoder(config, preprocessing, load_weights=False).cnn.state_dict()
    good = {name: tensor.contiguous() for name, tensor in good.items()}
    path = tmp_path / "weights.safetensors"
    save_file(good, path)
    assert build_encoder(config, preprocessing, weights_path=path).weights.sha256

    name = next(iter(good))
    for damage in ({name: torch.full_like(good[name], torch.nan)}, {name: torch.ones(3)}):
        save_file(good | damage, path)
        with pytest.raises(ModelError, match="does not hold the weights of this CNN"):
            build_encoder(config, preprocessing, weights_path=path)
    for content in (b"", b"\x80\x04", bytes(100), path.read_bytes()[:5000]):
        path.write_bytes(content)
        path.with_suffix(".pth").write_bytes(content)
        for wrong in (path, path.with_suffix(".pth")):
            with pytest.raises(ModelError, match="does not hold the weights of this CNN"):
                build_encoder(config, preprocessing, weights_path=wrong)


def test_a_cnn_whose_features_are_not_a_map_is_refused() -> None:
    for name, message in (("test_vit", "must be a map"), ("vit_tiny_patch16_224", "does not take an image of 64 x 64")):
        with pytest.raises(ModelError, match=message):
            build_encoder(EncoderConfig(name=f"timm:{name}"), PreprocessingConfig(image_size=64), load_weights=False)


def test_a_model_saved_again_has_new_checksums(tmp_path: Path) -> None:
    first = read_model_folder(write_model_folder(tmp_path / "first"))

    again = write_model_folder(tmp_path / "again", seed=1, encoder_weights=EncoderWeights("random", ""))

    assert read_model_folder(again).fingerprint != first.fingerprint


@pytest.mark.parametrize("text", [f"search.length_penalty={'[' * 100_000}", f"search.beam_size=1{'0' * 5000}"])
def test_a_hostile_option_is_an_invalid_setting(text: str) -> None:
    name, value = parse_override(text)

    with pytest.raises(ConfigError):
        from_mapping(Recipe, {"search": {name.partition(".")[2]: value}})
