"""Certify from held-out text that a model's perplexity increase stays within a budget.

Pure statistics on paired differences: for each window of text, the mean over its tokens of
ln p_reference - ln p_quantized. Their mean over all tokens is the rise of the log perplexity, in nats per token;
exp(rise) - 1 is the relative increase of the perplexity. Accepted is only what a one-sided upper bound puts
within the budget, ln(1 + largest increase allowed).

The guarantee, at 95 % confidence say: if a model's true increase on text like the held-out one exceeds the
budget, it is accepted with probability at most 5 %. It rests on the documents being a random sample of that text,
and, as the differences have no largest possible value, on enough of them for their mean to be nearly normal.
Simulated at the budget itself (docs/certificate.md), heavy tails, alike windows and skewness towards damage keep the
promise from few documents on, as what an estimated skewness misses is added to it (`_quantile`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from scipy.special import ndtri, stdtrit

from bitween.gradual.proof.spending import error_levels

__all__ = ["Bound", "Certificate", "Look", "TooLittleText", "bootstrap_bound", "bound", "certify", "certify_in_order"]

MIN_WINDOWS = 8  # below, the spread of the differences can't be told
MIN_DOCUMENTS = 5  # below, windows are taken as independent, as there is nothing else to go by

Measure = Callable[[int, int], np.ndarray]


class TooLittleText(ValueError):
    """Too few windows for an interval; `needed` says how many there must be."""

    def __init__(self, windows: int, needed: int = MIN_WINDOWS) -> None:
        super().__init__(f"differences: expected at least {needed} windows of text for a bound; got {windows}")
        self.needed = needed


@dataclass(frozen=True)
class Bound:
    """Estimate of the mean difference with its one-sided upper bound.

    Attributes
    ----------
    increase, bound : float
        Mean over tokens and its upper bound, nats per token.
    standard_error : float
        Of the mean, nats per token.
    confidence : float
        Probability that the bound is not below the truth.
    clusters : int
        Independent pieces of text that the error was computed from.
    by : str
        What these pieces are: "documents", or "windows" where there are too few documents.
    freedom, skewness : float
        Degrees of freedom of the error, and skewness of the mean's sampling distribution.
    """

    increase: float
    bound: float
    standard_error: float
    confidence: float
    clusters: int
    by: str
    freedom: float
    skewness: float

    @property
    def perplexity_increase(self) -> float:
        """Relative increase of the perplexity, exp(increase) - 1."""
        return math.expm1(self.increase)

    @property
    def perplexity_bound(self) -> float:
        """Upper bound of the relative increase of the perplexity, exp(bound) - 1."""
        return math.expm1(self.bound)

    def upper(self, level: float) -> float:
        """Upper bound that the truth exceeds with probability `level`, nats per token."""
        return self.increase + self._margin(level, self.skewness)

    def lower(self, level: float) -> float:
        """Lower bound that the truth falls below with probability `level`, nats per token."""
        return self.increase - self._margin(level, -self.skewness)

    def _margin(self, level: float, skewness: float) -> float:
        return self.standard_error * _quantile(level, self.freedom, skewness) if self.standard_error else 0.0


def _quantile(level: float, freedom: float, skewness: float) -> float:
    """Student's quantile, moved outwards where skewness makes the tail in question longer, and by what it may miss.

    The first Cornish-Fisher term corrects for a skewness that is known. One that is estimated is too low where it
    matters, since the large values that make it are those that a small sample lacks; so it counts three times, and two
    standard errors of it (sqrt(6 / n), for a sum of n by sqrt(n) less) are added. Both were chosen by simulation.
    """
    t = -float(stdtrit(freedom, level)) if level > 0 else math.inf
    return t + max(3 * skewness + 2 * math.sqrt(6) / (freedom + 1), 0.0) * (1 + 2 * t * t) / 6


def bound(
    differences: np.ndarray, tokens: np.ndarray, documents: np.ndarray | None = None, confidence: float = 0.95
) -> Bound:
    """Mean difference over all tokens with its one-sided upper bound.

    Parameters
    ----------
    differences : float (windows,)
        Mean over each window's tokens of ln p_reference - ln p_quantized, nats.
    tokens : int (windows,)
        Tokens scored in each window.
    documents : (windows,), optional
        Document of each window. Windows of one document are alike, so documents are what counts as independent
        if there are at least 5; otherwise, and if left out, windows are.
    confidence : float
        Between 0.5 and 1.

    Raises
    ------
    TooLittleText
        Fewer than 8 windows.
    ValueError
        Shapes that differ, differences that are not finite, or tokens that are not positive.

    Notes
    -----
    The mean is a ratio of sums over clusters. Its variance is the delete-one jackknife's, its degrees of freedom
    those of clusters of unequal size. As the mean of skewed data errs more often on one side, the quantile takes
    the first Cornish-Fisher term for the studentised mean (Johnson 1978; Hall 1983) where that widens the bound, with a
    skewness that allows for its own error (`_quantile`).
    """
    if not 0.5 < confidence < 1:
        raise ValueError(f"confidence: expected a probability between 0.5 and 1; got {confidence}")
    size, excess, by = _clusters(differences, tokens, documents)
    n, share = len(size), size / size.sum()
    increase = float(excess.sum() / size.sum())
    influence = (excess - increase * size) / size.sum()
    error = math.sqrt((n - 1) / n * float(np.sum((influence / (1 - share)) ** 2)))
    freedom = max(1 / float(np.sum(share**2)) - 1, 1.0)
    skewness = _skewness(influence, freedom)
    upper = increase + error * _quantile(1 - confidence, freedom, skewness)
    return Bound(increase, upper, error, confidence, n, by, freedom, skewness)


def _skewness(influence: np.ndarray, freedom: float) -> float:
    """Skewness of the sum of the influences; freed of the bias that it has in small samples (Fisher)."""
    square = float(np.sum(influence**2))
    if square == 0:
        return 0.0
    n = freedom + 1
    return float(np.sum(influence**3)) / square**1.5 * (n * n / ((n - 1) * (n - 2)) if n > 3 else 4.5)


def _clusters(
    differences: np.ndarray, tokens: np.ndarray, documents: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray, str]:
    """Tokens and summed difference of each independent piece of text, and what the pieces are."""
    differences, tokens = np.asarray(differences, np.float64), np.asarray(tokens, np.float64)
    for name, values in (("tokens", tokens), ("documents", documents)):
        if values is not None and (np.shape(values) != differences.shape or differences.ndim != 1):
            raise ValueError(f"{name}: expected one per window, {differences.shape}; got {np.shape(values)}")
    if not np.isfinite(differences).all():
        raise ValueError(f"differences: expected finite numbers; got one in window {_first(~np.isfinite(differences))}")
    if not (tokens > 0).all():
        raise ValueError(f"tokens: expected at least 1 in each window; got none in window {_first(~(tokens > 0))}")
    if len(differences) < MIN_WINDOWS:
        raise TooLittleText(len(differences))
    sums = tokens * differences
    if documents is not None:
        names, place = np.unique(np.asarray(documents), return_inverse=True)
        if len(names) >= MIN_DOCUMENTS:
            return np.bincount(place, tokens), np.bincount(place, sums), "documents"
    return tokens, sums, "windows"


def _first(mask: np.ndarray) -> int:
    return int(np.flatnonzero(mask)[0])


def bootstrap_bound(
    differences: np.ndarray,
    tokens: np.ndarray,
    documents: np.ndarray | None = None,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> float:
    """Upper bound by the studentised bootstrap over the same clusters: a check on `bound`.

    Parameters as for `bound`. Returns nats per token. It assumes no shape of the distribution, but varies with
    the seed and is rough for fewer than about 20 clusters.
    """
    estimate = bound(differences, tokens, documents, confidence)
    size, excess, _ = _clusters(differences, tokens, documents)
    n = len(size)
    times = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), resamples).astype(float)
    total = times @ size
    mean = times @ excess / total
    error = np.sqrt(np.sum(times * (excess - mean[:, None] * size) ** 2, axis=1) * n / (n - 1)) / total
    plain = math.sqrt(np.sum((excess - estimate.increase * size) ** 2) * n / (n - 1)) / size.sum()
    usable = error > 0
    if not usable.any():
        return estimate.increase
    student = (mean[usable] - estimate.increase) / error[usable]
    return float(estimate.increase - plain * np.quantile(student, 1 - confidence))


@dataclass(frozen=True)
class Look:
    """State of the evidence after some of the text: counts, mean and bound in nats, level of this look's test."""

    windows: int
    tokens: int
    clusters: int
    increase: float
    bound: float
    level: float


