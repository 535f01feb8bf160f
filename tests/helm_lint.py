"""`helm lint` of one chart by Helm's own library, in a process of its own: `python helm_lint.py LIBRARY CHART`.

The library is the one in the wheel helm-sdkpy (`make kube-tools`): there is no wheel of the `helm` command. Prints the
messages as JSON; errors have no words, only the file that they are in.
"""

from __future__ import annotations

import ctypes
import json
import sys


def lint(library: str, chart: str) -> list[dict[str, object]]:
    helm = ctypes.CDLL(library)
    helm.helm_sdkpy_last_error.restype = ctypes.c_char_p
    config, answer = ctypes.c_ulonglong(), ctypes.c_char_p()
    if helm.helm_sdkpy_config_create(b"default", None, None, b"{}", ctypes.byref(config)):
        raise RuntimeError(str(helm.helm_sdkpy_last_error()))
    if helm.helm_sdkpy_lint(config, chart.encode(), ctypes.byref(answer)):
        raise RuntimeError(str(helm.helm_sdkpy_last_error()))
    return list(json.loads(answer.value or b"{}").get("Messages") or [])


if __name__ == "__main__":
    print(json.dumps(lint(sys.argv[1], sys.argv[2])))
