"""The slots that are found against those that optax itself maps over."""

from __future__ import annotations

import jax
import oracle
import pytest

from jaxckpt.graph.flatten import flatten

TRANSFORMS = oracle.transforms()
#: `tree_map_params` fails on these: they put parameters into one vector, or look into them while making
#: a state. What we do: `flatten` has variables only (its vector is no parameter's); the searches and
#: lbfgs have slots for the fields that mirror the parameters.
NO_ORACLE = {
    "flatten": set(),
    "lbfgs": {"params", "updates", "diff_params_memory", "diff_updates_memory", "grad"},
    "scale_by_backtracking_linesearch": set(),
    "scale_by_zoom_linesearch": {"grad"},
}


def test_the_oracle_sees_all_of_optax():
    assert len(TRANSFORMS) > 100
    assert {"adam", "sm3", "contrib.muon", "partition", "MultiSteps", "named_chain"} <= TRANSFORMS.keys()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_slots_are_what_optax_maps_over(name):
    state = TRANSFORMS[name].init(oracle.PARAMS)
    graph = flatten({"net": oracle.PARAMS, "opt": state}).graph
    mine = graph.leaves[len(jax.tree.leaves(oracle.PARAMS)) :]
    assert graph.left_out == 0
    if name in NO_ORACLE:
        assert {leaf.state.field for leaf in mine if leaf.state.is_slot} == NO_ORACLE[name]
        return
    found = {index for index, leaf in enumerate(mine) if leaf.state.is_slot}
    assert found == oracle.touched(TRANSFORMS[name], state)
    assert all(leaf.variable is not None for leaf in mine if leaf.state.is_slot)
