"""Saves that the system refuses, for real: each raises a clear error, leaves nothing, and the next one works.

Each kind of refusal has one child process, which goes through every place where a failure is told of.
"""

import errno
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import textwrap

import numpy as np
import pytest

import jaxckpt
from jaxckpt import saving
from jaxckpt.storage import kv

# `refuse(True)` and `refuse(False)` are the child's own; `big` is what is refused.
STORY = """
manager = jaxckpt.CheckpointManager(d)
manager.save(small).result()  # imports all there is

def told(call, path):
    try:
        call()
    except jaxckpt.SaveError as error:
        for part in (path, says, "could not be written", " bytes", remedy):
            assert part in str(error), (part, str(error))
        assert error.errno == number, error.errno
        assert there() == before, there()
    else:
        raise AssertionError("nothing was raised")

def there():
    return {os.path.relpath(os.path.join(parent, name), d)
            for parent, _, names in os.walk(d) for name in [*names, os.path.basename(parent)]
            if "ckpt" in name}

before = there()
refuse(True)
told(lambda: jaxckpt.save(os.path.join(d, "one"), big), os.path.join(d, "one"))
told(manager.save(big).result, "ckpt-2")
other = manager.save(big)
concurrent.futures.wait([other])
told(lambda: manager.save(big), "ckpt-2")  # whose own number nothing has used up
manager.save(big)
told(manager.wait, "ckpt-2")
manager.save(big)
told(manager.close, "ckpt-2")
refuse(False)
manager = jaxckpt.CheckpointManager(d)
assert manager.save(big).result().path.endswith("ckpt-2")
assert manager.steps == [1, 2]
shutil.rmtree(os.path.join(d, "ckpt-2"))
before = there()
refuse(True)
atexit.register(lambda: print("left:", sorted(there() - before), flush=True))  # called after ours
jaxckpt.save_async(os.path.join(d, "last"), big)
"""

START = """
import atexit, concurrent.futures, faulthandler, os, shutil, subprocess, sys
faulthandler.dump_traceback_later(100, exit=True)
import numpy as np, jaxckpt
d, small = sys.argv[1], {"w": np.ones(3)}
"""


