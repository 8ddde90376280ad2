"""Functions of z3 terms: powers, roots, exponentials and logarithms, sines.

Exponentials are abstracted: exp(Σ c·t) is a product of powers of one positive unknown a term t, so products of
exponentials multiply exactly, and what holds of all positive unknowns holds of exponentials. sin and cos likewise are
points of the unit circle. A formula without a solution is therefore a proof; a solution is a guess to be evaluated.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import z3

from psmc.algebra import numbers as nu
from psmc.algebra.ring import UndefinedError
from psmc.algebra.smt_values import Arithmetic, Pair, Real, Term, UndecidedError, Value, endless, number, parts, real

_MAX_POWER, _MAX_ROOT = 8, 4
_HALF = Fraction(1, 2)


class Terms(Arithmetic):
    """All operators on values."""

    def power(self, x: Value, y: Real) -> Value:
        if isinstance(y, Fraction) and y.denominator == 1 and abs(y) <= _MAX_POWER:
            out: Value = Fraction(1)
            for _ in range(abs(int(y))):
                out = self.times(out, x)
            return out if y >= 0 else self.over(Fraction(1), out)
        if isinstance(x, Pair | bool | z3.BoolRef):
            raise UndecidedError("a power of a complex number")
        if y == _HALF:
            return self.sqrt(x)
        return self.exp(self.mul(y, self.log(x)))

    def _chosen_power(self, condition: Any, x: Real, y: Real) -> Term:
        chosen = self.choose(condition, self.exp(x), self.exp(y))
        return chosen if isinstance(chosen, Term) else Term(number(real(chosen)))

    def exp(self, x: Real) -> Real:
        if endless(x):
            return nu.INF if x > 0 else Fraction(0)  # type: ignore[operator]
        top: Real = Fraction(1)
        bottom: Real = Fraction(1)
        for atom, coef in self._linear(x):
            factor = self._root(atom, coef.denominator)
            for _ in range(min(abs(coef.numerator), _MAX_POWER + 1)):
                top, bottom = (self.mul(top, factor), bottom) if coef > 0 else (top, self.mul(bottom, factor))
            if abs(coef.numerator) > _MAX_POWER:
                raise UndecidedError("an exponential with a large coefficient")
        mark = len(self._partial)
        out = self.div(top, bottom)
        del self._partial[mark:]  # exponentials are not 0
        return out

    def _root(self, atom: int, degree: int) -> Real:
        power = self.power_of(atom)
        if degree == 1:
            return power
        if degree > _MAX_ROOT:
            raise UndecidedError("an exponential with a small coefficient")
        known = self._known(f"root {degree}", power)
        if known is None:
            unknown = Term(self.fresh("root"))
            whole: Real = Fraction(1)
            for _ in range(degree):
                whole = self.mul(whole, unknown)
            self.facts += [unknown.top > 0, self.compare("eq", whole, power)]
            known = self._remember(f"root {degree}", power, unknown)
        return known

    def log(self, x: Real) -> Real:
        if endless(x) or x == 0:
            return nu.log(x)  # type: ignore[arg-type]
        if x == 1:
            return Fraction(0)
        if isinstance(x, Fraction):
            if x < 0:
                raise UndefinedError("log of a negative number")
            x = Term(number(x))
        assert isinstance(x, Term)
        sign = self.compare("gt", x, Fraction(0))
        if not isinstance(sign, bool):
            # log(0) is -inf, which no term is: 0 has to be impossible
            self.positive.append(self.compare("ne", x, Fraction(0)))
            self._partial.append(sign)
        known = self._known("log", x)
        if known is None:
            self.abstract = True
            known = self._remember("log", x, self._atom(self.fresh("log"), lambda: x))
            assert known.linear is not None
            self.power_of(known.linear[0][0])
        return known

    def sqrt(self, x: Real) -> Real:
        if not isinstance(x, Term):
            root = nu.sqrt(x)
            if isinstance(root, Fraction) or endless(root):
                return root
            x = Term(number(x))
        known = self._known("sqrt", x)
        there = self.compare("ge", x, Fraction(0))
        if known is None:
            known = self._remember("sqrt", x, self._atom(self.fresh("sqrt")))
            square = self.compare("eq", self.mul(known, known), x)
            self.facts += [known.top >= 0, square if isinstance(there, bool) else z3.Implies(there, square)]
        if not isinstance(there, bool):
            self._partial.append(there)
        return known

    def cis(self, x: Real) -> Pair:
        """(cos x, sin x)."""
        if endless(x):
            raise UndefinedError("an angle that is infinite")
        out: Value = Pair(Fraction(1), Fraction(0))
        for atom, coef in self._linear(x):
            if coef.denominator != 1 or abs(coef) > _MAX_POWER:
                raise UndecidedError("a sine of a fraction of an angle")
            cos, sin = self._point(atom)
            step = Pair(cos, sin if coef > 0 else self.neg(sin))
            for _ in range(abs(int(coef))):
                out = self.times(out, step)
        assert isinstance(out, Pair)
        return out

    def _point(self, atom: int) -> tuple[Real, Real]:
        if atom not in self._circle:
            self.abstract = True
            if atom in self._choices:
                condition, x, y = self._choices[atom]
                chosen = self.choose(condition, self.cis(x), self.cis(y))
                self._circle[atom] = parts(chosen)
            else:
                cos, sin = self._atom(self.fresh("cos")), self._atom(self.fresh("sin"))
                self.facts.append(cos.top * cos.top + sin.top * sin.top == 1)
                self._circle[atom] = (cos, sin)
        return self._circle[atom]
