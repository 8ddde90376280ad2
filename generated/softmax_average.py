"""softmax_average: The average of the values so far, weighted by softmax(scores). Milakov & Gimelshein 2018, arXiv 1805.02867.

    aggregator softmax_average {
      '''The average of the values so far, weighted by softmax(scores). Milakov & Gimelshein 2018, arXiv 1805.02867.'''
      input score, value
      state m = -inf, u = 0, w = 0

      lift {
        m = score
        u = 1
        w = value
      }

      combine (l, r) {
        let m_1 = max(l.m, r.m)
        m = m_1
        u = l.u * exp(l.m - m_1) + r.u * exp(r.m - m_1)
        w = l.w * exp(l.m - m_1) + r.w * exp(r.m - m_1)
      }

      output y = w / u

      associative: yes
    }

Proof (associative): proved over the reals, for all sizes (normal form).
Proof (identity element): proved over the reals, for all sizes (normal form).
Plan: pointwise. pointwise: 3 scalars an element, 3 carried; lanes are independent, one pass over time; few lanes and a long sequence are split into segments.

Written by psmc; regenerate with: psmc compile softmax_average.psm
The mathematics of the spec comes first, then its kernels, then the runtime that all such modules share.
Needs torch, and triton for tensors on a GPU; nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import pairwise
from math import isqrt
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["softmax_average"]


# --- the spec's mathematics: tensors are [..., *dims], leading axes broadcast

def _exp_sum(first, *rest):
    """exp(first + ...); 0 with gradient 0 where a term is -inf, whatever the others are."""
    gone = first.real == -math.inf
    total = first
    for term in rest:
        gone = gone | (term.real == -math.inf)
        total = total + term
    return torch.where(gone, 0.0, torch.exp(torch.where(gone, 0.0, total)))


def _max(a, b):
    """The larger one; of equal ones the left, gradient included."""
    return torch.where((a >= b) | (a != a), a, b)


def lift(x, p, n):
    u = x.score.new_full((), 1)
    return {"m": x.score, "u": u, "w": x.value}


def combine(l, r, p, n):
    m = _max(l.m, r.m)
    exp_l_m = _exp_sum(l.m, -m)
    exp_r_m = _exp_sum(r.m, -m)
    u = l.u * exp_l_m + r.u * exp_r_m
    w = l.w * exp_l_m + r.w * exp_r_m
    return {"m": m, "u": u, "w": w}


def advance(l, r, p, n):
    m = _max(l.m, r.m)
    exp_l_m = _exp_sum(l.m, -m)
    exp_r_m = _exp_sum(r.m, -m)
    u = l.u * exp_l_m + r.u * exp_r_m
    w = l.w * exp_l_m + r.w * exp_r_m
    return {"m": m, "u": u, "w": w}


def output(s, prev, x, p, n):
    y = s.w / s.u
    return {"y": y}


def identity(n, like):
    m = like.new_full((), -math.inf)
    u = like.new_full((), 0)
    w = like.new_full((), 0)
    return {"m": m, "u": u, "w": w}


# --- kernels: a pointwise scan. Tensors lie as [B, T, C], C the lanes (all lane axes and dims, flattened).
#
# A program has BC lanes of one sequence (or of one of its S segments of SEG tokens) and walks over tiles of W * R tokens,
# [W, R, BC]: W chunks of R tokens, each in one thread's registers. Lift the tokens, scan each chunk, scan the chunks'
# products behind what is carried, bring what is before each chunk into it, read out.
#   bos, eos    a sequence's first token and the one past its last, as rows of the packed batch
#   C = CV * V  V lanes are loaded at once, and C is known to be a multiple of V
#   Q, D        lane c of a tensor that has fewer lanes is its (c // Q) * D + c % D
#   kind        int8 [B, T]: 0 the token is skipped, 1 it joins what is before, 3 nothing counts before it, 2 the same
#               and it is skipped; None: all count
# Least traffic: every input and output once, and for a backward the states once more.


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
def lane_exp(x):
    return tl.exp2(x * 1.4426950408889634)


@jit
def lane_larger(a, b):
    """max(a, b), NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@jit
def lane_exp_sum_2(a, b):
    """exp(a + b); 0 where a term is -inf, whatever the others are."""
    return tl.where((a == float("-inf")) | (b == float("-inf")), 0.0, lane_exp(a + b))


@jit
def lane_lift(score, value):
    m = score
    w = value
    return m, w


@jit
def lane_combine(l_m, l_u, l_w, r_m, r_u, r_w):
    m = lane_larger(l_m, r_m)
    exp_l_m = lane_exp_sum_2(l_m, -m)
    exp_r_m = lane_exp_sum_2(r_m, -m)
    u = l_u * exp_l_m + r_u * exp_r_m
    w = l_w * exp_l_m + r_w * exp_r_m
    return m, u, w


@jit
def lane_advance(l_m, l_u, l_w, r_m, r_u, r_w):
    m = lane_larger(l_m, r_m)
    exp_l_m = lane_exp_sum_2(l_m, -m)
    exp_r_m = lane_exp_sum_2(r_m, -m)
    u = l_u * exp_l_m + r_u * exp_r_m
    w = l_w * exp_l_m + r_w * exp_r_m
    return m, u, w


@jit
def lane_combine_m(l_m, r_m):
    m = lane_larger(l_m, r_m)
    return m


@jit
def lane_advance_m(l_m, r_m):
    m = lane_larger(l_m, r_m)
    return m


@jit
def lane_affine_u(score, prev_m):
    t1 = lane_larger(prev_m, score)
    A_u_u = lane_exp_sum_2(prev_m, -t1)
    u = lane_exp_sum_2(score, -t1)
    return A_u_u, u


@jit
def lane_combine_u(l_A_u_u, l_u, r_A_u_u, r_u):
    A_u_u = r_A_u_u * l_A_u_u
    u = r_A_u_u * l_u + r_u
    return A_u_u, u


@jit
def lane_advance_u(l_u, r_A_u_u, r_u):
    u = r_A_u_u * l_u + r_u
    return u


@jit
def lane_affine_w(score, value, prev_m):
    t1 = lane_larger(prev_m, score)
    A_w_w = lane_exp_sum_2(prev_m, -t1)
    w = value * lane_exp_sum_2(score, -t1)
    return A_w_w, w


@jit
def lane_combine_w(l_A_w_w, l_w, r_A_w_w, r_w):
    A_w_w = r_A_w_w * l_A_w_w
    w = r_A_w_w * l_w + r_w
    return A_w_w, w


@jit
def lane_advance_w(l_w, r_A_w_w, r_w):
    w = r_A_w_w * l_w + r_w
    return w


@jit
def lane_readout(s_u, s_w):
    y = s_w / s_u
    return y


@jit
def lane_direct(s_u, s_w, d_y):
    adj_w = d_y / s_u
    adj_u = -(adj_w * (s_w / s_u))
    return adj_u, adj_w


@jit
def lane_transition(score, value, prev_m, prev_u, prev_w):
    t1 = prev_m >= score
    J_m_m = tl.where(t1, 1, 0).to(tl.float32)
    t2 = lane_larger(prev_m, score)
    J_u_u = lane_exp_sum_2(prev_m, -t2)
    t3 = prev_u * J_u_u
    exp_score = lane_exp_sum_2(score, -t2)
    J_m_u = t3 + tl.where(t1, -exp_score - t3, 0)
    t4 = prev_w * J_u_u
    J_m_w = t4 + tl.where(t1, -(value * exp_score) - t4, 0)
    return J_m_m, J_m_u, J_m_w, J_u_u, J_u_u


@jit
def lane_compose(l_J_m_m, l_J_m_u, l_J_m_w, l_J_u_u, l_J_w_w, l_adj_m, l_adj_u, l_adj_w, r_J_m_m, r_J_m_u, r_J_m_w, r_J_u_u, r_J_w_w, r_adj_m, r_adj_u, r_adj_w):
    J_m_m = r_J_m_m * l_J_m_m
    J_m_u = r_J_m_m * l_J_m_u + r_J_m_u * l_J_u_u
    J_m_w = r_J_m_m * l_J_m_w + r_J_m_w * l_J_w_w
    J_u_u = r_J_u_u * l_J_u_u
    J_w_w = r_J_w_w * l_J_w_w
    adj_m = r_J_m_m * l_adj_m + r_J_m_u * l_adj_u + r_J_m_w * l_adj_w + r_adj_m
    adj_u = r_J_u_u * l_adj_u + r_adj_u
    adj_w = r_J_w_w * l_adj_w + r_adj_w
    return J_m_m, J_m_u, J_m_w, J_u_u, J_w_w, adj_m, adj_u, adj_w


@jit
def lane_pull(l_adj_m, l_adj_u, l_adj_w, r_J_m_m, r_J_m_u, r_J_m_w, r_J_u_u, r_J_w_w, r_adj_m, r_adj_u, r_adj_w):
    adj_m = r_J_m_m * l_adj_m + r_J_m_u * l_adj_u + r_J_m_w * l_adj_w + r_adj_m
    adj_u = r_J_u_u * l_adj_u + r_adj_u
    adj_w = r_J_w_w * l_adj_w + r_adj_w
    return adj_m, adj_u, adj_w


@jit
def lane_gradient(score, value, prev_m, prev_u, prev_w, grad_m, grad_u, grad_w, first):
    t1 = lane_larger(prev_m, score)
    exp_score = lane_exp_sum_2(score, -t1)
    t2 = (grad_w * value + grad_u) * exp_score
    t = (grad_w * prev_w + grad_u * prev_u) * lane_exp_sum_2(prev_m, -t1)
    g_score = tl.where(first, grad_m, t2 + tl.where(prev_m >= score, 0, grad_m - t2 - t))
    g_value = tl.where(first, grad_w, grad_w * exp_score)
    return g_score, g_value


@jit
def lane_flagged(left_kind, l_m, l_u, l_w, right_kind, r_m, r_u, r_w):
    """A combine, with the kind of each side: a skipped one leaves the other, an absolute one (2, 3) drops the left."""
    c_m, c_u, c_w = lane_combine(l_m, l_u, l_w, r_m, r_u, r_w)
    both = (left_kind != 0) & (right_kind == 1)
    c_m = tl.where(right_kind == 0, l_m, tl.where(both, c_m, r_m))
    c_u = tl.where(right_kind == 0, l_u, tl.where(both, c_u, r_u))
    c_w = tl.where(right_kind == 0, l_w, tl.where(both, c_w, r_w))
    return left_kind | right_kind, c_m, c_u, c_w


@jit
def lane_flagged_m(left_kind, l_m, right_kind, r_m):
    """A combine, with the kind of each side: a skipped one leaves the other, an absolute one (2, 3) drops the left."""
    c_m = lane_combine_m(l_m, r_m)
    both = (left_kind != 0) & (right_kind == 1)
    c_m = tl.where(right_kind == 0, l_m, tl.where(both, c_m, r_m))
    return left_kind | right_kind, c_m


@jit
def lane_flagged_u(left_kind, l_A_u_u, l_u, right_kind, r_A_u_u, r_u):
    """A combine, with the kind of each side: a skipped one leaves the other, an absolute one (2, 3) drops the left."""
    c_A_u_u, c_u = lane_combine_u(l_A_u_u, l_u, r_A_u_u, r_u)
    both = (left_kind != 0) & (right_kind == 1)
    c_A_u_u = tl.where(right_kind == 0, l_A_u_u, tl.where(both, c_A_u_u, r_A_u_u))
    c_u = tl.where(right_kind == 0, l_u, tl.where(both, c_u, r_u))
    return left_kind | right_kind, c_A_u_u, c_u


@jit
def lane_flagged_w(left_kind, l_A_w_w, l_w, right_kind, r_A_w_w, r_w):
    """A combine, with the kind of each side: a skipped one leaves the other, an absolute one (2, 3) drops the left."""
    c_A_w_w, c_w = lane_combine_w(l_A_w_w, l_w, r_A_w_w, r_w)
    both = (left_kind != 0) & (right_kind == 1)
    c_A_w_w = tl.where(right_kind == 0, l_A_w_w, tl.where(both, c_A_w_w, r_A_w_w))
    c_w = tl.where(right_kind == 0, l_w, tl.where(both, c_w, r_w))
    return left_kind | right_kind, c_A_w_w, c_w


@jit
def lane_before_m(l_m, lu_m, left_many, r_m, ru_m, right_many):
    """A combine that also gives the product without the last token, u_*, where there are two or more (`many`)."""
    c_m = lane_combine_m(l_m, r_m)
    u_m = lane_combine_m(l_m, ru_m)
    u_m = tl.where(right_many != 0, u_m, l_m)
    return c_m, u_m, left_many | 1


@jit
def lane_flagged_before_m(left_kind, l_m, left_above, lu_m, left_many, right_kind, r_m, right_above, ru_m, right_many):
    kind, c_m = lane_flagged_m(left_kind, l_m, right_kind, r_m)
    above_kind, u_m = lane_flagged_m(left_kind, l_m, right_above, ru_m)
    above_kind = tl.where(right_many != 0, above_kind, left_kind)
    u_m = tl.where(right_many != 0, u_m, l_m)
    return kind, c_m, above_kind, u_m, left_many | 1


@jit
def lane_cut(left_cut, l_J_m_m, l_J_m_u, l_J_m_w, l_J_u_u, l_J_w_w, l_adj_m, l_adj_u, l_adj_w, right_cut, r_J_m_m, r_J_m_u, r_J_m_w, r_J_u_u, r_J_w_w, r_adj_m, r_adj_u, r_adj_w):
    """lane_compose, where `cut` says that nothing reaches the state from later tokens."""
    c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w = lane_compose(l_J_m_m, l_J_m_u, l_J_m_w, l_J_u_u, l_J_w_w, l_adj_m, l_adj_u, l_adj_w, r_J_m_m, r_J_m_u, r_J_m_w, r_J_u_u, r_J_w_w, r_adj_m, r_adj_u, r_adj_w)
    c_adj_m = tl.where(right_cut != 0, r_adj_m, c_adj_m)
    c_adj_u = tl.where(right_cut != 0, r_adj_u, c_adj_u)
    c_adj_w = tl.where(right_cut != 0, r_adj_w, c_adj_w)
    return left_cut | right_cut, c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w


