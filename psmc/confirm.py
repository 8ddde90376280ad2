"""What another method says of a verdict before it is printed.

Proofs go through the checker of certificates. Counterexamples are evaluated once more in fp64: by the oracle, without
torch in plain floats.

Exact evaluation has refuted a law at some elements. Here both sides are computed at the same elements in doubles. They
may agree with that; they may not see the difference (overflow, rounding, NaN), which is said in a note; or they may be
equal where rounding cannot explain it. Then one of our two evaluations is wrong, and the law counts as unknown.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal, TypeAlias

from psmc.algebra import floats
from psmc.algebra.cross_check import contradictions
from psmc.algebra.exact import Position
from psmc.algebra.floats import Float, Floats
from psmc.algebra.numbers import Complex
from psmc.algebra.padded import steps
from psmc.algebra.verdict import Counterexample, Proof, Refuted, Unknown, Verdict
from psmc.diagnostics import Diagnostic
from psmc.ir import Aggregator, Block

Element: TypeAlias = "dict[str, Floats]"
Runner: TypeAlias = "Callable[[Block, Mapping[tuple[str, str], Floats]], Element]"
_SMALL = 1e-3  # of the difference between the exact sides
_NOISY_RUNS = 8
_MAX_STEPS = 10_000_000  # of one combine: plain floats compute the one entry that is looked at
_SIDES = {"associativity": ("(a∘b)∘c", "a∘(b∘c)"), "left identity": ("e∘x", "x"), "right identity": ("x∘e", "x")}


@dataclass(frozen=True)
class Confirmation:
    """Both sides in doubles. `word`: they show the difference; they do not; they contradict it."""

    word: Literal["shown", "unseen", "contradicted"]
    left: Float
    right: Float


def confirm(agg: Aggregator, found: Counterexample) -> Confirmation:
    """Evaluate both sides of a counterexample in fp64."""
    if found.left is None or found.right is None:  # the law has no value there: nothing to compare
        return Confirmation("shown", math.nan, math.nan)
    sizes = dict(found.dims)
    left, right = _evaluated(agg, found, sizes)
    exact = _float(found.left), _float(found.right)
    apart = abs(exact[0] - exact[1]) if all(map(_finite, exact)) else math.inf
    if left != right and _near(left, exact[0], apart) and _near(right, exact[1], apart):
        return Confirmation("shown", left, right)
    equal = _finite(left) and _finite(right) and _near(left, right, apart)
    certain = equal and _noise(agg, found, sizes) < _SMALL * apart
    return Confirmation("contradicted" if certain else "unseen", left, right)


def confirmed(agg: Aggregator, proof: Proof) -> tuple[Proof, Mapping[str, str]]:
    """The proof without refutations that floats contradict and proofs that the checker of certificates does, and what
    there is to say of the other refutations, by law."""
    if not isinstance(agg.combine, Block):
        return proof, {}
    notes: dict[str, str] = {}
    first, second = (_law(agg, v, notes) for v in (proof.associativity, proof.identity))
    wrong = {law: _disproved(said) for law, said in contradictions(agg, proof).items()}
    first, second = wrong.get("associativity", first), wrong.get("identity", second)
    return replace(proof, associativity=first, identity=second), notes


def _disproved(said: str) -> Unknown:
    return Unknown(
        f"PSM901 (a bug of psmc, please report it): the prover calls it proved, and the checker finds that {said}",
        "the prover and the checker of certificates contradict each other",
    )


def _law(agg: Aggregator, verdict: Verdict | None, notes: dict[str, str]) -> Verdict | None:
    if not isinstance(verdict, Refuted):
        return verdict
    found = verdict.counterexample
    result = confirm(agg, found)
    values = f"{_shown(result.left)} and {_shown(result.right)}"
    if result.word == "contradicted":
        return Unknown(
            f"PSM901 (a bug of psmc, please report it): {found.text} In fp64 the two sides are {values}",
            "exact evaluation and the fp64 oracle contradict each other",
        )
    if result.word == "unseen":
        one, other = _SIDES[found.law]
        notes[found.law] = (
            f"fp64 does not show this difference: {one} and {other} come out as {values} there, "
            "by rounding or overflow. The law fails over the reals."
        )
    return verdict


def noted(diagnostic: Diagnostic | None, proof: Proof, notes: Mapping[str, str]) -> Diagnostic | None:
    """The diagnostic of a proof with the note on the counterexample that it prints."""
    for verdict in (proof.associativity, proof.identity):
        if isinstance(verdict, Refuted):
            note = notes.get(verdict.counterexample.law)
            if diagnostic is None or note is None:
                return diagnostic
            return replace(diagnostic, notes=(*diagnostic.notes[:1], note, *diagnostic.notes[1:]))
    return diagnostic


# --- evaluation ---------------------------------------------------------------------------------


def _evaluated(agg: Aggregator, found: Counterexample, sizes: Mapping[str, int]) -> tuple[Float, Float]:
    """By the oracle where it can: it computes all entries, of which some may be read outside of a dim, and plain floats
    the one that is looked at."""
    try:
        return _sides(agg, found, _oracle(agg, sizes) or _plain(sizes))
    except IndexError:
        return _sides(agg, found, _plain(sizes))


def _sides(agg: Aggregator, found: Counterexample, run: Runner) -> tuple[Float, Float]:
    """Both sides at the component and position of the counterexample."""
    kinds = {c.name: c.kind for c in agg.state} | {p.name: p.kind for p in agg.params}
    given = {name: {c: _array(v, kinds[c]) for c, v in parts} for name, parts in found.elements}
    params = {("param", n): a for n, a in given.get("params", {}).items()}

    def combine(left: Element, right: Element) -> Element:
        assert isinstance(agg.combine, Block)
        both = {("left", n): a for n, a in left.items()} | {("right", n): a for n, a in right.items()}
        return run(agg.combine, params | both)

    if found.law == "associativity":
        a, b, c = (given[n] for n in "abc")
        left, right = combine(combine(a, b), c), combine(a, combine(b, c))
    else:
        right = given["x"]
        e = run(Block(results=tuple(c.identity for c in agg.state)), params)
        left = combine(e, right) if found.law == "left identity" else combine(right, e)
    return left[found.component][found.position], right[found.component][found.position]


def _plain(sizes: Mapping[str, int], noise: random.Random | None = None) -> Runner:
    return lambda block, store: floats.run(block, sizes, store, noise)


def _oracle(agg: Aggregator, sizes: Mapping[str, int]) -> Runner | None:
    """The reference interpreter; None where torch is not installed, or all entries at once are too many for it."""
    if steps(agg, sizes) > _MAX_STEPS:
        return None
    try:
        from psmc.reference.cells import cells_runner
    except (ImportError, OSError):
        return None
    return cells_runner(sizes)


def _noise(agg: Aggregator, found: Counterexample, sizes: Mapping[str, int]) -> float:
    """How far rounding can move either side; inf where it decides whether there is a value."""
    rows = [_sides(agg, found, _plain(sizes, random.Random(seed))) for seed in range(_NOISY_RUNS)]
    if not all(_finite(v) for row in rows for v in row):
        return math.inf
    return float(max(abs(v - w) for side in zip(*rows, strict=True) for v in side for w in side))


# --- numbers --------------------------------------------------------------------------------------


def _array(value: Any, kind: str, prefix: Position = ()) -> Floats:
    """Nested tuples of exact numbers as floats by position; whole numbers stay such, complex ones take both parts."""
    if isinstance(value, tuple):
        return {p: v for n, x in enumerate(value) for p, v in _array(x, kind, (*prefix, n)).items()}
    number = _float(value)
    return {prefix: int(number.real) if kind == "int" else complex(number) if kind == "complex" else number}


def _float(value: object) -> Float:
    match value:
        case None:
            return math.nan
        case Complex(re=re, im=im):
            return complex(_double(re), _double(im))
        case Fraction() | Decimal() | int():
            return _double(value)
    raise AssertionError(value)


def _double(value: Fraction | Decimal | int) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _finite(x: Float) -> bool:
    return math.isfinite(x.real) and math.isfinite(x.imag)


def _near(x: Float, y: Float, apart: float) -> bool:
    return x == y or (_finite(x) and _finite(y) and abs(x - y) <= _SMALL * min(apart, 1e300))


def _shown(x: Float) -> str:
    return f"{x:.6g}".replace("j", "i")
