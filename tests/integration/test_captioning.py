from __future__ import annotations

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq
import pytest
import ray

from imcap_ray.config import CaptioningConfig, ResourcesConfig, SearchConfig
from imcap_ray.data.image_decoding import SquarePixels, decode_image
from imcap_ray.data.image_reading import read_rows
from imcap_ray.data.manifest import build_manifest
from imcap_ray.data.schemas import CAPTIONS_SCHEMA
from imcap_ray.distributed.captioning import caption_images
from imcap_ray.distributed.cluster.connection import ClusterResources
from imcap_ray.distributed.pipeline import image_pipeline
from imcap_ray.distributed.pipeline.image_loading import LoadImages
from imcap_ray.distributed.pipeline.image_pipeline import read_images
from imcap_ray.errors import ClusterError, FailureBudgetError, ImageError, ImcapError, InputError, OutputError
from imcap_ray.models.caption import COMPUTE_BATCH_SIZE, ImageCaptioner
from imcap_ray.models.captioner import Captioner
from imcap_ray.runs.captioned_images import CaptionedImageSource
from imcap_ray.runs.captioning_run import CaptioningSummary
from imcap_ray.runs.captions_folder import CaptionsFolder
from imcap_ray.runs.progress_reporter import ProgressReporter
from tests.fakes import DiesOf, EchoCaptioner, FailsOn, SaysItsGpus, TooLargeFor, echo
from tests.hang_guard import HANG_SECONDS
from tests.malformed_images import OK, encode, malformed_images, photo
from tests.small_data import write_tar

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:ray.*"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

Run = Callable[..., CaptioningSummary]


@pytest.fixture
def run(local_ray: ClusterResources) -> Run:
    def run(
        input: str,
        output: str,
        *,
        load_captioner: Callable[[], ImageCaptioner] = EchoCaptioner,
        num_actors: int = 2,
        batch_size: int | None = None,
        reporter: ProgressReporter | None = None,
        **settings: Any,
    ) -> CaptioningSummary:
        return caption_images(
            CaptioningConfig(input=input, output=output, **{"max_failure_rate": 1.0, **settings}),
            ResourcesConfig(num_actors=num_actors, batch_size=batch_size),
            cluster=local_ray,
            load_captioner=load_captioner,
            reporter=reporter or ProgressReporter(None),
        )

    return run


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """100 different JPEGs in two folders."""
    folder = tmp_path / "photographs"
    for number in range(100):
        path = folder / ("even" if number % 2 == 0 else "odd") / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode(photo(40 + number, 50), "JPEG"))
    return folder


def read(output: Path) -> list[dict[str, Any]]:
    """Read the rows with a plain Parquet reader, in the order of their ids."""
    rows: list[dict[str, Any]] = pads.dataset([str(path) for path in output.glob("*.parquet")]).to_table().to_pylist()
    return sorted(rows, key=lambda row: row["image_id"])


def expected(data: bytes) -> str:
    return echo(decode_image(data, image_size=32).pixels)


def test_every_file_of_a_folder_is_one_row_regardless_of_its_content(run: Run, tmp_path: Path) -> None:
    folder, output = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    codes, contents = {}, {}
    for number, (name, data, code) in enumerate(malformed_images()):
        image_id = f"{number:03}-{name.replace('/', ' ').replace(' ', '-')}.jpg"
        (folder / image_id).write_bytes(data)
        codes[image_id], contents[image_id] = code, data
    (folder / "dangling.jpg").symlink_to("nowhere.jpg")
    codes["dangling.jpg"] = "missing"
    (folder / "endless.jpg").touch()
    os.truncate(folder / "endless.jpg", 2**40)  # takes no room, and is not read
    codes["endless.jpg"] = "too_large"

    run(str(folder), str(output))

    rows = read(output)
    assert {row["image_id"]: row["error_code"] or OK for row in rows} == codes
    assert len(rows) == len(codes)
    for row in rows:
        if row["status"] == "ok":
            assert row["caption"] == expected(contents[row["image_id"]])
            assert row["captions"] == [row["caption"]]
            assert math.isclose(row["confidence"], math.exp(-0.5), rel_tol=1e-6)
        else:
            assert row["status"] == "failed"
            assert row["caption"] == ""
            assert math.isnan(row["confidence"])
            assert row["error_message"]


