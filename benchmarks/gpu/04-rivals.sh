#!/usr/bin/env bash
# Rivals at the same sizes and with the same healing, as many as fit; in the folder of script 3,
# whose cells it finds done. Run again, it goes on.
. "$(dirname "$0")/setup.sh"
CELLS=()
for size in 0.8 0.625 0.5; do CELLS+=("$size whitened SVD" "$size layers dropped"); done
for size in 0.8 0.625 0.5; do CELLS+=("$size low rank" "$size balanced sum"); done
[ -z "$SMALL" ] || CELLS=("0.8 layers dropped")
. "$HERE/study.sh"
