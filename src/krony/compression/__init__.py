"""From a calibration text to factors: moments, prices, budgets, fits."""
