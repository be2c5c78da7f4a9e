"""A report as one self-contained HTML page: pictures inside, tables that sort, nothing loaded from anywhere."""

from __future__ import annotations

import io
import json
import math
from html import escape
from pathlib import Path
from typing import Any

from bitween.report import plots
from bitween.report.quantization_report import decision

__all__ = ["page", "picture"]

_HERE = Path(__file__).parent


def page(report: dict[str, Any], title: str = "Quantization report") -> str:
    """HTML text of a report's plain values (`report.to_dict()`, or `report` in a saved model's bitween.json).

    Raises
    ------
    ValueError
        when the values are not those of a report.
    """
    missing = [name for name in ("targets", "memory", "quality", "plan", "stages", "frontier") if name not in report]
    if missing:
        raise ValueError(f"report: expected a bitween report; it has no {missing[0]!r}")
    names = ["bits", "frontier", "memory"] + (["importance"] if report.get("importance") else [])
    pictures = {name: picture(name, report) for name in names}
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="sub">{_machine(report)}</p>',
        _cards(report),
        _conflict(report),
        f"<section>{pictures['bits']}</section>",
        f'<div class="two"><section>{pictures["frontier"]}</section><section>{pictures["memory"]}</section></div>',
        f"<section>{pictures['importance']}</section>" if "importance" in pictures else "",
        _stages(report),
        _certificate(report),
        _layers(report),
        _facts(report),
    ]
    style, script = ((_HERE / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + f"\n</main><script>{script}</script></body></html>\n"
    )


def picture(name: str, report: dict[str, Any]) -> str:
    """One of `plots.PICTURES` as SVG text."""
    import matplotlib

    figure = plots.PICTURES[name](report)

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "bitween", "font.family": "sans-serif"}):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def _machine(report: dict[str, Any]) -> str:
    m = report.get("machine", {})
    seconds = report.get("seconds", {}).get("total")
    took = f"{seconds / 60:.1f} minutes on " if seconds else ""
    return escape(f"{took}{m.get('cpu', '?')}, {m.get('threads', '?')} threads, bitween {m.get('bitween', '?')}")


def _cards(report: dict[str, Any]) -> str:
    m, q, t, c = report["memory"], report["quality"], report["targets"], report.get("certificate")
    if "budget" in t:
        return _whole_cards(m, q, t, c)
    dtype = f", plain numbers in {m['dtype']}" if m.get("dtype") else ""
    cards = [
        ("memory", f"−{m['reduction']:.1%}",
         f"{_mib(m['original_total'])} → {_mib(m['total'])}{dtype}; asked −{t['memory_reduction']:.0%}",
         m["reduction"] >= t["memory_reduction"]),
        ("perplexity, selection text" if c else "perplexity, measured", f"{q['perplexity_increase']:+.2%}",
         f"{q['reference_perplexity']:.2f} → {q['perplexity']:.2f}; budget +{t['perplexity_increase']:.1%}",
         None if c else q["perplexity_increase"] <= t["perplexity_increase"]),
        ("distance", f"{q['damage']:.4f}", f"nats per token (KL), same first choice {q['agreement']:.1%}", None),
        ("width", f"{t['average_bits']:.2f} bits", "a weight, scales and zeros included", None),
    ]  # fmt: skip
    if c:  # the proof comes first: the selection text steered the search, so that its numbers flatter
        found, bound = (math.inf if c[key] is None else math.expm1(min(c[key], 700.0)) for key in ("increase", "bound"))
        note = f"at most {bound:+.2%} with {t['confidence']:.0%} confidence; budget +{t['perplexity_increase']:.1%}: "
        card = ("perplexity, held-out text", f"{found:+.2%}", note + c["verdict"], c["verdict"] == "accepted")
        cards.insert(0, card)
    return _shown(cards)


def _whole_cards(m: dict, q: dict, t: dict, c: dict | None) -> str:
    """Of a model that runs as a whole: its budget may be one of damage, or of a metric."""
    dtype = f", plain numbers in {m['dtype']}" if m.get("dtype") else ""
    memory = f"{_mib(m['original_total'])} → {_mib(m['total'])}{dtype}; asked −{t['memory_reduction']:.0%}"
    cards = [
        ("memory", f"−{m['reduction']:.1%}", memory, m["reduction"] >= t["memory_reduction"]),
        ("measured, to steer by", q["text"], t["budget"]["text"], q["spent"] <= t["budget"]["limit"]),
        ("width", f"{t['average_bits']:.2f} bits", "a weight, scales and zeros included", None),
    ]
    if c:
        cards.insert(0, ("held-out examples", c["verdict"], c["text_line"], c["verdict"] == "accepted"))
    return _shown(cards)


