import gc
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.errors import RestoreError, UnsupportedLeafError
from jaxckpt.graph.model import ArraySpec, Sharding
from jaxckpt.graph.pytree.shardings import describe_sharding
from jaxckpt.storage import place as place_module
from jaxckpt.storage.devices import Placement, hold, hold_all, place
from jaxckpt.storage.format.dtypes import dtype_name

DEVICES = jax.devices()
MESH = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
EXPLICIT = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
double = jax.jit(lambda x: x * 2, donate_argnums=0)

NAMES = sorted(
    name
    for name in dir(ml_dtypes)
    if isinstance(getattr(ml_dtypes, name), type) and issubclass(getattr(ml_dtypes, name), np.generic)
)


def on(mesh, *spec, **kwargs):
    return NamedSharding(mesh, P(*spec), **kwargs)


def spec_of(array, **changes):
    """The spec that flattening this target would make."""
    kwargs = {"shape": array.shape, "dtype": str(array.dtype)}
    if isinstance(array, jax.Ref):
        kwargs["ref"] = True
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(array.shape, array.dtype))
        kwargs |= {"array_type": "key", "impl": array.dtype._impl.name, "dtype": str(data.dtype)}
        kwargs["key_shape"] = data.shape[len(array.shape) :]
    else:
        kwargs["weak_type"] = bool(getattr(array, "weak_type", False))
    return ArraySpec(**(kwargs | changes))


def back(target, host=None):
    """A target's value held and made again."""
    host = hold(target) if host is None else host
    [result] = place([Placement(host=host, spec=spec_of(target), like=target)])
    return result


def same(result, target):
    assert type(result) is type(target)
    assert jax.typeof(result) == jax.typeof(target)
    assert result.sharding == target.sharding
    assert result.sharding.memory_kind == target.sharding.memory_kind
    assert result.committed == target.committed
    assert hold(result).tobytes() == hold(target).tobytes()


# ---- holding


@pytest.mark.parametrize("size", [1, 10, 1 << 18])
def test_held_values_survive_donation_deletion_and_reuse(size):
    want = np.arange(size, dtype=np.float32) + 1
    for fate in ("donate", "delete", "drop"):
        array = jnp.asarray(want) + 0
        held = hold(array)
        if fate == "donate":
            later = double(array)
            for _ in range(5):
                later = double(later)
        elif fate == "delete":
            array.delete()
        del array
        gc.collect()
        others = [jnp.full(size, 3.0) + i for i in range(20)]
        jax.block_until_ready(others)
        np.testing.assert_array_equal(held, want)


def test_holding_shows_memory_and_keeps_nothing_afterwards():
    array = jnp.arange(1024.0) + 0
    held = hold_all([array])
    assert held.nbytes == 0
    assert not held.arrays[0].flags.writeable
    assert held.arrays[0].ctypes.data == array.unsafe_buffer_pointer()
    address = array.unsafe_buffer_pointer()
    del held
    assert double(array).unsafe_buffer_pointer() == address  # donated as if nothing had happened


def test_sharded_arrays_survive_donation_too():
    want = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    for spec in (("a", "b"), ("b", None), (("a", "b"), None), ()):
        array = jax.device_put(want, on(MESH, *spec))
        held = hold(array)
        for _ in range(3):
            array = double(array)
        np.testing.assert_array_equal(held, want)


def test_numpy_and_refs_are_copied():
    array = np.arange(6, dtype=np.int32).reshape(2, 3)[:, ::2]
    ref, key_ref = jax.new_ref(jnp.arange(3.0)), jax.new_ref(jax.random.key(3))
    held = hold_all([array, np.float64(2.5), ref, key_ref])
    array[...] = 7
    ref[...] = jnp.ones(3)
    np.testing.assert_array_equal(held.arrays[0], [[0, 2], [3, 5]])
    assert held.arrays[0].flags.c_contiguous
    assert held.arrays[1] == 2.5
    assert held.arrays[1].shape == ()
    np.testing.assert_array_equal(held.arrays[2], [0, 1, 2])
    np.testing.assert_array_equal(held.arrays[3], jax.random.key_data(jax.random.key(3)))
    assert held.nbytes == sum(a.nbytes for a in held.arrays)


