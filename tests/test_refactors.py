"""Every moment and count survives a change of the optax chain, through real files, bit for bit."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import transforms
from toy_training import assert_same, by_path, fresh, params, same_bits, states, trained, zeros

import jaxckpt

SCHEDULE = optax.cosine_decay_schedule(1e-2, 100)
ALL = {"l1": True, "l2": True}
FIRST = {"l1": True, "l2": False}
SPLIT = {"l1": "a", "l2": "b"}
ADAM = optax.adam(1e-2)


def named(name, *stages):
    return optax.named_chain(*[(f"{name}{place}", stage) for place, stage in enumerate(stages)])


class Refactor(NamedTuple):
    """One way to write adam. `new`: state classes that plain adam has not got, counts among them."""

    optimizer: optax.GradientTransformation
    new: tuple[type, ...] = ()
    part: bool = False  # adam on some of the parameters only


REFACTORS = {
    "clip_before": Refactor(optax.chain(optax.clip_by_global_norm(1.0), ADAM)),
    "clip_after": Refactor(optax.chain(ADAM, optax.clip(1.0))),
    "zero_nans_around": Refactor(
        optax.chain(optax.zero_nans(), optax.chain(optax.identity(), ADAM), optax.ema(0.9)),
        (optax.ZeroNansState, optax.EmaState),
    ),
    "trace_before": Refactor(optax.chain(optax.trace(0.9), ADAM), (optax.TraceState,)),
    "by_hand": Refactor(optax.chain(optax.scale_by_adam(), optax.scale(-1e-2))),
    "bare": Refactor(optax.scale_by_adam()),
    "adamw": Refactor(optax.adamw(1e-2)),
    "nadam": Refactor(optax.nadam(1e-2)),
    "lamb": Refactor(optax.lamb(1e-2)),
    "schedule": Refactor(optax.adam(SCHEDULE), (optax.ScaleByScheduleState,)),
    "inject": Refactor(
        optax.inject_hyperparams(optax.adam)(1e-2), (optax.schedules.InjectStatefulHyperparamsState,)
    ),
    "inject_schedule": Refactor(
        optax.inject_hyperparams(optax.adamw)(SCHEDULE), (optax.schedules.InjectStatefulHyperparamsState,)
    ),
    "multi_steps": Refactor(optax.MultiSteps(ADAM, 2).gradient_transformation(), (optax.MultiStepsState,)),
    "masked": Refactor(optax.masked(ADAM, ALL)),
    "masked_part": Refactor(optax.masked(ADAM, FIRST), part=True),
    "masked_function": Refactor(optax.masked(ADAM, lambda net: jax.tree.map(lambda leaf: leaf.ndim > 1, net)), part=True),
    "partition_part": Refactor(
        transforms.partition({"a": ADAM, "b": optax.sgd(1e-2)}, SPLIT), part=True
    ),
    "partition_two": Refactor(transforms.partition({"a": ADAM, "b": optax.adamw(1e-3)}, SPLIT)),
    "multi_transform": Refactor(optax.multi_transform({"a": ADAM, "b": optax.set_to_zero()}, SPLIT), part=True),
    "named_chain": Refactor(named("stage", optax.clip(1.0), ADAM)),
    "named_in_chain": Refactor(optax.chain(optax.clip(1.0), named("x", ADAM))),
    "apply_if_finite": Refactor(optax.apply_if_finite(ADAM, 5), (optax.ApplyIfFiniteState,)),
    "deep": Refactor(
        optax.chain(optax.clip(1.0), optax.apply_if_finite(optax.masked(optax.adamw(SCHEDULE), ALL), 5)),
        (optax.ApplyIfFiniteState, optax.ScaleByScheduleState),
    ),
}  # fmt: skip


@functools.cache
def saved_by(name):
    """Its state after four steps."""
    return trained(REFACTORS[name].optimizer, steps=4)


def moments(state):
    """Moments by parameter, and counts, of every adam in a state."""
    found: dict[str, np.ndarray] = {}
    for adam in states(state, optax.ScaleByAdamState):
        for field in ("mu", "nu"):
            found.update({f"{field}{path}": leaf for path, leaf in by_path(getattr(adam, field)).items()})
    return found, [int(adam.count) for adam in states(state, optax.ScaleByAdamState)]


def count_new(state, classes):
    """How many leaves the state has that are no adam's."""
    inner = sum(len(jax.tree.leaves(adam)) for adam in states(state, optax.ScaleByAdamState))
    assert all(states(state, cls) for cls in classes), "the table above does not know this optax"
    return len(jax.tree.leaves(state)) - inner


