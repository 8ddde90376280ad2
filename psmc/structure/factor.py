"""Low-rank factors of a matrix given as an expression: Σ_c left_c[i] · right_c[j], as few as a vertex cover allows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from psmc.derive.graph import vertex_cover
from psmc.ir import Expr, Eye, Index
from psmc.ir.rewrite import rename
from psmc.structure.products import Context, Expansion, NotSeparableError, Product, collected, expand, text, tidy, total

MAX_DISTRIBUTED = 16  # terms
Columns = list[tuple[Expr, Expr]]  # (left over rows, right over columns)


def factored(matrix: Expr, row: frozenset[Index], col: frozenset[Index], context: Context) -> Columns:
    """Columns of the matrix; none if it is 0. Raises NotSeparableError.

    The expression is taken apart as little as possible first, then with every one-sided sum distributed. The second
    is preferred where it needs no more columns and more than one: its vectors are the same for every spelling. With
    many terms (R micro-steps have 2^R) the first stays as it is: its vectors are nested, and short.
    """
    found = _diagonal_and_rest(matrix, row, col, context)
    if found[0]:
        raise NotSeparableError(matrix)
    return found[1]


def diagonal_and_low_rank(matrix: Expr, row: Index, col: Index, context: Context) -> tuple[Expr, Columns]:
    """(d, columns) with matrix[row, col] = eye(row, col) d[row] + Σ left[row] right[col]. Raises NotSeparableError."""
    diagonal, columns = _diagonal_and_rest(matrix, frozenset((row,)), frozenset((col,)), context)
    return tidy(total(diagonal), context), columns


def _diagonal_and_rest(
    matrix: Expr, row: frozenset[Index], col: frozenset[Index], context: Context
) -> tuple[list[Product], Columns]:
    sides = row | col
    openings: list[Callable[[Expr], bool]] = [lambda _: False, lambda e: bool(e.free & sides)]
    found: list[tuple[tuple[list[Product], Columns], int]] = []
    problem: NotSeparableError | None = None
    for opens in openings:
        try:
            products = expand(matrix, Expansion((row, col), opens, context))
            found.append((_attempt(products, row, col), len(products)))
        except NotSeparableError as error:
            problem = problem or error
    if not found:
        assert problem is not None
        raise problem
    (first, _), (last, terms) = found[0], found[-1]
    return last if 1 < len(last[1]) <= len(first[1]) and terms <= MAX_DISTRIBUTED else first


def _attempt(
    products: Sequence[Product], row: frozenset[Index], col: frozenset[Index]
) -> tuple[list[Product], Columns]:
    diagonal: list[Product] = []
    entries: dict[tuple[Expr, Expr], list[Product]] = {}
    for p in products:
        eyes, rest = p.split(lambda f: isinstance(f, Eye) and bool(f.free & row) and bool(f.free & col))
        if eyes.factors:
            diagonal.append(_on_diagonal(eyes, rest))
            continue
        left, rest = rest.split(lambda f: bool(f.free & row))
        right, scalar = rest.split(lambda f: bool(f.free & col))
        if any(f.free & col for f, _ in left.factors):
            raise NotSeparableError(left.expr())
        entries.setdefault((left.expr(), right.expr()), []).append(scalar)
    return diagonal, _covered({pair: s for pair, ps in entries.items() if (s := collected(ps))})


def _on_diagonal(eyes: Product, rest: Product) -> Product:
    """The product's value where row and column agree."""
    ((eye, power),) = eyes.factors
    assert isinstance(eye, Eye)
    if power < 1 or not (isinstance(eye.row, Index) and isinstance(eye.col, Index)):
        raise NotSeparableError(eye)
    return Product(rest.coef, tuple((rename(f, {eye.col: eye.row}), n) for f, n in rest.factors))


def _covered(entries: Mapping[tuple[Expr, Expr], Sequence[Product]]) -> Columns:
    lefts = sorted({left for left, _ in entries}, key=text)
    rights = sorted({right for _, right in entries}, key=text)
    in_left, in_right = vertex_cover((lefts.index(a), rights.index(b)) for a, b in entries)
    columns: Columns = []
    for n in in_right:
        terms = [(a, s) for (a, b), s in sorted(entries.items(), key=_order) if b == rights[n]]
        columns.append((_combination(terms), rights[n]))
    for n in in_left:
        terms = [
            (b, s)
            for (a, b), s in sorted(entries.items(), key=_order)
            if a == lefts[n] and rights.index(b) not in in_right
        ]
        columns.append((lefts[n], _combination(terms)))
    return columns


def _order(entry: tuple[tuple[Expr, Expr], object]) -> tuple[tuple[int, str], tuple[int, str]]:
    (left, right), _ = entry
    return text(left), text(right)


def _combination(terms: Sequence[tuple[Expr, Sequence[Product]]]) -> Expr:
    """Σ scalar · vector. A scalar that is a sum stays one factor."""
    out: list[Product] = []
    for vector, scalars in terms:
        (v,) = expand(vector, Expansion())
        if len(scalars) == 1:
            out.append(scalars[0] * v)
        else:
            out.append(Product(Fraction(1), ((total(scalars), 1),)) * v)
    return total(collected(out))