@jit
def tile_pick(x, chosen, axis: tl.constexpr):
    """The one entry along an axis that is chosen: a sum of bits, all others 0, which costs nothing inside a thread."""
    if x.dtype == tl.float32:
        return tl.sum(tl.where(chosen, x.to(tl.int32, bitcast=True), 0), axis).to(tl.float32, bitcast=True)
    else:
        return tl.sum(tl.where(chosen, x, 0), axis)


@jit
def tile_load(p, m):
    if m is None:
        return tl.load(p)
    else:
        return tl.load(p, mask=m, other=0)


@jit
def tile_store(p, value, m):
    tl.store(p, value, mask=m)


@jit
def lane_index(c, Q: tl.constexpr, D: tl.constexpr):
    """Where lane c lies in a tensor that has fewer lanes; of c = C, how many it has."""
    if Q == 1:
        return c
    return c // Q * D + c % D


@jit
def tile_span(p_cu, i_n, i_s, T, SEG):
    """Sequence n from bos to eos, its segment s from `begin`, `length` tokens (none if not positive)."""
    if p_cu is not None:
        bos = tl.load(p_cu + i_n).to(tl.int64)
        eos = tl.load(p_cu + i_n + 1).to(tl.int64)
    else:
        bos = i_n.to(tl.int64) * T
        eos = bos + T
    begin = bos + i_s.to(tl.int64) * SEG
    length = tl.minimum(eos - begin, SEG).to(tl.int32)
    return bos, eos, begin, length


@jit
def lane_count(l_restart, l_count, r_restart, r_count):
    """How many tokens counted since the latest restart, at most 2."""
    return l_restart | r_restart, tl.minimum(tl.where(r_restart != 0, r_count, l_count + r_count), 2)


@jit(do_not_specialize=["T"])
def kind_kernel(p_code, p_kind, p_cu, T, JOINED: tl.constexpr, BT: tl.constexpr):
    """Marks (1 -> 3) each token that counts and has nothing before it; one program a sequence."""
    i_n = tl.program_id(0)
    bos, eos, begin, length = tile_span(p_cu, i_n, i_n * 0, T, T)
    t = tl.arange(0, BT)
    before = tl.program_id(0) * 0 + (1 if JOINED else 0)
    for i_t in tl.range(0, length, BT):
        code = tl.load(p_code + begin + i_t + t, mask=i_t + t < length, other=0).to(tl.int32)
        restart, count = code & 2, code & 1
        count = tl.where((t == 0) & (restart == 0), count + before, count)
        restart, count = tl.associative_scan((restart, count), 0, lane_count)
        tl.store(p_kind + begin + i_t + t, tl.where((code == 1) & (count == 1), 3, code), mask=i_t + t < length)
        before = tl.sum(tl.where(t == BT - 1, count, 0), 0)


@jit
def forward_tile(
    p_score, p_value, p_out_y, p_saved_m, p_saved_u, p_saved_w,
    p_kind, row, left, C, i_c, joined, h_m, h_u, h_w,
    Q_score: tl.constexpr, D_score: tl.constexpr,
    Q_value: tl.constexpr, D_value: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, WHOLE: tl.constexpr, EVEN: tl.constexpr,
):
    """One tile from token `row` on, of which `left` are there (all, if WHOLE; and all lanes, if EVEN): prefixes s_* of the
    lifted tokens e_* behind h_*, which counts if `joined`, and the outputs y_*. Returns h_* for the next tile."""
    BT: tl.constexpr = W * R
    o_c = i_c * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    m_c = o_c < C
    w = tl.arange(0, W)[:, None]  # [W, 1]
    r = tl.arange(0, R)[None, :, None]
    t = (w[:, :, None] * R + r)  # [W, R, 1]
    o = t * C + o_c[:, None, :]  # [W, R, BC]
    above = tl.broadcast_to(tl.maximum(w - 1, 0), [W, BC])
    C_score, k_score = lane_index(C, Q_score, D_score), lane_index(o_c, Q_score, D_score)
    oc_score = t * C_score + k_score[:, None, :]
    C_value, k_value = lane_index(C, Q_value, D_value), lane_index(o_c, Q_value, D_value)
    oc_value = t * C_value + k_value[:, None, :]
    inside = t < left
    m = None
    if not EVEN:
        m = m_c[:, None, :]
    if not WHOLE:
        m = inside & m_c[:, None, :]
    b_score = tile_load(p_score + row * C_score + oc_score, m).to(tl.float32)
    b_value = tile_load(p_value + row * C_value + oc_value, m).to(tl.float32)
    e_m, e_w = lane_lift(b_score, b_value)
    e_u = tl.full([W, R, BC], 1, tl.float32)
    if p_kind is not None:
        kind = tl.load(p_kind + row + t, mask=inside, other=0).to(tl.int32)  # [W, R, 1]
        e_m = tl.where(kind == 2, float("-inf"), e_m)
        e_u = tl.where(kind == 2, 0.0, e_u)
        e_w = tl.where(kind == 2, 0.0, e_w)
        kind = tl.broadcast_to(kind, [W, R, BC])
    none = tl.zeros([W, R, BC], tl.int32)
    x_m = tl.zeros([W, R, BC], tl.float32)
    if p_kind is not None:
        inner_kind, g_m, above_kind, x_m, none = tl.associative_scan(
            (kind, e_m, none, x_m, none), 1, lane_flagged_before_m
        )
        outer_kind = tile_pick(inner_kind, r == R - 1, 1)
    else:
        g_m, x_m, none = tl.associative_scan(
            (e_m, x_m, none), 1, lane_before_m
        )
    c_m = tile_pick(g_m, r == R - 1, 1)  # [W, BC]
    f_m = lane_advance_m(h_m, c_m)
    if p_kind is not None:
        f_m = tl.where(outer_kind == 0, h_m, tl.where(outer_kind == 1, f_m, c_m))
        c_m = tl.where(w == 0, f_m, c_m)
        outer_kind = tl.where(w == 0, 3, outer_kind)
        outer_kind, c_m = tl.associative_scan((outer_kind, c_m), 0, lane_flagged_m)
    else:
        c_m = tl.where((w == 0) & joined, f_m, c_m)
        (c_m,) = tl.associative_scan((c_m,), 0, lane_combine_m)
    q_m = tl.where(w == 0, h_m, tl.gather(c_m, above, 0))[:, None, :]  # before each chunk
    h_m = tile_pick(c_m, w == W - 1, 0)[None, :]
    s_m = lane_advance_m(q_m, g_m)
    v_m = lane_advance_m(q_m, x_m)
    if p_kind is not None:
        s_m = tl.where(inner_kind == 0, q_m, tl.where(inner_kind == 1, s_m, g_m))
        v_m = tl.where(above_kind == 0, q_m, tl.where(above_kind == 1, v_m, x_m))
        v_m = tl.where(kind >= 2, float("-inf"), tl.where(r == 0, q_m, v_m))
    else:
        s_m = tl.where((w > 0)[:, :, None] | joined, s_m, g_m)
        v_m = tl.where((w > 0)[:, :, None] | joined, v_m, x_m)
        v_m = tl.where(r == 0, q_m, v_m)
    a_A_u_u, a_u = lane_affine_u(b_score, v_m)
    alone = (t == 0) & (joined == 0)
    if p_kind is not None:
        alone = kind >= 2
    e_A_u_u = tl.broadcast_to(a_A_u_u, [W, R, BC])
    e_u = tl.where(alone, e_u, a_u)
    if p_kind is not None:
        inner_kind, g_A_u_u, g_u = tl.associative_scan((kind, e_A_u_u, e_u), 1, lane_flagged_u)
        outer_kind = tile_pick(inner_kind, r == R - 1, 1)
    else:
        (g_A_u_u, g_u,) = tl.associative_scan((e_A_u_u, e_u,), 1, lane_combine_u)
    c_A_u_u = tile_pick(g_A_u_u, r == R - 1, 1)  # [W, BC]
    c_u = tile_pick(g_u, r == R - 1, 1)  # [W, BC]
    f_u = lane_advance_u(h_u, c_A_u_u, c_u)
    if p_kind is not None:
        f_u = tl.where(outer_kind == 0, h_u, tl.where(outer_kind == 1, f_u, c_u))
        c_u = tl.where(w == 0, f_u, c_u)
        outer_kind = tl.where(w == 0, 3, outer_kind)
        outer_kind, c_A_u_u, c_u = tl.associative_scan((outer_kind, c_A_u_u, c_u), 0, lane_flagged_u)
    else:
        c_u = tl.where((w == 0) & joined, f_u, c_u)
        (c_A_u_u, c_u,) = tl.associative_scan((c_A_u_u, c_u,), 0, lane_combine_u)
    q_u = tl.where(w == 0, h_u, tl.gather(c_u, above, 0))[:, None, :]  # before each chunk
    h_u = tile_pick(c_u, w == W - 1, 0)[None, :]
    s_u = lane_advance_u(q_u, g_A_u_u, g_u)
    if p_kind is not None:
        s_u = tl.where(inner_kind == 0, q_u, tl.where(inner_kind == 1, s_u, g_u))
    else:
        s_u = tl.where((w > 0)[:, :, None] | joined, s_u, g_u)
    a_A_w_w, a_w = lane_affine_w(b_score, b_value, v_m)
    alone = (t == 0) & (joined == 0)
    if p_kind is not None:
        alone = kind >= 2
    e_A_w_w = tl.broadcast_to(a_A_w_w, [W, R, BC])
    e_w = tl.where(alone, e_w, a_w)
    if p_kind is not None:
        inner_kind, g_A_w_w, g_w = tl.associative_scan((kind, e_A_w_w, e_w), 1, lane_flagged_w)
        outer_kind = tile_pick(inner_kind, r == R - 1, 1)
    else:
        (g_A_w_w, g_w,) = tl.associative_scan((e_A_w_w, e_w,), 1, lane_combine_w)
    c_A_w_w = tile_pick(g_A_w_w, r == R - 1, 1)  # [W, BC]
    c_w = tile_pick(g_w, r == R - 1, 1)  # [W, BC]
    f_w = lane_advance_w(h_w, c_A_w_w, c_w)
    if p_kind is not None:
        f_w = tl.where(outer_kind == 0, h_w, tl.where(outer_kind == 1, f_w, c_w))
        c_w = tl.where(w == 0, f_w, c_w)
        outer_kind = tl.where(w == 0, 3, outer_kind)
        outer_kind, c_A_w_w, c_w = tl.associative_scan((outer_kind, c_A_w_w, c_w), 0, lane_flagged_w)
    else:
        c_w = tl.where((w == 0) & joined, f_w, c_w)
        (c_A_w_w, c_w,) = tl.associative_scan((c_A_w_w, c_w,), 0, lane_combine_w)
    q_w = tl.where(w == 0, h_w, tl.gather(c_w, above, 0))[:, None, :]  # before each chunk
    h_w = tile_pick(c_w, w == W - 1, 0)[None, :]
    s_w = lane_advance_w(q_w, g_A_w_w, g_w)
    if p_kind is not None:
        s_w = tl.where(inner_kind == 0, q_w, tl.where(inner_kind == 1, s_w, g_w))
    else:
        s_w = tl.where((w > 0)[:, :, None] | joined, s_w, g_w)
    y_y = lane_readout(s_u, s_w)
    if p_kind is not None:
        y_y = tl.where((kind & 1) != 0, y_y, 0)
    tile_store(p_out_y + row * C + o, y_y, m)
    if p_saved_m is not None:
        tile_store(p_saved_m + row * C + o, s_m, m)
    if not WHOLE:
        h_m = tile_pick(tile_pick(s_m, t == left - 1, 1), w >= 0, 0)[None, :]
    if p_saved_u is not None:
        tile_store(p_saved_u + row * C + o, s_u, m)
    if not WHOLE:
        h_u = tile_pick(tile_pick(s_u, t == left - 1, 1), w >= 0, 0)[None, :]
    if p_saved_w is not None:
        tile_store(p_saved_w + row * C + o, s_w, m)
    if not WHOLE:
        h_w = tile_pick(tile_pick(s_w, t == left - 1, 1), w >= 0, 0)[None, :]
    return h_m, h_u, h_w


