"""gla: Gated linear attention: S' = diag(exp g) S + k vᵀ, o = qᵀS / sqrt(K). Yang et al. 2023, arXiv 2312.06635.

    aggregator gla {
      '''Gated linear attention: S' = diag(exp g) S + k vᵀ, o = qᵀS / sqrt(K). Yang et al. 2023, arXiv 2312.06635.'''
      dim K, V
      input q[K], k[K], v[V], g[K] in (-inf, 0]
      state a[K] = 1, S[K, V] = 0

      lift {
        a[i] = exp(g[i])
        S[i, j] = k[i] * v[j]
      }

      combine (l, r) {
        a[i] = l.a[i] * r.a[i]
        S[i, j] = r.a[i] * l.S[i, j] + r.S[i, j]
      }

      output o[i] = (sum[j] q[j] * S[j, i]) / sqrt(K)

      associative: yes
    }

Proof (associative): proved over the reals, for all sizes (normal form).
Proof (identity element): proved over the reals, for all sizes (normal form).
Plan: chunked. S: chunks of tokens as batched matrix products.

Written by psmc; regenerate with: psmc compile gla.psm
The runtime holds what this spec needs of it. Needs torch, and triton for tensors on a GPU; nothing else.

   82  the spec's mathematics: tensors are [..., *dims], leading axes broadcast
  124  kernels: a matrix state in chunks of tokens, S_t = D_t S_(t-1) + b_t c_t', y_t = q_t' S_t (or q_t' S_(t-1))
 1257  Scans in PyTorch, differentiable by autograd: no loop over T where the rule is associative
 1536  A layer over a batch of sequences: masks, restarts and packing on top of the scans, a stretch of time at once
 1693  The border of a compiled aggregator: what was passed, checked against the spec, with the spec's own names
 1963  The border, continued: states, flags and packing
 2087  What the border sees only by reading tensors: values, checked where `checks` or PSMC_CHECK=1 asks for it
 2163  Inputs read some tokens earlier, and time run backwards: index arithmetic on whole sequences, no loop over T
 2226  One checked call in PyTorch: lift, the scan of the plan, readout
 2392  Sequences cut into chunks of tokens, so that no chunk holds tokens of two: dense batches, and packed ones
 2455  Decays between the tokens of a chunk, by halving: products of steps alone, never a ratio of two
 2660  Decays between the tokens of a chunk: of one number a token by running sums, of vectors by ratios or by ...
 2840  States from chunk to chunk, and the triangular solve of a low-rank transition; both with a backward by hand
 3028  Matrix states a chunk of tokens at a time, as batched matrix products
 3180  Kernels that threads compile ahead of a first call: most of its time, the compiler needs no interpreter
 3267  Launches of Triton kernels past the binder, which takes longer than a small kernel runs
 3454  How a chunk kernel sees its tensors: rows and strides, and what a call's kernels share
 3621  One layer of a spec as calls of the chunk kernels: its factors as they lie, its readouts, its last states
 3836  What the shape of a chunked call fixes, worked out once: blocks, the split of time, strides, launches
 4003  What is made ready of a call before the chunk kernels walk: sums of logs, factors, pairs of a chunk's tokens
 4051  Calls of the chunk kernels: one matrix state per lane, its readout and its last state, with their gradients
 4433  The scan as an operator of torch: one graph node for torch.compile, with its own backward
 4701  The small layers of a chunked spec: what is scanned before its matrix states, and read by them as numbers a ...
 4801  A spec layer by layer: matrix states in chunks, what is small by the blocked scan, then the readout
 5080  Calls of specs that one fused layer makes up, straight to its kernels, once a call of their shapes was checked
 5257  The public face of a compiled aggregator: a parallel call, a step, states
 5482  the spec's border
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
from math import exp, isqrt, prod
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

__all__ = ["gla"]


# --- the spec's mathematics: tensors are [..., *dims], leading axes broadcast

def lift(x, p, n):
    a = torch.exp(x.g)
    S = x.k[..., :, None] * x.v[..., None, :]
    return {"a": a, "S": S}


def combine(l, r, p, n):
    a = l.a * r.a
    S = r.a[..., :, None] * l.S + r.S
    return {"a": a, "S": S}


def advance(l, r, p, n):
    S = r.a[..., :, None] * l.S + r.S
    return {"S": S}


def output(s, prev, x, p, n):
    o = torch.einsum("...j,...ji->...i", x.q, s.S) / math.sqrt(n.K)
    return {"o": o}


def identity(n, like):
    a = like.new_full((n.K,), 1)
    S = like.new_full((n.K, n.V), 0)
    return {"a": a, "S": S}


def factors_0(x, s, prev, p, n):
    return {}


def given_0(x, s, prev, p, n):
    return {}


def readout(s, prev, x, p, n):
    return {"o": s.y_S}


# --- kernels: a matrix state in chunks of tokens, S_t = D_t S_(t-1) + b_t c_t', y_t = q_t' S_t (or q_t' S_(t-1)).
#
#   N sequences, G lanes each; token t of lane g of a tensor x lies at x + (first row + t) * x_t + g // x_r * x_g, its
#   last axis contiguous. K, V: sizes of the state; BK, BV: blocks of them; BT tokens a chunk.
#   over the key k0, k1, ..., over the value c, v0, ..., numbers a token s0, ...: k0 q, k1 k, k2 g, c v
#   p_code    a byte a token, if any: bit 0 it counts, bit 1 the state is new before it
#   R(t, s)   product of the decays of the tokens s+1 .. t: 2 ** a sum of logs, computed without cancellation
#   DECAY     0: D is 1; 1: a number a token; 2: a vector over K.      SHIFT  1: y reads the state before its token
#   to        [BT] or [BT, BK] logs of R(t - SHIFT, chunk's start)     after  logs of R(chunk's end, t)
#   n [BT]        a number a token that multiplies b (p_n; not for DECAY 2); it joins R(t, s) and 2**after
#   A [BT, BT]    q_t . b_s R(t - SHIFT, s) for s <= t - SHIFT, else 0
#   y = 2**to q S + A c;    S at the end = 2**total S + (2**after b)' c;   the costate G runs backwards alike, from (q, dy)
#   z, w          the same with c = 1: a state [K] and what q reads of it, a number a token (NORM)
#   p_up [B, T, G, K]  a decay over the key: sums of logs, base 2, from the start of its half of a chunk up to each token;
#             p_down: from behind it to that half's end, for precise operands
#   p_total   what was summed ahead: DECAY 2: the logs of whole chunks [chunks, G, K]; DECAY 1: those up to each token
#   p_p [B, T, G, BT]  P of each token and those of its chunk
#   p_sums [B, T, G, E]  numbers a token that kernels hand on: w first, then sums over the key
#   PREC      operands of all products: "bf16"; "tf32" (for fp16 inputs, which have its digits); "tf32x3" (for fp32)
# States, sums of logs and accumulators are fp32; stored states of chunks are operands (bf16 or fp32).
# Least traffic forward: what is named above and the output once, (2K + 2V) e bytes a token and lane at e bytes a number
# for q, b, c, y; least work 4 K V FLOPs; backward 11/4 and 5/2 of that. A chunk adds 4 BT (K + V) FLOPs a token, its
# state 2 K V e / BT bytes; DECAY 2 writes and reads q and b once more, scaled, A, and 4 K bytes of sums of logs.


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
def operand(x, PREC: tl.constexpr):
    return x.to(tl.bfloat16) if PREC == "bf16" else x.to(tl.float32)


@jit
def product(x, z, PREC: tl.constexpr):
    if PREC == "bf16":
        found = tl.dot(operand(x, PREC), operand(z, PREC))
    else:
        found = tl.dot(operand(x, PREC), operand(z, PREC), input_precision=PREC)
    return found


@jit
def sequence(p_cu, p_chunks, i_n, T, BT: tl.constexpr):
    """First row, number of tokens and first chunk of a sequence."""
    if p_cu is not None:
        bos = tl.load(p_cu + i_n).to(tl.int64)
        total = (tl.load(p_cu + i_n + 1).to(tl.int64) - bos).to(tl.int32)
        chunk = tl.load(p_chunks + i_n).to(tl.int64)
    else:
        bos, total, chunk = i_n * T, T, i_n * tl.cdiv(T, BT)
    return bos, total, chunk


@jit
def chunk_at(p_cu, p_chunks, p_owner, i_c, T, BT: tl.constexpr):
    """First row of a chunk and how many tokens there are from it on; none: there is no such chunk."""
    i_n = i_c // tl.cdiv(T, BT)
    if p_owner is not None:
        i_n = tl.load(p_owner + i_c).to(tl.int64)
    bos, total, chunk = sequence(p_cu, p_chunks, tl.maximum(i_n, 0), T, BT)
    length = (total - (i_c - chunk) * BT).to(tl.int32)
    return bos + (i_c - chunk) * BT, tl.where(i_n < 0, 0, length)


@jit
def inside(m, o_w, W: tl.constexpr):
    """m & o_w < W along the columns, where that says anything."""
    if (o_w.shape[0] + W) % o_w.shape[0] != 0:
        m = m & (o_w < W)[None, :]
    return m


@jit
def rows(p_x, row, x_t, length, o_w, W: tl.constexpr, BT: tl.constexpr):
    """Tile [BT, BW] of tokens from `row` on; `length` of them exist. The pointer is at the lane."""
    return rows_at(p_x, row, x_t, length, tl.arange(0, BT), o_w, W)


@jit
def rows_at(p_x, row, x_t, length, t, o_w, W: tl.constexpr):
    """The same of the tokens t [BT] from `row` on."""
    m = inside((t < length)[:, None], o_w, W)
    return tl.load(p_x + row * x_t + (t * x_t)[:, None] + o_w[None, :], mask=m, other=0)


@jit
def store_rows(p_x, b_x, row, x_t, length, o_w, W: tl.constexpr, BT: tl.constexpr):
    store_rows_at(p_x, b_x, row, x_t, length, tl.arange(0, BT), o_w, W)


@jit
def store_rows_at(p_x, b_x, row, x_t, length, t, o_w, W: tl.constexpr):
    m = inside((t < length)[:, None], o_w, W)
    tl.store(p_x + row * x_t + (t * x_t)[:, None] + o_w[None, :], b_x, mask=m)


@jit
def numbers(p_x, row, x_t, length, BT: tl.constexpr):
    """[BT], a number a token."""
    return numbers_at(p_x, row, x_t, length, tl.arange(0, BT))


@jit
def numbers_at(p_x, row, x_t, length, t):
    return tl.load(p_x + row * x_t + t * x_t, mask=t < length, other=0).to(tl.float32)


@jit
def load_matrix(p_s, at, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    """A block of the `at`-th matrix [K, V]."""
    m = inside((o_k < K)[:, None], o_v, V)
    return tl.load(p_s + at * (K * V) + o_k[:, None] * V + o_v[None, :], mask=m, other=0)


@jit
def store_matrix(p_s, at, b_s, o_k, o_v, K: tl.constexpr, V: tl.constexpr):
    m = inside((o_k < K)[:, None], o_v, V)
    tl.store(p_s + at * (K * V) + o_k[:, None] * V + o_v[None, :], b_s, mask=m)


@jit
def code_of(p_code, row, length, BT: tl.constexpr):
    """[BT], 0 where there is no token."""
    return code_at(p_code, row, length, tl.arange(0, BT))


@jit
def code_at(p_code, row, length, t):
    if p_code is None:
        code = (t < length).to(tl.int32)
    else:
        code = tl.load(p_code + row + t, mask=t < length, other=0).to(tl.int32)
    return code


@jit
def kept(b_x, p_code, row, length, o_w, FRESH: tl.constexpr, ALL: tl.constexpr, W: tl.constexpr, BT: tl.constexpr):
    """b_x [BT, BW], 0 where no token counts (FRESH: nor where the state is new). ALL: it is not 0 outside, either."""
    return kept_at(b_x, p_code, row, length, tl.arange(0, BT), o_w, FRESH, ALL, W)


@jit
def kept_at(b_x, p_code, row, length, t, o_w, FRESH: tl.constexpr, ALL: tl.constexpr, W: tl.constexpr):
    if ALL or p_code is not None:
        code = code_at(p_code, row, length, t)
        m = (code == 1) if FRESH else (code % 2 == 1)
        b_x = tl.where(m[:, None] & (o_w < W)[None, :], b_x, 0)
    return b_x


@jit
def decays(b_x, code):
    """Logs as they are added up: next to -inf where the state is new, but finite."""
    return tl.where(code >= 2, -710.0, tl.maximum(b_x.to(tl.float32), -710.0))


@jit
def tile_factors(s_db, s_dlog, s_dq):
    k0 = s_dq
    k1 = s_db
    k2 = s_dlog
    return k0, k1, k2

@jit
def load_q(raw, row, i_g, length, o_k, FRESH: tl.constexpr, K: tl.constexpr, BT: tl.constexpr):
    """What reads the state, [BT, BK]."""
    return load_q_at(raw, row, i_g, length, tl.arange(0, BT), o_k, FRESH, K)


@jit
def load_q_at(raw, row, i_g, length, t, o_k, FRESH: tl.constexpr, K: tl.constexpr):
    """The same of the tokens t [BT]."""
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r = raw
    b_k0 = rows_at(p_k0 + i_g // k0_r * k0_g, row, k0_t, length, t, o_k, K)
    b_x = kept_at(b_k0, p_code, row, length, t, o_k, FRESH, False, K)
    return b_x


@jit
def load_b(raw, row, i_g, length, o_k, K: tl.constexpr, BT: tl.constexpr):
    """What enters the state over the key, [BT, BK]."""
    return load_b_at(raw, row, i_g, length, tl.arange(0, BT), o_k, K)


@jit
def load_b_at(raw, row, i_g, length, t, o_k, K: tl.constexpr):
    """The same of the tokens t [BT]."""
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r = raw
    b_k1 = rows_at(p_k1 + i_g // k1_r * k1_g, row, k1_t, length, t, o_k, K)
    b_x = kept_at(b_k1, p_code, row, length, t, o_k, 0, False, K)
    return b_x


@jit
def load_log(raw, row, i_g, length, o_k, K: tl.constexpr, BT: tl.constexpr):
    """Log of the decay over the key, finite, [BT, BK]."""
    return load_log_at(raw, row, i_g, length, tl.arange(0, BT), o_k, K)


@jit
def load_log_at(raw, row, i_g, length, t, o_k, K: tl.constexpr):
    """The same of the tokens t [BT]."""
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r = raw
    b_k2 = rows_at(p_k2 + i_g // k2_r * k2_g, row, k2_t, length, t, o_k, K)
    b_x = kept_at(b_k2, p_code, row, length, t, o_k, 0, False, K)
    return decays(b_x, code_at(p_code, row, length, t)[:, None]).to(b_x.dtype)


@jit
def load_c(raw, row, i_g, length, o_v, V: tl.constexpr, BT: tl.constexpr):
    """What enters the state over the value, [BT, BV]."""
    return load_c_at(raw, row, i_g, length, tl.arange(0, BT), o_v, V)


@jit
def load_c_at(raw, row, i_g, length, t, o_v, V: tl.constexpr):
    """The same of the tokens t [BT]."""
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r = raw
    b_c = rows_at(p_c + i_g // c_r * c_g, row, c_t, length, t, o_v, V)
    b_x = kept_at(b_c, p_code, row, length, t, o_v, 0, False, V)
    return b_x


@jit
def back_out(raw, p_do, p_seen, p_sums, row, i_g, length, o_v, G, V: tl.constexpr, BT: tl.constexpr):
    """From the output's cotangent that of y, [BT, BV] each."""
    return back_out_at(raw, p_do, p_seen, p_sums, row, i_g, length, tl.arange(0, BT), o_v, G, V)


@jit
def back_out_at(raw, p_do, p_seen, p_sums, row, i_g, length, t, o_v, G, V: tl.constexpr):
    """The same of the tokens t [BT]."""
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r = raw
    b_do = rows_at(p_do + i_g * V, row, G * V, length, t, o_v, V)
    return b_do


@jit
def store_keys(
    raw, p_dk0, p_dk1, p_dk2, b_dq, b_db, b_dlog, row, i_c, i_g, length, o_k, G,
    FRESH: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
):
    """Gradients of what q, b and the log are made of; of a param: the chunk's share."""
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r = raw
    b_dq = kept(b_dq, p_code, row, length, o_k, FRESH, False, K, BT)
    b_db = kept(b_db, p_code, row, length, o_k, 0, False, K, BT)
    d_k0, d_k1, d_k2 = tile_factors(b_db, b_dlog, b_dq)
    if p_dk0 is not None:
        b_share = kept(d_k0, p_code, row, length, o_k, 0, False, K, BT)
        store_rows(p_dk0 + i_g * K, b_share, row, G * K, length, o_k, K, BT)
    if p_dk1 is not None:
        b_share = kept(d_k1, p_code, row, length, o_k, 0, False, K, BT)
        store_rows(p_dk1 + i_g * K, b_share, row, G * K, length, o_k, K, BT)
    if p_dk2 is not None:
        b_share = kept(d_k2, p_code, row, length, o_k, 0, False, K, BT)
        store_rows(p_dk2 + i_g * K, b_share, row, G * K, length, o_k, K, BT)


@jit
def store_values(
    raw, p_dc, b_dy, b_dc, row, i_c, i_g, length, o_v, G,
    V: tl.constexpr, BT: tl.constexpr,
):
    """Gradients of c and of what the output reads over the value."""
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r = raw
    b_dc = kept(b_dc, p_code, row, length, o_v, 0, False, V, BT)
    store_rows(p_dc + i_g * V, b_dc, row, G * V, length, o_v, V, BT)


