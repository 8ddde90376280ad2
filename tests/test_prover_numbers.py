"""Evaluation's numbers: the bound on a decimal's error holds, and what rounding made is never taken for a difference."""

from __future__ import annotations

import random
from decimal import Decimal
from fractions import Fraction

import pytest
from prover_specs import spec

from psmc.algebra import numbers as nu
from psmc.algebra.prover import prove
from psmc.algebra.verdict import Proved

mp = pytest.importorskip("mpmath")
FUNCTIONS = {"exp": nu.exp, "log": nu.log, "sqrt": nu.sqrt, "sin": nu.sin, "cos": nu.cos, "erf": nu.erf}


@pytest.mark.parametrize("seed", range(6))
def test_error_bounds_hold(seed: int) -> None:
    """Chains of functions and operators, against 300 digits."""
    told = 0
    with mp.workdps(300):
        for trial in range(120):
            rng = random.Random(f"{seed}.{trial}")
            x: nu.Real = Fraction(rng.randint(-60, 60), rng.randint(1, 9))
            y = mp.mpf(x.numerator) / x.denominator  # type: ignore[union-attr]
            try:
                for _ in range(rng.randint(1, 5)):
                    x, y = step(rng, x, y)
            except nu.UndefinedError:
                continue
            if isinstance(x, nu.Ball):
                told += 1
                assert abs(mp.mpf(str(x)) - y) <= mp.mpf(str(x.error))
    assert told > 20


def step(rng: random.Random, x: nu.Real, y: object) -> tuple[nu.Real, object]:
    if rng.random() < 0.6:
        name = rng.choice(sorted(FUNCTIONS))
        return nu.real(FUNCTIONS[name](x)), getattr(mp, name)(y)
    c = Fraction(rng.randint(-9, 9), rng.randint(1, 5))
    d = mp.mpf(c.numerator) / c.denominator
    if rng.random() < 0.5:  # cancels, if c is small
        gap = nu.add_real(nu.real(nu.exp(x)), nu.real(nu.neg(nu.exp(nu.add_real(x, c)))))
        return gap, mp.exp(y) - mp.exp(y + d)
    return (nu.div_real(c, x), d / y) if rng.random() < 0.5 else (nu.mul_real(x, c), y * d)


def test_rounding_is_no_difference() -> None:
    """(x + exp(big)) - exp(big) is x, whatever the digits say; so is log(exp(-big) - 1 + 1)."""
    big = nu.real(nu.exp(Fraction(400)))
    x = nu.add_real(nu.add_real(Fraction(1, 3), big), nu.real(nu.neg(big)))
    assert not nu.differ(x, Fraction(1, 3)) and not nu.differ(x, Fraction(1, 2))
    lost = nu.add_real(nu.add_real(nu.real(nu.exp(Fraction(-400))), Fraction(-1)), Fraction(1))
    with pytest.raises(nu.UnclearError):
        nu.log(lost)
    with pytest.raises(nu.UnclearError):
        nu.compare(x, Fraction(1, 3))


def test_a_difference_is_seen() -> None:
    one = nu.real(nu.exp(Fraction(1)))
    assert nu.differ(one, nu.add_real(one, Fraction(1, 10**30)))
    assert nu.compare(one, Fraction(2)) == 1 and nu.sign(one) == 1
    assert nu.greatest(one, Fraction(2)) is one


def test_a_rule_that_cancels_badly_is_not_refuted() -> None:
    """Exponentials of exponentials cancel: thousands of digits would be needed to see nothing but rounding."""
    rule = "x = l.x + r.x; y = (l.y + exp(l.x)) + (r.y + exp(r.x)) + exp(exp(l.x)) - exp(exp(l.x)) - exp(l.x + r.x)"
    proof = prove(spec(f"state x = 0, y = -1 combine (l, r) {{ {rule} }}"), 60)
    assert isinstance(proof.associativity, Proved) and isinstance(proof.identity, Proved)


def test_infinities() -> None:
    assert nu.exp(nu.NEG_INF) == 0 and nu.log(Fraction(0)) == Decimal("-Infinity")
    for undefined in (lambda: nu.add_real(nu.INF, nu.NEG_INF), lambda: nu.mul_real(nu.INF, Fraction(0))):
        with pytest.raises(nu.UndefinedError):
            undefined()
