"""The normal form's data: a Poly is a sum of coefficient × Mono, a Mono is Σ over indices of a product of Atom powers.

Equality is equality of `key`, a text in which bound indices are numbered, so that it is equality up to their renaming.
A binder is shown as `height.position`, where the height counts the binders below it: a nested text therefore never
depends on its context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from typing import Any

from psmc.ir import Index

Names = Mapping[Index, str]
_NONE: frozenset[Index] = frozenset()
_NO_NAMES: Names = {}


MAX_TERMS = 20_000  # of a Poly
_LONG = 1000  # characters of a Poly's text past which a digest stands for it: atoms repeat the texts of what they hold


class OutOfBudgetError(Exception):
    """Time or size limit reached."""


class Bag(tuple[Any, ...]):
    """An unordered collection: shown sorted."""

    __slots__ = ()


class Node:
    """Anything with a canonical text."""

    __slots__ = ("_hash", "free", "height", "key", "real")
    key: str
    free: frozenset[Index]
    height: int
    real: bool
    _hash: int

    def text(self, names: Names) -> str:
        raise AssertionError(f"{type(self).__name__} has no text")

    def __eq__(self, other: object) -> bool:
        return self is other or (type(other) is type(self) and other.key == self.key)

    def __hash__(self) -> int:
        return self._hash

    def __repr__(self) -> str:
        return self.key

    def _seal(self) -> None:
        self.key = self.text(_NO_NAMES)
        self._hash = hash(self.key)


def show(x: Any, names: Names) -> str:
    """Canonical text of a node, an index, a number, a string, or a tuple of such."""
    if isinstance(x, Node):
        return x.key if not names or x.free.isdisjoint(names) else x.text(names)
    if isinstance(x, Index):
        return names.get(x) or f"{x.name}:{x.dim}"
    if isinstance(x, Bag):
        return "{" + ",".join(sorted(show(y, names) for y in x)) + "}"
    if isinstance(x, tuple):
        return "(" + ",".join(show(y, names) for y in x) + ")"
    return str(x)


def indices_in(x: Any) -> frozenset[Index]:
    if isinstance(x, Node):
        return x.free
    if isinstance(x, Index):
        return frozenset((x,))
    if isinstance(x, tuple):
        return _NONE.union(*map(indices_in, x)) if x else _NONE
    return _NONE


def _height(x: Any) -> int:
    if isinstance(x, Node):
        return x.height
    return max(map(_height, x), default=0) if isinstance(x, tuple) else 0


class Atom(Node):
    """A tagged, indivisible quantity; `args` hold indices, numbers, names, Polys and tuples of them.

    elem     an element of an operand or a param: (name, kind, conjugated, *subscripts)
    i dim index prime            the imaginary unit, a dim's size, an index as a number, a prime under a root
    eye pos zero                 0 or 1: positions agree; the Poly is > 0; the (complex) Poly is 0
    exp log flog base            of one Poly; `flog` is the formal logarithm in integer powers, `base` a Poly in a power
    max      a Bag of `Term`s: the greatest of them
    prod     a product over one index
    anything else                an uninterpreted function of Polys
    """

    __slots__ = ("args", "tag")

    def __init__(self, tag: str, args: tuple[Any, ...] = (), real: bool = True) -> None:
        self.tag, self.args, self.real = tag, args, real
        self.free = indices_in(args)
        self.height = _height(args)
        self._seal()

    def text(self, names: Names) -> str:
        return self.tag + show(self.args, names)


Factors = tuple[tuple[Atom, Fraction], ...]


def _binders(bound: tuple[Index, ...], height: int, names: Names) -> Names:
    return {**names, **{b: f"{height}.{k}" for k, b in enumerate(bound)}} if bound else names


class Mono(Node):
    """Σ over `bound` (in canonical order) of the product of `factors`."""

    __slots__ = ("bound", "factors")

    def __init__(self, factors: Factors, bound: tuple[Index, ...] = ()) -> None:
        self.factors, self.bound = factors, bound
        self.free = _NONE.union(*(a.free for a, _ in factors)) - set(bound) if factors else _NONE
        self.height = max((a.height for a, _ in factors), default=0) + (1 if bound else 0)
        self.real = all(a.real for a, _ in factors)
        self._seal()

    def text(self, names: Names) -> str:
        inner = _binders(self.bound, self.height, names)
        body = "*".join(sorted(f"{show(a, inner)}^{p}" if p != 1 else show(a, inner) for a, p in self.factors))
        return f"S[{','.join(b.dim for b in self.bound)}]{body}" if self.bound else body

    def __lt__(self, other: Mono) -> bool:
        return self.key < other.key


ONE = Mono(())


def _digest(text: str) -> str:
    """Stands for a long text; what is looked for in texts (`bounds`, `equality`) stays to be found."""
    return " ".join([hashlib.sha256(text.encode()).hexdigest(), *(w for w in ("plog", "base") if w in text)])


class Poly(Node):
    """Σ coefficient · mono, no zero coefficients."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[Mono, Fraction]) -> None:
        if len(terms) > MAX_TERMS:
            raise OutOfBudgetError("an expression grew too large")
        self.terms = {m: terms[m] for m in sorted(terms) if terms[m]}
        self.free = _NONE.union(*(m.free for m in self.terms)) if self.terms else _NONE
        self.height = max((m.height for m in self.terms), default=0)
        self.real = all(m.real for m in self.terms)
        self._seal()

    def text(self, names: Names) -> str:
        try:
            body = "+".join(sorted(f"{show(m, names)}~{c}" for m, c in self.terms.items()))
        except ValueError:  # Python prints no more than 4300 digits
            raise OutOfBudgetError("a number grew too large") from None
        return f"[{_digest(body) if len(body) > _LONG else body}]"

    def __bool__(self) -> bool:
        return bool(self.terms)

    def __iter__(self) -> Iterator[tuple[Mono, Fraction]]:
        return iter(self.terms.items())

    def __len__(self) -> int:
        return len(self.terms)

    def __add__(self, other: Poly) -> Poly:
        if not other.terms:
            return self
        if not self.terms:
            return other
        out = dict(self.terms)
        for mono, coef in other.terms.items():
            out[mono] = out.get(mono, Fraction(0)) + coef
        return Poly(out)

    def __neg__(self) -> Poly:
        return self.scaled(Fraction(-1))

    def __sub__(self, other: Poly) -> Poly:
        return self + -other

    def scaled(self, by: Fraction) -> Poly:
        return self if by == 1 else Poly({m: c * by for m, c in self.terms.items()}) if by else ZERO

    @property
    def constant(self) -> Fraction | None:
        """Its value if it is a rational number."""
        if not self.terms:
            return Fraction(0)
        return self.terms.get(ONE) if len(self.terms) == 1 else None

    @property
    def single(self) -> tuple[Mono, Fraction] | None:
        return next(iter(self.terms.items())) if len(self.terms) == 1 else None


