"""docs/architectures.md: what every model type gave, written from the results.

Types without a result keep the row, or the reason, that the page has for them, and so do versions of transformers: a
page can be renewed in parts, on machines that hold a part of the results.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.architectures.checks import KEPT, SPREAD
from tests.architectures.tiny import causal_types

_MARK = {"ok": "✓", "bad": "✗", "none": "–", "not run": "·"}
_CHECKS = ("rtn", "gptq", "generate", "save", "gradual")
_NAMES = {"rtn": "packed", "gptq": "GPTQ"}  # in the table's head
_FAILS, _REST, _OTHERS = "## What fails", "## Not built", "## With transformers "


def write(results: Path, path: Path) -> None:
    """Write the page from one JSON file a type, in a folder for each version of transformers."""
    import transformers

    old = path.read_text() if path.exists() else ""
    found = _results(results / transformers.__version__)
    rows = {n: row for n, row in _old_rows(old).items() if n not in found}
    rest = {n: said for n, said in _old_lines(old, _REST).items() if n not in found}
    fails = {n: said for n, said in _old_lines(old, _FAILS).items() if n.partition(",")[0] not in found}
    for name, result in found.items():
        if result["build"].startswith("none"):
            rest[name] = _said(result["build"])
            continue
        if result["build"].startswith("ERROR"):
            fails[f"{name}, build"] = _said(result["build"])
            continue
        rows[name] = _row(result)
        fails |= {f"{name}, {c}": _said(result[c]) for c in _CHECKS if _state(result.get(c, "")) == "bad"}
    lines = [*_head(rows, rest), *(f"| {name} | {' | '.join(row)} |" for name, row in sorted(rows.items()))]
    if fails:
        lines += ["", _FAILS, "", *(f"- {name}: {said}" for name, said in sorted(fails.items()))]
    if rest:
        lines += ["", _REST, "", "transformers cannot build or run these at this size, with its own words:", ""]
        lines += [f"- {name}: {said}" for name, said in sorted(rest.items())]
    others = _old_sections(old)
    others |= {d.name: _section(d.name, _results(d)) for d in results.iterdir() if d.is_dir() and any(d.iterdir())}
    others.pop(transformers.__version__, None)
    for version in sorted(others):
        lines += ["", *others[version]]
    path.write_text("\n".join(lines) + "\n")


def _results(folder: Path) -> dict[str, dict[str, str]]:
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}


def _row(result: dict[str, str]) -> tuple[str, ...]:
    """Class, a cell for each check, and the day of the run."""
    uniform = result.get("rtn", "")
    packed = uniform.split()[0] if _state(uniform) == "ok" else _MARK[_state(uniform)]
    return result["build"], packed, *(_MARK[_state(result.get(c, ""))] for c in _CHECKS[1:]), result.get("date", "")


def _head(rows: dict[str, tuple[str, ...]], rest: dict[str, str]) -> list[str]:
    import transformers

    good = [row for row in rows.values() if _MARK["bad"] not in row]
    whole = [row for row in good if _MARK["not run"] not in row]
    return [
        "# Architectures",
        "",
        f"Of the {len(causal_types())} types of causal language models that transformers {transformers.__version__} "
        f"knows {len(rows) + len(rest)} were made tiny (64 channels, four layers, random weights) and quantized: `make "
        "architectures` runs all of them and writes this page. "
        f"Transformers built and ran {len(rows)} at this size; {len(good)} of these pass every "
        f"check that was run, {len(whole)} all five of them. The last column tells the day of the run"
        + ("." if all(row[-1] for row in rows.values()) else "; rows without one are older."),
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
        "| type | class | packed | GPTQ | generate | save | gradual | run |",
        "|---|---|---|---|---|---|---|---|",
    ]


def _section(version: str, found: dict[str, dict[str, str]]) -> list[str]:
    """What was run with another version of transformers."""
    built = {name: result for name, result in found.items() if not result["build"].startswith("none")}
    bad = {f"{n}, {c}": r[c] for n, r in built.items() for c in _CHECKS if _state(r.get(c, "")) == "bad"}
    bad |= {name: result["build"] for name, result in found.items() if name not in built}
    failing = {name.partition(",")[0] for name in bad}
    passing: dict[tuple[str, ...], list[str]] = {}
    for name, result in built.items():
        if name not in failing:
            passing.setdefault(tuple(check for check in _CHECKS if check in result), []).append(f"`{name}`")
    said = [f"{len(found)} types were run with this version, {len(built)} of them built."]
    for checks, names in sorted(passing.items(), key=lambda item: -len(item[0])):
        what = "all five checks" if checks == _CHECKS else ", ".join(_NAMES.get(check, check) for check in checks)
        said.append(f"{len(names)} pass {what}: {', '.join(names)}.")
    lines = [f"{_OTHERS}{version}", "", " ".join(said)]
    return lines + ([""] + [f"- {name}: {_said(text)}" for name, text in sorted(bad.items())] if bad else [])


# ---- the page as it was -----------------------------------------------------------------------------


def _old_rows(page: str) -> dict[str, tuple[str, ...]]:
    rows = re.findall(r"^\| ([\w-]+) \| (\w+) \| (.*) \|$", page, re.M)
    cells = {name: (kind, *(cell.strip() for cell in rest.split("|"))) for name, kind, rest in rows if kind != "class"}
    return {name: row if len(row) == len(_CHECKS) + 2 else (*row, "") for name, row in cells.items()}


def _old_lines(page: str, heading: str) -> dict[str, str]:
    """{what a line of this part is about: what it says}."""
    _, _, part = page.partition(f"\n{heading}\n")
    return dict(re.findall(r"^- ([\w-]+(?:, \w+)?): (.*)$", part.partition("\n## ")[0], re.M))


def _old_sections(page: str) -> dict[str, list[str]]:
    parts = [part for part in page.split("\n## ") if part.startswith(_OTHERS.removeprefix("## "))]
    return {part.split()[2]: ("## " + part.rstrip("\n")).split("\n") for part in parts}


def _state(text: str) -> str:
    if not text:
        return "not run"
    if text.startswith(("WRONG", "ERROR")):
        return "bad"
    return "none" if text.startswith("none") else "ok"


def _said(text: str) -> str:
    plain = " ".join(text.split()).replace("|", "/").replace("<", "&lt;").removeprefix("none ")
    return plain if len(plain) < 160 else plain[:157] + "..."
