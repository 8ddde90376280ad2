"""Text and decorator to the surface AST, and the one resolver to typed IR."""
