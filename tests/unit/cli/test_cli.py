"""The parts of the command line that need no Ray: help, usage errors, one image, a model, scores."""

from __future__ import annotations

import html
import json
import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner, Result

from imcap_ray import __version__
from imcap_ray.cli.main import main
from imcap_ray.data.datasets import load_dataset
from imcap_ray.data.schemas import CAPTIONS_SCHEMA
from imcap_ray.models.captioner import Captioner
from imcap_ray.models.torch_captioner import TorchCaptioner
from imcap_ray.text.escaping import printable
from tests import small_data

COMMANDS = [
    *("bench", "caption", "check", "demo", "evaluate", "export", "model", "quantize", "report", "status"),
    *("submit", "suggest", "train"),
]


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """Restore the SIGTERM handler that `imcap` installs."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def flickr8k(tmp_path: Path, make_flickr8k: Callable[..., Path]) -> Path:
    return make_flickr8k(tmp_path / "flickr8k")


@pytest.fixture
def photograph(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> Path:
    path = tmp_path / "one.jpg"
    path.write_bytes(make_jpeg(1))
    return path


def imcap(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def mistake(*arguments: object) -> str:
    """Return the one line on stderr of a command that ends with exit code 2."""
    result = imcap(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert isinstance(result.exception, SystemExit), "a traceback"
    (line,) = result.stderr.splitlines()
    assert line.startswith("imcap: ")
    return line.removeprefix("imcap: ")


# ---- help


def test_help_is_instant_and_imports_neither_torch_nor_ray() -> None:
    program = (
        "import sys\n"
        "from imcap_ray.cli.main import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'ray', 'timm', 'nltk', 'PIL') if name in sys.modules])"
    )
    seconds = []
    for _ in range(3):  # the first may have to compile and to read from a cold disk
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=50)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # CPU time, because wall-clock time depends on the load of the machine.
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

    assert run.stdout.splitlines()[-1] == "[]"
    assert min(seconds) < 0.5


def test_every_command_is_listed_and_has_help() -> None:
    result = imcap("--help")

    assert result.exit_code == 0
    for command in COMMANDS:
        assert command in result.stdout
        assert imcap(command, "--help").exit_code == 0
    assert sorted(main.commands) == COMMANDS


@pytest.mark.parametrize("command", ["caption", "check", "train", "evaluate", "export", "submit"])
def test_the_help_of_the_main_command_has_an_example(command: str) -> None:
    assert f"\n  imcap {command}" in imcap(command, "-h").stdout


def test_the_version_is_printed() -> None:
    assert imcap("--version").stdout == f"imcap, version {__version__}\n"


# ---- usage errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["caption"],
        ["caption", "a.jpg", "--no-such-option"],
        ["caption", "a.jpg", "--beam-size", "0"],
        ["caption", "in", "out", "--max-failure-rate", "2"],
        ["train", "data"],
        ["train", "data", "out", "--num-workers", "0"],
        ["train", "data", "out", "--num-workers", "4-2"],
        ["train", "data", "out", "--num-workers", "some"],
        ["evaluate", "a", "b", "--split", "dev"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = imcap(*arguments)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_a_missing_image_is_a_one_line_error(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "nowhere.jpg"

    assert mistake("caption", path, "--model", model_dir) == f"{path}: no such file: {path} (missing)"


def test_the_captions_of_several_images_are_printed_with_their_names(
    model_dir: Path, photograph: Path, tmp_path: Path, make_jpeg: Callable[..., bytes]
) -> None:
    two, text = tmp_path / "two.jpg", tmp_path / "three.jpg"
    two.write_bytes(make_jpeg(2))
    text.write_bytes(b"no image")
    first, second = (imcap("caption", path, "--model", model_dir).stdout for path in (photograph, two))

    result = imcap("caption", photograph, two, "--model", model_dir)
    assert (result.exit_code, result.stdout) == (0, f"{photograph}: {first}{two}: {second}")

    result = imcap("caption", photograph, text, two, tmp_path / "gone.jpg", "--model", model_dir)
    assert (result.exit_code, result.stdout) == (2, f"{photograph}: {first}{two}: {second}")
    assert re.fullmatch(rf"imcap: {text}: .* \(not_an_image\); .*/gone.jpg: .* \(missing\)\n", result.stderr)

    rows = json.loads(imcap("caption", photograph, text, "--model", model_dir, "--json").stdout)["images"]
    assert [row["image"] for row in rows] == [str(photograph), str(text)]
    assert rows[0]["caption"] == rows[0]["captions"][0]["caption"] == first.strip()
    assert rows[1]["error_code"] == "not_an_image"


def test_several_paths_are_images_or_input_and_output(model_dir: Path, photograph: Path, tmp_path: Path) -> None:
    for paths in ([tmp_path, photograph], [photograph, photograph, tmp_path / "captions"]):
        other = next(path for path in paths if path != photograph)
        expected = f"expected INPUT and OUTPUT, or only images: {other} is not an image"
        assert mistake("caption", *paths, "--model", model_dir) == expected


def test_a_file_that_is_not_an_image_is_a_one_line_error(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")

    assert mistake("caption", tmp_path / "a.jpg", "--model", model_dir).endswith("(not_an_image)")


def test_captioning_a_folder_requires_an_output(model_dir: Path, tmp_path: Path) -> None:
    assert "is a folder: say where the captions go" in mistake("caption", tmp_path, "--model", model_dir)


def test_a_folder_that_is_not_a_model_is_a_one_line_error(photograph: Path, tmp_path: Path) -> None:
    assert "is not a model folder" in mistake("caption", photograph, "--model", tmp_path)
    assert "is not a model folder" in mistake("model", tmp_path)


def test_incompatible_settings_are_a_one_line_error(photograph: Path, model_dir: Path) -> None:
    line = mistake("caption", photograph, "--model", model_dir, "--num-captions", "9")

    assert line == "--num-captions must be 1 to --beam-size (3), got 9"


def test_missing_captions_and_references_are_a_one_line_error(flickr8k: Path, tmp_path: Path) -> None:
    assert "no such captions" in mistake("evaluate", tmp_path / "nowhere", flickr8k)
    assert "no such data set" in mistake("evaluate", tmp_path / "nowhere", tmp_path / "nowhere2")


def test_submit_runs_only_its_own_commands() -> None:
    assert "runs caption, train, evaluate, report or demo, got 'rm'" in mistake("submit", "rm", "-rf", "/")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, photograph: Path, model_dir: Path) -> None:
    def broken(self: Captioner, *arguments: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(TorchCaptioner, "caption_pixels", broken)

    result = imcap("caption", photograph, "--model", model_dir)

    assert (result.exit_code, type(result.exception)) == (1, ZeroDivisionError)


def test_ctrl_c_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, photograph: Path, model_dir: Path) -> None:
    def interrupted(self: Captioner, *arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(TorchCaptioner, "caption_pixels", interrupted)

    result = imcap("caption", photograph, "--model", model_dir)

    assert result.exit_code == 130
    assert result.stderr.startswith("imcap: interrupted; what is written is kept")


TERMINATED = """
import os, signal, sys, threading, time
from imcap_ray.cli import main
from imcap_ray import storage
from imcap_ray.errors import ImcapError

