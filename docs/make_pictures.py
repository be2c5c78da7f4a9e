"""Draws the pictures of docs/planning.md from a run: python docs/make_pictures.py demo-output/SmolLM2-135M-quantized"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

from bitween.report.plots import PICTURES

matplotlib.rcParams.update({"svg.hashsalt": "bitween", "svg.fonttype": "none"})  # the same run, the same bytes


def main() -> None:
    report = json.loads(Path(sys.argv[1], "bitween.json").read_text())["report"]
    folder = Path(__file__).parent / "pictures"
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        figure = draw(report)
        figure.set_facecolor("white")
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
