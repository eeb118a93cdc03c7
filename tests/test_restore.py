"""`jaxckpt.restore`: what comes back, of which type, and what raises before anything is read."""

import gc
import itertools
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxckpt


class Counter:
    def __init__(self, position=0):
        self.position = position
        self.calls = 0

    def __next__(self):
        self.position += 1
        return self.position

    def get_state(self):
        self.calls += 1
        return {"position": self.position, "history": [self.position, np.arange(3)]}

    def set_state(self, state):
        self.position = state["position"]
        self.given = state


def saved(tmp_path, tree, **options):
    path = tmp_path / f"saved-{len(list(tmp_path.iterdir()))}"
    jaxckpt.save(path, tree, **options)
    return path


def problems(path, target, **options):
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(path, target, **options)
    return {problem.key: problem.kind for problem in caught.value.problems}


# ---- results that jit cannot tell from the target ----


@pytest.mark.parametrize(
    "make",
    [
        lambda: jnp.ones(3),
        lambda: jnp.asarray(2.0),
        lambda: jnp.float32(2.0),
        lambda: jax.device_put(jnp.ones(3), jax.devices()[1]),
        lambda: jax.device_put(jnp.ones((8, 2)), NamedSharding(jax.make_mesh((8,), ("d",)), P("d"))),
        lambda: jax.random.key(3),
        lambda: jax.random.split(jax.random.key(3, impl="rbg"), 4),
        lambda: jnp.zeros((0, 3), jnp.int8),
        lambda: jax.device_put(
            jnp.ones(8), NamedSharding(jax.make_mesh((8,), ("d",)), P("d"), memory_kind="pinned_host")
        ),
    ],
)
def test_a_step_traced_before_the_restore_is_not_traced_again(tmp_path, make):
    traces = []

    @jax.jit
    def step(tree):
        traces.append(1)
        return jax.tree.map(lambda x: x, tree)

    target = {"x": make(), "n": jnp.int32(0)}
    path = saved(tmp_path, target)  # first: to import orbax makes jax 0.12 trace once more
    step(target)
    tree, _ = jaxckpt.restore(path, target)
    step(tree)
    assert len(traces) == 1
    assert jax.typeof(tree["x"]) == jax.typeof(target["x"])
    assert tree["x"].sharding == target["x"].sharding
    assert tree["x"].committed == target["x"].committed


def test_results_can_be_donated_and_own_their_memory(tmp_path):
    target = {"w": jnp.ones((512, 512)), "b": jnp.ones(7)}
    path = saved(tmp_path, target)
    tree, _ = jaxckpt.restore(path, target)
    step = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    result = step(tree)
    assert tree["w"].is_deleted()
    assert (result["w"] == 2).all()
    host, _ = jaxckpt.restore(path, {"w": np.zeros((512, 512), np.float32), "b": ...})
    host["w"][0, 0] = 5
    assert (jaxckpt.restore(path, target).tree["w"] == 1).all()


def test_abstract_targets(tmp_path):
    path = saved(tmp_path, {"a": jnp.arange(8.0), "b": jnp.ones(2)})
    mesh = jax.make_mesh((8,), ("d",))
    split = NamedSharding(mesh, P("d"))
    tree, _ = jaxckpt.restore(
        path,
        {
            "a": jax.ShapeDtypeStruct((8,), "float32", sharding=split),
            "b": jax.ShapeDtypeStruct((2,), "float32"),
        },
    )
    assert tree["a"].sharding == split
    assert tree["a"].committed
    assert not tree["b"].committed
    assert isinstance(tree["b"].sharding, SingleDeviceSharding)


def test_the_target_decides_the_type(tmp_path):
    path = saved(
        tmp_path, {"a": np.arange(3, dtype=np.int32), "b": jnp.arange(3), "c": np.float32(2), "d": 3}
    )
    tree, _ = jaxckpt.restore(
        path, {"a": jnp.zeros(3, int), "b": np.zeros(3, np.int32), "c": jnp.float32(0), "d": jnp.int32(0)}
    )
    assert isinstance(tree["a"], jax.Array)
    assert isinstance(tree["b"], np.ndarray)
    assert isinstance(tree["c"], jax.Array)
    assert isinstance(tree["d"], jax.Array)
    assert tree["d"] == 3


