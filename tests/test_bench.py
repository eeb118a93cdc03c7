"""The comparisons run: no time is asserted."""

import json

from bench import small_leaves


def test_small_leaves(tmp_path, capsys):
    code = small_leaves.main(
        [
            "--leaves",
            "20",
            "--rounds",
            "1",
            "--directory",
            str(tmp_path),
            "--json",
            str(tmp_path / "times.json"),
        ]
    )
    assert code == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "20 leaves of 1024 bytes, medians of 1 rounds:"
    assert [line.split("  ")[0] for line in printed[2:]] == [
        "jaxckpt",
        "orbax StandardCheckpointer",
        "orbax AsyncCheckpointer",
    ]
    measured = json.loads((tmp_path / "times.json").read_text())
    assert measured["leaves"] == 20
    assert measured["nbytes"] == 20 * 1024
    assert set(measured["medians"]["jaxckpt"]) == {"blocked", "save", "restore"}
    assert [path.name for path in tmp_path.iterdir()] == ["times.json"]  # nothing is left behind
