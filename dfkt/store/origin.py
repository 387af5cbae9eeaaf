"""Where figures come from: versions, commit, hardware and command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from typing import Any


def environment() -> dict[str, Any]:
    """Return what figures travel with: versions, commit, hardware and command, as JSON values.

    ``commit`` is the one of the checkout that this package runs from, ``None`` if it runs from none; ``dirty`` says
    whether tracked files differ from it. The host's name is left out.
    """
    packages = ["python", "dfkt", "torch", "torchvision", "ray", "optuna", "pyarrow", "pandas", "numpy"]
    here = os.path.dirname(os.path.abspath(__file__))
    tracked = _output("git", "-C", here, "ls-files", os.path.basename(__file__))
    changes = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no") if tracked else None
    return {
        "versions": {name: package_version(name) for name in packages},
        "commit": _output("git", "-C", here, "rev-parse", "HEAD") if tracked else None,
        "dirty": None if changes is None else bool(changes),
        "hardware": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "platform": platform.platform(),
            "gpus": (_output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or "").splitlines(),
        },
        "command": list(sys.argv),
    }


def _output(*command: str) -> str | None:
    """Return what a command prints, or ``None`` if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def package_version(package: str) -> str | None:
    """Return the version of an installed package, or of ``python``; ``None`` where there is no such package."""
    if package == "python":
        return platform.python_version()
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
