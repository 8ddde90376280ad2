"""Recurrences of every class that is lifted: name -> (declarations and recurrence, what is carried)."""

from __future__ import annotations

CLASSES = {
    # fractional-linear
    "continued fraction": ("input b in (0, inf), d in (0, inf) state s = 1 recurrence { s = b / (d + s) }", "a c"),
    "continued fraction, inside out": (
        "input b in (0, inf), d in (0, inf) state s = 1 recurrence { s = d + b / s }", "a c"),
    "Kalman variance": (
        """input q in [0, inf), r in (0, inf), a
        state P in [0, inf) = 1
        recurrence { let M = a * P * a + q  let K = M / (M + r)  P = (1 - K) * M }""", "a_P c"),
    "Kalman variance, Joseph form": (
        """input q in [0, inf), r in (0, inf)
        state P = 0
        recurrence { let M = P + q  let K = M / (M + r)  P = (1 - K)^2 * M + K * r * K }""", "a c"),
    "information filter": (
        """input q in (0, inf), h state Y in [0, inf) = 0
        recurrence { Y = Y / (1 + q * Y) + h * h }""", "a c"),
    "Riccati": (
        """input a, r in (0, inf), q in [0, inf) state P = 2
        recurrence { P = a * a * P - (a * P) * (a * P) / (P + r) + q }""", "a_P c"),
    "all signs turned": (
        "input x in (0, inf), y in (-inf, 0] state s = 0 recurrence { s = (s * y - x) / (s * y - 2) }", "a c"),
    "below zero": ("input x in (0, inf) state s in (-inf, 0] = 0 recurrence { s = (s - x) / (1 - s) }", "a c"),
    "from one on": ("input x in [0, inf) state s = 1 recurrence { s = 1 + x + (s - 1) / s }", "a c"),
    "lanes of fractions": (
        """dim D input x[D] in (0, inf), y in (0, inf) state s[D] = 0
        recurrence { s[i] = (s[i] + x[i]) / (1 + y * s[i]) }""", "a[D] c[D]"),
    "two fractions a token": (
        """dim R = 2 input x[R] in (0, inf) state s = 0
        recurrence { for r in R { s = x[r] / (1 + s) } }""", "a c"),
    "fractions, restarted": (
        """input x in (0, inf), z : int in [0, 1] state s = 1
        recurrence { s = where(z > 0, x, (s + x) / (s + 2)) }""", "a c"),
    "fractions, restarted by a factor": (
        """input x in (0, inf), z : int in [0, 1] state s in [0, inf) = 1
        recurrence { s = ((1 - z) * s + x) / ((1 - z) * s + 2) }""", "a c"),
    # floor and ceiling
    "saturating counter": ("input x state s = 0 recurrence { s = clamp(s + x, -1, 1) }", "b hi"),
    "bounds of a token": (
        "input x, lo, w in [0, inf) state s = 0 recurrence { s = clamp(s + x, lo, lo + w) }", "b hi"),
    "bounds that may cross": ("input x, lo, hi state s = 0 recurrence { s = clamp(s + x, lo, hi) }", "b hi_s"),
    "ceiling first": ("input x, lo, hi state s = 0 recurrence { s = max(min(s + x, hi), lo) }", "b hi_s"),
    "clamped leaky integrator": (
        "input x, g state s = 0 recurrence { s = clamp(sigmoid(g) * s + x, -1, 1) }", "a b hi"),
    "scaled after the floor": (
        "input x, g in (0, 1] state s = 0.5 recurrence { s = g * max(s + x, 0) }", "a b"),
    "divided, floored, capped": (
        """input x, g in (1, inf) state s = 0.5
        recurrence { s = relu(s / g + x); s = min(s, 2) - 1 }""", "a b hi"),
    "growing queue with a ceiling": (
        "input x, g in (0, 1] state s = 0.5 recurrence { s = min(g * s + x, 1) }", "a b"),
    "fallen twice": (
        "input x, u in (0, 1) state s = 0 recurrence { s = 1 - u * max(1 - 0.5 * s, x); s = min(s, 3) }", "a b"),
    "fallen twice, with choices": (
        """input x, u in (0, 1), z : int in [0, 1] state s = 0
        recurrence { s = 1 - where(z > 0, x, u * max(1 - clamp(s + x, 0, 1), 0.5)) }""", "a b hi"),
    "token bucket": (
        """input rate in (0, inf), take in [0, inf) param size in (1, inf) state s = 1
        recurrence { s = max(min(s + rate, size) - take, 0) }""", "b hi"),
    "clamp per channel": (
        """dim D input x[D], w in (0, inf) state s[D] = 0
        recurrence { s[i] = clamp(s[i] + x[i], -w, w) }""", "b[D] hi[D]"),
    "clamp, restarted": (
        """input x, z : int in [0, 1] state s = 0
        recurrence { s = where(z > 0, x, clamp(s + x, -1, 1)) }""", "b hi"),
    "clamp, restarted by a factor": (
        """input x, z : int in [0, 1] state s = 0
        recurrence { s = clamp((1 - z) * s + x, -1, 1) }""", "flag b hi"),
    # semirings
    "Lindley": ("input x state w = 0 recurrence { w = max(w + x, 0) }", "f"),
    "Lindley with relu, restarted": (
        "input x, z : int in [0, 1] state w = 3 recurrence { w = where(z > 0, 0, relu(w + x)) }", "f"),
    "maximum with reset": (
        "input x, z : int in [0, 1] state m = 0 recurrence { m = where(z > 0, x, max(m, x)) }", "f"),
    "minimum that rises": ("input x, d in [0, inf) state m = 9 recurrence { m = min(m + d, x) }", "f"),
    "leaky peak": ("input x, a in (0, 1) state m = 0 recurrence { m = max(a * m, x) }", "a_m"),
    "leaky peak of sizes": (
        "input x, a in [0, 1] state m in [0, inf) = 0 recurrence { m = max(a * m, abs(x)) }", "a_m"),
    "leaky peak, restarted": (
        """input x, a in (0, 1), z : int in [0, 1] state m = 0
        recurrence { m = where(z > 0, x, max(a * m, x)) }""", "flag a_m"),
    "leaky peak, restarted by a factor": (
        """input x, a in (0, 1), z : int in [0, 1] state m = 0
        recurrence { m = max((1 - z) * a * m, x) }""", "flag a_m"),
    "leaky peak, two resets": (
        """dim D input x[D], a in (0, 1), z : int in [0, 1], y[D] : int in [0, 2] state m[D] = 1
        recurrence { m[i] = where(z > 0, -1, where(y[i] == 1, x[i], max(a * m[i], x[i]))) }""", "flag[D] a_m[D]"),
    "leaky trough, restarted": (
        """input x, a in (0, 1), z : int in [0, 1] state m = 0
        recurrence { m = min(a * where(z > 0, 0, m), x) }""", "flag a_m"),
    "largest of whole numbers": (
        "input x : int in [0, 5], y state m : int in [0, inf) = 0, s = 0 recurrence { m = max(m, x); s = s + y }", ""),
    "bottleneck": ("input a, b state s = 0 recurrence { s = max(min(s, a), b) }", "a_s"),
    "bottleneck the other way": ("input a, b state s = 0 recurrence { s = clamp(s, b, a) }", "a_s"),
    "widest path": (
        """dim N input e[N], c[N, N] state w[N] = 0
        recurrence { w[j] = max(max[i] min(w[i], c[i, j]), e[j]) }""", "A[N, N]"),
    "shortest path": (
        """dim N input c[N, N] in [0, inf) state d[N] = 0
        recurrence { d[j] = -max[i] -(d[i] + c[i, j]) }""", "A[N, N]"),
    "minimax path": (
        """dim N input c[N, N], e[N] state d[N] = 0
        recurrence { d[j] = min(-max[i] -max(d[i], c[i, j]), e[j]) }""", "A[N, N]"),
    "reachability": (
        """dim N input edge[N, N] in [0, 1], source[N] in [0, 1] state r[N] in [0, 1] = 0
        recurrence { r[j] = max(max[i] r[i] * edge[i, j], source[j]) }""", "A[N, N]"),
    "reachability by minima": (
        """dim N input edge[N, N] in [0, 1], source[N] in [0, 1] state r[N] in [0, 1] = 0
        recurrence { r[j] = max(max[i] min(r[i], edge[i, j]), source[j]) }""", "A[N, N]"),
    "Viterbi in probabilities, restarted": (
        """dim N input e[N] in [0, inf), z : int in [0, 1] param t[N, N] in [0, 1] state p[N] in [0, inf) = 1
        recurrence { p[j] = where(z > 0, e[j], e[j] * max[i] p[i] * t[i, j]) }""", "A[N, N]"),
    # segments of what holds constants itself
    "segmented decay": (
        """dim K, V input k[K], v[V], g[K] in (-inf, 0], z : int in [0, 1] state S[K, V] = 0
        recurrence { S[i, j] = where(z > 0, 0, exp(g[i]) * S[i, j]) + k[i] * v[j] }""", "a[K]"),
    "segmented delta rule": (
        """dim K, V input k[K], v[V], b in [0, 1], z : int in [0, 1] state S[K, V] = 0
        recurrence { S[i, j] = (1 - z) * S[i, j]; S[i, j] = S[i, j] + b * k[i] * (v[j] - sum[m] k[m] * S[m, j]) }""",
        "A[K, K]"),
    "segmented tropical matrix": (
        """dim N input e[N], z : int in [0, 1] param t[N, N] state d[N] = 0
        recurrence { d[j] = where(z > 0, e[j], max[i] (d[i] + t[i, j]) + e[j]) }""", "A[N, N]"),
    "segmented log-sum-exp": (
        """input x, f, z : int in [0, 1] state m = 0
        recurrence { m = where(z > 0, x, logaddexp(m + f, x)) }""", "f_m"),
    "segmented mlstm": (
        """dim K, V input k[K], v[V], i, f in (-inf, 0], z : int in [0, 1]
        state m = -inf, C[K, V] = 0
        recurrence {
          m = where(z > 0, i, max(m + f, i))
          C[n, p] = where(z > 0, 0, exp(prev.m + f - m) * C[n, p]) + exp(i - m) * k[n] * v[p] }""", "f_m"),
    "segmented rotation": (
        """input w, x, z : int in [0, 1] state p = 1, q = 0
        recurrence { p = where(z > 0, 1, cos(w) * prev.p - sin(w) * prev.q + x)
          q = where(z > 0, x, sin(w) * prev.p + cos(w) * prev.q) }""", "a_pp a_pq a_qp a_qq"),
    # a finite set
    "permutations": (
        "dim N = 4 input x[N] : int in [0, 3] state p[N] : int = iota recurrence { p[i] = x[p[i]] }", ""),
    "automaton": (
        """dim N = 4 input x : int in [0, 2] state p[N] : int = iota
        recurrence { p[i] = where(x == 0, 3 - p[i], where(p[i] == x, 0, max(p[i], 1))) }""", ""),
    "permutations, restarted": (
        """dim N = 3 input x[N] : int in [0, 2], z : int in [0, 1] state p[N] : int = iota
        recurrence { p[i] = where(z > 0, i, x[p[i]]) }""", "flag"),
    "permutations, from elsewhere": (
        """dim N = 3 input x[N] : int in [0, 2], z : int in [0, 1] state p[N] : int = iota
        recurrence { p[i] = where(z > 0, 2 - i, x[p[i]]) }""", "flag"),
    # several at once
    "one of each": (
        """dim N = 3 input x, g in (0, 1), r in (0, inf), y[N] : int in [0, 2], z : int in [0, 1]
        state P in [0, inf) = 1, w = 0, c = 0, m = 0, n = 0, p[N] : int = iota, o[N] : int = iota
        recurrence {
          P = (P + g) * r / (P + g + r);  w = relu(w + x);  c = clamp(g * c + x, -1, 1)
          m = max(where(z > 0, 0, g * m), x);  n = g * n + x
          p[i] = where(z > 0, i, y[p[i]]);  o[i] = y[o[i]] }""",
        "a_P c_P f a_c b hi flag a_m a_n"),
    "shared flags": (
        """input x, g in (0, 1), h in (0, 1), z : int in [0, 1], y : int in [0, 1] state m = 0, n = 0, o = 0
        recurrence { m = where(z > 0, x, max(g * m, x)); n = where(z > 0, 1, max(h * n, x))
          o = where(y > 0, x, min(g * o, x)) }""",
        "flag_m a_m a_n flag_o a_o"),
}  # fmt: skip
