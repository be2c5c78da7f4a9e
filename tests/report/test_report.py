"""Reports as pictures and as a page."""

import json
import re
from html.parser import HTMLParser

import pytest

from bitween.gradual import GradualQuantizer
from bitween.report import plots
from bitween.report.page import page


@pytest.fixture(scope="module")
def report(_loaded_tiny_model, tiny_tokenizer):
    quantizer = GradualQuantizer(
        _loaded_tiny_model, tiny_tokenizer, 0.6, 0.1, calibration_samples=6, evaluation_samples=8, distillation_steps=2
    )
    quantizer.quantize()
    return json.loads(json.dumps(quantizer.get_quantization_report().to_dict()))


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.links, self.text = [], [], []

    def handle_starttag(self, tag, attributes):
        self.links += [v for k, v in attributes if k in ("src", "href", "xlink:href") and v]
        if tag not in ("meta", "br", "path", "use", "rect", "image"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_page_is_whole_and_loads_nothing(report):
    text = page(report, "A <model> & more")
    tags = _Tags()
    tags.feed(text)
    assert not tags.open
    assert all(link.startswith(("#", "data:")) for link in tags.links)
    shown = " ".join(tags.text)
    assert "A <model> & more" in shown
    assert f"−{report['memory']['reduction']:.1%}" in shown
    for layer, scheme in report["plan"].items():
        assert f"<td>{layer}</td><td>{scheme}</td>" in text
    assert text.count("<svg") == len(plots.PICTURES)
    assert page(report, "A <model> & more") == text


def test_page_says_what_conflicted(report):
    text = page({**report, "conflict": {"text": "the budget <was> not kept", "measured": []}})
    assert "the budget &lt;was&gt; not kept" in text


def test_page_without_importance_and_proof(report):
    assert page({**report, "importance": None, "certificate": None}).count("<svg") == len(plots.PICTURES) - 1


def test_something_else_is_refused():
    with pytest.raises(ValueError, match="expected a bitween report; it has no 'targets'"):
        page({})


def test_heat_map_shows_each_layers_width(report):
    figure = plots.bits_per_layer(report)
    (image,) = figure.axes[0].images
    labels = [t.get_text() for t in figure.axes[0].get_yticklabels()]
    widths = [*plots._WIDTHS, "kept"]
    for name, scheme in report["plan"].items():
        inner = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        row = labels.index(inner[2] if inner else name.removeprefix("model."))
        shown = image.get_array()[row, int(inner[1]) if inner else 0]
        assert widths[int(shown)] == ("kept" if scheme == "kept" else plots._bits(scheme))


def test_memory_picture_adds_up(report):
    figure = plots.memory(report)
    after = [patch.get_width() for patch in figure.axes[0].containers[1]]
    assert sum(after) * 2**20 == pytest.approx(sum(report["memory"]["by_layer"].values()), rel=0.01)


def test_frontier_picture_marks_every_stage(report):
    texts = {t.get_text() for t in plots.frontier(report).axes[0].texts}
    chosen = plots._chosen(report)
    assert {s["name"] for s in report["stages"] if s is not chosen} <= texts


def test_the_proof_leads(report):
    from math import expm1

    first = page(report).split("<i>", 2)[1]
    assert "held-out text" in first
    assert f"{expm1(report['certificate']['increase']):+.2%}" in first
    without = page({**report, "certificate": None}).split("<i>", 2)[1]
    assert "memory" in without


def test_what_is_delivered_is_not_rolled_back(tiny_model, tiny_tokenizer):
    options = {"calibration_samples": 6, "evaluation_samples": 8, "importance": False, "sequence_length": 64}
    quantizer = GradualQuantizer(tiny_model, tiny_tokenizer, 0.9, 0.02, on_conflict="memory", stages=1, **options)
    quantizer.quantize()
    found = quantizer.get_quantization_report()
    (stage,) = [s for s in found.stages if s["delivered"]]
    assert not stage["accepted"]
    shown = next(line for line in str(found).splitlines() if stage["name"] in line and "stage" in line)
    if len([s for s in found.stages if s["name"] == stage["name"]]) == 1:
        assert "broke the budget: delivered all the same" in shown
    assert "broke the budget: delivered all the same" in page(found.to_dict())
    assert found.certificate is None or str(found).index("proof ") < str(found).index("selection KL")


def test_layers_are_listed_in_their_order(report):
    names = list(report["plan"])
    assert names[0] == "model.embed_tokens"
    assert [n.split(".")[2] for n in names if ".layers." in n] == sorted(
        n.split(".")[2] for n in names if ".layers." in n
    )
    from bitween.cli.inputs import natural

    assert sorted(["layers.10", "layers.9", "layers.1", "head"], key=natural) == [
        "head",
        "layers.1",
        "layers.9",
        "layers.10",
    ]
