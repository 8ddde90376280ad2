"""The typed IR. See `nodes` for its grammar."""

from psmc.ir.nodes import (
    Aggregator,
    Assign,
    Block,
    Claim,
    Component,
    Const,
    Dim,
    DimValue,
    Expr,
    Extern,
    Eye,
    Index,
    IndexValue,
    Infinity,
    Interval,
    Op,
    Order,
    Reduce,
    Ref,
    Space,
    Sub,
    Tensor,
)
from psmc.ir.ops import OPS, REDUCTIONS, Kind, OpInfo

__all__ = [
    "OPS", "REDUCTIONS", "Aggregator", "Assign", "Block", "Claim", "Component", "Const", "Dim", "DimValue", "Expr",
    "Extern", "Eye", "Index", "IndexValue", "Infinity", "Interval", "Kind", "Op", "OpInfo", "Order", "Reduce", "Ref",
    "Space", "Sub", "Tensor",
]  # fmt: skip
