#!/usr/bin/env bash
# The paper's 81M at GPT-2's shapes: a step of training against dense and torch.kron, and decode.
. "$(dirname "$0")/setup.sh"
bench training paper-training --shape gpt2 --batch 32 --seconds 20 --kinds \
  dense "factored, 2x2" torch.kron "torch.kron, B first" "factored, 4x1"
[ -n "$SMALL" ] || bench training paper-training-compiled --shape gpt2 --batch 32 --seconds 20 --compile \
  --kinds dense "factored, 2x2" torch.kron
[ -n "$SMALL" ] || bench model paper-decode --shape gpt2 --dtypes bfloat16 --threads 1 --compile --bare \
  --batches 1 8 64 --new 64 --models "81M, (1536, 384) x (2, 2)" "81M, (768, 768) x (4, 1)"
