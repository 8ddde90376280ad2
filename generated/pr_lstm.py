"""pr_lstm: c = i u + f1 c1 + f2 c2, h = o tanh(c): an LSTM cell merges two halves of a balanced tree. Gaudreault & Mao 2026, arXiv 2605.17108.

    aggregator pr_lstm {
      '''c = i u + f1 c1 + f2 c2, h = o tanh(c): an LSTM cell merges two halves of a balanced tree.
      Gaudreault & Mao 2026, arXiv 2605.17108.'''
      dim G = 5
      input x
      param left[G], right[G], bias[G]
      state c = 0, h = 0

      lift {
        c = x
        h = tanh(x)
      }

      combine (l, r) {
        let z[i] = left[i] * l.h + right[i] * r.h + bias[i]
        let c_1 = sigmoid(z[0]) * tanh(z[4]) + sigmoid(z[1]) * l.c + sigmoid(z[2]) * r.c
        c = c_1
        h = sigmoid(z[3]) * tanh(c_1)
      }

      output y = h

      associative: no
      order: tree
    }

Associativity: not claimed; the order of combines is part of the meaning.
Plan: tree. not associative: the Blelloch tree is the meaning; kernels for 3 levels of it at a time: 2 scalars an element; calls with a mask, resets, packed sequences or a state, and steps, run it in PyTorch, one batched combine a level.

Written by psmc; regenerate with: psmc compile pr_lstm.psm
The runtime holds what this spec needs of it. Needs torch, and triton for tensors on a GPU; nothing else.

   75  the spec's mathematics: tensors are [..., *dims], leading axes broadcast
  108  kernels: the Blelloch tree of a rule that is not associative
 1080  How the lanes of a call's tensors lie in memory, for kernels whose lanes do the same
 1195  Calls of the tree kernels: stages of blocks and their buffers; launches up the stages, then down again
 1456  Scans in PyTorch, differentiable by autograd: no loop over T where the rule is associative
 1735  A layer over a batch of sequences: masks, restarts and packing on top of the scans, a stretch of time at once
 1892  The tree plan: one fixed parenthesisation for rules that are not associative, in parallel and token by token
 2049  one tree ----------------------------------------------------------------------------------
 2124  counters -----------------------------------------------------------------------------------
 2174  Many trees: the tree plan over sequences with masks, restarts and packing
 2290  The border of a compiled aggregator: what was passed, checked against the spec, with the spec's own names
 2560  The border, continued: states, flags and packing
 2701  What the border sees only by reading tensors: values, checked where `checks` or PSMC_CHECK=1 asks for it
 2777  Inputs read some tokens earlier, and time run backwards: index arithmetic on whole sequences, no loop over T
 2840  One checked call in PyTorch: lift, the scan of the plan, readout
 3020  The scan as an operator of torch: one graph node for torch.compile, with its own backward
 3290  The public face of a compiled aggregator: a parallel call, a step, states
 3515  the spec's border
"""

from __future__ import annotations

import math
import os
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
from torch.utils.checkpoint import checkpoint

__all__ = ["pr_lstm"]


# --- the spec's mathematics: tensors are [..., *dims], leading axes broadcast

def lift(x, p, n):
    h = torch.tanh(x.x)
    return {"c": x.x, "h": h}


def combine(l, r, p, n):
    z = p.left * l.h[..., None] + p.right * r.h[..., None] + p.bias
    t1 = torch.sigmoid(z[..., 0]) * torch.tanh(z[..., 4])
    c = t1 + torch.sigmoid(z[..., 1]) * l.c + torch.sigmoid(z[..., 2]) * r.c
    h = torch.sigmoid(z[..., 3]) * torch.tanh(c)
    return {"c": c, "h": h}


def advance(l, r, p, n):
    z = p.left * l.h[..., None] + p.right * r.h[..., None] + p.bias
    t1 = torch.sigmoid(z[..., 0]) * torch.tanh(z[..., 4])
    c = t1 + torch.sigmoid(z[..., 1]) * l.c + torch.sigmoid(z[..., 2]) * r.c
    h = torch.sigmoid(z[..., 3]) * torch.tanh(c)
    return {"c": c, "h": h}


def output(s, prev, x, p, n):
    return {"y": s.h}


def identity(n, like):
    c = like.new_full((), 0)
    h = like.new_full((), 0)
    return {"c": c, "h": h}


# --- kernels: the Blelloch tree of a rule that is not associative. Tensors lie as [B, T, C], C the lanes (all lane axes
# and the dims that are lanes, flattened), or [B, T, C, F] where F dims' entries are written out.
#
# Stage 0 are the T tokens; a stage of n nodes is cut into blocks of L = 8, whose roots are the next stage's n // L
# nodes; the last stage has less than L. A program has a block of one sequence and BC lanes, [L, BC]; a thread has a
# lane, all levels of it in registers. It evaluates exactly the tree: level j has nodes n{j} [L / 2^j, BC], of which
# l{j} and r{j} are the left and right halves of those of level j + 1.
#   roots       of all complete blocks, stage by stage upwards
#   prefixes    of the nodes, stage by stage downwards: e{j} before and i{j} after each node of level j,
#               e{j} = e{j+1}, c and i{j} = c, i{j+1} in turn, where c = e{j+1} with l{j} (l{j} alone at the very start)
#   backward    the same from the other end, nodes computed again: once for the cotangents of the stage above, upwards,
#               then with those of the blocks' roots, downwards
# Buffers of a stage are [scalar, B, n, C] fp32. Least traffic: every input and output once. Moved: a forward reads the
# inputs twice, a backward inputs three times and outputs' cotangents twice; buffers hold 1 / L as many rows.


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
def lane_sigmoid(x):
    """1 / (1 + exp(-x)): the square of a reciprocal root is cheaper than a quotient."""
    root = tl.rsqrt(1 + lane_exp(-x))
    return root * root


@jit
def lane_expm1(x):
    """exp(x) - 1; its series near 0."""
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7))))))
    return tl.where(tl.abs(x) < 0.35, series, lane_exp(x) - 1)


@jit
def lane_tanh(x):
    e = lane_expm1(-2 * tl.abs(x))
    t = -e / (2 + e)
    return tl.where(x < 0, -t, t)


@jit
def lane_lift(x):
    c = x
    h = lane_tanh(x)
    return c, h


@jit
def lane_merge(
    l_c, l_h, r_c, r_h, left_0, left_1, left_2, left_3, left_4, right_0, right_1, right_2, right_3, right_4, bias_0,
    bias_1, bias_2, bias_3, bias_4,
):
    t_ = lane_sigmoid(left_0 * l_h + right_0 * r_h + bias_0)
    t = t_ * lane_tanh(left_4 * l_h + right_4 * r_h + bias_4)
    t__ = t + lane_sigmoid(left_1 * l_h + right_1 * r_h + bias_1) * l_c
    c = t__ + lane_sigmoid(left_2 * l_h + right_2 * r_h + bias_2) * r_c
    h = lane_sigmoid(left_3 * l_h + right_3 * r_h + bias_3) * lane_tanh(c)
    return c, h


@jit
def lane_readout(s_h):
    y = s_h
    return y


@jit
def lane_lift_back(x, grad_c, grad_h):
    tanh_x = lane_tanh(x)
    g_x = grad_c + grad_h * (1 - tanh_x * tanh_x)
    return g_x


@jit
def lane_merge_back(
    l_c, l_h, r_c, r_h, left_0, left_1, left_2, left_3, left_4, right_0, right_1, right_2, right_3, right_4, bias_0,
    bias_1, bias_2, bias_3, bias_4, grad_c, grad_h,
):
    sigmoid_left_3 = lane_sigmoid(left_3 * l_h + right_3 * r_h + bias_3)
    sigmoid_left_0 = lane_sigmoid(left_0 * l_h + right_0 * r_h + bias_0)
    tanh_left_4 = lane_tanh(left_4 * l_h + right_4 * r_h + bias_4)
    sigmoid_left_1 = lane_sigmoid(left_1 * l_h + right_1 * r_h + bias_1)
    sigmoid_left_2 = lane_sigmoid(left_2 * l_h + right_2 * r_h + bias_2)
    tanh_left_0 = lane_tanh(sigmoid_left_0 * tanh_left_4 + sigmoid_left_1 * l_c + sigmoid_left_2 * r_c)
    t1 = grad_c + grad_h * sigmoid_left_3 * (1 - tanh_left_0 * tanh_left_0)
    l_c_ = t1 * sigmoid_left_1
    g_bias_3 = grad_h * tanh_left_0 * (sigmoid_left_3 * (1 - sigmoid_left_3))
    g_bias_2 = t1 * r_c * (sigmoid_left_2 * (1 - sigmoid_left_2))
    g_bias_1 = t1 * l_c * (sigmoid_left_1 * (1 - sigmoid_left_1))
    g_bias_4 = t1 * sigmoid_left_0 * (1 - tanh_left_4 * tanh_left_4)
    g_bias_0 = t1 * tanh_left_4 * (sigmoid_left_0 * (1 - sigmoid_left_0))
    l_h_ = g_bias_3 * left_3 + g_bias_2 * left_2 + g_bias_1 * left_1 + g_bias_4 * left_4 + g_bias_0 * left_0
    r_c_ = t1 * sigmoid_left_2
    t = g_bias_3 * right_3 + g_bias_2 * right_2 + g_bias_1 * right_1
    r_h_ = t + g_bias_4 * right_4 + g_bias_0 * right_0
    g_left_0 = g_bias_0 * l_h
    g_left_1 = g_bias_1 * l_h
    g_left_2 = g_bias_2 * l_h
    g_left_3 = g_bias_3 * l_h
    g_left_4 = g_bias_4 * l_h
    g_right_0 = g_bias_0 * r_h
    g_right_1 = g_bias_1 * r_h
    g_right_2 = g_bias_2 * r_h
    g_right_3 = g_bias_3 * r_h
    g_right_4 = g_bias_4 * r_h
    return (
        l_c_, l_h_, r_c_, r_h_, g_left_0, g_left_1, g_left_2, g_left_3, g_left_4, g_right_0, g_right_1, g_right_2,
        g_right_3, g_right_4, g_bias_0, g_bias_1, g_bias_2, g_bias_3, g_bias_4,
    )


@jit
def lane_readout_back(d_y):
    s_h = d_y
    return s_h


