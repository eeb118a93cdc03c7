"""The JSON files by which Orbax opens a checkpoint of ours. Pure.

Their forms are Orbax 0.12.8's: `_src/metadata/tree.py` (``_METADATA``), `array_metadata_store.py`,
`step_metadata_serialization.py` (``_CHECKPOINT_METADATA``), `_src/serialization/type_handlers.py`
(``_strings.json``).
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec

from jaxckpt.graph.model import ArraySpec, ObjectGraph
from jaxckpt.storage.chunks import digest

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from jaxckpt.storage.format.spelling import Place
    from jaxckpt.storage.layout import Entry, OrbaxValues

METADATA = "_METADATA"
CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
STRINGS = "_strings.json"
ARRAY_METADATAS = "array_metadatas/process_0"
COMMIT_SUCCESS = "commit_success.txt"
#: Orbax reads that it is there, not what it says; so it says the same in every checkpoint.
COMMIT_SUCCESS_CONTENT = b"Checkpoint commit was successful.\n"

# Orbax's own word for it; `StandardCheckpointer` and `PyTreeCheckpointer` both open what has it.
_HANDLER = "orbax.checkpoint._src.handlers.standard_checkpoint_handler.StandardCheckpointHandler"


class _Times(msgspec.Struct):
    started: float
    committed: float


class _Manifest(msgspec.Struct):
    files: _Times


def files(graph: ObjectGraph, entries: Sequence[Entry], visible: Sequence[Place]) -> dict[str, bytes]:
    """The files that depend on the structure alone, by name: ``_METADATA`` and, where needed, the keys' one.

    Args:
        graph: what is saved.
        entries: `layout.layout` of it.
        visible: `spelling.places` of it.
    """
    found = {METADATA: tree_metadata(visible)}
    arrays = array_metadatas(graph, entries, visible)
    if arrays is not None:
        found[ARRAY_METADATAS] = arrays
    return found


def value_files(values: OrbaxValues) -> dict[str, bytes]:
    """The file that depends on the values: ``_strings.json``, where there is a string."""
    return {STRINGS: _json(dict(values.strings))} if values.strings else {}


def tree_metadata(visible: Sequence[Place]) -> bytes:
    """``_METADATA``: path and type of each place.

    Every array is an ``np.ndarray``, and there is no ``_sharding``: so it opens on any number of devices.
    """
    tree = {
        str(place.names): {
            "key_metadata": [
                {"key": name, "key_type": type_} for name, type_ in zip(place.names, place.types, strict=True)
            ],
            "value_metadata": {"value_type": place.type, "skip_deserialize": place.leaf < 0},
        }
        for place in visible
    }
    return _json(
        {
            "tree_metadata": tree,
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
    )


def array_metadatas(graph: ObjectGraph, entries: Sequence[Entry], visible: Sequence[Place]) -> bytes | None:
    """``array_metadatas/process_0``: which arrays are the bits of PRNG keys; None if there is none.

    Orbax makes keys of them for a target with keys. Without a target they come as their bits: what Orbax
    restores as keys it restores as `jax.Array`, which needs the devices of the save.
    """
    chunks = {leaf: entry.chunk_shape for entry in entries for leaf in (entry.owner[0], *entry.aliases)}
    found: list[dict[str, Any]] = []
    for place in visible:
        spec = graph.leaves[place.leaf].spec if place.leaf >= 0 else None
        if isinstance(spec, ArraySpec) and spec.impl is not None:
            document = {
                "param_name": place.key,
                "write_shape": list(spec.stored_shape),
                "chunk_shape": list(chunks[place.leaf]),
                "ext_metadata": {"random_key_impl": spec.impl},
            }
            found.append({"array_metadata": document})
    return _json({"array_metadatas": found}) if found else None


def checkpoint_metadata(manifest: bytes) -> bytes:
    """``_CHECKPOINT_METADATA``: a pure function of the bytes of ``graph.json``, so that it can be verified.

    Args:
        manifest: the bytes of ``graph.json``, which are whole.
    """
    times = msgspec.json.decode(manifest, type=_Manifest).files
    return _json(
        {
            "item_handlers": _HANDLER,
            "metrics": {},
            "performance_metrics": {},
            "init_timestamp_nsecs": round(times.started * 1e9),
            "commit_timestamp_nsecs": round(times.committed * 1e9),
            "custom_metadata": {"jaxckpt": {"manifest": digest(manifest).hex(), "size": len(manifest)}},
        }
    )


def is_ours(names: Collection[str], checkpoint_metadata: bytes | None) -> bool:
    """Whether a directory without ``graph.json`` is a checkpoint of ours that lost it: corrupt, not foreign.

    Args:
        names: what is in the directory.
        checkpoint_metadata: bytes of its ``_CHECKPOINT_METADATA``, if it has one.
    """
    if any(name.startswith("chunks.process_") for name in names):
        return True
    return checkpoint_metadata is not None and b'"jaxckpt"' in checkpoint_metadata


def _json(value: Any) -> bytes:
    try:
        return msgspec.json.encode(value)
    except UnicodeEncodeError:  # a name with a lone surrogate, which it refuses
        return json.dumps(value, separators=(",", ":")).encode()
