"""Specs with matrix states that no shipped example is: what the chunked plan takes, and what it leaves to others."""

from __future__ import annotations

TAKEN = {
    "value_decay": """
      dim K, V
      input q[K], k[K], v[V], g[V] in (-inf, 0]
      state S[K, V] = 0
      recurrence { S[i, j] = exp(g[j]) * S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] q[i] * S[i, j]""",
    "both_decays_bonus": """
      dim K, V
      input r[K], k[K], v[V], f[K], g[V] in (-inf, 0]
      param u[K]
      state S[K, V] = 0
      recurrence { S[i, j] = sigmoid(f[i]) * exp(g[j]) * S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] r[i] * (prev.S[i, j] + u[i] * k[i] * v[j])""",
    "two_injections": """
      dim K, V
      input q[K], k[K], v[V], a[K], b[V], g in (-inf, 0]
      state S[K, V] = 0
      recurrence { S[i, j] = exp(g) * S[i, j] + k[i] * v[j] + a[i] * b[j] }
      output o[j] = sum[i] q[i] * S[i, j]""",
    "two_injections_value_decay": """
      dim K, V
      input q[K], p[K], k[K], v[V], a[K], b[V], g[V]
      state S[K, V] = 0
      recurrence { S[i, j] = sigmoid(g[j]) * S[i, j] + k[i] * v[j] + a[i] * b[j] }
      output o[j] = sum[i] q[i] * S[i, j] + sum[i] p[i] * prev.S[i, j]""",
    "constant_decay": """
      dim K, V
      input q[K], k[K], v[V]
      param a[K] in (0, 1)
      state S[K, V] = 0
      recurrence { S[i, j] = a[i] * S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] q[i] * S[i, j]""",
    "value_first": """
      dim V, K
      input q[K], k[K], v[V], g[K] in (-inf, 0]
      state S[V, K] = 0
      recurrence { S[j, i] = exp(g[i]) * S[j, i] + v[j] * k[i] }
      output o[j] = sum[i] q[i] * S[j, i]""",
    "outer_between": """
      dim V, H, K
      input q[H, K], k[K], v[H, V], g[H] in (-inf, 0]
      state S[V, H, K] = 0
      recurrence { S[j, h, i] = exp(g[h]) * S[j, h, i] + v[h, j] * k[i] }
      output o[h, j] = sum[i] q[h, i] * S[j, h, i]""",
    "normaliser": """
      dim K, V
      input q[K], k[K] in [0.1, 1], v[V], g in (-inf, 0]
      state z[K] = 0, S[K, V] = 0
      recurrence { z[i] = exp(g) * z[i] + k[i]; S[i, j] = exp(g) * S[i, j] + k[i] * v[j] }
      output o[j] = (sum[i] q[i] * S[i, j]) / (1 + abs(sum[i] q[i] * z[i])), n = sum[i] k[i] * z[i]""",
    "normaliser_decays_apart": """
      dim K, V
      input q[K], k[K], v[V], g in (-inf, 0], f[K] in (-inf, 0]
      state S[K, V] = 0, z[K] = 0
      recurrence { S[i, j] = exp(g) * S[i, j] + k[i] * v[j]; z[i] = exp(f[i]) * z[i] + k[i] }
      output o[j] = (sum[i] q[i] * S[i, j]) / (1 + (sum[i] q[i] * z[i])^2)""",
    "three_of_one_key": """
      dim K, V, W
      input q[K], k[K], v[V], w[W], beta in [0, 1]
      state S[K, V] = 0, R[W, K] = 0, z[K] = 0
      recurrence {
        S[i, j] = S[i, j] + beta * k[i] * (v[j] - sum[m] k[m] * S[m, j])
        R[j, i] = R[j, i] + beta * k[i] * (w[j] - sum[m] k[m] * R[j, m])
        z[i] = z[i] + beta * k[i] * (1 - sum[m] k[m] * z[m])
      }
      output o[j] = sum[i] q[i] * S[i, j], y[j] = sum[i] q[i] * R[j, i] + sum[i] k[i] * z[i]""",
    "chain_of_stabilisers": """
      dim K, V
      input q[K], k[K], v[V], a, b
      state m = -inf, c = 0, S[K, V] = 0
      recurrence {
        m = max(m + logsigmoid(a), b)
        c = exp(logsigmoid(a) + prev.m - m) * c + exp(b - m)
        S[i, j] = exp(logsigmoid(a) + prev.m - m) * S[i, j] + exp(b - m) * k[i] * v[j]
      }
      output o[j] = (sum[i] q[i] * S[i, j]) / c""",
    "rank_one_any_keys": """
      dim K, V
      input q[K], w[K], u[K], b[K], c[V], d[K] in [-0.9, 0.9]
      state S[K, V] = 0
      recurrence { S[i, j] = d[i] * S[i, j] + 0.3 * u[i] * (sum[m] w[m] * S[m, j]) + b[i] * c[j] }
      output o[j] = sum[i] q[i] * S[i, j]""",
    "rank_two_decay": """
      dim K, V
      dim R = 2
      input q[K], k[R, K], v[R, V], beta[R] in [0, 1], g[K] in (-inf, 0]
      state S[K, V] = 0
      recurrence {
        S[i, j] = exp(g[i]) * S[i, j]
        for s in R { S[i, j] = S[i, j] + beta[s] * k[s, i] * (v[s, j] - sum[m] k[s, m] * S[m, j]) }
      }
      output o[j] = sum[i] q[i] * prev.S[i, j], n[j] = sum[i] k[0, i] * S[i, j]""",
    "signed_scalar": """
      dim K, V
      input q[K], k[K], v[V], a in [-1, 1]
      state S[K, V] = 0
      recurrence { S[i, j] = a * S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] q[i] * S[i, j]""",
    "signed_both": """
      dim K, V
      input q[K], k[K], v[V], a[K] in [-1, 1], b[V] in [-1, 1]
      state S[K, V] = 0
      recurrence { S[i, j] = a[i] * b[j] * S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] q[i] * S[i, j]""",
    "complex_state": """
      dim K, V
      input q[K] : complex, k[K], v[V], a[K] in [0, 1], t[K]
      state S[K, V] : complex = 0
      recurrence { S[i, j] = a[i] * complex(cos(t[i]), sin(t[i])) * S[i, j] + k[i] * v[j] }
      output o[j] = real(sum[i] q[i] * S[i, j])""",
    "decay_without_a_gradient": """
      dim K, V
      input q[K], k[K], v[V], f
      state S[K, V] = 0
      recurrence { S[i, j] = where(f > 0, 0.9, 0.5) * S[i, j] + stop(k[i]) * v[j] }
      output o[j] = sum[i] sign(q[i]) * S[i, j]""",
    "value_decay_without_a_gradient": """
      dim K, V
      input q[K], k[K], v[V], f[V]
      state S[K, V] = 0
      recurrence { S[i, j] = where(f[j] > 0, 0.9, 0.5) * S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] q[i] * S[i, j]""",
    "normaliser_without_a_gradient": """
      dim K, V
      input q[K], k[K], v[V], g in (-inf, 0]
      state S[K, V] = 0, z[K] = 0
      recurrence { S[i, j] = exp(g) * S[i, j] + k[i] * v[j]; z[i] = exp(g) * z[i] + k[i] }
      output o[j] = (sum[i] q[i] * S[i, j]) / (1 + stop(abs(sum[i] q[i] * z[i])))""",
    "complex_log": """
      dim K, V
      input q[K] : complex, k[K] : complex, v[V], g[K] in (-inf, 0], t[V]
      state S[K, V] : complex = 0
      recurrence { S[i, j] = exp(g[i]) * exp(complex(0, t[j])) * S[i, j] + k[i] * v[j] }
      output o[j] = real(sum[i] conj(q[i]) * S[i, j])""",
    "complex_state_real_log": """
      dim K, V
      input q[K], k[K] : complex, v[V], g in (-inf, 0]
      state S[K, V] : complex = 0
      recurrence { S[i, j] = exp(g) * S[i, j] + k[i] * v[j] }
      output o[j] = imag(sum[i] q[i] * S[i, j])""",
    "complex_beside_real": """
      dim K, V
      input q[K], k[K], v[V], u[V] : complex, g in (-inf, 0]
      state S[K, V] = 0, R[K, V] : complex = 0
      recurrence {
        S[i, j] = exp(g) * S[i, j] + k[i] * v[j]
        R[i, j] = exp(g) * R[i, j] + k[i] * u[j]
      }
      output o[j] = sum[i] q[i] * S[i, j], p[j] = real(sum[i] q[i] * prev.R[i, j])""",
    "many_queries": """
      dim K, V
      dim H = 3
      input q[H, K], p[K], k[K], v[V], g[K] in (-inf, 0]
      state S[K, V] = 0
      recurrence { S[i, j] = exp(g[i]) * S[i, j] + k[i] * v[j] }
      output o[h, j] = sum[i] q[h, i] * (S[i, j] + prev.S[i, j]), n[j] = sum[i] p[i] * S[i, j]""",
    "taps": """
      dim K, V
      input q[K], k[K], v[V], g in (-inf, 0]
      state S[K, V] = 0
      recurrence { S[i, j] = exp(g{-1}) * S[i, j] + (k[i] + k{-2}[i]) * v[j] }
      output o[j] = sum[i] q{-1}[i] * S[i, j]""",
    "vector": """
      dim K
      input q[K], k[K], u[K], w[K]
      state z[K] = 0
      recurrence { z[i] = z[i] - 0.5 * u[i] * (sum[m] w[m] * z[m]) + k[i] }
      output o = sum[i] q[i] * z[i]""",
    "beside_a_general_one": """
      dim K, V
      input q[K], k[K], v[V], a[K], b[V], g[K] in (-inf, 0]
      state S[K, V] = 0, R[K, V] = 0
      recurrence {
        S[i, j] = exp(g[i]) * S[i, j] + k[i] * v[j]
        R[i, j] = sigmoid(a[i] + b[j]) * R[i, j] + k[i] * v[j]
      }
      output o[j] = sum[i] q[i] * S[i, j] + sum[i] k[i] * prev.R[i, j], r[j] = tanh(sum[i] q[i] * R[i, j])""",
    "no_output_of_one": """
      dim K, V
      input q[K], k[K], v[V]
      state S[K, V] = 0, n = 0
      recurrence { S[i, j] = S[i, j] + k[i] * v[j]; n = n + 1 }
      output o[j] = (sum[i] q[i] * S[i, j]) / n""",
}  # fmt: skip

