"""How often a run of healing looks at held-out text, and at how much of it."""

import datasets

from krony.text.blocks import Blocks

EVALUATIONS = 20  # in a run, where they are cheap enough
LEAST = 8192  # held-out tokens that an evaluation looks at, if there are so many
# Held-out tokens a token of training, of all evaluations together: one costs a forward pass, a
# token of training with a teacher more than four of them, so that this is a tenth of the run.
EVALUATED = 0.4


def evaluations(tokens: int, evaluation: Blocks, window: int) -> tuple[Blocks, int]:
    """(held-out blocks to look at, tokens between two evaluations) of a run of so many tokens.

    As many evaluations as a curve needs, fewer in a short run, which together take about a tenth
    of its time; the two at its ends are always there.
    """
    most = max(LEAST, int(EVALUATED * tokens / EVALUATIONS)) // window or 1
    if isinstance(evaluation, datasets.IterableDataset):
        some, count = evaluation.take(most), most
    else:
        count = min(most, len(evaluation))
        some = evaluation.select(range(count))
    times = min(EVALUATIONS, max(1, int(EVALUATED * tokens / (count * window))))
    return some, max(1, tokens // times)
