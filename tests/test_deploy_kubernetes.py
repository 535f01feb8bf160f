"""The chart and the plain manifests, as far as that goes without a cluster: definitions, Helm, and what must agree.

`make kube-tools` gets what some of these tests need (Kubernetes' definitions, Helm's library); without it they say so.
KubeRay's and the Prometheus Operator's definitions are in no package registry: a folder with their CRD files may be
named in BATON_KUBE_CRDS. The shapes that are always held to were written down from KubeRay 1.7.0.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from conftest import POCKET, REPOSITORY

from deploy.config_file import keys_of, parse_config
from deploy.launch import Cluster
from deploy.placement import Machine, place, router_machines, usable
from deploy.serve_arguments import add_serve_arguments, config_from
from deploy.specs import Specs
from kvstore.blocks import KVLayout
from router.amounts import parse_bytes

HELM = REPOSITORY / "deploy" / "kubernetes" / "helm"
CHART = HELM / "baton"
MANIFESTS = REPOSITORY / "deploy" / "kubernetes" / "manifests" / "baton.yaml"
TOOLS = REPOSITORY / "build" / "kube-tools"
HELM_LIBRARY = TOOLS / "helm_sdkpy" / "_lib" / "linux-amd64" / "libhelm_sdkpy.so"
KUBERNETES = "1.35"
Object = dict[str, Any]

VARIANTS: Mapping[str, Object] = {
    "defaults": {},
    "70b": yaml.safe_load((HELM / "values-70b.yaml").read_text()),
    "everything": {
        "image": {"pullSecrets": ["a"]},
        "model": {"volume": {"hostPath": {"path": "/models"}}},
        "config": {"dtype": "bfloat16"},
        "prefill": {"pods": 2, "nodesPerPod": 2, "gpusPerPod": 0, "nodeSelector": {"a": "b"}, "tolerations": []},
        "ray": {"authSecret": "token"},
        "redis": {"enabled": False, "existingSecret": "url"},
        "tls": {"existingSecret": "tls"},
        "tenants": {"existingSecret": "tenants"},
        "metrics": {"podMonitor": True, "podMonitorLabels": {"release": "prometheus"}},
    },
}


def merged(values: Object, more: Mapping[str, Any]) -> Object:
    both = dict(values)
    for key, value in more.items():
        deeper = isinstance(value, dict) and isinstance(both.get(key), dict)
        both[key] = merged(both[key], value) if deeper else value
    return both


def chart_values(variant: str) -> Object:
    return merged(yaml.safe_load((CHART / "values.yaml").read_text()), VARIANTS[variant])


@pytest.fixture(scope="module")
def manifests() -> list[Object]:
    return [one for one in yaml.safe_load_all(MANIFESTS.read_text()) if one]


def only(objects: list[Object], kind: str, name: str = "") -> Object:
    (found,) = [one for one in objects if one["kind"] == kind and name in ("", one["metadata"]["name"])]
    return found


def ray_groups(objects: list[Object]) -> list[Object]:
    spec = only(objects, "RayCluster")["spec"]
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def pod_specs(objects: list[Object]) -> Iterator[Object]:
    for one in objects:
        if one["kind"] in ("Deployment", "StatefulSet"):
            yield one["spec"]["template"]["spec"]
    for group in ray_groups(objects):
        yield group["template"]["spec"]


# --- definitions ---


def shape(required: tuple[str, ...], **properties: Any) -> Object:
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}
COUNT = {"type": "integer", "minimum": 0}
RAY_CLUSTER = shape(
    ("headGroupSpec",),
    rayVersion={"type": "string"},
    authOptions=shape((), mode={"enum": ["disabled", "token"]}, secretName={"type": "string"}),
    headGroupSpec=shape(("template",), rayStartParams=TEXTS, template={"type": "object"}),
    workerGroupSpecs={
        "type": "array",
        "items": shape(
            ("groupName", "maxReplicas", "minReplicas", "template"),
            groupName={"type": "string"},
            replicas=COUNT,
            minReplicas=COUNT,
            maxReplicas=COUNT,
            rayStartParams=TEXTS,
            template={"type": "object"},
        ),
    },
)


def check_definitions(objects: list[Object]) -> None:
    """Everything but custom resources, and the pods inside these, strictly: no unknown field."""
    kubernetes_validate = kube_tool("kubernetes_validate")
    for group in ray_groups(objects):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": group["template"]["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    for one in objects:
        if one["kind"] not in ("RayCluster", "PodMonitor"):
            kubernetes_validate.validate(one, KUBERNETES, strict=True)


def kube_tool(name: str) -> Any:
    if TOOLS.is_dir() and str(TOOLS) not in sys.path:
        sys.path.append(str(TOOLS))
    return pytest.importorskip(name, reason="`make kube-tools` gets it")


def strict(schema: Any) -> Any:
    """A CRD's schema in which no unknown field passes; formats and `int or string` are left to Kubernetes."""
    if isinstance(schema, list):
        return [strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items() if key != "format"}
    if made.get("x-kubernetes-int-or-string"):
        made.pop("type", None)
    is_open = made.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in made
    if made.get("type") == "object" and "properties" in made and not is_open:
        made["additionalProperties"] = False
    return made


