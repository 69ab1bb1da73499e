"""Layers and the kernels behind them. Knows no model."""

from krony.nn import kernels
from krony.nn.layers import KroneckerGroup, KroneckerLinear

KroneckerGroup.fused = KroneckerLinear.fused = kernels
