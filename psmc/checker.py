"""Accepts or rejects a certificate of `psmc check --certificate`: python checker.py FILE [POINTS [SEED]]

Nothing of psmc is imported. Every number is computed twice: its value at a rational point, exact or to 150 digits,
which decides every comparison on the way; and, along the path so decided, its residues modulo primes q0 < q1 < q2 where
variables have random ones. q[i] divides q[i+1] - 1, so e^v = g^v takes residues mod q[i] to residues mod q[i+1], and
sums to products. Sides that agree mod q2 are equal as expressions on the whole cell of that path; the chance of error
is at most degree/q0. What has no residues is compared at the point alone, and the report counts such points.
"""

from __future__ import annotations

import json
import re
import sys
from decimal import Context, Decimal, DecimalException, Underflow, localcontext
from fractions import Fraction
from functools import lru_cache, reduce
from itertools import product
from math import gcd, inf, log2
from random import Random
from typing import Any, NamedTuple

# q[i+1] = 2 q[i] + 1, so 4 has order q[i] mod q[i+1]. All are 3 mod 4: -1 is no square, as over the reals.
Q = (576460752303493199, 1152921504606986399, 2305843009213972799)
PI = Decimal("3.1415926535897932384626433832795028841971693993751058209749445923078164062862089986280348253421170679")
SAME, APART, STATED = Decimal("1e-50"), Decimal("1e-30"), Decimal("1e-15")  # STATED: of a counterexample's values
BITS, MAX_BYTES, WORK, NONE = 6000, 16_000_000, 2_000_000, (None, None, None)
COSTS = {"exp": 25, "log": 50, "pow": 50, "sin": 300, "cos": 300, "erf": 300}  # in steps of WORK
DIGITS = Context(150, Emin=-(10**6), Emax=10**6)
DIGITS.traps[Underflow] = True
NUMBER, END = re.compile(r"-?[0-9]{1,400}(/[0-9]{1,400})?|-?inf"), r"(-inf|inf|-?[0-9]+(?:/[0-9]+)?)"
INTERVAL = re.compile(rf"([\[(]){END}, {END}([\])])")
LAWS: Any = {"associativity": (3, "(a∘b)∘c = a∘(b∘c)"), "identity": (1, "e∘x = x", "x∘e = x", "e∘e = e")}


class Refused(Exception):
    """The certificate is wrong, cannot be read, or asks for too much."""


class Undefined(Exception):
    """No value here: 0/0, inf - inf, the root of a negative number, too close to call."""


class V(NamedTuple):
    """A number: value, residues, those of e^v (None: g^r), bound on the degree (inf: it has roots, of unsure sign)."""

    x: Any  # Fraction or Decimal
    r: Any = NONE
    e: Any = None
    d: float = 0


@lru_cache(5000)
def const(text: str) -> V:
    if not NUMBER.fullmatch(text):
        raise Refused(f"'{text[:40]}' is no number")
    x = Fraction(0 if "inf" in text else text)
    r = tuple(x.numerator * pow(x.denominator, -1, q) % q for q in Q)
    return V(Decimal(text), NONE, NONE) if "inf" in text else V(x, r)


def dec(x: Any) -> Decimal:
    return x if isinstance(x, Decimal) else Decimal(x.numerator) / Decimal(x.denominator)


def gap(x: Any, y: Any) -> Decimal:
    """Relative distance; 1 between rationals or infinities that differ."""
    if type(x) is type(y) is Fraction or inf in (abs(x), abs(y)):
        return Decimal(x != y)
    return abs(dec(x) - dec(y)) / (1 + abs(dec(x)) + abs(dec(y)))


def each(fn: Any, *rs: Any) -> Any:
    return tuple(None if None in col else fn(*col, q) for *col, q in zip(*rs, Q, strict=True))


def made(fn: Any, args: list[Any], r: Any, e: Any, d: float) -> V:
    try:
        out = fn(*(args if all(type(x) is Fraction for x in args) else map(dec, args)))
    except (DecimalException, ZeroDivisionError) as error:
        raise Undefined from error
    if type(out) is Fraction:
        return V(dec(out) if out.numerator.bit_length() + out.denominator.bit_length() > BITS else out, r, e, d)
    return V(out, r, e, d) if out.is_finite() else const("inf" if out > 0 else "-inf")


def up(v: V) -> Any:
    """Residues of e^v."""
    return v.e or (None, *(r if r is None else pow(4, r, q) for r, q in zip(v.r[:2], Q[1:], strict=True)))


