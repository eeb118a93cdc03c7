"""TensorFlow's guide "Training checkpoints", told in JAX; its printed numbers come out as they stand there.

The numbers are what the guide prints with seed 0 in TensorFlow 2.21 (Keras's older Adam).
"""

from __future__ import annotations

import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_training import CountIter, assert_same, same_bits

import jaxckpt

LOSSES = [30.01, 23.42, 16.86, 10.40, 4.51, 0.99, 0.88, 0.63, 0.44, 0.35]
BIAS = [2.3229015, 3.3912137, 2.5017583, 4.6587796, 4.451101]
KERNEL = [4.620439, 4.6929374, 4.9402013, 4.8333507, 4.8946214]
ADAM = optax.adam(0.1, eps=1e-7)
MU = "net/l1/kernel/.OPTIMIZER_SLOT/optimizer/mu"


def net():
    kernel = jnp.array([[0.03136873, -0.38187599, 0.67780876, -0.78679633, -0.21013975]], jnp.float32)
    return {"l1": {"kernel": kernel, "bias": jnp.zeros(5)}}


@jax.jit
def train_step(parameters, optimizer, x, y):
    def loss_of(tree):
        error = x @ tree["l1"]["kernel"] + tree["l1"]["bias"] - y
        return jnp.mean(error * jax.lax.stop_gradient(jnp.sign(error)))  # |error|, slope 0 at 0

    loss, gradients = jax.value_and_grad(loss_of)(parameters)
    updates, optimizer = ADAM.update(gradients, optimizer)
    return optax.apply_updates(parameters, updates), optimizer, loss


def new_objects():
    """What a program makes when it starts; the guide's step starts at 1."""
    parameters = net()
    return jaxckpt.Checkpoint(step=1, optimizer=ADAM.init(parameters), net=parameters, iterator=CountIter())


def train(ckpt, steps, saved=lambda ckpt, loss: None):
    for _ in range(steps):
        parameters, optimizer, loss = train_step(ckpt.net, ckpt.optimizer, *next(ckpt.iterator))
        ckpt = ckpt.replace(net=parameters, optimizer=optimizer, step=ckpt.step + 1)
        if ckpt.step % 10 == 0:
            saved(ckpt, loss)
    return ckpt


