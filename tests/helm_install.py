"""`helm install` of one chart by Helm's own library: `python helm_install.py LIBRARY CHART`, in a process of its own.

Helm renders a chart for a cluster, and there is none here: a few lines of HTTP take the place of its API server. They
know which kinds there are, say of each object that it does not exist yet, and keep what Helm creates; it is printed as
JSON. Nothing of the objects is checked here, and nothing runs. There is no wheel of the `helm` command, which has
`helm template`.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar

KINDS = {  # of all groups that a chart here may use
    "v1": ("ConfigMap", "Secret", "Service", "ServiceAccount", "PersistentVolumeClaim"),
    "apps/v1": ("Deployment", "StatefulSet"),
    "policy/v1": ("PodDisruptionBudget",),
    "networking.k8s.io/v1": ("Ingress",),
    "ray.io/v1": ("RayCluster",),
    "monitoring.coreos.com/v1": ("PodMonitor",),
}
VERBS = ["create", "get", "list", "patch", "update", "delete"]


class ApiServer(BaseHTTPRequestHandler):
    """Answers what Helm asks before it creates objects, and takes these."""

    created: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        path = self.path.split("?")[0].strip("/")
        if path == "version":
            self._answer(200, {"major": "1", "minor": "35", "gitVersion": "v1.35.0"})
        elif path == "api":
            self._answer(200, {"kind": "APIVersions", "versions": ["v1"]})
        elif path == "apis":
            groups = [_group(version) for version in KINDS if "/" in version]
            self._answer(200, {"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
        elif (version := path.removeprefix("api/").removeprefix("apis/")) in KINDS:
            resources = [
                {"name": _plural(kind), "kind": kind, "namespaced": True, "verbs": VERBS} for kind in KINDS[version]
            ]
            self._answer(
                200,
                {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources},
            )
        elif path.endswith("/secrets"):  # Helm's own records of releases
            self._answer(200, {"kind": "SecretList", "apiVersion": "v1", "items": []})
        else:
            self._answer(
                404, {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "code": 404}
            )

    def do_POST(self) -> None:
        self._take(201, self.created)

    def do_PUT(self) -> None:
        self._take(200, [])

    do_PATCH = do_PUT

    def log_message(self, *_: object) -> None: ...

    def _take(self, status: int, kept: list[Any]) -> None:
        """What is not JSON are Helm's own records of the release."""
        kind, text = str(self.headers["Content-Type"]), self.rfile.read(int(self.headers["Content-Length"]))
        if "json" in kind:
            kept.append(json.loads(text))
        self._send(status, kind, text)

    def _answer(self, status: int, body: Any) -> None:
        self._send(status, "application/json", json.dumps(body).encode())

    def _send(self, status: int, kind: str, text: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


def _plural(kind: str) -> str:
    return kind.lower() + ("es" if kind.endswith("s") else "s")


def _group(version: str) -> dict[str, Any]:
    name, _, number = version.partition("/")
    one = {"groupVersion": version, "version": number}
    return {"name": name, "versions": [one], "preferredVersion": one}


def install(library: str, chart: str, server: str) -> str:
    """Helm's words where it refuses, else ""."""
    helm = ctypes.CDLL(library)
    helm.helm_sdkpy_last_error.restype = ctypes.c_char_p
    config = ctypes.c_ulonglong()
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": server}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "nobody"}}],
        "users": [{"name": "nobody", "user": {}}],
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(kubeconfig, file)
        file.flush()
        if helm.helm_sdkpy_config_create(b"default", file.name.encode(), None, b"{}", ctypes.byref(config)):
            return _error(helm)
        return _install(helm, config, chart)


def _install(helm: ctypes.CDLL, config: ctypes.c_ulonglong, chart: str) -> str:
    options, answer = {"wait": False, "timeout_seconds": 60, "disable_openapi_validation": True}, ctypes.c_char_p()
    arguments = (b"baton", chart.encode(), b"", b"", json.dumps(options).encode())
    return _error(helm) if helm.helm_sdkpy_install(config, *arguments, ctypes.byref(answer)) else ""


def _error(helm: ctypes.CDLL) -> str:
    return str(helm.helm_sdkpy_last_error(), "utf-8")


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), ApiServer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    problem = install(sys.argv[1], sys.argv[2], f"http://127.0.0.1:{server.server_port}")
    print(json.dumps({"problem": problem, "objects": ApiServer.created}))


if __name__ == "__main__":
    main()
