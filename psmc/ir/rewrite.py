"""Walking and rewriting expressions: everything here is memoised, so cost follows the DAG, not the tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from psmc.ir.nodes import Assign, Block, Expr, Eye, Index, IndexValue, Op, Reduce, Ref, Sub


def children(node: Expr) -> tuple[Expr, ...]:
    """Direct subexpressions, gathers inside subscripts included."""
    match node:
        case Op(args=args):
            return args
        case Reduce(body=body):
            return (body,)
        case Ref(subs=subs):
            return tuple(s for s in subs if isinstance(s, Expr))
        case Eye(row=row, col=col):
            return tuple(s for s in (row, col) if isinstance(s, Expr))
    return ()


def walk(*roots: Expr) -> Iterator[Expr]:
    """Each distinct node once, children before parents, in a deterministic order."""
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(r, False) for r in reversed(roots)]
    while stack:
        node, ready = stack.pop()
        if ready:
            yield node
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((c, False) for c in reversed(children(node)))


def refs(*roots: Expr) -> Iterator[Ref]:
    """Each distinct reference once."""
    return (n for n in walk(*roots) if isinstance(n, Ref))


def with_children(node: Expr, visit: Callable[[Expr], Expr]) -> Expr:
    """The same node over visited children."""

    def sub(s: Sub) -> Sub:
        return visit(s) if isinstance(s, Expr) else s

    match node:
        case Op(op=op, args=args):
            return Op(op, tuple(visit(a) for a in args))
        case Reduce(op=op, index=index, body=body):
            return Reduce(op, index, visit(body))
        case Ref(subs=subs) if any(isinstance(s, Expr) for s in subs):
            return Ref(node.space, node.name, tuple(sub(s) for s in subs), node.value_kind, node.lag)
        case Eye(row=row, col=col):
            return Eye(sub(row), sub(col))
    return node


def transform(root: Expr, rule: Callable[[Expr], Expr | None]) -> Expr:
    """Bottom-up: `rule` sees each node with its children already rewritten; None keeps it."""
    done: dict[Expr, Expr] = {}
    for node in walk(root):
        rebuilt = with_children(node, done.__getitem__)
        replaced = rule(rebuilt)
        done[node] = rebuilt if replaced is None else replaced
    return done[root]


def fresh(index: Index, taken: Iterable[str]) -> Index:
    """An index over the same dim whose name is not taken: i, i_1, i_2, ..."""
    names = set(taken)
    if index.name not in names:
        return index
    base = index.name.split("_")[0]
    number = 1
    while f"{base}_{number}" in names:
        number += 1
    return Index(f"{base}_{number}", index.dim)


def rename(root: Expr, subs: Mapping[Index, Sub]) -> Expr:
    """Substitute free indices, capture-free: bound indices that clash are renamed."""
    incoming = {s.name for s in subs.values() if isinstance(s, Index)} | {
        i.name for s in subs.values() if isinstance(s, Expr) for i in s.free
    }

    def index_sub(s: Sub, env: Mapping[Index, Sub]) -> Sub:
        return env.get(s, s) if isinstance(s, Index) else go(s, env) if isinstance(s, Expr) else s

    memo: dict[tuple[Expr, tuple[tuple[Index, Sub], ...]], Expr] = {}

    def go(node: Expr, env: Mapping[Index, Sub]) -> Expr:
        live = {k: v for k, v in env.items() if k in node.free and v != k}
        if not live:
            return node
        key = (node, tuple(sorted(live.items(), key=lambda kv: kv[0])))
        if key in memo:
            return memo[key]
        out: Expr
        match node:
            case IndexValue(index=index):
                target = live[index]
                out = IndexValue(target) if isinstance(target, Index) else _number(target)
            case Reduce(op=op, index=index, body=body):
                bound = fresh(index, incoming) if index.name in incoming else index
                if bound != index:
                    bound = fresh(index, incoming | {i.name for i in body.free})
                    live = {**live, index: bound}
                out = Reduce(op, bound, go(body, live))
            case Ref():
                out = Ref(node.space, node.name, tuple(index_sub(s, live) for s in node.subs), node.value_kind, node.lag)
            case Eye(row=row, col=col):
                out = Eye(index_sub(row, live), index_sub(col, live))
            case _:
                out = with_children(node, lambda child: go(child, live))
        memo[key] = out
        return out

    return go(root, dict(subs))


def _number(sub: Sub) -> Expr:
    from fractions import Fraction

    from psmc.ir.nodes import Const

    return sub if isinstance(sub, Expr) else Const(Fraction(int(sub)))  # type: ignore[arg-type]


def instantiate(definition: Assign, subs: tuple[Sub, ...]) -> Expr:
    """The value of a definition at given subscripts."""
    return rename(definition.value, dict(zip(definition.indices, subs, strict=True)))


def replace_refs(root: Expr, rule: Callable[[Ref], Expr | None]) -> Expr:
    """Substitute references (after their own gathers were rewritten). A substituted value's free indices
    must come from the reference's subscripts; bound indices above it are renamed when they would capture."""
    return transform(root, lambda n: rule(n) if isinstance(n, Ref) else None)


def substitute(root: Expr, definitions: Mapping[tuple[str, str], Assign]) -> Expr:
    """Replace every Ref whose (space, name) is defined by its definition at the reference's subscripts."""

    def rule(ref: Ref) -> Expr | None:
        definition = definitions.get((ref.space, ref.name))
        return None if definition is None else instantiate(definition, ref.subs)

    return replace_refs(root, rule)


def inline(block: Block) -> Block:
    """The same block without lets. May grow where a let is read at several subscripts; shared nodes stay shared."""
    env: dict[tuple[str, str], Assign] = {}
    for let in block.lets:
        env["let", let.name] = replace(let, value=substitute(let.value, env))
    return Block(results=tuple(replace(r, value=substitute(r.value, env)) for r in block.results))


def map_values(block: Block, fn: Callable[[Expr], Expr]) -> Block:
    """Apply `fn` to every right-hand side."""
    return Block(
        lets=tuple(replace(a, value=fn(a.value)) for a in block.lets),
        results=tuple(replace(a, value=fn(a.value)) for a in block.results),
    )