@jit
def numbers_n(raw, row, i_g, length, BT: tl.constexpr):
    """What multiplies b, [BT]."""
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r = raw
    if p_n is not None:
        found = numbers(p_n + i_g // n_r * n_g, row, n_t, length, BT)
    else:
        found = tl.full([BT], 1.0, tl.float32)
    return found


@jit
def number_sums(p_total, at, SHIFT: tl.constexpr, PREC: tl.constexpr, BT: tl.constexpr):
    """What chunk_sums_kernel wrote of a chunk: w and f up to t - SHIFT, up to s, each [BT], and in all. Loads this small come
    in whichever layout they are used in, so none waits for a barrier; sums made on the spot would."""
    p = p_total + at * (2 * BT)
    t = tl.arange(0, BT)
    w_s, w_e, f_s, f_e = tl.load(p + t), tl.load(p + BT - 1), 0.0, 0.0
    w_t, f_t = w_s, f_s
    if SHIFT:
        w_t = tl.load(p + t - 1, mask=t > 0, other=0)
    if PREC != "bf16":
        f_s, f_e = tl.load(p + BT + t), tl.load(p + 2 * BT - 1)
        f_t = f_s
        if SHIFT:
            f_t = tl.load(p + BT + t - 1, mask=t > 0, other=0)
    return w_t, f_t, w_s, f_s, w_e, f_e


@jit
def between(w_t, f_t, w_s, f_s, PREC: tl.constexpr):
    """The decay between two sums of `number_sums`."""
    if PREC == "bf16":
        found = tl.exp2(w_t - w_s)
    else:
        found = tl.exp2((w_t - w_s) + (f_t - f_s))
    return found


@jit
def up_to(w_t, f_t, PREC: tl.constexpr):
    return between(w_t, f_t, 0.0, 0.0, PREC)


@jit
def ratio(w_t, f_t, w_s, f_s, SHIFT: tl.constexpr, FLIP: tl.constexpr, PREC: tl.constexpr, BT: tl.constexpr):
    """R(t - SHIFT, s) [BT, BT], 0 above, from `number_sums`; FLIP: its transpose."""
    m = later(SHIFT, FLIP, BT)
    if PREC == "bf16":
        f_t, f_s = w_t, w_s
    if FLIP:
        b_r = between(w_t[None, :], f_t[None, :], w_s[:, None], f_s[:, None], PREC)
    else:
        b_r = between(w_t[:, None], f_t[:, None], w_s[None, :], f_s[None, :], PREC)
    return tl.where(m, b_r, 0.0)


@jit
def later(SHIFT: tl.constexpr, FLIP: tl.constexpr, BT: tl.constexpr):
    """t - SHIFT >= s, [t, s]; FLIP: [s, t]."""
    t = tl.arange(0, BT)
    if FLIP:
        m = t[None, :] - SHIFT >= t[:, None]
    else:
        m = t[:, None] - SHIFT >= t[None, :]
    return m


@jit
def chosen(m, b_x, PREC: tl.constexpr):
    """m x [BT, BK] for a matrix of 0 and 1: sums of rows of x, to the digits of fp32 (bf16: 16 bits of each)."""
    if b_x.dtype == tl.bfloat16:
        found = tl.dot(m.to(tl.bfloat16), b_x)
    elif PREC == "bf16":
        high = b_x.to(tl.bfloat16)
        found = tl.dot(m.to(tl.bfloat16), high)
        found = tl.dot(m.to(tl.bfloat16), (b_x - high.to(tl.float32)).to(tl.bfloat16), found)
    else:
        found = tl.dot(m.to(tl.float32), b_x.to(tl.float32), input_precision="tf32x3")
    return found


@jit
def pairs_across(p_pairs, row, i_g, length, G, BT: tl.constexpr):
    """A or P [B, T, G, BT] of a chunk as [s, t]: not a transpose, which Triton 3.4-3.7 gets wrong in a product."""
    t = tl.arange(0, BT)
    return tl.load(p_pairs + ((row + t) * G + i_g)[None, :] * BT + t[:, None], mask=(t < length)[None, :], other=0)


@jit
def lane_numbers(p_x, row, x_t, lanes, m):
    """Tile [BT, BG] of numbers a token, from `row` on, of the lanes at these offsets."""
    t = tl.arange(0, m.shape[0])
    return tl.load(p_x + row * x_t + t[:, None] * x_t + lanes[None, :], mask=m, other=0).to(tl.float32)


@jit(do_not_specialize=["T"])
def chunk_sums_kernel(
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r,
    p_total, p_cu, p_chunks, p_owner, T, G, PREC: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BG: tl.constexpr,
):
    """Numbers a token of one chunk and BG lanes: the sums of the decay's
    logs up to each token, [chunks, G, 2, BT]: for precise operands as whole numbers w and remainders f, so that a
    difference behind strong decays keeps its digits."""
    NG = tl.cdiv(G, BG)
    pid = tl.program_id(0)
    i_c = (pid // NG).to(tl.int64)
    row, length = chunk_at(p_cu, p_chunks, p_owner, i_c, T, BT)
    if length <= 0:
        return
    t, o_g = tl.arange(0, BT), pid % NG * BG + tl.arange(0, BG)
    m = (t < length)[:, None] & (o_g < G)[None, :]
    code = code_of(p_code, row, length, BT)[:, None]
    b_log = tl.zeros([BT, BG], tl.float32)
    if p_log is not None:
        b_log = lane_numbers(p_log, row, l_t, o_g // l_r * l_g, m)
    if p_total is not None:
        b_x = decays(tl.where(code % 2 == 1, b_log, 0.0), code) * 1.4426950408889634
        w = b_x
        if PREC != "bf16":
            w = tl.floor(b_x + 0.5)
        p = p_total + ((i_c * G + o_g) * (2 * BT))[None, :] + t[:, None]
        tl.store(p, tl.cumsum(w, 0), mask=(o_g < G)[None, :])
        if PREC != "bf16":
            tl.store(p + BT, tl.cumsum(b_x - w, 0), mask=(o_g < G)[None, :])


@jit(do_not_specialize=["T"])
def chunk_logs_kernel(
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r,
    p_up, p_down, p_cu, p_chunks, p_owner, T, G, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):
    """For a decay over the key, of one chunk, lane and block of K: sums of its logs within each half of the chunk, up to each
    token, [B, T, G, K]; with p_down also those behind it, which no difference gives to the digits of fp32. A thread adds
    up columns of its own. Floor: logs once, sums once."""
    raw = (p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r)
    NK: tl.constexpr = (K + BK - 1) // BK
    H: tl.constexpr = BT // 2
    pid = tl.program_id(0)
    i_k, i_g, i_c = pid % NK, pid // NK % G, (pid // (NK * G)).to(tl.int64)
    row, length = chunk_at(p_cu, p_chunks, p_owner, i_c, T, BT)
    if length <= 0:
        return
    o_k, t = i_k * BK + tl.arange(0, BK), tl.arange(0, 2) * H
    b_e = tl.zeros([2, BK], tl.float32)
    b_x = load_log_at(raw, row, i_g, length, t, o_k, K)
    for j in tl.static_range(H):
        b_e += b_x.to(tl.float32) * 1.4426950408889634
        b_x = load_log_at(raw, row, i_g, length, t + (j + 1) % H, o_k, K)  # on its way while the sum is stored
        store_rows_at(p_up + i_g * K, b_e, row, G * K, length, t + j, o_k, K)
    if p_down is not None:
        b_e = tl.zeros([2, BK], tl.float32)
        for j in tl.static_range(H):
            store_rows_at(p_down + i_g * K, b_e, row, G * K, length, t + H - 1 - j, o_k, K)
            b_e += load_log_at(raw, row, i_g, length, t + H - 1 - j, o_k, K).to(tl.float32) * 1.4426950408889634


@jit
def half_totals(p_up, row, i_g, length, o_w, G, W: tl.constexpr, BT: tl.constexpr):
    """Logs of the decays of either half of a chunk, [BW] each."""
    H: tl.constexpr = BT // 2
    p = p_up + (row * G + i_g) * W + o_w
    first = tl.load(p + (tl.minimum(H, length) - 1) * (G * W), mask=o_w < W, other=0)
    return first, tl.load(p + (tl.minimum(BT, length) - 1) * (G * W), mask=(o_w < W) & (length > H), other=0)


@jit
def meeting(first):
    """A whole m [BW] next to the log of the first half's decays, and what is left of that: pairs of tokens meet at 2**m. It is
    within what keeps both factors finite, and is not where decays grow."""
    m = tl.maximum(tl.minimum(tl.floor(first + 0.5), 0.0), -60.0)
    return m, first - m


@jit
def late(BT: tl.constexpr):
    """Whether a token is in the later half of its chunk, [BT, 1]."""
    return tl.arange(0, BT)[:, None] >= BT // 2


@jit
def sums_up(p_up, row, i_g, length, o_w, G, SHIFT: tl.constexpr, W: tl.constexpr, BT: tl.constexpr):
    """Logs of R(t - SHIFT, half's start), [BT, BW]."""
    t = tl.arange(0, BT)
    m = inside(((t < length) & (t % (BT // 2) >= SHIFT))[:, None], o_w, W)
    return tl.load(p_up + (row * G + i_g) * W + ((t - SHIFT) * (G * W))[:, None] + o_w[None, :], mask=m, other=0)


@jit
def sums_down(p_down, b_e, first, second, row, i_g, length, o_w, G, W: tl.constexpr, BT: tl.constexpr):
    """Logs of R(half's end, t), [BT, BW]; b_e: those up to t."""
    if p_down is not None:
        found = rows(p_down + i_g * W, row, G * W, length, o_w, W, BT)
    else:
        found = tl.where(late(BT), second[None, :], first[None, :]) - b_e
        found = tl.where((tl.arange(0, BT) < length)[:, None], found, 0.0)
    return found


@jit
def by_half(early, later, BT: tl.constexpr):
    """A factor [BW] for the tokens of each half, [BT, BW]."""
    return tl.where(late(BT), later[None, :], early[None, :])


@jit
def prepare_far(
    raw, p_up, p_down, p_sums, row, i_g, length, G, SHIFT: tl.constexpr, PREC: tl.constexpr, K: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr,
):
    """A for rows whose decays are beyond all bounds: pairs of both halves meet at the middle, and no exponent adds up logs of
    both signs; those of one half add up step by step, in sums that begin at t."""
    t = tl.arange(0, BT)
    b_a = tl.zeros([BT, BT], tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=1):
        o_k = i_k + tl.arange(0, BK)
        b_q = load_q(raw, row, i_g, length, o_k, SHIFT, K, BT)
        x_b = load_b(raw, row, i_g, length, o_k, K, BT)
        first, second = half_totals(p_up, row, i_g, length, o_k, G, K, BT)
        b_e = sums_up(p_up, row, i_g, length, o_k, G, 0, K, BT)
        x_b = x_b * tl.exp2(sums_down(p_down, b_e, first, second, row, i_g, length, o_k, G, K, BT))
        to = tl.exp2(sums_up(p_up, row, i_g, length, o_k, G, SHIFT, K, BT))
        b_o = product(b_q * to, tl.trans(operand(x_b, PREC)), PREC)
        b_a += tl.where(late(BT) & (t < BT // 2)[None, :], b_o, 0.0)
        b_e = tl.zeros([BT, BK], tl.float32)
        for j in tl.range(0, BT // 2, num_stages=1):
            s = t // (BT // 2) * (BT // 2) + BT // 2 - 1 - j
            m = (s <= t - SHIFT)[:, None]
            b_b = load_b_at(raw, row, i_g, length, s, o_k, K)
            x = tl.sum(b_q.to(tl.float32) * b_b.to(tl.float32) * tl.exp2(b_e), 1)[:, None]
            b_a += tl.where((s[:, None] == t[None, :]) & m, x, 0.0)
            b_x = load_log_at(raw, row, i_g, length, s, o_k, K).to(tl.float32)
            b_e += tl.where(m, b_x, 0.0) * 1.4426950408889634
    return b_a


@jit(do_not_specialize=["T"])
def chunk_prepare_kernel(
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r,
    p_up, p_down, p_qs, p_bs, p_pairs, p_total, p_sums, p_cu, p_chunks, p_owner, T, G,
    SHIFT: tl.constexpr, PREC: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):
    """For a decay over the key, of one chunk and lane: q 2**to, b 2**after, the total [K] of the logs, and A [BT, BT] as a
    product of q and b, each scaled from the middle. A row t that meets a sum beyond 60.0 up to t, of logs since the start
    of a half, is made otherwise: no later token has a say in it, as 2**m scales without rounding."""
    raw = (p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r)
    pid = tl.program_id(0)
    i_g, i_c = pid % G, (pid // G).to(tl.int64)
    row, length = chunk_at(p_cu, p_chunks, p_owner, i_c, T, BT)
    if length <= 0:
        return
    t = tl.arange(0, BT)
    m = later(SHIFT, False, BT)
    b_a = tl.zeros([BT, BT], tl.float32)
    reach = tl.zeros([BT], tl.float32)
    for i_k in tl.range(0, K, BK, num_stages=1):
        o_k = i_k + tl.arange(0, BK)
        b_q = load_q(raw, row, i_g, length, o_k, SHIFT, K, BT)  # [BT, BK]
        b_b = load_b(raw, row, i_g, length, o_k, K, BT)
        b_e = sums_up(p_up, row, i_g, length, o_k, G, 0, K, BT)
        to = b_e
        if SHIFT:
            to = sums_up(p_up, row, i_g, length, o_k, G, 1, K, BT)
        reach = tl.maximum(reach, tl.max(tl.abs(b_e), 1))
        first, second = half_totals(p_up, row, i_g, length, o_k, G, K, BT)
        tl.store(p_total + (i_c * G + i_g) * K + o_k, first + second, mask=o_k < K)
        whole, rest = meeting(first)
        x_q = b_q * tl.exp2(to)
        x_b = b_b * tl.exp2(-b_e)
        x_q, b_q = x_q * by_half(tl.exp2(-whole), tl.exp2(rest), BT), x_q * tl.where(late(BT), tl.exp2(first)[None, :], 1.0)
        x_b *= by_half(tl.exp2(whole), tl.exp2(-rest), BT)
        b_a += product(x_q, tl.trans(operand(x_b, PREC)), PREC)
        store_rows(p_qs + i_g * K, b_q, row, G * K, length, o_k, K, BT)
        b_b = b_b * tl.exp2(sums_down(p_down, b_e, first, second, row, i_g, length, o_k, G, K, BT))
        store_rows(p_bs + i_g * K, b_b * tl.where(late(BT), 1.0, tl.exp2(second)[None, :]), row, G * K, length, o_k, K, BT)
    if tl.max(reach, 0) > 60.0:
        far = tl.max(tl.where(m, reach[None, :], 0.0), 1) > 60.0
        b_h = prepare_far(raw, p_up, p_down, p_sums, row, i_g, length, G, SHIFT, PREC, K, BT, BK)
        b_a = tl.where(far[:, None], b_h, b_a)
    store_rows(p_pairs + i_g * BT, tl.where(m, b_a, 0.0), row, G * BT, length, t, BT, BT)


@jit
def prepare_far_read(
    raw, p_p, row, i_g, length, o_k, G, SELF: tl.constexpr, SHIFT: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):
    """Sums over s < t of P[t, s] R(t - SHIFT, s) b[s], [BT, BK], for t and s of the same half, step by step as prepare_far
    makes A; SELF: s = t, too."""
    t = tl.arange(0, BT)
    found = tl.zeros([BT, BK], tl.float32)
    p_p += (row * G + i_g) * BT
    b_e = tl.zeros([BT, BK], tl.float32)
    for j in tl.range(0, BT // 2, num_stages=1):
        s = t // (BT // 2) * (BT // 2) + BT // 2 - 1 - j
        b_a = tl.load(p_p + t * (G * BT) + s, mask=(s < t + SELF) & (t < length), other=0).to(tl.float32)[:, None]
        x = b_a * load_b_at(raw, row, i_g, length, s, o_k, K).to(tl.float32) * tl.exp2(b_e)
        found += tl.where((s < t + SELF)[:, None], x, 0.0)
        x = load_log_at(raw, row, i_g, length, s, o_k, K).to(tl.float32)
        b_e += tl.where((s <= t - SHIFT)[:, None], x, 0.0) * 1.4426950408889634
    return found


@jit
def prepare_far_write(
    raw, p_p, p_sums, row, i_g, length, o_k, G, SHIFT: tl.constexpr, K: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr,
):
    """Sums over t > s of P[t, s] R(t - SHIFT, s) q[t], [BT, BK], likewise."""
    s = tl.arange(0, BT)
    found = tl.zeros([BT, BK], tl.float32)
    p_p += (row * G + i_g) * BT
    b_e = tl.zeros([BT, BK], tl.float32)
    for j in tl.range(0, BT // 2, num_stages=1):
        x = s // (BT // 2) * (BT // 2) + j
        b_x = load_log_at(raw, row, i_g, length, tl.maximum(x - SHIFT, 0), o_k, K).to(tl.float32)
        b_e += tl.where((x - SHIFT > s)[:, None], b_x, 0.0) * 1.4426950408889634
        b_a = tl.load(p_p + x * (G * BT) + s, mask=(x > s) & (x < length), other=0).to(tl.float32)[:, None]
        found += b_a * load_q_at(raw, row, i_g, length, x, o_k, SHIFT, K).to(tl.float32) * tl.exp2(b_e)
    return found


@jit
def prepare_back(
    raw, p_up, p_down, p_p, p_sums, b_q, b_b, b_dq, b_db, b_h, row, i_g, length, o_k, G, scale, inner,
    FAR: tl.constexpr, SHIFT: tl.constexpr, PREC: tl.constexpr, K: tl.constexpr, BT: tl.constexpr,
):
    """dq, db [BT, BK], self terms left out, and the log's gradient, of a decay over the key; and whether
    the logs are within what one reference a chunk can scale: if not, call it again with FAR. b_dq, b_db: S dy and G c,
    unscaled; p_p: P [t, s] = dy_t . c_s, inner: what it lacks of the scale; b_h [BK]: of paths through the whole chunk.
    The log's gradient is made of operands as products have them, rounded: a pair is the same number in what t reads and in
    what s gives, and cancels where s to t does not cross the log's token. Nothing comes through a decay below 2**-24: what
    precise operands leave there is rounding of the sums, which a steep gate makes large; bf16 rounds more elsewhere."""
    b_e = sums_up(p_up, row, i_g, length, o_k, G, 0, K, BT)
    near = tl.max(tl.max(tl.abs(b_e), 1), 0) <= 60.0
    to = b_e
    if SHIFT:
        to = sums_up(p_up, row, i_g, length, o_k, G, 1, K, BT)
    first, second = half_totals(p_up, row, i_g, length, o_k, G, K, BT)
    if FAR:
        to, down = tl.exp2(to), tl.exp2(sums_down(p_down, b_e, first, second, row, i_g, length, o_k, G, K, BT))
        b_p = inner_pairs(p_p, row, i_g, length, G, BT // 2, BT)
        b_r, b_w = operand(b_q * to, PREC), operand(b_b * down, PREC)
        x_dq = tl.where(late(BT), product(b_p, b_w, PREC), 0.0) * inner
        x_db = product(tl.trans(b_p), b_r, PREC) * inner
        b_dq = b_dq * scale * to * tl.where(late(BT), tl.exp2(first)[None, :], 1.0)
        b_dq += prepare_far_read(raw, p_p, row, i_g, length, o_k, G, 0, SHIFT, K, BT, to.shape[1]) * inner
        b_db *= down * tl.where(late(BT), 1.0, tl.exp2(second)[None, :])
        b_h += tl.sum(b_b * b_db, 0)
        b_db += prepare_far_write(raw, p_p, p_sums, row, i_g, length, o_k, G, SHIFT, K, BT, to.shape[1]) * inner
        b_read, b_fed = b_q * b_dq + b_r * x_dq, b_b * b_db + b_w * x_db
        b_dq, b_db = b_dq + to * x_dq, b_db + down * x_db
    else:
        whole, rest = meeting(first)
        to = tl.exp2(to + by_half(-whole, rest, BT))
        since = tl.exp2(by_half(whole, -rest, BT) - b_e)
        b_p = inner_pairs(p_p, row, i_g, length, G, 0, BT)
        b_r, b_w = operand(b_q * to, PREC), operand(b_b * since, PREC)
        b_db *= tl.exp2(first + second - whole)[None, :]
        b_h += tl.sum(b_w * b_db, 0)  # and of those that leave it, as b_fed has them
        b_dq = b_dq * (tl.exp2(whole) * scale)[None, :] + product(b_p, b_w, PREC) * inner
        b_db += product(tl.trans(b_p), b_r, PREC) * inner
        b_read, b_fed = b_r * b_dq, b_w * b_db
        b_dq, b_db = b_dq * to, b_db * since
    b_dlog = chosen(later(SHIFT, True, BT), b_read - b_fed, PREC) + b_h[None, :]
    if SHIFT:
        b_dlog -= b_fed
    if PREC != "bf16":
        b_e = sums_up(p_up, row, i_g, length, o_k, G, 0, K, BT) - sums_up(p_up, row, i_g, length, o_k, G, 1, K, BT)
        b_dlog = tl.where(b_e <= -24.0, 0.0, b_dlog)
    return b_dq, b_db, b_dlog, near


@jit
def inner_pairs(p_p, row, i_g, length, G, H: tl.constexpr, BT: tl.constexpr):
    """P [t, s] of a chunk for s < t; H: for s before and t from the middle on."""
    t, s = tl.arange(0, BT)[:, None], tl.arange(0, BT)[None, :]
    m = s < t
    if H:
        m = (s < H) & (t >= H)
    return tl.load(p_p + ((row + t) * G + i_g) * BT + s, mask=m & (t < length), other=0)


@jit(do_not_specialize=["T", "S", "SEG"])
def chunk_forward_kernel(
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r,
    p_qs, p_bs, p_pairs, p_total, p_vup, p_vdown, p_sums, p_start, p_zstates, p_out, p_y, p_final, p_states, p_cu, p_chunks,
    T, S, SEG, G, scale,
    DECAY: tl.constexpr, OVER_V: tl.constexpr, SHIFT: tl.constexpr, PREC: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NS: tl.constexpr,
):
    """The output and the last state. A program has a block of BV columns of one lane's state on chip, and walks over one
    of S segments of SEG tokens; p_start [N, S, G, K, V]. p_states: the states before each chunk are wanted, too; p_y: y
    before the readout. For DECAY 2 q and b are those of chunk_prepare_kernel."""
    raw = (p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r)
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v, i_s, i_g = pid % NV, pid // NV % S, pid // (NV * S) % G
    i_n = (pid // (NV * S * G)).to(tl.int64)
    bos, total, chunk = sequence(p_cu, p_chunks, i_n, T, BT)
    begin = bos + i_s.to(tl.int64) * SEG
    total = tl.minimum(total - i_s * SEG, SEG)
    chunk += i_s * (SEG // BT)
    o_k, o_v, o_t = tl.arange(0, BK), i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    b_s = tl.zeros([BK, BV], tl.float32)
    if p_start is not None:
        b_s = load_matrix(p_start, (i_n * S + i_s) * G + i_g, o_k, o_v, K, V).to(tl.float32)
    for i_t in tl.range(0, total, BT, num_stages=NS):
        row, length = begin + i_t, total - i_t
        at = (chunk + i_t // BT) * G + i_g
        if DECAY == 2:
            b_q = rows(p_qs + i_g * K, row, G * K, length, o_k, K, BT)  # [BT, BK]
            b_b = rows(p_bs + i_g * K, row, G * K, length, o_k, K, BT)  # [BT, BK]
        else:
            b_q = load_q(raw, row, i_g, length, o_k, SHIFT, K, BT)
            b_b = load_b(raw, row, i_g, length, o_k, K, BT)
        b_c = load_c(raw, row, i_g, length, o_v, V, BT)  # [BT, BV]
        before = operand(b_s, PREC)
        if p_states is not None:
            store_matrix(p_states, at, before, o_k, o_v, K, V)
        b_e, b_f, keep = 1.0, 1.0, 1.0  # [BT], [BT], of the state
        if DECAY == 2:
            b_a = rows(p_pairs + i_g * BT, row, G * BT, length, o_t, BT, BT)
            keep = tl.exp2(tl.load(p_total + at * K + o_k, mask=o_k < K, other=0))[:, None]  # [BK, 1]
        else:
            b_a = product(b_q, tl.trans(b_b), PREC)
            if DECAY == 1:
                w_t, f_t, w_s, f_s, w_e, f_e = number_sums(p_total, at, SHIFT, PREC, BT)
                b_a *= ratio(w_t, f_t, w_s, f_s, SHIFT, False, PREC, BT)
                b_e, b_f = up_to(w_t, f_t, PREC), between(w_e, f_e, w_s, f_s, PREC)
                keep = up_to(w_e, f_e, PREC)
            else:
                b_a = tl.where(later(SHIFT, False, BT), b_a, 0.0)
            if p_n is not None:
                b_n = numbers_n(raw, row, i_g, length, BT)
        b_y = product(b_q, before, PREC)
        if DECAY == 1:
            b_y *= b_e[:, None]
        if DECAY > 0:
            b_s *= keep
        b_u = b_c
        if p_n is not None:
            b_u = operand(b_c * b_n[:, None], PREC)
        gives = b_u
        if DECAY == 1:
            gives = b_u * b_f[:, None]
        if not OVER_V:
            b_y += product(b_a, b_u, PREC)
        b_s += product(tl.trans(b_b), gives, PREC)
        b_y *= scale
        b_w = 0.0
        store_rows(p_out + i_g * V, b_y, row, G * V, length, o_v, V, BT)
    if p_final is not None:
        store_matrix(p_final, i_n * G + i_g, b_s, o_k, o_v, K, V)


@jit(do_not_specialize=["T", "S", "SEG"])
def chunk_states_kernel(
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r,
    p_qs, p_bs, p_total, p_vup, p_vdown, p_sums, p_do, p_seen, p_dys, p_vtotal, p_start, p_end, p_decay, p_vdecay,
    p_states, p_cu, p_chunks, T, S, SEG, G, scale,
    BACK: tl.constexpr, DECAY: tl.constexpr, OVER_V: tl.constexpr, SHIFT: tl.constexpr, PREC: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NS: tl.constexpr,
):
    """States before each chunk, from (x, z) = (b, c); BACK: costates behind each chunk, from (q, dy), last chunk first.
    A program has a block [BK, BV] and walks over one of S segments; p_start, p_end [N, S, G, K, V]: what it starts from
    and ends with, p_decay [N, S, G, K or 1] the log of what is left of the start."""
    raw = (p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r)
    NK: tl.constexpr = (K + BK - 1) // BK
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v, i_k, i_s, i_g = pid % NV, pid // NV % NK, pid // (NV * NK) % S, pid // (NV * NK * S) % G
    i_n = (pid // (NV * NK * S * G)).to(tl.int64)
    bos, total, chunk = sequence(p_cu, p_chunks, i_n, T, BT)
    begin = bos + i_s.to(tl.int64) * SEG
    total = tl.minimum(total - i_s * SEG, SEG)
    chunk += i_s * (SEG // BT)
    o_k, o_v = i_k * BK + tl.arange(0, BK), i_v * BV + tl.arange(0, BV)
    b_left = tl.zeros([BK if DECAY == 2 else 1], tl.float32)  # log of what is left of the start
    b_s = tl.zeros([BK, BV], tl.float32)
    place = (i_n * S + i_s) * G + i_g
    if p_start is not None:
        b_s = load_matrix(p_start, place, o_k, o_v, K, V).to(tl.float32)
    count = tl.cdiv(total, BT)
    for i in tl.range(0, count, num_stages=NS):
        i_c = count - 1 - i if BACK else i
        row, length = begin + i_c * BT, total - i_c * BT
        at = (chunk + i_c) * G + i_g
        if p_states is not None:
            store_matrix(p_states, at, b_s, o_k, o_v, K, V)
        if BACK:
            if DECAY == 2:
                b_x = rows(p_qs + i_g * K, row, G * K, length, o_k, K, BT)  # [BT, BK]
            else:
                b_x = load_q(raw, row, i_g, length, o_k, SHIFT, K, BT)
            b_dy = back_out(raw, p_do, p_seen, p_sums, row, i_g, length, o_v, G, V, BT)
            b_z_in = b_dy * scale  # [BT, BV]
        else:
            if DECAY == 2:
                b_x = rows(p_bs + i_g * K, row, G * K, length, o_k, K, BT)
            else:
                b_x = load_b(raw, row, i_g, length, o_k, K, BT)
            b_z_in = load_c(raw, row, i_g, length, o_v, V, BT)
        w = tl.full([BT], 1.0, tl.float32)
        if DECAY == 2:
            keep = tl.load(p_total + at * K + o_k, mask=o_k < K, other=0)
            b_left += keep
            b_s *= tl.exp2(keep)[:, None]
        elif DECAY == 1:
            w_t, f_t, w_s, f_s, w_e, f_e = number_sums(p_total, at, SHIFT, PREC, BT)
            if BACK:
                w = up_to(w_t, f_t, PREC)
            else:
                w = between(w_e, f_e, w_s, f_s, PREC)
            b_left += w_e + f_e
            b_s *= up_to(w_e, f_e, PREC)
        if DECAY < 2:
            if p_n is not None:
                if not BACK:
                    w *= numbers_n(raw, row, i_g, length, BT)
                b_z_in = b_z_in * w[:, None]
            elif DECAY == 1:
                b_z_in = b_z_in * w[:, None]
        b_s += product(tl.trans(b_x), b_z_in, PREC)
    if p_end is not None:
        store_matrix(p_end, place, b_s, o_k, o_v, K, V)
    if p_decay is not None:
        if DECAY == 2:
            tl.store(p_decay + place * K + o_k, b_left, mask=(o_k < K) & (i_v == 0))
        else:
            tl.store(p_decay + place + tl.arange(0, 1), b_left, mask=tl.arange(0, 1) + i_v + i_k == 0)


@jit(do_not_specialize=["S"])
def chunk_join_kernel(
    p_first, p_end, p_decay, p_vdecay, p_start, p_last, S, G,
    BACK: tl.constexpr, DECAY: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BE: tl.constexpr,
):
    """What each segment starts from, p_start [N, S, G, K, V], and the last end, p_last [N, G, K, V]; p_first likewise
    is where the sequence starts. One program: BE numbers of one lane's matrix."""
    NE: tl.constexpr = (K * V + BE - 1) // BE
    pid = tl.program_id(0)
    o_e = pid % NE * BE + tl.arange(0, BE)
    m = o_e < K * V
    i_g, i_n = pid // NE % G, (pid // (NE * G)).to(tl.int64)
    b_s = tl.zeros([BE], tl.float32)
    if p_first is not None:
        b_s = tl.load(p_first + (i_n * G + i_g) * (K * V) + o_e, mask=m, other=0).to(tl.float32)
    for i in range(0, S):
        place = (i_n * S + (S - 1 - i if BACK else i)) * G + i_g
        tl.store(p_start + place * (K * V) + o_e, b_s, mask=m)
        if DECAY == 2:
            b_s *= tl.exp2(tl.load(p_decay + place * K + o_e // V, mask=m, other=0))
        elif DECAY == 1:
            b_s *= tl.exp2(tl.load(p_decay + place))
        if p_vdecay is not None:
            b_s *= tl.exp2(tl.load(p_vdecay + place * V + o_e % V, mask=m, other=0))
        b_s += tl.load(p_end + place * (K * V) + o_e, mask=m, other=0)
    tl.store(p_last + (i_n * G + i_g) * (K * V) + o_e, b_s, mask=m)


@jit(do_not_specialize=["T", "SHARE"])
def chunk_gradients_kernel(
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r,
    p_total, p_sums, p_do, p_seen, p_dw, p_dys, p_cs, p_vpairs, p_vtotal, p_states, p_costates, p_zstates,
    p_zcostates, p_dk0, p_dk1, p_dk2, p_dlog, p_dn,
    p_cu, p_chunks, p_owner, T, SHARE, G, scale,
    DECAY: tl.constexpr, OVER_V: tl.constexpr, SHIFT: tl.constexpr, PREC: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NS: tl.constexpr,
):
    """Gradients of all that q, b, n and the decay are made of, if that is none or a number a token. One chunk and block of K of one lane. With S the state before
    it and G the costate behind it, P[t, s] = dy_t . c_s, and E = 2**to, F = 2**after,
        dq = E (S dy) + (P R) b,   db = F (G c) + (P R)' q,   dn = rowsum(b db / n)
    p_dlog and p_dn [NK, B, T, G] get its share. The log's gradient at t is the sum over all paths that cross t: from before
    the chunk to behind it, 2**total S.G; from u < t to behind, b.F (G c); from before to u >= t, q.E (S dy); from s < t to
    u >= t, (A P R)[u, s] = what u gives to dq less what s gives to db."""
    raw = (p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r)
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_k, i_g, i_c = pid % NK, pid // NK % G, (pid // (NK * G)).to(tl.int64)
    row, length = chunk_at(p_cu, p_chunks, p_owner, i_c, T, BT)
    if length <= 0:
        return
    at = i_c * G + i_g
    o_k, o_t = i_k * BK + tl.arange(0, BK), tl.arange(0, BT)
    share = (i_k * SHARE + row + o_t) * G + i_g
    b_p = tl.zeros([BT, BT], tl.float32)  # [t, s]
    b_pt = tl.zeros([BT, BT], tl.float32)  # [s, t], as `pairs_across` says
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_db = tl.zeros([BT, BK], tl.float32)
    b_h = tl.zeros([BK], tl.float32)  # rowsum(G * S)
    for i_v in tl.range(0, V, BV, num_stages=NS):
        o_v = i_v + tl.arange(0, BV)
        b_c = load_c(raw, row, i_g, length, o_v, V, BT)  # [BT, BV]
        b_dy = back_out(raw, p_do, p_seen, p_sums, row, i_g, length, o_v, G, V, BT)
        b_s = load_matrix(p_states, at, o_k, o_v, K, V)  # [BK, BV]
        b_m = load_matrix(p_costates, at, o_k, o_v, K, V)
        keep = 1.0
        if not OVER_V:
            b_p += product(b_dy, tl.trans(b_c), PREC)
            b_pt += product(b_c, tl.trans(b_dy), PREC)
        b_dq += product(b_dy, tl.trans(b_s), PREC)
        b_db += product(b_c, tl.trans(b_m), PREC)
        if p_dlog is not None:
            b_h += tl.sum(b_s.to(tl.float32) * b_m.to(tl.float32) * keep, 1)
    b_q = load_q(raw, row, i_g, length, o_k, SHIFT, K, BT)
    b_b = load_b(raw, row, i_g, length, o_k, K, BT)
    b_dq *= scale
    b_dlog = b_dq
    if DECAY == 1:
        w_t, f_t, w_s, f_s, w_e, f_e = number_sums(p_total, at, SHIFT, PREC, BT)
        b_dq *= up_to(w_t, f_t, PREC)[:, None]
        b_db *= between(w_e, f_e, w_s, f_s, PREC)[:, None]
        b_p *= ratio(w_t, f_t, w_s, f_s, SHIFT, False, PREC, BT)
        b_pt *= ratio(w_t, f_t, w_s, f_s, SHIFT, True, PREC, BT)
    else:
        b_p = tl.where(later(SHIFT, False, BT), b_p, 0.0)
        b_pt = tl.where(later(SHIFT, True, BT), b_pt, 0.0)
    b_n = numbers_n(raw, row, i_g, length, BT)
    own = tl.zeros([BT], tl.float32)
    if (p_dlog is not None) and (SHIFT == 0):
        # A token's pair with itself has no decay: it is left out, so that its rounding does not enter the log's gradient.
        same = o_t[:, None] == o_t[None, :]
        own = tl.sum(tl.where(same, b_p, 0.0), 1) * scale
        b_p, b_pt = tl.where(same, 0.0, b_p), tl.where(same, 0.0, b_pt)
    if p_n is not None:
        if p_dn is not None:
            fed_n = b_db + product(b_pt, b_q, PREC) * scale + own[:, None] * b_q
            tl.store(p_dn + share, tl.sum(b_b * fed_n, 1), mask=o_t < length)
        b_p *= b_n[None, :]
        b_pt *= b_n[:, None]  # in both, before they are rounded: a pair is the same number in what follows
        b_db *= b_n[:, None]
    x_dq, x_db = product(b_p, b_b, PREC) * scale, product(b_pt, b_q, PREC) * scale
    if p_dlog is not None:
        # Where s to u does not cross t, it is in what u reads and in what s gives: it cancels.
        read, fed = tl.sum(b_q * b_dq, 1), tl.sum(b_b * b_db, 1)
        inner = tl.sum(b_q * x_dq, 1) - tl.sum(b_b * x_db, 1)
        b_d = tl.cumsum(fed, 0) - fed + tl.cumsum(read + inner, 0, reverse=True)
        if SHIFT:
            b_d -= read + tl.sum(b_q * x_dq, 1)
        b_d += up_to(w_e, f_e, PREC) * tl.sum(b_h, 0)
        if PREC != "bf16":  # nothing comes through a decay below 2**-24: see the decays over the key
            w_b, f_b, w_s, f_s, w_e, f_e = number_sums(p_total, at, 1, PREC, BT)
            b_d = tl.where((w_s - w_b) + (f_s - f_b) <= -24.0, 0.0, b_d)
        b_d = tl.where(code_of(p_code, row, length, BT) == 1, b_d, 0.0)
        tl.store(p_dlog + share, b_d, mask=o_t < length)
    b_dq += x_dq + (own * b_n)[:, None] * b_b
    b_db += x_db + (own * b_n)[:, None] * b_q
    store_keys(raw, p_dk0, p_dk1, p_dk2, b_dq, b_db, b_dlog, row, i_c, i_g, length, o_k, G, SHIFT, K, BT)


@jit(do_not_specialize=["T"])
def chunk_pairs_kernel(
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r,
    p_sums, p_do, p_seen, p_dw, p_p, p_cu, p_chunks, p_owner, T, G, scale,
    PREC: tl.constexpr, V: tl.constexpr, BT: tl.constexpr, BV: tl.constexpr,
):
    """For a decay over the key P [t, s] = scale dy_t . c_s of one chunk and lane: read back, also transposed, as operands."""
    raw = (p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r)
    pid = tl.program_id(0)
    i_g, i_c = pid % G, (pid // G).to(tl.int64)
    row, length = chunk_at(p_cu, p_chunks, p_owner, i_c, T, BT)
    if length <= 0:
        return
    b_p = tl.zeros([BT, BT], tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=1):
        o_v = i_v + tl.arange(0, BV)
        b_dy = back_out(raw, p_do, p_seen, p_sums, row, i_g, length, o_v, G, V, BT)
        b_p += product(b_dy, tl.trans(load_c(raw, row, i_g, length, o_v, V, BT)), PREC)
    store_rows(p_p + i_g * BT, b_p * scale, row, G * BT, length, tl.arange(0, BT), BT, BT)


@jit(do_not_specialize=["T"])
def chunk_key_kernel(
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r,
    p_up, p_down, p_total, p_sums, p_do, p_seen, p_dw, p_dys, p_cs, p_p, p_vtotal, p_states, p_costates, p_zstates,
    p_zcostates, p_near, p_dk0, p_dk1, p_dk2, p_cu, p_chunks, p_owner, T, G, scale,
    OVER_V: tl.constexpr, SHIFT: tl.constexpr, PREC: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BT: tl.constexpr,
    BK: tl.constexpr, BV: tl.constexpr, NS: tl.constexpr, FAR: tl.constexpr,
):
    """chunk_gradients_kernel for a decay over the key, of one chunk, lane and block of K. Launched twice: FAR does again what
    the first found to be too far apart for it (p_near [chunks, G, NK]), in registers that the first does not spend."""
    raw = (p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r)
    NK: tl.constexpr = (K + BK - 1) // BK
    pid = tl.program_id(0)
    i_k, i_g, i_c = pid % NK, pid // NK % G, (pid // (NK * G)).to(tl.int64)
    row, length = chunk_at(p_cu, p_chunks, p_owner, i_c, T, BT)
    if length <= 0:
        return
    at, o_k, o_t = i_c * G + i_g, i_k * BK + tl.arange(0, BK), tl.arange(0, BT)
    if FAR:
        if tl.load(p_near + at * NK + i_k) != 0:
            return
    b_dq = tl.zeros([BT, BK], tl.float32)
    b_db = tl.zeros([BT, BK], tl.float32)
    b_h = tl.zeros([BK], tl.float32)  # rowsum(G * S)
    for i_v in tl.range(0, V, BV, num_stages=NS):
        o_v = i_v + tl.arange(0, BV)
        b_s = load_matrix(p_states, at, o_k, o_v, K, V)  # [BK, BV]
        b_m = load_matrix(p_costates, at, o_k, o_v, K, V)
        keep = 1.0
        b_dy = back_out(raw, p_do, p_seen, p_sums, row, i_g, length, o_v, G, V, BT)
        b_c = load_c(raw, row, i_g, length, o_v, V, BT)
        b_dq += product(b_dy, tl.trans(b_s), PREC)
        b_db += product(b_c, tl.trans(b_m), PREC)
        b_h += tl.sum(b_s.to(tl.float32) * b_m.to(tl.float32) * keep, 1)
    b_h *= tl.exp2(tl.load(p_total + at * K + o_k, mask=o_k < K, other=0))
    b_q = load_q(raw, row, i_g, length, o_k, SHIFT, K, BT)
    b_b = load_b(raw, row, i_g, length, o_k, K, BT)
    inner = 1.0
    b_dq, b_db, b_dlog, near = prepare_back(raw, p_up, p_down, p_p, p_sums, b_q, b_b, b_dq, b_db, b_h, row, i_g, length, o_k, G,
                                            scale, inner, FAR, SHIFT, PREC, K, BT)
    if not FAR:
        tl.store(p_near + at * NK + i_k, near.to(tl.int8))
    if SHIFT == 0:
        own = tl.load(p_p + ((row + o_t) * G + i_g) * BT + o_t, mask=o_t < length, other=0).to(tl.float32)[:, None] * inner
        b_dq += own * b_b
        b_db += own * b_q
    store_keys(raw, p_dk0, p_dk1, p_dk2, b_dq, b_db, b_dlog, row, i_c, i_g, length, o_k, G, SHIFT, K, BT)


@jit(do_not_specialize=["T"])
def chunk_values_kernel(
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r,
    p_qs, p_bs, p_pairs, p_total, p_vup, p_vdown, p_vtotal, p_sums, p_do, p_seen, p_states, p_costates, p_dc,
    p_near, p_cu, p_chunks, p_owner, T, G, scale,
    DECAY: tl.constexpr, OVER_V: tl.constexpr, SHIFT: tl.constexpr, PREC: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    BT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr, NS: tl.constexpr, FAR: tl.constexpr,
):
    """Gradients of c and of what the readout reads over the value, of one chunk, lane and block of V. With F = 2**after,
        dc = G' (F b) + A' dy
    """
    raw = (p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r)
    NV: tl.constexpr = (V + BV - 1) // BV
    pid = tl.program_id(0)
    i_v, i_g, i_c = pid % NV, pid // NV % G, (pid // (NV * G)).to(tl.int64)
    row, length = chunk_at(p_cu, p_chunks, p_owner, i_c, T, BT)
    if length <= 0:
        return
    at = i_c * G + i_g
    o_v, o_t = i_v * BV + tl.arange(0, BV), tl.arange(0, BT)
    b_dc = tl.zeros([BT, BV], tl.float32)
    b_at = tl.zeros([BT, BT], tl.float32)  # [s, t], as `pairs_across` says
    for i_k in tl.range(0, K, BK, num_stages=NS):
        o_k = i_k + tl.arange(0, BK)
        if DECAY == 2:
            b_b = rows(p_bs + i_g * K, row, G * K, length, o_k, K, BT)  # [BT, BK]
        else:
            b_b = load_b(raw, row, i_g, length, o_k, K, BT)
        b_m = load_matrix(p_costates, at, o_k, o_v, K, V)  # [BK, BV]
        if (DECAY < 2) or OVER_V:
            if DECAY == 2:
                b_q = rows(p_qs + i_g * K, row, G * K, length, o_k, K, BT)
            else:
                b_q = load_q(raw, row, i_g, length, o_k, SHIFT, K, BT)
                if not OVER_V:
                    b_at += product(b_b, tl.trans(b_q), PREC)
        b_dc += product(b_b, b_m, PREC)
    if DECAY == 2:
        b_at = pairs_across(p_pairs, row, i_g, length, G, BT)
    else:
        b_n = numbers_n(raw, row, i_g, length, BT)
        if DECAY == 1:
            w_t, f_t, w_s, f_s, w_e, f_e = number_sums(p_total, at, SHIFT, PREC, BT)
            b_at *= ratio(w_t, f_t, w_s, f_s, SHIFT, True, PREC, BT)
            b_dc *= between(w_e, f_e, w_s, f_s, PREC)[:, None]
        else:
            b_at = tl.where(later(SHIFT, True, BT), b_at, 0.0)
        if p_n is not None:
            b_at *= b_n[:, None]
            b_dc *= b_n[:, None]
    b_at = operand(b_at * scale, PREC)
    b_dy = back_out(raw, p_do, p_seen, p_sums, row, i_g, length, o_v, G, V, BT)
    b_dlog = 0.0
    if not OVER_V:
        b_dc += product(b_at, b_dy, PREC)
    store_values(raw, p_dc, b_dy, b_dc, row, i_c, i_g, length, o_v, G, V, BT)


@jit
def chunk_step_kernel(
    p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r,
    p_s, p_z, p_out, p_slots, s_n, s_g, s_k, s_v, z_n, z_g, z_k, G, scale,
    DECAY: tl.constexpr, SHIFT: tl.constexpr, K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NB: tl.constexpr,
):
    """One token: a program reads NB blocks of BV columns of one lane's state once and writes them once, in the row that
    p_slots [B] names; with z, all columns. Floor: the state's bytes, twice."""
    raw = (p_k0, p_k1, p_k2, p_c, p_log, p_n, p_code, k0_t, k0_g, k0_r, k1_t, k1_g, k1_r, k2_t, k2_g, k2_r, c_t, c_g, c_r, l_t, l_g, l_r, n_t, n_g, n_r)
    NV: tl.constexpr = (V + BV * NB - 1) // (BV * NB)
    pid = tl.program_id(0)
    i_v, i_g, i_n = pid % NV, pid // NV % G, (pid // (NV * G)).to(tl.int64)
    slot = i_n
    if p_slots is not None:
        slot = tl.load(p_slots + i_n).to(tl.int64)
    o_k = tl.arange(0, BK)
    b_q = tl.sum(load_q(raw, i_n, i_g, 1, o_k, SHIFT, K, 1).to(tl.float32), 0)  # [BK]
    b_b = tl.sum(load_b(raw, i_n, i_g, 1, o_k, K, 1).to(tl.float32), 0)
    keep = tl.full([BK], 1.0, tl.float32)
    if DECAY == 1:
        keep *= tl.exp2(tl.load(p_log + i_g // l_r * l_g + i_n * l_t).to(tl.float32) * 1.4426950408889634)
    elif DECAY == 2:
        keep = tl.exp2(tl.sum(load_log(raw, i_n, i_g, 1, o_k, K, 1).to(tl.float32), 0) * 1.4426950408889634)
    if p_n is not None:
        b_b *= tl.load(p_n + i_g // n_r * n_g + i_n * n_t).to(tl.float32)
    b_w = 0.0
    for i in range(NB):
        o_v = (i_v * NB + i) * BV + tl.arange(0, BV)
        m = (o_k < K)[:, None] & (o_v < V)[None, :]
        b_c = rows(p_c + i_g // c_r * c_g, i_n, c_t, 1, o_v, V, 1).to(tl.float32)  # [1, BV]
        at = p_s + slot * s_n + i_g * s_g + o_k[:, None] * s_k + o_v[None, :] * s_v
        b_s = tl.load(at, mask=m, other=0).to(tl.float32)  # [BK, BV]
        next_s = b_s
        next_s = next_s * keep[:, None] + b_b[:, None] * b_c
        tl.store(at, next_s, mask=m)
        b_y = tl.sum(b_q[:, None] * (b_s if SHIFT else next_s), 0)[None, :] * scale  # [1, BV]
        store_rows(p_out + i_g * V, b_y, i_n, G * V, 1, o_v, V, 1)


CHUNK_KERNELS = SimpleNamespace(
    sums=chunk_sums_kernel,
    forward=chunk_forward_kernel,
    states=chunk_states_kernel,
    join=chunk_join_kernel,
    gradients=chunk_gradients_kernel,
    values=chunk_values_kernel,
    step=chunk_step_kernel,
    logs=chunk_logs_kernel,
    prepare=chunk_prepare_kernel,
    key=chunk_key_kernel,
    pairs=chunk_pairs_kernel,
    interpreted=triton is not None and not isinstance(chunk_forward_kernel, triton.JITFunction),
    params=((False, False, False), ()),
    grads=((True, True, True), (), ()),
    operands=(0, 1),
    norm=False,
    scalars=(),
    lifted=(),
    width=0,
    seen='',
    tiles={
        "forward": {2: ((64, (64, 64, 64, 4, 2)), (128, (64, 64, 128, 4, 2)), (256, (32, 32, 256, 4, 2))), 4: ((64, (32, 64, 64, 4, 1)), (128, (32, 64, 128, 4, 1)), (256, (32, 32, 256, 4, 1)))},
        "states": {2: ((64, (64, 64, 64, 4, 2)), (128, (64, 64, 64, 4, 2)), (256, (32, 64, 64, 4, 2))), 4: ((64, (32, 64, 64, 4, 1)), (128, (32, 64, 64, 4, 1)), (256, (32, 64, 64, 4, 1)))},
        "gradients": {2: ((64, (64, 64, 64, 4, 1)), (128, (64, 64, 64, 4, 1)), (256, (32, 64, 64, 4, 1))), 4: ((64, (32, 32, 64, 4, 1)), (128, (32, 32, 64, 4, 1)), (256, (32, 32, 64, 4, 1)))},
        "prepare": {2: ((64, (64, 64, 64, 4, 1)), (128, (64, 64, 64, 4, 1)), (256, (32, 64, 64, 4, 1))), 4: ((64, (32, 64, 64, 4, 1)), (128, (32, 64, 64, 4, 1)), (256, (32, 64, 64, 4, 1)))},
        "key": {2: ((64, (64, 64, 64, 4, 1)), (128, (64, 64, 64, 4, 1)), (256, (32, 64, 64, 4, 1))), 4: ((64, (32, 32, 64, 4, 1)), (128, (32, 32, 64, 4, 1)), (256, (32, 32, 64, 4, 1)))},
        "values": {2: ((64, (64, 128, 64, 4, 1)), (128, (64, 128, 64, 4, 1)), (256, (32, 64, 64, 4, 1))), 4: ((64, (32, 64, 64, 4, 1)), (128, (32, 64, 64, 4, 1)), (256, (32, 64, 64, 4, 1)))},
    },
)


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
    if lazily:
        return Prepared({name: (slot, value) for name, slot, value in raw}, call), params
    return {name: _prepared(slot, value, call) for name, slot, value in raw}, params


class Prepared(Mapping[str, Tensor]):
    """Inputs by name, each in the dtype of computation from its first reading on, wherever that is: a reading without
    gradient leaves none out of later ones."""

    def __init__(self, raw: Mapping[str, tuple[Slot, Tensor]], call: Call) -> None:
        self._raw, self._call, self._made = raw, call, dict[str, Tensor]()
        self._grad = torch.is_grad_enabled()

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            with torch.set_grad_enabled(self._grad):
                self._made[name] = _prepared(*self._raw[name], self._call)
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._raw)

    def __len__(self) -> int:
        return len(self._raw)


class Tokens:
    """The same as attributes, as the functions of a spec read them."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        self._values = values

    def __getattr__(self, name: str) -> Tensor:
        return self._values[name]


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
    if hasattr(rules, "layers") and not whole and not transformed():
        layered: tuple[Values, Values] = rules.layered(spec, rules, call, x, p, initial, mask, reset, cu_seqlens)
        return layered
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


# --- Sequences cut into chunks of tokens, so that no chunk holds tokens of two: dense batches, and packed ones.


class Cut:
    """Time [B, T, ...] as chunks [B, chunks, L, ...] and back, without a look at what is on the device.

    A dense batch is padded at its end. Of N packed sequences each begins a chunk of its own, so that what a sequence
    gives does not depend on its neighbours; there are as many chunks as that may need, and some hold no token.

    tokens      [chunks, L] bool: where a token lies; None: everywhere but behind the end of a dense batch
    first, row  [chunks] bool, int64: a sequence begins here, and which; None for a dense batch
    """

    def __init__(self, length: int, size: int, cu_seqlens: Tensor | None) -> None:
        self.length, self.size = length, size
        self.tokens: Tensor | None = None
        self.first: Tensor | None = None
        self.row: Tensor | None = None
        if cu_seqlens is None:
            self.count = -(-length // size)
            return
        bounds = cu_seqlens.long()
        sequences = bounds.numel() - 1
        self.count = length // size + sequences
        begin, end = bounds[:-1], bounds[1:]
        self.nonempty = end > begin
        chunks = (end - begin + size - 1) // size
        behind = chunks.cumsum(0)
        ahead = behind - chunks
        here = torch.arange(self.count, device=bounds.device)
        self.row = torch.searchsorted(behind, here, right=True).clamp(max=sequences - 1)
        self.first = here == ahead[self.row]
        place = torch.arange(size, device=bounds.device)
        token = (begin[self.row] + (here - ahead[self.row]) * size)[:, None] + place
        self.tokens = token < end[self.row][:, None]
        self.source = token.clamp(0, max(length - 1, 0)).flatten()
        self.last = (behind - 1).clamp(0)
        time = torch.arange(length, device=bounds.device)
        of = (torch.searchsorted(bounds, time, right=True) - 1).clamp(0, sequences - 1)
        self.target = (ahead[of] * size + time - begin[of]).clamp(0, self.count * size - 1)

    def split(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, ...] to [B, chunks, L, ...]; `fill` where there is no token."""
        if self.tokens is not None:
            x = x.index_select(1, self.source).unflatten(1, (self.count, self.size))
            return torch.where(self.tokens.reshape(self.tokens.shape + (1,) * (x.dim() - 3)), x, fill)
        behind = self.count * self.size - self.length
        if behind:
            x = torch.cat([x, x.new_full((), fill).expand(x.shape[0], behind, *x.shape[2:])], 1)
        chunks: Tensor = x.unflatten(1, (self.count, self.size))
        return chunks

    def join(self, x: Tensor) -> Tensor:
        """[B, chunks, L, ...] to [B, T, ...]."""
        x = x.flatten(1, 2)
        return x[:, : self.length] if self.tokens is None else x.index_select(1, self.target)

    def ends(self, after: Tensor, start: Tensor) -> Tensor:
        """[N, ...]: of `after` [chunks, ...] the states behind packed sequences' last tokens; an empty one's start."""
        some = self.nonempty.reshape(-1, *(1 for _ in start.shape[1:]))
        return torch.where(some, after.index_select(0, self.last), start)


# --- Decays between the tokens of a chunk, by halving: products of steps alone, never a ratio of two.


class Step(NamedTuple):
    """Decays of single tokens, [..., width]; width 1 is one number for all. `log`: it holds their logs."""

    value: Tensor
    log: bool


def spans_of(step: Step) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Products of the steps [..., L, width] of a chunk, L a power of two: (halves, since, until, whole).

    halves [levels, ..., L, width]: in blocks of 2^(l+1) tokens, from the later half's start up to and with each of its
    tokens, and from behind each token of the earlier half to that half's end. since, until [..., L, width]: from the
    chunk's start, and to its end; whole [..., width]: of all its tokens.
    """
    halves, since, until, whole = _Spans.apply(step.value, step.log)  # type: ignore[no-untyped-call]
    return halves, since, until, whole


def before_token(since: Tensor) -> Tensor:
    """Products up to each token [..., L, width], without the token itself."""
    return torch.cat([torch.ones_like(since[..., :1, :]), since[..., :-1, :]], -2)


def pairs_by_halves(halves: Tensor, z: Tensor, rows: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """M of `kit_decay.pair_products`."""
    shifts = tuple(shift for _, shift in rows)
    return list(_Pairs.apply(halves, z, shifts, *(x for x, _ in rows)))  # type: ignore[no-untyped-call]


def apply_by_halves(m: Tensor, c: Tensor, halves: Tensor, shift: int) -> Tensor:
    """As `kit_decay.apply_pairs`."""
    each = m.unflatten(-1, c.shape[-3:-1]).unflatten(-3, (c.shape[-3], -1))
    own = own_token(each) @ c  # [..., L, a, V]
    total = torch.zeros_like(own) if shift else own
    for level, (early, late) in enumerate(_levels(halves)):
        fed = _scaled(_half(c, level, 0, -3), early)  # [..., blocks, b c, V]
        given = (corner_of(each, level) @ fed).unflatten(-2, (1 << level, -1))
        given = given * (before_token(late) if shift else late)[..., None, :]
        total = total + torch.stack([torch.zeros_like(given), given], -4).flatten(-5, -3)
    return total.flatten(-3, -2)


def products(step: Tensor, log: bool, halves: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(since, until, whole) of `spans_of`, or their logs; `halves`: where to put those of each level, if anywhere."""
    since, whole = step.clone(memory_format=torch.contiguous_format), step
    until = torch.zeros_like(since) if log else torch.ones_like(since)
    for level in range(since.shape[-2].bit_length() - 1):
        early, late = _half(until, level, 0), _half(since, level, 1)
        if halves:
            _half(halves[level], level, 0).copy_(early)
            _half(halves[level], level, 1).copy_(late)
        first, second = whole.unflatten(-2, (-1, 2)).unbind(-2)
        for part, more in ((late, first), (early, second)):
            part.add_(more[..., None, :]) if log else part.mul_(more[..., None, :])
        whole = first + second if log else first * second
    return since, until, whole.squeeze(-2)


def _levels(halves: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(earlier, later) of each level, [..., blocks, 2^l, width]."""
    return [(_half(x, level, 0), _half(x, level, 1)) for level, x in enumerate(halves.unbind(0))]


def by_token(m: Tensor, x: Tensor, z: Tensor) -> Tensor:
    """[..., L a, L c] as [..., L, a, L, c]."""
    each: Tensor = m.unflatten(-1, z.shape[-3:-1]).unflatten(-3, x.shape[-3:-1])
    return each


def _half(x: Tensor, level: int, late: int, axis: int = -2) -> Tensor:
    """The earlier or the later halves of all blocks, [..., blocks, 2^level, ...], of [..., L, ...]."""
    half: Tensor = x.unflatten(axis, (-1, 2, 1 << level)).select(axis - 1, late)
    return half


def corners(each: Tensor, level: int) -> Tensor:
    """Of [..., L, a, L, c] what joins a block's earlier tokens to its later ones, [..., blocks, 2^l, a, 2^l, c]."""
    halves = (-1, 2, 1 << level)
    corner: Tensor = each.unflatten(-2, halves).select(-3, 0).unflatten(-5, halves).select(-6, 1)
    return corner.diagonal(dim1=-6, dim2=-3).movedim(-1, -5)


def corner_of(each: Tensor, level: int) -> Tensor:
    """The same as matrices [..., blocks, 2^l a, 2^l c]."""
    return corners(each, level).flatten(-4, -3).flatten(-2)


def own_token(each: Tensor) -> Tensor:
    """Of [..., L, a, L, c] a token with itself, [..., L, a, c]."""
    return each.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


class _Spans(torch.autograd.Function):
    """Steps [..., L, width] to the parts of `Decay`. By hand for the sake of memory: what autograd would keep of the
    levels is what they give."""

    @staticmethod
    def forward(ctx: Any, step: Tensor, log: bool) -> tuple[Tensor, ...]:
        halves = step.new_empty((step.shape[-2].bit_length() - 1, *step.shape))
        since, until, whole = products(step, log, halves.unbind(0))
        if log:
            halves, since, until, whole = halves.exp_(), since.exp_(), until.exp_(), whole.exp()
        ctx.log = log
        ctx.save_for_backward(step, halves, since, until, whole)
        return halves, since, until, whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        step, halves, since, until, whole = (x.conj() for x in ctx.saved_tensors)
        d_halves, d_since, d_until, d_whole = grads
        if ctx.log:
            d_whole, d_since, d_until = d_whole * whole, d_since * since, d_until * until
        else:
            d_since, d_until = (x.clone(memory_format=torch.contiguous_format) for x in (d_since, d_until))
        d_whole = d_whole.unsqueeze(-2)
        for level in reversed(range(halves.shape[0])):
            first = second = whole  # of the halves of each block, not of logs
            if not ctx.log:
                first = _half(halves[level], level, 0)[..., 0, :] * _half(step, level, 0)[..., 0, :]
                second = _half(halves[level], level, 1)[..., -1, :]
            given, of = [], []
            for late, total, more in ((1, d_since, first), (0, d_until, second)):
                part, half, d_half = (_half(x, level, late) for x in (total, halves[level], d_halves[level]))
                if ctx.log:
                    of.append(part.sum(-2))
                    given.append(d_whole)
                    part.addcmul_(d_half, half)
                else:
                    of.append((part.clone() * half).sum(-2))
                    given.append(d_whole * (second if late else first))
                    part.mul_(more[..., None, :]).add_(d_half)
            d_whole = torch.stack([x + y for x, y in zip(given, of, strict=True)], -2).flatten(-3, -2)
        return d_since + d_whole, None


class _Pairs(torch.autograd.Function):
    """M of `pair_products` for a decay over the key, of halves, z and one x for each shift. By hand: nothing scaled is
    kept, and gradients add up in place."""

    @staticmethod
    def forward(ctx: Any, halves: Tensor, z: Tensor, shifts: tuple[int, ...], *rows: Tensor) -> tuple[Tensor, ...]:
        ctx.shifts = shifts
        ctx.save_for_backward(halves, z, *rows)
        found = [z.new_zeros((*x.shape[:-1], *z.shape[-3:-1])) for x in rows]  # [..., L, a, L, c]
        for m, x, shift in zip(found, rows, shifts, strict=True):
            if not shift:
                own_token(m).copy_((x[..., :, None, :] * z[..., None, :, :]).sum(-1))
        for level, (early, late) in enumerate(_levels(halves)):
            fed = _scaled(_half(z, level, 0, -3), early if level else None)
            for m, x, scale in zip(found, rows, _shifted(late, shifts), strict=True):
                corner = corners(m, level)
                corner.copy_((_scaled(_half(x, level, 1, -3), scale) @ fed.mT).view(corner.shape))
        return tuple(m.flatten(-4, -3).flatten(-2) for m in found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        halves, z, *rows = (x.conj() for x in ctx.saved_tensors)
        given = [by_token(g, x, z) for g, x in zip(grads, rows, strict=True)]
        d_halves, d_z = torch.empty_like(halves), torch.zeros_like(z)
        d_rows = []
        for g, x, shift in zip(given, rows, ctx.shifts, strict=True):
            own = own_token(g)[..., None]  # [..., L, a, c, 1]
            d_rows.append(torch.zeros_like(x) if shift else _summed(own * z[..., None, :, :], -2))
            if not shift:
                d_z.add_(_summed(own * x[..., :, None, :], -3))
        for level, (early, late) in enumerate(_levels(halves)):
            fed = _half(z, level, 0, -3)  # [..., blocks, b, c, K]
            scaled = _scaled(fed, early if level else None)
            d_fed: list[Tensor] = []
            d_late: list[Tensor] = []
            for d, g, x, scale, shift in zip(d_rows, given, rows, _shifted(late, ctx.shifts), ctx.shifts, strict=True):
                low, reads = corner_of(g, level), _half(x, level, 1, -3)
                back = (low @ scaled).view(reads.shape)
                _half(d, level, 1, -3).add_(back * scale[..., None, :])
                d_scale = _summed(back * reads, -2)
                d_late.append(torch.nn.functional.pad(d_scale[..., 1:, :], (0, 0, 0, 1)) if shift else d_scale)
                d_fed.append(low.mT @ _scaled(reads, scale))
            _half(d_halves[level], level, 1).copy_(_added(d_late))
            back = _added(d_fed).view(fed.shape)
            _half(d_halves[level], level, 0).copy_(_summed(back * fed, -2) if level else torch.zeros_like(early))
            _half(d_z, level, 0, -3).add_(back * early[..., None, :] if level else back)
        return d_halves, d_z, None, *d_rows


def _summed(x: Tensor, axis: int) -> Tensor:
    return x.squeeze(axis) if x.shape[axis] == 1 else x.sum(axis)


def _added(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else _added([parts[0] + parts[1], *parts[2:]])


def _shifted(late: Tensor, shifts: Sequence[int]) -> list[Tensor]:
    without = before_token(late) if any(shifts) else late
    return [without if shift else late for shift in shifts]


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    """[..., blocks, b, c, K] times [..., blocks, b, K or 1], as [..., blocks, b c, K]."""
    return (x if scale is None else x * scale[..., None, :]).flatten(-3, -2)


# --- Decays between the tokens of a chunk: of one number a token by running sums, of vectors by ratios or by halving.

MILD = exp(-12.0)  # a ratio of products that are no smaller has an error of at most 12 roundings


class Decay(NamedTuple):
    """Products of the steps of a chunk, as `kit_halves.spans_of` gives them; halves None: logs are known, and there are
    other ways. `inverse` is 1 / since within bounds, None where ratios of products are not taken, and `mild` [..., L]
    the tokens up to which all products are within them; None: all tokens."""

    step: Step
    since: Tensor
    until: Tensor
    whole: Tensor
    halves: Tensor | None
    inverse: Tensor | None
    mild: Tensor | None


def decay_of(step: Step, key: bool) -> Decay:
    """Steps [..., L, width], L a power of two; key: whether they are decays over the key."""
    x = step.value
    at_hand = x.device.type == "cpu" and type(x) is Tensor  # a fake tensor holds nothing that one could look at
    if not step.log or x.is_complex() or not (at_hand or (key and x.shape[-1] == 1)):  # complex numbers have no bounds
        halves, since, until, whole = spans_of(step)
        return Decay(step, since, until, whole, halves, None, None)
    since, until, whole, inverse = _Sums.apply(x)  # type: ignore[no-untyped-call]
    if not at_hand:
        return Decay(step, since, until, whole, None, None, None)
    seen, mild = since.detach(), None
    if seen.numel() and not (seen.min() >= MILD and seen.max() <= 1 / MILD):
        least, most = seen.amin(-1).cummin(-1).values, seen.amax(-1).cummax(-1).values
        mild = (least >= MILD) & (most <= 1 / MILD)
    return Decay(step, since, until, whole, None, inverse, mild)


def since_start(x: Tensor, decay: Decay | None, shift: int) -> Tensor:
    """Vectors that read, [..., L, a, K], with the decays since the chunk's start; shift as in `pair_products`."""
    if decay is None:
        return x
    return x * (before_token(decay.since) if shift else decay.since)[..., None, :]


def pair_products(
    rows: Sequence[tuple[Tensor, int]], scaled: Sequence[Tensor], z: Tensor, decay: Decay | None, same: Tensor | None
) -> list[Tensor]:
    """M[t a, s c] = Σ_k x[t, a, k] (decay from s to t)[k] z[s, c, k], 0 for s > t, [..., L a, L c], of each (x, shift).

    x [..., L, a, K], z [..., L, c, K]; scaled: each x as `since_start` gives it; shift 1: x reads the state before its
    token, so that s < t and t's own step is left out. same [..., L, L] bool: where a pair counts at all. Columns of one
    token stay together: where they cancel, as those of a delta rule do, sums over s c lose no digits.
    """
    if decay is not None and decay.inverse is not None:
        found = _near_pairs(rows, scaled, z, decay)
    else:
        found = _exact_pairs(rows, z, decay and decay.step, decay and decay.halves)
    if same is None:
        return found
    spread = same[..., :, None, :, None]
    return [
        torch.where(spread, by_token(m, x, z), 0.0).flatten(-4, -3).flatten(-2)
        for m, (x, _) in zip(found, rows, strict=True)
    ]


def apply_pairs(m: Tensor, c: Tensor, decay: Decay | None, shift: int) -> Tensor:
    """Σ_s M[t a, s c] (decay from s to t)[v] C[s, c, v], [..., L a, V], with a decay along the values.

    M as `pair_products` gives it, C [..., L, c, V].
    """
    if decay is None:
        return m @ c.flatten(-3, -2)
    if decay.inverse is None:
        assert decay.halves is not None
        return apply_by_halves(m, c, decay.halves, shift)
    near = m @ (c * decay.inverse[..., None, :]).flatten(-3, -2)
    near = since_start(near.unflatten(-2, (c.shape[-3], -1)), decay, shift).flatten(-3, -2)
    if decay.mild is None:
        return near
    far = _Far(decay.mild)
    exact = apply_by_halves(far.pick(m, 2), far.pick(c, 3), spans_of(far.step(decay))[0], shift)
    return far.join(near, exact)


def _lower(x: Tensor, z: Tensor, shift: int) -> Tensor:
    """[L a, L c] bool: where a pair counts, of x [..., L, a, K] and z [..., L, c, K]."""
    token = torch.arange(z.shape[-3], device=z.device)
    return (token - shift).repeat_interleave(x.shape[-2])[:, None] >= token.repeat_interleave(z.shape[-2])


def _exact_pairs(
    rows: Sequence[tuple[Tensor, int]], z: Tensor, step: Step | None, halves: Tensor | None
) -> list[Tensor]:
    """M by products of steps alone; halves None: they are yet to be found, if they are needed."""
    if step is not None and step.value.shape[-1] > 1:
        return pairs_by_halves(spans_of(step)[0] if halves is None else halves, z, rows)
    plain = [x.flatten(-3, -2) @ z.flatten(-3, -2).mT for x, _ in rows]
    if step is None:
        return [torch.where(_lower(x, z, shift), m, 0.0) for m, (x, shift) in zip(plain, rows, strict=True)]
    if halves is not None:
        one = torch.ones_like(step.value)[..., None]  # [..., L, 1, 1]
        ones = [(one.expand(*one.shape[:-2], x.shape[-2], 1), shift) for x, shift in rows]
        ratios = pairs_by_halves(halves, one.expand(*one.shape[:-2], z.shape[-2], 1), ones)
    else:
        token = torch.arange(z.shape[-3], device=z.device)
        after = torch.where(token[:, None] > token, step.value, 0.0).cumsum(-2).exp().tril()  # [..., L, L]
        both = after, torch.nn.functional.pad(after[..., :-1, :], (0, 0, 1, 0))
        ratios = [_columns(both[shift], x.shape[-2], z.shape[-2]) for x, shift in rows]
    return [m * ratio for m, ratio in zip(plain, ratios, strict=True)]


def _columns(ratio: Tensor, a: int, c: int) -> Tensor:
    """[..., L, L] as [..., L a, L c]."""
    if a == c == 1:
        return ratio
    whole = ratio[..., :, None, :, None].expand(*ratio.shape[:-1], a, ratio.shape[-1], c)
    return whole.flatten(-4, -3).flatten(-2)


def _near_pairs(rows: Sequence[tuple[Tensor, int]], scaled: Sequence[Tensor], z: Tensor, decay: Decay) -> list[Tensor]:
    """M by ratios where decays are mild."""
    assert decay.inverse is not None
    back = (z * decay.inverse[..., None, :]).flatten(-3, -2).mT
    found = [torch.where(_lower(x, z, shift), y.flatten(-3, -2) @ back, 0.0)
             for (x, shift), y in zip(rows, scaled, strict=True)]  # fmt: skip
    if decay.mild is None:
        return found
    far = _Far(decay.mild)
    exact = _exact_pairs([(far.pick(x, 3), shift) for x, shift in rows], far.pick(z, 3), far.step(decay), None)
    return [far.join(m, e) for m, e in zip(found, exact, strict=True)]


class _Far:
    """The chunks [..., L] some of whose tokens are not `mild`, as one axis; items None: all chunks."""

    def __init__(self, mild: Tensor) -> None:
        far = (~mild).any(-1).flatten()
        self.mild = mild
        self.items = None if bool(far.all()) else far.nonzero().squeeze(-1)

    def pick(self, x: Tensor, own: int) -> Tensor:
        """The chunks of x, which has `own` axes from the tokens on."""
        x = x.flatten(0, -own - 1)
        return x if self.items is None else x.index_select(0, self.items)

    def step(self, decay: Decay) -> Step:
        return Step(self.pick(decay.step.value, 2), decay.step.log)

    def join(self, near: Tensor, exact: Tensor) -> Tensor:
        """Rows [..., L a, width] of mild tokens, and the others of `exact`."""
        mild = self.mild.repeat_interleave(near.shape[-2] // self.mild.shape[-1], -1)[..., None]
        found = torch.where(self.pick(mild, 2), self.pick(near, 2), exact)
        if self.items is not None:
            found = near.flatten(0, -3).index_copy(0, self.items, found)
        return found.view_as(near)


class _Sums(torch.autograd.Function):
    """Logs of steps [..., L, width] to since, until, whole and the inverse of since. By hand, so that the sums of
    gradients are matrix products."""

    @staticmethod
    def forward(ctx: Any, log: Tensor) -> tuple[Tensor, ...]:
        since, until, whole = products(log, True, ())
        since, until, whole = since.exp_(), until.exp_(), whole.exp()
        inverse = since.clamp(MILD, 1 / MILD).reciprocal_()
        ctx.save_for_backward(since, until, whole, inverse)
        return since, until, whole, inverse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        since, until, whole, inverse = ctx.saved_tensors
        d_since, d_until, d_whole, d_inverse = grads
        # Beyond its bounds no row reads the inverse, and its gradient is 0.
        upto = torch.addcmul(d_since * since, d_inverse, inverse, value=-1)
        ones = torch.ones(2 * (since.shape[-2],), dtype=since.dtype, device=since.device)
        total: Tensor = ones.triu() @ upto + ones.tril(-1) @ (d_until * until) + (d_whole * whole)[..., None, :]
        return total


# --- States from chunk to chunk, and the triangular solve of a low-rank transition; both with a backward by hand.


def walk(
    keep: Tensor, adds: Tensor, carry: Tensor, start: Tensor, first: Tensor | None, row: Tensor | None
) -> tuple[Tensor, Tensor]:
    """S' = keep S + adds: the states before each chunk [B, n, G, K, V]; and that after the last one [1, B, G, K, V], or
    those after each where sequences end among them, [n, B, ...].

    keep [B, n, G, K, V or 1], adds [B, n, G, K, V], carry [B, G, K, V] before the first chunk. With first [n] bool and
    row [n] a sequence begins at some chunks, from a row of start [N, G, K, V].
    """
    enter = None if row is None else start.index_select(0, row)
    lead = (x.transpose(0, 1).flatten(1, 2) for x in (keep, adds))
    before, after = _Walk.apply(first, *lead, carry.flatten(0, 1), enter)  # type: ignore[no-untyped-call]
    return before.unflatten(1, carry.shape[:2]).transpose(0, 1), after.unflatten(1, carry.shape[:2])


def walk_low_rank(
    keep: Tensor, ends: Tensor, c: Tensor, work: Tensor, gain: Tensor, carry: Tensor, start: Tensor,
    first: Tensor | None, row: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """S' = keep S + endsᵀ [Y, C] with Y = work S + gain: what `walk` gives, and [Y, C] [B, n, G, L, columns, V].

    ends [B, n, G, L, columns, K], c [..., L, rest, V], work [..., L, rank, K], gain [..., L, rank, V].
    """
    enter = None if row is None else start.index_select(0, row)
    lead = (x.transpose(0, 1).flatten(1, 2) for x in (keep, ends, c, work, gain))
    found = _LowRank.apply(first, *lead, carry.flatten(0, 1), enter)  # type: ignore[no-untyped-call]
    before, after, whole = (x.unflatten(1, carry.shape[:2]) for x in found)
    return before.transpose(0, 1), after, whole.transpose(0, 1)


def solve(m: Tensor, hat: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
    """(I - M)⁻¹ times hat and fed, [..., L, rank, width] each. M [..., L rank, L rank] is 0 from its own token on, and
    what gradient it is given there means nothing.

    The inverse is put together from those of blocks: exact on correlated keys, where a product of powers would lose all
    digits.
    """
    work, gain = _Solve.apply(m, hat, fed)  # type: ignore[no-untyped-call]
    return work, gain


class _Walk(torch.autograd.Function):
    """`walk` over [n, lanes, ...]."""

    @staticmethod
    def forward(
        ctx: Any, first: Tensor | None, keep: Tensor, adds: Tensor, state: Tensor, enter: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        before, after, into = _room(adds, first)
        for n, out in enumerate(into):
            state = _entered(before, n, state, first, enter)
            state = torch.addcmul(adds[n], keep[n], state, out=out)
        ctx.save_for_backward(first, keep, before)
        return before, after

    @staticmethod
    def backward(ctx: Any, d_before: Tensor, d_after: Tensor) -> tuple[Tensor | None, ...]:
        first, keep, before = _saved(ctx)
        back = _Back(first, d_after)
        for n in reversed(range(len(before))):
            back.step(n, torch.addcmul(d_before[n], keep[n], back.state))
        d_adds, d_carry, d_enter = back.found()
        return None, _like_keep(d_adds, before, keep), d_adds, d_carry, d_enter


class _LowRank(torch.autograd.Function):
    """`walk_low_rank` over [n, lanes, ...]."""

    @staticmethod
    def forward(
        ctx: Any, first: Tensor | None, keep: Tensor, ends: Tensor, c: Tensor, work: Tensor, gain: Tensor,
        state: Tensor, enter: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        rank = work.shape[-2]
        before, after, into = _room(state.expand(len(c), *state.shape), first)
        whole = c.new_empty((*ends.shape[:-1], c.shape[-1]))
        whole[..., rank:, :] = c
        rows, given = ends.flatten(-3, -2), whole.flatten(-3, -2)
        left, right = work.flatten(-3, -2), gain.flatten(-3, -2)
        for n, out in enumerate(into):
            state = _entered(before, n, state, first, enter)
            if whole.shape[-2] == rank:
                torch.baddbmm(right[n], left[n], state, out=given[n])
            else:
                whole[n, :, :, :rank] = torch.baddbmm(right[n], left[n], state).view(gain.shape[1:])
            state = torch.mul(keep[n], state, out=out).baddbmm_(rows[n].mT, given[n])
        ctx.save_for_backward(first, keep, ends, work, before, whole)
        return before, after, whole

    @staticmethod
    def backward(ctx: Any, d_before: Tensor, d_after: Tensor, d_whole: Tensor) -> tuple[Tensor | None, ...]:
        first, keep, ends, work, before, whole = _saved(ctx)
        rows, left, rank = ends.flatten(-3, -2), work.flatten(-3, -2).mT, work.shape[-2]
        back, given = _Back(first, d_after), []
        for n in reversed(range(len(before))):
            given.append(torch.baddbmm(d_whole[n].flatten(-3, -2), rows[n], back.state))
            d_y = given[-1].unflatten(-2, ends.shape[-3:-1])[..., :rank, :].flatten(-3, -2)
            back.step(n, torch.baddbmm(torch.addcmul(d_before[n], keep[n], back.state), left[n], d_y))
        states, d_carry, d_enter = back.found()
        d_all = torch.stack(given[::-1]).unflatten(-2, ends.shape[-3:-1])
        d_y, d_c = torch.split(d_all, [rank, ends.shape[-2] - rank], -2)
        d_ends = (whole.flatten(-3, -2) @ states.mT).unflatten(-2, ends.shape[-3:-1])
        d_work = (d_y.flatten(-3, -2) @ before.mT).unflatten(-2, work.shape[-3:-1])
        return None, _like_keep(states, before, keep), d_ends, d_c, d_work, d_y, d_carry, d_enter


def _room(like: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Room for the states before and after [n, lanes, K, V]; where each chunk puts its own."""
    before = torch.empty(like.shape, dtype=like.dtype, device=like.device)
    after = torch.empty_like(before if first is not None else before[:1])
    return before, after, list(after) if first is not None else [*before[1:], after[0]]


def _entered(before: Tensor, n: int, state: Tensor, first: Tensor | None, enter: Tensor | None) -> Tensor:
    """The state before chunk n, which is put where it belongs."""
    if first is None or enter is None:
        return before[n].copy_(state) if n == 0 else state
    return before[n].copy_(torch.where(first[n], enter[n], state))


def _saved(ctx: Any) -> tuple[Any, ...]:
    return tuple(None if x is None else x.conj() for x in ctx.saved_tensors)


class _Back:
    """Gradients of states from the last chunk to the first; `state`: of that after the chunk."""

    def __init__(self, first: Tensor | None, d_after: Tensor) -> None:
        self.first, self.d_after, self.state = first, d_after, d_after[-1]
        self.after: list[Tensor] = []
        self.enter: list[Tensor] = []

    def step(self, n: int, before: Tensor) -> None:
        """before: of the state before chunk n."""
        self.after.append(self.state)
        if self.first is not None:
            self.enter.append(torch.where(self.first[n], before, 0.0))
            before = torch.where(self.first[n], 0.0, before)
        self.state = before + self.d_after[n - 1] if self.first is not None and n else before

    def found(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of the states after each chunk, of the carry, and of the states that enter."""
        return torch.stack(self.after[::-1]), self.state, torch.stack(self.enter[::-1]) if self.enter else None


def _like_keep(states: Tensor, before: Tensor, keep: Tensor) -> Tensor:
    return (states * before).sum_to_size(keep.shape)


class _Solve(torch.autograd.Function):
    """`solve`, whose inverse is kept."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, hat: Tensor, fed: Tensor) -> tuple[Tensor, Tensor]:
        inverse = _inverse(m, hat.shape[-2])
        work, gain = ((inverse @ x.flatten(-3, -2)).view(x.shape) for x in (hat, fed))
        ctx.save_for_backward(m, inverse, work, gain)
        return work, gain

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        m, inverse, work, gain = _saved(ctx)
        rows = [g.flatten(-3, -2) for g in grads]
        if torch.is_grad_enabled():  # of second derivatives: nothing knows how the inverse came about
            found = [torch.linalg.solve_triangular(-m.mT, g, upper=True, unitriangular=True) for g in rows]
        else:
            found = [inverse.mT @ g for g in rows]
        d_m = found[0] @ work.flatten(-3, -2).mT + found[1] @ gain.flatten(-3, -2).mT
        return d_m, *(x.view(y.shape) for x, y in zip(found, (work, gain), strict=True))


def _inverse(m: Tensor, rank: int) -> Tensor:
    """(I - M)⁻¹ [..., L rank, L rank]: what joins a block's halves is the later inverse, times M, times the earlier."""
    each = m.unflatten(-1, (-1, rank)).unflatten(-3, (-1, rank))  # [..., L, rank, L, rank]
    inverse = torch.zeros_like(each, memory_format=torch.contiguous_format)
    own_token(inverse).copy_(torch.eye(rank, dtype=m.dtype, device=m.device))
    for level in range(each.shape[-2].bit_length() - 1):
        blocks = inverse.unflatten(-2, (-1, 1 << level)).unflatten(-5, (-1, 1 << level))
        blocks = blocks.diagonal(dim1=-6, dim2=-3).movedim(-1, -5).flatten(-4, -3).flatten(-2)
        early, late = blocks.unflatten(-3, (-1, 2)).unbind(-3)
        out = corners(inverse, level)
        out.copy_((late @ (corner_of(each, level) @ early)).view(out.shape))
    return inverse.flatten(-4, -3).flatten(-2)


# --- Matrix states a chunk of tokens at a time, as batched matrix products.

CHUNK = {"cpu": 32, "cuda": 64}  # tokens: what a cache likes; as few launches as that allows

Rows = tuple[Tensor, ...]  # the columns of a factor, [B, T, G, width] each


class Factors(NamedTuple):
    """One layer's tokens, [B, T, G, width] each, over G lanes: decays over the key and over the value (None: 1), the
    columns of U (none with W there: U is -B), W, B, C, and the vectors that read the state after a token (q) and before
    it (p)."""

    key: Step | None
    value: Step | None
    u: Rows
    w: Rows
    b: Rows
    c: Rows
    q: Rows
    p: Rows

    def map(self, change: Callable[[Tensor, float], Any]) -> Factors:
        """`change` of every tensor and of what stands for no token there."""
        key, value = (s and Step(change(s.value, 0.0 if s.log else 1.0), s.log) for s in (self.key, self.value))
        u, w, b, c, q, p = (tuple(change(x, 0.0) for x in rows) for rows in self[2:])
        return Factors(key, value, u, w, b, c, q, p)


def chunk_scan(
    f: Factors,
    start: Tensor,
    valid: Tensor | None = None,
    reset: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    size: int | None = None,
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """(qᵀ S_t for each q, pᵀ S_{t-1} for each p, [B, T, G, V] each; the state after the last token as `start`).

    start          [B, G, K, V]; with cu_seqlens [N + 1] of N packed sequences (B is 1) [N, G, K, V]
    valid, reset   [B, T] bool: a token that does not count changes nothing; before a reset token the state is 0 again
    size           tokens a chunk, a power of two

    No token changes a bit of what earlier ones give.
    """
    batch, length, lanes, _ = f.c[0].shape
    if length == 0:
        return [f.c[0] for _ in f.q], [f.c[0] for _ in f.p], start
    kind = "cpu" if start.device.type == "cpu" else "cuda"
    cut = Cut(length, size or _size(length, cu_seqlens, kind), cu_seqlens)
    if valid is not None:
        on = valid[..., None, None]
        f = f.map(lambda x, fill: torch.where(on, x, fill))
    f = f.map(cut.split)
    runs = None if reset is None else cut.split(reset, False)
    item = f.c[0].element_size() * batch * lanes
    per_chunk = item * cut.size * (cut.size + sum(x.shape[-1] for rows in f[2:] for x in rows))
    some = max(1, min(cut.count, SEGMENT_BYTES[kind] // max(per_chunk, 1)))
    kept = 4 * per_chunk * cut.count  # about that many tensors of each size are kept for backward
    recompute = kept > RECOMPUTE_BYTES[kind] and some < cut.count and torch.is_grad_enabled()
    carry = start if cut.row is None else torch.zeros_like(start[:1])
    found: list[list[Tensor]] = []
    after: list[Tensor] = []  # each chunk's, of packed sequences
    for piece, again, first, row in _few_chunks(f, runs, cut, some):
        args = (piece, again, carry, start, first, row)
        rows, states, carry = checkpoint(_run, *args, use_reentrant=False) if recompute else _run(*args)
        found.append(rows)
        after.append(states)
    joined = [cut.join(parts[0] if len(parts) == 1 else torch.cat(parts, 1)) for parts in zip(*found, strict=True)]
    final = carry if cut.row is None else cut.ends(torch.cat(after).flatten(0, 1), start)
    return joined[: len(f.q)], joined[len(f.q) :], final


def _size(length: int, cu_seqlens: Tensor | None, kind: str) -> int:
    """Tokens a chunk: not many more than a sequence has on average, since its last chunk may be next to empty."""
    mean = length if cu_seqlens is None else max(1, length // max(1, cu_seqlens.numel() - 1))
    return min(CHUNK[kind], 1 << (mean - 1).bit_length())


def _few_chunks(f: Factors, runs: Tensor | None, cut: Cut, some: int) -> Any:
    """Some chunks at a time: (factors, resets, first, row)."""
    if some >= cut.count:
        return [(f, runs, cut.first, cut.row)]
    split: list[Factors] = []
    columns: list[list[Any]] = []
    f.map(lambda x, _: columns.append(list(torch.split(x, some, 1))))
    for n in range(len(columns[0])):
        parts = iter([c[n] for c in columns])
        split.append(f.map(lambda x, _, parts=parts: next(parts)))  # type: ignore[misc]
    none: Sequence[Any] = [None] * len(split)
    again = none if runs is None else torch.split(runs, some, 1)
    first, row = (none if x is None else torch.split(x, some) for x in (cut.first, cut.row))
    return zip(split, again, first, row, strict=True)


def _run(
    f: Factors, reset: Tensor | None, carry: Tensor, start: Tensor, first: Tensor | None, row: Tensor | None
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Some chunks [B, n, L, ...]: (what q and p read, [B, n, L, G, V] each; the states after each chunk where sequences
    end among them; the last of them). `carry` [B, G, K, V] comes before; with `first` and `row` a sequence begins at
    some chunks, from a row of `start`."""

    def side(*columns: Tensor) -> Tensor:
        """[B, n, G, L, columns, width]."""
        if len(columns) == 1:
            return columns[0].transpose(2, 3).contiguous().unsqueeze(-2)
        return torch.stack([x.transpose(2, 3) for x in columns], -2)

    key, value = (
        None if s is None else decay_of(Step(side(s.value).squeeze(-2), s.log), over_key)
        for s, over_key in zip(f[:2], (True, False), strict=True)
    )
    z, c, rank = side(*f.u, *f.b), side(*f.c), len(f.w)
    same = fresh = None
    if reset is not None:
        run = reset.to(torch.int32).cumsum(2)[:, :, None]  # [B, n, 1, L]
        same, fresh = run[..., :, None] == run[..., None, :], run == 0
    readers = {k: (side(*rows), shift) for k, rows, shift in (("w", f.w, 1), ("p", f.p, 1), ("q", f.q, 0)) if rows}
    scaled = [since_start(x, key, shift) for x, shift in readers.values()]
    pairs = dict(zip(readers, pair_products(list(readers.values()), scaled, z, key, same), strict=True))
    hats = {k: _kept(x, fresh) for k, x in zip(readers, scaled, strict=True)}  # [B, n, G, L, columns, K]
    last = None if same is None else same[..., -1, :]
    ends = _kept(z if key is None else z * key.until[..., None, :], last)  # z with the decays up to the chunk's end
    keep = torch.ones_like(c[..., -1, 0, :1]) if key is None else key.whole
    keep = _kept(keep, fresh if fresh is None else fresh[..., -1])[..., None]
    if rank and not f.u:
        work, gain = solve(-pairs.pop("w"), -hats.pop("w"), c)
        before, after, whole = walk_low_rank(keep, ends, c[..., :0, :], work, gain, carry, start, first, row)
    elif rank:
        each = pairs.pop("w").unflatten(-1, z.shape[-3:-1])
        own, others = (x.flatten(-2) for x in torch.split(each, [rank, z.shape[-2] - rank], -1))
        hat = hats.pop("w")
        fed = (others @ c.flatten(-3, -2)).unflatten(-2, hat.shape[-3:-1])
        before, after, whole = walk_low_rank(keep, ends, c, *solve(own, hat, fed), carry, start, first, row)
    else:
        gives = c if value is None else c * value.until[..., None, :]
        keep = keep if value is None else keep * value.whole[..., None, :]
        adds = ends.flatten(-3, -2).mT @ gives.flatten(-3, -2)
        before, after = walk(keep, adds, carry, start, first, row)
        whole = c
    found: dict[str, Sequence[Tensor]] = {}
    for k, hat in hats.items():
        o, shift = (hat.flatten(-3, -2) @ before).unflatten(-2, hat.shape[-3:-1]), readers[k][1]
        o = since_start(o, value, shift)
        o = o + apply_pairs(pairs[k], whole, value, shift).unflatten(-2, hat.shape[-3:-1])
        found[k] = [x.transpose(2, 3) for x in (o.unbind(-2) if o.shape[-2] > 1 else (o.squeeze(-2),))]
    return [*found.get("q", ()), *found.get("p", ())], after, after[-1]


def _kept(x: Tensor, where: Tensor | None) -> Tensor:
    return x if where is None else torch.where(where.reshape(where.shape + (1,) * (x.dim() - where.dim())), x, 0.0)


# --- Kernels that threads compile ahead of a first call: most of its time, the compiler needs no interpreter.

_THREADS = 8  # of one call


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


class Compiling:
    """Kernels whose first call on a GPU waits for the compiler; not in Triton's interpreter."""

    interpreted: bool

    def compiles(self, device: torch.device) -> bool:
        return device.type == "cuda" and not self.interpreted


@contextmanager
def compiling_ahead(device: torch.device) -> Iterator[None]:
    """Within, launches over tensors of the device "meta" are compiled by threads, for `device`."""
    _DRY.device, _DRY.room = device, threading.Semaphore(_THREADS)
    try:
        with torch.no_grad():
            yield
    finally:
        _DRY.device = _DRY.room = None


def _ghost(x: Tensor) -> Tensor:
    """Laid out like `x`, as far from a multiple of 16 bytes, and without memory."""
    offset = x.data_ptr() % 16 // x.element_size()
    span = 1 + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return torch.empty(offset + span, dtype=x.dtype, device="meta").as_strided(x.shape, x.stride(), offset)


_COUNTS: dict[torch.device, int] = {}


def _processors(device: torch.device) -> int:
    """The GPU's number of multiprocessors; of the one that a dry call is for."""
    if device.type == "meta" and _DRY.device is not None:
        device = _DRY.device
    if device not in _COUNTS:
        _COUNTS[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return _COUNTS[device]


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


# --- How a chunk kernel sees its tensors: rows and strides, and what a call's kernels share.


class Lanes(NamedTuple):
    """What a call's kernels share. `batch`, `tokens` as the rows lie; `sequences`, `chunks`: how many there may be;
    `cu`, `first`, `owner`: offsets, the first chunk of each sequence, and the sequence of each chunk (-1: none)."""

    batch: int
    tokens: int
    lanes: int
    key: int
    value: int
    sequences: int
    chunks: int
    cu: Tensor | None
    first: Tensor | None
    owner: Tensor | None


class ChunkCall(NamedTuple):
    """One call. keys: what q, b and a log over the key are made of, [B, T, G, K] each, or [1, 1, G, K] of a param; c
    [B, T, G, V]; values: what the readout and a log over the value read, likewise; numbers [B, T, G] for the readout;
    log, n [B, T, G]; start [N, G, K, V] and zstart [N, G, K] in fp32; scalars [B, T, G], or [1, 1, G] of a param: what
    kernels compute numbers, log and n of, which are left out then. A tensor may have fewer lanes, each for several of
    the G in turn.

    shape: B, T, G; shift, scale: y_t = scale qᵀ S_(t - shift); code [B, T] int8: bit 0 a token counts, bit 1 the state
    is new before it; cu: N + 1 offsets of sequences in a batch of 1; dtype: of the output; decay: 0 none, 1 a number a
    token, 2 over the key; over: over the value, too; layout: what all of this fixes, of kit_chunk_plan.
    """

    start: Tensor | None
    zstart: Tensor | None
    log: Tensor | None
    n: Tensor | None
    c: Tensor
    keys: tuple[Tensor | None, ...]
    values: tuple[Tensor | None, ...]
    numbers: tuple[Tensor | None, ...]
    shape: tuple[int, int, int]
    shift: int
    scale: float
    code: Tensor | None
    cu: Tensor | None
    dtype: torch.dtype
    decay: int
    over: bool
    scalars: tuple[Tensor, ...] = ()
    layout: Any = None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a gradient may be wanted of, in order."""
        return (*self[:5], *self.keys, *self.values, *self.numbers, *self.scalars)

    def of(self, tensors: Any) -> ChunkCall:
        """The same call over other `tensors`."""
        a, b, c = len(self.keys), len(self.values), len(self.numbers)
        rest = tuple(tensors[5:])
        return self._replace(
            start=tensors[0], zstart=tensors[1], log=tensors[2], n=tensors[3], c=tensors[4], keys=rest[:a],
            values=rest[a : a + b], numbers=rest[a + b : a + b + c], scalars=rest[a + b + c :],
        )  # fmt: skip

    @property
    def scaled(self) -> ChunkCall:
        """What is left to read where q and b lie scaled."""
        return self._replace(keys=(None,) * len(self.keys)) if self.decay == 2 else self

    @property
    def placed(self) -> tuple[Tensor | None, ...]:
        """The tensors with which all kernels begin."""
        return (*self.keys, self.c, *self.values, *self.numbers, self.log, self.n, self.code)

    @property
    def strides(self) -> tuple[int, ...]:
        """What follows them: strides of tokens and lanes, and lanes to one, of each but the code."""
        return self._strides(self.placed[:-1])

    @property
    def scalar_strides(self) -> tuple[int, ...]:
        """The same of the scalars."""
        return self._strides(self.scalars)

    def _strides(self, tensors: tuple[Tensor | None, ...]) -> tuple[int, ...]:
        found: list[int] = []
        for x in tensors:
            if x is None:
                found += (0, 0, 1)
            else:  # of a param, tokens lie on top of each other
                token = 0 if x.shape[:2] == (1, 1) else x.stride(1)
                found += (token, x.stride(2), self.shape[2] // x.shape[2])
        return tuple(found)


class Made(NamedTuple):
    """What is made ready of a call: of a decay over the key sums of logs within halves of chunks, up to each token and
    (for precise operands) behind it, [B, T, G, K]; the same over the value; q and b scaled; A [B, T, G, BT]; the logs
    of whole chunks [chunks, G, K], or the sums of those of a number a token, [chunks, G, 2, BT]."""

    up: Tensor | None = None
    down: Tensor | None = None
    vup: Tensor | None = None
    vdown: Tensor | None = None
    q: Tensor | None = None
    b: Tensor | None = None
    pairs: Tensor | None = None
    total: Tensor | None = None


class Kept(NamedTuple):
    """What a backward needs of its forward: what the kernels read of the readout, sums [B, T, G, width] that they
    handed on, and the states before each chunk and what was made ready, if they were kept."""

    seen: Tensor | None
    sums: Tensor | None
    states: Tensor | None
    zstates: Tensor | None
    made: Made | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return (*self[:4], *(self.made or Made()))

    @staticmethod
    def of(tensors: Any) -> Kept:
        """What `tensors` gave."""
        made = Made(*tensors[4:])
        seen, sums, states, zstates = tensors[:4]
        return Kept(seen, sums, states, zstates, made if any(x is not None for x in made) else None)


def _is_readable(at: int, x: Tensor) -> bool:
    """Whether the kernels read the tensor at this place as it lies: a start in fp32 and contiguous; of others rows
    (b, t) evenly spaced, vectors contiguous, and nothing of a chunk of tokens further than 32 bits reach (where an axis
    of lanes lies outside of time, it may be)."""
    if at < 2:
        return x.dtype == torch.float32 and x.is_contiguous()
    even = x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1)
    solid = x.dim() == 3 or x.stride(-1) == 1 or x.shape[-1] == 1
    return even and solid and _near((64, *x.shape[2:]), x.stride()[1:])


def _readable(at: int, x: Tensor | None) -> Tensor | None:
    """The tensor, or a copy that the kernels read as it lies."""
    if x is None or _is_readable(at, x):
        return x
    return (x.float() if at < 2 else x).contiguous()


def _near(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether 32 bits hold every offset. Kernels compute those of rows in 64 bits, and within a row in 32."""
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) < 2**31


def _folded(x: Tensor, like: Tensor) -> Tensor:
    """Gradients of all G lanes [B, T, G, ...] as those of the lanes that `like` has, in its dtype."""
    if x.shape[2] != like.shape[2]:
        x = x.unflatten(2, (like.shape[2], -1)).sum(3)
    return x.to(like.dtype)


def _block(n: int) -> int:
    """The least power of two that is not below n, and 16 at least."""
    return max(16, 1 << (n - 1).bit_length())


# --- One layer of a spec as calls of the chunk kernels: its factors as they lie, its readouts, its last states.

_STEP_VALUES = 64  # columns of a state that a program moves on at once
_STEP_EACH = 64  # numbers of them in a thread


def fused_call(
    call: Any, fused: Any, reads: tuple[Any, ...], starts: tuple[Tensor | None, Tensor | None], mask: Tensor | None,
    reset: Tensor | None, cu: Tensor | None,
) -> ChunkCall:  # fmt: skip
    """What the kernels of a fused layer are called with. reads: tokens, prefixes with and before them, params, sizes;
    starts: of S and z."""
    lanes = prod(call.lanes)
    tokens, at, before = reads[:3]
    given = fused.given(*reads)

    def placed(x: Tensor, own: tuple[int, ...]) -> Tensor:
        """[B, T, lanes of its own, *own]; a single lane axis may be shorter than the call's."""
        if len(call.lanes) == 1 and x.dim() == 3 + len(own):
            return x
        x = spread(x, x.dim() - len(own), call.lanes)
        whole: Tensor = x.expand(*call.leading, *call.lanes, *own).reshape(*call.leading, lanes, *own)
        return whole

    def found(name: str, kind: str, lag: int, width: int = 1) -> Tensor:
        """A tensor over the key or value (`width` 1) or a number a token (0)."""
        if kind == "param":
            x = call.params[name]
            own = x.shape[x.dim() - width :]
            x = spread(x, x.dim() - width, call.lanes)
            whole: Tensor = x.expand(*call.lanes, *own).reshape(1, 1, lanes, *own)
            return whole
        if kind in ("at", "before"):
            return placed(getattr(at if kind == "at" else before, name), ())
        x = given[name] if kind == "factor" else getattr(tokens, f"{name}_lag{lag}") if lag else call.inputs[name]
        x = x.to(call.dtype) if (kind == "factor" or lag) and width and not name.startswith("log") else x
        if kind == "factor" and not width:
            x = x.expand(*call.leading, *call.lanes)
        return placed(x, x.shape[x.dim() - width :])

    decay = fused.decay if reset is None else max(fused.decay, 1)
    code = None if mask is None and reset is None else token_code(mask, reset)
    return ChunkCall(
        *starts, None, None, found(*fused.c), tuple(found(*k) for k in fused.keys),
        tuple(found(*v) for v in fused.values), (None,) * fused.numbers, (*call.leading, lanes), fused.shift,
        fused.scale(call.n), code, cu, call.dtype, decay, fused.over,
        tuple(found(name, kind, lag, 0) for name, kind, lag in fused.scalars),
    )  # fmt: skip


def chunk_layer(
    kernels: Any, call: Any, layer: Any, sizes: list[int], widths: list[int], found: dict[str, Tensor],
    start: Tensor | None, mask: Tensor | None, reset: Tensor | None, cu: Tensor | None,
) -> tuple[list[list[Tensor]], list[Tensor]] | None:  # fmt: skip
    """The linear readouts of a layer, [B, T, G, V] of each component, and the components' last states [N, G, K, V];
    None: not for the kernels.

    sizes: outer and key; widths: of the components over the value; found: the factors that are not plain; start: [N, G,
    K, all widths]; mask, reset: [B, T] bool. Readouts of S and of prev.S, and columns of the injection, add up, and
    components share no column: one scan for each.
    """
    outer, key = tuple(sizes[:-1]), sizes[-1]
    f = LayerFactors(call, layer, outer, found, mask, reset)
    if not simple_layer(layer, f) or not all(kernels.takes(key, w, call.device) for w in widths):
        return None
    dtypes = [call.dtype if all(p[0] in layer.shown for p in r.parts) else torch.float32 for r in layer.reads]
    columns = [f.rows(f"b{k}") for k in range(layer.columns)]
    numbers = [f.number(k) for k in range(layer.columns)]
    log, log_value = f.log(), f.log_value()
    queries = [
        [(f.rows(n), s, f.scale(n)) for n, s in ((f"q{r}", 0), (f"p{r}", 1)) if n in f] for r in range(len(dtypes))
    ]
    outputs: list[list[Tensor]] = [[] for _ in queries]
    states = []
    starts = [None] * len(widths) if start is None else torch.split(start, widths, -1)
    for j, begin in enumerate(starts):
        values = [f.rows(f"c{k}_{j}" if j else f"c{k}", layer.vectors[j]) for k in range(layer.columns)]
        final: Tensor | None = None
        for r, query in enumerate(queries):
            total: Tensor | None = None
            for q, shift, scale in query:
                q = f.fresh(q) if shift else q
                ends = []
                for k, (b, c, n) in enumerate(zip(columns, values, numbers, strict=True)):
                    first = None if k else begin
                    y, end = kernels.scan(q, b, c, log, first, cu, shift, scale, dtypes[r], n, None, log_value)
                    total = y if total is None else total + y
                    ends.append(end)
                final = sum(ends[1:], ends[0]) if final is None else final
            assert total is not None
            outputs[r].append(total)
        assert final is not None
        states.append(final)
    return outputs, states


def chunk_steps(kernels: Any, states: list[Tensor]) -> bool:
    """Whether there is a kernel for one token of S [rows, G, K, V] and z [rows, G, K, 1]."""
    key, value = states[0].shape[2], states[0].shape[3]
    if not kernels.takes(key, value, states[0].device) or any(s.dtype != torch.float32 for s in states):
        return False
    return all(_near(s.shape[1:], s.stride()[1:]) for s in states)


def step_states(layer: Any, state: Any) -> list[Tensor] | None:
    """A layer's states as [rows, G, K, V]; None if they do not lie as they should."""
    found = []
    for name, order, vector in zip(layer.components, layer.orders, layer.vectors, strict=True):
        s = state[name]
        front = s.dim() - len(order)
        if not s.is_contiguous():
            return None
        s = s.permute(*range(front), *(front + k for k in order))
        s = s.unsqueeze(-1) if vector else s
        found.append(s.flatten(1, -3) if s.dim() > 3 else s.unsqueeze(1))
    return found


def chunk_step(kernels: Any, a: ChunkCall, states: list[Tensor], slots: Tensor | None) -> Tensor:
    """One token by kernel: the output [B, 1, G, V] as S [rows, G, K, V] and z [rows, G, K, 1] move on in place, in the
    rows that `slots` [B] names."""
    out = torch.empty(*a.shape, states[0].shape[3], dtype=a.dtype, device=a.c.device)
    launch, given = step_launch(kernels, kernels.readable(a), states, slots, out)
    launch(*given)
    return out


def step_launch(
    kernels: Any, a: ChunkCall, states: list[Tensor], slots: Tensor | None, out: Tensor | None = None
) -> tuple[Any, tuple[Any, ...]]:
    """The step kernel's launch, and the tensors that it takes."""
    (batch, _, lanes), key, value = a.shape, states[0].shape[2], states[0].shape[3]
    bk, bv = _block(key), min(_block(value), _STEP_VALUES)
    blocks = 1 if len(states) == 1 else -(-value // bv)  # one program moves a normaliser on, and reads it
    z = states[1] if len(states) > 1 else None
    out = torch.empty(0, dtype=a.dtype) if out is None else out
    found: tuple[Any, tuple[Any, ...]] = kernels.launcher(
        "step", a, batch * lanes * -(-value // (bv * blocks)), (states[0], z, out, slots, *a.scalars),
        (*a.scalar_strides, *states[0].stride(), *((0, 0, 0) if z is None else z.stride()[:3]), lanes, a.scale),
        (a.decay, a.shift, key, value, bk, bv, blocks), num_warps=min(max(bk * bv // (32 * _STEP_EACH), 1), 8),
    )  # fmt: skip
    return found


def simple_layer(layer: Any, f: LayerFactors) -> bool:
    """Whether the kernels know this kind of layer."""
    other = any(name in f for name in ("decay", "decay_key", "decay_value"))
    other |= "log_value" in f and True in layer.vectors  # a sum that C = 1 makes has no value to decay over
    if other or layer.rank or not layer.reads or any(r.extra for r in layer.reads):
        return False
    return all(f.call.leading) and f.call.compute == torch.float32


class LayerFactors:
    """A layer's factors as [B, T, G, width]: plain ones in their own dtype, others in that of the outputs."""

    def __init__(
        self, call: Any, layer: Any, outer: tuple[int, ...], found: dict[str, Tensor], mask: Tensor | None,
        reset: Tensor | None,
    ) -> None:  # fmt: skip
        self.call, self.outer, self.found, self.plain = call, outer, found, layer.plain
        self.scales = layer.scales(call.n)
        self.mask, self.reset = mask, reset
        self.shape = (*call.leading, prod(call.lanes) * prod(outer))

    def __contains__(self, name: str) -> bool:
        return name in self.found or name in self.plain

    def scale(self, name: str) -> float:
        return float(self.scales.get(name, 1.0))

    def rows(self, name: str, vector: bool = False) -> Tensor:
        """`vector`: without a width of its own, which is 1 then."""
        if name in self.plain:
            x = self.call.inputs[self.plain[name]]
            x = spread(x, x.dim() - len(self.outer) - (not vector), self.call.lanes)
        else:
            x = self.found[name]
            if name[0] not in "ln":
                x = x.to(self.call.dtype)
        own = () if vector else x.shape[-1:]
        x = x.expand(*self.call.leading, *self.call.lanes, *self.outer, *own).reshape(*self.shape, *own)
        x = x.unsqueeze(-1) if vector and name[0] not in "ln" else x
        return x if self.mask is None or name[0] in "ln" else torch.where(self.mask[..., None, None], x, 0.0)

    def number(self, k: int) -> Tensor | None:
        """What multiplies b of column k, [B, T, G]."""
        return self.rows(f"n{k}", True) if f"n{k}" in self else None

    def log(self) -> Tensor | None:
        """[B, T, G] or [B, T, G, K]; 0 at tokens that do not count, -inf before a restart."""
        name = next((n for n in ("log", "log_key") if n in self), None)
        log = None if name is None else self._counted(self.rows(name, name == "log"))
        if self.reset is not None:
            if log is None:
                log = torch.zeros((), device=self.call.device).expand(self.shape)
            log = torch.where(self._over(self.reset, log), -torch.inf, log)
        return log

    def log_value(self) -> Tensor | None:
        """[B, T, G, V], 0 at tokens that do not count; restarts are in the other log."""
        return self._counted(self.rows("log_value")) if "log_value" in self else None

    def _counted(self, log: Tensor) -> Tensor:
        return log if self.mask is None else torch.where(self._over(self.mask, log), log, 0.0)

    def fresh(self, p: Tensor) -> Tensor:
        """Queries of prev.S, which is nothing at a restart."""
        return p if self.reset is None else torch.where(self.reset[..., None, None], 0.0, p)

    @staticmethod
    def _over(flag: Tensor, like: Tensor) -> Tensor:
        return flag.reshape(flag.shape + (1,) * (like.dim() - flag.dim()))


# --- What the shape of a chunked call fixes, worked out once: blocks, the split of time, strides, launches.

_PRECISION = {torch.bfloat16: "bf16", torch.float16: "tf32", torch.float32: "tf32x3"}
_MOST_LAYOUTS = 256  # remembered


class Layout:
    """Of all calls over tensors of the same shapes, strides and dtypes: whether kernels read them as they lie, strides
    of what kernels begin with, blocks by kernel, launches by kernel and arguments, and the layout that has its numbers
    computed."""

    __slots__ = ("blocks", "launches", "lifted", "readable", "strides", "warm")

    def __init__(self, a: ChunkCall) -> None:
        self.readable = all(x is None or _is_readable(at, x) for at, x in enumerate(a.tensors))
        self.strides = {"all": a.strides, "scaled": a.scaled.strides, "scalars": a.scalar_strides, "none": ()}
        self.lifted: Layout | None = None
        self.warm = [False, False]  # whether kernels of calls without and with gradients have been asked for
        self.blocks: dict[Any, SimpleNamespace] = {}
        self.launches: dict[Any, Any] = {}


class ChunkPlans(Compiling):
    """Of one table of kernels. `processors` is the GPU's number of multiprocessors."""

    def __init__(self, table: Any) -> None:
        self.table = table
        self.interpreted: bool = table.interpreted
        self.processors: int | None = 1 if self.interpreted else None
        self._kernels: dict[str, Kernel] = {}
        self._layouts: dict[Any, Layout] = {}
        self._kinds = set[Any]()  # of calls, whose kernels are compiled
        self._tuned: Any = None

    def layout(self, a: ChunkCall) -> Layout:
        if self._tuned != (self.table.tiles, self.processors):
            self._tuned = self.table.tiles, self.processors
            self._layouts.clear()
        plain = a.shape, a.shift, a.scale, a.code is None, a.dtype, a.decay, a.over, a.c.device
        packed = a.cu if a.cu is None else (a.cu.shape, a.cu.dtype)
        key = (plain, packed, *[None if x is None else (x.shape, x.stride(), x.dtype) for x in a.tensors])
        found = self._layouts.get(key)
        if found is None:
            if len(self._layouts) >= _MOST_LAYOUTS:
                self._layouts.clear()
            found = self._layouts[key] = Layout(a)
        return found

    def run(self, *args: Any, **options: Any) -> None:
        """Launches a kernel."""
        launch, tensors = self.launcher(*args, **options)
        launch(*tensors)

    def near_then_far(
        self, name: str, a: ChunkCall, grid: int, before: tuple[Any, ...], behind: tuple[Any, ...],
        numbers: tuple[float, ...], constants: tuple[Any, ...], decays: bool = True, **options: int,
    ) -> None:  # fmt: skip
        """Launches a kernel, and if it has `decays` to scale by, once more, for those of its programs that found the
        decays beyond what one reference a chunk can scale: a way of its own, which would slow the usual one down.
        before, behind: the tensors on either side of what programs found."""
        near = torch.empty(grid, dtype=torch.int8, device=a.c.device) if decays else None
        for far in (False, True)[: 1 + decays]:
            self.run(name, a, grid, (*before, near, *behind), numbers, (*constants, far), **options)

    def launcher(
        self, name: str, a: ChunkCall, grid: int, tensors: tuple[Tensor | None, ...], numbers: tuple[float, ...],
        constants: tuple[Any, ...], own: str = "all", **options: int,
    ) -> tuple[Any, tuple[Tensor | None, ...]]:  # fmt: skip
        """A kernel's launch, and the tensors that it takes. own: which of the call's own tensors it begins with, their
        strides behind them: all; scaled, which leaves out those over the key; scalars, and the code; none."""
        layout = a.layout or self.layout(a)
        if own == "all":
            first = a.placed
        else:
            first = () if own == "none" else (*a.scalars, a.code) if own == "scalars" else a.scaled.placed
        given = (*first, *tensors)
        key = (name, own, numbers, constants, *[x is None for x in given])
        launch = layout.launches.get(key)
        if launch is None:
            kernel = self._kernels.get(name) or self._kernels.setdefault(name, Kernel(getattr(self.table, name)))
            strides = len(first), layout.strides[own]
            launch = kernel.launch(grid, numbers, constants, a.c.device, strides=strides, **options)
            layout.launches[key] = launch
        return launch, given

    def lifted(self, a: ChunkCall, plan: SimpleNamespace) -> tuple[ChunkCall, Tensor | None]:
        """The call with its numbers a token computed; for a decay of one a token the sums of its logs, [chunks, G, 2,
        BT]."""
        n, few = plan.lanes, {"dtype": torch.float32, "device": a.c.device}
        names = self.table.lifted
        if a.decay != 1 and not names:
            return a, None
        made = {x: torch.empty(a.shape, **few) for x in names if x != "log"}  # type: ignore[call-overload]
        total = None
        if a.decay == 1:
            total = torch.empty(n.chunks, n.lanes, 2, plan.bt, **few)  # type: ignore[call-overload]
        self.run(
            "sums", a, n.chunks * -(-n.lanes // plan.lane_block), (*made.values(), total, n.cu, n.first, n.owner),
            (n.tokens, n.lanes), (plan.precision, n.key, n.value, plan.bt, plan.lane_block),
            "scalars" if names else "all", num_warps=4,
        )  # fmt: skip
        if not names:
            return a, total
        layout = a.layout or self.layout(a)
        whole = a._replace(n=made.pop("n", None), numbers=tuple(made.values()), scalars=(), layout=layout.lifted)
        if layout.lifted is None:
            layout.lifted = self.layout(whole)
            whole = whole._replace(layout=layout.lifted)
        return whole, total

    def warm(self, a: ChunkCall, run: Callable[[ChunkCall], None]) -> None:
        """Has threads compile what `run` launches of the call, which it does over tensors without memory."""
        with compiling_ahead(a.c.device):
            code = None if a.code is None else _ghost(a.code)
            run(a.of([None if x is None else _ghost(x) for x in a.tensors])._replace(layout=None, code=code))

    def plan(self, kernel: str, a: ChunkCall, bt: int = 0) -> SimpleNamespace:
        """Blocks, warps and the split of time for one kernel of a call; `bt`: tokens a chunk, if set already."""
        blocks = (a.layout or self.layout(a)).blocks
        plan = blocks.get((kernel, bt))
        if plan is None:
            plan = blocks[kernel, bt] = self._blocks(kernel, a, bt)
        if a.cu is None:
            return plan
        lengths = (a.cu[1:] - a.cu[:-1] + plan.bt - 1) // plan.bt
        ends = lengths.cumsum(0)
        owner = torch.searchsorted(ends, torch.arange(plan.lanes.chunks, device=a.cu.device), right=True)
        owner = torch.where(owner < plan.lanes.sequences, owner, -1)
        lanes = plan.lanes._replace(cu=a.cu, first=ends - lengths, owner=owner)
        return SimpleNamespace(**{**vars(plan), "lanes": lanes})

    def _blocks(self, kernel: str, a: ChunkCall, bt: int) -> SimpleNamespace:
        (batch, tokens, lanes), cu = a.shape, a.cu
        key, value = next(k for k in a.keys if k is not None).shape[-1], a.c.shape[-1]
        dtype = a.c.dtype
        for k in self.table.operands:
            own = a.keys[k]
            dtype = dtype if own is None else torch.promote_types(dtype, own.dtype)
        bk = _block(key)
        sizes = self.table.tiles[kernel][2 if dtype == torch.bfloat16 else 4]
        tokens_of, bv, bks, warps, stages = next(tile for largest, tile in sizes if bk <= largest)
        bt = bt or tokens_of
        bv = min(bv, _block(value))
        sequences = batch if cu is None else cu.shape[0] - 1
        chunks = batch * -(-tokens // bt) if cu is None else -(-tokens // bt) + sequences
        wide = -(-value // bv) * (-(-key // bks) if kernel == "states" else 1)
        segments, segment = self._split(a.c, sequences * lanes * wide, tokens, bt)
        return SimpleNamespace(
            lanes=Lanes(batch, tokens, lanes, key, value, sequences, chunks, None, None, None), bt=bt,
            lane_block=min(16, 1 << (lanes - 1).bit_length()), bk=bk, bks=bks, bv=bv,
            warps=warps, stages=stages, segments=segments, segment=segment,
            precision=_PRECISION[dtype], operand=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32,
        )  # fmt: skip

    def _split(self, like: Tensor, programs: int, tokens: int, bt: int) -> tuple[int, int]:
        """(segments, tokens in each): a second reading pays where the GPU would stand idle otherwise. Two programs a
        processor run at once; one more than that would be a second wave of its own."""
        processors = self.processors or _processors(like.device)
        segments = 1
        if 0 < programs < processors:
            segments = min(2 * processors // programs, tokens // (8 * bt))
        if segments < 3:
            return 1, max(-(-tokens // bt), 1) * bt
        each = -(-tokens // (segments * bt)) * bt
        return -(-tokens // each), each


# --- What is made ready of a call before the chunk kernels walk: sums of logs, factors, pairs of a chunk's tokens.


def chunk_made(kernels: Any, a: ChunkCall, plan: SimpleNamespace, sums: Tensor | None, total: Tensor | None) -> Made:
    """total: sums of the logs of a decay of a number a token."""
    n = plan.lanes
    made = Made(total=total)
    if a.decay == 2:
        made = _made_side(kernels, "", a, plan, n.key, *_log_sums(kernels, "", a, plan, n.key), sums)
    return made


def chunk_made_value(kernels: Any, a: ChunkCall, plan: SimpleNamespace, made: Made, back: SimpleNamespace) -> Made:
    """For a decay over the value what is made of dy, c and P."""
    return Made()


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


# --- Calls of the chunk kernels: one matrix state per lane, its readout and its last state, with their gradients.


class ChunkKernels(ChunkPlans):
    """The kernels of the chunked plan. `table`: the kernels, what they fuse, and `tiles`, which the compiler wrote."""

    keeps = True  # states of a forward for its backward, where they are not more than its tensors

    def takes(self, key: int, value: int, device: torch.device) -> bool:
        """Whether there are kernels for this device and these sizes."""
        return self.runs_on(device) and 0 < key <= 256 and value > 0

    def runs_on(self, device: torch.device) -> bool:
        return device.type == "cuda" or self.interpreted

    layer, step, steps = chunk_layer, chunk_step, chunk_steps
    _prepared, _prepared_value = chunk_made, chunk_made_value

    def scan(
        self, q: Tensor, b: Tensor, c: Tensor, log: Tensor | None, start: Tensor | None, cu: Tensor | None = None,
        shift: int = 0, scale: float = 1.0, dtype: torch.dtype | None = None, number: Tensor | None = None,
        code: Tensor | None = None, log_value: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """y_t = scale q_tᵀ S_(t - shift) [B, T, G, V] in `dtype` (q's), and the last state [N, G, K, V] in fp32, by
        kernels that fuse nothing.

        q, b [B, T, G, K], c [B, T, G, V]; log: log of the decay, None, [B, T, G] or [B, T, G, K]; start [N, G, K, V] or
        None; cu: N + 1 offsets of sequences in a batch of 1; number: [B, T, G], multiplies b (log not over K);
        log_value: log of a decay over the value, [B, T, G, V]. Differentiable in q, b, c, both logs, start and number.
        """
        wide = log is not None and log.dim() == 4
        decay = 2 if wide else int(log is not None or code is not None)
        keys = (q, b, log if wide else None)
        values = (log_value,) * len(self.table.params[1])
        shape = (c.shape[0], c.shape[1], max(q.shape[2], b.shape[2], c.shape[2]))
        y, final, _ = self.call(
            ChunkCall(start, None, None if wide else log, number, c, keys, values, (), shape, shift, scale, code, cu,
                      dtype or q.dtype, decay, log_value is not None)
        )  # fmt: skip
        return y, final

    def call(self, a: ChunkCall) -> tuple[Tensor, Tensor, Tensor | None]:
        """The output [B, T, G, V], the last states [N, G, K, V] and [N, G, K] of z in fp32. Differentiable."""
        a = a if a.layout is not None else a._replace(layout=self.layout(a))
        wanted = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in a.tensors)
        if not a.layout.warm[wanted] and self.compiles(a.c.device):
            a.layout.warm[wanted] = True
            self._warm(a, wanted)
        if wanted:
            found = _ChunkScan.apply(self, a, *a.tensors)  # type: ignore[no-untyped-call]
            return found[0], found[1], found[2]
        return self.forward(self.readable(a))[:3]

    def _warm(self, a: ChunkCall, wanted: bool) -> None:
        """Compiles the kernels of a kind of call that is new, those of its backward, too, if one is `wanted`."""
        flags = tuple(x is not None and x.requires_grad and wanted for x in a.tensors)
        sizes = a.c.shape[-1], *[k.shape[-1] for k in a.keys if k is not None]
        dtypes = [None if x is None else x.dtype for x in a.tensors]
        kind = (flags, sizes, a.decay, a.over, a.dtype, a.code is None, a.cu is None, *dtypes)
        if kind in self._kinds:
            return
        self._kinds.add(kind)

        def run(a: ChunkCall) -> None:
            a = self.readable(a)
            out, _, _, kept = self.forward(a, wanted)
            if wanted:
                self.backward(a, kept, torch.empty_like(out), None, None, flags)

        self.warm(a, run)

    def readable(self, a: ChunkCall) -> ChunkCall:
        """The call over tensors that kernels read as they lie."""
        a = a if a.layout is not None else a._replace(layout=self.layout(a))
        if a.layout.readable:
            return a
        a = a.of([_readable(at, x) for at, x in enumerate(a.tensors)])
        return a._replace(layout=self.layout(a))

    # --- launches

    def forward(self, a: ChunkCall, keep: bool = False) -> tuple[Tensor, Tensor, Tensor | None, Kept]:
        """`call`, and what its backward needs, if `keep`."""
        plan = self.plan("forward", a)
        n = plan.lanes
        out = torch.empty(*a.shape, n.value, dtype=a.dtype, device=a.c.device)
        final, zfinal = self._matrices(n, n.sequences, a)
        if not out.numel():
            for x, start in ((final, a.start), (zfinal, a.zstart)):
                if x is not None:
                    x.zero_() if start is None else x.copy_(start)
            return out, final, zfinal, Kept(None, None, None, None, None)
        sums = self._sums(a)
        a, total = self.lifted(a, plan)
        made = self._prepared(a, plan, sums, total)
        zstates = self._norms(a, made, None, plan, a.zstart, zfinal)
        begin, last = a.start, final if plan.segments == 1 else None
        if plan.segments > 1:
            begin = self._starts(a, made, begin, final, None, plan)
        y = torch.empty_like(out) if keep and self.table.seen == "y" else None
        worth = self._worth(n, plan.bt, made) if keep else (False, False)
        states = self._states(n, plan.operand, a) if worth[1] else None
        self.run(
            "forward", a, n.sequences * n.lanes * plan.segments * -(-n.value // plan.bv),
            (made.q, made.b, made.pairs, made.total, made.vup, made.vdown, sums, begin, zstates, out, y, last, states,
             n.cu, n.first),
            (n.tokens, plan.segments, plan.segment, n.lanes, a.scale),
            (a.decay, a.over, a.shift, plan.precision, n.key, n.value, plan.bt, plan.bk, plan.bv, plan.stages),
            "scaled" if a.decay == 2 else "all", num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip
        seen = out if self.table.seen == "output" else y
        if not keep:
            return out, final, zfinal, Kept(None, None, None, None, None)
        return out, final, zfinal, Kept(seen, sums, states, zstates, made if worth[0] else None)

    def backward(
        self, a: ChunkCall, kept: Kept, do: Tensor, d_final: Tensor | None, d_zfinal: Tensor | None,
        wanted: tuple[bool, ...],
    ) -> list[Tensor | None]:  # fmt: skip
        """Gradients of `a.tensors`, of those that are `wanted`."""
        plan = self.plan("gradients", a)
        n = plan.lanes
        d_start, d_zstart = self._matrices(n, n.sequences, a)
        given = a.of(wanted)
        keys, values = (
            [self._gradient(x, n, param, stored and bool(asked))
             for x, param, stored, asked in zip(xs, params, kinds, flags, strict=True)]
            for xs, params, kinds, flags in (
                (a.keys, self.table.params[0], self.table.grads[0], given.keys),
                (a.values, self.table.params[1], self.table.grads[1], given.values),
            )
        )  # fmt: skip
        bk = min(plan.bk, plan.bks)
        blocks = -(-n.key // bk)
        few = {"dtype": torch.float32, "device": a.c.device}
        lifted = self.table.lifted if any(given.scalars) else ()
        make: Any = torch.empty if a.cu is None else torch.zeros  # no chunk may hold some tokens
        shown = [n in lifted for n in self.table.lifted if n[0] == "s"] if self.table.lifted else given.numbers
        numbers = [make(a.shape, **few) if asked else None for asked in shown]
        each = (blocks, *a.shape)  # what adds up over the key comes in shares
        dlog = make(each, **few) if given.log or "log" in lifted else None
        dn = make(each, **few) if given.n or "n" in lifted else None
        dc = torch.empty(*a.shape, n.value, dtype=a.c.dtype, device=a.c.device)
        if not do.numel():
            for x, d in ((d_start, d_final), (d_zstart, d_zfinal)):
                if x is not None:
                    x.zero_() if d is None else x.copy_(d)
            return [d_start, d_zstart, None, None, dc, *keys, *values, *([None] * (len(a.numbers) + len(a.scalars)))]
        do = do.contiguous()
        raw, (a, total) = a, self.lifted(a, plan)
        made = kept.made or self._prepared(a, plan, kept.sums, total)
        dw = None
        if self.table.norm:
            dw = torch.empty(a.shape, **few)  # type: ignore[call-overload]
            self.run(
                "normed", a, n.chunks * n.lanes, (do, kept.seen, kept.sums, dw, n.cu, n.first, n.owner),
                (n.tokens, n.lanes), (n.value, plan.bt, plan.bv),
            )  # fmt: skip
        states = self.states(a, made, None, plan.bt) if kept.states is None else kept.states
        back = SimpleNamespace(do=do, seen=kept.seen, dw=dw, sums=kept.sums, begin=d_final, end=d_start)
        back.value = value = self._prepared_value(a, plan, made, back)
        costates = self.states(a, made, back, plan.bt)
        zcostates = self._norms(a, made, back, plan, d_zfinal, d_zstart)
        reached = [x for x, stored in zip(numbers, self.table.grads[2], strict=True) if stored]
        if a.decay == 2:
            self._key_gradients(a, plan, made, back, (states, costates, kept.zstates, zcostates), *keys, *reached)
        else:
            self.run(
                "gradients", a, n.chunks * n.lanes * blocks,
                (made.total, kept.sums, do, kept.seen, dw, value.q, value.b, value.pairs, value.total, states, costates,
                 kept.zstates, zcostates, *keys, *reached, dlog, dn, n.cu, n.first, n.owner),
                (n.tokens, n.batch * n.tokens, n.lanes, a.scale),
                (a.decay, a.over, a.shift, plan.precision, n.key, n.value, plan.bt, bk, plan.bv, plan.stages),
                num_warps=plan.warps, num_stages=plan.stages,
            )  # fmt: skip
        own = self.plan("values", a, plan.bt)
        self.near_then_far(
            "values", a, n.chunks * n.lanes * -(-n.value // own.bv),
            (made.q, made.b, made.pairs, made.total, made.vup, made.vdown, value.total, kept.sums, do, kept.seen,
             None, costates, dc, *values),
            (n.cu, n.first, n.owner), (n.tokens, n.lanes, a.scale),
            (a.decay, a.over, a.shift, own.precision, n.key, n.value, own.bt, min(own.bk, own.bks), own.bv,
             own.stages),
            a.over, num_warps=own.warps, num_stages=own.stages,
        )  # fmt: skip
        if lifted:
            found = {"log": dlog, "n": dn, **{f"s{k}": x for k, x in enumerate(numbers)}}
            scalars = self._scalar_gradients(raw, plan, [found[x] for x in lifted], blocks, given.scalars)
            return [d_start, d_zstart, None, None, dc, *keys, *values, *([None] * len(numbers)), *scalars]
        dlog, dn = (None if x is None else x[0] if blocks == 1 else x.sum(0) for x in (dlog, dn))
        return [d_start, d_zstart, dlog, dn, dc, *keys, *values, *numbers, *([None] * len(raw.scalars))]

    def _key_gradients(
        self, a: ChunkCall, plan: SimpleNamespace, made: Made, back: SimpleNamespace, states: Any, *given: Tensor | None
    ) -> None:
        """For a decay over the key. given: what the gradients of keys and of numbers go to."""
        n, p = plan.lanes, back.value.pairs
        reads = back.sums, back.do, back.seen, back.dw
        own = self.plan("key", a, plan.bt)
        p = torch.empty(*a.shape, plan.bt, dtype=plan.operand, device=a.c.device)
        self.run(
            "pairs", a, n.chunks * n.lanes, (*reads, p, n.cu, n.first, n.owner), (n.tokens, n.lanes, a.scale),
            (plan.precision, n.value, plan.bt, own.bv), num_warps=4,
        )  # fmt: skip
        bk = min(own.bk, own.bks)
        self.near_then_far(
            "key", a, n.chunks * n.lanes * -(-n.key // bk),
            (made.up, made.down, made.total, *reads, back.value.q, back.value.b, p, back.value.total, *states),
            (*given, n.cu, n.first, n.owner), (n.tokens, n.lanes, a.scale),
            (a.over, a.shift, own.precision, n.key, n.value, own.bt, bk, own.bv, own.stages),
            num_warps=own.warps, num_stages=own.stages,
        )  # fmt: skip

    def _scalar_gradients(
        self, a: ChunkCall, plan: SimpleNamespace, given: list[Tensor | None], blocks: int, wanted: tuple[Any, ...]
    ) -> list[Tensor | None]:
        """Gradients of what numbers a token are computed of, from theirs; of a param: each chunk's share."""
        n = plan.lanes
        made: list[Tensor | None] = []
        for (param, stored), x, asked in zip(self.table.scalars, a.scalars, wanted, strict=True):
            if not stored or not asked:
                made.append(None)
            elif param:
                made.append(torch.zeros(n.chunks, n.lanes, dtype=torch.float32, device=x.device))
            else:
                made.append(torch.empty(a.shape, dtype=x.dtype, device=x.device))
        stored_ones = [x for x, (_, stored) in zip(made, self.table.scalars, strict=True) if stored]
        self.run(
            "numbers", a, n.chunks * -(-n.lanes // plan.lane_block),
            (*given, *stored_ones, n.cu, n.first, n.owner), (n.tokens, n.batch * n.tokens, n.lanes),
            (blocks, n.key, n.value, plan.bt, plan.lane_block), "scalars", num_warps=4,
        )  # fmt: skip
        return made

    def states(self, a: ChunkCall, made: Made, back: SimpleNamespace | None, bt: int = 0) -> Tensor:
        """The state before each chunk, [chunks, G, K, V] as operands; with `back` the costate behind it."""
        plan = self.plan("states", a, bt)
        n = plan.lanes
        found = self._states(n, plan.operand, a)
        begin, end = (a.start, None) if back is None else (back.begin, back.end)
        if plan.segments > 1:
            begin, end = self._starts(a, made, begin, end, back, plan), None
        self._walk(a, made, begin, end, (None, None), found, back, plan)
        return found

    def _starts(
        self, a: ChunkCall, made: Made, first: Tensor | None, last: Tensor | None,
        back: SimpleNamespace | None, plan: SimpleNamespace,
    ) -> Tensor:  # fmt: skip
        """What each segment starts from, [N, S, G, K, V]; into `last`: where the last ends."""
        n = plan.lanes
        few: Any = {"dtype": torch.float32, "device": a.c.device}
        each = n.sequences, plan.segments, n.lanes
        ends, starts = (torch.empty(*each, n.key, n.value, **few) for _ in range(2))
        widths = n.key if a.decay == 2 else 1, 0
        left = [torch.empty(*each, w, **few) if w else None for w in widths]
        own = SimpleNamespace(**vars(self.plan("states", a, plan.bt)))
        own.segments, own.segment = plan.segments, plan.segment
        self._walk(a, made, None, ends, left, None, back, own)
        block = min(1024, _block(n.key * n.value))
        self.run(
            "join", a, n.sequences * n.lanes * -(-n.key * n.value // block), (first, ends, *left, starts, last),
            (plan.segments, n.lanes), (back is not None, a.decay, n.key, n.value, block), "none",
        )  # fmt: skip
        return starts

    def _walk(
        self, a: ChunkCall, made: Made, begin: Tensor | None, end: Tensor | None, left: Any,
        states: Tensor | None, back: SimpleNamespace | None, plan: SimpleNamespace,
    ) -> None:  # fmt: skip
        n = plan.lanes
        bk = min(plan.bk, plan.bks)
        blocks = -(-n.key // bk) * -(-n.value // plan.bv)
        given = back or SimpleNamespace(do=None, seen=None, sums=None, value=Made())
        self.run(
            "states", a, n.sequences * n.lanes * plan.segments * blocks,
            (made.q, made.b, made.total, made.vup, made.vdown, given.sums, given.do, given.seen, given.value.q,
             given.value.total, begin, end, *left, states, n.cu, n.first),
            (n.tokens, plan.segments, plan.segment, n.lanes, a.scale),
            (back is not None, a.decay, a.over, a.shift, plan.precision, n.key, n.value, plan.bt, bk, plan.bv,
             plan.stages),
            "scaled" if a.decay == 2 else "all", num_warps=plan.warps, num_stages=plan.stages,
        )  # fmt: skip

    def _norms(
        self, a: ChunkCall, made: Made, back: SimpleNamespace | None, plan: SimpleNamespace,
        first: Tensor | None, last: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """z before each chunk, [chunks, G, K] in fp32, if there is a z; with `back` its costate behind it. From `first`
        on; into `last` [N, G, K]: where it ends."""
        if not self.table.norm:
            return None
        n = plan.lanes
        shares, found = (
            torch.empty(n.chunks, n.lanes, n.key, dtype=torch.float32, device=a.c.device) for _ in range(2)
        )
        self.run(
            "shares", a, n.chunks * n.lanes,
            (made.q, made.b, made.total, None if back is None else back.dw, shares, n.cu, n.first, n.owner),
            (n.tokens, n.lanes, a.scale),
            (back is not None, a.decay, a.shift, plan.precision, n.key, plan.bt, plan.bk),
            "scaled" if a.decay == 2 else "all",
        )  # fmt: skip
        block = min(plan.bk, 32)
        self.run(
            "norms", a, n.sequences * n.lanes * -(-n.key // block),
            (made.total, shares, first, found, last, n.cu, n.first), (n.tokens, n.lanes),
            (back is not None, a.decay, plan.precision, n.key, plan.bt, block, 32), "none",
        )  # fmt: skip
        return found

    # --- sizes

    def _matrices(self, n: Lanes, count: int, a: ChunkCall) -> tuple[Tensor, Tensor | None]:
        options: Any = {"dtype": torch.float32, "device": a.c.device}
        z = torch.empty(count, n.lanes, n.key, **options) if self.table.norm else None
        return torch.empty(count, n.lanes, n.key, n.value, **options), z

    @staticmethod
    def _states(n: Lanes, operand: torch.dtype, a: ChunkCall) -> Tensor:
        return torch.empty(n.chunks, n.lanes, n.key, n.value, dtype=operand, device=a.c.device)

    def _sums(self, a: ChunkCall) -> Tensor | None:
        if not self.table.width:
            return None
        return torch.empty(*a.shape, self.table.width, dtype=torch.float32, device=a.c.device)

    def _worth(self, n: Lanes, bt: int, made: Made) -> tuple[bool, bool]:
        """Whether what was made ready, and then the states before each chunk, are kept for backward: all in all not
        more numbers a token than q, b, c and y have. To make states again takes one light kernel."""
        most = 2 * (n.key + n.value) if self.keeps else 0
        ready = sum(x.shape[-1] for x in made[:-1] if x is not None)
        keep = 0 < ready <= most
        return keep, n.key * n.value <= bt * (most - ready * keep)

    @staticmethod
    def _gradient(x: Tensor | None, n: Lanes, param: bool, wanted: bool) -> Tensor | None:
        if x is None or not wanted:
            return None
        if param:
            return torch.zeros(n.chunks, n.lanes, x.shape[-1], dtype=torch.float32, device=x.device)
        return torch.empty(n.batch, n.tokens, n.lanes, x.shape[-1], dtype=x.dtype, device=x.device)


class _ChunkScan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, kernels: ChunkKernels, a: ChunkCall, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        a = kernels.readable(a)
        out, final, zfinal, kept = kernels.forward(a, True)
        ctx.kernels, ctx.plain = kernels, a.of([None] * len(tensors))
        ctx.save_for_backward(*a.tensors, *kept.tensors)
        ctx.set_materialize_grads(False)
        return out, final, zfinal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        count = len(ctx.plain.tensors)
        tensors, kept = ctx.saved_tensors[:count], Kept.of(ctx.saved_tensors[count:])
        a: ChunkCall = ctx.plain.of(tensors)
        do, d_final, d_zfinal = grads
        if do is None:
            do = torch.zeros(*a.shape, a.c.shape[3], dtype=a.dtype, device=a.c.device)
        ends = [None if x is None else x.float().contiguous() for x in (d_final, d_zfinal)]
        wanted = ctx.needs_input_grad[2:]
        found = ctx.kernels.backward(a, kept, do, *ends, wanted)
        table = ctx.kernels.table
        params = (False,) * 5 + tuple(p for part in table.params for p in part)
        params += (False,) * len(a.numbers) + tuple(param for param, _ in table.scalars if a.scalars)
        whole: list[Tensor | None] = []
        for at, (x, d, param) in enumerate(zip(tensors, found, params, strict=True)):
            if x is None or d is None or not wanted[at]:
                whole.append(None)
            elif at < 2:
                whole.append(d)
            else:
                whole.append(_folded(d.sum(0)[None, None] if param else d, x))
        return None, None, *whole


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
        self.live = tuple(s for s in spec.components if s.name in spec.live)
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


# --- The small layers of a chunked spec: what is scanned before its matrix states, and read by them as numbers a token.


class Scanned(NamedTuple):
    """Layers of small components: their own lift, combine and advance, of what their elements hold; operator: the same
    by kernels, if there are some, as a spec whose outputs are at_ and before_ each component."""

    components: tuple[str, ...]
    lift: Callable[..., Values]
    combine: Callable[..., Values]
    advance: Callable[..., Values]
    operator: Operator | None


class Asked(NamedTuple):
    """What a call says beside its tensors."""

    initial: Values | None
    mask: Tensor | None
    reset: Tensor | None
    cu_seqlens: Tensor | None
    sequences: int


def run_small(
    spec: Spec, rules: Rules, call: Call, layer: Scanned, x: Values, params: SimpleNamespace, given: Asked
) -> tuple[Values, Values, Values]:
    """The prefixes of every token, those before it, and the final state."""
    own = small_call(call, layer)
    if own is None or layer.operator is None:
        return _scanned(spec, rules, call, layer, x, params, given)
    found, final = layer.operator(own, {}, given.initial, given.mask, given.reset, given.cu_seqlens)
    prefix, previous = ({k: found[f"{side}_{k}"] for k in layer.components} for side in ("at", "before"))
    return prefix, previous, final


def small_steps(
    call: Call, layers: Sequence[Scanned], state: Values, slots: Tensor | None
) -> tuple[SimpleNamespace, SimpleNamespace] | None:
    """The prefixes [B, 1, *lanes] of small layers with and before one token, while `state` moves on in place; None, and
    nothing has changed, where not all have kernels."""
    own = [(layer.operator, small_call(call, layer)) for layer in layers]
    if not all(op is not None and small is not None and op.steps(small, state) for op, small in own):
        return None
    found: Values = {}
    for op, small in own:
        assert op is not None and small is not None
        outputs = op.step(small, state, slots, True)[0]
        found |= dict(zip((s.name for s in op.spec.outputs), outputs, strict=True))
    names = [k for layer in layers for k in layer.components]
    at, before = ({k: found[f"{side}_{k}"].unsqueeze(1) for k in names} for side in ("at", "before"))
    return SimpleNamespace(**at), SimpleNamespace(**before)


def small_call(call: Call, layer: Scanned) -> Call | None:
    """The call of a small layer's kernels; None: not for them."""
    if layer.operator is None:
        return None
    spec = layer.operator.spec
    inputs = {s.name: call.inputs[s.name] for s in spec.inputs}
    params = {s.name: call.params[s.name] for s in spec.params}
    front = len(call.leading)
    whole = any(call.inputs[s.name].shape[front : front + len(call.lanes)] == call.lanes for s in spec.inputs)
    own = replace(call, inputs=inputs, params=params)
    return own if whole and layer.operator.wanted(own, True, True) else None


def _scanned(
    spec: Spec, rules: Rules, call: Call, layer: Scanned, x: Values, params: SimpleNamespace, given: Asked
) -> tuple[Values, Values, Values]:
    """The same in PyTorch."""
    slots = {s.name: s for s in spec.components}
    n = call.n

    def lift(tokens: Values) -> Values:
        leading = next(iter(tokens.values())).shape[:2]
        return {
            k: as_state(v, slots[k], call, leading) for k, v in layer.lift(SimpleNamespace(**tokens), params, n).items()
        }

    def rule(function: Callable[..., Values]) -> Callable[[Values, Values], Values]:
        def apply(l: Values, r: Values) -> Values:  # noqa: E741
            return function(SimpleNamespace(**l), SimpleNamespace(**r), params, n)

        return apply

    def output(prefix: Values, previous: Values | None, tokens: Values) -> Values:
        return {**{f"s.{k}": v for k, v in prefix.items()}, **{f"prev.{k}": v for k, v in (previous or {}).items()}}

    empty = start_state(spec, rules, call, layer.components)
    begin = None if given.initial is None else {k: given.initial[k] for k in layer.components}
    found, final = scan_tokens(
        lift, rule(layer.combine), rule(layer.advance), output, x, empty, begin, valid=given.mask, reset=given.reset,
        cu_seqlens=given.cu_seqlens, previous=True,
    )  # fmt: skip
    final = {k: as_state((final or empty)[k], slots[k], call, (given.sequences,)) for k in empty}
    parts = [{k: found[f"{side}.{k}"] for k in layer.components} for side in ("s", "prev")]
    return parts[0], parts[1], final


# --- A spec layer by layer: matrix states in chunks, what is small by the blocked scan, then the readout.


class Reads(NamedTuple):
    """What one query reads: (name, of which component, where its axes are among outer, extra, value) for each part.
    `extra`: how many axes tell apart the vectors of a token."""

    extra: int
    parts: tuple[tuple[str, int, tuple[int, ...]], ...]


class FusedLayer(NamedTuple):
    """What the kernels compute of a layer and its readout themselves.

    keys, c, values, scalars: (name, 'input' | 'param' | 'at' | 'before' | 'factor', lag) of the tensors that they read;
    given(x, s, prev, p, n): the factors among them; numbers: how many numbers a token the readout reads. decay, over:
    as in ChunkCall. output: what the kernels give, in full.
    """

    keys: tuple[tuple[str, str, int], ...]
    c: tuple[str, str, int]
    values: tuple[tuple[str, str, int], ...]
    scalars: tuple[tuple[str, str, int], ...]
    numbers: int
    given: Callable[..., Values]
    scale: Callable[..., float]
    shift: int
    decay: int
    over: bool
    output: str


class Chunked(NamedTuple):
    """A layer S_t = D S_{t-1} + U (Wᵀ S_{t-1}) + B Cᵀ; several components that differ in C alone are one S.

    factors(x, s, prev, p, n) gives log or decay (one number a token), log_key or decay_key, log_value or decay_value,
    u0, w0, ... (w0 without u0: U is -B), b0, c0, ... (c0_1, ... of the second component) and the queries q0, p0, ...
    where there are some, [..., *outer, width], queries [..., *outer, *extra, width]; without the width: log, decay, and
    c of a vector.
    orders: where outer, key and value stand among a component's dims; vectors: the components without a value.
    plain: factors that are an input as it lies, by its name, not among those that `factors` gives; scales(n) gives the
    numbers that multiply some of them. b0 is to be multiplied by n0 [..., *outer], where it is there. shown: linear
    parts that are outputs as they stand. fused: what kernels compute of it, if all of it is of that kind.
    """

    components: tuple[str, ...]
    factors: Callable[..., Values]
    rank: int
    columns: int
    reads: tuple[Reads, ...]
    orders: tuple[tuple[int, ...], ...]
    outer: int
    vectors: tuple[bool, ...]
    plain: Mapping[str, str]
    scales: Callable[..., dict[str, float]]
    shown: tuple[str, ...]
    fused: FusedLayer | None

    @property
    def vector(self) -> bool:
        return all(self.vectors)


def run_layers(
    spec: Spec, rules: Rules, call: Call, x: Values, p: Values, initial: Values | None, mask: Tensor | None,
    reset: Tensor | None, cu_seqlens: Tensor | None,
) -> tuple[Values, Values]:  # fmt: skip
    """As `run_scan`, for a spec whose rules have `layers` and `readout`."""
    x = fill_masked(x, mask)
    params, n, leading = SimpleNamespace(**p), call.n, call.leading
    rows = leading[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    given = Asked(initial, mask, reset, cu_seqlens, rows)
    slots = {s.name: s for s in spec.components}
    after: Values = {}
    before: Values = {}
    final: Values = {}
    tokens = Tokens(x)
    answer: Values | None = None
    for layer in rules.layers:
        if isinstance(layer, Scanned):
            prefix, previous, end = run_small(spec, rules, call, layer, x, params, given)
            after |= fill_masked(prefix, mask)  # what is read of padding may be infinite and must not meet a gradient
            before |= fill_masked(previous, mask)
        else:
            reads = tokens, SimpleNamespace(**after), SimpleNamespace(**before), params, n
            done = _fused(spec, call, layer, reads, given, getattr(rules, "matrices", None))
            if done is None:
                outputs, end = _chunked(spec, call, layer, reads, given, getattr(rules, "matrices", None))
                after |= fill_masked(outputs, mask)
            else:
                answer, end = done
        final |= end
    if answer is None:
        answer = rules.readout(SimpleNamespace(**after), SimpleNamespace(**before), tokens, params, n)
    outputs = {s.name: as_output(answer[s.name], s, call, leading) for s in spec.outputs}
    if mask is not None:
        outputs = {k: torch.where(_flag(mask, o), o, torch.zeros_like(o)) for k, o in outputs.items()}
    return outputs, {k: as_state(final[k], slots[k], call, (rows,)) for k in spec.live}


def step_layers(spec: Spec, rules: Rules, call: Call, state: Values, slots: Tensor | None) -> Values | None:
    """One token by kernel: outputs [B, *lanes, *dims], while `state` moves on in place, in the rows that `slots` names.

    None, and nothing has changed, where there is no kernel for it or a gradient is wanted.
    """
    wanted = torch.is_grad_enabled() and any(
        x.requires_grad for x in (*call.inputs.values(), *call.params.values(), *state.values())
    )
    *scanned, layer = rules.layers
    if wanted or spec.taps or isinstance(layer, Scanned) or layer.fused is None or call.compute != torch.float32:
        return None
    if not all(isinstance(x, Scanned) for x in scanned):
        return None
    states = step_states(layer, state)
    if states is None or not rules.matrices.steps(states):
        return None
    prefixes = small_steps(call, scanned, state, slots)
    if prefixes is None:
        return None
    now = replace(call, inputs={k: x.unsqueeze(1) for k, x in call.inputs.items()}, leading=(*call.leading, 1))
    x, p = prepared(spec, now, {}, True)
    reads = Tokens(x), *prefixes, SimpleNamespace(**p), call.n
    fused = layer.fused
    a = fused_call(now, fused, reads, (None, None), None, None, None)
    out = rules.matrices.step(a, states, slots)
    y = out.unflatten(2, call.lanes) if call.lanes else out.squeeze(2)
    return {fused.output: as_output(y, spec.outputs[0], now, now.leading).squeeze(1)}


def _sizes(spec: Spec, call: Call, layer: Chunked) -> tuple[list[list[int]], list[int], torch.dtype]:
    """(outer, key and value of each component, the widths of their values, the dtype of the states)."""
    slots = [next(s for s in spec.components if s.name == name) for name in layer.components]
    ordered = [[call.sizes[s.dims[k]] for k in order] for s, order in zip(slots, layer.orders, strict=True)]
    widths = [1 if vector else sizes[-1] for vector, sizes in zip(layer.vectors, ordered, strict=True)]
    return ordered, widths, call.of_kind(slots[0].kind)


def _fused(
    spec: Spec, call: Call, layer: Chunked, reads: tuple[Any, ...], given: Asked, kernels: Any
) -> tuple[Values, Values] | None:
    """(the outputs, the final states); None: not by fused kernels."""
    if kernels is None or layer.fused is None or not all(call.leading) or call.compute != torch.float32:
        return None
    ordered, widths, dtype = _sizes(spec, call, layer)
    if not kernels.takes(ordered[0][0], widths[0], call.device):
        return None
    begin = None
    if given.initial is not None:
        begin = _matrix_start(call, layer, ordered, widths, given, prod(call.lanes), dtype)
    parts = (None, None) if begin is None else (begin[..., : widths[0]], begin[..., -1] if len(widths) > 1 else None)
    flags = given.mask, given.reset, given.cu_seqlens
    fused = layer.fused
    out, state, z = kernels.call(fused_call(call, fused, reads, parts, *flags))
    states = [state] if z is None else [state, z.unsqueeze(-1)]
    final = _matrix_states(call, layer, ordered, states)
    return {fused.output: out.unflatten(2, call.lanes) if call.lanes else out.squeeze(2)}, final


def _chunked(
    spec: Spec, call: Call, layer: Chunked, reads_of: tuple[Any, ...], given: Asked, kernels: Any
) -> tuple[Values, Values]:
    """The layer's linear readouts by name, and its final states [N, *lanes, *dims]."""
    found, tokens = layer.factors(*reads_of), reads_of[0]
    ordered, widths, dtype = _sizes(spec, call, layer)
    outer, key = ordered[0][: layer.outer], ordered[0][layer.outer]
    batch, length = call.leading
    lanes = prod(call.lanes) * prod(outer)
    start = _matrix_start(call, layer, ordered, widths, given, lanes, dtype)
    if kernels is not None and not dtype.is_complex:
        begin = None if given.initial is None else start
        flags = given.mask, given.reset, given.cu_seqlens
        done = kernels.layer(call, layer, [*outer, key], widths, found, begin, *flags)
        if done is not None:
            single = [()] * len(layer.reads)
            return _linear_parts(call, layer, single, done[0], outer), _matrix_states(call, layer, ordered, done[1])
    scales = layer.scales(call.n)
    plain = {k: getattr(tokens, x) for k, x in layer.plain.items()}
    found = {**found, **{k: x * scales[k] if k in scales else x for k, x in plain.items()}}
    for k in range(layer.columns):
        if f"n{k}" in found:
            found[f"b{k}"] = found[f"b{k}"] * found[f"n{k}"].unsqueeze(-1)
    if len(layer.components) > 1:
        found = {**found, **{f"c{k}": _side_by_side(found, f"c{k}", layer.vectors) for k in range(layer.columns)}}

    def rows(name: str, extra: int = 0) -> Tensor:
        """[B, T, G, *extra, width]: lanes and outer dims as one axis."""
        value = found[name].to(dtype)
        if name in ("log", "decay") or (layer.vector and name[0] == "c"):
            value = value.unsqueeze(-1)
        own = value.shape[value.dim() - 1 - extra :]
        return value.expand(batch, length, *call.lanes, *outer, *own).reshape(batch, length, lanes, *own)

    def columns(letter: str, count: int) -> tuple[Tensor, ...]:
        return tuple(rows(f"{letter}{k}") for k in range(count))

    def queries(letter: str) -> list[list[Tensor]]:
        """The vectors of each query; none if it does not read there."""
        return [
            list(rows(f"{letter}{k}", r.extra).flatten(3, -2).unbind(3) if r.extra else (rows(f"{letter}{k}"),))
            if f"{letter}{k}" in found
            else []
            for k, r in enumerate(layer.reads)
        ]

    def step(*names: str) -> Step | None:
        name = next((k for k in names if k in found), None)
        return None if name is None else Step(rows(name), name.startswith("log"))

    q, p = queries("q"), queries("p")
    factors = Factors(
        step("log", "log_key", "decay", "decay_key"), step("log_value", "decay_value"),
        columns("u", layer.rank if "u0" in found else 0),
        columns("w", layer.rank), columns("b", layer.columns), columns("c", layer.columns),
        tuple(x for xs in q for x in xs), tuple(x for xs in p for x in xs),
    )  # fmt: skip
    after, prior, state = chunk_scan(factors, start, given.mask, given.reset, given.cu_seqlens)
    from_q, from_p = iter(after), iter(prior)
    reads, several = [], []
    for k, (of_q, of_p, r) in enumerate(zip(q, p, layer.reads, strict=True)):
        sides = [torch.stack([next(it) for _ in vs], 3) for it, vs in ((from_q, of_q), (from_p, of_p)) if vs]
        total = sides[0] if len(sides) == 1 else sides[0] + sides[1]
        query = found.get(f"q{k}", found.get(f"p{k}"))
        assert query is not None
        several.append(tuple(query.shape[query.dim() - 1 - r.extra : -1]))
        reads.append(torch.split(total if r.extra else total.squeeze(3), widths, -1))
    states = torch.split(state, widths, -1)
    return _linear_parts(call, layer, several, reads, outer), _matrix_states(call, layer, ordered, states)


def _side_by_side(found: Values, name: str, vectors: tuple[bool, ...]) -> Tensor:
    """C of all components as one, [..., widths together]."""
    parts = [found[name if not j else f"{name}_{j}"] for j in range(len(vectors))]
    parts = [x.unsqueeze(-1) if vector else x for x, vector in zip(parts, vectors, strict=True)]
    lead = torch.broadcast_shapes(*(x.shape[:-1] for x in parts))
    return torch.cat([x.expand(*lead, x.shape[-1]) for x in parts], -1)


def _matrix_start(
    call: Call, layer: Chunked, ordered: list[list[int]], widths: list[int], given: Asked, lanes: int,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """[N, G, K, V] before the first tokens."""
    key = ordered[0][layer.outer]
    if given.initial is None:
        return torch.zeros(given.sequences, lanes, key, sum(widths), dtype=dtype, device=call.device)
    parts = []
    for name, order, width in zip(layer.components, layer.orders, widths, strict=True):
        x = given.initial[name]
        front = x.dim() - len(order)
        x = x.permute(*range(front), *(front + k for k in order))
        parts.append(x.reshape(given.sequences, lanes, key, width))
    return (parts[0] if len(parts) == 1 else torch.cat(parts, -1)).to(dtype)


def _linear_parts(
    call: Call, layer: Chunked, several: Sequence[tuple[int, ...]], reads: Sequence[Sequence[Tensor]], outer: list[int]
) -> Values:
    """The linear parts by name; reads: [B, T, G, (vectors,) V] of each component; several: how many vectors."""
    y: Values = {}
    front = 2 + len(call.lanes)
    for r, extra, each in zip(layer.reads, several, reads, strict=True):
        for name, component, axes in r.parts:
            part = each[component]
            part = part.reshape(*call.leading, *call.lanes, *outer, *extra, part.shape[-1])
            part = part[..., 0] if layer.vectors[component] else part
            y[name] = part.permute(*range(front), *(front + a for a in axes))
    return y


def _matrix_states(call: Call, layer: Chunked, ordered: list[list[int]], states: Sequence[Tensor]) -> Values:
    """[N, G, K, V] as the components' own tensors."""
    final: Values = {}
    front = 1 + len(call.lanes)
    for name, order, sizes, x in zip(layer.components, layer.orders, ordered, states, strict=True):
        x = x.reshape(x.shape[0], *call.lanes, *sizes)
        final[name] = x.permute(*range(front), *(front + order.index(k) for k in range(len(order))))
    return final


# --- Calls of specs that one fused layer makes up, straight to its kernels, once a call of their shapes was checked.

_MOST_CALLS = 256  # remembered
_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
_Place = tuple[int, tuple[int, ...] | None]  # an argument, and the shape in which a param is read


class FusedCalls:
    """Calls and steps that passed all checks, by what the checks look at."""

    def __init__(self, spec: Spec, rules: Rules) -> None:
        self.kernels = rules.matrices
        self.names = tuple(s.name for s in (*spec.inputs, *spec.params))
        self.inputs = len(spec.inputs)
        self.dims = next(s.dims for s in spec.components if s.name == rules.layers[-1].components[0])
        self._known: dict[Any, Any] = {}
        *before, layer = rules.layers
        fused = getattr(layer, "fused", None)
        read = () if fused is None else (*fused.keys, fused.c, *fused.values, *fused.scalars)
        orders = ((0, 1),), ((0, 1), (0,))  # of the components' dims: key, value; key
        plain = fused is not None and layer.orders in orders and all(kind != "factor" for _, kind, _ in read)
        plain = plain and all(getattr(x, "operator", None) is not None for x in before)
        self.layer: Any = layer if plain else None
        self.small: list[Any] = before if plain else []  # their prefixes follow the arguments
        self.at = {name: n for n, name in enumerate(self.names)}
        for x in self.small:
            self.at |= {s.name: len(self.at) + n for n, s in enumerate(x.operator.spec.outputs)}

    # --- sequences

    def ordered(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Sequence[Any]:
        """Arguments in the spec's order, if they are all and no others; else none."""
        if kwargs:
            rest = self.names[len(args) :]
            if len(rest) != len(kwargs) or not all(n in kwargs for n in rest):
                return ()
            return (*args, *[kwargs[n] for n in rest])
        return args if len(args) == len(self.names) else ()

    def key(self, what: str, args: Sequence[Any], state: Any, slots: Any = None) -> Any:
        """What the checks look at; None: not for the kernels."""
        if self.layer is None or not args or torch.compiler.is_compiling() or transformed():
            return None
        names: tuple[str, ...] = ()
        tensors = args
        if state is not None:
            if type(state) is not dict:
                return None
            names, tensors = tuple(state), (*args, *state.values())
        kernels = self.kernels
        found: list[Any] = [what, names, slots is None, kernels.processors, id(kernels.table.tiles)]
        for x in tensors if slots is None else (*tensors, slots):
            if type(x) not in _PLAIN_TENSORS or x.is_neg():
                return None
            found.append((x.shape, x.stride(), x.dtype, x.device))
        return tuple(found)

    def whole(self, key: Any, args: Sequence[Tensor], state: Any) -> tuple[Tensor, Values] | None:
        """The output and the last states of a call that is known."""
        known = self._known.get(key)
        if known is None:
            return None
        names = self.layer.components
        ends: Values = {}
        for x, own in zip(self.small, known[2], strict=True):
            given = {k: args[self.at[k]] for k in (*own.inputs, *own.params)}
            own = replace(own, inputs={k: given[k] for k in own.inputs}, params={k: given[k] for k in own.params})
            found, end = x.operator(own, {}, state, None, None, None)
            args = (*args, *found.values())
            ends |= end
        starts = (None, None) if state is None else (*[state[n] for n in names], None)[:2]
        placed = [None if p is None else args[p[0]] if p[1] is None else args[p[0]].view(p[1]) for p in known[1]]
        a = known[0].of((*starts, None, None, *placed))
        if a.layout is None:
            a = a._replace(layout=self.kernels.layout(a))
            self._known[key] = known[0]._replace(layout=a.layout), *known[1:]
        out, *finals = self.kernels.call(a)
        return out, {**ends, **dict(zip(names, finals, strict=False))}

    def learn(self, key: Any, args: Sequence[Tensor], call: Call) -> None:
        """Remembers a call that has just been checked, if it is one of these."""
        if key is None or not all(call.leading):
            return
        small = [small_call(call, x) for x in self.small]
        found = self._empty(args, call)
        if found is not None and None not in small:
            self._remember(key, (*found, small))

    def _remember(self, key: Any, what: Any) -> None:
        if len(self._known) >= _MOST_CALLS:
            self._known.clear()
        self._known[key] = what

    def _empty(self, args: Sequence[Tensor], call: Call) -> tuple[ChunkCall, tuple[_Place | None, ...]] | None:
        """The call without its tensors, and which arguments they are from c on; None: the kernels do not take them."""
        fused = self.layer.fused
        takes = self.kernels.takes(*(call.sizes[d] for d in self.dims), call.device)
        if len(call.lanes) != 1 or call.compute != torch.float32 or not takes:
            return None

        def place(width: int, name: str, kind: str, lag: int) -> _Place | None:
            if kind != "param":
                return self.at[name if kind == "input" else f"{kind}_{name}"], None
            at = self.at[name]
            shape = args[at].shape
            front, own = shape[: len(shape) - width], shape[len(shape) - width :]
            return (at, (1, 1, *call.lanes, *own)) if front == call.lanes else None

        wide = [place(1, *read) for read in (fused.c, *fused.keys, *fused.values)]
        scalars = [place(0, *read) for read in fused.scalars]
        if None in wide or None in scalars:
            return None
        counts = (len(fused.keys), len(fused.values), fused.numbers, len(scalars))
        keys, values, numbers, few = ((None,) * n for n in counts)
        shape: Any = (*(*call.leading, 1)[:2], *call.lanes)
        empty = ChunkCall(
            None, None, None, None, args[0], keys, values, numbers, shape, fused.shift,
            fused.scale(call.n), None, None, call.dtype, fused.decay, fused.over, few,  # type: ignore[arg-type]
        )  # fmt: skip
        return empty, (*wide, *numbers, *scalars)

    # --- tokens

    def again(self, state: Any, args: Sequence[Any], slots: Any, in_place: bool) -> tuple[Tensor, Any] | None:
        """The output of one token and the state after it, if a step like this is known. None, too, where autograd
        watches."""
        if state is None or len(args) != len(self.names):
            return None
        key = self.key("step", args, state, slots)
        known = None if key is None else self._known.get(key)
        if known is None:
            return None
        if not in_place:
            if torch.is_grad_enabled() and any(x.requires_grad for x in (*args, *state.values())):
                return None
            state = {k: x.clone() for k, x in state.items()}
        launch, places, (shape, dtype), small = known
        for x, reads in zip(self.small, small, strict=True):
            own = {k: state[k] for k in x.components}
            moved = x.operator.quick.again(own, [args[n] for n in reads], slots, True)
            if moved is None:
                return None
            args = (*args, *moved[0])
        out = torch.empty(shape, dtype=dtype, device=args[0].device)
        named = {None: None, "out": out, "slots": slots, **state}
        launch(*[args[p] if type(p) is int else named[p] for p in places])
        return out, state

    def learn_step(self, args: Sequence[Tensor], call: Call, state: Values, slots: Tensor | None) -> None:
        """Remembers a step that has just been run."""
        key = self.key("step", args, state, slots)
        found = None if key is None else self._empty(args, call)
        states = None if found is None else step_states(self.layer, state)
        if found is None or states is None or len(self.small) > 1:  # all of them move, or none
            return
        empty, read = found
        tensors = [x.unsqueeze(1) if n < self.inputs else x for n, x in enumerate(args)]
        lanes, small = (call.leading[0], 1, *call.lanes), []
        for x in self.small:
            if small_call(call, x) is None:
                return
            spec = x.operator.spec
            small.append([self.at[s.name] for s in (*spec.inputs, *spec.params)])
            tensors += [torch.empty(lanes, dtype=torch.float32, device=call.device) for _ in spec.outputs]
        placed = [None if p is None else tensors[p[0]] if p[1] is None else tensors[p[0]].view(p[1]) for p in read]
        a = empty.of((None, None, None, None, *placed))
        a = a._replace(layout=self.kernels.layout(a))
        if not a.layout.readable:
            return
        named = {id(x): p[0] for x, p in zip(placed, read, strict=True) if p is not None}
        launch, given = step_launch(self.kernels, a, states, slots)
        rest: dict[int, Any] = {id(None): None, id(slots): "slots" if slots is not None else None}
        rest |= {id(x): name for x, name in zip(states, self.layer.components, strict=True)}
        places = tuple([named[id(x)] if id(x) in named else rest.get(id(x), "out") for x in given])
        self._remember(key, (launch, places, ((call.leading[0], *call.lanes, a.c.shape[-1]), call.dtype), small))


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
        self._calls = FusedCalls(spec, rules) if hasattr(self.rules, "matrices") else None  # and whole calls
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
        if self._calls is not None and mask is None and reset is None and cu_seqlens is None:
            tensors = self._calls.ordered(args, kwargs)
            key = None if reverse or self.checks else self._calls.key("call", tensors, initial_state)
            known = self._calls.whole(key, tensors, initial_state)
            if known is not None:
                return known if return_state else known[0]
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
        if self._calls is not None:
            self._calls.learn(key, [*call.inputs.values(), *call.params.values()], call)
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
        if hasattr(self.rules, "stepped") and self.rules.matrices.runs_on(call.device):
            after = self._start(call) if before is None else {k: x.clone() for k, x in before.items()}
            moved = self.rules.stepped(self.spec, self.rules, call, after, None)
            if moved is not None:
                self._learn_step(call, after, None)
                outs = tuple(moved[s.name] for s in self.spec.outputs)
                return outs[0] if len(outs) == 1 else outs, after
        x, p = prepared(self.spec, call, lags)
        if before is None:
            before = self._start(call)
        run = run_step
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
        if self.operator is not None and self.operator.steps(call, state):
            return self.operator.step(call, state, slots, True)[0]
        if hasattr(self.rules, "stepped") and self.rules.matrices.runs_on(call.device):
            moved = self.rules.stepped(self.spec, self.rules, call, state, slots)
            if moved is not None:
                self._learn_step(call, state, slots)
                outs = tuple(moved[s.name] for s in self.spec.outputs)
                return outs[0] if len(outs) == 1 else outs
        rows = state if slots is None else {k: x.index_select(0, slots) for k, x in state.items()}
        out, after = self.step(rows, *args, **kwargs)
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

    def _learn_step(self, call: Call, state: State, slots: Tensor | None) -> None:
        if self._calls is not None:
            self._calls.learn_step([*call.inputs.values(), *call.params.values()], call, state, slots)

    def _checked(self, call: Call, state: Mapping[str, Tensor] | None, rows: int) -> State | None:
        check = check_state
        return check(self.spec, call, state, rows)

    def _begin(self, call: Call) -> State:
        """What each component starts from, [*dims]."""
        return start_state(self.spec, self.rules, call, tuple(s.name for s in self.spec.components))

    def _start(self, call: Call) -> State:
        """Before any token; tails apart."""
        slots = {s.name: s for s in self.spec.components}
        begin = start_state(self.spec, self.rules, call, self.spec.live)
        return {k: as_state(v, slots[k], call, call.leading[:1]).clone() for k, v in begin.items()}


# --- the spec's border

SPEC = Spec(
    name='gla',
    digest='d474f606b955f9c6',
    inputs=(Slot('q', ('K',)), Slot('k', ('K',)), Slot('v', ('V',)), Slot('g', ('K',), within=(None, 0.0, '(]')),),
    params=(),
    components=(Slot('a', ('K',)), Slot('S', ('K', 'V')),),
    live=('S',),
    outputs=(Slot('o', ('V',)),),
    sizes={},
    dims=('K', 'V'),
    taps={},
    previous=False,
)

LAYERS = (
    Chunked(('S',), factors_0, rank=0, columns=1, reads=(Reads(0, (('y_S', 0, (0,)),)), ), orders=((0, 1),), outer=0, vectors=(False,), plain={'log_key': 'g', 'b0': 'k', 'c0': 'v', 'q0': 'q'}, scales=lambda n: {'q0': 1 / math.sqrt(n.K)}, shown=('y_S',), fused=FusedLayer((('q', 'input', 0), ('k', 'input', 0), ('g', 'input', 0)), ('v', 'input', 0), (), (), 0, given_0, lambda n: 1 / math.sqrt(n.K), 0, 2, False, 'o')),
)

gla = Aggregator(SPEC, SimpleNamespace(lift=lift, combine=combine, advance=advance, output=output, identity=identity, layered=run_layers, layers=LAYERS, readout=readout, matrices=ChunkKernels(CHUNK_KERNELS), stepped=step_layers), fold="scan", kernels=KERNELS)
