"""Each kernel's speed against a copy of the same bytes, and against the straightforward torch expression.

    python benchmarks/kernels.py [--rounds 5] [--size 4096] [--only search]

"of copy" is the time of a torch copy that moves as many bytes (read and written), over the kernel's: 1 means as fast
as memory allows. "best" takes the quickest round of each instead of the median ratio, which a busy machine blurs.
"x torch" is torch's time over the kernel's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import common
import torch

import bitween
from bitween import Scheme, _core


class Case(NamedTuple):
    name: str
    nbytes: int  # read and written by the kernel
    ours: Callable[[], object]
    torch: Callable[[], object]


def torch_grid(groups, scheme, shrink=1.0):
    """Scales and zeros of min-max ranges, the plain way; groups: (rows, n_groups, group_size)."""
    top = scheme.levels - 1
    if scheme.symmetric:
        zero = torch.tensor(scheme.zero)
        scale = torch.maximum(groups.amax(2, True) / (top - zero), -groups.amin(2, True) / zero) * shrink
        return scale.half().float(), zero
    low, high = groups.amin(2, True).clamp(max=0) * shrink, groups.amax(2, True).clamp(min=0) * shrink
    scale = ((high - low) / top).half().float()
    return scale, (-low / scale).round().clamp(0, top)


def torch_codes(groups, scale, zero, scheme):
    return (groups / scale + zero).round().clamp(0, scheme.levels - 1)


def torch_pack4(codes):
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def torch_unpack4(packed):
    return torch.stack([packed & 15, packed >> 4], 2).flatten(1)


def torch_rtn(weight, scheme):
    groups = weight.float().unflatten(1, (-1, scheme.group_size))
    scale, zero = torch_grid(groups, scheme)
    return torch_pack4(torch_codes(groups, scale, zero, scheme).to(torch.uint8).flatten(1)), scale, zero


def torch_error(weight, scheme, importance, shrink=1.0):
    groups = weight.unflatten(1, (-1, scheme.group_size))
    scale, zero = torch_grid(groups, scheme, shrink)
    wrong = (torch_codes(groups, scale, zero, scheme) - zero) * scale - groups
    return (importance.unflatten(1, (-1, scheme.group_size)) * wrong**2).sum(2)


def torch_clip(weight, scheme, importance):
    """Best of twenty shrunk ranges."""
    errors = [torch_error(weight, scheme, importance, 1 - 0.03 * i) for i in range(20)]
    return torch.stack(errors).min(0)


def torch_kl(reference, logits):
    p, q = reference.float().log_softmax(-1), logits.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def storage_cases(size: int) -> Iterator[Case]:
    scheme = Scheme(4, 64)
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        weight = (torch.randn(size, size) * 0.02).to(dtype)
        stored = bitween.quantize(weight, scheme)
        moved = weight.nbytes + stored.nbytes
        scales, zeros = torch.from_numpy(stored.scales).float()[:, :, None], torch.from_numpy(stored.unpack_zeros())
        packed, out = torch.from_numpy(stored.codes), torch.empty_like(weight)
        yield Case(
            f"rtn {scheme} {name}",
            moved,
            lambda weight=weight: bitween.quantize(weight, scheme),
            lambda weight=weight: torch_rtn(weight, scheme),
        )
        yield Case(
            f"dequantize {scheme} {name}",
            moved,
            lambda stored=stored, out=out: stored.dequantize(out=out),
            lambda packed=packed, scales=scales, zeros=zeros, out=out: out.copy_(
                ((torch_unpack4(packed).unflatten(1, (-1, 64)).float() - zeros[:, :, None]) * scales).flatten(1)
            ),
        )
    codes = torch.randint(0, 16, (size, size), dtype=torch.uint8)
    packed = torch.from_numpy(_core.pack(codes, 16))
    moved = codes.nbytes + packed.nbytes
    yield Case("pack 4 bits", moved, lambda: _core.pack(codes, 16), lambda: torch_pack4(codes))
    yield Case("unpack 4 bits", moved, lambda: _core.unpack(packed, size, 16), lambda: torch_unpack4(packed))


def search_cases(size: int) -> Iterator[Case]:
    size = size // 4
    weight, importance = torch.randn(size, size) * 0.02, torch.rand(size, size)
    schemes = [Scheme(b, g, s) for b in (2, 3, 4, 8) for g in (16, 32, 64, 128) for s in (False, True)]
    yield Case(
        f"search {len(schemes)} schemes",
        weight.nbytes + importance.nbytes,
        lambda: bitween.search(weight, schemes, importance),
        lambda: [torch_error(weight, s, importance).sum().item() for s in schemes],
    )
    for scheme in (Scheme(4, 64), Scheme(4, 64, True)):
        yield Case(
            f"clip {scheme}",
            weight.nbytes + importance.nbytes + scheme.nbytes(size, size),
            lambda s=scheme: bitween.quantize(weight, s, method="clip", importance=importance),
            lambda s=scheme: torch_clip(weight, s, importance),
        )


def loss_cases(size: int) -> Iterator[Case]:
    tokens, vocabulary = max(1, size // 32), 49152
    reference = torch.randn(tokens, vocabulary) * 3
    logits = reference + 0.1 * torch.randn(tokens, vocabulary)
    targets = torch.randint(0, vocabulary, (tokens,))
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        p, q = reference.to(dtype), logits.to(dtype)
        yield Case(
            f"cross-entropy {name}",
            q.nbytes,
            lambda q=q: bitween.cross_entropy(q, targets),
            lambda q=q: torch.nn.functional.cross_entropy(q.float(), targets, reduction="none"),
        )
        yield Case(
            f"KL {name}",
            p.nbytes + q.nbytes,
            lambda p=p, q=q: bitween.kl_divergence(p, q),
            lambda p=p, q=q: torch_kl(p, q),
        )


def measure(case: Case, rounds: int) -> dict[str, object]:
    source = torch.ones(case.nbytes // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)
    candidates = {"ours": case.ours, "copy": lambda: target.copy_(source), "torch": case.torch}
    seconds = common.alternate(candidates, rounds)
    ours = statistics.median(seconds["ours"])
    return {
        "kernel": case.name,
        "ms": ours * 1e3,
        "GB/s": case.nbytes / ours / 1e9,
        "of copy": common.median_ratio(seconds["copy"], seconds["ours"]),
        "best": min(seconds["copy"]) / min(seconds["ours"]),
        "torch ms": statistics.median(seconds["torch"]) * 1e3,
        "x torch": common.median_ratio(seconds["torch"], seconds["ours"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds (default 5)")
    parser.add_argument("--size", type=int, default=6144, help="rows and columns of the matrix, a multiple of 512")
    parser.add_argument("--only", default="", help="run the kernels whose name contains this")
    options = parser.parse_args()
    if options.rounds < 1 or options.size < 512 or options.size % 512:
        parser.error("expected rounds >= 1 and a size that is a multiple of 512")
    torch.manual_seed(0)
    rows = []
    for cases in (storage_cases, search_cases, loss_cases):
        for case in cases(options.size):
            if options.only in case.name:
                rows.append(measure(case, options.rounds))
                print(common.show(rows[-1:]).splitlines()[-1], flush=True)
    if not rows:
        parser.error(f"no kernel's name contains {options.only!r}")
    print(common.show(rows))
    if not options.only:
        print("written to", common.save("kernels", rows, rounds=options.rounds, size=options.size))


if __name__ == "__main__":
    main()
