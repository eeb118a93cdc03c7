"""What is asked of jaxckpt beside what was measured. Nothing fails here: a time is no test."""

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bench import workloads
from bench.timing import ratio

#: What a save may hold in copies, and a restore besides its result, unless it is told otherwise.
DEFAULT_LIMIT = 2 * workloads.GIB
_LEAF = workloads.KIB

Measured = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One line.

    Attributes:
        what: the workload and the figure.
        against: what with.
        bar: what is asked.
        value: what was measured, in words.
        met: whether that is what was asked.
    """

    what: str
    against: str
    bar: str
    value: str
    met: bool


def bars(measured: Measured) -> list[Bar]:
    """Each line whose figures were measured."""
    found: list[Bar] = []
    for lines in (_small, _large, _one_leaf, _digests, _limits, _row):
        for line in lines(measured):
            try:
                found.append(line())
            except KeyError:  # left out of this run
                continue
    return found


Lines = list[Callable[[], Bar]]


def _small(measured: Measured) -> Lines:
    peers = measured["workloads"].get("5000x1KiB", {}).get("peers", {})
    special = measured["special"]

    def faster(field: str, peer: str, least: float) -> Bar:
        times = ratio(peers[peer][field], peers["jaxckpt"][field])
        return Bar(
            what=f"5000 x 1 KiB, {field}",
            against=peer,
            bar=f"at least {least:g}x faster",
            value=f"{times:.1f}x",
            met=times >= least,
        )

    def floor(name: str, own: str, others: list[str], most: float | None, what: str) -> Bar:
        contenders = special[name]["contenders"]
        best = min(others, key=lambda other: statistics.median(contenders[other]["seconds"]))
        times = ratio(contenders[own]["seconds"], contenders[best]["seconds"])
        return Bar(
            what=what,
            against=f"the floor: {best}",
            bar="is shown" if most is None else f"at most {most:g}x",
            value=f"{times:.2f}x",
            met=most is None or times <= most,
        )

    def making() -> Bar:
        names = [name for name in special["floor-of-making"]["contenders"] if name != "jaxckpt.restore"]
        return floor("floor-of-making", "jaxckpt.restore", names, None, "5000 x 1 KiB, restore")

    blocked = "5000 x 1 KiB, blocked, later saves"
    asarray = ["np.asarray of each leaf"]
    return [
        lambda: faster("save", "orbax v0", 40),
        lambda: faster("blocked", "orbax v0", 20),
        lambda: faster("restore", "orbax v0", 40),
        lambda: _at_most(peers, "5000 x 1 KiB", "restore", "safetensors", 1.5),
        making,
        lambda: floor("floor-of-blocking", "save_async, later saves", asarray, 1.7, blocked),
        lambda: _files(peers),
    ]


def _files(peers: Any) -> Bar:
    files = int(max(peers["jaxckpt"]["files"]))
    return Bar(what="5000 x 1 KiB, files", against="", bar="at most 10", value=f"{files}", met=files <= 10)


def _at_most(peers: Any, workload: str, field: str, peer: str, most: float) -> Bar:
    times = ratio(peers["jaxckpt"][field], peers[peer][field])
    return Bar(
        what=f"{workload}, {field}",
        against=peer,
        bar="no longer" if most == 1 else f"at most {most:g}x",
        value=f"{times:.2f}x",
        met=times <= most,
    )


def _large(measured: Measured) -> Lines:
    peers = measured["workloads"].get("100x10MiB", {}).get("peers", {})

    def faster() -> Bar:
        times = ratio(peers["orbax v0"]["save"], peers["jaxckpt"]["save"])
        raw = ratio(peers["jaxckpt"]["save"], peers["raw"]["save"])
        return Bar(
            what="100 x 10 MiB, save",
            against="orbax v0",
            bar="at least 3x faster, or 1.2x raw",
            value=f"{times:.2f}x, {raw:.2f}x raw",
            met=times >= 3 or raw <= 1.2,
        )

    return [
        lambda: _at_most(peers, "100 x 10 MiB", "save", "raw", 1.2),
        faster,
        lambda: _at_most(peers, "100 x 10 MiB", "restore", "safetensors", 1.1),
        lambda: _at_most(peers, "100 x 10 MiB", "blocked", "orbax v0", 1.0),
    ]


def _one_leaf(measured: Measured) -> Lines:
    def one(cache: str) -> Bar:
        figures = measured["special"]["one-leaf"]["contenders"][cache]
        read, nbytes = statistics.median(figures["read"]), int(max(figures["nbytes"]))
        return Bar(
            what=f"1 KiB out of 1 GiB, {cache} cache",
            against="",
            bar="at most 10 ms, leaf + 256 KiB",
            value=f"{read * 1000:.2f} ms, leaf + {nbytes - _LEAF} B",
            met=read <= 0.01 and nbytes <= _LEAF + 256 * workloads.KIB,
        )

    return [lambda: one("warm"), lambda: one("cold")]


def _digests(measured: Measured) -> Lines:
    def one(field: str) -> Bar:
        with_them, without = (
            measured["special"]["digests"]["contenders"][name] for name in ("with", "without")
        )
        more = ratio(with_them[field], without[field]) - 1
        work = ratio(with_them[f"{field}, CPU"], without[f"{field}, CPU"]) - 1
        told = field == "restore, warm"
        return Bar(
            what=f"digests, {field}",
            against="without",
            bar="is shown" if told else "at most 5 % more",
            value=f"{more:+.1%}, CPU time {work:+.1%}",
            met=told or more <= 0.05,
        )

    return [lambda field=field: one(field) for field in ("save", "restore, cold", "restore, warm")]


def _limits(measured: Measured) -> Lines:
    def one(figures: Any, name: str, action: str) -> Bar:
        limit = figures.get("limit", [DEFAULT_LIMIT])[0]
        grown = figures[action][0] - (figures["result"][0] if action == "restore" else 0)
        return Bar(
            what=f"100 x 10 MiB, peak of a {action}, limit {name}",
            against="the state" if action == "save" else "the result",
            bar=f"at most {workloads.size(limit)} more",
            value=f"{grown / workloads.MIB:+.0f} MiB",
            met=grown <= limit,
        )

    contenders = measured["special"].get("memory-limit", {}).get("contenders", {})
    return [
        lambda figures=figures, name=name, action=action: one(figures, name, action)
        for name, figures in contenders.items()
        for action in ("save", "restore")
    ]


def _row(measured: Measured) -> Lines:
    def one() -> Bar:
        grown = measured["special"]["saves-in-a-row"]["contenders"]["jaxckpt"]["above the state"]
        early, late = max(grown[:3]), max(grown[-3:])
        slack = 16 * workloads.MIB  # what an allocator may keep for itself
        return Bar(
            what="100 x 10 MiB, ten saves in a row",
            against="the first three",
            bar="does not ratchet",
            value=f"{early / workloads.MIB:.0f} MiB, then {late / workloads.MIB:.0f} MiB",
            met=late <= early + slack,
        )

    return [one]
