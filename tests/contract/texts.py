"""Specs that reach corners no shipped example does."""

from __future__ import annotations

from functools import cache
from typing import Any

from contract.examples import scratch_cache
from psmc.api import realise
from psmc.pipeline import pick, read_text

TEXTS = {
    # Taps of several lags, of vectors and scalars, in lift and readout.
    "tap_lift": """aggregator tap_lift {
      dim K
      input x[K], g in (-inf, 0]
      param w[K]
      state a = 1, h[K] = 0
      lift { a = exp(g{-1}); h[i] = x[i] + w[i] * x{-1}[i] - 0.5 * x{-3}[i] }
      combine (l, r) { a = l.a * r.a; h[i] = r.a * l.h[i] + r.h[i] }
      output y[i] = h[i] * (1 + g{-2}) + x{-2}[i]
      associative: yes
    }""",
    # A recurrence with taps: a short convolution before a gate, token shift in the readout, prev.
    "tap_recurrence": """aggregator tap_recurrence {
      dim N
      input x, f, c[N]
      param w[N]
      state h[N] = 0
      let u = silu(x + 0.5 * x{-1} + 0.25 * x{-2})
      recurrence { h[n] = sigmoid(f{-1} + w[n]) * h[n] + u * c[n] }
      output y = sum[n] c{-1}[n] * prev.h[n]
      associative: yes
    }""",
    # One order, with taps.
    "tap_left": """aggregator tap_left {
      input x
      state h = 0.5
      lift { h = x + x{-2} }
      combine (l, r) { h = tanh(l.h - r.h) }
      output y = h * x{-1}
      associative: no
      order: left
    }""",
    "tap_tree": """aggregator tap_tree {
      input x
      state h = 0.25
      lift { h = x - x{-1} }
      combine (l, r) { h = tanh(l.h + 0.5 * r.h) }
      output y = h + prev.h * x{-3}
      associative: no
      order: tree
    }""",
    # Integers that are tapped and a component that is never read by an output.
    "tap_int": """aggregator tap_int {
      dim N = 4
      input x[N] : int in [0, 3]
      input v
      state p[N] : int in [0, 3] = iota, s = 0
      lift { p[i] = x{-1}[x[i]]; s = v }
      combine (l, r) { p[i] = r.p[l.p[i]]; s = l.s + r.s }
      output q[i] = p[i], total = s * where(x{-1}[0] > 1, 1, 2)
      associative: yes
    }""",
    "tap_complex": """aggregator tap_complex {
      input u : complex
      input g in (-inf, 0]
      state a : complex = 1, h : complex = 0
      lift { a = exp(complex(g, g{-1})); h = u - u{-1} }
      combine (l, r) { a = l.a * r.a; h = r.a * l.h + r.h }
      output y = h, z = real(h * conj(u{-2}))
      associative: yes
    }""",
    # Declared starts that are not the identity of the lifted rule.
    "start_scalar": """aggregator start_scalar {
      input a in (0, 1), b
      state h = 1
      recurrence { h = a * h + b }
      output y = h * prev.h
      associative: yes
    }""",
    "start_matrix": """aggregator start_matrix {
      dim K
      input f in (-inf, 0], k[K]
      state S[K, K] = eye, z[K] = 2
      recurrence {
        S[i, j] = exp(f) * S[i, j] + k[i] * k[j]
        z[i] = exp(f) * z[i] + k[i]
      }
      output y[i] = (sum[j] S[i, j] * k[j]) + z[i]
      associative: yes
    }""",
    "start_taps": """aggregator start_taps {
      input x
      state h = 3
      recurrence { h = 0.5 * h + x{-1} }
      output y = h
      associative: yes
    }""",
    # What has no readout returns its prefixes; what has no lift takes its state as inputs.
    "bare": """aggregator bare {
      state m = -inf, c : int in [0, 9] = 0
      combine (l, r) { m = max(l.m, r.m); c = max(l.c, r.c) }
      associative: yes
    }""",
    # Infinite or undefined before the first token, with params in the readout.
    "padded": """aggregator padded {
      input x
      param w, c
      state m = inf, n in (0, inf) = 0
      lift { m = x * w; n = 1 }
      combine (l, r) { m = min(l.m, r.m); n = l.n + r.n }
      output o = m * w + c, p = m / (n * c)
      associative: yes
    }""",
    "padded_matrix": """aggregator padded_matrix {
      dim K, V
      input q[K] in [0.1, 1], k[K] in [0.1, 1], v[V], score
      param w[V], c
      state m = -inf, S[K, V] = 0, z[K] = 0
      lift { m = score; S[i, j] = k[i] * v[j]; z[i] = k[i] }
      combine (l, r) {
        m = max(l.m, r.m)
        S[i, j] = exp(l.m - m) * l.S[i, j] + exp(r.m - m) * r.S[i, j]
        z[i] = exp(l.m - m) * l.z[i] + exp(r.m - m) * r.z[i]
      }
      output o[j] = w[j] * (sum[i] q[i] * S[i, j]) / (sum[i] q[i] * z[i]), p = m * c
      associative: yes
    }""",
    "padded_tree": """aggregator padded_tree {
      input x
      param w
      state m = -inf
      lift { m = x }
      combine (l, r) { m = tanh(l.m) + r.m }
      output o = m * w
      associative: no
    }""",
    # Outputs that read no state, integers alone, inputs and params that nothing reads, a scalar start from the left.
    "stateless": """aggregator stateless {
      input x
      state n = 0
      lift { n = x }
      combine (l, r) { n = l.n + r.n }
      output y = x^2
      associative: yes
    }""",
    "integers": """aggregator integers {
      input x : int in [0, 3]
      param unread
      state n : int = 0
      lift { n = x }
      combine (l, r) { n = l.n + r.n }
      output y = n / 2, m = n
      associative: yes
    }""",
    "left_start": """aggregator left_start {
      input x, unread
      state s = 2
      recurrence { s = tanh(s + x) }
      output y = s - prev.s
      associative: no
      order: left
    }""",
    # Constants that do not depend on the token.
    "constants": """aggregator constants {
      dim N
      input x
      param w[N]
      state n in (0, inf) = 0, s = 0
      lift { n = 1; s = x }
      combine (l, r) { n = l.n + r.n; s = l.s + r.s }
      output mean = s / n, basis[i] = w[i] * i + N, half = 0.5
      associative: yes
    }""",
}


@cache
def compiled_text(name: str) -> Any:
    """The aggregator of one of the texts."""
    return from_text(TEXTS[name])


def from_text(text: str, extern: Any = None) -> Any:
    scratch_cache()
    agg = realise(pick(read_text(text), None, "a test"), extern)
    agg.rule = extern
    return agg
