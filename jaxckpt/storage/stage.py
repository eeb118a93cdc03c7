"""Writing one checkpoint into its staging directory: values, chunk table, Orbax's files, manifest."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from msgspec import Struct

from jaxckpt import __version__
from jaxckpt.graph.model import ObjectGraph
from jaxckpt.storage import directory, handler
from jaxckpt.storage import manifest as manifests
from jaxckpt.storage.chunks import build_table, digest, leaf_digest
from jaxckpt.storage.format import orbax_files, seal
from jaxckpt.storage.hold import Borrowed, Buffer
from jaxckpt.storage.layout import orbax_values
from jaxckpt.storage.manifest import Files
from jaxckpt.storage.plan import Plan, prepare
from jaxckpt.storage.saved_text import graphs_text, saved_text

TABLE = "chunks.process_0"
#: Where the database keeps its values.
VALUES = "d/"


class Contents(Struct, frozen=True, kw_only=True, eq=False):
    """What a checkpoint is to hold.

    Attributes:
        graph: the tree.
        plan: how its structure is written.
        buffers: the values of each of the plan's entries, C-contiguous, which nothing changes any more.
    """

    graph: ObjectGraph
    plan: Plan
    buffers: tuple[Buffer | Borrowed, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all values."""
        return sum([buffer.nbytes for buffer in self.buffers])


class Facts(Struct, frozen=True, kw_only=True):
    """What a manifest says of one save and no other.

    Attributes:
        metadata: the caller's JSON value.
        started: seconds since 1970.
        step, save_counter, writer, metrics: see `manifest.Files`.
        sequence: called when everything else is written.
    """

    metadata: Any
    started: float
    step: int | None
    save_counter: int | None
    writer: str
    metrics: Mapping[str, float] | None
    sequence: Callable[[], int]


def write_stage(
    staging: directory.Staging,
    contents: Contents,
    facts: Facts,
    *,
    memory_limit: int,
    lap: Callable[[str], None],
    progress: Callable[[int], object] | None = None,
) -> int:
    """Writes everything; nothing is durable or visible yet.

    Args:
        staging: where to.
        contents: what.
        facts: what else the manifest says.
        memory_limit: bytes of host memory for copies.
        lap: called with the name of each stage when it ends.
        progress: called now and then with the number of bytes written.

    Returns:
        Bytes of all files.

    Raises:
        SaveError: the files could not be written.
    """
    plan = contents.plan
    orbax = orbax_values(contents.graph, plan.places)
    scalars = [prepare(key, (), array.dtype, ()) for key, array in orbax.arrays]
    with directory.saving(staging.target, contents.nbytes):
        written = handler.write(
            staging.path,
            (*plan.items, *scalars),
            (*contents.buffers, *(array for _, array in orbax.arrays)),
            plan.aliases,
            memory_limit=memory_limit,
            progress=progress and (lambda: progress(_size_of(os.path.join(staging.path, VALUES)))),
        )
        lap("write")
        table = build_table(plan.keys, written.located, written.digests, written.others).encode()
        files = {**plan.files, **orbax_files.value_files(orbax), TABLE: table}
        files[orbax_files.COMMIT_SUCCESS] = orbax_files.COMMIT_SUCCESS_CONTENT
        for name, data in files.items():
            _write(staging.path, name, data)
        data = _manifest(staging, contents, facts, written.digests, table)
        _write(staging.path, seal.NAME, data)
        _write(staging.path, orbax_files.CHECKPOINT_METADATA, orbax_files.checkpoint_metadata(data))
        lap("manifest")
        return sum(size for _, size in _sizes(staging.path))


def _manifest(
    staging: directory.Staging, contents: Contents, facts: Facts, digests: Sequence[bytes], table: bytes
) -> bytes:
    plan = contents.plan
    found = iter(digests)
    leaves = [leaf_digest([next(found) for _ in item.names]) for item in plan.items]
    graphs = plan.graphs_text or graphs_text(contents.graph, plan.entries)
    files = Files(
        sequence=facts.sequence(),
        started=facts.started,
        committed=time.time(),
        step=facts.step,
        save_counter=facts.save_counter,
        writer=facts.writer,
        name=os.path.basename(staging.target),
        version=__version__,
        metrics=facts.metrics,
        tables={TABLE: digest(table)},
        others=_others(staging.path),
        nbytes=contents.nbytes,
    )
    saved = saved_text(graphs, plan.entry_texts, leaves, facts.metadata)
    return seal.seal(saved, manifests.encode_files(files))


def _size_of(directory: str) -> int:
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        return sum(entry.stat().st_size for entry in entries)
    return 0


def _sizes(path: str) -> Iterator[tuple[str, int]]:
    """Every file below a directory with its size, by its name with slashes."""
    for parent, _, files in os.walk(path):
        for name in files:
            whole = os.path.join(parent, name)
            yield os.path.relpath(whole, path).replace(os.sep, "/"), os.path.getsize(whole)


def _others(path: str) -> dict[str, tuple[int, bytes]]:
    """Size and digest of every file but the values and the chunk table."""
    found: dict[str, tuple[int, bytes]] = {}
    for name, size in sorted(_sizes(path)):
        if not name.startswith(VALUES) and name != TABLE:
            with open(os.path.join(path, name), "rb") as file:
                found[name] = size, digest(file.read())
    return found


def _write(path: str, name: str, data: bytes) -> None:
    """A new file; the commit makes it durable together with all others."""
    whole = os.path.join(path, name)
    os.makedirs(os.path.dirname(whole), exist_ok=True)
    with open(whole, "xb") as file:
        file.write(data)