class Swallows:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

def swallowed(location):
    Swallows()  # Python prints what is raised in a destructor, and continues
    time.sleep(20)

def cleaning_up(location):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2.5)
        print("cleaned up")

def failing(location):
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)
    except KeyboardInterrupt:
        raise ImcapError("a process of Ray has ended") from None

from imcap_ray.runs import status
status.read_status = globals()[sys.argv[1]]
main.main(["status", "somewhere"])
"""


@pytest.mark.parametrize(
    ("moment", "stdout"), [("swallowed", ""), ("cleaning_up", "cleaned up\n"), ("failing", "")], ids=str
)
def test_sigterm_is_exit_code_130_even_if_the_exception_is_swallowed(moment: str, stdout: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", TERMINATED, moment], capture_output=True, text=True, timeout=50, check=False
    )

    assert ended.returncode == 130, ended.stderr
    assert ended.stdout == stdout
    assert ended.stderr.endswith("imcap: interrupted; what is written is kept, the same command resumes\n")
    assert ended.stderr.count("imcap: ") == 1


def test_sigterm_while_modules_are_imported_is_exit_code_130_too() -> None:
    program = (
        "import os, signal, sys\n"
        "from importlib.abc import MetaPathFinder\n"
        "class Terminates(MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'imcap_ray.cli':\n"
        "            os.kill(os.getpid(), signal.SIGTERM)\n"
        "from imcap_ray.__main__ import main\n"
        "sys.meta_path.insert(0, Terminates())\n"
        "main(['--help'])\n"
    )

    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=False)

    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "imcap: interrupted before work began\n")


# ---- hostile names and captions

HOSTILE = "\x1b[2J\x1b]0;owned\x07\n<script>alert(1)</script> ](http://x) | `id` \u202egpj.\x9b31m"


def without_control_characters(text: str) -> bool:
    return all(letter == "\n" or (letter.isprintable() or ord(letter) > 0x9F) for letter in text) and not (
        set("\u202e\u2028\x9b") & set(text)
    )


@pytest.mark.parametrize(
    "arguments",
    [
        ["caption", HOSTILE],
        ["caption", HOSTILE, "out"],
        ["caption", "one.jpg", "--model", HOSTILE],
        ["evaluate", HOSTILE, HOSTILE],
        ["report", HOSTILE],
        ["export", HOSTILE, HOSTILE, "--to", "csv"],
        ["check", HOSTILE],
        ["model", HOSTILE],
        ["submit", HOSTILE],
        ["train", "data", "out", "--recipe", HOSTILE],
    ],
)
def test_a_hostile_name_in_an_error_is_escaped_on_one_line(arguments: list[str]) -> None:
    line = mistake(*(argument.replace("/", "_") for argument in arguments))

    assert without_control_characters(line)


def test_a_hostile_name_in_a_table_is_printed_escaped(tmp_path: Path, flickr8k: Path) -> None:
    pq.write_table(pa.table({"image_id": [HOSTILE], "caption": ["x"]}), tmp_path / "a.parquet")
    assert without_control_characters(mistake("evaluate", tmp_path / "a.parquet", flickr8k))

    pq.write_table(pa.table({"image_path": [f"/elsewhere/{HOSTILE}"], "caption": ["x"]}), tmp_path / "b.parquet")
    line = mistake("evaluate", tmp_path / "a.parquet", tmp_path / "b.parquet")
    assert "--allow-outside-paths" in line
    assert without_control_characters(line)


def test_a_caption_of_a_hostile_vocabulary_is_printed_escaped(photograph: Path, tmp_path: Path) -> None:
    words = ("<b>", "\x1b[2J", "\u202e", "](x)", "|", "\x9b31m", "\x7f")
    model = small_data.write_model_folder(tmp_path / "model", words=words, seed=4)
    text = Captioner.load(model, device="cpu").caption([photograph])[0].text
    assert not without_control_characters(text), "the caption must contain control characters"

    shown = imcap("caption", photograph, "--model", model).stdout
    as_json = imcap("caption", photograph, "--model", model, "--json").stdout

    assert without_control_characters(shown)
    assert shown == f"{printable(text)}\n"
    assert without_control_characters(as_json)
    assert json.loads(as_json)["caption"] == text


def test_hostile_references_are_scored_and_printed_escaped(tmp_path: Path) -> None:
    references = {"image_id": ["a", "b"], "captions": [[HOSTILE, HOSTILE], [HOSTILE]], "split": ["test"] * 2}
    pq.write_table(pa.table(references), tmp_path / "references.parquet")
    pq.write_table(pa.table({"image_id": ["a", "b"], "caption": [HOSTILE, "a cat"]}), tmp_path / "captions.parquet")
    arguments = ["evaluate", tmp_path / "captions.parquet", tmp_path / "references.parquet", "--save", tmp_path / "s"]

    shown, as_json = imcap(*arguments).stdout, imcap(*arguments, "--json").stdout

    for text in (shown, as_json):
        assert "script" in text
        assert without_control_characters(text)
    assert json.loads(as_json) == json.loads((tmp_path / "s" / "scores.json").read_text())
    markdown = (tmp_path / "s" / "scores.md").read_text()
    assert r"\<script\>alert(1)\</script\>" in markdown
    assert without_control_characters(markdown)


# ---- files that a table must not name


@pytest.fixture
def captions_elsewhere(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> Path:
    """A captions table whose image is neither below it nor in the input of a run."""
    (tmp_path / "elsewhere.jpg").write_bytes(make_jpeg(1))
    (tmp_path / "captions").mkdir()
    row = {"image_id": "a", "image_path": f"{tmp_path}/elsewhere.jpg", "caption": "a dog", "status": "ok"}
    row |= {"error_code": "", "error_message": "", "confidence": 0.5}
    pq.write_table(pa.Table.from_pylist([row], schema=CAPTIONS_SCHEMA), tmp_path / "captions" / "part-0.parquet")
    return tmp_path / "captions"


def test_a_report_shows_outside_files_only_if_allowed(captions_elsewhere: Path) -> None:
    line = mistake("report", captions_elsewhere)

    for words in ("image 'a'", "elsewhere.jpg", f"leads out of {captions_elsewhere};", "--allow-outside-paths"):
        assert words in line
    assert not (captions_elsewhere / "report.html").exists()
    assert imcap("report", captions_elsewhere, "--allow-outside-paths").exit_code == 0
    assert "data:image/jpeg" in (captions_elsewhere / "report.html").read_text()


@pytest.mark.parametrize("name", ["", "list.parquet"])
def test_a_report_shows_the_files_of_the_run_input(captions_elsewhere: Path, name: str) -> None:
    (captions_elsewhere / "_imcap").mkdir()
    run = {"input": str(captions_elsewhere.parent / name)}
    (captions_elsewhere / "_imcap" / "run.json").write_text(json.dumps(run))

    assert imcap("report", captions_elsewhere).exit_code == 0
    assert "data:image/jpeg" in (captions_elsewhere / "report.html").read_text()


def test_training_data_can_name_outside_files_only_if_allowed(tmp_path: Path, captions: Path) -> None:
    data = tmp_path / "data.parquet"
    pq.write_table(pa.table({"image_path": ["/elsewhere/a.jpg"], "caption": ["x"]}), data)

    # An address that is none ends a training after its data are read and before Ray starts.
    for command in (["train", data, tmp_path / "out", "--address", "http://x"], ["evaluate", captions, data]):
        assert "leads out of" in mistake(*command)
        assert "leads out of" not in mistake(*command, "--allow-outside-paths", "--quiet")
    assert not (tmp_path / "out").exists()


# ---- secrets


@pytest.mark.parametrize(
    "arguments",
    [
        ["caption", "one.jpg", "s3://AKIA:planted@bucket/two.jpg"],
        ["caption", "one.jpg", "two.jpg", "s3://AKIA:planted@bucket/captions"],
        ["caption", "s3://AKIA:planted@bucket/images", "out"],
        ["caption", "photographs", "s3://AKIA:planted@bucket/captions"],
        ["caption", "https://host/a.jpg?X-Amz-Signature=planted"],
        ["caption", "one.jpg", "--model", "s3://AKIA:planted@bucket/model"],
        ["train", "s3://AKIA:planted@bucket/data", "out"],
        ["evaluate", "captions", "s3://AKIA:planted@bucket/data"],
        ["report", "s3://AKIA:planted@bucket/captions"],
        ["export", "s3://AKIA:planted@bucket/captions", "out.csv", "--to", "csv"],
        ["export", "captions", "s3://AKIA:planted@bucket/out.csv", "--to", "csv"],
        ["check", "s3://AKIA:planted@bucket/data"],
        ["model", "s3://AKIA:planted@bucket/model"],
        ["submit", "caption", "s3://AKIA:planted@bucket/images", "s3://bucket/captions"],
        ["submit", "caption", "s3://b/images", "s3://b/captions", "--model=s3://b/model?secret_key=planted"],
    ],
)
def test_a_secret_in_an_argument_is_refused_and_not_repeated(arguments: list[str], tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        (tmp_path / "photographs").mkdir()
        line = mistake(*arguments)

    assert "holds a secret" in line
    assert "planted" not in line
    assert os.listdir(tmp_path) == ["photographs"]


# ---- one image


def test_one_image_is_captioned_on_stdout(photograph: Path, model_dir: Path, captioner: Captioner) -> None:
    expected = captioner.caption([photograph])[0]

    result = imcap("caption", photograph, "--model", model_dir)

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{expected.text}\n"


def test_one_image_is_not_captioned_on_a_cpu_if_a_gpu_was_requested(photograph: Path, model_dir: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")

    result = imcap("caption", photograph, "--model", model_dir, "--gpus-per-worker", 1)

    assert (result.exit_code, result.stdout) == (1, "")
    assert "CUDA cannot be used" in result.stderr and "--gpus-per-worker 0" in result.stderr


def test_one_image_as_json(photograph: Path, model_dir: Path) -> None:
    caption = json.loads(imcap("caption", photograph, "--model", model_dir, "--json").stdout)

    assert set(caption) == {"caption", "confidence", "familiarity", "captions"}
    assert caption["familiarity"] is None
    assert 0 < caption["confidence"] <= 1


def test_the_search_can_be_changed_on_the_command_line(photograph: Path, model_dir: Path) -> None:
    result = imcap("caption", photograph, "--model", model_dir, "--max-length", 2, "--beam-size", 1)

    assert len(result.stdout.split()) <= 2


# ---- a model


def test_a_model_is_described(model_dir: Path, captioner: Captioner) -> None:
    result = imcap("model", model_dir)

    assert (result.exit_code, result.stderr) == (0, "")
    lines = dict(line.split(":", 1) for line in result.stdout.splitlines())
    assert lines["fingerprint"].strip() == captioner.fingerprint
    assert "timm:test_efficientnet" in lines["encoder"]
    assert "beam_size 3" in lines["search"]
    assert "cider_d 0.5" in lines["metrics"]
    assert lines["size_bytes"].strip() == f"{(model_dir / 'model.safetensors').stat().st_size:,}"
    assert lines["scores"].strip() == "unknown"


def test_the_scores_of_a_model_are_shown_with_the_reason_why_evaluate_may_give_others() -> None:
    *_, scores, reason = imcap("model").stdout.splitlines()

    assert scores.startswith("scores: ") and "BLEU-4 26.0" in scores
    assert "CIDEr-D 0.642" in scores and scores.endswith("on 1000 validation images")
    assert "float32" in reason and "rounded" in reason and "imcap evaluate" in reason


def test_a_model_is_described_as_json(model_dir: Path) -> None:
    facts = json.loads(imcap("model", model_dir, "--json").stdout)

    assert facts["location"] == str(model_dir)
    assert facts["vocabulary"] == {"tokens": 32, "tokenizer": "ptb"}
    assert facts["parameters"] > 1000


# ---- scores


@pytest.fixture
def captions(tmp_path: Path, flickr8k: Path) -> Path:
    """Captions of the test split: each image's first reference."""
    references = load_dataset(str(flickr8k)).references("test")
    (tmp_path / "captions").mkdir()
    table = pa.table({"image_id": list(references), "caption": [texts[0] for texts in references.values()]})
    pq.write_table(table, tmp_path / "captions" / "part-0.parquet")
    return tmp_path / "captions"


