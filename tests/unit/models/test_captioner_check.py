"""The check of a captioner says in sentences what is wrong with it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from imcap_ray.cli.main import main
from imcap_ray.errors import ModelError
from imcap_ray.models.captioner_check import check_captioner


def test_a_correct_captioner_has_no_faults_and_is_measured() -> None:
    check = check_captioner("tests.plugins:Echo", {"size": "16"})

    assert check.faults == ()
    assert check.seconds_per_image > 0 and check.peak_bytes > 10**6


@pytest.mark.parametrize(
    ("name", "options", "faults"),
    [
        ("Counting", {}, ["the second time", "the order of the images", "alone differ"]),
        ("Faulty", {"fault": "raises"}, ["it cannot caption an image of 1 x 1 pixel: the captioner raised an error"]),
        ("Square", {}, ["it cannot prepare an image of 1 x 1 pixel"]),
        ("Unloadable", {}, ["it cannot caption: tests.plugins:Unloadable: load raised an error"]),
    ],
)
def test_faults_are_sentences(name: str, options: dict[str, str], faults: list[str]) -> None:
    found = check_captioner(f"tests.plugins:{name}", options).faults

    for expected in faults:
        assert any(expected in fault and fault.endswith(".") for fault in found), found


def test_what_cannot_be_loaded_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be imported"):
        check_captioner("tests.plugins:Nothing")


def test_the_command_ends_with_the_exit_code_of_the_result() -> None:
    def run(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(main, ["model", "check", *words])
        return result.exit_code, result.output

    assert run("tests.plugins:Echo")[0] == 0
    code, output = run("tests.plugins:Counting", "--json")
    assert (code, len(json.loads(output)["faults"])) == (1, 3)
    assert run("tests.plugins:Nothing")[0] == 2
    assert run()[0] == 2
