"""cluster.yaml is one that Ray's launcher takes, and leaves no door open."""

import copy
import re
from importlib.metadata import requires
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from ray.autoscaler._private.util import prepare_config, validate_config

pytestmark = pytest.mark.timeout(60)

CLUSTER_FILE = Path(__file__).parents[2] / "cluster.yaml"


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    return yaml.safe_load(CLUSTER_FILE.read_text())


def start_commands(cluster: dict[str, Any]) -> list[str]:
    commands = cluster["head_start_ray_commands"] + cluster["worker_start_ray_commands"]
    return [command for command in commands if "ray start" in command]


def test_ray_accepts_the_file(cluster):
    validate_config(prepare_config(copy.deepcopy(cluster)))


def test_ray_accepts_the_file_for_machines_of_ones_own(cluster):
    own = {name: value for name, value in cluster.items() if name not in ("docker", "max_workers", "head_node_type")}
    del own["available_node_types"]
    lines = CLUSTER_FILE.read_text().partition("#\n# provider:\n")[2].splitlines()
    own["provider"] = yaml.safe_load("\n".join(line.removeprefix("#") for line in lines))
    validate_config(prepare_config(own))


def test_no_work_lands_on_the_head_and_every_worker_has_a_gpu(cluster):
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


def test_the_nodes_get_the_ray_that_the_package_wants(cluster):
    text = CLUSTER_FILE.read_text()
    installed = [Requirement(found) for found in re.findall(r'"(ray\[.*?)"', text)]
    images = re.findall(r"rayproject/ray:([\d.]+)-", text)
    wanted = next(wanted for wanted in map(Requirement, requires("imcap_ray") or []) if wanted.name == "ray")
    assert [found.extras for found in installed] == [wanted.extras]
    assert {str(found.specifier) for found in installed} == {f"=={version}" for version in images}
    assert all(version in wanted.specifier for version in images)


def test_amazon_lets_in_ssh_and_nothing_else(cluster):
    """The rules that Ray writes into the security group it makes, and what the file would add to them."""
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


def test_no_node_has_rules_of_its_own_or_publishes_a_containers_ports(cluster):
    for node_type in cluster["available_node_types"].values():
        assert not {"SecurityGroupIds", "NetworkInterfaces"} & set(node_type["node_config"])
    options = " ".join(cluster["docker"]["run_options"])
    assert not re.search(r"(^|\s)(-p|-P|--publish|--publish-all|--privileged)\b", options)


def test_no_start_command_lifts_the_token_or_listens_everywhere_by_itself(cluster):
    for command in start_commands(cluster):
        assert not re.search(r"RAY_AUTH_MODE=(?!token)|0\.0\.0\.0|--metrics-export-port", command)


def test_the_file_holds_no_credentials():
    names = "RAY_AUTH_TOKEN|AWS_SECRET_ACCESS_KEY|AWS_SESSION_TOKEN|aws_secret_access_key|aws_session_token"
    assert not re.search(rf"({names})\s*[=:]", CLUSTER_FILE.read_text())