def test_captions_are_scored_and_the_scores_are_stored_next_to_them(captions: Path, flickr8k: Path) -> None:
    result = imcap("evaluate", captions, flickr8k)

    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        f"{flickr8k}: Flickr8k as distributed, 8 train, 2 validation, 2 test",
        f"{flickr8k}: 1 captioned image is in no split: odd.jpg.1",
    ]
    assert "BLEU-4" in result.stdout
    assert json.loads((captions / "_imcap" / "scores.json").read_text())
    assert "BLEU-4" in (captions / "_imcap" / "scores.md").read_text()
    assert "cider_d" in pq.read_schema(captions / "_imcap" / "image_scores").names


def test_scores_name_the_search_and_the_model(captions: Path, flickr8k: Path) -> None:
    run = {"search": {"beam_size": 4, "length_penalty": 0.7}, "model_fingerprint": "0123456789abcdef"}
    (captions / "_imcap").mkdir()
    (captions / "_imcap" / "run.json").write_text(json.dumps(run))

    result = imcap("evaluate", captions, flickr8k)

    assert "beam 4, length penalty 0.7; model 0123456789ab" in result.stdout


@pytest.mark.parametrize(
    "columns",
    [
        {"caption": [["a dog", "a cat"]]},
        {"caption": ["a dog"], "confidence": ["high"]},
        {"caption": pa.array([b"caf\xe9"]).view(pa.string())},
    ],
)
def test_a_captions_table_with_unsuitable_columns_is_a_one_line_error(
    tmp_path: Path, flickr8k: Path, columns: dict[str, Any]
) -> None:
    pq.write_table(pa.table({"image_id": ["a.jpg"], **columns}), tmp_path / "odd.parquet")

    assert "odd.parquet cannot be read as a captions table: " in mistake("evaluate", tmp_path / "odd.parquet", flickr8k)


