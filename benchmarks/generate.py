"""Tokens a second of transformers' generate, batch 1: quantized models against the bfloat16 model they came from.

    python benchmarks/generate.py MODEL_DIR [--bits 4] [--group-size 64] [--quantized DIR] [--isa avx2]
        [--llama PYTHON] [--tokens 48] [--rounds 5]

All take turns in one process. One model is rounded to one scheme, embedding and head included, since only the time
counts here; --quantized adds another, a mixed plan for instance. --isa repeats the first with another instruction set.
--llama names an interpreter with llama-cpp-python: it reads the GGUF file of a model rounded to 4 bits in groups of 32,
which holds bitween's own codes, in a process of its own that works only in its turn. "x bf16" is the median over
rounds of the ratio of the two. "layer by layer" is transformers' own forward pass on the same packed layers, and its text
has to be the same. The second table tells where the time of a token goes, as the core takes it: CPU time, all threads.

Writes results/generate.json and the table of docs/performance.md.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitween
from bitween import Bitween, _core, decode
from bitween.decode import stepping
from bitween.export.gguf import export_gguf
from bitween.layers import linear
from bitween.model.memory import model_bytes

PROMPT = "The most important thing about a good night's sleep is"
GGUF = "4b g32 sym in llama.cpp"


class Writers:
    """What takes turns: {name: function that writes the tokens}, {name: bytes}."""

    def __init__(self, tokenizer, tokens: int) -> None:
        self.ids = tokenizer(PROMPT, return_tensors="pt").input_ids
        self.options = {"do_sample": False, "pad_token_id": tokenizer.eos_token_id}
        self.options |= {"min_new_tokens": tokens, "max_new_tokens": tokens}
        self.run: dict[str, Callable[[], object]] = {}
        self.nbytes: dict[str, int] = {}
        self.text: dict[str, torch.Tensor] = {}

    def add(
        self, name: str, model: torch.nn.Module, mode: str | None = None, isa: str | None = None, core: bool = True
    ) -> None:
        """A model, with few rows multiplied in a mode, on an instruction set, its steps taken by the core or not."""
        own = bitween.info()["isa"]

        def write() -> None:
            (decode.attach if core else decode.detach)(model)
            if mode:
                bitween.set_matmul_mode(model, mode)
            _core.set_isa(isa or own)
            self.text[name] = model.generate(self.ids, **self.options)
            _core.set_isa(own)

        self.run[name], self.nbytes[name] = write, model_bytes(model)


def llama(stack: contextlib.ExitStack, python: str, model, tokenizer, tokens: int) -> tuple[Callable, int, str] | None:
    """(function that has llama.cpp write the tokens, bytes of its file, version), or None where it is not installed."""
    path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.gguf"
    export_gguf(model, tokenizer, path)
    script = Path(__file__).with_name("llama_generate.py")
    command = [python, str(script), str(path), PROMPT, str(tokens), str(torch.get_num_threads())]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.stdin.close)
    version = process.stdout.readline().strip()
    if not version:
        return None

    def write() -> None:
        process.stdin.write("\n")
        process.stdin.flush()
        if not process.stdout.readline():
            raise RuntimeError("llama.cpp ended early")

    return write, path.stat().st_size, version


def shares(writers: Writers, name: str, tokens: int) -> list[dict[str, object]]:
    """Milliseconds of CPU time a token takes in the core's step, in the head and in Python around them."""
    spent = {"blocks, in the core": 0.0, "products outside of it: the head, and the prompt": 0.0}

    class Timed:
        def __init__(self, key: str) -> None:
            self.key = key

        def __getattr__(self, function: str):
            found = getattr(_core, function)
            if function not in ("decode", "matmul"):
                return found

            def run(*args):
                start = time.process_time()
                found(*args)
                spent[self.key] += time.process_time() - start

            return run

    writers.run[name]()
    stepping._core, linear._core = (Timed(key) for key in spent)
    try:
        start = time.process_time()
        writers.run[name]()
        total = time.process_time() - start
    finally:
        stepping._core = linear._core = _core
    spent["transformers' loop and the rest of Python"] = total - sum(spent.values())
    return [{"part": k, "ms": 1e3 * v / tokens, "share": v / total} for k, v in spent.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory of a causal language model")
    parser.add_argument("--quantized", help="directory of the same model, quantized")
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--isa", choices=bitween.info()["isas"])
    parser.add_argument("--llama", metavar="PYTHON", help="interpreter with llama-cpp-python")
    parser.add_argument("--tokens", type=int, default=48, help="to generate")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)

    def rounded(bits: float, group_size: int, symmetric: bool):
        return Bitween(original, None, bits, group_size, symmetric, embeddings=True).quantize(rtn=True)

    uniform = rounded(options.bits, options.group_size, False)
    name = str(bitween.Scheme(options.bits, options.group_size))
    writers = Writers(tokenizer, options.tokens)
    writers.add("original, bfloat16", original)
    for mode in ("int16", "int8", "exact"):
        writers.add(f"{name}, {mode}", uniform, mode)
    writers.add(f"{name}, int16, layer by layer", uniform, "int16", core=False)
    if options.isa:
        writers.add(f"{name}, int16, {options.isa}", uniform, "int16", options.isa)
    if options.quantized:
        writers.add("mixed plan, int16", bitween.load_model(options.quantized)[0], "int16")
    with contextlib.ExitStack() as stack:
        if options.llama:
            theirs = rounded(4, 32, True)
            writers.add("4b g32 sym, int16", theirs, "int16")
            found = llama(stack, options.llama, theirs, tokenizer, options.tokens)
            if found is None:
                print("llama-cpp-python: not installed", file=sys.stderr)
            else:
                writers.run[GGUF], writers.nbytes[GGUF], version = found
                print("llama-cpp-python", version)
        seconds = common.alternate(writers.run, options.rounds)
    rows = [
        {
            "model": name,
            "MiB": writers.nbytes[name] / 2**20,
            "tokens/s": options.tokens / statistics.median(took),
            "x bf16": common.median_ratio(seconds["original, bfloat16"], took),
        }
        for name, took in seconds.items()
    ]
    if not torch.equal(writers.text[f"{name}, int16"], writers.text[f"{name}, int16, layer by layer"]):
        print("the text of both paths differs", file=sys.stderr)
    parts = shares(writers, f"{name}, int16", options.tokens)
    print(common.show(rows), common.show(parts), sep="\n\n")
    print("written to", common.save("generate", [*rows, *parts], tokens=options.tokens, rounds=options.rounds))
    common.write_page(common.PERFORMANCE, "generate", [common.show(rows), common.show(parts)])


if __name__ == "__main__":
    main()
