"""Printing one IR expression as a torch expression.

A printed tensor knows which indices its trailing axes are; operands are aligned to each other with `[..., :, None]`.
What depends on no tensor stays a Python number.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from fractions import Fraction

from psmc.codegen.torch_ops import (
    ATOM,
    CONSTANT_REDUCTIONS,
    NUMBER_OPS,
    PRODUCT,
    TENSOR_OPS,
    TENSOR_REDUCTIONS,
    UNARY,
    Row,
)
from psmc.codegen.torch_value import Axes, Like, Printed, as_number, atom, number, subscript
from psmc.ir import Const, DimValue, Expr, Eye, Index, IndexValue, Infinity, Op, Reduce, Ref, Sub
from psmc.ir.ops import Kind, join
from psmc.ir.query import needs_safe_exp, signed_terms
from psmc.ir.rewrite import walk

NAMESPACES = {"input": "x", "param": "p", "left": "l", "right": "r", "state": "s", "prev": "prev"} | {
    "level": "at", "prev_level": "prev_at"
}  # fmt: skip


class ExprPrinter:
    """Prints expressions of one function. `local` gives what a let's name stands for (its axes are its subscripts),
    `definition` its value, `helpers` collects the names of the pasted functions used."""

    def __init__(
        self, like: Like, local: dict[str, Printed], definition: Callable[[Ref], Expr | None], helpers: set[str]
    ) -> None:
        self.like = like
        self.local = local
        self.definition = definition
        self.helpers = helpers
        self.done: dict[Expr, Printed] = {}
        self.order: dict[Index, int] = {}

    def show(self, root: Expr, axes: Axes) -> Printed:
        """`root` with its axes in the order it comes; `axes` is the order to prefer."""
        self.order = {i: n for n, i in enumerate(_order(root, axes))}
        self.done = {}
        for node in walk(root):
            self.done[node] = self.node(node)
        return self.done[root]

    def part(self, root: Expr, axes: Axes, limit: int) -> Expr | None:
        """Where `root` makes a text longer than `limit`: the part whose text is nearest to half of it."""
        text = self.show(root, axes).text
        if len(text) <= limit:
            return None
        kept = {root, *(n.args[0] for n in walk(root) if isinstance(n, Op) and n.op == "exp")}
        parts: list[tuple[int, Expr]] = []
        for node in walk(root):
            own = self.done[node]
            work = isinstance(node, Op | Reduce) and node not in kept and own.axes is not None
            if work and len(own.text) > limit // 5 and own.text in text:
                parts.append((abs(2 * len(own.text) - len(text)), node))
        return min(parts, key=lambda p: p[0])[1] if parts else None

    def node(self, node: Expr) -> Printed:
        match node:
            case Const(value=value):
                return number(value)
            case Infinity(negative=negative):
                return Printed("-math.inf", UNARY, None, "real") if negative else atom("math.inf", "real")
            case DimValue(dim=dim):
                return atom(f"n.{dim}", "int")
            case IndexValue(index=index):
                return self.position(index)
            case Eye(row=row, col=col):
                return self.eye(row, col)
            case Ref():
                return self.ref(node)
            case Reduce():
                return self.reduce(node)
            case Op():
                return self.op(node)
        raise AssertionError(node)

    # --- leaves -------------------------------------------------------------------------------

    def position(self, sub: Sub) -> Printed:
        if isinstance(sub, Index):
            return Printed(f"torch.arange(n.{sub.dim}, device={self.like.device})", ATOM, (sub,), "int")
        return self.done[sub] if isinstance(sub, Expr) else atom(str(sub), "int")

    def eye(self, row: Sub, col: Sub) -> Printed:
        if row == col:
            return number(Fraction(1))
        if isinstance(row, Index) and isinstance(col, Index) and row.dim == col.dim:
            text = f"torch.eye(n.{row.dim}, dtype={self.like.dtype}, device={self.like.device})"
            return Printed(text, ATOM, (row, col), "real")
        equal = self.apply(TENSOR_OPS["eq"], [self.position(row), self.position(col)], "bool")
        if equal.axes is None:
            return Printed(f"int({equal.text})", ATOM, None, "int")
        return Printed(f"{equal.within(ATOM)}.to({self.like.dtype})", ATOM, equal.axes, "real")

    def ref(self, ref: Ref) -> Printed:
        base = self.local[ref.name] if ref.space == "let" else Printed(slot(ref), ATOM, (), ref.value_kind)
        subs = ref.subs
        plain = [s for s in subs if isinstance(s, Index)]
        fixed = [self.position(s) for s in subs if not isinstance(s, Index)]
        if len(set(plain)) == len(plain) and all(f.axes is None for f in fixed):
            if not fixed:
                return replace(base, axes=base.axes if base.axes is None else tuple(plain))
            places = (":" if isinstance(s, Index) else self.position(s).text for s in subs)
            return subscript(base.text, tuple(places), tuple(plain), base.kind)
        if not fixed and len(plain) == 2:
            return Printed(f"{base.text}.diagonal(dim1=-2, dim2=-1)", ATOM, (plain[0],), base.kind)
        positions = [self.position(s) for s in subs]
        axes = self.union(positions)
        self.helpers.add("_gather")
        texts = ", ".join(self.align(p, axes).text for p in positions)
        return Printed(f"_gather({base.text}, {len(axes)}, {texts})", ATOM, axes, base.kind)

    # --- operators ----------------------------------------------------------------------------

    def op(self, node: Op) -> Printed:
        args = [self.done[a] for a in node.args]
        if node.op == "exp":
            terms = signed_terms(node.args[0], self.definition)
            if needs_safe_exp(terms):
                return self.exp_sum([(sign, self.term(term)) for sign, term in terms], node.kind)
        if all(a.axes is None for a in args) and as_number(node):
            return self.apply(NUMBER_OPS[node.op], args, node.kind)
        if node.op in ("real", "imag", "conj") and args[0].kind != "complex":
            if node.op != "imag":
                return args[0]
            text = "0" if args[0].axes is None else f"torch.zeros_like({args[0].text})"
            return Printed(text, ATOM, args[0].axes, "int" if args[0].axes is None else args[0].kind)
        if node.op == "clamp" and args[1].axes is None and args[2].axes is None:
            x, lo, hi = self.operands(node, args)
            return Printed(f"{x.within(ATOM)}.clamp({lo.text}, {hi.text})", ATOM, x.axes, node.kind)
        return self.apply(TENSOR_OPS[node.op], self.operands(node, args), node.kind)

    def term(self, term: Expr) -> Printed:
        """A term of an exponent; one seen inside a let was not printed yet."""
        for node in walk(term):
            if node not in self.done:
                self.done[node] = self.node(node)
        return self.done[term]

    def exp_sum(self, terms: Sequence[tuple[int, Printed]], kind: Kind) -> Printed:
        self.helpers.add("_exp_sum")
        signed = [t if sign > 0 else Printed(f"-{t.within(UNARY)}", UNARY, t.axes, t.kind) for sign, t in terms]
        tensors = [self.like.full("()", t) if t.axes is None else self.real(t) for t in signed]
        axes = self.union(tensors)
        texts = ", ".join(self.align(t, axes).text for t in tensors)
        return Printed(f"_exp_sum({texts})", ATOM, axes, kind)

    def operands(self, node: Op, args: list[Printed]) -> list[Printed]:
        """Operands as torch wants them: real where the result is, tensors where a function takes no numbers."""
        tensors = [a for a in args if a.axes is not None and a.kind in ("real", "complex")]
        out = []
        for place, arg in enumerate(args):
            kind = "real" if node.op == "complex" else join((arg.kind, node.kind))
            promotes = node.op in _PROMOTING and any(t is not arg for t in tensors)
            if arg.axes is not None and kind in ("real", "complex") and not promotes:
                arg = self.real(arg)
            # Two numbers make torch take its default dtype, whatever the dtype of the work is.
            takes = _TAKES_NUMBERS.get(node.op, ())
            alone = place in takes[:1] and all(a.axes is None or a.kind == "bool" for a in args)
            out.append(self.like.full("()", arg) if arg.axes is None and (alone or place not in takes) else arg)
        return out

    def real(self, value: Printed) -> Printed:
        """An int tensor as a real one."""
        if value.kind != "int":
            return value
        return Printed(f"{value.within(ATOM)}.to({self.like.dtype})", ATOM, value.axes, "real")

    def apply(self, row: Row, args: Sequence[Printed], kind: Kind) -> Printed:
        numbers = all(a.axes is None for a in args)
        axes = None if numbers else self.union(args)
        aligned = args if axes is None else [self.align(a, axes) for a in args]
        texts = (a.within(need) for a, need in zip(aligned, row.needs, strict=False))
        self.helpers.update(row.helper.split() if row.helper else ())
        return Printed(row.text.format(*texts), row.precedence, axes, kind)

    # --- reductions ---------------------------------------------------------------------------

    def reduce(self, node: Reduce) -> Printed:
        body = self.done[node.body]
        if node.op == "sum" and (product := self.einsum(node)) is not None:
            return product
        if body.axes is None or node.index not in body.axes:
            size = atom(f"n.{node.index.dim}", "int")
            return self.apply(CONSTANT_REDUCTIONS[node.op], [body, size], node.kind)
        axis = body.axes.index(node.index) - len(body.axes)
        row = TENSOR_REDUCTIONS[node.op]
        text = row.text.format(body.within(row.needs[0]), axis)
        return Printed(text, row.precedence, tuple(i for i in body.axes if i != node.index), body.kind)

    def einsum(self, node: Reduce) -> Printed | None:
        """A sum of a product of tensors of one kind, nested sums taken together."""
        bound = [node.index]
        body = node.body
        while isinstance(body, Reduce) and body.op == "sum" and body.index not in bound:
            bound.append(body.index)
            body = body.body
        factors = [self.done[f] for f in _factors(body)]
        numbers = [f for f in factors if f.axes is None]
        tensors = [f for f in factors if f.axes is not None]
        inside = {i for t in tensors for i in t.axes or ()}
        one_kind = {t.kind for t in tensors} in ({"real"}, {"complex"})
        if len(tensors) < 2 or not one_kind or not inside.issuperset(bound):
            return None
        axes = tuple(i for i in self.union(tensors, sort=True) if i not in bound)
        letters = _letters((*axes, *bound))
        sides = ",".join("..." + "".join(letters[i] for i in t.axes or ()) for t in tensors)
        target = "..." + "".join(letters[i] for i in axes)
        out = Printed(f'torch.einsum("{sides}->{target}", {", ".join(t.text for t in tensors)})', ATOM, axes, node.kind)
        for factor in numbers:
            out = Printed(f"{factor.within(PRODUCT)} * {out.within(UNARY)}", PRODUCT, axes, node.kind)
        return out

    # --- axes ---------------------------------------------------------------------------------

    def union(self, args: Iterable[Printed], sort: bool = False) -> Axes:
        """All indices of the operands: in the order of one that has them all, else in the preferred order."""
        lists = [a.axes for a in args if a.axes is not None]
        every = {i for axes in lists for i in axes}
        if not sort:
            for axes in lists:
                if len(axes) == len(every):
                    return axes
        return tuple(sorted(every, key=lambda i: self.order.get(i, len(self.order))))

    def align(self, value: Printed, axes: Axes) -> Printed:
        """`value` with exactly these trailing axes, of size 1 where it does not depend on the index."""
        if value.axes is None or value.axes == axes:
            return value
        own = tuple(i for i in axes if i in value.axes)
        text = value.within(ATOM)
        if own != value.axes:
            if len(own) == 2:
                text += ".mT"
            else:
                target = ", ".join(str(own.index(i) - len(own)) for i in value.axes)
                text += f".movedim(({', '.join(str(n - len(own)) for n in range(len(own)))}), ({target}))"
        if own == axes:
            return Printed(text, ATOM, axes, value.kind)
        if own != value.axes or not value.base:
            return subscript(text, tuple(":" if i in own else "None" for i in axes), axes, value.kind)
        # One subscript for both: fixed places stay before the axis that they stood before.
        rest = list(value.places)
        places: list[str] = []
        for index in axes:
            while index in own and rest[0] != ":":
                places.append(rest.pop(0))
            places.append(rest.pop(0) if index in own else "None")
        return subscript(value.base, (*places, *rest), axes, value.kind)


# Operators where torch itself takes an int tensor beside a real one.
_PROMOTING = {"add", "sub", "mul", "div", "lt", "le", "gt", "ge", "eq", "ne", "max", "min", "where"}
# The operands that may stay Python numbers while another is a tensor.
_TAKES_NUMBERS: dict[str, tuple[int, ...]] = {
    **{op: (0, 1) for op in ("add", "sub", "mul", "div", "pow", "max", "min", "and", "or")},
    **{op: (0, 1) for op in ("lt", "le", "gt", "ge", "eq", "ne")},
    "where": (1, 2),
    "clamp": (1, 2),
}


def slot(ref: Ref) -> str:
    """Where a printed function finds a tensor: x.q, x.q_lag1, l.S, prev.S."""
    return ref.name if ref.space == "let" else f"{NAMESPACES[ref.space]}.{lagged(ref.name, ref.lag)}"


def lagged(name: str, lag: int) -> str:
    """The attribute that holds an input `lag` tokens ago."""
    return f"{name}_lag{lag}" if lag else name


def _order(root: Expr, axes: Axes) -> list[Index]:
    """All indices of an expression: `axes`, and the others where the tensors that have them want them."""
    order = list(axes)
    subs = [[s for s in node.subs if isinstance(s, Index)] for node in walk(root) if isinstance(node, Ref)]
    for plain in sorted(subs, key=len, reverse=True):
        for place, index in enumerate(plain):
            if index not in order:
                later = [order.index(i) for i in plain[place + 1 :] if i in order]
                order.insert(min(later, default=len(order)), index)
    bound = [node.index for node in walk(root) if isinstance(node, Reduce)]
    return list(dict.fromkeys((*order, *bound)))


def _factors(node: Expr) -> list[Expr]:
    out: list[Expr] = []
    stack = [node]
    while stack:
        top = stack.pop()
        if isinstance(top, Op) and top.op == "mul":
            stack += reversed(top.args)
        else:
            out.append(top)
    return out


def _letters(axes: Axes) -> dict[Index, str]:
    letters: dict[Index, str] = {}
    for index in axes:
        wish = index.name[0]
        taken = letters.values()
        free = wish if wish in string.ascii_letters and wish not in taken else ""
        letters[index] = free or next(c for c in string.ascii_lowercase if c not in taken)
    return letters
