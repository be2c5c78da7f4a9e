"""One certificate of several kinds of text: it holds for each of them.

The claim is that the increase is within its budget in every domain. It is accepted only where every domain's own test
accepts, and each of these is made at the full error rate. That needs no sharing of the rate (intersection-union test;
Berger 1982): where some domain is above its budget, whichever, accepting needs that domain's test to err, which happens
with probability at most 1 - confidence, and what the others do can only lower it. Likewise the largest of the bounds is
a bound of the largest increase: to be below it, it must be below the bound of that one domain. Rows of single domains
hold with the confidence each by itself, not all at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from bitween.gradual.proof.certificate import Certificate

__all__ = ["together"]

_WORST = ("accepted", "undecided", "refused")


def together(parts: Mapping[str, Certificate], text: str, domains: Sequence[str] = ()) -> Certificate:
    """The certificate of all domains.

    Parameters
    ----------
    parts : {domain: its own certificate}, at least one
    text : where the text comes from
    domains : all that the claim is about; one without a certificate leaves it undecided

    Returns
    -------
    Certificate
        Of a single domain its own. Of several: numbers of the domain that leaves least of its budget (`worst`); counts
        of all; "accepted" where all are, "refused" where one is; `domains` holds the parts.
    """
    missing = [name for name in domains if name not in parts]
    if len(parts) == 1 and not missing:
        return next(iter(parts.values()))
    name = max(parts, key=lambda key: (_WORST.index(parts[key].verdict), parts[key].bound - parts[key].budget))
    worst = parts[name]
    return replace(
        worst,
        text=text,
        tokens=sum(part.tokens for part in parts.values()),
        windows=sum(part.windows for part in parts.values()),
        documents=sum(part.documents for part in parts.values()),
        verdict="undecided" if missing and worst.verdict == "accepted" else worst.verdict,
        by="documents" if all(part.by == "documents" for part in parts.values()) else "windows",
        worst=name,
        domains=dict(parts),
    )
