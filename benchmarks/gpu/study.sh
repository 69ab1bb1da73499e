# Read by scripts 3 and 4: the cells CELLS of a study of the real model.
STUDY="$OUT/study"
TEXTS=(wikitext2 "valid=$DATA/corpus/valid.txt.xz")
SIZES=(--model "$DATA/smollm2" --data "$DATA"/corpus/corpus-*.txt.xz --tokens 10M
  --loss default --evaluated 100000)
if [ -n "$SMALL" ]; then
  cat "$PROJECT"/*.md >"$OUT/toy.txt"
  TEXTS=("toy=$OUT/toy.txt")
  SIZES=(--model demo --data "$OUT/toy.txt" --tokens 1024 --batch-tokens 512
    --loss default --windows 2 --evaluated 300)
fi
need "$DATA/smollm2/config.json"
need "$DATA/corpus/corpus-000.txt.xz"
timeout -k 5 $(($(left) + 30)) "$PYTHON" "$PROJECT/benchmarks/study.py" "$STUDY" "${SIZES[@]}" \
  --texts "${TEXTS[@]}" --cells "${CELLS[@]}" --minutes "$(awk "BEGIN {print $(left) / 60}")" ||
  echo "failed or stopped ($?)"
[ ! -f "$STUDY/table.md" ] || cat "$STUDY/table.md"
