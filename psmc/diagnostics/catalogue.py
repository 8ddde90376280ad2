"""The catalogue of diagnostic codes: 1xx syntax, 2xx names and shapes, 3xx algebra, 4xx derivation, 5xx our limits, 6xx run time, 9xx our bug."""

from __future__ import annotations

# code -> (title, what the user should know). `psmc explain-code` and docs print this table; every
# code has one bad file in tests/bad/ whose rendered text is pinned.
CATALOGUE: dict[str, tuple[str, str]] = {
    "PSM101": ("unexpected text", "The file does not follow the grammar at this place."),
    "PSM102": ("file cannot be read", "The file is missing, not UTF-8, or holds NUL bytes."),
    "PSM103": ("misplaced or repeated section", "An aggregator has at most one lift, combine and recurrence."),
}
