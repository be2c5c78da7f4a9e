"""docs/architectures.md: what every model type gave, written from the results."""

from __future__ import annotations

import json
from pathlib import Path

from tests.architectures.checks import KEPT, SPREAD
from tests.architectures.tiny import causal_types

_MARK = {"ok": "✓", "bad": "✗", "none": "–", "not run": "·"}


def write(results: Path, path: Path) -> None:
    """Write the page from one JSON file a type."""
    import transformers

    found = {file.stem: json.loads(file.read_text()) for file in sorted(results.glob("*.json"))}
    built = {name: result for name, result in found.items() if not result["build"].startswith("none")}
    checks = ("rtn", "gptq", "generate", "save", "gradual")
    good = {name for name, result in built.items() if all(_state(result.get(c, "")) != "bad" for c in checks)}
    whole = {name for name in good if all(_state(built[name].get(check, "")) != "not run" for check in checks)}
    lines = [
        "# Architectures",
        "",
        f"Of the {len(causal_types())} types of causal language models that transformers {transformers.__version__} "
        f"knows {len(found)} were made tiny (64 channels, four layers, random weights) and quantized: `make "
        "architectures` runs all of them and writes this page. "
        f"Transformers built and ran {len(built)} at this size; {len(good)} of these pass every "
        f"check that was run, {len(whole)} all five of them.",
        "",
        "- **packed**: uniform 4 bits by rounding (and by GPTQ); logits equal those of a full-precision copy that "
        f"holds the same numbers within {SPREAD:g} of their standard deviation, at least 95 % of the matrix weights "
        "are packed (the table says how many), and the user's model is untouched",
        "- **generate**: with a cache each step's logits are those without, as exactly as the original's are",
        "- **save**: by `save_model` and by `save_pretrained`; loaded by bitween and by transformers, equal logits",
        "- **gradual**: `GradualQuantizer` to half the bytes",
        "",
        "– stands where the original model itself cannot do it, · where the check was left out. "
        "Not counted as matrices to pack: " + "; ".join(f"`{word}` ({reason})" for word, reason in KEPT.items()) + ".",
        "",
        "| type | class | packed | GPTQ | generate | save | gradual |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, result in built.items():
        uniform = result.get("rtn", "")
        cells = [uniform.split()[0] if _state(uniform) == "ok" else _MARK[_state(uniform)]]
        cells += [_MARK[_state(result.get(check, ""))] for check in checks[1:]]
        lines.append(f"| {name} | {result['build']} | " + " | ".join(cells) + " |")
    bad = [(name, check) for name in built for check in checks if _state(built[name].get(check, "")) == "bad"]
    if bad:
        lines += ["", "## What fails", ""]
        lines += [f"- {name}, {check}: {_said(built[name][check])}" for name, check in bad]
    rest = [name for name in found if name not in built]
    if rest:
        lines += [
            "",
            "## Not built",
            "",
            "transformers cannot build or run these at this size, with its own words:",
            "",
        ]
        lines += [f"- {name}: {_said(found[name]['build'])}" for name in rest]
    path.write_text("\n".join(lines) + "\n")


def _state(text: str) -> str:
    if not text:
        return "not run"
    if text.startswith(("WRONG", "ERROR")):
        return "bad"
    return "none" if text.startswith("none") else "ok"


def _said(text: str) -> str:
    plain = " ".join(text.split()).replace("|", "/").replace("<", "&lt;").removeprefix("none ")
    return plain if len(plain) < 160 else plain[:157] + "..."
