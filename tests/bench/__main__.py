"""jaxckpt beside Orbax, safetensors, numpy, flax msgpack and the bare file: `python tests/bench`.

Prints, for each workload: how long the call of save blocks, how long until the checkpoint is durable, how long a
restore onto the device takes from a warm page cache, the files and bytes it writes, and by how much memory grows at
the peak of a save and of a restore (whose result is in it). Then what the floors are, what one leaf out of many
costs, what digests cost, and what memory does; then all that is asked of jaxckpt beside what was measured.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

if not __package__:  # run as a directory: its package is not on the path
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from bench import bars, chart, memory, report, special, timing, workloads
from bench.peers import DEFAULT, PEERS


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures and prints; returns the exit code."""
    options = _options(arguments)
    say = partial(print, flush=True)
    measured: dict[str, Any] = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "machine": report.machine(),
        "rounds": options.rounds,
        "quick": options.quick,
        "workloads": {},
        "special": {},
        "bars": [],
    }
    say(", ".join(f"{key} {value}" for key, value in measured["machine"].items()))
    if options.quick:
        say("Quick: states are smaller than their titles say; the figures tell only that everything runs.")
    with tempfile.TemporaryDirectory(dir=options.directory) as inside:
        for name in options.only:
            if name in special.SPECIAL:
                told = _special(name, Path(inside), options)
                measured["special"][name] = told
                say(f"\n{report.special_table(told)}")
            else:
                told = _workload(name, Path(inside), options)
                measured["workloads"][name] = told
                say(f"\n{report.workload_table(told)}")
            _write(measured, options)  # after each: what was measured is not lost with what comes
    found = bars.bars(measured)
    measured["bars"] = report.bars_json(found)
    if found:
        say(f"\n{report.bars_table(found)}")
    _write(measured, options)
    return 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    names = [*workloads.workloads(quick=True), *special.SPECIAL]
    parser = argparse.ArgumentParser(
        prog="python tests/bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="small states and few rounds: whether it runs")
    parser.add_argument(
        "--only", action="append", choices=names, metavar="NAME", help=f"of {', '.join(names)}"
    )
    parser.add_argument("--peers", help=f"of {', '.join(PEERS)} (default: {', '.join(DEFAULT)})")
    parser.add_argument(
        "--rounds", type=int, help="that count, after one that does not (default: 5, quick 2)"
    )
    parser.add_argument("--no-memory", action="store_true", help="measure no memory, which takes processes")
    parser.add_argument("--directory", type=Path, help="where to write (default: the system's temporary one)")
    parser.add_argument("--json", type=Path, help="also write every figure there")
    parser.add_argument("--svg", type=Path, help="also draw a chart there")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.only = options.only or [name for name in names if not (options.no_memory and name in _MEMORY)]
    options.peers = [name.strip() for name in options.peers.split(",")] if options.peers else list(DEFAULT)
    unknown = [name for name in options.peers if name not in PEERS]
    if unknown:
        parser.error(f"there is no peer {', '.join(unknown)}; there are {', '.join(PEERS)}")
    return options


_MEMORY = ("memory-limit", "saves-in-a-row")


def _workload(name: str, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    log = partial(print, file=sys.stderr, flush=True)
    chosen = workloads.workloads(quick=options.quick)[name]
    log(name)
    abstract = chosen.abstract()
    makes = [PEERS[peer] for peer in options.peers]
    found = timing.measure(makes, workloads.noise(abstract), directory, rounds=options.rounds, log=log)
    grown: dict[str, Any] = {}
    for peer in [] if options.no_memory else options.peers:
        log(f"  memory of {peer}")
        grown[peer] = memory.peaks(name, peer, directory, quick=options.quick)
    return report.workload(chosen.title, abstract, found, grown)


def _special(name: str, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    print(name, file=sys.stderr, flush=True)
    title, measure = special.SPECIAL[name]
    contenders = measure(directory, quick=options.quick, rounds=options.rounds)
    return {"title": title, "unit": "bytes" if name in _MEMORY else "seconds", "contenders": contenders}


def _write(measured: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        options.json.write_text(json.dumps(measured, indent=1) + "\n")
    if options.svg and measured["workloads"]:
        options.svg.write_text(chart.draw(measured))


if __name__ == "__main__":
    sys.exit(main())
