"""Checks before work begins that need no cluster."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

import imcap_ray
from imcap_ray import storage
from imcap_ray.cli import main, submit
from imcap_ray.config import CaptioningConfig, ResourcesConfig, TrainingRunConfig, load_recipe
from imcap_ray.data.columns import ColumnOptions
from imcap_ray.data.datasets import load_dataset
from imcap_ray.data.manifest import InputOptions, build_manifest
from imcap_ray.distributed.captioning import CaptioningPlan, plan_captioning
from imcap_ray.distributed.cluster import jobs
from imcap_ray.distributed.cluster.captioner_code import MAX_PACKAGE_BYTES, require_small
from imcap_ray.distributed.cluster.connection import ClusterResources, connect, require
from imcap_ray.distributed.cluster.preflight import ADVICE, Marks, find_problem, require_visible
from imcap_ray.distributed.training.training_plan import PreparedTraining, TrainingPlan, prepare_training
from imcap_ray.errors import ClusterError, ConfigError, InputError, OutputError
from imcap_ray.models.caption import ActorNeeds
from imcap_ray.runs.captioning_run import CaptioningRun, run_identity
from imcap_ray.runs.captions_folder import CaptionsFolder
from imcap_ray.runs.progress_reporter import ProgressReporter
from imcap_ray.runs.training_run import write_metrics
from tests import small_data
from tests.fakes import EchoCaptioner
from tests.unit.runs.test_captioning_run import write_rows

RESOURCES = ClusterResources(is_local=False, cpus=6, gpus=0, nodes=1, physical_cores=6)


def plan_of(input: Path, output: Path | str, *, num_actors: int | None = None, **settings: Any) -> CaptioningPlan:
    config = CaptioningConfig(input=str(input), output=str(output), **settings)
    return plan_captioning(config, ResourcesConfig(num_actors=num_actors), cluster=RESOURCES, captioner=EchoCaptioner())


def identity_of(input: Path) -> dict[str, Any]:
    return run_identity(str(input), fingerprint=EchoCaptioner().fingerprint, search=EchoCaptioner().search)


def test_gpus_for_a_captioner_that_cannot_use_them_are_refused(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "one.jpg").write_bytes(small_data.jpeg(1))
    config = CaptioningConfig(input=str(tmp_path / "images"), output=str(tmp_path / "captions"))
    captioner = EchoCaptioner()
    captioner.needs = ActorNeeds(gpus=0, no_gpus="this captioner computes on CPUs")
    cluster = replace(RESOURCES, gpus=2)

    with pytest.raises(ConfigError, match="this captioner computes on CPUs"):
        plan_captioning(config, ResourcesConfig(gpus_per_worker=1), cluster=cluster, captioner=captioner)


# ---- access of the nodes


def test_a_node_that_sees_everything_has_no_problem(tmp_path: Path) -> None:
    with Marks({"OUTPUT": str(tmp_path / "a" / "b")}) as marks:
        assert find_problem([("INPUT", str(tmp_path))], marks.locations, ()) == ""


def test_the_error_for_an_input_missing_on_a_node_names_it_and_a_remedy(tmp_path: Path) -> None:
    problem = find_problem([("INPUT", str(tmp_path)), ("--model", str(tmp_path / "mine"))], {}, ())

    assert problem.startswith(f"--model {tmp_path / 'mine'} ")
    assert problem.endswith(ADVICE)


def test_an_output_folder_on_the_local_disk_of_a_node_is_detected(tmp_path: Path) -> None:
    mine, others = tmp_path / "mine", tmp_path / "others"
    mine.mkdir()
    others.mkdir()
    with Marks({"OUTPUT": str(mine)}) as marks:
        seen_there = {name: place.replace(str(mine), str(others)) for name, place in marks.locations.items()}
        assert find_problem([], seen_there, ()).startswith(f"OUTPUT: {others} is another folder than ")


@pytest.mark.parametrize("place", [".", "a/b"], ids=["a folder", "one that does not exist yet"])
def test_probe_files_are_removed(tmp_path: Path, place: str) -> None:
    with Marks({"OUTPUT": str(tmp_path / place)}):
        assert len(list(tmp_path.iterdir())) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_store_error_is_one_line_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(location: str) -> bool:
        raise OSError("When reading\ns3://id:key@bucket/x: AWS Error ACCESS_DENIED")

    monkeypatch.setattr("imcap_ray.storage.exists", refuse)

    problem = find_problem([("INPUT", "s3://bucket/x")], {}, ())

    assert problem == "INPUT s3://bucket/x cannot be read: When reading s3://***@bucket/x: AWS Error ACCESS_DENIED"


def test_a_single_node_is_not_probed() -> None:
    require_visible(RESOURCES, reads=[("INPUT", "/no/such/folder")], writes={"OUTPUT": "/no/such/output"})


# ---- resources of the cluster


def test_nodes_that_autoscaling_can_add_count_as_available() -> None:
    growing = ClusterResources(is_local=False, cpus=0, gpus=0, nodes=1, physical_cores=0, max_cpus=16, max_gpus=4)

    require(growing, cpus=6, gpus=4, what="--num-actors 4")
    with pytest.raises(ClusterError, match="--num-actors 5 needs 5 GPUs, the cluster has 0 and grows to 4: ask for le"):
        require(growing, cpus=7, gpus=5, what="--num-actors 5")


# ---- the package


def test_a_package_that_contains_data_is_not_uploaded(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with (tmp_path / "data" / "photographs.tar").open("wb") as file:
        file.truncate(MAX_PACKAGE_BYTES + 1)  # takes no room

    with pytest.raises(ClusterError, match=r"expected at most 200 MiB, got 200 MiB: .*photographs\.tar"):
        require_small(tmp_path)

    shutil.move(tmp_path / "data", tmp_path / ".git")
    require_small(tmp_path)


def test_the_package_itself_is_small_enough() -> None:
    require_small(Path(imcap_ray.__file__).parent)


# ---- wrong usage


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["caption", "in", "out", "--no-such-option"], "No such option"),
        (["caption", "in", "out", "--beam-size", "0"], "--beam-size"),
        (["caption"], "Missing argument 'INPUT'"),
        (["train", "in"], "Missing argument 'MODEL'"),
        (["--dry-run", "evaluate", "in", "out"], "imcap submit --dry-run plans caption and train, got evaluate"),
        (["--dry-run", "--follow", "job"], "imcap submit --dry-run plans caption and train, got --follow"),
    ],
)
def test_wrong_usage_of_a_submitted_command_is_reported_before_contacting_the_cluster(
    monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(jobs, "_connect", lambda *_: pytest.fail("a cluster was contacted"))

    result = CliRunner().invoke(main.main, ["submit", *words])

    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["caption", "memory://preflight/nowhere", "s3://bucket/out"], "no such INPUT: memory://preflight/nowhere"),
        (["caption", "in", "out", "--model", "memory://preflight/model"], "no such --model: memory://preflight/model"),
        (["caption", "in", "out", "--model", "memory://preflight"], "is not a model folder"),
        (["evaluate", "memory://preflight/here", "memory://preflight/gone"], "no such REFERENCES: memory://"),
    ],
)
def test_missing_store_objects_are_reported_before_contacting_the_cluster(
    monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    monkeypatch.setattr(jobs, "_connect", lambda *_: pytest.fail("a cluster was contacted"))
    storage.write_bytes("memory://preflight/here", b"")

    result = CliRunner().invoke(main.main, ["submit", *words])

    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["caption", "s3://bucket/in", "captions"], "OUTPUT of a job must be an absolute path on the cluster or a URI"),
        (["caption", "photographs", "s3://bucket/out"], "INPUT of a job must be an absolute path .*got photographs"),
        (["caption", "/in", "/out", "--model", "mine"], "--model of a job must be an absolute path .*got mine"),
        (["train", "/data", "mine"], "MODEL of a job must be an absolute path .*got mine"),
        (
            ["train", "/data", "/mine", "--features", "cache"],
            "--features of a job must be .*got cache",
        ),
        (["evaluate", "/captions", "/data", "--save=scores"], "--save of a job must be an absolute path .*got scores"),
        (["report", "/captions", "--output", "a.html"], "--output of a job must be an absolute path .*got a.html"),
        (["demo"], "OUT of a job must be an absolute path .*got imcap-demo"),
    ],
)
def test_relative_paths_are_refused_before_contacting_the_cluster(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(submit, "_exists", lambda location: None)
    monkeypatch.setattr(jobs, "_connect", lambda *_: pytest.fail("a cluster was contacted"))

    result = CliRunner().invoke(main.main, ["submit", *words])

    assert result.exit_code == 2
    assert re.search(message, result.stderr)


def test_the_bundled_model_is_not_a_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "submit", lambda command, **_: 0)

    result = CliRunner().invoke(main.main, ["submit", "caption", "/in", "/out", "--model", "flickr8k-lite2"])

    assert result.exit_code == 0, result.stderr


def test_an_unreachable_store_is_left_to_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = threading.Event()
    monkeypatch.setattr(submit, "_PROBE_SECONDS", 0.05)
    monkeypatch.setattr(main.storage, "exists", lambda location: asked.wait(10))
    monkeypatch.setattr(jobs, "submit", lambda command, **_: 0)

    result = CliRunner().invoke(main.main, ["submit", "caption", "s3://bucket/in", "s3://bucket/out"])
    asked.set()

    assert result.exit_code == 0


def test_the_cpus_of_this_machine_are_its_cores_and_not_those_that_a_private_ray_counts() -> None:
    machine = replace(RESOURCES, is_local=True, cpus=4, physical_cores=2)

    with pytest.raises(ClusterError, match="^--num-workers 8 needs 9 CPUs, this machine has 2: ask for less$"):
        require(machine, cpus=9, gpus=0, what="--num-workers 8")


def test_missing_dependencies_are_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> None:
        raise ModuleNotFoundError("No module named 'timm'", name="timm")

    monkeypatch.setattr(main.storage, "refuse_secrets", missing)
    result = CliRunner().invoke(main.main, ["submit", "demo"])

    assert result.exit_code == 2
    [line] = result.stderr.splitlines()
    assert line.startswith(f"imcap: {sys.executable} has no module timm: ")


# ---- the plan


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(130):
        (folder / f"{number}.jpg").write_bytes(small_data.jpeg(0))
    return folder


def test_a_plan_reports_images_blocks_and_actors_and_writes_nothing(tmp_path: Path, photographs: Path) -> None:
    output = tmp_path / "out"

    plan = plan_of(photographs, output)

    assert (plan.num_images, plan.is_counted, plan.num_done) == (130, True, 0)
    assert (plan.num_blocks, plan.num_actors, plan.gpus_per_actor) == (3, 3, 0.0)
    assert plan.seconds is None
    assert not output.exists()


def test_a_plan_counts_ignored_files_by_their_extensions(tmp_path: Path, photographs: Path) -> None:
    for name in ("a.txt", "b.txt", "film.mov", ".hidden/c.jpg"):
        (photographs / name).parent.mkdir(exist_ok=True)
        (photographs / name).write_bytes(small_data.jpeg(0))

    plan = plan_of(photographs, tmp_path / "out")

    assert (plan.num_images, plan.ignored) == (130, {".txt": 2, ".mov": 1})
    assert plan.notes == (f"{photographs}: ignored 3 files that are not images (.txt 2, .mov 1)",)


def test_a_plan_uses_the_speed_of_the_last_run(tmp_path: Path, photographs: Path) -> None:
    folder = CaptionsFolder(str(tmp_path / "out"))
    folder.write_run(identity_of(photographs) | {"state": "complete", "images_per_second": 13.0})

    plan = plan_of(photographs, folder.location)

    assert (plan.images_per_second, plan.seconds) == (13.0, 10.0)


def test_a_plan_counts_images_that_left_the_input(tmp_path: Path, photographs: Path) -> None:
    config = CaptioningConfig(input=str(photographs), output=str(tmp_path / "out"))
    with CaptioningRun.open(config, identity_of(photographs), reporter=ProgressReporter(None)) as run:
        run.list_images()
        write_rows(run)
    for number in range(30):
        (photographs / f"{number}.jpg").unlink()
        (photographs / f"new {number}.jpg").write_bytes(small_data.jpeg(1))

    kept, pruned = (plan_of(photographs, config.output, prune=prune) for prune in (False, True))

    assert (kept.num_images, kept.num_done, kept.num_blocks, kept.num_not_in_input) == (160, 130, 1, 30)
    assert (pruned.num_images, pruned.num_done, pruned.num_blocks, pruned.num_not_in_input) == (130, 100, 1, 30)
    assert pruned.notes == (f"30 images are no longer in {photographs}: their rows are removed",)
    assert "the rows are kept" in kept.notes[0]


def test_a_plan_names_the_columns_of_tables(tmp_path: Path) -> None:
    table = tmp_path / "in.parquet"
    pq.write_table(pa.table({"left": [small_data.jpeg(0)], "right": [small_data.jpeg(1)], "id": ["a"]}), table)
    folder = CaptionsFolder(str(tmp_path / "out"))

    def plan(image: str | None) -> CaptioningPlan:
        return plan_of(table, folder.location, image_column=image)

    with pytest.raises(InputError, match="left .bytes. and right .bytes.: give --image-column"):
        plan(None)
    planned = plan("left")
    folder.write_run(identity_of(table) | {"image_column": "left", "id_column": "id"})
    build_manifest(str(table), folder.manifest, InputOptions(columns=ColumnOptions(image="left")))

    assert (planned.image_column, planned.id_column) == ("left", "id")
    assert planned.notes == (f"{table}: images from column left (bytes), ids from column id",)
    assert plan("left").image_column == "left"
    with pytest.raises(InputError, match="read from column left, and would now be read from right: .*--overwrite"):
        plan("right")


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    ("before", "now", "problem"),
    [
        ({"a": ["image"]}, {"a": ["image"], "b": ["img"]}, ""),
        ({"a": ["image"]}, {"a": ["image"], "b": ["image", "img"]}, ""),
        ({"a": ["img"]}, {"a": ["img"], "b": ["image", "img"]}, "read from column img, and would now be read from ima"),
        ({"a": ["img"], "b": ["image"]}, {"a": ["image", "img"]}, "read from column img, and would now be read from i"),
        ({"a": ["image"]}, {"a": ["image", "image_id"]}, ""),
    ],
)
def test_a_plan_and_a_run_accept_the_same_columns_for_an_output(
    tmp_path: Path, before: dict[str, list[str]], now: dict[str, list[str]], problem: str, overwrite: bool
) -> None:
    source, folder = tmp_path / "in", CaptionsFolder(str(tmp_path / "out"))
    folder.write_run(identity_of(source) | {"state": "complete"})
    for tables in (before, now):
        shutil.rmtree(source, ignore_errors=True)
        source.mkdir()
        for number, (name, columns) in enumerate(tables.items()):
            values = {column: [f"{name}"] if column == "image_id" else [small_data.jpeg(number)] for column in columns}
            pq.write_table(pa.table(values), source / f"{name}.parquet")
        if tables is before:
            build_manifest(str(source), folder.manifest)
    manifest = {path.name: path.read_bytes() for path in Path(folder.manifest).iterdir()}

    def plan() -> CaptioningPlan:
        return plan_of(source, folder.location, overwrite=overwrite)

    if problem and not overwrite:
        for refuse in (plan, lambda: build_manifest(str(source), folder.manifest)):
            with pytest.raises(InputError, match=problem):
                refuse()
    else:
        assert plan().num_images == len(now)
        assert manifest == {path.name: path.read_bytes() for path in Path(folder.manifest).iterdir()}
        build_manifest(str(source), str(tmp_path / "fresh") if overwrite else folder.manifest)


def test_a_plan_refuses_everything_that_the_run_would_refuse(tmp_path: Path, photographs: Path) -> None:
    def plan(output: Path, num_actors: int = 1) -> None:
        plan_of(photographs, output, num_actors=num_actors)

    with pytest.raises(OutputError, match="is no captions folder"):
        plan(photographs)
    with pytest.raises(ClusterError, match="--num-actors 8 needs 10 CPUs"):
        plan(tmp_path / "out", num_actors=8)
    shutil.rmtree(photographs)
    with pytest.raises(InputError, match="no such input"):
        plan(tmp_path / "out")


def test_an_error_about_a_small_cluster_names_no_option_that_was_not_given(tmp_path: Path, photographs: Path) -> None:
    config = CaptioningConfig(input=str(photographs), output=str(tmp_path / "out"))

    with pytest.raises(ClusterError, match="^captioning needs 3 CPUs, the cluster has 2: ask for less, or add nodes$"):
        plan_captioning(config, ResourcesConfig(), cluster=replace(RESOURCES, cpus=2), captioner=EchoCaptioner())


def test_a_plan_of_a_training_reports_its_epochs_and_writes_nothing(tmp_path: Path) -> None:
    data = load_dataset(str(small_data.write_flickr8k(tmp_path / "flickr8k", num_train=6, num_validation=3)))
    settings = small_data.TINY_TRAINING | {"training.epochs": 3, "finetune.epochs": 2}
    recipe = load_recipe("lite2-attention", settings)

    def prepare(
        model: Path, *, num_workers: Any = None, seed: int = 0, cluster: ClusterResources = RESOURCES
    ) -> PreparedTraining:
        config = TrainingRunConfig(data=data.location, model=str(model), recipe=recipe, seed=seed)
        return prepare_training(config, ResourcesConfig(num_workers=num_workers), data=data, cluster=cluster)

    def plan(**options: Any) -> TrainingPlan:
        return prepare(tmp_path / "model", **options).plan()

    planned = plan(num_workers=(2, 4))

    assert (planned.num_images, planned.num_captions) == ({"train": 6, "validation": 3, "test": 2}, 30)
    assert planned.num_epochs == {"cross_entropy": 3, "finetune": 2}
    assert (planned.num_epochs_done, planned.num_workers, planned.batch_size) == (0, "2 to 4 workers", 4)
    assert planned.seconds is None
    assert not (tmp_path / "model").exists()

    rows = [{"phase": "cross_entropy", "epoch": number + 1, "cider_d": 0.1, "seconds": 7.0} for number in range(2)]
    (tmp_path / "model" / "_training").mkdir(parents=True)
    write_metrics(str(tmp_path / "model" / "_training"), rows)
    with pytest.raises(OutputError, match="exists and is no training of imcap"):
        plan()
    settings = prepare(tmp_path / "other").settings
    (tmp_path / "model" / "_training" / "settings.json").write_text(json.dumps(settings))
    assert (plan().num_epochs_done, plan().seconds) == (2, 21.0)

    with pytest.raises(OutputError, match="another seed"):
        plan(seed=5)
    with pytest.raises(ClusterError, match="--num-workers 3-4 needs 4 CPUs, the cluster has 2"):
        plan(num_workers=(3, 4), cluster=replace(RESOURCES, cpus=2))


def test_a_name_that_is_not_utf8_on_the_command_line_is_an_error_before_ray_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "argv", ["imcap", "caption", os.fsdecode(b"caf\xe9"), "out"])

    with pytest.raises(InputError, match="udce9' is not UTF-8, and Ray starts neither"):
        connect("local")
