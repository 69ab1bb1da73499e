"""One page that shows what was made of a model, how, and what it cost."""
