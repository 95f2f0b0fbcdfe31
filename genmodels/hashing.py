"""Digests: of plain data by its canonical JSON, of files by their bytes."""

import hashlib
import json
from pathlib import Path
from typing import Any

BLOCK = 4096  # bytes


def canonical(tree: Any) -> str:
    """JSON with sorted keys, no spaces and shortest float form: equal trees give equal text."""
    return json.dumps(tree, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(tree: Any) -> str:
    """12 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical(tree).encode()).hexdigest()[:12]


def sha256(path: Path, budget: int | None = None) -> str:
    """64 hexadecimal digits: the SHA-256 of a file's bytes, read in pieces.

    Args:
        budget: of a file with more bytes than this, hash its size and evenly spaced blocks of 4,096 bytes, the first
            and the last among them, about that many bytes in all and at least two blocks: a change between them is
            not seen.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        if budget is None or size <= max(budget, 2 * BLOCK):
            return hashlib.file_digest(file, "sha256").hexdigest()
        out, count = hashlib.sha256(str(size).encode()), max(2, budget // BLOCK)
        for k in range(count):
            file.seek(k * (size - BLOCK) // (count - 1))
            out.update(file.read(BLOCK))
        return out.hexdigest()
