"""docs/pictures/rooms.svg: the rooms of the package in the order of `tool.importlinter`, and their imports.

.venv/bin/python docs/make_rooms.py
"""

import tomllib
from pathlib import Path

import grimp
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs/pictures/rooms.svg"


def levels() -> list[list[str]]:
    """Rooms of each level, the highest first."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    rooms = next(contract for contract in settings["contracts"] if contract["name"] == "rooms")
    return [[name.strip() for name in level.split("|")] for level in rooms["layers"]]


def arrows(known: set[str]) -> set[tuple[str, str]]:
    """(room, room that it imports from)."""
    graph = grimp.build_graph("bitween")
    found = set()
    for module in graph.modules:
        for imported in graph.find_modules_directly_imported_by(module):
            pair = tuple((f"{name}..".split("."))[1] for name in (module, imported))
            if pair[0] != pair[1] and set(pair) <= known:
                found.add(pair)
    return found


def picture() -> Figure:
    """Rooms as boxes, imports as lines that all point down."""
    rows = levels()
    place = {room: (3.2 * k - 1.6 * (len(row) - 1), -i) for i, row in enumerate(rows) for k, room in enumerate(row)}
    figure = Figure((9, 9), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    for n, (above, below) in enumerate(sorted(arrows(set(place)))):
        (x0, y0), (x1, y1) = place[above], place[below]
        bend = 0.0 if y0 - y1 <= 1 else (0.28 if n % 2 else -0.28)
        style = {"arrowstyle": "-|>", "color": f"C{list(place).index(above) % 10}", "alpha": 0.55, "shrinkA": 12}
        style |= {"shrinkB": 12, "connectionstyle": f"arc3,rad={bend}"}
        axes.annotate("", (x1, y1), (x0, y0), arrowprops=style)
    for room, (x, y) in place.items():
        box = {"boxstyle": "round,pad=0.4", "facecolor": "white", "edgecolor": "0.3"}
        axes.text(x, y, room, ha="center", va="center", fontsize=11, bbox=box, zorder=3)
    axes.set_xlim(-5, 5)
    axes.set_ylim(-len(rows), 1)
    return figure


if __name__ == "__main__":
    picture().savefig(PICTURE, metadata={"Date": None})
    print(PICTURE.relative_to(ROOT))
