"""The main job: train on handwritten digits, be killed in the middle of a save, resume bit for bit.

Three child processes train the same flax model with adam: one straight through, one that is killed
while a save is being written, one that resumes from what the killed one left. Then the optimizer chain
changes, and every moment is found again.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxckpt

STEPS = 100
KILL_AT = 50
HIDDEN = 1024


class Digits:
    """Shuffled batches of the 1797 handwritten digits of scikit-learn; its position can be saved."""

    def __init__(self, batch: int = 64, seed: int = 0) -> None:
        from sklearn.datasets import load_digits

        images, labels = load_digits(return_X_y=True)
        self._images = np.asarray(images, np.float32) / 16
        self._labels = np.asarray(labels, np.int32)
        self._batch = batch
        self._seed = seed
        self._position = 0

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return self

    def __next__(self) -> tuple[np.ndarray, np.ndarray]:
        per_epoch = len(self._images) // self._batch
        epoch, index = divmod(self._position, per_epoch)
        order = np.random.default_rng((self._seed, epoch)).permutation(len(self._images))
        rows = order[index * self._batch : (index + 1) * self._batch]
        self._position += 1
        return self._images[rows], self._labels[rows]

    def get_state(self) -> dict[str, int]:
        """What the next batch depends on."""
        return {"position": self._position, "seed": self._seed}

    def set_state(self, state: dict[str, int]) -> None:
        """Goes on from there."""
        self._position, self._seed = state["position"], state["seed"]


class Net(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits of shape (batch, 10) for images of shape (batch, 64)."""
        x = nn.relu(nn.Dense(HIDDEN, name="l1")(x))
        x = nn.relu(nn.Dense(HIDDEN, name="l2")(x))
        return nn.Dense(10, name="head")(x)


def init(optimizer: optax.GradientTransformation) -> dict[str, Any]:
    """A new train state."""
    params = Net().init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
    return {
        "step": jnp.int32(0),
        "net": params,
        "optimizer": optimizer.init(params),
        "loss": jnp.float32(0),
        "rng": jax.random.key(7),
    }


def make_step(optimizer: optax.GradientTransformation) -> Callable[..., dict[str, Any]]:
    """One jitted training step, which donates the state that it is given."""

    def step(state: dict[str, Any], images: jax.Array, labels: jax.Array) -> dict[str, Any]:
        rng, noise = jax.random.split(state["rng"])

        def loss_of(params: Any) -> jax.Array:
            noisy = images + 0.05 * jax.random.normal(noise, images.shape)
            logits = Net().apply({"params": params}, noisy)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        loss, grads = jax.value_and_grad(loss_of)(state["net"])
        updates, optimizer_state = optimizer.update(grads, state["optimizer"], state["net"])
        return {
            "step": state["step"] + 1,
            "net": optax.apply_updates(state["net"], updates),
            "optimizer": optimizer_state,
            "loss": loss,
            "rng": rng,
        }

    return jax.jit(step, donate_argnums=0)


def train(directory: str) -> None:
    """Trains to the last step, from the newest checkpoint of the directory where there is one."""
    optimizer = optax.adam(1e-3)
    step = make_step(optimizer)
    with jaxckpt.CheckpointManager(directory, max_to_keep=3, save_every=10) as manager:
        state, status = manager.restore({**init(optimizer), "data": Digits()})
        if manager.latest_checkpoint:
            status.assert_consumed().assert_existing_objects_matched()
            print(f"Restored from {manager.latest_checkpoint}", flush=True)
        else:
            print("Initializing from scratch.", flush=True)
        batches = state.pop("data")
        for number in range(int(state["step"]) + 1, STEPS + 1):
            state = step(state, *next(batches))
            future = manager.save({**state, "data": batches}, step=number)
            if future is not None and number % 10 == 0:
                loss = float(state["loss"])
                print(f"Saved checkpoint for step {number}: {future.path} (loss {loss:.4f})", flush=True)


