"""Variables that Ray reads at import are set before, without overriding the user; a private Ray gets a token."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from imcap_ray.distributed.cluster.ray_environment import find_token, means_own_ray, temporary_environment
from imcap_ray.errors import ClusterError

PROGRAM = """
import json, os, sys
from imcap_ray.distributed.cluster.ray_environment import set_ray_environment

{first}
set_ray_environment(*json.loads(sys.argv[1]), verbose=False)
print(json.dumps({name: value for name, value in os.environ.items() if name.startswith(("RAY_", "MALLOC_"))}))
print("ray" in sys.modules)
"""


def environment_for(address: str | None, *, first: str = "", **variables: str) -> dict[str, str]:
    """Return the variables of Ray and malloc in a new process after the call."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MALLOC_"))}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("{first}", first), json.dumps([address])],
        env=inherited | variables,
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[1] == str("sys.modules" in first)
    return dict(json.loads(lines[0]))


def test_a_private_ray_gets_a_new_token_each_time(tmp_path: Path) -> None:
    first, second = (environment_for(None, HOME=str(tmp_path), RAY_AUTH_TOKEN="the cluster's") for _ in range(2))

    assert first["RAY_AUTH_MODE"] == "token"
    assert len({first["RAY_AUTH_TOKEN"], second["RAY_AUTH_TOKEN"], "the cluster's"}) == 3
    assert first["MALLOC_ARENA_MAX"] == "1"
    assert list(tmp_path.iterdir()) == []


def test_authentication_is_off_if_the_user_turned_it_off() -> None:
    variables = environment_for("local", RAY_AUTH_MODE="disabled")

    assert variables["RAY_AUTH_MODE"] == "disabled"
    assert "RAY_AUTH_TOKEN" not in variables


@pytest.mark.parametrize(
    ("ray_version", "has_token", "expected"),
    [("2.60.0", True, "token"), ("2.60.0", False, "disabled"), ("2.58.1", True, "disabled")],
)
def test_a_cluster_receives_the_users_token_if_this_ray_uses_tokens_that_it_finds(
    tmp_path: Path, ray_version: str, has_token: bool, expected: str
) -> None:
    if has_token:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("secret\n")

    other_version = (
        f"from imcap_ray.distributed.cluster import ray_environment as e; e.version = lambda _: {ray_version!r}"
    )
    variables = environment_for("10.0.0.1:6379", first=other_version, HOME=str(tmp_path))

    assert variables["RAY_AUTH_MODE"] == expected
    assert "MALLOC_ARENA_MAX" not in variables  # the cluster's processes have an environment of their own


def test_settings_of_the_user_are_kept() -> None:
    assert environment_for(None, RAY_BACKEND_LOG_LEVEL="debug")["RAY_BACKEND_LOG_LEVEL"] == "debug"


def test_nothing_is_set_after_ray_was_imported() -> None:
    assert environment_for(None, first="sys.modules['ray'] = None") == {}


def test_ray_is_private_only_if_nothing_names_a_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert [means_own_ray(address) for address in (None, "local", "auto", "10.0.0.1:6379")] == [
        True,
        True,
        False,
        False,
    ]
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert [means_own_ray(address) for address in (None, "local")] == [False, True]


def test_the_token_is_read_from_the_places_that_ray_documents(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_token() == ""
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("of the home folder\n")
    assert find_token() == "of the home folder"
    (tmp_path / "token").write_text("of the path")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert find_token() == "of the path"
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    with pytest.raises(ClusterError, match="cannot read the token .*none.*RAY_AUTH_TOKEN_PATH"):
        find_token()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "of the variable")
    assert find_token() == "of the variable"


def test_a_temporary_variable_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMCAP_TEST_KEPT", "before")
    with pytest.raises(KeyError), temporary_environment({"IMCAP_TEST_KEPT": "during", "IMCAP_TEST_NEW": "1"}):
        assert (os.environ["IMCAP_TEST_KEPT"], os.environ["IMCAP_TEST_NEW"]) == ("during", "1")
        raise KeyError
    assert os.environ["IMCAP_TEST_KEPT"] == "before"
    assert "IMCAP_TEST_NEW" not in os.environ
