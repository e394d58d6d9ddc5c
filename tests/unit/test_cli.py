"""The command line, as far as it needs no Ray: help, mistakes, one image, a model, a score."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from imcap_ray import __version__
from imcap_ray.captioner import Captioner
from imcap_ray.cli import main
from imcap_ray.datasets import load_dataset

COMMANDS = ["caption", "demo", "evaluate", "model", "report", "submit", "train"]


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """`imcap` listens to SIGTERM; a test run does not."""
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
    """The one line on stderr of a command that ends with exit code 2."""
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
        "from imcap_ray.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print([name for name in ('torch', 'ray', 'timm', 'nltk', 'PIL') if name in sys.modules])"
    )
    seconds = []
    for _ in range(3):  # the first may have to compile and to read from a cold disk
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=50)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # The processor's time, not the clock's: that one depends on what else the machine does.
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


@pytest.mark.parametrize("command", ["caption", "train", "evaluate", "submit"])
def test_the_main_commands_help_has_an_example(command: str) -> None:
    assert f"\n  imcap {command}" in imcap(command, "-h").stdout


def test_the_version_is_told() -> None:
    assert imcap("--version").stdout == f"imcap, version {__version__}\n"


# ---- mistakes


@pytest.mark.parametrize(
    "arguments",
    [
        ["fly"],
        ["caption"],
        ["caption", "a.jpg", "--no-such-option"],
        ["caption", "a.jpg", "--beam-size", "0"],
        ["caption", "in", "out", "--max-failure-rate", "2"],
        ["train", "data"],
        ["evaluate", "a", "b", "--split", "dev"],
    ],
)
def test_wrong_usage_is_exit_code_2(arguments: list[str]) -> None:
    result = imcap(*arguments)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_an_image_that_is_not_there_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "nowhere.jpg"

    assert mistake("caption", path, "--model", model_dir) == f"{path}: no such file: {path} (missing)"


def test_a_file_that_is_no_image_is_one_line(model_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"no image")

    assert mistake("caption", tmp_path / "a.jpg", "--model", model_dir).endswith("(not_an_image)")


def test_a_folder_needs_an_output(model_dir: Path, tmp_path: Path) -> None:
    assert "is a folder: say where the captions go" in mistake("caption", tmp_path, "--model", model_dir)


def test_a_folder_that_is_no_model_is_one_line(photograph: Path, tmp_path: Path) -> None:
    assert "is not a model folder" in mistake("caption", photograph, "--model", tmp_path)
    assert "is not a model folder" in mistake("model", tmp_path)


def test_settings_that_do_not_go_together_are_one_line(photograph: Path, model_dir: Path) -> None:
    line = mistake("caption", photograph, "--model", model_dir, "--num-captions", "9")

    assert line == "search.num_captions must be 1 to search.beam_size (3), got 9"


def test_captions_and_references_that_are_not_there_are_one_line(flickr8k: Path, tmp_path: Path) -> None:
    assert "no such captions" in mistake("evaluate", tmp_path / "nowhere", flickr8k)
    assert "no such data set" in mistake("evaluate", tmp_path / "nowhere", tmp_path / "nowhere2")


def test_submit_runs_only_its_own_commands() -> None:
    assert "runs caption, train, evaluate, report or demo, got 'rm'" in mistake("submit", "rm", "-rf", "/")


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, photograph: Path, model_dir: Path) -> None:
    def broken(self: Captioner, images: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(Captioner, "caption_pixels", broken)

    result = imcap("caption", photograph, "--model", model_dir)

    assert (result.exit_code, type(result.exception)) == (1, ZeroDivisionError)


def test_ctrl_c_is_exit_code_130(monkeypatch: pytest.MonkeyPatch, photograph: Path, model_dir: Path) -> None:
    def interrupted(self: Captioner, images: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Captioner, "caption_pixels", interrupted)

    result = imcap("caption", photograph, "--model", model_dir)

    assert result.exit_code == 130
    assert result.stderr.startswith("imcap: interrupted; what is written is kept")


# ---- one image


def test_one_image_is_captioned_on_stdout(photograph: Path, model_dir: Path, captioner: Captioner) -> None:
    expected = captioner.caption([photograph])[0]

    result = imcap("caption", photograph, "--model", model_dir)

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"{expected.text}\n"


def test_one_image_as_json(photograph: Path, model_dir: Path) -> None:
    caption = json.loads(imcap("caption", photograph, "--model", model_dir, "--json").stdout)

    assert set(caption) == {"caption", "confidence", "captions"}
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


def test_a_model_is_described_as_json(model_dir: Path) -> None:
    facts = json.loads(imcap("model", model_dir, "--json").stdout)

    assert facts["location"] == str(model_dir)
    assert facts["vocabulary"] == {"tokens": 32, "tokenizer": "ptb"}
    assert facts["parameters"] > 1000


# ---- a score


@pytest.fixture
def captions(tmp_path: Path, flickr8k: Path) -> Path:
    """Captions of the test split: each image's first reference."""
    references = load_dataset(str(flickr8k)).references("test")
    (tmp_path / "captions").mkdir()
    table = pa.table({"image_id": list(references), "caption": [found[0] for found in references.values()]})
    pq.write_table(table, tmp_path / "captions" / "part-0.parquet")
    return tmp_path / "captions"


def test_captions_are_scored_and_the_scores_kept_beside_them(captions: Path, flickr8k: Path) -> None:
    result = imcap("evaluate", captions, flickr8k)

    assert (result.exit_code, result.stderr) == (0, "")
    assert "BLEU-4" in result.stdout
    assert json.loads((captions / "_imcap" / "scores.json").read_text())
    assert "BLEU-4" in (captions / "_imcap" / "scores.md").read_text()


def test_scores_as_json_are_all_there_is_on_stdout(captions: Path, flickr8k: Path, tmp_path: Path) -> None:
    result = imcap("evaluate", captions, flickr8k, "--json", "--save", tmp_path / "scores")

    assert json.loads(result.stdout) == json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert not (captions / "_imcap").exists()


def test_quiet_says_nothing(captions: Path, flickr8k: Path) -> None:
    assert imcap("evaluate", captions, flickr8k, "--quiet").output == ""


def test_scoring_against_a_split_without_captions_is_one_line(captions: Path, flickr8k: Path) -> None:
    line = mistake("evaluate", captions, flickr8k, "--split", "validation")

    assert "has captions for 0 of the 2 validation images" in line
    assert not (captions / "_imcap").exists()


def test_python_m_is_the_same_command() -> None:
    run = subprocess.run([sys.executable, "-m", "imcap_ray", "--version"], capture_output=True, text=True, timeout=50)

    assert run.stdout == f"imcap, version {__version__}\n"
