"""Transitions that erase by the vectors with which they write: U Wᵀ = -B W'ᵀ, column by column.

Then S' = D S + B (C - W'ᵀ S)ᵀ, and a chunk has half as many columns as with U and B apart.
"""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

from psmc.ir import Assign, Expr, Index
from psmc.structure.products import Expansion, NotSeparableError, Product, collected, expand, total
from psmc.structure.report import Affine


def erasers(affine: Affine) -> tuple[Assign, ...] | None:
    """W' for each column of B; None where U is something else."""
    if not affine.rank or affine.rank != affine.injection.rank:
        return None
    rest = list(zip(affine.transition.left, affine.transition.right, strict=True))
    found: list[Assign] = []
    for b in affine.injection.left:
        for n, (u, w) in enumerate(rest):
            ratio = _ratio(u, b, affine.key)
            if ratio is not None:
                found.append(replace(w, value=_times(ratio.scaled(Fraction(-1)), w.value)))
                del rest[n]
                break
        else:
            return None
    return tuple(found)


def _ratio(u: Assign, b: Assign, key: Index) -> Product | None:
    """A number a token r with u = r b and nothing under a line; None if there is none."""
    try:
        above, below = (collected(expand(x.value, Expansion(opens=lambda _: True))) for x in (u, b))
    except NotSeparableError:
        return None
    if len(above) != len(below) or not below:
        return None
    for p in above:
        ratio = p * below[0].inverse()
        whole = all(power > 0 and key not in atom.free for atom, power in ratio.factors)
        if whole and collected(x * ratio for x in below) == above:
            return ratio
    return None


def _times(number: Product, w: Expr) -> Expr:
    return total(collected(x * number for x in expand(w, Expansion())))
