"""Ray accepts cluster.yaml and the Kubernetes manifest. Both fit the image and the package, and open no other port."""

import copy
import itertools
import re
import shlex
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.util import prepare_config, validate_config

from imcap_ray import __version__
from imcap_ray.cli.main import main
from imcap_ray.distributed.cluster.connection import maximum_of

pytestmark = pytest.mark.timeout(60)

ROOT = Path(__file__).parents[2]
CLUSTER_FILE = ROOT / "cluster.yaml"
RAYJOB_FILE = ROOT / "jobs" / "rayjob.yaml"
DOCKERFILE = ROOT / "jobs" / "Dockerfile"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER_FILE.read_text())


def start_commands(cluster: dict[str, Any]) -> list[str]:
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def test_ray_accepts_the_file(cluster):
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_the_maximum_size_of_the_cluster_is_read_from_its_file(cluster):
    prepared = prepare_config(copy.deepcopy(cluster))
    assert maximum_of(prepared) == {"CPU": 16, "GPU": 4}
    prepared["max_workers"] = 3
    assert maximum_of(prepared) == {"CPU": 12, "GPU": 3}


def uncommented(text: str) -> dict[str, Any]:
    """The YAML in the comments at the start of this text."""
    lines = itertools.takewhile(lambda line: line.startswith("#"), text.splitlines())
    return yaml.safe_load("\n".join(line.removeprefix("# ") for line in lines))


def test_ray_accepts_the_file_for_google_cloud(cluster):
    variant = uncommented("# gcp:\n" + CLUSTER_FILE.read_text().partition("\n# gcp:\n")[2])["gcp"]
    validate_config(prepare_config(copy.deepcopy(cluster) | variant))
    worker = variant["available_node_types"]["gpu_worker"]["node_config"]
    assert worker["disks"] and worker["scheduling"][0]["provisioningModel"] == "SPOT"
    assert variant["available_node_types"]["head"]["resources"]["CPU"] == 0


def test_the_drivers_of_the_images_are_new_enough_for_the_cuda_of_pytorch():
    """CUDA 13, which PyTorch's wheels are built for, needs driver 580."""
    text = CLUSTER_FILE.read_text()

    named = [int(number) for number in re.findall(r"-nvidia-(\d{3})\b", text)]
    assert named and min(named) >= 580
    assert text.count("NVIDIA driver 580 or newer") == 2, "the rule is next to the image of each cloud"


def test_ray_accepts_the_file_with_on_demand_workers_too():
    text = CLUSTER_FILE.read_text()
    start = text.index("  # gpu_worker_on_demand:")
    block = "".join(itertools.takewhile(lambda line: line.startswith("  #"), text[start:].splitlines(keepends=True)))
    with_it = yaml.safe_load(text.replace(block, block.replace("  # ", "  ")))
    validate_config(prepare_config(with_it))
    spot, on_demand = (with_it["available_node_types"][name] for name in ("gpu_worker", "gpu_worker_on_demand"))
    assert spot["node_config"].pop("InstanceMarketOptions") == {"MarketType": "spot"}
    assert spot == on_demand


@pytest.mark.parametrize("dropped", [[], ["docker"]], ids=["with Docker", "without"])
def test_ray_accepts_the_file_for_on_premises_machines(cluster, dropped):
    dropped = [*dropped, "max_workers", "head_node_type", "available_node_types"]
    own = {name: value for name, value in cluster.items() if name not in dropped}
    own |= uncommented("# provider:\n" + CLUSTER_FILE.read_text().partition("#\n# provider:\n")[2])
    validate_config(prepare_config(own))


def test_the_head_runs_no_work_and_every_worker_has_a_gpu(cluster):
    node_types = dict(cluster["available_node_types"])
    head = node_types.pop(cluster["head_node_type"])
    assert head["resources"]["CPU"] == 0
    assert node_types
    for worker in node_types.values():
        assert worker["resources"]["GPU"] >= 1
        assert worker["max_workers"] >= 1


def test_every_node_starts_with_token_authentication(cluster):
    assert len(start_commands(cluster)) == 2
    for command in start_commands(cluster):
        assert "RAY_AUTH_MODE=token ray start" in command


def test_the_dashboard_listens_on_the_loopback_only(cluster):
    head = next(command for command in start_commands(cluster) if "--head" in command)
    assert re.findall(r"--dashboard-host[= ](\S+)", head) == ["127.0.0.1"]
    assert "0.0.0.0" not in CLUSTER_FILE.read_text()


def test_the_nodes_install_a_ray_version_that_the_package_accepts(cluster):
    text = DOCKERFILE.read_text()
    (version,) = re.findall(r"^ARG RAY_VERSION=([\d.]+)$", text, re.MULTILINE)
    (extras,) = re.findall(r'"ray\[([a-z,]+)\]==\$\{RAY_VERSION\}"', text)
    required = next(required for required in map(Requirement, requires("imcap_ray") or []) if required.name == "ray")
    assert set(extras.split(",")) == required.extras
    assert version in required.specifier
    assert "ARG BASE=rayproject/ray:${RAY_VERSION}-py311-gpu\nFROM ${BASE}\n" in text
    assert rayjob()["spec"]["rayClusterSpec"]["rayVersion"] == version


# ---- the image, and Kubernetes


def rayjob() -> dict[str, Any]:
    return yaml.safe_load(RAYJOB_FILE.read_text())


