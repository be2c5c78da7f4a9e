"""Tokens a second of transformers' generate, batch 1: quantized models against the bfloat16 model they came from.

    python benchmarks/generate.py MODEL_DIR [--bits 4] [--group-size 64] [--quantized DIR] [--isa avx2]
        [--llama PYTHON ...] [--tokens 64] [--rounds 5] [--threads 2] [--modes int16 int8 exact]

MODEL_DIR may be random:LAYERSxWIDTHxINNERxVOCABULARY, a Llama of random weights, or with xEXPERTS at the end a Mixtral,
of whose experts a token chooses two. All take turns in one process. One model is rounded to one scheme, embedding and
head included, since only the time counts here; --quantized adds another, a mixed plan for instance. --isa repeats the
first with another instruction set. --llama names interpreters with llama-cpp-python, xllamacpp or ik-llama-cpp-python:
each reads the GGUF file of a model rounded to 4 bits in groups of 32, which holds bitween's own codes, in a process of
its own that works only in its turn.

Columns: "CPU ms" is the CPU time of a token in all threads, which another program on the machine disturbs less than
the time of the clock; "x bf16" and "x slow path" are medians over rounds of the ratio to the original and to
transformers' own forward pass on the same packed layers ("layer by layer"), by the clock and by CPU time. The place
where the texts of both paths part is told, with how close the choice was there. The second table is a prompt of 512
tokens up to its first token, and a model's first token from its files on. The third tells where the time of a token
goes, as the core takes it.

Writes results/generate.json and the tables of docs/performance.md; --dry only prints.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import common
import torch
from memory import make_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

import bitween
from bitween import Bitween, _core, decode
from bitween.decode import stepping
from bitween.export.gguf import export_gguf
from bitween.layers import linear
from bitween.model.memory import model_bytes

PROMPT = "The most important thing about a good night's sleep is"
LONG = 512  # tokens of the long prompt, where the model takes as many
GGUF, ORIGINAL, SLOW = "4b g32 sym in ", "original, bfloat16", ", layer by layer"
TOKENIZER = Path(__file__).parent.parent / "tests/tiny/model"


class Candidates:
    """What takes turns: {name: function of a prompt and a number of tokens}, {name: bytes}."""

    def __init__(self) -> None:
        self.write: dict[str, Callable[[torch.Tensor, int], object]] = {}
        self.load: dict[str, Callable[[], object]] = {}
        self.nbytes: dict[str, int] = {}
        self.text: dict[str, torch.Tensor] = {}

    def add(
        self, name: str, model: torch.nn.Module, mode: str | None = None, isa: str | None = None, core: bool = True
    ) -> None:
        """A model, with few rows multiplied in a mode, on an instruction set, its steps taken by the core or not."""
        own = bitween.info()["isa"]

        def write(ids: torch.Tensor, tokens: int) -> None:
            (decode.attach if core else decode.detach)(model)
            if mode:
                bitween.set_matmul_mode(model, mode)
            _core.set_isa(isa or own)
            self.text[name] = generate(model, ids, tokens)
            _core.set_isa(own)

        self.write[name], self.nbytes[name] = write, model_bytes(model)

    def runs(self, ids: torch.Tensor, tokens: int) -> dict[str, Callable[[], object]]:
        return {name: lambda write=write: write(ids, tokens) for name, write in self.write.items()}


def generate(model: torch.nn.Module, ids: torch.Tensor, tokens: int) -> torch.Tensor:
    model.generation_config.eos_token_id = None  # to write on without processors of logits that forbid the end
    return model.generate(ids, do_sample=False, pad_token_id=0, max_new_tokens=tokens)


class Llama:
    """llama.cpp in a process of its own, on the GGUF of a model."""

    def __init__(self, stack: contextlib.ExitStack, python: str, model, tokenizer, tokens: int) -> None:
        self.path = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.gguf"
        export_gguf(model, tokenizer, self.path)
        script = Path(__file__).with_name("llama_generate.py")
        command = [python, str(script), str(self.path), str(tokens), str(torch.get_num_threads())]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        stack.callback(self.process.wait)
        stack.callback(self.process.stdin.close)
        self.version = self.process.stdout.readline().strip()

    def ask(self, line: str) -> float:
        """CPU seconds that it took."""
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError("llama.cpp ended early")
        return float(answer)

    def write(self, ids: torch.Tensor, tokens: int) -> float:
        return self.ask(f"{json.dumps(ids[0].tolist())} {tokens}")


def first_token(llama: Llama, ids: torch.Tensor) -> float:
    return llama.ask("load") + llama.write(ids, 1)


def shares(candidates: Candidates, name: str, ids: torch.Tensor, tokens: int) -> list[dict[str, object]]:
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

    candidates.write[name](ids, tokens)
    stepping._core, linear._core = (Timed(key) for key in spent)
    try:
        start = time.process_time()
        candidates.write[name](ids, tokens)
        total = time.process_time() - start
    finally:
        stepping._core = linear._core = _core
    spent["transformers' loop and the rest of Python"] = total - sum(spent.values())
    return [{"part": k, "CPU ms": 1e3 * v / tokens, "share": v / total} for k, v in spent.items()]


def generating(candidates: Candidates, slow: str, ids: torch.Tensor, tokens: int, rounds: int) -> list[dict]:
    took = common.alternate_with_cpu(candidates.runs(ids, tokens), rounds)
    wall = {name: [pair[0] for pair in pairs] for name, pairs in took.items()}
    cpu = {name: [pair[1] for pair in pairs] for name, pairs in took.items()}
    return [
        {
            "model": name,
            "MiB": candidates.nbytes[name] / 2**20,
            "tokens/s": tokens / statistics.median(wall[name]),
            "CPU ms": 1e3 * statistics.median(cpu[name]) / tokens,
            "x bf16": common.median_ratio(wall[ORIGINAL], wall[name]),
            "x slow path": common.median_ratio(wall[slow], wall[name]),
            "x bf16, CPU": common.median_ratio(cpu[ORIGINAL], cpu[name]),
            "x slow path, CPU": common.median_ratio(cpu[slow], cpu[name]),
        }
        for name in took
    ]


def agreement(model, ids: torch.Tensor, by_core: torch.Tensor, slow: torch.Tensor) -> str:
    """Whether both paths wrote the same text; else how far apart transformers' own logits are where it parts."""
    if torch.equal(by_core, slow):
        return f"Both paths wrote the same {slow.shape[1] - ids.shape[1]} tokens."
    at = int((by_core != slow)[0].nonzero()[0])
    decode.detach(model)
    cache = None
    with torch.no_grad():
        for tokens in (slow[:, : ids.shape[1]], *slow[:, ids.shape[1] : at].split(1, dim=1)):
            out = model(tokens, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
    chosen, other = (float(out.logits[0, -1, text[0, at]]) for text in (slow, by_core))
    step = torch.finfo(model.dtype).eps * 2 ** math.floor(math.log2(abs(chosen)))
    dtype = str(model.dtype).removeprefix("torch.")
    return (
        f"The texts part at token {at - ids.shape[1] + 1}, where transformers' own logits of both choices are "
        f"{chosen:g} and {other:g}: {(chosen - other) / step:g} steps of {dtype} apart."
    )


def beginning(candidates: Candidates, long: torch.Tensor, rounds: int) -> list[dict]:
    """A long prompt up to its first token, and the first token of a model from its files on."""
    names = [name for name in candidates.load if name in candidates.write]
    runs = candidates.runs(long, 1)
    prompt = common.alternate_with_cpu({name: runs[name] for name in names}, rounds)
    first = common.alternate_with_cpu({name: candidates.load[name] for name in names}, rounds)
    median = statistics.median
    return [
        {
            "model": name,
            f"{long.shape[1]} tokens, s": median(wall for wall, _ in prompt[name]),
            "CPU s": median(cpu for _, cpu in prompt[name]),
            "loading and a first token, s": median(wall for wall, _ in first[name]),
            "and its CPU s": median(cpu for _, cpu in first[name]),
        }
        for name in names
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="directory of a causal language model, or random:SIZES")
    parser.add_argument("--quantized", help="directory of the same model, quantized")
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--isa", choices=bitween.info()["isas"])
    parser.add_argument("--llama", metavar="PYTHON", nargs="+", default=[], help="interpreters with a llama.cpp")
    parser.add_argument("--tokens", type=int, default=64, help="to generate")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--modes", nargs="+", default=["int16", "int8", "exact"])
    parser.add_argument("--dry", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with contextlib.ExitStack() as stack:
        measure(options, stack)


def measure(options: argparse.Namespace, stack: contextlib.ExitStack) -> None:
    if options.model.startswith("random:"):
        sizes = map(int, options.model.removeprefix("random:").split("x"))
        options.model = stack.enter_context(tempfile.TemporaryDirectory())
        make_llama(Path(options.model), TOKENIZER, *sizes)
    tokenizer = AutoTokenizer.from_pretrained(options.model, local_files_only=True)
    original = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.bfloat16)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    most = original.config.max_position_embeddings - 8
    long = torch.randint(10, 250, (1, min(LONG, most)), generator=torch.Generator().manual_seed(0))
    candidates = Candidates()

    def rounded(bits: float, group_size: int, symmetric: bool):
        return Bitween(original, None, bits, group_size, symmetric, embeddings=True).quantize(rtn=True)

    def loading(load: Callable[[], torch.nn.Module]) -> Callable[[], object]:
        return lambda: generate(load(), ids, 1)

    uniform = rounded(options.bits, options.group_size, False)
    name = str(bitween.Scheme(options.bits, options.group_size))
    fast = f"{name}, {options.modes[0]}"
    folder = stack.enter_context(tempfile.TemporaryDirectory()) + "/model"
    bitween.save_model(uniform, tokenizer, folder)
    candidates.add(ORIGINAL, original)
    candidates.load[ORIGINAL] = loading(lambda: AutoModelForCausalLM.from_pretrained(options.model))
    for mode in options.modes:
        candidates.add(f"{name}, {mode}", uniform, mode)
    candidates.load[fast] = loading(lambda: bitween.load_model(folder)[0])
    candidates.add(fast + SLOW, uniform, options.modes[0], core=False)
    if options.isa:
        candidates.add(f"{fast}, {options.isa}", uniform, options.modes[0], options.isa)
    if options.quantized:
        candidates.add("mixed plan, int16", bitween.load_model(options.quantized)[0], "int16")
    if options.llama:
        theirs = rounded(4, 32, True)
        candidates.add(f"4b g32 sym, {options.modes[0]}", theirs, options.modes[0])
        for python in options.llama:
            llama = Llama(stack, python, theirs, tokenizer, options.tokens)
            if not llama.version:
                print(f"{python}: no llama.cpp that this knows is installed there", file=sys.stderr)
                continue
            print(llama.version)
            name = GGUF + llama.version.split()[0]
            candidates.write[name], candidates.nbytes[name] = llama.write, llama.path.stat().st_size
            candidates.load[name] = functools.partial(first_token, llama, ids)
    rows = generating(candidates, fast + SLOW, ids, options.tokens, options.rounds)
    print(common.show(rows), end="\n\n", flush=True)
    same = agreement(uniform, ids, candidates.text[fast], candidates.text[fast + SLOW])
    print(same, end="\n\n", flush=True)
    begun = beginning(candidates, long, options.rounds)
    parts = shares(candidates, fast, ids, options.tokens)
    print(common.show(begun), common.show(parts), sep="\n\n")
    if options.dry:
        return
    print("written to", common.save("generate", [*rows, *begun, *parts], tokens=options.tokens, rounds=options.rounds))
    common.write_page(common.PERFORMANCE, "generate", [common.show(rows), same, common.show(begun), common.show(parts)])


if __name__ == "__main__":
    main()