ZERO = Poly({})
UNIT = Poly({ONE: Fraction(1)})


def number(value: Fraction | int) -> Poly:
    return Poly({ONE: Fraction(value)})


def total(polys: Iterable[Poly]) -> Poly:
    out: dict[Mono, Fraction] = {}
    for poly in polys:
        for mono, coef in poly.terms.items():
            out[mono] = out.get(mono, Fraction(0)) + coef
    return Poly(out)


class Term(Node):
    """One member of a maximum: over all values of `bound`, the least of `lits`."""

    __slots__ = ("bound", "lits")

    def __init__(self, lits: tuple[Poly, ...], bound: tuple[Index, ...] = ()) -> None:
        self.lits, self.bound = Bag(sorted(lits, key=lambda p: p.key)), bound
        self.free = indices_in(self.lits) - set(bound)
        self.height = _height(self.lits) + (1 if bound else 0)
        self.real = True
        self._seal()

    def text(self, names: Names) -> str:
        inner = _binders(self.bound, self.height, names)
        return f"M[{','.join(b.dim for b in self.bound)}]{show(self.lits, inner)}"


def atoms_in(poly: Poly) -> list[Atom]:
    """All atoms of a Poly, inner ones first, in a deterministic order."""
    seen: dict[Atom, None] = {}

    def visit(x: object) -> None:
        if isinstance(x, Poly):
            for mono, _ in x:
                for atom, _ in mono.factors:
                    if atom not in seen:
                        visit(atom.args)
                        seen[atom] = None
        elif isinstance(x, tuple):
            for y in x:
                visit(y)
        elif isinstance(x, Term):
            visit(x.lits)

    visit(poly)
    return list(seen)
