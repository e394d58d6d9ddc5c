"""Models of the transformers library caption as they do by themselves, one image at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from imcap_ray.errors import ConfigError, ImageError, ModelError
from imcap_ray.models.captioner_spec import CaptionerSpec, absolute_model
from tests.small_data import jpeg
from tests.tiny_transformers import WRITERS, write_blip

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: write(folder / name) for name, write in WRITERS.items()}


@pytest.fixture(params=list(WRITERS))
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


def load(folder: Path, num_captions: int = 1, **options: str) -> Any:
    options = {"max_new_tokens": "8", "batch_size": "4"} | options
    spec = CaptionerSpec(models=(f"hf:{folder}",), options=tuple(options.items()), num_captions=num_captions)
    captioner = spec()
    captioner.start(gpus=0)
    return captioner


def photographs(count: int = 6) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (40 + 5 * n, 60, 3), np.uint8)) for n in range(count)]


def pixels_of(captioner: Any) -> np.ndarray[Any, Any]:
    return np.stack([captioner._plugin.prepare(image) for image in photographs()])


def test_pixels_equal_those_of_the_processor_alone(folder: Path) -> None:
    captioner = load(folder)._plugin
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    image = photographs(1)[0]

    prepared = captioner.prepare(image)
    normalised = (torch.from_numpy(prepared).float() * captioner._scale - captioner._mean) / captioner._std

    assert prepared.dtype == np.uint8
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(normalised, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_beams", ["1", "3"])
def test_captions_equal_those_of_the_model_alone(folder: Path, num_beams: str) -> None:
    captioner = load(folder, num_beams=num_beams)
    model = captioner._plugin._model
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    results = captioner.caption_pixels(pixels_of(captioner))

    for image, captions in zip(photographs(), results, strict=True):
        inputs = processor(image, return_tensors="pt")["pixel_values"]
        alone = model.generate(pixel_values=inputs, max_new_tokens=8, num_beams=int(num_beams), do_sample=False)
        assert captions[0].text == tokenizer.batch_decode(alone, skip_special_tokens=True)[0].strip()
    assert len({captions[0].text for captions in results}) > 1, "otherwise the test proves nothing"


@pytest.mark.parametrize("num_beams", ["1", "3"])
def test_captions_do_not_depend_on_their_batch(folder: Path, num_beams: str) -> None:
    captioner = load(folder, num_captions=int(num_beams), num_beams=num_beams)
    pixels = pixels_of(captioner)

    together = captioner.caption_pixels(pixels)
    alone = [captioner.caption_pixels(pixels[n : n + 1])[0] for n in range(len(pixels))]

    assert [[caption.text for caption in captions] for captions in alone] == [
        [caption.text for caption in captions] for captions in together
    ]
    for captions, expected in zip(alone, together, strict=True):  # the last digit may depend on the place in the batch
        assert [caption.logprob for caption in captions] == pytest.approx([one.logprob for one in expected], rel=1e-5)
        assert all(0 < caption.confidence <= 1 and 1 <= caption.num_tokens <= 8 for caption in captions)


@pytest.mark.parametrize("num_beams", [1, 3])
def test_the_logprob_is_the_sum_over_the_tokens_up_to_the_end(folders: dict[str, Path], num_beams: int) -> None:
    captioner = load(folders["vit-gpt2"], num_captions=num_beams, num_beams=str(num_beams))
    model, pixels = captioner._plugin._model, pixels_of(captioner)

    results = captioner.caption_pixels(pixels)

    for image, captions in zip(photographs(), results, strict=True):
        inputs = transformers.AutoImageProcessor.from_pretrained(folders["vit-gpt2"])(image, return_tensors="pt")
        arguments = {"max_new_tokens": 8, "num_beams": num_beams, "num_return_sequences": num_beams}
        sequences = model.generate(**inputs, **arguments, do_sample=False)
        for caption, sequence in zip(captions, sequences, strict=True):
            tokens = sequence[1 : 1 + caption.num_tokens]
            assert 3 not in tokens[:-1]
            assert caption.num_tokens == 8 or tokens[-1] == 3
            logits = model(**inputs, decoder_input_ids=sequence[None, : caption.num_tokens]).logits
            expected = logits[0].log_softmax(-1)[range(len(tokens)), tokens].sum().item()
            assert caption.logprob == pytest.approx(expected, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("name", ["blip", "git"])
def test_a_prompt_is_continued_and_is_not_part_of_the_caption(folders: dict[str, Path], name: str) -> None:
    prompt = "a dog"
    captioner = load(folders[name], prompt=prompt)
    model = captioner._plugin._model
    processor = transformers.AutoProcessor.from_pretrained(folders[name])

    results = captioner.caption_pixels(pixels_of(captioner))

    for image, captions in zip(photographs(), results, strict=True):
        inputs = processor(images=image, text=prompt, return_tensors="pt")
        if name == "git":  # as in its documentation: without an end token
            inputs = {key: inputs[key][:, :-1] for key in ("input_ids", "attention_mask")} | {
                "pixel_values": inputs["pixel_values"]
            }
        alone = model.generate(**inputs, max_new_tokens=8, do_sample=False)
        text = processor.decode(alone[0], skip_special_tokens=True).strip()
        assert captions[0].text == text.removeprefix(prompt).strip()
    assert results != load(folders[name]).caption_pixels(pixels_of(captioner))


def test_a_model_without_prompts_is_refused(folders: dict[str, Path]) -> None:
    captioner = load(folders["vit-gpt2"], prompt="a dog")

    with pytest.raises(ModelError, match="takes no prompt"):
        captioner.caption_pixels(np.zeros((1, *captioner.preparation.shape), np.uint8))


def test_bfloat16_computes_almost_what_float32_does(folder: Path) -> None:
    narrow, wide = load(folder, precision="bfloat16"), load(folder)
    pixels = pixels_of(wide)

    assert {parameter.dtype for parameter in narrow._plugin._model.parameters()} == {torch.bfloat16}
    for (few,), (many,) in zip(narrow.caption_pixels(pixels), wide.caption_pixels(pixels), strict=True):
        assert few.confidence == pytest.approx(many.confidence, abs=0.3)


def test_a_beam_search_that_goes_on_after_its_results_has_captions(folders: dict[str, Path]) -> None:
    captioner = load(folders["vit-gpt2"], num_beams="2", batch_size="1")
    decoded = [captioner.preparation(jpeg(number)).pixels for number in range(24)]

    results = captioner.caption_pixels(np.stack(decoded))

    assert not [result for result in results if isinstance(result, ImageError)]
    assert min(captions[0].num_tokens for captions in results) < 8


def test_settings_and_weights_are_in_the_fingerprint(folders: dict[str, Path], tmp_path: Path) -> None:
    other = write_blip(tmp_path / "other")
    weights = other / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")

    fingerprint = load(folders["blip"]).fingerprint

    assert load(folders["blip"]).fingerprint == fingerprint
    assert load(folders["blip"], num_beams="2").fingerprint != fingerprint
    assert load(other).fingerprint != fingerprint


def test_a_model_that_differs_between_processes_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="another model in this process than where the run was started"):
        CaptionerSpec(models=(f"hf:{folders['blip']}",), fingerprint="another")()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": "many"}, "--model-option num_beams must be an integer of at least 1, got 'many'"),
        ({"precision": "int4"}, "precision must be float32 or bfloat16"),
        ({"trust_remote_code": "yes"}, "trust_remote_code must be false or true"),
        ({"beams": "3"}, "does not take these options"),
    ],
)
def test_wrong_options_are_refused(folders: dict[str, Path], options: dict[str, str], message: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=message):
        load(folders["blip"], **options)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch, folders: dict[str, Path]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    with pytest.raises(ModelError, match=r"needs the library transformers .*pip install 'imcap_ray\[transformers\]'"):
        load(folders["blip"])


def test_a_missing_network_or_model_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()

    for name in ("nobody/nothing", str(tmp_path / "empty")):
        with pytest.raises(ModelError, match=f"hf:{name} cannot be loaded: .* can be downloaded or was") as caught:
            CaptionerSpec(models=(f"hf:{name}",))()
        assert "\n" not in str(caught.value)


def test_weights_in_a_pickle_are_refused(tmp_path: Path) -> None:
    folder = write_blip(tmp_path / "pickled")
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    captioner = load(folder)

    with pytest.raises(ModelError, match="cannot be loaded.*safetensors"):
        captioner.caption_pixels(np.zeros((1, *captioner.preparation.shape), np.uint8))


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    transformers.BertConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1).save_pretrained(tmp_path)

    with pytest.raises(ModelError, match="is a model of the type bert, which does not turn images into text"):
        CaptionerSpec(models=(f"hf:{tmp_path}",))()


def test_a_local_folder_gets_an_absolute_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)

    assert absolute_model("hf:mine") == f"hf:{tmp_path / 'mine'}"
    assert absolute_model("hf:owner/name") == "hf:owner/name"


def test_processes_that_share_a_cache_download_a_file_once(tmp_path: Path) -> None:
    downloads: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            for name, value in {"ETag": '"abc"', "X-Repo-Commit": "0" * 40, "Content-Length": "4"}.items():
                self.send_header(name, value)
            self.end_headers()

        def do_GET(self) -> None:
            downloads.append(self.path)
            time.sleep(1)
            self.do_HEAD()
            self.wfile.write(b"data")

        def log_message(self, *_: object) -> None:
            pass

    program = "from huggingface_hub import hf_hub_download as download; download('owner/name', 'model.safetensors')"
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        variables = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path)}
        variables |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        processes = [
            subprocess.Popen([sys.executable, "-c", program], env={**os.environ, **variables}) for _ in range(3)
        ]
        assert [process.wait(timeout=50) for process in processes] == [0, 0, 0]
        server.shutdown()

    assert [path for path in downloads if "model.safetensors" in path] == ["/owner/name/resolve/main/model.safetensors"]
