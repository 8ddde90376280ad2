"""Rules for the prover's tests: name -> body of an aggregator (dims, state, combine)."""

from __future__ import annotations

from psmc.frontend.psm import parse
from psmc.frontend.resolve import resolve
from psmc.ir import Aggregator
from psmc.source import SourceFile

AFFINE = "a[i] = l.a[i] * r.a[i];  S[i, j] = r.a[i] * l.S[i, j] + r.S[i, j]"

ASSOCIATIVE = {
    "cumsum": "state s = 0 combine (l, r) { s = l.s + r.s }",
    "ema": "state a = 1, h = 0 combine (l, r) { a = l.a * r.a; h = r.a * l.h + r.h }",
    "complex_lru": """dim N state a[N] : complex = 1, h[N] : complex = 0
        combine (l, r) { a[i] = l.a[i] * r.a[i]; h[i] = r.a[i] * l.h[i] + r.h[i] }""",
    "mamba": """dim D, N state a[D, N] = 1, h[D, N] = 0
        combine (l, r) { a[d, n] = l.a[d, n] * r.a[d, n]; h[d, n] = r.a[d, n] * l.h[d, n] + r.h[d, n] }""",
    "gla": f"dim K, V state a[K] = 1, S[K, V] = 0 combine (l, r) {{ {AFFINE} }}",
    "deltanet": """dim K, V state A[K, K] = eye, S[K, V] = 0 combine (l, r) {
        A[i, m] = sum[p] r.A[i, p] * l.A[p, m]
        S[i, j] = sum[p] r.A[i, p] * l.S[p, j] + r.S[i, j] }""",
    "deltanet_transposed": """dim K, V state A[K, K] = eye, S[V, K] = 0 combine (l, r) {
        A[m, i] = sum[p] l.A[m, p] * r.A[p, i]
        S[j, i] = sum[p] l.S[j, p] * r.A[p, i] + r.S[j, i] }""",
    "retnet": """dim K, V param gamma in (0, 1) state n = 0, S[K, V] = 0
        combine (l, r) { n = l.n + r.n; S[i, j] = gamma ^ r.n * l.S[i, j] + r.S[i, j] }""",
    "retnet_counted": """dim K, V param gamma state n : int = 0, S[K, V] = 0
        combine (l, r) { n = l.n + r.n; S[i, j] = gamma ^ r.n * l.S[i, j] + r.S[i, j] }""",
    "mlstm": """dim K, V state f = 0, m = -inf, C[K, V] = 0, n[K] = 0 combine (l, r) {
        f = l.f + r.f
        m = max(l.m + r.f, r.m)
        C[i, j] = l.C[i, j] * exp(l.m + r.f - m) + r.C[i, j] * exp(r.m - m)
        n[i] = l.n[i] * exp(l.m + r.f - m) + r.n[i] * exp(r.m - m) }""",
    "softmax_average": """state m = -inf, u = 0, w = 0 combine (l, r) {
        m = max(l.m, r.m)
        u = l.u * exp(l.m - m) + r.u * exp(r.m - m)
        w = l.w * exp(l.m - m) + r.w * exp(r.m - m) }""",
    "logsumexp": """state m = -inf, u = 0 combine (l, r) {
        m = max(l.m, r.m); u = l.u * exp(l.m - m) + r.u * exp(r.m - m) }""",
    "logaddexp": "state a = -inf, b = -inf combine (l, r) { a = logaddexp(l.a, r.a); b = log(exp(l.b) + exp(r.b)) }",
    "softplus_sum": "state s = -inf combine (l, r) { s = l.s + softplus(r.s - l.s) }",
    "viterbi": """dim K state A[K, K] = where(eye == 1, 0, -inf)
        combine (l, r) { A[i, j] = max[m] (l.A[i, m] + r.A[m, j]) }""",
    "min_plus": """dim K state A[K, K] = -log(eye)
        combine (l, r) { A[i, j] = -max[m] -(l.A[i, m] + r.A[m, j]) }""",
    "bottleneck": """dim K state A[K, K] = log(eye) - log(1 - eye)
        combine (l, r) { A[i, j] = max[m] min(l.A[i, m], r.A[m, j]) }""",
    "min_max": """dim K state A[K, K] = log(1 - eye) - log(eye)
        combine (l, r) { A[i, j] = -max[m] -max(l.A[i, m], r.A[m, j]) }""",
    "max_times": """dim K state A[K, K] in [0, inf) = eye
        combine (l, r) { A[i, j] = max[m] l.A[i, m] * r.A[m, j] }""",
    "affine2x2": """dim R = 2 state A[R, R] = eye, b[R] = 0 combine (l, r) {
        A[i, j] = sum[m] r.A[i, m] * l.A[m, j]
        b[i] = sum[m] r.A[i, m] * l.b[m] + r.b[i] }""",
    "written_out_2x2": """state a = 1, b = 0, c = 0, d = 1 combine (l, r) {
        a = r.a * l.a + r.b * l.c; b = r.a * l.b + r.b * l.d
        c = r.c * l.a + r.d * l.c; d = r.c * l.b + r.d * l.d }""",
    "permutations": "dim N state p[N] : int = iota combine (l, r) { p[i] = r.p[l.p[i]] }",
    "relabelled_rows": """dim N, D state p[N] : int = iota, x[N, D] = 0
        combine (l, r) { p[i] = r.p[l.p[i]]; x[i, d] = l.x[i, d] + r.x[l.p[i], d] }""",
    "moebius": """state a = 1, b = 0, c = 0 combine (l, r) {
        a = (r.a * l.a + r.b * l.c) / (r.c * l.b + 1)
        b = (r.a * l.b + r.b) / (r.c * l.b + 1)
        c = (r.c * l.a + l.c) / (r.c * l.b + 1) }""",
    "velocity_addition": "state v = 0 combine (l, r) { v = (l.v + r.v) / (1 + l.v * r.v) }",
    "parallel_resistors": "state x in (0, inf) = inf combine (l, r) { x = 1 / (1 / l.x + 1 / r.x) }",
    "welford": """state n in (0, inf) = 0, mean = 0, M = 0 combine (l, r) {
        let d = r.mean - l.mean
        n = l.n + r.n
        mean = (l.n * l.mean + r.n * r.mean) / n
        M = l.M + r.M + d * d * l.n * r.n / n }""",
    "welford_guarded": """state n in (0, inf) = 0, mean = 0 combine (l, r) {
        n = l.n + r.n
        mean = where(r.n == 0, l.mean, where(l.n == 0, r.mean, (l.n * l.mean + r.n * r.mean) / (l.n + r.n))) }""",
    "extrema": """state s = 0, hi = -inf, lo = inf, top = -inf combine (l, r) {
        s = l.s + r.s; hi = max(l.hi, r.hi); lo = min(l.lo, r.lo); top = max(l.top, l.s + r.top) }""",
    "segmented_sum": """state f : int in [0, 1] = 0, s = 0 combine (l, r) {
        f = max(l.f, r.f); s = where(r.f > 0, r.s, l.s + r.s) }""",
    "segmented_by_equality": """state f : int in [0, 1] = 0, s = 0 combine (l, r) {
        f = where(r.f == 1, 1, l.f); s = where(r.f == 1, r.s, l.s + r.s) }""",
    "segmented_polynomial": """state f = 0, s = 0 combine (l, r) {
        f = l.f + r.f - l.f * r.f; s = l.s * (1 - r.f) + r.s }""",
    "latest_nonzero": "state s = 0 combine (l, r) { s = where(r.s == 0, l.s, r.s) }",
    "signed": "state s = 1 combine (l, r) { s = abs(l.s) * abs(r.s) * sign(l.s) * sign(r.s) }",
    "rotation": """state t = 0, x = 0, y = 0 combine (l, r) {
        t = l.t + r.t
        x = l.x * cos(r.t) - l.y * sin(r.t) + r.x
        y = l.x * sin(r.t) + l.y * cos(r.t) + r.y }""",
    "polar": """state z : complex = 1, n = 1 combine (l, r) { z = l.z * conj(conj(r.z)); n = l.n * real(r.z / r.z) * r.n }""",
    "conjugated_by_tanh": """state s in (-inf, inf) = 0 combine (l, r) {
        s = (tanh(l.s) + tanh(r.s)) * 0 + l.s + r.s }""",
    "norms": "dim N state x[N] = 0, q = 0 combine (l, r) { x[i] = l.x[i] + r.x[i]; q = l.q + r.q }",
    "products": "dim N state x[N] = 1, p = 1 combine (l, r) { x[i] = l.x[i] * r.x[i]; p = l.p * r.p * prod[i] exp(l.x[i] * 0) }",
    "root_of_squares": "state s in [0, inf) = 0 combine (l, r) { s = sqrt(l.s * l.s + r.s * r.s) }",
    "geometric": "state s in (0, inf) = 1 combine (l, r) { s = exp(log(l.s) + log(r.s)) }",
    "geometric_with_zero": "state s in [0, inf) = 1 combine (l, r) { s = exp(log(l.s) + log(r.s)) }",
    "complex_sizes": """state z : complex = 1, w : complex = 0, s = 0, n = 1 combine (l, r) {
        z = l.z * r.z; w = l.w + r.w; s = abs(r.z) * abs(exp(r.w)) * l.s + r.s
        n = l.n * r.n * abs(r.z)^2 / (real(r.z)^2 + imag(r.z)^2) * abs(complex(3, 4)) / 5 }""",
    "latest_nonzero_complex": "state z : complex = 0 combine (l, r) { z = where(r.z == 0, l.z, r.z) }",
    "guarded_by_a_complex_zero": """state z : complex = 1, s = 0, n = 0 combine (l, r) {
        z = l.z * r.z; s = where(r.z == 0, r.s, l.s * abs(r.z) + r.s)
        n = l.n + r.n + where(l.z * r.z == 0, 1, 0) - where(conj(l.z) == 0 or r.z == 0, 1, 0) }""",
    "sum_of_roots": """state s in [0, inf) = 0, t in [0, inf) = 0 combine (l, r) {
        s = (sqrt(l.s) + sqrt(r.s))^2; t = (l.t^(1/4) + r.t^(1/4))^4 }""",
    "roots_of_squares": """dim K state s = 0, x[K] = 0 combine (l, r) {
        s = l.s + r.s + sqrt((l.s - r.s)^2) - abs(l.s - r.s)
        x[i] = l.x[i] + r.x[i] + 0 * sum[j] sqrt(l.x[j]^2) }""",
    "exclusive_or": "state s : int in [0, 1] = 0 combine (l, r) { s = abs(l.s - r.s) }",
    "clock": "state s : int in [0, 2] = 0 combine (l, r) { s = l.s + r.s; s = where(s > 2, s - 3, s) }",
    "phase": "state s in [0, 1) = 0 combine (l, r) { s = where(l.s + r.s < 1, l.s + r.s, l.s + r.s - 1) }",
    "seven_stays": "state s = 0 combine (l, r) { s = where(l.s + r.s == 7, 7, l.s + r.s) }",
    "by_position": """dim R = 2 state s[R] = 0 combine (l, r) {
        s[i] = where(i == 0, l.s[i] + r.s[i], where(i == 1, r.s[i] + l.s[i], 7)) }""",
    "within_the_dim": "dim K state s[K] = 0 combine (l, r) { s[i] = where(i < K, l.s[i] + r.s[i], 7) }",
    "one_position": "dim R = 1 state s[R] = 0 combine (l, r) { s[i] = l.s[i] + r.s[i] + 1 - eye(i, 0) }",
    "never_below_zero": """dim K state A[K, K] in [0, 1] = eye, r[K] = 0, t[K] in [0, 1] = 0 combine (l, r) {
        A[i, j] = max[m] l.A[m, j] * r.A[i, m]; t[i] = max(l.t[i], r.t[i])
        r[i] = l.r[i] + r.r[i] + max(max[m] (-(l.t[m] * r.A[i, m])), r.t[i]) - r.t[i] }""",
}
CLAMP = """state a = 0, lo = -inf, hi = inf combine (l, r) {
    a = l.a + r.a; lo = min(max(l.lo + r.a, r.lo), r.hi); hi = min(max(l.hi + r.a, r.lo), r.hi) }"""

