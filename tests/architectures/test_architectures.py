"""One type of each kind of trouble through the checks; `make architectures` runs all types."""

import pytest

pytest.importorskip("transformers")

from tests.architectures.__main__ import run
from tests.architectures.tiny import causal_types

KINDS = {
    "gpt2": "transposed layers and a table of positions",
    "opt": "positions that count from an offset",
    "falcon": "linear layers with a forward of their own",
    "qwen3_moe": "stacks of experts, saved under other names",
    "hrm_text": "blocks that run more than once",
    "deepseek_v4": "hidden states of four dimensions, grouped linear layers",
    "zamba": "a matrix a head, on the left of its product",
    "got_ocr2": "a tower of convolutions that text does not reach",
    "internlm3": "a config of its own for the class of another",
    "dbrx": "experts one below the other in a matrix",
    "gemma4_assistant": "inputs that another model computes, no text",
    "musicgen": "lists of tables and heads, and the part of a type",
    "emu3": "a text model whose config no Auto class knows",
}


@pytest.mark.parametrize("model_type", [name for name in KINDS if name in causal_types()])
def test_type(model_type):
    result = run(model_type, "rtn,generate,save")
    assert not result["build"].startswith("none"), result["build"]
    assert not {check: said for check, said in result.items() if said.startswith(("WRONG", "ERROR"))}
    assert set(result) == {"build", "rtn", "generate", "save"}