@jit(do_not_specialize=["T", "CV", "S", "SEG"])
def forward_kernel(
    p_score, p_value, p_out_y, p_saved_m, p_saved_u, p_saved_w, p_initial_m, p_initial_u, p_initial_w,
    p_final_m, p_final_u, p_final_w, p_carry_m, p_carry_u, p_carry_w,
    p_kind, p_cu, T, CV, S, SEG,
    Q_score: tl.constexpr, D_score: tl.constexpr,
    Q_value: tl.constexpr, D_value: tl.constexpr,
    JOINED: tl.constexpr, EVEN: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
):
    """Outputs, the final state, and what the backward wants saved. h_* [1, BC] is the state before a tile."""
    C = CV * V
    NC = tl.cdiv(C, BC)
    i_c, i_n, i_s = tl.program_id(0) % NC, tl.program_id(0) // NC // S, tl.program_id(0) // NC % S
    bos, eos, begin, length = tile_span(p_cu, i_n, i_s, T, SEG)
    i_n = i_n.to(tl.int64)
    BT: tl.constexpr = W * R
    o_c = i_c * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    m_c = o_c < C
    w = tl.arange(0, W)[:, None]  # [W, 1]
    r = tl.arange(0, R)[None, :, None]
    t = (w[:, :, None] * R + r)  # [W, R, 1]
    o = t * C + o_c[:, None, :]  # [W, R, BC]
    above = tl.broadcast_to(tl.maximum(w - 1, 0), [W, BC])
    h_m = tl.full([1, BC], float("-inf"), tl.float32)
    if p_carry_m is not None:
        h_m = tl.load(p_carry_m + (i_n * (S + 1) + i_s) * C + o_c, mask=m_c, other=0)
    elif p_initial_m is not None:
        h_m = tl.load(p_initial_m + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    h_u = tl.full([1, BC], 0.0, tl.float32)
    if p_carry_u is not None:
        h_u = tl.load(p_carry_u + (i_n * (S + 1) + i_s) * C + o_c, mask=m_c, other=0)
    elif p_initial_u is not None:
        h_u = tl.load(p_initial_u + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    h_w = tl.full([1, BC], 0.0, tl.float32)
    if p_carry_w is not None:
        h_w = tl.load(p_carry_w + (i_n * (S + 1) + i_s) * C + o_c, mask=m_c, other=0)
    elif p_initial_w is not None:
        h_w = tl.load(p_initial_w + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    whole = tl.maximum(length, 0) // BT * BT
    for i_t in tl.range(0, whole, BT, num_stages=NS):
        joined = ((i_t > 0) | (i_s > 0) | JOINED).to(tl.int1)
        h_m, h_u, h_w = forward_tile(
            p_score, p_value, p_out_y, p_saved_m, p_saved_u, p_saved_w,
            p_kind, begin + i_t, BT, C, i_c, joined, h_m, h_u, h_w,
            Q_score, D_score, Q_value, D_value, R, W, BC, True, EVEN,
        )
    if whole < length:
        joined = ((whole > 0) | (i_s > 0) | JOINED).to(tl.int1)
        h_m, h_u, h_w = forward_tile(
            p_score, p_value, p_out_y, p_saved_m, p_saved_u, p_saved_w,
            p_kind, begin + whole, length - whole, C, i_c, joined, h_m, h_u, h_w,
            Q_score, D_score, Q_value, D_value, R, W, BC, False, EVEN,
        )
    m_end = m_c & (begin + SEG >= eos) & ((begin < eos) | (i_s == 0))
    tl.store(p_final_m + i_n * C + o_c, h_m, mask=m_end)
    tl.store(p_final_u + i_n * C + o_c, h_u, mask=m_end)
    tl.store(p_final_w + i_n * C + o_c, h_w, mask=m_end)


@jit(do_not_specialize=["T", "CV", "S", "SEG"])
def fold_kernel(
    p_score, p_value, p_fold_m, p_fold_u, p_fold_w, p_fold_kind,
    p_kind, p_cu, T, CV, S, SEG,
    Q_score: tl.constexpr, D_score: tl.constexpr,
    Q_value: tl.constexpr, D_value: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
):
    """The product of each whole segment's elements, [N, S, C] a component; with kinds, its kind. What a sequence's last
    segment folds to is not read."""
    C = CV * V
    NC = tl.cdiv(C, BC)
    i_c, i_n, i_s = tl.program_id(0) % NC, tl.program_id(0) // NC // S, tl.program_id(0) // NC % S
    bos, eos, begin, length = tile_span(p_cu, i_n, i_s, T, SEG)
    i_n = i_n.to(tl.int64)
    BT: tl.constexpr = W * R
    o_c = i_c * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    m_c = o_c < C
    w = tl.arange(0, W)[:, None]  # [W, 1]
    r = tl.arange(0, R)[None, :, None]
    t = (w[:, :, None] * R + r)  # [W, R, 1]
    o = t * C + o_c[:, None, :]  # [W, R, BC]
    above = tl.broadcast_to(tl.maximum(w - 1, 0), [W, BC])
    C_score, k_score = lane_index(C, Q_score, D_score), lane_index(o_c, Q_score, D_score)
    oc_score = t * C_score + k_score[:, None, :]
    C_value, k_value = lane_index(C, Q_value, D_value), lane_index(o_c, Q_value, D_value)
    oc_value = t * C_value + k_value[:, None, :]
    h_m = tl.zeros([1, BC], tl.float32)
    h_u = tl.zeros([1, BC], tl.float32)
    h_w = tl.zeros([1, BC], tl.float32)
    before_kind = tl.zeros([1, BC], tl.int32)
    for i_t in tl.range(0, length, BT, num_stages=NS):
        row, inside = begin + i_t, i_t + t < length
        m = inside & m_c[:, None, :]
        b_score = tile_load(p_score + row * C_score + oc_score, m).to(tl.float32)
        b_value = tile_load(p_value + row * C_value + oc_value, m).to(tl.float32)
        e_m, e_w = lane_lift(b_score, b_value)
        e_u = tl.full([W, R, BC], 1, tl.float32)
        if p_kind is not None:
            kind = tl.load(p_kind + row + t, mask=inside, other=0).to(tl.int32)  # [W, R, 1]
            e_m = tl.where(kind == 2, float("-inf"), e_m)
            e_u = tl.where(kind == 2, 0.0, e_u)
            e_w = tl.where(kind == 2, 0.0, e_w)
            kind = tl.broadcast_to(kind, [W, R, BC])
        if p_kind is not None:
            inner_kind, g_m, g_u, g_w = tl.associative_scan((kind, e_m, e_u, e_w), 1, lane_flagged)
            outer_kind = tile_pick(inner_kind, r == R - 1, 1)
        else:
            (g_m, g_u, g_w,) = tl.associative_scan((e_m, e_u, e_w,), 1, lane_combine)
        c_m = tile_pick(g_m, r == R - 1, 1)  # [W, BC]
        c_u = tile_pick(g_u, r == R - 1, 1)  # [W, BC]
        c_w = tile_pick(g_w, r == R - 1, 1)  # [W, BC]
        if p_kind is not None:
            joined_kind, f_m, f_u, f_w = lane_flagged(before_kind, h_m, h_u, h_w, outer_kind, c_m, c_u, c_w)
            outer_kind = tl.where(w == 0, joined_kind, outer_kind)
        else:
            f_m, f_u, f_w = lane_combine(h_m, h_u, h_w, c_m, c_u, c_w)
        c_m = tl.where((w == 0) & ((i_t > 0) | (p_kind is not None)), f_m, c_m)
        c_u = tl.where((w == 0) & ((i_t > 0) | (p_kind is not None)), f_u, c_u)
        c_w = tl.where((w == 0) & ((i_t > 0) | (p_kind is not None)), f_w, c_w)
        if p_kind is not None:
            outer_kind, c_m, c_u, c_w = tl.associative_scan((outer_kind, c_m, c_u, c_w), 0, lane_flagged)
            before_kind = tile_pick(outer_kind, w == W - 1, 0)[None, :]
        else:
            (c_m, c_u, c_w,) = tl.associative_scan((c_m, c_u, c_w,), 0, lane_combine)
        h_m = tile_pick(c_m, w == W - 1, 0)[None, :]
        h_u = tile_pick(c_u, w == W - 1, 0)[None, :]
        h_w = tile_pick(c_w, w == W - 1, 0)[None, :]
    tl.store(p_fold_m + (i_n * S + i_s) * C + o_c, h_m, mask=m_c)
    tl.store(p_fold_u + (i_n * S + i_s) * C + o_c, h_u, mask=m_c)
    tl.store(p_fold_w + (i_n * S + i_s) * C + o_c, h_w, mask=m_c)
    if p_kind is not None:
        tl.store(p_fold_kind + (i_n * S + i_s) * C + o_c, before_kind, mask=m_c)


@jit(do_not_specialize=["T", "CV", "S", "SEG"])
def carry_kernel(
    p_fold_m, p_fold_u, p_fold_w, p_initial_m, p_initial_u, p_initial_w, p_carry_m, p_carry_u, p_carry_w,
    p_kind, p_cu, T, CV, S, SEG,
    JOINED: tl.constexpr, R: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
):
    """What is before each segment, [N, S + 1, C] a live component, from the segments' products."""
    C = CV * V
    NC = tl.cdiv(C, BC)
    i_c, i_n = tl.program_id(0) % NC, tl.program_id(0) // NC
    bos, eos, begin, length = tile_span(p_cu, i_n, i_n * 0, T, SEG)
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
    h_m = tl.full([1, BC], float("-inf"), tl.float32)
    if p_initial_m is not None:
        h_m = tl.load(p_initial_m + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    tl.store(p_carry_m + i_n * (S + 1) * C + o_c, h_m, mask=m_c)
    h_u = tl.full([1, BC], 0.0, tl.float32)
    if p_initial_u is not None:
        h_u = tl.load(p_initial_u + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    tl.store(p_carry_u + i_n * (S + 1) * C + o_c, h_u, mask=m_c)
    h_w = tl.full([1, BC], 0.0, tl.float32)
    if p_initial_w is not None:
        h_w = tl.load(p_initial_w + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    tl.store(p_carry_w + i_n * (S + 1) * C + o_c, h_w, mask=m_c)
    for i_t in tl.range(0, segments, BT, num_stages=NS):
        m = (i_t + t < segments) & m_c[:, None, :]
        e_m = tl.load(p_fold_m + (i_n * S + i_t) * C + o, mask=m, other=0)
        e_u = tl.load(p_fold_u + (i_n * S + i_t) * C + o, mask=m, other=0)
        e_w = tl.load(p_fold_w + (i_n * S + i_t) * C + o, mask=m, other=0)
        if p_kind is not None:
            kind = tl.load(p_kind + (i_n * S + i_t) * C + o, mask=m, other=0).to(tl.int32)
        joined = ((i_n * 0 + i_t > 0) | JOINED).to(tl.int1)
        if p_kind is not None:
            inner_kind, g_m, g_u, g_w = tl.associative_scan((kind, e_m, e_u, e_w), 1, lane_flagged)
            outer_kind = tile_pick(inner_kind, r == R - 1, 1)
        else:
            (g_m, g_u, g_w,) = tl.associative_scan((e_m, e_u, e_w,), 1, lane_combine)
        c_m = tile_pick(g_m, r == R - 1, 1)  # [W, BC]
        c_u = tile_pick(g_u, r == R - 1, 1)  # [W, BC]
        c_w = tile_pick(g_w, r == R - 1, 1)  # [W, BC]
        f_m, f_u, f_w = lane_advance(h_m, h_u, h_w, c_m, c_u, c_w)
        if p_kind is not None:
            f_m = tl.where(outer_kind == 0, h_m, tl.where(outer_kind == 1, f_m, c_m))
            c_m = tl.where(w == 0, f_m, c_m)
            f_u = tl.where(outer_kind == 0, h_u, tl.where(outer_kind == 1, f_u, c_u))
            c_u = tl.where(w == 0, f_u, c_u)
            f_w = tl.where(outer_kind == 0, h_w, tl.where(outer_kind == 1, f_w, c_w))
            c_w = tl.where(w == 0, f_w, c_w)
            outer_kind = tl.where(w == 0, 3, outer_kind)
            outer_kind, c_m, c_u, c_w = tl.associative_scan((outer_kind, c_m, c_u, c_w), 0, lane_flagged)
        else:
            c_m = tl.where((w == 0) & joined, f_m, c_m)
            c_u = tl.where((w == 0) & joined, f_u, c_u)
            c_w = tl.where((w == 0) & joined, f_w, c_w)
            (c_m, c_u, c_w,) = tl.associative_scan((c_m, c_u, c_w,), 0, lane_combine)
        q_m = tl.where(w == 0, h_m, tl.gather(c_m, above, 0))[:, None, :]  # before each chunk
        h_m = tile_pick(c_m, w == W - 1, 0)[None, :]
        q_u = tl.where(w == 0, h_u, tl.gather(c_u, above, 0))[:, None, :]  # before each chunk
        h_u = tile_pick(c_u, w == W - 1, 0)[None, :]
        q_w = tl.where(w == 0, h_w, tl.gather(c_w, above, 0))[:, None, :]  # before each chunk
        h_w = tile_pick(c_w, w == W - 1, 0)[None, :]
        s_m, s_u, s_w = lane_advance(q_m, q_u, q_w, g_m, g_u, g_w)
        if p_kind is not None:
            s_m = tl.where(inner_kind == 0, q_m, tl.where(inner_kind == 1, s_m, g_m))
            s_u = tl.where(inner_kind == 0, q_u, tl.where(inner_kind == 1, s_u, g_u))
            s_w = tl.where(inner_kind == 0, q_w, tl.where(inner_kind == 1, s_w, g_w))
        else:
            s_m = tl.where((w > 0)[:, :, None] | joined, s_m, g_m)
            s_u = tl.where((w > 0)[:, :, None] | joined, s_u, g_u)
            s_w = tl.where((w > 0)[:, :, None] | joined, s_w, g_w)
        tl.store(p_carry_m + (i_n * (S + 1) + i_t + 1) * C + o, s_m, mask=m)
        tl.store(p_carry_u + (i_n * (S + 1) + i_t + 1) * C + o, s_u, mask=m)
        tl.store(p_carry_w + (i_n * (S + 1) + i_t + 1) * C + o, s_w, mask=m)


@jit(do_not_specialize=["T", "CV", "S", "SEG"])
def backward_kernel(
    p_score, p_value, p_d_out_y, p_saved_m, p_saved_u, p_saved_w, p_initial_m, p_initial_u, p_initial_w,
    p_d_final_m, p_d_final_u, p_d_final_w, p_d_initial_m, p_d_initial_u, p_d_initial_w, p_d_score,
    p_d_value, p_carry_m, p_carry_u, p_carry_w,
    p_kind, p_cu, T, CV, S, SEG,
    Q_score: tl.constexpr, D_score: tl.constexpr,
    Q_value: tl.constexpr, D_value: tl.constexpr,
    JOINED: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
):
    """From the last tile to the first: l_*, the whole cotangent of the state after each token, by a scan of a_* (the
    next token's Jacobian, and what enters at this one); then the gradients. h_* [1, BC] is l_* below the tile."""
    C = CV * V
    NC = tl.cdiv(C, BC)
    i_c, i_n, i_s = tl.program_id(0) % NC, tl.program_id(0) // NC // S, tl.program_id(0) // NC % S
    bos, eos, begin, length = tile_span(p_cu, i_n, i_s, T, SEG)
    i_n = i_n.to(tl.int64)
    BT: tl.constexpr = W * R
    o_c = i_c * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    m_c = o_c < C
    w = tl.arange(0, W)[:, None]  # [W, 1]
    r = tl.arange(0, R)[None, :, None]
    t = BT - 1 - (w[:, :, None] * R + r)  # [W, R, 1]
    o = t * C + o_c[:, None, :]  # [W, R, BC]
    above = tl.broadcast_to(tl.maximum(w - 1, 0), [W, BC])
    C_score, k_score = lane_index(C, Q_score, D_score), lane_index(o_c, Q_score, D_score)
    oc_score = t * C_score + k_score[:, None, :]
    C_value, k_value = lane_index(C, Q_value, D_value), lane_index(o_c, Q_value, D_value)
    oc_value = t * C_value + k_value[:, None, :]
    if p_carry_m is not None:
        h_adj_m = tl.load(p_carry_m + (i_n * S + i_s) * C + o_c, mask=m_c, other=0)
    else:
        h_adj_m = tl.load(p_d_final_m + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    if p_carry_u is not None:
        h_adj_u = tl.load(p_carry_u + (i_n * S + i_s) * C + o_c, mask=m_c, other=0)
    else:
        h_adj_u = tl.load(p_d_final_u + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    if p_carry_w is not None:
        h_adj_w = tl.load(p_carry_w + (i_n * S + i_s) * C + o_c, mask=m_c, other=0)
    else:
        h_adj_w = tl.load(p_d_final_w + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    z_m = tl.full([1, BC], float("-inf"), tl.float32)
    if p_initial_m is not None:
        z_m = tl.load(p_initial_m + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    z_u = tl.full([1, BC], 0.0, tl.float32)
    if p_initial_u is not None:
        z_u = tl.load(p_initial_u + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    z_w = tl.full([1, BC], 0.0, tl.float32)
    if p_initial_w is not None:
        z_w = tl.load(p_initial_w + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    tiles = tl.cdiv(length, BT)
    rest, first_row = (eos - begin).to(tl.int32), (bos - begin).to(tl.int32)
    for j in tl.range(0, tiles, num_stages=NS):
        i_t = (tiles - 1 - j) * BT
        row = begin + i_t
        m = (i_t + t < length) & m_c[:, None, :]
        m_after = m & (i_t + t + 1 < rest)  # another token follows
        b_score = tl.load(p_score + row * C_score + oc_score, mask=m, other=0).to(tl.float32)
        b_value = tl.load(p_value + row * C_value + oc_value, mask=m, other=0).to(tl.float32)
        b_d_y = tl.load(p_d_out_y + row * C + o, mask=m, other=0).to(tl.float32)
        nb_score = tl.load(p_score + (row + 1) * C_score + oc_score, mask=m_after, other=0).to(tl.float32)
        nb_value = tl.load(p_value + (row + 1) * C_value + oc_value, mask=m_after, other=0).to(tl.float32)
        s_m = tl.load(p_saved_m + row * C + o, mask=m, other=0).to(tl.float32)
        v_m = tl.load(p_saved_m + (row - 1) * C + o, mask=m & (i_t + t > first_row), other=float("-inf")).to(tl.float32)
        if p_initial_m is not None:
            v_m = tl.where(i_t + t > first_row, v_m, z_m[:, None, :])
        s_u = tl.load(p_saved_u + row * C + o, mask=m, other=0).to(tl.float32)
        v_u = tl.load(p_saved_u + (row - 1) * C + o, mask=m & (i_t + t > first_row), other=0.0).to(tl.float32)
        if p_initial_u is not None:
            v_u = tl.where(i_t + t > first_row, v_u, z_u[:, None, :])
        s_w = tl.load(p_saved_w + row * C + o, mask=m, other=0).to(tl.float32)
        v_w = tl.load(p_saved_w + (row - 1) * C + o, mask=m & (i_t + t > first_row), other=0.0).to(tl.float32)
        if p_initial_w is not None:
            v_w = tl.where(i_t + t > first_row, v_w, z_w[:, None, :])
        m_here = m
        if p_kind is not None:
            kind = tl.load(p_kind + row + t, mask=i_t + t < length, other=0).to(tl.int32)  # [W, R, 1]
            below = tl.load(p_kind + row + 1 + t, mask=(i_t + t < length) & (i_t + t + 1 < rest), other=0).to(tl.int32)
            cut = tl.broadcast_to((below >= 2).to(tl.int32), [W, R, BC])
            m_here, m_after = m & ((kind & 1) != 0), m & (below == 1)
            v_m = tl.where(kind >= 2, float("-inf"), v_m)
            v_u = tl.where(kind >= 2, 0.0, v_u)
            v_w = tl.where(kind >= 2, 0.0, v_w)
        u_adj_u, u_adj_w = lane_direct(s_u, s_w, b_d_y)
        w_J_m_m, w_J_m_u, w_J_m_w, w_J_u_u, w_J_w_w = lane_transition(nb_score, nb_value, s_m, s_u, s_w)
        a_J_m_m = tl.where(m_after, w_J_m_m, 1.0)
        a_J_m_u = tl.where(m_after, w_J_m_u, 0.0)
        a_J_m_w = tl.where(m_after, w_J_m_w, 0.0)
        a_J_u_u = tl.where(m_after, w_J_u_u, 1.0)
        a_J_w_w = tl.where(m_after, w_J_w_w, 1.0)
        a_adj_m = tl.zeros([W, R, BC], tl.float32)
        a_adj_u = tl.where(m_here, u_adj_u, 0.0)
        a_adj_w = tl.where(m_here, u_adj_w, 0.0)
        if p_kind is not None:
            inner_cut, g_J_m_m, g_J_m_u, g_J_m_w, g_J_u_u, g_J_w_w, g_adj_m, g_adj_u, g_adj_w = tl.associative_scan((cut, a_J_m_m, a_J_m_u, a_J_m_w, a_J_u_u, a_J_w_w, a_adj_m, a_adj_u, a_adj_w), 1, lane_cut)
            outer_cut = tile_pick(inner_cut, r == R - 1, 1)
        else:
            (g_J_m_m, g_J_m_u, g_J_m_w, g_J_u_u, g_J_w_w, g_adj_m, g_adj_u, g_adj_w,) = tl.associative_scan((a_J_m_m, a_J_m_u, a_J_m_w, a_J_u_u, a_J_w_w, a_adj_m, a_adj_u, a_adj_w,), 1, lane_compose)
        c_J_m_m = tile_pick(g_J_m_m, r == R - 1, 1)  # [W, BC]
        c_J_m_u = tile_pick(g_J_m_u, r == R - 1, 1)  # [W, BC]
        c_J_m_w = tile_pick(g_J_m_w, r == R - 1, 1)  # [W, BC]
        c_J_u_u = tile_pick(g_J_u_u, r == R - 1, 1)  # [W, BC]
        c_J_w_w = tile_pick(g_J_w_w, r == R - 1, 1)  # [W, BC]
        c_adj_m = tile_pick(g_adj_m, r == R - 1, 1)  # [W, BC]
        c_adj_u = tile_pick(g_adj_u, r == R - 1, 1)  # [W, BC]
        c_adj_w = tile_pick(g_adj_w, r == R - 1, 1)  # [W, BC]
        f_adj_m, f_adj_u, f_adj_w = lane_pull(h_adj_m, h_adj_u, h_adj_w, c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w)
        if p_kind is not None:
            c_adj_m = tl.where((w == 0) & (outer_cut == 0), f_adj_m, c_adj_m)
            c_adj_u = tl.where((w == 0) & (outer_cut == 0), f_adj_u, c_adj_u)
            c_adj_w = tl.where((w == 0) & (outer_cut == 0), f_adj_w, c_adj_w)
            outer_cut, c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w = tl.associative_scan((outer_cut, c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w), 0, lane_cut)
        else:
            c_adj_m = tl.where(w == 0, f_adj_m, c_adj_m)
            c_adj_u = tl.where(w == 0, f_adj_u, c_adj_u)
            c_adj_w = tl.where(w == 0, f_adj_w, c_adj_w)
            (c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w,) = tl.associative_scan((c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w,), 0, lane_compose)
        q_adj_m = tl.where(w == 0, h_adj_m, tl.gather(c_adj_m, above, 0))[:, None, :]  # below each chunk
        h_adj_m = tile_pick(c_adj_m, w == W - 1, 0)[None, :]
        q_adj_u = tl.where(w == 0, h_adj_u, tl.gather(c_adj_u, above, 0))[:, None, :]  # below each chunk
        h_adj_u = tile_pick(c_adj_u, w == W - 1, 0)[None, :]
        q_adj_w = tl.where(w == 0, h_adj_w, tl.gather(c_adj_w, above, 0))[:, None, :]  # below each chunk
        h_adj_w = tile_pick(c_adj_w, w == W - 1, 0)[None, :]
        l_adj_m, l_adj_u, l_adj_w = lane_pull(q_adj_m, q_adj_u, q_adj_w, g_J_m_m, g_J_m_u, g_J_m_w, g_J_u_u, g_J_w_w, g_adj_m, g_adj_u, g_adj_w)
        if p_kind is not None:
            l_adj_m = tl.where(inner_cut == 0, l_adj_m, g_adj_m)
            l_adj_u = tl.where(inner_cut == 0, l_adj_u, g_adj_u)
            l_adj_w = tl.where(inner_cut == 0, l_adj_w, g_adj_w)
        first = i_t + t == first_row
        if JOINED:
            first = i_t + t < 0
        if p_kind is not None:
            first = kind >= 2
        g_score, g_value = lane_gradient(b_score, b_value, v_m, v_u, v_w, l_adj_m, l_adj_u, l_adj_w, first)
        if p_kind is not None:
            g_score = tl.where(m_here, g_score, 0.0)
        tl.store(p_d_score + row * C + o, g_score, mask=m)
        if p_kind is not None:
            g_value = tl.where(m_here, g_value, 0.0)
        tl.store(p_d_value + row * C + o, g_value, mask=m)
    if p_d_initial_m is not None:
        m_after = m_c & (length > 0) & (i_s == 0)
        nb_score = tl.load(p_score + begin * C_score + k_score, mask=m_after, other=0).to(tl.float32)
        nb_value = tl.load(p_value + begin * C_value + k_value, mask=m_after, other=0).to(tl.float32)
        s_m = z_m
        s_u = z_u
        s_w = z_w
        if p_kind is not None:
            below = tl.load(p_kind + begin, mask=length > 0, other=0).to(tl.int32)
            m_after = m_after & (below == 1)
        w_J_m_m, w_J_m_u, w_J_m_w, w_J_u_u, w_J_w_w = lane_transition(nb_score, nb_value, s_m, s_u, s_w)
        c_J_m_m = tl.where(m_after, w_J_m_m, 1.0)
        c_J_m_u = tl.where(m_after, w_J_m_u, 0.0)
        c_J_m_w = tl.where(m_after, w_J_m_w, 0.0)
        c_J_u_u = tl.where(m_after, w_J_u_u, 1.0)
        c_J_w_w = tl.where(m_after, w_J_w_w, 1.0)
        c_adj_m = tl.zeros([1, BC], tl.float32)
        c_adj_u = tl.zeros([1, BC], tl.float32)
        c_adj_w = tl.zeros([1, BC], tl.float32)
        f_adj_m, f_adj_u, f_adj_w = lane_pull(h_adj_m, h_adj_u, h_adj_w, c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w)
        if p_kind is not None:
            f_adj_m = tl.where(below >= 2, 0.0, f_adj_m)
        tl.store(p_d_initial_m + i_n * C + o_c, f_adj_m, mask=m_c & (i_s == 0))
        if p_kind is not None:
            f_adj_u = tl.where(below >= 2, 0.0, f_adj_u)
        tl.store(p_d_initial_u + i_n * C + o_c, f_adj_u, mask=m_c & (i_s == 0))
        if p_kind is not None:
            f_adj_w = tl.where(below >= 2, 0.0, f_adj_w)
        tl.store(p_d_initial_w + i_n * C + o_c, f_adj_w, mask=m_c & (i_s == 0))


@jit(do_not_specialize=["T", "CV", "S", "SEG"])
def backward_fold_kernel(
    p_score, p_value, p_d_out_y, p_saved_m, p_saved_u, p_saved_w, p_initial_m, p_initial_u, p_initial_w,
    p_fold_J_m_m, p_fold_J_m_u, p_fold_J_m_w, p_fold_J_u_u, p_fold_J_w_w, p_fold_adj_m, p_fold_adj_u,
    p_fold_adj_w, p_fold_cut,
    p_kind, p_cu, T, CV, S, SEG,
    Q_score: tl.constexpr, D_score: tl.constexpr,
    Q_value: tl.constexpr, D_value: tl.constexpr,
    R: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
):
    """How the cotangents before each segment come from those after it, [N, S, C] an entry."""
    C = CV * V
    NC = tl.cdiv(C, BC)
    i_c, i_n, i_s = tl.program_id(0) % NC, tl.program_id(0) // NC // S, tl.program_id(0) // NC % S
    bos, eos, begin, length = tile_span(p_cu, i_n, i_s, T, SEG)
    i_n = i_n.to(tl.int64)
    BT: tl.constexpr = W * R
    o_c = i_c * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    m_c = o_c < C
    w = tl.arange(0, W)[:, None]  # [W, 1]
    r = tl.arange(0, R)[None, :, None]
    t = BT - 1 - (w[:, :, None] * R + r)  # [W, R, 1]
    o = t * C + o_c[:, None, :]  # [W, R, BC]
    above = tl.broadcast_to(tl.maximum(w - 1, 0), [W, BC])
    C_score, k_score = lane_index(C, Q_score, D_score), lane_index(o_c, Q_score, D_score)
    oc_score = t * C_score + k_score[:, None, :]
    C_value, k_value = lane_index(C, Q_value, D_value), lane_index(o_c, Q_value, D_value)
    oc_value = t * C_value + k_value[:, None, :]
    z_m = tl.full([1, BC], float("-inf"), tl.float32)
    if p_initial_m is not None:
        z_m = tl.load(p_initial_m + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    z_u = tl.full([1, BC], 0.0, tl.float32)
    if p_initial_u is not None:
        z_u = tl.load(p_initial_u + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    z_w = tl.full([1, BC], 0.0, tl.float32)
    if p_initial_w is not None:
        z_w = tl.load(p_initial_w + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    h_J_m_m = tl.full([1, BC], 1.0, tl.float32)
    h_J_m_u = tl.full([1, BC], 0.0, tl.float32)
    h_J_m_w = tl.full([1, BC], 0.0, tl.float32)
    h_J_u_u = tl.full([1, BC], 1.0, tl.float32)
    h_J_w_w = tl.full([1, BC], 1.0, tl.float32)
    h_adj_m = tl.full([1, BC], 0.0, tl.float32)
    h_adj_u = tl.full([1, BC], 0.0, tl.float32)
    h_adj_w = tl.full([1, BC], 0.0, tl.float32)
    before_cut = tl.zeros([1, BC], tl.int32)
    tiles = tl.cdiv(length, BT)
    rest, first_row = (eos - begin).to(tl.int32), (bos - begin).to(tl.int32)
    for j in tl.range(0, tiles, num_stages=NS):
        i_t = (tiles - 1 - j) * BT
        row = begin + i_t
        m = (i_t + t < length) & m_c[:, None, :]
        m_after = m & (i_t + t + 1 < rest)  # another token follows
        b_d_y = tl.load(p_d_out_y + row * C + o, mask=m, other=0).to(tl.float32)
        nb_score = tl.load(p_score + (row + 1) * C_score + oc_score, mask=m_after, other=0).to(tl.float32)
        nb_value = tl.load(p_value + (row + 1) * C_value + oc_value, mask=m_after, other=0).to(tl.float32)
        s_m = tl.load(p_saved_m + row * C + o, mask=m, other=0).to(tl.float32)
        s_u = tl.load(p_saved_u + row * C + o, mask=m, other=0).to(tl.float32)
        s_w = tl.load(p_saved_w + row * C + o, mask=m, other=0).to(tl.float32)
        m_here = m
        if p_kind is not None:
            kind = tl.load(p_kind + row + t, mask=i_t + t < length, other=0).to(tl.int32)  # [W, R, 1]
            below = tl.load(p_kind + row + 1 + t, mask=(i_t + t < length) & (i_t + t + 1 < rest), other=0).to(tl.int32)
            cut = tl.broadcast_to((below >= 2).to(tl.int32), [W, R, BC])
            m_here, m_after = m & ((kind & 1) != 0), m & (below == 1)
        u_adj_u, u_adj_w = lane_direct(s_u, s_w, b_d_y)
        w_J_m_m, w_J_m_u, w_J_m_w, w_J_u_u, w_J_w_w = lane_transition(nb_score, nb_value, s_m, s_u, s_w)
        a_J_m_m = tl.where(m_after, w_J_m_m, 1.0)
        a_J_m_u = tl.where(m_after, w_J_m_u, 0.0)
        a_J_m_w = tl.where(m_after, w_J_m_w, 0.0)
        a_J_u_u = tl.where(m_after, w_J_u_u, 1.0)
        a_J_w_w = tl.where(m_after, w_J_w_w, 1.0)
        a_adj_m = tl.zeros([W, R, BC], tl.float32)
        a_adj_u = tl.where(m_here, u_adj_u, 0.0)
        a_adj_w = tl.where(m_here, u_adj_w, 0.0)
        if p_kind is not None:
            inner_cut, g_J_m_m, g_J_m_u, g_J_m_w, g_J_u_u, g_J_w_w, g_adj_m, g_adj_u, g_adj_w = tl.associative_scan((cut, a_J_m_m, a_J_m_u, a_J_m_w, a_J_u_u, a_J_w_w, a_adj_m, a_adj_u, a_adj_w), 1, lane_cut)
            outer_cut = tile_pick(inner_cut, r == R - 1, 1)
        else:
            (g_J_m_m, g_J_m_u, g_J_m_w, g_J_u_u, g_J_w_w, g_adj_m, g_adj_u, g_adj_w,) = tl.associative_scan((a_J_m_m, a_J_m_u, a_J_m_w, a_J_u_u, a_J_w_w, a_adj_m, a_adj_u, a_adj_w,), 1, lane_compose)
        c_J_m_m = tile_pick(g_J_m_m, r == R - 1, 1)  # [W, BC]
        c_J_m_u = tile_pick(g_J_m_u, r == R - 1, 1)  # [W, BC]
        c_J_m_w = tile_pick(g_J_m_w, r == R - 1, 1)  # [W, BC]
        c_J_u_u = tile_pick(g_J_u_u, r == R - 1, 1)  # [W, BC]
        c_J_w_w = tile_pick(g_J_w_w, r == R - 1, 1)  # [W, BC]
        c_adj_m = tile_pick(g_adj_m, r == R - 1, 1)  # [W, BC]
        c_adj_u = tile_pick(g_adj_u, r == R - 1, 1)  # [W, BC]
        c_adj_w = tile_pick(g_adj_w, r == R - 1, 1)  # [W, BC]
        if p_kind is not None:
            joined_cut, f_J_m_m, f_J_m_u, f_J_m_w, f_J_u_u, f_J_w_w, f_adj_m, f_adj_u, f_adj_w = lane_cut(before_cut, h_J_m_m, h_J_m_u, h_J_m_w, h_J_u_u, h_J_w_w, h_adj_m, h_adj_u, h_adj_w, outer_cut, c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w)
            outer_cut = tl.where(w == 0, joined_cut, outer_cut)
        else:
            f_J_m_m, f_J_m_u, f_J_m_w, f_J_u_u, f_J_w_w, f_adj_m, f_adj_u, f_adj_w = lane_compose(h_J_m_m, h_J_m_u, h_J_m_w, h_J_u_u, h_J_w_w, h_adj_m, h_adj_u, h_adj_w, c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w)
        c_J_m_m = tl.where(w == 0, f_J_m_m, c_J_m_m)
        c_J_m_u = tl.where(w == 0, f_J_m_u, c_J_m_u)
        c_J_m_w = tl.where(w == 0, f_J_m_w, c_J_m_w)
        c_J_u_u = tl.where(w == 0, f_J_u_u, c_J_u_u)
        c_J_w_w = tl.where(w == 0, f_J_w_w, c_J_w_w)
        c_adj_m = tl.where(w == 0, f_adj_m, c_adj_m)
        c_adj_u = tl.where(w == 0, f_adj_u, c_adj_u)
        c_adj_w = tl.where(w == 0, f_adj_w, c_adj_w)
        if p_kind is not None:
            outer_cut, c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w = tl.associative_scan((outer_cut, c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w), 0, lane_cut)
            before_cut = tile_pick(outer_cut, w == W - 1, 0)[None, :]
        else:
            (c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w,) = tl.associative_scan((c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w,), 0, lane_compose)
        h_J_m_m = tile_pick(c_J_m_m, w == W - 1, 0)[None, :]
        h_J_m_u = tile_pick(c_J_m_u, w == W - 1, 0)[None, :]
        h_J_m_w = tile_pick(c_J_m_w, w == W - 1, 0)[None, :]
        h_J_u_u = tile_pick(c_J_u_u, w == W - 1, 0)[None, :]
        h_J_w_w = tile_pick(c_J_w_w, w == W - 1, 0)[None, :]
        h_adj_m = tile_pick(c_adj_m, w == W - 1, 0)[None, :]
        h_adj_u = tile_pick(c_adj_u, w == W - 1, 0)[None, :]
        h_adj_w = tile_pick(c_adj_w, w == W - 1, 0)[None, :]
    tl.store(p_fold_J_m_m + (i_n * S + i_s) * C + o_c, h_J_m_m, mask=m_c)
    tl.store(p_fold_J_m_u + (i_n * S + i_s) * C + o_c, h_J_m_u, mask=m_c)
    tl.store(p_fold_J_m_w + (i_n * S + i_s) * C + o_c, h_J_m_w, mask=m_c)
    tl.store(p_fold_J_u_u + (i_n * S + i_s) * C + o_c, h_J_u_u, mask=m_c)
    tl.store(p_fold_J_w_w + (i_n * S + i_s) * C + o_c, h_J_w_w, mask=m_c)
    tl.store(p_fold_adj_m + (i_n * S + i_s) * C + o_c, h_adj_m, mask=m_c)
    tl.store(p_fold_adj_u + (i_n * S + i_s) * C + o_c, h_adj_u, mask=m_c)
    tl.store(p_fold_adj_w + (i_n * S + i_s) * C + o_c, h_adj_w, mask=m_c)
    if p_kind is not None:
        tl.store(p_fold_cut + (i_n * S + i_s) * C + o_c, before_cut, mask=m_c)


@jit(do_not_specialize=["T", "CV", "S", "SEG"])
def backward_carry_kernel(
    p_fold_J_m_m, p_fold_J_m_u, p_fold_J_m_w, p_fold_J_u_u, p_fold_J_w_w, p_fold_adj_m, p_fold_adj_u,
    p_fold_adj_w, p_d_final_m, p_d_final_u, p_d_final_w, p_carry_m, p_carry_u, p_carry_w,
    p_cut, p_cu, T, CV, S, SEG,
    R: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, V: tl.constexpr, NS: tl.constexpr,
):
    """The cotangents after each segment, [N, S, C] a live component."""
    C = CV * V
    NC = tl.cdiv(C, BC)
    i_c, i_n = tl.program_id(0) % NC, tl.program_id(0) // NC
    bos, eos, begin, length = tile_span(p_cu, i_n, i_n * 0, T, SEG)
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
    h_adj_m = tl.load(p_d_final_m + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    tl.store(p_carry_m + (i_n * S + tl.maximum(segments - 1, 0)) * C + o_c, h_adj_m, mask=m_c)
    h_adj_u = tl.load(p_d_final_u + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    tl.store(p_carry_u + (i_n * S + tl.maximum(segments - 1, 0)) * C + o_c, h_adj_u, mask=m_c)
    h_adj_w = tl.load(p_d_final_w + i_n * C + o_c, mask=m_c, other=0).to(tl.float32)
    tl.store(p_carry_w + (i_n * S + tl.maximum(segments - 1, 0)) * C + o_c, h_adj_w, mask=m_c)
    tiles = tl.cdiv(segments, BT)
    for j in tl.range(0, tiles, num_stages=NS):
        i_t = (tiles - 1 - j) * BT
        m = (i_t + t < segments) & m_c[:, None, :]
        a_J_m_m = tl.load(p_fold_J_m_m + (i_n * S + i_t) * C + o, mask=m, other=1.0)
        a_J_m_u = tl.load(p_fold_J_m_u + (i_n * S + i_t) * C + o, mask=m, other=0.0)
        a_J_m_w = tl.load(p_fold_J_m_w + (i_n * S + i_t) * C + o, mask=m, other=0.0)
        a_J_u_u = tl.load(p_fold_J_u_u + (i_n * S + i_t) * C + o, mask=m, other=1.0)
        a_J_w_w = tl.load(p_fold_J_w_w + (i_n * S + i_t) * C + o, mask=m, other=1.0)
        a_adj_m = tl.load(p_fold_adj_m + (i_n * S + i_t) * C + o, mask=m, other=0.0)
        a_adj_u = tl.load(p_fold_adj_u + (i_n * S + i_t) * C + o, mask=m, other=0.0)
        a_adj_w = tl.load(p_fold_adj_w + (i_n * S + i_t) * C + o, mask=m, other=0.0)
        if p_cut is not None:
            cut = tl.load(p_cut + (i_n * S + i_t) * C + o, mask=m, other=0).to(tl.int32)
        if p_cut is not None:
            inner_cut, g_J_m_m, g_J_m_u, g_J_m_w, g_J_u_u, g_J_w_w, g_adj_m, g_adj_u, g_adj_w = tl.associative_scan((cut, a_J_m_m, a_J_m_u, a_J_m_w, a_J_u_u, a_J_w_w, a_adj_m, a_adj_u, a_adj_w), 1, lane_cut)
            outer_cut = tile_pick(inner_cut, r == R - 1, 1)
        else:
            (g_J_m_m, g_J_m_u, g_J_m_w, g_J_u_u, g_J_w_w, g_adj_m, g_adj_u, g_adj_w,) = tl.associative_scan((a_J_m_m, a_J_m_u, a_J_m_w, a_J_u_u, a_J_w_w, a_adj_m, a_adj_u, a_adj_w,), 1, lane_compose)
        c_J_m_m = tile_pick(g_J_m_m, r == R - 1, 1)  # [W, BC]
        c_J_m_u = tile_pick(g_J_m_u, r == R - 1, 1)  # [W, BC]
        c_J_m_w = tile_pick(g_J_m_w, r == R - 1, 1)  # [W, BC]
        c_J_u_u = tile_pick(g_J_u_u, r == R - 1, 1)  # [W, BC]
        c_J_w_w = tile_pick(g_J_w_w, r == R - 1, 1)  # [W, BC]
        c_adj_m = tile_pick(g_adj_m, r == R - 1, 1)  # [W, BC]
        c_adj_u = tile_pick(g_adj_u, r == R - 1, 1)  # [W, BC]
        c_adj_w = tile_pick(g_adj_w, r == R - 1, 1)  # [W, BC]
        f_adj_m, f_adj_u, f_adj_w = lane_pull(h_adj_m, h_adj_u, h_adj_w, c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w)
        if p_cut is not None:
            c_adj_m = tl.where((w == 0) & (outer_cut == 0), f_adj_m, c_adj_m)
            c_adj_u = tl.where((w == 0) & (outer_cut == 0), f_adj_u, c_adj_u)
            c_adj_w = tl.where((w == 0) & (outer_cut == 0), f_adj_w, c_adj_w)
            outer_cut, c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w = tl.associative_scan((outer_cut, c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w), 0, lane_cut)
        else:
            c_adj_m = tl.where(w == 0, f_adj_m, c_adj_m)
            c_adj_u = tl.where(w == 0, f_adj_u, c_adj_u)
            c_adj_w = tl.where(w == 0, f_adj_w, c_adj_w)
            (c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w,) = tl.associative_scan((c_J_m_m, c_J_m_u, c_J_m_w, c_J_u_u, c_J_w_w, c_adj_m, c_adj_u, c_adj_w,), 0, lane_compose)
        q_adj_m = tl.where(w == 0, h_adj_m, tl.gather(c_adj_m, above, 0))[:, None, :]  # below each chunk
        h_adj_m = tile_pick(c_adj_m, w == W - 1, 0)[None, :]
        q_adj_u = tl.where(w == 0, h_adj_u, tl.gather(c_adj_u, above, 0))[:, None, :]  # below each chunk
        h_adj_u = tile_pick(c_adj_u, w == W - 1, 0)[None, :]
        q_adj_w = tl.where(w == 0, h_adj_w, tl.gather(c_adj_w, above, 0))[:, None, :]  # below each chunk
        h_adj_w = tile_pick(c_adj_w, w == W - 1, 0)[None, :]
        l_adj_m, l_adj_u, l_adj_w = lane_pull(q_adj_m, q_adj_u, q_adj_w, g_J_m_m, g_J_m_u, g_J_m_w, g_J_u_u, g_J_w_w, g_adj_m, g_adj_u, g_adj_w)
        if p_cut is not None:
            l_adj_m = tl.where(inner_cut == 0, l_adj_m, g_adj_m)
            l_adj_u = tl.where(inner_cut == 0, l_adj_u, g_adj_u)
            l_adj_w = tl.where(inner_cut == 0, l_adj_w, g_adj_w)
        tl.store(p_carry_m + (i_n * S + i_t - 1) * C + o, l_adj_m, mask=m & (i_t + t > 0))
        tl.store(p_carry_u + (i_n * S + i_t - 1) * C + o, l_adj_u, mask=m & (i_t + t > 0))
        tl.store(p_carry_w + (i_n * S + i_t - 1) * C + o, l_adj_w, mask=m & (i_t + t > 0))


@jit(do_not_specialize=["CV"])
def step_kernel(
    p_score, p_value, p_out_y, p_state_m, p_state_u, p_state_w,
    p_slots, CV,
    Q_score: tl.constexpr, D_score: tl.constexpr,
    Q_value: tl.constexpr, D_value: tl.constexpr,
    BC: tl.constexpr, V: tl.constexpr,
):
    """One token a row: the state is read, moved on and written back, in the rows that p_slots [B] names."""
    C = CV * V
    NC = tl.cdiv(C, BC)
    i_c, row = tl.program_id(0) % NC, (tl.program_id(0) // NC).to(tl.int64)
    slot = row
    if p_slots is not None:
        slot = tl.load(p_slots + row).to(tl.int64)
    o_c = i_c * BC + tl.arange(0, BC)[None, :]  # [1, BC]
    m_c = o_c < C
    C_score, k_score = lane_index(C, Q_score, D_score), lane_index(o_c, Q_score, D_score)
    C_value, k_value = lane_index(C, Q_value, D_value), lane_index(o_c, Q_value, D_value)
    b_score = tl.load(p_score + row * C_score + k_score, mask=m_c, other=0).to(tl.float32)
    b_value = tl.load(p_value + row * C_value + k_value, mask=m_c, other=0).to(tl.float32)
    v_m = tl.load(p_state_m + slot * C + o_c, mask=m_c, other=0).to(tl.float32)
    v_u = tl.load(p_state_u + slot * C + o_c, mask=m_c, other=0).to(tl.float32)
    v_w = tl.load(p_state_w + slot * C + o_c, mask=m_c, other=0).to(tl.float32)
    e_m, e_w = lane_lift(b_score, b_value)
    e_u = tl.full([1, BC], 1, tl.float32)
    s_m, s_u, s_w = lane_advance(v_m, v_u, v_w, e_m, e_u, e_w)
    y_y = lane_readout(s_u, s_w)
    tl.store(p_state_m + slot * C + o_c, s_m, mask=m_c)
    tl.store(p_state_u + slot * C + o_c, s_u, mask=m_c)
    tl.store(p_state_w + slot * C + o_c, s_w, mask=m_c)
    tl.store(p_out_y + row * C + o_c, y_y, mask=m_c)


# --- Calls of the pointwise kernels: shapes to grids and tiles, buffers, one launch (three where time is split).

_SHAPES = 256  # remembered shapes


class PointwiseKernels:
    """The kernels of one spec behind tensors in the spec's own order.

    Inputs are [B, T, *lanes, *dims] (declared ones, then taps), params [*lanes, *dims] or [*dims], states
    [N, *lanes, *dims]; lanes of size 1 and grouped ones need not be expanded. `table` is what the compiler wrote: the
    kernels, and the places of the tensors that each takes. `processors` is the GPU's number of multiprocessors.
    """

    def __init__(self, table: Any) -> None:
        self.table = table
        self.interpreted: bool = table.interpreted
        self.processors: int | None = 1 if self.interpreted else None
        self.segment_tiles = 16  # a segment has at least as many
        self._lanes: dict[Any, LaneShape] = {}

    def saved_components(self, dtype: torch.dtype, flagged: bool = False) -> tuple[str, ...]:
        """The live components that `scan_forward` saves beside outputs of that dtype; `flagged`: with a mask or resets
        (then an output is 0 at masked tokens, and does not stand for the state)."""
        reused = [] if flagged else [c for c, _, always in self.table.reused if always or dtype == torch.float32]
        return tuple(self.table.live[c][0] for c in self.table.backward[3] if c not in reused)

    def scan_forward(
        self, inputs: list[Tensor], params: list[Tensor], initial: list[Tensor] | None, code: Tensor | None,
        cu: Tensor | None, save: bool,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:  # fmt: skip
        """Outputs [B, T, ...], the state after the last token [N, ...], and saved components [B, T, ...]."""
        table, lanes = self.table, self._shape(inputs, params)
        batch, length = inputs[0].shape[:2]
        rows = batch if cu is None else cu.numel() - 1
        dtype = real_dtype([*inputs, *params])
        device = inputs[0].device
        outputs = [_empty((batch, length, *lanes.full), kind, dtype, device) for _, kind in table.outputs]
        finals = [_empty((rows, *lanes.full), kind, torch.float32, device) for _, kind in table.live]
        names = self.saved_components(dtype, code is not None) if save else ()
        saved = {
            name: _empty((batch, length, *lanes.full), kind, torch.float32, device)
            for name, kind in table.live if name in names
        }  # fmt: skip
        if rows and lanes.count:
            args, maps = lanes.arguments(table.forward, inputs, params)
            begin = [None] * len(table.live) if initial is None else [_plain(x) for x in initial]
            joined = initial is not None or table.counts
            kinds = self._kinds(code, cu, rows, length, joined)
            span = self._span("forward", lanes, rows, length, inputs)
            carry: list[Tensor | None] = [None] * len(table.live_scalars)
            if span.segments > 1:
                carry = self._carries(span, lanes, inputs, params, begin, kinds, cu, joined)
            tensors = [*outputs, *(saved.get(name) for name, _ in table.live), *begin, *finals]
            table.forward_kernel[span.grid](
                *args, *map(_real, tensors), *carry, kinds, cu, *span.numbers, *maps, joined, span.even, *span.tile,
                num_warps=span.warps,
            )  # fmt: skip
        return outputs, finals, [saved[name] for name in names]

    def scan_backward(
        self, d_outputs: list[Tensor], d_finals: list[Tensor], inputs: list[Tensor], params: list[Tensor],
        initial: list[Tensor] | None, outputs: list[Tensor], saved: list[Tensor], code: Tensor | None,
        cu: Tensor | None,
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None] | None]:  # fmt: skip
        """Gradients of inputs and params in their own shapes, and of the initial state; None where there is none."""
        table, lanes = self.table, self._shape(inputs, params)
        batch, length = inputs[0].shape[:2]
        rows = batch if cu is None else cu.numel() - 1
        device = inputs[0].device
        d_inputs: list[Tensor | None] = [None] * len(inputs)
        d_params: list[Tensor | None] = [None] * len(params)
        d_initial: list[Tensor | None] | None = None
        if initial is not None:
            d_initial = [torch.empty_like(x, memory_format=torch.contiguous_format) if place in table.smooth else None
                         for place, x in enumerate(initial)]  # fmt: skip
        if not (rows and lanes.count):
            zeros = [torch.zeros_like(x) for x in inputs], [torch.zeros_like(x) for x in params]
            return [*zeros[0]], [*zeros[1]], d_initial

        names = self.saved_components(real_dtype([*inputs, *params]), code is not None)
        kept = dict(zip(names, saved, strict=True))
        states = {c: outputs[o] for c, o, _ in table.reused}
        states = {c: kept[name] if (name := table.live[c][0]) in kept else states[c] for c in table.backward[3]}
        joined = initial is not None or table.counts
        kinds = self._kinds(code, cu, rows, length, joined)
        span = self._span("backward", lanes, rows, length, inputs)
        args, maps = lanes.arguments(table.backward, inputs, params)
        cotangents = [_plain(d_outputs[o]) for o in table.backward[2]]
        begin = [None if initial is None else _plain(initial[c]) for c in table.backward[3]]
        ends = [_plain(d_finals[c]) for c in table.smooth]
        firsts = [None if d_initial is None else d_initial[c] for c in table.smooth]
        whole = {x: self._gradient(inputs[x], table.inputs[x][2], lanes.maps[x], (batch, length, *lanes.full))
                 for x in table.input_shares}  # fmt: skip
        parts = {p: _empty((rows * span.segments, *lanes.full), table.params[p][2], torch.float32, device)
                 for p in table.param_shares}  # fmt: skip
        carry: list[Tensor | None] = [None] * table.smooth_scalars
        if span.segments > 1:
            carry = self._backward_carries(span, lanes, inputs, params, d_outputs, states, initial, ends, kinds, cu)
        tensors = [*cotangents, *states.values(), *begin, *ends, *firsts, *whole.values(), *parts.values()]
        table.backward_kernel[span.grid](
            *args, *map(_real, tensors), *carry, kinds, cu, *span.numbers, *maps, joined, *span.tile,
            num_warps=span.warps,
        )  # fmt: skip
        for x, g in whole.items():
            d_inputs[x] = lanes.reduced(g, inputs[x], table.inputs[x][1], 2)
        for p, g in parts.items():
            d_params[p] = lanes.reduced(g.sum(0), params[p], table.params[p][1], 0)
        return d_inputs, d_params, d_initial

    def step_in_place(
        self, state: list[Tensor], inputs: list[Tensor], params: list[Tensor], slots: Tensor | None
    ) -> list[Tensor]:
        """The outputs of one token, inputs [B, ...]: row b (or slots[b]) of `state` [rows, ...] moves on in place."""
        table = self.table
        batch = inputs[0].shape[0]
        tokens = [x.unsqueeze(1) for x in inputs]
        lanes = self._shape(tokens, params)
        dtype = real_dtype([*inputs, *params])
        outputs = [_empty((batch, *lanes.full), kind, dtype, inputs[0].device) for _, kind in table.outputs]
        if batch and lanes.count:
            args, maps = lanes.arguments(table.forward, tokens, params)
            block = min(1024, _power_of_two(lanes.count))
            vector = math.gcd(lanes.count, 4)
            table.step_kernel[(batch * -(-lanes.count // block),)](
                *args, *map(_real, outputs), *map(_real, state), slots, lanes.count // vector, *maps, block, vector
            )
        return outputs

    # --- pieces

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
        each_rows, chunks, width, warps, stages, vector = self.table.tiles[direction][4 if wide else 2]
        while width > 1 and width >= 2 * lanes.count:
            width, chunks = width // 2, min(2 * chunks, 64)
        tokens, vector = each_rows * chunks, math.gcd(vector, lanes.count)
        programs = rows * -(-lanes.count // width)
        processors = self.processors or _processors(inputs[0].device)
        segments, each = 1, length
        if programs < 2 * processors:
            segments = min(-(-4 * processors // programs), length // (self.segment_tiles * tokens))
            if segments > 3:
                each = -(-length // (segments * tokens)) * tokens
            segments = -(-length // each) if each else 1
        return SimpleNamespace(
            tile=(each_rows, chunks, width, vector, stages), warps=warps, programs=programs, segments=segments,
            grid=(programs * segments,), numbers=(length, lanes.count // vector, segments, each),
            even=lanes.count % width == 0,
        )  # fmt: skip

    def _kinds(self, code: Tensor | None, cu: Tensor | None, rows: int, length: int, joined: bool) -> Tensor | None:
        """Kinds of tokens: `code`, with the tokens marked that have nothing before them."""
        if code is None or self.table.counts:
            return code
        kinds = torch.empty_like(code, memory_format=torch.contiguous_format)
        self.table.kind_kernel[(rows,)](code.contiguous(), kinds, cu, length, joined, 256)
        return kinds

    def _carries(
        self, span: SimpleNamespace, lanes: LaneShape, inputs: list[Tensor], params: list[Tensor],
        begin: Sequence[Tensor | None], kinds: Tensor | None, cu: Tensor | None, joined: bool,
    ) -> list[Tensor | None]:  # fmt: skip
        """What is before each segment, [N, S + 1, C] a live scalar."""
        table, device = self.table, inputs[0].device
        rows = span.programs // -(-lanes.count // span.tile[2])
        folds = [_empty((rows, span.segments, lanes.count), k, torch.float32, device) for k in table.element_scalars]
        carry = [_empty((rows, span.segments + 1, lanes.count), k, torch.float32, device) for k in table.live_scalars]
        fold_kinds = None
        if kinds is not None:
            fold_kinds = torch.empty((rows, span.segments, lanes.count), dtype=torch.int8, device=device)
        args, maps = lanes.arguments(table.fold, inputs, params)
        table.fold_kernel[span.grid](
            *args, *folds, fold_kinds, kinds, cu, *span.numbers, *maps, *span.tile, num_warps=span.warps
        )
        table.carry_kernel[(span.programs,)](
            *folds, *map(_real, begin), *carry, fold_kinds, cu, *span.numbers, joined, *span.tile, num_warps=span.warps
        )
        return [*carry]

    def _backward_carries(
        self, span: SimpleNamespace, lanes: LaneShape, inputs: list[Tensor], params: list[Tensor],
        d_outputs: list[Tensor], states: dict[int, Tensor], initial: list[Tensor] | None, ends: list[Tensor],
        kinds: Tensor | None, cu: Tensor | None,
    ) -> list[Tensor | None]:  # fmt: skip
        """The cotangents after each segment, [N, S, C] a live scalar."""
        table, device = self.table, inputs[0].device
        rows = span.programs // -(-lanes.count // span.tile[2])
        shape = (rows, span.segments, lanes.count)
        folds = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(table.entries)]
        carry = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(table.smooth_scalars)]
        cuts = None if kinds is None else torch.empty(shape, dtype=torch.int8, device=device)
        args, maps = lanes.arguments(table.backward_fold, inputs, params)
        _, _, outputs, used = table.backward_fold
        begin = [None if initial is None else _plain(initial[c]) for c in used]
        tensors = [*(_plain(d_outputs[o]) for o in outputs), *(states[c] for c in used), *begin]
        table.backward_fold_kernel[span.grid](
            *args, *map(_real, tensors), *folds, cuts, kinds, cu, *span.numbers, *maps, *span.tile, num_warps=span.warps
        )
        table.backward_carry_kernel[(span.programs,)](
            *folds, *map(_real, ends), *carry, cuts, cu, *span.numbers, *span.tile, num_warps=span.warps
        )
        return [*carry]

    def _gradient(self, x: Tensor, kind: str, lane_map: tuple[int, int] | None, shape: tuple[int, ...]) -> Tensor:
        """A buffer for an input's gradient in all lanes; fp32 if it has to be summed."""
        dtype = torch.float32 if kind == "complex" or lane_map != (1, 1) else x.dtype
        return _empty(shape, kind, dtype, x.device)


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

    def arguments(
        self, places: tuple[tuple[int, ...], ...], inputs: Sequence[Tensor], params: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[int]]:
        """The tensors at these places as kernels take them, and their maps, flat."""
        tensors: list[Tensor] = []
        maps: list[int] = []
        for at, x in [*((p, inputs[p]) for p in places[0]), *((self.inputs + p, params[p]) for p in places[1])]:
            lead = 2 if at < self.inputs else 0
            lane_map = self.maps[at]
            if self.kinds[at] == "complex" and not x.is_complex():
                x = x.to(torch.complex64)
            if lane_map is None:
                own = [n for _, n in self.axes[at]]
                x = x.reshape(*x.shape[:lead], *own).expand(*x.shape[:lead], *(n for n, _ in self.axes[at]))
            tensors.append(_real(_plain(x)))
            maps += lane_map or (1, 1)
        return tensors, maps

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


def _empty(shape: tuple[int, ...], kind: str, real: torch.dtype, device: torch.device) -> Tensor:
    dtype = {"real": real, "complex": torch.complex64, "int": torch.int64, "bool": torch.bool}[kind]
    return torch.empty(shape, dtype=dtype, device=device)


def _plain(x: Tensor) -> Tensor:
    """Contiguous, and not a lazy conjugate."""
    return x.resolve_conj().contiguous()


def _real(x: Any) -> Any:
    """A complex tensor as pairs of reals."""
    return torch.view_as_real(x) if x is not None and x.is_complex() else x


def _power_of_two(n: int) -> int:
    """The least one that is not below n."""
    return 1 << (n - 1).bit_length()


_COUNTS: dict[torch.device, int] = {}


def _processors(device: torch.device) -> int:
    if device not in _COUNTS:
        _COUNTS[device] = torch.cuda.get_device_properties(device).multi_processor_count
    return _COUNTS[device]


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
        inputs=(('score', (), 'real'), ('value', (), 'real'),),
        params=(),
        outputs=(('y', 'real'),),
        live=(('m', 'real'), ('u', 'real'), ('w', 'real'),),
        forward=((0, 1), ()),
        fold=((0, 1), ()),
        backward=((0, 1), (), (0,), (0, 1, 2)),
        backward_fold=((0, 1), (), (0,), (0, 1, 2)),
        smooth=(0, 1, 2),
        input_shares=(0, 1),
        param_shares=(),
        element_scalars=('real', 'real', 'real'),
        live_scalars=('real', 'real', 'real'),
        entries=8,
        smooth_scalars=3,
        reused=(),
        counts=False,
        tiles={"forward": {4: (4, 8, 64, 4, 3, 4), 2: (2, 16, 64, 4, 3, 8)}, "backward": {4: (2, 4, 64, 2, 3, 4), 2: (2, 4, 64, 2, 3, 4)}},
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


def sequential_scan(
    advance: Rule,
    elements: Values,
    empty: Values,
    *,
    carry: Values | None = None,
    initial: Values | None = None,
    valid: Tensor | None = None,
    entry: Tensor | None = None,
    previous: bool = False,
) -> Scan:
    """`order: left`: one token after another is the meaning, and the start `empty` is combined with the first token.

    `advance` may read anything of a token: for components that are not among `elements`, `empty` is [*lanes, *dims].
    """
    live = tuple(empty)
    length = _leading(elements)[1]
    if length == 0:
        return _nothing(elements, empty, carry, None, previous)
    start = _start(elements, empty)
    before = start if carry is None else carry
    state, states = before, []
    donor = None if valid is None else _donor(elements, valid)
    flags = [None] * length if valid is None else valid.unbind(1)
    entries = [None] * length if entry is None else entry.unbind(1)
    for x, v, e in zip(_unbind(elements), flags, entries, strict=True):
        if e is not None:
            rows, named = _rows(start, initial, None, e)
            state = _pick(e == GO_ON, state, _pick(named, rows, start))
        if v is None or donor is None:
            state = _fit(advance(state, x), state, live)
        else:
            state = _pick(v, _fit(advance(state, _pick(v, x, donor)), state, live), state)
        states.append(state)
    prefix = {k: torch.stack([s[k] for s in states], 1) for k in live}
    shifted = _previous(prefix, before, None, empty, entry, initial, None) if previous else None
    return Scan(prefix, shifted, state, None)


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
        if left:
            scan = sequential_scan(
                advance, lift(x), empty, carry=carry, initial=entering, valid=v, entry=e, previous=previous
            )
        else:
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


def tree_scan(
    combine: Merge,
    leaves: Node,
    counter: Node | None = None,
    *,
    empty: Node | None = None,
    exclusive: bool = False,
    keep: bool = True,
    recompute: bool = False,
) -> tuple[Node, Node | None]:
    """The prefixes [B, T, ...] of leaves [B, T, ...], and the counter after them; one combine a level.

    counter     where to go on; all its streams must be at one position (`tree_tokens` has no such limit)
    exclusive   the prefixes before each leaf; the first is `empty` (broadcast) if nothing came before
    keep        False: no counter is returned; exclusive prefixes of 2^m leaves then take 2 (2^m - 1 - m) combines
                in 2 (m - 1) levels, which is the least
    recompute   keep the operands of each level for backward, not what `combine` computes on the way
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
    if exclusive and length:
        first = counter_prefix(counter, leaves, empty)
        prefix = {k: torch.cat([first[k].unsqueeze(1), p[:, : length - 1]], 1) for k, p in prefix.items()}
    return prefix, after


def tree_roots(combine: Merge, leaves: Node, counter: Node | None = None, *, empty: Node) -> list[Node]:
    """What the counter holds after each leaf, level by level: [B, T, ...], the root of 2^k tokens or `empty`."""
    batch, length = next(iter(leaves.values())).shape[:2]
    position = 0 if counter is None else _common_position(counter)
    counter = counter_start(batch) if counter is None else counter
    roots = {k: _slot(counter, leaves, "root", k) for k in _bits(position)}
    nodes = _trees(combine, leaves, roots, position)
    levels = []
    for k in range((position + length).bit_length()):
        known = nodes[k] if k < len(nodes) else {name: x[:, :0] for name, x in leaves.items()}
        before = roots[k] if k in roots else {n: empty[n].to(x.dtype).expand_as(x[:, 0]) for n, x in leaves.items()}
        tokens = range(position + 1, position + length + 1)
        index = torch.tensor([(t >> k) - (position >> k) if t >> k & 1 else -1 for t in tokens])
        level = {}
        for name, x in known.items():
            at = index.to(x.device)
            rows = torch.cat([before[name].unsqueeze(1), x], 1).index_select(1, at.clamp(min=0))
            level[name] = torch.where((at >= 0).view(-1, *[1] * (rows.dim() - 2)), rows, empty[name])
        levels.append(level)
    return levels


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


def counter_bytes(counter: Node) -> int:
    """What a counter holds, in bytes; tensors that are the same memory count once."""
    return sum({x.data_ptr(): x.numel() * x.element_size() for x in counter.values()}.values())


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
) -> tuple[Node, Node | None, Node]:
    """(prefix, prefix before each token or None, counter) of sequences with masks, restarts and packing.

    valid [B, T] bool: a token that does not count is no leaf, the prefix stays as it is. reset [B, T] bool: a new tree
    starts with this token. cu_seqlens [N + 1]: N sequences in one row; the counters are theirs. Runs between restarts
    are found on the host (a sync, where the flags are on a device); those of one length and position share a scan.
    """
    batch, length = next(iter(leaves.values())).shape[:2]
    bounds = [b * length for b in range(batch + 1)] if cu_seqlens is None else cu_seqlens.tolist()
    count = len(bounds) - 1
    given = counter_start(count) if counter is None else counter
    positions: list[int] = [0] * count if counter is None else given["position"].tolist()
    if not batch or (valid is None and reset is None and cu_seqlens is None and len(set(positions)) == 1):
        prefix, after = tree_scan(combine, leaves, counter, recompute=recompute)
        first = counter_prefix(counter, leaves, empty) if previous and counter is not None else empty
        shifted = {k: torch.cat([_first(first[k], x), x], 1)[:, :length] for k, x in prefix.items()}
        return prefix, shifted if previous else None, after or given
    flags = [None if f is None else f.flatten().tolist() for f in (valid, reset)]
    runs = _runs(bounds, flags[0], flags[1])
    flat = {k: x.flatten(0, 1) for k, x in leaves.items()}
    device = next(iter(flat.values())).device
    # A table of every prefix there is: nothing, what each sequence went on from, then those of the runs.
    nothing = {k: empty[k].to(x.dtype).expand(1, *x.shape[1:]) for k, x in flat.items()}
    begun = counter_prefix(given, {k: x.new_empty(count, 0, *x.shape[1:]) for k, x in flat.items()}, empty)
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
        prefix, after = tree_scan(combine, {k: x[index] for k, x in flat.items()}, start, recompute=recompute)
        table.append({k: x.flatten(0, 1) for k, x in prefix.items()})
        for row, run in enumerate(members):
            run.first, size = size, size + steps
            if run is last[run.sequence]:
                ends[run.sequence] = (after or start, row)
    whole = {k: torch.cat([part[k] for part in table]) for k in leaves}
    outside = batch * length - sum(len(run.seen) for run in runs)

    def look(counts: list[list[int]]) -> Node:
        pairs = [(run, seen) for run, c in zip(runs, counts, strict=True) for seen in c]
        at = [run.before if seen == 0 else run.first + seen - 1 for run, seen in pairs] + [0] * outside
        rows = torch.tensor(at, dtype=torch.int64).to(device)
        return {k: x[rows].reshape(batch, length, *x.shape[1:]) for k, x in whole.items()}

    before = look([run.seen for run in runs]) if previous else None
    return look([run.after for run in runs]), before, counter_rows([ends[n] for n in range(count)])


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
    *dims]."""

    name: str
    dims: tuple[str, ...] = ()
    kind: str = "real"


@dataclass(frozen=True)
class Spec:
    """A spec's border, as data. `taps`: how many tokens back an input is read; `previous`: the readout reads prev."""

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
        return Fields(self.sizes)

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
    key = (spec.digest, tokens, *((x.shape, x.dtype, x.device) for x in args))
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
            hint = tokens and end > 2 and shape[0] == leading[0] and shape[2] == leading[1]
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
                _refuse(spec, slot, x, lead, f"{dim} is {size} here, but {sizes[dim]} in {owner[dim]}", tokens)
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
            why = f"it has {x.dim()} axes" if axes < 0 else f"it has {axes} lane axes"
            _refuse(spec, slot, x, lead, why + ("" if slot is first else f", while '{first.name}' has {rank}"))
    return rank


def _check_lanes(spec: Spec, given: Mapping[str, Tensor], lead: int, lanes: list[int]) -> None:
    for slot in (*spec.inputs, *spec.params):
        x = given[slot.name]
        here = x.shape[0 if slot in spec.params else lead : x.dim() - len(slot.dims)]
        for axis, (size, whole) in enumerate(zip(here, lanes, strict=False)):
            last = axis == len(lanes) - 1
            if size not in (1, whole) and not (last and size and whole % size == 0):
                why = "does not divide" if last else "is neither 1 nor"
                _refuse(spec, slot, x, lead, f"its lane axis of {size} {why} {whole}", lead == 2)


def _refuse(spec: Spec, slot: Slot, x: Tensor, lead: int, why: str, hint: bool = False) -> NoReturn:
    """A shape that does not fit. `hint`: heads may have been put before time."""
    front = () if slot in spec.params else ("B", "T")[:lead]
    want = ", ".join((*front, "*lanes", *slot.dims))
    swapped = hint and slot in spec.inputs and x.dim() - len(slot.dims) > 2
    raise ArgumentError(
        f"PSM602: {spec.name}: '{slot.name}' must be [{want}], but it is {list(x.shape)}: {why}."
        + (f" Did you pass [{', '.join(('B', 'H', 'T', *slot.dims))}]? Time comes before the lanes." if swapped else "")
    )


def spread(x: Tensor, axis: int, lanes: tuple[int, ...]) -> Tensor:
    """Grouped lanes made whole: on the last lane axis (the one before `axis` from the left) the shorter repeats."""
    if not lanes or axis < 1:
        return x
    at = axis - 1
    size, whole = x.shape[at], lanes[-1]
    if size in (1, whole):
        return x
    return x.unsqueeze(at + 1).expand(*x.shape[: at + 1], whole // size, *x.shape[at + 1 :]).flatten(at, at + 1)


def all_lanes(x: Tensor, axis: int, lanes: tuple[int, ...]) -> Tensor:
    """`spread`, and lane axes of one repeated as well; the lanes of `x` end before `axis`."""
    whole = spread(x, axis, lanes)
    return whole.expand(*x.shape[: axis - len(lanes)], *lanes, *x.shape[axis:])


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
        _refuse_state(spec, key, f"must be [{shape}] = {list(want)}, but it is {list(x.shape)}")
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


def _refuse_state(spec: Spec, key: str, why: str) -> NoReturn:
    raise ArgumentError(f"PSM605: {spec.name}: state '{key}' {why}.")


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
    if not spec.taps:
        return {}, {}
    where = places(call, cu_seqlens, reset)
    lags: dict[str, Tensor] = {}
    tails: Tails = {}
    for name, longest in spec.taps.items():
        x = _whole(spec, call, name)
        tail = None if state is None else state[f"{name}_tail"]
        if mask is not None:
            x = torch.where(_flag(mask, x), x, x.new_zeros(()))
        for lag in range(1, longest + 1):
            lags[f"{name}_lag{lag}"] = lagged(x, lag, where, tail)
        tails[f"{name}_tail"] = next_tail(x, longest, where, tail)
    return lags, tails


def tap_token(spec: Spec, call: Call, state: Tails | None) -> tuple[dict[str, Tensor], Tails]:
    """The same for one token."""
    lags: dict[str, Tensor] = {}
    tails: Tails = {}
    for name, longest in spec.taps.items():
        x = _whole(spec, call, name)
        past = x.new_zeros(x.shape[0], longest, *x.shape[1:]) if state is None else state[f"{name}_tail"]
        for lag in range(1, longest + 1):
            lags[f"{name}_lag{lag}"] = past[:, longest - lag]
        tails[f"{name}_tail"] = torch.cat([past[:, 1:], x.unsqueeze(1)], 1)
    return lags, tails


def _whole(spec: Spec, call: Call, name: str) -> Tensor:
    (slot,) = (s for s in spec.inputs if s.name == name)
    x = call.inputs[name]
    return all_lanes(x, x.dim() - len(slot.dims), call.lanes)


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


def lagged(x: Tensor, lag: int, where: Places, tail: Tensor | None) -> Tensor:
    """x read `lag` tokens earlier: [B, T, ...]; from the tail [rows, W, ...] or 0 before a sequence's start, 0 across a
    restart. `x` holds 0 at masked tokens already."""
    length = x.shape[1]
    shifted = torch.cat([x.new_zeros(x.shape[0], min(lag, length), *x.shape[2:]), x[:, : max(length - lag, 0)]], 1)
    inside = _flag(where.since >= lag, x)
    out = torch.where(inside, shifted, x.new_zeros(()))
    if tail is None:
        return out
    width = tail.shape[1]
    slot = (width + where.at - lag).clamp(0, width - 1)
    early = _flag((where.at < lag) & ~where.restarted, x)
    return torch.where(early, tail[where.row, slot].to(x.dtype), out)


def next_tail(x: Tensor, width: int, where: Places, tail: Tensor | None) -> Tensor:
    """The last `width` tokens of each sequence, oldest first, [rows, W, ...]: older ones from the old tail, 0 before a
    restart."""
    rows, length = where.end.numel(), x.shape[1]
    back = torch.arange(width, 0, -1, device=x.device)  # how far before the end
    token = where.end[:, None] - back
    inside = token >= where.begin[:, None]
    if length == 0:
        return x.new_zeros(rows, width, *x.shape[2:]) if tail is None else tail.to(x.dtype)
    batch = torch.arange(rows, device=x.device).clamp(max=x.shape[0] - 1)  # packed sequences share row 0
    last = (where.end - 1).clamp(min=0)
    empty = where.end <= where.begin
    reach = torch.where(where.restarted[batch, last] & ~empty, where.since[batch, last] + 1, length + width + 1)
    kept = back[None, :] <= reach[:, None]
    out = torch.where(_flag(inside & kept, x), x[batch[:, None], token.clamp(0, length - 1)], x.new_zeros(()))
    if tail is None:
        return out
    slot = (width + token - where.begin[:, None]).clamp(0, width - 1)
    older = tail[torch.arange(rows, device=x.device)[:, None], slot].to(x.dtype)
    return torch.where(_flag(~inside & kept, x), older, out)


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


def in_full_precision(run: Callable[..., tuple[Values, Values]]) -> Callable[..., tuple[Values, Values]]:
    """A run without autocast: what surrounds a call does not change its arithmetic (a rule from Python may want it)."""

    @wraps(run)
    def wrapped(spec: Spec, rules: Rules, call: Call, *args: Any, **kwargs: Any) -> tuple[Values, Values]:
        if hasattr(rules, "extern") or not torch.is_autocast_enabled(call.device.type):
            return run(spec, rules, call, *args, **kwargs)
        with torch.autocast(call.device.type, enabled=False):
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
    if hasattr(rules, "layers") and not whole:
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
        found = rules.output(Fields(prefix), before, Fields(tokens), params, n)
        return {s.name: as_output(found[s.name], s, call, next(iter(prefix.values())).shape[:2]) for s in spec.outputs}

    empty = start_state(spec, rules, call, live)
    sequences = hasattr(rules, "recurrence")
    if sequences:
        empty = {k: as_state(v, slots[k], call, ()) for k, v in empty.items()}
    rows = call.leading[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    restart = None
    if hasattr(rules, "start") and fold == "scan":
        restart = {k: as_state(v, slots[k], call, (1,)) for k, v in empty.items()}
    if fold == "tree":
        x = fill_masked(x, mask)
        prefix, before, counter = tree_tokens(
            combine, lift(x), empty, initial, valid=mask, reset=reset, cu_seqlens=cu_seqlens,
            previous=spec.previous and not whole,
        )  # fmt: skip
        if whole:
            return {}, counter
        outputs = output(fill_masked(prefix, mask), before and fill_masked(before, mask), x)
        if mask is not None:
            outputs = {k: torch.where(_flag(mask, v), v, 0) for k, v in outputs.items()}
        return outputs, counter
    final: Values
    outputs, final = scan_tokens(
        (lambda tokens: tokens) if sequences else lift, combine, recur if sequences else advance,
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
    if hasattr(rules, "recurrence"):
        moved = rules.recurrence(before, tokens, params, n)
    else:
        moved = rules.advance(before, Fields(rules.lift(tokens, params, n)), params, n)
    after = {k: as_state(moved[k], slots[k], call, call.leading) for k in spec.live}
    found = rules.output(Fields(after), before if spec.previous else None, tokens, params, n)
    return {s.name: as_output(found[s.name], s, call, call.leading) for s in spec.outputs}, after


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
    before = None
    if spec.previous:
        empty = start_state(spec, rules, call, tuple(slots))
        before = Fields(counter_prefix(state, {k: v.unsqueeze(1) for k, v in leaf.items()}, empty))
    found = rules.output(Fields(prefix), before, tokens, params, n)
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
        name = f"{spec.name}_{spec.digest}"
        if not hasattr(torch.ops.psmc, name):
            self._register(name)
        self.op = getattr(torch.ops.psmc, name).default

    def wanted(self, call: Call, carries: bool) -> bool:
        """Kernels where there are some for this device and dtype, one node of a compiled graph; else plain autograd.

        `carries`: a state goes in or out; that of a tree is not of one shape, and such calls are traced.
        """
        return self._kernels(call) or (torch.compiler.is_compiling() and not (carries and self.fold == "tree"))

    def _kernels(self, call: Call) -> bool:
        on_device = call.device.type == "cuda" or (self.kernels is not None and self.kernels.interpreted)
        return self.kernels is not None and on_device and call.compute == torch.float32

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
        if not self._kernels(call) or self.extras or torch.compiler.is_compiling():
            return False
        tensors = (*call.inputs.values(), *call.params.values(), *(state or {}).values())
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return False
        return state is None or all(
            state[s.name].dtype == call.of_kind(s.kind) and state[s.name].is_contiguous() for s in self.live
        )

    def step(self, call: Call, state: Values, slots: Tensor | None) -> Any:
        """One token by the step kernel: `state` [rows, ...] moves on in place, in the rows that `slots` names."""
        found = self.kernels.step_in_place(
            [state[s.name] for s in self.live], list(call.inputs.values()), list(call.params.values()), slots
        )
        return found[0] if len(found) == 1 else tuple(found)

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
        if self._kernels(self._call(given)):
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
            grads[:count], grads[count:], inputs, params, initial or None, results[:count],
            results[count + len(self.live) :], token_code(mask, reset), cu_seqlens,
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
        if save and self._kernels(call):
            slots = {s.name: s for s in self.live}
            flagged = given.mask is not None or given.reset is not None
            saved = self.kernels.saved_components(call.dtype, flagged)
            results += [empty(call.leading, slots[k]) for k in saved]
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
        found = iter(backward(dense, *given, results if self._kernels(self._call(given)) else []))
        split = [[g if _smooth(x) else None for x, g in zip(part, found, strict=False)] for part in parts]
        return (*split, None, None, None, None)

    def _backward(
        self, grads: list[Tensor], inputs: list[Tensor], params: list[Tensor], initial: list[Tensor],
        mask: Tensor | None, reset: Tensor | None, cu_seqlens: Tensor | None, results: list[Tensor],
    ) -> list[Tensor]:  # fmt: skip
        given = Given(inputs, params, initial, mask, reset, cu_seqlens)
        everything = [*inputs, *params, *initial]
        kernels = self._kernels(self._call(given))
        flat = self._launch_backward(given, grads, results) if kernels else self._transpose(given, grads)
        return [
            torch.zeros(x.shape, dtype=x.dtype, device=x.device)
            if g is None
            else (g if kernels else g.clone(memory_format=torch.contiguous_format))
            for g, x in zip(flat, everything, strict=True)
        ]

    def _transpose(self, given: Given, grads: list[Tensor]) -> list[Tensor | None]:
        """Autograd through a run of its own."""
        with _recorded():
            inputs, params, initial = (
                [x.detach().requires_grad_(_smooth(x)) for x in part]
                for part in (given.inputs, given.params, given.initial)
            )
            out, final = self._run(given._replace(inputs=inputs, params=params, initial=initial))
            pairs = zip((*out.values(), *(final[s.name] for s in self.live)), grads, strict=True)
            reached = [(y, g) for y, g in pairs if y.requires_grad]
            leaves = [*inputs, *params, *initial]
            wanted = [x for x in leaves if x.requires_grad]
            if not reached or not wanted:
                return [None] * len(leaves)
            results, cotangents = ([pair[side] for pair in reached] for side in (0, 1))
            found = iter(torch.autograd.grad(results, wanted, cotangents, allow_unused=True))
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
        self.operator = None if hasattr(rules, "extern") else Operator(spec, rules, fold, kernels)
        self.__name__ = spec.name

    def __deepcopy__(self, memo: dict[int, Any]) -> Aggregator:
        """Itself, as it holds nothing that trains; with a rule from Python, one with a copy of the rule."""
        if not hasattr(self.rules, "extern"):
            return self
        make, rule = self.rules.extern
        own = deepcopy(rule, memo)
        copied: Aggregator = make(own)
        copied.__class__ = type(self)
        for name, value in vars(self).items():
            vars(copied).setdefault(name, own if value is rule else value)
        return copied

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
        call = bind_call(self.spec, args, kwargs, tokens=True)
        mask = check_flags(self.spec, "mask", mask, call)
        reset = check_flags(self.spec, "reset", reset, call)
        cu_seqlens = check_cu_seqlens(self.spec, cu_seqlens, call)
        state = self._checked(call, initial_state, call.leading[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1)
        back = None
        if reverse:
            back = None if cu_seqlens is None else places(call, cu_seqlens, None)
            call = replace(call, inputs={k: flip(x, back) for k, x in call.inputs.items()})
            mask = None if mask is None else flip(mask, back)
            reset = None if reset is None else flip(reset, back)
        lags, tails = tap_tokens(self.spec, call, state, mask, reset, cu_seqlens)
        begin = None if state is None else {k: x for k, x in state.items() if k not in tail_names(self.spec)}
        if self.operator is not None and self.operator.wanted(call, return_state or state is not None):
            outputs, final = self.operator(call, lags, begin, mask, reset, cu_seqlens)
        else:
            x, p = prepared(self.spec, call, lags, hasattr(self.rules, "matrices"))
            outputs, final = run_scan(
                self.spec, self.rules, call, self.fold_order, x, p, begin, mask, reset, cu_seqlens
            )
        found = tuple(flip(outputs[s.name], back) if reverse else outputs[s.name] for s in self.spec.outputs)
        out = found[0] if len(found) == 1 else found
        return (out, {**final, **tails}) if return_state else out

    def step(self, state: Mapping[str, Tensor] | None, *args: Tensor, **kwargs: Tensor) -> tuple[Any, State]:
        """One token, inputs [B, *lanes, *dims]: (output, new state). Functional and differentiable."""
        call = bind_call(self.spec, args, kwargs, tokens=False)
        before = self._checked(call, state, call.leading[0])
        if self.operator is not None and self.operator.steps(call, before):
            after = self._start(call) if before is None else {k: x.clone() for k, x in before.items()}
            return self.operator.step(call, after, None), after
        lags, tails = tap_token(self.spec, call, before)
        if hasattr(self.rules, "stepped") and self.rules.matrices.runs_on(call.device):
            after = self._start(call) if before is None else {k: x.clone() for k, x in before.items()}
            moved = self.rules.stepped(self.spec, self.rules, call, after, None)
            if moved is not None:
                outs = tuple(moved[s.name] for s in self.spec.outputs)
                return outs[0] if len(outs) == 1 else outs, after
        x, p = prepared(self.spec, call, lags)
        if before is None:
            before = self._start(call)
        run = run_push if self.fold_order == "tree" else run_step
        outputs, after = run(self.spec, self.rules, call, before, x, p)
        found = tuple(outputs[s.name] for s in self.spec.outputs)
        return found[0] if len(found) == 1 else found, {**after, **tails}

    @torch.no_grad()
    def step_(self, state: State, *args: Tensor, slots: Tensor | None = None, **kwargs: Tensor) -> Any:
        """One token, in place and without gradient: `state` is overwritten; with `slots` [B] the rows that it names.

        The tensors of a tree's state grow in number: there the dict is updated, not its tensors.
        """
        call = bind_call(self.spec, args, kwargs, tokens=False)
        self._checked(call, state, check_slots(self.spec, slots, call, state))
        if slots is not None and self.fold_order == "tree":
            return self._push_rows(state, slots, *args, **kwargs)
        if self.operator is not None and self.operator.steps(call, state):
            return self.operator.step(call, state, slots)
        if hasattr(self.rules, "stepped") and self.rules.matrices.runs_on(call.device):
            moved = self.rules.stepped(self.spec, self.rules, call, state, slots)
            if moved is not None:
                outs = tuple(moved[s.name] for s in self.spec.outputs)
                return outs[0] if len(outs) == 1 else outs
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
        """The state before any token, [batch, *lanes, *dims]. Dims by name: `init_state(1, (16,), K=64, V=64)`."""
        lanes = (lanes,) if isinstance(lanes, int) else tuple(lanes)
        known = {**self.spec.sizes, **(sizes or {}), **dims}
        stray = sorted(known.keys() - set(self.spec.dims))
        if stray:
            raise ArgumentError(
                f"PSM603: {self.spec.name} has no dim {', '.join(stray)}; it has {', '.join(self.spec.dims) or 'none'}."
            )
        read = (*self.spec.components, *(s for s in self.spec.inputs if s.name in self.spec.taps))
        missing = sorted({d for s in read for d in s.dims} - known.keys())
        if missing:
            raise ArgumentError(f"PSM603: {self.spec.name}: init_state needs the size of {', '.join(missing)}.")
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
        lags, _ = tap_tokens(self.spec, call, None, mask, None, cu_seqlens)
        rules = SimpleNamespace(**{k: v for k, v in vars(self.rules).items() if k != "start"})
        x, p = prepared(self.spec, call, lags)
        return run_scan(self.spec, rules, call, "scan", x, p, None, mask, None, cu_seqlens, whole=True)[1]

    def _checked(self, call: Call, state: Mapping[str, Tensor] | None, rows: int) -> State | None:
        check = check_counter if self.fold_order == "tree" else check_state
        return check(self.spec, call, state, rows)

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
    name='softmax_average',
    digest='936bc697d4514574',
    inputs=(Slot('score'), Slot('value'),),
    params=(),
    components=(Slot('m'), Slot('u'), Slot('w'),),
    live=('m', 'u', 'w'),
    outputs=(Slot('y'),),
    sizes={},
    dims=(),
    taps={},
    previous=False,
)

softmax_average = Aggregator(SPEC, SimpleNamespace(lift=lift, combine=combine, advance=advance, output=output, identity=identity), fold="scan", kernels=KERNELS)
