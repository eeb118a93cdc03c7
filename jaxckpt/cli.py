"""The command line: ``jaxckpt demo``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="jaxckpt", description="Checkpoints of JAX programs.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo", help="train on handwritten digits, be killed in the middle of a save, resume bit for bit"
    )
    demo.add_argument(
        "directory",
        nargs="?",
        help="its checkpoints go into DIRECTORY/jaxckpt-demo, or the first such name that is free "
        "(default: a temporary directory)",
    )
    options = parser.parse_args(arguments)
    from jaxckpt import demo as program  # imports jax and flax, which `--help` can do without

    return program.main(options.directory)
