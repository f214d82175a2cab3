"""The API server's client, as far as it goes without one."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_user_that_nobody_knows_needs_no_home() -> None:
    """As in a container whose user is in no /etc/passwd, where the runtime sets no HOME."""
    code = """
import pwd
def nobody(uid):
    raise KeyError(uid)
pwd.getpwuid = nobody
import dataplane.sources.kubernetes_client
"""
    environment = {key: value for key, value in os.environ.items() if key != "HOME"}
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
