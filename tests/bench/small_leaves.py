"""Many small leaves: jaxckpt beside Orbax, `python tests/bench/small_leaves.py [--json PATH]`.

5000 float32 arrays of 1 KiB, where the cost of each leaf is all there is. Prints the medians of: how long the
call of save blocks, how long until the checkpoint is durable, how long a restore into a target takes.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parents[1])
)  # run as a script, its package is not on the path

from bench import run, workloads
from bench.peers import PEERS


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--leaves", type=int, default=5000)
    parser.add_argument("--bytes", type=int, default=1024, help="of each leaf (default: 1024)")
    parser.add_argument(
        "--rounds", type=int, default=5, help="that count, after one that does not (default: 5)"
    )
    parser.add_argument("--directory", help="where to write (default: the system's temporary directory)")
    parser.add_argument("--json", type=Path, help="also write every figure there")
    options = parser.parse_args(arguments)
    tree = workloads.small_leaves(options.leaves, options.bytes)
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        times = run.measure(PEERS, tree, Path(directory), rounds=options.rounds)
    print(f"{options.leaves} leaves of {options.bytes} bytes, medians of {options.rounds} rounds:")
    print(run.table(times))
    if options.json:
        run.write_json(options.json, run.report("small_leaves", tree, times))
    return 0


if __name__ == "__main__":
    sys.exit(main())
