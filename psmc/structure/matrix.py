"""A component's step in the form S_t = D ⊙ S_{t-1} + U (Wᵀ S_{t-1}) + B Cᵀ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from psmc.derive.affine import BothSidesError, affine
from psmc.derive.logs import log_decay
from psmc.derive.semiring import PLUS_TIMES, NotAffineError
from psmc.derive.simplify import ONE, ZERO, make
from psmc.ir import Assign, Expr, Index, Kind
from psmc.ir.rewrite import refs, rename
from psmc.structure.factor import Columns, diagonal_and_low_rank, factored
from psmc.structure.products import Context, Expansion, NotSeparableError, expand, product, tidy
from psmc.structure.report import Affine, Decay, DecayKind, Term

IsPositive = Callable[[Expr], bool]
_Axes = tuple[int, int | None]  # positions of key and value


def affine_step(
    step: Assign,
    kind: Kind,
    contracted: Sequence[int],
    context: Context,
    is_positive: IsPositive,
    lanes: Sequence[str] = (),
) -> Affine | None:
    """The factored step of a component with dims, None if it has no such form.

    `contracted` are the positions that outputs sum over. The key is the position that the transition acts on, else the
    one that outputs contract, else the first; of several choices for the value the one of least rank, then one that is
    none of `lanes` (dims that everything has), then one without a decay of its own.
    """
    context = replace(context, taken=context.taken | {i.name for i in step.indices})
    try:
        group = affine([step], PLUS_TIMES, {step.name: kind})
    except (NotAffineError, BothSidesError):
        return None
    entry = group.entries[step.name, step.name]
    found: list[Affine] = []
    for axes in _axes(len(step.indices), group.acted, contracted):
        try:
            found.append(_on_axes(step, axes, entry.value, group.column, group.rest[step.name], context, is_positive))
        except NotSeparableError:
            continue

    def cost(a: Affine) -> tuple[int, int, bool, bool]:
        lane = a.value is not None and a.value.dim in lanes
        return a.rank, a.injection.rank, lane, a.decay.kind in ("V", "KV")

    return min(found, key=cost, default=None)


def _axes(rank: int, acted: int | None, contracted: Sequence[int]) -> list[_Axes]:
    """Choices of (key, value), preferred first."""
    if acted is not None:
        keys = [acted]
    elif len(contracted) == 1:
        keys = list(contracted)
    else:
        keys = [0] if rank else []
    if rank == 1:
        return [(k, None) for k in keys if acted is not None or contracted]
    return [(k, v) for k in keys for v in reversed(range(rank)) if v != k]


def _on_axes(
    step: Assign,
    axes: _Axes,
    transition: Expr,
    column: Index | None,
    rest: Expr,
    context: Context,
    is_positive: IsPositive,
) -> Affine:
    key, value = step.indices[axes[0]], None if axes[1] is None else step.indices[axes[1]]
    outer = tuple(i for i in step.indices if i not in (key, value))
    columns: Columns = []
    decay: Expr = transition
    shared: Expr = ONE
    if column is not None:
        if value is not None and value in transition.free:
            transition, shared = _common_factor(transition, frozenset((key, column)), value, context)
        decay, columns = diagonal_and_low_rank(transition, key, column, context)
        decay = make("mul", decay, shared)
        columns = [(left, rename(right, {column: key})) for left, right in columns]
        if value is not None and any(value in x.free for pair in columns for x in pair):
            raise NotSeparableError(transition)
    sides = frozenset((key,)), frozenset((value,)) if value is not None else frozenset[Index]()
    return Affine(
        component=step.name,
        key=key,
        value=value,
        outer=outer,
        decay=_decay(tidy(decay, context), step.indices, key, value, context, is_positive),
        transition=_term("UW", columns, outer, key, key, context),
        scaled=shared != ONE,
        injection=_term("BC", _injection(rest, *sides, context), outer, key, value, context),
    )


def _common_factor(transition: Expr, sides: frozenset[Index], value: Index, context: Context) -> tuple[Expr, Expr]:
    """(A, d) with transition = A · d, A free of the value index; d is 1 if they do not come apart."""
    try:
        columns = factored(transition, sides, frozenset((value,)), context)
    except NotSeparableError:
        return transition, ONE
    return columns[0] if len(columns) == 1 else (transition, ONE)


def _injection(rest: Expr, row: frozenset[Index], col: frozenset[Index], context: Context) -> Columns:
    if rest == ZERO:
        return []
    return factored(rest, row, col, context) if col else [(tidy(rest, context), ONE)]


def _term(
    names: str, columns: Columns, outer: tuple[Index, ...], left: Index, right: Index | None, context: Context
) -> Term:
    over = (*outer, left), (*outer, *(() if right is None else (right,)))
    many = len(columns) > 1
    sides = [
        tuple(
            Assign(f"{names[side]}{n if many else ''}", over[side], tidy(pair[side], context))
            for n, pair in enumerate(columns)
        )
        for side in (0, 1)
    ]
    return Term(*sides)


def _decay(
    value: Expr,
    indices: tuple[Index, ...],
    key: Index,
    other: Index | None,
    context: Context,
    is_positive: IsPositive,
) -> Decay:
    outer = tuple(i for i in indices if i not in (key, other))
    parts = _parts(value, key, other, context)
    log = log_decay(value, is_positive)
    logs = None if parts is None else [log_decay(p, is_positive) for p in parts]
    over = ((*outer, key), (*outer, *(() if other is None else (other,))))
    constant = all(r.space == "param" for r in refs(value))
    return Decay(
        value=Assign("D", indices, value),
        kind=_kind(value, key, other, constant),
        parts=parts and (Assign("D_key", over[0], parts[0]), Assign("D_value", over[1], parts[1])),
        log=None if log is None else Assign("log_D", indices, tidy(log, context)),
        logs=None
        if logs is None or logs[0] is None or logs[1] is None
        else (
            Assign("log_D_key", over[0], tidy(logs[0], context)),
            Assign("log_D_value", over[1], tidy(logs[1], context)),
        ),
        constant=constant,
    )


def _kind(value: Expr, key: Index, other: Index | None, constant: bool) -> DecayKind:
    if value == ONE:
        return "none"
    if key in value.free:
        return "KV" if other in value.free else "K"
    if other in value.free:
        return "V"
    return "constant" if constant else "scalar"


def _parts(value: Expr, key: Index, other: Index | None, context: Context) -> tuple[Expr, Expr] | None:
    """D as a product of one over the key (scalars included) and one over the value."""
    if other is None or other not in value.free:
        return value, ONE
    try:
        sides = (frozenset((key,)), frozenset((other,)))
        found = expand(value, Expansion(sides, lambda _: False, context))
    except NotSeparableError:
        return None
    if len(found) != 1:
        return None
    over_value, over_key = found[0].split(lambda f: other in f.free)
    return over_key.expr(), product(over_value.coef, over_value.factors).expr()
