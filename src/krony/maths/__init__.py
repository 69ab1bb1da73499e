"""Pure mathematics of Kronecker sums: shapes, factors, fits. No modules, no I/O."""
