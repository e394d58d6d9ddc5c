"""Hosts that share only a network and a store, and fail in the middle of a run."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from imcap_ray.models.caption import Caption
from imcap_ray.models.captioner import Captioner
from tests import small_data
from tests.hosts import BUCKET, Host, Hosts, running_hosts, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NUM_IMAGES: Final = 300
EPOCHS: Final = 8
RECIPE: Final = small_data.TINY_TRAINING | {
    "training.epochs": EPOCHS,
    "training.patience": 0,
}


PLUG_IN: Final = """
import socket
import time
import numpy as np
from imcap_ray import Caption

class Hostname:
    batch_size, resources, fingerprint = 1, {"gpus": 0}, "hostname"

    def prepare(self, image):
        return np.asarray(image.resize((8, 8)))

    def caption(self, batch, num_captions):
        time.sleep(0.05)  # so that no actor is done before the others start
        return [[Caption(socket.gethostname())] for _ in batch]
"""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with running_hosts(tmp_path_factory.mktemp("hosts")) as hosts:
        for _ in range(2):
            hosts.add_worker(num_cpus=3)
        yield hosts


def host_with(hosts: Hosts, name: str) -> Host:
    """A worker on which a process of this name runs."""

    def matching_hosts() -> list[Host]:
        return [host for host in hosts.alive() if any(name in line for line in host.processes())]

    wait_until(matching_hosts, hosts.output)
    return matching_hosts()[0]


def test_a_captioner_that_only_one_host_has_is_sent_to_the_others(hosts: Hosts, tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(NUM_IMAGES):
        (photographs / f"{number:03}.jpg").write_bytes(small_data.jpeg(number))
    source = hosts.put(photographs, f"{BUCKET}/for-plug-in")
    (tmp_path / "hostname_captioner.py").write_text(PLUG_IN)
    private = "/tmp/ray/plug-in"  # the head's own
    hosts.head.run("sh", "-c", f"mkdir {private} && cp {tmp_path}/hostname_captioner.py {private}")
    command = f"cd {private} && exec {sys.executable} -m imcap_ray"
    words = ["caption", source, f"{BUCKET}/by-plug-in", "--model", "hostname_captioner:Hostname"]
    words += ["--address", hosts.address, "--num-actors", 4]  # more than a host has CPUs

    hosts.head.run("sh", "-c", f'{command} "$@"', "sh", *words, timeout=300)

    rows = hosts.rows(f"{BUCKET}/by-plug-in")
    assert [row["image_id"] for row in rows] == sorted(path.name for path in photographs.iterdir())
    assert {row["status"] for row in rows} == {"ok"}
    assert {row["caption"] for row in rows} == {host.name for host in hosts.alive()}  # none of which has the file


def test_a_lost_host_loses_no_image(hosts: Hosts, model_dir: Path, captioner: Captioner, tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for number in range(NUM_IMAGES):
        (photographs / f"{number:03}.jpg").write_bytes(small_data.jpeg(number))
    (photographs / "broken.jpg").write_bytes(b"no photograph")
    (photographs / "copy.jpg").write_bytes(small_data.jpeg(7))
    source = hosts.put(photographs, f"{BUCKET}/photographs")
    model = hosts.put(model_dir, f"{BUCKET}/tiny")
    command = ["caption", source, "--model", model, "--address", hosts.address, "--num-actors", 2]

    run = hosts.start_imcap(*command, f"{BUCKET}/captions")
    wait_until(lambda: run.poll() is not None or hosts.num_parts(f"{BUCKET}/captions"), hosts.output)
    lost = host_with(hosts, "CaptionImages")
    lost.lose()
    assert run.poll() is None, f"the run finished before a host was lost: {hosts.output()}"
    hosts.add_worker(num_cpus=3)

    assert run.wait(timeout=900) == 0, hosts.output()
    rows = hosts.rows(f"{BUCKET}/captions")
    assert [row["image_id"] for row in rows] == sorted(path.name for path in photographs.iterdir())
    assert {row["image_id"]: row["status"] for row in rows if row["status"] != "ok"} == {
        "broken.jpg": "failed",
        "copy.jpg": "duplicate",
    }
    captioned = [row for row in rows if row["status"] != "failed"]
    undisturbed = captioner.caption([photographs / row["image_id"] for row in captioned])
    assert [row["caption"] for row in captioned] == [
        isinstance(caption, Caption) and caption.text for caption in undisturbed
    ]
    assert rows[-1]["duplicate_of"] == "007.jpg"
    assert json.loads(hosts.text(f"{BUCKET}/captions/_imcap/run.json"))["state"] == "complete"


def test_a_training_continues_when_a_host_is_lost(hosts: Hosts, tmp_path: Path) -> None:
    data = hosts.put(
        small_data.write_flickr8k(tmp_path / "flickr8k", num_train=12, num_validation=4), f"{BUCKET}/flickr8k"
    )
    model = f"{BUCKET}/runs/mine"
    settings = [f"--set={name}={value}" for name, value in RECIPE.items()]

    run = hosts.start_imcap("train", data, model, "--address", hosts.address, "--num-workers", 2, *settings)
    metrics = f"{model}/_training/metrics.jsonl"  # empty at first, then once for each epoch
    wait_until(lambda: run.poll() is not None or hosts.num_writes(metrics) >= 3, hosts.output)
    assert run.poll() is None, hosts.output()
    host_with(hosts, "RayTrainWorker").lose()
    done = len(epochs(hosts, model))

    assert run.wait(timeout=900) == 0, hosts.output()
    assert 0 < done < EPOCHS
    assert epochs(hosts, model) == list(range(1, EPOCHS + 1))
    image = f"{data}/Flicker8k_Dataset/0000_photo.jpg"
    assert json.loads(hosts.imcap("caption", image, "--model", model, "--json"))["caption"]


def epochs(hosts: Hosts, model: str) -> list[int]:
    return [json.loads(line)["epoch"] for line in hosts.text(f"{model}/_training/metrics.jsonl").splitlines()]
