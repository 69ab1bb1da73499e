# Read by the scripts beside it: where things are, and how much of the five minutes is left.
#   PROJECT   the sources; default: the repository that this file is in
#   DATA      what was carried: smollm2/, corpus/, sets/, wheels/ (README.md); default: PROJECT/carried
#   OUT       where results go; default: benchmarks/results/gpu
#   SMALL=1   toy sizes, to see that all of it runs; needs neither DATA nor a GPU
#   LIMIT     seconds; default: 285
set -euo pipefail
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PROJECT=${PROJECT:-$(cd "$HERE/../.." && pwd)}
DATA=${DATA:-$PROJECT/carried}
OUT=${OUT:-$PROJECT/benchmarks/results/gpu}
SMALL=${SMALL:-}
LIMIT=${LIMIT:-285}
PYTHON=${PYTHON:-python3}
export PYTHONPATH="$PROJECT/src:$PROJECT/benchmarks${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
[ -d "$DATA/wheels" ] && export PYTHONPATH="$DATA/wheels:$PYTHONPATH"
[ -d "$DATA/sets" ] && export KRONY_DATA="$DATA/sets"
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=true
mkdir -p "$OUT"
"$PYTHON" - <<'END'
import importlib.util, sys
from importlib.metadata import version
missing = [n for n in ("accelerate", "datasets", "torch", "transformers") if not importlib.util.find_spec(n)]
if missing:
    sys.exit(f"{', '.join(missing)} missing; benchmarks/gpu/README.md says how to carry wheels")
if tuple(map(int, version("transformers").split(".")[:2])) < (5, 23):
    print(f"transformers {version('transformers')}: healing needs 5.23 (benchmarks/gpu/README.md)")
END
SMALL_FLAG=(${SMALL:+--small})

# Seconds that are left.
left() { echo $((LIMIT - SECONDS)); }

# `bench NAME RESULT OPTIONS...`: one benchmark within what is left, or CAP seconds of it; it is
# stopped hard 15 seconds later.
bench() {
  local name=$1 result=$2 limit
  shift 2
  limit=$(left)
  [ "$limit" -lt "${CAP:-$limit}" ] || limit=${CAP:-$limit}
  if [ "$limit" -lt 5 ]; then
    echo "not done, no time left: $name $*"
    return
  fi
  echo "== $name $* (at most $limit s)"
  timeout -k 5 $((limit + 15)) "$PYTHON" "$PROJECT/benchmarks/$name.py" \
    --out "$OUT/$result.json" --limit "$limit" "${SMALL_FLAG[@]}" "$@" ||
    echo "failed or stopped ($?): $name $*"
}

# `need PATH`: what this script can't do without, but at toy size.
need() {
  if [ -z "$SMALL" ] && [ ! -e "$1" ]; then
    echo "$1 is missing; benchmarks/gpu/README.md says how to carry it" >&2
    exit 2
  fi
}
