"""The main job: train on handwritten digits, be killed in the middle of a save, resume bit for bit.

Child processes train the same flax model with adam: one straight through, one that is killed while a
checkpoint is being written, one that resumes from what the killed one left. Then the optimizer's chain
changes, and every moment is found again.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from numpy.typing import NDArray

import jaxckpt

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

STEPS = 100
#: The run is killed in its first save from this step on.
KILL_FROM = 50
HIDDEN = 1024
#: Where the images lie, beside the directories of the runs.
IMAGES = "digits.npz"


class Digits:
    """Endless shuffled batches of scikit-learn's 1797 handwritten digits; its position can be saved."""

    def __init__(self, file: Path, batch: int = 64, seed: int = 0) -> None:
        with np.load(file) as data:
            self._images, self._labels = data["images"], data["labels"]
        self._batch = batch
        self._seed = seed
        self._position = 0

    def __iter__(self) -> Iterator[tuple[NDArray[np.float32], NDArray[np.int32]]]:
        return self

    def __next__(self) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
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


def fetch_digits(file: Path) -> None:
    """Writes the images (float32 in 0..1, 64 pixels each) and their labels (int32) to a file."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("the demo trains on scikit-learn's digits: pip install 'jaxckpt[demo]'") from None
    images, labels = load_digits(return_X_y=True)
    np.savez(file, images=np.asarray(images, np.float32) / 16, labels=np.asarray(labels, np.int32))


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

    def build() -> dict[str, Any]:
        params = Net().init(jax.random.key(0), jnp.zeros((1, 64)))["params"]
        return {
            "step": jnp.int32(0),
            "net": params,
            "optimizer": optimizer.init(params),
            "loss": jnp.float32(0),
            "rng": jax.random.key(7),
        }

    return jax.jit(build)()  # one compilation, not one for each parameter


def make_step(optimizer: optax.GradientTransformation) -> Callable[..., dict[str, Any]]:
    """One jitted training step, which donates the state that it is given."""

    def step(state: dict[str, Any], images: jax.Array, labels: jax.Array) -> dict[str, Any]:
        rng, noise = jax.random.split(state["rng"])

        def loss_of(params: Any) -> jax.Array:
            noisy = images + 0.05 * jax.random.normal(noise, images.shape)
            logits: Any = Net().apply({"params": params}, noisy)
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


def train(directory: Path) -> None:
    """Trains to the last step, from the newest checkpoint of the directory where there is one."""
    optimizer = optax.adam(1e-3)
    step = make_step(optimizer)
    saves: list[tuple[jaxckpt.SaveFuture, float]] = []
    with jaxckpt.CheckpointManager(directory, max_to_keep=3, save_every=10) as manager:
        state, status = manager.restore({**init(optimizer), "data": Digits(directory.parent / IMAGES)})
        if manager.latest_checkpoint:
            status.assert_consumed().assert_existing_objects_matched()
            print(f"Restored from {manager.latest_checkpoint}", flush=True)
        else:
            print("Initializing from scratch.", flush=True)
        batches = state.pop("data")
        for number in range(int(state["step"]) + 1, STEPS + 1):
            state = step(state, *next(batches))
            loss = float(state["loss"])
            future = manager.save({**state, "data": batches}, step=number)
            if future is not None:  # else it was not this step's turn
                saves.append((future, loss))
            while saves and saves[0][0].done():
                _tell(*saves.pop(0))
    for save in saves:  # closing the manager has waited for them
        _tell(*save)


def _tell(future: jaxckpt.SaveFuture, loss: float) -> None:
    report = future.result()
    times = f"training waited {report.seconds_blocked * 1e3:.0f} of {report.seconds * 1e3:.0f} ms"
    print(
        f"Saved checkpoint for step {report.step}: {report.path} (loss {loss:.4f}; {times})",
        flush=True,
    )


def killed_in_a_save(directory: Path) -> str:
    """Trains in a child process that gets SIGKILL while it writes a checkpoint of step `KILL_FROM` or later.

    Returns:
        The name of what that save had written so far.
    """
    half_written = re.compile(r"\.ckpt-(\d+)\.jaxckpt-tmp-.*")
    for _ in range(10):
        child = subprocess.Popen(_command(directory))
        try:
            while child.poll() is None:
                for name in _entries(directory):
                    found = half_written.fullmatch(name)
                    if found and int(found[1]) >= KILL_FROM and _size(directory / name):
                        child.send_signal(signal.SIGKILL)
                        child.wait()
                        if name in _entries(directory):
                            return name
                        print("(The save was faster than the kill: once more.)", flush=True)
                time.sleep(0.0005)
        finally:
            child.kill()
            child.wait()
    raise RuntimeError(f"{directory}: no save could be caught in the middle")


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Keys whose values are not bit for bit the same in two checkpoints."""
    return sorted(set(a) ^ set(b)) + [key for key in a if key in b and not _equal(a[key], b[key])]