@pytest.mark.parametrize("name", REFACTORS)
def test_to(tmp_path, name):
    """Plain adam was saved, the program has another chain."""
    refactor = REFACTORS[name]
    saved, target = trained(ADAM), fresh(refactor.optimizer)
    jaxckpt.save(tmp_path / "c", saved)
    new = count_new(target["optimizer"], refactor.new)
    if new:  # state that never was may not start at zero in silence
        with pytest.raises(jaxckpt.RestoreError) as caught:
            jaxckpt.restore(tmp_path / "c", target)
        assert {problem.kind for problem in caught.value.problems} == {"missing"}
        assert len(caught.value.problems) == new
    got, status = jaxckpt.restore(tmp_path / "c", target, partial=bool(new))
    assert len(status.missing) == new
    assert not status.ambiguous
    assert_same(got["net"], saved["net"])
    before, (count,) = moments(saved["optimizer"])
    after, counts = moments(got["optimizer"])
    assert after
    assert refactor.part or after.keys() == before.keys()
    assert all(same_bits(leaf, before[key]) for key, leaf in after.items())
    assert set(counts) == {count} == {3}
    assert len(status.slots_unused) == len(before) - len(after)
    if not refactor.part:
        status.assert_consumed()
    if not new:
        status.assert_existing_objects_matched()


@pytest.mark.parametrize("name", REFACTORS)
def test_from(tmp_path, name):
    """The other chain was saved, the program has plain adam."""
    refactor = REFACTORS[name]
    saved, target = saved_by(name), fresh(ADAM)
    jaxckpt.save(tmp_path / "c", saved)
    before, counts = moments(saved["optimizer"])
    lost = len(moments(target["optimizer"])[0]) - len(before)  # moments that a part has not got
    if refactor.part:
        assert lost > 0
        with pytest.raises(jaxckpt.RestoreError) as caught:
            jaxckpt.restore(tmp_path / "c", target)
        assert {problem.kind for problem in caught.value.problems} == {"missing"}
        assert len(caught.value.problems) == lost
    got, status = jaxckpt.restore(tmp_path / "c", target, partial=refactor.part)
    assert len(status.missing) == lost
    after, (count,) = moments(got["optimizer"])
    assert all(same_bits(after[key], leaf) for key, leaf in before.items())
    assert {count} == set(counts)
    assert count == (2 if name == "multi_steps" else 4)
    new = count_new(saved["optimizer"], refactor.new)
    assert len(status.unused) == new
    if new:
        with pytest.raises(jaxckpt.RestoreAssertionError):
            status.assert_consumed()


BETWEEN = [
    ("adamw", "deep"),
    ("deep", "named_chain"),
    ("partition_two", "named_in_chain"),
    ("inject", "multi_steps"),
    ("multi_steps", "inject_schedule"),
    ("masked", "partition_two"),
    ("lamb", "apply_if_finite"),
    ("zero_nans_around", "trace_before"),
]


@pytest.mark.parametrize(("one", "other"), BETWEEN)
def test_between(tmp_path, one, other):
    """Two chains neither of which is plain adam."""
    saved, target = saved_by(one), fresh(REFACTORS[other].optimizer)
    jaxckpt.save(tmp_path / "c", saved)
    got, status = jaxckpt.restore(tmp_path / "c", target, partial=True)
    before, counts = moments(saved["optimizer"])
    after, after_counts = moments(got["optimizer"])
    assert after.keys() == before.keys()
    assert all(same_bits(after[key], leaf) for key, leaf in before.items())
    assert set(counts) == set(after_counts)
    assert not status.ambiguous
    assert len(status.missing) == count_new(got["optimizer"], REFACTORS[other].new)


