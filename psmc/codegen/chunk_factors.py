"""Which parts of a spec the chunk kernels compute themselves: q, b and the logs of the decay from a token's inputs, the
output from y, and the gradients of all of these.

A factor is fused where it is elementwise over its own index, in inputs and params that have that index alone. A number
a token is fused where it is computed from inputs, params and small components that have no index. PyTorch computes
every other factor. The readout is fused where it is elementwise over the value in y, in w (the normaliser's readout),
in sums over the key of elementwise terms, and in inputs, params and numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

from psmc.codegen.chunk_code import factors, number_text, queries, split_number
from psmc.codegen.torch_code import Signature, Source, inputs_like, print_block
from psmc.derive.simplify import ONE, make
from psmc.derive.vjp import vjp
from psmc.ir import Aggregator, Assign, Block, Const, DimValue, Expr, Index, Infinity, Op, Reduce, Ref, Space
from psmc.ir.rewrite import refs, transform, walk
from psmc.plan.chunked import split_layers
from psmc.structure.report import Affine, Linear, Structure

SIZE: Space = "right"  # of a dim's size as a scalar
Y, W, C, COTANGENT = "y", "w", "c", "do"


@dataclass(frozen=True)
class Raw:
    """A tensor that kernels read: an input (with its lag), a param, a small component after its token (kind 'at') or
    before it ('before'), or a factor that torch computes ('factor', under the factor's name)."""

    name: str
    kind: str  # input, param, at, before, factor
    lag: int = 0

    @property
    def ref(self) -> Ref:
        space = {"input": "input", "param": "param", "factor": "state"}[self.kind]
        return Ref(space, self.name, (), "real", self.lag)  # type: ignore[arg-type]

    @property
    def attribute(self) -> str:
        return self.name + (f"_lag{self.lag}" if self.lag else "")


@dataclass(frozen=True)
class Fused:
    """keys, values: what has the index of the key, of the value; c: what lies behind C. q, b, log (None: no decay over
    the key): scalar expressions over `keys`; log_value (None: no decay over the value): over `values` and c. scale: the
    text of the number that multiplies q. numbers: a token has one of each, `log` and `n` by name, s0, ... for the
    readout: expressions over `scalars`, x0, x1, .... sums: terms of sums over the key. readout: over y, w, c, sums (e0,
    ...), values, numbers; None: the output is y. seen: y as an expression over the output (its ref is Y itself where y
    must be kept)."""

    stack: tuple[Affine, ...]
    output: str
    shift: int
    keys: tuple[Raw, ...]
    values: tuple[Raw, ...]
    c: Raw
    q: Expr
    b: Expr
    log: Expr | None
    log_value: Expr | None
    scale: str
    scalars: tuple[Raw, ...]
    numbers: tuple[Assign, ...]
    torch_rows: tuple[Assign, ...]
    sums: tuple[Expr, ...]
    readout: Expr | None
    seen: Expr | None

    @property
    def norm(self) -> bool:
        return len(self.stack) > 1

    @property
    def decay(self) -> int:
        return 2 if self.log is not None else 1 if any(a.name == "log" for a in self.numbers) else 0


def scalar(name: str) -> Ref:
    """A value of the kernel by name."""
    return Ref("state", name, (), "real")


def fuse(agg: Aggregator, structure: Structure) -> Fused | None:
    """None where some part of the spec is not of this kind: then kernels see factors alone."""
    _, stacks = split_layers(structure)
    if len(stacks) != 1 or len(agg.output.results) != 1 or len(structure.readout) != 1:
        return None
    (stack,), (readout,) = stacks, structure.readout
    head = stack[0]
    if agg.component(head.component).kind != "real":
        return None
    single = [a.value is None for a in stack] in ([False], [False, True])
    if head.rank or head.outer or head.injection.rank != 1 or not single or head.decay.logs is None:
        return None
    if len(readout.linear) != len(stack):
        return None
    if len(stack) == 2 and (stack[1].injection.right[0].value != ONE or head.decay.kind in ("V", "KV")):
        return None
    asked = queries(stack, list(readout.linear))
    if len(asked) != 1 or len({p.component for p in readout.linear}) != len(stack):
        return None
    ((q, p),) = asked
    if (q is None) == (p is None):
        return None
    if any(len(part.indices) != (part.component == head.component) for part in readout.linear):
        return None
    found = _Fusion(agg, head, stack, factors(stack, tuple(asked))).whole(readout.linear, readout.epilogue)
    return found if found is not None and _reaches_back(found) else None


def _reaches_back(f: Fused) -> bool:
    """Whether the readout passes a gradient on to all that the kernels scan; 'stop' or a sign would not."""
    met = {name for name, _ in transposed(f)[0]}
    return f.readout is None or met >= ({"y", "w"} if f.norm else {"y"})


class _Fusion:
    def __init__(self, agg: Aggregator, head: Affine, stack: tuple[Affine, ...], rows: list[Assign]) -> None:
        self.agg, self.head, self.stack = agg, head, stack
        self.rows = {r.name: r for r in rows}
        self.dims = {t.name: t.dims for t in (*agg.leaf_inputs, *agg.params)} | {c.name: c.dims for c in agg.state}
        self.keys: list[Raw] = []
        self.values: list[Raw] = []
        self.numbers: list[Assign] = []
        self.torch_rows: list[Assign] = []
        self.sums: list[Expr] = []

    def whole(self, linear: tuple[Linear, ...], epilogue: Assign) -> Fused | None:
        shift = int("p0" in self.rows)
        q, scale = self._scaled(self.rows["p0" if shift else "q0"])
        b = self._numbered(self.rows["b0"])
        log = None
        if "log_key" in self.rows:
            log = self._factor(self.rows["log_key"])
        elif "log" in self.rows:
            self.numbers.append(self.rows["log"])
        c = self._behind(self.rows["c0"])
        log_value = self._over_value(self.rows["log_value"], c) if "log_value" in self.rows else None
        shown = self._readout(linear, epilogue, c)
        if shown is None:
            return None
        direct = shown == scalar(Y)
        scalars: list[Raw] = []
        numbers = tuple(self._lifted(a, scalars) for a in self.numbers)
        return Fused(
            self.stack, epilogue.name, shift, tuple(self.keys), tuple(self.values), c, q, b, log, log_value, scale,
            tuple(scalars), numbers, tuple(self.torch_rows), tuple(self.sums), None if direct else shown,
            None if direct else _seen(shown),
        )  # fmt: skip

    def _scaled(self, row: Assign) -> tuple[Expr, str]:
        """A query without the number that multiplies it."""
        value = row.value
        if isinstance(value, Op) and value.op in ("mul", "div"):
            times, (left, right) = value.op == "mul", value.args
            if times and not any(isinstance(x, Ref) for x in walk(left)):
                left, right = right, left
            if not right.free and not any(isinstance(x, Ref) for x in walk(right)):
                text = number_text(right if times else Op("div", (ONE, right)))
                if text is not None:
                    return self._factor(Assign(row.name, row.indices, left)), text
        return self._factor(row), "1.0"

    def _numbered(self, row: Assign) -> Expr:
        """b without the number a token that multiplies it, for a decay that is not over the key."""
        split = None if "log_key" in self.rows else split_number(row)
        if split is None:
            return self._factor(row)
        vector, number = split
        self.numbers.append(Assign("n", number.indices, number.value))
        return self._factor(vector)

    def _factor(self, row: Assign) -> Expr:
        """The row as an expression over `keys`; if it is not elementwise, torch computes it and it is a key itself."""
        return self._held(row, self.keys)

    def _held(self, row: Assign, held: list[Raw]) -> Expr:
        kept = len(held)
        found = self._elementwise(row.value, row.indices[-1], held)
        if found is None or not any(isinstance(x, Ref) and x.space != SIZE for x in walk(found)):
            del held[kept:]
            self.torch_rows.append(row)
            held.append(Raw(row.name, "factor"))
            return held[-1].ref
        return found

    def _over_value(self, row: Assign, c: Raw) -> Expr:
        """An expression over `values` and c."""
        found = self._held(row, self.values)
        self.values = [x for x in self.values if x != c]
        return transform(found, lambda node: scalar(C) if node == c.ref else None)

    def _behind(self, row: Assign) -> Raw:
        found: list[Raw] = []
        value = self._elementwise(row.value, row.indices[-1], found)
        if isinstance(value, Ref) and found and found[0].kind == "input":
            return found[0]
        self.torch_rows.append(row)
        return Raw("c0", "factor")

    def _raw(self, ref: Ref, index: Index, held: list[Raw]) -> Expr | None:
        if ref.space not in ("input", "param") or ref.kind != "real" or ref.subs != (index,):
            return None
        if self.dims[ref.name] != (index.dim,):
            return None
        raw = Raw(ref.name, ref.space, ref.lag)
        if raw not in held:
            held.append(raw)
        return raw.ref

    def _elementwise(self, expr: Expr, index: Index, held: list[Raw]) -> Expr | None:
        """`expr` as a scalar expression; None if it is not elementwise over `index`."""
        failed = False

        def rule(node: Expr) -> Expr | None:
            nonlocal failed
            if isinstance(node, Ref):
                found = self._raw(node, index, held)
                failed |= found is None
                return found
            if isinstance(node, DimValue):
                failed |= node.dim not in (self.head.key.dim, self.head.value and self.head.value.dim)
                return self._size(node)
            failed |= not isinstance(node, (Op, Const, Infinity)) or node.kind == "complex"
            return None

        found = transform(expr, rule)
        return None if failed else found

    def _lifted(self, number: Assign, scalars: list[Raw]) -> Assign:
        """A number a token over `scalars`; where it reads anything else, a scalar of its own."""
        kept, failed = len(scalars), False
        kinds = {"input": "input", "param": "param", "state": "at", "prev": "before"}

        def place(raw: Raw) -> Expr:
            if raw not in scalars:
                scalars.append(raw)
            return scalar(f"x{scalars.index(raw)}")

        def rule(node: Expr) -> Expr | None:
            nonlocal failed
            if isinstance(node, Ref):
                ours = node.space in kinds and node.kind == "real" and not self.dims.get(node.name, node.subs)
                failed |= not ours
                return place(Raw(node.name, kinds[node.space], node.lag)) if ours else None
            if isinstance(node, DimValue):
                failed |= node.dim not in (self.head.key.dim, self.head.value and self.head.value.dim)
                return self._size(node)
            failed |= not isinstance(node, (Op, Const, Infinity)) or node.kind == "complex"
            return None

        found = transform(number.value, rule)
        if failed or not any(isinstance(x, Ref) and x.space != SIZE for x in walk(found)):
            del scalars[kept:]
            self.torch_rows.append(number)
            found = place(Raw(number.name, "factor"))
        return Assign(number.name, (), found)

    def _size(self, node: DimValue) -> Ref:
        return Ref(SIZE, "K" if node.dim == self.head.key.dim else "V", (), "real")

    def _readout(self, linear: tuple[Linear, ...], epilogue: Assign, c: Raw) -> Expr | None:
        (index,) = epilogue.indices
        named = {x.name: scalar(Y if x.component == self.head.component else W) for x in linear}
        held = list(self.values)

        def show(node: Expr) -> Expr | None:
            if isinstance(node, Ref) and node.space == "let":
                return named[node.name]
            if isinstance(node, (Const, Infinity)):
                return node
            if isinstance(node, DimValue):
                return self._size(node) if node.dim in (self.head.key.dim, index.dim) else None
            if isinstance(node, Reduce):
                return self._sum(node)
            inner = list(walk(node))
            if index not in node.free and not any(isinstance(x, Ref) and x.space == "let" for x in inner):
                if not any(isinstance(x, Ref) for x in inner) or node.kind != "real":
                    return self._parts(node, show)
                whole = not any(isinstance(x, Reduce) for x in inner)
                return self._number(node) if whole else self._parts(node, show)
            if isinstance(node, Ref):
                found = self._raw(node, index, held)
                return scalar(C) if found == c.ref else found
            return self._parts(node, show)

        shown = show(epilogue.value)
        self.values = [x for x in held if x != c]
        return shown

    @staticmethod
    def _parts(node: Expr, show: object) -> Expr | None:
        assert callable(show)
        if not isinstance(node, Op) or node.kind == "complex":
            return None
        args = [show(a) for a in node.args]
        return None if any(a is None for a in args) else Op(node.op, tuple(args))

    def _sum(self, node: Reduce) -> Expr | None:
        if node.op != "sum" or node.index.dim != self.head.key.dim or node.free:
            return None
        term = self._elementwise(node.body, node.index, self.keys)
        if term is None:
            return None
        if term not in self.sums:
            self.sums.append(term)
        return scalar(f"e{self.sums.index(term)}")

    def _number(self, node: Expr) -> Expr:
        known = [a for a in self.numbers if a.name[0] == "s"]
        for a in known:
            if a.value == node:
                return scalar(a.name)
        self.numbers.append(Assign(f"s{len(known)}", (), node))
        return scalar(self.numbers[-1].name)


def _seen(readout: Expr) -> Expr:
    """y as an expression over what backward keeps, `seen`: the output if y can be had from it without loss, else y."""
    y = scalar(Y)
    if isinstance(readout, Op) and readout.op == "div" and readout.args[0] == y and y not in walk(readout.args[1]):
        return make("mul", scalar("seen"), readout.args[1])
    return scalar("seen")


def print_fused(agg: Aggregator, structure: Structure) -> tuple[Source, str] | None:
    """The torch function of the factors that are not fused, and the literal of the `kit_layers.FusedLayer`."""
    f = fuse(agg, structure)
    if f is None:
        return None
    block = Block(results=f.torch_rows)
    source = print_block(agg, block, Signature("given_0", "x, s, prev, p, n", inputs_like(agg)))
    keys, values, scalars = (tuple((r.name, r.kind, r.lag) for r in raws) for raws in (f.keys, f.values, f.scalars))
    shown = sum(a.name[0] == "s" for a in f.numbers)
    return source, (
        f"FusedLayer({keys!r}, {(f.c.name, f.c.kind, f.c.lag)!r}, {values!r}, {scalars!r}, {shown}, given_0, "
        f"lambda n: {f.scale}, "
        f"{f.shift}, {f.decay}, {f.log_value is not None}, {f.output!r})"
    )


_Pulled = tuple[tuple[str, Expr], ...]


def transposed(f: Fused) -> tuple[_Pulled, _Pulled, _Pulled]:
    """Cotangents as (name, scalar expression), those that are not 0, in three groups: what the readout gives y, w, c,
    values, sums, numbers; what the factors and sums give each key; what the log over the value gives c and values."""
    sums = [scalar(f"e{n}") for n in range(len(f.sums))]
    shown = [scalar(a.name) for a in f.numbers if a.name[0] == "s"]
    back: list[tuple[str, Expr]] = []
    if f.readout is not None:
        wrt = [scalar(Y), scalar(W), scalar(C), *(v.ref for v in f.values), *sums, *shown]
        names = ["y", "w", "c_read", *(f"v{n}" for n in range(len(f.values))), *(x.name for x in (*sums, *shown))]
        found = vjp([f.readout], [scalar(COTANGENT)], wrt)
        back = [(n, _again(e, f)) for n, e in zip(names, found, strict=True) if e is not None]
    rows = [f.q, f.b, *([] if f.log is None else [f.log]), *f.sums]
    logs = [] if f.log is None else ["dlog"]
    given = [scalar(n) for n in ("dq", "db", *logs, *(f"de{n}" for n in range(len(f.sums))))]
    through = vjp(rows, given, [k.ref for k in f.keys])
    over_value: list[Expr | None] = []
    if f.log_value is not None:
        over_value = vjp([f.log_value], [scalar("dlog")], [scalar(C), *(v.ref for v in f.values)])
    names = ["c", *(f"v{n}" for n in range(len(f.values)))]
    return (
        tuple(back),
        tuple((f"k{n}", e) for n, e in enumerate(through) if e is not None),
        tuple((n, e) for n, e in zip(names, over_value, strict=False) if e is not None),
    )


def numbers_transposed(f: Fused) -> _Pulled:
    """The cotangents of the scalars x0, x1, ... that are not 0, over those of the numbers (glog, gn, gs0, ...)."""
    wrt = [scalar(f"x{n}") for n in range(len(f.scalars))]
    found = vjp([a.value for a in f.numbers], [scalar(f"g{a.name}") for a in f.numbers], wrt)
    return tuple((x.name, e) for x, e in zip(wrt, found, strict=True) if e is not None)


def _again(expr: Expr, f: Fused) -> Expr:
    y = scalar(Y)
    return transform(expr, lambda n: f.seen if n == y else None)


def reads_seen(exprs: tuple[Expr, ...]) -> bool:
    return any(r.name == "seen" for r in refs(*exprs))


__all__ = [
    "COTANGENT", "SIZE", "Fused", "Raw", "fuse", "numbers_transposed", "print_fused", "reads_seen", "scalar",
    "transposed",
]  # fmt: skip
