"""Every public transform and optimizer of optax, made with the least arguments that it takes."""

from __future__ import annotations

import inspect
import warnings
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

if TYPE_CHECKING:
    from collections.abc import Callable

PARAMS = {"a": {"w": jnp.ones((3, 4)), "b": jnp.ones(4)}, "c": jnp.ones((2, 3, 4))}


def _schedule(count: Any) -> Any:
    return 1e-3 + 0 * count


def _adam() -> optax.GradientTransformationExtraArgs:
    return optax.adam(1e-3)


#: Values for required arguments, by name.
_ARGUMENTS: dict[str, Any] = {
    "learning_rate": 1e-3,
    "max_norm": 1.0,
    "max_delta": 1.0,
    "clipping": 1.0,
    "threshold": 1.0,
    "delta": 1.0,
    "decay": 0.9,
    "decay_rate": 0.9,
    "eta": 0.01,
    "gamma": 0.5,
    "seed": 0,
    "key": 0,
    "step_size": 0.1,
    "step_size_fn": _schedule,
    "max_iter": 3,
    "max_learning_rate": 1.0,
    "max_backtracking_steps": 3,
    "max_linesearch_steps": 3,
    "l2_norm_clip": 1.0,
    "noise_multiplier": 0.1,
    "max_consecutive_errors": 3,
    "every_k": 2,
    "k": 2,
    "min_decay": 0.1,
}

#: What needs more than numbers.
_MADE: dict[str, Callable[[], Any]] = {
    "chain": lambda: optax.chain(optax.clip(1.0), _adam(), optax.trace(0.9)),
    "named_chain": lambda: optax.named_chain(("one", _adam()), ("two", optax.lion(1e-3))),
    "masked": lambda: optax.masked(_adam(), {"a": True, "c": False}),
    "partition": lambda: optax.partition(
        {"x": _adam(), "y": optax.sgd(0.1, momentum=0.9)}, {"a": {"w": "x", "b": "y"}, "c": "x"}
    ),
    "multi_transform": lambda: optax.multi_transform({"x": _adam(), "y": _adam()}, {"a": "x", "c": "y"}),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=_schedule),
    "inject_stateful_hyperparams": lambda: optax.inject_stateful_hyperparams(optax.adam)(learning_rate=1e-3),
    "MultiSteps": lambda: optax.MultiSteps(_adam(), 4).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(_adam(), 3),
    "apply_every": lambda: optax.apply_every(2),
    "conditionally_mask": lambda: optax.conditionally_mask(_adam(), lambda step: step > 2),
    "conditionally_transform": lambda: optax.conditionally_transform(_adam(), lambda step: step > 2),
    "maybe_update": lambda: optax.maybe_update(_adam(), lambda step: step > 2),
    "flatten": lambda: optax.flatten(_adam()),
    "freeze": lambda: optax.freeze({"a": True, "c": False}),
    "selective_transform": lambda: optax.selective_transform(_adam(), freeze_mask={"a": True, "c": False}),
    "snapshot": lambda: optax.snapshot("norm", lambda updates: optax.tree_utils.tree_norm(updates)),
    "monitor": lambda: optax.monitor({"norm": lambda updates: optax.tree_utils.tree_norm(updates)}),
    "scale_by_schedule": lambda: optax.scale_by_schedule(_schedule),
    "add_decayed_weights": lambda: optax.add_decayed_weights(_schedule),
    "adam_with_schedule": lambda: optax.adam(_schedule),
    "contrib.split_real_and_imaginary": lambda: optax.contrib.split_real_and_imaginary(_adam()),
    "contrib.mechanize": lambda: optax.contrib.mechanize(_adam()),
    "contrib.sam": lambda: optax.contrib.sam(
        optax.sgd(0.1, momentum=0.9), optax.chain(optax.contrib.normalize(), optax.sgd(0.1))
    ),
    "contrib.schedule_free": lambda: optax.contrib.schedule_free(_adam(), 1e-3),
    "contrib.dpsgd": lambda: optax.contrib.dpsgd(1e-3, 1.0, 0.1, 0),
    "dpsgd": lambda: optax.dpsgd(1e-3, 1.0, 0.1, 0),
    "contrib.reduce_on_plateau": lambda: optax.contrib.reduce_on_plateau(),
}


def _make(module: Any, name: str) -> Any:
    function = getattr(module, name)
    required = {
        key: _ARGUMENTS[key]
        for key, parameter in inspect.signature(function).parameters.items()
        if parameter.default is inspect.Parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    }
    return function(**required)


def transforms() -> dict[str, Any]:
    """By name: every public function of optax and optax.contrib that gives a transform with an init."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _transforms()


def _transforms() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for prefix, module in (("", optax), ("contrib.", optax.contrib)):
        for name in sorted(vars(module)):
            if name.startswith("_") or prefix + name in _MADE or not callable(getattr(module, name)):
                continue
            try:
                made = _make(module, name)
                if isinstance(made, optax.GradientTransformation):
                    made.init(PARAMS)
                    found[prefix + name] = made
            except Exception:
                continue  # a loss, a schedule, a class: no transform
    for name, make in _MADE.items():
        try:
            found[name] = make()
        except AttributeError:
            continue  # not in this release of optax
    return found


def touched(transform: Any, state: Any) -> set[int]:
    """Indices of the leaves of a state that `tree_map_params` maps over."""
    leaves, treedef = jax.tree.flatten(state)
    numbered = treedef.unflatten(range(len(leaves)))
    seen: set[int] = set()
    optax.tree_utils.tree_map_params(
        transform, seen.add, numbered, is_leaf=lambda leaf: isinstance(leaf, optax.MaskedNode)
    )
    return {index for index in seen if isinstance(index, int)}
