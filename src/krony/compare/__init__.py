"""Every way to make one model smaller, ours and others', at equal sizes: made, measured, healed."""