def test_dots_are_not_asked_for(tmp_path):
    path = saved(tmp_path, {"a": jnp.ones(2), "b": jnp.ones(3)})
    tree, status = jaxckpt.restore(path, {"a": jnp.zeros(2), "b": ...})
    assert tree["b"] is ...
    assert status.unused == ("b",)


# ---- sharing ----


def test_sharing_follows_the_target(tmp_path):
    x, y = jnp.ones(3), jnp.zeros(3)
    shared, split = saved(tmp_path, {"a": x, "b": x}), saved(tmp_path, {"a": x, "b": y})
    once, _ = jaxckpt.restore(shared, {"a": y, "b": y})
    assert once["a"] is once["b"]
    twice, status = jaxckpt.restore(shared, {"a": x, "b": y})
    assert twice["a"] is not twice["b"]
    assert (twice["b"] == 1).all()
    status.assert_consumed()
    own, _ = jaxckpt.restore(split, {"a": x, "b": x})
    assert (own["a"] == 1).all()
    assert (own["b"] == 0).all()
    none, _ = jaxckpt.restore(shared)
    assert none["a"] is none["b"]
    only, status = jaxckpt.restore(shared, {"b": y})
    assert (only["b"] == 1).all()
    status.assert_consumed()


def test_equal_values_saved_apart_come_back_as_one_where_the_target_shares(tmp_path):
    path = saved(tmp_path, {"a": jnp.ones(3), "b": jnp.ones(3)})
    x = jnp.zeros(3)
    tree, _ = jaxckpt.restore(path, {"a": x, "b": x})
    assert tree["a"] is tree["b"]


# ---- everything at once, before anything is read ----


def test_all_problems_in_one_error_and_nothing_is_read(tmp_path, monkeypatch):
    path = saved(tmp_path, {"a": jnp.ones(2), "b": jnp.ones(3), "c": {"d": 1}, "it": Counter(3)})
    counter = Counter(0)
    target = {
        "a": jnp.ones(5),
        "b": jnp.ones(3, jnp.int32),
        "c": jnp.ones(1),
        "x": jnp.ones(1),
        "it": counter,
    }
    from jaxckpt.storage.values import ValueReader

    def no_read(*args, **kwargs):
        pytest.fail("an array was read")

    monkeypatch.setattr(ValueReader, "read_many", no_read)
    assert problems(path, target) == {"a": "shape", "b": "dtype", "c": "kind", "x": "missing"}
    assert counter.position == 0


def test_partial_forgives_what_is_missing_and_nothing_else(tmp_path):
    path = saved(tmp_path, {"a": jnp.ones(2), "b": jnp.ones(3)})
    own = jnp.full(1, 7.0)
    tree, status = jaxckpt.restore(path, {"a": jnp.zeros(2), "x": own}, partial=True)
    assert tree["x"] is own
    assert status.missing == ("x",)
    assert status.unused == ("b",)
    assert problems(path, {"a": jnp.zeros(3), "x": own}, partial=True) == {"a": "shape"}
    assert problems(path, {"y": own, "x": own}, partial=("x",)) == {"y": "missing"}


def test_did_you_mean(tmp_path):
    path = saved(tmp_path, {"encoder": {"kernel": jnp.ones(2)}})
    with pytest.raises(jaxckpt.RestoreError, match="encoder/kernel"):
        jaxckpt.restore(path, {"encodr": {"kernel": jnp.ones(2)}})


# ---- casts and exact conversions ----


def test_a_cast_has_to_be_asked_for(tmp_path):
    path = saved(tmp_path, {"f": jnp.full(2, 1.5), "i": np.array([1, 127], np.int64)})
    target = {"f": jnp.zeros(2, jnp.bfloat16), "i": np.zeros(2, np.int8)}
    assert problems(path, target) == {"f": "dtype", "i": "dtype"}
    tree, status = jaxckpt.restore(path, target, cast=True)
    assert tree["f"].dtype == jnp.bfloat16
    assert tree["i"].tolist() == [1, 127]
    assert set(status.cast) == {"f", "i"}
    assert problems(path, target, cast=("f",)) == {"i": "dtype"}


def test_integers_are_never_wrapped(tmp_path):
    path = saved(tmp_path, {"i": np.array([1, 128], np.int64), "u": np.array([1], np.int64)})
    target = {"i": np.zeros(2, np.int8), "u": np.zeros(1, np.uint8)}
    assert problems(path, target, cast=True) == {"i": "dtype"}
    path = saved(tmp_path, {"i": np.array([-1], np.int64)})
    assert problems(path, {"i": np.zeros(1, np.uint64)}, cast=True) == {"i": "dtype"}