def train_and_checkpoint(directory):
    """The guide's function: a program from its start. Returns the end, what it restored from, losses."""
    losses: list[float] = []

    def saved(ckpt, loss):
        manager.save(ckpt)
        losses.append(round(float(loss), 2))

    with jaxckpt.CheckpointManager(directory, max_to_keep=3) as manager:
        source = manager.latest_checkpoint
        ckpt, status = manager.restore(new_objects())
        if source:
            status.assert_consumed().assert_existing_objects_matched()
        ckpt = train(ckpt, 50, saved)
        manager.wait()
        return ckpt, source, losses, [os.path.basename(path) for path in manager.checkpoints]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The directory after both programs of the guide."""
    directory = tmp_path_factory.mktemp("guide") / "ckpts"
    runs = [train_and_checkpoint(directory) for _ in range(2)]
    return directory, runs


def test_a_second_program_goes_on_where_the_first_stopped(trained):
    directory, ((_, none, first, listed), (end, source, second, listed_after)) = trained
    assert none is None
    assert listed == ["ckpt-3", "ckpt-4", "ckpt-5"]
    assert os.path.basename(source) == "ckpt-5"
    assert first + second == LOSSES
    assert listed_after == ["ckpt-8", "ckpt-9", "ckpt-10"]
    assert end.step == 100
    assert type(end.step) is int
    names = sorted(name for name in os.listdir(directory) if not name.startswith("."))
    assert names == ["checkpoint", "ckpt-10", "ckpt-8", "ckpt-9"]
    assert os.path.basename(jaxckpt.latest_checkpoint(directory)) == "ckpt-10"


@pytest.fixture
def values_read(monkeypatch):
    """Counts the bytes of values that are read."""
    counted: list[int] = []
    preadv, pread = os.preadv, os.pread

    def counting_preadv(file, buffers, offset, *flags):
        counted.append(preadv(file, buffers, offset, *flags))
        return counted[-1]

    def counting_pread(file, length, offset):
        data = pread(file, length, offset)
        counted.append(len(data))
        return data

    monkeypatch.setattr(os, "preadv", counting_preadv)
    monkeypatch.setattr(os, "pread", counting_pread)
    return counted


def test_one_bias_by_one_path(trained, values_read):
    """A program that makes nothing but the bias restores nothing but the bias."""
    directory, _ = trained
    wanted = jaxckpt.Checkpoint(net=jaxckpt.Checkpoint(l1=jaxckpt.Checkpoint(bias=jnp.zeros(5))))
    restored = wanted.restore(jaxckpt.latest_checkpoint(directory))
    assert sum(values_read) <= 5 * 4  # small values may lie in the chunk table itself
    restored.assert_existing_objects_matched().assert_nontrivial_match()
    np.testing.assert_allclose(restored.tree.net.l1.bias, BIAS, rtol=1e-5)
    with pytest.raises(jaxckpt.RestoreAssertionError) as caught:
        restored.assert_consumed()
    for key in ("net/l1/kernel", MU, "step", "iterator", "optimizer/ScaleByAdamState/count"):
        assert key in str(caught.value)
    assert "net/l1/bias:" not in str(caught.value)
    assert dict(restored.status.restored) == {"net/l1/bias": ("net/l1/bias",)}
    assert len(restored.status.unused) == 8
    assert len(restored.status.slots_unused) == 4
    restored.expect_partial()


def test_one_small_array_beside_large_ones(tmp_path, values_read):
    large = {f"w{i}": jnp.full((512, 512), float(i)) for i in range(4)}
    jaxckpt.save(tmp_path / "c", {"net": {**large, "bias": jnp.arange(7.0)}})
    del values_read[:]
    got, _ = jaxckpt.restore(tmp_path / "c", {"net": {"bias": jnp.zeros(7), "w0": ..., "w3": ...}})
    assert sum(values_read) <= 4096
    assert got["net"]["w3"] is ...
    del values_read[:]
    np.testing.assert_array_equal(jaxckpt.load_checkpoint(tmp_path / "c")["net/w2"], 2.0)
    assert 512 * 512 * 4 <= sum(values_read) <= 512 * 512 * 4 + 4096


def test_the_kernel_attached_later_has_its_value(trained):
    directory, _ = trained
    path = jaxckpt.latest_checkpoint(directory)
    first = jaxckpt.restore(path, {"net": {"l1": {"bias": jnp.zeros(5)}}})
    restored = first.attach("net/l1", {"kernel": jnp.zeros((1, 5))})
    np.testing.assert_allclose(restored.tree["net"]["l1"]["kernel"], [KERNEL], rtol=1e-5)
    np.testing.assert_allclose(restored.tree["net"]["l1"]["bias"], BIAS, rtol=1e-5)
    restored.assert_existing_objects_matched()
    assert set(restored.status.restored) == {"net/l1/bias", "net/l1/kernel"}
    assert set(first.status.restored) == {"net/l1/bias"}  # the one before is as it was
    assert list(first.tree["net"]["l1"]) == ["bias"]


def test_attached_bit_by_bit_until_all_is_there(trained):
    """Attributes: a `Checkpoint` grows as well as a dict. The optimizer comes before one of its parameters."""
    directory, ((_, *_), (end, *_)) = trained
    restored = jaxckpt.Checkpoint(net=jaxckpt.Checkpoint(l1=jaxckpt.Checkpoint(bias=jnp.zeros(5)))).restore(
        jaxckpt.latest_checkpoint(directory)
    )
    restored = restored.attach("optimizer", ADAM.init(net()))
    restored = restored.attach("net/l1/kernel", jnp.ones((1, 5)))
    restored = restored.attach("step", 0)
    with pytest.raises(jaxckpt.RestoreAssertionError, match="iterator"):
        restored.assert_consumed()
    iterator = CountIter()
    restored = restored.attach("iterator", iterator).assert_consumed().assert_existing_objects_matched()
    assert iterator.position == end.iterator.position
    assert restored.tree.iterator is iterator
    whole = new_objects().restore(jaxckpt.latest_checkpoint(directory)).tree
    assert_same(restored.tree.optimizer, whole.optimizer)
    assert same_bits(restored.tree.net.l1.kernel, whole.net["l1"]["kernel"])
    assert restored.tree.step == 100


def test_a_list_that_grows(tmp_path):
    """The guide's ListTracking: what is appended restores, what is replaced is saved anew."""
    jaxckpt.save(tmp_path / "c", {"listed": [jnp.float32(5.0)], "mapped": {"one": jnp.float32(6.0)}})
    restored = jaxckpt.restore(tmp_path / "c", {"listed": []})
    restored = restored.attach("listed/0", jnp.float32(0.0)).attach("mapped/one", jnp.float32(0.0))
    assert restored.tree == {"listed": [5.0], "mapped": {"one": 6.0}}
    restored.assert_consumed()


