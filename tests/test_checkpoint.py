"""`Checkpoint`: named edges in the spelling of TensorFlow's guide."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxckpt
from jaxckpt import Checkpoint


def test_edges_are_attributes_in_sorted_order():
    ckpt = Checkpoint(step=jnp.int32(3), net={"w": jnp.ones(2)})
    assert ckpt.step == 3
    assert [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(ckpt)] == [
        ".net['w']",
        ".step",
    ]
    assert repr(ckpt) == "Checkpoint(net=dict, step=ArrayImpl)"
    assert [leaf.key for leaf in jaxckpt.object_graph(ckpt).leaves] == ["net/w", "step"]


def test_it_is_frozen():
    ckpt = Checkpoint(step=3)
    with pytest.raises(AttributeError, match=r"replace\(step="):
        ckpt.step = 4
    with pytest.raises(AttributeError, match="without that edge"):
        del ckpt.step
    assert ckpt.replace(step=4, other=5).step == 4
    assert ckpt.step == 3
    with pytest.raises(AttributeError, match="no edge 'other'; it has step"):
        ckpt.other


@pytest.mark.parametrize("name", ["save", "restore", "write", "read", "replace", "save_counter"])
def test_names_that_mean_something_else(name):
    with pytest.raises(ValueError, match=name):
        Checkpoint(**{name: 1})


def test_a_root_has_its_own_edges():
    ckpt = Checkpoint({"v": jnp.ones(2), "w": {"x": 1}}, step=3)
    assert [leaf.key for leaf in jaxckpt.object_graph(ckpt).leaves] == ["v", "w/x", "step"]
    assert (ckpt.v == 1).all()
    with pytest.raises(ValueError, match=r"keyword argument v if root\.v already exists"):
        Checkpoint({"v": 1}, v=2)
    assert Checkpoint({}, step=3).step == 3


def test_jax_sees_a_pytree():
    ckpt = Checkpoint({"v": jnp.ones(2)}, step=jnp.int32(3))
    doubled = jax.jit(lambda c: jax.tree.map(lambda x: x * 2, c))(ckpt)
    assert doubled.step == 6
    assert (doubled.v == 2).all()
    assert Checkpoint(a=1) == Checkpoint(a=1) != Checkpoint(a=2)


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_it_can_be_copied(duplicate):
    assert duplicate(Checkpoint({"v": 1}, step=[2])) == Checkpoint({"v": 1}, step=[2])


def test_save_numbers_and_write_does_not(tmp_path):
    ckpt = Checkpoint(w=jnp.ones(2))
    assert ckpt.save(tmp_path / "a") == str(tmp_path / "a-1")
    assert ckpt.save(tmp_path / "a") == str(tmp_path / "a-2")
    assert ckpt.write(tmp_path / "exactly") == str(tmp_path / "exactly")
    assert jaxckpt.latest_checkpoint(tmp_path) == str(tmp_path / "exactly")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a-1", "a-2", "checkpoint", "exactly"]
    import shutil

    shutil.rmtree(tmp_path / "a-2")
    assert ckpt.save(tmp_path / "a") == str(tmp_path / "a-3")


def test_a_rewind_overwrites_nothing(tmp_path):
    for value in (1.0, 2.0, 3.0):
        Checkpoint(w=jnp.full(2, value)).save(tmp_path / "a")
    old = Checkpoint(w=jnp.zeros(2)).restore(tmp_path / "a-1").tree
    assert old.save(tmp_path / "a") == str(tmp_path / "a-4")
    assert (jaxckpt.load_checkpoint(tmp_path / "a-2")["w"] == 2).all()


def test_restore_and_read_are_the_same_and_change_nothing(tmp_path):
    params = {"w": jnp.ones(2)}
    ckpt = Checkpoint(net=params, opt=optax.adam(1e-3).init(params), step=7)
    path = ckpt.save(tmp_path / "a")
    fresh = Checkpoint(net={"w": jnp.zeros(2)}, opt=optax.adam(1e-3).init(params), step=0)
    for method in (fresh.restore, fresh.read):
        got, status = method(path)
        assert isinstance(got, Checkpoint)
        assert got.step == 7
        status.assert_consumed().assert_existing_objects_matched()
    assert fresh.step == 0
    assert fresh.restore(None).tree == fresh


def test_without_a_target_a_checkpoint_comes_back(tmp_path):
    Checkpoint(net={"w": np.ones(2)}, step=3).write(tmp_path / "a")
    tree = jaxckpt.restore(tmp_path / "a").tree
    assert isinstance(tree, Checkpoint)
    assert tree.step == 3
    Checkpoint({"v": 1}, step=3).write(tmp_path / "b")
    assert jaxckpt.restore(tmp_path / "b").tree == Checkpoint({"v": 1}, step=3)


def test_a_checkpoint_and_a_dict_are_the_same_to_restore(tmp_path):
    Checkpoint(net={"w": np.ones(2)}, step=3).write(tmp_path / "a")
    assert jaxckpt.restore(tmp_path / "a", {"net": {"w": np.zeros(2)}, "step": 0}).tree["step"] == 3


def test_an_edge_of_a_root_can_be_replaced():
    assert Checkpoint({"a": 1}, b=2).replace(a=3, b=4) == Checkpoint({"a": 3}, b=4)


def test_the_number_is_recorded(tmp_path):
    path = Checkpoint(w=1).save(tmp_path / "a")
    assert jaxckpt.load_checkpoint(path).save_counter == 1