REFUSED = {
    "decay_apart": """
      dim K, V
      input q[K], k[K], v[V], a[K], b[V]
      state S[K, V] = 0
      recurrence { S[i, j] = sigmoid(a[i] + b[j]) * S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] q[i] * S[i, j]""",
    "starts_elsewhere": """
      dim K, V
      input q[K], k[K], v[V], g in (-inf, 0]
      state S[K, V] = 0.5
      recurrence { S[i, j] = exp(g) * S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] q[i] * S[i, j]""",
    "columns_apart": """
      dim K, V
      input q[K], k[K], v[V], b[V] in [0, 1]
      state S[K, V] = 0
      recurrence { S[i, j] = b[j] * (S[i, j] - k[i] * sum[m] k[m] * S[m, j]) + k[i] * v[j] }
      output o[j] = sum[i] q[i] * S[i, j]""",
    "real_through_complex": """
      dim K, V
      input q[K] : complex, k[K], v[V], g in (-inf, 0]
      state S[K, V] = 0
      recurrence { S[i, j] = exp(g) * S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] q[i] * S[i, j]""",
    "squares": """
      dim K, V
      input q[K], k[K], v[V]
      state S[K, V] = 0
      recurrence { S[i, j] = S[i, j] + k[i] * v[j] }
      output o[j] = sum[i] q[i] * S[i, j]^2""",
    "one_reads_the_other": """
      dim K, V
      input q[K], k[K], v[V]
      state S[K, V] = 0, R[K, V] = 0
      recurrence {
        R[i, j] = R[i, j] + k[i] * sum[m] q[m] * prev.S[m, j]
        S[i, j] = S[i, j] + k[i] * v[j]
      }
      output o[j] = sum[i] q[i] * R[i, j]""",
}  # fmt: skip


def text(name: str) -> str:
    """The whole spec."""
    return f"aggregator {name} {{ {TAKEN.get(name) or REFUSED[name]}\n associative: yes\n}}"
