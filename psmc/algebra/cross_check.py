"""A proof, held against the checker of certificates before it is printed.

The checker shares nothing with the prover, not even the intervals that it called closed. Only what contradicts a proof
counts here: that a rule is too large for it, or has no value at its points, does not.
"""

from __future__ import annotations

from decimal import localcontext
from typing import Any

from psmc import checker
from psmc.algebra.certificate import certificate_of
from psmc.algebra.prover import deep_recursion
from psmc.algebra.verdict import Proof, Proved
from psmc.ir import Aggregator

_POINTS = 8
_SEEDS = range(3)
_WORK = 150_000  # steps of the checker for a seed: some tenths of a second
# As the checker words it. Sides that agree at a point and not around it do not count: the point may be a special one.
_CONTRADICTIONS = (": the sides differ, ", " is not closed: ")


def contradictions(agg: Aggregator, proof: Proof) -> dict[str, str]:
    """By law, 'associativity' or 'identity': what the checker finds wrong with a proof of it."""
    laws = [law for law in checker.LAWS if isinstance(getattr(proof, law), Proved)]
    if not laws:
        return {}
    with deep_recursion(), localcontext(checker.DIGITS):
        (entry,) = certificate_of(agg, proof)["aggregators"]
        said = {law: _objection(entry, law) for law in laws} if "combine" in entry else {}
    return {law: why for law, why in said.items() if why is not None}


def _objection(entry: dict[str, Any], law: str) -> str | None:
    for seed in _SEEDS:
        try:
            checker.examine(entry, law, seed, _POINTS, [_WORK])
        except checker.Refused as refused:
            if any(words in str(refused) for words in _CONTRADICTIONS):
                return str(refused)
        else:
            return None
    return None
