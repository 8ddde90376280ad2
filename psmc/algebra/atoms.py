"""Constructors of the atoms that subscripts occur in, and of uninterpreted functions."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

from psmc.algebra.powers import power
from psmc.algebra.ring import REBUILD, Ring, lone
from psmc.algebra.terms import UNIT, ZERO, Atom, Mono, Poly, number
from psmc.ir import Index


def elem(ring: Ring, args: tuple[Any, ...], p: Fraction) -> Poly:
    """An element under a power; subscripts that are plain numbers or index values become that."""
    name, kind, conjugated, *subs = args
    atom = Atom("elem", (name, kind, conjugated, *map(_subscript, subs)), kind != "complex")
    known = ring.facts.values.get(atom)
    return power(ring, known, p) if known is not None else Poly({Mono(((atom, p),)): Fraction(1)})


def _subscript(s: Any) -> Any:
    if isinstance(s, Poly):
        if s.constant is not None and s.constant.denominator == 1:
            return int(s.constant)
        single = s.single
        if single and single[1] == 1 and len(single[0].factors) == 1 and not single[0].bound:
            atom, p = single[0].factors[0]
            if atom.tag == "index" and p == 1:
                return atom.args[0]
    return s


def eye(ring: Ring, args: tuple[Any, ...], p: Fraction) -> Poly:
    row, col = map(_subscript, args)
    if row == col:
        return UNIT
    if isinstance(row, int) and isinstance(col, int):
        return ZERO
    if any(isinstance(s, Index) and ring.facts.sizes.get(s.dim) == 1 for s in (row, col)):
        return UNIT
    row, col = sorted((row, col), key=_eye_rank)
    atom = Atom("eye", (row, col))
    return ZERO if atom in ring.facts.distinct else lone(atom)


def _eye_rank(s: Any) -> tuple[int, str]:
    return (0, "") if isinstance(s, int) else (1, s.name) if isinstance(s, Index) else (2, s.key)


def index_value(ring: Ring, args: tuple[Any, ...], p: Fraction) -> Poly:
    (s,) = args
    if isinstance(s, Poly):
        return power(ring, s, p)
    return power(ring, number(s), p) if isinstance(s, int) else Poly({Mono(((Atom("index", (s,)), p),)): Fraction(1)})


def opaque(tag: str) -> Callable[[Ring, tuple[Any, ...], Fraction], Poly]:
    def rebuild(ring: Ring, args: tuple[Any, ...], p: Fraction) -> Poly:
        real = all(a.real for a in args if isinstance(a, Poly))
        return Poly({Mono(((Atom(tag, args, real), p),)): Fraction(1)})

    return rebuild


REBUILD |= {"elem": elem, "eye": eye, "index": index_value}
REBUILD |= {tag: opaque(tag) for tag in ("flog", "pow", "erf", "clog", "conj")}
