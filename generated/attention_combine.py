"""attention_combine: The later chunk's tokens attend to both chunks' tokens; a prefix is what N tokens keep of all chunks before. Yau et al. 2025, arXiv 2506.10918.

    aggregator attention_combine {
      '''The later chunk's tokens attend to both chunks' tokens; a prefix is what N tokens keep of all chunks before.
      Yau et al. 2025, arXiv 2506.10918.'''
      dim N, D
      input x[N, D]
      param query[D, D], key[D, D], value[D, D]
      state h[N, D] = 0

      lift {
        h[i, j] = x[i, j]
      }

      combine (l, r) {
        let q[i, j] = sum[m] r.h[i, m] * query[m, j]
        let far[i, j] = (sum[m] q[i, m] * sum[n] l.h[j, n] * key[n, m]) / sqrt(D)
        let near[i, j] = (sum[m] q[i, m] * sum[n] r.h[j, n] * key[n, m]) / sqrt(D)
        let top[i] = max(max[j] far[i, j], max[j] near[i, j])
        let left[i, j] = sum[m] l.h[i, m] * value[m, j]
        let right[i, j] = sum[m] r.h[i, m] * value[m, j]
        let mixed[i, j] = sum[m] exp(far[i, m] - top[i]) * left[m, j]
          + sum[m] exp(near[i, m] - top[i]) * right[m, j]
        let total[i] = sum[j] exp(far[i, j] - top[i]) + sum[j] exp(near[i, j] - top[i])
        h[i, j] = r.h[i, j] + mixed[i, j] / total[i]
      }

      output o[i, j] = h[i, j]

      associative: no
      order: tree
    }

Associativity: not claimed; the order of combines is part of the meaning.
Plan: tree. not associative: the Blelloch tree is the meaning, one batched combine a level; softmax attention over 2 sets of tokens: fused kernels on a GPU for widths up to 256, torch's call elsewhere.

Written by psmc; regenerate with: psmc compile attention_combine.psm
The runtime holds what this spec needs of it. Needs torch, and triton for tensors on a GPU; nothing else.

   84  the spec's mathematics: tensors are [..., *dims], leading axes broadcast
  161  kernels: softmax attention over several sets of tokens at once, o = softmax(scale q [k0; k1; ..]ᵀ) [v0; v1; ...
  358  Kernels that threads compile ahead of a first call: most of its time, the compiler needs no interpreter
  404  Launches of Triton kernels past the binder, which takes longer than a small kernel runs
  591  Calls of the attention kernels: softmax over several sets of tokens at once, with its gradients
  854  Scans in PyTorch, differentiable by autograd: no loop over T where the rule is associative
 1133  A layer over a batch of sequences: masks, restarts and packing on top of the scans, a stretch of time at once
 1290  The tree plan: one fixed parenthesisation for rules that are not associative, in parallel and token by token
 1447  one tree ----------------------------------------------------------------------------------
 1522  counters -----------------------------------------------------------------------------------
 1572  Many trees: the tree plan over sequences with masks, restarts and packing
 1688  The border of a compiled aggregator: what was passed, checked against the spec, with the spec's own names
 1958  The border, continued: states, flags and packing
 2099  What the border sees only by reading tensors: values, checked where `checks` or PSMC_CHECK=1 asks for it
 2175  Inputs read some tokens earlier, and time run backwards: index arithmetic on whole sequences, no loop over T
 2238  One checked call in PyTorch: lift, the scan of the plan, readout
 2418  The scan as an operator of torch: one graph node for torch.compile, with its own backward
 2688  The public face of a compiled aggregator: a parallel call, a step, states
 2913  the spec's border
"""

from __future__ import annotations

import math
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import pairwise
from math import isqrt
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

__all__ = ["attention_combine"]


# --- the spec's mathematics: tensors are [..., *dims], leading axes broadcast

def _attention(kernels, n, query, keys, values, scale=1.0, masks=None):
    """softmax(scale query keysᵀ) values over several sets of tokens at once, [..., tokens, width] each, where masks()
    holds, [tokens, tokens] for each set: by kernels where there are some for these operands, else one call of torch."""
    if kernels is not None and kernels.takes([query, *keys, *values]):
        return kernels(query, keys, values, scale, getattr(n, "__dtype__", None))
    lead = torch.broadcast_shapes(*(x.shape[:-2] for x in (query, *keys, *values)))
    sides = [torch.cat([x.expand(*lead, *x.shape[-2:]) for x in part], -2) for part in ((query,), keys, values)]
    dtype = max((x.dtype for x in sides), key=lambda d: d.itemsize)
    q, k, v = (x.reshape(-1, 1, *x.shape[-2:]).to(dtype) for x in sides)
    seen = None if masks is None else torch.cat([*masks().values()], -1)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=float(scale))
    if seen is not None:
        out = torch.where(seen.any(-1, keepdim=True), out, math.nan)  # 0 / 0, as the rule says
    return out.reshape(*lead, *out.shape[-2:])


def _as_precise(kernels, n, x):
    """Where kernels run, matrix products in the operands are as precise as a call's inputs: bf16 if these are."""
    there = x.device.type == "cuda" or (kernels is not None and kernels.interpreted)
    if there and getattr(n, "__dtype__", None) == torch.bfloat16:
        return torch.autocast(x.device.type, torch.bfloat16)
    return torch.autocast("cpu", enabled=False)


def lift(x, p, n):
    return {"h": x.x}


def combine_operands(l, r, p, n):
    query_1 = torch.einsum("...ia,...am->...im", r.h, p.query)
    keys = torch.einsum("...mn,...na->...ma", l.h, p.key)
    keys_1 = torch.einsum("...mn,...na->...ma", r.h, p.key)
    values = torch.einsum("...ma,...aj->...mj", l.h, p.value)
    values_1 = torch.einsum("...ma,...aj->...mj", r.h, p.value)
    return {"query_1": query_1, "keys": keys, "keys_1": keys_1, "values": values, "values_1": values_1}


def combine(l, r, p, n):
    with _as_precise(ATTENTION_0, n, r.h):
        a = combine_operands(l, r, p, n)
    attended = _attention(
        ATTENTION_0, n, a["query_1"], [a["keys"], a["keys_1"]], [a["values"], a["values_1"]], scale=1 / math.sqrt(n.D)
    )
    h = r.h + attended
    return {"h": h}


def advance_operands(l, r, p, n):
    query_1 = torch.einsum("...ia,...am->...im", r.h, p.query)
    keys = torch.einsum("...mn,...na->...ma", l.h, p.key)
    keys_1 = torch.einsum("...mn,...na->...ma", r.h, p.key)
    values = torch.einsum("...ma,...aj->...mj", l.h, p.value)
    values_1 = torch.einsum("...ma,...aj->...mj", r.h, p.value)
    return {"query_1": query_1, "keys": keys, "keys_1": keys_1, "values": values, "values_1": values_1}


def advance(l, r, p, n):
    with _as_precise(ATTENTION_0, n, r.h):
        a = advance_operands(l, r, p, n)
    attended = _attention(
        ATTENTION_0, n, a["query_1"], [a["keys"], a["keys_1"]], [a["values"], a["values_1"]], scale=1 / math.sqrt(n.D)
    )
    h = r.h + attended
    return {"h": h}


def output(s, prev, x, p, n):
    return {"o": s.h}


def identity(n, like):
    h = like.new_full((n.N, n.D), 0)
    return {"h": h}


# --- kernels: softmax attention over several sets of tokens at once, o = softmax(scale q [k0; k1; ..]ᵀ) [v0; v1; ..].
#
#   One matrix of each operand for X * Y * Z batch rows (pairs of a tree's level, heads): q [N, E], k of set s [Ms, E],
#   v [Ms, V], o [N, V]. Row i of the matrix (x, y, z) of an operand a lies at a + x * a_x + y * a_y + z * a_z + i * a_t,
#   its last axis contiguous; what a kernel makes is contiguous. The sets are read where they are, none is copied.
#   BN, BM    tokens of a block of queries and of keys; BE, BV: E and V as powers of two
#   b_s       [BN, BM] scores times log2 e; nothing of that size leaves a program
#   p_lse     [rows, N] log2 of the sum of 2 ** b_s over all tokens of all sets;   b_p = 2 ** (b_s - lse): the weights
#   p_delta   [rows, N] Σ o do, which is Σ b_p dp, with dp = do vᵀ;   ds = b_p (dp - delta)
#   EVEN      strides of operands are multiples of it; each operand has a dtype of its own
#   PREC      operands of all products: "bf16"; "tf32" (for fp16 inputs, which have its digits); "tf32x3" (for fp32);
#             "ieee" for the last two on GPUs without them
# Scores, weights and all sums are fp32. Least traffic forward: (N E + N V + Σ M (E + V)) e bytes a row at e bytes a
# number; least work 2 N ΣM (E + V) FLOPs. Backward twice these bytes and the output's, 2 N ΣM (3 E + 2 V) FLOPs, of
# which the two kernels do 2 N ΣM (4 E + 3 V): both make the weights again, so that no sum is shared between programs.

try:
    import triton
    import triton.language as tl
except ImportError:  # CPU tensors do not need it
    triton = None


def jit(fn=None, **options):
    """triton.jit where there is triton."""
    if fn is None:
        return lambda f: jit(f, **options)
    return fn if triton is None else triton.jit(fn, **options)


@jit
def product(x, z, PREC: tl.constexpr):
    """x z in fp32."""
    if PREC == "bf16":
        found = tl.dot(x.to(tl.bfloat16), z.to(tl.bfloat16))
    else:
        found = tl.dot(x.to(tl.float32), z.to(tl.float32), input_precision=PREC)
    return found


@jit
def matrix(p_a, a_x, a_y, a_z, i_l, Y, Z, EVEN: tl.constexpr):
    """Where a row's matrix begins."""
    at = i_l // (Y.to(tl.int64) * Z) * a_x + i_l // Z % Y * a_y + i_l % Z * a_z
    return p_a + tl.multiple_of(at, EVEN)


@jit
def tile(p_a, a_t, o_i, N, o_w, W: tl.constexpr, EVEN: tl.constexpr):
    """Rows o_i of a matrix of N, [BI, BW]; 0 where there is nothing."""
    m = (o_i < N)[:, None]
    if o_w.shape[0] != W:
        m = m & (o_w < W)[None, :]
    at = o_i.to(tl.int64) * a_t
    if EVEN > 1:
        at = tl.multiple_of(at, EVEN)
    return tl.load(p_a + at[:, None] + o_w[None, :], mask=m, other=0)


@jit
def store_tile(p_a, b_a, o_i, N, o_w, W: tl.constexpr):
    """Into a contiguous matrix."""
    m = (o_i < N)[:, None]
    if o_w.shape[0] != W:
        m = m & (o_w < W)[None, :]
    tl.store(p_a + o_i.to(tl.int64)[:, None] * W + o_w[None, :], b_a, mask=m)


