"""Who is measured: each saves in the background if it can, waits until that is durable, restores into a target.

Everyone runs with its own default settings. "Durable" is what each calls finished: Orbax and jaxckpt say so
themselves, for the plain files of `file_peers` it is an fsync of the file and of its directory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp
import orbax.checkpoint.experimental.v1 as ocp_v1

import jaxckpt
from bench import workloads
from bench.file_peers import FlaxMsgpack, NumpySavez, Raw, Safetensors


class Peer(Protocol):
    """One way to save and restore.

    Attributes:
        name: what `--peers` and the tables call it.
    """

    name: str

    def begin(self, path: Path, tree: Any) -> None:
        """Saves; returns as soon as training may go on."""
        ...

    def wait(self) -> None:
        """Returns when the checkpoint is durable."""
        ...

    def restore(self, path: Path, target: Any) -> Any:
        """What was saved, on the devices of the target (arrays or `jax.ShapeDtypeStruct`s)."""
        ...

    def same(self, result: Any, tree: Any) -> bool:
        """Whether a result of `restore` is what was saved."""
        ...

    def close(self) -> None:
        """Ends threads."""
        ...


class _InBackground:
    def same(self, result: Any, tree: Any) -> bool:
        return workloads.equal(result, tree)

    def close(self) -> None:
        pass


class Jaxckpt(_InBackground):
    """`jaxckpt.save_async` and `jaxckpt.restore`, digests on.

    Args:
        memory_limit: theirs, in bytes.
    """

    name = "jaxckpt"

    def __init__(self, memory_limit: int | None = None) -> None:
        self._limit = memory_limit
        self._future: jaxckpt.SaveFuture | None = None

    def begin(self, path: Path, tree: Any) -> None:
        self._future = jaxckpt.save_async(path, tree, memory_limit=self._limit)

    def wait(self) -> None:
        assert self._future is not None
        self._future.result()
        self._future = None

    def restore(self, path: Path, target: Any) -> Any:
        return jax.block_until_ready(jaxckpt.restore(path, target, memory_limit=self._limit).tree)


class OrbaxAsync(_InBackground):
    """Orbax's v0 `AsyncCheckpointer` around its `PyTreeCheckpointHandler`."""

    name = "orbax v0"

    def __init__(self) -> None:
        self._checkpointer = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())

    def begin(self, path: Path, tree: Any) -> None:
        self._checkpointer.save(path, args=ocp.args.PyTreeSave(tree))

    def wait(self) -> None:
        self._checkpointer.wait_until_finished()

    def restore(self, path: Path, target: Any) -> Any:
        arguments = ocp.args.PyTreeRestore(
            item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
        )
        return jax.block_until_ready(self._checkpointer.restore(path, args=arguments))

    def close(self) -> None:
        self._checkpointer.close()


class OrbaxStandard(_InBackground):
    """Orbax's v0 `StandardCheckpointer`, which saves in the background too."""

    name = "orbax v0 standard"

    def __init__(self) -> None:
        self._checkpointer = ocp.StandardCheckpointer()

    def begin(self, path: Path, tree: Any) -> None:
        self._checkpointer.save(path, tree)

    def wait(self) -> None:
        self._checkpointer.wait_until_finished()

    def restore(self, path: Path, target: Any) -> Any:
        return jax.block_until_ready(self._checkpointer.restore(path, target))

    def close(self) -> None:
        self._checkpointer.close()


class OrbaxV1(_InBackground):
    """Orbax's v1 functions."""

    name = "orbax v1"

    def __init__(self) -> None:
        self._response: Any = None

    def begin(self, path: Path, tree: Any) -> None:
        self._response = ocp_v1.save_async(path, tree)

    def wait(self) -> None:
        self._response.result()
        self._response = None

    def restore(self, path: Path, target: Any) -> Any:
        return jax.block_until_ready(ocp_v1.load(path, target))


Make = Callable[[], Peer]
PEERS: dict[str, Make] = {
    peer.name: peer
    for peer in (Jaxckpt, OrbaxAsync, OrbaxStandard, OrbaxV1, Safetensors, NumpySavez, FlaxMsgpack, Raw)
}
#: Who takes part unless others are asked for.
DEFAULT = tuple(name for name in PEERS if name != OrbaxStandard.name)