@pytest.mark.parametrize("name", REFACTORS)
def test_no_change(tmp_path, name):
    """The same program: everything, whatever the chain."""
    saved = saved_by(name)
    jaxckpt.save(tmp_path / "c", saved)
    got = jaxckpt.restore(tmp_path / "c", fresh(REFACTORS[name].optimizer))
    got.assert_consumed().assert_existing_objects_matched()
    assert_same(got.tree, saved)


def test_training_goes_on_as_if_nothing_had_changed(tmp_path):
    saved = trained(ADAM)
    other = optax.chain(
        optax.identity(), named("stage", optax.masked(optax.adamw(1e-2, weight_decay=0.0), ALL))
    )
    jaxckpt.save(tmp_path / "c", saved)
    got = jaxckpt.restore(tmp_path / "c", fresh(other)).tree
    gradient = params(0.5)
    here, _ = ADAM.update(gradient, saved["optimizer"], saved["net"])
    there, _ = other.update(gradient, got["optimizer"], got["net"])
    for key, leaf in by_path(here).items():
        np.testing.assert_allclose(by_path(there)[key], leaf, rtol=1e-6)


AMSGRAD = {"optimizer/ScaleByAdamState": "optimizer/ScaleByAmsgradState"}


def test_adam_to_amsgrad_when_asked(tmp_path):
    saved = trained(ADAM)
    jaxckpt.save(tmp_path / "c", saved)
    target = fresh(optax.amsgrad(1e-2))
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "c", target)
    assert len(caught.value.problems) == 13  # nothing of it without a rule
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "c", target, rename=AMSGRAD)
    assert len(caught.value.problems) == 4  # nu_max is truly new
    got, status = jaxckpt.restore(tmp_path / "c", target, rename=AMSGRAD, partial=True)
    old, new = saved["optimizer"][0], got["optimizer"][0]
    assert_same((new.count, new.mu, new.nu), (old.count, old.mu, old.nu))
    assert len(status.missing) == 4
    assert all(key.endswith("nu_max") for key in status.missing)
    status.assert_consumed()


def test_amsgrad_to_adam_when_asked(tmp_path):
    saved = trained(optax.amsgrad(1e-2))
    jaxckpt.save(tmp_path / "c", saved)
    got, status = jaxckpt.restore(tmp_path / "c", fresh(ADAM), rename={v: k for k, v in AMSGRAD.items()})
    old, new = saved["optimizer"][0], got["optimizer"][0]
    assert_same((new.count, new.mu, new.nu), (old.count, old.mu, old.nu))
    assert len(status.unused) == len(status.slots_unused) == 4


def test_the_moments_of_adam_never_land_in_lion(tmp_path):
    """Both have a `mu`, and lion's is another thing."""
    jaxckpt.save(tmp_path / "c", trained(ADAM))
    target = fresh(optax.lion(1e-2))
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "c", target)
    assert {problem.kind for problem in caught.value.problems} == {"missing"}
    got, status = jaxckpt.restore(tmp_path / "c", target, partial=True)
    assert_same(got["optimizer"], target["optimizer"])
    assert len(status.missing) == len(jaxckpt.object_graph(target).slots) + 1
    assert len(status.slots_unused) == 8


@pytest.mark.parametrize(
    ("one", "other"),
    [(optax.lion(1.0), ADAM), (ADAM, optax.sgd(1e-2, momentum=0.9)), (optax.sgd(1e-2, momentum=0.9), ADAM),
     (ADAM, optax.rmsprop(1e-2)), (optax.adagrad(1e-2), optax.rmsprop(1e-2))],
)  # fmt: skip
def test_slots_of_another_class_are_left_alone(tmp_path, one, other):
    jaxckpt.save(tmp_path / "c", trained(one))
    target = fresh(other)
    got, status = jaxckpt.restore(tmp_path / "c", target, partial=True)
    assert_same(got["optimizer"], target["optimizer"])
    assert len(status.slots_unused) == sum(".OPTIMIZER_SLOT" in key for key in status.unused)
    assert status.slots_unused


