"""The command line: the demonstration end to end, at its small size."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("optax")

COMMAND = [sys.executable, "-m", "tangents.cli"]
PICTURES = ["kernel.png", "least_sure.png", "learning_curves.png", "spectrum.png"]


def _run(*arguments, **kwargs):
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, **kwargs)


def test_demo_twice(tmp_path):
    """Report, pictures and JSON; a second run replaces them and touches nothing else."""
    out = tmp_path / "report"
    out.mkdir()
    (out / "mine.txt").write_text("stays")
    (out / "report.html").write_text("of an earlier run")
    run = _run("demo", "--quick", "--json", "--seed", "3", "--out", str(out))
    assert run.returncode == 0, run.stderr
    facts = json.loads(run.stdout)
    everything = len(facts["subsets"])
    pooled = sum(n <= 50 for n in facts["subsets"])
    assert [len(row["curve"]) for row in facts["rows"]] == [everything] * 6 + [pooled]
    assert "CNN with pooling (50 images)" in facts["rows"][-1]["name"]
    for row in facts["rows"]:
        assert 0.5 < row["accuracy"] <= 1.0, row
        assert row["seconds"] > 0 and row["peak_bytes"] > 2**20
        assert row["curve"][-1] > row["curve"][0]
    assert sorted(os.listdir(tmp_path)) == ["report"]
    assert sorted(os.listdir(out)) == sorted([*PICTURES, "mine.txt", "report.html"])
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 4 and 'src="http' not in page
    for row in facts["rows"]:
        assert row["name"] in page
    assert "NTK at initialisation" in run.stderr  # progress


HEED_INTERRUPTS = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Started in the background of a shell, programs inherit that interrupts are ignored."""


def test_interrupted_demo_leaves_nothing(tmp_path):
    out = tmp_path / "new" / "report"
    process = subprocess.Popen(
        [sys.executable, "-c", HEED_INTERRUPTS, *COMMAND, "demo", "--quick", "--out", str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    assert process.stderr is not None
    while "NTK" not in process.stderr.read(1) + process.stderr.readline(40):
        assert process.poll() is None
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=120)
    assert process.returncode == 130, rest
    assert "nothing was written" in rest
    assert os.listdir(tmp_path) == []


def test_bad_arguments(tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    run = _run("demo", "--out", str(file))
    assert run.returncode == 2 and "cannot be written: File exists" in run.stderr
    run = _run("demo", "--out", str(file / "sub"))
    assert run.returncode == 2 and "cannot be written: Not a directory" in run.stderr
    run = _run("demo", "--seed", "-1", "--out", str(tmp_path / "o"))
    assert run.returncode == 2 and "--seed -1 must be 0 to 2**32 - 1" in run.stderr
    assert _run("nonsense").returncode == 2
    assert _run("--version").stdout.startswith("tangents ")
