"""Layers of factors and how they are run: products, quantized weights, kernels. Knows no model."""
