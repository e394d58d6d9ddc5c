"""Shared fixtures. The folder of a test determines its tier, that is, its marker and its time limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pytest
from packaging.version import Version

from tests import small_data
from tests.hang_guard import TIMEOUT_SECONDS

if TYPE_CHECKING:
    from imcap_ray.models.captioner import Captioner
    from tests.flaky_s3 import S3Store

_VARIABLES: Final = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_JOB_CONFIG_JSON_ENV_VAR", "RAY_AUTH_MODE")

_WARNINGS_OF_OLDER_RAYS: Final = (
    r"ignore::ResourceWarning:ray\..*",  # files that Ray opens for the output of its processes
    r"ignore:subprocess \d+ is still running:ResourceWarning",  # of Ray, which ends it without waiting
    r"ignore:Tip. In future versions of Ray:FutureWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    if Version(version("ray")) < Version("2.60"):
        for line in _WARNINGS_OF_OLDER_RAYS:
            config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        tier = item.path.relative_to(Path(__file__).parent).parts[0]
        if tier in TIMEOUT_SECONDS:
            item.add_marker(tier)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(TIMEOUT_SECONDS[tier]))


@pytest.fixture(scope="session", autouse=True)
def clean_environment() -> Iterator[None]:
    """Remove variables of the shell that would make a test join a cluster or a job."""
    with pytest.MonkeyPatch.context() as patch:
        for name in _VARIABLES:
            patch.delenv(name, raising=False)
        # Ray's C++ side reads the mode once in a process. Tests of tokens have processes of their own.
        patch.setenv("RAY_AUTH_MODE", "disabled")
        yield


@pytest.fixture(scope="session")
def make_jpeg() -> Callable[..., bytes]:
    """`make_jpeg(number, width=, height=)`: the bytes of a photograph, a different one for each number."""
    return small_data.jpeg


@pytest.fixture(scope="session")
def make_flickr8k() -> Callable[..., Path]:
    """`make_flickr8k(folder, num_train=, ...)`: writes a small Flickr8k as distributed and returns the folder."""
    return small_data.write_flickr8k


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model folder that includes its CNN. Do not modify it: all tests share it."""
    return small_data.write_model_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def captioner(model_dir: Path) -> Captioner:
    """The captioner of `model_dir`, on the CPU."""
    from imcap_ray.models.captioner import Captioner

    return Captioner.load(model_dir, device="cpu")


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 store on this machine, in a process of its own."""
    from tests.flaky_s3 import moto_server

    with moto_server() as endpoint:
        yield endpoint


@pytest.fixture
def s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3Store]:
    """An empty bucket behind a proxy that can make requests fail; the environment leads to it."""
    from tests.flaky_s3 import FlakyProxy, S3Store, make_bucket, s3_environment

    proxy = FlakyProxy(s3_endpoint)
    for name, value in s3_environment(proxy.url).items():
        monkeypatch.setenv(name, value)
    yield S3Store(uri=f"s3://{make_bucket(s3_endpoint)}", proxy=proxy)
    proxy.close()
