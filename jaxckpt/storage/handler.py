"""Orbax's array handler with our writer behind it. The only importer of orbax, by its public names.

The save of jaxckpt drives it through Orbax's handler interface; registered with Orbax
(``ocp.type_handlers.register_type_handler(jax.Array, GraphArrayHandler(), override=True)``) it gives
Orbax's own checkpointers the same way of writing: one transaction, no compression, and futures that wait
for nothing but the write itself (Orbax's wait for signals of the process, which a save that failed
never sends).
"""

from __future__ import annotations

import asyncio
import base64
import json
import os
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, SingleDeviceSharding
from msgspec import Struct
from orbax.checkpoint import metadata as orbax_metadata
from orbax.checkpoint import multihost, type_handlers

from jaxckpt.errors import CheckpointError, SaveError
from jaxckpt.graph.model import ArraySpec
from jaxckpt.storage import kv
from jaxckpt.storage.chunks import grid
from jaxckpt.storage.format.dtypes import ORBAX_DTYPES
from jaxckpt.storage.format.zarr import ZarrReader
from jaxckpt.storage.hold import hold_all, is_key
from jaxckpt.storage.place import Placement, place

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from orbax.checkpoint import future
    from orbax.checkpoint.type_handlers import ParamInfo, RestoreArgs, SaveArgs

# Orbax merges every database of a name that begins so; in `ocdbt.process_0` its other handlers write.
_PROCESS_DIRECTORY = "ocdbt.process_jaxckpt"
# Arrays read before they are put on devices.
_BATCH_BYTES = 256 << 20


@dataclass
class ChunkArgs(type_handlers.SaveArgs):
    """How to store one array.

    Attributes:
        chunk_shape: shape of a chunk; None for the grid of the array's shape and sharding.
        raw: see `kv.ArrayWrite`.
    """

    chunk_shape: tuple[int, ...] | None = None
    raw: bool = False


class Direct(Struct, frozen=True, kw_only=True):
    """A save of jaxckpt's own: what goes into the database beside the arrays. See `kv.write`."""

    values: Sequence[tuple[str, bytes]] = ()
    aliases: Sequence[tuple[str, str]] = ()
    memory_limit: int | None = None


class GraphArrayHandler(type_handlers.ArrayHandler):
    """Saves arrays as `kv.write` does, and restores as Orbax's `ArrayHandler`.

    Arrays are held when `serialize` returns, so that donation cannot reach the checkpoint. What our
    writer does not do (several processes, zarr3, casts, an option of Orbax's about shapes of chunks,
    dtypes that Orbax refuses) is left to the base class.
    """

    def __init__(self, *, direct: Direct | None = None, timeout: float = 600, **options: Any) -> None:
        """Makes a handler.

        Args:
            direct: for a save of ours: `serialize` writes into the directory itself, in the calling
                thread. Else it writes beside it, in a thread, for Orbax to merge.
            timeout: seconds to wait for Orbax to make the directory.
            **options: as of `orbax.checkpoint.type_handlers.ArrayHandler`.
        """
        super().__init__(**options)
        self._direct = direct
        self._timeout = timeout
        self._orbax_options = bool(options)
        self._keys_are_ours = options.get("array_metadata_store") is None

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[ParamInfo], args: Sequence[SaveArgs] | None = None
    ) -> Sequence[future.Future]:
        """Writes arrays, or begins to; see `orbax.checkpoint.type_handlers.TypeHandler`.

        Raises:
            SaveError: a direct write failed.
            UnsupportedLeafError: an array is deleted.
        """
        args = args or [ChunkArgs()] * len(values)
        if self._direct is not None:
            arrays = _writes(values, infos, args)
            parent = os.fspath(infos[0].parent_dir) if infos else ""
            return [cast("future.Future", _Written(_write_direct(parent, arrays, self._direct)))]
        if self._orbax_options or not all(map(_is_ours, values, infos, args)):
            return await super().serialize(values, infos, args)
        arrays = _writes(values, infos, args)
        beside = _Beside.of(values, infos, arrays)
        work = _Work(lambda wait: _write_beside(wait, infos[0], arrays, beside), self._timeout)
        return [cast("future.Future", work)]

    async def deserialize(
        self, infos: Sequence[ParamInfo], args: Sequence[RestoreArgs] | None = None
    ) -> Sequence[Any]:
        """Reads arrays: those written without compression by location, any other as Orbax does."""
        arrays = _read_plain(infos, args or ())
        if arrays is None:
            arrays = list(await super().deserialize(infos, args))
        if self._keys_are_ours and infos:
            impls = _key_impls(infos[0].parent_dir)
            for index, info in enumerate(infos):
                if info.name in impls and not is_key(arrays[index].dtype):
                    arrays[index] = jax.random.wrap_key_data(arrays[index], impl=impls[info.name])
        return arrays

    def finalize(self, directory: epath.Path) -> None:
        """Merges what was written beside the database into it, if nobody has; Orbax's savers do."""
        if not (directory / "manifest.ocdbt").exists():
            asyncio.run(type_handlers.merge_ocdbt_per_process_files(directory, kv.context(), use_zarr3=False))


