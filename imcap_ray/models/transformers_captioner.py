"""A model of the transformers library -> a `CaptionerPlugin`, named `hf:OWNER/NAME` or `hf:FOLDER`.

B images, N captions of each, T generated tokens.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from imcap_ray.errors import ConfigError, ImageError, ModelError
from imcap_ray.models.caption import Caption

_HASHED: Final = ("*.json", "*.txt", "*.model", "*.safetensors", "*.jinja", "*.py")
"""Files of a local folder that decide its captions."""


class TransformersCaptioner:
    """Captions with a `VisionEncoderDecoderModel`, or any model of `AutoModelForImageTextToText` whose images have one
    size. The keyword arguments are those of `--model-option`.

    Args:
        name: OWNER/NAME on the Hugging Face Hub, or a local folder.
        revision: branch, tag or commit of the Hub.
        prompt: text that the caption continues, or the question that it answers.
        max_new_tokens: longest caption, in tokens.
        num_beams: beam width; 1 is greedy search. At least the number of captions.
        batch_size: images that are computed together.
        precision: `float32` or `bfloat16`; default: `bfloat16` on a GPU.
        trust_remote_code: `true` runs Python code that comes with the model.

    Raises:
        ModelError: the library, the model or the network is missing, or the model is of another kind.
        ConfigError: an option is out of range.
    """

    def __init__(
        self,
        name: str,
        *,
        revision: str = "main",
        prompt: str = "",
        max_new_tokens: str = "30",
        num_beams: str = "1",
        batch_size: str = "16",
        precision: str = "",
        trust_remote_code: str = "false",
    ) -> None:
        self.name = name
        self._prompt = prompt
        self._max_new_tokens = _positive("max_new_tokens", max_new_tokens)
        self._num_beams = _positive("num_beams", num_beams)
        self.batch_size = _positive("batch_size", batch_size)
        self._precision = _choice("precision", precision, ("", "float32", "bfloat16"))
        self._trusts = _choice("trust_remote_code", trust_remote_code, ("false", "true")) == "true"
        self.resources: Mapping[str, float] = {}
        self._transformers = _import_transformers(name)
        with self._errors():
            self._source = self._find(revision)
            self._config = self._transformers.AutoConfig.from_pretrained(**self._source)
        self._model_class = self._choose_class()

    def _find(self, revision: str) -> dict[str, Any]:
        """Arguments of `from_pretrained`, with the commit of the revision."""
        if os.path.isdir(self.name):
            return {"pretrained_model_name_or_path": self.name, "trust_remote_code": self._trusts}
        from huggingface_hub import hf_hub_download

        path = Path(hf_hub_download(self.name, "config.json", revision=revision))  # .../snapshots/COMMIT/config.json
        return {
            "pretrained_model_name_or_path": self.name,
            "revision": path.parent.name,
            "trust_remote_code": self._trusts,
        }

    def _choose_class(self) -> Any:
        kind = self._config.model_type
        if kind == "vision-encoder-decoder":
            return self._transformers.VisionEncoderDecoderModel
        known = self._transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
        if type(self._config) not in known and "AutoModelForImageTextToText" not in getattr(
            self._config, "auto_map", {}
        ):
            raise ModelError(f"hf:{self.name} is a model of the type {kind}, which does not turn images into text")
        return self._transformers.AutoModelForImageTextToText

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise what the libraries raise, because of missing files or networks, as ModelErrors of one line."""
        try:
            yield
        except (OSError, ValueError, ImportError, KeyError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelError(
                f"hf:{self.name} cannot be loaded: {reason} (expected a folder, or a model of the Hugging Face Hub "
                "that can be downloaded or was before)"
            ) from error

    @cached_property
    def fingerprint(self) -> str:
        """Commit of the Hub, or the hash of the folder's files; and the settings, which are options."""
        if "revision" in self._source:
            return f"{self.name} {self._source['revision']}"
        digest = hashlib.sha256()
        for path in sorted({path for pattern in _HASHED for path in Path(self.name).glob(pattern)}):
            digest.update(f"{path.name} {path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(2**20):
                    digest.update(chunk)
        return digest.hexdigest()

    @cached_property
    def _processor(self) -> Any:
        with self._errors():
            return self._transformers.AutoImageProcessor.from_pretrained(**self._source)

    def prepare(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Resize and crop as the model's processor does; its normalisation is computed with the model."""
        inputs = self._processor(image, do_rescale=False, do_normalize=False, return_tensors="np")
        pixels = np.asarray(inputs["pixel_values"])[0]
        if pixels.ndim != 3:
            raise ModelError(f"hf:{self.name} divides an image into parts, which is not supported: {pixels.shape}")
        rounded: npt.NDArray[np.uint8] = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
        return rounded

    def load(self, gpus: float) -> None:
        """Load the weights, onto the GPU if there is one."""
        import torch

        from imcap_ray.models.devices import choose_device

        self._device = choose_device(gpus)
        on_gpu = self._device.type == "cuda"
        self._dtype = getattr(torch, self._precision or ("bfloat16" if on_gpu else "float32"))
        with self._errors():
            # Kernels would be compiled code that is downloaded from the Hub.
            options = {"dtype": self._dtype, "use_safetensors": True, "use_kernels": False}
            model = self._model_class.from_pretrained(**self._source, **options)
            self._tokenizer = self._transformers.AutoTokenizer.from_pretrained(**self._source)
            self._texts = self._encode_prompt() if self._prompt else {}
        self._model = model.to(self._device).eval()
        ends = (self._model.generation_config.eos_token_id, self._tokenizer.eos_token_id, self._tokenizer.sep_token_id)
        self._end_ids = [
            number for end in ends if end is not None for number in (end if isinstance(end, list) else [end])
        ]
        processor = self._processor
        scale = processor.rescale_factor if processor.do_rescale else 1.0
        mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else (0.0, 1.0)
        self._scale, self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self._device).reshape(-1, 1, 1)
            for values in (scale, mean, std)
        )

    def _encode_prompt(self) -> dict[str, Any]:
        """The prompt's tokens, as the model's processor writes them next to an image."""
        processor = self._transformers.AutoProcessor.from_pretrained(**self._source)
        if not hasattr(processor, "tokenizer"):
            raise ModelError(f"hf:{self.name} takes no prompt")
        inputs = processor(images=Image.new("RGB", (64, 64)), text=self._prompt, return_tensors="pt")
        # GIT would continue after the end token that its processor writes; BLIP removes it itself.
        end = -1 if self._config.model_type == "git" else None
        names = [name for name in ("input_ids", "attention_mask") if name in inputs]
        return {name: inputs[name][:, :end].to(self._device) for name in names}

    def caption(self, batch: npt.NDArray[np.uint8], num_captions: int) -> Sequence[Sequence[Caption] | ImageError]:
        """Generate the captions by greedy or beam search, the most probable one first."""
        import torch

        count = len(batch)
        # Always as many images, because the shape of a batch decides how numbers are rounded.
        batch = np.concatenate([batch, np.repeat(batch[-1:], self.batch_size - count, axis=0)])
        pixels = torch.from_numpy(batch).to(self._device).float()
        pixels = ((pixels * self._scale - self._mean) / self._std).to(self._dtype)
        num_beams = max(self._num_beams, num_captions)
        with torch.inference_mode():
            generated = self._model.generate(
                pixel_values=pixels,
                **{name: tokens.repeat(len(batch), 1) for name, tokens in self._texts.items()},  # BLIP writes to them
                max_new_tokens=self._max_new_tokens,
                num_beams=num_beams,
                num_return_sequences=num_captions,
                do_sample=False,
                return_dict_in_generate=True,
                output_scores=True,
            )
            tokens, logprobs = _generated_tokens(generated)
        is_end = torch.isin(tokens, torch.tensor(self._end_ids, device=self._device))
        is_part = is_end.cumsum(1) - is_end.long() == 0  # up to the first end token
        texts = self._tokenizer.batch_decode(tokens, skip_special_tokens=True)
        sums, lengths = logprobs.where(is_part, 0.0).sum(1).tolist(), is_part.sum(1).tolist()
        captions = [
            Caption(text.strip(), min(0.0, logprob), length)
            for text, logprob, length in zip(texts, sums, lengths, strict=True)
        ]
        return [captions[number * num_captions : (number + 1) * num_captions] for number in range(count)]


def _generated_tokens(generated: Any) -> tuple[Any, Any]:
    """The generated tokens (B * N, T) and their log-probabilities."""
    import torch

    beams = getattr(generated, "beam_indices", None)
    # A beam search may go on after the last token of its results.
    length = len(generated.scores) if beams is None else beams.shape[1]
    tokens = generated.sequences[:, -length:]
    columns = []
    for position, scores in enumerate(generated.scores[:length]):
        rows = torch.arange(len(tokens), device=tokens.device) if beams is None else beams[:, position].clamp(min=0)
        columns.append(scores.float().log_softmax(-1)[rows, tokens[:, position]])
    return tokens, torch.stack(columns, dim=1)


def _import_transformers(name: str) -> Any:
    try:
        import huggingface_hub
        import transformers
    except ImportError as error:
        raise ModelError(
            f"hf:{name} needs the library transformers ({error}): pip install 'imcap_ray[transformers]'"
        ) from error
    huggingface_hub.logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # it warns of each attempt
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def _positive(name: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and int(value) >= 1):
        raise ConfigError(f"--model-option {name} must be an integer of at least 1, got {value!r}")
    return int(value)


def _choice(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise ConfigError(f"--model-option {name} must be {' or '.join(filter(None, choices))}, got {value!r}")
    return value