def test_the_maps_of_the_reader(trained):
    directory, _ = trained
    reader = jaxckpt.load_checkpoint(directory)
    shapes = {
        "net/l1/bias": [5],
        "net/l1/bias/.OPTIMIZER_SLOT/optimizer/mu": [5],
        "net/l1/bias/.OPTIMIZER_SLOT/optimizer/nu": [5],
        "net/l1/kernel": [1, 5],
        MU: [1, 5],
        "net/l1/kernel/.OPTIMIZER_SLOT/optimizer/nu": [1, 5],
        "optimizer/ScaleByAdamState/count": [],
        "step": [],
    }
    assert reader.get_variable_to_shape_map() == shapes
    assert jaxckpt.list_variables(directory) == sorted(shapes.items())
    dtypes = reader.get_variable_to_dtype_map()
    assert dtypes.keys() == shapes.keys()
    assert dtypes[MU] == np.float32
    assert dtypes["optimizer/ScaleByAdamState/count"] == np.int32
    assert np.issubdtype(dtypes["step"], np.integer)
    np.testing.assert_allclose(
        reader.get_tensor("net/l1/kernel/.ATTRIBUTES/VARIABLE_VALUE"), [KERNEL], rtol=1e-5
    )
    assert reader["step"] == 100
    assert reader["iterator"] == {"position": 99}
    assert set(reader) == {*shapes, "iterator"}
    assert MU in reader.debug_string()


def test_the_graph_of_the_guide(trained):
    """The guide's picture: solid edges are the tree's, dotted ones the optimizer's."""
    directory, _ = trained
    for graph in (jaxckpt.load_checkpoint(directory).graph, jaxckpt.object_graph(new_objects())):
        edges = {(graph.nodes[edge.parent].key, edge.name) for edge in graph.edges}
        assert {(".", "step"), (".", "optimizer"), (".", "net"), (".", "iterator"), ("net", "l1")} <= edges
        assert {("net/l1", "kernel"), ("net/l1", "bias")} <= edges
        assert sorted((slot.optimizer, slot.variable, slot.name) for slot in graph.slots) == [
            ("optimizer", f"net/l1/{name}", field) for name in ("bias", "kernel") for field in ("mu", "nu")
        ]
        kinds = {node.key: node.kind for node in graph.nodes}
        assert kinds["optimizer"] == "optimizer"
        assert kinds["net/l1/kernel"] == "variable"
        assert kinds[MU] == "slot"
        assert kinds["step"] == "value"
        assert kinds["iterator"] == "iterator"


def test_a_manual_checkpoint(tmp_path):
    """The guide's `save` and `restore` by hand: the path comes back, and numbers follow each other."""
    ckpt = new_objects()
    assert [ckpt.save(tmp_path / "ckpt") for _ in range(2)] == [str(tmp_path / f"ckpt-{n}") for n in (1, 2)]
    assert ckpt.write(tmp_path / "other") == str(tmp_path / "other")
    got = new_objects().read(tmp_path / "other").assert_consumed().assert_existing_objects_matched().tree
    assert_same((got.net, got.optimizer, got.step), (ckpt.net, ckpt.optimizer, ckpt.step))


def test_restoring_from_nothing_gives_the_state_back(tmp_path):
    state = {"net": net(), "optimizer": ADAM.init(net()), "step": 3, "iterator": CountIter(5)}
    got, status = jaxckpt.restore(jaxckpt.latest_checkpoint(tmp_path), state)
    assert_same((got["net"], got["optimizer"], got["step"]), (state["net"], state["optimizer"], 3))
    assert got["iterator"] is state["iterator"]
    assert got["iterator"].position == 5
    assert not status.restored
    with pytest.raises(jaxckpt.RestoreAssertionError):
        status.assert_consumed()
    with jaxckpt.CheckpointManager(tmp_path / "empty") as manager:
        assert_same(manager.restore({"net": net()}).tree, {"net": net()})
        assert manager.latest_checkpoint is None


