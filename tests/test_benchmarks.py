"""The benchmark runner: its statistics and tables on toy samples, and every workload once, tiny."""

import importlib.util
import math
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from benchmarks import __main__ as command  # noqa: E402
from benchmarks import pairs, processes, table, workloads  # noqa: E402
from benchmarks.protocol import METRICS, Case, Side, Target, Workload  # noqa: E402

WORKLOADS = workloads.find()


# ---- statistics ---------------------------------------------------------------------------------


def test_sides_take_turns_within_each_stretch():
    whats = {"ours": ["run", "forward", "memory_baseline"], "peer": ["run", "forward"]}
    order = list(pairs.alternate(["ours", "peer"], whats, 2))
    one = [
        ("ours", "run"),
        ("peer", "run"),
        ("ours", "forward"),
        ("peer", "forward"),
        ("ours", "memory_baseline"),
    ]
    assert order == one + one


def test_ratio_is_the_median_over_pairs_not_of_the_sums():
    # One disturbed pair: the ratio of the sums would be 9.3.
    peer, ours = [2.0, 50.0, 2.0, 2.2, 1.8], [1.0, 1.0, 1.0, 1.0, 1.0]
    assert pairs.median_of_ratios(peer, ours) == 2.0
    assert pairs.spread(peer, ours) == (1.8, 50.0)
    assert pairs.median_of_ratios([1.0], [0.0]) is None


def test_relative_difference():
    a = np.array([3.0, 4.0])
    assert pairs.relative_difference([a], [a]) == 0.0
    assert pairs.relative_difference([a * 1.5], [a]) == 0.5
    # The worst array counts.
    assert pairs.relative_difference([a, a * 2], [a, a]) == 1.0
    assert pairs.relative_difference([a], [a, a]) == math.inf
    assert pairs.relative_difference([a[:1]], [a]) == math.inf
    assert pairs.relative_difference([a * np.nan], [a]) == math.inf
    assert pairs.relative_difference([0 * a], [0 * a]) == 0.0
    assert pairs.relative_difference([a], [0 * a]) == math.inf


def samples(cpu, first=None, steady=None):
    return {
        "first": None if first is None else {"wall": first, "cpu": first},
        "calls": 1,
        "wall": [2 * seconds for seconds in cpu],
        "cpu": cpu,
        "memory": {"steady": steady, "first": 60.0, "device": None},
    }


def toy_row():
    about = {"python": "3.11", "versions": {"jax": "0.0"}, "device": "cpu: cpu"}
    return {
        "name": "toy/row",
        "peer": "neural-tangents",
        "wanted_peer": "neural-tangents",
        "rtol": 1e-4,
        "difference": 2e-6,
        "agrees": True,
        "sides": {
            "ours": {
                "about": about,
                "run": samples([2.0, 2.0, 4.0], first=5.0, steady=24.0),
                "forward": samples([1.0, 1.0, 1.0], first=1.5, steady=2.0),
                "memory_baseline": samples([1.0] * 3, first=1.0, steady=20.0),
            },
            "peer": {
                "about": about,
                "run": samples([6.0, 6.0, 8.0], first=12.0, steady=48.0),
                "forward": samples([2.0, 2.0, 2.0], first=2.0, steady=2.0),
            },
        },
    }


def test_statistics_and_verdicts_of_a_row():
    workload = Workload(
        "toy/row",
        lambda side: Case(run=lambda: 0),
        targets=(
            Target("speedup", 2.5),
            Target("over_forward", 1.9),
            Target("peak_over_baseline", 1.2),
            Target("compile_ratio", 2.0),
        ),
    )
    figures = pairs.statistics_of(toy_row())
    assert figures["seconds"] == 2.0
    assert figures["wall_seconds"] == 4.0
    assert figures["speedup"] == 3.0
    assert figures["speedup_range"] == (2.0, 3.0)
    assert figures["over_forward"] == 2.0
    assert figures["peer_over_forward"] == 3.0
    assert figures["compile"] == 3.0
    assert figures["compile_ratio"] == 2.0
    assert figures["peak_over_baseline"] == pytest.approx(1.2)
    assert figures["memory_ratio"] == 2.0
    met = {verdict["metric"]: verdict["met"] for verdict in pairs.verdicts(workload, figures)}
    assert met == {
        "speedup": True,
        "over_forward": False,
        "peak_over_baseline": True,
        "compile_ratio": True,
    }


def test_accelerators_are_read_off_the_wall_clock():
    assert pairs.Settings(gpu=True).clock == "wall"
    assert pairs.statistics_of(toy_row(), "wall")["seconds"] == 4.0


def test_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="no metric 'sped'; there are speedup, "):
        Target("sped", 1.0)
    assert set(METRICS) == set(table.NAMES)


# ---- tables -------------------------------------------------------------------------------------


