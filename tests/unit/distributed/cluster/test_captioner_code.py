"""Which code of a captioner is sent to a cluster, and which its nodes must have."""

from __future__ import annotations

from pathlib import Path

import pytest

from imcap_ray.distributed.cluster.captioner_code import MAX_PACKAGE_BYTES, CaptionerCode, captioner_code
from imcap_ray.errors import ClusterError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with a module of one file, a package, and a package without __init__.py."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "one_file.py").write_text("raise SystemExit('it must not be imported')")
    for package in ("a_package", "a_namespace"):
        (tmp_path / package / "inner").mkdir(parents=True)
        (tmp_path / package / "inner" / "captioner.py").touch()
    (tmp_path / "a_package" / "__init__.py").touch()
    return tmp_path


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("one_file:Captioner", "one_file.py"),
        ("a_package.inner.captioner:make", "a_package"),
        ("a_namespace.inner.captioner:make", "a_namespace"),
    ],
)
def test_a_module_that_is_not_installed_is_sent_from_its_top_level(folder: Path, name: str, module: str) -> None:
    assert captioner_code([name]) == CaptionerCode((folder / module,), ())


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("PIL.Image:open", "the cluster's nodes need the package pillow, for PIL.Image:open"),
        ("json:loads", "the cluster's nodes need the package json, for json:loads"),
        ("hf:owner/name", "the cluster's nodes need the package transformers, for hf:owner/name"),
        ("no_such:Thing", "there is no module no_such here: no_such:Thing needs it on the cluster's nodes"),
    ],
)
def test_a_module_that_is_installed_or_missing_is_named(folder: Path, name: str, note: str) -> None:
    assert captioner_code([name]) == CaptionerCode((), (note,))


def test_model_folders_need_no_code(folder: Path) -> None:
    assert captioner_code(["flickr8k-lite2", "runs/mine", "s3://bucket/model"]) == CaptionerCode()


@pytest.mark.parametrize("data", ["one_file.py", "a_package/weights.bin"])
def test_a_module_that_contains_data_is_not_sent(folder: Path, data: str) -> None:
    with (folder / data).open("wb") as file:
        file.truncate(MAX_PACKAGE_BYTES + 1)  # takes no room

    with pytest.raises(ClusterError, match=f"is sent to the cluster: expected at most 200 MiB, got .*{data}"):
        captioner_code(["one_file:Captioner", "a_package:Captioner"])
