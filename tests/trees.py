"""Kinds of tree and leaf, by name: what has to survive flattening, a save and a restore."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, defaultdict, namedtuple
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
from flax import nnx, struct
from flax.core import FrozenDict
from flax.training.train_state import TrainState

from jaxckpt.graph.marks import Optimizer, PerProcess, Values

if TYPE_CHECKING:
    from collections.abc import Callable

Point = namedtuple("Point", ["x", "y"])


class Typed(NamedTuple):
    w: Any
    b: Any = None


class Custom(NamedTuple):
    """A state of somebody's own transform."""

    count: Any
    momentum: Any


@struct.dataclass
class FlaxData:
    w: Any
    name: str = struct.field(pytree_node=False, default="flax")


@partial(jax.tree_util.register_dataclass, data_fields=["w", "inner"], meta_fields=["tag"])
@dataclasses.dataclass
class Registered:
    w: Any
    inner: Any
    tag: str = "t"


@jax.tree_util.register_pytree_node_class
class Keyless:
    def __init__(self, *children: Any) -> None:
        self.children = children

    def tree_flatten(self) -> Any:
        return self.children, None

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Any:
        return cls(*children)


@jax.tree_util.register_pytree_with_keys_class
class Keyed:
    def __init__(self, a: Any, b: Any) -> None:
        self.a, self.b = a, b

    def tree_flatten_with_keys(self) -> Any:
        key = jax.tree_util.GetAttrKey
        return ((key("a"), self.a), (key("b"), self.b)), ("static", 3)

    @classmethod
    def tree_unflatten(cls, aux: Any, children: Any) -> Any:
        return cls(*children)


class Counting:
    """An iterator in grain's protocol; it counts how often its state was asked for."""

    def __init__(self, position: int = 0) -> None:
        self.position = position
        self.asked = 0
        self.recent: list[Any] = []

    def get_state(self) -> dict[str, Any]:
        self.asked += 1
        return {"position": self.position, "buffer": np.arange(3), "recent": self.recent}

    def set_state(self, state: dict[str, Any]) -> None:
        self.position, self.recent = state["position"], state["recent"]


class Loader:
    """An iterator in PyTorch's protocol."""

    def __init__(self) -> None:
        self.state: Any = {"epoch": 1}

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def params() -> dict[str, Any]:
    return {"l1": {"kernel": jnp.full((1, 5), 0.5), "bias": jnp.zeros(5)}, "l2": {"kernel": jnp.ones((5, 2))}}


def with_optimizer(transform: Any, tree: Any = None) -> dict[str, Any]:
    net = params() if tree is None else tree
    return {"net": net, "optimizer": transform.init(net), "step": jnp.int32(3)}


def guide() -> dict[str, Any]:
    """The tree of TensorFlow's guide."""
    net = {"l1": {"kernel": jnp.ones((1, 5)), "bias": jnp.zeros(5)}}
    return {"net": net, "optimizer": optax.adam(0.1).init(net), "step": 1, "iterator": Counting(4)}


def bare() -> dict[str, Any]:
    return {"w": jnp.ones((3, 4)), "opt": optax.adam(0.1).init(jnp.ones((3, 4)))}


def shared() -> dict[str, Any]:
    table = jnp.arange(6.0).reshape(2, 3)
    return {"embed": table, "head": {"kernel": table}}


def train_state() -> Any:
    return TrainState.create(apply_fn=None, params=params(), tx=optax.adamw(1e-3))


def boxed() -> Any:
    net = jax.tree.map(lambda leaf: nn.Partitioned(leaf, (None,) * leaf.ndim), params())
    return {"net": net, "optimizer": optax.adam(0.1).init(net)}


def nnx_state() -> Any:
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    return {"model": nnx.state(model), "opt": optax.adam(0.1).init(nnx.state(model, nnx.Param))}


def own_optimizer() -> Any:
    net = params()
    state = {"m": jax.tree.map(jnp.zeros_like, net), "t": jnp.int32(0)}
    return {"net": net, "opt": Optimizer(state, of="net")}


def chain_with_custom() -> Any:
    net = params()
    custom = Custom(jnp.int32(0), jax.tree.map(jnp.zeros_like, net))
    return {"net": net, "opt": (optax.scale_by_adam().init(net), custom, optax.EmptyState())}


def complex_params() -> Any:
    net = {"c": jnp.ones(2, jnp.complex64), "r": jnp.ones(3)}
    return with_optimizer(optax.contrib.split_real_and_imaginary(optax.adam(0.1)), net)


