#!/usr/bin/env bash
# Is healing a factored model faster than the dense one? A step at 135M and at GPT-2's shapes:
# factored, narrowed, plain, dense, torch.kron; tokens a second, memory, roofline; Muon and AdamW.
. "$(dirname "$0")/setup.sh"
bench mixing mixing
bench training training-135m --shape 135m --batch 16 --loss kl+features --optimizers adamw muon --seconds 15
[ -n "$SMALL" ] || bench training training-gpt2 --shape gpt2 --batch 16 --optimizers adamw muon --seconds 15
[ -n "$SMALL" ] || bench training training-135m-compiled --shape 135m --batch 16 --compile --seconds 10
