"""Steps of a decoder against a forward pass in NumPy's float64, on every instruction set and number of threads.

It needs no model and no transformers, so that it runs under sanitizers too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest

import bitween
from bitween import Scheme, _core
from bitween.quantized_tensor import MODES

ISAS = bitween.info()["isas"]
SCHEMES = [Scheme(4, 64), Scheme(8, 16, True), Scheme(3, -1), Scheme(1.58, 16), Scheme(2, 32), Scheme.trellis(2.5)]
DTYPES = {np.float32: 0, np.float16: 1}
ROUNDED, DIRECT, PLUS_ONE = 1, 2, 3
SILU, GELU_TANH, RELU_SQUARED, CLAMPED = 0, 2, 4, 5


@pytest.fixture(autouse=True)
def _restore():
    yield
    _core.set_isa(None)
    _core.set_num_threads(1)


@dataclass
class Shape:
    """What a made-up decoder looks like; norms: kinds of the four norms of a block, None where there is none."""

    hidden: int = 40
    inner: int = 52
    heads: int = 6
    kv_heads: int = 2
    dim: int = 10  # not a whole number of vectors
    norms: tuple[int | None, ...] = (ROUNDED, None, ROUNDED, None)
    head_norms: int | None = None
    by_head: bool = True
    cap: float = 0.0
    residual: float = 1.0
    activation: int = SILU
    gated: bool = True
    joined: bool = False  # q, k, v in one layer, and gate, up
    windows: tuple[int, ...] = (0, 5, 0)
    ropes: tuple[int, ...] = (0, 1, -1)
    plain: bool = False
    experts: tuple[int, ...] = ()  # of each block; 0: an MLP
    chosen: int = 2
    shared: bool = False  # an MLP beside the experts
    over_all: bool = True
    divided: bool = True
    pairs: bool = False  # experts' gates and ups in turns
    sinks: bool = False
    late: bool = False  # biases are added to rounded products
    alpha: float = 0.0
    limit: float = 0.0


SHAPES = {
    "usual": Shape(),
    "norms of heads": Shape(head_norms=DIRECT, activation=GELU_TANH, norms=(DIRECT, None, DIRECT, None)),
    "norms around": Shape(norms=(PLUS_ONE,) * 4, cap=3.0, head_norms=PLUS_ONE, windows=(5, 0, 5), ropes=(1, 0, 1)),
    "norms after": Shape(norms=(None, ROUNDED, None, ROUNDED), head_norms=ROUNDED, by_head=False, residual=0.3),
    "no gate": Shape(gated=False, activation=RELU_SQUARED, norms=(0, None, 0, None), kv_heads=6, plain=True),
    "joined": Shape(joined=True, hidden=130, inner=70, dim=24, kv_heads=3),
    "experts": Shape(experts=(5, 5, 5)),
    "experts beside an MLP": Shape(experts=(9, 0, 6), shared=True, divided=False, chosen=3, joined=True),
    "many experts": Shape(experts=(70, 0, 3), over_all=False, chosen=1, norms=(PLUS_ONE,) * 4, residual=0.5),
    "experts in pairs": Shape(
        experts=(6, 6, 6), gated=False, pairs=True, sinks=True, late=True, activation=CLAMPED, alpha=1.7, limit=0.8
    ),
    "sinks": Shape(sinks=True, kv_heads=3, windows=(5, 0, 4)),
    "experts without gates": Shape(experts=(4, 4, 4), gated=False, activation=RELU_SQUARED, plain=True, chosen=4),
}


@dataclass
class Decoder:
    """A decoder for the core, and the same numbers in float64 for the oracle."""

    shape: Shape
    dtype: type
    mode: str
    seed: int = 0
    linears: list = field(default_factory=list)
    weights: list = field(default_factory=list)

    def __post_init__(self):
        self.random = np.random.default_rng(self.seed)
        self.places, counts = [], {}
        for window in self.shape.windows:
            room = sorted(set(self.shape.windows)).index(window)
            self.places.append((room, counts.get(room, 0)))
            counts[room] = counts.get(room, 0) + 1
        self.blocks = [self.block(i) for i in range(len(self.shape.windows))]
        self.final = self.norm(ROUNDED, self.shape.hidden)
        s = self.shape
        self.sizes = (s.hidden, s.heads, s.kv_heads, s.dim, s.by_head, s.dim**-0.5, s.cap, s.residual)
        self.sizes += (s.activation, s.alpha, s.limit, DTYPES[self.dtype])
        self.core = _core.decoder(self.sizes, tuple(self.linears), tuple(self.blocks), self.final)

    def linear(self, rows: int, cols: int, plain: bool = False) -> int:
        weight = self.random.standard_normal((rows, cols)).astype(np.float32) / cols**0.5
        number = len(self.linears)
        bias = None if number % 2 else self.random.standard_normal(rows).astype(np.float32) * 0.1
        if plain or (self.shape.plain and number % 3 == 0):
            weight = weight.astype(self.dtype)
            self.linears.append(("plain", weight, bias))
        else:
            scheme = SCHEMES[number % len(SCHEMES)]
            q = bitween.quantize(weight, scheme, method="trellis" if scheme.coding == "trellis" else "rtn")
            weight, rest = q.dequantize(), (cols, bias, MODES[self.mode])
            if scheme.coding == "trellis":
                self.linears.append(("trellis", q.codes, q.scales.reshape(-1), q.zeros, scheme.width, *rest))
            else:
                self.linears.append(("packed", q.codes, q.scales, q.zeros, scheme.key, *rest))
        if self.shape.late:
            self.linears[-1] += (True,)
        self.weights.append((weight.astype(np.float64), 0 if bias is None else bias.astype(np.float64)))
        return number

    def norm(self, kind: int | None, width: int):
        if kind is None:
            return None
        gain = self.random.standard_normal(width) * 0.2 + (0 if kind == PLUS_ONE else 1)
        return kind, 1e-5, gain.astype(self.dtype) if kind else None

    def parts(self, rows: list[int], cols: int, joined: bool) -> list[tuple]:
        if not joined:
            return [(self.linear(n, cols), 0, n) for n in rows]
        number = self.linear(sum(rows), cols)
        return [(number, sum(rows[:i]), n) for i, n in enumerate(rows)]

    def block(self, index: int) -> tuple:
        s = self.shape
        q, kv = s.heads * s.dim, s.kv_heads * s.dim
        parts = [*self.parts([q, kv, kv], s.hidden, s.joined), (self.linear(s.hidden, q), 0, s.hidden)]
        n = s.experts[index] if s.experts else 0
        parts += self.mlp(s.inner) if s.shared or not n else [None] * 3
        mixture = self.mixture(n) if n else None
        sinks = self.random.standard_normal(s.heads).astype(self.dtype) if s.sinks else None
        before, after, before_mlp, after_mlp = (self.norm(kind, s.hidden) for kind in s.norms)
        widths = (s.dim, s.dim) if s.by_head else (q, kv)
        heads = [self.norm(s.head_norms, width) for width in widths]
        norms = (before, *heads, after, before_mlp, after_mlp)
        return tuple(parts), norms, s.windows[index], s.ropes[index], *self.places[index], mixture, sinks

    def mlp(self, inner: int) -> list[tuple | None]:
        s = self.shape
        first = [None] * (not s.gated) + self.parts([inner * (1 + s.pairs)] * (1 + s.gated), s.hidden, s.joined)
        return [*first, (self.linear(s.hidden, inner), 0, s.hidden)]

    def mixture(self, n: int) -> tuple:
        """Experts of several widths, all narrower than an MLP."""
        s = self.shape
        gate = (self.linear(1, s.hidden), 0, 1) if s.shared else None
        experts = tuple(tuple(self.mlp(s.inner - 1 - e % 20)) for e in range(n))
        router = (self.linear(n, s.hidden, plain=True), 0, n)
        return router, gate, experts, s.chosen, s.over_all, s.divided, s.pairs, DTYPES[self.dtype]


# ---- the oracle ----


def normed(norm, x):
    if norm is None:
        return x
    kind, eps, gain = norm
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return y if kind == 0 else y * (gain.astype(np.float64) + (kind == PLUS_ONE))


def product(decoder: Decoder, part, x):
    number, first, rows = part
    weight, bias = decoder.weights[number]
    return (x @ weight.T + bias)[..., first : first + rows]


def activated(kind: int, x):
    if kind == SILU:
        return x / (1 + np.exp(-x))
    if kind == GELU_TANH:
        return x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return np.maximum(x, 0) ** 2


def rotated(x, rope):
    """x (batch, new, heads, dim); rope: cosines and sines (batch, new, n)."""
    cosine, sine = (t[:, :, None].astype(np.float64) for t in rope)
    n = cosine.shape[-1]
    turned = np.concatenate([-x[..., n // 2 : n], x[..., : n // 2]], -1)
    return np.concatenate([x[..., :n] * cosine + turned * sine, x[..., n:]], -1)


def attended(s: Shape, window, q, keys, values, padding, sinks):
    """q (batch, new, heads, dim); keys, values (batch, kv_heads, text, dim), the text ending with the new tokens."""
    text, new = keys.shape[2], q.shape[1]
    group = s.heads // s.kv_heads
    scores = np.einsum("bnhd,bhtd->bhnt", q, keys.repeat(group, 1)) * s.dim**-0.5
    if s.cap:
        scores = np.tanh(scores / s.cap) * s.cap
    own, other = np.arange(text - new, text)[:, None], np.arange(text)[None]
    seen = (other <= own) & ((other > own - window) if window else True)
    seen = seen[None] & (other[None] >= padding[:, None, None])
    scores = np.where(seen[:, None], scores, -np.inf)
    if sinks is not None:
        sinks = np.broadcast_to(sinks.astype(np.float64)[:, None, None], (*scores.shape[:3], 1))
        scores = np.concatenate([scores, sinks], -1)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights = (weights / weights.sum(-1, keepdims=True))[..., :text]
    return np.einsum("bhnt,bhtd->bnhd", weights, values.repeat(group, 1))


def mlp(decoder: Decoder, parts, x):
    s = decoder.shape
    up = product(decoder, parts[1], x)
    if s.pairs:
        gate, up = np.minimum(up[..., ::2], s.limit), np.clip(up[..., 1::2], -s.limit, s.limit)
        return product(decoder, parts[2], (up + 1) * gate / (1 + np.exp(-s.alpha * gate)))
    gate = activated(s.activation, product(decoder, parts[0], x) if s.gated else up)
    return product(decoder, parts[2], gate * up if s.gated else gate)


def advised(decoder: Decoder, parts, mixture, x, choose=None):
    """What experts say, every expert asked, and the MLP beside them."""
    router, shared_gate, experts, chosen, over_all, divided, _, _ = mixture
    logits = product(decoder, router, x)
    best = choose(logits) if choose else np.argsort(-logits, -1, kind="stable")[..., :chosen]
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    own = np.take_along_axis(weights, best, -1)
    total = own if divided or not over_all else weights
    own /= total.sum(-1, keepdims=True)
    said = np.stack([mlp(decoder, expert, x) for expert in experts], -2)
    y = (np.take_along_axis(said, best[..., None], -2) * own[..., None]).sum(-2)
    if parts[1] is None:
        return y
    return y + mlp(decoder, parts, x) / (1 + np.exp(-product(decoder, shared_gate, x)))


def forward(decoder: Decoder, x, text, ropes, padding, choose=None):
    """x (batch, new, hidden) in float64; text: keys and values of each block, to which the new ones are appended."""
    s = decoder.shape
    h = x
    for index, (parts, norms, window, rope, _, _, mixture, sinks) in enumerate(decoder.blocks):
        before, q_norm, k_norm, after, before_mlp, after_mlp = norms
        look = normed(before, h)
        q, k, v = (product(decoder, part, look) for part in parts[:3])
        if not s.by_head:
            q, k = normed(q_norm, q), normed(k_norm, k)
        q, k, v = (t.reshape(*t.shape[:2], -1, s.dim) for t in (q, k, v))
        if s.by_head:
            q, k = normed(q_norm, q), normed(k_norm, k)
        if rope >= 0:
            q, k = rotated(q, ropes[rope]), rotated(k, ropes[rope])
        text[index] = [np.concatenate([old, t.swapaxes(1, 2)], 2) for old, t in zip(text[index], (k, v), strict=True)]
        mixed = attended(s, window, q, *text[index], padding, sinks)
        y = product(decoder, parts[3], mixed.reshape(*mixed.shape[:2], -1))
        h = h + s.residual * normed(after, y)
        look = normed(before_mlp, h)
        y = advised(decoder, parts[4:], mixture, look, choose) if mixture else mlp(decoder, parts[4:], look)
        h = h + s.residual * normed(after_mlp, y)
    return normed(decoder.final, h)


# ---- steps both ways ----


def tables(random, batch: int, new: int, n: int):
    angle = random.uniform(0, 6, (batch, new, n // 2))
    angle = np.concatenate([angle, angle], -1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


class Steps:
    """A decoder's steps after a text of random keys and values, by the core and by the oracle."""

    def __init__(self, decoder: Decoder, batch: int, seen: int, padding: bool) -> None:
        s = decoder.shape
        self.decoder, self.batch, self.seen = decoder, batch, seen
        self.random = np.random.default_rng(5)
        self.padding = np.arange(batch) % 3 if padding else None
        shape = (2, batch, s.kv_heads, seen, s.dim)
        made = [self.random.standard_normal(shape).astype(decoder.dtype) for _ in decoder.blocks]
        self.text = [[t.astype(np.float64) for t in pair] for pair in made]
        self.rooms = []
        for number, window in enumerate(sorted(set(s.windows))):
            # Of a window only what is still seen is kept, after a row that nobody may read.
            kept = min(seen, window - 1) if window else seen
            mine = [t for t, place in zip(made, decoder.places, strict=True) if place[0] == number]
            data = np.full((len(mine), 2, batch, s.kv_heads, kept + 30, s.dim), np.nan, decoder.dtype)
            data[:, :, :, :, 1 : 1 + kept] = np.stack(mine)[:, :, :, :, seen - kept :]
            self.rooms.append([data, 1, 1 + kept, 1 + seen])

    def step(self, new: int):
        """(by the core, by the oracle), (batch, new, hidden) each."""
        d = self.decoder
        x = self.random.standard_normal((self.batch, new, d.shape.hidden)).astype(d.dtype)
        ropes = [tables(self.random, self.batch, new, n) for n in (d.shape.dim, d.shape.dim // 4 * 2)]
        out = np.full_like(x, np.nan)
        flat = tuple((*(t.reshape(-1, t.shape[-1]) for t in pair), i == 1) for i, pair in enumerate(ropes))
        # Row 0 of a room counts as a token of the text: so does one more token of padding.
        padding = None if self.padding is None else self.padding + 1
        _core.decode(d.core, x, out, flat, tuple(map(tuple, self.rooms)), padding)
        for room in self.rooms:
            room[2] += new
            room[3] += new
        hidden = np.zeros(self.batch, int) if self.padding is None else self.padding
        return out, forward(d, x.astype(np.float64), self.text, ropes, hidden)


def miss(got, want) -> float:
    assert np.isfinite(got).all()
    return float(np.sqrt(((got - want) ** 2).mean() / (want**2).mean()))


def typical_miss(made) -> float:
    """The median over tokens: one whose choice of experts was close may have fallen to another by rounding."""
    got, want = (np.concatenate([x.reshape(-1, x.shape[-1]) for x in side]) for side in zip(*made, strict=True))
    assert np.isfinite(got).all()
    return float(np.sqrt(np.median(((got - want) ** 2).mean(-1) / (want**2).mean(-1))))


BOUNDS = {"exact": 1e-5, "int16": 5e-4, "int8": 0.03}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", BOUNDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_equal_a_forward_in_float64(shape, mode, isa):
    _core.set_isa(isa)
    _core.set_num_threads(2)
    steps = Steps(Decoder(SHAPES[shape], np.float32, mode), batch=2, seen=9, padding=shape != "usual")
    made = [steps.step(new) for new in (1, 3, 1, 8)]
    if mode == "int8" and SHAPES[shape].experts:
        assert typical_miss(made) < BOUNDS[mode]
    else:
        assert max(miss(*pair) for pair in made) < BOUNDS[mode]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_steps_in_float16(shape, isa):
    _core.set_isa(isa)
    steps = Steps(Decoder(SHAPES[shape], np.float16, "int16"), batch=3, seen=20, padding=True)
    made = [steps.step(new) for new in (1, 5, 1)]
    assert (typical_miss(made) if SHAPES[shape].experts else max(miss(*pair) for pair in made)) < 0.01


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES)
def test_any_number_of_threads_gives_the_same_bytes(shape, isa):
    _core.set_isa(isa)
    results = []
    for threads in (1, 2, 8):
        _core.set_num_threads(threads)
        steps = Steps(Decoder(SHAPES[shape], np.float32, "int16"), batch=1, seen=40, padding=False)
        made = [steps.step(new)[0].tobytes() for new in (1, 2, 1, 16)]
        results.append((made, [room[0].tobytes() for room in steps.rooms]))
    assert results[0] == results[1] == results[2]


def test_refused_calls_write_nothing():
    steps = Steps(Decoder(SHAPES["usual"], np.float32, "int16"), batch=2, seen=9, padding=False)
    x, out = np.ones((2, 1, 40), np.float32), np.full((2, 1, 40), 7, np.float32)
    rope = (np.ones((2, 10), np.float32), np.ones((2, 10), np.float32), False)
    rooms = tuple(map(tuple, steps.rooms))
    before = [room[0].tobytes() for room in rooms]
    full = tuple((data, start, data.shape[4], data.shape[4]) for data, start, _, _ in rooms)
    wide = (np.ones((2, 12), np.float32), np.ones((2, 12), np.float32), False)
    cases = {
        "one table too few": (x, out, (rope,), rooms),
        "a table wider than a head": (x, out, (rope, wide), rooms),
        "a room too few": (x, out, (rope, rope), rooms[:1]),
        "no row left": (x, out, (rope, rope), full),
        "rooms of another batch": (x[:1].copy(), out[:1].copy(), (rope, rope), rooms),
        "rooms twice": (x, out, (rope, rope), (rooms[0], rooms[0])),
        "too many tokens": (np.ones((2, 9, 40), np.float32), np.ones((2, 9, 40), np.float32), (rope, rope), rooms),
        "padding of another batch": (x, out, (rope, rope), rooms, np.zeros(3, np.int64)),
        "results over what is read": (x, x, (rope, rope), rooms),
        "another dtype": (x.astype(np.float16), out, (rope, rope), rooms),
    }
    for name, case in cases.items():
        with pytest.raises((ValueError, IndexError, TypeError)) as raised:
            _core.decode(steps.decoder.core, *case)
        assert str(raised.value), name
    assert (out == 7).all()
    assert [room[0].tobytes() for room in rooms] == before
    with pytest.raises(TypeError, match="what decoder"):
        _core.decode(None, x, out, (rope, rope), rooms)


def test_a_layer_of_another_shape_is_refused():
    class Wrong(Decoder):
        def linear(self, rows, cols, plain=False):
            return super().linear(rows, cols + (len(self.linears) == 8), plain)

    steps = Steps(Wrong(SHAPES["usual"], np.float32, "int16"), batch=1, seen=3, padding=False)
    with pytest.raises(ValueError, match="decode"):
        steps.step(1)