@dataclass(frozen=True)
class Certificate:
    """What held-out text says about a model's perplexity increase.

    Attributes
    ----------
    text : str
        Where the text comes from.
    tokens, windows, documents : int
        How much of it was used; documents is 0 where they are unknown.
    increase, bound, budget : float
        Rise of the log perplexity, its upper bound as of the last look, and the largest rise allowed; nats per
        token. `perplexity_increase`, `perplexity_bound` and `perplexity_budget` give them as fractions.
    confidence : float
        Of the whole procedure, all looks together.
    verdict : str
        "accepted": the bound is within the budget. "refused": the increase is above it, by the estimate on all of
        the text or clearly before. "undecided": the estimate is within it, but the text does not suffice.
    looks : tuple of Look
    by : str
        What counted as independent: "documents" or "windows".
    needed_tokens : int or None
        If undecided: tokens of such text that would probably do, judged by the spread seen.
    worst : str
        The domain that numbers, looks and `needed_tokens` are of, where there are several; else "".
    domains : dict of str to Certificate
        The certificate of each domain, where there are several.
    tails : tuple of Tail
        Bounds beside the mean's (`bitween.gradual.proof.tails`); of several domains each has its own.
    of : str
        What was measured: "perplexity", or what else stands in the place of nats per token ("damage, nats of KL").
    """

    text: str
    tokens: int
    windows: int
    documents: int
    increase: float
    bound: float
    budget: float
    confidence: float
    verdict: str
    looks: tuple[Look, ...]
    by: str
    needed_tokens: int | None = None
    worst: str = ""
    domains: Mapping[str, Certificate] = field(default_factory=dict)
    tails: tuple = ()
    of: str = "perplexity"

    @property
    def accepted(self) -> bool:
        """True if the verdict is "accepted"."""
        return self.verdict == "accepted"

    @property
    def perplexity_increase(self) -> float:
        """Estimated relative increase of the perplexity."""
        return _expm1(self.increase)

    @property
    def perplexity_bound(self) -> float:
        """Upper bound of the relative increase of the perplexity."""
        return _expm1(self.bound)

    @property
    def perplexity_budget(self) -> float:
        """Largest relative increase of the perplexity allowed."""
        return _expm1(self.budget)

    def to_dict(self) -> dict:
        """Plain values for JSON, perplexity fractions included; what is not finite becomes None."""
        values = asdict(replace(self, domains={}, tails=()))
        values["looks"] = [{key: _plain(value) for key, value in look.items()} for look in values["looks"]]
        for name in ("perplexity_increase", "perplexity_bound", "perplexity_budget"):
            values[name] = getattr(self, name)
        parts = {name: {**part.to_dict(), "text_line": str(part)} for name, part in self.domains.items()}
        return {key: _plain(value) for key, value in values.items()} | {
            "domains": parts,
            "tails": [tail.to_dict() for tail in self.tails],
        }

    def __str__(self) -> str:
        if self.of != "perplexity":
            line = (
                f"{self.verdict}: {self.of} {self.increase:.4g}, at most {self.bound:.4g} with {self.confidence:.4g} "
                f"confidence; budget {self.budget:.4g}; {self.windows} examples"
            )
            line += f" from {self.text}" if self.text else ""
            return line + (f"; about {self.needed_tokens:,} would do" if self.needed_tokens else "")
        amount = f"{self.tokens:,} tokens in {self.windows} windows"
        amount += f" of {self.documents} documents" if self.documents else ""
        where = f" in {self.worst}, the worst of {len(self.domains)} domains" if self.worst else ""
        line = (
            f"{self.verdict}: perplexity {self.perplexity_increase:+.2%}, at most {self.perplexity_bound:+.2%} "
            f"with {self.confidence:.4g} confidence{where}; budget {self.perplexity_budget:+.2%}; {amount}"
        )
        line += f" from {self.text}" if self.text else ""
        more = f" of {self.worst}" if self.worst else ""
        return line + (f"; about {self.needed_tokens:,} tokens{more} would do" if self.needed_tokens else "")


