"""krony bench."""

from typing import Annotated, Any

import typer

from krony.cli import tables
from krony.cli.options import (
    MACHINE,
    MEASURED,
    Against,
    Device,
    JsonFile,
    RunDtype,
    Source,
    out,
    progress_bar,
)


def bench_command(
    source: Source,
    against: Against = None,
    seed: Annotated[
        int,
        typer.Option(metavar="N", min=0, help="Of the random tokens.", rich_help_panel=MEASURED),
    ] = 0,
    compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Compile the bare loop's step; on a GPU into a CUDA graph.",
            rich_help_panel=MEASURED,
        ),
    ] = False,
    device: Device = None,
    dtype: RunDtype = None,
    threads: Annotated[
        int | None,
        typer.Option(metavar="N", help="Of the CPU. Default: torch's.", rich_help_panel=MACHINE),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Speed, memory and bytes of a model against the dense one, and against the machine."""
    import torch

    from krony.hf import checkpoints
    from krony.measure.bench import bench
    from krony.measure.memory import keep_memory

    keep_memory()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with progress_bar() as bar:
        task = bar.add_task("load", total=None)
        record = bench(
            source,
            against,
            device,
            dtype,
            threads,
            compiled,
            seed,
            lambda what, i, n: bar.update(task, description=what, completed=i, total=n),
        )
    # A CPU's times are those of its neighbors too: only ratios and shares mean something there.
    out.print(tables.bench_table(record, absolute=not device.startswith("cpu")))
    out.print(tables.takes_table(record))
    out.print(_notes(record), markup=False, soft_wrap=True)
    if json_file is not None:
        checkpoints.write_json(json_file, record)
        out.print(f"Wrote {json_file}")


def _notes(record: dict[str, Any]) -> str:
    settings, takes = record["settings"], record["models"]
    lines = []
    if any(
        f.get("roofline", {}).get("share", 0) > 1
        for row in record["rows"]
        for f in row["models"].values()
    ):
        lines.append("More than 100 % of the roofline: the weights stay in the processor's cache.")
    if settings["compiled"]:
        seconds = sum(m["compile_seconds"] for m in takes.values())
        did = record["compiled"]
        how = "C++" if settings["device"] == "cpu" else "CUDA graphs"
        if did["cudagraph_skips"]:
            how = f"kernels, {did['cudagraph_skips']} of them outside of CUDA graphs"
        lines.append(
            f"The bare loop ran over a static cache, compiled into {how} in {seconds:.0f} s: "
            f"{did['graphs']} graphs, {did['breaks']} breaks. generate and prefill ran as they are."
        )
    if len(takes) > 1:
        lines += record["verdicts"] or ["Nothing is slower, and nothing takes more."]
    return "\n" + "\n".join(lines) if lines else ""
