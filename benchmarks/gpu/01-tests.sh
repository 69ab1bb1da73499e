#!/usr/bin/env bash
# Are the kernels right? All tests of kernels and CUDA graphs; perplexity on the GPU and on the CPU.
. "$(dirname "$0")/setup.sh"
bench checks checks --model "$DATA/smollm2"