def test_rows_have_the_documented_schema_and_provenance(run: Run, photographs: Path, tmp_path: Path) -> None:
    run(str(photographs), str(tmp_path / "out"), limit=3)

    (file,) = (tmp_path / "out").glob("*.parquet")
    schema = pq.read_schema(file)
    assert schema.remove_metadata() == CAPTIONS_SCHEMA
    assert schema.metadata[b"imcap_ray.model_fingerprint"] == b"echo"
    assert json.loads(schema.metadata[b"imcap_ray.models.beam_search"])["beam_size"] == SearchConfig().beam_size


def test_summary_and_run_file_count_the_rows(run: Run, photographs: Path, tmp_path: Path) -> None:
    (photographs / "empty.jpg").write_bytes(b"")

    summary = run(str(photographs), str(tmp_path / "out"))

    assert summary.counts == {"ok": 100, "failed": 1}
    assert summary.error_counts == {"empty_file": 1}
    run_file = json.loads((tmp_path / "out" / "_imcap" / "run.json").read_text())
    assert run_file["state"] == "complete"
    assert run_file["num_images"] == 101


@pytest.mark.parametrize("kind", ["table", "tar"])
def test_an_image_that_left_a_rewritten_table_does_not_get_the_caption_of_another(
    run: Run, tmp_path: Path, kind: str
) -> None:
    source, output = tmp_path / "in", tmp_path / "out"
    contents = {name: encode(photo(40 + number, 50), "JPEG") for number, name in enumerate("acde")} | {"b": b"broken"}

    def write(names: str) -> None:
        source.mkdir(exist_ok=True)
        if kind == "tar":
            write_tar(source / "t.tar", {f"{name}.jpg": contents[name] for name in names})
        else:
            pq.write_table(
                pa.table({"id": list(names), "image": [contents[name] for name in names]}), source / "t.parquet"
            )

    write("abcde")
    assert run(str(source), str(output)).counts == {"ok": 4, "failed": 1}
    write("acde")
    run(str(source), str(output), retry_failed=True)

    rows = {row["image_id"]: row for row in read(output)}
    assert {name: row["error_code"] or row["status"] for name, row in rows.items()} == (
        {name: "ok" for name in "acde"} | {"b": "changed"}
    )
    assert all(rows[name]["caption"] == expected(contents[name]) for name in "acde")