def containers() -> list[dict[str, Any]]:
    spec = rayjob()["spec"]["rayClusterSpec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [container for group in groups for container in group["template"]["spec"]["containers"]]


def test_cluster_and_kubernetes_use_the_image_of_the_recipe(cluster):
    image = cluster["docker"]["image"]
    assert image.endswith(f"/imcap_ray:{__version__}")
    assert {container["image"] for container in containers()} == {image}
    assert f"--tag {image} " in DOCKERFILE.read_text()


def test_the_image_contains_what_the_recipe_copies():
    copied = re.findall(r"^COPY --chown=\S+ (.*) \S+$", DOCKERFILE.read_text(), re.MULTILINE)
    assert {name for line in copied for name in line.split()} == {"pyproject.toml", "README.md", "LICENSE", "imcap_ray"}
    assert all((ROOT / name).exists() for line in copied for name in line.split())


def test_ray_reads_the_resources_of_the_kubernetes_cluster():
    cluster = {"metadata": {"name": "imcap", "namespace": "default"}, "spec": rayjob()["spec"]["rayClusterSpec"]}

    types = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]

    head = types.pop("headgroup")
    assert head["resources"]["CPU"] == 0 and not head["resources"].get("GPU")
    (worker,) = types.values()
    assert (worker["resources"]["CPU"], worker["resources"]["GPU"]) == (4, 1)
    assert worker["min_workers"] >= 1


def test_the_kubernetes_cluster_requires_a_token_and_is_deleted_with_its_job():
    spec = rayjob()["spec"]
    assert spec["rayClusterSpec"]["authOptions"] == {"mode": "token"}
    assert spec["shutdownAfterJobFinishes"] is True
    names = {entry["name"] for container in containers() for entry in container["env"]}
    assert not {name for name in names if re.search("TOKEN|SECRET|KEY|AUTH", name)}


@pytest.mark.parametrize(("exit_code", "stops"), [(0, False), (1, False), (2, True), (3, True), (137, False)])
def test_a_kubernetes_job_stops_itself_where_a_retry_would_end_the_same(
    tmp_path: Path, exit_code: int, stops: bool
) -> None:
    for name, script in {"imcap": f"exit {exit_code}", "ray": f'echo "$@" > {tmp_path}/called', "sleep": ""}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "python").symlink_to(sys.executable)
    spec = rayjob()["spec"]

    done = subprocess.run(
        spec["entrypoint"], shell=True, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, check=False
    )

    assert done.returncode == exit_code
    called = tmp_path / "called"
    assert (called.read_text().split() if called.exists() else []) == (
        ["job", "stop", "--no-wait", spec["jobId"]] if stops else []
    )


@pytest.mark.parametrize("file", ["cluster.yaml", "rayjob.yaml"])
def test_the_commands_are_accepted_by_the_command_line(file):
    if file == "rayjob.yaml":
        entrypoint = rayjob()["spec"]["entrypoint"]
        assert "$" not in entrypoint and "`" not in entrypoint, "the shell of an older `ray job submit` replaces them"
        python, option, _, job, *command = shlex.split(entrypoint)  # KubeRay passes it through a shell
        assert (python, option, job) == ("python", "-c", rayjob()["spec"]["jobId"])
        commands = [shlex.join(command)]
        commands += re.findall(r"^#   (imcap .*?)(?:  +#.*)?$", RAYJOB_FILE.read_text(), re.MULTILINE)
    else:
        commands = re.findall(r"\bimcap (?:submit|caption|train) .*", CLUSTER_FILE.read_text())
    assert commands
    for command in commands:
        program, name, *words = shlex.split(command)
        assert program == "imcap"
        context = main.commands[name].make_context(name, words)
        if name == "submit":
            inner, *words = context.params["command"]
            main.commands[inner].make_context(inner, words)


def test_on_amazon_only_ssh_is_open(cluster):
    """Checks the rules that Ray writes into the security group it creates, and those that the file would add."""
    pytest.importorskip("boto3", reason="Ray's code for AWS needs it")
    from ray.autoscaler._private.aws.config import _create_default_inbound_rules

    added = cluster["provider"].get("security_group", {}).get("IpPermissions", [])
    rules = _create_default_inbound_rules({"sg-of-the-cluster"}, added)

    from_anywhere = [
        rule for rule in rules if rule.get("IpRanges") or rule.get("Ipv6Ranges") or rule.get("PrefixListIds")
    ]
    assert [(rule["IpProtocol"], rule["FromPort"], rule["ToPort"]) for rule in from_anywhere] == [("tcp", 22, 22)]
    groups = [pair["GroupId"] for rule in rules for pair in rule.get("UserIdGroupPairs", [])]
    assert groups == ["sg-of-the-cluster"]


def test_no_node_has_its_own_rules_or_publishes_container_ports(cluster):
    for node_type in cluster["available_node_types"].values():
        assert not {"SecurityGroupIds", "NetworkInterfaces"} & set(node_type["node_config"])
    options = " ".join(cluster["docker"]["run_options"])
    assert not re.search(r"(^|\s)(-p|-P|--publish|--publish-all|--privileged)\b", options)


def test_no_start_command_disables_the_token_or_listens_on_all_interfaces(cluster):
    for command in start_commands(cluster):
        assert not re.search(r"RAY_AUTH_MODE=(?!token)|0\.0\.0\.0|--metrics-export-port", command)


def test_the_file_contains_no_credentials():
    names = "RAY_AUTH_TOKEN|AWS_SECRET_ACCESS_KEY|AWS_SESSION_TOKEN|aws_secret_access_key|aws_session_token"
    assert not re.search(rf"({names})\s*[=:]", CLUSTER_FILE.read_text())
