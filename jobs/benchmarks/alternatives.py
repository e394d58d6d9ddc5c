"""Speed of `imcap caption` next to other ways to caption a folder with the same model.

python jobs/benchmarks/alternatives.py
"""

from __future__ import annotations

import logging
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import ray
import torch
from PIL import Image
from shared import decode_whole, json_option, require_rate, show

from imcap_ray.cli.options import precision_option
from imcap_ray.data.synthetic_images import write_photographs
from imcap_ray.distributed.benchmark import Rate, describe_machine, measure_run, steady_rate
from imcap_ray.distributed.cluster.machine import available_cores
from imcap_ray.errors import ImageError
from imcap_ray.models.captioner_spec import CaptionerSpec
from imcap_ray.models.decoders import AttentionDecoder
from imcap_ray.models.encoders import build_encoder
from imcap_ray.models.model_folder import read_model_folder
from imcap_ray.models.model_weights import select_tensors
from imcap_ray.models.torch_captioner import TorchCaptioner, load_torch_captioner
from imcap_ray.text.vocabulary import END_ID, START_ID

Load = Callable[[], TorchCaptioner]


@click.command()
@click.option("--images", default=1000, show_default=True, help="Images of 500 x 375.")
@click.option("--tutorial-images", default=100, show_default=True, help="Images for the loops over single images.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--our-model", is_flag=True, help="Give the alternatives our fused CNN and our packed decoder too.")
@precision_option
@json_option
def main(images: int, tutorial_images: int, rounds: int, our_model: bool, precision: str, as_json: bool) -> None:
    """Compare `imcap caption` with four other programs around the same model.

    A PyTorch DataLoader with a worker for each core, whose batches the main process captions; Ray Data's documented
    recipe (read_images, map, map_batches with actors); and one image at a time with a beam search in Python. Tutorials
    in Keras run the whole decoder for each next word, on the image and all words so far; those in PyTorch keep the
    LSTM's state. The first two use our batched search. All alternatives run the model as torch does, in float32. Rates
    are steady ones, without start-up. The programs take turns, round by round.
    """
    load = load_torch_captioner if our_model else _load_plain
    programs: dict[str, Callable[[str, str], float]] = {
        "imcap caption": partial(_caption_by_imcap, precision=precision),
        "DataLoader loop": partial(_caption_by_data_loader, load=load),
        "Ray's recipe": partial(_caption_by_ray_recipe, load=load),
        "tutorial loop": partial(_caption_one_by_one, load=load, count=tutorial_images, keeps_state=False),
        "tutorial loop, state kept": partial(_caption_one_by_one, load=load, count=tutorial_images, keeps_state=True),
    }
    rates: dict[str, list[float]] = {name: [] for name in programs}
    with tempfile.TemporaryDirectory(prefix="imcap-bench-") as folder:
        source = f"{folder}/photographs"
        write_photographs(source, images, (500, 375))
        for number in range(rounds):
            for name, caption in programs.items():
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                    rates[name].append(pool.submit(caption, source, f"{folder}/{name}-{number}").result())
                click.echo(f"round {number + 1}, {name}: {rates[name][-1]:.1f} images/s", err=True)
    ours = Rate(tuple(rates["imcap caption"]))
    result: dict[str, Any] = {"machine": describe_machine(), "images": images, "precision": precision}
    for name, values in rates.items():
        rate = Rate(tuple(values))
        result[name] = rate.to_dict() | {"ours_is_times": round(ours.median / rate.median, 2)}
    show(result, as_json)


def _caption_by_imcap(source: str, output: str, *, precision: str) -> float:
    return require_rate(measure_run(source, output, spec=CaptionerSpec(precision=precision)).steady)


def _load_plain() -> TorchCaptioner:
    """Load the bundled captioner as torch runs it: its CNN layer by layer, its decoder's weights unpacked."""
    captioner, folder = load_torch_captioner(), read_model_folder()
    assert isinstance(captioner.decoder, AttentionDecoder)
    captioner.decoder.freeze(packed=False)
    encoder = build_encoder(folder.encoder, folder.preprocessing, load_weights=False)
    encoder.cnn.load_state_dict(select_tensors("encoder.", folder.tensors))
    captioner.encoder = encoder.eval().to(captioner.device)
    return captioner


# ---- PyTorch's DataLoader


def _caption_by_data_loader(source: str, output: str, *, load: Load) -> float:
    captioner = load()
    loader = torch.utils.data.DataLoader(
        _Photographs(source, captioner.image_size), batch_size=32, num_workers=available_cores()
    )
    return _steady_rate_of(len(captioner.caption_pixels(pixels)) for pixels in loader)


