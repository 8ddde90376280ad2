"""What is made ready of a call before the chunk kernels walk: sums of logs, factors, pairs of a chunk's tokens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from psmc.runtime.kit_chunk_views import ChunkCall, Made, _block


def chunk_made(kernels: Any, a: ChunkCall, plan: SimpleNamespace, sums: Tensor | None, total: Tensor | None) -> Made:
    """total: sums of the logs of a decay of a number a token."""
    n = plan.lanes
    made = Made(total=total)
    if a.decay == 2:
        made = _made_side(kernels, "", a, plan, n.key, *_log_sums(kernels, "", a, plan, n.key), sums)
    if a.over:
        vup, vdown = _log_sums(kernels, "_value", a, plan, n.value)
        made = made._replace(vup=vup, vdown=vdown)
    if a.over and a.decay < 2:
        made = made._replace(pairs=torch.empty(*a.shape, plan.bt, dtype=plan.operand, device=a.c.device))
        own = kernels.plan("prepare", a, plan.bt)
        kernels.run(
            "products", a, n.chunks * n.lanes, (total, made.pairs, n.cu, n.first, n.owner), (n.tokens, n.lanes),
            (a.decay, a.shift, plan.precision, n.key, plan.bt, min(plan.bk, own.bks)), num_warps=own.warps,
        )  # fmt: skip
    return made


def chunk_made_value(kernels: Any, a: ChunkCall, plan: SimpleNamespace, made: Made, back: SimpleNamespace) -> Made:
    """For a decay over the value what is made of dy, c and P."""
    if not a.over:
        return Made()
    return _made_side(kernels, "_value", a, plan, plan.lanes.value, made.vup, made.vdown, back.do, back.seen, back.sums)


def _made_side(
    kernels: Any, side: str, a: ChunkCall, plan: SimpleNamespace, width: int, up: Tensor | None, down: Tensor | None,
    *given: Tensor | None,
) -> Made:  # fmt: skip
    n = plan.lanes
    device = a.c.device
    q, b = (torch.empty(*a.shape, width, dtype=plan.operand, device=device) for _ in range(2))
    pairs = torch.empty(*a.shape, plan.bt, dtype=plan.operand, device=device)
    total = torch.empty(n.chunks, n.lanes, width, dtype=torch.float32, device=device)
    own = kernels.plan("prepare", a, plan.bt)
    kernels.run(
        f"prepare{side}", a, n.chunks * n.lanes, (up, down, q, b, pairs, total, *given, n.cu, n.first, n.owner),
        (n.tokens, n.lanes), (a.shift, plan.precision, width, plan.bt, min(_block(width), own.bks)),
        num_warps=own.warps,
    )  # fmt: skip
    return Made(up=up, down=down, q=q, b=b, pairs=pairs, total=total)


def _log_sums(kernels: Any, side: str, a: ChunkCall, plan: SimpleNamespace, width: int) -> tuple[Tensor, Tensor | None]:
    """Up to each token and, for precise operands, behind it."""
    n = plan.lanes
    up = torch.empty(*a.shape, width, dtype=torch.float32, device=a.c.device)
    down = None if plan.precision == "bf16" else torch.empty_like(up)
    block = min(_block(width), 256)
    kernels.run(
        f"logs{side}", a, n.chunks * n.lanes * -(-width // block), (up, down, n.cu, n.first, n.owner),
        (n.tokens, n.lanes), (width, plan.bt, block), num_warps=max(1, block // 128),
    )  # fmt: skip
    return up, down