def test_adam_and_lion_in_one_chain_keep_their_own(tmp_path):
    both = optax.chain(optax.scale_by_lion(), optax.scale_by_adam())
    saved = trained(both)
    jaxckpt.save(tmp_path / "c", saved)
    keys = set(jaxckpt.load_checkpoint(tmp_path / "c"))
    assert {"net/l1/bias/.OPTIMIZER_SLOT/optimizer/mu", "net/l1/bias/.OPTIMIZER_SLOT/optimizer/mu.2"} <= keys
    turned = optax.chain(optax.scale_by_adam(), optax.scale_by_lion())
    got = jaxckpt.restore(tmp_path / "c", fresh(turned)).assert_consumed().tree
    assert_same(got["optimizer"], saved["optimizer"][::-1])
    got, status = jaxckpt.restore(tmp_path / "c", fresh(ADAM))
    assert_same(got["optimizer"][0], saved["optimizer"][1])
    assert len(status.slots_unused) == 4


MOMENTUM = optax.chain(optax.trace(0.9), optax.scale(-1.0))


@pytest.mark.parametrize(
    "other",
    [
        optax.chain(optax.trace(0.9), optax.trace(0.5)),
        optax.chain(optax.trace(0.5), optax.clip(1.0), optax.trace(0.9)),
    ],
)
def test_a_second_trace_is_ambiguous(tmp_path, other):
    """optax stores no decay, so nothing says which of the two the saved one was."""
    jaxckpt.save(tmp_path / "c", trained(MOMENTUM))
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "c", fresh(other))
    assert {problem.kind for problem in caught.value.problems} == {"ambiguous"}
    assert len(caught.value.problems) == 8
    status = jaxckpt.load_checkpoint(tmp_path / "c").match(fresh(other))
    assert len([key for key in status.ambiguous if ".OPTIMIZER_SLOT" in key]) == len(status.ambiguous) >= 8
    assert len(status.restored) == 4


def test_a_trace_taken_away_is_ambiguous(tmp_path):
    jaxckpt.save(tmp_path / "c", trained(optax.chain(optax.trace(0.9), optax.trace(0.5))))
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "c", fresh(MOMENTUM))
    assert {problem.kind for problem in caught.value.problems} == {"ambiguous"}


def test_another_dtype_decides_between_two_traces(tmp_path):
    one = optax.trace(0.9, accumulator_dtype=jnp.bfloat16)
    saved = trained(optax.chain(one))
    jaxckpt.save(tmp_path / "c", saved)
    got, status = jaxckpt.restore(tmp_path / "c", fresh(optax.chain(optax.trace(0.5), one)), partial=True)
    assert_same(got["optimizer"][1], saved["optimizer"][0])
    assert len(status.missing) == 4
    assert not status.ambiguous


def test_labels_decide_where_numbers_do_not(tmp_path):
    """The group `a` kept its name when a third adam came."""
    net = {name: {"w": jnp.full(4, float(place))} for place, name in enumerate("xyz")}
    two = transforms.partition({"a": optax.trace(0.9), "b": optax.trace(0.5)}, {"x": "a", "y": "b", "z": "b"})
    three = transforms.partition(
        {"a": optax.trace(0.9), "b": optax.trace(0.5), "c": optax.trace(0.1)}, {"x": "a", "y": "b", "z": "c"}
    )
    saved = trained(two, net)
    jaxckpt.save(tmp_path / "c", saved)
    got, status = jaxckpt.restore(tmp_path / "c", fresh(three, zeros(net)), partial=True)
    before = {k: v for state in states(saved, optax.TraceState) for k, v in by_path(state).items()}
    after = {k: v for state in states(got, optax.TraceState) for k, v in by_path(state).items()}
    for key in (".trace['x']['w']", ".trace['y']['w']"):
        assert same_bits(before[key], after[key])
    assert not status.ambiguous