def test_copy_protects_from_writes_to_memory_that_jax_was_given():
    memory = np.zeros(4096, np.float32)
    array = jax.dlpack.from_dlpack(memory)
    held = hold(array, copy=True)
    memory[:] = 1
    assert not held.any()
    assert held.flags.owndata


def test_gathering_runs_nothing_on_the_devices_and_keeps_nothing_in_the_array():
    whole = jax.device_put(np.arange(64.0).reshape(8, 8), on(MESH, "b", "a"))
    with jax.log_compiles(False):
        before = whole.__dict__.keys() - {"addressable_shards"}
        np.testing.assert_array_equal(hold(whole), np.arange(64.0).reshape(8, 8))
        assert whole.__dict__.keys() - {"addressable_shards"} == before


def test_replicated_arrays_are_shown_from_one_shard():
    array = jax.device_put(np.ones((4, 4), np.float32), on(MESH))
    assert hold_all([array]).nbytes == 0


def test_layouts_other_than_row_major_are_made_contiguous():
    array = jax.device_put(
        np.arange(6.0).reshape(2, 3), Format(Layout((1, 0)), SingleDeviceSharding(DEVICES[0]))
    )
    held = hold(array)
    assert held.flags.c_contiguous
    np.testing.assert_array_equal(held, np.arange(6.0).reshape(2, 3))


def test_deleted_arrays_raise():
    array = jnp.ones(3) + 0
    array.delete()
    sharded = jax.device_put(np.ones(8), on(MESH, "a"))
    sharded.delete()
    for gone in (array, sharded):
        with pytest.raises(UnsupportedLeafError, match="deleted"):
            hold(gone)
    with pytest.raises(UnsupportedLeafError, match="no array"):
        hold({})


def test_settings_of_the_thread_do_not_matter_to_a_hold():
    array = jnp.asarray([np.nan, 1.0])
    ref = jax.new_ref(array)
    with jax.debug_nans(True), jax.transfer_guard("disallow"), jax.disable_jit(), jax.set_mesh(EXPLICIT):
        for held in hold_all([array, ref]).arrays:
            assert np.isnan(held[0])


# ---- both ways


@pytest.mark.parametrize("dtype", [*NAMES, "bool", "int8", "uint16", "float16", "float32", "complex64"])
@pytest.mark.parametrize("shape", [(), (0, 3), (8, 3)])
def test_every_dtype(dtype, shape):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    bits = np.random.default_rng(0).integers(0, 2, (*shape, dtype.itemsize), np.uint8)
    host = bits.view(dtype).reshape(shape) if bits.size else np.zeros(shape, dtype)
    for sharding in (None, on(MESH, "a") if shape == (8, 3) else on(MESH)):
        try:
            target = jax.device_put(host, sharding)
            jax.block_until_ready(target)
        except (TypeError, ValueError, RuntimeError):  # this jax does not have it
            assert "float6" in dtype.name or "complex32" in dtype.name
            return
        same(back(target), target)
        abstract = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        spec = ArraySpec(shape=shape, dtype=dtype_name(dtype))
        [result] = place([Placement(host=hold(target), spec=spec, like=abstract)])
        same(result, target)


def test_high_bits_of_small_values_are_zero():
    for name in ("int4", "uint4", "int2", "float4_e2m1fn"):
        dtype = np.dtype(getattr(ml_dtypes, name))
        dirty = np.full(4, 0xFF, np.uint8).view(dtype)
        held = hold(dirty)
        assert held.view(np.uint8).max() < 16
        assert held.view(np.uint8).min() > 0
        np.testing.assert_array_equal(held.astype(np.float32), hold(jax.device_put(held)).astype(np.float32))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_keys(impl):
    key = jax.random.key(7, impl=impl)
    keys = jax.random.split(key, (8, 2))
    for target in (
        *(key, keys, jax.device_put(key, DEVICES[2]), jax.device_put(key, on(MESH))),
        *(jax.device_put(keys, on(MESH, "a")), jax.device_put(keys, on(EXPLICIT, ("a", "b"), None))),
        jax.device_put(keys, on(MESH, None, "b")),
    ):
        same(back(target), target)
    assert jax.random.bits(back(key)) == jax.random.bits(key)


