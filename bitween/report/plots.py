"""Pictures of a quantization report: one function a picture, each from the plain values of `report.to_dict()`.

Every function returns a matplotlib Figure, so notebooks show it and scripts save it; none touches pyplot's state.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from bitween.scheme import Scheme

__all__ = ["PICTURES", "bits_per_layer", "frontier", "importance", "memory"]

INK, SOFT, GRID = "#26324a", "#66708a", "#dfe4ee"
BLUE, TEAL, AMBER, RED = "#3c5fd0", "#1a9c8c", "#e0912f", "#cf4a57"
# Light to dark with rising width, so that a dark cell reads as "kept precise". Half bits are those of a trellis.
_WIDTHS = {
    1: "#f7e8c8",
    1.5: "#f5e0b3",
    1.58: "#f3dca6",
    2: "#f5cf86",
    2.5: "#cfd49f",
    3: "#a9d8b8",
    3.5: "#86cab4",
    4: "#62bcb0",
    4.5: "#4fa8af",
    5: "#3b93ad",
    6: "#3568a5",
    8: "#33438c",
}
_KEPT = "#1d2140"
_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained", facecolor="none")
    axes = figure.add_subplot(facecolor="none")
    axes.tick_params(colors=SOFT, labelsize=9, length=0)
    for side in axes.spines.values():
        side.set_visible(False)
    return figure, axes


def _titled(axes: Any, title: str, x: str = "", y: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=11, color=INK, fontweight="bold", pad=10)
    axes.set_xlabel(x, fontsize=9, color=SOFT)
    axes.set_ylabel(y, fontsize=9, color=SOFT)


def _bits(scheme: str) -> float | None:
    return None if scheme == "kept" else Scheme.parse(scheme).bits


def _grid(plan: dict[str, str]) -> tuple[list[str], list[str], dict[tuple[str, str], str], dict[str, str]]:
    """Blocks, kinds of layers, {(block, kind): scheme}, and the layers outside blocks."""
    cells, outside, kinds = {}, {}, {}
    for name, scheme in plan.items():
        found = re.fullmatch(r"(.*?\.\d+)\.(.+)", name)
        if found:
            cells[found[1], found[2]] = scheme
            kinds[found[2]] = None
        else:
            outside[name] = scheme
    blocks = sorted({block for block, _ in cells}, key=lambda b: [int(n) for n in re.findall(r"\d+", b)])

    def place(kind: str) -> tuple[int, str]:
        short = kind.rpartition(".")[2]
        return (_ORDER.index(short) if short in _ORDER else len(_ORDER), kind)

    return blocks, sorted(kinds, key=place), cells, outside


def bits_per_layer(report: dict[str, Any]) -> Figure:
    """A heat map: kinds of layers down, blocks across, the colour is the width, the text in a cell the group size."""
    blocks, kinds, cells, outside = _grid(report["plan"])
    rows = [*kinds, *outside]
    widths = [*_WIDTHS, "kept"]
    values = np.full((len(rows), len(blocks)), np.nan)
    figure, axes = _figure(max(6.0, 0.3 * len(blocks) + 2.2), 0.36 * len(rows) + 1.5)
    for i, row in enumerate(rows):
        for j, block in enumerate(blocks):
            scheme = outside.get(row) if row in outside else cells.get((block, row))
            if scheme is None:
                continue
            bits = _bits(scheme)
            values[i, j] = widths.index("kept" if bits is None else bits)
            if row not in outside and (size := _cell_text(scheme)):
                dark = bits >= 5
                axes.text(
                    j, i, size, ha="center", va="center", fontsize=6.2, color="white" if dark else INK, alpha=0.85
                )
        if row in outside:
            axes.text(0, i, outside[row], va="center", fontsize=7.5, color="white" if values[i, 0] >= 5 else INK)
    colours = ListedColormap([*_WIDTHS.values(), _KEPT])
    axes.imshow(values, cmap=colours, vmin=-0.5, vmax=len(widths) - 0.5, aspect="auto", interpolation="nearest")
    axes.set_xticks(np.arange(-0.5, len(blocks)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    axes.grid(which="minor", color="white", linewidth=1.2)
    axes.tick_params(which="minor", length=0)
    step = max(1, len(blocks) // 15)
    axes.set_xticks(range(0, len(blocks), step), [str(j) for j in range(0, len(blocks), step)])
    axes.set_yticks(range(len(rows)), [row.removeprefix("model.") for row in rows])
    present = [w for w in widths if (values == widths.index(w)).any()]
    patches = [
        axes.scatter([], [], marker="s", s=60, color=[*_WIDTHS.values(), _KEPT][widths.index(w)], label=_width_name(w))
        for w in present
    ]
    figure.legend(handles=patches, ncols=len(patches), loc="outside lower center", frameon=False, fontsize=9)
    coded = any("trellis" in scheme for scheme in report["plan"].values())
    _titled(axes, "Bits of each layer (numbers: group size" + ("; T: trellis)" if coded else ")"), "block")
    return figure


def _cell_text(scheme: str) -> str:
    """Group size, T for a trellis, nothing for whole rows and layers kept."""
    if scheme == "kept":
        return ""
    found = Scheme.parse(scheme)
    return "T" if found.coding == "trellis" else "" if found.group_size == -1 else str(found.group_size)


def _width_name(width: float | str) -> str:
    return "as it was" if width == "kept" else "ternary" if width == 1.58 else f"{width:g} bits"


def frontier(report: dict[str, Any]) -> Figure:
    """Size against damage: what was predicted possible, what was measured, what was chosen, and both targets."""
    figure, axes = _figure(7.4, 4.2)
    points = np.array(report["frontier"], float)
    mib = 2.0**20
    shown = points[points[:, 1] > 0]
    axes.plot(shown[:, 0] / mib, shown[:, 1], color=BLUE, lw=1.8, label="predicted frontier", zorder=2)
    chosen = _chosen(report)
    for stage in report["stages"]:
        if stage is chosen or not stage["damage"] or stage["damage"] <= 0:
            continue
        uniform = stage["name"].startswith("uniform")
        axes.scatter(
            stage["nbytes"] / mib, stage["damage"], s=46, zorder=3, marker="D" if uniform else "o",
            facecolor="white", edgecolor=AMBER if uniform else TEAL, linewidth=1.6,
        )  # fmt: skip
        axes.annotate(
            stage["name"], (stage["nbytes"] / mib, stage["damage"]), xytext=(7, 5), textcoords="offset points",
            fontsize=8, color=SOFT,
        )  # fmt: skip
    if chosen is not None and chosen["damage"] > 0:
        error = 1.96 * report["quality"].get("standard_error", 0.0)
        low = min(error, 0.9 * chosen["damage"])
        axes.errorbar(
            chosen["nbytes"] / mib, chosen["damage"], yerr=[[low], [error]], fmt="o", ms=9, color=RED, capsize=3,
            zorder=4, label="chosen, with 95 % interval",
        )  # fmt: skip
    budget = float(np.log1p(report["targets"]["perplexity_increase"]))
    axes.axhline(budget, color=RED, lw=1, ls=(0, (4, 3)), alpha=0.7, zorder=1)
    axes.text(
        shown[-1, 0] / mib, budget, f"budget: perplexity +{report['targets']['perplexity_increase']:.1%} ",
        ha="right", va="bottom", fontsize=8, color=RED,
    )  # fmt: skip
    axes.set_yscale("log")
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    _titled(axes, "Size against damage", "layers, MiB", "KL from the original, nats per token")
    return figure


def _chosen(report: dict[str, Any]) -> dict[str, Any] | None:
    if delivered := [s for s in report["stages"] if s.get("delivered")]:
        return delivered[-1]
    damage = report["quality"]["damage"]
    near = [s for s in report["stages"] if s["damage"] is not None and abs(s["damage"] - damage) <= 1e-12 * damage]
    return near[-1] if near else None


def importance(report: dict[str, Any]) -> Figure:
    """Damage of each block by every measured method, on a logarithmic axis, and the combined ranking."""
    found = report.get("importance")
    if not found:
        raise ValueError("report: expected importance; it was not measured (importance=False)")
    figure, axes = _figure(7.4, 3.9)
    units = list(found["combined"])
    for (method, damage), colour in zip(sorted(found["damage"].items()), (BLUE, TEAL, AMBER, RED), strict=False):
        values = [np.nan if damage[u] is None or damage[u] <= 0 else damage[u] for u in units]
        label = f"{method.replace('_', ' ')} ({found['weights'].get(method, 0):.0%})"
        axes.plot(range(len(units)), values, color=colour, lw=1.6, marker="o", ms=3.5, label=label)
    axes.set_yscale("log")
    axes.grid(color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=9, ncols=2, labelcolor=INK)
    _titled(axes, "What each block bears, by method (share in the ranking)", "block", "KL, nats per token")
    return figure


def memory(report: dict[str, Any]) -> Figure:
    """Bytes before and after by kind of layer; kinds below 0.2 % of the model are left out."""
    before, after = (_by_kind(report["memory"][name]) for name in ("original_by_layer", "by_layer"))
    kinds = [k for k in sorted(before, key=lambda k: -before[k]) if before[k] >= 2e-3 * sum(before.values())]
    figure, axes = _figure(7.4, max(4.2, 0.36 * len(kinds) + 1.2))
    place = np.arange(len(kinds))
    mib = 2.0**20
    axes.barh(place - 0.2, [before[k] / mib for k in kinds], 0.38, color=GRID, label="before")
    axes.barh(place + 0.2, [after.get(k, 0) / mib for k in kinds], 0.38, color=BLUE, label="after")
    for i, kind in enumerate(kinds):
        axes.text(
            after.get(kind, 0) / mib, i + 0.2, f"  {after.get(kind, 0) / mib:,.1f}", va="center", fontsize=8, color=INK
        )
    axes.set_yticks(place, kinds)
    axes.invert_yaxis()
    axes.grid(axis="x", color=GRID, lw=0.8)
    axes.set_axisbelow(True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.0f}"))
    axes.legend(frameon=False, fontsize=9, loc="lower right", labelcolor=INK)
    _titled(axes, "Memory by kind of layer", "MiB")
    return figure


def _by_kind(layers: dict[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, nbytes in layers.items():
        inner = re.fullmatch(r".*?\.\d+\.(.+)", name)
        kind = (inner[1] if inner else name).rpartition(".")[2]
        found[kind] = found.get(kind, 0) + nbytes
    return found


PICTURES = {"bits": bits_per_layer, "frontier": frontier, "importance": importance, "memory": memory}