def test_a_failed_run_resumes_where_it_stopped(run: Run, photographs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    words = expected((photographs / "odd" / "099.jpg").read_bytes())
    with pytest.raises(ImcapError, match="planted"):
        run(
            str(photographs),
            str(output),
            load_captioner=partial(FailsOn, words=frozenset({words})),
            num_actors=1,
            batch_size=8,
        )
    state = json.loads((output / "_imcap" / "run.json").read_text())["state"]
    before = {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}

    run(str(photographs), str(output))

    assert state == "failed"
    assert [row["image_id"] for row in read(output)] == sorted(
        str(path.relative_to(photographs)) for path in photographs.rglob("*.jpg")
    )
    assert before.items() <= {path.name: path.stat().st_mtime_ns for path in output.glob("*.parquet")}.items()


def test_new_images_are_captioned_and_finished_ones_are_not(run: Run, photographs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    assert run(str(photographs), str(output), limit=30).num_new == 30
    (photographs / "aaa.jpg").write_bytes(encode(photo(70, 70), "JPEG"))

    summary = run(str(photographs), str(output))

    assert (summary.num_new, summary.num_images) == (71, 101)
    assert len({row["image_id"] for row in read(output)}) == len(read(output)) == 101
    assert run(str(photographs), str(output)).num_new == 0


@pytest.mark.parametrize("kind", ["bytes", "struct", "path"])
def test_parquet_gives_the_same_captions_as_the_folder(run: Run, photographs: Path, tmp_path: Path, kind: str) -> None:
    paths = sorted(photographs.rglob("*.jpg"))[:20]
    values: dict[str, list[Any]] = {
        "bytes": [path.read_bytes() for path in paths],
        "struct": [{"bytes": path.read_bytes(), "path": path.name} for path in paths],
        "path": [str(path.relative_to(tmp_path)) for path in paths],
    }
    table = pa.table({"id": [path.name for path in paths], {"path": "file_name"}.get(kind, "image"): values[kind]})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=7)

    run(str(tmp_path / "in.parquet"), str(tmp_path / "out"))

    actual = {row["image_id"]: row["caption"] for row in read(tmp_path / "out")}
    assert actual == {path.name: expected(path.read_bytes()) for path in paths}


def test_the_named_column_is_captioned_recorded_and_kept(run: Run, photographs: Path, tmp_path: Path) -> None:
    paths = sorted(photographs.rglob("*.jpg"))[:20]
    columns = {
        "left": [path.read_bytes() for path in paths],
        "right": [path.read_bytes() for path in reversed(paths)],
        "sku": [path.name for path in paths],
    }
    pq.write_table(pa.table(columns), tmp_path / "in.parquet", row_group_size=7)
    lines: list[str] = []
    named = {"image_column": "right", "id_column": "sku"}

    run(
        str(tmp_path / "in.parquet"),
        str(tmp_path / "out"),
        **named,
        limit=10,
        reporter=ProgressReporter(lines.append),
    )
    with pytest.raises(InputError, match="left .bytes. and right .bytes.: give --image-column to choose one"):
        run(str(tmp_path / "in.parquet"), str(tmp_path / "out"))
    with pytest.raises(InputError, match="read from column right, and would now be read from left"):
        run(str(tmp_path / "in.parquet"), str(tmp_path / "out"), image_column="left", id_column="sku")
    run(str(tmp_path / "in.parquet"), str(tmp_path / "out"), **named)

    actual = {row["image_id"]: row["caption"] for row in read(tmp_path / "out")}
    assert actual == {
        path.name: expected(other.read_bytes()) for path, other in zip(paths, reversed(paths), strict=True)
    }
    assert f"{tmp_path}/in.parquet: images from column right (bytes), ids from column sku" in lines
    run_file = json.loads((tmp_path / "out" / "_imcap" / "run.json").read_text())
    assert (run_file["image_column"], run_file["id_column"]) == ("right", "sku")
    source = CaptionedImageSource(str(tmp_path / "out"))
    assert list(source.load([{"image_id": paths[0].name, "image_path": ""}])) == [paths[-1].read_bytes()]


def test_tars_give_the_same_captions_as_the_folder(run: Run, photographs: Path, tmp_path: Path) -> None:
    for folder in ("even", "odd"):
        images = {f"{path.name}": path.read_bytes() for path in sorted((photographs / folder).iterdir())}
        write_tar(tmp_path / "in" / f"{folder}.tar", {**images, "000.txt": b"a caption"})
    (tmp_path / "in" / "even.parquet").write_bytes(b"tells about the tar")

    summary = run(str(tmp_path / "in"), str(tmp_path / "out"))

    rows = read(tmp_path / "out")
    assert summary.counts == {"ok": 100}
    assert {row["image_id"]: row["caption"] for row in rows} == {
        path.stem: expected(path.read_bytes()) for path in photographs.rglob("*.jpg")
    }
    assert {row["image_path"] for row in rows} == {""}


@pytest.mark.usefixtures("local_ray")
def test_a_large_row_group_is_read_by_one_task_whose_blocks_do_not_depend_on_failures(tmp_path: Path) -> None:
    whole, broken = encode(photo(), "JPEG"), b"broken" * 100_000
    images = [whole if number % 7 else broken for number in range(300)]
    pq.write_table(pa.table({"image": pa.array(images, pa.binary())}), tmp_path / "in.parquet")
    build_manifest(str(tmp_path / "in.parquet"), str(tmp_path / "manifest"))

    blocks = read_images(
        str(tmp_path / "manifest"), LoadImages(preparation=SquarePixels(32), root=str(tmp_path)), num_images=1_000_000
    ).iter_batches(batch_size=None, batch_format="pyarrow")

    ids = [block["manifest_id"].to_pylist() for block in blocks]
    assert ids == [list(range(start, min(start + 64, 300))) for start in range(0, 300, 64)]


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    ("num_images", "sizes"), [(1, [1]), (50, [12, 12, 13, 13]), (300, [15] * 4 + [16] * 15), (600, [60] * 10)]
)
def test_blocks_are_even_and_as_few_as_the_batch_size_allows_in_small_runs(
    tmp_path: Path, num_images: int, sizes: list[int]
) -> None:
    for number in range(num_images):
        (tmp_path / f"{number}.jpg").write_bytes(encode(photo(), "JPEG"))
    build_manifest(str(tmp_path), str(tmp_path / "manifest"))

    blocks = read_images(
        str(tmp_path / "manifest"), LoadImages(preparation=SquarePixels(32), root=str(tmp_path)), num_images=num_images
    ).iter_batches(batch_size=None, batch_format="pyarrow")

    assert sorted(block.num_rows for block in blocks) == sizes


