"""Arrays that are read into: XLA's own memory, and otherwise those that `place` makes."""

import ctypes
import gc
import weakref

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxckpt.graph.flatten import flatten
from jaxckpt.graph.model import ArraySpec
from jaxckpt.storage import blank
from jaxckpt.storage.blank import blanks
from jaxckpt.storage.devices import Placement, hold, place
from jaxckpt.storage.slab import Slab

DEVICES = jax.devices()
DTYPES = sorted(
    {"bool", "int8", "uint16", "int32", "uint32", "int64", "float16", "float32", "float64", "complex64"}
    | {"complex128", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e8m0fnu"}
)


@pytest.fixture(autouse=True)
def always(monkeypatch):
    """Whether it pays is a matter of speed: here it always does."""
    monkeypatch.setattr(blank, "_LEAST", 1)
    monkeypatch.setattr(blank, "_LEAST_BYTES", 1)


def spec_of(target):
    return flatten(target, target=True).graph.leaves[0].spec


def filled(target, value):
    """A target's blank with a value written into it, or None."""
    [found] = blanks([spec_of(target)], [target], 1 << 40)
    if found is None:
        return None
    assert len(found.memory) == value.nbytes
    ctypes.memmove(found.memory, np.ascontiguousarray(value).ctypes.data, value.nbytes)
    return found.array


def same(result, expected):
    assert type(result) is type(expected)
    assert jax.typeof(result) == jax.typeof(expected)
    assert result.sharding == expected.sharding
    assert result.sharding.memory_kind == expected.sharding.memory_kind
    assert result.committed == expected.committed
    assert hold(result).tobytes() == hold(expected).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 5), (2, 1, 4)])
def test_what_is_read_into_is_what_is_copied(dtype, shape):
    dtype = np.dtype(getattr(ml_dtypes, dtype, dtype))
    bits = np.random.default_rng(0).integers(0, 2, int(np.prod(shape)) * dtype.itemsize, np.uint8)
    value = bits.view(dtype).reshape(shape)
    with jax.enable_x64(True):
        targets = (
            jnp.zeros(shape, dtype),
            jax.device_put(np.zeros(shape, dtype), DEVICES[3]),
            jax.ShapeDtypeStruct(shape, dtype),
            jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(DEVICES[2])),
        )
    for target in targets:
        [expected] = place([Placement(host=value, spec=spec_of(target), like=target)])
        result = filled(target, value)
        assert result is not None
        same(result, expected)


@pytest.mark.parametrize("shape", [(16,), (300, 300)])
def test_results_can_be_donated_without_a_copy(shape):
    result = filled(jnp.zeros(shape), np.ones(shape, np.float32))
    address = result.unsafe_buffer_pointer()
    later = jax.jit(lambda x: x * 2, donate_argnums=0)(result)
    assert result.is_deleted()
    assert later.unsafe_buffer_pointer() == address
    assert (later == 2).all()


def test_the_memory_keeps_the_array_alive():
    target = jnp.zeros(1000)
    [found] = blanks([spec_of(target)], [target], 1 << 40)
    memory, kept = found.memory, weakref.ref(found.array)
    view = np.ndarray((1000,), np.float32, memory)
    del found, memory
    gc.collect()
    assert kept() is not None
    view[:] = 3
    assert (kept() == 3).all()
    del view
    gc.collect()
    assert kept() is None


def test_many_at_once_are_each_their_own():
    targets = [jnp.zeros([4, 6][i % 2], [jnp.float32, jnp.int32][i % 3 % 2]) for i in range(333)]
    found = blanks([spec_of(target) for target in targets], targets, 1 << 40)
    for i, each in enumerate(found):
        each.memory[:] = bytes([i % 251]) * len(each.memory)
    for i, (each, target) in enumerate(zip(found, targets, strict=True)):
        assert jax.typeof(each.array) == jax.typeof(target)
        assert hold(each.array).tobytes() == bytes([i % 251]) * target.nbytes


def test_what_cannot_be_read_into_is_left_to_be_copied():
    mesh = jax.make_mesh((8,), ("d",))
    kinds = {memory.kind for memory in DEVICES[0].addressable_memories()} - {DEVICES[0].default_memory().kind}
    others = [
        jax.device_put(np.zeros(8, np.float32), NamedSharding(mesh, P("d"))),
        jax.device_put(
            np.zeros((2, 3), np.float32), Format(Layout((1, 0)), SingleDeviceSharding(DEVICES[0]))
        ),
        jax.random.key(0),
        jax.new_ref(jnp.zeros(3)),
        jnp.zeros((0, 3)),
        jnp.asarray(2.0) * 1,
        jnp.zeros(4, jnp.int4),
        *(
            jax.device_put(np.zeros(3), SingleDeviceSharding(DEVICES[0], memory_kind=kind))
            for kind in sorted(kinds)
        ),
    ]
    weak = jax.jit(lambda: jnp.full(3, 1.0) * 0 + jax.lax.full((3,), 2.0))()
    assert blanks([spec_of(other) for other in others], others, 1 << 40) == [None] * len(others)
    assert (filled(weak, np.ones(3, np.float32)) is None) == weak.weak_type