def test_counts_that_differ_are_ambiguous_and_equal_ones_are_not(tmp_path):
    split = transforms.partition({"a": ADAM, "b": ADAM}, SPLIT)
    saved = trained(split)
    jaxckpt.save(tmp_path / "equal", saved)
    assert int(jaxckpt.restore(tmp_path / "equal", fresh(ADAM)).tree["optimizer"][0].count) == 3
    inner = dict(saved["optimizer"].inner_states)
    a = inner["a"].inner_state
    inner["a"] = inner["a"]._replace(inner_state=(a[0]._replace(count=jnp.int32(9)), *a[1:]))
    jaxckpt.save(tmp_path / "other", {**saved, "optimizer": saved["optimizer"]._replace(inner_states=inner)})
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "other", fresh(ADAM))
    (problem,) = caught.value.problems
    assert problem.kind == "ambiguous"
    assert problem.key == "optimizer/ScaleByAdamState/count"


@pytest.mark.parametrize(
    "options", [{"fresh": ("optimizer/**",)}, {"skip_slots": True}, {"fresh": ("optimizer",)}]
)
@pytest.mark.parametrize(
    "optimizer", [ADAM, optax.lion(1e-2), optax.chain(optax.clip(1.0), optax.adamw(1e-2))]
)
def test_an_optimizer_started_over(tmp_path, optimizer, options):
    """Counts go with their moments: zero moments with an old count make a first step far too large."""
    saved, target = trained(optimizer), fresh(optimizer)
    jaxckpt.save(tmp_path / "c", saved)
    got, status = jaxckpt.restore(tmp_path / "c", target, **options)
    assert_same(got["optimizer"], target["optimizer"])
    assert_same(got["net"], saved["net"])
    assert len(status.fresh) == len(jax.tree.leaves(target["optimizer"]))
    assert len(status.restored) == 4


def test_skip_slots_keeps_what_has_no_slots(tmp_path):
    optimizer = optax.adam(SCHEDULE)
    jaxckpt.save(tmp_path / "c", trained(optimizer))
    got, status = jaxckpt.restore(tmp_path / "c", fresh(optimizer), skip_slots=True)
    assert int(got["optimizer"][0].count) == 0
    assert int(got["optimizer"][1].count) == 3  # the schedule's own
    status.assert_consumed()


def test_a_renamed_layer_takes_its_slots_along(tmp_path):
    saved = trained(ADAM)
    jaxckpt.save(tmp_path / "c", saved)
    net = {"first": params()["l1"], "l2": params()["l2"]}
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(tmp_path / "c", fresh(ADAM, net))
    assert len(caught.value.problems) == 6
    got = jaxckpt.restore(tmp_path / "c", fresh(ADAM, net), rename={"net/l1": "net/first"})
    got.assert_consumed().assert_existing_objects_matched()
    for field in ("mu", "nu"):
        old, new = getattr(saved["optimizer"][0], field), getattr(got.tree["optimizer"][0], field)
        assert_same((new["first"], new["l2"]), (old["l1"], old["l2"]))


@pytest.mark.parametrize(
    "rename",
    [{"net/l1": "net/l2", "net/l2": "net/l1"}, {"net/l1/*": "net/l2/*", "net/l2/*": "net/l1/*"},
     lambda key: {"l1": "net/l2", "l2": "net/l1"}.get(key.split("/")[1], key) + key[len("net/l1") :] if key.startswith("net/l") else key],
)  # fmt: skip
def test_swapped_layers_swap_their_slots(tmp_path, rename):
    net = {"l1": {"w": jnp.ones(3)}, "l2": {"w": jnp.full(3, 2.0)}}
    saved = trained(ADAM, net)
    jaxckpt.save(tmp_path / "c", saved)
    got = jaxckpt.restore(tmp_path / "c", fresh(ADAM, zeros(net)), rename=rename).assert_consumed().tree
    for one, other in (("l1", "l2"), ("l2", "l1")):
        assert same_bits(got["net"][one]["w"], saved["net"][other]["w"])
        assert same_bits(got["optimizer"][0].mu[one]["w"], saved["optimizer"][0].mu[other]["w"])
        assert same_bits(got["optimizer"][0].nu[one]["w"], saved["optimizer"][0].nu[other]["w"])