_JAX_DTYPES = [
    "bool",
    "int4",
    "uint4",
    "int8",
    "uint8",
    "int16",
    "uint16",
    "int32",
    "uint32",
    "float16",
    "bfloat16",
    "float32",
    "complex64",
    "int2",
    "uint2",
    "float8_e4m3fn",
    "float8_e5m2",
    "float8_e4m3b11fnuz",
    "float8_e4m3fnuz",
    "float8_e5m2fnuz",
    "float8_e4m3",
    "float8_e3m4",
    "float8_e8m0fnu",
    "float4_e2m1fn",
]
_NUMPY = {
    "numpy float64": lambda: np.arange(3.0),
    "numpy int64": lambda: np.arange(3),
    "numpy big endian": lambda: np.arange(3, dtype=">f4"),
    "numpy strings": lambda: np.array(["a", "bcd", "\u00e9"]),
    "numpy bytes": lambda: np.array([b"a", b"bc"]),
    "numpy datetime64": lambda: np.array(["2020-01-01", "NaT"], dtype="M8[ns]"),
    "numpy timedelta64": lambda: np.array([1, 2], dtype="m8[s]"),
    "numpy 0-d": lambda: np.array(2.5),
    "numpy zero size": lambda: np.zeros((0, 3), np.float32),
    "numpy bfloat16": lambda: np.ones(3, ml_dtypes.bfloat16),
    "numpy fortran order": lambda: np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "numpy strided": lambda: np.arange(10.0)[::3],
    "numpy complex128": lambda: np.ones(2, np.complex128),
    "numpy scalar float32": lambda: np.float32(1.5),
    "numpy scalar float64": lambda: np.float64(1.5),
    "numpy scalar int64": lambda: np.int64(-3),
    "numpy scalar bool": lambda: np.bool_(True),
    "numpy scalar str": lambda: np.str_("abc"),
    "numpy scalar datetime64": lambda: np.datetime64("2020-01-01", "D"),
    "numpy 0-d padded string": lambda: np.array("ab", "<U4"),
    "numpy 0-d padded bytes": lambda: np.array(b"ab", "S4"),
    "numpy zero size uint4": lambda: np.zeros(0, ml_dtypes.uint4),
    "numpy zero size strings": lambda: np.zeros((2, 0), "U3"),
    "numpy scalar padded str": lambda: np.str_("ab\0"),
    "numpy scalar bfloat16": lambda: ml_dtypes.bfloat16(0.5),
}
_PYTHON = {
    "int": 3,
    "huge int": 10**40,
    "negative int": -1,
    "float": 0.1,
    "nan": float("nan"),
    "infinity": float("-inf"),
    "negative zero": -0.0,
    "complex": 1 + 2j,
    "true": True,
    "str": "text/with.dots \u2603",
    "empty str": "",
    "lone surrogate": "\ud800",
    "bytes": b"\x00\xff",
}


def _containers() -> dict[str, Callable[[], Any]]:
    one = lambda: jnp.ones(2)
    return {
        "a leaf": one,
        "a Python leaf": lambda: 7,
        "None": lambda: None,
        "empty dict": dict,
        "dict": lambda: {"b": one(), "a": 1},
        "nested": lambda: {"a": [one(), {"b": (one(), None)}], "c": {}},
        "OrderedDict": lambda: OrderedDict(b=one(), a=one()),
        "defaultdict": lambda: defaultdict(list, {"k": [one()]}),
        "defaultdict of a lambda": lambda: defaultdict(lambda: 3, {"k": one()}),
        "list": lambda: [one(), one()],
        "tuple": lambda: (one(), one()),
        "empty containers": lambda: {"a": {}, "b": [], "c": (), "d": None, "e": optax.EmptyState()},
        "namedtuple": lambda: Point(one(), {"z": one()}),
        "NamedTuple": lambda: Typed(one()),
        "FrozenDict": lambda: FrozenDict({"a": {"b": one()}}),
        "flax dataclass": lambda: FlaxData(one()),
        "register_dataclass": lambda: Registered(one(), [one()]),
        "custom without keys": lambda: Keyless(one(), {"a": one()}),
        "custom with keys": lambda: Keyed(one(), [one()]),
        "integer keys": lambda: {2: one(), 10: one()},
        "integer beside string": lambda: OrderedDict([(1, one()), ("1", one())]),
        "keys of many types": lambda: OrderedDict([(1, 1), (2.5, 2), (None, 3), (b"b", 4), (("t", 1), 5)]),
        "bool keys": lambda: {True: one(), False: one()},
        "odd names": lambda: {
            "": one(),
            "a.b": one(),
            "a/b": one(),
            ".E": one(),
            "..": one(),
            "\u00fc": one(),
        },
        "Partial": lambda: jax.tree_util.Partial(jnp.add, one()),
        "Values": lambda: Values(with_optimizer(optax.adam(0.1))),
        "PerProcess": lambda: {"host": PerProcess(np.array([0]))},
        "linen boxes": lambda: {
            "k": nn.Partitioned(one(), ("x",)),
            "l": nn.LogicallyPartitioned(one(), ("y",)),
        },
        "nnx State": lambda: nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0))),
        "equinox Linear": lambda: eqx.nn.Linear(2, 3, key=jax.random.key(0)),
        "equinox MLP": lambda: eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)),
        "equinox filtered": lambda: eqx.filter(eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0)), eqx.is_array),
        "shared arrays": shared,
        "iterator": lambda: {"it": Counting(2)},
        "loader": lambda: {"it": Loader()},
        "ref": lambda: {"ref": jax.new_ref(jnp.ones(3))},
        "functions": lambda: {"f": jnp.tanh, "g": jax.nn.relu, "n": 1},
        "static node": lambda: {"a": optax.EmptyState(), "b": one()},
    }