def refactor(directory: Path) -> bool:
    """Clipping and a schedule come into the chain; returns whether every moment was found again."""
    schedule = optax.cosine_decay_schedule(1e-3, STEPS * 2)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    target = {**init(optimizer), "data": Digits(directory.parent / IMAGES)}
    with jaxckpt.CheckpointManager(directory) as manager:
        # The schedule's own count is new: to start it at zero has to be asked for.
        state, status = manager.restore(target, partial=("optimizer/ScaleByScheduleState/**",))
        reader = jaxckpt.load_checkpoint(directory)
        print(f"Restored from {manager.latest_checkpoint}")
    print(status)
    kept = total = 0
    for slot in ("mu", "nu"):
        moments = optax.tree_utils.tree_get(state["optimizer"], slot)
        for path, moment in jax.tree.leaves_with_path(moments):
            layer, kind = (step.key for step in path)
            kept += _equal(moment, reader[f"net/{layer}/{kind}/.OPTIMIZER_SLOT/optimizer/{slot}"])
            total += 1
    print(f"{kept} of {total} moments are bit for bit those of the checkpoint.")
    batches = state.pop("data")
    state = make_step(optimizer)(state, *next(batches))
    print(f"Training goes on: step {int(state['step'])}, loss {float(state['loss']):.4f}")
    return kept == total


def main(directory: str | None = None) -> int:
    """Runs the whole demo below a directory; returns 0 when everything is as promised."""
    root = _new_directory(Path(directory) if directory else Path(tempfile.mkdtemp(prefix="jaxckpt-demo-")))
    straight, killed = root / "straight", root / "killed"
    fetch_digits(root / IMAGES)

    _say(f"1. {STEPS} steps straight through, in {straight}")
    subprocess.run(_command(straight), check=True)

    _say(f"2. The same program in {killed}, killed (SIGKILL) in the middle of a save")
    leftover = killed_in_a_save(killed)
    print(f"Killed.\nHalf-written: {leftover}\nWhole: {', '.join(_checkpoints(killed))}")

    _say("3. The same program again: it resumes by itself")
    subprocess.run(_command(killed), check=True)
    swept = leftover not in _entries(killed)
    print(f"The half-written {leftover} is {'swept' if swept else 'still there!'}.")
    last = f"ckpt-{STEPS}"
    ours, theirs = jaxckpt.load_checkpoint(killed / last), jaxckpt.load_checkpoint(straight / last)
    different = differences(ours, theirs)
    same = f"{len(ours) - len(different)} of {len(ours)} values of {last} are bit-equal in both runs"
    print(f"{same}: parameters, slots, counts, random key, loss, position in the data.")

    _say("4. The graph of that checkpoint: a dotted edge leads to what the optimizer keeps for a parameter")
    print(ours.graph)

    _say("5. The optimizer becomes chain(clip_by_global_norm, adam(schedule)); no moment is lost")
    kept = refactor(killed)
    return 0 if swept and kept and not different else 1


def _new_directory(parent: Path) -> Path:
    """An empty directory for this demo alone, so that it can be run again in the same place."""
    for number in range(1, 10_000):
        path = parent / (f"jaxckpt-demo-{number}" if number > 1 else "jaxckpt-demo")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise SystemExit(f"{parent} is full of demos")


def _command(directory: Path) -> list[str]:
    return [sys.executable, "-m", "jaxckpt.demo", str(directory)]


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _entries(directory: Path) -> list[str]:
    return [path.name for path in directory.iterdir()] if directory.exists() else []


def _checkpoints(directory: Path) -> list[str]:
    return [Path(path).name for path in jaxckpt.CheckpointManager(directory).checkpoints]


def _size(directory: Path) -> int:
    try:
        return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
    except FileNotFoundError:  # committed meanwhile
        return 0


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return bool(a == b)  # an iterator's state
    a, b = np.asarray(a), np.asarray(b)
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


if __name__ == "__main__":
    train(Path(sys.argv[1]))