@jit(do_not_specialize=[
    "N", "M0", "M1", "Y", "Z", "q_x", "q_y", "q_z", "q_t", "k0_x", "k0_y", "k0_z", "k0_t", "v0_x", "v0_y", "v0_z",
    "v0_t", "k1_x", "k1_y", "k1_z", "k1_t", "v1_x", "v1_y", "v1_z", "v1_t", "scale",
])
def attention_forward_kernel_0(
    p_q, p_k0, p_v0, p_k1, p_v1, p_o, p_lse,
    N, M0, M1, Y, Z, q_x, q_y, q_z, q_t, k0_x, k0_y, k0_z, k0_t, v0_x, v0_y, v0_z, v0_t, k1_x, k1_y, k1_z, k1_t, v1_x,
    v1_y, v1_z, v1_t, scale,
    E: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    EVEN: tl.constexpr, PREC: tl.constexpr, NS: tl.constexpr,
):
    """The output, and the log of each token's sum. A program has a block of queries and passes over all sets once."""
    blocks = tl.cdiv(N, BN)
    i_n, i_l = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    o_n, o_e, o_v = i_n * BN + tl.arange(0, BN), tl.arange(0, BE), tl.arange(0, BV)
    b_q = tile(matrix(p_q, q_x, q_y, q_z, i_l, Y, Z, EVEN), q_t, o_n, N, o_e, E, EVEN)  # [BN, BE]
    b_top = tl.full([BN], -float("inf"), tl.float32)
    b_sum = tl.zeros([BN], tl.float32)
    b_o = tl.zeros([BN, BV], tl.float32)
    p_k, p_v = matrix(p_k0, k0_x, k0_y, k0_z, i_l, Y, Z, EVEN), matrix(p_v0, v0_x, v0_y, v0_z, i_l, Y, Z, EVEN)
    for i_m in tl.range(0, M0, BM, num_stages=NS):
        o_m = i_m + tl.arange(0, BM)
        b_k = tile(p_k, k0_t, o_m, M0, o_e, E, EVEN)  # [BM, BE]
        b_v = tile(p_v, v0_t, o_m, M0, o_v, V, EVEN)  # [BM, BV]
        b_s = product(b_q, tl.trans(b_k), PREC) * scale  # [BN, BM]
        b_s = tl.where((o_m < M0)[None, :], b_s, -float("inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_base = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_base[:, None])
        b_keep = tl.exp2(b_top - b_base)
        b_sum = b_sum * b_keep + tl.sum(b_p, 1)
        b_o = b_o * b_keep[:, None] + product(b_p, b_v, PREC)
        b_top = b_new
    p_k, p_v = matrix(p_k1, k1_x, k1_y, k1_z, i_l, Y, Z, EVEN), matrix(p_v1, v1_x, v1_y, v1_z, i_l, Y, Z, EVEN)
    for i_m in tl.range(0, M1, BM, num_stages=NS):
        o_m = i_m + tl.arange(0, BM)
        b_k = tile(p_k, k1_t, o_m, M1, o_e, E, EVEN)  # [BM, BE]
        b_v = tile(p_v, v1_t, o_m, M1, o_v, V, EVEN)  # [BM, BV]
        b_s = product(b_q, tl.trans(b_k), PREC) * scale  # [BN, BM]
        b_s = tl.where((o_m < M1)[None, :], b_s, -float("inf"))
        b_new = tl.maximum(b_top, tl.max(b_s, 1))
        b_base = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_p = tl.exp2(b_s - b_base[:, None])
        b_keep = tl.exp2(b_top - b_base)
        b_sum = b_sum * b_keep + tl.sum(b_p, 1)
        b_o = b_o * b_keep[:, None] + product(b_p, b_v, PREC)
        b_top = b_new
    b_o = b_o / b_sum[:, None]
    store_tile(p_o + i_l * N * V, b_o, o_n, N, o_v, V)
    tl.store(p_lse + i_l * N + o_n, b_top + tl.log2(b_sum), mask=o_n < N)


@jit(do_not_specialize=[
    "N", "M0", "M1", "Y", "Z", "q_x", "q_y", "q_z", "q_t", "k0_x", "k0_y", "k0_z", "k0_t", "v0_x", "v0_y", "v0_z",
    "v0_t", "k1_x", "k1_y", "k1_z", "k1_t", "v1_x", "v1_y", "v1_z", "v1_t", "scale",
])
def attention_query_kernel_0(
    p_q, p_k0, p_v0, p_k1, p_v1, p_o, p_lse, p_do, p_dq, p_delta,
    N, M0, M1, Y, Z, q_x, q_y, q_z, q_t, k0_x, k0_y, k0_z, k0_t, v0_x, v0_y, v0_z, v0_t, k1_x, k1_y, k1_z, k1_t, v1_x,
    v1_y, v1_z, v1_t, scale,
    E: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    EVEN: tl.constexpr, PREC: tl.constexpr, NS: tl.constexpr,
):
    """The query's gradient and delta; a program as in the forward. `scale` holds log2 e, which ds is without."""
    blocks = tl.cdiv(N, BN)
    i_n, i_l = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    o_n, o_e, o_v = i_n * BN + tl.arange(0, BN), tl.arange(0, BE), tl.arange(0, BV)
    b_q = tile(matrix(p_q, q_x, q_y, q_z, i_l, Y, Z, EVEN), q_t, o_n, N, o_e, E, EVEN)  # [BN, BE]
    b_do = tile(p_do + i_l * N * V, V, o_n, N, o_v, V, 1)  # [BN, BV]
    b_o = tile(p_o + i_l * N * V, V, o_n, N, o_v, V, 1)
    b_lse = tl.load(p_lse + i_l * N + o_n, mask=o_n < N, other=0)
    b_delta = tl.sum(b_o.to(tl.float32) * b_do.to(tl.float32), 1)
    tl.store(p_delta + i_l * N + o_n, b_delta, mask=o_n < N)
    b_dq = tl.zeros([BN, BE], tl.float32)
    p_k, p_v = matrix(p_k0, k0_x, k0_y, k0_z, i_l, Y, Z, EVEN), matrix(p_v0, v0_x, v0_y, v0_z, i_l, Y, Z, EVEN)
    for i_m in tl.range(0, M0, BM, num_stages=NS):
        o_m = i_m + tl.arange(0, BM)
        b_k = tile(p_k, k0_t, o_m, M0, o_e, E, EVEN)  # [BM, BE]
        b_v = tile(p_v, v0_t, o_m, M0, o_v, V, EVEN)  # [BM, BV]
        b_s = product(b_q, tl.trans(b_k), PREC) * scale  # [BN, BM]
        b_p = tl.where((o_m < M0)[None, :], tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_ds = b_p * (product(b_do, tl.trans(b_v), PREC) - b_delta[:, None])
        b_dq += product(b_ds, b_k, PREC)
    p_k, p_v = matrix(p_k1, k1_x, k1_y, k1_z, i_l, Y, Z, EVEN), matrix(p_v1, v1_x, v1_y, v1_z, i_l, Y, Z, EVEN)
    for i_m in tl.range(0, M1, BM, num_stages=NS):
        o_m = i_m + tl.arange(0, BM)
        b_k = tile(p_k, k1_t, o_m, M1, o_e, E, EVEN)  # [BM, BE]
        b_v = tile(p_v, v1_t, o_m, M1, o_v, V, EVEN)  # [BM, BV]
        b_s = product(b_q, tl.trans(b_k), PREC) * scale  # [BN, BM]
        b_p = tl.where((o_m < M1)[None, :], tl.exp2(b_s - b_lse[:, None]), 0.0)
        b_ds = b_p * (product(b_do, tl.trans(b_v), PREC) - b_delta[:, None])
        b_dq += product(b_ds, b_k, PREC)
    store_tile(p_dq + i_l * N * E, b_dq * (scale * 0.6931471805599453), o_n, N, o_e, E)


@jit(do_not_specialize=[
    "N", "M", "Y", "Z", "q_x", "q_y", "q_z", "q_t", "k_x", "k_y", "k_z", "k_t", "v_x", "v_y", "v_z", "v_t", "scale",
])
def attention_keys_kernel_0_0(
    p_q, p_k, p_v, p_lse, p_do, p_delta, p_dk, p_dv,
    N, M, Y, Z, q_x, q_y, q_z, q_t, k_x, k_y, k_z, k_t, v_x, v_y, v_z, v_t, scale,
    E: tl.constexpr, V: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr,
    EVEN: tl.constexpr, PREC: tl.constexpr, NS: tl.constexpr,
):
    """Gradients of one set's keys and values. A program has a block of them and passes over all queries; its scores lie
    the other way round, [BM, BN], from the start: no product is transposed."""
    blocks = tl.cdiv(M, BM)
    i_m, i_l = tl.program_id(0) % blocks, (tl.program_id(0) // blocks).to(tl.int64)
    o_m, o_e, o_v = i_m * BM + tl.arange(0, BM), tl.arange(0, BE), tl.arange(0, BV)
    b_k = tile(matrix(p_k, k_x, k_y, k_z, i_l, Y, Z, EVEN), k_t, o_m, M, o_e, E, EVEN)  # [BM, BE]
    b_v = tile(matrix(p_v, v_x, v_y, v_z, i_l, Y, Z, EVEN), v_t, o_m, M, o_v, V, EVEN)  # [BM, BV]
    p_q = matrix(p_q, q_x, q_y, q_z, i_l, Y, Z, EVEN)
    b_dk = tl.zeros([BM, BE], tl.float32)
    b_dv = tl.zeros([BM, BV], tl.float32)
    for i_n in tl.range(0, N, BN, num_stages=NS):
        o_n = i_n + tl.arange(0, BN)
        b_q = tile(p_q, q_t, o_n, N, o_e, E, EVEN)  # [BN, BE]
        b_do = tile(p_do + i_l * N * V, V, o_n, N, o_v, V, 1)  # [BN, BV]
        b_lse = tl.load(p_lse + i_l * N + o_n, mask=o_n < N, other=0)
        b_delta = tl.load(p_delta + i_l * N + o_n, mask=o_n < N, other=0)
        b_s = product(b_k, tl.trans(b_q), PREC) * scale  # [BM, BN]
        b_p = tl.where((o_m < M)[:, None] & (o_n < N)[None, :], tl.exp2(b_s - b_lse[None, :]), 0.0)
        b_dv += product(b_p, b_do, PREC)
        b_ds = b_p * (product(b_v, tl.trans(b_do), PREC) - b_delta[None, :])
        b_dk += product(b_ds, b_q, PREC)
    store_tile(p_dk + i_l * M * E, b_dk * (scale * 0.6931471805599453), o_m, M, o_e, E)
    store_tile(p_dv + i_l * M * V, b_dv, o_m, M, o_v, V)


# --- Kernels that threads compile ahead of a first call: most of its time, the compiler needs no interpreter.


class _Dry(threading.local):
    """Of the call that this thread runs over tensors without memory: the device that it is for."""

    device: torch.device | None = None
    room: threading.Semaphore | None = None


_DRY = _Dry()


class Compilation:
    """Of one kernel, by a thread. What it raises is kept: the launch compiles again, and raises it."""

    def __init__(self, work: Callable[[], None]) -> None:
        self.error: BaseException | None = None
        self._done, self._process = threading.Event(), os.getpid()
        device, room = _DRY.device, _DRY.room
        assert device is not None and room is not None

        def run() -> None:
            try:
                with room:
                    if threading.main_thread().is_alive():  # else nobody is left to launch it
                        if device.type == "cuda":
                            torch.cuda.set_device(device)  # of this thread
                        work()
            except BaseException as error:
                self.error = error
            finally:
                self._done.set()

        try:
            threading.Thread(target=run, name="psmc-compile").start()
        except RuntimeError as error:  # no threads are left, or the interpreter ends
            self.error = error
            self._done.set()

    def wait(self) -> None:
        """A forked process does not have the thread."""
        if self._process == os.getpid():
            self._done.wait()


# --- Launches of Triton kernels past the binder, which takes longer than a small kernel runs.

_WORD = range(-(2**31), 2**31)


class Kernel:
    """A function of triton.jit whose arguments are tensors (or None), then whole numbers, then constants; among the
    tensors, strides of the first ones may stand.

    triton.jit compiles anew for other constants, for tensors of another dtype, None or not at a multiple of 16 bytes,
    and for numbers that are 1, divisible by 16 or of 64 bits (unless it is told not to look), a device each. So that is
    the key of what it compiled, and a call whose key is known goes straight to the launcher, pointers as numbers.
    Triton's launch hooks are called; its settings are read when a kernel is first compiled. In the interpreter, with a
    version of triton that is not known, and on other GPUs than NVIDIA's, all calls go through triton.jit.
    """

    def __init__(self, fn: Any) -> None:
        self.fn = fn
        self._found: dict[Any, tuple[dict[Any, Any], dict[Any, Compilation]]] = {}  # compiled, being compiled

    def prime(self, device: torch.device) -> None:
        """Has triton make its memory of what it compiled for a device. Two threads at once would make two."""
        driver = _driver(type(self.fn))
        if driver is not None:
            self.fn.device_caches[driver.get_current_device() if device.index is None else device.index]

    def launch(
        self, grid: int, numbers: Sequence[float], constants: Sequence[Any], device: torch.device,
        strides: tuple[int, tuple[int, ...]] = (0, ()), **options: int,
    ) -> Launch:  # fmt: skip
        """What one shape of call fixes; the tensors, on `device`, are passed to the result. `strides`: after so many
        tensors stand these numbers. `options`: num_warps, num_stages. On the device "meta" nothing is launched, but
        compiled ahead."""
        kinds = [(type(x), x) for x in constants]
        params = getattr(self.fn, "params", None)
        if params is None:
            traits = []
        else:
            end = len(params) - len(constants)
            of = [*params[strides[0] : strides[0] + len(strides[1])], *params[end - len(numbers) : end]]
            traits = [_traits(n, p) for n, p in zip((*strides[1], *numbers), of, strict=True)]
        known, ahead = self._found.setdefault((*options.items(), *kinds, *traits), ({}, {}))
        kind: type[Launch] = Launch
        if device.type == "meta" and _DRY.device is not None:
            kind = _Ahead
            self.prime(_DRY.device)
        return kind(self.fn, grid, strides, (*numbers, *constants), device, options, known, ahead)


class Launch:
    """A kernel's launches of one shape: tensors of the same dtypes each time, None at the same places."""

    __slots__ = ("ahead", "first", "fn", "grid", "home", "known", "near", "options", "rest", "strides")

    def __init__(
        self, fn: Any, grid: int, strides: tuple[int, tuple[int, ...]], rest: tuple[Any, ...], device: torch.device,
        options: dict[str, int], known: dict[Any, Any], ahead: dict[Any, Compilation],
    ) -> None:  # fmt: skip
        self.fn, self.grid, self.rest, self.options, self.known = fn, (grid, 1, 1), rest, options, known
        self.first, self.strides = strides
        self.ahead = ahead
        self.home = device.index  # None: wherever
        self.near: dict[Any, Any] = {}  # device, which pointers are aligned -> a compiled kernel on this grid

    def __call__(self, *tensors: Tensor | None) -> None:
        """Runs on the tensors' device, in its current stream. They are as the kernel reads them: the caller has seen to
        layouts and devices; complex ones are pairs of reals."""
        driver = _driver(type(self.fn))
        if driver is None:
            self._jit(tensors)
            return
        device = driver.get_current_device()
        if device != self.home and self.home is not None:
            with torch.cuda.device(self.home):
                self(*tensors)
            return
        pointers = [None if x is None else x.data_ptr() for x in tensors]
        bits = 0
        for p in pointers:
            if p:
                bits |= p
        aligned = _aligned(pointers) if bits & 15 else True
        run = self.near.get((device, aligned))
        if run is None:
            self._find(tensors, device, aligned)
            return
        if self.first:
            run(*self._among(pointers), *self.rest, stream=driver.get_current_stream(device))
        else:
            run(*pointers, *self.rest, stream=driver.get_current_stream(device))

    def _among(self, tensors: Sequence[Any]) -> list[Any]:
        """With the strides where they stand."""
        return [*tensors[: self.first], *self.strides, *tensors[self.first :]]

    def _find(self, tensors: Sequence[Tensor | None], device: int, aligned: Any) -> None:
        """A launch by triton.jit, which compiles if need be; what it ran is remembered."""
        key = (device, aligned, *[None if x is None else x.dtype for x in tensors])
        compiled = self.known.get(key)
        if compiled is None:
            task = self.ahead.get(key[1:])
            if task is not None:
                task.wait()
            compiled = self._jit(tensors)
            if not hasattr(compiled, "packed_metadata"):
                return
            self.known[key] = compiled
        else:
            stream = _driver(type(self.fn)).get_current_stream(device)
            pointers = [None if x is None else x.data_ptr() for x in tensors]
            compiled[self.grid](*self._among(pointers), *self.rest, stream=stream)
        self.near[device, aligned] = compiled[self.grid]

    def warm(self, *tensors: Tensor | torch.dtype | None) -> None:
        """Compiles without launching; a dtype stands for an aligned tensor."""
        if _driver(type(self.fn)) is not None:
            given = self._among([*map(_pairs, tensors)])
            _parsed(lambda: self.fn.warmup(*given, *self.rest, grid=self.grid, **self.options))

    def _jit(self, tensors: Sequence[Tensor | None]) -> Any:
        given = self._among([*map(_pairs, tensors)])
        return _parsed(lambda: self.fn[self.grid](*given, *self.rest, **self.options))


def _parsed(run: Callable[[], Any]) -> Any:
    """Runs what may compile. CPython's ast.parse counts its depth for all threads together: where others parse at the
    same time, it may miscount, and raise SystemError."""
    for _ in range(_PARSES):
        try:
            return run()
        except SystemError:
            continue
    return run()


class _Ahead(Launch):
    """Launches over tensors without memory: their kernels are compiled by threads, each once."""

    __slots__ = ()

    def __call__(self, *tensors: Tensor | None) -> None:
        aligned = _aligned([None if x is None else x.data_ptr() for x in tensors])
        key = (True if all(aligned) else aligned, *[None if x is None else x.dtype for x in tensors])
        if key not in self.ahead:
            self.ahead[key] = Compilation(lambda: self.warm(*tensors))


def _aligned(pointers: Sequence[int | None]) -> tuple[bool, ...]:
    return tuple([p is None or not p & 15 for p in pointers])


def _traits(number: float, parameter: Any) -> tuple[Any, ...]:
    """What triton.jit may compile differently for."""
    if type(number) is not int:
        return (type(number),)
    wide = number not in _WORD
    if getattr(parameter, "do_not_specialize", False):
        return wide, number >= 2**63
    return wide, number >= 2**63, number == 1, number % 16 == 0


def _pairs(x: Any) -> Any:
    """A complex tensor as pairs of reals."""
    if isinstance(x, torch.dtype):
        return torch.float32 if x == torch.complex64 else x
    return torch.view_as_real(x) if x is not None and x.is_complex() else x


_PARSES = 8  # tries
_KNOWN = ((3, 4), (3, 7))  # versions of triton, first and last, whose compiled kernels take all arguments as they are
_DIRECT: dict[type, bool] = {}  # kinds of kernel -> whether they are launched directly


def _driver(kind: type) -> Any:
    """Triton's driver, if compiled kernels of this kind are launched directly."""
    direct = _DIRECT.get(kind)
    if direct is None:
        triton = sys.modules.get("triton")
        direct = False
        if triton is not None and kind is getattr(triton, "JITFunction", None):
            version = tuple(int(part) for part in triton.__version__.split(".")[:2])
            target = triton.runtime.driver.active.get_current_target()
            direct = _KNOWN[0] <= version <= _KNOWN[1] and target.backend == "cuda"
        _DIRECT[kind] = direct
    return sys.modules["triton"].runtime.driver.active if direct else None


# --- Calls of the attention kernels: softmax over several sets of tokens at once, with its gradients.

_PRODUCTS = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}
_LOG2_E = 1.4426950408889634
_WIDEST = 256  # a program holds whole rows
_SHAPES_OF_CALLS = 1024  # shapes of calls that are remembered
_ATTEND = "(Tensor[] operands, float scale, str products) -> (Tensor, Tensor)"
_ATTEND_BACK = "(Tensor grad, Tensor[] operands, Tensor out, Tensor lse, float scale, str products) -> Tensor[]"


class AttentionKernels:
    """The kernels of one form of attention. `table`: the kernels, one for the keys of each set, `tiles`, `digest`."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.interpreted: bool = table.interpreted
        self._forward, self._query = Kernel(table.forward), Kernel(table.query)
        self._keys = [Kernel(k) for k in table.keys]
        self._plans: dict[Any, Any] = {}
        name = f"attention_{table.digest}"
        if not hasattr(torch.ops.psmc, name):
            self._register(name)
        self.op = getattr(torch.ops.psmc, name).default

    def takes(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the kernels run on these operands."""
        first = tensors[0]
        if first.device.type != "cuda" and not self.interpreted:
            return False
        return all(x.dtype in _PRODUCTS and 0 < x.shape[-1] <= _WIDEST for x in tensors)

    def __call__(
        self, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float = 1.0,
        given: torch.dtype | None = None,
    ) -> Tensor:  # fmt: skip
        """softmax(scale query keysᵀ) values, [*lead, N, V], of query [*lead, N, E], keys [*lead, M, E] and values
        [*lead, M, V] of each set; leading axes broadcast. Differentiable once, in all operands.

        given: the dtype of a call's inputs; products are as precise as the least precise of it and the operands. The
        output is in the dtype that query and values promote to.
        """
        operands = [query, *(x for pair in zip(keys, values, strict=True) for x in pair)]
        lead = torch.broadcast_shapes(*(x.shape[:-2] for x in operands))
        operands = [x if x.shape[:-2] == lead else x.expand(*lead, *x.shape[-2:]) for x in operands]
        products = _products({given, *(x.dtype for x in operands)})
        if torch.compiler.is_compiling():
            out: Tensor = self.op(operands, scale, products)[0]
            return out
        found: Tensor = _Attend.apply(self, scale, products, *operands)  # type: ignore[no-untyped-call]
        return found

    # --- launches

    def forward(self, operands: Sequence[Tensor], scale: float, products: str) -> tuple[Tensor, Tensor]:
        """The output, and log2 of the sum of each token's weights, [*lead, N] in fp32."""
        query, value = operands[0], operands[2]
        out = query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=torch.promote_types(query.dtype, value.dtype))
        lse = query.new_empty(query.shape[:-1], dtype=torch.float32)
        if out.numel():
            views = _operand_views(operands)
            self._launch("forward", self._forward, views, range(len(operands)), scale, products)(
                *views.tensors, out, lse
            )
        return out, lse

    def backward(
        self, grad: Tensor, operands: Sequence[Tensor], out: Tensor, lse: Tensor, scale: float, products: str,
        wanted: Sequence[bool],
    ) -> list[Tensor | None]:  # fmt: skip
        """Gradients of the operands, each in its own full shape; None for a set of which none is wanted."""
        if not out.numel():
            return [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in operands]
        views = _operand_views(operands)
        grad, delta = grad.contiguous(), torch.empty_like(lse)
        found: list[Tensor | None] = [None] * len(operands)
        found[0] = dq = _gradient_like(operands[0])
        launch = self._launch("query", self._query, views, range(len(operands)), scale, products)
        launch(*views.tensors, out, lse, grad, dq, delta)
        for at, kernel in enumerate(self._keys):
            k, v = 2 * at + 1, 2 * at + 2
            if not (wanted[k] or wanted[v]):
                continue
            found[k], found[v] = dk, dv = _gradient_like(operands[k]), _gradient_like(operands[v])
            if dk.shape[-2]:
                launch = self._launch(f"keys {at}", kernel, views, (0, k, v), scale, products)
                launch(*(views.tensors[i] for i in (0, k, v)), lse, grad, delta, dk, dv)
        return found

    def _launch(
        self, name: str, kernel: Kernel, views: _Views, at: Sequence[int], scale: float, products: str
    ) -> Any:
        """A kernel on the operands `at`, with a program for each block of queries, or of keys for "keys 0", ...."""
        query, keys, value = views.tensors[0], [views.tensors[i] for i in at[1::2]], views.tensors[at[2]]
        tokens, many = query.shape[-2], [x.shape[-2] for x in keys]
        numbers = (tokens, *many, *views.sizes[1:], *(n for i in at for n in views.strides[i]), scale * _LOG2_E)
        widths = query.shape[-1], value.shape[-1]
        dtypes = tuple([views.tensors[i].dtype for i in at])
        key = (name, numbers, widths, views.sizes, views.even, products, dtypes, query.device)
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _SHAPES_OF_CALLS:
                self._plans.clear()
            be, bv = map(_padded, widths)
            rows = self.table.tiles[name.split()[0]][products]
            bn, bm, warps, stages = next(tile for limit, tile in rows if max(be, bv) <= limit)
            bn, bm = min(bn, _padded(tokens)), min(bm, _padded(max(many)))
            blocks = -(-many[0] // bm) if name.startswith("keys") else -(-tokens // bn)
            plan = self._plans[key] = kernel.launch(
                math.prod(views.sizes) * blocks, numbers, (*widths, bn, bm, be, bv, views.even, products, stages),
                query.device, num_warps=warps,
            )  # fmt: skip
        return plan

    # --- one node of a compiled graph

    def _register(self, name: str) -> None:
        def run(operands: list[Tensor], scale: float, products: str) -> tuple[Tensor, Tensor]:
            return self.forward(operands, scale, products)

        def transpose(
            grad: Tensor, operands: list[Tensor], out: Tensor, lse: Tensor, scale: float, products: str
        ) -> list[Tensor]:
            found = self.backward(grad, operands, out, lse, scale, products, [True] * len(operands))
            return [x for x in found if x is not None]

        def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
            ctx.fixed = inputs[1:]
            ctx.save_for_backward(*inputs[0], *output)

        def differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
            *operands, out, lse = ctx.saved_tensors
            return backward_op(grad, operands, out, lse, *ctx.fixed), None, None

        forward = torch.library.custom_op(f"psmc::{name}", run, mutates_args=(), schema=_ATTEND)
        backward = torch.library.custom_op(f"psmc::{name}_backward", transpose, mutates_args=(), schema=_ATTEND_BACK)
        backward_op = getattr(torch.ops.psmc, f"{name}_backward").default
        forward.register_fake(
            lambda operands, scale, products: (
                operands[0].new_empty(
                    (*operands[0].shape[:-1], operands[2].shape[-1]),
                    dtype=torch.promote_types(operands[0].dtype, operands[2].dtype),
                ),
                operands[0].new_empty(operands[0].shape[:-1], dtype=torch.float32),
            )
        )
        backward.register_fake(lambda grad, operands, *rest: [_gradient_like(x) for x in operands])
        forward.register_autograd(differentiate, setup_context=remember)


class _Attend(torch.autograd.Function):
    """The kernels under autograd, outside of compiled graphs."""

    @staticmethod
    def forward(ctx: Any, kernels: AttentionKernels, scale: float, products: str, *operands: Tensor) -> Tensor:
        out, lse = kernels.forward(operands, scale, products)
        ctx.kernels, ctx.fixed = kernels, (scale, products)
        ctx.save_for_backward(*operands, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *operands, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[3:]
        return None, None, None, *ctx.kernels.backward(grad, operands, out, lse, *ctx.fixed, wanted)


class _Views(NamedTuple):
    """Operands as the kernels read them: sizes X, Y, Z of the leading axes, and for each operand its strides over them
    and over its tokens. `even`: all strides are multiples of it, up to 8 numbers."""

    tensors: list[Tensor]
    sizes: tuple[int, int, int]
    strides: list[tuple[int, int, int, int]]
    even: int


def _products(dtypes: set[torch.dtype | None]) -> str:
    """The precision of products of operands of these dtypes."""
    narrow = next((d for d in (torch.bfloat16, torch.float16) if d in dtypes), torch.float32)
    return "ieee" if torch.version.hip and narrow != torch.bfloat16 else _PRODUCTS[narrow]


def _operand_views(operands: Sequence[Tensor]) -> _Views:
    """The leading axes as three: axes that follow each other in memory in all operands are one. Copied is what has a
    last axis with gaps, or if there are more axes than three."""
    tensors = [a if a.shape[-1] == 1 or a.stride(-1) == 1 else a.contiguous() for a in operands]
    groups = _lead_groups(tensors)
    if len(groups) > 3:
        tensors = [a.contiguous() for a in tensors]
        groups = _lead_groups(tensors)
    groups = [(1, [0] * len(tensors))] * (3 - len(groups)) + groups
    (x, over_x), (y, over_y), (z, over_z) = groups
    strides = [(over_x[n], over_y[n], over_z[n], _token_stride(a)) for n, a in enumerate(tensors)]
    even = math.gcd(8, *(n for row in strides for n in row))
    return _Views(tensors, (x, y, z), strides, even)


def _lead_groups(tensors: Sequence[Tensor]) -> list[tuple[int, list[int]]]:
    """(size, stride of each tensor) of the leading axes, as few as there can be."""
    groups: list[tuple[int, list[int]]] = []
    for axis, size in enumerate(tensors[0].shape[:-2]):
        strides = [x.stride(axis) for x in tensors]
        if size == 1:
            continue
        if groups and all(outer == inner * size for outer, inner in zip(groups[-1][1], strides, strict=True)):
            groups[-1] = (groups[-1][0] * size, strides)
        else:
            groups.append((size, strides))
    return groups


def _token_stride(x: Tensor) -> int:
    return x.stride(-2) if x.shape[-2] > 1 else 0


def _gradient_like(x: Tensor) -> Tensor:
    """A gradient, contiguous."""
    return x.new_empty(x.shape)


def _padded(size: int) -> int:
    """A power of two that holds it, 16 or more."""
    return max(16, 1 << (max(size, 1) - 1).bit_length())


ATTENTION_TILES = {  # kernel -> products -> ((largest width, (queries, keys, warps, stages)), ...)
    "forward": {
        "bf16": ((32, (64, 64, 4, 2)), (64, (64, 64, 4, 2)), (128, (128, 64, 8, 2)), (256, (32, 32, 4, 1))),
        "tf32": ((32, (64, 32, 4, 1)), (64, (64, 32, 4, 1)), (128, (64, 32, 8, 1)), (256, (32, 32, 8, 1))),
        "tf32x3": ((32, (64, 32, 4, 1)), (64, (64, 32, 4, 1)), (128, (32, 32, 4, 1)), (256, (16, 16, 8, 1))),
        "ieee": ((32, (64, 32, 4, 1)), (64, (64, 32, 4, 1)), (128, (32, 32, 4, 1)), (256, (16, 16, 8, 1))),
    },
    "query": {
        "bf16": ((32, (64, 64, 4, 2)), (64, (64, 64, 4, 2)), (128, (64, 64, 8, 1)), (256, (32, 32, 8, 1))),
        "tf32": ((32, (32, 32, 4, 1)), (64, (32, 32, 4, 1)), (128, (32, 32, 8, 1)), (256, (16, 16, 8, 1))),
        "tf32x3": ((32, (32, 32, 4, 1)), (64, (32, 32, 4, 1)), (128, (16, 32, 4, 1)), (256, (16, 16, 8, 1))),
        "ieee": ((32, (32, 32, 4, 1)), (64, (32, 32, 4, 1)), (128, (16, 32, 4, 1)), (256, (16, 16, 8, 1))),
    },
    "keys": {
        "bf16": ((32, (32, 64, 4, 2)), (64, (32, 64, 4, 2)), (128, (64, 64, 8, 1)), (256, (32, 32, 8, 1))),
        "tf32": ((32, (32, 32, 4, 1)), (64, (32, 32, 4, 1)), (128, (32, 32, 8, 1)), (256, (16, 16, 8, 1))),
        "tf32x3": ((32, (32, 32, 4, 1)), (64, (32, 32, 4, 1)), (128, (32, 16, 4, 1)), (256, (16, 16, 8, 1))),
        "ieee": ((32, (32, 32, 4, 1)), (64, (32, 32, 4, 1)), (128, (32, 16, 4, 1)), (256, (16, 16, 8, 1))),
    },
}


ATTENTION_KERNELS_0 = AttentionKernels(SimpleNamespace(
    digest='61888788d29a3706_0',
    forward=attention_forward_kernel_0,
    query=attention_query_kernel_0,
    keys=(attention_keys_kernel_0_0, attention_keys_kernel_0_0,),
    tiles=ATTENTION_TILES,
    interpreted=triton is not None and not isinstance(attention_forward_kernel_0, triton.JITFunction),
))


ATTENTION_0 = ATTENTION_KERNELS_0


KERNELS = None

# --- Scans in PyTorch, differentiable by autograd: no loop over T where the rule is associative.

GO_ON, RESTART = -2, -1  # what `entry` says of a token besides the row of the initial state that enters there

Values = dict[str, Tensor]
Rule = Callable[[Values, Values], Values]


class Scan(NamedTuple):
    """`prefix`, `previous`: [B, T, ...]; `carry`: the state after the last token, [B, ...]; `exists` [B]: whether any
    element or initial state is in `carry` (None: in all of them)."""

    prefix: Values
    previous: Values | None
    carry: Values
    exists: Tensor | None


def blocked_scan(
    combine: Rule,
    advance: Rule,
    elements: Values,
    empty: Values,
    *,
    carry: Values | None = None,
    exists: Tensor | None = None,
    initial: Values | None = None,
    initial_exists: Tensor | None = None,
    valid: Tensor | None = None,
    entry: Tensor | None = None,
    previous: bool = False,
    block: int | None = None,
) -> Scan:
    """All prefixes of an associative rule: three passes over about sqrt(T) steps, each batched over all blocks.

    elements  the tokens, all components          empty    the live components before anything, [*dims]: only selected
    carry     the state before token 0, [B, ...]  exists   [B] bool: rows of `carry` that hold something (None: all)
    valid     [B, T] bool: tokens that count      entry    [B, T] of `scan_entries`: restarts
    initial   rows that `entry` names, [N, ...]   initial_exists   [N] bool, as `exists`
    block     tokens a block; None chooses        previous   also return the prefixes before each token
    """
    live = tuple(empty)
    batch, length = _leading(elements)
    if length == 0:
        return _nothing(elements, empty, carry, exists, previous)
    before, before_exists = carry, exists
    pieces: list[Values] = []
    if valid is None and entry is None and exists is None:
        lengths = _pieces(length, carry is None, block)
        for (count, size), x in zip(lengths, _split(elements, [c * s for c, s in lengths]), strict=True):
            if carry is None:
                prefix = {k: x[k] for k in live}  # one token: it is the first prefix
                carry = {k: x[k][:, 0] for k in live}
            else:
                prefix, carry = _plain_piece(combine, advance, x, carry, count, size)
            pieces.append(prefix)
    else:
        like = next(iter(elements.values()))
        valid = torch.ones((batch, length), dtype=torch.bool, device=like.device) if valid is None else valid
        entry = torch.full((batch, length), GO_ON, device=like.device) if entry is None else entry
        donor = _donor(elements, valid)
        before = _start(elements, empty) if carry is None else carry
        if exists is None:
            exists = torch.full((batch,), carry is not None, device=like.device)
        before_exists, carry = exists, before
        rule = _Guarded(combine, advance, empty, donor, initial, initial_exists)
        lengths = _pieces(length, False, block)
        sizes = [c * s for c, s in lengths]
        parts = zip(
            lengths, _split(elements, sizes), torch.split(valid, sizes, 1), torch.split(entry, sizes, 1), strict=True
        )
        for (count, size), x, v, e in parts:
            prefix, carry, exists = _guarded_piece(rule, x, v, e, carry, exists, count, size)
            pieces.append(prefix)
    prefix = _cat(pieces)
    shifted = _previous(prefix, before, before_exists, empty, entry, initial, initial_exists) if previous else None
    return Scan(prefix, shifted, carry or {}, exists)


class _Guarded(NamedTuple):
    """The rule and what stands in for operands that are not there."""

    combine: Rule
    advance: Rule
    empty: Values
    donor: Values
    initial: Values | None
    initial_exists: Tensor | None

    def join(self, rule: Rule, both: Tensor, l: Values, r: Values) -> Values:  # noqa: E741
        """rule(l, r) where `both`, and a value of no consequence elsewhere."""
        return _fit(rule(_pick(both, l, self.donor), _pick(both, r, self.donor)), r, tuple(l))

    def attach(
        self, carry: Values, exists: Tensor, y: Values, has: Tensor, cut: Tensor, row: Tensor
    ) -> tuple[Values, Tensor]:
        """The prefix from what precedes a block (`carry` where it `exists`) and the block's own product y (where it
        `has` one) since the last restart, if the block has one (`cut`), which let in the initial state `row`."""
        if self.initial is None:
            base, base_exists = carry, exists & ~cut
        else:
            entered, entered_exists = _rows(self.empty, self.initial, self.initial_exists, row)
            base, base_exists = _pick(cut, entered, carry), torch.where(cut, entered_exists, exists)
        joined = self.join(self.advance, base_exists & has, base, y)
        alone = _pick(has, {k: y[k] for k in carry}, _pick(base_exists, base, self.empty))
        return _pick(base_exists & has, joined, alone), base_exists | has


def _plain_piece(
    combine: Rule,
    advance: Rule,
    elements: Values,
    carry: Values,
    count: int,
    size: int,
) -> tuple[Values, Values]:
    """Every token counts and none restarts: `count` blocks of `size` tokens after `carry`."""
    live = tuple(carry)
    local: list[Values] = []  # within each block, [B, count, ...] each
    for x in _unbind(_blocks(elements, count, size), 2):
        local.append(_fit(combine(local[-1], x), x, tuple(x)) if local else x)
    carries = [carry]  # before each block, and after the last
    for total in _unbind(local[-1]):
        carries.append(_fit(advance(carries[-1], total), total, live))
    before, after = _stack(carries[:-1], 1), _stack(carries[1:], 1)
    prefixes = [_fit(advance(before, y), y, live) for y in local[:-1]]
    return {k: v.flatten(1, 2) for k, v in _stack([*prefixes, after], 2).items()}, carries[-1]


def _guarded_piece(
    rule: _Guarded,
    elements: Values,
    valid: Tensor,
    entry: Tensor,
    carry: Values,
    exists: Tensor,
    count: int,
    size: int,
) -> tuple[Values, Values, Tensor]:
    """As `_plain_piece`, with tokens that do not count, restarts, and a carry that need not exist."""
    local: list[tuple[Values, Tensor, Tensor, Tensor]] = []
    flags = zip(*(torch.unflatten(f, 1, (count, size)).unbind(2) for f in (valid, entry)), strict=True)
    for x, (v, e) in zip(_unbind(_blocks(elements, count, size), 2), flags, strict=True):
        start = e != GO_ON
        if not local:
            local.append((x, v, start, e))
            continue
        y, has, cut, row = local[-1]
        both = has & v & ~start
        y = _pick(both, rule.join(rule.combine, both, y, x), _pick(v, x, y))
        local.append((y, v | (has & ~start), cut | start, torch.where(start, e, row)))
    totals, *marks = local[-1]
    carries, known = [carry], [exists]
    for y, has, cut, row in zip(_unbind(totals), *(m.unbind(1) for m in marks), strict=True):
        state, some = rule.attach(carries[-1], known[-1], y, has, cut, row)
        carries.append(state)
        known.append(some)
    before, before_exists, after = _stack(carries[:-1], 1), torch.stack(known[:-1], 1), _stack(carries[1:], 1)
    prefixes = [rule.attach(before, before_exists, *part)[0] for part in local[:-1]]
    return {k: v.flatten(1, 2) for k, v in _stack([*prefixes, after], 2).items()}, carries[-1], known[-1]


def _pieces(length: int, peel: bool, block: int | None) -> list[tuple[int, int]]:
    """(blocks, tokens a block) of each piece: one token alone if there is nothing before it, then a square that takes
    the fewest steps (two passes over a block, one over the blocks), then what that leaves."""
    pieces = [(1, 1)] if peel else []
    length -= len(pieces)
    while length:
        size = max(1, min(block or isqrt(length // 2), length))
        pieces.append((length // size, size))
        length %= size
    return pieces


def _previous(
    prefix: Values,
    before: Values | None,
    exists: Tensor | None,
    empty: Values,
    entry: Tensor | None,
    initial: Values | None,
    initial_exists: Tensor | None,
) -> Values:
    """The prefixes before each token: shifted by one, and the start again at every restart."""
    first = _start(prefix, empty)
    if before is not None:
        first = before if exists is None else _pick(exists, before, first)
    shifted = {k: torch.cat([first[k].unsqueeze(1), p[:, :-1]], 1) for k, p in prefix.items()}
    if entry is None:
        return shifted
    if initial is None:
        return _pick(entry == GO_ON, shifted, empty)
    rows, rows_exist = _rows(empty, initial, initial_exists, entry)
    return _pick(entry == GO_ON, shifted, _pick(rows_exist, rows, empty))


def _rows(empty: Values, initial: Values | None, initial_exists: Tensor | None, row: Tensor) -> tuple[Values, Tensor]:
    """The initial states `row` names (any, where it names none) and whether it names one that exists."""
    index = row.clamp(min=0)
    named = row >= 0 if initial_exists is None else (row >= 0) & initial_exists[index]
    return (empty if initial is None else {k: initial[k][index] for k in empty}), named


def _donor(tensors: Values, valid: Tensor) -> Values:
    """The first token that counts, without gradient and leading axes; ones (zeros for integers) if none does."""
    flat, length = valid.reshape(-1), valid.shape[1]
    if flat.numel() == 0:
        return {k: torch.ones(x.shape[2:], dtype=x.dtype, device=x.device) for k, x in tensors.items()}
    first, some = flat.to(torch.int8).argmax().reshape(1), flat.any()
    found = {k: x.detach()[first // length, first % length][0] for k, x in tensors.items()}
    return {k: torch.where(some, x, torch.full_like(x, x.is_floating_point())) for k, x in found.items()}


def _nothing(
    elements: Values,
    empty: Values,
    carry: Values | None,
    exists: Tensor | None,
    previous: bool,
) -> Scan:
    """The scan of no tokens."""
    carry = _start(elements, empty) if carry is None else carry
    prefix = {k: s.unsqueeze(1)[:, :0] for k, s in carry.items()}
    return Scan(prefix, prefix if previous else None, carry, exists)


def _start(elements: Values, empty: Values) -> Values:
    """`empty` as a state of the elements' batch and lanes."""
    batch = _leading(elements)[0]
    shapes = {k: elements[k].shape[2:] if k in elements else e.shape for k, e in empty.items()}
    return {k: e.to(elements.get(k, e).dtype).expand(batch, *shapes[k]) for k, e in empty.items()}


def _fit(values: Values, like: Values, names: tuple[str, ...]) -> Values:
    """What a rule returned, at the full shape of its right operand (a constant comes without leading axes)."""
    return {k: values[k] if values[k].shape == like[k].shape else values[k].expand_as(like[k]) for k in names}


def _pick(flag: Tensor, yes: Values, no: Values) -> Values:
    """torch.where by component; the flag's axes are the leading ones."""
    return {k: torch.where(_flag(flag, y if y.dim() >= no[k].dim() else no[k]), y, no[k]) for k, y in yes.items()}


def _flag(flag: Tensor, like: Tensor) -> Tensor:
    return flag.reshape(flag.shape + (1,) * (like.dim() - flag.dim()))


def _leading(tensors: Values) -> tuple[int, int]:
    """(B, T)."""
    shape = next(iter(tensors.values())).shape
    return shape[0], shape[1]


def _blocks(elements: Values, count: int, size: int) -> Values:
    return {k: torch.unflatten(x, 1, (count, size)) for k, x in elements.items()}


def _unbind(tensors: Values, dim: int = 1) -> list[Values]:
    """One dict a position; backward is one stack, where indexing would add up full-size zeros."""
    rows = zip(*(x.unbind(dim) for x in tensors.values()), strict=True)
    return [dict(zip(tensors, row, strict=True)) for row in rows]


def _split(tensors: Values, sizes: list[int]) -> list[Values]:
    """Consecutive stretches of time."""
    if len(sizes) == 1:
        return [tensors]
    parts = zip(*(torch.split(x, sizes, 1) for x in tensors.values()), strict=True)
    return [dict(zip(tensors, part, strict=True)) for part in parts]


def _stack(rows: list[Values], dim: int) -> Values:
    return {k: torch.stack([row[k] for row in rows], dim) for k in rows[0]}


def _cat(rows: list[Values], dim: int = 1) -> Values:
    return rows[0] if len(rows) == 1 else {k: torch.cat([row[k] for row in rows], dim) for k in rows[0]}


# --- A layer over a batch of sequences: masks, restarts and packing on top of the scans, a stretch of time at once.

SEGMENT_BYTES = {"cpu": 8 << 20, "cuda": 256 << 20}  # elements lifted at once: a cache's worth; enough to fill a GPU
RECOMPUTE_BYTES = {"cpu": 256 << 20, "cuda": 2 << 30}  # elements of a whole call from which on backward recomputes them


def scan_tokens(
    lift: Callable[[Values], Values],
    combine: Rule,
    advance: Rule,
    output: Callable[[Values, Values | None, Values], Values] | None,
    inputs: Values,
    empty: Values,
    initial: Values | None = None,
    *,
    initial_exists: Tensor | None = None,
    restart: Values | None = None,
    valid: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    previous: bool = False,
    left: bool = False,
    segment: int | None = None,
    recompute: bool | None = None,
) -> tuple[Values, Values]:
    """A whole layer, some tokens at a time, so that elements of matrix states never fill the memory.

    inputs      [B, T, ...] each (taps as shifted copies); masked tokens are filled here, before `lift` sees them
    lift        inputs -> elements;  output   (prefix, previous or None, inputs) -> outputs; None: outputs is {}
    initial     [B, ...], or [N, ...] with cu_seqlens [N + 1] (then B is 1);  initial_exists   [B] or [N] bool
    restart     [1, ...] where a sequence without `initial` and a reset begin, if that counts (None: with nothing)
    left        the sequential scan instead of the blocked one
    segment     tokens lifted at once; None: by the size of an element
    recompute   keep only the states between segments for backward; None: by the size of all elements

    Returns (outputs, 0 at masked tokens; final state, [B, ...] or [N, ...]).
    """
    inputs = fill_masked(inputs, valid)
    cu_seqlens = None if cu_seqlens is None else cu_seqlens.long()
    batch, length = _leading(inputs)
    if initial is None and restart is not None:
        rows = batch if cu_seqlens is None else cu_seqlens.numel() - 1
        initial = {k: s.expand(rows, *s.shape[1:]) for k, s in restart.items()}
    entry = scan_entries(batch, length, reset=reset, cu_seqlens=cu_seqlens, initial=initial is not None)
    entering = initial if cu_seqlens is not None else None
    if restart is not None and reset is not None and entry is not None:  # one row more, for the resets
        named = 0 if entering is None else next(iter(entering.values())).shape[0]
        entering = restart if entering is None else {k: torch.cat([s, restart[k]]) for k, s in entering.items()}
        entry = torch.where(entry == RESTART, named, entry)
    with torch.no_grad():
        size = sum(v.numel() * v.element_size() for v in lift({k: x[:, :1] for k, x in inputs.items()}).values())
    kind = "cpu" if next(iter(inputs.values())).device.type == "cpu" else "cuda"
    segment_bytes, limit = SEGMENT_BYTES[kind], RECOMPUTE_BYTES[kind]
    segment = segment or max(16, min(length, segment_bytes // max(size, 1)))
    if recompute is None:
        recompute = size * length > limit and length > segment
    ends = None if cu_seqlens is None else _Ends(cu_seqlens, length, segment)

    def body(x: Values, v: Any, e: Any, carry: Any, exists: Any, rows: Any) -> tuple[Any, ...]:
        scan = blocked_scan(
            combine, advance, lift(x), empty, carry=carry, exists=exists, initial=entering,
            initial_exists=initial_exists, valid=v, entry=e, previous=previous,
        )  # fmt: skip
        # Before the first token that counts a state may be infinite: no readout of it may meet a gradient.
        read, before = fill_masked(scan.prefix, v), scan.previous and fill_masked(scan.previous, v)
        outputs = {} if output is None else output(read, before, x)
        if v is not None:
            outputs = {k: torch.where(_flag(v, o), o, torch.zeros_like(o)) for k, o in outputs.items()}
        final = {} if rows is None else {k: s[0].index_select(0, rows) for k, s in scan.prefix.items()}
        return outputs, scan.carry, scan.exists, final

    carry, exists = (None, None) if ends else (initial, initial_exists if initial else None)
    sizes = [min(segment, length - at) for at in range(0, length, segment)] or [0]
    masks = [None] * len(sizes) if valid is None else torch.split(valid, sizes, 1)
    entries = [None] * len(sizes) if entry is None else torch.split(entry, sizes, 1)
    last = [None] * len(sizes) if ends is None else ends.rows.unbind(0)
    outputs, finals = [], []
    for args in zip(_split(inputs, sizes), masks, entries, last, strict=True):
        x, v, e, r = args
        if recompute and torch.is_grad_enabled():
            out, carry, exists, final = checkpoint(body, x, v, e, carry, exists, r, use_reentrant=False)
        else:
            out, carry, exists, final = body(x, v, e, carry, exists, r)
        outputs.append(out)
        finals.append(final)
    return _cat(outputs), ends.gather(_cat(finals, 0), initial, empty) if ends else carry or {}


class _Ends:
    """Where packed sequences end, segment by segment: `rows` [segments, W] are the last tokens of the (at most W)
    sequences that end in a segment, so that their states are kept and no others. No host sync."""

    def __init__(self, cu_seqlens: Tensor, length: int, segment: int) -> None:
        count, device = cu_seqlens.numel() - 1, cu_seqlens.device
        self.last = cu_seqlens[1:] - 1
        self.nonempty = cu_seqlens[1:] > cu_seqlens[:-1]
        segments, width = max(1, -(-length // segment)), min(count, segment)
        total = segments * segment
        end = torch.zeros(total + 1, dtype=torch.int64, device=device)
        end = end.scatter(0, torch.where(self.nonempty, self.last, total).long(), 1)[:-1].view(segments, segment)
        slot = end.cumsum(1) - 1
        token = torch.arange(segment, device=device).expand(segments, segment)
        rows = torch.zeros(segments, width + 1, dtype=torch.int64, device=device)
        self.rows = rows.scatter(1, torch.where(end > 0, slot, width), token)[:, :width]
        last = self.last.clamp(min=0)
        self.place = torch.where(self.nonempty, last // segment * width + slot.reshape(-1)[last], 0)
        if length == 0:
            self.rows = self.rows[:, :0]

    def gather(self, kept: Values, initial: Values | None, empty: Values) -> Values:
        """[N, ...]: the state after each sequence's last token; of an empty sequence what it started from."""
        final = {}
        for k, s in kept.items():
            start = empty[k].to(s.dtype) if initial is None else initial[k]
            if s.shape[0] == 0:
                final[k] = start.expand(self.last.numel(), *s.shape[1:])
            else:
                final[k] = torch.where(_flag(self.nonempty, s), s.index_select(0, self.place), start)
        return final


def scan_entries(
    batch: int,
    length: int,
    *,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial: bool = False,
    device: torch.device | None = None,
) -> Tensor | None:
    """[B, T] int64: GO_ON, RESTART (from nothing), or the row of the initial state that enters at this token.

    `reset` [B, T] bool; `cu_seqlens` [N + 1]: N sequences in one row; `initial`: there are initial states [N, ...].
    None if no token restarts. Without `cu_seqlens` an initial state is the scan's carry, not an entry.
    """
    if reset is None and cu_seqlens is None:
        return None
    device = cu_seqlens.device if cu_seqlens is not None else reset.device if reset is not None else device
    entry = torch.full((batch, length), GO_ON, dtype=torch.int64, device=device)
    if cu_seqlens is not None:
        token = torch.arange(length, device=device)
        cu_seqlens = cu_seqlens.long()
        row = torch.searchsorted(cu_seqlens, token, right=True) - 1
        starts = cu_seqlens[row] == token
        inside = row < cu_seqlens.numel() - 1
        entry = torch.where(starts, torch.where(inside, row, RESTART) if initial else RESTART, entry)
    return entry if reset is None else torch.where(reset, RESTART, entry)


def fill_masked(tensors: Values, valid: Tensor | None) -> Values:
    """Replace what masked tokens hold (it may be NaN) by a valid token's values, without gradient. valid: [B, T]."""
    if valid is None or valid.numel() == 0:
        return tensors
    donor = _donor(tensors, valid)
    return {k: torch.where(_flag(valid, x), x, donor[k]) for k, x in tensors.items()}


# --- The tree plan: one fixed parenthesisation for rules that are not associative, in parallel and token by token.

Node = dict[str, Tensor]
Merge = Callable[[Node, Node], Node]


class LevelError(ValueError):
    """A counter has more levels than are read."""


def tree_scan(
    combine: Merge,
    leaves: Node,
    counter: Node | None = None,
    *,
    empty: Node | None = None,
    exclusive: bool = False,
    keep: bool = True,
    recompute: bool = False,
    levels: int = 0,
) -> tuple[Node, Node | None]:
    """The prefixes [B, T, ...] of leaves [B, T, ...], and the counter after them; one combine a level.

    counter     where to go on; all its streams must be at one position (`tree_tokens` has no such limit)
    exclusive   the prefixes before each leaf; the first is `empty` (broadcast) if nothing came before
    keep        False: no counter is returned; exclusive prefixes of 2^m leaves then take 2 (2^m - 1 - m) combines
                in 2 (m - 1) levels, which is the least
    recompute   keep the operands of each level for backward, not what `combine` computes on the way
    levels      beside the prefixes, `<component>.root.<k>`: what the counter holds at level k < levels, or `empty`
    """
    batch, length = next(iter(leaves.values())).shape[:2]
    position = 0 if counter is None else _common_position(counter)
    counter = counter_start(batch) if counter is None else counter
    used = leaves if keep or not exclusive else {k: x[:, :-1] for k, x in leaves.items()}
    if recompute:
        rule = combine

        def combine(l: Node, r: Node) -> Node:  # noqa: E741
            again: Node = checkpoint(rule, l, r, use_reentrant=False)
            return again

    roots = {k: _slot(counter, leaves, "root", k) for k in _bits(position)}
    folds = {k: _slot(counter, leaves, "fold", k) for k in _bits(position)}
    nodes = _trees(combine, used, roots, position)
    prefix = _prefixes(combine, nodes, folds, position)
    after = _counter_after(counter, nodes, prefix, position) if keep else None
    if levels:
        assert empty is not None and not exclusive, "levels are read beside inclusive prefixes"
        for k, level in enumerate(_roots(nodes, roots, position, length, levels, empty)):
            prefix |= {f"{name}.root.{k}": x for name, x in level.items()}
    if exclusive and length:
        first = counter_prefix(counter, leaves, empty)
        prefix = {k: torch.cat([first[k].unsqueeze(1), p[:, : length - 1]], 1) for k, p in prefix.items()}
    return prefix, after


def _roots(
    nodes: list[Node], roots: dict[int, Node], position: int, length: int, levels: int, empty: Node
) -> list[Node]:
    """Level by level, after each of `length` leaves."""
    if (position + length).bit_length() > levels:
        raise LevelError(f"{position + length} tokens have {(position + length).bit_length()} levels, not {levels}")
    found = []
    for k in range(levels):
        leaves = nodes[0]
        known = nodes[k] if k < len(nodes) else {name: x[:, :0] for name, x in leaves.items()}
        nothing = {n: empty[n].to(x.dtype).expand(x.shape[:1] + x.shape[2:]) for n, x in leaves.items()}
        before = roots.get(k, nothing)
        tokens = range(position + 1, position + length + 1)
        index = torch.tensor([(t >> k) - (position >> k) if t >> k & 1 else -1 for t in tokens], dtype=torch.int64)
        level = {}
        for name, x in known.items():
            at = index.to(x.device)
            rows = torch.cat([before[name].unsqueeze(1), x], 1).index_select(1, at.clamp(min=0))
            level[name] = torch.where((at >= 0).view(-1, *[1] * (rows.dim() - 2)), rows, empty[name].to(x.dtype))
        found.append(level)
    return found


def counter_levels(counter: Node, like: Node, levels: int, empty: Node) -> Node:
    """`<component>.root.<k>` of each stream, [B, ...], for k < levels: the root of 2^k tokens, or `empty`."""
    positions: list[int] = counter["position"].tolist()
    most = max(positions, default=0)
    if levels and most.bit_length() > levels:
        raise LevelError(f"{most} tokens have {most.bit_length()} levels, not {levels}")
    found: Node = {}
    for k in range(levels):
        rows = [b for b, p in enumerate(positions) if p >> k & 1]
        level = {n: empty[n].to(x.dtype).expand(x.shape[:1] + x.shape[2:]) for n, x in like.items()}
        level = _put(level, rows, _take(_slot(counter, like, "root", k), rows)) if rows else level
        found |= {f"{name}.root.{k}": x for name, x in level.items()}
    return found


def counter_start(batch: int) -> Node:
    """The counter of `batch` streams that have seen nothing."""
    return {"position": torch.zeros(batch, dtype=torch.int64)}


def counter_push(combine: Merge, counter: Node, leaf: Node) -> tuple[Node, Node]:
    """One token a stream, [B, ...]: (the prefix after it, the counter after it). Functional and differentiable.

    The streams may be at different positions; a combine is called once for each level that carries in some stream, on
    those streams alone, and once for the folds.
    """
    positions: list[int] = counter["position"].tolist()
    carries = [(~p & p + 1).bit_length() - 1 for p in positions]  # trailing ones
    root = leaf
    for k in range(max(carries, default=0)):
        rows = [b for b, c in enumerate(carries) if c > k]
        merged = combine(_take(_slot(counter, leaf, "root", k), rows), _take(root, rows))
        root = _put(root, rows, merged)
    above = [_lowest(p >> c << c) for p, c in zip(positions, carries, strict=True)]  # the next root, if any
    rows = [b for b, k in enumerate(above) if k is not None]
    fold = root
    if rows:
        levels = sorted({k for k in above if k is not None})
        left = root
        for k in levels:
            at = [b for b in rows if above[b] == k]
            left = _put(left, at, _take(_slot(counter, leaf, "fold", k), at))
        fold = _put(root, rows, combine(_take(left, rows), _take(root, rows)))
    after = {"position": counter["position"] + 1}
    for k in sorted({k for p in positions for k in _bits(p + 1)}):
        rows = [b for b, c in enumerate(carries) if c == k]
        for part, value in (("root", root), ("fold", fold)):
            old = _slot(counter, leaf, part, k) if f"{next(iter(leaf))}.{part}.{k}" in counter else _zeros(leaf)
            for name, x in _put(old, rows, _take(value, rows)).items():
                after[f"{name}.{part}.{k}"] = x
    return fold, after


def counter_prefix(counter: Node, like: Node, empty: Node | None = None) -> Node:
    """The prefix of each stream so far, [B, ...]; `empty` where nothing was seen. `like`: names, [B, T, ...] each."""
    positions: list[int] = counter["position"].tolist()
    if empty is None and not all(positions):
        raise ValueError("a stream that has seen nothing has no prefix: pass `empty`")
    found = {n: x.new_zeros(()) if empty is None else empty[n].to(x.dtype) for n, x in like.items()}
    prefix = {n: v.expand(x.shape[:1] + x.shape[2:]) for (n, x), v in zip(like.items(), found.values(), strict=True)}
    for k in sorted({k for k in map(_lowest, positions) if k is not None}):
        rows = [b for b, p in enumerate(positions) if _lowest(p) == k]
        prefix = _put(prefix, rows, _take(_slot(counter, like, "fold", k), rows))
    return prefix


def counter_rows(parts: list[tuple[Node, int]]) -> Node:
    """A counter of chosen streams: row `b` of counter `c` for each (c, b)."""
    position = torch.stack([c["position"].cpu()[b] for c, b in parts])  # some may have moved to a device
    bits = {k for p in position.tolist() for k in _bits(p)}
    found = {key: x[0] for c, _ in parts for key, x in c.items() if key != "position"}
    chosen = {"position": position}
    for key, x in sorted(found.items(), key=lambda item: item[0]):
        if int(key.rpartition(".")[2]) in bits:
            chosen[key] = torch.stack([c[key][b] if key in c else torch.zeros_like(x) for c, b in parts])
    return chosen


# --- one tree ----------------------------------------------------------------------------------


def _trees(combine: Merge, leaves: Node, roots: dict[int, Node], position: int) -> list[Node]:
    """Upwards: level k holds the trees of 2^k tokens that end after `position`, [B, count, ...]. The left half of one
    that straddles `position` is the counter's root of the level below."""
    nodes = [leaves]
    while True:
        k, below = len(nodes) - 1, nodes[-1]
        if position >> k & 1:
            below = {name: torch.cat([roots[k][name].unsqueeze(1), x], 1) for name, x in below.items()}
        pairs = next(iter(below.values())).shape[1] // 2
        if pairs == 0:
            return nodes
        halves = {name: torch.unflatten(x[:, : 2 * pairs], 1, (pairs, 2)).unbind(2) for name, x in below.items()}
        left, right = ({name: pair[side] for name, pair in halves.items()} for side in (0, 1))
        nodes.append(_level(combine, left, right))


def _prefixes(combine: Merge, nodes: list[Node], folds: dict[int, Node], position: int) -> Node:
    """Downwards: level k has the prefixes at all multiples of 2^k after `position`. The even ones are the level above;
    an odd one is the even one before it, or the counter's fold, combined with the tree between."""
    even = {name: x[:, :0] for name, x in nodes[0].items()}
    for k in reversed(range(len(nodes))):
        first = position >> k
        known = next(iter(even.values())).shape[1]
        trees = {name: x[:, first % 2 :: 2] for name, x in nodes[k].items()}
        count = next(iter(trees.values())).shape[1]
        if first % 2:
            odd = _level(combine, {name: x[:, :count] for name, x in even.items()}, trees) if count else trees
            even = {name: _alternate(even[name], odd[name]) for name in even}
            continue
        start = _lowest(first)
        if count == 0:
            odd = trees
        elif start is None:  # the first tree starts at token 0 and is its own prefix
            left, right = ({n: x[:, lo : lo + count - 1] for n, x in y.items()} for y, lo in ((even, 0), (trees, 1)))
            rest = [_level(combine, left, right)] if count > 1 else []
            odd = {name: torch.cat([x[:, :1], *(r[name] for r in rest)], 1) for name, x in trees.items()}
        else:
            fold = folds[k + start]
            left = {n: torch.cat([fold[n].unsqueeze(1), x[:, : count - 1]], 1) for n, x in even.items()}
            odd = _level(combine, left, trees)
        even = {name: _alternate(odd[name], even[name]) for name in even}
        assert next(iter(even.values())).shape[1] == known + count
    return even


def _counter_after(counter: Node, nodes: list[Node], prefix: Node, position: int) -> Node:
    """The counter at the end: roots and folds are among the trees and prefixes, or the old ones."""
    length = next(iter(prefix.values())).shape[1]
    end = position + length
    after = {"position": counter["position"] + length}
    for k in _bits(end):
        new_tree, new_fold = (end >> k) - (position >> k) - 1, (end >> k << k) - position - 1
        for name, x in prefix.items():
            for part, source, at in (("root", nodes, new_tree), ("fold", None, new_fold)):
                key = f"{name}.{part}.{k}"
                after[key] = counter[key] if at < 0 else (source[k][name] if source else x)[:, at]
    return after


def _level(combine: Merge, left: Node, right: Node) -> Node:
    """One combine for all pairs [B, count, ...] of a level, as one batch."""
    l, r = ({name: x.flatten(0, 1) for name, x in side.items()} for side in (left, right))  # noqa: E741
    return {name: x.expand(r[name].shape).reshape(right[name].shape) for name, x in combine(l, r).items()}


def _alternate(first: Tensor, second: Tensor) -> Tensor:
    """first 0, second 0, first 1, ... along axis 1; `first` may be one longer."""
    short = second.shape[1]
    both = torch.stack([first[:, :short], second], 2).flatten(1, 2)
    return both if first.shape[1] == short else torch.cat([both, first[:, short:]], 1)


# --- counters -----------------------------------------------------------------------------------


def _bits(position: int) -> list[int]:
    """The set bits."""
    return [k for k in range(position.bit_length()) if position >> k & 1]


def _lowest(position: int) -> int | None:
    """The lowest set bit."""
    return (position & -position).bit_length() - 1 if position else None


def _common_position(counter: Node) -> int:
    positions = set(counter["position"].tolist())
    if len(positions) > 1:
        raise ValueError(f"the streams are at different positions: {sorted(positions)}")
    return int(positions.pop()) if positions else 0


def _slot(counter: Node, names: Node, part: str, level: int) -> Node:
    return {name: counter[f"{name}.{part}.{level}"] for name in names}


def _zeros(node: Node) -> Node:
    return {k: torch.zeros_like(x) for k, x in node.items()}


def _take(node: Node, rows: list[int]) -> Node:
    """Some rows; all of them at no cost."""
    batch = next(iter(node.values())).shape[0]
    if len(rows) == batch:
        return node
    return {k: x.index_select(0, torch.tensor(rows, dtype=torch.int64).to(x.device)) for k, x in node.items()}


def _put(node: Node, rows: list[int], values: Node) -> Node:
    """`node` with some rows replaced, out of place."""
    batch = next(iter(node.values())).shape[0]
    if len(rows) == batch:
        return {k: values[k].expand(x.shape) for k, x in node.items()}
    if not rows:
        return node
    out = {}
    for k, x in node.items():
        value = values[k].expand(len(rows), *x.shape[1:])
        out[k] = x.index_copy(0, torch.tensor(rows, dtype=torch.int64).to(x.device), value)
    return out


# --- Many trees: the tree plan over sequences with masks, restarts and packing.


def tree_tokens(
    combine: Merge,
    leaves: Node,
    empty: Node,
    counter: Node | None = None,
    *,
    valid: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    previous: bool = False,
    recompute: bool = False,
    levels: int = 0,
) -> tuple[Node, Node | None, Node]:
    """(prefix, prefix before each token or None, counter) of sequences with masks, restarts and packing.

    valid [B, T] bool: a token that does not count is no leaf, the prefix stays as it is. reset [B, T] bool: a new tree
    starts with this token. cu_seqlens [N + 1]: N sequences in one row; the counters are theirs. Runs between restarts
    are found on the host (a sync, where the flags are on a device); those of one length and position share a scan.
    levels: beside each prefix, what the counter holds at so many levels, `<component>.root.<k>`, or `empty`.
    """
    batch, length = next(iter(leaves.values())).shape[:2]
    bounds = [b * length for b in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    count = len(bounds) - 1
    given = counter_start(count) if counter is None else counter
    positions: list[int] = [0] * count if counter is None else given["position"].tolist()
    if not batch or (valid is None and reset is None and cu_seqlens is None and len(set(positions)) == 1):
        prefix, after = tree_scan(combine, leaves, counter, empty=empty, recompute=recompute, levels=levels)
        first = {**empty, **_level_names(empty, levels)}
        if previous and counter is not None:
            first = counter_prefix(counter, leaves, empty) | counter_levels(counter, leaves, levels, empty)
        shifted = {k: torch.cat([_first(first[k], x), x], 1)[:, :length] for k, x in prefix.items()}
        return prefix, shifted if previous else None, after or given
    flags = [None if f is None else f.flatten().tolist() for f in (valid, reset)]
    runs = _runs(bounds, flags[0], flags[1])
    flat = {k: x.flatten(0, 1) for k, x in leaves.items()}
    device = next(iter(flat.values())).device
    # A table of every prefix there is: nothing, what each sequence went on from, then those of the runs.
    nothing = {k: empty[k].to(x.dtype).expand(1, *x.shape[1:]) for k, x in flat.items()}
    nothing |= _level_names(nothing, levels)
    like = {k: x.new_empty(count, 0, *x.shape[1:]) for k, x in flat.items()}
    begun = counter_prefix(given, like, empty) | counter_levels(given, like, levels, empty)
    table, size = [nothing, begun], 1 + count
    groups: dict[tuple[int, int], list[_Run]] = {}
    last = {run.sequence: run for run in runs}
    ends: dict[int, tuple[Node, int]] = {}
    for run in runs:
        position = positions[run.sequence] if run.continues else 0
        run.before = 1 + run.sequence if position else 0
        ends[run.sequence] = (given, run.sequence) if position else (counter_start(1), 0)
        if run.tokens:
            groups.setdefault((len(run.tokens), position), []).append(run)
    for (steps, position), members in groups.items():
        index = torch.tensor([run.tokens for run in members]).to(device)
        start = counter_rows([(given, run.sequence) for run in members]) if position else counter_start(len(members))
        rows = {k: x[index] for k, x in flat.items()}
        prefix, after = tree_scan(combine, rows, start, empty=empty, recompute=recompute, levels=levels)
        table.append({k: x.flatten(0, 1) for k, x in prefix.items()})
        for row, run in enumerate(members):
            run.first, size = size, size + steps
            if run is last[run.sequence]:
                ends[run.sequence] = (after or start, row)
    whole = {k: torch.cat([part[k] for part in table]) for k in nothing}
    outside = batch * length - sum(len(run.seen) for run in runs)

    def look(counts: list[list[int]]) -> Node:
        pairs = [(run, seen) for run, c in zip(runs, counts, strict=True) for seen in c]
        at = [run.before if seen == 0 else run.first + seen - 1 for run, seen in pairs] + [0] * outside
        places = torch.tensor(at, dtype=torch.int64).to(device)
        return {k: x[places].reshape(batch, length, *x.shape[1:]) for k, x in whole.items()}

    before = look([run.seen for run in runs]) if previous else None
    return look([run.after for run in runs]), before, counter_rows([ends[n] for n in range(count)])


def _level_names(empty: Node, levels: int) -> Node:
    """Nothing at any level."""
    return {f"{name}.root.{k}": x for k in range(levels) for name, x in empty.items()}


def _first(state: Tensor, like: Tensor) -> Tensor:
    """A state, or a constant [*dims], as the first of prefixes [B, T, ...]."""
    state = state.to(like.dtype).expand(like.shape[:1] + like.shape[2:])
    return state.unsqueeze(1)


class _Run:
    """Tokens between two restarts of a sequence: those that count; for every token, how many did before and with it."""

    def __init__(self, sequence: int, continues: bool) -> None:
        self.sequence = sequence
        self.continues = continues  # the sequence's first run goes on from its counter
        self.tokens: list[int] = []
        self.seen: list[int] = []
        self.after: list[int] = []
        self.before = self.first = 0  # where the prefix before the run, and the first one in it, are


def _runs(bounds: list[int], valid: list[bool] | None, reset: list[bool] | None) -> list[_Run]:
    """All runs, in the order of their tokens."""
    runs = []
    for n, (lo, hi) in enumerate(pairwise(bounds)):
        runs.append(_Run(n, continues=True))
        for t in range(lo, hi):
            if reset is not None and reset[t]:
                runs.append(_Run(n, continues=False))
            run = runs[-1]
            run.seen.append(len(run.tokens))
            if valid is None or valid[t]:
                run.tokens.append(t)
            run.after.append(len(run.tokens))
    return runs


# --- The border of a compiled aggregator: what was passed, checked against the spec, with the spec's own names.


class ArgumentError(ValueError):
    """A call that does not fit the spec; the message says what was expected and what came."""


class Fields:
    """Values by name as attributes, as the functions of a spec read them; torch.compile traces it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.__dict__.update(values)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)


@dataclass(frozen=True)
class Slot:
    """A declared tensor: an input is [B, T, *lanes, *dims], a param [*lanes, *dims] or [*dims], a state [B, *lanes,
    *dims]. `within`: (low, high, brackets), its interval; None: no bound."""

    name: str
    dims: tuple[str, ...] = ()
    kind: str = "real"
    within: tuple[float | None, float | None, str] | None = None


@dataclass(frozen=True)
class Spec:
    """A spec's border, as data. `taps`: how many tokens back an input is read; `previous`: the readout reads prev;
    `levels`: those of a tree's counter that the readout reads."""

    name: str
    digest: str
    inputs: tuple[Slot, ...]
    params: tuple[Slot, ...]
    components: tuple[Slot, ...]
    live: tuple[str, ...]
    outputs: tuple[Slot, ...]
    sizes: Mapping[str, int] = field(default_factory=dict)
    dims: tuple[str, ...] = ()
    taps: Mapping[str, int] = field(default_factory=dict)
    previous: bool = False
    levels: int = 0


@dataclass
class Call:
    """One checked call: tensors by name, dim sizes, [B, T] or [B], the lanes; `dtype` is the outputs', what the inputs
    promote to, `compute` that of the state and of all arithmetic."""

    inputs: dict[str, Tensor]
    params: dict[str, Tensor]
    sizes: dict[str, int]
    leading: tuple[int, ...]
    lanes: tuple[int, ...]
    dtype: torch.dtype
    compute: torch.dtype
    device: torch.device

    @property
    def n(self) -> Fields:
        """The sizes of the dims; and, under a name that no dim can have, how precise the inputs are."""
        return Fields({**self.sizes, "__dtype__": self.dtype})

    def of_kind(self, kind: str, dtype: torch.dtype | None = None) -> torch.dtype:
        """The torch dtype of an element kind; real ones are `dtype`, by default the state's."""
        real = dtype or self.compute
        return {"real": real, "complex": complex_of(real), "int": torch.int64, "bool": torch.bool}[kind]


_COMPLEX = {torch.float64: torch.complex128, torch.float32: torch.complex64}
_REAL = {torch.complex128: torch.float64, torch.complex64: torch.float32}
_ACCEPTED = {
    "real": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "complex": (torch.complex64, torch.complex128, torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "int": (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
}


def complex_of(real: torch.dtype) -> torch.dtype:
    return _COMPLEX.get(real, torch.complex64)


_SEEN: dict[Any, Call] = {}  # calls that passed the checks, by digest, tokens, then shape, dtype, device of each
_MOST = 1024
_NONE = torch.empty(0)
_PLAIN = (Tensor, torch.nn.Parameter)  # what traces has shapes that are no keys


def bind_call(spec: Spec, args: Sequence[Any], kwargs: Mapping[str, Any], tokens: bool) -> Call:
    """Checks names, ranks, sizes, dtypes and devices. `tokens`: inputs have a T axis. Raises ArgumentError."""
    if kwargs:
        rest = [s.name for s in (*spec.inputs, *spec.params)][len(args) :]
        if kwargs.keys() == set(rest):
            args, kwargs = (*args, *(kwargs[name] for name in rest)), {}
    if kwargs or torch.compiler.is_compiling() or not all(type(x) in _PLAIN for x in args):
        return _bind(spec, args, kwargs, tokens)
    key = (spec.digest, tokens, *((x.shape, x.dtype, x.device, x.layout) for x in args))
    like = _SEEN.get(key)
    if like is None:
        if len(_SEEN) >= _MOST:
            _SEEN.clear()
        like = _bind(spec, args, kwargs, tokens)
        _SEEN[key] = replace(like, inputs=dict.fromkeys(like.inputs, _NONE), params=dict.fromkeys(like.params, _NONE))
    count = len(spec.inputs)
    inputs = dict(zip(like.inputs, args, strict=False))
    params = dict(zip(like.params, args[count:], strict=False))
    return Call(inputs, params, like.sizes, like.leading, like.lanes, like.dtype, like.compute, like.device)


def _bind(spec: Spec, args: Sequence[Any], kwargs: Mapping[str, Any], tokens: bool) -> Call:
    given = _by_name(spec, args, kwargs)
    inputs, params = ({s.name: given[s.name] for s in part} for part in (spec.inputs, spec.params))
    lead = 2 if tokens else 1
    first = spec.inputs[0]
    rank = _lane_axes(spec, given, lead)
    leading, device = tuple(given[first.name].shape[:lead]), given[first.name].device
    sizes = dict(spec.sizes)
    owner = dict.fromkeys(sizes, "the spec")
    lanes = [1] * rank
    for slot in (*spec.inputs, *spec.params):
        x = given[slot.name]
        front = lead if slot.name in inputs else 0
        shape = x.shape
        end = len(shape) - len(slot.dims)
        if front and tuple(shape[:front]) != leading:
            hint = tokens and end > 2 and shape[0] == leading[0] and _heads_first(shape, given[first.name].shape)
            _refuse(spec, slot, x, lead, f"its leading sizes are not those of '{first.name}', {list(leading)}", hint)
        if x.device != device:
            raise ArgumentError(f"PSM602: {spec.name}: '{slot.name}' is on {x.device}, '{first.name}' on {device}.")
        if x.dtype not in _ACCEPTED[slot.kind]:
            names = ", ".join(str(t).removeprefix("torch.") for t in _ACCEPTED[slot.kind])
            raise ArgumentError(
                f"PSM602: {spec.name}: '{slot.name}' is {x.dtype}, but it is a tensor of {slot.kind} numbers: {names}."
            )
        for dim, size in zip(slot.dims, shape[end:], strict=True):
            if sizes.setdefault(dim, size) != size:
                _refuse(spec, slot, x, lead, f"{dim} is {size} here, but {sizes[dim]} in {owner[dim]}")
            if not size:
                _refuse(spec, slot, x, lead, f"{dim} is 0, but a dim has at least one position")
            owner.setdefault(dim, f"'{slot.name}'")
        for axis, size in enumerate(shape[front:end]):
            lanes[axis] = size if lanes[axis] == 1 else max(lanes[axis], size) if size else 0
    _check_lanes(spec, given, lead, lanes)
    missing = [d for d in spec.dims if d not in sizes]
    if missing:
        raise ArgumentError(f"PSM603: {spec.name}: no argument tells the size of {', '.join(missing)}.")
    dtype = _promoted(inputs.values()) or _promoted(params.values()) or torch.get_default_dtype()
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return Call(inputs, params, sizes, leading, tuple(lanes), dtype, compute, device)


def _promoted(tensors: Iterable[Tensor]) -> torch.dtype | None:
    """The real dtype that holds all but the ints."""
    dtype: torch.dtype | None = None
    for x in tensors:
        if x.is_floating_point() or x.is_complex():
            real = _REAL.get(x.dtype, x.dtype)
            dtype = real if dtype is None or dtype == real else torch.promote_types(dtype, real)
    return dtype


def _by_name(spec: Spec, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    names = [s.name for s in (*spec.inputs, *spec.params)]
    usage = f"{spec.name}({', '.join(names)})"
    if len(args) > len(names):
        raise ArgumentError(f"PSM601: {usage} takes {len(names)} tensors, but {len(args)} were passed.")
    given = dict(zip(names, args, strict=False))
    for name, value in kwargs.items():
        if name not in names:
            raise ArgumentError(f"PSM601: {usage} has no argument '{name}'.")
        if name in given:
            raise ArgumentError(f"PSM601: {usage}: '{name}' was passed twice.")
        given[name] = value
    absent = [n for n in names if n not in given]
    if absent:
        raise ArgumentError(f"PSM601: {usage}: {', '.join(absent)} missing.")
    for name in names:
        if not isinstance(given[name], Tensor):
            raise ArgumentError(f"PSM601: {usage}: '{name}' must be a tensor, not {type(given[name]).__name__}.")
        if given[name].layout is not torch.strided:
            raise ArgumentError(f"PSM602: {spec.name}: '{name}' must be a dense tensor, not {given[name].layout}.")
    return given


def _lane_axes(spec: Spec, given: Mapping[str, Tensor], lead: int) -> int:
    """How many lane axes the inputs have: all the same number. A param has as many, or none."""
    first = spec.inputs[0]
    rank = max(0, given[first.name].dim() - lead - len(first.dims))
    for slot in (*spec.inputs, *spec.params):
        x = given[slot.name]
        is_param = slot in spec.params
        axes = x.dim() - len(slot.dims) - (0 if is_param else lead)
        if axes != rank and not (is_param and axes == 0):
            why = f"it has {_axes(x.dim())}" if axes < 0 else f"it has {_axes(axes, 'lane ')}"
            _refuse(spec, slot, x, lead, why + ("" if slot is first else f", while '{first.name}' has {rank}"))
    return rank


def _heads_first(shape: Sequence[int], first: Sequence[int]) -> bool:
    """Whether [B, T, ...] reads as if heads were put before time, here or in both, here in groups."""
    return shape[2] == first[1] or (shape[2:3] == first[2:3] and shape[1] > 0 and first[1] % shape[1] == 0)


def _axes(count: int, kind: str = "") -> str:
    return f"{count} {kind}{'axis' if count == 1 else 'axes'}"


def _check_lanes(spec: Spec, given: Mapping[str, Tensor], lead: int, lanes: list[int]) -> None:
    slots = (*spec.inputs, *spec.params)

    def front(slot: Slot) -> tuple[int, ...]:
        x = given[slot.name]
        return tuple(x.shape[0 if slot in spec.params else lead : x.dim() - len(slot.dims)])

    for slot in slots:
        x = given[slot.name]
        for axis, (size, whole) in enumerate(zip(front(slot), lanes, strict=False)):
            last = axis == len(lanes) - 1
            if size not in (1, whole) and not (last and size and whole % size == 0):
                why = "does not divide" if last else "is neither 1 nor"
                owner = next(s.name for s in slots if front(s)[axis : axis + 1] == (whole,))
                _refuse(spec, slot, x, lead, f"its lane axis of {size} {why} {whole}, that of '{owner}'", lead == 2)


def _refuse(spec: Spec, slot: Slot, x: Tensor, lead: int, why: str, hint: bool = False) -> NoReturn:
    """A shape that does not fit. `hint`: heads may have been put before time."""
    front = () if slot in spec.params else ("B", "T")[:lead]
    want = ", ".join((*front, "*lanes", *slot.dims))
    swapped = hint and slot in spec.inputs and x.dim() - len(slot.dims) > 2
    raise ArgumentError(
        f"PSM602: {spec.name}: '{slot.name}' must be [{want}], but it is {list(x.shape)}: {why}."
        + (f" Did you pass [{', '.join(('B', 'H', 'T', *slot.dims))}]? Time comes before the lanes." if swapped else "")
    )


def check_sizes(spec: Spec, batch: Any, lanes: Sequence[Any], dims: Mapping[str, Any], dtype: Any) -> None:
    """What `init_state` makes tensors of: batch and lanes from 0 on, every dim from 1 on, a float dtype."""
    where = f"PSM603: {spec.name}"
    stray = sorted(dims.keys() - set(spec.dims))
    if stray:
        raise ArgumentError(f"{where} has no dim {', '.join(stray)}; it has {', '.join(spec.dims) or 'none'}.")
    read = (*spec.components, *(s for s in spec.inputs if s.name in spec.taps))
    missing = sorted({d for s in read for d in s.dims} - dims.keys())
    if missing:
        raise ArgumentError(f"{where}: init_state needs the size of {', '.join(missing)}.")
    counts = ("batch", batch, 0), *(("lanes", n, 0) for n in lanes), *((k, n, 1) for k, n in dims.items())
    for name, size, least in counts:
        if not hasattr(size, "__index__") or size < least:
            raise ArgumentError(f"{where}: init_state: {name} is a whole number from {least} on, not {size!r}.")
    for name, size in spec.sizes.items():
        if dims[name] != size:
            raise ArgumentError(f"{where}: init_state: {name} is {size} in the spec, not {dims[name]!r}.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ArgumentError(f"{where}: init_state: dtype is a float dtype of torch, not {dtype!r}.")


def spread(x: Tensor, axis: int, lanes: tuple[int, ...]) -> Tensor:
    """Grouped lanes made whole: on the last lane axis (the one before `axis` from the left) the shorter repeats."""
    if not lanes or axis < 1:
        return x
    at = axis - 1
    size, whole = x.shape[at], lanes[-1]
    if size in (1, whole):
        return x
    return x.unsqueeze(at + 1).expand(*x.shape[: at + 1], whole // size, *x.shape[at + 1 :]).flatten(at, at + 1)


# --- The border, continued: states, flags and packing.


def check_flags(spec: Spec, name: str, flags: Any, call: Call) -> Tensor | None:
    """mask and reset: [B, T] of bools or ints, as bool."""
    if flags is None:
        return None
    where = f"PSM604: {spec.name}: '{name}'"
    if not isinstance(flags, Tensor):
        raise ArgumentError(f"{where} must be a tensor [B, T], not {type(flags).__name__}.")
    if tuple(flags.shape) != call.leading:
        raise ArgumentError(f"{where} must be [B, T] = {list(call.leading)}, but it is {list(flags.shape)}.")
    if flags.device != call.device:
        raise ArgumentError(f"{where} is on {flags.device}, the inputs on {call.device}.")
    if flags.is_floating_point() or flags.is_complex():
        raise ArgumentError(f"{where} is {flags.dtype}; pass bools (True: the token counts, or restarts).")
    return flags if flags.dtype == torch.bool else flags != 0


def check_cu_seqlens(spec: Spec, cu_seqlens: Any, call: Call) -> Tensor | None:
    """N + 1 ascending token offsets on the inputs' device; B must be 1. On a GPU their values are not read (a sync)."""
    if cu_seqlens is None:
        return None
    where = f"PSM606: {spec.name}: 'cu_seqlens'"
    batch, length = call.leading
    if not isinstance(cu_seqlens, Tensor):
        raise ArgumentError(f"{where} must be a tensor of N + 1 offsets, not {type(cu_seqlens).__name__}.")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ArgumentError(
            f"{where} must be N + 1 offsets, int32 or int64, but it is {list(cu_seqlens.shape)}, {cu_seqlens.dtype}."
        )
    if batch != 1:
        raise ArgumentError(f"{where} packs the sequences in a batch of 1, but B is {batch}.")
    if cu_seqlens.device != call.device:
        raise ArgumentError(f"{where} is on {cu_seqlens.device}, the inputs on {call.device}.")
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        offsets = cu_seqlens.tolist()
        if offsets[0] != 0 or offsets[-1] != length or sorted(offsets) != offsets:
            raise ArgumentError(f"{where} must rise from 0 to T = {length}, but it is {offsets}.")
    return cu_seqlens


def check_slots(spec: Spec, slots: Any, call: Call, state: Any) -> int:
    """How many rows a state has that `step_` changes; `slots` [B]: the rows, different ones (not checked: a sync)."""
    if not isinstance(state, Mapping):
        raise ArgumentError(f"PSM605: {spec.name}: step_ changes a state: pass what init_state or a call returned.")
    if slots is None:
        return call.leading[0]
    if not isinstance(slots, Tensor) or slots.dtype != torch.int64 or tuple(slots.shape) != call.leading:
        given = f"{slots.dtype}, {list(slots.shape)}" if isinstance(slots, Tensor) else type(slots).__name__
        raise ArgumentError(
            f"PSM605: {spec.name}: 'slots' must be an int64 tensor [B] = {list(call.leading)}, not {given}."
        )
    if slots.device != call.device:
        raise ArgumentError(f"PSM605: {spec.name}: 'slots' is on {slots.device}, the inputs on {call.device}.")
    rows = [x for x in state.values() if isinstance(x, Tensor) and x.dim()]
    return rows[0].shape[0] if rows else 0


def check_state(spec: Spec, call: Call, state: Any, rows: int) -> dict[str, Tensor] | None:
    """An initial state: exactly the live components and the tails, [rows, *lanes, *dims], in the state's dtypes."""
    if state is None:
        return None
    slots = {s.name: s for s in spec.components if s.name in spec.live}
    _check_names(spec, state, [*slots, *tail_names(spec)])
    parts = {k: _component(spec, call, k, state[k], slot, rows) for k, slot in slots.items()}
    return {**parts, **_tails(spec, call, state, rows)}


def check_counter(spec: Spec, call: Call, state: Any, rows: int) -> dict[str, Tensor] | None:
    """The state of a tree: `position` [rows], and for each set bit k of one the roots and folds of that level."""
    if state is None:
        return None
    position = state.get("position") if isinstance(state, Mapping) else None
    if not isinstance(position, Tensor) or position.dtype != torch.int64 or tuple(position.shape) != (rows,):
        raise ArgumentError(
            f"PSM605: {spec.name}: the state of a tree has 'position', an int64 tensor [{rows}]; "
            "pass what init_state, a call or a step returned."
        )
    bits = sorted({k for p in position.tolist() for k in range(p.bit_length()) if p >> k & 1})
    keys = {f"{s.name}.{part}.{k}": s for s in spec.components for part in ("root", "fold") for k in bits}
    _check_names(spec, state, ["position", *keys, *tail_names(spec)])
    parts = {k: _component(spec, call, k, state[k], slot, rows) for k, slot in keys.items()}
    return {"position": position, **parts, **_tails(spec, call, state, rows)}


def tail_names(spec: Spec) -> list[str]:
    """Keys of a state that hold the last tokens of an input."""
    return [f"{name}_tail" for name in spec.taps]


def _check_names(spec: Spec, state: Any, wanted: list[str]) -> None:
    if not isinstance(state, Mapping):
        raise ArgumentError(f"PSM605: {spec.name}: a state is a dict of tensors, not {type(state).__name__}.")
    if set(state) != set(wanted):
        passed = ", ".join(map(str, state)) or "nothing"
        raise ArgumentError(f"PSM605: {spec.name}: a state holds {', '.join(wanted)}, but {passed} was passed.")


def _component(spec: Spec, call: Call, key: str, x: Any, slot: Slot, rows: int) -> Tensor:
    if not isinstance(x, Tensor):
        _refuse_state(spec, key, f"must be a tensor, not {type(x).__name__}")
    want = (rows, *call.lanes, *(call.sizes[d] for d in slot.dims))
    if tuple(x.shape) != want:
        shape = ", ".join(("rows", "*lanes", *slot.dims))
        tokens = len(call.leading) == 1 and call.lanes and tuple(x.shape) == (rows, *want[2:])
        hint = ". A step takes one token, without T: did you pass [B, T, ...]?" if tokens else ""
        _refuse_state(spec, key, f"must be [{shape}] = {list(want)}, but it is {list(x.shape)}", hint)
    return _placed(spec, call, key, x, call.of_kind(slot.kind))


def _tails(spec: Spec, call: Call, state: Mapping[str, Any], rows: int) -> dict[str, Tensor]:
    """The last tokens of tapped inputs, [rows, W, *lanes, *dims], in the inputs' dtypes."""
    out = {}
    inputs = {s.name: s for s in spec.inputs}
    for source, longest in spec.taps.items():
        key, slot = f"{source}_tail", inputs[source]
        x = state[key]
        if not isinstance(x, Tensor):
            _refuse_state(spec, key, f"must be a tensor, not {type(x).__name__}")
        want = (rows, longest, *call.lanes, *(call.sizes[d] for d in slot.dims))
        if tuple(x.shape) != want:
            shape = ", ".join(("rows", str(longest), "*lanes", *slot.dims))
            _refuse_state(spec, key, f"must be [{shape}] = {list(want)}, but it is {list(x.shape)}")
        out[key] = _placed(spec, call, key, x, call.inputs[source].dtype)
    return out


def _placed(spec: Spec, call: Call, key: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.device != call.device:
        _refuse_state(spec, key, f"is on {x.device}, the inputs on {call.device}")
    rank = (x.is_complex(), x.is_floating_point())
    if rank > (dtype.is_complex, dtype.is_floating_point):
        _refuse_state(spec, key, f"is {x.dtype}, but it holds {dtype}")
    return x.to(dtype)


def _refuse_state(spec: Spec, key: str, why: str, hint: str = "") -> NoReturn:
    raise ArgumentError(f"PSM605: {spec.name}: state '{key}' {why}{hint or '.'}")


# --- What the border sees only by reading tensors: values, checked where `checks` or PSMC_CHECK=1 asks for it.


def checks_wanted() -> bool:
    """Whether aggregators check values from their start."""
    return os.environ.get("PSMC_CHECK", "") not in ("", "0")


def check_values(spec: Spec, call: Call, mask: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Inputs and params are finite and in their intervals, masked tokens apart; offsets rise from 0 to T."""
    for slot in spec.inputs:
        _check(spec, slot, slot.name, call.inputs[slot.name], counts=mask)
    for slot in spec.params:
        _check(spec, slot, slot.name, call.params[slot.name])
    if cu_seqlens is not None:
        offsets, length = cu_seqlens.tolist(), call.leading[1]
        if offsets[0] != 0 or offsets[-1] != length or sorted(offsets) != offsets:
            raise ArgumentError(f"PSM606: {spec.name}: 'cu_seqlens' must rise from 0 to T = {length}, not {offsets}.")


def check_state_values(spec: Spec, state: Mapping[str, Tensor] | None, start: Mapping[str, Tensor]) -> None:
    """A state's values are numbers, and in their intervals or what a sequence starts from."""
    slots = {s.name: s for s in spec.components}
    for name, x in (state or {}).items():
        slot = slots.get(name, Slot(name))
        _check(spec, slot, f"state '{name}'", x, free=start.get(name), finite=False)


def check_slot_values(spec: Spec, slots: Tensor | None, rows: int) -> None:
    """Rows of the state, different ones."""
    chosen = [] if slots is None else slots.tolist()
    for at, row in enumerate(chosen):
        if not 0 <= row < rows:
            raise ArgumentError(f"PSM608: {spec.name}: slots[{at}] is {row}, but the state has {rows} rows.")
        if row in chosen[:at]:
            raise ArgumentError(f"PSM608: {spec.name}: slots[{at}] is {row}, as slots[{chosen.index(row)}] is.")


def check_results(spec: Spec, outputs: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> None:
    """No output and no state is NaN."""
    for name, x in outputs.items():
        _check(spec, Slot(name), f"output '{name}'", x, finite=False)
    for name, x in state.items():
        _check(spec, Slot(name), f"final state '{name}'", x, finite=False)


def _check(
    spec: Spec, slot: Slot, name: str, x: Tensor, *, counts: Tensor | None = None, free: Tensor | None = None,
    finite: bool = True,
) -> None:  # fmt: skip
    """`counts` [B, T]: which tokens do; `free`: values that are allowed wherever the interval is."""
    x = x.detach()
    bad = ~torch.isfinite(x) if finite else torch.isnan(x)
    if slot.within is not None and not x.is_complex():
        low, high, ends = slot.within
        value, outside = x.double(), torch.zeros_like(bad)
        if low is not None:
            outside |= value <= low if ends[0] == "(" else value < low
        if high is not None:
            outside |= value >= high if ends[1] == ")" else value > high
        bad |= outside if free is None else outside & (x != free)
    if counts is not None:
        bad &= counts.reshape(*counts.shape, *[1] * (x.dim() - 2))
    if not bool(bad.any()):
        return
    at = bad.nonzero()[0].tolist()
    found = x[tuple(at)].item()
    quoted = name if "'" in name else f"'{name}'"
    where = f"PSM608: {spec.name}: {quoted}{at if at else ''} is {found}"
    if slot.within is not None and found == found and abs(found) != torch.inf:
        low, high, ends = slot.within
        bounds = f"{'-inf' if low is None else f'{low:g}'}, {'inf' if high is None else f'{high:g}'}"
        raise ArgumentError(f"{where}, outside of its interval {ends[0]}{bounds}{ends[1]}.")
    raise ArgumentError(f"{where}{'' if found != found else ', but it must be finite'}.")


# --- Inputs read some tokens earlier, and time run backwards: index arithmetic on whole sequences, no loop over T.

Tails = dict[str, Tensor]


def tap_tokens(
    spec: Spec,
    call: Call,
    state: Tails | None,
    mask: Tensor | None,
    reset: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[dict[str, Tensor], Tails]:
    """Inputs read some tokens earlier, as inputs `name_lagK` over all lanes; and the tails after the last token."""
    return {}, {}


def tap_token(spec: Spec, call: Call, state: Tails | None) -> tuple[dict[str, Tensor], Tails]:
    """The same for one token."""
    return {}, {}


class Places(NamedTuple):
    """Where each token stands: the `row` of its sequence, `at` which place in it, `since` how far after the last reset
    (its place, if there was none), whether it is after one (`restarted`), [B, T] each; `begin`, `end` [rows]."""

    row: Tensor
    at: Tensor
    since: Tensor
    begin: Tensor
    end: Tensor
    restarted: Tensor


def places(call: Call, cu_seqlens: Tensor | None, reset: Tensor | None) -> Places:
    """Token places of a dense batch, or of N packed sequences in one row."""
    (batch, length), device = call.leading, call.device
    token = torch.arange(length, device=device).expand(batch, length)
    if cu_seqlens is None:
        row = torch.arange(batch, device=device)[:, None].expand(batch, length)
        begin = torch.zeros(batch, dtype=torch.int64, device=device)
        end = begin + length
        at = token
    else:
        bounds = cu_seqlens.long()
        row = (torch.searchsorted(bounds, token.contiguous(), right=True) - 1).clamp(0, bounds.shape[0] - 2)
        begin, end = bounds[:-1], bounds[1:]
        at = token - begin[row]
    if reset is None:
        return Places(row, at, at, begin, end, torch.zeros(batch, length, dtype=torch.bool, device=device))
    last = torch.where(reset, token, -1).cummax(1).values if length else token
    restarted = last >= token - at
    return Places(row, at, torch.where(restarted, token - last, at), begin, end, restarted)


def flip(x: Tensor, where: Places | None) -> Tensor:
    """Time reversed within each sequence; `where` None: each row is one sequence."""
    if where is None:
        return x.flip(1)
    mirror = where.begin[where.row] + where.end[where.row] - 1 - torch.arange(x.shape[1], device=x.device)
    return x[:, mirror[0].clamp(0, max(x.shape[1] - 1, 0))]


# --- One checked call in PyTorch: lift, the scan of the plan, readout. Differentiable by autograd.

Rules = SimpleNamespace  # the functions of the spec: lift, combine, advance, output, identity, (start), (recurrence)


def as_state(value: Tensor, slot: Slot, call: Call, leading: tuple[int, ...]) -> Tensor:
    """A component in full, [*leading, *lanes, *dims], in its dtype: rules return what they read of the leading axes."""
    rank = len(slot.dims)
    dims = value.shape[value.dim() - rank :]
    return value.to(call.of_kind(slot.kind)).expand((*leading, *call.lanes, *dims))


def prepared(spec: Spec, call: Call, lags: Values, lazily: bool = False) -> tuple[Any, Values]:
    """Inputs and params in the dtypes of computation, grouped lanes made whole; `lags`: the taps, `name_lagK`.

    `lazily`: an input is converted when it is first read.
    """
    raw = [(s.name, s, call.inputs[s.name]) for s in spec.inputs]
    for s in spec.inputs:
        raw += [(f"{s.name}_lag{k}", s, lags[f"{s.name}_lag{k}"]) for k in range(1, spec.taps.get(s.name, 0) + 1)]
    params = {s.name: _prepared(s, call.params[s.name], call) for s in spec.params}
    return {name: _prepared(slot, value, call) for name, slot, value in raw}, params


def _prepared(slot: Slot, value: Tensor, call: Call) -> Tensor:
    return spread(value.to(call.of_kind(slot.kind)), value.dim() - len(slot.dims), call.lanes)


def start_state(spec: Spec, rules: Rules, call: Call, names: tuple[str, ...]) -> Values:
    """Where a sequence starts, [*dims] each."""
    begin = getattr(rules, "start", rules.identity)
    found: Values = begin(call.n, torch.empty((), dtype=call.compute, device=call.device))
    kinds = {s.name: s.kind for s in spec.components}
    return {k: found[k].to(call.of_kind(kinds[k])) for k in names}


def transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp) transforms this call. Then it is plain PyTorch: kernels, and gradients that
    are written by hand, know nothing of it."""
    return bool(torch._C._are_functorch_transforms_active())


def in_full_precision(run: Callable[..., tuple[Values, Values]]) -> Callable[..., tuple[Values, Values]]:
    """A run without autocast: what surrounds a call does not change its arithmetic (a rule from Python may want it)."""

    @wraps(run)
    def wrapped(spec: Spec, rules: Rules, call: Call, *args: Any, **kwargs: Any) -> tuple[Values, Values]:
        kind = call.device.type
        if hasattr(rules, "extern") or kind == "meta" or not torch.is_autocast_enabled(kind):
            return run(spec, rules, call, *args, **kwargs)
        with torch.autocast(kind, enabled=False):
            return run(spec, rules, call, *args, **kwargs)

    return wrapped


@in_full_precision
def run_scan(
    spec: Spec, rules: Rules, call: Call, fold: str, x: Values, p: Values, initial: Values | None,
    mask: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None, whole: bool = False,
) -> tuple[Values, Values]:  # fmt: skip
    """Outputs [B, T, *lanes, *dims] by name, and the final state. `whole`: no readout, all components of the state.

    x: inputs (taps as `name_lagK`) and p: params, as `prepared` returns them. `fold`: 'scan', 'left' or 'tree'.
    """
    params, n = Fields(p), call.n
    slots = {s.name: s for s in spec.components}
    live = tuple(slots) if whole or fold == "tree" else spec.live

    def lift(tokens: Values) -> Values:
        leading = next(iter(tokens.values())).shape[:2]
        element = rules.lift(Fields(tokens), params, n)
        return {k: as_state(v, slots[k], call, leading) for k, v in element.items()}

    def combine(l: Values, r: Values) -> Values:  # noqa: E741
        joined: Values = rules.combine(Fields(l), Fields(r), params, n)
        return {k: v.to(l[k].dtype) for k, v in joined.items()}

    def advance(l: Values, r: Values) -> Values:  # noqa: E741
        rule = rules.combine if whole else rules.advance
        moved: Values = rule(Fields(l), Fields(r), params, n)
        return {k: v.to(l[k].dtype) for k, v in moved.items() if k in l}

    def recur(state: Values, tokens: Values) -> Values:
        moved: Values = rules.recurrence(Fields(state), Fields(tokens), params, n)
        leading = next(iter(tokens.values())).shape[:1]
        return {k: as_state(moved[k], slots[k], call, leading) for k in state}

    def output(prefix: Values, previous: Values | None, tokens: Values) -> Values:
        before = Fields(previous) if previous is not None else None
        levels = []
        found = rules.output(Fields(prefix), before, Fields(tokens), params, n, *levels)
        return {s.name: as_output(found[s.name], s, call, next(iter(prefix.values())).shape[:2]) for s in spec.outputs}

    empty = start_state(spec, rules, call, live)
    sequences = hasattr(rules, "recurrence")
    rows = call.leading[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    restart = None
    if hasattr(rules, "start") and fold == "scan":
        restart = {k: as_state(v, slots[k], call, (1,)) for k, v in empty.items()}
    if fold == "tree":
        x = fill_masked(x, mask)
        try:
            prefix, before, counter = tree_tokens(
                combine, lift(x), empty, initial, valid=mask, reset=reset, cu_seqlens=cu_seqlens,
                previous=spec.previous and not whole, levels=0 if whole else spec.levels,
            )  # fmt: skip
        except LevelError as error:
            raise ArgumentError(f"PSM609: {spec.name}: {error}.") from None
        if whole:
            return {}, counter
        outputs = output(fill_masked(prefix, mask), before and fill_masked(before, mask), x)
        if mask is not None:
            outputs = {k: torch.where(_flag(mask, v), v, 0) for k, v in outputs.items()}
        return outputs, counter
    final: Values
    outputs, final = scan_tokens(
        lift, combine, advance,
        None if whole else output, x, empty, initial, restart=restart, valid=mask, reset=reset, cu_seqlens=cu_seqlens,
        previous=spec.previous and not whole, left=fold == "left",
    )  # fmt: skip
    final = {k: as_state(v, slots[k], call, (rows,)) for k, v in final.items()}
    return outputs, final or {k: as_state(v, slots[k], call, (rows,)) for k, v in empty.items()}


def as_output(value: Tensor, slot: Slot, call: Call, leading: tuple[int, ...]) -> Tensor:
    """An output in full and in the dtype that the inputs promote to."""
    rank = len(slot.dims)
    dims = value.shape[value.dim() - rank :]
    kind = "complex" if value.is_complex() else slot.kind
    return value.to(call.of_kind(kind, call.dtype)).expand((*leading, *call.lanes, *dims))


@in_full_precision
def run_step(spec: Spec, rules: Rules, call: Call, state: Values, x: Values, p: Values) -> tuple[Values, Values]:
    """One token for every row: (outputs [B, *lanes, *dims], the state after it); not of a tree."""
    params, n = Fields(p), call.n
    slots = {s.name: s for s in spec.components}
    tokens, before = Fields(x), Fields(state)
    moved = rules.advance(before, Fields(rules.lift(tokens, params, n)), params, n)
    after = {k: as_state(moved[k], slots[k], call, call.leading) for k in spec.live}
    found = rules.output(Fields(after), None, tokens, params, n)
    return {s.name: as_output(found[s.name], s, call, call.leading) for s in spec.outputs}, after


def _held_levels(spec: Spec, prefix: Values | None) -> Fields | None:
    """What a counter holds, [.., *lanes, levels, *dims], from a tensor a level."""
    if prefix is None:
        return None
    found = {}
    for slot in spec.components:
        parts = [prefix[f"{slot.name}.root.{k}"] for k in range(spec.levels)]
        found[slot.name] = torch.stack(parts, parts[0].dim() - len(slot.dims))
    return Fields(found)


@in_full_precision
def run_push(spec: Spec, rules: Rules, call: Call, state: Values, x: Values, p: Values) -> tuple[Values, Values]:
    """One token of a tree: (outputs, the counter after it)."""
    params, n, tokens = Fields(p), call.n, Fields(x)
    slots = {s.name: s for s in spec.components}

    def combine(l: Values, r: Values) -> Values:  # noqa: E741
        joined: Values = rules.combine(Fields(l), Fields(r), params, n)
        return {k: v.to(l[k].dtype) for k, v in joined.items()}

    element = rules.lift(tokens, params, n)
    leaf = {k: as_state(v, slots[k], call, call.leading) for k, v in element.items()}
    prefix, after = counter_push(combine, state, leaf)
    before, levels = None, []
    like = {k: v.unsqueeze(1) for k, v in leaf.items()}
    try:
        for c in ():
            levels.append(_held_levels(spec, counter_levels(c, like, spec.levels, empty)))
    except LevelError as error:
        raise ArgumentError(f"PSM609: {spec.name}: {error}.") from None
    found = rules.output(Fields(prefix), before, tokens, params, n, *levels)
    return {s.name: as_output(found[s.name], s, call, call.leading) for s in spec.outputs}, after


# --- The scan as an operator of torch: one graph node for torch.compile, with its own backward.

_FORWARD = (
    "(Tensor[] inputs, Tensor[] params, Tensor[] initial, Tensor? mask, Tensor? reset, Tensor? cu_seqlens, bool save)"
    " -> Tensor[]"
)
_BACKWARD = (
    "(Tensor[] grads, Tensor[] inputs, Tensor[] params, Tensor[] initial, Tensor? mask, Tensor? reset,"
    " Tensor? cu_seqlens, Tensor[] results) -> Tensor[]"
)


class Given(NamedTuple):
    """The tensors of a call as the operator takes them; `inputs` end with the taps, `initial` may be empty."""

    inputs: list[Tensor]
    params: list[Tensor]
    initial: list[Tensor]
    mask: Tensor | None
    reset: Tensor | None
    cu_seqlens: Tensor | None


class Operator:
    """psmc::<name>_<digest> and its backward, registered once per process whoever imports the module how often.

    results: the outputs, then the live components of the final state, then what the kernels save for backward.
    """

    def __init__(self, spec: Spec, rules: Rules, fold: str, kernels: Any) -> None:
        self.spec, self.rules, self.fold, self.kernels = spec, rules, fold, kernels
        self.extras = tuple((s, lag) for s in spec.inputs for lag in range(1, spec.taps.get(s.name, 0) + 1))
        self.live = () if fold == "tree" else tuple(s for s in spec.components if s.name in spec.live)
        self.quick = None if kernels is None or self.extras or fold == "tree" else kernels.steps(len(spec.inputs))
        name = f"{spec.name}_{spec.digest}"
        if not hasattr(torch.ops.psmc, name):
            self._register(name)
        self.op = getattr(torch.ops.psmc, name).default

    def wanted(self, call: Call, carries: bool, cut: bool) -> bool:
        """Kernels where there are some for this device and dtype, one node of a compiled graph; else plain autograd.

        `carries`: a state goes in or out; that of a tree is not of one shape, and such calls are traced. `cut`: tokens
        are masked, packed or begin anew, which the kernels of a tree do not do.
        """
        tree = self.fold == "tree"
        kernels = self._kernels(call) and not (tree and (carries or cut))
        return kernels or (torch.compiler.is_compiling() and not (tree and carries))

    def _kernels(self, call: Call, given: Given | None = None) -> bool:
        """`given`: of this very call, where flags matter."""
        if given is not None and self.fold == "tree" and any(x is not None for x in given[3:]):
            return False
        if self.kernels is None or call.compute != torch.float32 or transformed():
            return False
        return bool(call.device.type == "cuda" or self.kernels.interpreted)

    def __call__(
        self, call: Call, extra: Values, initial: Values | None, mask: Tensor | None, reset: Tensor | None,
        cu_seqlens: Tensor | None,
    ) -> tuple[Values, Values]:  # fmt: skip
        """As `run_scan`; `extra` holds the taps as `name_lagK`."""
        inputs = [*call.inputs.values(), *(extra[f"{s.name}_lag{lag}"] for s, lag in self.extras)]
        params = list(call.params.values())
        begin = [] if initial is None else [initial[s.name] for s in self.live]
        save = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *params, *begin))
        if torch.compiler.is_compiling():
            results = self.op(inputs, params, begin, mask, reset, cu_seqlens, save)
        else:  # the same without the dispatcher, whose first call imports half of torch
            given = Given(inputs, params, begin, mask, reset, cu_seqlens)
            apply: Any = Eager.apply
            results = apply(self, given, *inputs, *params, *begin) if save else self._launch(given, False)
        outputs = {s.name: x for s, x in zip(self.spec.outputs, results, strict=False)}
        return outputs, {s.name: x for s, x in zip(self.live, results[len(outputs) :], strict=False)}

    def steps(self, call: Call, state: Values | None) -> bool:
        """Whether the step kernel takes this token: no gradient is wanted, no taps, a state in the kernels' dtype."""
        if not self._kernels(call) or self.extras or self.fold == "tree" or torch.compiler.is_compiling():
            return False
        tensors = (*call.inputs.values(), *call.params.values(), *(state or {}).values())
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return False
        return state is None or all(
            state[s.name].dtype == call.of_kind(s.kind) and state[s.name].is_contiguous() for s in self.live
        )

    def step(self, call: Call, state: Values, slots: Tensor | None, in_place: bool) -> tuple[Any, Values]:
        """One token by the step kernel: (outputs, the state after it); `slots`: the rows that move on."""
        assert self.quick is not None
        tensors = (*call.inputs.values(), *call.params.values())
        found: tuple[Any, Values] = self.quick.first(state, tensors, slots, in_place)
        return found

    def _register(self, name: str) -> None:
        forward = torch.library.custom_op(f"psmc::{name}", self._forward, mutates_args=(), schema=_FORWARD)
        backward = torch.library.custom_op(f"psmc::{name}_backward", self._backward, mutates_args=(), schema=_BACKWARD)
        forward.register_fake(lambda *args: self._fake(Given(*args[:-1]), args[-1]))
        backward.register_fake(lambda grads, inputs, params, initial, *rest: _like(inputs, params, initial))
        forward.register_autograd(self._differentiate, setup_context=self._remember)

    def _call(self, given: Given) -> Call:
        return bind_call(self.spec, [*given.inputs[: len(self.spec.inputs)], *given.params], {}, tokens=True)

    def _forward(
        self, inputs: list[Tensor], params: list[Tensor], initial: list[Tensor], mask: Tensor | None,
        reset: Tensor | None, cu_seqlens: Tensor | None, save: bool,
    ) -> list[Tensor]:  # fmt: skip
        given = Given(inputs, params, initial, mask, reset, cu_seqlens)
        if self._kernels(self._call(given), given):
            return self._launch(given, save)
        found, final = self._run(given)
        results = (*found.values(), *(final[s.name] for s in self.live))
        return [x.clone(memory_format=torch.contiguous_format) for x in results]

    def _launch(self, given: Given, save: bool) -> list[Tensor]:
        inputs, params, initial, mask, reset, cu_seqlens = given
        outputs, finals, saved = self.kernels.scan_forward(
            inputs, params, initial or None, token_code(mask, reset), cu_seqlens, save
        )
        return [*outputs, *finals, *saved]

    def _launch_backward(self, given: Given, grads: list[Tensor], results: list[Tensor]) -> list[Tensor | None]:
        """Gradients of inputs, params and the initial state in one list, None where there is none."""
        inputs, params, initial, mask, reset, cu_seqlens = given
        count = len(self.spec.outputs)
        found = self.kernels.scan_backward(
            grads[:count], grads[count:], inputs, params, initial or None, results[count + len(self.live) :],
            token_code(mask, reset), cu_seqlens,
        )  # fmt: skip
        parts = zip(found, (inputs, params, initial), strict=True)
        return [g for part, like in parts for g in (part or [None] * len(like))]

    def _run(self, given: Given) -> tuple[Values, Values]:
        call = self._call(given)
        taps = zip(self.extras, given.inputs[len(self.spec.inputs) :], strict=True)
        lags = {f"{slot.name}_lag{lag}": value for (slot, lag), value in taps}
        x, p = prepared(self.spec, call, lags, hasattr(self.rules, "matrices"))
        begin = {s.name: v for s, v in zip(self.live, given.initial, strict=True)} if given.initial else None
        return run_scan(self.spec, self.rules, call, self.fold, x, p, begin, given.mask, given.reset, given.cu_seqlens)

    def _fake(self, given: Given, save: bool) -> list[Tensor]:
        call = self._call(given)
        rows = call.leading[0] if given.cu_seqlens is None else given.cu_seqlens.shape[0] - 1
        like = given.inputs[0]

        def empty(leading: tuple[int, ...], slot: Slot, dtype: torch.dtype | None = None) -> Tensor:
            shape = (*leading, *call.lanes, *(call.sizes[d] for d in slot.dims))
            return like.new_empty(shape, dtype=call.of_kind(slot.kind, dtype))

        results = [empty(call.leading, s, call.dtype) for s in self.spec.outputs]
        results += [empty((rows,), s) for s in self.live]
        if save and self._kernels(call, given):
            slots = {s.name: s for s in self.live}
            for name in self.kernels.saved_components():
                results.append(empty((self.kernels.saved_rows(math.prod(call.leading), rows),), slots[name]))
        return results

    def _remember(self, ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        given = Given(*inputs[:-1])
        ctx.counts = [len(part) for part in given[:3]]
        saved = output if self.kernels is not None else []
        ctx.save_for_backward(*given.inputs, *given.params, *given.initial, *given[3:], *saved)

    def _differentiate(self, ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        saved = list(ctx.saved_tensors)
        parts: list[list[Tensor]] = []
        for count in ctx.counts:
            parts.append(saved[:count])
            saved = saved[count:]
        mask, reset, cu_seqlens, *results = saved
        given = Given(parts[0], parts[1], parts[2], mask, reset, cu_seqlens)
        used = grads[: len(self.spec.outputs) + len(self.live)]
        like = self._fake(given, False) if any(g is None for g in used) else used
        dense = [torch.zeros_like(x) if g is None else g.contiguous() for g, x in zip(used, like, strict=True)]  # type: ignore[arg-type]
        backward = getattr(torch.ops.psmc, f"{self.spec.name}_{self.spec.digest}_backward").default
        found = iter(backward(dense, *given, results if self._kernels(self._call(given), given) else []))
        split = [[g if _smooth(x) else None for x, g in zip(part, found, strict=False)] for part in parts]
        return (*split, None, None, None, None)

    def _backward(
        self, grads: list[Tensor], inputs: list[Tensor], params: list[Tensor], initial: list[Tensor],
        mask: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None, results: list[Tensor],
    ) -> list[Tensor]:  # fmt: skip
        given = Given(inputs, params, initial, mask, reset, cu_seqlens)
        everything = [*inputs, *params, *initial]
        kernels = self._kernels(self._call(given), given)
        flat = self._launch_backward(given, grads, results) if kernels else self._transpose(given, grads)
        return [
            torch.zeros(x.shape, dtype=x.dtype, device=x.device)
            if g is None
            else (g if kernels else g.clone(memory_format=torch.contiguous_format))
            for g, x in zip(flat, everything, strict=True)
        ]

    def _transpose(self, given: Given, grads: list[Tensor], again: bool = False) -> list[Tensor | None]:
        """Autograd through a run of its own; `again`: what it gives is differentiated, too."""

        def fresh(x: Tensor) -> Tensor:  # of views, so that no gradient takes the way from one argument to another
            return x.view_as(x) if again else x.detach().requires_grad_(_smooth(x))

        with _recorded():
            inputs, params, initial = ([fresh(x) for x in part] for part in (given.inputs, given.params, given.initial))
            out, final = self._run(given._replace(inputs=inputs, params=params, initial=initial))
            pairs = zip((*out.values(), *(final[s.name] for s in self.live)), grads, strict=True)
            reached = [(y, g) for y, g in pairs if y.requires_grad]
            leaves = [*inputs, *params, *initial]
            wanted = [x for x in leaves if x.requires_grad]
            if not reached or not wanted:
                return [None] * len(leaves)
            results, cotangents = ([pair[side] for pair in reached] for side in (0, 1))
            found = iter(torch.autograd.grad(results, wanted, cotangents, allow_unused=True, create_graph=again))
        return [next(found) if x.requires_grad else None for x in leaves]


class Eager(torch.autograd.Function):
    """The kernels under autograd, outside of compiled graphs."""

    @staticmethod
    def forward(ctx: Any, operator: Operator, given: Given, *tensors: Tensor) -> tuple[Tensor, ...]:
        results = operator._launch(given, True)
        ctx.operator, ctx.counts = operator, [len(part) for part in given[:3]]
        ctx.flags, ctx.results = given[3:], len(operator.spec.outputs) + len(operator.live)
        ctx.save_for_backward(*tensors, *results)
        ctx.mark_non_differentiable(*(x for x in results if not _smooth(x)))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        saved = list(ctx.saved_tensors)
        parts: list[list[Tensor]] = []
        for count in ctx.counts:
            parts.append(saved[:count])
            saved = saved[count:]
        given = Given(parts[0], parts[1], parts[2], *ctx.flags)
        dense = [g.contiguous() for g in grads[: ctx.results]]
        if torch.is_grad_enabled():  # for gradients of gradients, which the kernels know nothing of
            return (None, None, *ctx.operator._transpose(given, dense, True))
        return (None, None, *ctx.operator._launch_backward(given, dense, saved))


def token_code(mask: Tensor | None, reset: Tensor | None) -> Tensor | None:
    """[B, T] int8 for the kernels, None where nothing is said. Bit 0: the token counts; bit 1: a restart before it."""
    if reset is None:
        return None if mask is None else mask.to(torch.int8)
    return (torch.ones_like(reset) if mask is None else mask).to(torch.int8) + 2 * reset.to(torch.int8)


@contextmanager
def _recorded() -> Iterator[None]:
    """Autograd inside an operator's kernel, where torch's dispatcher leaves it out."""
    keys = (torch._C.DispatchKey.AutogradFunctionality, torch._C.DispatchKey.AutogradOther)
    before = [torch._C._dispatch_tls_is_dispatch_key_excluded(key) for key in keys]
    try:
        for key in keys:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        with torch.enable_grad():
            yield
    finally:
        for key, excluded in zip(keys, before, strict=True):
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, excluded)


def _smooth(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _like(*parts: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(x.shape) for part in parts for x in part]


# --- The public face of a compiled aggregator: a parallel call, a step, states.

State = dict[str, Tensor]


class Aggregator:
    """A sequence model's scan: call it on whole sequences, or `step` it token by token with the same result.

    Inputs are [B, T, *lanes, *dims] in the spec's order, params [*lanes, *dims] or [*dims]; see `help(agg)`.
    """

    def __init__(self, spec: Spec, rules: Rules, *, fold: str, kernels: Any = None) -> None:
        """`fold`: 'scan', 'left' or 'tree'; `kernels`: the module's Triton entry points. With a rule from Python (then
        `rules.extern` is what makes an aggregator of one, and this one) calls are plain PyTorch, never a custom op."""
        self.spec, self.rules, self.fold_order = spec, rules, fold
        self.operator = Operator(spec, rules, fold, kernels)
        self._quick = None if self.operator is None else self.operator.quick  # steps that were checked before
        self._calls = None  # and whole calls
        self.checks = checks_wanted()  # values are read and checked, which waits for the device
        self.__name__ = spec.name

    def __deepcopy__(self, memo: dict[int, Any]) -> Aggregator:
        """Itself, as it holds nothing that trains; with a rule from Python, one with a copy of the rule."""
        return self

    def __repr__(self) -> str:
        named = ", ".join(s.name for s in (*self.spec.inputs, *self.spec.params))
        return f"<aggregator {self.spec.name}({named}) -> {', '.join(s.name for s in self.spec.outputs)}>"

    def __call__(
        self,
        *args: Tensor,
        initial_state: Mapping[str, Tensor] | None = None,
        return_state: bool = False,
        cu_seqlens: Tensor | None = None,
        mask: Tensor | None = None,
        reset: Tensor | None = None,
        reverse: bool = False,
        **kwargs: Tensor,
    ) -> Any:
        """All tokens at once: the output (a tuple if there are several), and with `return_state` the state after them.

        initial_state  what `init_state`, a call or a step returned; None is the start
        cu_seqlens     N + 1 offsets: N sequences packed in a batch of 1, states [N, ...]
        mask, reset    [B, T]: tokens that count (the others leave the state alone, and their outputs are 0); tokens
                       before which the state starts anew
        reverse        run each sequence from its last token to its first

        Raises ArgumentError if a shape, dtype or device does not fit the spec.
        """
        key = None
        call = bind_call(self.spec, args, kwargs, tokens=True)
        mask = check_flags(self.spec, "mask", mask, call)
        reset = check_flags(self.spec, "reset", reset, call)
        cu_seqlens = check_cu_seqlens(self.spec, cu_seqlens, call)
        state = self._checked(call, initial_state, call.leading[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        checks = self.checks and not torch.compiler.is_compiling()
        if checks:
            check_values(self.spec, call, mask, cu_seqlens)
            check_state_values(self.spec, state, self._begin(call))
        back = None
        if reverse:
            back = None if cu_seqlens is None else places(call, cu_seqlens, None)
            call = replace(call, inputs={k: flip(x, back) for k, x in call.inputs.items()})
            mask = None if mask is None else flip(mask, back)
            reset = None if reset is None else flip(reset, back)
        lags, tails = tap_tokens(self.spec, call, state, mask, reset, cu_seqlens)
        begin = None if state is None else {k: x for k, x in state.items() if k not in tail_names(self.spec)}
        cut = mask is not None or reset is not None or cu_seqlens is not None
        if self.operator is not None and self.operator.wanted(call, return_state or state is not None, cut):
            outputs, final = self.operator(call, lags, begin, mask, reset, cu_seqlens)
        else:
            x, p = prepared(self.spec, call, lags, hasattr(self.rules, "matrices"))
            outputs, final = run_scan(
                self.spec, self.rules, call, self.fold_order, x, p, begin, mask, reset, cu_seqlens
            )
        if checks:
            check_results(self.spec, outputs, final)
        found = tuple(flip(outputs[s.name], back) if reverse else outputs[s.name] for s in self.spec.outputs)
        out = found[0] if len(found) == 1 else found
        return (out, {**final, **tails}) if return_state else out

    def step(self, state: Mapping[str, Tensor] | None, *args: Tensor, **kwargs: Tensor) -> tuple[Any, State]:
        """One token, inputs [B, *lanes, *dims]: (output, new state). Functional and differentiable."""
        quick = self._quick or self._calls
        if quick is not None and not kwargs and not self.checks:
            known: tuple[Any, State] | None = quick.again(state, args, None, False)
            if known is not None:
                return known
        call = bind_call(self.spec, args, kwargs, tokens=False)
        before = self._checked(call, state, call.leading[0])
        if self.checks and not torch.compiler.is_compiling():
            check_values(self.spec, call, None, None)
            check_state_values(self.spec, before, self._begin(call))
        if self.operator is not None and self.operator.steps(call, before):
            if before is None:
                return self.operator.step(call, self._start(call), None, True)
            return self.operator.step(call, before, None, False)
        lags, tails = tap_token(self.spec, call, before)
        x, p = prepared(self.spec, call, lags)
        if before is None:
            before = self._start(call)
        run = run_push if self.fold_order == "tree" else run_step
        outputs, after = run(self.spec, self.rules, call, before, x, p)
        found = tuple(outputs[s.name] for s in self.spec.outputs)
        return found[0] if len(found) == 1 else found, {**after, **tails}

    def step_(self, state: State, *args: Tensor, slots: Tensor | None = None, **kwargs: Tensor) -> Any:
        """One token, in place and without gradient: `state` is overwritten; with `slots` [B] the rows that it names.

        The tensors of a tree's state grow in number: there the dict is updated, not its tensors.
        """
        quick = self._quick or self._calls
        if quick is not None and not kwargs and not self.checks:
            known = quick.again(state, args, slots, True)
            if known is not None:
                return known[0]
        with torch.no_grad():
            return self._step_in_place(state, args, slots, kwargs)

    def _step_in_place(
        self, state: State, args: tuple[Tensor, ...], slots: Tensor | None, kwargs: dict[str, Tensor]
    ) -> Any:
        call = bind_call(self.spec, args, kwargs, tokens=False)
        count = check_slots(self.spec, slots, call, state)
        self._checked(call, state, count)
        if self.checks and not torch.compiler.is_compiling():
            check_slot_values(self.spec, slots, count)
            check_values(self.spec, call, None, None)
            check_state_values(self.spec, state, self._begin(call))
        if slots is not None and self.fold_order == "tree":
            return self._push_rows(state, slots, *args, **kwargs)
        if self.operator is not None and self.operator.steps(call, state):
            return self.operator.step(call, state, slots, True)[0]
        rows = state if slots is None else {k: x.index_select(0, slots) for k, x in state.items()}
        out, after = self.step(rows, *args, **kwargs)
        if self.fold_order == "tree":
            state.clear()
            state.update(after)
            return out
        for name, value in after.items():
            if slots is None:
                state[name].copy_(value)
            else:
                state[name].index_copy_(0, slots, value.to(state[name].dtype))
        return out

    def init_state(
        self,
        batch: int,
        lanes: tuple[int, ...] | int = (),
        device: torch.device | str | None = None,
        *,
        sizes: Mapping[str, int] | None = None,
        dtype: torch.dtype = torch.float32,
        **dims: int,
    ) -> State:
        """The state before any token, [batch, *lanes, *dims]. Dims by name: `init_state(1, (16,), K=64, V=64)`.

        Raises ArgumentError if a size is missing, or not one.
        """
        lanes = tuple(lanes) if isinstance(lanes, Iterable) else (lanes,)
        known = {**self.spec.sizes, **(sizes or {}), **dims}
        check_sizes(self.spec, batch, lanes, known, dtype)
        call = Call({}, {}, known, (batch,), lanes, dtype, dtype, torch.device(device or "cpu"))
        state = self._start(call)
        for slot in self.spec.inputs:
            if slot.name in self.spec.taps:
                width = (batch, self.spec.taps[slot.name], *lanes, *(known[d] for d in slot.dims))
                state[f"{slot.name}_tail"] = torch.zeros(width, dtype=call.of_kind(slot.kind), device=call.device)
        return state

    def fold(
        self, *args: Tensor, cu_seqlens: Tensor | None = None, mask: Tensor | None = None, **kwargs: Tensor
    ) -> State:
        """The product of all tokens' elements, every component, [B, *lanes, *dims]: what segments and ranks exchange.

        No tokens give the identity; taps read 0 before the first. Raises ArgumentError, too, if there is no such thing.
        """
        if self.fold_order != "scan":
            raise ArgumentError(f"PSM607: {self.spec.name} is not associative: tokens have no product of their own.")
        call = bind_call(self.spec, args, kwargs, tokens=True)
        mask = check_flags(self.spec, "mask", mask, call)
        cu_seqlens = check_cu_seqlens(self.spec, cu_seqlens, call)
        if self.checks:
            check_values(self.spec, call, mask, cu_seqlens)
        lags, _ = tap_tokens(self.spec, call, None, mask, None, cu_seqlens)
        rules = SimpleNamespace(**{k: v for k, v in vars(self.rules).items() if k != "start"})
        x, p = prepared(self.spec, call, lags)
        return run_scan(self.spec, rules, call, "scan", x, p, None, mask, None, cu_seqlens, whole=True)[1]

    def _checked(self, call: Call, state: Mapping[str, Tensor] | None, rows: int) -> State | None:
        check = check_counter if self.fold_order == "tree" else check_state
        return check(self.spec, call, state, rows)

    def _begin(self, call: Call) -> State:
        """What each component starts from, [*dims]."""
        return start_state(self.spec, self.rules, call, tuple(s.name for s in self.spec.components))

    def _start(self, call: Call) -> State:
        """Before any token; tails apart."""
        if self.fold_order == "tree":
            return counter_start(call.leading[0])
        slots = {s.name: s for s in self.spec.components}
        begin = start_state(self.spec, self.rules, call, self.spec.live)
        return {k: as_state(v, slots[k], call, call.leading[:1]).clone() for k, v in begin.items()}

    def _push_rows(self, state: State, slots: Tensor, *args: Tensor, **kwargs: Tensor) -> Any:
        """`step_` of some streams of a tree, which may be at positions of their own."""
        names = tail_names(self.spec)
        rows: list[int] = slots.tolist()
        counter = {k: x for k, x in state.items() if k not in names}
        tails = {k: x.index_select(0, slots) for k, x in state.items() if k in names}
        out, after = self.step({**counter_rows([(counter, r) for r in rows]), **tails}, *args, **kwargs)
        pushed = {r: i for i, r in enumerate(rows)}
        streams = range(counter["position"].shape[0])
        moved = {k: x for k, x in after.items() if k not in names}
        kept = counter_rows([(moved, pushed[r]) if r in pushed else (counter, r) for r in streams])
        for name in names:
            kept[name] = state[name].index_copy_(0, slots, after[name].to(state[name].dtype))
        state.clear()
        state.update(kept)
        return out


# --- the spec's border

SPEC = Spec(
    name='attention_combine',
    digest='9d9ef86902a73ad3',
    inputs=(Slot('x', ('N', 'D')),),
    params=(Slot('query', ('D', 'D')), Slot('key', ('D', 'D')), Slot('value', ('D', 'D')),),
    components=(Slot('h', ('N', 'D')),),
    live=('h',),
    outputs=(Slot('o', ('N', 'D')),),
    sizes={},
    dims=('N', 'D'),
    taps={},
    previous=False,
)

attention_combine = Aggregator(SPEC, SimpleNamespace(lift=lift, combine=combine, advance=advance, output=output, identity=identity), fold="tree", kernels=KERNELS)
