"""Captioners of others are loaded by name, and what is wrong with them is said in one line."""

from __future__ import annotations

import io
import math
import pickle
import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import ExifTags, Image

from imcap_ray.data.image_decoding import decode_prepared
from imcap_ray.errors import ConfigError, ImageError, ImcapError, ModelError
from imcap_ray.models import plugin
from imcap_ray.models.captioner_spec import CaptionerSpec, absolute_model, caption_files
from imcap_ray.models.plugin import PluggedCaptioner, is_plugin_name
from tests.fakes import echo
from tests.small_data import jpeg

RED, BLUE = np.full((32, 32, 3), (255, 0, 0), np.uint8), np.full((32, 32, 3), (0, 0, 255), np.uint8)


def spec(name: str = "tests.plugins:Echo", **options: str) -> CaptionerSpec:
    return CaptionerSpec(models=(name,), options=tuple(options.items()))


def test_a_captioner_is_loaded_by_name_and_gets_the_options() -> None:
    captioner = pickle.loads(pickle.dumps(spec(size="8")))()
    captioner.start(gpus=0)

    pixels = captioner.preparation(jpeg(1)).pixels
    (captions,) = captioner.caption_pixels(pixels[None])

    assert pixels.shape == captioner.preparation.shape == (8, 8, 3)
    assert captions[0].text == f"{echo(pixels)} 0"
    assert math.isnan(captions[0].confidence)


def test_prepared_images_are_upright_and_have_their_full_size() -> None:
    image, stream, sizes = Image.new("RGB", (300, 20), "white"), io.BytesIO(), []
    exif = image.getexif()
    exif[ExifTags.Base.Orientation] = 6
    image.save(stream, "JPEG", exif=exif)

    def prepare(rgb: Image.Image) -> npt.NDArray[np.uint8]:
        sizes.append(rgb.size)
        return np.asarray(rgb)

    decoded = decode_prepared(stream.getvalue(), prepare=prepare)

    assert sizes == [(20, 300)]
    assert (decoded.width, decoded.height) == (20, 300)


def test_an_entry_point_is_a_short_name(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint(name="echo", value="tests.plugins:Echo", group=plugin.ENTRY_POINT_GROUP)
    monkeypatch.setattr(plugin, "entry_points", lambda **wanted: EntryPoints([entry]).select(**wanted))

    assert is_plugin_name("echo")
    assert spec("echo", size="16")().preparation.shape == (16, 16, 3)
    with pytest.raises(ModelError, match="no such model: blip.*or one of flickr8k-lite2, echo"):
        absolute_model("blip")


def test_a_module_of_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_alone.py").write_text("from tests.plugins import Echo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])

    assert spec("mine_alone:Echo")().fingerprint == spec()().fingerprint


def test_options_change_the_fingerprint() -> None:
    assert spec(size="8")().fingerprint != spec()().fingerprint == spec()().fingerprint


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("no.such.module:Echo", {}, "cannot be imported: ModuleNotFoundError: No module named 'no'"),
        ("tests.plugins:Nothing", {}, "cannot be imported: AttributeError.*Nothing"),
        ("tests.plugins:math", {}, "must be a function or a class, got module"),
        ("tests.plugins:Echo", {"sise": "8"}, "does not take these options.*unexpected keyword argument 'sise'"),
        ("tests.plugins:Echo", {"size": "big"}, "cannot be loaded: ValueError: invalid literal"),
        ("tests.plugins:Faulty", {}, "does not take these options.*missing a required argument: 'fault'"),
        ("tests.plugins:fails", {}, "cannot be loaded: KeyError: 'no such thing'"),
        ("tests.plugins:returns_a_path", {}, "must return a captioner with prepare.*PosixPath without prepare"),
        ("tests.plugins:WithoutCaption", {}, "got WithoutCaption without caption"),
    ],
)
def test_what_is_no_captioner_is_refused_in_one_line(name: str, options: dict[str, str], message: str) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        spec(name, **options)()

    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_settings_of_model_folders_are_refused_for_other_captioners() -> None:
    with pytest.raises(ConfigError, match="--beam-size is for model folders"):
        CaptionerSpec(models=("tests.plugins:Echo",), beam_size=3)()
    with pytest.raises(ConfigError, match="only model folders caption together"):
        CaptionerSpec(models=("flickr8k-lite2", "tests.plugins:Echo"))()
    with pytest.raises(ConfigError, match="model folders have no options: --model-option size"):
        CaptionerSpec(options=(("size", "8"),))()


def test_weights_that_cannot_be_loaded_stop_the_run() -> None:
    captioner = spec("tests.plugins:Unloadable")()
    captioner.start(gpus=0)

    with pytest.raises(ImcapError, match="load raised an error: FileNotFoundError: weights.bin"):
        captioner.caption_pixels(BLUE[None])


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("raises", "the captioner raised an error: RuntimeError: planted"),
        ("too few", "caption must return a list of 1 results, got 0 results"),
        ("no captions", "expected 1 captions, the captioner returned 0"),
        ("not text", "text must be a string, got float"),
        ("no caption", "expected a Caption, got str"),
        ("a text", "expected a list of captions, got str"),
        ("none", "expected a list of captions, got NoneType"),
        ("infinite", "logprob must be at most 0, or NaN if it is unknown, got -inf"),
        ("positive", "logprob must be at most 0"),
        ("too long", "num_tokens must be from 0 to 32,767, got 32768"),
        ("surrogate", "surrogates not allowed"),
        ("unfamiliar", "familiarity must be from 0 to 1"),
    ],
)
def test_a_wrong_answer_is_the_error_of_its_image_alone(fault: str, message: str) -> None:
    captioner = PluggedCaptioner("tests.plugins:Faulty", (("fault", fault),))
    captioner.start(gpus=0)

    results = captioner.caption_pixels(np.stack([BLUE, RED, BLUE, BLUE]))

    assert [isinstance(result, ImageError) for result in results] == [False, True, False, False]
    assert isinstance(results[1], ImageError)
    assert results[1].code == "internal"
    assert message in results[1].message


def test_a_batch_that_does_not_fit_into_memory_is_halved() -> None:
    captioner = PluggedCaptioner("tests.plugins:Echo")
    captioner.start(gpus=0)
    sizes = []
    whole = captioner._plugin.caption

    def caption(batch: np.ndarray, num_captions: int) -> object:  # type: ignore[type-arg]
        sizes.append(len(batch))
        if len(batch) > 2:
            raise MemoryError
        return whole(batch, num_captions)

    captioner._plugin.caption = caption  # type: ignore[method-assign,assignment]

    results = captioner.caption_pixels(np.stack([BLUE] * 8))

    assert len(results) == 8
    assert sizes == [8, 4, 2, 2, 2, 2]


def test_an_image_of_another_shape_is_its_own_error() -> None:
    captioner = spec("tests.plugins:Square")()

    with pytest.raises(ImageError, match=r"must return uint8 \(64, 64, 3\) for every image, got uint8 \(60, 80, 3\)"):
        captioner.preparation(jpeg(1))


def test_files_are_captioned_without_ray(tmp_path: Path) -> None:
    (tmp_path / "one.jpg").write_bytes(jpeg(1))
    captioner = spec()()
    captioner.start(gpus=0)

    found, missing = caption_files(captioner, [str(tmp_path / "one.jpg"), str(tmp_path / "two.jpg")])

    assert isinstance(found, list)
    assert isinstance(missing, ImageError)
    assert missing.code == "missing"
