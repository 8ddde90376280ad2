"""A block as an ordered list of named values: what is shared gets a name, the rest stays inside its one reader.

The steps are again IR: a step's value reads other steps as `Ref("let", name, subs)`, so a printer is a walk over
expressions. Subexpressions that differ only in the names of their indices are one value.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from itertools import count

from psmc.ir import Assign, Block, Const, DimValue, Expr, Eye, Index, IndexValue, Infinity, Op, Reduce, Ref, Sub
from psmc.ir.query import needs_safe_exp, restrict, signed_terms
from psmc.ir.rewrite import children, instantiate, refs, walk, with_children

Axes = tuple[Index, ...]


@dataclass(frozen=True)
class Step:
    """name[axes] = value. `axes` are the value's ordered free indices; those of a let or a result are its declared
    ones, even where the value does not depend on one."""

    name: str
    axes: Axes
    value: Expr


@dataclass(frozen=True)
class Program:
    """Steps in order, each before its readers; `results` gives, for each result, the step that holds it."""

    steps: tuple[Step, ...]
    results: tuple[tuple[str, str], ...]

    def definition(self, ref: Ref) -> Expr | None:
        """What a reference to a step stands for."""
        steps = (s for s in self.steps if s.name == ref.name)
        return next((instantiate(Assign(s.name, s.axes, s.value), ref.subs) for s in steps), None)


def worth_naming(node: Expr, uses: int) -> bool:
    """Shared work on tensors: not a number, not a plain sign or part of something that has a name."""
    if uses < 2 or not isinstance(node, Op | Reduce):
        return False
    if isinstance(node, Op) and node.op in ("neg", "stop", "conj", "real") and isinstance(node.args[0], Ref):
        return False
    return any(True for _ in refs(node))


def every_op(node: Expr, uses: int) -> bool:
    """Three-address code: each operation is a step of its own."""
    return isinstance(node, Op | Reduce)


def linearise(
    block: Block, reserved: Collection[str] = (), named: Callable[[Expr, int], bool] = worth_naming
) -> Program:
    """Ordered assignments for a block. Dead lets are dropped. Names are the block's own where there is one, a let
    that a result only passes on takes the result's; a name of `reserved`, or a second one, gets a `_`.
    `named(node, number of readers)` decides which inner values become steps.
    """
    return _Lineariser(restrict(block, tuple(r.name for r in block.results)), reserved, named).program()


class _Shapes:
    """Numbers for expressions, equal where two differ only in the names of indices; and free indices by appearance."""

    def __init__(self) -> None:
        self.number: dict[Expr, int] = {}
        self.free: dict[Expr, Axes] = {}
        self.keys: dict[object, int] = {}

    def of(self, root: Expr) -> int:
        for node in walk(root):
            if node not in self.number:
                key = self._key(node)
                self.number[node] = self.keys.setdefault(key, len(self.keys))
        return self.number[root]

    def _key(self, node: Expr) -> object:
        items = _items(node)
        bound = node.index if isinstance(node, Reduce) else None
        seen: dict[Index, None] = {}
        for item in items:
            for index in self.free[item] if isinstance(item, Expr) else (item,) if isinstance(item, Index) else ():
                seen.setdefault(index)
        self.free[node] = free = tuple(i for i in seen if i != bound)
        place = {index: n for n, index in enumerate(free)}

        def code(item: Sub) -> object:
            if isinstance(item, Expr):
                return self.number[item], tuple(place.get(i, -1) for i in self.free[item])
            return place[item] if isinstance(item, Index) else ("at", item)

        dims = tuple(i.dim for i in free)
        return type(node).__name__, _payload(node), dims, bound and bound.dim, tuple(code(item) for item in items)


def _read(node: Expr) -> tuple[Expr, ...]:
    """What a printed node reads: its children, but of the exp of a difference the terms."""
    if isinstance(node, Op) and node.op == "exp":
        terms = signed_terms(node.args[0])
        return tuple(term for _, term in terms) if needs_safe_exp(terms) else node.args
    return children(node)


def _items(node: Expr) -> tuple[Sub, ...]:
    match node:
        case Ref(subs=subs):
            return subs
        case Eye(row=row, col=col):
            return row, col
        case IndexValue(index=index):
            return (index,)
    return children(node)


def _payload(node: Expr) -> object:
    match node:
        case Const(value=value):
            return value
        case Infinity(negative=negative):
            return negative
        case DimValue(dim=dim):
            return dim
        case Ref():
            return node.space, node.name, node.lag, node.value_kind
        case Op(op=op) | Reduce(op=op):
            return op
    return None


@dataclass(frozen=True)
class _Held:
    """A step's name, and its axes as places in the value's free indices by appearance."""

    name: str
    places: tuple[int, ...]


class _Lineariser:
    def __init__(self, block: Block, reserved: Collection[str], named: Callable[[Expr, int], bool]) -> None:
        self.block = block
        self.named = named
        self.taken = set(reserved)
        self.shapes = _Shapes()
        self.steps: list[Step] = []
        self.held: dict[int, _Held] = {}  # by shape
        self.lets: dict[str, str] = {}  # the block's let -> its step
        self.wishes: dict[int, _Held] = {}  # what the block calls a value
        self.passed: dict[str, str] = {}  # let -> the result that only passes it on
        self.uses = self._count()

    def _count(self) -> Counter[int]:
        """Readers of each shape, a shared reader counted once."""
        uses: Counter[int] = Counter()
        for assign in (*self.block.lets, *self.block.results):
            self.shapes.of(assign.value)
            stack = [assign.value]
            while stack:
                node = stack.pop()
                shape = self.shapes.number[node]
                uses[shape] += 1
                if uses[shape] == 1:
                    stack.extend(_read(node))
        return uses

    def program(self) -> Program:
        for result in self.block.results:
            value = result.value
            if isinstance(value, Ref) and value.space == "let" and value.subs == result.indices:
                self.passed.setdefault(value.name, result.name)
        names = {r.name for r in self.block.results}
        wishes = [(self.passed.get(a.name, a.name + "_" * (a.name in names)), a) for a in self.block.lets]
        wishes += [(a.name, a) for a in self.block.results]
        for wish, assign in wishes:
            if (places := self._places(assign)) is not None:
                self.wishes.setdefault(self.shapes.number[assign.value], _Held(wish, places))
        for wish, let in wishes[: len(self.block.lets)]:
            self.lets[let.name] = self._assign(wish, let)
        results = tuple((r.name, self._assign(r.name, r)) for r in self.block.results)
        return Program(tuple(self.steps), results)

    def _places(self, assign: Assign) -> tuple[int, ...] | None:
        """The assignment's indices as places in its value's free ones; None unless it is work with exactly these."""
        free = self.shapes.free[assign.value]
        if not isinstance(assign.value, Op | Reduce) or set(free) != set(assign.indices):
            return None
        return tuple(free.index(i) for i in assign.indices)

    def _assign(self, wish: str, assign: Assign) -> str:
        """The step that holds the assignment's value, made now unless there is one."""
        value, axes = assign.value, assign.indices
        if isinstance(value, Ref) and value.space == "let" and value.subs == axes:
            return self.lets[value.name]
        places = self._places(assign)
        shape = self.shapes.number[value]
        if shape in self.held and self.held[shape].places == places:
            return self.held[shape].name
        body = self._rewrite(value)
        name = self._step(wish, axes, body)
        if places is not None and shape not in self.held:
            self.held[shape] = _Held(name, places)
        return name

    def _rewrite(self, root: Expr) -> Expr:
        """`root` over the steps made so far, making those for the values inside that deserve a name."""
        done: dict[Expr, Expr] = {}
        for node in walk(root):
            done[node] = self._node(node, done, inner=node is not root)
        return done[root]

    def _node(self, node: Expr, done: dict[Expr, Expr], inner: bool) -> Expr:
        body = with_children(node, done.__getitem__)
        if isinstance(body, Ref) and body.space == "let":
            return Ref("let", self.lets[body.name], body.subs, body.value_kind)
        shape, free = self.shapes.number[node], self.shapes.free[node]
        if inner and shape not in self.held and self.named(node, self.uses[shape]):
            wish = self.wishes.get(shape, _Held(_suggest(node), tuple(range(len(free)))))
            axes = tuple(free[place] for place in wish.places)
            self.held[shape] = _Held(self._step(wish.name, axes, body), wish.places)
        if shape not in self.held or not isinstance(node, Op | Reduce):
            return body
        held = self.held[shape]
        return Ref("let", held.name, tuple(free[place] for place in held.places), node.kind)

    def _step(self, wish: str, axes: Axes, value: Expr) -> str:
        name = fresh(wish, self.taken)
        self.taken.add(name)
        self.steps.append(Step(name, axes, value))
        return name


def fresh(wish: str, taken: Collection[str]) -> str:
    """`wish`, with as many `_` as it takes; a name for what has none is numbered, t1, t2, ..."""
    if not wish:
        return next(name for n in count(1) if (name := f"t{n}") not in taken)
    while wish in taken:
        wish += "_"
    return wish


def _suggest(node: Expr) -> str:
    """A readable name for a shared value: exp_g for exp(g[i]), exp_l_m for exp(l.m - r.m), else none."""
    if isinstance(node, Op) and len(node.args) == 1:
        first = next(refs(node))
        return f"{node.op}_{_SIDES.get(first.space, '')}{first.name}"
    return ""


_SIDES = {"left": "l_", "right": "r_", "prev": "prev_"}
