"""A model folder round-trips; an image gets the same caption in any batch."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file

from imcap_ray.config import DecoderConfig, EncoderConfig, PreprocessingConfig, SearchConfig
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.errors import ConfigError, ImageError, ModelError
from imcap_ray.models.caption import COMPUTE_BATCH_SIZE, Caption
from imcap_ray.models.captioner import Captioner, override_search
from imcap_ray.models.decoders import build_decoder
from imcap_ray.models.encoder_weights import EncoderWeights
from imcap_ray.models.encoders import Encoder, build_encoder
from imcap_ray.models.inference_optimization import optimize_for_inference
from imcap_ray.models.model_averages import average_models
from imcap_ray.models.model_folder import default_model_folder, read_model_folder
from imcap_ray.models.torch_captioner import TorchCaptioner
from imcap_ray.text.vocabulary import Vocabulary
from tests.small_data import IMAGE_SIZE, WORDS, jpeg, write_model_folder

Found = list[list[Caption]]

NUM_IMAGES = 20  # more than one compute batch
SMALL = PreprocessingConfig(image_size=IMAGE_SIZE)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray[Any, Any]:
    return np.stack([decode_image(jpeg(number), image_size=IMAGE_SIZE).pixels for number in range(NUM_IMAGES)])


@pytest.fixture(scope="module")
def lstm_captioner(tmp_path_factory: pytest.TempPathFactory) -> Captioner:
    return Captioner.load(write_model_folder(tmp_path_factory.mktemp("lstm"), decoder="lstm"), device="cpu")


@pytest.fixture(scope="module", params=["attention", "lstm"])
def either_captioner(request: pytest.FixtureRequest, captioner: Captioner, lstm_captioner: Captioner) -> Captioner:
    return captioner if request.param == "attention" else lstm_captioner


@pytest.fixture(scope="module")
def all_together(either_captioner: Captioner, pixels: np.ndarray[Any, Any]) -> Found:
    return either_captioner.caption_pixels(pixels)


def error_of_reading(folder: Path) -> str:
    with pytest.raises(ModelError) as caught:
        _ = read_model_folder(folder).tensors
    return str(caught.value)


def change_config(folder: Path, **values: Any) -> None:
    """Change top-level values of config.json; None removes the key."""
    config = json.loads((folder / "config.json").read_text()) | values
    kept = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(kept, indent=2))


# ---- captions


def test_the_tiny_model_distinguishes_images(all_together: Found) -> None:
    assert len({captions[0].text for captions in all_together}) > 3, "the other tests of this file would prove nothing"


def test_a_caption_contains_only_words(either_captioner: Captioner, all_together: Found) -> None:
    for captions in all_together:
        words = captions[0].text.split()

        assert set(words) <= set(WORDS)
        assert len(words) <= either_captioner.search.max_length
        assert captions[0].num_tokens == len(words) + 1  # the end token


@pytest.mark.parametrize(
    "numbers",
    [[0], [19], [7, 3, 11], list(range(3, 3 + COMPUTE_BATCH_SIZE)), list(range(NUM_IMAGES))[::-1]],
    ids=["the first alone", "the last alone", "three in another order", "shifted", "all in reverse"],
)
def test_captions_and_their_logprobs_are_bit_identical_in_any_batch(
    either_captioner: Captioner, pixels: np.ndarray[Any, Any], all_together: Found, numbers: list[int]
) -> None:
    captions = either_captioner.caption_pixels(pixels[numbers])

    assert captions == [all_together[number] for number in numbers]


def test_the_cnn_is_optimized_once_at_first_use(model_dir: Path, pixels: np.ndarray[Any, Any]) -> None:
    captioner = Captioner.load(model_dir, device="cpu")
    captioner.caption_pixels(pixels[:2])
    optimized = captioner.encoder

    captioner.caption_pixels(pixels[:2])

    assert captioner.encoder is optimized
    assert not [module for module in optimized.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def test_nothing_is_moved_to_the_device_before_something_is_captioned() -> None:
    # A driver only reads its captioner's settings, and must leave a GPU's memory to the actors.
    def devices(module: torch.nn.Module) -> set[str]:
        return {parameter.device.type for parameter in module.parameters()}

    encoder = build_encoder(EncoderConfig(name="timm:test_efficientnet"), SMALL, load_weights=False)
    config = DecoderConfig(embedding_size=16, hidden_size=16, num_heads=2)
    decoder = build_decoder(config, num_channels=encoder.num_channels, vocabulary_size=5)
    captioner = TorchCaptioner(
        encoder=encoder, decoder=decoder, vocabulary=Vocabulary(["dog"]), search=SearchConfig(), device="meta"
    )

    assert devices(encoder) == devices(decoder) == {"cpu"}
    assert devices(captioner.decoder) == {"meta"}


def test_the_n_best_captions_are_different_and_the_best_is_first(model_dir: Path, pixels: np.ndarray[Any, Any]) -> None:
    search = SearchConfig(beam_size=4, max_length=6, num_captions=4, length_penalty=0.0)
    captioner = Captioner.load(model_dir, device="cpu", search=search)

    for captions in captioner.caption_pixels(pixels[:5]):
        assert len(captions) == len({one.text for one in captions}) == 4
        assert [one.logprob for one in captions] == sorted((one.logprob for one in captions), reverse=True)


def test_confidence_is_the_geometric_mean_of_the_tokens_probabilities() -> None:
    caption = Caption(text="a dog", logprob=math.log(0.5) + math.log(0.25) + math.log(0.125), num_tokens=3)

    assert caption.confidence == pytest.approx(0.25)


def test_a_path_a_uri_and_the_bytes_of_a_file_get_the_same_caption(captioner: Captioner, tmp_path: Path) -> None:
    path = tmp_path / "one.jpg"
    path.write_bytes(jpeg(1))

    captions = captioner.caption([path, str(path), f"file://{path}", path.read_bytes()])

    assert len(captions) == 4
    assert len(set(captions)) == 1


def test_a_wrong_extension_changes_nothing(captioner: Captioner, tmp_path: Path) -> None:
    (tmp_path / "really_a_jpeg.png").write_bytes(jpeg(1))

    assert captioner.caption([tmp_path / "really_a_jpeg.png"]) == captioner.caption([jpeg(1)])


def test_an_image_that_cannot_be_captioned_gives_an_error_at_its_position(captioner: Captioner, tmp_path: Path) -> None:
    results = captioner.caption([jpeg(0), b"no image", tmp_path / "nowhere.jpg", jpeg(1)])

    alone = captioner.caption([jpeg(0), jpeg(1)])
    assert [results[0], results[3]] == alone
    errors = results[1:3]
    assert [error.code for error in errors if isinstance(error, ImageError)] == ["not_an_image", "missing"]


def test_no_images_give_no_captions(captioner: Captioner) -> None:
    assert captioner.caption([]) == []


def test_pixels_of_another_size_are_refused(captioner: Captioner) -> None:
    with pytest.raises(ValueError, match=r"pixels must be \(B, 3, 64, 64\), got \(2, 3, 32, 64\)"):
        captioner.caption_pixels(np.zeros((2, 3, 32, 64), np.uint8))


def test_encode_gives_the_features_of_each_image(captioner: Captioner, pixels: np.ndarray[Any, Any]) -> None:
    features = captioner.encode(pixels)

    assert features.shape == (NUM_IMAGES, captioner.encoder.num_regions, captioner.encoder.num_channels)
    assert torch.equal(features[7:9], captioner.encode(torch.as_tensor(pixels[7:9])))


def test_search_overrides_leave_the_other_settings_unchanged() -> None:
    search = SearchConfig(beam_size=4, max_length=9)

    assert override_search(search, beam_size=2, max_length=None) == SearchConfig(beam_size=2, max_length=9)
    with pytest.raises(ConfigError, match="^num_captions must be 1 to beam_size"):
        override_search(search, num_captions=5)


# ---- out of memory


def no_cuda_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def no_cuda_library_memory() -> None:
    raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")


def no_cpu_memory() -> None:
    torch.empty(1 << 50)  # torch has no type for what this raises


def no_python_memory() -> None:
    raise MemoryError


def with_room_for(model_dir: Path, num_images: int, run_out: Callable[[], None] = no_cuda_memory) -> Captioner:
    """Return a captioner whose CNN runs out of memory on batches larger than this."""
    captioner = Captioner.load(model_dir, device="cpu")

    def check(encoder: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        if len(arguments[0]) > num_images:
            run_out()

    captioner.encoder.register_forward_pre_hook(check)
    return captioner


@pytest.mark.parametrize("run_out", [no_cuda_memory, no_cuda_library_memory, no_cpu_memory, no_python_memory])
@pytest.mark.parametrize(("room", "batch_size"), [(15, 8), (8, 8), (5, 4), (1, 1)])
def test_when_memory_runs_out_the_batch_shrinks_and_the_captions_stay_the_same(
    captioner: Captioner,
    model_dir: Path,
    pixels: np.ndarray[Any, Any],
    room: int,
    batch_size: int,
    run_out: Callable[[], None],
) -> None:
    short_of_memory = with_room_for(model_dir, room, run_out)

    captions = short_of_memory.caption_pixels(pixels)

    assert short_of_memory.compute_batch_size == batch_size
    for caption, expected in zip(captions, captioner.caption_pixels(pixels), strict=True):
        assert [one.text for one in caption] == [one.text for one in expected]
        assert [one.confidence for one in caption] == pytest.approx([one.confidence for one in expected], abs=1e-3)


def test_the_smaller_batch_is_remembered(model_dir: Path, pixels: np.ndarray[Any, Any]) -> None:
    short_of_memory = with_room_for(model_dir, 4)
    assert short_of_memory.compute_batch_size == COMPUTE_BATCH_SIZE
    short_of_memory.caption_pixels(pixels)
    batches = []
    short_of_memory.encoder.register_forward_pre_hook(lambda encoder, arguments: batches.append(len(arguments[0])))

    short_of_memory.caption_pixels(pixels[:6])

    assert batches == [4, 4]


def test_running_out_of_memory_in_the_search_has_the_same_effect(
    captioner: Captioner, model_dir: Path, pixels: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    short_of_memory = Captioner.load(model_dir, device="cpu")
    start = short_of_memory.decoder.start

    def start_with_room_for_two(features: torch.Tensor, beam_size: int) -> Any:
        if len(features) > 2:
            no_cuda_memory()
        return start(features, beam_size)

    monkeypatch.setattr(short_of_memory.decoder, "start", start_with_room_for_two)

    captions = short_of_memory.caption_pixels(pixels[:5])

    assert short_of_memory.compute_batch_size == 2
    assert [one[0].text for one in captions] == [one[0].text for one in captioner.caption_pixels(pixels[:5])]


def test_features_are_the_same_when_memory_runs_out(
    captioner: Captioner, model_dir: Path, pixels: np.ndarray[Any, Any]
) -> None:
    torch.testing.assert_close(with_room_for(model_dir, 3).encode(pixels), captioner.encode(pixels))


def test_if_memory_runs_out_even_for_one_image_only_that_image_has_no_caption(
    captioner: Captioner, model_dir: Path, pixels: np.ndarray[Any, Any]
) -> None:
    short_of_memory = Captioner.load(model_dir, device="cpu")
    too_much = torch.from_numpy(pixels[2])

    def check(encoder: torch.nn.Module, arguments: tuple[torch.Tensor]) -> None:
        if any(torch.equal(image, too_much) for image in arguments[0]):
            no_cuda_memory()

    short_of_memory.encoder.register_forward_pre_hook(check)

    captions = short_of_memory.caption_pixels(pixels[:5])

    expected = captioner.caption_pixels(pixels[:5])
    assert [one[0].text if one else "" for one in captions] == [
        "" if number == 2 else one[0].text for number, one in enumerate(expected)
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_image_whose_features_are_not_finite_is_an_internal_error_and_the_others_are_captioned(
    captioner: Captioner, model_dir: Path, pixels: np.ndarray[Any, Any], value: float
) -> None:
    broken = Captioner.load(model_dir, device="cpu")
    overflowing = torch.from_numpy(pixels[2])

    def spoil(encoder: torch.nn.Module, arguments: tuple[torch.Tensor], features: torch.Tensor) -> torch.Tensor:
        is_overflowing = torch.tensor([torch.equal(image, overflowing) for image in arguments[0]])
        return features.masked_fill(is_overflowing[:, None, None], value)

    broken.encoder.register_forward_hook(spoil)

    captions = broken.caption_pixels(pixels[:5])

    error = captions.pop(2)
    assert isinstance(error, ImageError)
    assert (error.code, error.message) == ("internal", "the features of the image are not finite numbers")
    assert captions == [one for number, one in enumerate(captioner.caption_pixels(pixels[:5])) if number != 2]


def test_an_image_whose_words_have_no_finite_probability_is_an_internal_error(
    model_dir: Path, pixels: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Captioner.load(model_dir, device="cpu")
    start = broken.decoder.start

    def start_spoilt(features: torch.Tensor, beam_size: int) -> Any:
        step, state = start(features, beam_size)
        return lambda tokens, state: (step(tokens, state)[0] * float("nan"), step(tokens, state)[1]), state

    monkeypatch.setattr(broken.decoder, "start", start_spoilt)

    errors = broken.caption([jpeg(0), jpeg(1)])

    assert [error.code for error in errors if isinstance(error, ImageError)] == ["internal"] * 2
    assert "the words' probabilities of the image are not finite numbers" in str(errors[0])


def test_if_no_batch_size_fits_in_memory_every_image_has_an_error(
    model_dir: Path, pixels: np.ndarray[Any, Any]
) -> None:
    hopeless = with_room_for(model_dir, 0)

    errors = hopeless.caption([jpeg(0), jpeg(1)])

    assert [error.code for error in errors if isinstance(error, ImageError)] == ["out_of_memory"] * 2
    with pytest.raises(ImageError, match="not enough memory"):
        hopeless.encode(pixels)


def test_other_errors_are_not_mistaken_for_a_lack_of_memory(model_dir: Path, pixels: np.ndarray[Any, Any]) -> None:
    def break_down() -> None:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    broken = with_room_for(model_dir, 0, break_down)

    with pytest.raises(RuntimeError, match="shapes"):
        broken.caption_pixels(pixels)
    assert broken.compute_batch_size == COMPUTE_BATCH_SIZE


# ---- the model folder


def test_a_model_folder_round_trips(model_dir: Path) -> None:
    folder = read_model_folder(model_dir)

    assert folder.vocabulary.tokens[4:] == list(WORDS)
    assert folder.vocabulary_size == len(WORDS) + 4
    assert folder.search == SearchConfig(beam_size=3, max_length=8)
    assert folder.encoder == EncoderConfig(name="timm:test_efficientnet")
    assert folder.preprocessing.image_size == IMAGE_SIZE
    assert folder.preprocessing.mean is not None
    assert folder.metrics == {"cider_d": 0.5}
    assert {tensor.dtype for tensor in folder.tensors.values() if tensor.is_floating_point()} == {torch.float32}


def test_a_copy_of_a_model_folder_gives_the_same_captions_and_fingerprint(
    captioner: Captioner, model_dir: Path, pixels: np.ndarray[Any, Any], tmp_path: Path
) -> None:
    for path in model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())

    copy = Captioner.load(f"file://{tmp_path}/", device="cpu")

    assert copy.fingerprint == captioner.fingerprint != ""
    assert copy.caption_pixels(pixels[:3]) == captioner.caption_pixels(pixels[:3])


def test_saving_a_loaded_model_changes_nothing(model_dir: Path, tmp_path: Path) -> None:
    folder = read_model_folder(model_dir)

    write_model_folder(
        tmp_path,
        encoder_weights=folder.encoder_weights,
        search=folder.search,
        decoder_tensors={k.removeprefix("decoder."): v for k, v in folder.tensors.items() if k.startswith("decoder.")},
        encoder_tensors={k.removeprefix("encoder."): v for k, v in folder.tensors.items() if k.startswith("encoder.")},
    )

    assert read_model_folder(tmp_path).fingerprint == folder.fingerprint


@pytest.mark.parametrize("decoder", ["attention", "lstm"])
def test_a_weight_is_kept_to_half_a_step_of_its_row(tmp_path: Path, decoder: str) -> None:
    config = DecoderConfig(name=decoder, embedding_size=16, hidden_size=16, num_heads=2)
    torch.manual_seed(0)
    weights = build_decoder(config, num_channels=8, vocabulary_size=len(WORDS) + 4).state_dict()
    weights["embedding.weight"][-1] = 0

    write_model_folder(tmp_path, decoder=decoder, decoder_tensors=weights)

    kept = read_model_folder(tmp_path).tensors
    for name, before in weights.items():
        after = kept[f"decoder.{name}"]
        step = before.abs().amax(dim=-1, keepdim=True) / 127
        assert torch.all((after - before).abs() <= 0.6 * step), name  # half a step, and the digits of the scale
    written = load_file(tmp_path / "model.safetensors")
    matrices = [name for name, before in weights.items() if before.dim() == 2]
    assert matrices and all(written[f"decoder.{name}"].dtype == torch.int8 for name in matrices)


def test_a_folder_of_format_version_1_is_read(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    now = read_model_folder(folder)
    save_file({name: tensor.half() for name, tensor in now.tensors.items()}, folder / "model.safetensors")
    change_config(folder, format_version=1, sha256=None)

    before = read_model_folder(folder)

    assert before.tensors.keys() == now.tensors.keys()
    for name, tensor in before.tensors.items():
        torch.testing.assert_close(tensor, now.tensors[name].float(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"search": SearchConfig(beam_size=2, max_length=8)},
        {"words": (*WORDS[1:], WORDS[0])},
        {"seed": 1},
        {"preprocessing": PreprocessingConfig(image_size=IMAGE_SIZE, mean=(0, 0, 0), std=(1, 1, 1))},
    ],
    ids=["search", "vocabulary", "weights", "preprocessing"],
)
def test_every_setting_that_affects_captions_changes_the_fingerprint(
    model_dir: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    changed = write_model_folder(tmp_path, **change)

    assert read_model_folder(changed).fingerprint != read_model_folder(model_dir).fingerprint


def test_metrics_and_card_do_not_change_the_fingerprint(model_dir: Path, tmp_path: Path) -> None:
    changed = write_model_folder(tmp_path, metrics={"cider_d": 0.7}, card="# Another card")

    assert read_model_folder(changed).fingerprint == read_model_folder(model_dir).fingerprint


def test_a_model_folder_contains_five_files_and_no_pickle(model_dir: Path) -> None:
    files = {path.name: path.read_bytes() for path in model_dir.iterdir()}

    assert set(files) == {"config.json", "model.safetensors", "vocabulary.json", "metrics.json", "README.md"}
    for name in ("config.json", "vocabulary.json", "metrics.json"):
        json.loads(files.pop(name))
    files.pop("README.md").decode()
    (weights,) = files.values()
    header_size = int.from_bytes(weights[:8], "little")
    assert "decoder.embedding.weight" in json.loads(weights[8 : 8 + header_size])


def test_weights_that_no_library_provides_must_be_inside_the_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weights from file:mine.pth must be inside the model folder"):
        write_model_folder(tmp_path, encoder_weights=EncoderWeights("file:mine.pth", ""), encoder_tensors=None)


def test_a_cnn_from_a_wheel_is_named_in_the_folder_and_loaded_from_the_wheel(tmp_path: Path) -> None:
    config, preprocessing = EncoderConfig(name="efficientnet_lite0"), PreprocessingConfig(image_size=IMAGE_SIZE)
    encoder = build_encoder(config, preprocessing)
    channels = {"project_features.0.weight": torch.randn(16, encoder.num_channels)}
    tiny = load_file(write_model_folder(tmp_path / "tiny") / "model.safetensors")
    decoder_tensors = {k.removeprefix("decoder."): v for k, v in tiny.items() if k.startswith("decoder.")}

    saved = write_model_folder(
        tmp_path / "lite0",
        encoder=config,
        preprocessing=preprocessing,
        encoder_weights=encoder.weights,
        encoder_tensors=None,
        decoder_tensors=decoder_tensors | channels,
    )

    loaded = Captioner.load(saved, device="cpu")
    assert loaded.encoder.weights == encoder.weights
    image = torch.randint(0, 256, (1, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    torch.testing.assert_close(loaded.encoder(image), encoder(image), rtol=1e-3, atol=1e-3)
    assert not [name for name in read_model_folder(saved).tensors if name.startswith("encoder.")]

    settings = json.loads((saved / "config.json").read_text())
    settings["encoder_weights"]["sha256"] = "0" * 64
    (saved / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ModelError, match=r"was trained on the CNN weights efficientnet-lite0.*--encoder-weights FILE"):
        Captioner.load(saved, device="cpu")


# ---- incomplete folders


def test_a_folder_without_config_is_not_a_model_folder(tmp_path: Path) -> None:
    assert f"{tmp_path} is not a model folder" in error_of_reading(tmp_path)
    assert "is not a model folder" in error_of_reading(tmp_path / "nowhere")


@pytest.mark.parametrize("name", ["model.safetensors", "vocabulary.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    (write_model_folder(tmp_path) / name).unlink()

    assert f"the model folder {tmp_path} lacks a readable {name}" in error_of_reading(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"\xff\xfe\xff", b'{"tokenizer": "ptb"}'])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocabulary.json"])
def test_a_corrupt_file_is_named(model_dir: Path, tmp_path: Path, name: str, content: bytes) -> None:
    for path in model_dir.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / name).write_bytes(content)

    assert name in error_of_reading(tmp_path)


def test_corrupt_metrics_are_named(tmp_path: Path) -> None:
    (write_model_folder(tmp_path) / "metrics.json").write_text("{")

    assert "metrics.json is corrupt" in error_of_reading(tmp_path)


def test_truncated_weights_are_named(tmp_path: Path) -> None:
    weights = write_model_folder(tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])

    assert "model.safetensors is corrupt" in error_of_reading(tmp_path)


@pytest.mark.parametrize(
    ("section", "value", "message"),
    [
        ("format_version", 3, "has model format 3, this imcap_ray reads 1 to 2"),
        ("encoder", "vgg16", "config.json is corrupt or of another kind: encoder must be a section, got 'vgg16'"),
        ("search", {"beam_size": 0}, "search.beam_size must be at least 1, got 0"),
        ("decoder", {"hidden": 16}, "unknown setting decoder.hidden"),
    ],
)
def test_an_unknown_setting_is_named(tmp_path: Path, section: str, value: Any, message: str) -> None:
    path = write_model_folder(tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {section: value}))

    assert message in error_of_reading(tmp_path)


def test_the_error_for_a_vocabulary_of_another_training_names_both_sizes(tmp_path: Path) -> None:
    path = write_model_folder(tmp_path) / "vocabulary.json"
    path.write_text(json.dumps({"tokenizer": "ptb", "tokens": WORDS[:10]}))

    message = error_of_reading(tmp_path)

    assert f"the vocabulary has 14 tokens but the decoder was trained with {len(WORDS) + 4}" in message


def test_weights_of_another_decoder_are_refused_in_one_line(tmp_path: Path) -> None:
    path = write_model_folder(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    del tensors["decoder.query.weight"]
    save_file(tensors, path)
    change_config(tmp_path, sha256=None)

    with pytest.raises(ModelError, match=r"model.safetensors and config.json do not match.*query\.weight") as caught:
        Captioner.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_default_model_is_inside_the_package_and_small() -> None:
    folder = Path(default_model_folder())

    assert folder.parent.parent.name == "imcap_ray"
    sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
    num_int8_bytes = sum(size for name, size in sizes.items() if "int8" in name)
    assert sum(sizes.values()) - num_int8_bytes <= 25_000_000
    assert num_int8_bytes <= 18_000_000


def test_the_bundled_model_can_be_given_by_name_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    assert read_model_folder("flickr8k-lite2").fingerprint == read_model_folder().fingerprint
    with pytest.raises(ModelError, match="flickr8k-lite2 is not a model folder"):
        read_model_folder("./flickr8k-lite2")


def test_beam_steps_are_counted_per_batch(captioner: Captioner, pixels: np.ndarray[Any, Any]) -> None:
    counts = [captioner.num_beam_steps]
    longest = []
    for _ in range(2):
        captions = captioner.caption_pixels(pixels[:1])
        longest.append(max(one.num_tokens for one in captions[0]))
        counts.append(captioner.num_beam_steps)

    first, second = counts[1] - counts[0], counts[2] - counts[1]
    assert first == second
    assert longest[0] <= first <= captioner.search.max_length + 1


# ---- attention


def test_attention_is_over_the_grid_for_each_word_of_the_best_caption(captioner: Captioner) -> None:
    photograph = jpeg(3)
    [best] = captioner.caption([photograph])

    attention = captioner.attend(photograph)

    assert isinstance(best, Caption)
    assert " ".join(one.word for one in attention) == best.text
    side = math.isqrt(captioner.encoder.num_regions)
    for one in attention:
        assert one.weights.shape == (side, side)
        assert one.weights.min() >= 0
        assert one.weights.sum() == pytest.approx(1, abs=1e-5)


def test_attention_is_computed_for_the_given_caption(captioner: Captioner) -> None:
    attention = captioner.attend(jpeg(3), "A dog, a unicorn")

    assert [one.word for one in attention] == ["a", "dog", "a", "unicorn"]
    assert captioner.attend(jpeg(3), "") == []


def test_a_model_without_attention_is_refused(lstm_captioner: Captioner, captioner: Captioner) -> None:
    with pytest.raises(ModelError, match="attention needs a single model"):
        lstm_captioner.attend(jpeg(3))
    with pytest.raises(ImageError):
        captioner.attend(b"no image")


# ---- the mean of several models


def test_the_mean_of_models_has_the_mean_of_their_weights(tmp_path: Path) -> None:
    folders = [read_model_folder(write_model_folder(tmp_path / f"{seed}", seed=seed)) for seed in (0, 1, 2)]

    mean = average_models(folders)

    for name, tensor in mean.tensors.items():
        expected = np.mean([folder.tensors[name].numpy() for folder in folders], axis=0)
        np.testing.assert_allclose(tensor.numpy(), expected, rtol=1e-5, atol=1e-6, err_msg=name)
    assert mean.fingerprint not in {folder.fingerprint for folder in folders}
    assert average_models(folders[:1]) is folders[0]
    larger = replace(folders[1], preprocessing=replace(folders[1].preprocessing, image_size=96))
    assert average_models([larger, folders[0]]).preprocessing.image_size == 96, "the first one's"


def test_models_that_differ_in_more_than_weights_cannot_be_averaged(tmp_path: Path) -> None:
    folders = [read_model_folder(write_model_folder(tmp_path / kind, decoder=kind)) for kind in ("attention", "lstm")]

    with pytest.raises(ModelError, match=r"lstm and .*attention cannot be averaged: they differ in their decoder"):
        average_models(folders)


# ---- the library


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ("one.jpg", "expected a list of images, got one str"),
        (b"bytes", "expected a list of images, got one bytes"),
        (np.zeros((8, 8, 3), np.uint8), "expected a list of images, got one ndarray"),
        (Image.new("RGB", (8, 8)), "expected a list of images, got one Image"),
        (io.BytesIO(b"bytes"), "expected a list of images, got one BytesIO"),
        (7, "expected a list of images, got one int"),
        ([7], "expected a path, a URI, a file's bytes, an open binary file, a PIL image or .*, got int"),
        ([np.zeros((3, 8, 8), np.uint8)], r"expected an array of uint8 \(H, W, 3\), got one of uint8 \(3, 8, 8\)"),
        ([np.zeros((8, 8, 3))], r"expected an array of uint8 \(H, W, 3\), got one of float64 \(8, 8, 3\)"),
        ([np.zeros((0, 8, 3), np.uint8)], r"got one of uint8 \(0, 8, 3\)"),
        ([io.StringIO("text")], "expected a file that is open in binary mode, got StringIO in text mode"),
    ],
)
def test_an_argument_that_is_not_a_list_of_images_is_a_type_error(
    captioner: Captioner, images: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        captioner.caption(images)


def test_all_kinds_of_images_get_the_caption_of_their_file(captioner: Captioner, tmp_path: Path) -> None:
    """In every mode of Pillow that a file can have, upright, from any iterable."""
    sideways = Image.open(io.BytesIO(jpeg(3)))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    pictures = [Image.open(io.BytesIO(jpeg(2))).convert(mode) for mode in ("RGB", "L", "P", "RGBA", "LA", "I;16", "1")]
    files = [tmp_path / f"{number}.png" for number in range(len(pictures) + 1)]
    for picture, file in zip(pictures, files, strict=False):
        picture.save(file)
    sideways.save(files[-1], exif=exif)
    expected = captioner.caption(files)
    assert len(set(expected)) > 2

    def opened() -> Iterator[BinaryIO]:
        for file in files:
            with file.open("rb") as open_file:
                open_file.read(7)  # as a program that has looked at the file
                yield open_file

    assert captioner.caption(Image.open(file) for file in files) == expected
    assert captioner.caption(opened()) == expected
    assert captioner.caption(bytearray(file.read_bytes()) for file in files) == expected
    rgb = np.asarray(pictures[0])
    assert captioner.caption(np.stack([rgb, rgb])) == [expected[0]] * 2
    assert (
        captioner.caption([rgb[:, ::-1][:, ::-1], pictures[0], io.BytesIO(files[0].read_bytes())]) == [expected[0]] * 3
    )


def test_a_picture_that_cannot_be_decoded_is_an_error_at_its_position(captioner: Captioner) -> None:
    whole = io.BytesIO()
    Image.effect_noise((200, 200), 50).save(whole, "png")
    cut = Image.open(io.BytesIO(whole.getvalue()[: len(whole.getvalue()) // 2]))

    results = captioner.caption([Image.new("RGB", (0, 0)), cut, Image.open(io.BytesIO(jpeg(1)))])

    assert [result.code for result in results[:2] if isinstance(result, ImageError)] == ["not_an_image", "not_an_image"]
    assert results[2] == captioner.caption([jpeg(1)])[0]


def test_images_are_read_one_batch_at_a_time(captioner: Captioner) -> None:
    num_read = 0

    def images() -> Iterator[bytes]:
        nonlocal num_read
        for number in range(COMPUTE_BATCH_SIZE + 1):
            num_read += 1
            yield jpeg(number)
        raise KeyboardInterrupt

    steps = captioner.num_beam_steps
    with pytest.raises(KeyboardInterrupt):
        captioner.caption(images())
    assert num_read == COMPUTE_BATCH_SIZE + 1
    assert captioner.num_beam_steps > steps, "the first batch is captioned before the second is read"


def test_the_number_of_captions_and_the_beam_size_can_be_given_for_a_call(
    captioner: Captioner, model_dir: Path
) -> None:
    images = [jpeg(0), b"no image", jpeg(1)]
    wide = Captioner.load(model_dir, device="cpu", search=replace(captioner.search, beam_size=7, num_captions=7))

    several = captioner.caption(images, num_captions=7, beam_size=7)

    assert several[::2] == wide.caption_pixels(np.stack([wide.read_pixels(jpeg(number)) for number in (0, 1)]))
    assert isinstance(several[1], ImageError)
    assert captioner.caption(images[:1], beam_size=7) == [several[0][0]]
    assert captioner.caption(images[:1], num_captions=1) == [captioner.caption(images[:1])]
    with pytest.raises(ConfigError, match="^num_captions must be 1 to beam_size"):
        captioner.caption(images, num_captions=100)


def test_the_repr_of_a_captioner_names_its_model(captioner: Captioner, model_dir: Path) -> None:
    assert re.fullmatch(
        rf"<TorchCaptioner {model_dir}: 64 x 64 pixels, \d+ tokens, SearchConfig\(beam_size=.*\), on cpu>",
        repr(captioner),
    )


def test_the_cnn_is_not_optimized_when_a_captioner_is_loaded_and_once_when_it_is_used(
    model_dir: Path, pixels: np.ndarray[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    optimized: list[Any] = []

    def optimize(encoder: Encoder, device: torch.device) -> Any:
        optimized.append(optimize_for_inference(encoder, device))
        return optimized[-1]

    monkeypatch.setattr("imcap_ray.models.torch_captioner.optimize_for_inference", optimize)

    captioner = Captioner.load(model_dir, device="cpu")
    assert not optimized
    for _ in range(2):
        captioner.caption_pixels(pixels[:2])
    assert optimized == [captioner.encoder]
