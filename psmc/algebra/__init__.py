"""Proofs about combine rules: normal forms, case analysis, exact evaluation. Imports neither torch nor triton."""
