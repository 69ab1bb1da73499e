#!/usr/bin/env bash
# What comes of a real model? Compressed at 0.8, 0.625 and 0.5 of its blocks, healed with 10M tokens
# by default; perplexity before and after, minutes. Stops at a checkpoint; run again, it goes on.
. "$(dirname "$0")/setup.sh"
CELLS=("dense" "0.8 budget" "0.625 budget" "0.5 budget")
[ -z "$SMALL" ] || CELLS=("dense")
. "$HERE/study.sh"
