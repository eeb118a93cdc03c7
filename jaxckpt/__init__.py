"""jaxckpt: a pytree-native functional checkpointer for JAX.

A checkpoint is a named graph of values: `save` flattens an immutable pytree into it, `restore` finds
every value again by its name. The names below are imported when they are first used, so that
``import jaxckpt`` itself imports neither jax nor numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxckpt.checkpoint import Checkpoint as Checkpoint
    from jaxckpt.errors import CheckpointError as CheckpointError
    from jaxckpt.errors import CheckpointExistsError as CheckpointExistsError
    from jaxckpt.errors import CheckpointNotFoundError as CheckpointNotFoundError
    from jaxckpt.errors import CheckpointWarning as CheckpointWarning
    from jaxckpt.errors import CorruptCheckpointError as CorruptCheckpointError
    from jaxckpt.errors import CorruptCheckpointWarning as CorruptCheckpointWarning
    from jaxckpt.errors import DirectoryInUseError as DirectoryInUseError
    from jaxckpt.errors import NewerCheckpointsWarning as NewerCheckpointsWarning
    from jaxckpt.errors import Problem as Problem
    from jaxckpt.errors import RestoreAssertionError as RestoreAssertionError
    from jaxckpt.errors import RestoreError as RestoreError
    from jaxckpt.errors import RestoreIgnoredWarning as RestoreIgnoredWarning
    from jaxckpt.errors import SaveError as SaveError
    from jaxckpt.errors import SlotsLeftOutWarning as SlotsLeftOutWarning
    from jaxckpt.errors import UnsupportedFormatError as UnsupportedFormatError
    from jaxckpt.errors import UnsupportedLeafError as UnsupportedLeafError
    from jaxckpt.graph.flatten import object_graph as object_graph
    from jaxckpt.graph.marks import Optimizer as Optimizer
    from jaxckpt.graph.marks import Values as Values
    from jaxckpt.graph.model import ObjectGraph as ObjectGraph
    from jaxckpt.graph.status import RestoreStatus as RestoreStatus
    from jaxckpt.listing import checkpoints_iterator as checkpoints_iterator
    from jaxckpt.listing import latest_checkpoint as latest_checkpoint
    from jaxckpt.manager import CheckpointManager as CheckpointManager
    from jaxckpt.reader import CheckpointReader as CheckpointReader
    from jaxckpt.reader import list_variables as list_variables
    from jaxckpt.reader import load_checkpoint as load_checkpoint
    from jaxckpt.report import SaveReport as SaveReport
    from jaxckpt.restored import Restored as Restored
    from jaxckpt.restoring import restore as restore
    from jaxckpt.saving import save as save
    from jaxckpt.saving import save_async as save_async
    from jaxckpt.storage.retention import CheckpointInfo as CheckpointInfo
    from jaxckpt.writer import SaveFuture as SaveFuture

__version__ = "0.1.0"

_HOMES = {
    "checkpoint": ["Checkpoint"],
    "errors": [
        "CheckpointError",
        "CheckpointExistsError",
        "CheckpointNotFoundError",
        "CheckpointWarning",
        "CorruptCheckpointError",
        "CorruptCheckpointWarning",
        "DirectoryInUseError",
        "NewerCheckpointsWarning",
        "Problem",
        "RestoreAssertionError",
        "RestoreError",
        "RestoreIgnoredWarning",
        "SaveError",
        "SlotsLeftOutWarning",
        "UnsupportedFormatError",
        "UnsupportedLeafError",
    ],
    "graph.flatten": ["object_graph"],
    "graph.marks": ["Optimizer", "Values"],
    "graph.model": ["ObjectGraph"],
    "graph.status": ["RestoreStatus"],
    "listing": ["checkpoints_iterator", "latest_checkpoint"],
    "manager": ["CheckpointManager"],
    "reader": ["CheckpointReader", "list_variables", "load_checkpoint"],
    "report": ["SaveReport"],
    "restoring": ["restore"],
    "restored": ["Restored"],
    "saving": ["save", "save_async"],
    "storage.retention": ["CheckpointInfo"],
    "writer": ["SaveFuture"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = sorted(_HOME_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'jaxckpt' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"jaxckpt.{_HOME_OF[name]}"), name)
    globals()[name] = value  # the next look-up does not come here
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
