"""A proof, held against the checker of certificates before it is printed.

The checker shares nothing with the prover, not even the intervals that it called closed. Only what contradicts a proof
counts here: that a rule is too large for it, or has no value at its points, does not.
"""

from __future__ import annotations

from decimal import localcontext

from psmc import checker
from psmc.algebra.certificate import certificate_of
from psmc.algebra.prover import deep_recursion
from psmc.algebra.verdict import Proof, Proved
from psmc.ir import Aggregator

_POINTS = 8
_WORK = 150_000  # steps of the checker: some tenths of a second
_CONTRADICTIONS = (" fails for ", " is not closed: ")  # as the checker words them


def contradictions(agg: Aggregator, proof: Proof) -> dict[str, str]:
    """By law, 'associativity' or 'identity': what the checker finds wrong with a proof of it."""
    laws = [law for law in checker.LAWS if isinstance(getattr(proof, law), Proved)]
    found: dict[str, str] = {}
    if not laws:
        return found
    with deep_recursion(), localcontext(checker.DIGITS):
        (entry,) = certificate_of(agg, proof)["aggregators"]
        for law in laws if "combine" in entry else ():
            try:
                checker.examine(entry, law, 0, _POINTS, [_WORK])
            except checker.Refused as refused:
                if any(words in str(refused) for words in _CONTRADICTIONS):
                    found[law] = str(refused)
    return found
