"""mingru: minGRU: h' = (1 - σ(z)) h + σ(z) x, x the candidate state h~. Feng et al. 2024, arXiv 2410.01201.

    aggregator mingru {
      '''minGRU: h' = (1 - σ(z)) h + σ(z) x, x the candidate state h~. Feng et al. 2024, arXiv 2410.01201.'''
      input z, x
      state a = 1, h = 0

      lift {
        a = 1 - sigmoid(z)
        h = sigmoid(z) * x
      }

      combine (l, r) {
        a = l.a * r.a
        h = r.a * l.h + r.h
      }

      output y = h

      associative: yes
    }

Proof (associative): proved over the reals, for all sizes (normal form).
Proof (identity element): proved over the reals, for all sizes (normal form).
Plan: pointwise. pointwise: 2 scalars an element, 1 carried; lanes are independent, one pass over time; few lanes and a long sequence are split into segments.

Written by psmc; regenerate with: psmc compile mingru.psm
The runtime holds what this spec needs of it. Needs torch, and triton for tensors on a GPU; nothing else.

   70  the spec's mathematics: tensors are [..., *dims], leading axes broadcast
  100  kernels: a pointwise scan
  799  How the lanes of a call's tensors lie in memory, for kernels whose lanes do the same
  914  Kernels that threads compile ahead of a first call: most of its time, the compiler needs no interpreter
 1001  Launches of Triton kernels past the binder, which takes longer than a small kernel runs
 1188  One token at a time by the step kernel: what its shapes fix is worked out once
 1316  Calls of the pointwise kernels: shapes to grids and tiles, buffers, one launch (three where time is split)
 1735  Scans in PyTorch, differentiable by autograd: no loop over T where the rule is associative
 2014  A layer over a batch of sequences: masks, restarts and packing on top of the scans, a stretch of time at once
 2171  The border of a compiled aggregator: what was passed, checked against the spec, with the spec's own names
 2441  The border, continued: states, flags and packing
 2565  What the border sees only by reading tensors: values, checked where `checks` or PSMC_CHECK=1 asks for it
 2641  Inputs read some tokens earlier, and time run backwards: index arithmetic on whole sequences, no loop over T
 2704  One checked call in PyTorch: lift, the scan of the plan, readout
 2834  The scan as an operator of torch: one graph node for torch.compile, with its own backward
 3102  The public face of a compiled aggregator: a parallel call, a step, states
 3302  the spec's border
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
from math import isqrt
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["mingru"]


# --- the spec's mathematics: tensors are [..., *dims], leading axes broadcast

def lift(x, p, n):
    sigmoid_z = torch.sigmoid(x.z)
    a = 1 - sigmoid_z
    h = sigmoid_z * x.x
    return {"a": a, "h": h}


def combine(l, r, p, n):
    a = l.a * r.a
    h = r.a * l.h + r.h
    return {"a": a, "h": h}


def advance(l, r, p, n):
    h = r.a * l.h + r.h
    return {"h": h}


def output(s, prev, x, p, n):
    return {"y": s.h}


def identity(n, like):
    a = like.new_full((), 1)
    h = like.new_full((), 0)
    return {"a": a, "h": h}


# --- kernels: a pointwise scan. Tensors lie as [B, T, C], C the lanes (all lane axes and dims, flattened).
#
# A program has BC lanes of one sequence (or of one of its S segments of SEG tokens) and walks over its tokens, a token
# of a lane in one thread, R tokens of each tensor loaded at a time and NS such loads ahead.
#   bos, eos    a sequence's first token and the one past its last, as rows of the packed batch
#   Q, D        lane c of a tensor that has fewer lanes is its (c // Q) * D + c % D
#   kind        int8 [B, T]: 0 the token is skipped, 1 it joins what is before, 3 nothing counts before it, 2 the same
#               and it is skipped; None: all count
# Least traffic: every input and output once; for the backward, a state of every K tokens is written and read, too.



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
def tile_load(p, m):
    if m is None:
        return tl.load(p)
    else:
        return tl.load(p, mask=m, other=0)


if triton is not None:  # not in Triton's interpreter, and not on other GPUs
    NATIVE = tl.constexpr(isinstance(tile_load, triton.JITFunction) and torch.version.hip is None)

@jit
def lane_exp(x):
    if NATIVE:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * 1.4426950408889634], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x * 1.4426950408889634)


@jit
def lane_sigmoid(x):
    """1 / (1 + exp(-x)): the square of a reciprocal root is cheaper than a quotient."""
    root = tl.rsqrt(1 + lane_exp(-x))
    return root * root


@jit
def lane_lift(z, x):
    sigmoid_z = lane_sigmoid(z)
    a = 1 - sigmoid_z
    h = sigmoid_z * x
    return a, h


@jit
def lane_step(z, x, prev_h):
    sigmoid_z = lane_sigmoid(z)
    h = (1 - sigmoid_z) * prev_h + sigmoid_z * x
    return h


@jit
def lane_readout(s_h):
    y = s_h
    return y


@jit
def lane_fold(z, x, l_a, l_h):
    sigmoid_z = lane_sigmoid(z)
    t1 = 1 - sigmoid_z
    a = l_a * t1
    h = t1 * l_h + sigmoid_z * x
    return a, h


@jit
def lane_combine(l_a, l_h, r_a, r_h):
    a = l_a * r_a
    h = r_a * l_h + r_h
    return a, h


@jit
def lane_advance(l_h, r_a, r_h):
    h = r_a * l_h + r_h
    return h


@jit
def lane_direct(d_y):
    adj_h = d_y
    return adj_h


@jit
def lane_back(z, x, prev_h, grad_h):
    sigmoid_z = lane_sigmoid(z)
    t1 = 1 - sigmoid_z
    adj_h = grad_h * t1
    g_z = (grad_h * x - grad_h * prev_h) * (sigmoid_z * t1)
    g_x = grad_h * sigmoid_z
    return adj_h, g_z, g_x


@jit
def lane_entry(z, d_y):
    J_h_h = 1 - lane_sigmoid(z)
    adj_h = d_y * J_h_h
    return J_h_h, adj_h


@jit
def lane_compose(l_J_h_h, l_adj_h, r_J_h_h, r_adj_h):
    J_h_h = r_J_h_h * l_J_h_h
    adj_h = r_J_h_h * l_adj_h + r_adj_h
    return J_h_h, adj_h


@jit
def lane_pull(l_adj_h, r_J_h_h, r_adj_h):
    adj_h = r_J_h_h * l_adj_h + r_adj_h
    return adj_h


@jit
def token_state(b_z, b_x, h_h, kind, alone, BC: tl.constexpr):
    """v_* before a token and s_* after it. h_* is what stands there, but counts for nothing where kind is 2 or 3, or
    the token is `alone`: then the state after it is its lifted element."""
    v_h = h_h
    if kind is not None:
        v_h = tl.where(kind >= 2, tl.full([BC], 0.0, tl.float32), h_h)
    s_h = lane_step(b_z, b_x, v_h)
    e_a, e_h = lane_lift(b_z, b_x)
    if kind is not None:
        s_h = tl.where(kind == 3, e_h, s_h)
    elif alone is not None:
        s_h = tl.where(alone, e_h, s_h)
    if kind is not None:
        s_h = tl.where((kind & 1) != 0, s_h, v_h)
    return v_h, s_h


@jit
def lane_flagged(left_kind, l_a, l_h, right_kind, r_a, r_h):
    """A combine, with the kind of each side: a skipped one leaves the other, an absolute one (2, 3) drops the left."""
    c_a, c_h = lane_combine(l_a, l_h, r_a, r_h)
    both = (left_kind != 0) & (right_kind == 1)
    c_a = tl.where(right_kind == 0, l_a, tl.where(both, c_a, r_a))
    c_h = tl.where(right_kind == 0, l_h, tl.where(both, c_h, r_h))
    return left_kind | right_kind, c_a, c_h


@jit
def lane_cut(left_cut, l_J_h_h, l_adj_h, right_cut, r_J_h_h, r_adj_h):
    """lane_compose, where `cut` says that nothing reaches the state from later tokens."""
    c_J_h_h, c_adj_h = lane_compose(l_J_h_h, l_adj_h, r_J_h_h, r_adj_h)
    c_adj_h = tl.where(right_cut != 0, r_adj_h, c_adj_h)
    return left_cut | right_cut, c_J_h_h, c_adj_h


@jit
def tile_pick(x, chosen, axis: tl.constexpr):
    """The one entry along an axis that is chosen: a sum of bits, all others 0, which costs nothing inside a thread."""
    if x.dtype == tl.float32:
        return tl.sum(tl.where(chosen, x.to(tl.int32, bitcast=True), 0), axis).to(tl.float32, bitcast=True)
    else:
        return tl.sum(tl.where(chosen, x, 0), axis)


@jit
def lane_index(c, Q: tl.constexpr, D: tl.constexpr):
    """Where lane c lies in a tensor that has fewer lanes."""
    if Q == 1:
        return c
    return c // Q * D + c % D


@jit
def tile_span(p_cu, PACKED, i_n, i_s, T, SEG):
    """Sequence n from bos to eos, its segment s from `begin`, `length` tokens (none if not positive)."""
    bos = i_n.to(tl.int64) * T
    eos = bos + T
    if PACKED != 0:
        bos = tl.load(p_cu + i_n).to(tl.int64)
        eos = tl.load(p_cu + i_n + 1).to(tl.int64)
    begin = bos + i_s.to(tl.int64) * SEG
    length = tl.minimum(eos - begin, SEG).to(tl.int32)
    return bos, eos, begin, length


@jit
def lane_count(l_restart, l_count, r_restart, r_count):
    """How many tokens counted since the latest restart, at most 2."""
    return l_restart | r_restart, tl.minimum(tl.where(r_restart != 0, r_count, l_count + r_count), 2)


@jit(do_not_specialize=["T", "PACKED"])
def kind_kernel(p_code, p_kind, p_cu, T, PACKED, JOINED: tl.constexpr, BT: tl.constexpr):
    """Marks (1 -> 3) each token that counts and has nothing before it; one program a sequence."""
    i_n = tl.program_id(0)
    bos, eos, begin, length = tile_span(p_cu, PACKED, i_n, i_n * 0, T, T)
    t = tl.arange(0, BT)
    before = tl.program_id(0) * 0 + (1 if JOINED else 0)
    for i_t in tl.range(0, length, BT):
        code = tl.load(p_code + begin + i_t + t, mask=i_t + t < length, other=0).to(tl.int32)
        restart, count = code & 2, code & 1
        count = tl.where((t == 0) & (restart == 0), count + before, count)
        restart, count = tl.associative_scan((restart, count), 0, lane_count)
        tl.store(p_kind + begin + i_t + t, tl.where((code == 1) & (count == 1), 3, code), mask=i_t + t < length)
        before = tl.sum(tl.where(t == BT - 1, count, 0), 0)


@jit(do_not_specialize=["T", "S", "SEG", "PACKED", "REST"])
def forward_kernel(
    p_z, p_x, p_out_y, p_saved_h, p_initial_h, p_final_h, p_carry_h,
    p_kind, p_cu, T, S, SEG, PACKED, REST,
    Q_z: tl.constexpr, D_z: tl.constexpr,
    Q_x: tl.constexpr, D_x: tl.constexpr,
    C: tl.constexpr, JOINED: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
):
    """Outputs, the final state, and the states before every K tokens, for the backward. h_* [BC] is the state before a
    token."""
    NC: tl.constexpr = (C + BC - 1) // BC
    i_c, i_n, i_s = tl.program_id(0) % NC, tl.program_id(0) // NC // S, tl.program_id(0) // NC % S
    bos, eos, begin, length = tile_span(p_cu, PACKED, i_n, i_s, T, SEG)
    i_n = i_n.to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m, m_tile = None, None
    if C % BC != 0:
        m, m_tile = m_c, m_c[None, :]
    t = tl.arange(0, R)[:, None]
    o = tl.max_contiguous(t * C + o_c[None, :], (1, V))  # [R, BC]; a thread loads V lanes at once
    if V == 1:  # one that may start anywhere, as far as it shows: its tokens would be other threads' if it loaded more
        o = t * C + o_c[None, :] + (S < 0)
    C_z: tl.constexpr = C if Q_z == 1 else C // Q_z * D_z + C % D_z
    k_z = lane_index(o_c, Q_z, D_z)
    oc_z = o if Q_z == 1 else t * C_z + k_z[None, :]
    C_x: tl.constexpr = C if Q_x == 1 else C // Q_x * D_x + C % D_x
    k_x = lane_index(o_c, Q_x, D_x)
    oc_x = o if Q_x == 1 else t * C_x + k_x[None, :]
    h_h = tl.full([BC], 0.0, tl.float32)
    if p_initial_h is not None:
        h_h = tl.load(p_initial_h + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    if S > 1:
        h_h = tl.load(p_carry_h + (i_n * (S + 1) + i_s) * C + o_c, mask=m_c, other=0).to(tl.float32)
    BT: tl.constexpr = max(R, K)
    whole = tl.maximum(length, 0) // BT * BT
    for i_t in tl.range(0, whole, R, num_stages=NS):
        row = begin + i_t
        q_out_y = p_out_y + (row * C + o_c)
        tb_z = tile_load(p_z + row * C_z + oc_z, m_tile).to(tl.float32)  # [R, BC]
        tb_x = tile_load(p_x + row * C_x + oc_x, m_tile).to(tl.float32)  # [R, BC]
        for r in tl.static_range(R):
            if r % K == 0:
                if p_saved_h is not None:
                    tl.store(p_saved_h + ((row + r) // K + i_n) * C + o_c, h_h, mask=m_c & ((i_t + r) % K == 0))
            b_z = tile_pick(tb_z, t == r, 0)
            b_x = tile_pick(tb_x, t == r, 0)
            alone, kind = None, None
            if p_kind is not None:
                kind = tl.load(p_kind + row + r).to(tl.int32)
            elif r == 0 and not JOINED:
                alone = (i_t == 0) & (i_s == 0)
            v_h, s_h = token_state(b_z, b_x, h_h, kind, alone, BC)
            y_y = lane_readout(s_h)
            if p_kind is not None:
                y_y = tl.where((kind & 1) != 0, y_y, 0)
            tl.store(q_out_y + r * C, y_y, mask=m)
            h_h = s_h
    for i_t in tl.range(whole, length, 1, num_stages=NS):
        row = begin + i_t
        q_out_y = p_out_y + (row * C + o_c)
        b_z = tile_load(p_z + row * C_z + k_z, m).to(tl.float32)
        b_x = tile_load(p_x + row * C_x + k_x, m).to(tl.float32)
        within = i_t % K
        kept = tl.where(i_t - within + K <= length, row // K + i_n, REST + i_n * K + within)
        if p_saved_h is not None:
            tl.store(p_saved_h + kept * C + o_c, h_h, mask=m_c & ((within == 0) | (kept >= REST)))
        alone, kind = None, None
        if p_kind is not None:
            kind = tl.load(p_kind + row).to(tl.int32)
        elif not JOINED:
            alone = (i_t == 0) & (i_s == 0)
        v_h, s_h = token_state(b_z, b_x, h_h, kind, alone, BC)
        y_y = lane_readout(s_h)
        if p_kind is not None:
            y_y = tl.where((kind & 1) != 0, y_y, 0)
        tl.store(q_out_y, y_y, mask=m)
        h_h = s_h
    m_end = m_c & (begin + SEG >= eos) & ((begin < eos) | (i_s == 0))
    tl.store(p_final_h + i_n * C + o_c, h_h, mask=m_end)


@jit(do_not_specialize=["T", "S", "SEG", "PACKED", "REST"])
def fold_kernel(
    p_z, p_x, p_fold_a, p_fold_h, p_fold_kind,
    p_kind, p_cu, T, S, SEG, PACKED, REST,
    Q_z: tl.constexpr, D_z: tl.constexpr,
    Q_x: tl.constexpr, D_x: tl.constexpr,
    C: tl.constexpr, R: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
):
    """The product of each whole segment's elements, [N, S, C] a component; with kinds, its kind. What a sequence's last
    segment folds to is not read."""
    NC: tl.constexpr = (C + BC - 1) // BC
    i_c, i_n, i_s = tl.program_id(0) % NC, tl.program_id(0) // NC // S, tl.program_id(0) // NC % S
    bos, eos, begin, length = tile_span(p_cu, PACKED, i_n, i_s, T, SEG)
    i_n = i_n.to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m, m_tile = None, None
    if C % BC != 0:
        m, m_tile = m_c, m_c[None, :]
    t = tl.arange(0, R)[:, None]
    o = tl.max_contiguous(t * C + o_c[None, :], (1, V))  # [R, BC]; a thread loads V lanes at once
    if V == 1:  # one that may start anywhere, as far as it shows: its tokens would be other threads' if it loaded more
        o = t * C + o_c[None, :] + (S < 0)
    C_z: tl.constexpr = C if Q_z == 1 else C // Q_z * D_z + C % D_z
    k_z = lane_index(o_c, Q_z, D_z)
    oc_z = o if Q_z == 1 else t * C_z + k_z[None, :]
    C_x: tl.constexpr = C if Q_x == 1 else C // Q_x * D_x + C % D_x
    k_x = lane_index(o_c, Q_x, D_x)
    oc_x = o if Q_x == 1 else t * C_x + k_x[None, :]
    h_a = tl.zeros([BC], tl.float32)
    h_h = tl.zeros([BC], tl.float32)
    before = i_s * 0
    for i_t in tl.range(0, tl.where(length == SEG, length, 0), R, num_stages=NS):
        row = begin + i_t
        tb_z = tile_load(p_z + row * C_z + oc_z, m_tile).to(tl.float32)  # [R, BC]
        tb_x = tile_load(p_x + row * C_x + oc_x, m_tile).to(tl.float32)  # [R, BC]
        for r in tl.static_range(R):
            b_z = tile_pick(tb_z, t == r, 0)
            b_x = tile_pick(tb_x, t == r, 0)
            alone, kind = None, None
            if p_kind is not None:
                kind = tl.load(p_kind + row + r).to(tl.int32)
            elif r == 0:
                alone = i_t == 0
            e_a, e_h = lane_lift(b_z, b_x)
            f_a, f_h = lane_fold(b_z, b_x, h_a, h_h)
            if kind is not None:
                a_a = e_a
                f_a = tl.where(kind == 0, h_a, tl.where((kind == 1) & (before != 0), f_a, a_a))
                a_h = tl.where(kind == 2, 0.0, e_h)
                f_h = tl.where(kind == 0, h_h, tl.where((kind == 1) & (before != 0), f_h, a_h))
                before = before | kind
            elif alone is not None:
                f_a = tl.where(alone, e_a, f_a)
                f_h = tl.where(alone, e_h, f_h)
            h_a = f_a
            h_h = f_h
    tl.store(p_fold_a + (i_n * S + i_s) * C + o_c, h_a, mask=m_c)
    tl.store(p_fold_h + (i_n * S + i_s) * C + o_c, h_h, mask=m_c)
    if p_kind is not None:
        tl.store(p_fold_kind + (i_n * S + i_s) * C + o_c, tl.full([BC], 0, tl.int32) + before, mask=m_c)


@jit(do_not_specialize=["T", "S", "SEG", "PACKED", "REST"])
def carry_kernel(
    p_fold_a, p_fold_h, p_initial_h, p_carry_h,
    p_kind, p_cu, T, S, SEG, PACKED, REST,
    C: tl.constexpr, JOINED: tl.constexpr, R: tl.constexpr, W: tl.constexpr, BC: tl.constexpr,
):
    """What is before each segment, [N, S + 1, C] a live component, from the segments' products."""
    NC: tl.constexpr = (C + BC - 1) // BC
    i_c, i_n = tl.program_id(0) % NC, tl.program_id(0) // NC
    bos, eos, begin, length = tile_span(p_cu, PACKED, i_n, i_n * 0, T, SEG)
    segments = tl.cdiv(eos - bos, SEG).to(tl.int32)
    i_n = i_n.to(tl.int64)
    BT: tl.constexpr = W * R
    o_c = i_c * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    m_c = o_c < C
    w = tl.arange(0, W)[:, None]  # [W, 1]
    r = tl.arange(0, R)[None, :, None]
    t = (w[:, :, None] * R + r)  # [W, R, 1]
    o = t * C + o_c[:, None, :]  # [W, R, BC]
    above = tl.broadcast_to(tl.maximum(w - 1, 0), [W, BC])
    h_h = tl.full([1, BC], 0.0, tl.float32)
    if p_initial_h is not None:
        h_h = tl.load(p_initial_h + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    tl.store(p_carry_h + i_n * (S + 1) * C + o_c, h_h, mask=m_c)
    for i_t in tl.range(0, segments, BT):
        m = (i_t + t < segments) & m_c[:, None, :]
        e_a = tl.load(p_fold_a + (i_n * S + i_t) * C + o, mask=m, other=0)
        e_h = tl.load(p_fold_h + (i_n * S + i_t) * C + o, mask=m, other=0)
        if p_kind is not None:
            kind = tl.load(p_kind + (i_n * S + i_t) * C + o, mask=m, other=0).to(tl.int32)
        joined = ((i_n * 0 + i_t > 0) | JOINED).to(tl.int1)
        if p_kind is not None:
            inner_kind, g_a, g_h = tl.associative_scan((kind, e_a, e_h), 1, lane_flagged)
            outer_kind = tile_pick(inner_kind, r == R - 1, 1)
        else:
            (g_a, g_h,) = tl.associative_scan((e_a, e_h,), 1, lane_combine)
        c_a = tile_pick(g_a, r == R - 1, 1)  # [W, BC]
        c_h = tile_pick(g_h, r == R - 1, 1)  # [W, BC]
        f_h = lane_advance(h_h, c_a, c_h)
        if p_kind is not None:
            f_h = tl.where(outer_kind == 0, h_h, tl.where(outer_kind == 1, f_h, c_h))
            c_h = tl.where(w == 0, f_h, c_h)
            outer_kind = tl.where(w == 0, 3, outer_kind)
            outer_kind, c_a, c_h = tl.associative_scan((outer_kind, c_a, c_h), 0, lane_flagged)
        else:
            c_h = tl.where((w == 0) & joined, f_h, c_h)
            (c_a, c_h,) = tl.associative_scan((c_a, c_h,), 0, lane_combine)
        q_h = tl.where(w == 0, h_h, tl.gather(c_h, above, 0))[:, None, :]  # before each chunk
        h_h = tile_pick(c_h, w == W - 1, 0)[None, :]
        s_h = lane_advance(q_h, g_a, g_h)
        if p_kind is not None:
            s_h = tl.where(inner_kind == 0, q_h, tl.where(inner_kind == 1, s_h, g_h))
        else:
            s_h = tl.where((w > 0)[:, :, None] | joined, s_h, g_h)
        tl.store(p_carry_h + (i_n * (S + 1) + i_t + 1) * C + o, s_h, mask=m)


@jit(do_not_specialize=["T", "S", "SEG", "PACKED", "REST"])
def backward_kernel(
    p_z, p_x, p_d_out_y, p_saved_h, p_d_final_h, p_d_initial_h, p_d_z, p_d_x, p_carry_h,
    p_kind, p_cu, T, S, SEG, PACKED, REST,
    Q_z: tl.constexpr, D_z: tl.constexpr,
    Q_x: tl.constexpr, D_x: tl.constexpr,
    C: tl.constexpr, JOINED: tl.constexpr,
    R: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
):
    """From the last token to the first: l_* [BC], the cotangent of the state from later tokens, takes in what each
    token's outputs ask of it, and gives the gradients. The states come again, R tokens at a time, from those kept."""
    NC: tl.constexpr = (C + BC - 1) // BC
    i_c, i_n, i_s = tl.program_id(0) % NC, tl.program_id(0) // NC // S, tl.program_id(0) // NC % S
    bos, eos, begin, length = tile_span(p_cu, PACKED, i_n, i_s, T, SEG)
    i_n = i_n.to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m, m_tile = None, None
    if C % BC != 0:
        m, m_tile = m_c, m_c[None, :]
    t = tl.arange(0, R)[:, None]
    o = tl.max_contiguous(t * C + o_c[None, :], (1, V))  # [R, BC]; a thread loads V lanes at once
    if V == 1:  # one that may start anywhere, as far as it shows: its tokens would be other threads' if it loaded more
        o = t * C + o_c[None, :] + (S < 0)
    C_z: tl.constexpr = C if Q_z == 1 else C // Q_z * D_z + C % D_z
    k_z = lane_index(o_c, Q_z, D_z)
    oc_z = o if Q_z == 1 else t * C_z + k_z[None, :]
    C_x: tl.constexpr = C if Q_x == 1 else C // Q_x * D_x + C % D_x
    k_x = lane_index(o_c, Q_x, D_x)
    oc_x = o if Q_x == 1 else t * C_x + k_x[None, :]
    l_h = tl.load(p_d_final_h + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    if S > 1:
        l_h = tl.load(p_carry_h + (i_n * S + i_s) * C + o_c, mask=m_c, other=0).to(tl.float32)
    whole = tl.maximum(length, 0) // R * R
    for j in tl.range(0, length - whole, 1, num_stages=NS):
        i_t = length - 1 - j
        row = begin + i_t
        q_d_z = p_d_z + (row * C + o_c)
        q_d_x = p_d_x + (row * C + o_c)
        b_z = tile_load(p_z + row * C_z + k_z, m).to(tl.float32)
        b_x = tile_load(p_x + row * C_x + k_x, m).to(tl.float32)
        b_d_y = tile_load(p_d_out_y + row * C + o_c, m).to(tl.float32)
        alone, kind = None, None
        if p_kind is not None:
            kind = tl.load(p_kind + row).to(tl.int32)
        elif not JOINED:
            alone = (i_t == 0) & (i_s == 0)
        h_h = tl.load(p_saved_h + (REST + i_n * R + i_t - whole) * C + o_c, mask=m_c, other=0).to(tl.float32)
        v_h, s_h = token_state(b_z, b_x, h_h, kind, alone, BC)
        if p_kind is not None:
            b_d_y = tl.where((kind & 1) != 0, b_d_y, 0.0)
        d_adj_h = lane_direct(b_d_y)
        c_h = l_h + d_adj_h
        adj_h, g_z, g_x = lane_back(b_z, b_x, v_h, c_h)
        if p_kind is not None:
            adj_h = tl.where(kind == 1, adj_h, tl.where(kind == 0, l_h, 0.0))
        l_h = adj_h
        if p_kind is not None:
            g_z = tl.where((kind & 1) != 0, g_z, 0.0)
        if p_kind is not None:
            g_x = tl.where((kind & 1) != 0, g_x, 0.0)
        tl.store(q_d_z, g_z, mask=m)
        tl.store(q_d_x, g_x, mask=m)
    for j in tl.range(0, whole, R, num_stages=NS):
        i_t = whole - R - j
        row = begin + i_t
        q_d_z = p_d_z + (row * C + o_c)
        q_d_x = p_d_x + (row * C + o_c)
        tb_z = tile_load(p_z + row * C_z + oc_z, m_tile).to(tl.float32)  # [R, BC]
        tb_x = tile_load(p_x + row * C_x + oc_x, m_tile).to(tl.float32)  # [R, BC]
        tb_d_y = tile_load(p_d_out_y + row * C + o, m_tile).to(tl.float32)  # [R, BC]
        h_h = tl.load(p_saved_h + (row // R + i_n) * C + o_c, mask=m_c, other=0).to(tl.float32)
        tv_h, ts_h = (), ()
        for r in tl.static_range(R):
            b_z = tile_pick(tb_z, t == r, 0)
            b_x = tile_pick(tb_x, t == r, 0)
            alone, kind = None, None
            if p_kind is not None:
                kind = tl.load(p_kind + row + r).to(tl.int32)
            elif r == 0 and not JOINED:
                alone = (i_t == 0) & (i_s == 0)
            v_h, s_h = token_state(b_z, b_x, h_h, kind, alone, BC)
            h_h = s_h
            tv_h = tv_h + (v_h,)
            ts_h = ts_h + (s_h,)
        for q in tl.static_range(R):
            b_z = tile_pick(tb_z, t == R - 1 - q, 0)
            b_x = tile_pick(tb_x, t == R - 1 - q, 0)
            b_d_y = tile_pick(tb_d_y, t == R - 1 - q, 0)
            v_h, s_h = tv_h[R - 1 - q], ts_h[R - 1 - q]
            alone, kind = None, None
            if p_kind is not None:
                kind = tl.load(p_kind + row + (R - 1 - q)).to(tl.int32)
            elif False:
                alone = (i_t == 0) & (i_s == 0)
            if p_kind is not None:
                b_d_y = tl.where((kind & 1) != 0, b_d_y, 0.0)
            d_adj_h = lane_direct(b_d_y)
            c_h = l_h + d_adj_h
            adj_h, g_z, g_x = lane_back(b_z, b_x, v_h, c_h)
            if p_kind is not None:
                adj_h = tl.where(kind == 1, adj_h, tl.where(kind == 0, l_h, 0.0))
            l_h = adj_h
            if p_kind is not None:
                g_z = tl.where((kind & 1) != 0, g_z, 0.0)
            if p_kind is not None:
                g_x = tl.where((kind & 1) != 0, g_x, 0.0)
            tl.store(q_d_z + (R - 1 - q) * C, g_z, mask=m)
            tl.store(q_d_x + (R - 1 - q) * C, g_x, mask=m)
    if p_d_initial_h is not None:
        tl.store(p_d_initial_h + i_n * C + o_c, l_h, mask=m_c & (i_s == 0))


@jit(do_not_specialize=["T", "S", "SEG", "PACKED", "REST"])
def backward_fold_kernel(
    p_z, p_d_out_y, p_fold_J_h_h, p_fold_adj_h, p_fold_cut,
    p_kind, p_cu, T, S, SEG, PACKED, REST,
    Q_z: tl.constexpr, D_z: tl.constexpr,
    C: tl.constexpr, JOINED: tl.constexpr,
    R: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
):
    """How the cotangents before each segment come from those after it, [N, S, C] an entry."""
    NC: tl.constexpr = (C + BC - 1) // BC
    i_c, i_n, i_s = tl.program_id(0) % NC, tl.program_id(0) // NC // S, tl.program_id(0) // NC % S
    bos, eos, begin, length = tile_span(p_cu, PACKED, i_n, i_s, T, SEG)
    i_n = i_n.to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)
    m_c = o_c < C
    m, m_tile = None, None
    if C % BC != 0:
        m, m_tile = m_c, m_c[None, :]
    t = tl.arange(0, R)[:, None]
    o = tl.max_contiguous(t * C + o_c[None, :], (1, V))  # [R, BC]; a thread loads V lanes at once
    if V == 1:  # one that may start anywhere, as far as it shows: its tokens would be other threads' if it loaded more
        o = t * C + o_c[None, :] + (S < 0)
    C_z: tl.constexpr = C if Q_z == 1 else C // Q_z * D_z + C % D_z
    k_z = lane_index(o_c, Q_z, D_z)
    oc_z = o if Q_z == 1 else t * C_z + k_z[None, :]
    z_J_h_h = tl.full([BC], 1.0, tl.float32)
    z_adj_h = tl.full([BC], 0.0, tl.float32)
    cut = i_s * 0
    whole = tl.maximum(length, 0) // R * R
    for j in tl.range(0, length - whole, 1, num_stages=NS):
        i_t = length - 1 - j
        row = begin + i_t
        b_z = tile_load(p_z + row * C_z + k_z, m).to(tl.float32)
        b_d_y = tile_load(p_d_out_y + row * C + o_c, m).to(tl.float32)
        alone, kind = None, None
        if p_kind is not None:
            kind = tl.load(p_kind + row).to(tl.int32)
        elif not JOINED:
            alone = (i_t == 0) & (i_s == 0)
        a_J_h_h, a_adj_h = lane_entry(b_z, b_d_y)
        f_J_h_h, f_adj_h = lane_compose(z_J_h_h, z_adj_h, a_J_h_h, a_adj_h)
        if p_kind is not None:
            f_J_h_h = tl.where(kind == 1, f_J_h_h, tl.where(kind == 0, z_J_h_h, 1.0))
        z_J_h_h = f_J_h_h
        if p_kind is not None:
            f_adj_h = tl.where(kind == 1, f_adj_h, tl.where(kind == 0, z_adj_h, 0.0))
        z_adj_h = f_adj_h
        if p_kind is not None:
            cut = cut | (kind >> 1)
    for j in tl.range(0, whole, R, num_stages=NS):
        i_t = whole - R - j
        row = begin + i_t
        tb_z = tile_load(p_z + row * C_z + oc_z, m_tile).to(tl.float32)  # [R, BC]
        tb_d_y = tile_load(p_d_out_y + row * C + o, m_tile).to(tl.float32)  # [R, BC]
        for q in tl.static_range(R):
            b_z = tile_pick(tb_z, t == R - 1 - q, 0)
            b_d_y = tile_pick(tb_d_y, t == R - 1 - q, 0)
            alone, kind = None, None
            if p_kind is not None:
                kind = tl.load(p_kind + row + (R - 1 - q)).to(tl.int32)
            elif False:
                alone = (i_t == 0) & (i_s == 0)
            a_J_h_h, a_adj_h = lane_entry(b_z, b_d_y)
            f_J_h_h, f_adj_h = lane_compose(z_J_h_h, z_adj_h, a_J_h_h, a_adj_h)
            if p_kind is not None:
                f_J_h_h = tl.where(kind == 1, f_J_h_h, tl.where(kind == 0, z_J_h_h, 1.0))
            z_J_h_h = f_J_h_h
            if p_kind is not None:
                f_adj_h = tl.where(kind == 1, f_adj_h, tl.where(kind == 0, z_adj_h, 0.0))
            z_adj_h = f_adj_h
            if p_kind is not None:
                cut = cut | (kind >> 1)
    tl.store(p_fold_J_h_h + (i_n * S + i_s) * C + o_c, z_J_h_h, mask=m_c)
    tl.store(p_fold_adj_h + (i_n * S + i_s) * C + o_c, z_adj_h, mask=m_c)
    if p_kind is not None:
        tl.store(p_fold_cut + (i_n * S + i_s) * C + o_c, tl.full([BC], 0, tl.int32) + cut, mask=m_c)


@jit(do_not_specialize=["T", "S", "SEG", "PACKED", "REST"])
def backward_carry_kernel(
    p_fold_J_h_h, p_fold_adj_h, p_d_final_h, p_carry_h,
    p_cut, p_cu, T, S, SEG, PACKED, REST,
    C: tl.constexpr, R: tl.constexpr, W: tl.constexpr, BC: tl.constexpr,
):
    """The cotangents after each segment, [N, S, C] a live component."""
    NC: tl.constexpr = (C + BC - 1) // BC
    i_c, i_n = tl.program_id(0) % NC, tl.program_id(0) // NC
    bos, eos, begin, length = tile_span(p_cu, PACKED, i_n, i_n * 0, T, SEG)
    segments = tl.cdiv(eos - bos, SEG).to(tl.int32)
    i_n = i_n.to(tl.int64)
    BT: tl.constexpr = W * R
    o_c = i_c * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    m_c = o_c < C
    w = tl.arange(0, W)[:, None]  # [W, 1]
    r = tl.arange(0, R)[None, :, None]
    t = BT - 1 - (w[:, :, None] * R + r)  # [W, R, 1]
    o = t * C + o_c[:, None, :]  # [W, R, BC]
    above = tl.broadcast_to(tl.maximum(w - 1, 0), [W, BC])
    h_adj_h = tl.load(p_d_final_h + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    tl.store(p_carry_h + (i_n * S + tl.maximum(segments - 1, 0)) * C + o_c, h_adj_h, mask=m_c)
    tiles = tl.cdiv(segments, BT)
    for j in tl.range(0, tiles):
        i_t = (tiles - 1 - j) * BT
        m = (i_t + t < segments) & m_c[:, None, :]
        a_J_h_h = tl.load(p_fold_J_h_h + (i_n * S + i_t) * C + o, mask=m, other=1.0)
        a_adj_h = tl.load(p_fold_adj_h + (i_n * S + i_t) * C + o, mask=m, other=0.0)
        if p_cut is not None:
            cut = tl.load(p_cut + (i_n * S + i_t) * C + o, mask=m, other=0).to(tl.int32)
        if p_cut is not None:
            inner_cut, g_J_h_h, g_adj_h = tl.associative_scan((cut, a_J_h_h, a_adj_h), 1, lane_cut)
            outer_cut = tile_pick(inner_cut, r == R - 1, 1)
        else:
            (g_J_h_h, g_adj_h,) = tl.associative_scan((a_J_h_h, a_adj_h,), 1, lane_compose)
        c_J_h_h = tile_pick(g_J_h_h, r == R - 1, 1)  # [W, BC]
        c_adj_h = tile_pick(g_adj_h, r == R - 1, 1)  # [W, BC]
        f_adj_h = lane_pull(h_adj_h, c_J_h_h, c_adj_h)
        if p_cut is not None:
            c_adj_h = tl.where((w == 0) & (outer_cut == 0), f_adj_h, c_adj_h)
            outer_cut, c_J_h_h, c_adj_h = tl.associative_scan((outer_cut, c_J_h_h, c_adj_h), 0, lane_cut)
        else:
            c_adj_h = tl.where(w == 0, f_adj_h, c_adj_h)
            (c_J_h_h, c_adj_h,) = tl.associative_scan((c_J_h_h, c_adj_h,), 0, lane_compose)
        q_adj_h = tl.where(w == 0, h_adj_h, tl.gather(c_adj_h, above, 0))[:, None, :]  # below each chunk
        h_adj_h = tile_pick(c_adj_h, w == W - 1, 0)[None, :]
        l_adj_h = lane_pull(q_adj_h, g_J_h_h, g_adj_h)
        if p_cut is not None:
            l_adj_h = tl.where(inner_cut == 0, l_adj_h, g_adj_h)
        tl.store(p_carry_h + (i_n * S + i_t - 1) * C + o, l_adj_h, mask=m & (i_t + t > 0))


@jit(do_not_specialize=["CV", "N_z", "N_x", ])
def step_kernel(
    p_z, p_x, p_out_y, p_state_h, p_next_h,
    p_slots, CV, N_z, N_x,
    Q_z: tl.constexpr, D_z: tl.constexpr,
    Q_x: tl.constexpr, D_x: tl.constexpr,
    BC: tl.constexpr, V: tl.constexpr,
):
    """One token a row: the state is read, moved on and written to p_next_*, in the rows that p_slots [B] names. N * V
    lanes lie from a row of an input to the next."""
    C = CV * V
    NC = tl.cdiv(C, BC)
    i_c, row = tl.program_id(0) % NC, (tl.program_id(0) // NC).to(tl.int64)
    slot = row
    if p_slots is not None:
        slot = tl.load(p_slots + row).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    m_c = o_c < C
    k_z = lane_index(o_c, Q_z, D_z)
    k_x = lane_index(o_c, Q_x, D_x)
    C_z = N_z.to(tl.int64) * V
    C_x = N_x.to(tl.int64) * V
    b_z = tl.load(p_z + row * C_z + k_z, mask=m_c, other=0).to(tl.float32)
    b_x = tl.load(p_x + row * C_x + k_x, mask=m_c, other=0).to(tl.float32)
    v_h = tl.load(p_state_h + slot * C + o_c, mask=m_c, other=0).to(tl.float32)
    e_a, e_h = lane_lift(b_z, b_x)
    s_h = lane_advance(v_h, e_a, e_h)
    y_y = lane_readout(s_h)
    tl.store(p_next_h + slot * C + o_c, s_h, mask=m_c)
    tl.store(p_out_y + row * C + o_c, y_y, mask=m_c)


# --- How the lanes of a call's tensors lie in memory, for kernels whose lanes do the same.


class LaneShape:
    """How the lanes of a call's tensors lie: `full` sizes, `count` of them, and a map (Q, D) for each tensor: lane c is
    its (c // Q) * D + c % D; None: no such map, the tensor is expanded."""

    def __init__(self, table: Any, inputs: tuple[Any, ...], params: tuple[Any, ...]) -> None:
        slots = [*zip(table.inputs, inputs, strict=True), *zip(table.params, params, strict=True)]
        dims: Sequence[str] = table.dims
        sizes: dict[str, int] = {}
        lanes: list[int] = [1] * max((len(shape) - len(own) for (_, own, _), shape in slots), default=0)
        for (_, own, _), shape in slots:
            front = len(shape) - len(own)
            sizes.update(zip(own, shape[front:], strict=True))
            for axis in range(-front, 0):
                both = lanes[axis], shape[front + axis]
                lanes[axis] = 0 if 0 in both else max(both)
        self.lanes = tuple(lanes)
        self.dims = tuple(dims)
        self.full = (*self.lanes, *(sizes[d] for d in dims))
        self.count = math.prod(self.full)
        self.axes = [self._axes(own, shape) for (_, own, _), shape in slots]
        self.maps = [_lane_map(a) for a in self.axes]
        self.inputs = len(inputs)
        self.kinds = [kind for (_, _, kind), _ in slots]

    def _axes(self, own: Sequence[str], shape: Sequence[int]) -> list[tuple[int, int]]:
        """(full, own) sizes, axis by axis; a grouped axis is two."""
        front = len(shape) - len(own)
        lanes = [1] * (len(self.lanes) - front) + list(shape[:front])
        axes: list[tuple[int, int]] = []
        for full, here in zip(self.lanes, lanes, strict=True):
            axes += [(full, here)] if here in (1, full) else [(here, here), (full // here, 1)]
        held = dict(zip(own, shape[front:], strict=True))
        sizes = self.full[len(self.lanes) :]
        return [*axes, *((size, held.get(d, 1)) for d, size in zip(self.dims, sizes, strict=True))]

    def tensors(
        self, places: tuple[tuple[int, ...], ...], inputs: Sequence[Tensor], params: Sequence[Tensor]
    ) -> list[Any]:
        """The tensors at these places as kernels take them."""
        found: list[Any] = [self.tensor(at, inputs[at], 2) for at in places[0]]
        return found + [self.tensor(self.inputs + at, params[at], 0) for at in places[1]]

    def tensor(self, at: int, x: Tensor, lead: int) -> Tensor:
        """Contiguous, complex if it is said to be, and expanded if its lanes have no map; `lead` axes before them."""
        if self.kinds[at] == "complex" and not x.is_complex():
            x = x.to(torch.complex64)
        if self.maps[at] is None:
            axes = self.axes[at]
            x = x.reshape(*x.shape[:lead], *(n for _, n in axes)).expand(*x.shape[:lead], *(n for n, _ in axes))
        return _plain(x)

    def flat_maps(self, places: tuple[tuple[int, ...], ...]) -> list[int]:
        """Q and D of each of the tensors at these places."""
        found = [self.maps[at] or (1, 1) for at in (*places[0], *(self.inputs + at for at in places[1]))]
        return [number for pair in found for number in pair]

    def reduced(self, grad: Tensor, like: Tensor, own: Sequence[str], lead: int) -> Tensor:
        """A gradient in all lanes summed to the shape and dtype of its tensor."""
        axes = self._axes(own, like.shape[lead:])
        if any(full != here for full, here in axes):
            grad = grad.reshape(*grad.shape[:lead], *(full for full, _ in axes))
            grad = grad.sum([lead + n for n, (full, here) in enumerate(axes) if full != here])
        grad = grad.reshape(like.shape)
        if grad.is_complex() and not like.is_complex():
            grad = grad.real
        return grad.to(like.dtype)


def _lane_map(axes: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Runs of axes that a tensor has or lacks: with one lacking run between, lane c is its (c // Q) * D + c % D."""
    runs: list[list[int]] = []  # [has it, size]
    for full, here in axes:
        if full == 1:
            continue
        has = int(here == full)
        if runs and runs[-1][0] == has:
            runs[-1][1] *= full
        else:
            runs.append([has, full])
    lacking = [n for n, (has, _) in enumerate(runs) if not has]
    if not lacking:
        return 1, 1
    if len(lacking) > 1:
        return None
    inner = math.prod(size for _, size in runs[lacking[0] + 1 :])
    return runs[lacking[0]][1] * inner, inner


def real_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """The real dtype of outputs: what the float tensors promote to."""
    found: torch.dtype | None = None
    for x in tensors:
        dtype = x.dtype
        if dtype.is_complex:
            dtype = torch.float32
        if dtype.is_floating_point and dtype != found:
            found = dtype if found is None else torch.promote_types(found, dtype)
    return found or torch.get_default_dtype()


def _plain(x: Tensor) -> Tensor:
    """Contiguous, and nothing left to be done when it is read (a conjugate, a sign)."""
    if x.is_contiguous() and not x.is_neg() and not x.is_conj():
        return x
    return x.resolve_conj().resolve_neg().contiguous()


def _power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << (n - 1).bit_length()


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


# --- One token at a time by the step kernel: what its shapes fix is worked out once.


class StepPlan:
    """A step of one shape and layout: inputs [B, ...], params, and whether it moves the state in place."""

    def __init__(
        self, table: Any, kernel: Kernel, inputs: Sequence[Tensor], params: Sequence[Tensor], in_place: bool
    ) -> None:
        self.places: tuple[tuple[int, ...], tuple[int, ...]] = table.forward
        self.in_place = in_place
        self.batch = inputs[0].shape[0]
        lanes = self.lanes = LaneShape(table, tuple(x.shape[1:] for x in inputs), tuple(p.shape for p in params))
        real = real_dtype([*inputs, *params])
        dtypes = {"real": real, "complex": torch.complex64, "int": torch.int64, "bool": torch.bool}
        whole = (self.batch, *lanes.full)
        self.outputs = [(whole, dtypes[kind], _model(whole, dtypes[kind], inputs)) for _, kind in table.outputs]
        self.launch = None
        strides = {at: self._stride(at, inputs[at]) for at in self.places[0]}
        self.arguments = [(at, strides[at] is not None) for at in self.places[0]]
        for at in self.places[1]:
            place = len(inputs) + at
            self.arguments.append((place, self._stride(place, params[at]) is not None))
        if self.batch and lanes.count:
            rows = [self._width(at) if strides[at] is None else strides[at] for at in self.places[0]]
            vector = math.gcd(lanes.count, 4, *(n for n in rows if n is not None))
            block = min(1024, _power_of_two(lanes.count))
            numbers = [n // vector for n in (lanes.count, *rows) if n is not None]
            self.launch = kernel.launch(
                self.batch * -(-lanes.count // block),
                numbers,
                (*lanes.flat_maps(self.places), block, vector),
                inputs[0].device,
            )

    def _stride(self, at: int, x: Tensor) -> int | None:
        """Lanes from one row of an input to the next; None: it is read from a copy. Of a param, 0 or None."""
        lanes = self.lanes
        ready = lanes.maps[at] is not None and (lanes.kinds[at] == "complex") <= x.is_complex()
        if not ready or x.is_conj() or x.is_neg():
            return None
        if at >= lanes.inputs:
            return 0 if x.is_contiguous() else None
        if not x[:1].is_contiguous():
            return None
        return x.stride(0) if self.batch > 1 else self._width(at)

    def _width(self, at: int) -> int:
        """The lanes of a contiguous row."""
        own = self.lanes.maps[at]
        return self.lanes.count if own is None else math.prod(n for _, n in self.lanes.axes[at])

    def __call__(
        self, state: Sequence[Tensor], tensors: Sequence[Tensor], slots: Tensor | None
    ) -> tuple[list[Tensor], Sequence[Tensor]]:
        """The outputs of one token, and the state after it: row b (or slots[b]) of `state` [rows, ...] moves on.
        `tensors`: the inputs and params that this plan was made for, or others of their shapes and layouts."""
        device = tensors[0].device
        outputs = [
            torch.empty(shape, dtype=dtype, device=device) if like is None else torch.empty_like(tensors[like])
            for shape, dtype, like in self.outputs
        ]
        after = state if self.in_place else [torch.empty_like(s) for s in state]
        if self.launch is not None:
            args = [tensors[at] if ready else self._ready(at, tensors[at]) for at, ready in self.arguments]
            self.launch(*args, *outputs, *state, *after, slots)
        return outputs, after

    def _ready(self, at: int, x: Tensor) -> Tensor:
        return self.lanes.tensor(at, x, 1 if at < self.lanes.inputs else 0)


def _model(shape: tuple[int, ...], dtype: torch.dtype, inputs: Sequence[Tensor]) -> int | None:
    """An input that such a tensor can be made like: the quickest way to make one."""
    found = (at for at, x in enumerate(inputs) if x.shape == shape and x.dtype == dtype and x.is_contiguous())
    return next(found, None)


class Steps:
    """Plans of steps that passed all checks, by what the checks look at: the next such step goes straight to a kernel.

    `names`: the state's tensors, in the kernel's order; `inputs`: how many of the arguments are inputs.
    """

    def __init__(self, names: tuple[str, ...], inputs: int, table: Any, kernel: Kernel) -> None:
        self.names, self.inputs, self.table, self.kernel = names, inputs, table, kernel
        self._known: dict[Any, StepPlan] = {}

    def again(self, state: Any, args: Sequence[Any], slots: Any, in_place: bool) -> tuple[Any, Any] | None:
        """The outputs and the state after the token, if a step like this is known. None, too, if these tensors are not
        for the kernel: autograd watches, something traces."""
        if torch.compiler.is_compiling() or type(state) is not dict or len(state) != len(self.names):
            return None
        try:
            before = [state[name] for name in self.names]
        except KeyError:
            return None
        key: list[Any] = [in_place]
        for x in (*args, *before) if slots is None else (*args, *before, slots):
            kind = type(x)
            if kind is not Tensor and kind is not torch.nn.Parameter:
                return None
            if x.requires_grad and not in_place and torch.is_grad_enabled():
                return None
            key.append((x.shape, x.stride(), x.dtype, x.device, x.is_neg(), x.is_conj()))
        plan = self._known.get(tuple(key))
        return None if plan is None else self._run(plan, state, before, args, slots)

    def first(self, state: Any, args: Sequence[Any], slots: Tensor | None, in_place: bool) -> tuple[Any, Any]:
        """The same of a step that has just been checked."""
        before = [state[name] for name in self.names]
        inputs, params = args[: self.inputs], args[self.inputs :]
        plan = StepPlan(self.table, self.kernel, inputs, params, in_place)
        tensors = (*args, *before) if slots is None else (*args, *before, slots)
        if len(self._known) >= 256:
            self._known.clear()
        key = [(x.shape, x.stride(), x.dtype, x.device, x.is_neg(), x.is_conj()) for x in tensors]
        self._known[in_place, *key] = plan
        return self._run(plan, state, before, args, slots)

    def _run(
        self, plan: StepPlan, state: Any, before: list[Tensor], args: Sequence[Any], slots: Tensor | None
    ) -> tuple[Any, Any]:
        outputs, after = plan(before, args, slots)
        moved = state if plan.in_place else dict(zip(self.names, after, strict=False))
        return outputs[0] if len(outputs) == 1 else tuple(outputs), moved


# --- Calls of the pointwise kernels: shapes to grids and tiles, buffers, one launch (three where time is split).

_SHAPES = 1024  # remembered shapes
_DTYPES = {"real": torch.float32, "complex": torch.complex64, "int": torch.int64, "bool": torch.bool}


class PointwiseKernels(Compiling):
    """The kernels of one spec behind tensors in the spec's own order.

    Inputs are [B, T, *lanes, *dims] (declared ones, then taps), params [*lanes, *dims] or [*dims], states
    [N, *lanes, *dims]; lanes of size 1 and grouped ones need not be expanded. `table` is what the compiler wrote: the
    kernels, and the places of the tensors that each takes. `processors` is the GPU's number of multiprocessors.
    """

    def __init__(self, table: Any, exact: bool = False) -> None:
        """`exact`: outputs are in the dtype of the state, whatever that of the inputs."""
        self.table, self.exact = table, exact
        self.interpreted: bool = table.interpreted
        self.processors: int | None = 1 if self.interpreted else None
        self.segment_tiles = 8  # a segment has at least as many
        self.kernels = {k.removesuffix("_kernel"): Kernel(v) for k, v in vars(table).items() if k.endswith("_kernel")}
        self._plans: dict[Any, Any] = {}
        self._families: dict[Any, Any] = {}
        self._lanes: dict[Any, LaneShape] = {}
        self._tuned: Any = None

    def saved_components(self) -> tuple[str, ...]:
        """The live components whose values `scan_forward` saves."""
        return tuple(self.table.live[c][0] for c in self.table.saved)

    def saved_rows(self, tokens: int, rows: int) -> int:
        """How many states are kept of so many tokens in `rows` sequences: one before every `every` tokens (of token t,
        in sequence n, at row t // every + n), and those before what is left over, `every` to a sequence, at the end."""
        every: int = self.table.every
        return tokens // every + rows * (1 + every)

    def scan_forward(
        self, inputs: list[Tensor], params: list[Tensor], initial: list[Tensor] | None, code: Tensor | None,
        cu: Tensor | None, save: bool,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
        """Outputs [B, T, ...], the state after the last token [N, ...], and saved components [saved_rows, ...]."""
        plan = self._planned(self._forward_plan, inputs, params, initial, code is not None, cu, save)
        device = inputs[0].device
        outputs = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.outputs]
        finals = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.finals]
        saved = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.saved]
        if plan.launch is not None:
            table = self.table
            args = plan.lanes.tensors(table.forward, inputs, params)
            begin = plan.nothing if initial is None else [_plain(x) for x in initial]
            offsets = _no_offsets(device) if cu is None else cu
            kinds = self._kinds(plan, code, offsets)
            carry = [finals[c] for c in table.live_owners]  # read only where there are segments
            if plan.folds is not None:
                carry = self._carries(plan, inputs, params, begin, kinds, offsets)
            kept = [None if at is None else saved[at] for at in plan.kept]
            plan.launch(*args, *outputs, *kept, *begin, *finals, *carry, kinds, offsets)
        return outputs, finals, saved

    def scan_backward(
        self, d_outputs: list[Tensor], d_finals: list[Tensor], inputs: list[Tensor], params: list[Tensor],
        initial: list[Tensor] | None, saved: list[Tensor], code: Tensor | None, cu: Tensor | None,
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None] | None]:  # fmt: skip
        """Gradients of inputs and params in their own shapes, and of the initial state; None where there is none."""
        table = self.table
        plan = self._planned(self._backward_plan, inputs, params, initial, code is not None, cu, True)
        device = inputs[0].device
        d_inputs: list[Tensor | None] = [None] * len(inputs)
        d_params: list[Tensor | None] = [None] * len(params)
        d_initial: list[Tensor | None] | None = None
        if initial is not None:
            d_initial = [torch.empty_like(x, memory_format=torch.contiguous_format) if place in table.smooth else None
                         for place, x in enumerate(initial)]  # fmt: skip
        if plan.launch is None:
            zeros = [torch.zeros_like(x) for x in inputs], [torch.zeros_like(x) for x in params]
            return [*zeros[0]], [*zeros[1]], d_initial

        offsets = _no_offsets(device) if cu is None else cu
        kinds = self._kinds(plan, code, offsets)
        args = plan.lanes.tensors(table.backward, inputs, params)
        cotangents = [_plain(d_outputs[o]) for o in table.backward[2]]
        ends = [_plain(d_finals[c]) for c in table.smooth]
        firsts = [None if d_initial is None else d_initial[c] for c in table.smooth]
        whole = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.whole]
        parts = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in plan.parts]
        carry = [ends[c] for c in table.smooth_owners]  # read only where there are segments
        if plan.folds is not None:
            carry = self._backward_carries(plan, inputs, params, d_outputs, saved, ends, kinds, offsets)
        tensors = [*cotangents, *saved, *ends, *firsts, *whole, *parts]
        plan.launch(*args, *tensors, *carry, kinds, offsets)
        for x, g in zip(table.input_shares, whole, strict=True):
            d_inputs[x] = plan.lanes.reduced(g, inputs[x], table.inputs[x][1], 2)
        for p, g in zip(table.param_shares, parts, strict=True):
            d_params[p] = plan.lanes.reduced(g.sum(0), params[p], table.params[p][1], 0)
        return d_inputs, d_params, d_initial

    def steps(self, inputs: int) -> Steps:
        """The step kernel, for a spec with so many inputs."""
        return Steps(tuple(name for name, _ in self.table.live), inputs, self.table, self.kernels["step"])

    # --- what a shape fixes

    def _planned(
        self, make: Callable[..., Any], inputs: Sequence[Tensor], params: Sequence[Tensor],
        initial: Sequence[Tensor] | None, flagged: bool, cu: Tensor | None, save: bool,
    ) -> Any:  # fmt: skip
        """The plan of a call's shapes. The second shape of a kind of call is the sign that shapes vary: from then on a
        split of time, which long sequences of few lanes need, must not wait for the compiler."""
        tuned = self.table.tiles, self.processors, self.segment_tiles, self.table.every
        if tuned != self._tuned:
            self._plans.clear()
            self._families.clear()
            self._tuned = tuned
        starts = None if initial is None else tuple([x.dtype for x in initial])
        kind = make.__name__, starts, flagged, save
        packed = 0 if cu is None else cu.shape[0]
        key = (
            kind,
            packed,
            cu is None or cu.dtype,
            *[(x.shape, x.dtype, x.device) for x in inputs],
            *[(p.shape, p.dtype) for p in params],
        )
        plan = self._plans.get(key)
        if plan is None:
            if len(self._plans) >= _SHAPES:
                self._plans.clear()
            batch, length = inputs[0].shape[:2]
            rows = batch if cu is None else packed - 1
            plan = self._plans[key] = make(inputs, params, initial is not None, flagged, rows, length, packed > 0, save)
            if inputs[0].device.type == "meta":
                return plan
            family = (kind, *[(x.shape[2:], x.dtype) for x in inputs], *[(p.shape, p.dtype) for p in params])
            self._families[family] = count = self._families.get(family, 0) + 1
            if plan.launch is None:
                return plan
            if count == 2:
                self._warm(make, plan, inputs, params, initial is not None, flagged)
            elif count == 1 and make == self._forward_plan and self.compiles(inputs[0].device):
                self._ahead(inputs, params, initial, flagged, cu, save)
        return plan

    def _ahead(
        self, inputs: Sequence[Tensor], params: Sequence[Tensor], initial: Sequence[Tensor] | None, flagged: bool,
        cu: Tensor | None, save: bool,
    ) -> None:  # fmt: skip
        """Has threads compile what a call launches, and its backward, if something is saved for one."""
        with compiling_ahead(inputs[0].device):
            xs, ps = ([_ghost(x) for x in part] for part in (inputs, params))
            code = torch.empty(inputs[0].shape[:2], dtype=torch.int8, device="meta") if flagged else None
            offsets = None if cu is None else _ghost(cu)
            begin = None if initial is None else [_ghost(x) for x in initial]
            outputs, finals, saved = self.scan_forward(xs, ps, begin, code, offsets, save)
            if save:
                self.scan_backward(outputs, finals, xs, ps, begin, saved, code, offsets)

    def _basis(
        self, direction: str, inputs: Sequence[Tensor], params: Sequence[Tensor], initial: bool, flagged: bool,
        rows: int, length: int, packed: bool,
    ) -> SimpleNamespace:  # fmt: skip
        """What both directions have in common; `launch` is None if there is nothing to run."""
        lanes, device = self._shape(inputs, params), inputs[0].device
        joined, tokens = initial or self.table.counts, math.prod(inputs[0].shape[:2])
        basis = SimpleNamespace(
            lanes=lanes, rows=rows, length=length, joined=joined, launch=None, folds=None, kinds=None,
            numbers=None, segments=1, span=None, device=device, rest=tokens // self.table.every + rows,
        )  # fmt: skip
        if rows and lanes.count:
            span = basis.span = self._span(direction, lanes, rows, length, inputs)
            basis.segments = span.segments
            basis.numbers = (*span.numbers, int(packed), basis.rest)
            if flagged and not self.table.counts:
                basis.kinds = self.kernels["kind"].launch(rows, (length, int(packed)), (joined, 256), device)
        return basis

    def _forward_plan(
        self, inputs: Sequence[Tensor], params: Sequence[Tensor], initial: bool, flagged: bool, rows: int, length: int,
        packed: bool, save: bool,
    ) -> SimpleNamespace:  # fmt: skip
        table = self.table
        plan = self._basis("forward", inputs, params, initial, flagged, rows, length, packed)
        lanes, span = plan.lanes, plan.span
        real = {**_DTYPES, "real": self._real(inputs, params)}
        names = self.saved_components() if save else ()
        tokens = (*inputs[0].shape[:2], *lanes.full)
        plan.outputs = [(tokens, real[kind]) for _, kind in table.outputs]
        plan.finals = [((rows, *lanes.full), _DTYPES[kind]) for _, kind in table.live]
        kinds = dict(table.live)
        kept = (self.saved_rows(math.prod(tokens[:2]), rows), *lanes.full)
        plan.saved = [(kept, _DTYPES[kinds[name]]) for name in names]
        plan.kept = [names.index(name) if name in names else None for name, _ in table.live]
        plan.nothing = [None] * len(table.live)
        if span is not None:
            maps = lanes.flat_maps(table.forward)
            plan.launch = self.kernels["forward"].launch(
                span.programs * span.segments, plan.numbers, (*maps, lanes.count, plan.joined, table.every, *span.tile),
                plan.device, num_warps=span.warps,
            )  # fmt: skip
            plan.folds = self._fold_plan(plan) if span.segments > 1 else None
        return plan

    def _fold_plan(self, plan: SimpleNamespace) -> SimpleNamespace:
        table, span, lanes = self.table, plan.span, plan.lanes
        rows, segments = plan.rows, plan.segments
        return SimpleNamespace(
            folds=[((rows, segments, lanes.count), _DTYPES[k]) for k in table.element_scalars],
            carry=[((rows, segments + 1, lanes.count), _DTYPES[k]) for k in table.live_scalars],
            kinds=((rows, segments, lanes.count), torch.int8),
            fold=self.kernels["fold"].launch(
                span.programs * segments, plan.numbers, (*lanes.flat_maps(table.fold), lanes.count, *span.tile),
                plan.device, num_warps=span.warps,
            ),
            join=self._join("carry", plan, len(table.element_scalars), (plan.joined,)),
        )

    def _backward_plan(
        self, inputs: Sequence[Tensor], params: Sequence[Tensor], initial: bool, flagged: bool, rows: int, length: int,
        packed: bool, save: bool,
    ) -> SimpleNamespace:  # fmt: skip
        table = self.table
        plan = self._basis("backward", inputs, params, initial, flagged, rows, length, packed)
        lanes, span = plan.lanes, plan.span
        if span is not None:
            tokens = (*inputs[0].shape[:2], *lanes.full)
            plan.whole = []
            for x in table.input_shares:
                kind = table.inputs[x][2]
                summed = kind == "complex" or lanes.maps[x] != (1, 1)  # in fp32, as it has to be summed
                plan.whole.append((tokens, _DTYPES[kind] if summed else inputs[x].dtype))
            shape = (rows * span.segments, *lanes.full)
            plan.parts = [(shape, _DTYPES[table.params[p][2]]) for p in table.param_shares]
            maps = lanes.flat_maps(table.backward)
            plan.launch = self.kernels["backward"].launch(
                span.programs * span.segments, plan.numbers, (*maps, lanes.count, plan.joined, *span.tile), plan.device,
                num_warps=span.warps,
            )  # fmt: skip
            plan.folds = self._backward_fold_plan(plan) if span.segments > 1 else None
        return plan

    def _backward_fold_plan(self, plan: SimpleNamespace) -> SimpleNamespace:
        table, span, lanes = self.table, plan.span, plan.lanes
        shape = (plan.rows, plan.segments, lanes.count)
        return SimpleNamespace(
            folds=[(shape, torch.float32)] * table.entries,
            carry=[(shape, torch.float32)] * table.smooth_scalars,
            kinds=(shape, torch.int8),
            fold=self.kernels["backward_fold"].launch(
                span.programs * span.segments, plan.numbers,
                (*lanes.flat_maps(table.backward_fold), lanes.count, plan.joined, *span.tile), plan.device,
                num_warps=span.warps,
            ),
            join=self._join("backward_carry", plan, table.entries, ()),
        )  # fmt: skip

    def _join(self, kernel: str, plan: SimpleNamespace, scalars: int, constants: tuple[Any, ...]) -> Launch:
        """The scan of the segments' products, so many scalars each, by programs of few lanes."""
        count = plan.lanes.count
        rows, chunks, width, warps = (2, 2, 2, 1) if self.interpreted else (8, 128, 4, 8)
        while chunks > 16 and chunks * scalars > 512:
            chunks //= 2
        grid = plan.rows * -(-count // width)
        return self.kernels[kernel].launch(
            grid, plan.numbers, (count, *constants, rows, chunks, width), plan.device, num_warps=warps
        )

    def _warm(
        self, make: Callable[..., Any], plan: SimpleNamespace, inputs: Sequence[Tensor], params: Sequence[Tensor],
        initial: bool, flagged: bool,
    ) -> None:  # fmt: skip
        """Compiles the kernels of a split of time; buffers of their own count as aligned."""
        table = self.table
        back = make == self._backward_plan
        found = (self._backward_fold_plan if back else self._fold_plan)(plan)
        folds, carry = [d for _, d in found.folds], [d for _, d in found.carry]
        kinds, offsets = torch.int8 if flagged else None, torch.int64
        states = [_DTYPES[kind] for _, kind in table.live]
        if back:
            _, _, outputs, used = table.backward_fold
            real = self._real(inputs, params)
            args = plan.lanes.tensors(table.backward_fold, inputs, params)
            args += [{**_DTYPES, "real": real}[table.outputs[o][1]] for o in outputs]
            args += [states[c] for c in used]
            begin = [states[c] for c in table.smooth]
        else:
            args = plan.lanes.tensors(table.fold, inputs, params)
            begin = [s if initial else None for s in states]
        found.fold.warm(*args, *folds, kinds, kinds, offsets)
        found.join.warm(*folds, *begin, *carry, kinds, offsets)

    def _real(self, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> torch.dtype:
        """Of the outputs."""
        return torch.float32 if self.exact else real_dtype([*inputs, *params])

    def _shape(self, inputs: Sequence[Tensor], params: Sequence[Tensor]) -> LaneShape:
        key = (tuple(x.shape[2:] for x in inputs), tuple(p.shape for p in params))
        found = self._lanes.get(key)
        if found is None:
            if len(self._lanes) >= _SHAPES:
                self._lanes.clear()
            found = self._lanes[key] = LaneShape(self.table, *key)
        return found

    def _span(
        self, direction: str, lanes: LaneShape, rows: int, length: int, inputs: Sequence[Tensor]
    ) -> SimpleNamespace:
        """Tile, grid, and the split of time: programs enough to keep every multiprocessor loading."""
        wide = any(x.element_size() >= 4 and lanes.maps[at] == (1, 1) for at, x in enumerate(inputs))
        each_rows, width, warps, stages = self.table.tiles[direction][4 if wide else 2]
        every = self.table.every if self.table.saved else 1
        if direction == "backward" and every > 1:
            each_rows = every  # the states are run again from one that was kept
        while width > 64 and width >= 2 * lanes.count:
            width, warps = width // 2, max(1, warps // 2)
        tokens = max(each_rows, every)
        programs = rows * -(-lanes.count // width)
        processors = self.processors or _processors(inputs[0].device)
        segments, each = 1, length
        if programs * warps < processors:
            segments = min(-(-7 * processors // (programs * warps)), length // (self.segment_tiles * tokens))
            if segments > 3:
                each = -(-length // (segments * tokens)) * tokens
            segments = -(-length // each) if each else 1
            if segments > 1:
                warps = max(1, min(warps, width // 64))  # segments are threads enough
        return SimpleNamespace(
            tile=(each_rows, width, max(1, width // (32 * warps)), stages), warps=warps, programs=programs,
            segments=segments, numbers=(length, segments, each),
        )  # fmt: skip

    # --- launches beside the main one

    def _kinds(self, plan: SimpleNamespace, code: Tensor | None, offsets: Tensor) -> Tensor | None:
        """Kinds of tokens: `code`, with the tokens marked that have nothing before them."""
        if code is None or plan.kinds is None:
            return code
        kinds = torch.empty_like(code, memory_format=torch.contiguous_format)
        plan.kinds(code.contiguous(), kinds, offsets)
        return kinds

    def _carries(
        self, plan: SimpleNamespace, inputs: list[Tensor], params: list[Tensor], begin: Sequence[Tensor | None],
        kinds: Tensor | None, offsets: Tensor,
    ) -> list[Tensor]:  # fmt: skip
        """What is before each segment, [N, S + 1, C] a live scalar."""
        folds, carry, fold_kinds = _buffers(plan.folds, kinds, offsets.device)
        args = plan.lanes.tensors(self.table.fold, inputs, params)
        plan.folds.fold(*args, *folds, fold_kinds, kinds, offsets)
        plan.folds.join(*folds, *begin, *carry, fold_kinds, offsets)
        return carry

    def _backward_carries(
        self, plan: SimpleNamespace, inputs: list[Tensor], params: list[Tensor], d_outputs: list[Tensor],
        saved: list[Tensor], ends: list[Tensor], kinds: Tensor | None, offsets: Tensor,
    ) -> list[Tensor]:
        """The cotangents after each segment, [N, S, C] a live scalar."""
        folds, carry, cuts = _buffers(plan.folds, kinds, offsets.device)
        args = plan.lanes.tensors(self.table.backward_fold, inputs, params)
        _, _, outputs, used = self.table.backward_fold
        tensors = [*(_plain(d_outputs[o]) for o in outputs), *(saved if used else ())]
        plan.folds.fold(*args, *tensors, *folds, cuts, kinds, offsets)
        plan.folds.join(*folds, *ends, *carry, cuts, offsets)
        return carry


def _buffers(
    folds: SimpleNamespace, kinds: Tensor | None, device: torch.device
) -> tuple[list[Tensor], list[Tensor], Tensor | None]:
    made = ([torch.empty(s, dtype=d, device=device) for s, d in group] for group in (folds.folds, folds.carry))
    flags = None if kinds is None else torch.empty(folds.kinds[0], dtype=folds.kinds[1], device=device)
    return next(made), next(made), flags


_OFFSETS: dict[torch.device, Tensor] = {}


def _no_offsets(device: torch.device) -> Tensor:
    """In place of cu_seqlens where there is none: packed or not, the same kernel runs."""
    found = _OFFSETS.get(device)
    if found is None:
        found = _OFFSETS[device] = torch.empty(0, dtype=torch.int64, device=device)
    return found


KERNELS = PointwiseKernels(
    SimpleNamespace(
        kind_kernel=kind_kernel,
        forward_kernel=forward_kernel,
        fold_kernel=fold_kernel,
        carry_kernel=carry_kernel,
        backward_kernel=backward_kernel,
        backward_fold_kernel=backward_fold_kernel,
        backward_carry_kernel=backward_carry_kernel,
        step_kernel=step_kernel,
        interpreted=triton is not None and not isinstance(forward_kernel, triton.JITFunction),
        dims=(),
        inputs=(('z', (), 'real'), ('x', (), 'real'),),
        params=(),
        outputs=(('y', 'real'),),
        live=(('h', 'real'),),
        forward=((0, 1), ()),
        fold=((0, 1), ()),
        backward=((0, 1), (), (0,), (0,)),
        backward_fold=((0,), (), (0,), ()),
        smooth=(0,),
        input_shares=(0, 1),
        param_shares=(),
        element_scalars=('real', 'real'),
        live_scalars=('real',),
        live_owners=(0,),
        smooth_owners=(0,),
        entries=2,
        smooth_scalars=1,
        saved=(0,),
        every=8,
        counts=False,
        tiles={"forward": {4: (8, 64, 2, 8), 2: (8, 128, 1, 6)}, "backward": {4: (8, 64, 2, 6), 2: (8, 128, 1, 6)}},
    )
)

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
    name='mingru',
    digest='1b9393f1104c96d0',
    inputs=(Slot('z'), Slot('x'),),
    params=(),
    components=(Slot('a'), Slot('h'),),
    live=('h',),
    outputs=(Slot('y'),),
    sizes={},
    dims=(),
    taps={},
    previous=False,
)

mingru = Aggregator(SPEC, SimpleNamespace(lift=lift, combine=combine, advance=advance, output=output, identity=identity), fold="scan", kernels=KERNELS)
