"""Rows as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

SECONDS = [(1.0, "s", 1.0), (1e-3, "ms", 1e3), (0.0, "µs", 1e6)]


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    for bound, unit, factor in SECONDS:
        if value >= bound:
            return f"{value * factor:.3g} {unit}"
    return f"{value:.3g} s"


def ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}" if value < 100 else f"{value:.0f}"


def mib(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def both(ours: str, peer: str) -> str:
    return f"{ours} / {peer}" if ours and peer else ours


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; a column with nothing in it, such as the peer's in a run without, is left out."""
    if not rows:
        return ""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    head, rows = [head[i] for i in kept], [[row[i] for i in kept] for row in rows]
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in [head, ["-" * width for width in widths], *rows]
    ]
    return "\n".join(lines)


NAMES = {
    "speedup": "peer / ours",
    "memory_ratio": "memory, peer / ours",
    "compile_ratio": "compile, peer / ours",
    "over_forward": "× forward",
    "peak_over_baseline": "memory, × baseline",
    "seconds": "seconds",
    "wall_seconds": "wall seconds",
    "peak_mib": "peak MiB",
}


def target_cell(target: dict) -> str:
    sign = "≥" if target["metric"] in ("speedup", "memory_ratio", "compile_ratio") else "≤"
    verdict = {True: "met", False: "**missed**", None: "not measured"}[target["met"]]
    value = "" if target["value"] is None else f"{ratio(target['value'])}, "
    return f"{NAMES[target['metric']]} {sign} {target['bound']:g}: {value}{verdict}"


def agreement_cell(row: dict) -> str:
    if row["difference"] is None:
        return "" if row["agrees"] else "**not finite**"
    text = f"{row['difference']:.1e}"
    return text if row["agrees"] else f"**{text} > {row['rtol']:g}**"


def time_table(rows: Sequence[dict]) -> str:
    head = [
        "workload",
        "ours",
        "peer",
        "peer / ours",
        "range",
        "wall",
        "forward ours / peer",
        "× forward ours / peer",
        "difference",
        "target",
    ]
    body = []
    for row in rows:
        if "statistics" not in row:
            continue
        s = row["statistics"]
        span = s.get("speedup_range")
        body.append(
            [
                row["name"],
                seconds(s["seconds"]),
                seconds(s.get("peer_seconds")),
                ratio(s.get("speedup")),
                f"{ratio(span[0])} to {ratio(span[1])}" if span else "",
                ratio(s.get("speedup_wall")),
                both(seconds(s["forward_seconds"]), seconds(s.get("peer_forward_seconds"))),
                both(ratio(s["over_forward"]), ratio(s.get("peer_over_forward"))),
                agreement_cell(row),
                "; ".join(target_cell(target) for target in row["targets"]),
            ]
        )
    return markdown(head, body)


def memory_table(rows: Sequence[dict]) -> str:
    head = [
        "workload",
        "peak MiB ours / peer",
        "peer / ours",
        "first call ours / peer",
        "forward ours / peer",
        "baseline",
        "compile ours / peer",
        "peer / ours",
    ]

    def cell(row: dict, side: str, what: str, key: str) -> str:
        memory = row["sides"].get(side, {}).get(what, {}).get("memory") or {}
        if key == "steady" and memory.get("device") is not None:
            return mib(memory["device"])
        return mib(memory.get(key))

    body = []
    for row in rows:
        if "statistics" not in row:
            continue
        s = row["statistics"]
        sides = ("ours", "peer")
        body.append(
            [
                row["name"],
                both(*[cell(row, side, "run", "steady") for side in sides]),
                ratio(s.get("memory_ratio")),
                both(*[cell(row, side, "run", "first") for side in sides]),
                both(*[cell(row, side, "forward", "steady") for side in sides]),
                cell(row, "ours", "memory_baseline", "steady"),
                both(seconds(s["compile"]), seconds(s.get("peer_compile"))),
                ratio(s.get("compile_ratio")),
            ]
        )
    return markdown(head, body)


def absences(rows: Sequence[dict]) -> str:
    lines = []
    for row in rows:
        if "error" in row:
            lines.append(f"- `{row['name']}`: **failed**: {row['error']}")
        elif "skipped" in row:
            lines.append(f"- `{row['name']}`: skipped: {row['skipped']}")
        elif row["wanted_peer"] and not row["peer"] and not row.get("alone"):
            lines.append(
                f"- `{row['name']}`: this package alone; `benchmarks/peer/setup "
                f"{row['wanted_peer']}` makes its peer"
            )
    return "\n".join(lines)


def report(about: dict, rows: Sequence[dict]) -> str:
    """The whole Markdown page of a run."""
    lines = [f"- {name}: {value}" for name, value in about.items()]
    parts = ["\n".join(lines), time_table(rows), memory_table(rows), absences(rows)]
    return "\n\n".join(part for part in parts if part) + "\n"
