"""What is sent to a cluster, as far as it needs none; the rest is in tests/integration."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st

from imcap_ray.distributed.submission import job_request

HOSTILE = [
    "a b",
    "it's",
    '"quoted"',
    "$(touch pwned)",
    "`id`",
    "; rm -rf ~",
    "&& x",
    "| y",
    "two\nlines",
    "*",
    "",
    "\\",
]


@pytest.mark.parametrize("word", HOSTILE)
def test_a_shell_hands_a_hostile_argument_on_as_it_is(word: str) -> None:
    request = job_request(["caption", word, f"--model={word}"])

    assert shlex.split(request["entrypoint"]) == ["python", "-m", "imcap_ray", "caption", word, f"--model={word}"]


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"))))
def test_any_arguments_arrive_as_they_are(words: list[str]) -> None:
    assert shlex.split(job_request(words)["entrypoint"])[3:] == words


def test_nothing_of_the_environment_travels_with_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "RAY_AUTH_TOKEN", "HF_TOKEN"):
        monkeypatch.setenv(name, "planted")

    request = job_request(["caption", "s3://bucket/images", "s3://bucket/captions"])

    assert set(request) == {"entrypoint", "runtime_env"}
    assert set(request["runtime_env"]) == {"py_modules"}
    assert "planted" not in repr(request)
