"""krony quantize and krony export: a model for other uses."""

from typing import Annotated, Literal

import typer

from krony import words
from krony.cli import tables
from krony.cli.options import OUTPUT, Destination, Source, StoredDtype, out
from krony.errors import KronyError

Form = Literal["dense", "onnx", "self-contained", "gguf"]
GGUFType = Literal["f16", "bf16", "q8_0", "q4_0"]


def quantize_command(
    source: Source,
    destination: Destination,
    to: Annotated[
        words.Quantity,
        typer.Option(
            help="int8: weights, a scale a row; int8-dynamic: inputs too, while the model runs; "
            "int4: weights, a scale for about 32 numbers.",
            rich_help_panel=OUTPUT,
        ),
    ] = "int8",
    dtype: StoredDtype = None,
) -> None:
    """Quantize the large factors of a factored model, or the MLPs of a dense one, with torchao."""
    from krony.export.quantize import quantize
    from krony.hf import checkpoints
    from krony.hf.modeling import quantized_of
    from krony.measure import info

    checkpoints.check_destination(destination)
    tokenizer = checkpoints.find_tokenizer(source)
    wanted = checkpoints.DTYPES[dtype] if dtype else None
    model = checkpoints.load_model(source, wanted)
    before = info.model_bytes(model)
    quantize(model, to)
    checkpoints.save_model(model, destination, tokenizer)
    quantized = quantized_of(model)
    assert quantized is not None
    for name, reason in quantized.kept.items():
        out.print(f"{name} stays as it is: {reason}", markup=False)
    size = tables.megabytes(checkpoints.directory_bytes(destination))
    out.print(
        f"Wrote {destination}: {len(quantized.matrices)} matrices in {to}, the parameters "
        f"{tables.megabytes(before)} before, {tables.megabytes(info.model_bytes(model))} now, "
        f"{size} on disk"
    )


def export_command(
    source: Source,
    destination: Destination,
    to: Annotated[
        Form,
        typer.Option(
            help="dense: an ordinary Hugging Face model; onnx: the factored graph; self-contained: "
            "with the code that loads it where krony is not installed; gguf: one file, for "
            "llama.cpp.",
            rich_help_panel=OUTPUT,
        ),
    ] = "dense",
    stored: Annotated[
        GGUFType,
        typer.Option("--type", help="Of the matrices in a GGUF file.", rich_help_panel=OUTPUT),
    ] = "f16",
    dtype: StoredDtype = None,
) -> None:
    """Write a model for where krony is not installed."""
    import torch

    from krony.export.onnx import onnx
    from krony.export.self_contained import self_contained
    from krony.hf import checkpoints
    from krony.hf.modeling import config_of
    from krony.measure import info

    checkpoints.check_destination(destination)
    tokenizer = checkpoints.find_tokenizer(source)
    wanted = checkpoints.DTYPES[dtype] if dtype else None
    if to == "gguf":
        from krony.export.gguf import gguf

        model = checkpoints.load_model(source)
        for name in gguf(model, destination, tokenizer, stored):
            out.print(f"{name} is in f16: no blocks of 32 in its rows", markup=False)
        size = tables.megabytes(destination.stat().st_size)
        out.print(
            f"Wrote {destination}: gguf in {stored}, {info.parameters(model):,} parameters, {size}"
        )
        return
    if to == "onnx":
        model = checkpoints.load_model(source, wanted or torch.float32)
        difference = onnx(model, destination, tokenizer)
        size = tables.megabytes(checkpoints.directory_bytes(destination, "model.onnx*"))
        out.print(
            f"Wrote {destination}: {to}, {info.parameters(model):,} parameters, {size}; "
            f"logits in onnxruntime and torch differ by {difference:.1e} at most"
        )
        return
    model = checkpoints.load_model(source, wanted if to == "self-contained" else None)
    if config_of(model) is None:
        raise KronyError(f"{source} is a dense model already; there is nothing to fold")
    if to == "dense":
        model.dequantize(wanted)
        checkpoints.save_model(model, destination, tokenizer)
    else:
        self_contained(model, destination, tokenizer)
    size = tables.megabytes(checkpoints.directory_bytes(destination))
    out.print(f"Wrote {destination}: {to}, {info.parameters(model):,} parameters, {size}")
