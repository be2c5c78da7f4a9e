"""Would leaving out a whole block ever pay? Told by the report of a run: python benchmarks/drop.py DIR

For several sizes on the predicted frontier: the damage there, by how much it would fall if the bytes of an average
block were spent on the others, and what leaving out the block that matters least costs, as measured. nats a token.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import common
import numpy as np

POINTS = 10


def main() -> None:
    report = json.loads(Path(sys.argv[1], "bitween.json").read_text())["report"]
    nbytes, damage = np.array(report["frontier"]).T
    disabled = report["importance"]["damage"]["block_disable"]
    original = report["memory"]["original_by_layer"]
    in_blocks = sum(n for name, n in original.items() if re.search(r"\.\d+\.", name))
    share = in_blocks / sum(original.values()) / len(disabled)  # of one block in all bytes, at equal bits
    rows = []
    for size in np.geomspace(nbytes[0], nbytes[-1], POINTS + 1)[:-1]:
        here, relieved = np.interp([size, size * (1 + share)], nbytes, damage)
        rows.append({"MiB": size / 2**20, "KL": here, "gain": here - relieved, "cost": min(disabled.values())})
    print(common.show(rows))


if __name__ == "__main__":
    main()