def test_fifty_steps_and_fifty_are_a_hundred(tmp_path):
    """Bit for bit: parameters, moments, counts, and the place in the data."""
    straight = train(new_objects(), 100)
    half = train(new_objects(), 50)
    path = half.save(tmp_path / "ckpt")
    resumed = new_objects().restore(path).assert_consumed().assert_existing_objects_matched().tree
    assert resumed.iterator.position == 50
    end = train(resumed, 50)
    assert_same((end.net, end.optimizer, end.step), (straight.net, straight.optimizer, straight.step))
    assert end.iterator.position == straight.iterator.position == 100


def test_a_restored_state_is_not_traced_again(tmp_path):
    ckpt = train(new_objects(), 2)
    traced = train_step._cache_size()
    train(new_objects().restore(ckpt.save(tmp_path / "ckpt")).tree, 2)
    assert train_step._cache_size() == traced


# The dotted edges


def test_parameters_and_optimizer_have_all_slots(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = jaxckpt.save(tmp_path / "c", {"net": net(), "optimizer": ADAM.init(net())})
    assert (report.slots, report.slots_left_out) == (4, 0)
    assert len(jaxckpt.load_checkpoint(tmp_path / "c").graph.slots) == 4


def test_an_optimizer_alone_has_none_and_says_so(tmp_path):
    optimizer = ADAM.init(net())
    with pytest.warns(jaxckpt.SlotsLeftOutWarning, match="Values") as caught:
        report = jaxckpt.save(tmp_path / "c", {"optimizer": optimizer, "step": 3})
    assert len(caught) == 1
    assert "4" in str(caught[0].message)
    assert (report.slots, report.slots_left_out) == (0, 4)
    assert set(jaxckpt.load_checkpoint(tmp_path / "c")) == {"optimizer/ScaleByAdamState/count", "step"}
    with pytest.raises(jaxckpt.RestoreError) as error:
        jaxckpt.restore(tmp_path / "c", {"optimizer": optimizer, "step": 0})
    assert [problem.kind for problem in error.value.problems] == ["missing"] * 4


def test_parameters_alone_have_none(tmp_path):
    report = jaxckpt.save(tmp_path / "c", {"net": net()})
    assert (report.slots, report.slots_left_out) == (0, 0)
    assert set(jaxckpt.load_checkpoint(tmp_path / "c")) == {"net/l1/kernel", "net/l1/bias"}


def test_an_optimizer_with_half_of_its_parameters(tmp_path):
    """Only the paths that are all there are the parameters' tree."""
    state = {"net": {"l1": {"kernel": net()["l1"]["kernel"]}}, "optimizer": ADAM.init(net())}
    with pytest.warns(jaxckpt.SlotsLeftOutWarning):
        report = jaxckpt.save(tmp_path / "c", state)
    assert report.slots + report.slots_left_out == 4
    assert report.slots_left_out > 0


@pytest.mark.parametrize("both", [False, True])
def test_values_have_no_slots_and_lose_nothing(tmp_path, both):
    """Inside `Values` every leaf is a plain variable, so an optimizer can be saved alone."""
    optimizer = train(new_objects(), 3).optimizer
    tree = {"optimizer": jaxckpt.Values(optimizer), **({"net": net()} if both else {})}
    report = jaxckpt.save(tmp_path / "c", tree)
    assert (report.slots, report.slots_left_out) == (0, 0)
    got, status = jaxckpt.restore(tmp_path / "c", {"optimizer": jaxckpt.Values(ADAM.init(net()))})
    assert_same(got["optimizer"].tree, optimizer)
    assert len(status.unused) == 2 * both


def test_an_optimizer_without_its_parameters_still_gets_its_slots(tmp_path):
    ckpt = train(new_objects(), 3)
    path = ckpt.save(tmp_path / "ckpt")
    got, status = jaxckpt.restore(path, {"optimizer": ADAM.init(net())})
    assert_same(got["optimizer"], ckpt.optimizer)
    status.assert_existing_objects_matched()
    assert not status.slots_unused