def captions_of_ours(folder: Path, image_ids: list[str]) -> Path:
    """A captions table of one part, as written by `imcap caption`."""
    rows = [{"image_id": image_id, "caption": "a dog runs", "status": "ok"} for image_id in image_ids]
    table = pa.Table.from_pylist(rows, schema=CAPTIONS_SCHEMA)
    folder.mkdir(parents=True)
    pq.write_table(table, folder / "part-0.parquet")
    return folder


def test_a_report_is_written_to_a_uri(tmp_path: Path) -> None:
    captions = captions_of_ours(tmp_path / "captions", ["a.jpg"])

    result = imcap("report", captions.as_uri())

    assert result.exit_code == 0
    assert "a dog runs" in (captions / "report.html").read_text()
    assert result.stderr == "1 photograph cannot be shown, the first is a.jpg: its bytes were in a table\n"


def test_a_report_of_one_file_is_written_next_to_it_and_does_not_replace_a_folder(tmp_path: Path) -> None:
    captions = captions_of_ours(tmp_path / "captions", ["a.jpg"])

    assert imcap("report", captions / "part-0.parquet").exit_code == 0
    assert (captions / "report.html").is_file()
    assert "is a folder: give the name of the page" in mistake("report", captions, "--output", tmp_path)


def test_a_report_of_captions_that_cannot_be_scored_states_the_reason(tmp_path: Path, flickr8k: Path) -> None:
    known = load_dataset(str(flickr8k)).split("test")["image_id"][0].as_py()
    captions = captions_of_ours(tmp_path / "captions", [known, "strange.jpg"])

    result = imcap("report", captions, "--references", flickr8k)

    assert result.exit_code == 0
    [reason] = [line.partition("without scores: ")[2] for line in result.stderr.splitlines() if "without" in line]
    assert reason in html.unescape((captions / "report.html").read_text())
    assert "is missing" in mistake("report", captions, "--references", flickr8k, "--split", "train")


