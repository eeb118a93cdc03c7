"""Which checkpoints go: the union of the rules, by commit order."""

import math
from datetime import timedelta
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxckpt.storage.retention import CheckpointInfo, Policy, as_number, as_scalars, best, ranked, removable


def info(sequence, step=None, *, time=0.0, pinned=False, **metrics):
    step = sequence if step is None else step
    return CheckpointInfo(
        path=f"d/ckpt-{step}", step=step, sequence=sequence, time=time, metrics=metrics, pinned=pinned
    )


def kept(infos, *, owned=None, held=(), **policy):
    paths = {i.path for i in infos} if owned is None else owned
    gone = {i.path for i in removable(infos, Policy(**policy), owned=paths, held=held)}
    return [i.step for i in sorted(infos, key=lambda i: i.sequence) if i.path not in gone]


def test_the_last_ones_are_kept():
    infos = [info(i) for i in range(1, 6)]
    assert kept(infos, max_to_keep=2) == [4, 5]
    assert kept(infos, max_to_keep=9) == [1, 2, 3, 4, 5]
    assert kept(infos) == [1, 2, 3, 4, 5]
    assert kept([], max_to_keep=1) == []


def test_last_goes_by_commit_not_by_step_nor_clock():
    infos = [info(1, 10, time=90.0), info(2, 20, time=80.0), info(3, 30, time=70.0), info(4, 11, time=0.0)]
    assert kept(infos, max_to_keep=1) == [11]
    assert kept(infos, max_to_keep=2) == [30, 11]
    assert [i.step for i in removable(infos, Policy(max_to_keep=1), owned={i.path for i in infos})] == [
        10,
        20,
        30,
    ]


def test_only_owned_ones_count_and_go():
    infos = [info(i) for i in range(1, 6)]
    owned = {infos[0].path, infos[1].path, infos[3].path}
    assert kept(infos, owned=owned, max_to_keep=1) == [3, 4, 5]
    assert kept(infos, owned=set(), max_to_keep=1) == [1, 2, 3, 4, 5]


def test_pinned_and_held_ones_stay_beside_the_last():
    infos = [info(1, pinned=True), info(2), info(3), info(4)]
    assert kept(infos, max_to_keep=1, held=("d/ckpt-2",)) == [1, 2, 4]


@pytest.mark.parametrize(("mode", "expected"), [("min", [1, 5]), ("max", [3, 5])])
def test_best_ones_stay_beside_the_last(mode, expected):
    infos = [info(1, loss=0.1), info(2, loss=0.5), info(3, loss=0.9), info(4, loss=0.2), info(5)]
    assert kept(infos, max_to_keep=1, keep_best=1, metric="loss", mode=mode) == expected


@pytest.mark.parametrize("mode", ["min", "max"])
def test_nan_infinite_and_missing_rank_worst(mode):
    infos = [
        info(1, loss=math.nan), info(2, loss=math.inf), info(3, loss=-math.inf), info(4), info(5, acc=1.0), info(6, loss=3.0),
    ]  # fmt: skip
    policy = Policy(metric="loss", mode=mode)
    assert [i.step for i in ranked(infos, policy)] == [6, 5, 4, 3, 2, 1]
    assert best(infos, policy).step == 6
    assert best(infos[:5], policy) is None
    assert best([], policy) is None


def test_between_equal_metrics_the_later_one_is_better():
    assert kept(
        [info(1, a=1.0), info(2, a=1.0), info(3, a=0.0)], max_to_keep=1, keep_best=1, metric="a", mode="max"
    ) == [2, 3]


def test_metric_as_a_function():
    infos = [info(1, a=1.0, b=5.0), info(2, a=2.0, b=1.0), info(3, a=9.0), info(4)]
    policy = {"max_to_keep": 1, "keep_best": 1, "mode": "max"}
    assert kept(infos, metric=lambda m: m["a"] + m["b"], **policy) == [1, 4]
    assert kept(infos, metric=lambda m: None, **policy) == [4]
    with pytest.raises(TypeError, match="result of metric"):
        kept(infos, metric=lambda m: "good", **policy)
    with pytest.raises(ZeroDivisionError):
        kept(infos, metric=lambda m: 1 / 0, **policy)


def test_multiples_stay():
    infos = [info(i, step) for i, step in enumerate([0, 3, 10, 14, 20, 21])]
    assert kept(infos, max_to_keep=1, keep_every=10) == [0, 10, 20, 21]
    nameless = CheckpointInfo(path="d/mine", sequence=9)
    assert removable(
        [nameless, info(10)], Policy(max_to_keep=1, keep_every=1), owned={"d/mine", "d/ckpt-10"}
    ) == [nameless]


def test_one_for_each_timedelta_stays():
    infos = [info(i, time=600.0 * i) for i in range(1, 14)]
    assert kept(infos, max_to_keep=1, keep_every=timedelta(hours=1)) == [1, 7, 13]
    # Deciding again on what is left changes nothing.
    left = [i for i in infos if i.sequence in (1, 7, 13)]
    assert kept(left, max_to_keep=1, keep_every=timedelta(hours=1)) == [1, 7, 13]