def write(
    directory: str,
    arrays: Sequence[kv.ArrayWrite],
    values: Sequence[tuple[str, bytes]] = (),
    aliases: Sequence[tuple[str, str]] = (),
    *,
    memory_limit: int | None = None,
) -> list[kv.Located]:
    """`kv.write`, through the handler.

    Raises:
        SaveError: as `kv.write` does.
    """
    handler = GraphArrayHandler(direct=Direct(values=values, aliases=aliases, memory_limit=memory_limit))
    parent, context = epath.Path(directory), kv.context()
    infos = [
        # the path of a parameter is of no use in a database, and 10 us to make
        type_handlers.ParamInfo(
            name=array.key, parent_dir=parent, path=parent, is_ocdbt_checkpoint=True, ts_context=context
        )
        for array in arrays
    ]
    if not infos:
        return kv.write(directory, (), values, aliases, memory_limit=memory_limit)
    args = [ChunkArgs(chunk_shape=array.chunk_shape, raw=array.raw) for array in arrays]
    [written] = _run(handler.serialize([array.host for array in arrays], infos, args))
    return written.result()


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine: one that never waits needs no event loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("a handler that writes in place has waited")


def _writes(
    values: Sequence[Any], infos: Sequence[ParamInfo], args: Sequence[SaveArgs]
) -> list[kv.ArrayWrite]:
    held = values if all(type(value) is np.ndarray for value in values) else hold_all(values).arrays
    arrays: list[kv.ArrayWrite] = []
    for value, host, info, arg in zip(values, held, infos, args, strict=True):
        chunk_shape, raw = (arg.chunk_shape, arg.raw) if isinstance(arg, ChunkArgs) else (None, False)
        if chunk_shape is None:
            chunk_shape = grid(host.shape, host.dtype.itemsize, _shard_shape(value, host.shape))
        arrays.append(kv.ArrayWrite(key=info.name, host=host, chunk_shape=chunk_shape, raw=raw))
    return arrays