@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize("cores", [1, 2])
def test_a_private_ray_runs_as_many_decoding_tasks_as_cores(
    monkeypatch: pytest.MonkeyPatch, photographs: Path, tmp_path: Path, cores: int
) -> None:
    monkeypatch.setattr(image_pipeline, "own_cores", lambda: cores)
    build_manifest(str(photographs), str(tmp_path / "manifest"))
    load_images = LoadImages(preparation=SquarePixels(32), root=str(photographs))

    def load(rows: pa.Table) -> pa.Table:
        begin = time.monotonic()
        (tmp_path / f"{begin}.begun").touch()
        (loaded,) = load_images(rows)
        # As many as there are cores meet here, however long their processes take to start.
        while len(list(tmp_path.glob("*.begun"))) < cores and time.monotonic() < begin + HANG_SECONDS:
            time.sleep(0.05)
        time.sleep(1)  # in which one too many would begin
        (tmp_path / f"{begin}.span").write_text(json.dumps([begin, time.monotonic()]))
        return loaded

    load.preparation = SquarePixels(32)
    read_images(str(tmp_path / "manifest"), load, num_images=4 * COMPUTE_BATCH_SIZE).materialize()

    spans = [json.loads(path.read_text()) for path in tmp_path.glob("*.span")]
    assert len(spans) == 4
    assert max(sum(start <= begin < end for start, end in spans) for begin, _ in spans) == cores


def test_a_table_row_without_an_image_becomes_a_row_too(run: Run, tmp_path: Path) -> None:
    table = pa.table({"image": [encode(photo(), "PNG"), None]}, schema=pa.schema([("image", pa.binary())]))
    pq.write_table(table, tmp_path / "in.parquet")

    run(str(tmp_path / "in.parquet"), str(tmp_path / "out"))

    assert [row["error_code"] for row in read(tmp_path / "out")] == ["", "missing"]


def test_rows_of_a_table_rewritten_since_listing_are_not_read(tmp_path: Path) -> None:
    data = encode(photo(), "PNG")
    for num_rows in (5, 3):
        pq.write_table(pa.table({"image": [data] * num_rows}), tmp_path / "in.parquet")
        if num_rows == 5:
            build_manifest(str(tmp_path / "in.parquet"), str(tmp_path / "manifest"))
    (part,) = (tmp_path / "manifest").iterdir()

    actual = [answer for _, answer in read_rows(pq.read_table(part).to_pylist(), str(tmp_path))]

    assert [error.code for error in actual if isinstance(error, ImageError)] == ["changed"] * 5


