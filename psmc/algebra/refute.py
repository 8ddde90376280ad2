"""Counterexamples: exact evaluation of both sides of a law at small dims and small values, then minimised."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from fractions import Fraction
from math import inf, prod
from typing import Literal

from psmc.algebra import interval_math as im
from psmc.algebra import numbers as nu
from psmc.algebra.exact import Array, Evaluator, Position, Sizes, positions, run
from psmc.algebra.numbers import Number
from psmc.algebra.padded import MAX_ENTRIES, Corner, lazily
from psmc.algebra.ring import UndefinedError
from psmc.algebra.samples import Element, Sampler, declared
from psmc.algebra.terms import OutOfBudgetError
from psmc.algebra.values import element_text, formatted, nested, told_apart
from psmc.algebra.verdict import Counterexample
from psmc.ir import Aggregator, Block

_AROUND = 3  # points
_AT_IDENTITY = range(4)  # points; they differ in sizes and params
Law = Literal["associativity", "left identity", "right identity"]
_OPERANDS: dict[Law, tuple[str, ...]] = {
    "associativity": ("a", "b", "c"),
    "left identity": ("x",),
    "right identity": ("x",),
}
_SIDES: dict[Law, tuple[str, str]] = {
    "associativity": ("(a∘b)∘c", "a∘(b∘c)"),
    "left identity": ("e∘x", "x"),
    "right identity": ("x∘e", "x"),
}


@dataclass(frozen=True)
class Point:
    """Dim sizes, params and operands to evaluate a law at."""

    sizes: Sizes
    params: Element
    operands: tuple[Element, ...]


@dataclass(frozen=True)
class Difference:
    """`left` None: no value there, for that `reason`."""

    component: str
    position: Position
    left: Number | None
    right: Number
    reason: str = ""


class Refuter:
    """Looks for points where a law of `agg` fails."""

    def __init__(self, agg: Aggregator, sampler: Sampler) -> None:
        self.agg, self.sampler = agg, sampler
        self.components: frozenset[str] | None = None  # only these are compared, if set
        self.deadline = inf

    def search(self, law: Law, trials: range, deadline: float) -> Counterexample | None:
        """A minimised counterexample among the numbered points."""
        hit = self.first(law, trials, deadline)
        return None if hit is None else self._smallest(law, *hit, deadline)

    def _smallest(
        self, law: Law, point: Point, found: Difference, deadline: float,
        test: Callable[[Law, Point], Difference | None] | None = None,
    ) -> Counterexample:  # fmt: skip
        with self._until(deadline):
            small, less = self._minimised(law, point, found, deadline, test)
            shown = self._declared(law, small, less)
            if shown is None:
                small, shown = point, self._declared(law, point, found)
        return self._counterexample(law, small, shown or found)

    @contextmanager
    def _until(self, deadline: float) -> Iterator[None]:
        """Evaluation raises OutOfBudgetError past the deadline."""
        before, self.deadline = self.deadline, deadline
        try:
            yield
        finally:
            self.deadline = before

    def first(self, law: Law, trials: range, deadline: float) -> tuple[Point, Difference] | None:
        """The first of the numbered points where the law fails."""
        with self._until(deadline), suppress(OutOfBudgetError):
            for trial in trials:
                if time.monotonic() > deadline:
                    return None
                point = self._point(law, trial)
                found = self.difference(law, point)
                if found is not None and self._declared(law, point, found) is not None:
                    return point, found
        return None

    def _declared(self, law: Law, point: Point, found: Difference) -> Difference | None:
        """What the declared sizes show in that place, where those of the point are smaller; None: no difference."""
        if not self.sampler.shrunk:
            return found
        full = self._full(point)
        if sum(prod(full.sizes[d] for d in t.dims) for t in declared(self.agg)) * len(full.operands) > MAX_ENTRIES:
            return None
        try:
            left, right = (side[found.component].get(found.position) for side in self._sides(law, full, lazy=True))
        except OutOfBudgetError:
            return None
        if right is None or (left is None) != (found.left is None):
            return None
        if left is not None and not nu.differ(left, right):
            return None
        return replace(found, left=left, right=right)

    def _full(self, point: Point) -> Point:
        """The point at the declared sizes, nothing but its corner stored."""
        sizes = self.sampler.declared_sizes(point.sizes)
        shapes = {t.name: tuple(sizes[d] for d in t.dims) for t in declared(self.agg)}

        def grown(element: Element) -> Element:
            return {n: Corner(a, self.sampler.filler(n), shapes[n]) for n, a in element.items()}

        return Point(sizes, grown(point.params), tuple(map(grown, point.operands)))

    def _point(self, law: Law, trial: int) -> Point:
        rng = random.Random(trial)
        sizes = self.sampler.sizes(trial)
        width = (4, 6, 9, 40)[trial // 4 % 4]
        params = self.sampler.params(rng, sizes, width)
        return Point(sizes, params, tuple(self.sampler.element(rng, sizes, width) for _ in _OPERANDS[law]))

    def difference(self, law: Law, point: Point) -> Difference | None:
        """The first place where both sides have values that certainly differ."""
        left, right = self._sides(law, point)
        for name, position in self._places(point):
            x, y = left[name][position], right[name][position]
            if x is not None and y is not None and nu.differ(x, y):
                return Difference(name, position, x, y)
        return None

    def _places(self, point: Point) -> Iterator[tuple[str, Position]]:
        for component in self.agg.state:
            if self.components is None or component.name in self.components:
                yield from ((component.name, p) for p in positions(component.dims, point.sizes))

    def without_value(self, law: Law, trials: range, deadline: float) -> Counterexample | None:
        """An element x that e∘x (or x∘e) has no value for, nor for elements around it: inf - inf, 0 times inf, 0/0."""
        with self._until(deadline), suppress(OutOfBudgetError):
            for trial in trials:
                if time.monotonic() > deadline:
                    return None
                point = self._point(law, trial)
                found = self._missing(law, point)
                if found is None or not all(self._missing(law, self._moved(point, k)) for k in range(_AROUND)):
                    continue  # at most a set of measure 0
                if self._declared(law, point, found) is not None:
                    return self._smallest(law, point, found, deadline, self._missing)
        return None

    def of_identity(self, deadline: float) -> Counterexample | None:
        """e∘e where it is not e: the left identity law at x = e, which no drawn element need be."""
        with self._until(deadline), suppress(OutOfBudgetError):
            for trial in _AT_IDENTITY:
                point = self._point("left identity", trial)
                point = replace(point, operands=(self.identity(point),))
                found = self.difference("left identity", point)
                if found is not None and self._declared("left identity", point, found) is not None:
                    return self._counterexample("left identity", point, found)
        return None

    def _moved(self, point: Point, seed: int) -> Point:
        """A point near by: real and complex entries a little aside, within their intervals."""
        rng = random.Random(seed)
        legal = {t.name: t.interval for t in self.agg.params} | dict(self.sampler.intervals)
        kinds = {t.name: t.kind for t in declared(self.agg)}

        def step() -> Fraction:
            return Fraction(rng.randint(-99, 99), 10_007)

        def aside(name: str, value: Number | None) -> Number | None:
            if kinds[name] == "complex" and value is not None:
                return nu.add(value, nu.Complex(step(), step()))
            if kinds[name] != "real" or not isinstance(value, Fraction):
                return value
            moved, interval = value + step(), legal.get(name)
            return moved if interval is None or im.holds(interval, moved) else value

        def element(arrays: Element) -> Element:
            return {n: {p: aside(n, v) for p, v in array.items()} for n, array in arrays.items()}

        return replace(point, params=element(point.params), operands=tuple(map(element, point.operands)))

    def _missing(self, law: Law, point: Point) -> Difference | None:
        left, right = self._sides(law, point)
        (x,), e = point.operands, self.identity(point)
        for name, position in self._places(point):
            if left[name][position] is None and (value := right[name][position]) is not None:
                reason = self._reason(point, *((e, x) if law == "left identity" else (x, e)), name, position)
                if reason:
                    return Difference(name, position, None, value, reason)
        return None

    def _reason(self, point: Point, left: Element, right: Element, name: str, position: Position) -> str:
        """Why left∘right has no value there; empty if it may only be too hard to compute."""
        assert isinstance(self.agg.combine, Block)
        rule = self.agg.combine
        evaluator = Evaluator(point.sizes, self._store(point, left, right), {a.name: a for a in rule.lets})
        try:
            evaluator.at(rule.result(name), position)
        except nu.UnclearError:
            return ""
        except UndefinedError as error:
            return str(error)
        return ""

    def _sides(self, law: Law, point: Point, lazy: bool = False) -> tuple[Element, Element]:
        def of(left: Element, right: Element) -> Element:
            return self.combine(point, left, right, lazy=lazy)

        if law == "associativity":
            a, b, c = point.operands
            return of(of(a, b), c), of(a, of(b, c))
        (x,) = point.operands
        e = self.identity(point, lazy=lazy)
        return (of(e, x) if law == "left identity" else of(x, e)), x

    def combine(
        self, point: Point, left: Element, right: Element, *, plain: bool = False, lazy: bool = False
    ) -> Element:
        assert isinstance(self.agg.combine, Block)
        store = self._store(point, left, right)
        if lazy:
            return lazily(self.agg.combine, point.sizes, store, self.deadline)
        return run(self.agg.combine, point.sizes, store, plain=plain, deadline=self.deadline)

    def _store(self, point: Point, left: Element, right: Element) -> dict[tuple[str, str], Array]:
        store: dict[tuple[str, str], Array] = {("param", n): a for n, a in point.params.items()}
        return store | {("left", n): a for n, a in left.items()} | {("right", n): a for n, a in right.items()}

    def identity(self, point: Point, lazy: bool = False) -> Element:
        store = {("param", n): a for n, a in point.params.items()}
        block = Block(results=tuple(c.identity for c in self.agg.state))
        return lazily(block, point.sizes, store, self.deadline) if lazy else run(block, point.sizes, store)

    # --- minimisation ---------------------------------------------------------------------------

    def _minimised(
        self, law: Law, point: Point, found: Difference, deadline: float,
        test: Callable[[Law, Point], Difference | None] | None = None,
    ) -> tuple[Point, Difference]:  # fmt: skip
        """Greedy: each entry takes the simplest value that keeps some difference."""
        test = test or self.difference
        rank = {n: {v: k for k, v in enumerate(self.sampler.choices(n, point.sizes))} for n in self._names()}
        changed = True
        while changed and time.monotonic() < deadline:
            changed = False
            for where, name, position in self._entries(point):
                current = self._arrays(point)[where][name][position]
                for value in self.sampler.choices(name, point.sizes):
                    if value == current or rank[name][value] >= rank[name].get(current, 1000):  # type: ignore[arg-type]
                        break
                    candidate = self._with(point, where, name, position, value)
                    try:
                        difference = test(law, candidate)
                    except OutOfBudgetError:
                        return point, found
                    if difference is not None:
                        point, found, changed = candidate, difference, True
                        break
        return point, found

    def _names(self) -> list[str]:
        return [t.name for t in declared(self.agg)]

    def _arrays(self, point: Point) -> tuple[Element, ...]:
        return (point.params, *point.operands)

    def _entries(self, point: Point) -> list[tuple[int, str, Position]]:
        return [(k, n, p) for k, e in enumerate(self._arrays(point)) for n, array in e.items() for p in array]

    def _with(self, point: Point, where: int, name: str, position: Position, value: Number) -> Point:
        arrays = list(self._arrays(point))
        arrays[where] = {**arrays[where], name: {**arrays[where][name], position: value}}
        return Point(point.sizes, arrays[0], tuple(arrays[1:]))

    # --- text -----------------------------------------------------------------------------------

    def _counterexample(self, law: Law, point: Point, found: Difference) -> Counterexample:
        names = _OPERANDS[law]
        shapes = {t.name: t.dims for t in declared(self.agg)}
        elements = [(n, e) for n, e in zip(names, point.operands, strict=True)]
        given = [f"{d}={s}" for d, s in self._used_sizes(point)] + self._unshown()
        given += [f"{n}={formatted(nested(array, shapes[n], point.sizes))}" for n, array in point.params.items()]
        shown = elements if law == "associativity" else [("e", self.identity(point)), *elements]
        given += [f"{n}={element_text(e, shapes, point.sizes)}" for n, e in shown]
        place = found.component + (f"[{','.join(map(str, found.position))}]" if found.position else "")
        left, right = _SIDES[law]
        if found.left is None:
            values = f"{place} no value ({found.reason})", formatted(found.right)
        else:
            x, y = told_apart(found.left, found.right)
            values = f"{place}={x}", y
        text = f"with {', '.join(given)}: {left} gives {values[0]}, {right} gives {place}={values[1]}."
        if law != "associativity":
            text = text.replace(f", {right} gives {place}=", f", not {place}=")
        full = self._full(point) if self.sampler.shrunk else point
        whole = [*zip(names, full.operands, strict=True), *([("params", full.params)] if full.params else [])]
        return Counterexample(
            law,
            tuple(sorted(full.sizes.items())),
            tuple(
                (n, tuple((c, nested(_entries(array), shapes[c], full.sizes)) for c, array in e.items()))
                for n, e in whole
            ),
            found.component,
            found.position,
            found.left,
            found.right,
            text,
        )

    def _used_sizes(self, point: Point) -> list[tuple[str, int]]:
        used = {d for t in declared(self.agg) for d in t.dims}
        return [(d.name, point.sizes[d.name]) for d in self.agg.dims if d.size is None and d.name in used]

    def _unshown(self) -> list[str]:
        """Of dims that are shown smaller than they are."""
        if not self.sampler.shrunk:
            return []
        sizes = [f"{d.name}={d.size}" for d in self.agg.dims if d.name in self.sampler.shrunk]
        others = [(t.name, self.sampler.filler(t.name)) for t in declared(self.agg) if t.dims]
        odd = [f", {formatted(v)} of '{n}'" for n, v in others if v != 0]
        return [f"{', '.join(sizes)} (entries that are not shown are 0{''.join(odd)})"]


def _entries(array: Array) -> Array:
    return array.filled() if isinstance(array, Corner) else array


def undefined_components(refuter: Refuter, point: Point, left: Element, right: Element) -> list[str]:
    """Components of left ∘ right that have an entry without a value (floats give NaN there)."""
    out: Mapping[str, Array] = refuter.combine(point, left, right, plain=True)
    return [n for n, array in out.items() if any(v is None for v in array.values())]
