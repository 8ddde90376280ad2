"""The oracle's expressions: a direct interpreter of the IR on torch tensors of any dtype, autograd through everything.

An expression is evaluated in a *frame*, the ordered tuple of all index variables in scope. Its value is a tensor
`[..., one axis for each index of the frame]`, of size 1 along indices that it does not depend on, so every
pointwise operator is plain broadcasting, and a reduction is a reduction of the last axis of a longer frame.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from psmc.ir import Assign, Block, Const, DimValue, Expr, Eye, Index, IndexValue, Infinity, Op, Reduce, Ref, Sub
from psmc.ir.ops import Kind, join
from psmc.ir.query import Terms, nearest_float, needs_safe_exp, signed_terms
from psmc.ir.rewrite import instantiate

Frame = tuple[Index, ...]
Slot = tuple[str, str, int]  # space, name, lag
_INT_BOUND = 2**53  # ints of a spec beyond it are reals


@dataclass(frozen=True)
class Env:
    """Tensors `[..., *dims]` by (space, name, lag), leading axes broadcasting; `dtype` is the real dtype to use."""

    values: Mapping[Slot, Tensor]
    dims: Mapping[str, int]
    dtype: torch.dtype = torch.float64
    device: torch.device | str = "cpu"

    def of_kind(self, value: Tensor, kind: Kind) -> Tensor:
        """`value` in the dtype that stands for `kind`."""
        dtypes = {"bool": torch.bool, "int": torch.int64, "real": self.dtype, "complex": self.dtype.to_complex()}
        return value.to(dtypes[kind])


def evaluate(expr: Expr, env: Env, indices: Frame = ()) -> Tensor:
    """The value of `expr` as a tensor `[..., *indices]`. It must not read lets (see `run`)."""
    return _Evaluation(env).full(expr, indices)


def run(block: Block, env: Env) -> dict[str, Tensor]:
    """The results of a block, `[..., *dims]` each."""
    evaluation = _Evaluation(env)
    for let in block.lets:
        evaluation.define(let)
    return {result.name: evaluation.full(result.value, result.indices) for result in block.results}


class _Evaluation:
    def __init__(self, env: Env) -> None:
        self.env = env
        self.lets: dict[str, Assign] = {}
        self.memo: dict[tuple[Expr, Frame], Tensor] = {}

    def full(self, expr: Expr, indices: Frame) -> Tensor:
        value = self.value(expr, indices)
        lead = value.shape[: value.dim() - len(indices)]
        return value.expand((*lead, *(self.env.dims[i.dim] for i in indices)))

    def define(self, let: Assign) -> None:
        value = self.full(let.value, let.indices)
        self.lets[let.name] = let
        self.env = replace(self.env, values={**self.env.values, ("let", let.name, 0): value})

    def value(self, node: Expr, frame: Frame) -> Tensor:
        key = (node, frame)
        if key not in self.memo:
            self.memo[key] = self.compute(node, frame)
        return self.memo[key]

    def compute(self, node: Expr, frame: Frame) -> Tensor:
        match node:
            case Const(value=number) if node.kind == "int" and abs(number) < _INT_BOUND:
                return self.number(int(number), frame, torch.int64)
            case Const(value=number):
                return self.number(nearest_float(number), frame, self.env.dtype)
            case Infinity(negative=negative):
                return self.number(-math.inf if negative else math.inf, frame, self.env.dtype)
            case DimValue(dim=dim):
                return self.number(self.env.dims[dim], frame, torch.int64)
            case IndexValue(index=index):
                return self.position(index, frame)
            case Eye(row=row, col=col):
                return (self.position(row, frame) == self.position(col, frame)).to(torch.int64)
            case Ref():
                return self.read(node, frame)
            case Reduce(op=op, index=index, body=body):
                inner = tuple(i for i in frame if i != index)  # an outer index of that name is hidden here
                value = self.value(body, (*inner, index))
                value = REDUCTIONS[op](value.expand(*value.shape[:-1], self.env.dims[index.dim]))
                return value if inner == frame else value.unsqueeze(frame.index(index) - len(frame))
            case Op(op="exp", args=(argument,)):
                terms = signed_terms(argument, self.definition)
                return self.exp_of_sum(terms, node.kind, frame) if needs_safe_exp(terms) else self.apply(node, frame)
            case Op(op="pow", args=(base, Const(value=power))) if power.denominator == 1:
                return self.env.of_kind(self.value(base, frame), node.kind) ** int(power)
            case Op():
                return self.apply(node, frame)
        raise AssertionError(node)

    def apply(self, node: Op, frame: Frame) -> Tensor:
        """Operands take the result's kind where that is larger, conditions and the parts of a complex excepted."""
        values = []
        for arg in node.args:
            kind = arg.kind if arg.kind == "bool" else "real" if node.op == "complex" else join((arg.kind, node.kind))
            values.append(self.env.of_kind(self.value(arg, frame), kind))
        return POINTWISE[node.op](*values)

    def exp_of_sum(self, terms: Terms, kind: Kind, frame: Frame) -> Tensor:
        """exp(Σ terms), and 0 with gradient 0 where a term is -inf, whatever the others are."""
        values = [sign * self.env.of_kind(self.value(term, frame), kind) for sign, term in terms]
        gone = torch.zeros((), dtype=torch.bool, device=self.env.device)
        for value in values:
            gone = gone | ((value.real if value.is_complex() else value) == -math.inf)
        total = values[0]
        for value in values[1:]:
            total = total + value
        return torch.where(gone, 0.0, torch.exp(torch.where(gone, 0.0, total)))

    def definition(self, ref: Ref) -> Expr | None:
        return instantiate(self.lets[ref.name], ref.subs) if ref.name in self.lets else None

    def number(self, value: float, frame: Frame, dtype: torch.dtype) -> Tensor:
        return torch.full((1,) * len(frame), value, dtype=dtype, device=self.env.device)

    def position(self, sub: Sub, frame: Frame) -> Tensor:
        """The position that a subscript names, as an int tensor in the frame."""
        if isinstance(sub, Index):
            shape = [self.env.dims[sub.dim] if i == sub else 1 for i in frame]
            return torch.arange(self.env.dims[sub.dim], device=self.env.device).reshape(shape)
        return self.value(sub, frame) if isinstance(sub, Expr) else self.number(sub, frame, torch.int64)

    def read(self, ref: Ref, frame: Frame) -> Tensor:
        tensor = self.env.values[ref.space, ref.name, ref.lag]
        rank = len(ref.subs)
        if not any(isinstance(s, Expr | int) for s in ref.subs) and len(set(ref.subs)) == rank:
            order = [tensor.dim() - rank + ref.subs.index(i) for i in frame if i in ref.subs]
            view = tensor.permute([*range(tensor.dim() - rank), *order])
            return view[(..., *(slice(None) if i in ref.subs else None for i in frame))]
        return _gather(tensor, rank, [self.position(s, frame) for s in ref.subs], len(frame))