def test_scores_as_json_are_the_only_output_on_stdout(captions: Path, flickr8k: Path, tmp_path: Path) -> None:
    result = imcap("evaluate", captions, flickr8k, "--json", "--save", tmp_path / "scores")

    assert json.loads(result.stdout) == json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert not (captions / "_imcap").exists()


def test_quiet_prints_nothing(captions: Path, flickr8k: Path) -> None:
    assert imcap("evaluate", captions, flickr8k, "--quiet").output == ""


def test_scoring_against_a_split_without_captions_is_a_one_line_error(captions: Path, flickr8k: Path) -> None:
    line = mistake("evaluate", captions, flickr8k, "--split", "validation")

    assert "has captions for 0 of the 2 validation images" in line
    assert not (captions / "_imcap").exists()


# ---- an export


@pytest.fixture
def captioned(tmp_path: Path, make_jpeg: Callable[..., bytes]) -> Path:
    """The output of a run over three images: two captions and a failure."""
    (tmp_path / "images").mkdir()
    rows = []
    for number, caption in enumerate(["ein Hund läuft", "a cat", ""]):
        path = tmp_path / "images" / f"{number}.jpg"
        path.write_bytes(make_jpeg(number))
        row = dict.fromkeys(CAPTIONS_SCHEMA.names, "") | {"image_id": path.name, "image_path": str(path)}
        row |= {"caption": caption, "captions": [caption], "status": "ok" if caption else "failed", "format": "jpeg"}
        row |= {
            "familiarity": 0.5,
            "confidence": 0.5 - 0.3 * number,
            "logprob": -2.0,
            "num_tokens": 4,
            "width": 80,
            "height": 60,
        }
        rows.append(row)
    (tmp_path / "captions" / "_imcap").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows, CAPTIONS_SCHEMA), tmp_path / "captions" / "part-0.parquet")
    run = {"input": str(tmp_path / "images"), "state": "complete"}
    (tmp_path / "captions" / "_imcap" / "run.json").write_text(json.dumps(run))
    return tmp_path / "captions"


