"""The table on what was tried to break krony: inputs, kills, families, bytes."""

from tabular import markdown, read, table


@table
def trust() -> str:
    """A row a kind of trial: how many there were, and what came of them."""
    found, faults = read("trust"), read("faults")
    fuzz, families, threads = found["fuzz"], found["families"], found["threads"]
    kinds = len(faults["commands"])
    differ = ", ".join(f"{value:.1e} ({name})" for name, value in threads["differ"].items())
    rows = [
        (
            "files of a model directory, changed at random",
            f"at most {fuzz['inputs']:,} inputs of {fuzz['targets']} kinds",
            f"{len(fuzz['escaped'])} got through, fixed; else read, or refused in a sentence",
        ),
        (
            "kills (SIGKILL, SIGTERM) at random moments",
            f"{faults['kills']} in {kinds} commands",
            f"{faults['survived']} left nothing that is wrong",
        ),
        ("families in whole chains", families["tried"], f"{families['passed']} pass"),
        (
            f"the same command twice ({', '.join(threads['twice'])})",
            f"{len(threads['twice'])} commands",
            f"{threads['equal']} write equal bytes; the others are compared by "
            "`tests/faults/test_same_bytes.py`",
        ),
        (
            "what reads data, with one thread and with two",
            f"{len(threads['differ'])} commands",
            f"stored tensors differ, of their norm, by {differ} at most",
        ),
    ]
    return markdown(("tried", "how much", "what came of it"), rows)
