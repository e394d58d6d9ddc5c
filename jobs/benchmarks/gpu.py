"""Captioning and training on one GPU, next to the CPU of the same machine: answers, speeds and memory.

python jobs/benchmarks/gpu.py --output gpu.json
python jobs/benchmarks/gpu.py --output gpu.json --rehearse

Each section has a process of its own with a time limit, at most eight minutes together. Where it fails or is stopped,
the JSON keeps what it had measured, with the traceback, and the other sections follow. Only the section `command`
needs Ray. `carry_wheels.sh` installs what is missing on a machine without a network.
"""

from __future__ import annotations

import gc
import io
import itertools
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import click
import numpy as np
import torch
from torch import Tensor

from imcap_ray.config import load_recipe
from imcap_ray.data.image_decoding import decode_image
from imcap_ray.data.synthetic_images import write_photographs
from imcap_ray.errors import ImageError
from imcap_ray.models.caption import Caption
from imcap_ray.models.inference_optimization import optimize_for_inference
from imcap_ray.models.model_folder import read_model_folder
from imcap_ray.models.torch_captioner import TorchCaptioner, load_torch_captioner, search_captions
from imcap_ray.training.loop import Learner, Phase, batch_maker, build_learner, caption_images, encode_images
from imcap_ray.training.phases import CROSS_ENTROPY, FINETUNE, SELF_CRITICAL
from imcap_ray.training.team import Team

TOLERANCES: Final = {
    ("float32", CROSS_ENTROPY): 0.01,
    ("float32", FINETUNE): 0.01,
    ("bfloat16", CROSS_ENTROPY): 0.03,
    ("bfloat16", FINETUNE): 0.03,
    ("float32", SELF_CRITICAL): 0.25,  # a GPU draws other captions than a CPU from the same seed
    ("bfloat16", SELF_CRITICAL): 0.25,
}
"""How far the mean cross-entropy of the first steps may be from the CPU's, as a share of it."""

WARMUP_STEPS: Final = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """How much is computed."""

    images: int = 1000
    """Images that are captioned and compared."""
    batch_sizes: tuple[int, ...] = (16, 64, 256, 1024)
    rounds: int = 3
    """Rounds of each measurement after one that warms up; the median counts."""
    run_images: int = 8000
    """Images of a run of the command."""
    steps: int = 50
    """Optimizer steps of a phase."""
    cpu_steps: int = 8
    """Steps that the CPU takes for comparison."""
    training_batch_size: int = 32
    """Images of a step."""
    time_factor: int = 1
    """By which the time limits of the sections are multiplied."""


REHEARSAL: Final = Sizes(
    images=24,
    batch_sizes=(8, 16),
    rounds=1,
    run_images=384,
    steps=5,
    cpu_steps=2,
    training_batch_size=8,
    time_factor=3,
)


