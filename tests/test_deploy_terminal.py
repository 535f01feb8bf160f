"""What a cluster says goes on being said to nobody where nobody can hear it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import REPOSITORY


@pytest.mark.parametrize("where", ["/dev/full", "a pipe"])
def test_nobody_who_hears_it_is_no_failure(where: str) -> None:
    read, broken = os.pipe()
    os.close(read)
    out = broken if where == "a pipe" else os.open(where, os.O_WRONLY)
    code = "import os, deploy.terminal as t; t.say('x'); t.show('y'); t.say('z'); os._exit(7)"
    done = subprocess.run([sys.executable, "-c", code], stdout=out, stderr=out, cwd=REPOSITORY, check=False)
    assert done.returncode == 7
    for end in {out, broken}:
        os.close(end)
