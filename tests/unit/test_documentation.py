"""The commands and programs accept the lines that the documentation shows."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import click
import numpy as np
import pytest

from imcap_ray.cli.main import main
from imcap_ray.models.plugin import PluggedCaptioner
from tests.documented import ROOT, Shown, example_captioner, shown_commands
from tests.small_data import jpeg

SHOWN = shown_commands()
BENCHMARKS = ROOT / "jobs" / "benchmarks"
PROGRAMS = [path for path in sorted(BENCHMARKS.glob("*.py")) if path.name != "shared.py"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which the names of the examples exist."""
    monkeypatch.chdir(tmp_path)
    for name in ("captions", "flickr8k"):
        (tmp_path / name).mkdir()
    yield tmp_path


@pytest.mark.parametrize(
    "shown", [shown for shown in SHOWN if shown.words[0] == "python"], ids=lambda shown: shown.line
)
def test_documented_benchmark_arguments_are_parsed(shown: Shown, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, program, *arguments = shown.words
    monkeypatch.syspath_prepend(BENCHMARKS)
    benchmark = importlib.import_module(Path(program).stem)
    assert Path(benchmark.__file__ or "") == ROOT / program
    try:
        benchmark.main.make_context(program, arguments).close()
    except click.UsageError as error:
        pytest.fail(f"{shown.where}: {shown.line}: {error.format_message()}")


@pytest.mark.parametrize("program", [path.name for path in PROGRAMS])
def test_every_benchmark_is_documented_or_called_by_another_one(program: str) -> None:
    assert any(f"jobs/benchmarks/{program}" in shown.words for shown in SHOWN) or any(
        f'"{program}"' in path.read_text() for path in PROGRAMS
    )


@pytest.mark.parametrize(
    "shown", [shown for shown in SHOWN if shown.words[0] != "python"], ids=lambda shown: shown.line
)
def test_documented_commands_are_parsed(shown: Shown, folder: Path) -> None:
    words = shown.words[1:]
    name, *arguments = [word for word in words if word != "--help"]
    above = click.Context(main, **main.context_settings)
    subcommand = main.get_command(above, name)
    assert subcommand is not None, f"{shown.where}: there is no {name}"
    if "--help" in words:
        return
    if name == "submit" and "--follow" not in arguments:
        start = next(position for position, word in enumerate(arguments) if word in main.commands)
        inner, *rest = arguments[start:]
        main.commands[inner].make_context(inner, rest, parent=above).close()
    try:
        subcommand.make_context(name, list(arguments), parent=above).close()
    except click.UsageError as error:
        pytest.fail(f"{shown.where}: {shown.line}: {error.format_message()}")


@pytest.mark.parametrize("name", [name for name, command in main.commands.items() if not command.hidden])
def test_every_command_is_documented(name: str) -> None:
    assert any(shown.words[1:2] == [name] for shown in SHOWN), f"imcap {name} is not documented"


@pytest.mark.parametrize("name", list(main.commands))
def test_every_command_and_option_has_help(name: str) -> None:
    command = main.commands[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"imcap {name} {parameter.opts[0]} has no help"


def test_the_example_of_a_captioner_captions_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = example_captioner()
    (tmp_path / "brightness.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    captioner = PluggedCaptioner("brightness:Brightness", (("words", "black,white"),), num_captions=2)
    captioner.start(gpus=0)

    pixels = np.stack([captioner.preparation(jpeg(number)).pixels for number in range(3)])
    pixels[0] = 255
    results = captioner.caption_pixels(pixels)

    assert [result.text for result in results[0]] == ["a white image", "a black image"]
    assert all(0 < result.confidence < 1 for captions in results for result in captions)
    assert len(code.splitlines()) <= 32, "the documentation promises a short one"


def test_the_library_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "one.jpg").write_bytes(jpeg(1))
    monkeypatch.chdir(tmp_path)

    exec(compile(code, "README.md", "exec"), {})

    caption, error = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"[a-z' ]+ \(0\.\d\d\)", caption)
    assert error == "no such file: two.jpg"