@jit
def lane_index(c, Q: tl.constexpr, D: tl.constexpr):
    """Where lane c lies in a tensor that has fewer lanes; of c = C, how many it has."""
    if Q == 1:
        return c
    return c // Q * D + c % D


@jit
def tree_split(x):
    """The even and the odd rows of [N, BC]."""
    N: tl.constexpr = x.shape[0] // 2
    return tl.split(tl.permute(tl.reshape(x, [N, 2, x.shape[1]]), [0, 2, 1]))


@jit
def tree_join(even, odd):
    """Rows in turn."""
    N: tl.constexpr = 2 * even.shape[0]
    return tl.reshape(tl.permute(tl.join(even, odd), [0, 2, 1]), [N, even.shape[1]])


@jit
def tree_up(
    n0_c, n0_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2, b_right_3,
    b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, BC: tl.constexpr,
):
    """The halves l{j}_*, r{j}_* of the nodes of each level, and the root."""
    l0_c, r0_c = tree_split(n0_c)
    l0_h, r0_h = tree_split(n0_h)
    n1_c, n1_h = lane_merge(
        l0_c, l0_h, r0_c, r0_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2,
        b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4,
    )
    l1_c, r1_c = tree_split(n1_c)
    l1_h, r1_h = tree_split(n1_h)
    n2_c, n2_h = lane_merge(
        l1_c, l1_h, r1_c, r1_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2,
        b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4,
    )
    l2_c, r2_c = tree_split(n2_c)
    l2_h, r2_h = tree_split(n2_h)
    n3_c, n3_h = lane_merge(
        l2_c, l2_h, r2_c, r2_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2,
        b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4,
    )
    return l0_c, l0_h, r0_c, r0_h, l1_c, l1_h, r1_c, r1_h, l2_c, l2_h, r2_c, r2_h, n3_c, n3_h


@jit
def tree_down(
    e3_c, e3_h, i3_c, i3_h, l0_c, l0_h, l1_c, l1_h, l2_c, l2_h, first, b_left_0, b_left_1, b_left_2, b_left_3,
    b_left_4, b_right_0, b_right_1, b_right_2, b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3,
    b_bias_4, BC: tl.constexpr,
):
    """The prefixes before (e{j}_*, j >= 1) and after each leaf (i0_*) of a block.
    `first`: nothing is before the block."""
    c2_c, c2_h = lane_merge(
        e3_c, e3_h, l2_c, l2_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2,
        b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4,
    )
    alone = first & (tl.arange(0, 1)[:, None] == 0)
    c2_c = tl.where(alone, l2_c, c2_c)
    e2_c = tree_join(e3_c, c2_c)
    i2_c = tree_join(c2_c, i3_c)
    c2_h = tl.where(alone, l2_h, c2_h)
    e2_h = tree_join(e3_h, c2_h)
    i2_h = tree_join(c2_h, i3_h)
    c1_c, c1_h = lane_merge(
        e2_c, e2_h, l1_c, l1_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2,
        b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4,
    )
    alone = first & (tl.arange(0, 2)[:, None] == 0)
    c1_c = tl.where(alone, l1_c, c1_c)
    e1_c = tree_join(e2_c, c1_c)
    i1_c = tree_join(c1_c, i2_c)
    c1_h = tl.where(alone, l1_h, c1_h)
    e1_h = tree_join(e2_h, c1_h)
    i1_h = tree_join(c1_h, i2_h)
    c0_c, c0_h = lane_merge(
        e1_c, e1_h, l0_c, l0_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2,
        b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4,
    )
    alone = first & (tl.arange(0, 4)[:, None] == 0)
    c0_c = tl.where(alone, l0_c, c0_c)
    i0_c = tree_join(c0_c, i1_c)
    c0_h = tl.where(alone, l0_h, c0_h)
    i0_h = tree_join(c0_h, i1_h)
    return e1_c, e1_h, e2_c, e2_h, e3_c, e3_h, i0_c, i0_h