def _shard_shape(value: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of a shard; of keys with all of their bits."""
    if not isinstance(value, jax.Array):
        return None
    shard = value.sharding.shard_shape(value.shape)
    return tuple(shard) + shape[value.ndim :]


def _write_direct(parent: str, arrays: list[kv.ArrayWrite], direct: Direct) -> list[kv.Located]:
    return kv.write(parent, arrays, direct.values, direct.aliases, memory_limit=direct.memory_limit)


def _is_ours(value: Any, info: ParamInfo, arg: SaveArgs) -> bool:
    if not isinstance(value, jax.Array) or jax.process_count() > 1 or not value.size:
        return False
    plain = bool(info.is_ocdbt_checkpoint) and not info.use_zarr3 and info.ocdbt_target_data_file_size is None
    default = arg.dtype is None and arg.chunk_byte_size is None and not arg.shard_axes
    return plain and default and (is_key(value.dtype) or value.dtype.name in ORBAX_DTYPES)


class _Beside(Struct, frozen=True, kw_only=True):
    """What Orbax keeps of arrays outside the database, as the JSON of its files."""

    shardings: dict[str, str]
    metadatas: list[dict[str, Any]]

    @classmethod
    def of(cls, values: Sequence[Any], infos: Sequence[ParamInfo], arrays: list[kv.ArrayWrite]) -> _Beside:
        shardings: dict[str, str] = {}
        metadatas: list[dict[str, Any]] = []
        for value, info, array in zip(values, infos, arrays, strict=True):
            sharding = _sharding_string(value.sharding)
            if sharding is not None:
                shardings[base64.urlsafe_b64encode(info.name.encode()).decode()] = sharding
            impl = {"random_key_impl": str(jax.random.key_impl(value))} if is_key(value.dtype) else None
            document = {
                "param_name": info.name,
                "write_shape": list(array.host.shape),
                "chunk_shape": list(array.chunk_shape),
                "ext_metadata": impl,
            }
            metadatas.append({"array_metadata": document})
        return cls(shardings=shardings, metadatas=metadatas)

    def write(self, parent: epath.Path) -> None:
        folder = parent / "array_metadatas"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"process_{multihost.process_index()}"
        path.write_text(json.dumps({"array_metadatas": self.metadatas}))
        (parent / "_sharding").write_text(json.dumps(self.shardings, separators=(",", ":")))


def _sharding_string(sharding: Any) -> str | None:
    if isinstance(sharding, NamedSharding):
        return orbax_metadata.NamedShardingMetadata.from_jax_sharding(sharding).to_serialized_string()
    if isinstance(sharding, SingleDeviceSharding):
        return orbax_metadata.SingleDeviceShardingMetadata.from_jax_sharding(sharding).to_serialized_string()
    return None


def _key_impls(parent: epath.Path) -> dict[str, str]:
    """Implementation of each key array, by the name of its parameter."""
    path = parent / "array_metadatas" / "process_0"
    if not path.exists():
        return {}
    found: dict[str, str] = {}
    for entry in json.loads(path.read_text()).get("array_metadatas", ()):
        document = entry["array_metadata"]
        impl = (document.get("ext_metadata") or {}).get("random_key_impl")
        if impl:
            found[document["param_name"]] = impl
    return found


def _read_plain(infos: Sequence[ParamInfo], args: Sequence[RestoreArgs]) -> list[Any] | None:
    """All the arrays, where each is asked for as it is stored and stored as plain bytes; else None."""
    plain = all(info.is_ocdbt_checkpoint and not info.use_zarr3 for info in infos)
    if not plain or not args or len(args) != len(infos) or jax.process_count() > 1:
        return None
    try:
        directory = os.fspath(infos[0].parent_dir)
        reader = ZarrReader(directory, {value.key: value for value in kv.locate(directory)})
    except (ValueError, CheckpointError):
        return None
    results: list[Any] = []
    batch: list[Placement] = []
    nbytes = 0
    try:
        for info, arg in zip(infos, args, strict=True):
            placement = _placement(reader, info, arg)
            if placement is None:
                return None
            batch.append(placement)
            nbytes += placement.host.nbytes
            if nbytes > _BATCH_BYTES:
                results += place(batch)
                batch, nbytes = [], 0
        return results + place(batch)
    finally:
        reader.close()


def _placement(reader: ZarrReader, info: ParamInfo, arg: RestoreArgs) -> Placement | None:
    found = reader.spec(info.name)
    if found is None or not isinstance(arg, type_handlers.ArrayRestoreArgs):
        return None
    shape, chunk_shape, dtype = found
    same_shape = arg.global_shape is None or tuple(arg.global_shape) == shape
    same_dtype = arg.dtype is None or (not is_key(arg.dtype) and np.dtype(arg.dtype) == dtype)
    if not same_shape or not same_dtype or not isinstance(arg.sharding, jax.sharding.Sharding):
        return None
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return None  # without x64; Orbax narrows it
    host = reader.read(info.name, shape, chunk_shape, dtype)
    if host is None:
        return None
    return Placement(host=host, spec=ArraySpec(shape=shape, dtype=dtype.name), sharding=arg.sharding)


def _write_beside(
    wait: Callable[[epath.Path], None], info: ParamInfo, arrays: list[kv.ArrayWrite], beside: _Beside
) -> None:
    try:
        parent = info.parent_dir
    except ValueError:  # Orbax has yet to choose and make it
        asyncio.run(info.await_path_creation())
        parent = info.parent_dir
    wait(parent)
    directory = parent / f"{_PROCESS_DIRECTORY}{multihost.process_index()}"
    directory.mkdir(parents=True, exist_ok=True)
    kv.write(os.fspath(directory), arrays, sync=True)
    beside.write(parent)


class _Written:
    """The future of what is done."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def result(self, timeout: float | None = None) -> Any:
        del timeout
        return self._value

    def cancel(self) -> bool:
        return False


@dataclass
class _Work:
    """The future of a write in a thread, which ends with the write and not before the interpreter does."""

    work: Callable[[Callable[[epath.Path], None]], None]
    timeout: float
    error: BaseException | None = None
    cancelled: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.thread = threading.Thread(target=self._run, name="jaxckpt-orbax-write", daemon=False)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.work(self._wait)
        except BaseException as error:
            self.error = error

    def _wait(self, parent: epath.Path) -> None:
        """Waits until Orbax has made the directory, which its asynchronous savers do meanwhile."""
        end = time.monotonic() + self.timeout
        while not parent.exists():
            if self.cancelled.wait(0.01):
                raise SaveError(f"the save into {parent} was cancelled")
            if time.monotonic() > end:
                raise SaveError(f"Orbax did not make the directory {parent} within {self.timeout:g} s")

    def result(self, timeout: float | None = None) -> None:
        self.thread.join(timeout)
        if self.thread.is_alive():
            raise TimeoutError(f"the arrays were not written within {timeout} s")
        if self.error is not None:
            raise self.error

    def cancel(self) -> bool:
        """Gives up the wait for the directory; a write that has begun is finished."""
        self.cancelled.set()
        return True
