"""Walking and rewriting expressions: everything here is memoised, so cost follows the DAG, not the tree."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

from psmc.ir.nodes import Assign, Block, Expr, Eye, Index, IndexValue, Op, Reduce, Ref, Sub, subs_free


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


_Env = tuple[tuple[Index, Sub], ...]  # a substitution, sorted by index


def rename(root: Expr, subs: Mapping[Index, Sub]) -> Expr:
    """Substitute free indices, capture-free: bound indices that clash are renamed. Iterative: gradients are deep."""
    memo: dict[tuple[Expr, _Env], Expr] = {}

    def live(node: Expr, env: _Env) -> _Env:
        free = node.free
        return env if all(k in free for k, _ in env) else tuple(kv for kv in env if kv[0] in free)

    def enter(node: Expr, env: _Env) -> _Env:
        """The substitution below `node`: a reduction hides its own index, or gives it another name where that of an
        incoming index, one renamed further out among them, is the same."""
        if not isinstance(node, Reduce):
            return env
        incoming = {i.name for _, s in env for i in subs_free((s,))}
        if node.index.name not in incoming:
            return env
        bound = fresh(node.index, incoming | {i.name for i in node.body.free})
        return tuple(sorted((*env, (node.index, bound)), key=lambda kv: kv[0]))

    def build(node: Expr, env: _Env) -> Expr:
        def visit(child: Expr) -> Expr:
            inner = live(child, env)
            return memo[child, inner] if inner else child

        match node:
            case Op(op=op, args=args):
                return Op(op, tuple([visit(a) for a in args]))
            case Reduce(op=op, index=index, body=body):
                bound = dict(env).get(index, index)
                assert isinstance(bound, Index)
                return Reduce(op, bound, visit(body))
        moved = dict(env)

        def sub(s: Sub) -> Sub:
            return moved.get(s, s) if isinstance(s, Index) else visit(s) if isinstance(s, Expr) else s

        match node:
            case Ref():
                return Ref(node.space, node.name, tuple(sub(s) for s in node.subs), node.value_kind, node.lag)
            case Eye(row=row, col=col):
                return Eye(sub(row), sub(col))
            case IndexValue(index=index):
                target = moved[index]
                return IndexValue(target) if isinstance(target, Index) else _number(target)
        return node

    start = live(root, tuple(sorted(((k, v) for k, v in subs.items() if k != v), key=lambda kv: kv[0])))
    stack: list[tuple[Expr, _Env]] = [(root, start)] if start else []
    while stack:
        node, env = stack[-1]
        below = enter(node, env)
        waiting = [(c, inner) for c in children(node) if (inner := live(c, below)) and (c, inner) not in memo]
        if waiting:
            stack += waiting
        else:
            memo[node, env] = build(node, below)
            stack.pop()
    return memo[root, start] if start else root


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