def add(a: V, b: V) -> V:
    e = None if a.e is b.e is None else each(lambda s, t, q: s * t % q, up(a), up(b))
    return made(lambda x, y: x + y, [a.x, b.x], each(lambda s, t, q: (s + t) % q, a.r, b.r), e, a.d + b.d)


def mul(a: V, b: V) -> V:
    a, b = (b, a) if b.d == 0 and type(b.x) is Fraction else (a, b)
    n = a.x if a.d == 0 and type(a.x) is Fraction else None  # a constant times b
    e = None if a.e is b.e is None else NONE if n is None else root(up(b), n)
    times = 1 if n is None else inf if b.e and n.denominator > 1 else min(1e9, max(1, abs(n.numerator)) * n.denominator)
    return made(lambda x, y: x * y, [a.x, b.x], each(lambda s, t, q: s * t % q, a.r, b.r), e, a.d + b.d * times)


def root(r: Any, n: Fraction) -> Any:
    """Residues of r^n, None where there are none; roots are multiplicative in r."""

    def one(s: Any, q: int) -> int | None:
        k = n.denominator
        while k % 2 == 0 and s is not None:
            half = pow(s, (q + 1) // 4, q)
            s, k = (half if half * half % q == s else None), k // 2
        none = s is None or gcd(k, q - 1) > 1 or (s == 0 and n < 0)
        return None if none else pow(s, pow(k, -1, q - 1) * n.numerator, q)

    return each(one, r)


def power(a: V, b: V) -> V:
    n = b.x
    if b.d or type(n) is not Fraction:
        return exp(mul(b, log(a)))
    if n == 0 or (abs(a.x) == inf and n < 0):
        return const("1" if n == 0 else "0")
    if (a.x < 0 and n.denominator > 1) or (abs(a.x) < SAME and n < 0):
        raise Undefined
    size = max(abs(a.x.numerator), a.x.denominator).bit_length() if type(a.x) is Fraction else BITS
    if n.denominator == 1 and abs(n) * size < BITS:
        return V(a.x ** int(n), root(a.r, n), a.e and NONE, a.d * abs(int(n)))
    step = Decimal.sqrt if n == Fraction(1, 2) else lambda x: x ** dec(n)
    return made(lambda x: step(dec(x)), [a.x], root(a.r, n), a.e and NONE, inf)


def exp(a: V, limit: int = 2000) -> V:
    if a.x == -inf or (a.x == 0 and a.d == 0):
        return const("1" if a.x == 0 else "0")
    if limit < abs(a.x) < inf:
        raise Undefined
    return made(lambda x: dec(x).exp(), [a.x], up(a), None, a.d)


def log(a: V, rule: Any = None) -> V:
    if rule and a.x == 0 and a.r[2] != 0:  # -inf at this point alone
        rule.tie = True
    return made(lambda x: dec(x).ln(), [a.x], NONE, a.r, a.d) if a.d or a.x != 1 else const("0")  # e^log(a) = a


def series(name: str, a: V) -> V:
    """sin, cos or erf by Taylor's series, at the point alone."""
    v = dec(a.x)
    if not abs(v) < (12 if name == "erf" else 64):
        raise Undefined
    with localcontext(prec=250):
        out = term = Decimal(1) if name == "cos" else v
        for n in range(1, 999):
            k = 2 * n + (name != "cos")
            term *= -v * v / (n if name == "erf" else k * (k - 1))
            out += term / k if name == "erf" else term
    return V(2 * out / PI.sqrt() if name == "erf" else +out, NONE, NONE, 1)


def same(a: V, b: V) -> bool:
    """Whether residues, or those of e^v, agree: equal as expressions."""
    tops = [(a.r[2], b.r[2])] + [(up(a)[2], up(b)[2])] * bool(a.e or b.e)
    return a is b or any(s is not None and s == t for s, t in tops) or (a.x == b.x and abs(a.x) == inf)


OPS: dict[str, Any] = {  # of a Rule and the operands
    "add": lambda _, a, b: add(a, b), "mul": lambda _, a, b: mul(a, b), "pow": lambda _, a, b: power(a, b),
    **{name: lambda _, a, name=name: series(name, a) for name in ("sin", "cos", "erf")},
    "exp": lambda rule, a: exp(a, rule.limit), "log": lambda rule, a: log(a, rule), "not": lambda _, a: not a,
    "max": lambda rule, a, b: a if rule.compare(a, b, 1) >= 0 else b,
    "min": lambda rule, a, b: a if rule.compare(a, b, 1) <= 0 else b, "eq": lambda rule, a, b: rule.compare(a, b) == 0,
    "lt": lambda rule, a, b: rule.compare(a, b) < 0, "le": lambda rule, a, b: rule.compare(a, b) <= 0,
}  # fmt: skip


class Rule:
    """One aggregator at one choice of sizes. Arrays are {position: V, or None where there is no value}. `path` records
    the comparisons; `tie`: numbers were equal by chance, not as expressions."""

    def __init__(self, data: Any, seed: str, sizes: Any, clock: list[int], limit: int = 60) -> None:
        self.data, self.rng, self.clock = data, Random(seed), clock
        self.path, self.tie, self.limit = [], False, limit  # type: list[Any], bool, int
        free = sizes or {d: self.rng.choice((1, 2, 5 if "'int'" in str(data["state"]) else 3)) for d in data["dims"]}
        self.sizes = {d: free[d] if size is None else size for d, size in data["dims"].items()}
        if not all(type(n) is int and 0 < n <= 4096 for n in self.sizes.values()):
            raise Refused("the size of a dim is a whole number from 1 to 4096")

    def compare(self, a: V, b: V, either: int = 0) -> int:
        out = 0 if gap(a.x, b.x) < SAME else 1 if a.x > b.x else -1
        if out == 0 and not same(a, b):
            if not (either or type(a.x) is type(b.x) is Fraction):  # of a maximum, either will do
                raise Undefined
            self.tie = True
        self.path.append(out)
        return out

    def value(self, t: Any, at: dict[str, int], env: Any) -> Any:
        head, *args = [t] if isinstance(t, str) else t
        self.clock[0] -= COSTS.get(head, 1)
        if self.clock[0] < 0:
            raise Refused("it asks for more work than a checker spends on a certificate")
        if head in ("l", "r", "param", "input", "let"):
            place = tuple(self.place(s, at, env) for s in args[1:])
            if head == "let" and place not in env["done", args[0]]:
                indices, body = env["let", args[0]]
                env["done", args[0]][place] = self.value(body, dict(zip(indices, place, strict=True)), env)
            found = env["done" if head == "let" else head, args[0]].get(place)
            if found is None:
                raise Undefined
            return found
        if head in ("index", "dim"):
            return const(str((at if head == "index" else self.sizes)[args[0]]))
        if head == "where":
            return self.value(args[1 if self.value(args[0], at, env) else 2], at, env)
        if head in ("sum", "prod", "maximum"):
            index, dim, body = args
            parts = [self.value(body, {**at, index: k}, env) for k in range(self.sizes[dim])]
            return reduce(lambda a, b: OPS[{"sum": "add", "prod": "mul", "maximum": "max"}[head]](self, a, b), parts)
        return OPS[head](self, *[self.value(a, at, env) for a in args]) if args else const(head)

    def place(self, sub: Any, at: dict[str, int], env: Any) -> int:
        if isinstance(sub, list):
            sub = self.value(sub, at, env).x
            if type(sub) is not Fraction or sub.denominator != 1:
                raise Undefined
        return at[sub] if isinstance(sub, str) else int(sub)

    def block(self, block: Any, env: dict[Any, Any]) -> dict[str, Any]:
        """The results of a block, all entries. Lets are computed where they are read."""
        for name, indices, body in block["lets"]:
            env["let", name], env["done", name] = ([i for i, _ in indices], body), {}
        out: dict[str, Any] = {}
        for name, indices, body in block["results"]:
            for place in product(*(range(self.sizes[d]) for _, d in indices)):
                try:
                    value = self.value(body, dict(zip((i for i, _ in indices), place, strict=True)), env)
                except Undefined:
                    value = None
                out.setdefault(name, {})[place] = value
        return out

    def combine(self, left: Any, right: Any, params: Any) -> Any:
        env = {("l", n): v for n, v in left.items()} | {("r", n): v for n, v in right.items()}
        return self.block(self.data["combine"], env | {("param", n): v for n, v in params.items()})

    def tensors(self, kind: str, flag: str, given: Any = None) -> Any:
        """As given, nested lists of numbers; else drawn in those intervals that bear the flag."""
        out: dict[str, Any] = {}
        numbers = [Fraction(x) for x in re.findall(r'"([0-9]{1,6}(?:/[0-9]{1,6})?)"', json.dumps(self.data["combine"]))]
        grid, reach = self.rng.choice((6, 6, 12, 5040)), 3 + self.rng.choice([Fraction(0), Fraction(0), *numbers])
        for name, t in self.data[kind].items():
            out[name] = {}
            lo, hi, with_lo, with_hi = ends(t["interval"] if flag and t[flag] else "(-inf, inf)")
            low = lo if lo > -inf else -reach if hi == inf else hi - 2 * reach  # 3 and 6: whole numbers, with ties
            high = hi if hi < inf else low + 2 * reach
            if t["kind"] == "int" and lo == -inf:
                low, high = Fraction(-2 * (grid == 12)), Fraction(max(self.sizes.values(), default=4) - 1)
            for place in product(*(range(self.sizes[d]) for d in t["dims"])):
                self.clock[0] -= 4
                step = self.rng.randint(not with_lo and lo > -inf, grid - (not with_hi and hi < inf))
                drawn = low + (high - low) * Fraction(step, grid)
                drawn = Fraction(round(drawn)) if t["kind"] == "int" else drawn
                x = const(reduce(lambda array, k: array[k], place, given[name]) if given else str(drawn))
                free = t["kind"] != "int" and abs(x.x) < inf and low < high
                self.path += [] if free else [x.x]  # whole numbers are part of what makes a cell
                r = tuple((1 if x.x >= 0 else -1) * pow(self.rng.randrange(1, q), 4, q) % q for q in Q)
                out[name][place] = V(x.x, r, None, 4) if free else x  # fourth powers have roots, as the value has
        return out


def ends(text: str) -> Any:
    found = INTERVAL.fullmatch(text)
    if not found:
        raise Refused(f"'{text[:40]}' is no interval")
    return *(Decimal(x) if "inf" in x else Fraction(x) for x in found.group(2, 3)), found[1] == "[", found[4] == "]"


def inside(v: V | None, text: str) -> bool:
    lo, hi, with_lo, with_hi = ends(text)
    return v is None or ((lo < v.x or (with_lo and v.x == lo)) and (v.x < hi or (with_hi and v.x == hi)))


def sides(rule: Rule, law: str, params: Any, x: Any) -> dict[str, tuple[Any, Any]]:
    """What the laws say is equal, of operands x."""
    if law == "associativity":
        first, last = rule.combine(x[0], x[1], params), rule.combine(x[1], x[2], params)
        return {"(a∘b)∘c = a∘(b∘c)": (rule.combine(first, x[2], params), rule.combine(x[0], last, params))}
    rows = [[name, *c["identity"]] for name, c in rule.data["state"].items()]
    e = rule.block({"lets": [], "results": rows}, {("param", n): v for n, v in params.items()})
    pairs = {"e∘x = x": (e, x[0], x[0]), "x∘e = x": (x[0], e, x[0]), "e∘e = e": (e, e, e)}
    return {said: (rule.combine(a, b, params), c) for said, (a, b, c) in pairs.items()}


def examine(data: Any, law: str, seed: int, points: int, clock: list[int]) -> dict[str, Any]:
    """Compares the sides of a law that is called proved. Refused where they differ."""
    closed(data, seed, points, clock)
    out, cells, degree = {"points": 0, "pointwise": 0, "undefined": 0}, set(), 1.0
    unseen = {(said, name) for said in LAWS[law][1:] for name in data["state"] if said != "e∘e = e"}
    for n, given in enumerate([*data[law].get("witnesses", []), *[{}] * points]):
        rule = Rule(data, f"{seed} {n}", given.get("sizes"), clock)
        params = rule.tensors("params", "used", given.get("params"))
        x = [rule.tensors("state", "used", e) for e in given.get("x", [None] * LAWS[law][0])]
        pairs = [(said, name, p, a, right[name][p]) for said, (left, right) in sides(rule, law, params, x).items()
                 for name, array in left.items() for p, a in array.items()]  # fmt: skip
        grade = 0  # 1: some entry is compared at the point alone; 2: some entry has no value
        for said, name, place, a, b in pairs:
            distance = gap(a.x, b.x) if a and b else SAME * 2
            if SAME < distance < APART:
                grade = max(grade, 2 * (said != "e∘e = e"))
                continue
            unseen.discard((said, name))
            alike, vague = same(a, b), rule.tie or a.d + b.d == inf or None in (a.r[2], b.r[2])
            if distance > APART or not (alike or vague):
                how = "the sides differ" if distance > APART else "the sides agree there, but not around it"
                point = [{c: [show(v) for v in array.values()] for c, array in e.items()} for e in x]
                raise Refused(f"{said} fails for {name}{[*place]}: {how}, {show(a)} and {show(b)}, at {point}")
            grade = max(grade, int(not alike))
            degree = max(degree, a.d + b.d if alike else 1)
        out[("points", "pointwise", "undefined")[grade]] += 1
        cells |= set() if grade else {(*rule.sizes.items(), *rule.path)}
    if unseen or (not cells and out["undefined"] > out["pointwise"]):
        raise Refused(f"too few points were found where both sides have values: {out} {sorted(unseen)}")
    error = round(log2(degree / Q[0]), 1) if cells and degree < inf else None
    return out | {"points": out["points"] + out["pointwise"], "cells": len(cells), "error": error}


def closed(data: Any, seed: int, points: int, clock: list[int]) -> None:
    """Refused if a combine leaves an interval that is called closed, or a lift misses it."""
    kept = {name: c["interval"] for name, c in data["state"].items() if c["closed"] or c["used"]}
    for n in range(points if kept else 0):
        rule = Rule(data, f"{seed} closed {n}", None, clock)
        params, inputs = rule.tensors("params", "closed"), rule.tensors("inputs", "closed")
        combined = rule.combine(rule.tensors("state", "closed"), rule.tensors("state", "closed"), params)
        env = {("param", n): v for n, v in params.items()} | {("input", n): v for n, v in inputs.items()}
        for what, found in (("combine leaves", combined), ("lift misses", rule.block(data["lift"], env))):
            for name, interval in kept.items():
                if not all(inside(v, interval) for v in found[name].values()):
                    raise Refused(f"the interval of '{name}' is not closed: {what} {interval}")


def refuted(data: Any, law: str, seed: int, points: int, clock: list[int]) -> dict[str, Any]:
    """Refused unless both sides are what the counterexample says, and differ."""
    case = data[law]["counterexample"]
    rule = Rule(data, "", case["sizes"], clock, limit=2000)
    params, x = rule.tensors("params", "", case["params"]), [rule.tensors("state", "", e) for e in case["x"]]
    for tensors, arrays in ((data["params"], params), *((data["state"], e) for e in x)):
        if not all(inside(v, t["interval"]) for n, t in tensors.items() if t["closed"] for v in arrays[n].values()):
            raise Refused("the counterexample lies outside the intervals")
    pair = [side[case["component"]][tuple(case["position"])] for side in sides(rule, law, params, x)[case["case"]]]
    for v, told in zip(pair, (case["left"], case["right"]), strict=True):
        if (v is None) != (told is None) or (v and gap(v.x, Fraction(told) if "/" in told else Decimal(told)) > STATED):
            raise Refused(f"a side of {case['case']} is {v and show(v)} at the counterexample, not {told} as it says")
    if pair[1] is None or (pair[0] and gap(pair[0].x, pair[1].x) < APART):
        raise Refused(f"both sides of {case['case']} are {show(pair[0])} at the counterexample")
    return {}


def show(v: V) -> str:
    return str(v.x) if type(v.x) is Fraction else f"{v.x:.20g}".lower().replace("inity", "")


def check(document: Any, points: int = 32, seed: int = 0) -> list[dict[str, Any]]:
    """A dict for each law of each aggregator; `accepted` is None where nothing is claimed. Raises nothing."""
    rows, clock, limit = [], [WORK * (1 + points // 32)], sys.getrecursionlimit()  # type: list[dict[str, Any]], Any, int
    found = document.get("aggregators") if isinstance(document, dict) else None
    sys.setrecursionlimit(max(limit, 10_000))
    with localcontext(DIGITS):
        for data, law in product(found if isinstance(found, list) else [None], LAWS):
            rows.append(row := {"aggregator": "?", "law": law, "verdict": None, "accepted": None})
            try:
                row |= {"aggregator": str(data["aggregator"])[:99], "verdict": data[law]["verdict"]}
                if row["verdict"] not in ("unknown", None):
                    examiner = {"proved": examine, "refuted": refuted}[row["verdict"]]
                    row |= examiner(data, law, seed, points, clock) | {"accepted": True}
            except Exception as error:  # wrong keys or types, endless nesting
                why = str(error) if isinstance(error, Refused) else f"malformed: {type(error).__name__} {error!s:.200}"
                row |= {"accepted": False, "why": why}
    sys.setrecursionlimit(limit)
    return rows


def read(path: str) -> Any:
    """The document in a file. Refused if it is none."""
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_BYTES + 1)
        return json.loads(text) if len(text) <= MAX_BYTES else None
    except (OSError, ValueError, RecursionError) as error:
        raise Refused(f"{path} is no certificate: {error!s:.200}") from None


if __name__ == "__main__":
    print(*map(json.dumps, found := check(read(sys.argv[1]), *map(int, sys.argv[2:4]))), sep="\n")
    sys.exit(int(not found or any(row["accepted"] is False for row in found)))
