"""From a decoder's modules and config to a description that the core can run.

What a norm or an activation computes is found by running it; how blocks are wired is known by family. Anything that
does not fit is refused with the reason, and keeps transformers' own forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitween import _core
from bitween.decode.families import Family, family_of
from bitween.decode.mixtures import DTYPES, Clamped, mixture_of
from bitween.decode.refusing import UnrecognisedError, refuse
from bitween.decode.watching import Watch
from bitween.layers import QuantizedLinear

__all__ = ["Recognised", "UnrecognisedError", "recognise"]

_MOST_HEAD = 512
_ROUNDED, _DIRECT, _PLUS_ONE = 1, 2, 3
_CLAMPED = 5
_STEADY_ROPES = {"default", "linear", "llama3", "yarn"}  # whose tables do not depend on how long the text is


@dataclass
class Recognised:
    """A decoder as the core knows it.

    Attributes
    ----------
    core : what `_core.decode` takes
    watch : tells whether the modules are still those that were recognised
    windows : window of each block's keys, 0 where all are kept, in blocks' order
    places : (room, place in it) of each block
    ropes : types of layers with a rotary table each, None for the one table of most families
    steady : whether tables can be kept
    routers : modules that choose experts, in blocks' order
    """

    core: Any
    watch: Watch
    family: Family
    dtype: torch.dtype
    n_blocks: int
    kv_heads: int
    dim: int
    windows: list[int]
    places: list[tuple[int, int]]
    ropes: list[str | None]
    steady: bool
    routers: list[nn.Module]


def _norm_kind(norm: nn.Module, dtype: torch.dtype) -> int:
    """How a norm takes its gain, by what it makes of a probe."""
    weight = norm.weight.detach()
    x = torch.linspace(-1.7, 2.3, weight.numel()).to(dtype)[None]
    with torch.no_grad():
        got = norm(x)
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + _eps(norm))
    made = {
        _ROUNDED: weight * normed.to(dtype),
        _DIRECT: (weight.float() * normed).to(dtype),
        _PLUS_ONE: ((1.0 + weight.float()) * normed).to(dtype),
    }
    if got.dtype is not dtype:
        raise refuse(f"{type(norm).__name__} gives {got.dtype}")
    near = {kind: (value.float() - got.float()).abs().max().item() for kind, value in made.items()}
    kind = min(near, key=near.__getitem__)
    if not near[kind] <= 4 * torch.finfo(dtype).eps * got.float().abs().max().item():
        raise refuse(f"{type(norm).__name__} is no norm by the root mean square")
    return kind


def _eps(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", 0.0) or 0.0)


def _activation(module: Any) -> int:
    if isinstance(module, Clamped):
        return _CLAMPED
    x = torch.linspace(-6, 6, 193)
    with torch.no_grad():
        got = module(x)
    functions = (
        nn.functional.silu,
        nn.functional.gelu,
        lambda v: nn.functional.gelu(v, approximate="tanh"),
        nn.functional.relu,
        lambda v: nn.functional.relu(v) ** 2,
    )
    for number, function in enumerate(functions):
        if torch.allclose(got, function(x), rtol=1e-5, atol=1e-6):
            return number
    raise refuse(f"activation {type(module).__name__} is none of silu, gelu, relu and relu squared")


class _Builder:
    """Collects the layers and norms of a decoder, and what is to be watched of them."""

    def __init__(self, base: nn.Module, family: Family) -> None:
        self.base, self.family, self.config = base, family, base.config
        self.watch = Watch()
        self.linears: list[tuple] = []
        self.routers: list[nn.Module] = []
        self.kinds: dict[tuple[type, int], int] = {}
        self.dtype = base.norm.weight.dtype
        if self.dtype is torch.float32:  # some families keep their norms wider than the rest
            self.dtype = base.embed_tokens.weight.dtype
        if self.dtype not in DTYPES:
            raise refuse(f"dtype {self.dtype}")

    def linear(self, module: nn.Module, late_bias: torch.Tensor | None = None) -> tuple[int, int]:
        """(its number, its rows); a late bias is added to what the module gives."""
        self.watch.module(module)
        if isinstance(module, QuantizedLinear):
            self.linears.append(self._packed(module))
            self.watch.attribute(module, "_mode_number")
            rows = module.out_features
        elif type(module) is nn.Linear:
            _, rows = self.plain(module.weight, module.bias)
        else:
            raise refuse(f"a linear layer of class {type(module).__name__}")
        if any(t.device.type != "cpu" for t in (*module.parameters(), *module.buffers())):
            raise refuse("tensors that are not on the CPU")
        if late_bias is not None:
            self._add_late(late_bias, module.bias)
        return len(self.linears) - 1, rows

    def _add_late(self, bias: torch.Tensor, own: torch.Tensor | None) -> None:
        if own is not None or bias.dtype is not self.dtype:
            raise refuse(f"two biases, or one of {bias.dtype} in a model of {self.dtype}")
        last = list(self.linears[-1])
        last[-2 if last[0] != "plain" else -1] = bias.detach()
        self.linears[-1] = (*last, True)

    def plain(self, weight: torch.Tensor, bias: torch.Tensor | None) -> tuple[int, int]:
        """(number, rows) of a matrix of plain numbers."""
        if weight.dtype is not self.dtype or not weight.is_contiguous():
            raise refuse(f"a plain linear layer of {weight.dtype} in a model of {self.dtype}")
        self.linears.append(("plain", self._detached(weight), self._detached(bias)))
        return len(self.linears) - 1, weight.shape[0]

    def _packed(self, module: QuantizedLinear) -> tuple:
        codes, scales, zeros = module._packed()
        rest = module.in_features, self._detached(module.bias), module._mode_number
        if module.scheme.turned:
            raise refuse("a turned trellis, whose transforms the core's steps leave out")
        if module.scheme.coding == "trellis":
            return "trellis", codes, scales.view(-1), zeros, module.scheme.width, *rest
        return "packed", codes, scales, zeros, module.scheme.key, *rest

    @staticmethod
    def _detached(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.detach()

    def norm(self, module: nn.Module | None, width: int) -> tuple | None:
        if module is None:
            return None
        self.watch.module(module)
        weight = getattr(module, "weight", None)
        if weight is None or weight.dtype not in (self.dtype, torch.float32) or tuple(weight.shape) != (width,):
            raise refuse(f"{type(module).__name__} without a gain of {width} numbers of {self.dtype}")
        if getattr(module, "bias", None) is not None:
            raise refuse(f"{type(module).__name__} with a bias")
        key = (type(module), width)
        if key not in self.kinds:
            self.kinds[key] = _norm_kind(module, self.dtype)
        return self.kinds[key], _eps(module), weight.detach()


def _attention_parts(build: _Builder, attention: nn.Module, heads: int, kv_heads: int, dim: int) -> list[tuple]:
    rows = (heads * dim, kv_heads * dim, kv_heads * dim)
    if hasattr(attention, "qkv_proj"):
        number, total = build.linear(attention.qkv_proj)
        if total != sum(rows):
            raise refuse("qkv_proj of another height")
        return [(number, 0, rows[0]), (number, rows[0], rows[1]), (number, rows[0] + rows[1], rows[2])]
    parts = []
    for name, n in zip(("q_proj", "k_proj", "v_proj"), rows, strict=True):
        number, total = build.linear(getattr(attention, name))
        if total != n:
            raise refuse(f"{name} of another height")
        parts.append((number, 0, n))
    return parts


def _mlp_parts(build: _Builder, mlp: nn.Module) -> tuple[list[tuple | None], Any]:
    """Gate, which a plain MLP has not, up and down, and the activation."""
    first: list[tuple | None]
    if hasattr(mlp, "gate_up_proj"):
        number, total = build.linear(mlp.gate_up_proj)
        inner, activation = total // 2, mlp.activation_fn
        first = [(number, 0, inner), (number, inner, inner)]
    elif hasattr(mlp, "gate_proj"):
        (gate, inner), (up, _) = build.linear(mlp.gate_proj), build.linear(mlp.up_proj)
        first, activation = [(gate, 0, inner), (up, 0, inner)], mlp.act_fn
    else:
        up, inner = build.linear(mlp.up_proj)
        first, activation = [None, (up, 0, inner)], mlp.act_fn
    if isinstance(activation, nn.Module):
        build.watch.module(activation)
    down, hidden = build.linear(mlp.down_proj)
    return [*first, (down, 0, hidden)], activation


def _window(build: _Builder, attention: nn.Module) -> int:
    if build.family.window == "none":
        return 0
    owner = build.config if build.family.window == "config" else attention
    return int(getattr(owner, "sliding_window", None) or 0)


def recognise(base: nn.Module, original: type[nn.Module]) -> Recognised:
    """Describe a decoder.

    Parameters
    ----------
    base : the decoder inside a causal language model, such as LlamaModel
    original : transformers' class of it

    Raises
    ------
    UnrecognisedError
        with the reason.
    """
    family = family_of(original)
    if family is None:
        raise refuse(f"{original.__name__} is not among the known families")
    try:
        return _recognise(base, family)
    except (AttributeError, TypeError, ValueError) as error:  # modules that are not those of the family
        raise refuse(f"{type(error).__name__}: {error}") from error


def _recognise(base: nn.Module, family: Family) -> Recognised:
    config = base.config
    build = _Builder(base, family)
    for name in ("num_hidden_layers", "sliding_window", "clip_qkv", "_attn_implementation_internal"):
        build.watch.attribute(config, name)
    if config._attn_implementation not in ("sdpa", "eager"):
        raise refuse(f"attention by {config._attn_implementation}")
    if getattr(config, "use_bidirectional_attention", False):
        raise refuse("attention in both directions")
    if getattr(config, "clip_qkv", None) is not None:
        raise refuse("queries, keys and values that are clipped")
    layers = list(base.layers[: config.num_hidden_layers])
    if not layers:
        raise refuse("no blocks")
    first = layers[0].self_attn
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, int(first.head_dim)
    if dim > _MOST_HEAD or dim % 2:
        raise refuse(f"heads of {dim} numbers")
    for module in (base, base.layers, base.rotary_emb, base.embed_tokens):
        build.watch.module(module)
    for table in base.rotary_emb.buffers():
        build.watch.numbers(table)
    ropes: list[str | None] = sorted(set(config.layer_types)) if family.ropes else [None]
    shared: dict[str, Any] = {}
    blocks, windows, places, rest, counts = [], [], [], [], {}
    for index, layer in enumerate(layers):
        attention, mlp = layer.self_attn, layer.mlp
        for module in (layer, attention, mlp):
            build.watch.module(module)
        block, more, facts = _block(build, layer, (heads, kv_heads, dim))
        for key, value in facts.items():
            if shared.setdefault(key, value) != value:
                raise refuse(f"blocks that differ in their {key}")
        windows.append(_window(build, attention))
        rope = ropes.index(config.layer_types[index]) if family.ropes else 0
        blocks.append([*block, windows[-1], rope if getattr(attention, "use_rope", True) else -1])
        rest.append(more)
    kinds = sorted(set(windows))
    for window in windows:
        room = kinds.index(window)
        places.append((room, counts.get(room, 0)))
        counts[room] = counts.get(room, 0) + 1
    hidden = config.hidden_size
    sizes = (hidden, heads, kv_heads, dim, shared["norms of heads"], float(shared["scale"]))
    sizes += (float(shared["cap"]), float(shared["residual scale"]), shared["activation"], *shared["clamp"])
    sizes += (DTYPES[build.dtype],)
    described = tuple((*block, *place, *more) for block, place, more in zip(blocks, places, rest, strict=True))
    core = _core.decoder(sizes, tuple(build.linears), described, build.norm(base.norm, hidden))
    return Recognised(
        core=core,
        watch=build.watch,
        family=family,
        dtype=build.dtype,
        n_blocks=len(layers),
        kv_heads=kv_heads,
        dim=dim,
        windows=windows,
        places=places,
        ropes=ropes,
        steady=_steady(base.rotary_emb, ropes),
        routers=build.routers,
    )


def _steady(rotary: nn.Module, ropes: list[str | None]) -> bool:
    kinds = [rotary.rope_type if name is None else rotary.rope_type[name] for name in ropes]
    return all(kind in _STEADY_ROPES for kind in kinds)


def _block(build: _Builder, layer: nn.Module, shape: tuple[int, int, int]) -> tuple[list, tuple, dict[str, Any]]:
    """(parts, norms), (its experts, its sinks), and what all blocks must have in common."""
    heads, kv_heads, dim = shape
    attention, mlp, family, hidden = layer.self_attn, layer.mlp, build.family, build.config.hidden_size
    if getattr(attention, "attention_dropout", 0.0) or getattr(build.config, "resid_pdrop", 0.0):
        build.watch.eval(layer)
    if int(attention.head_dim) != dim:
        raise refuse("heads of several sizes")
    sinks = getattr(attention, "sinks", None)
    if (sinks is not None) is not family.sinks:
        raise refuse("attention with sinks, or without")
    if sinks is not None and (sinks.dtype is not build.dtype or tuple(sinks.shape) != (heads,)):
        raise refuse(f"sinks of {sinks.dtype}, {tuple(sinks.shape)}")
    if not getattr(attention, "is_causal", True):
        raise refuse("attention in both directions")
    before, after, before_mlp, after_mlp = (
        None if name is None else build.norm(getattr(layer, name), hidden) for name in family.norms
    )
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    by_head = q_norm is None or q_norm.weight.numel() == dim
    widths = (dim, dim) if by_head else (heads * dim, kv_heads * dim)
    parts = _attention_parts(build, attention, heads, kv_heads, dim)
    number, rows = build.linear(attention.o_proj)
    parts.append((number, 0, rows))
    mixture = None
    if hasattr(mlp, "experts"):
        mixture, rest, activation = mixture_of(build, mlp, _mlp_parts)
    else:
        rest, activation = _mlp_parts(build, mlp)
    norms = (
        before,
        build.norm(q_norm, widths[0]),
        build.norm(k_norm, widths[1]),
        after,
        before_mlp,
        after_mlp,
    )
    caps = family.caps and build.config._attn_implementation == "eager"
    facts = {
        "norms of heads": by_head,
        "scale": attention.scaling,
        "cap": (attention.attn_logit_softcapping or 0.0) if caps else 0.0,
        "residual scale": 1.0 if family.residual_scale is None else getattr(layer, family.residual_scale),
        "activation": _activation(activation),
        "clamp": (activation.alpha, activation.limit) if isinstance(activation, Clamped) else (0.0, 0.0),
    }
    return [(*parts, *rest), norms], (mixture, None if sinks is None else sinks.detach()), facts
