"""Digests: of plain data by its canonical JSON, of files by their bytes."""

import hashlib
import json
from pathlib import Path
from typing import Any


def canonical(tree: Any) -> str:
    """JSON with sorted keys, no spaces and shortest float form: equal trees give equal text."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(tree: Any) -> str:
    """12 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(tree).encode()).hexdigest()[:12]


def sha256(path: Path) -> str:
    """64 hexadecimal digits: the SHA-256 of a file's bytes, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
