"""Names of files inside a checkpoint."""

from __future__ import annotations


def is_safe_name(name: str) -> bool:
    """Whether a name read from a file stays inside the checkpoint: relative, with ``/``, and no ``..``."""
    if not name or len(name) > 1024 or "\\" in name or "\0" in name or ":" in name:
        return False
    return all(part not in ("", ".", "..") for part in name.split("/"))