def killed_in_a_save(directory: Path) -> str:
    """Trains in a child process that gets SIGKILL while it writes the checkpoint of step `KILL_AT`.

    Returns:
        The name of what the save had written so far.
    """
    child = subprocess.Popen(_command(directory))
    try:
        while child.poll() is None:
            for name in _entries(directory):
                if name.startswith(".") and f"ckpt-{KILL_AT}." in name and _size(directory / name):
                    child.send_signal(signal.SIGKILL)
                    child.wait()
                    return name
            time.sleep(0.0005)
    finally:
        child.kill()
        child.wait()
    raise RuntimeError(f"the child ended with {child.returncode} before it could be killed")


def differences(a: str, b: str) -> list[str]:
    """Keys whose values are not bit for bit the same in two checkpoints."""
    left, right = jaxckpt.load_checkpoint(a), jaxckpt.load_checkpoint(b)
    keys = sorted(set(left) ^ set(right))
    return keys + [key for key in left if key in right and not _equal(left[key], right[key])]


def refactor(directory: Path) -> None:
    """Clipping and a schedule come into the chain; every moment and count is found again."""
    schedule = optax.cosine_decay_schedule(1e-3, STEPS * 2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    with jaxckpt.CheckpointManager(directory) as manager:
        # The schedule's own count is new: to start it at zero has to be asked for.
        new = ("optimizer/ScaleByScheduleState/**",)
        state, status = manager.restore({**init(optimizer), "data": Digits()}, partial=new)
        reader = jaxckpt.load_checkpoint(directory)
    print(f"Restored from {manager.latest_checkpoint}")
    print(status)
    kept = 0
    adam = (
        optax.tree_utils.tree_get(state["optimizer"], "mu"),
        optax.tree_utils.tree_get(state["optimizer"], "nu"),
    )
    for name, moments in zip(("mu", "nu"), adam, strict=True):
        for path, moment in jax.tree.leaves_with_path(moments):
            layer, kind = (str(step.key) for step in path)
            kept += _equal(moment, reader[f"net/{layer}/{kind}/.OPTIMIZER_SLOT/optimizer/{name}"])
    print(
        f"{kept} of {2 * len(jax.tree.leaves(state['net']))} moments are bit for bit those of the checkpoint."
    )
    batches = state.pop("data")
    state = make_step(optimizer)(state, *next(batches))
    print(f"Training goes on: step {int(state['step'])}, loss {float(state['loss']):.4f}")


def main(directory: str | None = None) -> int:
    """Runs the whole demo; returns 0 when the resumed run equals the uninterrupted one."""
    root = Path(directory or tempfile.mkdtemp(prefix="jaxckpt-demo-"))
    straight, killed = root / "straight", root / "killed"
    _say(f"Training straight through, in {straight}")
    subprocess.run(_command(straight), check=True)
    _say(f"The same, killed (SIGKILL) while the checkpoint of step {KILL_AT} is being written, in {killed}")
    leftover = killed_in_a_save(killed)
    print(f"Killed. On disk: {', '.join(sorted(_entries(killed)))}")
    _say("Running the same program again")
    subprocess.run(_command(killed), check=True)
    print(f"The half-written {leftover} is {'still there!' if leftover in _entries(killed) else 'swept.'}")
    last = f"ckpt-{STEPS}"
    different = differences(str(straight / last), str(killed / last))
    count = len(jaxckpt.load_checkpoint(killed / last))
    print(f"Parameters, slots, iterator and loss: {count - len(different)} of {count} values are bit-equal.")
    _say("The graph, with its slot edges")
    print(jaxckpt.load_checkpoint(killed / last).graph)
    _say("The optimizer becomes chain(clip_by_global_norm, adam(schedule))")
    refactor(killed)
    return 1 if different else 0


def _command(directory: Path) -> list[str]:
    return [sys.executable, "-m", "jaxckpt.demo", str(directory)]


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _entries(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()] if directory.exists() else []


def _size(directory: Path) -> int:
    try:
        return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    except FileNotFoundError:  # committed meanwhile
        return 0


def _equal(a: Any, b: Any) -> bool:
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


if __name__ == "__main__":
    train(sys.argv[1])
