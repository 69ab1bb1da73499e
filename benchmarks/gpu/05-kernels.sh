#!/usr/bin/env bash
# How fast is inference? Whole models of 135M, 1.5B and 7B shapes, a compiled step as a CUDA graph,
# batch 1, 8 and 64; then MLPs and the blocks of the kernels, which changed since they were measured.
. "$(dirname "$0")/setup.sh"
# To compile takes longer than to measure, in proportion to the blocks: of the large ones only eight.
DECODE=(--dtypes bfloat16 --threads 1 --compile --bare --new 64 --prefill 1024
  --models "factored, 2x2" "plain, a quarter of the units")
[ -n "$SMALL" ] || CAP=60 bench model decode-7b --shape 7b --layers 8 --batches 1 8 64 "${DECODE[@]}"
[ -n "$SMALL" ] || CAP=60 bench model decode-1.5b --shape 1.5b --layers 8 --batches 1 8 64 "${DECODE[@]}"
CAP=$((LIMIT / 3)) bench model decode-135m --shape 135m --batches 1 64 8 "${DECODE[@]}"
bench forward forward --what stack --layers 48 --threads 1 --dtypes bfloat16 --seconds 0.2 --ways factored torch.kron
[ -n "$SMALL" ] || bench launches launches --tokens 1 128