def _shown(cards: list[tuple[str, str, str, bool | None]]) -> str:
    shown = []
    for name, value, note, good in cards:
        kind = "" if good is None else " good" if good else " bad"
        shown.append(
            f'<div class="card{kind}"><i>{escape(name)}</i><b>{escape(value)}</b><span>{escape(note)}</span></div>'
        )
    return f'<div class="cards">{"".join(shown)}</div>'


def _conflict(report: dict[str, Any]) -> str:
    conflict = report.get("conflict")
    return (
        f'<section class="note"><h2>Both targets could not be met</h2>{escape(conflict["text"])}</section>'
        if conflict
        else ""
    )


def _table(columns: list[str], rows: list[list[tuple[str, float | None]]]) -> str:
    """Cells are (text, value to sort by, or None for text)."""
    numeric = [bool(rows) and rows[0][i][1] is not None for i in range(len(columns))]
    head = "".join(
        f'<th class="n">{escape(c)}</th>' if n else f"<th>{escape(c)}</th>"
        for c, n in zip(columns, numeric, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f'<td class="n" data-v="{v}">{escape(x)}</td>' if v is not None else f"<td>{escape(x)}</td>" for x, v in row
        )
        + "</tr>"
        for row in rows
    )
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _stages(report: dict[str, Any]) -> str:
    rows = [
        [
            (s["name"], None),
            (_mib(s["nbytes"]), s["nbytes"]),
            (f"{s['predicted']:.4f}", s["predicted"]),
            (f"{s['damage']:.4f}", s["damage"]),
            (s.get("text") or f"{math.expm1(s['increase']):+.2%}", s["increase"]),
            (decision(s), None),
        ]
        for s in report["stages"]
    ]
    whole = "budget" in report["targets"]
    names = ["predicted damage", "measured damage", "spent"] if whole else ["predicted KL", "measured KL", "perplexity"]
    table = _table(["stage", "layers", *names, "decision"], rows)
    return f"<section><h2>What was tried</h2>{table}</section>"


def _certificate(report: dict[str, Any]) -> str:
    c = report.get("certificate")
    if not c:
        return ""
    parts = c.get("domains") or {}
    if not parts:
        return f"<section><h2>The proof</h2>{escape(c['text_line'])} {escape(_tails(c))}</section>"
    rows = [
        [(name, None), *(_share(part[key]) for key in ("perplexity_increase", "perplexity_bound", "perplexity_budget")),
         (f"{part['tokens']:,}", part["tokens"]), (part["verdict"], None), (_tails(part), None)]
        for name, part in parts.items()
    ]  # fmt: skip
    columns = ["domain", "perplexity", "at most", "budget", "tokens", "verdict", "beside the mean"]
    return f"<section><h2>The proof</h2>{escape(c['text_line'])}{_table(columns, rows)}</section>"


def _share(value: float | None) -> tuple[str, float]:
    """A cell; None stands for infinity, which JSON lacks."""
    return ("∞", 1e9) if value is None else (f"{value:+.2%}", value)


def _tails(part: dict[str, Any]) -> str:
    """The bounds beside the mean's in one line."""
    shown = []
    for tail in part.get("tails") or ():
        number = "{:.3f} nats" if tail["unit"] == "nats" else "{:.2%}"
        shown.append(f"{tail['name']} at most {'∞' if tail['bound'] is None else number.format(tail['bound'])}")
    return "; ".join(shown)


def _layers(report: dict[str, Any]) -> str:
    after, before = report["memory"]["by_layer"], report["memory"]["original_by_layer"]
    rows = [
        [
            (name, None),
            (scheme, None),
            (_kib(before.get(name, 0)), before.get(name, 0)),
            (_kib(after.get(name, 0)), after.get(name, 0)),
        ]
        for name, scheme in report["plan"].items()
    ]
    table = _table(["layer", "scheme", "before", "after"], rows)
    return f"<section><details><summary>All {len(rows)} layers</summary>{table}</details></section>"


def _facts(report: dict[str, Any]) -> str:
    kept = {name: report.get(name) for name in ("targets", "text", "transforms", "seconds", "machine")}
    text = escape(json.dumps(kept, indent=1))
    return f"<section><details><summary>Settings, text, time, machine</summary><pre>{text}</pre></details></section>"


def _mib(nbytes: float) -> str:
    return f"{nbytes / 2**20:,.1f} MiB"


def _kib(nbytes: float) -> str:
    return f"{nbytes / 2**10:,.0f} KiB"