# name -> (body, component whose law fails)
NOT_ASSOCIATIVE = {
    "leaky": ("state s = 0, d = 1 combine (l, r) { d = r.d; s = l.s * r.d + r.s }", "s"),
    "swapped_delta": (
        """dim K, V state A[K, K] = eye, S[K, V] = 0 combine (l, r) {
        A[i, m] = sum[p] l.A[i, p] * r.A[p, m]
        S[i, j] = sum[p] r.A[i, p] * l.S[p, j] + r.S[i, j] }""",
        "S",
    ),
    "saturating": ("state s in [0, 1] = 0 combine (l, r) { s = where(l.s + r.s > 6, 0, l.s + r.s) }", "s"),
    "mean_of_means": ("state s = 0 combine (l, r) { s = (l.s + r.s) / 2 }", "s"),
    "difference": ("state s = 0 combine (l, r) { s = l.s - r.s }", "s"),
    "max_of_sums": ("state s = 0 combine (l, r) { s = max(l.s + r.s, r.s) - min(l.s, 0) }", "s"),
    "clipped_sum": ("state s = 0 combine (l, r) { s = min(max(l.s + r.s, -1), 1) }", "s"),
    "unscaled_softmax": (
        "state m = -inf, w = 0 combine (l, r) { m = max(l.m, r.m); w = l.w + r.w * exp(r.m - m) }",
        "w",
    ),
    "transposed_product": (
        "dim K state A[K, K] = eye combine (l, r) { A[i, j] = sum[m] l.A[m, i] * r.A[m, j] }",
        "A",
    ),
    "tanh_sum": ("state s = 0 combine (l, r) { s = tanh(l.s + r.s) }", "s"),
    "conjugate_product": ("state z : complex = 1 combine (l, r) { z = conj(l.z) * r.z }", "z"),
    "wrong_gather": ("dim N state p[N] : int = iota combine (l, r) { p[i] = l.p[l.p[r.p[i]]] }", "p"),
    "gather_out_of_range": (
        """dim N state s = 0, p : int = 0, q[N] = 0 combine (l, r) {
        p = l.p + r.p; q[i] = l.q[i] + r.q[i]; s = l.s + r.s + 1 - sum[i] (eye(i, l.p) + 0 * l.q[i]) }""",
        "s",
    ),
    "largest_out_of_range": (
        """dim N state s = 0, p : int = 0, q[N] = 0 combine (l, r) {
        p = l.p + r.p; q[i] = l.q[i] + r.q[i]; s = l.s + r.s + 1 - max[i] (eye(i, l.p) + 0 * l.q[i]) }""",
        "s",
    ),
    "modulus_that_loses": ("state s : int in [0, 2] = 0 combine (l, r) { s = where(l.s + r.s > 2, 0, l.s + r.s) }", "s"),
    "square_then_add": ("state s = 0 combine (l, r) { s = l.s * l.s + r.s }", "s"),
    "root_of_a_sum": ("state s in [0, inf) = 0 combine (l, r) { s = sqrt(l.s + r.s) }", "s"),
    "flag_ignored": (
        """state f : int in [0, 1] = 0, s = 0 combine (l, r) {
        f = l.f * r.f; s = where(r.f > 0, r.s, l.s + r.s) }""",
        "s",
    ),
}


def spec(body: str, claim: str = "yes") -> Aggregator:
    (agg,) = resolve(parse(SourceFile("test.psm", f"aggregator rule {{ {body}\n associative: {claim} }}")))
    return agg
