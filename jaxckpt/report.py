"""What a save did."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """What a save did.

    Attributes:
        path: the checkpoint.
        step: the step it was saved as, or None.
        nbytes: bytes of all its files.
        nbytes_shared: how many of them it has in common with an earlier checkpoint.
        leaves: how many leaves have a value in it, slots included.
        slots: how many of them are slots.
        slots_left_out: slots of optimizers whose variables are not in the tree.
        not_saved: keys of callables: program, not state.
        hidden_from_orbax: keys that plain Orbax does not see in it, since it has no spelling for them.
        seconds_blocked: how long the call kept its caller.
        seconds: from the call to the commit.
        stages: seconds of each stage, in order.
    """

    path: str
    step: int | None = None
    nbytes: int = 0
    nbytes_shared: int = 0
    leaves: int = 0
    slots: int = 0
    slots_left_out: int = 0
    not_saved: tuple[str, ...] = ()
    hidden_from_orbax: tuple[str, ...] = ()
    seconds_blocked: float = 0.0
    seconds: float = 0.0
    stages: Mapping[str, float] = field(default_factory=dict[str, float])