class _Photographs(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, source: str, image_size: int) -> None:
        self._files = sorted(Path(source).rglob("*.jpg"))
        self._image_size = image_size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.from_numpy(decode_whole(self._files[number].read_bytes(), self._image_size))


# ---- Ray Data's recipe


class RecipeCaptioner:
    """The actor of Ray Data's guide to batch inference, with our model in it."""

    def __init__(self, load: Load) -> None:
        self._captioner = load()

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Caption a batch of pixels."""
        captions = self._captioner.caption_pixels(np.stack(list(batch["pixels"])))
        return {"caption": ["" if isinstance(best, ImageError) else best[0].text for best in captions]}


def _caption_by_ray_recipe(source: str, output: str, *, load: Load) -> float:
    # Ray's own settings. With fewer logical CPUs its readers would have none next to the actors.
    ray.init(
        address="local",
        num_cpus=available_cores() + 2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    gpus = int(ray.cluster_resources().get("GPU", 0))
    ray.cloudpickle.register_pickle_by_value(sys.modules[RecipeCaptioner.__module__])
    dataset = (
        ray.data.read_images(source, mode="RGB")
        .map(partial(_preprocess, image_size=load_torch_captioner().image_size))
        .map_batches(
            RecipeCaptioner,
            fn_constructor_args=(load,),
            batch_size=32,
            num_cpus=1,
            num_gpus=1 if gpus else None,
            compute=ray.data.ActorPoolStrategy(size=gpus or available_cores()),
        )
    )
    return _steady_rate_of(len(batch["caption"]) for batch in dataset.iter_batches(batch_size=32))


def _preprocess(row: dict[str, Any], *, image_size: int) -> dict[str, Any]:
    squashed = Image.fromarray(row["image"]).resize((image_size, image_size), Image.Resampling.BICUBIC)
    return {"pixels": np.ascontiguousarray(np.asarray(squashed).transpose(2, 0, 1))}


# ---- one image at a time, as in tutorials


def _caption_one_by_one(source: str, output: str, *, load: Load, count: int, keeps_state: bool) -> float:
    captioner = load()
    files = sorted(Path(source).rglob("*.jpg"))[:count]
    return _steady_rate_of(_caption_one(captioner, file, keeps_state=keeps_state) for file in files)


@torch.inference_mode()
def _caption_one(captioner: TorchCaptioner, file: Path, *, keeps_state: bool) -> int:
    """Caption a photograph with a beam of Python lists; finished beams leave it.

    Args:
        keeps_state: continue from the LSTMs' last state, with keys and values of the image that are computed once;
            otherwise the whole decoder runs again for each word of each beam.
    """
    pixels = torch.from_numpy(decode_whole(file.read_bytes(), captioner.image_size)).unsqueeze(0).to(captioner.device)
    search, decoder, features = captioner.search, captioner.decoder, captioner.encoder(pixels)
    assert isinstance(decoder, AttentionDecoder)
    step, state = decoder.start(features, 1) if keeps_state else (None, None)
    of_first_image = torch.zeros(1, dtype=torch.long, device=captioner.device)
    live: list[tuple[float, list[int], Any]] = [(0.0, [START_ID], state)]
    finished: list[tuple[float, list[int]]] = []
    for _ in range(search.max_length):
        grown = []
        for logprob, words, state_of_beam in live:
            tokens = torch.tensor([words], device=captioner.device)
            if step:
                log_probs, next_state = step(tokens[:, -1:], state_of_beam)
            else:
                logits = decoder(features, tokens, torch.tensor([len(words)]), of_first_image)
                log_probs, next_state = logits[None, -1:].log_softmax(dim=-1), state_of_beam
            values, words_after = log_probs[0, 0].topk(search.beam_size)
            grown += [
                (logprob + value, [*words, word], next_state)
                for value, word in zip(values.tolist(), words_after.tolist(), strict=True)
            ]
        grown.sort(key=lambda beam: -beam[0])
        best = grown[: search.beam_size - len(finished)]
        finished += [(logprob, words) for logprob, words, _ in best if words[-1] == END_ID]
        live = [beam for beam in best if beam[1][-1] != END_ID]
        if not live:
            break
    scored = finished or [(logprob, words) for logprob, words, _ in live]
    captioner.vocabulary.to_text(max(scored, key=lambda beam: beam[0] / len(beam[1]) ** search.length_penalty)[1][1:])
    return 1


def _steady_rate_of(counts: Iterable[int]) -> float:
    """Images per second in the middle of a run, from the images of each of its steps."""
    timeline, done, start = [], 0, time.perf_counter()
    for count in counts:
        done += count
        timeline.append((time.perf_counter() - start, done))
    return require_rate(steady_rate(timeline))


if __name__ == "__main__":
    main()