def test_everything_renamed_at_once(tmp_path):
    """The optimizer, the parameters and the chain."""
    saved = trained(ADAM)
    jaxckpt.save(tmp_path / "c", saved)
    other = optax.chain(optax.clip(1.0), optax.adamw(1e-2))
    target = {"model": params(-7.0), "tx": other.init(params())}
    got = jaxckpt.restore(tmp_path / "c", target, rename={"net": "model", "optimizer": "tx"})
    got.assert_consumed().assert_existing_objects_matched()
    assert_same(got.tree["model"], saved["net"])
    assert_same(got.tree["tx"][1][0], saved["optimizer"][0])


def test_a_fresh_layer_has_fresh_slots(tmp_path):
    saved, target = trained(ADAM), fresh(ADAM)
    jaxckpt.save(tmp_path / "c", saved)
    got, status = jaxckpt.restore(tmp_path / "c", target, fresh=("net/l2",))
    assert len(status.fresh) == 6
    assert_same(got["net"], {"l1": saved["net"]["l1"], "l2": target["net"]["l2"]})
    assert_same(
        got["optimizer"][0].nu, {"l1": saved["optimizer"][0].nu["l1"], "l2": target["optimizer"][0].nu["l2"]}
    )
    assert int(got["optimizer"][0].count) == 3


def test_a_moving_average_added_later_orphans_nothing(tmp_path):
    """`average` comes before `net` and has its paths and shapes."""
    saved = trained(ADAM)
    jaxckpt.save(tmp_path / "c", saved)
    target = {"average": params(-3.0), **fresh(ADAM)}
    got, status = jaxckpt.restore(tmp_path / "c", target, partial=("average",))
    assert_same({**got, "average": None}, {**saved, "average": None})
    assert len(status.missing) == 4
    jaxckpt.save(tmp_path / "d", {"average": params(), **saved})
    assert_same(jaxckpt.restore(tmp_path / "d", fresh(ADAM)).tree, saved)


def test_two_optimizers_on_two_networks(tmp_path):
    saved = {"gen": params(1.0), "disc": params(2.0), "opts": {"gen": None, "disc": None}}
    for name in ("gen", "disc"):
        both = trained(ADAM, saved[name], steps=3 if name == "gen" else 5)
        saved[name], saved["opts"][name] = both["net"], jaxckpt.Optimizer(both["optimizer"], of=name)
    jaxckpt.save(tmp_path / "c", saved)
    keys = list(jaxckpt.load_checkpoint(tmp_path / "c"))
    assert "gen/l1/bias/.OPTIMIZER_SLOT/opts/gen/mu" in keys
    assert "disc/l1/bias/.OPTIMIZER_SLOT/opts/disc/mu" in keys
    other = optax.adamw(SCHEDULE)
    target = {
        "gen": params(), "disc": params(),
        "opts": {name: jaxckpt.Optimizer(other.init(params()), of=name) for name in ("gen", "disc")},
    }  # fmt: skip
    got, status = jaxckpt.restore(tmp_path / "c", target, partial=("**/ScaleByScheduleState",))
    status.assert_consumed()
    for name in ("gen", "disc"):
        assert_same(got["opts"][name].state[0], saved["opts"][name].state[0])


@pytest.mark.parametrize(
    "optimizer", [optax.sm3(1e-2), optax.adafactor(1e-2), optax.adabelief(1e-2), optax.adan(1e-2)]
)
def test_other_optimizers_move_in_a_chain(tmp_path, optimizer):
    """SM3 keeps a list for each parameter, adafactor arrays of other shapes."""
    saved, wrapped = trained(optimizer), optax.chain(optax.clip(9.0), optax.masked(optimizer, ALL))
    jaxckpt.save(tmp_path / "c", saved)
    got = jaxckpt.restore(tmp_path / "c", fresh(wrapped)).assert_consumed().tree
    assert_same(got["optimizer"][1].inner_state, saved["optimizer"])
    jaxckpt.save(tmp_path / "d", trained(wrapped))
    back = jaxckpt.restore(tmp_path / "d", fresh(optimizer)).assert_consumed().tree
    assert_same(back["optimizer"], trained(wrapped)["optimizer"][1].inner_state)