@pytest.mark.parametrize("wanted", [np.zeros(2, np.int32), np.zeros(2, bool), np.zeros(2, np.complex64)])
def test_cast_does_not_change_the_kind_of_number(tmp_path, wanted):
    path = saved(tmp_path, {"x": jnp.ones(2)})
    assert set(problems(path, {"x": wanted}, cast=True)) == {"x"}


@pytest.mark.parametrize(
    ("value", "target"),
    [
        (3, jnp.int32(0)),
        (3, np.int8(0)),
        (jnp.int32(3), 0),
        (0.5, jnp.float32(0)),
        (jnp.bfloat16(0.5), 0.0),
        (True, jnp.bool_(False)),
        (np.bool_(True), False),
        (1 + 2j, np.complex64(0)),
    ],
)
def test_scalars_convert_where_that_is_exact(tmp_path, value, target):
    tree, _ = jaxckpt.restore(saved(tmp_path, {"x": value}), {"x": target})
    assert type(tree["x"]) is type(target)
    assert tree["x"] == value


@pytest.mark.parametrize(
    ("value", "target"),
    [
        (300, np.int8(0)),
        (0.1, jnp.float32(0)),
        (2**70, jnp.int32(0)),
        (1, 1.0),
        (1.0, 1),
        (True, 1),
        (1, True),
    ],
)
def test_scalars_that_would_lose_something_raise(tmp_path, value, target):
    assert set(problems(saved(tmp_path, {"x": value}), {"x": target})) == {"x"}


def test_keys_are_not_their_bits(tmp_path):
    path = saved(tmp_path, {"k": jax.random.key(0), "raw": jax.random.PRNGKey(0)})
    assert problems(path, {"k": jax.random.PRNGKey(0), "raw": jax.random.key(0)}, cast=True) == {
        "k": "kind",
        "raw": "kind",
    }
    assert problems(path, {"k": jax.random.key(0, impl="rbg")}) == {"k": "kind"}


def test_sixty_four_bits_while_x64_is_off(tmp_path):
    big = np.array([2**40], np.int64)
    path = saved(tmp_path, {"x": big})
    assert problems(path, {"x": jnp.zeros(1, jnp.int32)}) == {"x": "dtype"}
    with jax.enable_x64(True):
        path = saved(tmp_path, {"x": jnp.asarray(big)})
    tree, _ = jaxckpt.restore(path)
    assert isinstance(tree["x"], np.ndarray)
    assert tree["x"] == big
    with jax.enable_x64(True):
        assert isinstance(jaxckpt.restore(path).tree["x"], jax.Array)


# ---- iterators ----


def test_iterators_are_set_last_and_handed_back(tmp_path):
    source = Counter(5)
    path = saved(tmp_path, {"data": source, "w": jnp.ones(2)})
    assert source.calls == 1
    target = Counter()
    tree, status = jaxckpt.restore(path, {"data": target, "w": jnp.zeros(2)})
    assert tree["data"] is target
    assert target.position == 5
    assert target.calls == 0
    assert (target.given["history"][1] == np.arange(3)).all()
    assert status.restored["data"] == ("data",)
    state, _ = jaxckpt.restore(path)
    assert state["data"]["position"] == 5
    assert jaxckpt.load_checkpoint(path)["data"]["history"][0] == 5


def test_an_iterator_is_not_moved_by_a_restore_that_fails(tmp_path):
    path = saved(tmp_path, {"data": Counter(5), "n": 300})
    target = Counter()
    with pytest.raises(jaxckpt.RestoreError):
        jaxckpt.restore(path, {"data": target, "n": np.int8(0)})
    assert target.position == 0


def test_what_the_iterator_is_given_is_its_own(tmp_path):
    class Sneaky(Counter):
        def set_state(self, state):
            state["history"].clear()

    path = saved(tmp_path, {"data": Counter(5)})
    reader = jaxckpt.load_checkpoint(path)
    jaxckpt.restore(reader, {"data": Sneaky()}).status.assert_consumed()
    assert len(reader["data"]["history"]) == 2


# ---- abstract leaves and initialize ----


