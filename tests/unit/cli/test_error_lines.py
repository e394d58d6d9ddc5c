"""Output of a command that ends with an error."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import click
import pytest
from click.testing import CliRunner

from imcap_ray.cli import main, options
from imcap_ray.errors import ImcapError


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@click.command()
@options.cluster_options
def stumble(**options: Any) -> None:
    try:
        raise RuntimeError("out of a process of Ray's")
    except RuntimeError as error:
        raise ImcapError("stopped by an error: it stumbled") from error


@pytest.mark.parametrize(("words", "has_traceback"), [([], False), (["-v"], True)])
def test_an_error_is_one_line_and_has_a_traceback_only_with_v(words: list[str], has_traceback: bool) -> None:
    group = main.CommandGroup(commands={"stumble": stumble})

    result = CliRunner().invoke(group, ["stumble", *words])

    assert result.exit_code == 1
    first, *rest = result.stderr.splitlines()
    assert first == "imcap: stopped by an error: it stumbled"
    assert ("RuntimeError: out of a process of Ray's" in rest) == has_traceback
    assert bool(rest) == has_traceback