def _expm1(value: float) -> float:
    return math.expm1(value) if value < 700 else math.inf


def _plain(value: object) -> object:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def certify(
    measure: Measure,
    tokens: Sequence[int],
    documents: Sequence | None = None,
    *,
    budget: float,
    confidence: float = 0.95,
    looks: int = 3,
    spending: str = "late",
    text: str = "",
    of: str = "perplexity",
) -> Certificate:
    """Draw text until it is clear whether the increase is within the budget, or the text ends.

    Parameters
    ----------
    measure : callable
        measure(start, stop) returns the differences of windows start to stop - 1, float (stop - start,), nats.
    tokens : int (windows,)
        Tokens scored in each window of all the text there is.
    documents : (windows,), optional
        Document of each window; windows of one document stand together, documents in random order.
    budget : float
        Largest increase allowed, nats per token: ln(1 + largest relative increase of the perplexity).
    confidence : float
        1 - probability of accepting a model whose increase is above the budget, all looks together.
    looks : int
        How many times at most the evidence is judged, at equal shares of the tokens.
    spending : str
        "late" saves the error probability for the last look, "even" spends it evenly: see `error_levels`.
    text : str
        Where the text comes from.
    of : str
        What the differences are of, for the certificate's words.

    Raises
    ------
    ValueError
        No windows, shapes that differ, or a confidence outside 0.5 to 1.
    """
    tokens = np.asarray(tokens)
    if tokens.ndim != 1 or not len(tokens) or not (tokens > 0).all():
        raise ValueError("tokens: expected at least one window, each with at least 1 token")
    if documents is not None and len(documents) != len(tokens):
        raise ValueError(f"documents: expected one per window, {len(tokens)}; got {len(documents)}")
    if not 0.5 < confidence < 1 or looks < 1 or math.isnan(budget):
        raise ValueError(f"expected 0.5 < confidence < 1, looks >= 1, a budget; got {confidence}, {looks}, {budget}")
    documents = None if documents is None else np.unique(np.asarray(documents), return_inverse=True)[1]
    trial = _Trial(text, tokens, documents, budget, confidence, of)
    stops = _stops(tokens, trial.clusters, looks)
    shares = tuple(float(tokens[:stop].sum() / tokens.sum()) for stop in stops)
    levels = error_levels(shares, 1 - confidence, spending)
    for stop, level in zip(stops, levels, strict=True):
        start = len(trial.differences)
        new = np.asarray(measure(start, stop), np.float64)
        if new.shape != (stop - start,):
            raise ValueError(f"measure: expected {stop - start} differences; got shape {new.shape}")
        trial.differences = np.concatenate([trial.differences, new])
        certificate = trial.judge(level, last=stop == len(tokens))
        if certificate.verdict != "undecided":
            break
    return certificate


