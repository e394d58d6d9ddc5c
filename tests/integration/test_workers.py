"""What the workers of a training agree on. Each is a process; Ray, which would only start them, is not used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(200)

CONNECT = """
import json, sys
import torch

rank, arguments = int(sys.argv[1]), json.loads(sys.argv[3])
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[2]}", rank=rank, world_size=2)
device = torch.device("cpu")

from imcap_ray.training.team import Team

team = Team(rank, 2, device)
"""
# As Ray Train does; without it, the exit of the process races gloo's threads and may abort.
DISCONNECT = """
torch.distributed.destroy_process_group()
"""


def run_workers(tmp_path: Path, script: str, *arguments: Any) -> list[Any]:
    """Run two workers, each with one of the arguments, and return what they print."""
    workers = [
        subprocess.Popen(
            [
                sys.executable,
                "-c",
                CONNECT + script + DISCONNECT,
                str(rank),
                str(tmp_path / "store"),
                json.dumps(argument),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, argument in enumerate(arguments)
    ]
    try:
        answers = [worker.communicate(timeout=150)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0, 0]
    return [json.loads(answer.splitlines()[-1]) for answer in answers]


READ_AN_EPOCH = """
from imcap_ray.distributed.training.training_shards import ShardFormat

shard = ShardFormat.of_phase("cross_entropy", {"train": (1, 49, 1280)})
fits = shard.fits_in_memory(1000, arguments)
keeps = shard.fits_on_every_node(1000, arguments, team)
# As Ray's barrier: each epoch that is streamed begins when all workers ask for it.
num_barriers = 1 if keeps else 3
for _ in range(num_barriers):
    torch.distributed.barrier()
print(json.dumps([fits, keeps]))
"""


def test_all_workers_stream_their_images_if_one_lacks_memory(tmp_path: Path) -> None:
    """The features take 125 MB: one node has a gigabyte for them, and one a tenth of that."""
    assert run_workers(tmp_path, READ_AN_EPOCH, 1e9, 1e8) == [[True, False], [False, False]]


def test_workers_that_all_have_memory_keep_their_images(tmp_path: Path) -> None:
    assert run_workers(tmp_path, READ_AN_EPOCH, 1e9, 9e8) == [[True, True], [True, True]]


FINE_TUNE = """
from torch.nn.parallel import DistributedDataParallel

from imcap_ray.config import DecoderConfig, EncoderConfig, PreprocessingConfig, TrainingConfig
from imcap_ray.models.decoders import build_decoder
from imcap_ray.training.loop import unfreeze
from imcap_ray.models.encoders import build_encoder
from imcap_ray.training.optimization import EndToEnd
from imcap_ray.training.optimization import Optimization
from imcap_ray.training.batches import make_batch
from imcap_ray.text.vocabulary import END_ID
from imcap_ray.text.vocabulary import START_ID

torch.manual_seed(0)
encoder = build_encoder(EncoderConfig(name=arguments), PreprocessingConfig(image_size=64), load_weights=False)
unfreeze(encoder, "")
config = DecoderConfig(embedding_size=16, hidden_size=16, num_heads=2)
trained = EndToEnd(encoder, build_decoder(config, num_channels=encoder.num_channels, vocabulary_size=9))
optimization = Optimization(
    DistributedDataParallel(trained), trained, TrainingConfig(), total_steps=3, encoder_learning_rate=1e-3
)
pixels = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(rank))
for _ in range(3):
    optimization.step(make_batch(pixels, [[[START_ID, 5, END_ID]], [[START_ID, 6, 7, END_ID]]], device))
print(json.dumps(float(sum(parameter.double().sum() for parameter in trained.parameters()))))
"""


@pytest.mark.parametrize("name", ["timm:convnext_atto", "timm:mobilenetv3_small_050"])
def test_two_workers_fine_tune_a_cnn_with_layers_after_its_grid(tmp_path: Path, name: str) -> None:
    first, second = run_workers(tmp_path, FINE_TUNE, name, name)

    assert first == second


DIVERGE = """
from imcap_ray.training.loop import run_epoch


class Optimization:
    loss = torch.zeros(())

    def __init__(self):
        self.num_steps = 0

    def step(self, batch):
        self.num_steps += 1
        self.loss = torch.tensor(float("nan") if self.num_steps >= arguments else 1.0)
        torch.distributed.all_reduce(torch.zeros(1))  # the gradients
        return self.loss.double(), 1


optimization = Optimization()
batches = ((torch.zeros(1), ["1.jpg"]) for _ in range(500))
learnt = run_epoch(optimization, lambda inputs, ids: (None, {}), batches, team)
print(json.dumps([learnt.bad_step, optimization.num_steps]))
"""


def test_workers_stop_together_at_the_first_non_finite_loss_of_any_worker(tmp_path: Path) -> None:
    assert run_workers(tmp_path, DIVERGE, 10_000, 73) == [[73, 100], [73, 100]]


SHARE = """
print(json.dumps(team.share(arguments)))
"""


def test_workers_exchange_values_of_any_length(tmp_path: Path) -> None:
    values = [None, {"犬.jpg": {"text": "a dog \ud800", "logprob": -0.1 - 0.2, "num_tokens": 3}}]

    assert run_workers(tmp_path, SHARE, *values) == [values, values]