@pytest.mark.parametrize("format", ["coco", "jsonl", "csv", "sidecar", "hf", "webdataset"])
def test_captions_are_exported_and_the_last_line_counts_them(format: str, captioned: Path, tmp_path: Path) -> None:
    result = imcap("export", captioned, tmp_path / "out", "--to", format, "--min-confidence", 0.3)

    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr.splitlines() == [
        f"{tmp_path}/out: 1 caption as {format}; left out: 1 failed, 1 below --min-confidence"
    ]
    assert (tmp_path / "out").exists()


def test_an_export_summary_as_json_is_the_only_output_on_stdout(captioned: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "1.jpg").unlink()

    summary = json.loads(imcap("export", captioned, tmp_path / "out", "--to", "webdataset", "--json").stdout)

    assert summary == {
        "output": str(tmp_path / "out"),
        "format": "webdataset",
        "num_exported": 1,
        "num_kept": 0,
        "left_out_by_status": {"failed": 1},
        "left_out_by_confidence": 0,
        "left_out_by_familiarity": 0,
        "left_out_without_image": 1,
        "images_without": ["1.jpg (missing)"],
        "left_out_not_in_input": 0,
        "num_renamed": 0,
        "renamed": [],
    }


def test_a_missing_image_is_named(captioned: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "1.jpg").unlink()

    result = imcap("export", captioned, tmp_path / "out", "--to", "hf")

    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        "left out: 1.jpg (missing)",
        f"{tmp_path}/out: 1 caption as hf; left out: 1 failed, 1 without an image",
    ]


