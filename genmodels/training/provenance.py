"""Where a number comes from: commit, versions, machine and command."""

import hashlib
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Commit and state of the source tree, versions, machine and command of this process."""
    source = Path(__file__).parent
    commit = _git(source, "rev-parse", "HEAD")
    changes = _git(source, "status", "--porcelain") if commit else None
    packages = {name: _version(name) for name in ("torch", "numpy", "accelerate", "omegaconf", "safetensors")}
    return {
        "commit": commit,
        "dirty": bool(changes) if changes is not None else None,
        "diff": hashlib.sha256((_git(source, "diff", "HEAD") or "").encode()).hexdigest()[:12] if changes else None,
        "versions": {"python": platform.python_version(), **packages},
        "hardware": _hardware(),
        "threads": torch.get_num_threads(),
        "argv": sys.argv,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _git(folder: Path, *words: str) -> str | None:
    command = ["git", "-C", str(folder), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False) if _has_git() else None
    return done.stdout.strip() if done is not None and done.returncode == 0 else None


def _has_git() -> bool:
    return any((Path(p) / "git").exists() for p in os.environ.get("PATH", "").split(os.pathsep))


def _version(package: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _hardware() -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()}x {torch.cuda.get_device_name(0)}"
    return f"{platform.machine()} CPU, {os.cpu_count()} cores"