def test_targets_of_every_place():
    value = np.arange(64.0, dtype=np.float32).reshape(8, 8)
    kinds = {memory.kind for memory in DEVICES[0].addressable_memories()} - {"device"}
    for target in (
        *(jnp.asarray(value), jax.device_put(value, DEVICES[0]), jax.device_put(value, DEVICES[5])),
        *(
            jax.device_put(value, on(mesh, *spec))
            for mesh in (MESH, EXPLICIT)
            for spec in ((), ("a",), ("b", "a"))
        ),
        *(
            jax.device_put(value, SingleDeviceSharding(DEVICES[1], memory_kind=kind))
            for kind in sorted(kinds)
        ),
        *(jax.device_put(value, on(MESH, "a", memory_kind=kind)) for kind in sorted(kinds)),
    ):
        same(back(target), target)
    with jax.default_device(DEVICES[3]):
        target = jnp.zeros(4)
    same(back(target), target)
    assert back(target).sharding == SingleDeviceSharding(DEVICES[3])


def test_layouts_are_kept():
    target = jax.device_put(np.ones((2, 3)), Format(Layout((1, 0)), SingleDeviceSharding(DEVICES[0])))
    abstract = jax.ShapeDtypeStruct((2, 3), target.dtype, sharding=target.format)
    for like in (target, abstract):
        [result] = place([Placement(host=hold(target), spec=spec_of(target), like=like)])
        same(result, target)
        assert result.format == target.format


def test_deleted_targets_do():
    target = jax.device_put(np.ones((8, 2), np.float32), on(MESH, "a"))
    target.delete()
    [result] = place([Placement(host=np.zeros((8, 2), np.float32), spec=spec_of(target), like=target)])
    assert result.sharding == target.sharding
    assert result.committed


@pytest.mark.parametrize("dtype", ["int32", "float32", "complex64", "int64", "float64", "complex128"])
@pytest.mark.parametrize("shape", [(), (3,), (8, 2)])
def test_weak_types(dtype, shape):
    zero = {"i": 0, "f": 0.0, "c": 0j}[np.dtype(dtype).kind]
    with jax.enable_x64(dtype in ("int64", "float64", "complex128")):
        weak = jnp.broadcast_to(zero, shape) + zero
        assert jax.typeof(weak).weak_type
        assert weak.dtype == dtype
    value = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    result = back(weak, value)
    same(result, weak if not shape else result)
    assert jax.typeof(result) == jax.typeof(weak)
    assert not result.committed
    np.testing.assert_array_equal(hold(result), value)
    if shape == (8, 2) and dtype == "float32":
        target = jax.device_put(weak, on(MESH, "a"))
        result = back(target, value)
        assert jax.typeof(result) == jax.typeof(target)
        assert result.sharding == target.sharding


def test_refs():
    for value in (
        *(
            jnp.arange(4.0),
            jax.device_put(np.arange(8.0), on(MESH, "a")),
            jax.random.key(1),
            jnp.asarray(2.0),
        ),
        jax.device_put(np.arange(4.0), DEVICES[3]),
    ):
        target = jax.new_ref(value)
        result = back(target)
        same(result, target)
        assert result is not target
    target = jax.new_ref(jnp.zeros(3))
    result = back(target, np.ones(3, np.float32))
    assert not hold(target).any()  # the target's own is not written to
    result[...] = jnp.full(3, 5.0)
    assert hold(result)[0] == 5


# ---- placing