def test_a_clock_that_was_set_back_empties_nothing():
    infos = [
        info(1, time=1e9),
        info(2, time=1e9 + 4000),
        info(3, time=500.0),
        info(4, time=600.0),
        info(5, time=4600.0),
    ]
    assert kept(infos, max_to_keep=1, keep_every=timedelta(hours=1)) == [1, 2, 3, 5]


def test_keep_as_a_function():
    infos = [info(i) for i in range(1, 6)]
    seen = []
    assert kept(infos, max_to_keep=1, keep=lambda given: seen.append(given) or given[1:2]) == [2, 5]
    assert [i.sequence for i in seen[0]] == [1, 2, 3, 4, 5]
    assert kept(infos, max_to_keep=1, keep=lambda given: set(given)) == [1, 2, 3, 4, 5]
    with pytest.raises(TypeError, match=r"keep= must return .* not 3"):
        kept(infos, max_to_keep=1, keep=lambda given: [3])


@given(
    steps=st.lists(st.integers(0, 30), unique=True, max_size=12),
    maximum=st.integers(1, 4),
    count=st.integers(0, 3),
    every=st.none() | st.integers(1, 7),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_the_union_is_never_less_than_its_parts(steps, maximum, count, every, data):
    metric = st.sampled_from([0.0, 1.0, 2.0, math.nan, math.inf])
    infos = [
        info(n, step, pinned=data.draw(st.booleans()), loss=data.draw(metric))
        for n, step in enumerate(steps, start=1)
    ]
    owned = {i.path for i in infos if data.draw(st.booleans())}
    held = {i.path for i in infos if data.draw(st.booleans())}
    policy = Policy(max_to_keep=maximum, keep_best=count, metric="loss", mode="min", keep_every=every)
    gone = removable(infos, policy, owned=owned, held=held)
    ours = [i for i in infos if i.path in owned]
    finite = sorted(
        (i for i in ours if math.isfinite(i.metrics["loss"])), key=lambda i: (i.metrics["loss"], -i.sequence)
    )
    kept_ones = {*ours[-maximum:], *finite[:count], *infos[-1:]}
    kept_ones |= {i for i in infos if i.pinned or i.path in held or (every and i.step % every == 0)}
    assert not kept_ones & set(gone)
    assert {i.path for i in gone} <= owned
    assert len(ours) - len(gone) <= maximum + count + len(kept_ones)
    assert removable([i for i in infos if i not in gone], policy, owned=owned, held=held) == []


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"max_to_keep": 0}, ValueError, "max_to_keep must be at least 1"),
        ({"max_to_keep": -1}, ValueError, "max_to_keep"),
        ({"max_to_keep": 2.0}, TypeError, "max_to_keep must be an int"),
        ({"max_to_keep": True}, TypeError, "max_to_keep must be an int"),
        ({"keep_best": -1}, ValueError, "keep_best"),
        ({"keep_best": 1}, ValueError, "keep_best needs metric="),
        ({"keep_best": 1, "metric": "loss"}, ValueError, "metric= and mode= go together"),
        ({"metric": "loss"}, ValueError, "metric= and mode= go together"),
        ({"mode": "min"}, ValueError, "metric= and mode= go together"),
        ({"metric": "loss", "mode": "lowest"}, ValueError, "mode must be 'min' or 'max'"),
        ({"metric": 3, "mode": "min"}, TypeError, "metric must be a name"),
        ({"keep_every": 0}, ValueError, "keep_every must be positive"),
        ({"keep_every": timedelta(0)}, ValueError, "keep_every must be positive"),
        ({"keep_every": 1.5}, TypeError, "keep_every must be an int"),
        ({"keep": 3}, TypeError, "keep must be a function"),
    ],
)
def test_a_policy_says_what_is_wrong_with_it(options, error, words):
    with pytest.raises(error, match=words):
        Policy(**options)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, 1.0), (0.5, 0.5), (True, 1.0), (np.float32(0.5), 0.5), (np.int64(3), 3.0), (np.array(2.5), 2.5),
        (ml_dtypes.bfloat16(0.5), 0.5), (np.array(0.5, ml_dtypes.bfloat16), 0.5), (Fraction(1, 2), 0.5),
        (math.inf, math.inf), (np.float64("-inf"), -math.inf), (10**400, math.inf), (-(10**400), -math.inf),
    ],
)  # fmt: skip
def test_numbers(value, expected):
    result = as_number("metric 'x'", value)
    assert type(result) is float
    assert result == expected


def test_jax_scalars_and_nan_are_numbers():
    import jax.numpy as jnp

    assert as_scalars({"a": jnp.float32(0.5), "b": jnp.bfloat16(2), "c": jnp.int32(3)}) == {
        "a": 0.5,
        "b": 2.0,
        "c": 3.0,
    }
    assert math.isnan(as_scalars({"a": float("nan")})["a"])
    assert as_scalars(None) is None


@pytest.mark.parametrize(
    "value",
    [
        "0.5",
        b"1",
        None,
        [1.0],
        {},
        1j,
        np.complex64(1),
        np.ones(1),
        np.array("0.5"),
        np.datetime64("2020"),
        object(),
    ],
)
def test_a_non_number_is_refused_by_name(value):
    with pytest.raises(TypeError, match="metric 'loss' must be a number"):
        as_scalars({"loss": value})


def test_a_metric_needs_a_name():
    with pytest.raises(TypeError, match="name of a metric"):
        as_scalars({3: 1.0})
