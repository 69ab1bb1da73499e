#!/usr/bin/env bash
# How long does compression take at 1.5B? Seconds a stage and memory, the rest extrapolated.
. "$(dirname "$0")/setup.sh"
PARTS=(moments algebra following planning)
[ -z "$SMALL" ] || PARTS=(moments following)
bench scale compression-1.5b --shape 1.5b --parts "${PARTS[@]}"
