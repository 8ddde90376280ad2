"""The catalogue of diagnostic codes.

1xx syntax, 2xx names and shapes, 3xx algebra, 4xx derivation, 5xx our limits, 6xx run time, 9xx our bug.
"""

from __future__ import annotations

# code -> (title, what the user should know). `psmc explain-code` and docs print this table; every
# code has one bad file in tests/bad/ whose rendered text is pinned.
CATALOGUE: dict[str, tuple[str, str]] = {
    "PSM101": ("unexpected text", "The file does not follow the grammar here; the help names the usual cause."),
    "PSM102": ("file cannot be read", "The file is missing, not UTF-8, or holds NUL bytes."),
    "PSM103": ("misplaced or repeated section", "An aggregator has at most one lift, combine, recurrence, 'associative' and 'order'."),
    "PSM104": (
        "word that cannot be a name",
        "Words of the language, Python keywords and a few names that generated code uses are reserved; "
        "names are ASCII letters, digits and underscores.",
    ),
    "PSM105": ("malformed number", "Numbers look like 2, 0.5, .5 or 1e-6. A product needs its '*': 2 * x, not 2x."),
    "PSM106": (
        "malformed interval",
        "An interval is (lo, hi), [lo, hi], (lo, hi] or [lo, hi) over constants, the smaller bound first; "
        "an infinite bound takes a round bracket.",
    ),
    "PSM107": ("malformed tap", "x{-1} is the input x one token earlier; taps reach back at most 64 tokens."),
    "PSM108": (
        "unknown setting",
        "'associative' is yes, assume or no; 'order' is tree or left; a type is real, complex or int.",
    ),
    "PSM109": ("malformed dim size", "A dim may fix its size to a positive whole number: dim R = 2."),
    "PSM110": ("value on an input or param", "Only a state has '= …', which gives its identity element."),
    "PSM111": ("reduction without an index", "A reduction names the index it runs over: sum[i] x[i]."),
    "PSM501": ("source too large", "psmc reads files of at most a megabyte; a spec is some 10 to 20 lines."),
    "PSM502": (
        "nested too deeply",
        "Brackets and expressions nest at most 200 deep; a chain a + b + … counts each operator.",
    ),
    "PSM503": ("name too long", "Names have at most 64 characters."),
    "PSM504": ("number out of range", "Literals have at most 64 digits and a decimal exponent within ±400."),
    "PSM510": (
        "complex operator without a real form",
        "Fused kernels compute complex values as pairs of reals. Sums, products, quotients, conj, abs, exp, where and "
        "whole powers have such a form; other functions of a complex value do not.",
    ),
}
