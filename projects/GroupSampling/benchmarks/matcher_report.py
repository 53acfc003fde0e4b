"""The tables and the figure of bench_matcher.py."""

import math
import statistics
from pathlib import Path


def lookup(records: list[dict], n: int, m: int, name: str) -> dict | None:
    return next((r for r in records if (r["n"], r["m"], r["name"]) == (n, m, name)), None)


def summary(report: dict) -> list[str]:
    """The table of the README: assign_and_sample against each peer of the same process run, in every mode."""
    modes = report["records"]
    columns = [(mode, peer) for peer in report["options"]["peers"] for mode in modes]
    lines = ["| n | m | assign_and_sample | " + " | ".join(f"{peer}, {mode}" for mode, peer in columns) + " |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    first = next(iter(modes.values()))
    for n, m in dict.fromkeys((r["n"], r["m"]) for r in first if r["name"] == "assign_and_sample"):
        ours = lookup(first, n, m, "assign_and_sample")
        cells = [f"{ours['median_ms']:.3f} ms{_memory(ours)}"]
        for mode, peer in columns:
            record = lookup(modes[mode], n, m, peer)
            if "skipped" in record:
                cells.append(record["skipped"])
            else:
                ratio = record["median_ms"] / lookup(modes[mode], n, m, "assign_and_sample")["median_ms"]
                cells.append(f"{record['median_ms']:,.1f} ms{_memory(record)}, {ratio:,.0f}x")
        lines.append(f"| {n:,} | {m:,} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _memory(record: dict) -> str:
    return "" if record["extra_mb"] is None else f", {record['extra_mb']:,.1f} MB"


def tables(report: dict) -> str:
    """The report in Markdown."""
    modes = report["records"]
    lines = ["### Summary: median, extra memory, ratio", "", *summary(report)]
    for mode, records in modes.items():
        names = list(dict.fromkeys(r["name"] for r in records if r["name"] not in ("pairwise_iou", "box_iou")))
        lines += [f"### {mode}: median ms (quartiles), ratio to assign_and_sample, extra MB", ""]
        lines += ["| n | m | " + " | ".join(names) + " | pairs/s |", "|---" * (len(names) + 3) + "|"]
        for n, m in dict.fromkeys((r["n"], r["m"]) for r in records if r["name"] in names):
            ours = lookup(records, n, m, "assign_and_sample")
            cells = [_cell(lookup(records, n, m, name), ours) for name in names]
            lines.append(f"| {n:,} | {m:,} | " + " | ".join(cells) + f" | {n * m / ours['median_ms'] * 1e3:.1e} |")
        iou, peer = (lookup(records, 10000, 1000, name) for name in ("pairwise_iou", "box_iou"))
        ratio = peer["median_ms"] / iou["median_ms"]
        lines += [
            "",
            f"IoU matrix 10,000 x 1,000: pairwise_iou {iou['median_ms']:.1f} ms, "
            f"torchvision box_iou {peer['median_ms']:.1f} ms ({ratio:.1f}x).",
            "",
        ]
    lines += ["### Growth of assign_and_sample", ""]
    records = next(iter(modes.values()))
    for kind, fixed in (("n", "m"), ("m", "n")):
        for value in dict.fromkeys(r[fixed] for r in records if r["name"] == "assign_and_sample"):
            points = [
                (r[kind], r["median_ms"]) for r in records if r["name"] == "assign_and_sample" and r[fixed] == value
            ]
            if len(points) > 1:
                path = ", ".join(f"{x:,}: {t:.3f} ms" for x, t in points)
                lines.append(f"- {fixed} = {value:,}, by {kind}: {path}; exponent {slope(points):.2f}")
    if report["skipped"]:
        lines += ["", *(f"Skipped: {name} ({why})." for name, why in report["skipped"].items())]
    return "\n".join(lines) + "\n"


def _cell(record: dict | None, ours: dict) -> str:
    if record is None:
        return "—"
    if "skipped" in record:
        return record["skipped"]
    ratio = "" if record is ours else f", {record['median_ms'] / ours['median_ms']:,.3g}x"
    return f"{record['median_ms']:.3f} ({record['q1_ms']:.3f}–{record['q3_ms']:.3f}){ratio}{_memory(record)}"


def slope(points: list[tuple[float, float]]) -> float:
    """Exponent of growth: least squares in log-log."""
    x, y = ([math.log(p[k]) for p in points] for k in (0, 1))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)


def plot(report: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 5), sharey=True)
    for mode, style in zip(report["records"], ("-", "--")):
        records = [
            r for r in report["records"][mode] if "median_ms" in r and r["name"] not in ("pairwise_iou", "box_iou")
        ]
        names = [x for x in dict.fromkeys(r["name"] for r in records) if x == "assign_and_sample" or "," not in x]
        sizes, faces = (sorted({r[k] for r in records}) for k in ("n", "m"))
        fixed = {"n": 360000 if 360000 in sizes else sizes[-1], "m": 100 if 100 in faces else faces[-1]}
        for axis, kind, other in ((axes[0], "m", "n"), (axes[1], "n", "m")):
            for number, name in enumerate(names):
                points = sorted(
                    (r[kind], r["median_ms"]) for r in records if r["name"] == name and r[other] == fixed[other]
                )
                if points:
                    label = name if style == "-" else None
                    axis.plot(*zip(*points), style, marker="o", markersize=3, color=f"C{number}", label=label)
            axis.set(xscale="log", yscale="log")
            axis.set_xlabel({"m": "faces m", "n": "anchors n"}[kind])
            axis.set_title(f"{other} = {fixed[other]:,}")
            axis.grid(True, which="both", alpha=0.2)
    axes[0].set_ylabel("ms per image (median)")
    axes[0].legend(fontsize=8)
    title = report["hardware"].get("gpu") or f"{report['hardware']['cpu']}, {report['threads']} threads"
    figure.suptitle(
        f"{title}, torch {report['versions']['torch']}"
        + ("; dashed: malloc tuned" if len(report["records"]) > 1 else "")
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
