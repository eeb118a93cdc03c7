"""Saved graph against target graph: by name, by parameter, all problems at once."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxckpt.errors import RestoreError
from jaxckpt.graph.flatten import flatten
from jaxckpt.graph.match import Match, match
from jaxckpt.graph.rules import Rules

ADAM = optax.adam(1e-3)


def zeros(*shape: int, dtype: str = "float32") -> np.ndarray:
    return np.zeros(shape, dtype)


def net(**sizes: tuple[int, ...]) -> dict[str, np.ndarray]:
    return {name: zeros(*shape) for name, shape in (sizes or {"w": (2, 3), "b": (3,)}).items()}


def state(optimizer: Any, params: Any = None, **more: Any) -> dict[str, Any]:
    params = net() if params is None else params
    return {"net": params, "opt": optimizer.init(params), **more}


def run(saved: Any, target: Any, **options: Any) -> Match:
    """A match whose laws are checked."""
    old, new = flatten(saved).graph, flatten(target, target=True).graph
    result = match(old, new, Rules.of(**options))
    check_laws(result, old, new, below=options.get("at", ""))
    return result


def check_laws(result: Match, old: Any, new: Any, below: str = "") -> None:
    status = result.status
    values = [leaf.key for leaf in new.leaves if leaf.kind not in ("callable", "skipped")]
    sets = [*status.restored, *status.missing, *status.fresh, *status.ambiguous]
    assert sorted(sets) == sorted(values)
    saved = {
        leaf.key for leaf in old.leaves if leaf.kind not in ("callable", "skipped") and inside(leaf, below)
    }
    restored = {key for keys in status.restored.values() for key in keys}
    assert restored | set(status.unused) | (set(status.ambiguous) & saved) == saved
    assert not restored & set(status.unused)
    assert len(set(status.unused)) == len(status.unused)
    assert set(status.slots_unused) <= set(status.unused)
    assert set(status.cast) <= set(status.restored)
    assert len(result.fills) == len(new.leaves)
    for leaf, fill in zip(new.leaves, result.fills, strict=True):
        assert (fill.why == "restored") == (leaf.key in status.restored)


def inside(leaf: Any, below: str) -> bool:
    """Whether a saved leaf lies below a node; a slot goes with its optimizer."""
    key = leaf.key if leaf.variable is None else leaf.state.optimizer
    return not below or key == below or key.startswith(below + "/")


def good(saved: Any, target: Any, **options: Any) -> Match:
    result = run(saved, target, **options)
    assert not result.problems, result.problems
    return result


def kinds(result: Match) -> dict[str, str]:
    return {problem.key: problem.kind for problem in result.problems}


def slot(name: str, field: str, optimizer: str = "opt") -> str:
    return f"{name}/.OPTIMIZER_SLOT/{optimizer}/{field}"


# ---------------------------------------------------------------- names


class Pair(NamedTuple):
    left: Any
    right: Any


def test_only_names_matter():
    a, b = zeros(2), zeros(3)
    digits = {"0": a, "1": b}
    for saved in ([a, b], (a, b), digits, {0: a, 1: b}, Pair(a, b)):
        for target in ([a, b], (a, b), digits, {0: a, 1: b}, Pair(a, b)):
            if isinstance(saved, dict) != isinstance(target, dict) and Pair in (type(saved), type(target)):
                continue
            result = good({"x": saved}, {"x": target})
            assert [fill.sources for fill in result.fills] == [(0,), (1,)]
            result.status.assert_consumed().assert_existing_objects_matched()


def test_a_namedtuple_is_found_by_index_and_takes_its_slots_along():
    params, plain = Pair(zeros(2, 2), zeros(3)), (zeros(2, 2), zeros(3))
    for saved, target in ((params, plain), (plain, params)):
        result = good(state(ADAM, saved), state(ADAM, target))
        result.status.assert_consumed()
    nested = good({"a": [Pair(zeros(1), [zeros(2)])]}, {"a": [(zeros(1), [zeros(2)])]})
    assert nested.status.restored["a/0/1/0"] == ("a/0/right/0",)


def test_all_problems_at_once_each_with_a_remedy():
    saved = {"a": zeros(2), "b": zeros(2, 3), "c": zeros(2), "d": [zeros(1)] * 3, "e": zeros(2), "g": None}
    target = {
        "a": zeros(2, dtype="float16"),
        "b": zeros(4),
        "c": {"x": zeros(2)},
        "d": [zeros(1)] * 2,
        "e": None,
        "f": zeros(1),
        "g": zeros(2),
        "h": zeros(1, 1),
    }
    result = run(saved, target)
    assert kinds(result) == {
        "a": "dtype", "b": "shape", "c": "kind", "d": "length", "e": "kind", "f": "missing", "g": "kind", "h": "missing",
    }  # fmt: skip
    assert [p.key for p in result.problems] == sorted(p.key for p in result.problems)
    assert all(problem.hint and problem.saved and problem.wanted for problem in result.problems), (
        result.problems
    )
    with pytest.raises(RestoreError, match="8 problems") as info:
        result.check("ckpt-1")
    assert len(info.value.problems) == 8
    assert set(kinds(run(saved, target, partial=True))) == {"a", "b", "c", "d", "e", "g"}


def test_did_you_mean():
    result = run({"net": {"encoder": {"kernel": zeros(2)}}}, {"net": {"backbone": {"kernel": zeros(2)}}})
    hint = result.problems[0].hint
    assert "did you mean 'net/encoder/kernel'?" in hint
    assert "rename={'net/encoder': 'net/backbone'}" in hint
    assert good({"n": {"e": zeros(2)}}, {"n": {"b": zeros(2)}}, rename={"n/e": "n/b"})


def test_container_against_value():
    assert kinds(run({"a": zeros(1)}, {"a": {"b": zeros(1), "c": zeros(1)}}, partial=True)) == {"a": "kind"}
    assert kinds(run({"a": {"b": zeros(1)}}, {"a": zeros(1)}, partial=True)) == {"a": "kind"}
    assert kinds(run(zeros(1), {"a": zeros(1)})) == {".": "kind"}
    assert kinds(run({"a": zeros(1)}, zeros(1))) == {".": "kind"}
    good({"a": zeros(1)}, {"a": {"b": zeros(1)}}, fresh="a")


def test_none_and_empty_containers():
    good({"a": None, "b": {}, "c": ()}, {"a": None, "b": {}, "c": []}).status.assert_consumed()
    good({"a": {"x": zeros(1)}}, {"a": {}})
    good({}, {"new": None})
    assert kinds(run({"a": {}}, {"a": None})) == {"a": "kind"}
    assert kinds(run({"a": None}, {"a": {}})) == {"a": "kind"}
    assert kinds(run({"a": {"x": zeros(1)}}, {"a": None})) == {"a": "kind"}
    assert kinds(run({"a": None}, {"a": {"x": zeros(1), "y": zeros(1)}}, partial=True)) == {"a": "kind"}
    assert kinds(run({"a": zeros(1)}, {"a": {}})) == {"a": "kind"}
    good({"a": zeros(1)}, {"a": None}, rename={"a": None})
    good({"a": zeros(1)}, {"a": None}, fresh="a")


def test_python_values_and_arrays():
    good({"a": 3, "b": 1.5, "c": True, "d": "s"}, {"a": 4, "b": 2.5, "c": False, "d": "t"})
    result = good({"a": 3, "b": 1.5, "c": True}, {"a": jnp.int32(0), "b": np.float32(0), "c": np.bool_(0)})
    assert all(fill.exact for fill in result.fills)
    result = good({"a": jnp.int32(0), "b": np.float32(0), "c": np.bool_(0)}, {"a": 3, "b": 1.5, "c": True})
    assert not any(fill.exact for fill in result.fills)
    for saved, wanted in [(1, 1.0), (True, 1), (1, "1"), (1, jnp.float32(0)), ("s", zeros(2)), (b"s", "s")]:
        assert kinds(run({"a": saved}, {"a": wanted}, cast=True)) == {"a": "kind"}
        assert kinds(run({"a": wanted}, {"a": saved}, cast=True)) == {"a": "kind"}
    assert kinds(run({"a": 1}, {"a": zeros(2, dtype="int32")})) == {"a": "shape"}
    changed = good({"a": 3, "b": "x"}, {"a": 4, "b": "x"}).status.replaced
    assert dict(changed) == {"a": (4, 3)}


def test_cast():
    saved = {"f": zeros(2), "i": zeros(2, dtype="int32"), "b": zeros(2, dtype="bool")}
    wanted = {"f": zeros(2, dtype="float16"), "i": zeros(2, dtype="uint8"), "b": zeros(2, dtype="bool")}
    assert kinds(run(saved, wanted)) == {"f": "dtype", "i": "dtype"}
    assert kinds(run(saved, wanted, cast="f")) == {"i": "dtype"}
    assert good(saved, wanted, cast=True).status.cast == ("f", "i")
    assert good({"x": jnp.zeros(2, "bfloat16")}, {"x": jnp.zeros(2, "float8_e5m2")}, cast=True).status.cast
    for a, b in [("float32", "int32"), ("bool", "int32"), ("float32", "complex64")]:
        assert kinds(run({"x": zeros(1, dtype=a)}, {"x": zeros(1, dtype=b)}, cast=True)) == {"x": "dtype"}
    both = run({"x": zeros(2)}, {"x": zeros(3, dtype="float16")})
    assert kinds(both) == {"x": "shape"}
    assert "float32[2]" in str(both.problems[0])
    assert "float16[3]" in str(both.problems[0])


def test_keys():
    typed, raw = jax.random.key(0), jax.random.key_data(jax.random.key(0))
    other = jax.random.key(0, impl="rbg")
    good({"k": typed}, {"k": jax.random.key(1)})
    for saved, wanted in [(typed, raw), (raw, typed), (typed, other)]:
        result = run({"k": saved}, {"k": wanted}, cast=True)
        assert kinds(result) == {"k": "kind"}
        assert "wrap_key_data" in result.problems[0].hint


def test_functions_and_what_is_not_asked():
    saved = {"f": jax.nn.relu, "w": zeros(2), "v": zeros(1)}
    result = good(saved, {"f": jax.nn.gelu, "w": zeros(2), "v": ...})
    assert result.status.unused == ("v",)
    assert result.fills[0].why == result.fills[1].why == "not asked"
    assert kinds(run(saved, {"f": zeros(1), "w": zeros(2)})) == {"f": "kind"}
    assert kinds(run({"w": zeros(2)}, {"w": jax.nn.relu})) == {"w": "kind"}
    good({}, {"f": jax.nn.relu})


def test_an_integer_key_is_no_string():
    a, b = zeros(2), zeros(2)
    both = OrderedDict([(1, a), ("1", b)])
    assert good({"x": both}, {"x": both}).status.restored["x/.N1"] == ("x/.N1",)
    assert dict(good({"x": both}, {"x": {1: a}}).status.restored) == {"x/1": ("x/.N1",)}
    assert dict(good({"x": both}, {"x": {"1": a}}).status.restored) == {"x/1": ("x/1",)}
    assert kinds(run({"x": {1: a}}, {"x": both})) == {"x/1": "missing"}
    assert kinds(run({"x": {"1": a}}, {"x": both})) == {"x/.N1": "missing"}
    assert good(state(ADAM, {"x": both}), state(ADAM, {"x": {1: a}})).status.restored[
        slot("net/x/1", "mu")
    ] == (slot("net/x/.N1", "mu"),)


# ---------------------------------------------------------------- lists, at, shared arrays


def layers(count: int) -> dict[str, Any]:
    return {"layers": [{"w": zeros(2, 2)} for _ in range(count)]}


def test_a_shorter_list_is_confirmed():
    result = run(layers(3), layers(2), partial=True)
    assert kinds(result) == {"layers": "length"}
    assert "'layers/2': None" in result.problems[0].hint
    moved = good(layers(3), layers(2), rename={"layers/1": None, "layers/2": "layers/1"})
    assert moved.status.restored["layers/1/w"] == ("layers/2/w",)
    good(layers(3), layers(2), rename={"layers/2": None})
    good(layers(3), layers(2), rename={"layers/2/w": None})
    good(layers(3), layers(2), rename=lambda key: None if key == "layers/2" else key)
    assert kinds(run(layers(3), {"l": layers(2)["layers"]}, rename={"layers": "l"})) == {"l": "length"}
    good(layers(3), {"layers": []})
    good(layers(3), layers(2), attach=True)
    good(layers(3), layers(2), fresh="layers/**")
    swap = good(layers(3), layers(3), rename={"layers/0": "layers/2", "layers/2": "layers/0"})
    assert swap.status.restored["layers/0/w"] == ("layers/2/w",)
    assert swap.status.restored["layers/1/w"] == ("layers/1/w",)
    assert kinds(run([1, 2, 3], [1, 2])) == {".": "length"}


def test_at():
    saved = {"run": state(ADAM, {"enc": net(), "dec": net()}), "config": {"depth": 2}}
    got = good(saved, {"depth": 0}, at="config").status
    assert dict(got.restored) == {"depth": ("config/depth",)}
    assert got.unused == ()
    whole = good(saved, state(ADAM, {"enc": net(), "dec": net()}), at="run").status.assert_consumed()
    assert whole.restored[slot("net/enc/w", "mu")] == (slot("run/net/enc/w", "mu", "run/opt"),)
    good(saved, net(), at="run/net/enc").status.assert_consumed()
    good(saved, 0, at="config/depth")
    optimizer = good(saved, ADAM.init({"enc": net(), "dec": net()}), at="run/opt").status
    assert len(optimizer.restored) == 9
    with pytest.raises(RestoreError, match="did you mean 'config'"):
        run(saved, {}, at="confg")


def test_a_second_name_of_a_restored_array_passes():
    shared = jnp.zeros(3)
    status = good({"a": shared, "b": shared, "c": zeros(1)}, {"a": zeros(3), "c": zeros(1)}).status
    assert status.unused == ("b",)
    status.assert_consumed()
    both = good({"a": shared, "b": shared}, {"a": zeros(3), "b": zeros(3)}).status
    assert both.restored["b"] == ("b",)


# ---------------------------------------------------------------- rename


def test_rename_takes_the_slots_along():
    saved = state(ADAM, {"encoder": net(), "head": net()})
    target = state(ADAM, {"backbone": net(), "head": net()})
    for rule in ({"net/encoder": "net/backbone"}, lambda key: key.replace("encoder", "backbone")):
        status = good(saved, target, rename=rule).status.assert_consumed().assert_existing_objects_matched()
        assert status.restored[slot("net/backbone/w", "nu")] == (slot("net/encoder/w", "nu"),)
    moved = {"model": saved["net"], "train": {"optimizer": saved["opt"]}}
    good(saved, moved, rename={"net": "model", "opt": "train/optimizer"}).status.assert_consumed()
    good(moved, saved, rename={"model": "net", "train/optimizer": "opt"}).status.assert_consumed()
    good(moved, saved, rename=lambda k: k.replace("model", "net").replace("train/optimizer", "opt"))


def test_a_swap_of_parameters_swaps_their_slots():
    both = state(ADAM, {"a": zeros(2, 2), "b": zeros(2, 2)})
    status = good(both, both, rename={"net/a": "net/b", "net/b": "net/a"}).status
    assert status.restored[slot("net/a", "mu")] == (slot("net/b", "mu"),)
    assert status.restored["net/a"] == ("net/b",)


def test_rename_with_an_optimizer_alone_in_the_target():
    saved = state(ADAM, {"encoder": net(), "head": net()})
    target = {"opt": ADAM.init({"backbone": net(), "head": net()})}
    status = good(saved, target, rename={"net/encoder": "net/backbone"}).status
    assert status.restored["opt/ScaleByAdamState/mu/backbone/w"] == (slot("net/encoder/w", "mu"),)
    assert len(good(saved, {"opt": ADAM.init({"encoder": net(), "head": net()})}).status.restored) == 9


def test_drop():
    saved = state(ADAM, {"body": net(), "head": net()})
    status = good(saved, state(ADAM, {"body": net()}), rename={"net/head": None}).status
    assert slot("net/head/w", "mu") in status.slots_unused
    status = good(
        saved, state(ADAM, {"body": net(), "head": net()}), rename={"opt": None}, partial=True
    ).status
    assert len(status.restored) == 4
    assert len(status.slots_unused) == 8
    assert kinds(run(saved, state(ADAM, {"body": net(), "head": net()}), rename={"net/head/w": None})) == {
        "net/head/w": "missing",
        slot("net/head/w", "mu"): "missing",
        slot("net/head/w", "nu"): "missing",
    }


def test_state_classes_and_slots_by_name():
    saved, target = state(ADAM), state(optax.amsgrad(1e-3))
    rule = {"opt/ScaleByAdamState": "opt/ScaleByAmsgradState"}
    result = run(saved, target, rename=rule)
    assert kinds(result) == {slot("net/w", "nu_max"): "missing", slot("net/b", "nu_max"): "missing"}
    assert "opt/ScaleByAmsgradState/count" in result.status.restored
    hint = run(saved, target).problems[0].hint
    assert str(rule) in hint
    back = good(target, saved, rename={"opt/ScaleByAmsgradState": "opt/ScaleByAdamState"}).status
    assert len(back.restored) == 7
    by_function = run(saved, target, rename=lambda key: key.replace("AdamState", "AmsgradState"))
    assert kinds(by_function) == kinds(result)
    momentum = state(optax.trace(0.9))
    full = good(
        saved, momentum, rename={"net/*/.OPTIMIZER_SLOT/opt/mu": "net/*/.OPTIMIZER_SLOT/opt/trace"}
    ).status
    assert full.restored[slot("net/w", "trace")] == (slot("net/w", "mu"),)
    field = good(saved, momentum, rename={"opt/ScaleByAdamState/mu": "opt/TraceState/trace"}).status
    assert field.restored == full.restored
    step = good(saved, {"step": np.int32(0)}, rename={"opt/ScaleByAdamState/count": "step"}).status
    assert step.restored["step"] == ("opt/ScaleByAdamState/count",)
    count = good(
        {**net(), "step": np.int32(0)}, {"opt": ADAM.init({})}, rename={"step": "opt/ScaleByAdamState/count"}
    )
    assert count.status.restored["opt/ScaleByAdamState/count"] == ("step",)


def test_ordinals():
    two, one = optax.chain(optax.trace(0.9), optax.trace(0.5)), optax.trace(0.5)
    result = run(state(two), state(one))
    assert set(kinds(result).values()) == {"ambiguous"}
    assert len(result.problems) == 2
    assert "TraceState.1" in result.problems[0].hint
    kept = run(state(two), state(one), partial=True)
    assert not kept.problems
    assert set(kept.status.ambiguous) == {slot("net/w", "trace"), slot("net/b", "trace")}
    assert kept.status.candidates[slot("net/w", "trace")] == (
        slot("net/w", "trace"),
        slot("net/w", "trace.2"),
    )
    second = good(state(two), state(one), rename={"opt/TraceState.1": None}).status
    assert second.restored[slot("net/w", "trace")] == (slot("net/w", "trace.2"),)
    first = good(state(two), state(one), rename={"opt/TraceState.2": None}).status
    assert first.restored[slot("net/w", "trace")] == (slot("net/w", "trace"),)
    swapped = {"opt/TraceState.1": "opt/TraceState.2", "opt/TraceState.2": "opt/TraceState.1"}
    swap = good(state(two), state(two), rename=swapped).status
    assert swap.restored[slot("net/w", "trace")] == (slot("net/w", "trace.2"),)
    assert swap.restored[slot("net/w", "trace.2")] == (slot("net/w", "trace"),)
    assert set(kinds(run(state(one), state(two))).values()) == {"ambiguous"}
    said = run(state(one), state(two), rename={"opt/TraceState": "opt/TraceState.2"})
    assert kinds(said) == {slot("net/w", "trace"): "missing", slot("net/b", "trace"): "missing"}
    assert said.status.restored[slot("net/w", "trace.2")] == (slot("net/w", "trace"),)
    keep = good(state(two), state(one), rename={"opt/TraceState.1": "opt/TraceState.1"}).status
    assert keep.restored[slot("net/w", "trace")] == (slot("net/w", "trace"),)
    last = good(
        state(two), state(one), rename={"opt/TraceState.2": "opt/TraceState.1", "opt/TraceState.1": None}
    ).status
    assert last.restored[slot("net/w", "trace")] == (slot("net/w", "trace.2"),)
    new = good(state(one), state(two), fresh="opt/TraceState").status
    assert new.restored == {
        "net/w": ("net/w",), "net/b": ("net/b",),
        slot("net/w", "trace.2"): (slot("net/w", "trace"),), slot("net/b", "trace.2"): (slot("net/b", "trace"),),
    }  # fmt: skip
    every = optax.chain(optax.ema(0.9), optax.ema(0.5))
    renamed = good(
        state(two), state(every), rename={"opt/TraceState/trace": "opt/EmaState/ema"}, partial=True
    )
    assert renamed.status.ambiguous == ()
    classes = run(state(two), state(two), rename={"opt/TraceState": "opt/EmaState"})
    assert set(kinds(classes).values()) == {"missing"}


def test_a_rule_that_names_nothing():
    saved = {"net": {"a": zeros(1)}}
    with pytest.raises(RestoreError, match="'net/x' names nothing"):
        run(saved, saved, rename={"net/x": "net/y"})
    with pytest.raises(RestoreError, match=r"rules go from saved to target.*'net/a': 'net/b'"):
        run(saved, saved, rename={"net/b": "net/a"})
    with pytest.raises(RestoreError, match="rules go from saved to target"):
        run(saved, saved, rename={"x/*": "net/*"})
    good(saved, {"m": {"z": zeros(1)}}, rename={"net": "m", "net/a": "m/z"})  # the longer rule wins


def test_two_things_in_one_name():
    saved = {"a": zeros(1), "b": zeros(1), "c": {"d": zeros(1)}}
    for rule in ({"a": "b"}, {"a": "x", "b": "x"}, {"a": "c"}, {"a": "c/d"}, {"a": "b/y"}, {"*": "x"}):
        with pytest.raises(RestoreError, match="one name"):
            run(saved, saved, rename=rule)
    good(saved, {"b": zeros(1)}, rename={"a": "b", "b": None})
    good(saved, {"c": {"d": zeros(1), "e": zeros(1)}}, rename={"a": "c/e"})


def test_function_forms():
    saved = {"net": {"a": {"k": zeros(1)}}, "x": zeros(1)}
    target = {"m": {"a": {"k": zeros(1)}}, "x": zeros(1)}
    good(saved, target, rename=lambda key: {"net": "m"}.get(key, key)).status.assert_consumed()
    with pytest.raises(TypeError, match="gives 3"):
        run(saved, target, rename=lambda key: 3)
    prefixed = good(saved, {"p": saved}, rename=lambda key: "p/" + key)
    prefixed.status.assert_consumed()


# ---------------------------------------------------------------- fresh, partial, skip_slots


def test_a_new_head_is_fresh_with_its_slots():
    def st(size):
        return state(ADAM, {"body": zeros(4, 4), "head": zeros(4, size)})

    result = run(st(3), st(5), partial=True)
    assert len(result.problems) == 3
    assert all("net/head" in problem.hint for problem in result.problems)
    status = good(st(3), st(5), fresh=("net/head",)).status
    assert set(status.fresh) == {"net/head", slot("net/head", "mu"), slot("net/head", "nu")}
    assert "net/head" in status.unused
    status.assert_existing_objects_matched()


def test_a_fresh_optimizer():
    saved = state(optax.chain(optax.trace(0.9), ADAM))
    for patterns in ("opt/**", "opt", ("opt/ScaleByAdamState/**", "opt/TraceState")):
        status = good(saved, saved, fresh=patterns).status
        assert set(status.restored) == {"net/w", "net/b"}
    status = good(saved, saved, fresh="opt/ScaleByAdamState").status
    assert slot("net/w", "trace") in status.restored
    assert slot("net/w", "mu") in status.fresh
    assert "opt/ScaleByAdamState/count" in status.fresh


def test_a_hyperparameter_stays():
    make = optax.inject_hyperparams(optax.adam)
    status = good(
        state(make(learning_rate=1e-3)), state(make(learning_rate=1e-5)), fresh=("opt/**/learning_rate",)
    ).status
    assert status.fresh == ("opt/InjectStatefulHyperparamsState/hyperparams/learning_rate",)


def test_skip_slots():
    saved = state(optax.inject_hyperparams(optax.adam)(learning_rate=1e-3))
    status = good(saved, saved, skip_slots=True).status.assert_consumed()
    assert "opt/ScaleByAdamState/count" in status.fresh
    assert "opt/InjectStatefulHyperparamsState/count" in status.restored
    assert set(status.slots_unused) == {slot(n, f) for n in ("net/w", "net/b") for f in ("mu", "nu")}
    good(saved, {"net": net()}, skip_slots=True)


def test_partial_patterns():
    target = {"a": zeros(1), "b": {"c": zeros(1), "d": zeros(1)}}
    assert good({"a": zeros(1)}, target, partial="b").status.missing == ("b/c", "b/d")
    assert kinds(run({"a": zeros(1)}, target, partial=("b/c",))) == {"b/d": "missing"}
    assert good({}, target, attach=True).status.missing


@pytest.mark.parametrize("option", ["fresh", "partial", "cast"])
def test_a_pattern_that_names_nothing(option):
    with pytest.raises(
        RestoreError, match=f"{option}: 'net/wx' names nothing in the target; did you mean 'net/w'"
    ):
        run(state(ADAM), state(ADAM), **{option: ("net/wx",)})
    good({}, {}, **{option: ("**",)})


# ---------------------------------------------------------------- transform


def test_stacked_layers_with_their_slots():
    saved = state(ADAM, {"layers": [{"k": zeros(2, 2)} for _ in range(11)]})
    target = state(ADAM, {"layers": {"k": zeros(11, 2, 2)}})
    result = run(saved, target)
    assert "net/layers/0/k" in str(result.problems[0])
    assert "stacked?" in result.problems[0].hint
    for rule in (
        {"net/layers/k": ("net/layers/*/k", np.stack)},
        {"net/layers": ("net/layers/*", np.stack)},
    ):
        result = good(saved, target, transform=rule)
        status = result.status.assert_consumed()
        assert status.restored["net/layers/k"] == tuple(f"net/layers/{i}/k" for i in range(11))
        assert status.restored[slot("net/layers/k", "mu")][10] == slot("net/layers/10/k", "mu")
        made = result.fills[0]
        assert made.function is not None
        assert made.function([np.full((2, 2), i) for i in range(11)])[10, 0, 0] == 10  # pyright: ignore


def test_scattered_layers():
    saved = state(ADAM, {"layers": {"k": zeros(3, 2, 2)}})
    target = state(ADAM, {"layers": [{"k": zeros(2, 2)} for _ in range(3)]})
    assert "unstacked?" in run(saved, target).problems[0].hint
    result = good(saved, target, transform={"net/layers/*/k": ("net/layers/k", lambda a, i: a[i])})
    result.status.assert_consumed()
    fill = result.fills[2]
    assert fill.indices == ("2",)
    assert fill.function is not None
    assert fill.function([np.arange(12).reshape(3, 2, 2)])[0, 0] == 8  # pyright: ignore


def test_paired_and_several():
    saved = {"blocks": [{"q": zeros(2), "k": zeros(2), "v": zeros(2)} for _ in range(2)], "t": zeros(2, 3)}
    target = {"b": [{"qkv": zeros(6)} for _ in range(2)], "t": zeros(3, 2)}
    rule = {
        "b/*/qkv": (("blocks/*/q", "blocks/*/k", "blocks/*/v"), np.concatenate),
        "t": ("t", np.transpose),
    }
    status = good(saved, target, transform=rule).status.assert_consumed()
    assert status.restored["b/1/qkv"] == ("blocks/1/q", "blocks/1/k", "blocks/1/v")
    assert "transposed?" in run(saved, {"t": zeros(3, 2)}).problems[0].hint
    assert "squeezed?" in run(saved, {"t": zeros(2, 1, 3)}).problems[0].hint


def test_transform_trouble():
    saved, target = {"a": [zeros(1)]}, {"b": [zeros(1), zeros(1)]}
    with pytest.raises(RestoreError, match=r"'x/\*' .*names nothing in the checkpoint"):
        run(saved, target, transform={"b/*": ("x/*", np.negative)})
    with pytest.raises(RestoreError, match="'c' names nothing in the target"):
        run(saved, target, transform={"c": ("a/0", np.negative)})
    result = run(saved, target, transform={"b/*": ("a/*", np.negative)})
    assert kinds(result) == {"b/1": "missing"}
    good(saved, target, transform={"b/*": ("a/*", np.negative)}, partial=True)
    odd = optax.chain(optax.scale_by_factored_rms(min_dim_size_to_factor=1))
    params, turned = {"w": zeros(2, 3)}, {"w": zeros(3, 2)}
    result = run(state(odd, params), state(odd, turned), transform={"net/w": ("net/w", np.transpose)})
    assert {problem.kind for problem in result.problems} <= {"missing", "shape"}
    assert result.problems


# ---------------------------------------------------------------- optimizers

MASK = {"w": True, "b": False}
LABELS = {"w": "a", "b": "b"}
REFACTORS: dict[str, Any] = {
    "adam": ADAM,
    "clip before": optax.chain(optax.clip(1.0), ADAM),
    "clip after": optax.chain(ADAM, optax.clip(1.0)),
    "trace before": optax.chain(optax.trace(0.9), ADAM),
    "adamw": optax.adamw(1e-3),
    "schedule": optax.adam(optax.cosine_decay_schedule(1e-3, 10)),
    "inject": optax.inject_hyperparams(optax.adam)(learning_rate=1e-3),
    "multi steps": optax.MultiSteps(ADAM, 2),
    "masked": optax.masked(ADAM, MASK),
    "partition part": optax.multi_transform({"a": ADAM, "b": optax.set_to_zero()}, LABELS),
    "partition": optax.multi_transform({"a": ADAM, "b": optax.adam(1e-2)}, LABELS),
    "named": optax.named_chain(("clip", optax.clip(1.0)), ("adam", ADAM)),
    "finite": optax.apply_if_finite(ADAM, 3),
}


@pytest.mark.parametrize("before", REFACTORS)
@pytest.mark.parametrize("after", REFACTORS)
def test_refactors_lose_nothing(before, after):
    saved, target = state(REFACTORS[before]), state(REFACTORS[after])
    result = good(saved, target, partial=True)
    status = result.status
    assert status.ambiguous == ()
    old, new = flatten(saved).graph, flatten(target).graph
    have = {leaf.state.state_class for leaf in old.leaves if leaf.state}
    shared = {slot.key.rpartition("/")[0] for slot in old.slots} & {
        slot.key.rpartition("/")[0] for slot in new.slots
    }
    for leaf in new.leaves:
        if leaf.state is None or leaf.state.state_class not in have:
            continue
        known = leaf.variable is None or any(leaf.key == other.key for other in old.leaves)
        if leaf.key == "opt/ScaleByAdamState.2/count" and before == "partition part":
            assert leaf.key in status.missing  # its label says that it is new
        elif known and (leaf.variable is None or leaf.key.rpartition("/")[0] in shared):
            assert leaf.key in status.restored, leaf.key
            sources = status.restored[leaf.key]
            assert leaf.variable is None or sources == (leaf.key,)


def test_counts_of_a_partition():
    one, two = state(ADAM), state(REFACTORS["partition"])
    split = good(one, two).status
    counts = ("opt/ScaleByAdamState/count", "opt/ScaleByAdamState.2/count")
    assert [split.restored[key] for key in counts] == [counts[:1]] * 2
    result = good(two, one)
    assert result.status.restored[counts[0]] == counts
    index = next(i for i, fill in enumerate(result.fills) if fill.equal)
    unequal = result.revise(unequal=[index])
    assert kinds(unequal) == {counts[0]: "ambiguous"}
    assert unequal.status.ambiguous == counts[:1]
    kept = good(two, one, partial=True).revise(unequal=[index])
    assert not kept.problems
    assert kept.fills[index].why == "ambiguous"
    lost = result.revise(lost=[index])
    assert counts[0] in lost.status.missing
    swapped = {"w": "b", "b": "a"}
    labels = state(optax.multi_transform({"a": ADAM, "b": optax.adam(1e-2)}, swapped))
    assert good(two, labels).status.restored[counts[1]] == counts[:1]  # a count goes with its moments
    third = state(optax.multi_transform({"b": ADAM, "c": ADAM}, {"w": "b", "b": "c"}))
    assert good(two, third).status.restored[counts[0]] == counts[:1]


def test_more_parts_with_labels():
    def split(*labels):
        params = {name: zeros(2) for name in "pqr"}
        names = dict(zip("pqr", labels, strict=True))
        return state(optax.multi_transform(dict.fromkeys(labels, ADAM), names), params)

    status = good(split("a", "b", "b"), split("a", "b", "c")).status
    # The third part has the moments of a part of the second, hence its count.
    assert status.restored["opt/ScaleByAdamState.3/count"] == ("opt/ScaleByAdamState.2/count",)


def test_two_slots_of_one_name_go_by_class():
    both = state(optax.chain(optax.scale_by_adam(), optax.scale_by_lion()))
    lion = state(optax.chain(optax.scale_by_lion(), optax.clip(1.0)))
    status = good(both, lion).status
    assert status.restored[slot("net/w", "mu")] == (slot("net/w", "mu.2"),)
    assert set(kinds(run(lion, state(ADAM))).values()) == {"missing"}


def test_a_moving_average_added_later_orphans_nothing():
    saved, target = state(ADAM), {"ema": net(), **state(ADAM)}
    status = good(saved, target, partial=True).status.assert_consumed()
    assert status.missing == ("ema/b", "ema/w")
    back = good(target, saved).status
    assert set(back.unused) == {"ema/b", "ema/w"}


def test_two_optimizers_and_a_renamed_one():
    params = net()
    both = {"net": params, "gen": ADAM.init(params), "disc": ADAM.init(params)}
    good(both, both).status.assert_consumed()
    swap = good(both, both, rename={"gen": "disc", "disc": "gen"}).status
    assert swap.restored[slot("net/w", "mu", "gen")] == (slot("net/w", "mu", "disc"),)
    hint = (
        run({"net": params, "opt": ADAM.init(params)}, {"net": params, "optimizer": ADAM.init(params)})
        .problems[0]
        .hint
    )
    assert "rename={'opt': 'optimizer'}" in hint


def test_a_bare_parameter():
    saved = {"net": zeros(3), "opt": ADAM.init(zeros(3))}
    good(saved, saved).status.assert_consumed()
    assert len(good(saved, {"opt": ADAM.init(zeros(3))}).status.restored) == 3


# ---------------------------------------------------------------- properties

NAMES = st.sampled_from(["a", "b", "c", "d", "e"])
LEAVES = st.sampled_from([zeros(2), zeros(3), zeros(2, 3), zeros(2, dtype="int32"), 1, 2.5, "s", True, None])
TREES = st.dictionaries(
    NAMES,
    st.recursive(
        LEAVES,
        lambda inner: st.dictionaries(NAMES, inner, max_size=3) | st.lists(inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)
PARAMS = st.dictionaries(NAMES, st.sampled_from([zeros(2, 2), zeros(3, 2)]), min_size=1)


@given(TREES, TREES, st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_laws_hold_for_any_two_trees(saved, target, partial, cast):
    result = run(saved, target, partial=partial, cast=cast)
    if not partial:
        kept = set(result.status.missing)
        covered = {
            key
            for key in kept
            if any(key == p.key or key.startswith(p.key + "/") or p.key == "." for p in result.problems)
        }
        assert kept == covered
    if not any(problem.kind == "length" for problem in result.problems):
        assert bool(result.problems) or not result.status.missing or partial


RULES = st.dictionaries(
    st.sampled_from(
        ["net", "net/a", "net/b", "net/*", "net/c/0", "opt", "opt/ScaleByAdamState", "**/d", "net/a/*"]
    ),
    st.sampled_from(
        [None, "net", "net/x", "net/a", "opt2", "opt/TraceState", "opt/ScaleByAdamState.2", "step"]
    ),
    max_size=3,
)


@given(PARAMS, PARAMS, RULES, st.sampled_from(["adam", "trace before", "partition of all"]), st.booleans())
@settings(max_examples=250, deadline=None)
def test_laws_hold_under_renames_and_drops(saved, target, rules, after, shrink):
    optimizer = optax.chain(ADAM, optax.trace(0.9)) if after == "partition of all" else REFACTORS[after]
    if shrink:
        target = {name: value.astype("float16")[:1] for name, value in target.items()}
    try:
        result = run(state(optimizer, saved), state(ADAM, target), rename=rules, partial=True)
    except RestoreError as error:
        assert str(error).startswith("rename")
        return
    dropped = [key for key, value in rules.items() if value is None and "*" not in key]
    sources = {key for keys in result.status.restored.values() for key in keys}
    for key in dropped:
        longer = [other for other in rules if other != key and (other.startswith(key) or "*" in other)]
        if not longer and not key.startswith("opt"):
            assert not [source for source in sources if source == key or source.startswith(key + "/")]


@given(TREES)
@settings(max_examples=60, deadline=None)
def test_any_tree_restores_into_itself(tree):
    good(tree, tree).status.assert_consumed().assert_existing_objects_matched()


@given(PARAMS, PARAMS, st.sampled_from(["adam", "trace before", "multi steps", "inject"]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_laws_hold_for_optimizers(saved, target, after, skip):
    run(state(ADAM, saved), state(REFACTORS[after], target), skip_slots=skip, partial=True)


@given(PARAMS, st.permutations(["a", "b", "c", "d", "e"]))
@settings(max_examples=60, deadline=None)
def test_rename_and_its_inverse(params, names):
    there = dict(zip("abcde", names, strict=True))
    moved = {there[name]: value for name, value in params.items()}
    rule = {f"net/{name}": f"net/{there[name]}" for name in params}
    inverse = {new: old for old, new in rule.items()}
    one = good(state(ADAM, params), state(ADAM, moved), rename=rule).status.assert_consumed()
    two = good(state(ADAM, moved), state(ADAM, params), rename=inverse).status.assert_consumed()
    for key, (source,) in one.restored.items():
        assert two.restored[source] == (key,)
    reverse = dict(reversed(rule.items()))
    assert good(state(ADAM, params), state(ADAM, moved), rename=reverse).status == one


@given(TREES, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_order_does_not_matter(tree, random):
    names = list(tree)
    random.shuffle(names)
    shuffled = OrderedDict((name, tree[name]) for name in names)
    one, two = good(tree, tree).status, good(tree, shuffled).status
    assert dict(one.restored) == dict(two.restored)


def test_five_thousand_leaves():
    params = {f"block{i}": {f"w{j}": zeros(2, 2) for j in range(16)} for i in range(104)}
    tree = state(ADAM, params)
    old, new = flatten(tree).graph, flatten(tree, target=True).graph
    assert len(new.leaves) > 4900
    assert len(match(old, new, Rules()).status.restored) == len(new.leaves)
    rename = {"net/block1": "net/x", "net/block*": "net/block*"}
    found = match(old, new, Rules.of(rename=rename, fresh=("net/**/w1",), partial=True))
    assert len(found.status.missing) == 3 * 15
    assert len(found.status.fresh) == 3 * 104
    other = flatten(state(ADAM, {f"layer{k}": v for k, v in params.items()}), target=True).graph
    assert len(match(old, other, Rules()).problems) > 4900