def test_custom_resources_are_what_their_operators_define(manifests: list[Object]) -> None:
    folder = os.environ.get("BATON_KUBE_CRDS")
    if not folder:
        pytest.skip("BATON_KUBE_CRDS names no folder with ray.io_rayclusters.yaml")
    crd = yaml.safe_load((Path(folder) / "ray.io_rayclusters.yaml").read_text())
    (version,) = [one for one in crd["spec"]["versions"] if one["name"] == "v1"]
    schema = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.Draft7Validator(schema).validate(only(manifests, "RayCluster"))


# --- Helm ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_fit_their_schema(variant: str) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    jsonschema.validate(chart_values(variant), schema)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefil": {}},
        {"prefill": {"pods": 0}},
        {"router": {"port": 1}},
        {"config": {"kv-memory": "1G"}},
        {"config": {"http": False}},
    ],
)
def test_wrong_values_are_refused(wrong: Object) -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(merged(chart_values("defaults"), wrong), schema)


def lint(chart: Path) -> list[Object]:
    """Helm's messages that are errors."""
    if not HELM_LIBRARY.exists():
        pytest.skip("`make kube-tools` gets Helm's library")
    argv = [sys.executable, str(Path(__file__).parent / "helm_lint.py"), str(HELM_LIBRARY), str(chart)]
    result = subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True)
    return [message for message in json.loads(result.stdout) if message["Severity"] > 1]  # 1 is a hint


@pytest.mark.parametrize("variant", VARIANTS)
def test_helm_lints_and_renders_the_chart(variant: str, tmp_path: Path) -> None:
    chart = Path(shutil.copytree(CHART, tmp_path / "baton"))
    (chart / "values.yaml").write_text(yaml.safe_dump(chart_values(variant)))
    assert lint(chart) == []


@pytest.mark.parametrize(
    "wrong", [{"prefill": {"pods": 0}}, {"prefill": {"storeGiB": 9}}, {"config": {"model": "/other"}}, {"typo": 1}]
)
def test_helm_refuses(wrong: Object, tmp_path: Path) -> None:
    chart = Path(shutil.copytree(CHART, tmp_path / "baton"))
    (chart / "values.yaml").write_text(yaml.safe_dump(merged(chart_values("defaults"), wrong)))
    assert lint(chart) != []


def installed(variant: str, folder: Path) -> list[Object]:
    """What Helm creates in a cluster, without what it notes of the release."""
    if not HELM_LIBRARY.exists():
        pytest.skip("`make kube-tools` gets Helm's library")
    chart = Path(shutil.copytree(CHART, folder / "baton"))
    (chart / "values.yaml").write_text(yaml.safe_dump(chart_values(variant)))
    argv = [sys.executable, str(Path(__file__).parent / "helm_install.py"), str(HELM_LIBRARY), str(chart)]
    done = json.loads(subprocess.run(argv, capture_output=True, text=True, timeout=120, check=True).stdout)
    assert done["problem"] == ""
    for one in done["objects"]:
        metadata = one["metadata"]
        assert metadata.pop("namespace") == "default"
        notes = metadata.pop("annotations")
        if kept := {key: value for key, value in notes.items() if not key.startswith("meta.helm.sh/")}:
            metadata["annotations"] = kept
    return list(done["objects"])


