"""What the documentation shows is what the commands take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest

from imcap_ray.cli.main import main
from tests.documented import ROOT, Shown, shown_commands
from tests.small_data import jpeg

SHOWN = shown_commands()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the names of the examples exist."""
    monkeypatch.chdir(tmp_path)
    for name in ("captions", "flickr8k"):
        (tmp_path / name).mkdir()
    yield tmp_path


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: shown.line)
def test_a_command_that_is_shown_is_understood(shown: Shown, folder: Path, benchmark: ModuleType) -> None:
    program, *words = shown.words
    if program == "python":
        command, (_, name, *arguments) = benchmark.main, words
    else:
        command, (name, *arguments) = main, [word for word in words if word != "--help"]
    above = click.Context(command, **command.context_settings)
    subcommand = command.get_command(above, name)
    assert subcommand is not None, f"{shown.where}: there is no {name}"
    if "--help" in words:
        return
    if name == "submit" and "--follow" not in arguments:
        start = next(place for place, word in enumerate(arguments) if word in main.commands)
        inner, *rest = arguments[start:]
        main.commands[inner].make_context(inner, rest, parent=above).close()
    try:
        subcommand.make_context(name, list(arguments), parent=above).close()
    except click.UsageError as error:
        pytest.fail(f"{shown.where}: {shown.line}: {error.format_message()}")


@pytest.mark.parametrize("name", [name for name, command in main.commands.items() if not command.hidden])
def test_every_command_is_shown_somewhere(name: str) -> None:
    assert any(shown.words[1:2] == [name] for shown in SHOWN), f"imcap {name} stands nowhere"


@pytest.mark.parametrize("name", list(main.commands))
def test_every_command_and_option_has_help(name: str) -> None:
    command = main.commands[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"imcap {name} {parameter.opts[0]} is not explained"


def test_the_librarys_example_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (tmp_path / "one.jpg").write_bytes(jpeg(1))
    monkeypatch.chdir(tmp_path)

    exec(compile(code, "README.md", "exec"), {})

    caption, error = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"[a-z' ]+ \(0\.\d\d\)", caption)
    assert error == "no such file: two.jpg"
