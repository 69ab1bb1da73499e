"""Where sums of Kronecker products earn their keep: their harm over that of low rank alone.

Some matrices of a real model, with all of their hidden units, at several shares of their
parameters: a balanced sum alone, and beside low rank with a tenth and with 45 % of the parameters.
The harm is the predicted one, fitted as `krony compress` fits; low rank has as many parameters.

    python recipes/smollm2.py runs/smollm2
    python benchmarks/sums.py runs/smollm2 --text corpus.txt
"""

import time

import krony
from krony.compression import budget, calibrate, prices
from krony.compression.structures import LOW_RANK_PARTS, balanced_shapes, mixed, sized
from krony.compression.work import Work
from krony.hf.checkpoints import load_tokenizer
from krony.hf.families import dense_weight, find_targets
from krony.maths import fit
from records import Record, parser

MATRICES = (
    "model.layers.5.mlp.up_proj",
    "model.layers.20.mlp.down_proj",
    "model.layers.12.self_attn.q_proj",
    "model.layers.24.self_attn.o_proj",
)
KEPT = (0.9, 0.75, 0.5, 0.25)


def main() -> None:
    """Fit, print, write."""
    made = parser(__doc__ or "", "sums")
    made.add_argument("source")
    made.add_argument("--text", required=True, help="calibration text, as krony compress takes")
    made.add_argument("--windows", type=int, default=32)
    made.add_argument("--window", type=int, default=512)
    made.add_argument("--matrices", nargs="+", default=MATRICES)
    options = made.parse_args()
    model, tokenizer = krony.load_model(options.source), load_tokenizer(options.source)
    tokens = calibrate.calibration_windows(
        options.text, model, tokenizer, options.windows, options.window
    )
    targets = {t.name: t for t in find_targets(model, "all") if t.name in options.matrices}
    found = budget.known(model, tokens, list(targets.values()), Work(), options.seed)
    record = Record("sums of Kronecker products beside low rank, over low rank", options)
    for name, target in targets.items():
        moments = found[name]
        assert isinstance(moments, calibrate.Moments)
        matrix = prices.Matrix(target, dense_weight(model.get_submodule(name)), moments)
        weight, metric = matrix.weight, matrix.metric
        harms = fit.low_rank_harm(weight, metric)
        for share in KEPT:
            row = {"matrix": name, "shape": list(target.shape), "share": share}
            started = time.process_time()
            for part in (0.0, *LOW_RANK_PARTS):
                alone = (sized(*balanced_shapes(target.shape), share),)
                groups = mixed(target.shape, share, part) if part else alone
                kept = sum(g.parameters for g in groups) / weight.numel()
                m, n = target.shape
                same = float(harms[sized((m, 1), (1, n), kept).terms])
                _, history = fit.groups(weight, metric, groups)
                row[f"{part:g}"] = round(history[-1] / same, 3)
            row["low_rank_harm"] = float(harms[sized((m, 1), (1, n), share).terms])
            row["processor_seconds"] = round(time.process_time() - started, 1)
            record.add(row)
            print(row, flush=True)


if __name__ == "__main__":
    main()