@dataclass(slots=True)
class Job:
    """One section in its process."""

    folder: str
    """With the images."""
    path: Path
    """The file with the section's results so far."""
    device: torch.device
    sizes: Sizes
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)

    def record(self, name: str, value: Any) -> None:
        """Add a result, and write all of them to the file: the process may be killed at any time."""
        self.results[name] = value
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results))
        temporary.replace(self.path)

    def read_files(self) -> list[bytes]:
        files = sorted(path for path in Path(self.folder).rglob("*") if path.suffix.lower() in (".jpg", ".jpeg"))
        return [path.read_bytes() for path in itertools.islice(itertools.cycle(files), self.sizes.images)]

    def synchronize(self) -> None:
        """Wait until the device has computed everything."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, compute: Callable[[], object]) -> float:
        """Median duration of a call, which includes what the device computes for it."""
        durations = []
        for _ in range(self.sizes.rounds + 1):
            self.synchronize()
            start = time.perf_counter()
            compute()
            self.synchronize()
            durations.append(time.perf_counter() - start)
        return float(np.median(durations[1:]))


# ---- Sections


def compare_captions(job: Job) -> None:
    """Caption the images on the CPU in float32, and on the device in each precision."""
    pixels = _decode_all(job.read_files(), load_torch_captioner(device="cpu").image_size)
    expected, rate = _caption_all(load_torch_captioner(device="cpu"), pixels)
    job.record("cpu", {"images_per_second": rate})
    for precision in ("float32", "float16"):
        captioner = load_in(precision, job.device)
        captions, rate = _caption_all(captioner, pixels)
        job.record(precision, {"images_per_second": rate, **compare(captions, expected), **_describe(captioner)})


def measure_parts(job: Job) -> None:
    """Images per second of decoding, of the model's parts, and of both together in one process."""
    files, size = job.read_files(), load_torch_captioner(device="cpu").image_size
    one_core = files[: len(files) // _cores() + 1]
    decode = len(files) / job.seconds(lambda: _decode_all(files, size))
    job.record("decode", {"cores": _cores(), "images_per_second": round(decode, 1)})
    alone = len(one_core) / job.seconds(lambda: [_decode(data, size) for data in one_core])
    job.record("decode_on_one_core", {"images_per_second": round(alone, 1)})
    pixels = torch.from_numpy(_decode_all(files, size))
    for precision, batch_size in itertools.product(("float32", "float16"), job.sizes.batch_sizes):
        batch = pixels.repeat(-(-batch_size // len(pixels)), 1, 1, 1)[:batch_size]
        with torch.inference_mode():
            measured = _measure_batch(job, load_in(precision, job.device), files, batch)
        rates = {"decode": decode, **{part: measured[part] for part in ("copy", "encoder", "search")}}
        job.record(f"{precision}_{batch_size}", {**measured, "limited_by": min(rates, key=lambda part: rates[part])})


def _measure_batch(job: Job, captioner: TorchCaptioner, files: Sequence[bytes], batch: Tensor) -> dict[str, float]:
    """Images per second of each part, for batches like this one."""

    def search(features: Tensor) -> object:
        return search_captions(captioner.decoder, captioner.vocabulary, features, captioner.search)

    def caption_files() -> None:
        with ThreadPoolExecutor(_cores()) as pool:
            decoded = pool.map(lambda data: _decode(data, captioner.image_size), files)
            while chunk := list(itertools.islice(decoded, len(batch))):
                search(captioner.encoder(torch.from_numpy(np.stack(chunk)).to(job.device)))

    on_device = batch.to(job.device)
    features = captioner.encoder(on_device)
    parts: dict[str, Callable[[], object]] = {
        "copy": lambda: batch.to(job.device),
        "encoder": lambda: captioner.encoder(on_device),
        "search": lambda: search(features),
        "model": lambda: search(captioner.encoder(batch.to(job.device))),
    }
    rates = {part: round(len(batch) / job.seconds(compute), 1) for part, compute in parts.items()}
    return {**rates, "decode_and_model": round(len(files) / job.seconds(caption_files), 1)}


def run_command(job: Job) -> None:
    """Run `imcap caption` with several batch sizes, and with several actors on the GPU."""
    with TemporaryDirectory() as folder:
        write_photographs(str(Path(folder, "images")), job.sizes.run_images, (500, 375))
        gpus = float(job.device.type == "cuda")
        settings = [(1, batch_size) for batch_size in (64, 256)] + [(2, 64), (4, 64)]
        for actors, batch_size in settings if gpus else settings[:1]:
            output = Path(folder, f"captions-{actors}-{batch_size}")
            options = {"--num-actors": actors, "--batch-size": batch_size, "--gpus-per-worker": gpus / actors}
            command = [sys.executable, "-m", "imcap_ray", "caption", str(Path(folder, "images")), str(output), "--json"]
            done = subprocess.run(
                [*command, *itertools.chain.from_iterable((name, f"{value:g}") for name, value in options.items())],
                capture_output=True,
                text=True,
                timeout=max(1.0, job.deadline - time.time()),
            )
            result = json.loads(done.stdout) if done.returncode == 0 else {"error": done.stderr[-2000:]}
            names = ("images_per_second", "seconds", "bound", "counts", "error")
            job.record(f"actors_{actors}_batch_{batch_size}", {name: result[name] for name in names if name in result})


def compare_training(job: Job) -> None:
    """Take steps of every phase on the CPU in float32, and on the device in each precision."""
    examples = _make_examples(job)
    for phase in (CROSS_ENTROPY, FINETUNE, SELF_CRITICAL):
        expected = _train(job, phase, "float32", torch.device("cpu"), job.sizes.cpu_steps, examples)
        job.record(f"{phase}_cpu", expected)
        for precision in ("float32", "bfloat16"):
            measured = _train(job, phase, precision, job.device, job.sizes.steps, examples)
            difference = relative_difference(measured["nats_per_token"], expected["nats_per_token"])
            is_close = difference <= TOLERANCES[precision, phase]
            job.record(f"{phase}_{precision}", {**measured, "difference": difference, "is_close": is_close})


SECTIONS: Final[dict[str, tuple[Callable[[Job], None], int]]] = {
    "captions": (compare_captions, 90),
    "parts": (measure_parts, 120),
    "training": (compare_training, 150),
    "command": (run_command, 120),
}
"""The sections and the seconds that each may take."""


# ---- Captioning


def load_in(precision: str, device: torch.device) -> TorchCaptioner:
    """The bundled model whose CNN computes in float32, or in float16 as on a GPU."""
    captioner = load_torch_captioner(device=device)
    encoder = captioner._trained_encoder
    if precision == "float16":
        encoder = optimize_for_inference(encoder, torch.device("cuda"))  # on a CPU as well, if slowly
    captioner.encoder = encoder.to(device)
    return captioner


def _describe(captioner: TorchCaptioner) -> dict[str, object]:
    """What the CNN has become; `optimize_for_inference` keeps float32 if float16 is too inexact."""
    filters = [parameter for parameter in captioner.encoder.parameters() if parameter.dim() == 4]
    return {
        "dtypes": sorted({str(parameter.dtype) for parameter in captioner.encoder.parameters()}),
        "is_channels_last": all(weight.is_contiguous(memory_format=torch.channels_last) for weight in filters),
        "compute_batch_size": captioner.compute_batch_size,
    }


def _caption_all(captioner: TorchCaptioner, pixels: np.ndarray[Any, Any]) -> tuple[list[Caption | None], float]:
    """The best caption of each image, and images per second after a first batch."""
    captioner.caption_pixels(pixels[: captioner.compute_batch_size])
    start = time.perf_counter()
    captions = captioner.caption_pixels(pixels)
    rate = len(pixels) / (time.perf_counter() - start)
    return [None if isinstance(best, ImageError) or not best else best[0] for best in captions], round(rate, 1)


def compare(captions: Sequence[Caption | None], expected: Sequence[Caption | None]) -> dict[str, Any]:
    """How many captions are the same, how far their log-probabilities and familiarity differ, and examples."""
    pairs = [(one, other) for one, other in zip(captions, expected, strict=True) if one and other]
    same = [(one, other) for one, other in pairs if one.text == other.text]
    changed = [[other.text, one.text] for one, other in pairs if one.text != other.text]
    differences = [abs(one.logprob - other.logprob) for one, other in same]
    return {
        "images": len(captions),
        "without_caption": len(captions) - len(pairs),
        "same_captions": len(same),
        "largest_logprob_difference": max(differences, default=None),
        "mean_logprob_difference": float(np.mean(differences)) if differences else None,
        "mean_logprob": float(np.mean([one.logprob for one, _ in pairs])) if pairs else None,
        "mean_logprob_on_the_cpu": float(np.mean([other.logprob for _, other in pairs])) if pairs else None,
        "largest_familiarity_difference": max((abs(a.familiarity - b.familiarity) for a, b in pairs), default=None),
        "changed": changed[:5],
    }


def _decode(data: bytes, image_size: int) -> np.ndarray[Any, Any]:
    return decode_image(data, image_size=image_size).pixels


def _decode_all(files: Sequence[bytes], image_size: int) -> np.ndarray[Any, Any]:
    with ThreadPoolExecutor(_cores()) as pool:
        return np.stack(list(pool.map(lambda data: _decode(data, image_size), files)))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


# ---- Training


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """Images to train on. Their captions are the model's own best five."""

    pixels: Tensor
    features: Tensor
    """Float16 (I, 1, R, F), as a cache stores them."""
    captions: dict[str, list[str]]


def _make_examples(job: Job) -> Examples:
    captioner = load_in("float32", job.device)
    count = min(256, job.sizes.images)
    pixels = _decode_all(job.read_files()[:count], captioner.image_size)
    search = replace(captioner.search, beam_size=5, num_captions=5)
    captions = captioner.caption_pixels(pixels, search)
    return Examples(
        pixels=torch.from_numpy(pixels),
        features=encode_images(torch.nn.Identity(), captioner.encode(pixels)).unsqueeze(1),
        captions={str(number): [caption.text for caption in best] for number, best in enumerate(captions)},
    )


def _make_learner(phase: str, device: torch.device, sizes: Sizes) -> Learner:
    """The bundled model, without dropout, because a GPU draws other random numbers than a CPU."""
    folder = read_model_folder(None)
    captioner = load_torch_captioner(device="cpu")
    recipe = load_recipe("lite2-finetuned", {"finetune.epochs": 1, "self_critical.epochs": 1, "training.epochs": 1})
    recipe = replace(
        recipe,
        encoder=folder.encoder,
        preprocessing=folder.preprocessing,
        decoder=replace(folder.decoder, dropout=0.0),
        training=replace(recipe.training, batch_size=sizes.training_batch_size, warmup_steps=0, patience=0),
        search=folder.search,
    )
    return build_learner(
        Phase(name=phase, recipe=recipe, seed=0),
        vocabulary=captioner.vocabulary,
        encoder=captioner._trained_encoder,
        start_weights=folder.tensors,
        num_images=sizes.steps * sizes.training_batch_size,
        team=Team(device=device),
    )


def _train(
    job: Job, phase: str, precision: str, device: torch.device, steps: int, examples: Examples
) -> dict[str, Any]:
    """Take the steps, resume from the saved state, and caption a few images with the result."""
    learner = _make_learner(phase, device, job.sizes)
    optimization = learner.optimization
    optimization.uses_bfloat16 = precision == "bfloat16"
    learner.encoder.to(device)
    make = batch_maker(learner, examples.captions, device)
    inputs = examples.features if phase == CROSS_ENTROPY else examples.pixels
    nats, rewards, is_finite, num_captions, start = [], [], [], 0, time.perf_counter()
    for step in range(steps):
        torch.manual_seed(step)  # the same crops on every device
        chosen = [(step * learner.batch_size + number) % len(inputs) for number in range(learner.batch_size)]
        batch, numbers = make(inputs[chosen], [str(number) for number in chosen])
        loss, num_tokens = optimization.step(batch)
        nats.append(loss / num_tokens)
        is_finite.append(torch.isfinite(optimization.loss))
        rewards.extend(numbers.values())
        num_captions += len(batch.lengths)
        if step < min(WARMUP_STEPS, steps - 1):
            job.synchronize()
            num_captions, start = 0, time.perf_counter()
    job.synchronize()
    seconds = time.perf_counter() - start
    state = io.BytesIO()
    torch.save(optimization.state_dict(), state)
    state.seek(0)
    optimization.load_state_dict(torch.load(state, map_location=device, weights_only=True), step=steps)
    first = [str(number) for number in range(8)]
    captions = caption_images(learner, [(inputs[:8], first)] if phase != SELF_CRITICAL else [], device)
    return {
        "captions_per_second": round(num_captions / seconds, 1),
        "is_finite": bool(torch.stack(is_finite).all()),
        "nats_per_token": [round(float(value), 5) for value in nats],
        "mean_reward": round(float(np.mean(rewards)), 4) if rewards else None,
        "captions_after": [caption.text for caption in captions.values()][:3],
        "state_mib": round(state.getbuffer().nbytes / 2**20, 1),
    }


def relative_difference(values: Sequence[float], expected: Sequence[float]) -> float:
    """The difference of the means over the steps that both have, as a share of the expected one."""
    count = min(len(values), len(expected))
    mean, expected_mean = np.mean(values[:count]), np.mean(expected[:count])
    return round(float(abs(mean - expected_mean) / abs(expected_mean)), 5)


# ---- Processes


def _run_section(name: str, job: Job) -> None:
    """Run a section in this process, and record its error and its memory."""
    section, _ = SECTIONS[name]
    try:
        section(job)
    except Exception:
        job.record("error", traceback.format_exc())
    gc.collect()
    if job.device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.empty_cache()
        left = torch.cuda.memory_allocated()
        job.record(
            "memory_mib", {"peak": peak >> 20, "left": left >> 20, "reserved": torch.cuda.memory_reserved() >> 20}
        )


def _isolate(name: str, folder: str, work: str, device: torch.device, sizes: Sizes) -> dict[str, Any]:
    """Run a section in a process of its own, and return its results so far when it ends or its time is over."""
    limit = SECTIONS[name][1] * sizes.time_factor
    path, start = Path(work, f"{name}.json"), time.time()
    job = Job(folder=folder, path=path, device=device, sizes=sizes, deadline=start + limit - 5)
    process = multiprocessing.get_context("spawn").Process(target=_run_section, args=(name, job))
    process.start()
    process.join(limit)
    problem = {}
    if process.is_alive():
        process.kill()
        process.join()
        problem = {"error": f"stopped after {limit} seconds"}
    elif process.exitcode:
        problem = {"error": f"the process ended with exit code {process.exitcode}"}
    results = json.loads(path.read_text()) if path.is_file() else {}
    return {**results, **problem, "seconds": round(time.time() - start, 1)}


def _describe_machine() -> dict[str, Any]:
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "gpu": ", ".join(names) or "none",
        "cpu": torch.cpu.get_capabilities().get("cpu_name", platform.machine()),
        "cores": _cores(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "torchvision", "timm")},
    }


def _gpu_memory_used() -> str:
    """Memory of the GPU in use by all processes; "" without a GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@click.command()
@click.option("--output", default="gpu.json", show_default=True, help="The file to write.")
@click.option("--images", "folder", type=click.Path(exists=True), help="Folder with JPEGs. Default: generated ones.")
@click.option("--section", "sections", multiple=True, type=click.Choice(list(SECTIONS)), help="Default: all.")
@click.option("--rehearse", is_flag=True, help="Run everything on the CPU, with small numbers.")
def main(output: str, folder: str | None, sections: Sequence[str], rehearse: bool) -> None:
    """Measure this machine's GPU and write the results as one JSON object."""
    device = torch.device("cpu" if rehearse else "cuda")
    sizes = REHEARSAL if rehearse else Sizes()
    results: dict[str, Any] = {"machine": _describe_machine(), "rehearsal": rehearse}
    results["gpu_memory_used_before"] = _gpu_memory_used()
    with TemporaryDirectory(prefix="imcap-bench-") as work:
        if folder is None:
            folder = str(Path(work, "images"))
            write_photographs(folder, sizes.images, (500, 375))
        for name in sections or SECTIONS:
            results[name] = _isolate(name, folder, work, device, sizes)
            click.echo(f"{name}: {results[name]['seconds']} s {results[name].get('error', '')}", err=True)
            results["gpu_memory_used_after"] = _gpu_memory_used()
            Path(output).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
