"""The container files, read and checked without Docker: no image was built by these tests, no container was run."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import POCKET, REPOSITORY

from deploy.cli import main
from deploy.commands import parser
from deploy.config_file import parse_with_file

FOLDER = REPOSITORY / "deploy" / "docker"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
HADOLINT = REPOSITORY / "build" / "kube-tools" / "bin" / "hadolint"


def read(name: str) -> Any:
    return yaml.safe_load((FOLDER / name).read_text())


def stages() -> dict[str, str]:
    """Each stage's lines, by its name."""
    parts = re.split(r"^FROM ", DOCKERFILE, flags=re.M)[1:]
    return {part.split("\n", 1)[0].split(" AS ")[1]: part for part in parts}


def copied(stage: str) -> list[str]:
    lines = re.findall(r"^COPY (?!--from)(.+)$", stages()[stage], re.M)
    return [word for line in lines for word in line.split()[:-1]]


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = set(re.findall(r"^!(\S+)$", (FOLDER / "Dockerfile.dockerignore").read_text(), re.M))
    paths = {path for name in stages() for path in copied(name)}
    assert all((REPOSITORY / path).exists() for path in paths)
    assert paths == kept


def test_both_images_have_every_package() -> None:
    packages = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert set(copied("sources")) == {*packages, "proto"} - {"batonpb"}
    for name in ("build-cpu", "build-cuda"):
        assert "COPY --from=sources / ./\nRUN /opt/baton/bin/pip install -c requirements.lock .\n" in stages()[name]


def test_images_are_pinned_lean_and_not_root() -> None:
    bases = re.findall(r"^FROM (\S+) AS", DOCKERFILE, re.M)
    outside = {base for base in bases if base not in stages() and base != "scratch"}
    assert len(outside) == 1 and all(re.search(r":\d+\.\d+\.\d+-", base) for base in outside)
    assert {"cpu", "cuda"} < set(stages())
    assert stages()["cpu"].startswith("runtime ") and stages()["cuda"].startswith("runtime ")
    assert not re.search(r"build-essential|g\+\+|gcc|pip install", stages()["runtime"])
    assert re.search(r"^USER [1-9]\d+:[1-9]\d+$", stages()["runtime"], re.M)
    assert "HEALTHCHECK" in stages()["runtime"] and '"/ready' not in stages()["cpu"]


def test_hadolint() -> None:
    hadolint = shutil.which("hadolint") or (str(HADOLINT) if HADOLINT.exists() else None)
    if hadolint is None:
        pytest.skip("`make kube-tools` gets hadolint")
    result = subprocess.run([hadolint, str(FOLDER / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stdout


def test_compose_names_what_is_there() -> None:
    compose = read("compose.yaml")
    for name, service in compose["services"].items():
        image = service.get("image", "x:1.2.3")
        assert re.search(r":v?\d+\.\d+\.\d+(-\w+)?$", image), f"{name} is not pinned"
        assert set(service.get("depends_on", [])) <= set(compose["services"])
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (FOLDER / source).exists() if source.startswith(".") else source in compose["volumes"], volume
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "nothing is opened to the network"
    build = compose["services"]["baton"]["build"]
    assert (FOLDER / build["context"]).resolve() == REPOSITORY and build["target"] in stages()
    assert (REPOSITORY / build["dockerfile"]).exists()


def test_the_parts_find_each_other(tmp_path: Path) -> None:
    compose, options = read("compose.yaml")["services"], read("baton.yaml")
    (job,) = read("prometheus.yaml")["scrape_configs"]
    assert job["file_sd_configs"][0]["files"] == [options["metrics_targets"]]
    assert options["metrics_targets"].startswith("/run/baton/")
    assert {"run:/run/baton"} <= set(compose["baton"]["volumes"])
    assert compose["prometheus"]["network_mode"] == "service:baton"
    assert f"127.0.0.1:{options['http_port']}:{options['http_port']}" in compose["baton"]["ports"]
    assert f"BATON_HTTP_PORT={options['http_port']}" in DOCKERFILE
    provider = read("grafana-dashboards.yaml")["providers"][0]["options"]["path"]
    assert any(f":{provider}:" in volume for volume in compose["grafana"]["volumes"])
    file = tmp_path / "baton.yaml"
    file.write_text(yaml.safe_dump(options | {"model": str(POCKET)}))
    argv = [word.replace("/etc/baton/baton.yaml", str(file)) for word in compose["baton"]["command"]]
    assert parse_with_file(parser(), argv).metrics_targets == Path(options["metrics_targets"])
    assert main(["config", "check", str(file)]) == 0