def test_initialize_computes_only_what_is_missing(tmp_path):
    path = saved(tmp_path, {"a": jnp.arange(3.0)})
    computed = []

    def record(x):
        computed.append(1)
        return x

    def init():
        a = jax.pure_callback(record, jax.ShapeDtypeStruct((3,), "float32"), jnp.zeros(3))
        return {"a": a, "b": jnp.full((2,), 5.0), "n": 4}

    target = {"a": jax.ShapeDtypeStruct((3,), "float32"), "b": jax.ShapeDtypeStruct((2,), "float32"), "n": 0}
    result = jaxckpt.restore(path, target, partial=True)
    with pytest.raises(jaxckpt.RestoreError, match="b: abstract"):
        _ = result.tree
    tree, status = result.initialize(init)
    assert tree["a"].tolist() == [0, 1, 2]
    assert tree["b"].tolist() == [5, 5]
    assert status.missing == ("b", "n")
    assert not computed
    jax.block_until_ready(jaxckpt.restore(None, target).initialize(init).tree)
    assert computed


def test_initialize_says_what_does_not_fit(tmp_path):
    target = {"a": jax.ShapeDtypeStruct((3,), "float32"), "b": jax.ShapeDtypeStruct((2,), "float32")}
    result = jaxckpt.restore(None, target)
    with pytest.raises(jaxckpt.RestoreError) as caught:
        result.initialize(lambda: {"a": jnp.zeros(4)})
    assert [problem.key for problem in caught.value.problems] == ["a", "b"]


def test_no_checkpoint_gives_the_target_back():
    target = {"a": jnp.ones(2), "n": 3}
    tree, status = jaxckpt.restore(None, target)
    assert tree["a"] is target["a"]
    with pytest.raises(jaxckpt.RestoreAssertionError, match="No checkpoint specified"):
        status.assert_consumed()


# ---- attach ----


def test_attach_at_any_depth_and_any_number_of_times(tmp_path):
    tree = {
        "net": {"l1": {"kernel": jnp.ones((1, 5)), "bias": jnp.full(5, 2.0)}},
        "listed": [jnp.ones(1), jnp.ones(2)],
    }
    path = saved(tmp_path, tree)
    first = jaxckpt.restore(
        path, {"net": {"l1": {"bias": jnp.zeros(5)}}, "listed": [jnp.zeros(1)]}, rename={"listed/1": None}
    )
    grown = first.attach("net/l1/kernel", jnp.zeros((1, 5)))
    assert (grown.tree["net"]["l1"]["kernel"] == 1).all()
    assert grown.tree["net"]["l1"]["bias"] is first.tree["net"]["l1"]["bias"]
    assert "kernel" not in first.tree["net"]["l1"]
    again = grown.attach("other", jnp.full(1, 7.0))
    assert again.tree["other"] == 7
    assert again.status.missing == ("other",)
    with pytest.raises(jaxckpt.RestoreError):
        first.attach("net/l1", {"kernel": jnp.zeros((2, 5))})


def test_attach_appends_to_lists(tmp_path):
    path = saved(tmp_path, {"listed": [jnp.ones(1), jnp.full(2, 2.0)]})
    result = jaxckpt.restore(path, {"listed": []})
    result = result.attach("listed/0", jnp.zeros(1)).attach("listed/1", jnp.zeros(2))
    assert (result.tree["listed"][1] == 2).all()
    result.assert_consumed()


@pytest.mark.parametrize("optimizer_first", [True, False])
def test_slots_come_as_soon_as_both_sides_are_there(tmp_path, optimizer_first):
    params = {"w": jnp.ones(3)}
    adam = optax.adam(1e-3)
    _, state = adam.update({"w": jnp.full(3, 0.5)}, adam.init(params))
    path = saved(tmp_path, {"net": params, "opt": state})
    fresh = {"net": {"w": jnp.zeros(3)}, "opt": adam.init(params)}
    order = ["opt", "net"] if optimizer_first else ["net", "opt"]
    result = jaxckpt.restore(path, {order[0]: fresh[order[0]]}).attach(order[1], fresh[order[1]])
    assert (result.tree["opt"][0].mu["w"] == state[0].mu["w"]).all()
    assert (result.tree["net"]["w"] == 1).all()
    result.assert_consumed().assert_existing_objects_matched()


