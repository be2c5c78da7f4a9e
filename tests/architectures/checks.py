"""What must hold for a model of any type: each check returns a line that says what was measured, or raises."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path

import torch
from torch import nn

import bitween
from bitween.layers.experts import ExpertStack
from bitween.layers.packed import Packed
from bitween.model.causal import find_layout
from bitween.model.experts import shared_copy, unfolded

# Parameters with two sides or more that are no matrices to pack, by a part of their names.
KEPT = {
    "A_log": "decays of a state space: they enter by an exponential, element by element",
    "_hc.fn": "mixing of hyper-connections: eight rows, however wide the model",
    "rg_lru": "gates of a linear recurrence: blocks on a diagonal, less than 2 % of RecurrentGemma-2B",
    "conv1d": "kernels of a convolution of each channel by itself: four numbers a channel",
    "relative_position_bias": "a bias by distance",
}
SPREAD = 1e-3  # how far logits may differ, of their standard deviation
_LENGTH, _EXAMPLES = 48, 24


class Wrong(AssertionError):
    """A result that is not right though no error was raised."""


class Subject:
    """One tiny model and what is made of it on the way through the checks.

    Parameters
    ----------
    model : a causal language model
    examples : inputs for each pass, for a model that text alone does not run
    """

    def __init__(self, model: nn.Module, examples: list[dict] | None = None):
        self.model, self.examples = model, examples
        vocabulary = min(300, _tokens(model))
        self.ids = torch.randint(3, vocabulary, (_EXAMPLES, _LENGTH), generator=torch.Generator().manual_seed(1))
        self.before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        self.expected = self.logits(model)
        if not torch.isfinite(self.expected).all():
            raise RuntimeError("the model itself gives logits that are not finite")
        self.spread = float(self.expected.std())
        self.packed: nn.Module | None = None

    def logits(self, model: nn.Module) -> torch.Tensor:
        """What a model of this type makes of two examples."""
        if self.examples is None:
            return logits(model, self.ids[:2])
        with torch.no_grad():
            return torch.cat([model(**example).logits.float() for example in self.examples[:2]])

    def untouched(self) -> None:
        for name, tensor in self.model.state_dict().items():
            if not torch.equal(tensor, self.before[name]):
                raise Wrong(f"the user's model was changed: {name}")


def _tokens(model: nn.Module) -> int:
    return min(len(table) for table in _matrices(model.get_input_embeddings()))


def _matrices(end: nn.Module | None) -> list[torch.Tensor]:
    """Weights of an embedding or a head, of which a model of several codebooks has lists."""
    return [p for p in end.parameters() if p.ndim == 2] if end is not None else []


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def quantized(subject: Subject, method: str) -> str:
    """The uniform quantizer: logits equal to a dequantized copy, 95 % of the matrix weights packed."""
    packed = bitween.Bitween(subject.model, bits=4, group_size=32).quantize(
        method=method, calibration_data=subject.examples or subject.ids
    )
    subject.untouched()
    bitween.set_matmul_mode(packed, "exact")
    got = subject.logits(packed)
    if not torch.isfinite(got).all():
        raise Wrong("logits are not finite")
    subject.packed = packed
    plain, share, left = dequantized(subject.model, packed)
    gap = float((got - subject.logits(plain)).abs().max()) / max(subject.spread, 1e-9)
    if gap > SPREAD:
        raise Wrong(f"logits differ from the dequantized copy's by {gap:.1e} of their spread")
    if share < 0.95:
        raise Wrong(f"{share:.0%} of the matrix weights are packed; left: {', '.join(left[:4])}")
    return f"{share:.1%} packed, gap {gap:.0e}"


def dequantized(model: nn.Module, packed: nn.Module) -> tuple[nn.Module, float, list[str]]:
    """A full-precision model that holds the packed one's numbers, the share of matrix weights packed, and the rest.

    The uniform quantizer leaves lookups and the head alone unless asked, so that they do not count, nor does `KEPT`.
    """
    plain = copy.deepcopy(model)
    done: set[int] = set()
    with torch.no_grad():
        for name, module in packed.named_modules():
            if isinstance(module, ExpertStack):
                target = plain.get_parameter(name)
                target.copy_(module.dense().to(target.dtype))
                done |= {id(target)} if all(isinstance(module.layer(e), Packed) for e in range(len(module))) else set()
            elif isinstance(module, Packed) and not _in_stack(packed, name):
                owner = plain.get_submodule(name)
                weight = module.dequantize(torch.float32)
                owner.weight.copy_(weight.t() if type(owner).__name__ == "Conv1D" else weight.view_as(owner.weight))
                done.add(id(owner.weight))
            elif not isinstance(module, Packed):
                for own, tensor in module.named_parameters(recurse=False):
                    path = f"{name}.{own}" if name else own
                    if not _in_stack(packed, path):
                        plain.get_parameter(path).copy_(tensor)
    tables = {id(m.weight) for m in plain.modules() if isinstance(m, nn.Embedding)}
    tables |= {id(p) for p in _matrices(plain.get_output_embeddings())}
    matrices = {
        id(p): (n, p)
        for n, p in plain.named_parameters()
        if p.ndim >= 2 and id(p) not in tables and not any(word in n for word in KEPT)
    }
    total = sum(p.numel() for _, p in matrices.values())
    left = sorted(((n, p) for i, (n, p) in matrices.items() if i not in done), key=lambda t: -t[1].numel())
    missing = sum(p.numel() for _, p in left)
    return plain, 1 - missing / max(total, 1), [f"{n} {list(p.shape)}" for n, p in left]


def _in_stack(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(isinstance(_at(model, parts[:k]), ExpertStack) for k in range(1, len(parts)))


def _at(model: nn.Module, parts: list[str]):
    for part in parts:
        model = getattr(model, part, None)
        if model is None:
            return None
    return model


def generates(subject: Subject) -> str:
    """With a cache each step's logits are those without, as exactly as the original's are."""
    if subject.examples is not None:
        return "none, the original generates for another model only"
    try:
        own = _cache_gap(subject.model, subject.ids[:1, :12]) / max(subject.spread, 1e-9)
    except Exception as error:  # random codes of a vocabulary with room to spare, a cache of another kind
        return f"none, the original raises {type(error).__name__}"
    gap = _cache_gap(subject.packed, subject.ids[:1, :12]) / max(subject.spread, 1e-9)
    if gap > max(SPREAD, 4 * own):
        raise Wrong(
            f"with a cache logits differ by {gap:.1e} of their spread from those without; the original's {own:.1e}"
        )
    return f"gap {gap:.0e}, original {own:.0e}"


def _cache_gap(model: nn.Module, prompt: torch.Tensor) -> float:
    got = model.generate(
        prompt, max_new_tokens=6, do_sample=False, pad_token_id=0, output_logits=True, return_dict_in_generate=True
    )
    start = prompt.shape[1]
    return max(
        float((logits(model, got.sequences[:, : start + k])[:, -1] - step.float()).abs().max())
        for k, step in enumerate(got.logits)
    )


def saved(subject: Subject) -> str:
    """Saved in both ways, then loaded by bitween and by transformers, with the same logits."""
    want, kind = subject.logits(subject.packed), type(subject.packed)
    gaps = []
    with tempfile.TemporaryDirectory() as folder:
        try:
            subject.model.save_pretrained(Path(folder) / "original")
            own = kind.from_pretrained(Path(folder) / "original")
            gap = float((subject.logits(own) - subject.expected).abs().max()) / max(subject.spread, 1e-9)
        except Exception as error:  # a configuration that transformers writes and does not read
            return f"none, the original raises {type(error).__name__}"
        if not gap <= SPREAD:
            return f"none, the original's own logits differ by {gap:.1e} of their spread"
        ways = {
            "save_model": lambda path: bitween.save_model(subject.packed, None, path),
            "save_pretrained": subject.packed.save_pretrained,
        }
        for way, save in ways.items():
            path = Path(folder) / way
            save(path)
            for name, load in (("bitween", lambda p: bitween.load_model(p)[0]), ("transformers", kind.from_pretrained)):
                loaded = load(path)
                bitween.set_matmul_mode(loaded, "exact")
                gaps.append(float((subject.logits(loaded) - want).abs().max()) / max(subject.spread, 1e-9))
                if not gaps[-1] <= SPREAD:
                    raise Wrong(f"saved by {way}, loaded by {name}: logits differ by {gaps[-1]:.1e} of their spread")
    return f"gap {max(gaps):.0e}"


def gradual(subject: Subject) -> str:
    """A gradual run to half the bytes; of a model that reads both ways, which has no perplexity, by its damage."""
    from bitween.gradual import GradualQuantizer

    ids = torch.randint(3, 300, (64, _LENGTH), generator=torch.Generator().manual_seed(2)) % _tokens(subject.model)
    options = {"target_memory_reduction": 0.5, "calibration_data": subject.examples or ids, "calibration_samples": 12}
    options |= {"evaluation_samples": 24, "sequence_length": _LENGTH, "on_conflict": "memory"}
    causal = subject.examples is None and find_layout(unfolded(shared_copy(subject.model)))[0] is not None
    if causal:
        quantizer = GradualQuantizer(subject.model, None, max_perplexity_increase=0.5, distillation_steps=2, **options)
    else:
        quantizer = GradualQuantizer(subject.model, None, max_damage=0.5, **options)
    model = quantizer.quantize()
    subject.untouched()
    if not torch.isfinite(subject.logits(model)).all():
        raise Wrong("logits are not finite")
    before, after = all_bytes(subject.model), all_bytes(model)
    if after > 0.5 * before + 256:  # the numbers by which embeddings scale their rows come on top
        raise Wrong(f"{after:,} of {before:,} bytes are left")
    return f"-{1 - after / before:.0%}" + ("" if causal else ", by damage")


def all_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared memory once."""
    tensors = (*model.parameters(), *model.buffers())
    return sum({(t.data_ptr(), t.numel()): t.numel() * t.element_size() for t in tensors}.values())


CHECKS = {
    "rtn": lambda s: quantized(s, "rtn"),
    "generate": generates,
    "save": saved,
    "gptq": lambda s: quantized(s, "gptq"),
    "gradual": gradual,
}
