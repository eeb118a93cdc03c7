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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import jax
import numpy as np
from etils import epath
from jax.sharding import NamedSharding, SingleDeviceSharding
from msgspec import Struct
from orbax.checkpoint import metadata as orbax_metadata
from orbax.checkpoint import multihost, type_handlers

from jaxckpt.errors import CheckpointError
from jaxckpt.graph.model import ArraySpec
from jaxckpt.storage import kv
from jaxckpt.storage.chunks import grid
from jaxckpt.storage.format.dtypes import ORBAX_DTYPES
from jaxckpt.storage.format.zarr import ZarrReader
from jaxckpt.storage.hold import Borrowed, Buffer, hold_all, is_key
from jaxckpt.storage.kv_dump import locate
from jaxckpt.storage.place import Placement, place
from jaxckpt.storage.plan import Item, prepare
from jaxckpt.storage.work import Done, Work

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from orbax.checkpoint import future
    from orbax.checkpoint.type_handlers import ParamInfo, RestoreArgs, SaveArgs

_T = TypeVar("_T")
# Orbax merges every database of a name that begins so; in `ocdbt.process_0` its other handlers write.
_PROCESS_DIRECTORY = "ocdbt.process_jaxckpt"
# Arrays read before they are put on devices.
_BATCH_BYTES = 256 << 20


@dataclass
class ChunkArgs(type_handlers.SaveArgs):
    """How to store one array.

    Attributes:
        item: how; None for what follows from the array's shape and sharding.
    """

    item: Item | None = None


class Direct(Struct, frozen=True, kw_only=True):
    """A save of jaxckpt's own: what else `kv.write` is to know."""

    aliases: Sequence[tuple[str, str]] = ()
    memory_limit: int = 1 << 30
    progress: Callable[[], object] | None = None


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
        if self._direct is not None and isinstance(args, _PlannedArgs):
            written = _write_direct(os.fspath(infos[0].parent_dir), args.items, values, self._direct)
            return [cast("future.Future", Done(written))]
        if self._orbax_options or not all(map(_is_ours, values, infos, args)):
            return await super().serialize(values, infos, args)
        held = hold_all(values).arrays
        items = [_item(*each) for each in zip(values, held, infos, args, strict=True)]
        beside = _Beside.of(values, infos, items)
        work = Work(lambda wait: _write_beside(wait, infos[0], items, held, beside), self._timeout)
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
    items: Sequence[Item],
    buffers: Sequence[Buffer | Borrowed],
    aliases: Sequence[tuple[str, str]] = (),
    *,
    memory_limit: int = 1 << 30,
    progress: Callable[[], object] | None = None,
) -> kv.Written:
    """`kv.write`, through the handler.

    Raises:
        SaveError: as `kv.write` does.
    """
    direct = Direct(aliases=aliases, memory_limit=memory_limit, progress=progress)
    if not items:  # a handler has nothing to do, and a checkpoint is to have a database
        return _write_direct(directory, items, buffers, direct)
    infos = _PlannedInfos(items, epath.Path(directory))
    [written] = _run(GraphArrayHandler(direct=direct).serialize(buffers, infos, _PlannedArgs(items)))
    return written.result()


def _write_direct(
    directory: str, items: Sequence[Item], buffers: Sequence[Buffer | Borrowed], direct: Direct
) -> kv.Written:
    return kv.write(
        directory,
        items,
        buffers,
        direct.aliases,
        memory_limit=direct.memory_limit,
        progress=direct.progress,
    )


def _run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """The result of a coroutine: one that never waits needs no event loop."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        return done.value
    raise RuntimeError("a handler that writes in place has waited")


class _Planned(Sequence[_T]):
    """What Orbax's interface wants to be told of each array, made when it is asked for: 2 us each."""

    def __init__(self, items: Sequence[Item]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        items = self.items[index]
        return [self._make(item) for item in items] if isinstance(index, slice) else self._make(items)

    def _make(self, item: Any) -> Any:
        raise NotImplementedError


class _PlannedInfos(_Planned["ParamInfo"]):
    def __init__(self, items: Sequence[Item], parent: epath.Path) -> None:
        super().__init__(items)
        self._parent, self._context = parent, kv.context()

    def _make(self, item: Item) -> Any:
        name = item.names[0].rpartition("/")[0] if item.names else (item.document or ("",))[0]
        return type_handlers.ParamInfo(
            name=name,
            parent_dir=self._parent,
            path=self._parent,  # of no use in a database
            is_ocdbt_checkpoint=True,
            ts_context=self._context,
        )


class _PlannedArgs(_Planned["SaveArgs"]):
    def _make(self, item: Item) -> Any:
        return ChunkArgs(item=item)


def _item(value: Any, host: np.ndarray[Any, Any], info: ParamInfo, arg: SaveArgs) -> Item:
    if isinstance(arg, ChunkArgs) and arg.item is not None:
        return arg.item
    chunk_shape = grid(host.shape, host.dtype.itemsize, _shard_shape(value, host.shape))
    return prepare(info.name, host.shape, host.dtype, chunk_shape)


def _shard_shape(value: Any, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """Shape of a shard; of keys with all of their bits."""
    if not isinstance(value, jax.Array):
        return None
    shard = value.sharding.shard_shape(value.shape)
    return tuple(shard) + shape[value.ndim :]


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
    def of(cls, values: Sequence[Any], infos: Sequence[ParamInfo], items: Sequence[Item]) -> _Beside:
        shardings: dict[str, str] = {}
        metadatas: list[dict[str, Any]] = []
        for value, info, item in zip(values, infos, items, strict=True):
            sharding = _sharding_string(value.sharding)
            if sharding is not None:
                shardings[base64.urlsafe_b64encode(info.name.encode()).decode()] = sharding
            impl = {"random_key_impl": str(jax.random.key_impl(value))} if is_key(value.dtype) else None
            document = {
                "param_name": info.name,
                "write_shape": list(item.shape),
                "chunk_shape": list(item.chunk_shape),
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
        reader = ZarrReader(directory, locate(directory))
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
    wait: Callable[[epath.Path], None],
    info: ParamInfo,
    items: Sequence[Item],
    held: Sequence[Buffer],
    beside: _Beside,
) -> None:
    try:
        parent = info.parent_dir
    except ValueError:  # Orbax has yet to choose and make it
        asyncio.run(info.await_path_creation())
        parent = info.parent_dir
    wait(parent)
    directory = parent / f"{_PROCESS_DIRECTORY}{multihost.process_index()}"
    directory.mkdir(parents=True, exist_ok=True)
    kv.write(os.fspath(directory), items, held, sync=True)
    beside.write(parent)
