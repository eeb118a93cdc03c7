"""When a manager saves."""

from datetime import timedelta

import numpy as np
import pytest

from jaxckpt.cadence import LastSave, as_step, check_rule, is_due, refuse_integer


def saved_steps(rule, steps):
    last, saved = None, []
    for step in steps:
        if is_due(rule, step=step, last=last, now=0.0):
            last = LastSave(step=step, time=0.0)
            saved.append(step)
    return saved


def test_without_a_rule_every_call_saves():
    assert saved_steps(None, [1, 2, 2, 3]) == [1, 2, 2, 3]


def test_the_first_call_and_every_multiple_that_was_passed():
    assert saved_steps(10, range(1, 51)) == [1, 10, 20, 30, 40, 50]
    assert saved_steps(10, range(3, 60, 7)) == [3, 10, 24, 31, 45, 52]  # strides of 7 meet no multiple but 10
    assert saved_steps(10, [5, 100]) == [5, 100]
    assert saved_steps(10, [20, 20, 29]) == [20]
    assert saved_steps(1, [1, 1, 2]) == [1, 2]


def test_a_rewind_does_not_starve():
    assert saved_steps(10, [30, 11, 12, 20]) == [30, 11, 20]


def test_timedelta_goes_by_the_clock_of_the_observer():
    minute = timedelta(minutes=1)
    assert is_due(minute, step=1, last=None, now=5.0)
    assert not is_due(minute, step=9, last=LastSave(step=1, time=5.0), now=64.9)
    assert is_due(minute, step=1, last=LastSave(step=1, time=5.0), now=65.0)


def test_a_function_decides_alone():
    assert saved_steps(lambda step: step in (3, 5), range(8)) == [3, 5]


@pytest.mark.parametrize("rule", [0, -1, timedelta(0), timedelta(seconds=-1)])
def test_no_rule_without_a_positive_interval(rule):
    with pytest.raises(ValueError, match="save_every must be positive"):
        check_rule(rule)


@pytest.mark.parametrize("rule", ["10", 1.5, True])
def test_no_rule_of_another_type(rule):
    with pytest.raises(TypeError, match="save_every must be an int"):
        check_rule(rule)


def test_steps_are_integers_of_any_kind():
    import jax.numpy as jnp

    assert [as_step(s) for s in (0, np.int32(3), jnp.int32(4))] == [0, 3, 4]
    for wrong in (1.0, "1", True, None, jnp.ones(3, int), jnp.float32(1)):
        with pytest.raises(TypeError, match="step must be an integer"):
            as_step(wrong)
    with pytest.raises(ValueError, match="negative"):
        as_step(-1)


def test_a_bare_integer_is_told_the_spelling():
    for value in (7, np.int64(7)):
        with pytest.raises(TypeError, match=r"manager.restore\(target, step=7\)"):
            refuse_integer("restore", "target", value)
    for value in (None, {"a": 1}, True, 1.0, np.float32(1)):
        refuse_integer("restore", "target", value)