def test_it_is_done_where_it_pays(monkeypatch):
    monkeypatch.undo()
    spec = ArraySpec(shape=(256,), dtype="float32")
    likes = [jnp.zeros(256)] * 600
    assert blanks([spec] * 300, likes[:300], 1 << 40) == [None] * 300
    assert None not in blanks([spec] * 600, likes, 1 << 40)
    large = ArraySpec(shape=(1 << 22,), dtype="float32")
    abstract = [jax.ShapeDtypeStruct(large.shape, "float32")] * 8
    assert blanks([large] * 7, abstract[:7], 1 << 40) == [None] * 7
    assert None not in blanks([large] * 8, abstract, 1 << 40)
    [one] = blanks([spec], likes[:1], 1024)  # too large to be copied
    assert one is not None


@pytest.mark.parametrize(
    "setting",
    [
        lambda: jax.set_mesh(jax.make_mesh((8,), ("d",))),
        jax.disable_jit,
        lambda: jax.transfer_guard("disallow_explicit"),
        lambda: jax.default_device(DEVICES[4]),
        lambda: jax.enable_x64(True),
    ],
)
def test_settings_of_the_callers_thread_change_nothing(setting):
    target = jnp.zeros(5)
    with setting():
        result = filled(target, np.ones(5, np.float32))
    same(result, target + 1)


def test_forms_of_several_numbers_take_few_programs():
    def form(i, size=1 << 20):
        return blank._Form((i, size), np.dtype(np.float32))

    many = {form(i): 3 for i in range(1, 101)}
    assert [(len(forms), count) for forms, count in blank._programs(many)] == [(64, 3), (36, 3)]
    counts = {form(1): 1, form(2): 24, form(3): 24, form(4): 2}
    made = dict.fromkeys(counts, 0)
    runs = list(blank._programs(counts))
    for forms, count in runs:
        for each in forms:
            made[each] += count
    assert made == counts
    assert len(runs) == 3
    [(forms, count)] = blank._programs({form(1, 8): 100})
    assert (len(forms), count) == (64, 2)


def test_without_the_interface_all_are_copied(monkeypatch):
    target = jnp.zeros(5)
    monkeypatch.setattr(blank, "available", lambda: False)
    assert blanks([spec_of(target)], [target], 1) == [None]
    monkeypatch.undo()

    def refuse(*_):
        raise jax.errors.JaxRuntimeError("INVALID_ARGUMENT")

    monkeypatch.setattr(blank, "_program", refuse)
    assert blanks([spec_of(target)], [target], 1) == [None]


def test_only_known_structures_are_answered():
    from jaxckpt.storage import uninitialized as module

    def ask(**changes):
        """What the handler answers to a call with a question, one size in which is another."""
        version = module._Version(size=ctypes.sizeof(module._Version), major=7, minor=8)
        metadata = module._Metadata(size=36)
        metadata.version.size = changes.get("version", ctypes.sizeof(module._Version))
        extension = module._Extension(
            size=changes.get("extension", ctypes.sizeof(module._Extension)),
            kind=changes.get("kind", 1),
            metadata=ctypes.pointer(metadata),
        )
        metadata.size = changes.get("metadata", 36)
        interface = module._Interface(
            size=changes.get("interface", ctypes.sizeof(module._Interface)), version=version
        )
        call = module._Call(
            size=changes.get("call", ctypes.sizeof(module._Call)),
            extension=ctypes.pointer(extension) if changes.get("asks", True) else None,
            interface=ctypes.pointer(interface),
        )
        assert not module._function(ctypes.pointer(call))
        return metadata.version.major, metadata.version.minor

    assert ask() == (7, 8)
    assert ask(call=168, interface=400, metadata=60) == (7, 8)  # they grow
    for changes in ({"call": 16}, {"extension": 24}, {"metadata": 28}, {"interface": 16}, {"version": 32}):
        assert ask(**changes) == (0, 0)
    assert ask(kind=2) == ask(asks=False) == (0, 0)


def test_a_slab_is_used_again_and_no_device_takes_it_over():
    slab = Slab()
    first = slab.cut([100, 3, 0, 64])
    assert [len(part) for part in first] == [100, 3, 0, 64]
    for number, part in enumerate(first):
        part[:] = bytes([number]) * len(part)
    assert [bytes(part) for part in first] == [b"\0" * 100, b"\1" * 3, b"", b"\3" * 64]
    addresses = [np.frombuffer(part, np.uint8).ctypes.data for part in first if len(part)]
    assert all(address % 64 == 16 for address in addresses)
    again = slab.cut([50])
    assert np.frombuffer(again[0], np.uint8).ctypes.data == addresses[0]
    array = jax.device_put(np.frombuffer(first[3], np.float32))
    assert array.unsafe_buffer_pointer() != addresses[-1]
