"""Every command that the documentation shows for one machine runs as shown, in a folder where its names exist.

Commands for a cluster are in test_jobs.py. Benchmarks run with fewer images. Those that would still take minutes, and
commands that need a cloud, are only parsed (tests/unit/test_documentation.py).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result

from imcap_ray.cli.main import main
from tests import small_data
from tests.documented import ROOT, Shown, example_captioner, shown_commands
from tests.hang_guard import TIMEOUT_SECONDS

LOCAL = (
    "caption",
    "train",
    "check",
    "evaluate",
    "report",
    "export",
    "model",
    "status",
    "demo",
    "bench",
    "quantize",
    "suggest",
)
MEASURES = "bench"
SPLITS = ["train"] * 8 + ["validation"] * 4
SHOWN = [
    shown
    for shown in {" ".join(shown.words): shown for shown in shown_commands()}.values()
    if not shown.where.startswith("imcap_ray/pretrained")  # the README shows the same training,
    and not (shown.where.startswith("jobs/RESULTS") and "train" in shown.words)  # and the same recipe
    and shown.words[1] in LOCAL
    and shown.words[1] != MEASURES
    and "s3://" not in shown.line
    and "hf:" not in shown.line  # needs the network
    and "--help" not in shown.words
]


def _name(shown: Shown) -> str:
    """The name of the command, or of the benchmark."""
    return Path(shown.words[1]).stem


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home folder with VGG16's weights where torchvision would put them. The Ray of these tests uses it."""
    import ray
    from torchvision.models import vgg16

    folder = tmp_path_factory.mktemp("home")
    weights = folder / "torch" / "hub" / "checkpoints" / "vgg16-397923af.pth"
    weights.parent.mkdir(parents=True)
    torch.save(vgg16(weights=None).state_dict(), weights)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder))
        patch.setenv("TORCH_HOME", str(folder / "torch"))
        yield folder
    ray.shutdown()


