"""Table and plot of what linear.py measured, from its JSON alone: no GPU, and torch is not imported. Writes both beside it.

    python kernels/benchmarks/report.py results.json [--batches 8 16] [--shares 0 0.01]

With batches or shares it prints one narrow table of these instead, ours beside fp16, and writes nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

Row = dict[str, Any]
TITLES = {
    "ours": "ours", "ours_bf16": "ours, x in bf16", "fp16": "fp16 cuBLAS", "bf16": "bf16 cuBLAS", "spqr_quant": "spqr_quant",
    "csr": "cuBLAS + cuSPARSE", "gemlite": "gemlite 4 bit",
}  # fmt: skip
FIELDS = ("shape", "weight_bits", "statistics", "group_size", "share")


def _same(row: Row, other: Row) -> bool:
    """The fields that both name agree."""
    return all(None in (row.get(name), other.get(name)) or row[name] == other[name] for name in FIELDS)


def _find(rows: list[Row], peer: str, like: Row) -> Row | None:
    return next((r for r in rows if r["peer"] == peer and r["batch"] == like["batch"] and _same(r, like)), None)


def _lines(rows: list[Row], peers: list[str]) -> list[Row]:
    """What the rows of a table are: each matrix of ours, or where ours was not measured, of the peer that names most."""
    for peer in ("ours", "spqr_quant", "csr", *peers):
        found = [r for r in rows if r["peer"] == peer]
        if found:
            return found
    return []


def _cell(found: Row | None, fp16: Row | None) -> str:
    if found is None:
        return "—"
    if found["status"] != "ok":
        return str(found["status"].split(":")[0])
    if fp16 is None or fp16["status"] != "ok" or found is fp16:
        return f"{found['us']:.1f}"
    return f"{found['us']:.1f} ({fp16['us'] / found['us']:.2f} x)"


def _kind(row: Row) -> str:
    return "—" if row.get("weight_bits") is None else f"{row['weight_bits']} {row['statistics']} {row['group_size']}"


def table(results: dict[str, Any]) -> str:
    """Markdown: the machine, then one table a batch size, a row a matrix; times in us, in brackets fp16's time over them."""
    about, rows = results["machine"], results["results"]
    peers = [name for name in TITLES if any(r["peer"] == name for r in rows)]
    ceiling = about["read_bytes_per_s"]
    versions = ", ".join(f"{name} {version}" for name, version in about["peers"].items())
    lines = [
        f"# {about['gpu']}, {about['date']}",
        "",
        f"Commit {about['commit']}; driver {about['driver']}, CUDA {about['cuda']}, torch {about['torch']}, Triton "
        f"{about['triton']}, Python {about['python']}; peers: {versions or 'none'}.",
        "",
        f"Read bandwidth of a plain sum in this run, the ceiling: {ceiling / 1e12:.2f} TB/s. Times in microseconds, in "
        "brackets fp16's time divided by them; % is ours' bytes a second of the ceiling, error its distance from float64.",
    ]
    if results.get("left_out"):
        lines += ["", f"The time was up: {results['left_out']} products were not measured."]
    for batch in sorted({r["batch"] for r in rows}):
        here = [r for r in rows if r["batch"] == batch]
        shown = [p for p in peers if any(r["peer"] == p for r in here)]
        head = ["out x in", "bits", "outliers %", *(TITLES[p] for p in shown), "TB/s", "%", "error"]
        lines += ["", f"## Batch {batch}", "", f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
        for line in _lines(here, shown):
            fp16 = _find(here, "fp16", line)
            share = "—" if line["share"] is None else f"{100 * line['share']:g}"
            cells = [f"{line['shape'][0]} x {line['shape'][1]}", _kind(line), share]
            cells += [_cell(_find(here, peer, line), fp16) for peer in shown]
            if line["status"] == "ok":
                reached = line["bytes_per_s"]
                cells += [f"{reached / 1e12:.2f}", f"{100 * reached / ceiling:.0f}", f"{line['error']:.1e}"]
            else:
                cells += ["—"] * 3
            lines.append(f"| {' | '.join(cells)} |")
    good = {p: [r for r in rows if r["peer"] == p and r["status"] == "ok"] for p in peers}
    errors = ", ".join(f"{TITLES[p]} {max(r['error'] for r in good[p]):.1e}" for p in peers if good[p])
    if errors:
        lines += ["", f"Largest error against float64 of the same stored matrix: {errors}."]
    loops = [TITLES[p] for p in peers if any(r.get("clock") == "loop" for r in good[p])]
    if loops:
        lines += ["", f"Launched one by one, as no CUDA graph could capture it (some rows at least): {', '.join(loops)}."]
    for said in sorted({f"{TITLES[r['peer']]}: {r['status']}" for r in rows if r["status"].startswith("failed")}):
        lines += ["", said]
    return "\n".join(lines) + "\n"


def narrow(results: dict[str, Any], batches: list[int], shares: list[float]) -> str:
    """Markdown: a row a shape, and of each batch size fp16's time and ours at these shares of outliers."""
    rows = results["results"]
    every = sorted({r["batch"] for r in rows})
    outliers = sorted({r["share"] for r in rows if r["peer"] == "ours"})
    batches, shares = batches or every, shares or outliers
    titles = ["none" if share == 0 else f"{100 * share:g} %" for share in shares]
    head = ["out x in", *(title for batch in batches for title in (f"fp16, batch {batch}", *titles))]
    lines = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    for shape in dict.fromkeys(tuple(r["shape"]) for r in rows):
        cells = [f"{shape[0]} x {shape[1]}"]
        for batch in batches:
            here = [r for r in rows if tuple(r["shape"]) == shape and r["batch"] == batch]
            fp16 = next((r for r in here if r["peer"] == "fp16"), None)
            ours = [next((r for r in here if r["peer"] == "ours" and r["share"] == share), None) for share in shares]
            cells += [_cell(found, fp16) for found in (fp16, *ours)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _series(rows: list[Row]) -> dict[str, list[Row]]:
    """Label -> rows: ours without and with 1 % of outliers, peers with 1 %, or what comes closest of what was measured."""
    chosen: dict[str, list[Row]] = {}
    kinds = sorted({_kind(r) for r in rows if r["peer"] == "ours"})
    kind = next((k for k in kinds if k.startswith("3 bilevel")), kinds[0] if kinds else None)
    for peer, title in TITLES.items():
        of_peer = [r for r in rows if r["peer"] == peer and r["status"] == "ok" and (peer != "ours" or _kind(r) == kind)]
        shares = sorted({r["share"] for r in of_peer if r["share"] is not None})
        if not shares:
            wanted: list[float | None] = [None]
        else:
            nearest = min(shares, key=lambda share: abs(share - 0.01))
            wanted = list(dict.fromkeys([shares[0], nearest] if peer == "ours" else [nearest]))
        for share in wanted:
            found = [r for r in of_peer if r["share"] == share]
            if found:
                chosen[title if share is None else f"{title}, {100 * share:g} % outliers"] = found
    return chosen


def plot(results: dict[str, Any], path: Path) -> None:
    """Bytes a second of the stored matrix that each product reached against the ceiling, one panel a batch size."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "roofline", "svg.fonttype": "none", "font.size": 8})
    about, rows = results["machine"], results["results"]
    batches = sorted({r["batch"] for r in rows})
    shapes = sorted({tuple(r["shape"]) for r in rows}, key=lambda s: (s[0] * s[1], s))
    series = _series(rows)
    columns = min(4, max(1, len(batches)))
    lines = -(-max(1, len(batches)) // columns)
    size = (3.4 * columns, 2.7 * lines + 0.8)
    figure, axes = plt.subplots(lines, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    for panel, batch in zip(axes.flat, batches, strict=False):
        ceiling = about["read_bytes_per_s"] / 1e12
        panel.axhline(ceiling, color="black", linestyle="--", linewidth=1, label="ceiling: a plain sum")
        for number, (label, found) in enumerate(series.items()):
            points = {tuple(r["shape"]): r["bytes_per_s"] / 1e12 for r in found if r["batch"] == batch}
            at = [i for i, shape in enumerate(shapes) if shape in points]
            reached = [points[shapes[i]] for i in at]
            panel.plot(at, reached, "osv^Dx*P"[number % 8], color=f"C{number}", markersize=5, label=label)
        panel.set_title(f"batch {batch}")
        panel.set_xticks(range(len(shapes)), [f"{o} x {i}" for o, i in shapes], rotation=60, ha="right")
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", linewidth=0.4)
    for panel in list(axes.flat)[len(batches) :]:
        panel.set_visible(False)
    for line in axes:
        line[0].set_ylabel("TB/s of stored weights")
    handles: dict[str, Any] = {}
    for panel in axes.flat:
        handles.update({label: handle for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)})
    figure.suptitle(f"{about['gpu']}, {about['date']}, commit {about['commit']}")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.set_layout_engine("constrained")
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)


def write(path: Path) -> str:
    """Write table.md and, where matplotlib is installed, roofline.svg beside the JSON; returns the table."""
    results = json.loads(path.read_text())
    text = table(results)
    (path.parent / "table.md").write_text(text)
    try:
        plot(results, path.parent / "roofline.svg")
    except ModuleNotFoundError as error:
        text += f"\nNo plot: {error}.\n"
    return text


def main(words: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", help="results.json of linear.py")
    parser.add_argument("--batches", nargs="+", type=int, default=[])
    parser.add_argument("--shares", nargs="+", type=float, default=[], help="of outliers")
    asked = parser.parse_args(words)
    for path in asked.results:
        brief = asked.batches or asked.shares
        print(narrow(json.loads(path.read_text()), asked.batches, asked.shares) if brief else write(path))


if __name__ == "__main__":
    main()