def test_what_is_pending_reads_what_was_opened(tmp_path):
    path = saved(tmp_path, {"a": jnp.ones(2), "b": jnp.full(1000, 2.0)})
    result = jaxckpt.restore(path, {"a": jnp.zeros(2)})
    jaxckpt.save(path, {"a": jnp.zeros(2), "b": jnp.zeros(1000)}, overwrite=True)
    assert (result.attach("b", jnp.zeros(1000)).tree["b"] == 2).all()


# ---- without a target ----


def test_at_without_a_target(tmp_path):
    path = saved(tmp_path, {"net": {"a": jnp.ones(2), "l": (1, [2.5, "x"])}, "other": 1})
    tree, status = jaxckpt.restore(path, at="net/l")
    assert tree == (1, [2.5, "x"])
    status.assert_consumed()
    assert jaxckpt.restore(path, at="other").tree == 1
    with pytest.raises(jaxckpt.RestoreError, match="net"):
        jaxckpt.restore(path, at="nett")


def test_where_arrays_go_without_a_target(tmp_path):
    path = saved(tmp_path, {"a": jnp.arange(8.0), "k": jax.random.key(1)})
    assert isinstance(jaxckpt.restore(path, sharding=np.ndarray).tree["a"], np.ndarray)
    split = NamedSharding(jax.make_mesh((8,), ("d",)), P())
    assert jaxckpt.restore(path, sharding=split).tree["a"].sharding == split
    one = SingleDeviceSharding(jax.devices()[3])
    chosen = jaxckpt.restore(path, sharding=lambda key, spec: one if key == "a" else None).tree
    assert chosen["a"].sharding == one


def test_rules_need_a_target(tmp_path):
    path = saved(tmp_path, {"a": 1})
    with pytest.raises(ValueError, match="rename= speaks about a target"):
        jaxckpt.restore(path, rename={"a": "b"})
    with pytest.raises(ValueError, match="the target decides"):
        jaxckpt.restore(path, {"a": 1}, sharding=np.ndarray)


# ---- the result as an object ----


def test_a_result_says_how_it_is_used(tmp_path):
    result = jaxckpt.restore(saved(tmp_path, {"a": 1}), {"a": 0})
    with pytest.raises(TypeError, match=r"\.tree\['a'\]"):
        result["a"]
    with pytest.raises(AttributeError, match=r"\.tree\.a"):
        result.a
    assert result.assert_consumed() is result
    assert result.tree == {"a": 1}


