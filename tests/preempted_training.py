"""A donating training loop that is preempted; run as a program by the tests of preemption.

Its state is a function of the step, so that a checkpoint can be checked without the program.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from functools import partial

import numpy as np

WIDTH = 1 << 14


def expected(step):
    """The state after so many steps, by numpy."""
    w, total = np.arange(WIDTH, dtype=np.uint32), np.zeros(WIDTH, np.uint32)
    for _ in range(step):
        total = total + w
        w = w * np.uint32(1664525) + np.uint32(1013904223)
    return {"w": w, "total": total, "step": np.int32(step)}


def start():
    import jax.numpy as jnp

    return {name: jnp.array(value, copy=True) for name, value in expected(0).items()}


def make_step():
    import jax

    @partial(jax.jit, donate_argnums=0)
    def step(state):
        total = state["total"] + state["w"]
        w = state["w"] * np.uint32(1664525) + np.uint32(1013904223)
        return {"w": w, "total": total, "step": state["step"] + 1}

    return step


def say(**what):
    print(json.dumps(what), flush=True)


def random_moments(directory, seed, rounds):
    """In each round a fresh manager, and SIGTERM at a random moment, from another thread."""
    import jaxckpt
    from jaxckpt.preemption import notice

    train = make_step()
    generator = random.Random(seed)
    for number in range(rounds):
        notice.forget()  # what happened in the round before
        state = start()
        where = os.path.join(directory, f"{seed}-{number}")
        delay, donated = generator.uniform(0, 0.06), 0
        with jaxckpt.CheckpointManager(where, save_every=7, max_to_keep=2, on_busy="skip") as manager:
            assert not manager.preempted(0)
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGTERM)).start()
            for step in range(1, 1_000_000):
                old, state = state, train(state)
                donated += old["w"].is_deleted()  # a handler that saves would have nothing to save
                manager.save(state, step=step)
                if manager.preempted(step):
                    manager.save(state, step=step)
                    break
        say(directory=where, step=step, delay=delay, donated=donated)


def one_moment(directory, moment):
    """The loop, with a call that takes long at one point: ``say`` tells the parent to send the signal there."""
    import jax
    import jax.numpy as jnp

    import jaxckpt

    train = make_step()
    manager = jaxckpt.CheckpointManager(directory, save_every=1000, on_busy="skip")
    if moment == "before the first step":
        manager.save(start(), step=0)
        manager.close()
        manager = jaxckpt.CheckpointManager(directory, save_every=1000, on_busy="skip")
    state = manager.restore(start()).tree
    manager.preempted(0)
    for step in range(1_000_000):
        if step == 3:
            say(now=True)
            if moment == "compilation":
                jax.jit(lambda x: [x := jnp.sin(x) @ x for _ in range(400)][-1])(jnp.ones((8, 8)))
            elif moment == "evaluation":
                np.asarray(jax.lax.fori_loop(0, 3000, lambda i, x: jnp.sin(x) @ x, jnp.ones((128, 128))))
            elif moment == "another save":
                big = {"w": np.ones(1 << 25, np.uint8)}
                for other in range(2):
                    jaxckpt.save_async(os.path.join(directory, f"big-{other}"), big)
        elif step == 0 and moment == "before the first step":
            say(now=True)
            while not manager.preempted(0):
                time.sleep(0.001)
        if manager.preempted(step):
            manager.save(state, step=step)
            say(step=step)
            if moment == "another save":
                signal.raise_signal(signal.SIGTERM)  # whoever sent the first may send a second
            return  # no close: the exit waits
        state = train(state)


def distributed(directory, port, index, count, stride):
    """Several processes (or one) with JAX's preemption service; the parent tells one of them."""
    import jax

    import jaxckpt

    jax.distributed.initialize(f"localhost:{port}", int(count), int(index))
    manager = jaxckpt.CheckpointManager(os.path.join(directory, index))
    client = jax._src.distributed.global_state.client
    for step in range(0, 100_000_000, int(stride)):
        if step == 3 * int(stride):
            say(now=True)
        # All are at the same step, as a collective would have them.
        client.wait_at_barrier(f"step {step}", timeout_in_ms=20_000)
        if manager.preempted(step):
            manager.save({"x": np.full(3, step)}, step=step)
            manager.close()
            assert manager.preempted(step + 1)
            say(step=step)
            return
        time.sleep(0.002)


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    if what == "random":
        random_moments(arguments[0], int(arguments[1]), int(arguments[2]))
    elif what == "moment":
        one_moment(*arguments)
    else:
        distributed(*arguments)