@pytest.fixture
def folder(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which all names of the examples exist, except those that a command creates."""
    monkeypatch.chdir(tmp_path)
    flickr8k = small_data.write_flickr8k(tmp_path / "flickr8k", num_train=8, num_validation=4, num_test=0)
    small_data.write_flickr8k(tmp_path / "holidays", num_train=6, num_validation=3, num_test=0)
    photographs = flickr8k / "Flicker8k_Dataset"
    pictures = home / "Pictures"
    shutil.rmtree(pictures, ignore_errors=True)
    shutil.copytree(photographs, pictures)
    for name in ("development", "more-photos", "photos"):
        shutil.copytree(photographs, tmp_path / name)
    rows = [
        f"{file.name},a dog runs,{split}" for file, split in zip(sorted(photographs.iterdir()), SPLITS, strict=True)
    ]
    (tmp_path / "photos" / "captions.csv").write_text("\n".join(["file_name,caption,split", *rows]))
    shutil.copy(next(photographs.iterdir()), tmp_path / "one.jpg")
    (tmp_path / "brightness.py").write_text(example_captioner())
    files = sorted(photographs.iterdir())
    table = pa.table({"image_id": [file.name for file in files], "image": [file.read_bytes() for file in files]})
    pq.write_table(table, tmp_path / "photographs.parquet")
    images = [{"id": number, "file_name": file.name} for number, file in enumerate(files)]
    annotations = [{"id": number, "image_id": number, "caption": "a dog"} for number in range(len(files))]
    coco = tmp_path / "coco" / "annotations" / "captions_val2017.json"
    coco.parent.mkdir(parents=True)
    coco.write_text(json.dumps({"images": images, "annotations": annotations}))
    shutil.copytree(photographs, tmp_path / "coco" / "val2017")
    return tmp_path


@pytest.fixture(scope="module")
def captions(home: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Captions of a small development split."""
    folder = tmp_path_factory.mktemp("captioned")
    flickr8k = small_data.write_flickr8k(folder / "flickr8k", num_train=8, num_validation=4, num_test=0)
    model = small_data.write_model_folder(folder / "tiny")
    assert run("caption", flickr8k / "Flicker8k_Dataset", folder / "captions", "--model", model).exit_code == 0
    for part in (folder / "captions").glob("*.parquet"):
        table = pq.read_table(part)
        position = table.schema.get_field_index("confidence")
        sure = pa.array([0.5] * table.num_rows, pa.float32())  # as if the model had been trained
        pq.write_table(table.set_column(position, table.schema.field(position), sure), part)
    return folder / "captions"


def run(*words: object) -> Result:
    """Run a command in this process, so that all share one Ray."""
    return CliRunner().invoke(main, [os.path.expanduser(str(word)) for word in words])


def run_alone(words: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run `imcap`, or a Python program of the documentation, in a process of its own, with a Ray of its own."""
    program, *arguments = words
    command = [sys.executable, *arguments] if program == "python" else [sys.executable, "-m", "imcap_ray", *arguments]
    command = [os.path.expanduser(word) for word in command]
    command = [str(ROOT / word) if word.startswith("jobs/") else word for word in command]
    timeout = TIMEOUT_SECONDS["end_to_end"] - 50
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def _shown(shown: Shown) -> object:
    """A pytest parameter. Trainings and `imcap bench` are slow: they take minutes."""
    takes_minutes = _name(shown) in ("train", MEASURES) and "--dry-run" not in shown.words
    return pytest.param(shown, id=shown.line, marks=[pytest.mark.slow] if takes_minutes else [])


@pytest.mark.parametrize("shown", [_shown(shown) for shown in SHOWN])
def test_documented_commands_run_as_shown(shown: Shown, folder: Path, captions: Path) -> None:
    _, command, *arguments = shown.words
    if command not in ("caption", "demo"):
        shutil.copytree(captions, folder / "captions")
        shutil.copytree(captions, folder / "captions-before")
    if command == "status" and "runs/mine" in arguments:
        work = folder / "runs" / "mine" / "_training"
        work.mkdir(parents=True)
        (work / "metrics.jsonl").write_text("")
        (work / "settings.json").write_text(json.dumps({"recipe": {"training": {"epochs": 3}}}))
    elif command != "train":
        small_data.write_model_folder(folder / "runs" / "mine")
    if command == "train" and arguments[0] == "to-correct/":  # which `imcap suggest` makes
        small_data.write_flickr8k(folder / "to-correct", num_train=6, num_validation=3, num_test=0)
    if "runs/photos" in arguments[2:]:  # a model to start from or to caption with, and not the one to be written
        small_data.write_model_folder(folder / "runs" / "photos")
    if command == "quantize":  # eight images are too few
        shutil.rmtree(folder / "flickr8k")
        small_data.write_flickr8k(folder / "flickr8k", num_train=20, num_validation=4, num_test=0)
    else:
        small_data.write_model_folder(folder / "runs" / "mine-int8")

    # A hundred epochs take four minutes however few the images are, and so do five phases.
    one_epoch = [f"{phase}.epochs=1" for phase in ("training", "finetune", "self_critical")]
    once = [f"{phase}.repetitions=1" for phase in ("finetune", "self_critical")]
    shorter = {
        "vgg16-lstm": one_epoch[:1],
        "small-domain": one_epoch[:2],
        "self-critical": one_epoch[2:],
        "lite2-finetuned": one_epoch + once,
    }
    settings = [
        word
        for recipe, changes in shorter.items()
        if recipe in shown.words
        for change in changes
        for word in ("--set", change)
    ]
    if "brightness:" in shown.line:  # a Ray that runs already does not see a captioner in the current folder
        alone = run_alone(shown.words)
        exit_code, output = alone.returncode, alone.stderr
    else:
        done = run(command, *arguments, *settings)
        exit_code, output = done.exit_code, done.output

    is_unusable = "captions_val2017.json" in shown.line  # it has no training images
    assert exit_code == (3 if is_unusable else 0), f"{shown.where}: {shown.line}\n{output}"
    if command == "caption" and "one.jpg" not in arguments:
        rows = [row for path in Path("captions").glob("*.parquet") for row in pq.read_table(path).to_pylist()]
        assert len(rows) == 12 and {row["status"] for row in rows} == {"ok"}
    if command == "train":
        assert "--dry-run" in arguments or Path(arguments[1], "model.safetensors").exists()


# Options that make a benchmark short. The others take minutes, or have no steady rate, with few images.
FEW = {
    "bench": ["--images", "64"],
    "beam_search": ["--images", "4", "--rounds", "1"],
    "scoring": ["--images", "1000"],
    "estimate": [],
}
MEASURED = [shown for shown in shown_commands() if shown.words[0] == "python" or shown.words[1] == MEASURES]
MEASURED = [shown for shown in MEASURED if _name(shown) in FEW and "4000x3000" not in shown.line]


@pytest.mark.parametrize("shown", [_shown(shown) for shown in MEASURED])
def test_documented_benchmarks_run_as_shown_on_fewer_images(shown: Shown, folder: Path) -> None:
    small_data.write_model_folder(folder / "runs" / "mine")

    done = run_alone([*shown.words, *FEW[_name(shown)], "--json"])

    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)
