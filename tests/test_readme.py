"""What the README shows runs and prints what it says; what it names exists."""

import contextlib
import io
import re
from pathlib import Path

import pytest

import jaxckpt

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks():
    """(line, language, text, what follows before the next block) of each fenced block."""
    text = README.read_text()
    found = list(BLOCK.finditer(text))
    ends = [match.start() for match in found[1:]] + [len(text)]
    for match, end in zip(found, ends, strict=True):
        line = text.count("\n", 0, match.start()) + 1
        yield line, match[1], match[2], text[match.end() : end]


def examples():
    """(line, code, printed or None): a text block right below a Python block is what it prints."""
    listed = list(blocks())
    for (line, language, code, between), following in zip(listed, [*listed[1:], None], strict=True):
        if language == "python":
            shown = following is not None and following[1] == "text" and not between.strip()
            yield line, code, following[2] if shown else None


def normalised(text):
    """Without blanks at the ends of lines and of the text."""
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def test_the_examples_run_in_order_and_print_what_stands_below_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for line, code, printed in examples():
        output = io.StringIO()
        # So many empty lines before it that a traceback names the README's own line.
        compiled = compile("\n" * line + code, str(README), "exec")
        with contextlib.redirect_stdout(output):
            exec(compiled, namespace)
        assert normalised(output.getvalue()) == normalised(printed or ""), f"README.md, line {line}"


def test_it_starts_with_the_main_job_and_the_tests():
    (_, first, job, _), (_, second, tests, _) = list(blocks())[:2]
    assert (first, second) == ("sh", "sh")
    assert job.strip().endswith(".venv/bin/jaxckpt demo .")
    assert "pytest" in tests
    assert len(job.strip().splitlines()) == len(tests.strip().splitlines()) == 1
    marked = README.read_text().split("<!-- tests -->")[1].split("<!-- end -->")[0]
    assert marked.strip() == f"```sh\n{tests}```"


@pytest.mark.parametrize("name", sorted(set(re.findall(r"jaxckpt\.([A-Za-z_]+)", README.read_text()))))
def test_the_public_names_it_uses_exist(name):
    assert name in jaxckpt.__all__


def test_the_files_it_links_to_exist():
    targets = re.findall(r"\]\(([^)#]+)\)", README.read_text())
    assert targets
    for target in targets:
        assert (ROOT / target).exists(), target
