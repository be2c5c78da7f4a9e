"""Quantize a model's decoder layers with another project, in whatever Python has it: for the other benchmarks.

    python benchmarks/peers.py auto-round MODEL WINDOWS OUT --bits 3 [--iterations 200]

WINDOWS is a torch file of token ids (windows, length), MODEL a directory. OUT becomes a safetensors file of the
layers' weights as plain numbers; its metadata tells seconds (loading left out), version and bits a weight. Groups of 64
with zero points everywhere; "AutoScheme" chooses the bits of each layer, --bits with scales and zeros on average. Exit
status 3: not installed. Needs nothing of bitween.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP = 64
MIXED_BITS = (2, 3, 4, 5, 6, 8)
BATCH = 2  # windows a training step of auto-round


def decoder_layers(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    linears = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {name: m for name, m in linears.items() if m is not model.get_output_embeddings()}


def auto_round(model, tokenizer, windows, options) -> torch.nn.Module:
    from auto_round import AutoRound

    compressor = AutoRound(
        model,
        tokenizer=tokenizer,
        scheme=f"W{options.bits}A16",
        group_size=GROUP,
        sym=False,
        iters=options.iterations,
        nsamples=len(windows),
        seqlen=windows.shape[1],
        batch_size=BATCH,
        dataset=list(windows.split(BATCH)),  # larger batches than batch_size end the process
    )
    return compressor.quantize()[0]


def auto_scheme(model, tokenizer, windows, options) -> torch.nn.Module:
    from auto_round import AutoRound, AutoScheme
    from auto_round.schemes import QuantizationScheme

    choices = [
        QuantizationScheme(bits=b, group_size=GROUP, sym=False, data_type="int", act_bits=16) for b in MIXED_BITS
    ]
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as file:  # it takes a dataset by name only
        for first, second in zip(windows, windows.roll(-1, 0), strict=True):  # long enough in whatever tokens
            file.write(json.dumps({"text": tokenizer.decode(torch.cat([first, second]))}) + "\n")
        file.flush()
        size = {"nsamples": len(windows), "seqlen": windows.shape[1]}
        compressor = AutoRound(
            model,
            tokenizer=tokenizer,
            scheme=AutoScheme(avg_bits=options.bits, options=choices, **size),
            iters=options.iterations,
            batch_size=BATCH,
            dataset=file.name,
            **size,
        )
        model = compressor.quantize()[0]
    model.mixed_bits = {name: int(compressor.layer_config[name]["bits"]) for name in decoder_layers(model)}
    return model


def llmcompressor(model, tokenizer, windows, options) -> torch.nn.Module:
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    weights = QuantizationArgs(num_bits=options.bits, symmetric=False, strategy="group", group_size=GROUP)
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)
    data = Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})
    oneshot(
        model=model,
        dataset=data,
        recipe=GPTQModifier(config_groups={"all": scheme}, ignore=["lm_head"]),
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
        pipeline="sequential",
    )
    return model


def hqq(model, tokenizer, windows, options) -> torch.nn.Module:
    from hqq.core.quantize import Quantizer

    for layer in decoder_layers(model).values():
        stored = Quantizer.quantize(
            layer.weight.data, options.bits, group_size=GROUP, axis=1, device="cpu", compute_dtype=torch.float32
        )
        layer.weight.data = Quantizer.dequantize(*stored).float().reshape(layer.weight.shape)
    return model


# name: (package, function, dtype, bits of a group's scale and zero)
PEERS = {
    "auto-round": ("auto-round", auto_round, torch.float32, lambda bits: 16 + bits),
    "AutoScheme": ("auto-round", auto_scheme, torch.float32, lambda bits: 16 + bits),
    "llmcompressor GPTQ": ("llmcompressor", llmcompressor, torch.bfloat16, lambda bits: 16 + bits),
    "hqq": ("hqq", hqq, torch.float32, lambda bits: 32),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("model")
    parser.add_argument("windows")
    parser.add_argument("out")
    parser.add_argument("--bits", type=float, default=4)
    parser.add_argument("--iterations", type=int, default=200, help="of auto-round (default 200)")
    options = parser.parse_args()
    if options.bits.is_integer():
        options.bits = int(options.bits)
    package, quantize, dtype, group_bits = PEERS[options.peer]
    try:
        found = version(package)
    except PackageNotFoundError:
        sys.exit(3)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = torch.load(options.windows)
    started = time.perf_counter()
    model = quantize(model, tokenizer, windows, options)
    seconds = time.perf_counter() - started
    weights = {name: layer.weight.detach().float().contiguous() for name, layer in decoder_layers(model).items()}
    widths = getattr(model, "mixed_bits", dict.fromkeys(weights, options.bits))
    _check_grid(weights, widths)
    total = sum(w.numel() * (widths[name] + group_bits(widths[name]) / GROUP) for name, w in weights.items())
    told = {"seconds": seconds, "version": found, "bits": total / sum(w.numel() for w in weights.values())}
    save_file(weights, options.out, {key: str(value) for key, value in told.items()})


def _check_grid(weights: dict[str, torch.Tensor], widths: dict[str, int]) -> None:
    """No group may hold more distinct values than its bits allow."""
    for name, weight in weights.items():
        groups = weight.reshape(-1, GROUP).sort(1).values
        distinct = (groups.diff(dim=1) > 1e-6 * groups.abs().amax(1, keepdim=True)).sum(1) + 1
        if distinct.max() > 2 ** widths[name]:
            raise ValueError(f"{name}: expected at most {2 ** widths[name]} values a group; got {int(distinct.max())}")


if __name__ == "__main__":
    main()
