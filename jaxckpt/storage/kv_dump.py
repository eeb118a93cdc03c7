"""Where the values of any OCDBT database lie, as tensorstore says: compressed and merged ones too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import tensorstore as ts

from jaxckpt.errors import CorruptCheckpointError
from jaxckpt.storage.chunks import INLINE, Located
from jaxckpt.storage.kv import refuse_fork

if TYPE_CHECKING:
    from collections.abc import Sequence


def locate(directory: str) -> Located:
    """Where each value of the newest version of any database lies, as tensorstore says, which takes its time.

    Raises:
        CorruptCheckpointError: the database cannot be read.
    """
    refuse_fork()
    try:
        return _dump(directory)
    except Exception as error:
        message = f"the database of {directory} cannot be read: {error}"
        raise CorruptCheckpointError(message, files=("manifest.ocdbt",)) from error


def _dump(directory: str) -> Located:
    base = ts.KvStore.open({"driver": "file", "path": directory.rstrip("/") + "/"}).result()
    manifest: dict[str, Any] = ts.ocdbt.dump(base).result()
    root = manifest["versions"][-1]["root"]
    found = Located(files=(), keys=[], file=[], offset=[], length=[], inline=[])
    if "location" not in root:
        return found
    files: dict[tuple[str, str], int] = {}
    level = [(b"", root["location"])]
    while level:
        # all nodes of a level at once, which come in the order of the keys: the reads overlap
        futures = [(prefix, ts.ocdbt.dump(base, node=location)) for prefix, location in level]
        level = []
        for prefix, future in futures:
            node: dict[str, Any] = future.result()
            if node["height"]:
                level += [
                    (prefix + entry["subtree_common_prefix"], entry["location"]) for entry in node["entries"]
                ]
            else:
                _add_leaves(found, prefix, node["entries"], files)
    names = tuple(unquote(parent) + unquote(name) for parent, name in files)
    return Located(
        files=names,
        keys=found.keys,
        file=found.file,
        offset=found.offset,
        length=found.length,
        inline=found.inline,
    )


def _add_leaves(
    found: Located, prefix: bytes, entries: Sequence[dict[str, Any]], files: dict[tuple[str, str], int]
) -> None:
    for entry in entries:
        found.keys.append(prefix + entry["key"])
        inline = entry.get("inline_value")
        found.inline.append(inline)
        if inline is not None:
            found.file.append(INLINE)
            found.offset.append(0)
            found.length.append(len(inline))
            continue
        # "value:<directory of a merged database, or nothing>:<file>:<offset>:<length>"
        _, parent, name, offset, length = entry["indirect_value"].split(":")
        found.file.append(files.setdefault((parent, name), len(files)))
        found.offset.append(int(offset))
        found.length.append(int(length))
