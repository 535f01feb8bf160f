"""The committed stubs are those that `make proto` would write."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


def test_stubs_are_fresh(tmp_path: Path) -> None:
    protos = sorted((REPOSITORY / "proto" / "batonpb").glob("*.proto"))
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I", str(REPOSITORY / "proto")]
    command += [f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([*command, *map(str, protos)], check=True)
    made = sorted((tmp_path / "batonpb").iterdir())
    assert len(made) == 4 * len(protos) - len(protos)
    for path in made:
        committed = REPOSITORY / "proto" / "batonpb" / path.name
        assert committed.read_bytes() == path.read_bytes(), f"{path.name} is stale: run `make proto`"