def test_no_target_and_numpy():
    host = np.arange(6, dtype=np.float32).reshape(2, 3)
    jax_spec = ArraySpec(shape=(2, 3), dtype="float32")
    numpy_spec = ArraySpec(shape=(2, 3), dtype="float32", array_type="numpy")
    scalar = ArraySpec(shape=(), dtype="bfloat16", array_type="scalar")
    number = np.array(0.5, ml_dtypes.bfloat16)
    read_only = host.view()
    read_only.flags.writeable = False
    a, b, c, d, e = place(
        [
            Placement(host=host, spec=jax_spec),
            Placement(host=read_only, spec=numpy_spec, owned=True),
            Placement(host=host, spec=numpy_spec, owned=True),
            Placement(host=number, spec=scalar),
            Placement(host=host, spec=jax_spec, sharding=on(MESH, "b")),
        ]
    )
    assert not a.committed
    assert a.sharding == jnp.zeros(1).sharding
    assert b.flags.owndata
    assert b.flags.writeable
    assert c is host
    assert type(d) is ml_dtypes.bfloat16
    assert e.sharding == on(MESH, "b")
    assert e.committed
    host[...] = 0
    np.testing.assert_array_equal(hold(a), np.arange(6).reshape(2, 3))
    np.testing.assert_array_equal(hold(e), np.arange(6).reshape(2, 3))


