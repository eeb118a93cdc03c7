"""Saves that are numbered by hand: ``prefix-1``, ``prefix-2``, ... as `tf.train.Checkpoint.save` does."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from jaxckpt.errors import CheckpointExistsError
from jaxckpt.saving import Order, submit
from jaxckpt.storage import directory as directories
from jaxckpt.storage import state


def save_numbered(tree: Any, prefix: str | os.PathLike[str], **options: Any) -> str:
    """Saves as ``prefix-N`` and returns that path; N is one more than any number ever used there.

    Args:
        tree: as of `save`.
        prefix: a directory and the start of a name.
        **options: of `save`.

    Raises:
        UnsupportedFormatError: the directory is TensorFlow's.
    """
    directory, name = os.path.split(os.path.abspath(os.fspath(prefix)))
    state.check_ours(directory)
    while True:
        known = state.view(directory)
        names = os.listdir(directory) if os.path.isdir(directory) else []
        number = state.next_number(known, names, name)
        order = Order(path=os.path.join(directory, f"{name}-{number}"), save_counter=number, **options)
        with contextlib.suppress(CheckpointExistsError):  # another process was faster: take the next number
            path = submit(tree, order).result().path
            break
    with directories.saving(directory):
        state.store(directory, state.view(directory))
    return path
