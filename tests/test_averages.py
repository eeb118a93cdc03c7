"""Several subtrees of one form (parameters and their moving average), and states that stay whole."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxckpt


def filled(tree, start):
    leaves, treedef = jax.tree.flatten(tree)
    new = [jnp.full(x.shape, start + i).astype(x.dtype) for i, x in enumerate(leaves)]
    return treedef.unflatten(new)


PARAMS = {"dec": jnp.ones((2, 3)), "enc": jnp.ones(3)}
ADAM = optax.adam(1.0)


def saved(tmp_path, average="ema"):
    state = filled(ADAM.init(PARAMS), 10)
    jaxckpt.save(tmp_path / "a", {average: filled(PARAMS, 5), "net": PARAMS, "opt": state})
    return tmp_path / "a", state


@pytest.mark.parametrize("average", ["ema", "zema"])
def test_a_renamed_parameter_takes_its_slots_along_when_the_average_goes(tmp_path, average):
    path, state = saved(tmp_path, average)
    params = {"dec2": PARAMS["dec"], "enc": PARAMS["enc"]}
    got, status = jaxckpt.restore(
        path, {"net": params, "opt": ADAM.init(params)}, rename={"net/dec": "net/dec2"}
    )
    assert (got["opt"][0].mu["dec2"] == state[0].mu["dec"]).all()
    assert (got["opt"][0].nu["enc"] == state[0].nu["enc"]).all()
    assert not status.missing
    assert all(key.startswith(average) for key in status.unused)


@pytest.mark.parametrize("average", ["ema", "zema"])
def test_a_transformed_parameter_takes_its_slots_along_when_the_average_goes(tmp_path, average):
    layers = {"l": [{"k": jnp.full((2, 2), float(i))} for i in range(3)]}
    state = filled(ADAM.init(layers), 10)
    jaxckpt.save(tmp_path / "a", {average: layers, "net": layers | {}, "opt": state})
    stacked = {"l": {"k": jnp.zeros((3, 2, 2))}}
    got, _ = jaxckpt.restore(
        tmp_path / "a",
        {"net": stacked, "opt": ADAM.init(stacked)},
        transform={"net/l/k": ("net/l/*/k", np.stack)},
    )
    for name in ("mu", "nu"):
        want = np.stack([layer["k"] for layer in getattr(state[0], name)["l"]])
        assert (getattr(got["opt"][0], name)["l"]["k"] == want).all()


def test_dropping_a_parameter_drops_its_slots_though_an_average_stays(tmp_path):
    path, _ = saved(tmp_path, "zema")
    status = jaxckpt.load_checkpoint(path).match(
        {"net": PARAMS, "opt": ADAM.init(PARAMS)}, rename={"zema": "net", "net": None}
    )
    assert len(status.slots_unused) == 4


def test_a_dtype_that_decides_for_one_field_decides_for_the_state(tmp_path):
    two = optax.chain(optax.adam(1.0, mu_dtype=jnp.bfloat16), optax.adam(1.0))
    state = filled(two.init(PARAMS), 10)
    jaxckpt.save(tmp_path / "a", {"net": PARAMS, "opt": state})
    got, status = jaxckpt.restore(tmp_path / "a", {"net": PARAMS, "opt": ADAM.init(PARAMS)})
    kept = state[1][0]
    for ours, theirs in zip(jax.tree.leaves(got["opt"][0]), jax.tree.leaves(kept), strict=True):
        assert (ours == theirs).all()
    assert not status.ambiguous


def test_a_count_goes_with_its_moments(tmp_path):
    def parts(labels):
        return optax.partition({"x": optax.adam(1.0), "y": optax.adam(1.0)}, labels)

    state = filled(parts({"dec": "x", "enc": "y"}).init(PARAMS), 10)
    jaxckpt.save(tmp_path / "a", {"net": PARAMS, "opt": state})
    target = parts({"dec": "y", "enc": "x"}).init(PARAMS)
    got, _ = jaxckpt.restore(tmp_path / "a", {"net": PARAMS, "opt": target})

    def adam(tree, label):
        return tree.inner_states[label].inner_state[0]

    assert (adam(got["opt"], "y").mu["dec"] == adam(state, "x").mu["dec"]).all()
    assert adam(got["opt"], "y").count == adam(state, "x").count
    assert adam(got["opt"], "x").count == adam(state, "y").count