def aligned(array, offset=0):
    memory = np.zeros(array.nbytes + 192, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    view = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    view[...] = array
    return view


@pytest.mark.parametrize("offset", [0, 16, 48, 8])
@pytest.mark.parametrize("count", [1, 300])
@pytest.mark.parametrize(
    "where", [None, SingleDeviceSharding(DEVICES[1]), on(MESH, "a"), on(MESH), on(MESH, "b", "a")]
)
def test_results_are_xlas_own_and_can_be_donated(offset, count, where):
    count = count if where is None or isinstance(where, SingleDeviceSharding) else 1
    value = np.arange(16 * 64, dtype=np.float32).reshape(16, 64)
    hosts = [aligned(value + i, offset) for i in range(count)]
    spec = ArraySpec(shape=value.shape, dtype="float32")
    results = place([Placement(host=host, spec=spec, sharding=where) for host in hosts])
    for host in hosts:
        host[...] = -1
    for i, result in enumerate(results):
        np.testing.assert_array_equal(hold(result), value + i)
    pointers = [shard.data.unsafe_buffer_pointer() for shard in results[-1].addressable_shards]
    later = double(results[-1])
    assert [shard.data.unsafe_buffer_pointer() for shard in later.addressable_shards] == pointers
    assert results[-1].is_deleted()


def test_many_of_several_kinds_come_back_in_order():
    hosts = [np.full((i % 3, 4), i, [np.float32, np.int32][i % 2]) for i in range(1500)]
    targets = [
        jax.device_put(host, DEVICES[i % 5]) if i % 7 else jnp.asarray(host) for i, host in enumerate(hosts)
    ]
    results = place([Placement(host=h, spec=spec_of(t), like=t) for h, t in zip(hosts, targets, strict=True)])
    for result, target in zip(results, targets, strict=True):
        same(result, target)


HOSTILE = {
    "set_mesh auto": lambda: jax.set_mesh(MESH),
    "set_mesh explicit": lambda: jax.set_mesh(EXPLICIT),
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "debug_infs": lambda: jax.debug_infs(True),
    "transfer_guard": lambda: jax.transfer_guard("disallow_explicit"),
    "x64": lambda: jax.enable_x64(True),
    "default_device": lambda: jax.default_device(DEVICES[4]),
    "leaks": jax.checking_leaks,
    "promotion": lambda: jax.numpy_dtype_promotion("strict"),
}


@pytest.mark.parametrize("setting", sorted(HOSTILE))
def test_settings_of_the_callers_thread_change_nothing(setting):
    value = np.array([[np.nan, np.inf], [1, 2]] * 4, np.float32)
    targets = [
        *(jnp.asarray(value), jax.device_put(value, DEVICES[2]), jax.device_put(value, on(EXPLICIT, "a"))),
        *(jax.random.key(0), jnp.asarray(1.5), jax.new_ref(jnp.asarray(value))),
        *(jnp.asarray(value) for _ in range(300)),
    ]
    hosts = hold_all(targets).arrays
    with HOSTILE[setting]():
        placements = [Placement(host=h, spec=spec_of(t), like=t) for h, t in zip(hosts, targets, strict=True)]
        results = place(placements)
        [plain] = place([Placement(host=value, spec=ArraySpec(shape=(8, 2), dtype="float32"))])
    for result, target in zip(results, targets, strict=True):
        same(result, target)
    assert not plain.committed
    assert plain.sharding == SingleDeviceSharding(DEVICES[4 if setting == "default_device" else 0])


def test_a_step_traced_before_is_not_traced_again():
    count = 0

    @jax.jit
    def step(tree):
        nonlocal count
        count += 1
        return jax.tree.map(lambda x: x, tree)

    value = np.ones((8, 2), np.float32)
    for mesh in (MESH, EXPLICIT):
        with jax.set_mesh(mesh):
            targets = [
                jnp.zeros((8, 2)),
                jax.device_put(value, on(mesh, "a")),
                jnp.asarray(1.0),
                jax.random.key(0),
            ]
            step(targets)
            before = count
            step([back(target) for target in targets])
            assert count == before
    targets = [jnp.zeros((8, 2)), jax.random.key(0), jnp.asarray(2.0), jax.device_put(value, DEVICES[0])]
    step(targets)
    before = count
    step([back(target) for target in targets])
    assert count == before


def test_abstract_meshes_are_those_that_are_set():
    host = np.arange(16, dtype=np.float32).reshape(8, 2)
    spec = ArraySpec(shape=(8, 2), dtype="float32")
    with jax.set_mesh(EXPLICIT):
        make = jax.jit(lambda: jax.sharding.reshard(jnp.zeros((8, 2)), P("a")))
        target = jax.eval_shape(make)
        [result] = place([Placement(host=host, spec=spec, like=target)])
        assert jax.typeof(result) == jax.typeof(make())
        assert result.sharding == make().sharding
    with pytest.raises(RestoreError, match=r"set_mesh\(mesh\)"):
        place([Placement(host=host, spec=spec, like=target)])


def test_64_bit_values_stay_what_they_are():
    host = np.array([2**40], np.int64)
    [result] = place([Placement(host=host, spec=ArraySpec(shape=(1,), dtype="int64", array_type="numpy"))])
    assert result.dtype == np.int64
    with jax.enable_x64(True):
        target = jnp.asarray(host)
    same(back(target), target)


def test_errors_come_from_the_thread():
    threads = threading.active_count()
    with pytest.raises(ValueError, match="implies that array axis 0"):
        place(
            [
                Placement(
                    host=np.ones(3, np.float32),
                    spec=ArraySpec(shape=(3,), dtype="float32"),
                    sharding=on(MESH, "a"),
                )
            ]
        )
    assert threading.active_count() == threads


def test_what_needs_no_jax_starts_no_thread(monkeypatch):
    monkeypatch.setattr(place_module, "in_own_thread", None)
    spec = ArraySpec(shape=(1,), dtype="float32", array_type="numpy")
    assert place([Placement(host=np.ones(1, np.float32), spec=spec)])[0] == 1
    assert place([]) == []


# ---- describing


def describe(array):
    sharding = getattr(array, "sharding", None)
    return None if sharding is None else describe_sharding(sharding, tuple(array.shape))


def test_describe():
    value = np.ones((8, 2), np.float32)
    assert describe(value) is None
    assert describe(jnp.asarray(value)) is None
    assert describe(jax.device_put(value, DEVICES[3])) is None
    assert describe(jax.ShapeDtypeStruct((2,), "int32")) is None
    shape = (("a", 4), ("b", 2))
    kind = DEVICES[0].default_memory().kind
    for spec, want, shard in (
        (("a",), (("a",), ()), (2, 2)),
        ((("a", "b"),), (("a", "b"), ()), (1, 2)),
        ((None, "b"), ((), ("b",)), (8, 1)),
    ):
        expected = Sharding(mesh=shape, spec=want, shard_shape=shard, memory_kind=kind)
        array = jax.device_put(value, on(MESH, *spec))
        assert describe(array) == expected
        assert describe(jax.ShapeDtypeStruct((8, 2), "float32", sharding=on(MESH, *spec))) == expected
    keys = jax.device_put(jax.random.split(jax.random.key(0), 8), on(MESH, "a"))
    assert describe(keys) == Sharding(mesh=shape, spec=(("a",),), shard_shape=(2,), memory_kind=kind)
    pinned = jax.device_put(value, SingleDeviceSharding(DEVICES[0], memory_kind="pinned_host"))
    assert describe(pinned) == Sharding(shard_shape=(8, 2), memory_kind="pinned_host")
