"""A manager against a plain dict: whatever is done in whatever order, both say the same."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import warnings
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import jaxckpt


@dataclass
class Saved:
    """What the dict holds for each step, in the order of commits."""

    value: float
    loss: float | None
    ours: bool
    highest: int  # the highest number used up to its save
    pinned: bool = False


STEPS = st.integers(0, 25)
LOSSES = st.none() | st.sampled_from([0.0, 0.25, 1.0, math.nan, math.inf, -math.inf])


class ManagerMachine(RuleBasedStateMachine):
    @initialize(
        maximum=st.none() | st.integers(1, 3), best=st.integers(0, 2), every=st.none() | st.integers(2, 10)
    )
    def start(self, maximum, best, every):
        self.directory = tempfile.mkdtemp()
        self.options = {
            "max_to_keep": maximum, "keep_best": best, "metric": "loss", "mode": "min", "keep_every": every,
        }  # fmt: skip
        self.manager = jaxckpt.CheckpointManager(self.directory, **self.options)
        self.model: dict[int, Saved] = {}
        self.highest = 0
        self.count = 0

    def teardown(self):
        if hasattr(self, "manager"):
            self.manager.close()
            shutil.rmtree(self.directory)

    def existing(self, data):
        return data.draw(st.sampled_from(sorted(self.model)))

    def tree(self):
        self.count += 1
        return {"x": np.full(2, float(self.count))}

    def committed(self, step, loss, *, ours=True):
        self.highest = max(self.highest, step)
        old = self.model.pop(step, None)
        number = self.highest if ours else 0
        pinned = old is not None and old.pinned
        self.model[step] = Saved(float(self.count), loss, ours, number, pinned=pinned)
        if ours:
            self.retain()

    def retain(self):
        """The rules once more, in other words."""
        if self.options["max_to_keep"] is None:
            return
        ours = [step for step, saved in self.model.items() if saved.ours]
        score = lambda step: self.model[step].loss
        finite = [step for step in ours if score(step) is not None and math.isfinite(score(step))]
        finite.sort(key=lambda step: (score(step), -ours.index(step)))
        worst = [step for step in reversed(ours) if step not in finite]
        keep = {*ours[-self.options["max_to_keep"] :], *(finite + worst)[: self.options["keep_best"]]}
        every = self.options["keep_every"]
        for step in ours:
            if step not in keep and not self.model[step].pinned and not (every and step % every == 0):
                del self.model[step]

    @rule(loss=LOSSES)
    def save_next(self, loss):
        metrics = None if loss is None else {"loss": np.float32(loss)}
        future = self.manager.save(self.tree(), metrics=metrics)
        self.manager.wait()
        assert future.result().step == self.highest + 1
        self.committed(self.highest + 1, loss)

    @rule(step=STEPS, loss=LOSSES, overwrite=st.booleans())
    def save_step(self, step, loss, overwrite):
        tree = self.tree()
        metrics = None if loss is None else {"loss": loss}
        if step in self.model and not overwrite:
            with pytest.raises(jaxckpt.CheckpointExistsError):
                self.manager.save(tree, step=step)
            return
        assert self.manager.save(tree, step=step, metrics=metrics, overwrite=overwrite).result().step == step
        self.committed(step, loss)

    @rule(number=st.integers(2, 4))
    def save_several(self, number):
        """Without waiting in between."""
        steps = []
        for _ in range(number):
            self.manager.save(self.tree())
            steps.append(self.highest + 1)
            self.committed(self.highest + 1, None)
        self.manager.wait()

    @rule(step=STEPS)
    def save_by_hand(self, step):
        if step not in self.model:
            jaxckpt.save(os.path.join(self.directory, f"ckpt-{step}"), self.tree())
            self.committed(step, None, ours=False)

    @rule()
    def fail_to_save(self):
        with pytest.raises(jaxckpt.UnsupportedLeafError):
            self.manager.save({"x": object()})

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def restore_step(self, data):
        step = self.existing(data)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", jaxckpt.NewerCheckpointsWarning)
            got = self.manager.restore({"x": np.zeros(2)}, step=step).tree
        assert got["x"][0] == self.model[step].value

    @precondition(lambda self: self.model)
    @rule(data=st.data(), on=st.booleans())
    def pin(self, data, on):
        step = self.existing(data)
        other = jaxckpt.CheckpointManager(self.directory)
        (other.pin if on else other.unpin)(step)
        self.model[step].pinned = on
        assert self.manager.info(step).pinned == on

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def delete(self, data):
        step = self.existing(data)
        saved = self.model[step]
        if saved.pinned or not saved.ours:
            with pytest.raises(ValueError, match=r"pinned|by hand"):
                self.manager.delete(step)
        else:
            self.manager.delete(step)
            del self.model[step]

    @rule(lose=st.booleans())
    def restart(self, lose):
        self.manager.close()
        path = os.path.join(self.directory, "checkpoint")
        if lose and os.path.exists(path):
            os.remove(path)
            self.highest = max([0, *self.model, *(saved.highest for saved in self.model.values())])
        self.manager = jaxckpt.CheckpointManager(self.directory, **self.options)

    @invariant()
    def the_same(self):
        steps = list(self.model)
        assert self.manager.steps == steps
        assert [os.path.basename(path) for path in self.manager.checkpoints] == [
            f"ckpt-{step}" for step in steps
        ]
        newest = None if not steps else os.path.join(self.directory, f"ckpt-{steps[-1]}")
        assert self.manager.latest_checkpoint == jaxckpt.latest_checkpoint(self.directory) == newest
        got = self.manager.restore({"x": np.full(2, -1.0)}).tree
        assert got["x"][0] == (self.model[steps[-1]].value if steps else -1)
        losses = [(saved.loss, -place) for place, saved in enumerate(self.model.values())]
        finite = [pair for pair in losses if pair[0] is not None and math.isfinite(pair[0])]
        best = f"ckpt-{steps[-min(finite)[1]]}" if finite else None
        assert best == (self.manager.best and os.path.basename(self.manager.best))
        there = [name for name in os.listdir(self.directory) if name not in ("checkpoint", ".jaxckpt")]
        assert sorted(there) == sorted(f"ckpt-{step}" for step in steps)


ManagerMachine.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestManagerMachine = ManagerMachine.TestCase
