"""All that knows transformers: architectures, plans, checkpoints, the loader, replay of blocks."""