@pytest.fixture(scope="module", params=["manifests", *VARIANTS])
def objects(request: pytest.FixtureRequest, manifests: list[Object], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The plain manifests, and what Helm makes of the chart with several values."""
    if request.param == "manifests":
        return manifests
    return installed(request.param, tmp_path_factory.mktemp(request.param))


def test_helm_makes_the_plain_manifests(manifests: list[Object], tmp_path: Path) -> None:
    def name(one: Object) -> tuple[str, str]:
        return one["kind"], one["metadata"]["name"]

    plain = copy.deepcopy(manifests)
    for one in plain:
        if not one["metadata"].get("annotations", True):
            del one["metadata"]["annotations"]  # Helm has some of its own there, which are taken off
    assert sorted(installed("defaults", tmp_path), key=name) == sorted(plain, key=name)


def test_objects_are_what_kubernetes_and_kuberay_define(objects: list[Object]) -> None:
    check_definitions(objects)
    jsonschema.validate(only(objects, "RayCluster")["spec"], RAY_CLUSTER)


def test_helm_takes_every_branch(tmp_path: Path) -> None:
    everything = installed("everything", tmp_path)
    assert only(everything, "PodMonitor")["metadata"]["labels"]["release"] == "prometheus"
    assert not [one for one in everything if one["kind"] == "StatefulSet"], "a Redis of one's own"
    text = json.dumps(everything)
    for name in ("url", "token", "tls", "tenants"):
        assert f'"secretName": "{name}"' in text or f'"name": "{name}"' in text, name
    assert (
        '"path": "/models"' in text
        and '"a": "b"' in text
        and "nvidia.com/gpu"
        not in json.dumps([group for group in ray_groups(everything) if group.get("groupName") == "prefill"])
    )


# --- what must agree ---


def serve_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    add_serve_arguments(parser)
    return parser


def test_the_cluster_that_is_described_is_the_one_that_starts(
    manifests: list[Object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ConfigMap's options, placed on the pods of the RayCluster: who runs where, on which ports."""
    monkeypatch.setenv("BATON_REDIS_URL", "redis://r")
    parser = serve_parser()
    parser.set_defaults(**parse_config(parser, only(manifests, "ConfigMap")["data"]["config.yaml"]))
    assert parser.get_default("model") == Path("/models/model")
    config = config_from(parser.parse_args([str(POCKET)]))
    Cluster(config).check()
    head, launcher = Machine("h" * 56, "10.0.0.1", "head", 1), Machine("l" * 56, "10.0.0.2", "launcher", 1)
    pods, servers = [], {}
    for group in ray_groups(manifests)[1:]:
        tags = frozenset(json.loads(json.loads(group["rayStartParams"]["resources"].strip("'"))))
        assert tags == {f"baton-{group['groupName']}"}
        gpus = int(container_of(group)["resources"]["limits"].get("nvidia.com/gpu", 0))
        for index in range(group["replicas"]):
            name = f"{group['groupName']}-{index}"
            pods.append(Machine(name.ljust(56, "0"), f"10.0.1.{len(pods)}", name, 8, gpus, tags))
            servers[name] = [p["containerPort"] for p in container_of(group)["ports"] if "metrics" in p["name"]]
    machines = [head, launcher, *pods]
    placements = place(config, machines)
    assert {(p.role, p.machine.name) for p in placements} == {("prefill", "prefill-0"), ("decode", "decode-0")}
    assert [m.name for m in router_machines(config, machines, launcher)] == ["router-0", "router-1"]
    assert len(usable(config, machines)) + config.routers == config.min_machines
    layout = KVLayout("m", "bfloat16", block_size=16, num_layers=1, num_kv_heads=1, head_dim=8)
    told = [*Specs(config, "0123abcd", "redis://r", layout).all(machines, placements, launcher)]
    for name, ports in servers.items():
        assert [one.spec.config.metrics_port for one in told if one.machine.name == name] == ports
    assert {one.spec.config.port for one in told if one.spec.kind == "router"} == {8200}


def container_of(group: Object) -> Object:
    return group["template"]["spec"]["containers"][0]


def test_every_key_that_the_chart_sets_is_a_flag() -> None:
    text = (CHART / "templates" / "config.yaml").read_text()
    keys = set(re.findall(r'^  "(\w+)" ', text, re.M)) | set(re.findall(r'set \$set "(\w+)"', text))
    assert len(keys) > 15 and keys <= set(keys_of(serve_parser()))


def test_pods_are_bounded_probed_and_not_root(objects: list[Object]) -> None:
    for pod in pod_specs(objects):
        assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
        volumes = {volume["name"] for volume in pod.get("volumes", [])} | {"data"}
        for container in pod["containers"]:
            assert container["resources"]["limits"]["memory"] and container["readinessProbe"]
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
            ports = {port["name"] for port in container.get("ports", [])}
            for probe in (container["readinessProbe"], container.get("livenessProbe", {})):
                where = probe.get("httpGet") or probe.get("tcpSocket")
                assert where is None or where["port"] in ports


def test_the_head_has_no_work(objects: list[Object]) -> None:
    head = ray_groups(objects)[0]
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    assert "resources" not in head["rayStartParams"]


def quantity(text: str) -> int:
    """Kubernetes' "9Gi" in bytes."""
    assert text.endswith("i")
    return parse_bytes(f"{text}B")


def test_arenas_fit_into_shared_memory_and_that_into_the_pod(objects: list[Object]) -> None:
    arena = parse_bytes(yaml.safe_load(only(objects, "ConfigMap")["data"]["config.yaml"])["store_memory"])
    for group in ray_groups(objects)[1:3]:
        (shm,) = [v["emptyDir"] for v in group["template"]["spec"]["volumes"] if v["name"] == "shm"]
        assert shm["medium"] == "Memory"
        own = int(group["rayStartParams"]["object-store-memory"])
        assert arena + own < quantity(shm["sizeLimit"])
        assert quantity(shm["sizeLimit"]) < quantity(container_of(group)["resources"]["limits"]["memory"])


def test_graces_are_longer_than_drains(objects: list[Object]) -> None:
    for group in ray_groups(objects)[1:]:
        drain = int(container_of(group)["lifecycle"]["preStop"]["exec"]["command"][1])
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > drain + 20
    launcher = only(objects, "Deployment")["spec"]["template"]["spec"]
    parser = serve_parser()
    stop_s = config_from(parser.parse_args([str(POCKET)])).stop_timeout_s
    assert launcher["terminationGracePeriodSeconds"] > 4 * stop_s, "routers, nodes, stores, folders"
    probe = launcher["containers"][0]["startupProbe"]
    start_s = yaml.safe_load(only(objects, "ConfigMap")["data"]["config.yaml"])["start_timeout"]
    assert probe["periodSeconds"] * probe["failureThreshold"] > start_s


def test_services_and_budgets_find_their_pods(objects: list[Object]) -> None:
    name = only(objects, "RayCluster")["metadata"]["name"]
    labels = [{"ray.io/cluster": name, "ray.io/group": g["groupName"]} for g in ray_groups(objects)[1:]]
    ports = [{port["name"] for port in container_of(group)["ports"]} for group in ray_groups(objects)[1:]]
    for one in objects:
        if one["kind"] in ("Deployment", "StatefulSet"):
            template = one["spec"]["template"]
            labels.append(template["metadata"]["labels"])
            ports.append({port["name"] for port in template["spec"]["containers"][0].get("ports", [])})
    for one in objects:
        if one["kind"] in ("Service", "PodDisruptionBudget"):
            selector = one["spec"]["selector"]
            selector = selector.get("matchLabels", selector)
            found = [there for has, there in zip(labels, ports, strict=True) if selector.items() <= has.items()]
            assert len(found) == 1, one["metadata"]["name"]
            assert {port["targetPort"] for port in one["spec"].get("ports", [])} <= found[0]


def test_the_launcher_reaches_what_the_others_offer(manifests: list[Object]) -> None:
    (container,) = only(manifests, "Deployment")["spec"]["template"]["spec"]["containers"]
    cluster = only(manifests, "RayCluster")["metadata"]["name"]
    (script,) = container["args"]
    assert f"--address={cluster}-head-svc:6379" in script
    assert "exec baton serve --config /etc/baton/config.yaml" in script
    environment = {one["name"]: one for one in container["env"]}
    redis = only(manifests, "StatefulSet")["spec"]["serviceName"]
    assert environment["BATON_REDIS_URL"]["value"] == f"redis://:$(REDIS_PASSWORD)@{redis}:6379/0"
    assert [*environment].index("REDIS_PASSWORD") < [*environment].index("BATON_REDIS_URL"), "or it is not put in"
    assert environment["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"] == {"name": cluster, "key": "auth_token"}


def test_no_secret_is_written_down() -> None:
    for file in (REPOSITORY / "deploy" / "kubernetes").rglob("*.yaml"):
        assert not re.search(r"kind: Secret\b|stringData", file.read_text()), file
