"""GPUs that Ray counts but CUDA cannot use are an immediate error, and the run does not fall back to CPUs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import small_data

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(torch.cuda.is_available(), reason="this machine's GPUs can be used"),
]

SCRIPT = """
import json, sys, time
from functools import partial
from pathlib import Path

import ray

ray.init(num_cpus=6, num_gpus=1, include_dashboard=False)

from imcap_ray.config import CaptioningConfig, ResourcesConfig, TrainingRunConfig, load_recipe
from imcap_ray.distributed.captioning import caption_images
from imcap_ray.distributed.cluster.connection import connect
from imcap_ray.distributed.training.trainer import train
from imcap_ray.distributed.training.training_plan import load_data
from imcap_ray.errors import ImcapError
from imcap_ray.models.captioner_spec import CaptionerSpec
from imcap_ray.runs.progress_reporter import ProgressReporter
from tests import small_data
from tests.fakes import EchoCaptioner

root = Path(sys.argv[1])
resources = connect("auto")


def outcome(function):
    start = time.monotonic()
    try:
        return function(), time.monotonic() - start
    except ImcapError as error:
        return str(error), time.monotonic() - start


def caption(output, load):
    config = CaptioningConfig(input=str(root / "data" / "Flicker8k_Dataset"), output=str(root / output))
    summary = caption_images(config, ResourcesConfig(num_actors=1), cluster=resources, load_captioner=load,
        reporter=ProgressReporter(None))
    return summary.counts


def learn():
    recipe = load_recipe("lite2-attention", small_data.TINY_TRAINING | {"training.epochs": 1})
    config = TrainingRunConfig(data=str(root / "data"), model=str(root / "trained"), recipe=recipe)
    train(config, ResourcesConfig(), data=load_data(config), cluster=resources, reporter=ProgressReporter(None))


print(json.dumps([
    outcome(lambda: caption("echoes", EchoCaptioner)),
    outcome(lambda: caption("captions", CaptionerSpec(models=(str(root / "model"),)))),
    outcome(learn),
]))
"""


def test_reserved_gpus_unusable_by_cuda_stop_captioning_and_training_immediately(tmp_path: Path) -> None:
    small_data.write_flickr8k(tmp_path / "data")
    small_data.write_model_folder(tmp_path / "model")

    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=280)

    assert done.returncode == 0, done.stderr
    (echoes, _), (captioning, captioning_seconds), (training, training_seconds) = json.loads(
        done.stdout.splitlines()[-1]
    )
    assert echoes == {"ok": 12}, "captioners without CUDA run on Ray's logical GPUs"
    for error in (captioning, training):
        assert "a GPU is reserved for this process, but CUDA cannot be used: PyTorch" in error
        assert "--gpus-per-worker 0" in error
    assert captioning_seconds < 60 and training_seconds < 60
    assert not list((tmp_path / "captions").glob("*.parquet"))
    assert not (tmp_path / "trained").exists()