@jit(do_not_specialize=["n", "B"])
def tree_roots_kernel(
    p_x, p_left, p_right, p_bias,
    p_roots, n, B, C,
    Q_x: tl.constexpr, D_x: tl.constexpr,
    Q_left: tl.constexpr, D_left: tl.constexpr,
    Q_right: tl.constexpr, D_right: tl.constexpr,
    Q_bias: tl.constexpr, D_bias: tl.constexpr,
    BC: tl.constexpr,
):
    """Roots of the complete blocks of tokens."""
    L: tl.constexpr = 8
    NC = tl.cdiv(C, BC)
    blocks = n // 8
    i_c, i_s, i_n = tl.program_id(0) % NC, tl.program_id(0) // NC % blocks, tl.program_id(0) // NC // blocks
    i_s, i_n, B = i_s.to(tl.int64), i_n.to(tl.int64), B.to(tl.int64)
    o_c = tl.max_contiguous(i_c * BC + tl.arange(0, BC), 1)[None, :]  # [1, BC], one lane a thread
    m_c = o_c < C
    t = tl.arange(0, L)[:, None]  # [L, 1]
    left = tl.minimum(n - i_s * L, L).to(tl.int32)  # nodes of the block that are there
    row = i_n * n + i_s * L + t
    m = (t < left) & m_c
    C_x, k_x = lane_index(C, Q_x, D_x), lane_index(o_c, Q_x, D_x)
    C_left, k_left = lane_index(C, Q_left, D_left), lane_index(o_c, Q_left, D_left)
    C_right, k_right = lane_index(C, Q_right, D_right), lane_index(o_c, Q_right, D_right)
    C_bias, k_bias = lane_index(C, Q_bias, D_bias), lane_index(o_c, Q_bias, D_bias)
    b_left_0 = tl.load(p_left + k_left * 5, mask=m_c, other=0).to(tl.float32)
    b_left_1 = tl.load(p_left + k_left * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_left_2 = tl.load(p_left + k_left * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_left_3 = tl.load(p_left + k_left * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_left_4 = tl.load(p_left + k_left * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_right_0 = tl.load(p_right + k_right * 5, mask=m_c, other=0).to(tl.float32)
    b_right_1 = tl.load(p_right + k_right * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_right_2 = tl.load(p_right + k_right * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_right_3 = tl.load(p_right + k_right * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_right_4 = tl.load(p_right + k_right * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_bias_0 = tl.load(p_bias + k_bias * 5, mask=m_c, other=0).to(tl.float32)
    b_bias_1 = tl.load(p_bias + k_bias * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_bias_2 = tl.load(p_bias + k_bias * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_bias_3 = tl.load(p_bias + k_bias * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_bias_4 = tl.load(p_bias + k_bias * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_x = tl.load(p_x + row * C_x + k_x, mask=m, other=0).to(tl.float32)
    n0_c, n0_h = lane_lift(b_x)
    (
        l0_c, l0_h, r0_c, r0_h, l1_c, l1_h, r1_c, r1_h, l2_c, l2_h, r2_c, r2_h, n3_c, n3_h,
    ) = tree_up(
        n0_c, n0_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2, b_right_3,
        b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, BC,
    )
    tl.store(p_roots + ((0 * B + i_n) * blocks + i_s) * C + o_c, n3_c, mask=m_c)
    tl.store(p_roots + ((1 * B + i_n) * blocks + i_s) * C + o_c, n3_h, mask=m_c)


@jit(do_not_specialize=["n", "B"])
def tree_prefix_kernel(
    p_x, p_left, p_right, p_bias,
    p_out_y, p_above, n, B, C,
    Q_x: tl.constexpr, D_x: tl.constexpr,
    Q_left: tl.constexpr, D_left: tl.constexpr,
    Q_right: tl.constexpr, D_right: tl.constexpr,
    Q_bias: tl.constexpr, D_bias: tl.constexpr,
    BC: tl.constexpr,
):
    """Outputs."""
    L: tl.constexpr = 8
    NC = tl.cdiv(C, BC)
    blocks = tl.cdiv(n, 8)
    i_c, i_s, i_n = tl.program_id(0) % NC, tl.program_id(0) // NC % blocks, tl.program_id(0) // NC // blocks
    i_s, i_n, B = i_s.to(tl.int64), i_n.to(tl.int64), B.to(tl.int64)
    o_c = tl.max_contiguous(i_c * BC + tl.arange(0, BC), 1)[None, :]  # [1, BC], one lane a thread
    m_c = o_c < C
    t = tl.arange(0, L)[:, None]  # [L, 1]
    left = tl.minimum(n - i_s * L, L).to(tl.int32)  # nodes of the block that are there
    row = i_n * n + i_s * L + t
    m = (t < left) & m_c
    C_x, k_x = lane_index(C, Q_x, D_x), lane_index(o_c, Q_x, D_x)
    C_left, k_left = lane_index(C, Q_left, D_left), lane_index(o_c, Q_left, D_left)
    C_right, k_right = lane_index(C, Q_right, D_right), lane_index(o_c, Q_right, D_right)
    C_bias, k_bias = lane_index(C, Q_bias, D_bias), lane_index(o_c, Q_bias, D_bias)
    b_left_0 = tl.load(p_left + k_left * 5, mask=m_c, other=0).to(tl.float32)
    b_left_1 = tl.load(p_left + k_left * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_left_2 = tl.load(p_left + k_left * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_left_3 = tl.load(p_left + k_left * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_left_4 = tl.load(p_left + k_left * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_right_0 = tl.load(p_right + k_right * 5, mask=m_c, other=0).to(tl.float32)
    b_right_1 = tl.load(p_right + k_right * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_right_2 = tl.load(p_right + k_right * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_right_3 = tl.load(p_right + k_right * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_right_4 = tl.load(p_right + k_right * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_bias_0 = tl.load(p_bias + k_bias * 5, mask=m_c, other=0).to(tl.float32)
    b_bias_1 = tl.load(p_bias + k_bias * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_bias_2 = tl.load(p_bias + k_bias * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_bias_3 = tl.load(p_bias + k_bias * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_bias_4 = tl.load(p_bias + k_bias * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_x = tl.load(p_x + row * C_x + k_x, mask=m, other=0).to(tl.float32)
    n0_c, n0_h = lane_lift(b_x)
    (
        l0_c, l0_h, r0_c, r0_h, l1_c, l1_h, r1_c, r1_h, l2_c, l2_h, r2_c, r2_h, n3_c, n3_h,
    ) = tree_up(
        n0_c, n0_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2, b_right_3,
        b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, BC,
    )
    first = i_s == 0
    above = i_n * (n // L) + i_s
    e3_c = tl.full([1, BC], 0.0, tl.float32)
    i3_c = tl.full([1, BC], 0.0, tl.float32)
    e3_h = tl.full([1, BC], 0.0, tl.float32)
    i3_h = tl.full([1, BC], 0.0, tl.float32)
    if p_above is not None:
        plane = p_above + (0 * B * (n // L) + above) * C + o_c
        e3_c = tl.where(first, e3_c, tl.load(plane - C, mask=m_c & (i_s > 0), other=0))
        i3_c = tl.load(plane, mask=m_c & (left == L), other=0)
        plane = p_above + (1 * B * (n // L) + above) * C + o_c
        e3_h = tl.where(first, e3_h, tl.load(plane - C, mask=m_c & (i_s > 0), other=0))
        i3_h = tl.load(plane, mask=m_c & (left == L), other=0)
    e1_c, e1_h, e2_c, e2_h, e3_c, e3_h, i0_c, i0_h = tree_down(
        e3_c, e3_h, i3_c, i3_h, l0_c, l0_h, l1_c, l1_h, l2_c, l2_h, first, b_left_0, b_left_1, b_left_2, b_left_3,
        b_left_4, b_right_0, b_right_1, b_right_2, b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3,
        b_bias_4, BC,
    )
    y_y = lane_readout(i0_h)
    tl.store(p_out_y + row * C + o_c, y_y, mask=m)


@jit(do_not_specialize=["n", "B"])
def tree_upper_roots_kernel(
    p_nodes, p_left, p_right, p_bias,
    p_roots, n, B, C,
    Q_left: tl.constexpr, D_left: tl.constexpr,
    Q_right: tl.constexpr, D_right: tl.constexpr,
    Q_bias: tl.constexpr, D_bias: tl.constexpr,
    BC: tl.constexpr,
):
    """Roots of the complete blocks of a stage above."""
    L: tl.constexpr = 8
    NC = tl.cdiv(C, BC)
    blocks = n // 8
    i_c, i_s, i_n = tl.program_id(0) % NC, tl.program_id(0) // NC % blocks, tl.program_id(0) // NC // blocks
    i_s, i_n, B = i_s.to(tl.int64), i_n.to(tl.int64), B.to(tl.int64)
    o_c = tl.max_contiguous(i_c * BC + tl.arange(0, BC), 1)[None, :]  # [1, BC], one lane a thread
    m_c = o_c < C
    t = tl.arange(0, L)[:, None]  # [L, 1]
    left = tl.minimum(n - i_s * L, L).to(tl.int32)  # nodes of the block that are there
    row = i_n * n + i_s * L + t
    m = (t < left) & m_c
    C_left, k_left = lane_index(C, Q_left, D_left), lane_index(o_c, Q_left, D_left)
    C_right, k_right = lane_index(C, Q_right, D_right), lane_index(o_c, Q_right, D_right)
    C_bias, k_bias = lane_index(C, Q_bias, D_bias), lane_index(o_c, Q_bias, D_bias)
    b_left_0 = tl.load(p_left + k_left * 5, mask=m_c, other=0).to(tl.float32)
    b_left_1 = tl.load(p_left + k_left * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_left_2 = tl.load(p_left + k_left * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_left_3 = tl.load(p_left + k_left * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_left_4 = tl.load(p_left + k_left * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_right_0 = tl.load(p_right + k_right * 5, mask=m_c, other=0).to(tl.float32)
    b_right_1 = tl.load(p_right + k_right * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_right_2 = tl.load(p_right + k_right * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_right_3 = tl.load(p_right + k_right * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_right_4 = tl.load(p_right + k_right * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_bias_0 = tl.load(p_bias + k_bias * 5, mask=m_c, other=0).to(tl.float32)
    b_bias_1 = tl.load(p_bias + k_bias * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_bias_2 = tl.load(p_bias + k_bias * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_bias_3 = tl.load(p_bias + k_bias * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_bias_4 = tl.load(p_bias + k_bias * 5 + 4, mask=m_c, other=0).to(tl.float32)
    n0_c = tl.load(p_nodes + (0 * B * n + row) * C + o_c, mask=m, other=0)
    n0_h = tl.load(p_nodes + (1 * B * n + row) * C + o_c, mask=m, other=0)
    (
        l0_c, l0_h, r0_c, r0_h, l1_c, l1_h, r1_c, r1_h, l2_c, l2_h, r2_c, r2_h, n3_c, n3_h,
    ) = tree_up(
        n0_c, n0_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2, b_right_3,
        b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, BC,
    )
    tl.store(p_roots + ((0 * B + i_n) * blocks + i_s) * C + o_c, n3_c, mask=m_c)
    tl.store(p_roots + ((1 * B + i_n) * blocks + i_s) * C + o_c, n3_h, mask=m_c)


@jit(do_not_specialize=["n", "B"])
def tree_upper_prefix_kernel(
    p_nodes, p_left, p_right, p_bias,
    p_prefix, p_above, n, B, C,
    Q_left: tl.constexpr, D_left: tl.constexpr,
    Q_right: tl.constexpr, D_right: tl.constexpr,
    Q_bias: tl.constexpr, D_bias: tl.constexpr,
    BC: tl.constexpr,
):
    """Prefixes after all nodes of a stage."""
    L: tl.constexpr = 8
    NC = tl.cdiv(C, BC)
    blocks = tl.cdiv(n, 8)
    i_c, i_s, i_n = tl.program_id(0) % NC, tl.program_id(0) // NC % blocks, tl.program_id(0) // NC // blocks
    i_s, i_n, B = i_s.to(tl.int64), i_n.to(tl.int64), B.to(tl.int64)
    o_c = tl.max_contiguous(i_c * BC + tl.arange(0, BC), 1)[None, :]  # [1, BC], one lane a thread
    m_c = o_c < C
    t = tl.arange(0, L)[:, None]  # [L, 1]
    left = tl.minimum(n - i_s * L, L).to(tl.int32)  # nodes of the block that are there
    row = i_n * n + i_s * L + t
    m = (t < left) & m_c
    C_left, k_left = lane_index(C, Q_left, D_left), lane_index(o_c, Q_left, D_left)
    C_right, k_right = lane_index(C, Q_right, D_right), lane_index(o_c, Q_right, D_right)
    C_bias, k_bias = lane_index(C, Q_bias, D_bias), lane_index(o_c, Q_bias, D_bias)
    b_left_0 = tl.load(p_left + k_left * 5, mask=m_c, other=0).to(tl.float32)
    b_left_1 = tl.load(p_left + k_left * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_left_2 = tl.load(p_left + k_left * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_left_3 = tl.load(p_left + k_left * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_left_4 = tl.load(p_left + k_left * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_right_0 = tl.load(p_right + k_right * 5, mask=m_c, other=0).to(tl.float32)
    b_right_1 = tl.load(p_right + k_right * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_right_2 = tl.load(p_right + k_right * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_right_3 = tl.load(p_right + k_right * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_right_4 = tl.load(p_right + k_right * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_bias_0 = tl.load(p_bias + k_bias * 5, mask=m_c, other=0).to(tl.float32)
    b_bias_1 = tl.load(p_bias + k_bias * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_bias_2 = tl.load(p_bias + k_bias * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_bias_3 = tl.load(p_bias + k_bias * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_bias_4 = tl.load(p_bias + k_bias * 5 + 4, mask=m_c, other=0).to(tl.float32)
    n0_c = tl.load(p_nodes + (0 * B * n + row) * C + o_c, mask=m, other=0)
    n0_h = tl.load(p_nodes + (1 * B * n + row) * C + o_c, mask=m, other=0)
    (
        l0_c, l0_h, r0_c, r0_h, l1_c, l1_h, r1_c, r1_h, l2_c, l2_h, r2_c, r2_h, n3_c, n3_h,
    ) = tree_up(
        n0_c, n0_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2, b_right_3,
        b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, BC,
    )
    first = i_s == 0
    above = i_n * (n // L) + i_s
    e3_c = tl.full([1, BC], 0.0, tl.float32)
    i3_c = tl.full([1, BC], 0.0, tl.float32)
    e3_h = tl.full([1, BC], 0.0, tl.float32)
    i3_h = tl.full([1, BC], 0.0, tl.float32)
    if p_above is not None:
        plane = p_above + (0 * B * (n // L) + above) * C + o_c
        e3_c = tl.where(first, e3_c, tl.load(plane - C, mask=m_c & (i_s > 0), other=0))
        i3_c = tl.load(plane, mask=m_c & (left == L), other=0)
        plane = p_above + (1 * B * (n // L) + above) * C + o_c
        e3_h = tl.where(first, e3_h, tl.load(plane - C, mask=m_c & (i_s > 0), other=0))
        i3_h = tl.load(plane, mask=m_c & (left == L), other=0)
    e1_c, e1_h, e2_c, e2_h, e3_c, e3_h, i0_c, i0_h = tree_down(
        e3_c, e3_h, i3_c, i3_h, l0_c, l0_h, l1_c, l1_h, l2_c, l2_h, first, b_left_0, b_left_1, b_left_2, b_left_3,
        b_left_4, b_right_0, b_right_1, b_right_2, b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3,
        b_bias_4, BC,
    )
    tl.store(p_prefix + (0 * B * n + row) * C + o_c, i0_c, mask=m)
    tl.store(p_prefix + (1 * B * n + row) * C + o_c, i0_h, mask=m)


@jit
def tree_down_back(
    d0_c, d0_h, f0_c, f0_h, e1_c, e1_h, e2_c, e2_h, e3_c, e3_h, l0_c, l0_h, l1_c, l1_h, l2_c, l2_h, left, first,
    b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2, b_right_3, b_right_4,
    b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, g_left_0, g_left_1, g_left_2, g_left_3, g_left_4, g_right_0,
    g_right_1, g_right_2, g_right_3, g_right_4, g_bias_0, g_bias_1, g_bias_2, g_bias_3, g_bias_4, BC: tl.constexpr,
):
    """The transpose of tree_down: cotangents of e0_* and i0_* (d0_*, f0_*) -> of e3_* and i3_*, and of
    l{j}_* (u{j}_*)."""
    alone = first & (tl.arange(0, 4)[:, None] == 0)
    there = ((2 * tl.arange(0, 4)[:, None] + 1) * 1 <= left) & (alone == 0)
    a_c, b_c = tree_split(d0_c)
    x_c, f1_c = tree_split(f0_c)
    b_c += x_c
    a_h, b_h = tree_split(d0_h)
    x_h, f1_h = tree_split(f0_h)
    b_h += x_h
    (
        h_l_c, h_l_h, h_r_c, h_r_h, h_g_left_0, h_g_left_1, h_g_left_2, h_g_left_3, h_g_left_4, h_g_right_0,
        h_g_right_1, h_g_right_2, h_g_right_3, h_g_right_4, h_g_bias_0, h_g_bias_1, h_g_bias_2, h_g_bias_3,
        h_g_bias_4,
    ) = lane_merge_back(
        e1_c, e1_h, l0_c, l0_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2,
        b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, b_c, b_h,
    )
    g_left_0 += tl.sum(tl.where(there, h_g_left_0, 0), 0, keep_dims=True)
    g_left_1 += tl.sum(tl.where(there, h_g_left_1, 0), 0, keep_dims=True)
    g_left_2 += tl.sum(tl.where(there, h_g_left_2, 0), 0, keep_dims=True)
    g_left_3 += tl.sum(tl.where(there, h_g_left_3, 0), 0, keep_dims=True)
    g_left_4 += tl.sum(tl.where(there, h_g_left_4, 0), 0, keep_dims=True)
    g_right_0 += tl.sum(tl.where(there, h_g_right_0, 0), 0, keep_dims=True)
    g_right_1 += tl.sum(tl.where(there, h_g_right_1, 0), 0, keep_dims=True)
    g_right_2 += tl.sum(tl.where(there, h_g_right_2, 0), 0, keep_dims=True)
    g_right_3 += tl.sum(tl.where(there, h_g_right_3, 0), 0, keep_dims=True)
    g_right_4 += tl.sum(tl.where(there, h_g_right_4, 0), 0, keep_dims=True)
    g_bias_0 += tl.sum(tl.where(there, h_g_bias_0, 0), 0, keep_dims=True)
    g_bias_1 += tl.sum(tl.where(there, h_g_bias_1, 0), 0, keep_dims=True)
    g_bias_2 += tl.sum(tl.where(there, h_g_bias_2, 0), 0, keep_dims=True)
    g_bias_3 += tl.sum(tl.where(there, h_g_bias_3, 0), 0, keep_dims=True)
    g_bias_4 += tl.sum(tl.where(there, h_g_bias_4, 0), 0, keep_dims=True)
    d1_c = a_c + tl.where(there, h_l_c, 0)
    u0_c = tl.where(alone, b_c, tl.where(there, h_r_c, 0))
    d1_h = a_h + tl.where(there, h_l_h, 0)
    u0_h = tl.where(alone, b_h, tl.where(there, h_r_h, 0))
    alone = first & (tl.arange(0, 2)[:, None] == 0)
    there = ((2 * tl.arange(0, 2)[:, None] + 1) * 2 <= left) & (alone == 0)
    a_c, b_c = tree_split(d1_c)
    x_c, f2_c = tree_split(f1_c)
    b_c += x_c
    a_h, b_h = tree_split(d1_h)
    x_h, f2_h = tree_split(f1_h)
    b_h += x_h
    (
        h_l_c, h_l_h, h_r_c, h_r_h, h_g_left_0, h_g_left_1, h_g_left_2, h_g_left_3, h_g_left_4, h_g_right_0,
        h_g_right_1, h_g_right_2, h_g_right_3, h_g_right_4, h_g_bias_0, h_g_bias_1, h_g_bias_2, h_g_bias_3,
        h_g_bias_4,
    ) = lane_merge_back(
        e2_c, e2_h, l1_c, l1_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2,
        b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, b_c, b_h,
    )
    g_left_0 += tl.sum(tl.where(there, h_g_left_0, 0), 0, keep_dims=True)
    g_left_1 += tl.sum(tl.where(there, h_g_left_1, 0), 0, keep_dims=True)
    g_left_2 += tl.sum(tl.where(there, h_g_left_2, 0), 0, keep_dims=True)
    g_left_3 += tl.sum(tl.where(there, h_g_left_3, 0), 0, keep_dims=True)
    g_left_4 += tl.sum(tl.where(there, h_g_left_4, 0), 0, keep_dims=True)
    g_right_0 += tl.sum(tl.where(there, h_g_right_0, 0), 0, keep_dims=True)
    g_right_1 += tl.sum(tl.where(there, h_g_right_1, 0), 0, keep_dims=True)
    g_right_2 += tl.sum(tl.where(there, h_g_right_2, 0), 0, keep_dims=True)
    g_right_3 += tl.sum(tl.where(there, h_g_right_3, 0), 0, keep_dims=True)
    g_right_4 += tl.sum(tl.where(there, h_g_right_4, 0), 0, keep_dims=True)
    g_bias_0 += tl.sum(tl.where(there, h_g_bias_0, 0), 0, keep_dims=True)
    g_bias_1 += tl.sum(tl.where(there, h_g_bias_1, 0), 0, keep_dims=True)
    g_bias_2 += tl.sum(tl.where(there, h_g_bias_2, 0), 0, keep_dims=True)
    g_bias_3 += tl.sum(tl.where(there, h_g_bias_3, 0), 0, keep_dims=True)
    g_bias_4 += tl.sum(tl.where(there, h_g_bias_4, 0), 0, keep_dims=True)
    d2_c = a_c + tl.where(there, h_l_c, 0)
    u1_c = tl.where(alone, b_c, tl.where(there, h_r_c, 0))
    d2_h = a_h + tl.where(there, h_l_h, 0)
    u1_h = tl.where(alone, b_h, tl.where(there, h_r_h, 0))
    alone = first & (tl.arange(0, 1)[:, None] == 0)
    there = ((2 * tl.arange(0, 1)[:, None] + 1) * 4 <= left) & (alone == 0)
    a_c, b_c = tree_split(d2_c)
    x_c, f3_c = tree_split(f2_c)
    b_c += x_c
    a_h, b_h = tree_split(d2_h)
    x_h, f3_h = tree_split(f2_h)
    b_h += x_h
    (
        h_l_c, h_l_h, h_r_c, h_r_h, h_g_left_0, h_g_left_1, h_g_left_2, h_g_left_3, h_g_left_4, h_g_right_0,
        h_g_right_1, h_g_right_2, h_g_right_3, h_g_right_4, h_g_bias_0, h_g_bias_1, h_g_bias_2, h_g_bias_3,
        h_g_bias_4,
    ) = lane_merge_back(
        e3_c, e3_h, l2_c, l2_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2,
        b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, b_c, b_h,
    )
    g_left_0 += tl.sum(tl.where(there, h_g_left_0, 0), 0, keep_dims=True)
    g_left_1 += tl.sum(tl.where(there, h_g_left_1, 0), 0, keep_dims=True)
    g_left_2 += tl.sum(tl.where(there, h_g_left_2, 0), 0, keep_dims=True)
    g_left_3 += tl.sum(tl.where(there, h_g_left_3, 0), 0, keep_dims=True)
    g_left_4 += tl.sum(tl.where(there, h_g_left_4, 0), 0, keep_dims=True)
    g_right_0 += tl.sum(tl.where(there, h_g_right_0, 0), 0, keep_dims=True)
    g_right_1 += tl.sum(tl.where(there, h_g_right_1, 0), 0, keep_dims=True)
    g_right_2 += tl.sum(tl.where(there, h_g_right_2, 0), 0, keep_dims=True)
    g_right_3 += tl.sum(tl.where(there, h_g_right_3, 0), 0, keep_dims=True)
    g_right_4 += tl.sum(tl.where(there, h_g_right_4, 0), 0, keep_dims=True)
    g_bias_0 += tl.sum(tl.where(there, h_g_bias_0, 0), 0, keep_dims=True)
    g_bias_1 += tl.sum(tl.where(there, h_g_bias_1, 0), 0, keep_dims=True)
    g_bias_2 += tl.sum(tl.where(there, h_g_bias_2, 0), 0, keep_dims=True)
    g_bias_3 += tl.sum(tl.where(there, h_g_bias_3, 0), 0, keep_dims=True)
    g_bias_4 += tl.sum(tl.where(there, h_g_bias_4, 0), 0, keep_dims=True)
    d3_c = a_c + tl.where(there, h_l_c, 0)
    u2_c = tl.where(alone, b_c, tl.where(there, h_r_c, 0))
    d3_h = a_h + tl.where(there, h_l_h, 0)
    u2_h = tl.where(alone, b_h, tl.where(there, h_r_h, 0))
    return (
        d3_c, d3_h, f3_c, f3_h, u0_c, u0_h, u1_c, u1_h, u2_c, u2_h, g_left_0, g_left_1, g_left_2, g_left_3,
        g_left_4, g_right_0, g_right_1, g_right_2, g_right_3, g_right_4, g_bias_0, g_bias_1, g_bias_2, g_bias_3,
        g_bias_4,
    )


@jit
def tree_up_back(
    d3_c, d3_h, u0_c, u0_h, u1_c, u1_h, u2_c, u2_h, l0_c, l0_h, r0_c, r0_h, l1_c, l1_h, r1_c, r1_h, l2_c, l2_h,
    r2_c, r2_h, left, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2, b_right_3,
    b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, g_left_0, g_left_1, g_left_2, g_left_3, g_left_4,
    g_right_0, g_right_1, g_right_2, g_right_3, g_right_4, g_bias_0, g_bias_1, g_bias_2, g_bias_3, g_bias_4,
    BC: tl.constexpr,
):
    """The transpose of tree_up: cotangents of the root and of the left halves -> of the leaves."""
    there = (2 * tl.arange(0, 1)[:, None] + 2) * 4 <= left
    (
        h_l_c, h_l_h, h_r_c, h_r_h, h_g_left_0, h_g_left_1, h_g_left_2, h_g_left_3, h_g_left_4, h_g_right_0,
        h_g_right_1, h_g_right_2, h_g_right_3, h_g_right_4, h_g_bias_0, h_g_bias_1, h_g_bias_2, h_g_bias_3,
        h_g_bias_4,
    ) = lane_merge_back(
        l2_c, l2_h, r2_c, r2_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2,
        b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, d3_c, d3_h,
    )
    g_left_0 += tl.sum(tl.where(there, h_g_left_0, 0), 0, keep_dims=True)
    g_left_1 += tl.sum(tl.where(there, h_g_left_1, 0), 0, keep_dims=True)
    g_left_2 += tl.sum(tl.where(there, h_g_left_2, 0), 0, keep_dims=True)
    g_left_3 += tl.sum(tl.where(there, h_g_left_3, 0), 0, keep_dims=True)
    g_left_4 += tl.sum(tl.where(there, h_g_left_4, 0), 0, keep_dims=True)
    g_right_0 += tl.sum(tl.where(there, h_g_right_0, 0), 0, keep_dims=True)
    g_right_1 += tl.sum(tl.where(there, h_g_right_1, 0), 0, keep_dims=True)
    g_right_2 += tl.sum(tl.where(there, h_g_right_2, 0), 0, keep_dims=True)
    g_right_3 += tl.sum(tl.where(there, h_g_right_3, 0), 0, keep_dims=True)
    g_right_4 += tl.sum(tl.where(there, h_g_right_4, 0), 0, keep_dims=True)
    g_bias_0 += tl.sum(tl.where(there, h_g_bias_0, 0), 0, keep_dims=True)
    g_bias_1 += tl.sum(tl.where(there, h_g_bias_1, 0), 0, keep_dims=True)
    g_bias_2 += tl.sum(tl.where(there, h_g_bias_2, 0), 0, keep_dims=True)
    g_bias_3 += tl.sum(tl.where(there, h_g_bias_3, 0), 0, keep_dims=True)
    g_bias_4 += tl.sum(tl.where(there, h_g_bias_4, 0), 0, keep_dims=True)
    d2_c = tree_join(u2_c + tl.where(there, h_l_c, 0), tl.where(there, h_r_c, 0))
    d2_h = tree_join(u2_h + tl.where(there, h_l_h, 0), tl.where(there, h_r_h, 0))
    there = (2 * tl.arange(0, 2)[:, None] + 2) * 2 <= left
    (
        h_l_c, h_l_h, h_r_c, h_r_h, h_g_left_0, h_g_left_1, h_g_left_2, h_g_left_3, h_g_left_4, h_g_right_0,
        h_g_right_1, h_g_right_2, h_g_right_3, h_g_right_4, h_g_bias_0, h_g_bias_1, h_g_bias_2, h_g_bias_3,
        h_g_bias_4,
    ) = lane_merge_back(
        l1_c, l1_h, r1_c, r1_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2,
        b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, d2_c, d2_h,
    )
    g_left_0 += tl.sum(tl.where(there, h_g_left_0, 0), 0, keep_dims=True)
    g_left_1 += tl.sum(tl.where(there, h_g_left_1, 0), 0, keep_dims=True)
    g_left_2 += tl.sum(tl.where(there, h_g_left_2, 0), 0, keep_dims=True)
    g_left_3 += tl.sum(tl.where(there, h_g_left_3, 0), 0, keep_dims=True)
    g_left_4 += tl.sum(tl.where(there, h_g_left_4, 0), 0, keep_dims=True)
    g_right_0 += tl.sum(tl.where(there, h_g_right_0, 0), 0, keep_dims=True)
    g_right_1 += tl.sum(tl.where(there, h_g_right_1, 0), 0, keep_dims=True)
    g_right_2 += tl.sum(tl.where(there, h_g_right_2, 0), 0, keep_dims=True)
    g_right_3 += tl.sum(tl.where(there, h_g_right_3, 0), 0, keep_dims=True)
    g_right_4 += tl.sum(tl.where(there, h_g_right_4, 0), 0, keep_dims=True)
    g_bias_0 += tl.sum(tl.where(there, h_g_bias_0, 0), 0, keep_dims=True)
    g_bias_1 += tl.sum(tl.where(there, h_g_bias_1, 0), 0, keep_dims=True)
    g_bias_2 += tl.sum(tl.where(there, h_g_bias_2, 0), 0, keep_dims=True)
    g_bias_3 += tl.sum(tl.where(there, h_g_bias_3, 0), 0, keep_dims=True)
    g_bias_4 += tl.sum(tl.where(there, h_g_bias_4, 0), 0, keep_dims=True)
    d1_c = tree_join(u1_c + tl.where(there, h_l_c, 0), tl.where(there, h_r_c, 0))
    d1_h = tree_join(u1_h + tl.where(there, h_l_h, 0), tl.where(there, h_r_h, 0))
    there = (2 * tl.arange(0, 4)[:, None] + 2) * 1 <= left
    (
        h_l_c, h_l_h, h_r_c, h_r_h, h_g_left_0, h_g_left_1, h_g_left_2, h_g_left_3, h_g_left_4, h_g_right_0,
        h_g_right_1, h_g_right_2, h_g_right_3, h_g_right_4, h_g_bias_0, h_g_bias_1, h_g_bias_2, h_g_bias_3,
        h_g_bias_4,
    ) = lane_merge_back(
        l0_c, l0_h, r0_c, r0_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2,
        b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, d1_c, d1_h,
    )
    g_left_0 += tl.sum(tl.where(there, h_g_left_0, 0), 0, keep_dims=True)
    g_left_1 += tl.sum(tl.where(there, h_g_left_1, 0), 0, keep_dims=True)
    g_left_2 += tl.sum(tl.where(there, h_g_left_2, 0), 0, keep_dims=True)
    g_left_3 += tl.sum(tl.where(there, h_g_left_3, 0), 0, keep_dims=True)
    g_left_4 += tl.sum(tl.where(there, h_g_left_4, 0), 0, keep_dims=True)
    g_right_0 += tl.sum(tl.where(there, h_g_right_0, 0), 0, keep_dims=True)
    g_right_1 += tl.sum(tl.where(there, h_g_right_1, 0), 0, keep_dims=True)
    g_right_2 += tl.sum(tl.where(there, h_g_right_2, 0), 0, keep_dims=True)
    g_right_3 += tl.sum(tl.where(there, h_g_right_3, 0), 0, keep_dims=True)
    g_right_4 += tl.sum(tl.where(there, h_g_right_4, 0), 0, keep_dims=True)
    g_bias_0 += tl.sum(tl.where(there, h_g_bias_0, 0), 0, keep_dims=True)
    g_bias_1 += tl.sum(tl.where(there, h_g_bias_1, 0), 0, keep_dims=True)
    g_bias_2 += tl.sum(tl.where(there, h_g_bias_2, 0), 0, keep_dims=True)
    g_bias_3 += tl.sum(tl.where(there, h_g_bias_3, 0), 0, keep_dims=True)
    g_bias_4 += tl.sum(tl.where(there, h_g_bias_4, 0), 0, keep_dims=True)
    d0_c = tree_join(u0_c + tl.where(there, h_l_c, 0), tl.where(there, h_r_c, 0))
    d0_h = tree_join(u0_h + tl.where(there, h_l_h, 0), tl.where(there, h_r_h, 0))
    return (
        d0_c, d0_h, g_left_0, g_left_1, g_left_2, g_left_3, g_left_4, g_right_0, g_right_1, g_right_2, g_right_3,
        g_right_4, g_bias_0, g_bias_1, g_bias_2, g_bias_3, g_bias_4,
    )


@jit(do_not_specialize=["n", "B", "below", "base"])
def tree_backward_kernel(
    p_x, p_left, p_right, p_bias,
    p_d_out_y, p_above, p_d_roots, p_d_carries, p_d_ends,
    p_g_x, p_sums, n, B, C, below, base,
    Q_x: tl.constexpr, D_x: tl.constexpr,
    Q_left: tl.constexpr, D_left: tl.constexpr,
    Q_right: tl.constexpr, D_right: tl.constexpr,
    Q_bias: tl.constexpr, D_bias: tl.constexpr,
    WHOLE: tl.constexpr, BC: tl.constexpr,
):
    """Without WHOLE: cotangents of what is before a block (row i_s - 1 of p_d_carries) and after it (row i_s of
    p_d_ends). With it, given those of the roots: of inputs, and the params' sums of each program."""
    L: tl.constexpr = 8
    NC = tl.cdiv(C, BC)
    blocks = tl.cdiv(n, 8)
    i_c, i_s, i_n = tl.program_id(0) % NC, tl.program_id(0) // NC % blocks, tl.program_id(0) // NC // blocks
    i_s, i_n, B = i_s.to(tl.int64), i_n.to(tl.int64), B.to(tl.int64)
    o_c = tl.max_contiguous(i_c * BC + tl.arange(0, BC), 1)[None, :]  # [1, BC], one lane a thread
    m_c = o_c < C
    t = tl.arange(0, L)[:, None]  # [L, 1]
    left = tl.minimum(n - i_s * L, L).to(tl.int32)  # nodes of the block that are there
    row = i_n * n + i_s * L + t
    m = (t < left) & m_c
    C_x, k_x = lane_index(C, Q_x, D_x), lane_index(o_c, Q_x, D_x)
    C_left, k_left = lane_index(C, Q_left, D_left), lane_index(o_c, Q_left, D_left)
    C_right, k_right = lane_index(C, Q_right, D_right), lane_index(o_c, Q_right, D_right)
    C_bias, k_bias = lane_index(C, Q_bias, D_bias), lane_index(o_c, Q_bias, D_bias)
    b_left_0 = tl.load(p_left + k_left * 5, mask=m_c, other=0).to(tl.float32)
    b_left_1 = tl.load(p_left + k_left * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_left_2 = tl.load(p_left + k_left * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_left_3 = tl.load(p_left + k_left * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_left_4 = tl.load(p_left + k_left * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_right_0 = tl.load(p_right + k_right * 5, mask=m_c, other=0).to(tl.float32)
    b_right_1 = tl.load(p_right + k_right * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_right_2 = tl.load(p_right + k_right * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_right_3 = tl.load(p_right + k_right * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_right_4 = tl.load(p_right + k_right * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_bias_0 = tl.load(p_bias + k_bias * 5, mask=m_c, other=0).to(tl.float32)
    b_bias_1 = tl.load(p_bias + k_bias * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_bias_2 = tl.load(p_bias + k_bias * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_bias_3 = tl.load(p_bias + k_bias * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_bias_4 = tl.load(p_bias + k_bias * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_x = tl.load(p_x + row * C_x + k_x, mask=m, other=0).to(tl.float32)
    n0_c, n0_h = lane_lift(b_x)
    (
        l0_c, l0_h, r0_c, r0_h, l1_c, l1_h, r1_c, r1_h, l2_c, l2_h, r2_c, r2_h, n3_c, n3_h,
    ) = tree_up(
        n0_c, n0_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2, b_right_3,
        b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, BC,
    )
    first = i_s == 0
    above = i_n * (n // L) + i_s
    e3_c = tl.full([1, BC], 0.0, tl.float32)
    i3_c = tl.full([1, BC], 0.0, tl.float32)
    e3_h = tl.full([1, BC], 0.0, tl.float32)
    i3_h = tl.full([1, BC], 0.0, tl.float32)
    if p_above is not None:
        plane = p_above + (0 * B * (n // L) + above) * C + o_c
        e3_c = tl.where(first, e3_c, tl.load(plane - C, mask=m_c & (i_s > 0), other=0))
        i3_c = tl.load(plane, mask=m_c & (left == L), other=0)
        plane = p_above + (1 * B * (n // L) + above) * C + o_c
        e3_h = tl.where(first, e3_h, tl.load(plane - C, mask=m_c & (i_s > 0), other=0))
        i3_h = tl.load(plane, mask=m_c & (left == L), other=0)
    e1_c, e1_h, e2_c, e2_h, e3_c, e3_h, i0_c, i0_h = tree_down(
        e3_c, e3_h, i3_c, i3_h, l0_c, l0_h, l1_c, l1_h, l2_c, l2_h, first, b_left_0, b_left_1, b_left_2, b_left_3,
        b_left_4, b_right_0, b_right_1, b_right_2, b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3,
        b_bias_4, BC,
    )
    g_left_0 = tl.full([1, BC], 0.0, tl.float32)
    g_left_1 = tl.full([1, BC], 0.0, tl.float32)
    g_left_2 = tl.full([1, BC], 0.0, tl.float32)
    g_left_3 = tl.full([1, BC], 0.0, tl.float32)
    g_left_4 = tl.full([1, BC], 0.0, tl.float32)
    g_right_0 = tl.full([1, BC], 0.0, tl.float32)
    g_right_1 = tl.full([1, BC], 0.0, tl.float32)
    g_right_2 = tl.full([1, BC], 0.0, tl.float32)
    g_right_3 = tl.full([1, BC], 0.0, tl.float32)
    g_right_4 = tl.full([1, BC], 0.0, tl.float32)
    g_bias_0 = tl.full([1, BC], 0.0, tl.float32)
    g_bias_1 = tl.full([1, BC], 0.0, tl.float32)
    g_bias_2 = tl.full([1, BC], 0.0, tl.float32)
    g_bias_3 = tl.full([1, BC], 0.0, tl.float32)
    g_bias_4 = tl.full([1, BC], 0.0, tl.float32)
    b_d_y = tl.load(p_d_out_y + row * C + o_c, mask=m, other=0).to(tl.float32)
    h_s_h = lane_readout_back(b_d_y)
    h_s_c = tl.full([L, BC], 0.0, tl.float32)
    h_p_c = tl.full([L, BC], 0.0, tl.float32)
    h_p_h = tl.full([L, BC], 0.0, tl.float32)
    d0_c = tl.where(m, h_p_c, 0)
    f0_c = tl.where(m, h_s_c, 0)
    d0_h = tl.where(m, h_p_h, 0)
    f0_h = tl.where(m, h_s_h, 0)
    (
        d3_c, d3_h, f3_c, f3_h, u0_c, u0_h, u1_c, u1_h, u2_c, u2_h, g_left_0, g_left_1, g_left_2, g_left_3,
        g_left_4, g_right_0, g_right_1, g_right_2, g_right_3, g_right_4, g_bias_0, g_bias_1, g_bias_2, g_bias_3,
        g_bias_4,
    ) = tree_down_back(
        d0_c, d0_h, f0_c, f0_h, e1_c, e1_h, e2_c, e2_h, e3_c, e3_h, l0_c, l0_h, l1_c, l1_h, l2_c, l2_h, left, first,
        b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2, b_right_3, b_right_4,
        b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, g_left_0, g_left_1, g_left_2, g_left_3, g_left_4,
        g_right_0, g_right_1, g_right_2, g_right_3, g_right_4, g_bias_0, g_bias_1, g_bias_2, g_bias_3, g_bias_4, BC,
    )
    if WHOLE:
        d3_c = tl.full([1, BC], 0.0, tl.float32)
        d3_h = tl.full([1, BC], 0.0, tl.float32)
        if p_d_roots is not None:
            plane = p_d_roots + (0 * B * (n // L) + above) * C + o_c
            d3_c = tl.load(plane, mask=m_c & (left == L), other=0)
            plane = p_d_roots + (1 * B * (n // L) + above) * C + o_c
            d3_h = tl.load(plane, mask=m_c & (left == L), other=0)
        (
            d0_c, d0_h, g_left_0, g_left_1, g_left_2, g_left_3, g_left_4, g_right_0, g_right_1, g_right_2,
            g_right_3, g_right_4, g_bias_0, g_bias_1, g_bias_2, g_bias_3, g_bias_4,
        ) = tree_up_back(
            d3_c, d3_h, u0_c, u0_h, u1_c, u1_h, u2_c, u2_h, l0_c, l0_h, r0_c, r0_h, l1_c, l1_h, r1_c, r1_h, l2_c,
            l2_h, r2_c, r2_h, left, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1,
            b_right_2, b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, g_left_0, g_left_1,
            g_left_2, g_left_3, g_left_4, g_right_0, g_right_1, g_right_2, g_right_3, g_right_4, g_bias_0, g_bias_1,
            g_bias_2, g_bias_3, g_bias_4, BC,
        )
        k_g_x = lane_lift_back(b_x, d0_c, d0_h)
        tl.store(p_g_x + row * C + o_c, k_g_x, mask=m)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 0) * C + o_c, g_left_0, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 1) * C + o_c, g_left_1, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 2) * C + o_c, g_left_2, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 3) * C + o_c, g_left_3, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 4) * C + o_c, g_left_4, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 5) * C + o_c, g_right_0, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 6) * C + o_c, g_right_1, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 7) * C + o_c, g_right_2, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 8) * C + o_c, g_right_3, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 9) * C + o_c, g_right_4, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 10) * C + o_c, g_bias_0, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 11) * C + o_c, g_bias_1, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 12) * C + o_c, g_bias_2, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 13) * C + o_c, g_bias_3, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 14) * C + o_c, g_bias_4, mask=m_c)
    else:
        plane = (0 * B * (n // L) + above) * C + o_c
        tl.store(p_d_carries + plane - C, d3_c, mask=m_c & (i_s > 0))
        tl.store(p_d_ends + plane, f3_c, mask=m_c & (left == L))
        plane = (1 * B * (n // L) + above) * C + o_c
        tl.store(p_d_carries + plane - C, d3_h, mask=m_c & (i_s > 0))
        tl.store(p_d_ends + plane, f3_h, mask=m_c & (left == L))


@jit(do_not_specialize=["n", "B", "below", "base"])
def tree_upper_backward_kernel(
    p_nodes, p_left, p_right, p_bias,
    p_carries, p_ends, p_above, p_d_roots, p_d_carries, p_d_ends,
    p_d_nodes, p_sums, n, B, C, below, base,
    Q_left: tl.constexpr, D_left: tl.constexpr,
    Q_right: tl.constexpr, D_right: tl.constexpr,
    Q_bias: tl.constexpr, D_bias: tl.constexpr,
    WHOLE: tl.constexpr, BC: tl.constexpr,
):
    """Without WHOLE: cotangents of what is before a block (row i_s - 1 of p_d_carries) and after it (row i_s of
    p_d_ends). With it, given those of the roots: of the nodes, and the params' sums of each program."""
    L: tl.constexpr = 8
    NC = tl.cdiv(C, BC)
    blocks = tl.cdiv(n, 8)
    i_c, i_s, i_n = tl.program_id(0) % NC, tl.program_id(0) // NC % blocks, tl.program_id(0) // NC // blocks
    i_s, i_n, B = i_s.to(tl.int64), i_n.to(tl.int64), B.to(tl.int64)
    o_c = tl.max_contiguous(i_c * BC + tl.arange(0, BC), 1)[None, :]  # [1, BC], one lane a thread
    m_c = o_c < C
    t = tl.arange(0, L)[:, None]  # [L, 1]
    left = tl.minimum(n - i_s * L, L).to(tl.int32)  # nodes of the block that are there
    row = i_n * n + i_s * L + t
    m = (t < left) & m_c
    C_left, k_left = lane_index(C, Q_left, D_left), lane_index(o_c, Q_left, D_left)
    C_right, k_right = lane_index(C, Q_right, D_right), lane_index(o_c, Q_right, D_right)
    C_bias, k_bias = lane_index(C, Q_bias, D_bias), lane_index(o_c, Q_bias, D_bias)
    b_left_0 = tl.load(p_left + k_left * 5, mask=m_c, other=0).to(tl.float32)
    b_left_1 = tl.load(p_left + k_left * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_left_2 = tl.load(p_left + k_left * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_left_3 = tl.load(p_left + k_left * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_left_4 = tl.load(p_left + k_left * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_right_0 = tl.load(p_right + k_right * 5, mask=m_c, other=0).to(tl.float32)
    b_right_1 = tl.load(p_right + k_right * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_right_2 = tl.load(p_right + k_right * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_right_3 = tl.load(p_right + k_right * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_right_4 = tl.load(p_right + k_right * 5 + 4, mask=m_c, other=0).to(tl.float32)
    b_bias_0 = tl.load(p_bias + k_bias * 5, mask=m_c, other=0).to(tl.float32)
    b_bias_1 = tl.load(p_bias + k_bias * 5 + 1, mask=m_c, other=0).to(tl.float32)
    b_bias_2 = tl.load(p_bias + k_bias * 5 + 2, mask=m_c, other=0).to(tl.float32)
    b_bias_3 = tl.load(p_bias + k_bias * 5 + 3, mask=m_c, other=0).to(tl.float32)
    b_bias_4 = tl.load(p_bias + k_bias * 5 + 4, mask=m_c, other=0).to(tl.float32)
    n0_c = tl.load(p_nodes + (0 * B * n + row) * C + o_c, mask=m, other=0)
    n0_h = tl.load(p_nodes + (1 * B * n + row) * C + o_c, mask=m, other=0)
    (
        l0_c, l0_h, r0_c, r0_h, l1_c, l1_h, r1_c, r1_h, l2_c, l2_h, r2_c, r2_h, n3_c, n3_h,
    ) = tree_up(
        n0_c, n0_h, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2, b_right_3,
        b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, BC,
    )
    first = i_s == 0
    above = i_n * (n // L) + i_s
    e3_c = tl.full([1, BC], 0.0, tl.float32)
    i3_c = tl.full([1, BC], 0.0, tl.float32)
    e3_h = tl.full([1, BC], 0.0, tl.float32)
    i3_h = tl.full([1, BC], 0.0, tl.float32)
    if p_above is not None:
        plane = p_above + (0 * B * (n // L) + above) * C + o_c
        e3_c = tl.where(first, e3_c, tl.load(plane - C, mask=m_c & (i_s > 0), other=0))
        i3_c = tl.load(plane, mask=m_c & (left == L), other=0)
        plane = p_above + (1 * B * (n // L) + above) * C + o_c
        e3_h = tl.where(first, e3_h, tl.load(plane - C, mask=m_c & (i_s > 0), other=0))
        i3_h = tl.load(plane, mask=m_c & (left == L), other=0)
    e1_c, e1_h, e2_c, e2_h, e3_c, e3_h, i0_c, i0_h = tree_down(
        e3_c, e3_h, i3_c, i3_h, l0_c, l0_h, l1_c, l1_h, l2_c, l2_h, first, b_left_0, b_left_1, b_left_2, b_left_3,
        b_left_4, b_right_0, b_right_1, b_right_2, b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3,
        b_bias_4, BC,
    )
    g_left_0 = tl.full([1, BC], 0.0, tl.float32)
    g_left_1 = tl.full([1, BC], 0.0, tl.float32)
    g_left_2 = tl.full([1, BC], 0.0, tl.float32)
    g_left_3 = tl.full([1, BC], 0.0, tl.float32)
    g_left_4 = tl.full([1, BC], 0.0, tl.float32)
    g_right_0 = tl.full([1, BC], 0.0, tl.float32)
    g_right_1 = tl.full([1, BC], 0.0, tl.float32)
    g_right_2 = tl.full([1, BC], 0.0, tl.float32)
    g_right_3 = tl.full([1, BC], 0.0, tl.float32)
    g_right_4 = tl.full([1, BC], 0.0, tl.float32)
    g_bias_0 = tl.full([1, BC], 0.0, tl.float32)
    g_bias_1 = tl.full([1, BC], 0.0, tl.float32)
    g_bias_2 = tl.full([1, BC], 0.0, tl.float32)
    g_bias_3 = tl.full([1, BC], 0.0, tl.float32)
    g_bias_4 = tl.full([1, BC], 0.0, tl.float32)
    later = i_s * L + t + 1 < tl.cdiv(below, L)
    plane = (0 * B * n + row) * C + o_c
    d0_c = tl.full([L, BC], 0.0, tl.float32)
    f0_c = tl.load(p_ends + plane, mask=m, other=0) + tl.load(p_carries + plane, mask=m & later, other=0)
    plane = (1 * B * n + row) * C + o_c
    d0_h = tl.full([L, BC], 0.0, tl.float32)
    f0_h = tl.load(p_ends + plane, mask=m, other=0) + tl.load(p_carries + plane, mask=m & later, other=0)
    (
        d3_c, d3_h, f3_c, f3_h, u0_c, u0_h, u1_c, u1_h, u2_c, u2_h, g_left_0, g_left_1, g_left_2, g_left_3,
        g_left_4, g_right_0, g_right_1, g_right_2, g_right_3, g_right_4, g_bias_0, g_bias_1, g_bias_2, g_bias_3,
        g_bias_4,
    ) = tree_down_back(
        d0_c, d0_h, f0_c, f0_h, e1_c, e1_h, e2_c, e2_h, e3_c, e3_h, l0_c, l0_h, l1_c, l1_h, l2_c, l2_h, left, first,
        b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1, b_right_2, b_right_3, b_right_4,
        b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, g_left_0, g_left_1, g_left_2, g_left_3, g_left_4,
        g_right_0, g_right_1, g_right_2, g_right_3, g_right_4, g_bias_0, g_bias_1, g_bias_2, g_bias_3, g_bias_4, BC,
    )
    if WHOLE:
        d3_c = tl.full([1, BC], 0.0, tl.float32)
        d3_h = tl.full([1, BC], 0.0, tl.float32)
        if p_d_roots is not None:
            plane = p_d_roots + (0 * B * (n // L) + above) * C + o_c
            d3_c = tl.load(plane, mask=m_c & (left == L), other=0)
            plane = p_d_roots + (1 * B * (n // L) + above) * C + o_c
            d3_h = tl.load(plane, mask=m_c & (left == L), other=0)
        (
            d0_c, d0_h, g_left_0, g_left_1, g_left_2, g_left_3, g_left_4, g_right_0, g_right_1, g_right_2,
            g_right_3, g_right_4, g_bias_0, g_bias_1, g_bias_2, g_bias_3, g_bias_4,
        ) = tree_up_back(
            d3_c, d3_h, u0_c, u0_h, u1_c, u1_h, u2_c, u2_h, l0_c, l0_h, r0_c, r0_h, l1_c, l1_h, r1_c, r1_h, l2_c,
            l2_h, r2_c, r2_h, left, b_left_0, b_left_1, b_left_2, b_left_3, b_left_4, b_right_0, b_right_1,
            b_right_2, b_right_3, b_right_4, b_bias_0, b_bias_1, b_bias_2, b_bias_3, b_bias_4, g_left_0, g_left_1,
            g_left_2, g_left_3, g_left_4, g_right_0, g_right_1, g_right_2, g_right_3, g_right_4, g_bias_0, g_bias_1,
            g_bias_2, g_bias_3, g_bias_4, BC,
        )
        tl.store(p_d_nodes + (0 * B * n + row) * C + o_c, d0_c, mask=m)
        tl.store(p_d_nodes + (1 * B * n + row) * C + o_c, d0_h, mask=m)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 0) * C + o_c, g_left_0, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 1) * C + o_c, g_left_1, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 2) * C + o_c, g_left_2, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 3) * C + o_c, g_left_3, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 4) * C + o_c, g_left_4, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 5) * C + o_c, g_right_0, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 6) * C + o_c, g_right_1, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 7) * C + o_c, g_right_2, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 8) * C + o_c, g_right_3, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 9) * C + o_c, g_right_4, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 10) * C + o_c, g_bias_0, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 11) * C + o_c, g_bias_1, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 12) * C + o_c, g_bias_2, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 13) * C + o_c, g_bias_3, mask=m_c)
        tl.store(p_sums + ((base + i_n * blocks + i_s) * 15 + 14) * C + o_c, g_bias_4, mask=m_c)
    else:
        plane = (0 * B * (n // L) + above) * C + o_c
        tl.store(p_d_carries + plane - C, d3_c, mask=m_c & (i_s > 0))
        tl.store(p_d_ends + plane, f3_c, mask=m_c & (left == L))
        plane = (1 * B * (n // L) + above) * C + o_c
        tl.store(p_d_carries + plane - C, d3_h, mask=m_c & (i_s > 0))
        tl.store(p_d_ends + plane, f3_h, mask=m_c & (left == L))


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


# --- Calls of the tree kernels: stages of blocks and their buffers; launches up the stages, then down again.


class TreeSlot(NamedTuple):
    """A tensor of the spec. `lanes`: its dims that are lanes; `rank`: of all its dims; `axes`, `sizes`: those among
    them that are written out, which lie last in memory, as one axis [F]."""

    name: str
    lanes: tuple[str, ...]
    kind: str
    rank: int
    axes: tuple[int, ...]
    sizes: tuple[int, ...]


class TreeKernels:
    """The kernels of one spec behind tensors in the spec's own order, for whole sequences from their start.

    Inputs are [B, T, *lanes, *dims] (declared ones, then taps), params [*lanes, *dims] or [*dims]. `table` is what the
    compiler wrote: the kernels, and the places of the tensors that each takes. Nothing is saved for the backward, which
    computes the nodes again.
    """

    def __init__(self, table: Any) -> None:
        self.table = table
        self.interpreted: bool = table.interpreted

    def saved_components(self) -> tuple[str, ...]:
        return ()

    def saved_rows(self, tokens: int, rows: int) -> int:
        return 0

    def scan_forward(
        self, inputs: list[Tensor], params: list[Tensor], initial: None, code: None, cu: None, save: bool
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Outputs [B, T, ...]; a tree's state is not made here, and nothing is saved."""
        call = TreeCall(self.table, inputs, params)
        dtype = real_dtype([*inputs, *params])
        outputs = [call.tokens(slot, dtype) for slot in self.table.outputs]
        if call.programs(0):
            above = call.prefixes(call.nodes())
            tensors, maps = call.arguments(self.table.token_inputs)
            call.launch("prefix", 0, [*tensors, *outputs, above[0]], maps)
        return [call.declared(x, slot) for x, slot in zip(outputs, self.table.outputs, strict=True)], [], []

    def scan_backward(
        self, d_outputs: list[Tensor], d_finals: list[Tensor], inputs: list[Tensor], params: list[Tensor],
        initial: None, saved: list[Tensor], code: None, cu: None,
    ) -> tuple[list[Tensor | None], list[Tensor | None], None]:  # fmt: skip
        """Gradients of inputs and params in their own shapes."""
        table, call = self.table, TreeCall(self.table, inputs, params)
        if not call.programs(0):
            return [torch.zeros_like(x) for x in inputs], [torch.zeros_like(x) for x in params], None
        nodes = call.nodes()
        above = call.prefixes(nodes)
        tensors, maps = call.arguments(table.back_inputs)
        cotangents = [_written(d_outputs[at], table.outputs[at]) for at in table.cotangents]
        grads: list[Any] = [
            call.tokens(table.inputs[at], call.gradient_dtype(at), whole) for at, whole in table.input_shares
        ]
        counts = [call.batch * call.blocks(stage) for stage in range(len(call.sizes))]
        sums = torch.empty((sum(counts), len(table.param_shares), call.lanes.count), device=call.device)

        def back(stage: int, given: list[Any], results: list[Any], out: list[Any], whole: bool) -> None:
            name, lane_maps = ("upper_backward", call.param_maps) if stage else ("backward", maps)
            leaves: list[Any] = [nodes[stage], *call.params] if stage else tensors
            tail = (call.sizes[stage - 1] if stage else 0, sum(counts[:stage]))
            call.launch(name, stage, [*leaves, *given, above[stage], *results, *out, sums], lane_maps, tail, (whole,))

        top = len(call.sizes) - 1
        given: list[list[Any]] = [cotangents]
        for stage in range(top):  # upwards: cotangents of the prefixes of the stage above
            ends: list[Any] = [call.buffer(stage + 1), call.buffer(stage + 1)]
            back(stage, given[stage], [None, *ends], [None] * (len(grads) if stage == 0 else 1), False)
            given.append(ends)
        above_nodes: Tensor | None = None
        for stage in range(top, -1, -1):  # downwards: those of the nodes
            out = [call.buffer(stage)] if stage else grads
            back(stage, given[stage], [above_nodes, None, None], out, True)
            above_nodes = out[0] if stage else None
        d_inputs: list[Tensor | None] = [None] * len(inputs)
        for (at, _), g in zip(table.input_shares, grads, strict=True):
            d_inputs[at] = call.reduced(g, inputs[at], table.inputs[at], 2)
        return d_inputs, call.param_gradients(sums.sum(0)), None


class TreeCall:
    """One call's shapes and buffers. `sizes`: the nodes of each stage, less than a block in the last."""

    def __init__(self, table: Any, inputs: list[Tensor], params: list[Tensor]) -> None:
        self.table, self.inputs, self.given_params = table, inputs, params
        self.device = inputs[0].device
        self.batch, length = inputs[0].shape[:2]
        self.sizes = [length]
        while self.sizes[-1] >= table.size:
            self.sizes.append(self.sizes[-1] // table.size)
        rows = SimpleNamespace(
            dims=table.dims, inputs=[slot[:3] for slot in table.inputs], params=[slot[:3] for slot in table.params]
        )
        shapes = tuple(_lane_sizes(x, slot)[2:] for x, slot in zip(inputs, table.inputs, strict=True))
        own = tuple(_lane_sizes(p, slot) for p, slot in zip(params, table.params, strict=True))
        self.lanes = LaneShape(rows, shapes, own)
        slots = enumerate(zip(params, table.params, strict=True), len(inputs))
        ready = [self._ready(p, slot, at, 0) for at, (p, slot) in slots]
        self.params = [x for x, _ in ready]
        self.param_maps = [n for _, pair in ready for n in pair]

    def blocks(self, stage: int) -> int:
        size: int = self.table.size
        return -(-self.sizes[stage] // size)

    def programs(self, stage: int) -> int:
        return self.batch * self.blocks(stage) * self.lanes.count

    def arguments(self, places: Sequence[int]) -> tuple[list[Tensor], list[int]]:
        """These inputs and all params, and their lane maps."""
        ready = [self._ready(self.inputs[at], self.table.inputs[at], at, 2) for at in places]
        return [*(x for x, _ in ready), *self.params], [*(n for _, pair in ready for n in pair), *self.param_maps]

    def launch(
        self, name: str, stage: int, tensors: Sequence[Any], maps: Sequence[int], more: Sequence[int] = (),
        flags: Sequence[bool] = (),
    ) -> None:  # fmt: skip
        n, count = self.sizes[stage], self.lanes.count
        (largest,) = self.table.tiles["backward" if "backward" in name else "forward"][4]
        width = min(largest, _power_of_two(count))
        blocks = n // self.table.size if "roots" in name else self.blocks(stage)
        kernel = getattr(self.table, f"{name}_kernel")
        kernel[(self.batch * blocks * -(-count // width),)](
            *tensors, n, self.batch, count, *more, *maps, *flags, width, num_warps=max(1, width // 32)
        )

    def nodes(self) -> list[Tensor | None]:
        """The nodes of each stage above the tokens, [scalar, B, n, C]."""
        found: list[Tensor | None] = [None]
        tensors, maps = self.arguments(self.table.lift_inputs)
        for stage in range(1, len(self.sizes)):
            found.append(self.buffer(stage))
            if stage == 1:
                self.launch("roots", 0, [*tensors, found[1]], maps)
            else:
                self.launch("upper_roots", stage - 1, [found[stage - 1], *self.params, found[stage]], self.param_maps)
        return found

    def prefixes(self, nodes: list[Tensor | None]) -> list[Tensor | None]:
        """For each stage the prefixes of the stage above."""
        above: list[Tensor | None] = [None] * len(self.sizes)
        for stage in range(len(self.sizes) - 1, 0, -1):
            above[stage - 1] = self.buffer(stage)
            tensors = [nodes[stage], *self.params, above[stage - 1], above[stage]]
            self.launch("upper_prefix", stage, tensors, self.param_maps)
        return above

    def buffer(self, stage: int) -> Tensor:
        shape = (self.table.scalars, self.batch, self.sizes[stage], self.lanes.count)
        return torch.empty(shape, dtype=torch.float32, device=self.device)

    def tokens(self, slot: TreeSlot, dtype: torch.dtype, whole: bool = True) -> Tensor:
        """A buffer [B, T, *lanes, F]; `whole`: kernels write all of it."""
        shape = (self.batch, self.sizes[0], *self.lanes.full, *([math.prod(slot.sizes)] if slot.axes else []))
        return (torch.empty if whole else torch.zeros)(shape, dtype=dtype, device=self.device)

    def gradient_dtype(self, at: int) -> torch.dtype:
        """fp32 where an input's gradient has to be summed."""
        return self.inputs[at].dtype if self.lanes.maps[at] == (1, 1) else torch.float32

    def declared(self, x: Tensor, slot: TreeSlot) -> Tensor:
        """[.., lanes, F] with its dims in the order of the spec."""
        if not slot.axes:
            return x
        x = x.unflatten(-1, slot.sizes)
        front = x.dim() - slot.rank
        return x.movedim(list(range(-len(slot.axes), 0)), [front + a for a in slot.axes]).contiguous()

    def reduced(self, grad: Tensor, like: Tensor, slot: TreeSlot, lead: int) -> Tensor:
        """A gradient in all lanes summed to the shape and dtype of its tensor."""
        if not slot.axes:
            plain: Tensor = self.lanes.reduced(grad, like, slot.lanes, lead)
            return plain
        front = like.dim() - slot.rank
        last = list(range(-len(slot.axes), 0))
        own = like.movedim([front + a for a in slot.axes], last).flatten(-len(slot.axes)).movedim(-1, 0)
        found: Tensor = self.lanes.reduced(grad.movedim(-1, 0), own, slot.lanes, lead + 1)
        found = found.movedim(0, -1).unflatten(-1, slot.sizes)
        return found.movedim(last, [front + a for a in slot.axes])

    def param_gradients(self, sums: Tensor) -> list[Tensor | None]:
        """From a row of lanes for each scalar that has a share."""
        found: list[Tensor | None] = []
        for place, (p, slot) in enumerate(zip(self.given_params, self.table.params, strict=True)):
            whole = sums.new_zeros((math.prod(slot.sizes), self.lanes.count))
            rows = [(at, n) for n, (owner, at) in enumerate(self.table.param_shares) if owner == place]
            for at, n in rows:
                whole[at] = sums[n]
            if not rows:
                found.append(None)
                continue
            full = whole.reshape(-1, *self.lanes.full).movedim(0, -1)
            found.append(self.reduced(full if slot.axes else full[..., 0], p, slot, 0))
        return found

    def _ready(self, x: Tensor, slot: TreeSlot, at: int, lead: int) -> tuple[Tensor, tuple[int, int]]:
        """A tensor as the kernels take it, and its lane map."""
        x, lane_map = _written(x, slot), self.lanes.maps[at]
        if lane_map is None:
            tail = x.shape[-1:] if slot.axes else ()
            x = x.reshape(*x.shape[:lead], *(own for _, own in self.lanes.axes[at]), *tail)
            x = x.expand(*x.shape[:lead], *(full for full, _ in self.lanes.axes[at]), *tail).contiguous()
        return x, lane_map or (1, 1)


def _written(x: Tensor, slot: TreeSlot) -> Tensor:
    """Contiguous, with its written-out dims last and flat."""
    if not slot.axes:
        return _plain(x)
    front = x.dim() - slot.rank
    last = list(range(-len(slot.axes), 0))
    return _plain(x.movedim([front + a for a in slot.axes], last).flatten(-len(slot.axes)))


def _lane_sizes(x: Tensor, slot: TreeSlot) -> tuple[int, ...]:
    """The shape without written-out dims."""
    front = x.dim() - slot.rank
    return tuple(n for a, n in enumerate(x.shape) if a - front not in slot.axes)


KERNELS = TreeKernels(
    SimpleNamespace(
        roots_kernel=tree_roots_kernel,
        prefix_kernel=tree_prefix_kernel,
        backward_kernel=tree_backward_kernel,
        upper_roots_kernel=tree_upper_roots_kernel,
        upper_prefix_kernel=tree_upper_prefix_kernel,
        upper_backward_kernel=tree_upper_backward_kernel,
        interpreted=triton is not None and not isinstance(tree_roots_kernel, triton.JITFunction),
        dims=(),
        scalars=2,
        inputs=(
            TreeSlot('x', (), 'real', 0, (), ()),
        ),
        params=(
            TreeSlot('left', (), 'real', 1, (0,), (5,)),
            TreeSlot('right', (), 'real', 1, (0,), (5,)),
            TreeSlot('bias', (), 'real', 1, (0,), (5,)),
        ),
        outputs=(
            TreeSlot('out_y', (), 'real', 0, (), ()),
        ),
        lift_inputs=(0,),
        token_inputs=(0,),
        back_inputs=(0,),
        cotangents=(0,),
        input_shares=((0, True),),
        param_shares=((0, 0), (0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (1, 2), (1, 3), (1, 4),
            (2, 0), (2, 1), (2, 2), (2, 3), (2, 4),),
        size=8,
        tiles={"forward": {4: (128,)}, "backward": {4: (128,)}},
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
    name='pr_lstm',
    digest='1ce37b0dd4416ffe',
    inputs=(Slot('x'),),
    params=(Slot('left', ('G',)), Slot('right', ('G',)), Slot('bias', ('G',)),),
    components=(Slot('c'), Slot('h'),),
    live=('c', 'h'),
    outputs=(Slot('y'),),
    sizes={'G': 5},
    dims=('G',),
    taps={},
    previous=False,
)

pr_lstm = Aggregator(SPEC, SimpleNamespace(lift=lift, combine=combine, advance=advance, output=output, identity=identity), fold="tree", kernels=KERNELS)