def test_captions_do_not_depend_on_actors_batches_or_an_interruption(
    local_ray: ClusterResources, run: Run, photographs: Path, tmp_path: Path, model_dir: Path
) -> None:
    load = partial(Captioner.load, str(model_dir))
    alone = load()
    keys = ("image_id", "caption", "confidence")

    outputs = []
    for number, (num_actors, batch_size) in enumerate([(1, 64), (2, 3), (4, 16)]):
        output = tmp_path / f"out{number}"
        run(str(photographs), str(output), load_captioner=load, num_actors=num_actors, batch_size=batch_size, limit=40)
        outputs.append([{key: row[key] for key in keys} for row in read(output)])

    resumed = tmp_path / "resumed"
    for limit in (7, 40):
        run(str(photographs), str(resumed), load_captioner=load, limit=limit)
    outputs.append([{key: row[key] for key in keys} for row in read(resumed)])

    assert outputs[0] == outputs[1] == outputs[2] == outputs[3]
    first = decode_image((photographs / outputs[0][0]["image_id"]).read_bytes(), image_size=alone.image_size)
    assert alone.caption_pixels(first.pixels[None])[0][0].text == outputs[0][0]["caption"]


def test_images_that_kill_their_process_are_identified_and_the_rest_are_captioned(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    poison = {"even/010.jpg", "odd/077.jpg"}
    words = frozenset(expected((photographs / name).read_bytes()) for name in poison)

    summary = run(str(photographs), str(tmp_path / "out"), load_captioner=partial(DiesOf, words=words))

    rows = read(tmp_path / "out")
    assert summary.error_counts == {"internal": 2}
    assert {row["image_id"] for row in rows if row["status"] == "failed"} == poison
    assert all(
        row["caption"] == expected((photographs / row["image_id"]).read_bytes())
        for row in rows
        if row["image_id"] not in poison
    )
    assert "died" in next(row["error_message"] for row in rows if row["image_id"] in poison)


def test_an_image_is_not_marked_failed_after_one_crash(run: Run, photographs: Path, tmp_path: Path) -> None:
    words = frozenset({expected((photographs / "odd" / "077.jpg").read_bytes())})

    summary = run(
        str(photographs),
        str(tmp_path / "out"),
        load_captioner=partial(DiesOf, words=words, once=str(tmp_path / "died")),
    )

    assert (tmp_path / "died").exists()
    assert summary.counts == {"ok": 100}


def test_the_same_bytes_are_captioned_once(run: Run, photographs: Path, tmp_path: Path) -> None:
    for number in range(60, 100):  # most of them far from their twins
        name = photographs / ("even" if number % 2 == 0 else "odd") / f"{number:03}.jpg"
        name.write_bytes((photographs / "even" / f"{number % 10 // 2 * 2:03}.jpg").read_bytes())
    for number in range(2):  # empty files are not duplicates
        (photographs / f"empty{number}.jpg").write_bytes(b"")

    summary = run(str(photographs), str(tmp_path / "out"))

    rows = {row["image_id"]: row for row in read(tmp_path / "out")}
    assert summary.counts == {"ok": 60, "duplicate": 40, "failed": 2}
    for name, row in rows.items():
        if row["status"] != "failed":
            assert row["caption"] == expected((photographs / name).read_bytes())
            original = row["duplicate_of"] or name
            assert (rows[original]["sha256"], rows[original]["status"]) == (row["sha256"], "ok")
    assert {rows[name]["duplicate_of"] for name in rows} == {"", *(f"even/00{digit}.jpg" for digit in (0, 2, 4, 6, 8))}


def test_a_duplicate_added_later_names_the_existing_original(run: Run, photographs: Path, tmp_path: Path) -> None:
    run(str(photographs), str(tmp_path / "out"), limit=20)
    (photographs / "again.jpg").write_bytes((photographs / "even" / "002.jpg").read_bytes())

    summary = run(str(photographs), str(tmp_path / "out"))

    twin = next(row for row in read(tmp_path / "out") if row["image_id"] == "again.jpg")
    assert (twin["status"], twin["duplicate_of"]) == ("duplicate", "even/002.jpg")
    assert summary.counts == {"ok": 100, "duplicate": 1}


def test_only_failed_images_are_retried(run: Run, photographs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    good = (photographs / "even" / "000.jpg").read_bytes()
    (photographs / "even" / "000.jpg").write_bytes(good[:300])
    (photographs / "odd" / "001.jpg").write_bytes(b"")
    assert run(str(photographs), str(output)).error_counts == {"truncated": 1, "empty_file": 1}
    assert run(str(photographs), str(output)).num_new == 0
    stat = (photographs / "even" / "000.jpg").stat()
    (photographs / "even" / "000.jpg").write_bytes(good[:300].ljust(300))  # the change is not what makes it retried
    os.utime(photographs / "even" / "000.jpg", ns=(stat.st_atime_ns, stat.st_mtime_ns))

    summary = run(str(photographs), str(output), retry_failed=True)

    assert (summary.num_new, summary.num_images) == (2, 100)
    assert summary.error_counts == {"truncated": 1, "empty_file": 1}
    assert len(read(output)) == 100


def test_a_changed_file_under_an_old_name_is_captioned_again(run: Run, photographs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    run(str(photographs), str(output))
    changed = encode(photo(90, 30), "JPEG")
    (photographs / "odd" / "051.jpg").write_bytes(changed)

    summary = run(str(photographs), str(output))

    assert summary.num_new == 1
    rows = {row["image_id"]: row["caption"] for row in read(output)}
    assert len(rows) == 100
    assert rows["odd/051.jpg"] == expected(changed)


def test_overwriting_removes_the_old_rows_only_after_the_new_ones_are_complete(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    run(str(photographs), str(output), limit=40)
    before = read(output)
    words = frozenset({expected((photographs / "odd" / "099.jpg").read_bytes())})
    new = partial(FailsOn, words=words)

    with pytest.raises(ImcapError, match="planted"):
        run(str(photographs), str(output), load_captioner=new, overwrite=True, num_actors=1, batch_size=8)
    assert read(output) == before
    num_written = len(CaptionsFolder(str(output)).next().done_ids())
    summary = run(str(photographs), str(output), overwrite=True)

    assert summary.num_new == 100 - num_written
    assert len(read(output)) == 100
    assert not list((output / "_imcap").glob("next/*"))
    assert run(str(photographs), str(output)).num_new == 0
    other = run(str(photographs), str(output), overwrite=True, load_captioner=partial(EchoCaptioner, fingerprint="b"))
    assert other.num_new == 100
    assert json.loads((output / "_imcap" / "run.json").read_text())["model_fingerprint"] == "b"


def test_an_actor_without_a_gpu_sees_no_gpu_of_its_node(
    run: Run, photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_gpu = ray.cluster_resources() | {"GPU": 1.0}
    monkeypatch.setattr(ray, "cluster_resources", lambda: with_gpu)

    run(str(photographs), str(tmp_path / "out"), load_captioner=SaysItsGpus, limit=3)

    assert {row["caption"] for row in read(tmp_path / "out")} == {"sees "}


def test_a_manifest_with_repeated_numbers_ends_the_run_with_an_error(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    run(str(photographs), str(tmp_path / "out"), limit=3)
    (part,) = (tmp_path / "out" / "_imcap" / "manifest").iterdir()
    first = pq.read_table(part).slice(0, 1)
    again = first.set_column(1, "image_id", pa.array(["even/another.jpg"]))
    pq.write_table(again, part.with_name("part-000000000003"))

    with pytest.raises(ImcapError, match="1 of 4 images were not captioned.*give --overwrite"):
        run(str(photographs), str(tmp_path / "out"), limit=3)


def test_an_image_too_large_for_memory_is_a_failed_row(run: Run, photographs: Path, tmp_path: Path) -> None:
    words = frozenset({expected((photographs / "odd" / "077.jpg").read_bytes())})

    summary = run(str(photographs), str(tmp_path / "out"), load_captioner=partial(TooLargeFor, words=words), limit=90)

    assert summary.counts == {"ok": 89, "failed": 1}
    assert summary.error_counts == {"out_of_memory": 1}
    assert "8 images were computed at a time" in summary.bound


def test_a_run_stops_if_all_images_are_missing(run: Run, photographs: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"

    def unmount(line: str) -> None:
        """The folder disappears between listing and reading."""
        if line.startswith("captioning"):
            photographs.rename(gone)

    with pytest.raises(ImcapError, match="cannot be read any more.*the same command resumes"):
        run(str(photographs), str(tmp_path / "out"), reporter=ProgressReporter(unmount))
    gone.rename(photographs)

    assert run(str(photographs), str(tmp_path / "out")).counts == {"ok": 100}


def test_a_run_that_lost_its_lease_stops_writing(run: Run, photographs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"

    def load() -> EchoCaptioner:
        if (output / "_imcap" / "owner").exists():
            (output / "_imcap" / "owner").write_text("another")
        return EchoCaptioner()

    with pytest.raises(ImcapError, match="another run has taken over"):
        run(str(photographs), str(output), load_captioner=load)

    assert not list(output.glob("*.parquet"))


def test_too_many_failures_are_an_error_after_all_rows_are_written(run: Run, photographs: Path, tmp_path: Path) -> None:
    (photographs / "empty.jpg").write_bytes(b"")

    with pytest.raises(FailureBudgetError, match="1 of 101 images failed.*1 empty_file") as caught:
        run(str(photographs), str(tmp_path / "out"), max_failure_rate=0.005)

    assert caught.value.exit_code == 3
    assert len(read(tmp_path / "out")) == 101


@pytest.mark.parametrize(
    ("captioner", "difference"),
    [
        (partial(EchoCaptioner, fingerprint="other"), "another model"),
        (partial(EchoCaptioner, search=SearchConfig(beam_size=9)), "another search settings"),
    ],
)
def test_an_output_of_another_model_or_search_is_refused(
    run: Run, photographs: Path, tmp_path: Path, captioner: Callable[[], EchoCaptioner], difference: str
) -> None:
    output = tmp_path / "out"
    run(str(photographs), str(output), limit=2)
    before = read(output)

    with pytest.raises(OutputError, match=difference):
        run(str(photographs), str(output), load_captioner=captioner)

    assert read(output) == before


def test_a_folder_with_other_files_is_refused_as_output(run: Run, photographs: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")

    with pytest.raises(OutputError, match="is no captions folder of imcap"):
        run(str(photographs), str(tmp_path / "out"))


def test_copies_of_parts_and_their_done_records_do_not_affect_the_next_run(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    output, lines = tmp_path / "out", list[str]()
    run(str(photographs), str(output))
    rows = read(output)
    for part in list(output.glob("*.parquet")):
        copy = part.name.replace(part.name[:32], "f" * 32)
        part.with_name(copy).write_bytes(part.read_bytes())
        record = output / "_imcap" / "done" / part.stem
        record.with_name(Path(copy).stem).write_bytes(record.read_bytes())

    summary = run(str(photographs), str(output), reporter=ProgressReporter(lines.append))

    assert read(output) == rows
    assert (summary.num_images, summary.num_new, summary.counts) == (100, 0, {"ok": 100})
    assert not [line for line in lines if line.startswith("captioning")]
    assert any("that repeated images of other parts" in line for line in lines)


def test_readers_of_all_parquet_files_below_an_output_see_captions_only(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    output, ended, seen = tmp_path / "out", threading.Event(), set[Path]()
    run(str(photographs), str(output), limit=40)

    def watch() -> None:
        while not ended.wait(0.01):
            with contextlib.suppress(FileNotFoundError):  # files come and go
                seen.update((output / "_imcap").rglob("*"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run(str(photographs), str(output), overwrite=True)
    finally:
        ended.set()
        watcher.join()

    new_parts = {path for path in seen if path.parent.name == "next" and not path.name.startswith(("_", "."))}
    assert {path.name for path in new_parts} == {path.stem for path in output.glob("*.parquet")}
    assert {path.name for path in seen if path.parent.name == "done"} > {path.name for path in new_parts}
    assert not [path for path in seen if path.suffix == ".parquet"]
    assert duckdb.sql(f"SELECT count(*) FROM '{output}/**/*.parquet'").fetchall() == [(100,)]


def test_an_output_of_an_earlier_version_resumes(run: Run, photographs: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (photographs / "even" / "twin.jpg").write_bytes((photographs / "odd" / "099.jpg").read_bytes())
    run(str(photographs), str(output), limit=60)
    for part in output.glob("*.parquet"):
        pq.write_table(pq.read_table(part).drop_columns(["familiarity", "caption_source"]), part)
    run_file = output / "_imcap" / "run.json"
    run_file.write_text(json.dumps(json.loads(run_file.read_text()) | {"schema_version": "2"}))
    before = read(output)
    for kind in ("manifest", "done"):
        for path in list((output / "_imcap" / kind).iterdir()):
            path.rename(f"{path}.parquet")
    (output / "_imcap" / "heartbeat").rename(output / "_imcap" / "heartbeat.json")

    summary = run(str(photographs), str(output))

    rows = read(output)
    assert (summary.num_images, summary.num_new, summary.counts) == (101, 41, {"ok": 100, "duplicate": 1})
    assert summary.num_unfamiliar is None
    assert {row["image_id"]: row for row in before}.items() <= {row["image_id"]: row for row in rows}.items()
    assert {tuple(pq.read_schema(part).names) for part in output.glob("*.parquet")} == {tuple(rows[0])}
    assert not {"familiarity", "caption_source"} & rows[0].keys()
    assert sorted(output.rglob("*.parquet")) == sorted(output.glob("*.parquet"))


def test_a_stopped_run_with_existing_captions_resumes_and_captions_only_the_rest(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    names = [str(path.relative_to(photographs)) for path in sorted(photographs.rglob("*.jpg"))]
    existing, output = tmp_path / "existing.jsonl", tmp_path / "out"
    existing.write_text(
        "".join(json.dumps({"file_name": name, "caption": f"mine {name}"}) + "\n" for name in names[::3])
    )
    run(str(photographs), str(output), limit=40, existing=str(existing))
    run_file = output / "_imcap" / "run.json"
    run_file.write_text(json.dumps(json.loads(run_file.read_text()) | {"state": "running"}))

    summary = run(str(photographs), str(output), existing=str(existing))

    rows = {row["image_id"]: row for row in read(output)}
    assert (len(rows), summary.num_existing) == (len(names), len(names[::3]))
    for name in names:
        is_existing = name in names[::3]
        assert rows[name]["caption_source"] == ("existing" if is_existing else "model")
        assert math.isnan(rows[name]["confidence"]) == is_existing
        assert (rows[name]["caption"] == f"mine {name}") == is_existing


def test_a_retry_of_failed_images_keeps_existing_captions(run: Run, photographs: Path, tmp_path: Path) -> None:
    names = [str(path.relative_to(photographs)) for path in sorted(photographs.rglob("*.jpg"))]
    existing, output = tmp_path / "existing.jsonl", tmp_path / "out"
    existing.write_text(json.dumps({"file_name": names[0], "caption": "mine"}))
    good = (photographs / names[1]).read_bytes()
    for name in names[:3]:  # the first has a caption and is not read
        (photographs / name).write_bytes(b"no photograph")
    run(str(photographs), str(output), limit=10, existing=str(existing))
    before = {row["image_id"]: row for row in read(output)}
    (photographs / names[1]).write_bytes(good)

    summary = run(str(photographs), str(output), limit=10, existing=str(existing), retry_failed=True)

    rows = {row["image_id"]: row for row in read(output)}
    assert (summary.num_new, summary.counts) == (2, {"ok": 9, "failed": 1})
    assert [before[name]["status"] for name in names[:3]] == ["ok", "failed", "failed"]
    assert [rows[name]["status"] for name in names[:3]] == ["ok", "ok", "failed"]
    assert (rows[names[0]]["caption"], rows[names[0]]["caption_source"]) == ("mine", "existing")
    assert {name for name in rows if str(rows[name]) != str(before[name])} == {names[1]}  # NaN is not equal to itself


def test_a_folder_without_images_creates_no_output(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "notes.txt").write_text("no image")

    with pytest.raises(InputError, match="no images in .* 1 other file"):
        run(str(tmp_path / "in"), str(tmp_path / "out"))

    assert not (tmp_path / "out").exists()


def test_more_actors_than_the_cluster_has_room_for_are_refused_immediately(
    run: Run, photographs: Path, tmp_path: Path
) -> None:
    with pytest.raises(ClusterError, match="--num-actors 500 needs 502 CPUs"):
        run(str(photographs), str(tmp_path / "out"), num_actors=500)

    assert not (tmp_path / "out").exists()