def _gather(tensor: Tensor, rank: int, positions: list[Tensor], width: int) -> Tensor:
    """tensor[..., positions[0], ..., positions[rank-1]], the leading axes of all of them broadcast together.

    `tensor` is `[..., rank axes]`, each of `positions` an int tensor `[..., width axes]`, and so is the result.
    """
    sizes = tensor.shape[tensor.dim() - rank :]
    flat: Tensor | int = 0
    for position, size in zip(positions, sizes, strict=True):
        if position.numel() and not 0 <= int(position.min()) <= int(position.max()) < size:
            raise IndexError(f"a subscript is outside 0..{size - 1}")
        flat = flat * size + position
    assert isinstance(flat, Tensor)
    lead = torch.broadcast_shapes(tensor.shape[: tensor.dim() - rank], flat.shape[: flat.dim() - width])
    shape = flat.shape[flat.dim() - width :]
    source = tensor.expand([*lead, *sizes]).reshape(*lead, math.prod(sizes))
    index = flat.expand([*lead, *shape]).reshape(*lead, math.prod(shape))
    return source.gather(-1, index).reshape([*lead, *shape])


def _first_max(a: Tensor, b: Tensor) -> Tensor:
    """Ties, and NaN on the left, take the left operand, gradient included."""
    return torch.where((a >= b) | a.isnan(), a, b)


def _first_min(a: Tensor, b: Tensor) -> Tensor:
    return torch.where((a <= b) | a.isnan(), a, b)


def _logaddexp(a: Tensor, b: Tensor) -> Tensor:
    """log(e^a + e^b), also where both are the same infinity: as with other equal ones, each gets half the gradient."""
    same = a.isinf() & (a == b)
    return torch.where(same, (a + b) / 2, torch.logaddexp(torch.where(same, 0.0, a), torch.where(same, 0.0, b)))


POINTWISE: dict[str, Callable[..., Tensor]] = {
    "or": torch.logical_or,
    "and": torch.logical_and,
    "not": torch.logical_not,
    "lt": torch.lt,
    "le": torch.le,
    "gt": torch.gt,
    "ge": torch.ge,
    "eq": torch.eq,
    "ne": torch.ne,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "neg": torch.neg,
    "pow": torch.pow,
    "where": torch.where,
    "max": _first_max,
    "min": _first_min,
    "abs": torch.abs,
    "sign": torch.sign,
    "clamp": lambda x, lo, hi: _first_min(_first_max(x, lo), hi),
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "sin": torch.sin,
    "cos": torch.cos,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "logsigmoid": functional.logsigmoid,
    "softplus": lambda x: -functional.logsigmoid(-x),  # torch's own softplus is linear from 20 on
    "relu": torch.relu,
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * 0.5 * torch.erfc(-x / math.sqrt(2)),
    "erf": torch.erf,
    "logaddexp": _logaddexp,
    "stop": torch.detach,
    "real": lambda x: x.real if x.is_complex() else x,
    "imag": lambda x: x.imag if x.is_complex() else torch.zeros_like(x),
    "conj": lambda x: x.conj().resolve_conj(),
    "complex": torch.complex,
}

# Each reduces the last axis.
REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(-1),
    "prod": lambda x: x.prod(-1),
    "max": lambda x: x.gather(-1, x.argmax(-1, keepdim=True)).squeeze(-1),  # the first of equal ones, gradient included
}