def run(code, path, prefix=(), setup=START):
    paths = os.pathsep.join([os.path.dirname(os.path.dirname(jaxckpt.__file__)), *sys.path])
    return subprocess.run(
        [*prefix, sys.executable, "-c", setup + textwrap.dedent(code), str(path)],
        capture_output=True,
        text=True,
        timeout=120,
        # (what is freed is given back, whatever size it has)
        env={**os.environ, "PYTHONPATH": paths, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )


def check(result, says):
    """The last failure is told of at the exit."""
    assert result.returncode == 120, result.stderr
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("jaxckpt: saving ")
    assert says in lines[0]
    assert "left: []" in result.stdout


def in_own_mount(path, options):
    """The command by which a program has a file system of its own at ``path``; skips where nobody may mount."""
    script = f'mount -t tmpfs -o {options} tmpfs "$0" && exec "$@"'
    for unshare in (["unshare", "-rm"], ["unshare", "-m"]):
        prefix = [*unshare, "sh", "-c", script, str(path)]
        if shutil.which("unshare") and not subprocess.run([*prefix, "true"], capture_output=True).returncode:
            return prefix
    pytest.skip("needs the right to mount: root's, or user namespaces")


def test_a_full_disk(tmp_path):
    code = """
    says, number, remedy = "No space left on device", 28, "Free some space"
    big = {"w": np.random.rand(1 << 20), **{f"k{i}": np.random.rand(100) for i in range(300)}}
    def refuse(yes):
        ballast = os.path.join(d, "ballast")
        if yes:
            with open(ballast, "wb") as file: file.write(bytes(18 << 20))
        else:
            os.unlink(ballast)
    """
    result = run(textwrap.dedent(code) + STORY, tmp_path, in_own_mount(tmp_path, "size=24m"))
    check(result, "No space left on device")


def test_a_file_system_that_has_become_read_only(tmp_path):
    code = """
    says, number, remedy, big = "Read-only file system", 30, "may write to", small
    def refuse(yes):
        subprocess.run(["mount", "-o", f"remount,{'ro' if yes else 'rw'}", d], check=True)
    """
    check(run(textwrap.dedent(code) + STORY, tmp_path, in_own_mount(tmp_path, "size=8m")), "Read-only")


def test_a_limit_on_the_size_of_files(tmp_path):
    code = """
    import resource
    says, number, remedy = "File too large", 27, "ulimit -f"
    big = {f"w{i}": np.random.rand(1 << 17) for i in range(8)}  # of 1 MiB
    def refuse(yes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000 if yes else -1, -1))
    """
    check(run(textwrap.dedent(code) + STORY, tmp_path), "File too large")


def test_a_permission_that_is_withdrawn():
    """Root may write everywhere, so the child becomes nobody; in a directory that nobody can reach."""
    path = tempfile.mkdtemp(dir="/tmp")
    code = f"""
    says, number, remedy, big = "Permission denied", 13, "may write to", small
    def refuse(yes):
        os.chmod(d, 0o500 if yes else 0o700)
    if os.geteuid() == 0:
        jaxckpt.save(os.path.join(d, "warm-up"), big)  # what is not imported by then cannot be any more
        jaxckpt.CheckpointManager(os.path.join(d, "m")).save(small).result()
        shutil.rmtree(d, ignore_errors=True); os.makedirs(d, exist_ok=True)
        user = {pwd.getpwnam("nobody").pw_uid}
        os.chown(d, user, -1)
        os.setuid(user)
    """
    try:
        check(run(textwrap.dedent(code) + STORY, path), "Permission denied")
    finally:
        shutil.rmtree(path)


def test_a_quota_that_is_used_up(tmp_path, monkeypatch):
    """Quotas need a system that has them; what it says reaches us in the same two ways as that of a full disk."""
    said = "RESOURCE_EXHAUSTED: Failed to write 1 bytes [os_error_code='122']"
    assert kv._system_error(ValueError(said)) == errno.EDQUOT
    assert kv._system_error(ValueError("DATA_LOSS")) is None

    def refuse(handle):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(jaxckpt.SaveError, match=r"quota exceeded.*bytes.*your quota") as caught:
        jaxckpt.save(tmp_path / "a", {"w": np.ones(3)})
    assert caught.value.errno == errno.EDQUOT
    assert os.listdir(tmp_path) == []


# what is removed meanwhile


def refused_at_the_commit(path, remove):
    order = saving.Order(path=str(path), before_commit=remove)
    error = saving.submit({"w": np.random.rand(1 << 18), "n": np.arange(5)}, order).exception()
    assert isinstance(error, jaxckpt.SaveError), error
    assert "could not be written" in str(error)
    assert "removed meanwhile" in str(error)
    assert not path.exists()
    if path.parent.exists():
        assert [name for name in os.listdir(path.parent) if "tmp" in name] == []
    assert jaxckpt.save(path, {"w": np.ones(3)}).path == str(path)  # makes it anew


def test_a_directory_that_is_removed(tmp_path):
    refused_at_the_commit(tmp_path / "d" / "c", lambda: shutil.rmtree(tmp_path / "d"))


def test_a_directory_that_is_removed_and_made_anew(tmp_path):
    """As storage does, which goes on writing into it."""

    def remove():
        [name] = [name for name in os.listdir(tmp_path / "d") if name.startswith(".")]
        copy = shutil.copytree(tmp_path / "d" / name, tmp_path / "copy")
        shutil.rmtree(tmp_path / "d")
        shutil.copytree(copy, tmp_path / "d" / name)

    refused_at_the_commit(tmp_path / "d" / "c", remove)


@pytest.mark.parametrize("which", ["d/*", "graph.json"])
def test_a_file_that_is_removed(tmp_path, which):
    def remove():
        found = [*tmp_path.glob(f".*/{which}")]
        assert found
        found[0].unlink()

    refused_at_the_commit(tmp_path / "c", remove)


def test_a_directory_that_is_removed_while_it_is_written(tmp_path):
    """At any moment: the outcome is a checkpoint that is whole (or was removed after it was there), or an error."""
    tree = {f"w{i}": np.random.rand(1 << 15) for i in range(20)}
    seen = set()
    for attempt in range(12):
        future = jaxckpt.save_async(tmp_path / "d" / "c", tree)
        waited = 0
        while not future.done() and waited < attempt:
            waited += any(name.startswith(".c.") for name in safe_listdir(tmp_path / "d"))
        for name in safe_listdir(tmp_path / "d"):
            if name.startswith("."):
                shutil.rmtree(tmp_path / "d" / name, ignore_errors=True)
        error = future.exception()
        assert error is None or isinstance(error, jaxckpt.SaveError), error
        seen.add(type(error))
        assert safe_listdir(tmp_path / "d") == (["c"] if error is None else [])
        if error is None:
            restored = jaxckpt.restore(tmp_path / "d" / "c", tree).tree
            assert all((restored[key] == tree[key]).all() for key in tree)
            shutil.rmtree(tmp_path / "d" / "c")
    assert seen


def safe_listdir(path):
    return os.listdir(path) if os.path.isdir(path) else []


def test_what_storage_still_writes_after_it_has_failed_is_not_left_behind(tmp_path):
    """A write of many files goes on for long after the first of them has failed, and makes directories anew."""
    code = """
    big = {f"w{i}": np.zeros(1 << 21) for i in range(40)}  # of 16 MiB
    import time
    for _ in range(2):
        try:
            jaxckpt.save(os.path.join(d, "a"), big, memory_limit=1 << 24)  # less than it takes: nothing is copied
        except jaxckpt.SaveError:
            pass
        else:
            raise AssertionError
        for _ in range(60):
            assert os.listdir(d) == []
            time.sleep(0.01)
    """
    result = run(code, tmp_path, in_own_mount(tmp_path, "size=200m"))
    assert result.returncode == 0, result.stderr


# memory

MEMORY = """
import resource
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << (0 if sys.platform == "darwin" else 10)
nbytes = 16 << 20
"""


def test_failed_saves_hold_no_memory(tmp_path):
    """Whoever keeps the future, or the error, keeps no values: neither does the list of what nobody has seen."""
    code = """
    before = peak()
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, -1))
    futures = []
    for number in range(6):
        futures.append(jaxckpt.save_async(os.path.join(d, str(number)), {"w": np.ones(nbytes // 8)}))
        concurrent.futures.wait(futures)
    assert peak() - before < 3 * nbytes, (peak() - before) / nbytes
    assert all(isinstance(future.exception(), jaxckpt.SaveError) for future in futures)
    """
    result = run(
        "jaxckpt.save(os.path.join(d, 'warm'), small)\n" + textwrap.dedent(code),
        tmp_path,
        setup=START + MEMORY,
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(("limit", "states"), [(1, 2), (1 << 30, 3)])
def test_saves_of_a_donating_step_do_not_pile_up(tmp_path, limit, states):
    """A view of a donated buffer keeps it alive: one beside the state itself, and two where the limit allows it."""
    code = f"""
    import jax, jax.numpy as jnp
    step = jax.jit(lambda state: {{key: value + 1 for key, value in state.items()}}, donate_argnums=0)
    state = step({{f"w{{i}}": jnp.zeros(nbytes // 64) for i in range(16)}})
    jaxckpt.save(os.path.join(d, "warm"), small)
    before = peak() - nbytes
    futures = []
    for number in range(20):
        futures.append(jaxckpt.save_async(os.path.join(d, "a"), state, overwrite=True, memory_limit={limit}))
        state = step(state)
    for future in futures: future.result()
    assert peak() - before < ({states} + 0.5) * nbytes, (peak() - before) / nbytes
    assert (jaxckpt.load_checkpoint(os.path.join(d, "a"))["w3"] == 20).all()
    """
    result = run(code, tmp_path, setup=START + MEMORY)
    assert result.returncode == 0, result.stderr