def test_report_has_figures_targets_failures_and_absences():
    row = toy_row()
    row["statistics"] = pairs.statistics_of(row)
    row["targets"] = [
        {"metric": "speedup", "bound": 2.5, "value": 3.0, "met": True},
        {"metric": "over_forward", "bound": 1.9, "value": 2.0, "met": False},
    ]
    wrong = {**row, "name": "toy/wrong", "difference": 0.3, "agrees": False, "targets": []}
    broken = {"name": "toy/broken", "error": "peer: ValueError: no", "sides": {}}
    absent = {**wrong, "name": "toy/absent", "peer": None, "difference": None, "agrees": True}
    page = table.report({"date": "today"}, [row, wrong, broken, absent])
    lines = page.splitlines()
    assert lines[0] == "- date: today"
    (time_line,) = [line for line in lines if line.startswith("| toy/row ")][:1]
    cells = [cell.strip() for cell in time_line.strip("|").split("|")]
    assert cells == [
        "toy/row",
        "2 s",
        "6 s",
        "3.00",
        "2.00 to 3.00",
        "3.00",
        "1 s / 2 s",
        "2.00 / 3.00",
        "2.0e-06",
        "peer / ours ≥ 2.5: 3.00, met; × forward ≤ 1.9: 2.00, **missed**",
    ]
    memory_line = [line for line in lines if line.startswith("| toy/row ")][1]
    assert [cell.strip() for cell in memory_line.strip("|").split("|")] == [
        "toy/row",
        "24.0 / 48.0",
        "2.00",
        "60.0 / 60.0",
        "2.0 / 2.0",
        "20.0",
        "3 s / 6 s",
        "2.00",
    ]
    assert any("**3.0e-01 > 0.0001**" in line for line in lines)
    assert "- `toy/broken`: **failed**: peer: ValueError: no" in lines
    assert any(line.startswith("- `toy/absent`: this package alone;") for line in lines)
    widths = {len(line) for line in lines if line.startswith("|")}
    assert len(widths) == 2  # two tables, each of one width


def test_columns_with_nothing_in_them_are_left_out():
    assert table.markdown(["a", "b", "c"], [["1", "", "2"], ["3", "", ""]]) == (
        "| a | c |\n| - | - |\n| 1 | 2 |\n| 3 |   |"
    )
    assert table.markdown(["a"], []) == ""


@pytest.mark.parametrize(
    "value, text", [(None, ""), (2.5, "2.5 s"), (0.0123, "12.3 ms"), (4.56e-5, "45.6 µs")]
)
def test_seconds(value, text):
    assert table.seconds(value) == text


# ---- workloads ----------------------------------------------------------------------------------


def test_workloads_have_distinct_names_and_known_peers():
    assert {w.name for w in workloads.find("vp/fresh")} == {
        "vp/fresh/mlp",
        "vp/fresh/cnn",
        "vp/fresh/transformer",
    }
    for workload in WORKLOADS:
        if workload.peer is not None:
            assert (processes.PEERS / f"{workload.peer}.txt").exists(), workload


def test_side_names_its_package_and_size():
    side = Side("tangents", quick=True)
    assert side.ours and side.nt.__name__ == "tangents" and side.size(512, 8) == 8
    assert not Side("neural_tangents").ours and Side("neural_tangents").size(512, 8) == 512


def test_unknown_peer_and_unknown_workload(capsys):
    with pytest.raises(ValueError, match="no peer 'nobody': benchmarks/peer has "):
        processes.peer_environment("nobody")
    assert command.main(["--only", "no such workload"]) == 2
    assert "--list" in capsys.readouterr().err


@pytest.fixture(scope="module")
def worker():
    with processes.Worker(processes.our_environment()) as process:
        yield process


def _quick(workload):
    # Compiling an expansion takes most of a minute: one of them stands for all.
    long = workload.name.startswith("infinite/any/") and "/tanh/" not in workload.name
    return pytest.param(workload, id=workload.name, marks=[pytest.mark.slow] if long else [])


@pytest.mark.parametrize("workload", [_quick(w) for w in WORKLOADS])
def test_workload_runs_in_its_quick_shape(workload, worker, tmp_path):
    """In this package alone, in a worker process as the benchmark runs it."""
    missing = [name for name in workload.requires if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    if workload.x64:
        with processes.Worker(processes.our_environment(), x64=True) as process:
            _run(workload, process, tmp_path)
    else:
        _run(workload, worker, tmp_path)


def _run(workload, worker, tmp_path):
    has = worker.ask("build", module=workload.module, name=workload.name, quick=True)["has"]
    if "measure" in has:
        assert worker.ask("time", what="run", calls=1)["cpu"] > 0
        return
    path = str(tmp_path / "result.npz")
    assert worker.ask("result", path=path)["shapes"]
    with np.load(path) as arrays:
        assert all(np.isfinite(arrays[name]).all() for name in arrays.files)
    if "forward" in has:
        assert worker.ask("time", what="forward", calls=1)["wall"] > 0


def test_worker_answers_errors_and_reports_its_death(worker):
    with pytest.raises(processes.WorkerError, match="ValueError"):
        worker.ask("build", module=WORKLOADS[0].module, name="no such name", quick=True)
    assert worker.ask("about")["versions"]["tangents"]  # and goes on
    nobody = processes.Environment("nobody", sys.executable, "no_such_package", jax=False)
    with (
        processes.Worker(nobody) as dead,
        pytest.raises(processes.WorkerError, match="No module named 'no_such_package'"),
    ):
        dead.ask("about")


def test_a_whole_run_writes_json_and_markdown(tmp_path, capsys):
    path = tmp_path / "run.json"
    code = command.main(["--quick", "--alone", "--only", "import", "--json", str(path)])
    page = capsys.readouterr().out
    assert code == 0
    assert path.with_suffix(".md").read_text() == page
    assert "| import " in page and "- ours: jax " in page