def _stops(tokens: np.ndarray, clusters: np.ndarray, looks: int) -> list[int]:
    """Windows read at each look: near equal shares of the tokens, between clusters, never too few for a bound."""
    ends = np.append(np.flatnonzero(clusters[1:] != clusters[:-1]) + 1, len(tokens))
    enough = [end for end in ends if end >= MIN_WINDOWS and len(np.unique(clusters[:end])) >= MIN_DOCUMENTS]
    if not enough:
        return [len(tokens)]
    read = np.cumsum(tokens)[np.array(enough) - 1]
    wanted = np.cumsum(tokens)[-1] * np.arange(1, looks + 1) / looks
    return sorted({enough[int(np.argmin(np.abs(read - share)))] for share in wanted} | {len(tokens)})


class _Trial:
    """Evidence gathered about one model."""

    def __init__(
        self, text: str, tokens: np.ndarray, documents: np.ndarray | None, budget: float, confidence: float, of: str
    ) -> None:
        self.of = of
        self.text, self.tokens, self.documents = text, tokens, documents
        self.budget, self.confidence = budget, confidence
        self.differences = np.zeros(0)
        self.looks: list[Look] = []
        few = documents is None or len(np.unique(documents)) < MIN_DOCUMENTS
        self.clusters = np.arange(len(tokens)) if few else documents
        self.by = "windows" if few else "documents"

    def judge(self, level: float, last: bool) -> Certificate:
        """Verdict on what has been measured so far."""
        tokens = self.tokens[: len(self.differences)]
        if not np.isfinite(self.differences).all():  # a model that fails on some window has no perplexity at all
            self._note(math.inf, math.inf, level)
            return self._certificate("refused")
        if len(tokens) < MIN_WINDOWS:
            self._note(float(np.average(self.differences, weights=tokens)), math.inf, level)
            return self._certificate("undecided", math.ceil(MIN_WINDOWS * tokens.mean()))
        found = bound(self.differences, tokens, self.clusters[: len(tokens)], self.confidence)
        upper = found.upper(level)
        self._note(found.increase, upper, level)
        if upper <= self.budget:
            return self._certificate("accepted")
        if found.lower(1 - self.confidence) > self.budget or (last and found.increase >= self.budget):
            return self._certificate("refused")
        return self._certificate("undecided", self._needed(found))

    def _needed(self, found: Bound) -> int | None:
        """Tokens at which the bound would reach the budget, if mean and spread stay; a normal quantile."""
        room = self.budget - found.increase
        if room <= 0:
            return None
        reach = -float(ndtri(1 - self.confidence)) * found.standard_error / room
        tokens = int(self.tokens[: len(self.differences)].sum())
        return max(math.ceil(tokens * reach**2), tokens + 1)

    def _note(self, increase: float, upper: float, level: float) -> None:
        windows = len(self.differences)
        clusters = len(np.unique(self.clusters[:windows]))
        self.looks.append(Look(windows, int(self.tokens[:windows].sum()), clusters, increase, upper, level))

    def _certificate(self, verdict: str, needed: int | None = None) -> Certificate:
        look = self.looks[-1]
        documents = 0 if self.documents is None else len(np.unique(self.documents[: look.windows]))
        return Certificate(
            text=self.text,
            tokens=look.tokens,
            windows=look.windows,
            documents=documents,
            increase=look.increase,
            bound=look.bound,
            budget=self.budget,
            confidence=self.confidence,
            verdict=verdict,
            looks=tuple(self.looks),
            by=self.by,
            needed_tokens=needed,
            of=self.of,
        )


def certify_in_order(
    measures: Sequence[Measure], tokens: Sequence[int], documents: Sequence | None = None, **settings
) -> tuple[Certificate, ...]:
    """Certify candidates from the safest on, and stop at the first that is not accepted.

    As the order is fixed before the text is seen, and nothing is tested after the first failure, the probability that
    any model above the budget is accepted is at most 1 - confidence for all candidates together (fixed-sequence
    testing, Maurer, Hothorn and Lehmacher 1995): it takes accepting the first such model in the order.

    Parameters
    ----------
    measures : sequence of callable
        One per candidate, safest first, as for `certify`; called only when its turn comes.
    tokens, documents, **settings
        As for `certify`, the same for all.

    Returns
    -------
    tuple of Certificate : of the candidates tested, all accepted but perhaps the last; the last accepted is to be taken
    """
    certificates: list[Certificate] = []
    for measure in measures:
        certificates.append(certify(measure, tokens, documents, **settings))
        if not certificates[-1].accepted:
            break
    return tuple(certificates)