def _optimizers() -> dict[str, Callable[[], Any]]:
    adam = lambda: optax.adam(0.1)
    made: dict[str, Callable[[], Any]] = {
        "adam": adam,
        "adamw with schedule": lambda: optax.adamw(optax.constant_schedule(0.1)),
        "chain": lambda: optax.chain(optax.clip(1.0), adam(), optax.trace(0.9)),
        "adam and lion": lambda: optax.chain(optax.scale_by_adam(), optax.scale_by_lion()),
        "named_chain": lambda: optax.named_chain(("one", adam()), ("two", adam())),
        "masked": lambda: optax.masked(adam(), {"l1": True, "l2": False}),
        "partition": lambda: optax.partition({"a": adam(), "b": adam()}, {"l1": "a", "l2": "b"}),
        "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
        "MultiSteps": lambda: optax.MultiSteps(adam(), 2),
        "apply_if_finite": lambda: optax.apply_if_finite(adam(), 2),
        "sm3": lambda: optax.sm3(0.1),
        "adafactor": lambda: optax.adafactor(0.1, min_dim_size_to_factor=2),
        "flatten": lambda: optax.flatten(adam()),
        "lbfgs": lambda: optax.lbfgs(),
        "schedule_free": lambda: optax.contrib.schedule_free(adam(), 0.1),
        "muon": lambda: optax.contrib.muon(0.1),
    }
    found = {f"optimizer {name}": partial(_init, make) for name, make in made.items()}
    alone: dict[str, Callable[[], Any]] = {
        "the guide": guide,
        "TrainState": train_state,
        "bare parameters": bare,
        "boxed parameters": boxed,
        "nnx parameters": nnx_state,
        "own optimizer": own_optimizer,
        "chain with a custom state": chain_with_custom,
        "complex parameters": complex_params,
        "marked optimizer": lambda: {"net": params(), "opt": Optimizer(adam().init(params()), of="net")},
        "two optimizers": lambda: {
            "p": params(),
            "o": {"g": adam().init(params()), "d": adam().init(params())},
        },
        "parameters and their average": lambda: {**with_optimizer(adam()), "ema": params()},
        "NamedTuple parameters": lambda: with_optimizer(adam(), Typed(jnp.ones((2, 2)), jnp.ones(2))),
        "list parameters": lambda: with_optimizer(adam(), [(jnp.ones((2, 2)), jnp.ones(2)), (jnp.ones(3),)]),
        "equinox parameters": _equinox,
        "optimizer alone": lambda: {"opt": adam().init(params())},
    }
    return {**found, **alone}


def _init(make: Callable[[], Any]) -> Any:
    return with_optimizer(make())


def _equinox() -> Any:
    model = eqx.nn.MLP(2, 2, 4, 1, key=jax.random.key(0))
    return {"model": model, "opt": optax.adam(0.1).init(eqx.filter(model, eqx.is_inexact_array))}


def kinds() -> dict[str, Callable[[], Any]]:
    """Each kind of tree by name; each call of a function gives a new tree with the same values."""
    found: dict[str, Callable[[], Any]] = {}
    for name in _JAX_DTYPES:
        found[f"jax {name}"] = partial(lambda dtype: {"x": jnp.array([0, 1, 1], dtype)}, name)
    found["jax 0-d"] = lambda: {"x": jnp.float32(1.5)}
    found["jax zero size"] = lambda: {"x": jnp.zeros((0, 3))}
    found["jax weak type"] = lambda: {"x": jnp.asarray(2.0), "y": jnp.asarray(2.0) + jnp.zeros(())}
    for impl in ("threefry2x32", "rbg", "unsafe_rbg"):
        found[f"key {impl}"] = partial(lambda impl: {"k": jax.random.key(1, impl=impl)}, impl)
    found["keys"] = lambda: {"k": jax.random.split(jax.random.key(1), (2, 3)), "raw": jax.random.PRNGKey(0)}
    for name, make in _NUMPY.items():
        found[name] = partial(lambda make: {"x": make()}, make)
    for name, value in _PYTHON.items():
        found[f"python {name}"] = partial(lambda value: {"x": value}, value)
    return {**found, **_containers(), **_optimizers()}
