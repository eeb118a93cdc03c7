"""A machine without jaxckpt: plain Orbax opens our checkpoints, on any number of devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from orbax_only import CASES, PAIRS, write_expected

import jaxckpt

DEVICES = (1, 8)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("for_orbax")
    for case, build in CASES.items():
        tree = build()
        jaxckpt.save(directory / case, tree)
        write_expected(directory / f"{case}.npz", tree)
    return directory


@pytest.fixture(scope="module")
def outcomes(directory):
    """What a process without jaxckpt met: {devices: {case and way: "ok" or a traceback}}."""
    found = {}
    for devices in DEVICES:
        child = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("orbax_only.py")), str(directory)],
            env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"},
            capture_output=True,
            text=True,
        )
        assert child.returncode == 0, child.stderr
        printed = json.loads(child.stdout.splitlines()[-1])
        assert printed["devices"] == devices
        found[devices] = printed["results"]
    return found


def ocdbt_value(path, key):
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
    return json.loads(store.read(key).result().value)


@pytest.mark.parametrize(("case", "way"), PAIRS)
@pytest.mark.parametrize("devices", DEVICES)
def test_orbax_opens_it(outcomes, devices, case, way):
    outcome = outcomes[devices][f"{case}: {way}"]
    if outcome != "ok":
        pytest.fail(outcome, pytrace=False)


def test_the_large_array_has_several_chunks(directory):
    reader = jaxckpt.load_checkpoint(directory / "large")
    assert reader.get_variable_to_shape_map()["w"] == [1500, 4001]
    sizes = [path.stat().st_size for path in Path(reader.path, "d").iterdir()]
    assert sum(sizes) >= 1500 * 4001 * 4
    zarray = ocdbt_value(reader.path, "w/.zarray")
    assert np.prod(-(-np.array(zarray["shape"]) // np.array(zarray["chunks"]))) > 1
    assert zarray["compressor"] is None