def test_a_result_thrown_away_is_warned_about(tmp_path):
    path = saved(tmp_path, {"a": 1})
    with pytest.warns(jaxckpt.RestoreIgnoredWarning, match="nothing is restored in place"):
        jaxckpt.restore(path, {"a": 0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jaxckpt.restore(path, {"a": 0}).tree
        gc.collect()


# ---- memory and progress ----


@pytest.mark.parametrize("limit", [1, 3000, None])
def test_groups_within_the_memory_limit(tmp_path, limit):
    tree = {f"x{i}": np.full(100, i) for i in range(40)}
    path = saved(tmp_path, tree, memory_limit=limit)
    seen = []
    result, _ = jaxckpt.restore(path, tree, memory_limit=limit, progress=lambda *args: seen.append(args))
    assert all((result[key] == tree[key]).all() for key in tree)
    done, totals = zip(*seen, strict=True)
    assert list(done) == sorted(done)
    assert done[-1] == totals[0] == 40 * 800
    assert seen[0] == (0, 40 * 800)


def test_dtypes_keep_their_bits(tmp_path):
    values = {
        "bf16": np.arange(5).astype(ml_dtypes.bfloat16),
        "e4m3": np.arange(5).astype(ml_dtypes.float8_e4m3fn),
        "nan": np.array([np.nan, -0.0, np.inf], np.float32),
        "i4": np.arange(-8, 8).astype(ml_dtypes.int4),
        "u2": np.arange(4).astype(ml_dtypes.uint2),
    }
    path = saved(tmp_path, values)
    for tree in (jaxckpt.restore(path, values).tree, jaxckpt.restore(path).tree):
        for key, value in values.items():
            assert tree[key].dtype == value.dtype
            assert tree[key].tobytes() == value.tobytes()


def test_itertools_style_combination_of_rules(tmp_path):
    path = saved(tmp_path, {"a": {"w": jnp.ones(2)}, "b": {"w": jnp.full(2, 2.0)}, "c": jnp.ones(1)})
    target = {"b": {"w": jnp.zeros(2)}, "a": {"w": jnp.zeros(2)}, "d": jnp.zeros(1)}
    for fresh, partial in itertools.product([(), ("d",)], [False, True]):
        if not fresh and not partial:
            assert problems(path, target, rename={"a": "b", "b": "a"}) == {"d": "missing"}
            continue
        tree, status = jaxckpt.restore(
            path, target, rename={"a": "b", "b": "a"}, fresh=fresh, partial=partial
        )
        assert (tree["b"]["w"] == 1).all()
        assert (tree["a"]["w"] == 2).all()
        assert status.fresh == fresh
        assert status.missing == (() if fresh else ("d",))


def test_a_directory_of_checkpoints_is_no_checkpoint(tmp_path):
    jaxckpt.save(tmp_path / "a", {"x": 1})
    with pytest.raises(jaxckpt.UnsupportedFormatError, match="directory of checkpoints"):
        jaxckpt.restore(tmp_path, {"x": 0})
    with pytest.raises(jaxckpt.CheckpointNotFoundError, match="'a'"):
        jaxckpt.restore(tmp_path / "aa", {"x": 0})


def test_arrays_in_an_iterators_state_keep_their_type(tmp_path):
    class Keyed(Counter):
        def get_state(self):
            return {
                "position": 3,
                "key": jax.random.key(2),
                "x": jnp.ones(2),
                "n": np.int8(3),
                "h": np.arange(2),
            }

    path = saved(tmp_path, {"data": Keyed()})
    target = Counter()
    jaxckpt.restore(path, {"data": target}).status.assert_consumed()
    assert target.given["key"].dtype == jax.random.key(0).dtype
    assert isinstance(target.given["x"], jax.Array)
    assert type(target.given["n"]) is np.int8
    assert type(target.given["h"]) is np.ndarray
    assert isinstance(jaxckpt.load_checkpoint(path)["data"]["x"], np.ndarray)


def test_nothing_is_printed_at_exit(tmp_path):
    import os
    import subprocess
    import sys

    path = saved(tmp_path, {"a": 1, "b": 2})
    code = f"import jaxckpt; result = jaxckpt.restore({str(path)!r}, {{'a': 0}})"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run(
        [sys.executable, "-W", "always::UserWarning", "-c", code], capture_output=True, text=True, env=env
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_cast_allows_a_python_float_to_lose_precision(tmp_path):
    path = saved(tmp_path, {"x": 0.1, "n": 300})
    tree, status = jaxckpt.restore(path, {"x": jnp.float32(0), "n": 0}, cast=("x",))
    assert tree["x"] == np.float32(0.1)
    assert status.cast == ("x",)
    assert problems(path, {"x": ..., "n": np.int8(0)}, cast=True) == {"n": "dtype"}


# ---- what initialize computes is like the target ----


def test_initialize_gives_the_targets_types(tmp_path):
    mesh, other = (
        jax.make_mesh((4,), ("d",), devices=jax.devices()[:4]),
        jax.make_mesh((4,), ("d",), devices=jax.devices()[4:]),
    )
    target = {
        "strong": jax.ShapeDtypeStruct((), "float32"),
        "weak": jax.ShapeDtypeStruct((), "float32", weak_type=True),
        "split": jax.ShapeDtypeStruct((8,), "float32", sharding=NamedSharding(mesh, P("d"))),
        "there": jax.ShapeDtypeStruct((8,), "float32", sharding=NamedSharding(other, P("d"))),
        "one": jax.ShapeDtypeStruct((2,), "float32", sharding=SingleDeviceSharding(jax.devices()[3])),
        "free": jax.ShapeDtypeStruct((2,), "float32"),
        "key": jax.eval_shape(lambda: jax.random.key(0)),
        "host": jax.ShapeDtypeStruct((2,), "float32"),
    }

    def init():
        return {
            "strong": jnp.full((), 1.0),
            "weak": jnp.float32(1),
            "split": jnp.arange(8.0),
            "there": jnp.arange(8.0),
            "one": jnp.ones(2),
            "free": jnp.ones(2),
            "key": jax.random.key(3),
            "host": np.ones(2, np.float32),
        }

    for active in (mesh, jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])):
        with jax.set_mesh(active):
            tree = jaxckpt.restore(None, target).initialize(init).tree
        for name, value in tree.items():
            assert isinstance(value, jax.Array), name
            assert value.dtype == target[name].dtype
            assert bool(getattr(value, "weak_type", False)) == (name == "weak"), name
            assert value.committed == (target[name].sharding is not None), name
            if target[name].sharding is not None:
                assert value.sharding == target[name].sharding
        assert (np.asarray(tree["there"]) == np.arange(8)).all()
        assert (jax.random.key_data(tree["key"]) == jax.random.key_data(jax.random.key(3))).all()


def test_initialize_names_the_kind_of_problem():
    target = {name: jax.ShapeDtypeStruct((2,), "float32") for name in "abcd"}
    with pytest.raises(jaxckpt.RestoreError) as caught:
        jaxckpt.restore(None, target).initialize(
            lambda: {"a": jnp.ones(2, jnp.bfloat16), "b": 3, "c": jnp.ones(3)}
        )
    assert {p.key: p.kind for p in caught.value.problems} == {
        "a": "dtype", "b": "kind", "c": "shape", "d": "missing"
    }  # fmt: skip


def test_a_mesh_without_a_target(tmp_path):
    eight = jax.make_mesh((4, 2), ("a", "b"))
    tree = {
        "x": jax.device_put(jnp.arange(16.0).reshape(8, 2), NamedSharding(eight, P("a", "b"))),
        "y": jax.device_put(jnp.arange(8.0), NamedSharding(eight, P(("a", "b")))),
        "n": 3,
    }
    path = saved(tmp_path, tree)
    for mesh, want in ((jax.make_mesh((2,), ("a",)), P("a")), (jax.make_mesh((3,), ("a",)), P())):
        result = jaxckpt.restore(path, sharding=mesh).tree
        assert result["x"].sharding.is_equivalent_to(NamedSharding(mesh, want), 2)
        assert (np.asarray(result["x"]) == np.arange(16.0).reshape(8, 2)).all()
        assert result["n"] == 3


def test_metadata_is_copied(tmp_path):
    metadata = {"a": [1]}
    future = jaxckpt.save_async(tmp_path / "a", {"w": np.ones(1_000_000)}, metadata=metadata)
    metadata["a"].append({2})
    future.result()
    assert jaxckpt.load_checkpoint(tmp_path / "a").metadata == {"a": [1]}


def test_a_function_in_an_iterators_state_is_refused(tmp_path):
    class Odd(Counter):
        def get_state(self):
            return {"dtype": np.float32}

    with pytest.raises(jaxckpt.UnsupportedLeafError, match="data/dtype"):
        jaxckpt.save(tmp_path / "a", {"data": Odd()})


def test_an_iterators_state_of_a_class_that_is_not_at_hand(tmp_path):
    import flax.struct

    @flax.struct.dataclass
    class State:
        position: int

    class Odd(Counter):
        def get_state(self):
            return State(position=3)

        def set_state(self, state):
            self.position = state.position

    path = saved(tmp_path, {"data": Odd()})
    target = Odd()
    jaxckpt.restore(path, {"data": target}).status.assert_consumed()
    assert target.position == 3


def test_overflow_is_no_warning(tmp_path):
    path = saved(tmp_path, {"x": 1e300, "y": np.array([1e300])})
    assert problems(path, {"x": jnp.float32(0), "y": ...}) == {"x": "dtype"}
    tree, _ = jaxckpt.restore(path, {"x": jnp.float32(0), "y": np.zeros(1, np.float32)}, cast=True)
    assert np.isinf(tree["x"])
    assert np.isinf(tree["y"])


def test_a_transform_that_raises_says_of_what(tmp_path):
    path = saved(tmp_path, {"x": jnp.ones(2)})
    with pytest.raises(ZeroDivisionError) as caught:
        jaxckpt.restore(path, {"y": jnp.ones(2)}, transform={"y": ("x", lambda x: 1 // 0)})
    assert caught.value.__notes__ == ["This is the transform of x to y."]


def test_readers_compare_by_identity(tmp_path):
    path = saved(tmp_path, {"x": jnp.ones(2)})
    reader = jaxckpt.load_checkpoint(path)
    assert reader == reader
    assert reader != jaxckpt.load_checkpoint(path)
    assert reader in {reader}
    assert reader.save_counter is None
