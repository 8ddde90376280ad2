"""Derivations on the IR: lifting of recurrences, reverse-mode rows, complex to real, the adjoint."""
