"""Who may import whom: the arrows of the house, read from the sources."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
OURS = {
    "engine",
    "kvstore",
    "grammar",
    "node",
    "prefill_node",
    "decode_node",
    "router",
    "deploy",
    "loadtest",
    "batonpb",
}

PURE_ROUTER = (
    "backlog",
    "baselines",
    "cluster",
    "costs",
    "fit",
    "hits",
    "line",
    "overtaking",
    "plan",
    "policy",
    "predict",
    "speeds",
    "warming",
    "ways",
)

# package -> (our modules it may import, outside packages that it may not)
RULES: dict[str, tuple[set[str], set[str]]] = {
    "engine": ({"engine", "kvstore.blocks", "kvstore.copies"}, {"ray", "grpc", "redis", "zmq", "transformers"}),
    "kvstore": ({"kvstore"}, {"ray", "torch", "grpc", "transformers"}),
    "grammar": ({"grammar", "batonpb"}, {"ray", "torch", "grpc", "redis", "zmq", "transformers"}),
    "node": ({"node", "batonpb", "engine", "grammar", "kvstore"}, {"ray", "redis", "zmq", "transformers"}),
    "prefill_node": ({"prefill_node", "node", "batonpb", "engine", "kvstore"}, {"ray", "redis", "zmq", "transformers"}),
    "decode_node": ({"decode_node", "node", "batonpb", "engine", "kvstore"}, {"ray", "redis", "zmq", "transformers"}),
    "router": (
        {"router", "batonpb", "grammar", "kvstore.blocks", "kvstore.directory", "kvstore.errors", "kvstore.scrape"},
        {"ray", "torch", "redis", "zmq", "transformers"},
    ),
    "loadtest": (
        # The simulator runs the shipped pure code: policies, eviction, the order of a prefill queue.
        {"loadtest", "batonpb", "kvstore.blocks", "kvstore.eviction", "engine.order"}
        | {f"router.{name}" for name in PURE_ROUTER},
        {"ray", "torch", "redis", "zmq", "transformers"},
    ),
    "deploy": (OURS, {"transformers"}),
}


def imports_of(path: Path) -> set[str]:
    """Absolute module names that a file imports, at any depth; `from a import b` counts as a and as a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def within(name: str, allowed: set[str]) -> bool:
    return any(name == a or name.startswith(a + ".") for a in allowed)


@pytest.mark.parametrize("package", sorted(RULES))
def test_imports(package: str) -> None:
    allowed, forbidden = RULES[package]
    for path in sorted((REPOSITORY / package).rglob("*.py")):
        for name in imports_of(path):
            top = name.split(".")[0]
            if top in OURS:
                assert within(name, allowed), f"{path.relative_to(REPOSITORY)} may not import {name}"
            assert top not in forbidden, f"{path.relative_to(REPOSITORY)} may not import {name}"


def test_ray_lives_in_one_file() -> None:
    users = {
        str(path.relative_to(REPOSITORY))
        for package in RULES
        for path in (REPOSITORY / package).rglob("*.py")
        if any(name.split(".")[0] == "ray" for name in imports_of(path))
    }
    assert users == {"deploy/on_ray.py"}


def test_proto_is_no_package() -> None:
    """`proto` would shadow Google's proto-plus, which Ray's extras bring in."""
    assert not (REPOSITORY / "proto" / "__init__.py").exists()


def test_no_drawer_for_everything() -> None:
    assert not [name for name in ("common", "utils") if list(REPOSITORY.glob(f"*/{name}*"))]


@pytest.mark.parametrize("module", ["router.server", "kvstore.server", "deploy.commands", "loadtest.bench"])
def test_starts_without_torch(module: str) -> None:
    """Importing torch costs seconds and 200 MB; only engines pay them."""
    import subprocess

    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=False).returncode == 0