def test_export_errors_are_one_line(captioned: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "no such captions" in mistake("export", tmp_path / "nowhere", out, "--to", "csv")
    assert "no captions table" in mistake("export", tmp_path / "images", out, "--to", "csv")
    assert "--existing is for sidecar, not for csv" in mistake(
        "export", captioned, out, "--to", "csv", "--existing", "append"
    )
    assert "--shard-size is for hf and webdataset, not for coco" in mistake(
        "export", captioned, out, "--to", "coco", "--shard-size", 5
    )
    assert "--existing" in mistake("export", captioned, out, "--to", "sidecar", "--overwrite")
    assert not out.exists()
    imcap("export", captioned, out, "--to", "csv")
    assert "give --overwrite to replace it" in mistake("export", captioned, out, "--to", "csv")
    (captioned / "_imcap" / "run.json").write_text("{")
    assert "run.json is damaged" in mistake("export", captioned, tmp_path / "other", "--to", "csv")


def test_an_outside_image_is_exported_only_if_allowed(captions_elsewhere: Path, tmp_path: Path) -> None:
    arguments = ["export", captions_elsewhere, tmp_path / "out", "--to", "webdataset"]

    assert "--allow-outside-paths" in mistake(*arguments)
    assert imcap(*arguments, "--allow-outside-paths").exit_code == 0


def test_an_export_from_an_unfinished_run_has_a_warning(captioned: Path, tmp_path: Path) -> None:
    (captioned / "_imcap" / "run.json").write_text(json.dumps({"state": "running"}))

    result = imcap("export", captioned, tmp_path / "out", "--to", "jsonl")

    assert result.exit_code == 0
    assert "is not complete" in result.stderr.splitlines()[0]


def test_python_m_is_the_same_command() -> None:
    run = subprocess.run([sys.executable, "-m", "imcap_ray", "--version"], capture_output=True, text=True, timeout=50)

    assert run.stdout == f"imcap, version {__version__}\n"


@pytest.mark.parametrize("setting", ["decoder.num_heads=7", "decoder.name=gru"])
@pytest.mark.parametrize("command", [["check", "--no-decode"], ["train", "--dry-run"]])
def test_a_decoder_that_cannot_be_built_is_refused_before_the_data_are_read(
    command: list[str], setting: str, tmp_path: Path
) -> None:
    """The data do not exist, so a command that read them first, or started Ray, would report that instead."""
    name, *flags = command
    folders = [tmp_path / "nowhere", *([tmp_path / "model"] if name == "train" else [])]

    line = mistake(name, *folders, *flags, "--set", setting)

    assert "decoder" in line and setting.partition("=")[2] in line
    assert "nowhere" not in line


def test_a_recipe_with_an_unknown_decoder_is_exit_code_2_for_data_that_can_be_checked(flickr8k: Path) -> None:
    assert imcap("check", flickr8k, "--no-decode", "--set", "decoder.name=lstm").exit_code != 2
    assert "'gru'" in mistake("check", flickr8k, "--no-decode", "--set", "decoder.name=gru")


@pytest.mark.parametrize(
    "arguments", [["export", "captions", "out", "--to", "csv"], ["report", "captions"], ["status", "captions"]]
)
def test_a_command_that_only_reads_captions_names_a_corrupt_run_file_and_never_advises_to_remove_it(
    arguments: list[str], captioned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (captioned / "_imcap" / "run.json").write_text("{")

    line = mistake(*arguments)

    assert "captions/_imcap/run.json is damaged" in line
    assert "remove" not in line and "OUTPUT" not in line
