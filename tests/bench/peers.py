"""Who is measured. Each peer saves in the background, waits until the save is durable, and restores into a target."""

from pathlib import Path
from typing import Any, Protocol

import jax
import orbax.checkpoint as ocp

import jaxckpt


class Peer(Protocol):
    """One way to save and restore.

    `begin` returns as soon as training may go on, `wait` when the checkpoint is durable.
    """

    name: str

    def begin(self, path: Path, tree: Any) -> None: ...

    def wait(self) -> None: ...

    def restore(self, path: Path, target: Any) -> Any: ...

    def close(self) -> None: ...


class Jaxckpt:
    name = "jaxckpt"

    def __init__(self) -> None:
        self._future: jaxckpt.SaveFuture | None = None

    def begin(self, path: Path, tree: Any) -> None:
        self._future = jaxckpt.save_async(path, tree)

    def wait(self) -> None:
        assert self._future is not None
        self._future.result()

    def restore(self, path: Path, target: Any) -> Any:
        return jax.block_until_ready(jaxckpt.restore(path, target).tree)

    def close(self) -> None:
        pass


class OrbaxStandard:
    """Orbax's v0 `StandardCheckpointer`, which saves in the background; its own settings."""

    name = "orbax StandardCheckpointer"

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


class OrbaxAsync:
    """Orbax's v0 `AsyncCheckpointer` around its `PyTreeCheckpointHandler`; its own settings."""

    name = "orbax AsyncCheckpointer"

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


PEERS = (Jaxckpt, OrbaxStandard, OrbaxAsync)
