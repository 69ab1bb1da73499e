"""Models as ONNX graphs."""

import importlib
import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from krony.errors import KronyError
from krony.hf.checkpoints import companions, new_directory
from krony.hf.families import cache_name
from krony.hf.modeling import form, quantized_of, sharing
from krony.hf.offload import check_present
from krony.measure.evaluate import context_length

TOLERANCE = 1e-4  # of the largest logit, or of 1 where all are smaller
# Batch and length, of which 5 are in the cache when the graph is made; and those it is checked on.
TRACED, CACHED, CHECKED = (2, 12), 5, ((2, 12), (1, 1), (3, 29))

Past = list[tuple[Tensor, Tensor]]


class _Step(nn.Module):
    """(input_ids (b, t), attention_mask (b, p + t), keys and values of p tokens) to (logits, keys
    and values of p + t tokens); nothing is cached for a model whose cache is not made of these."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.cache = cache_name(model)
        self.positions = "position_ids" in inspect.signature(type(model).forward).parameters

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Past
    ) -> tuple[Tensor, Past] | Tensor:
        more: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": bool(past)}
        if self.positions:  # those of a padded row start where its tokens do
            positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            more["position_ids"] = positions[:, -input_ids.shape[1] :]
        if not past:
            logits: Tensor = self.model(input_ids=input_ids, **more).logits
            return logits
        more[self.cache] = DynamicCache(ddp_cache_data=past)
        found = self.model(input_ids=input_ids, **more)
        return found.logits, _layers(found[self.cache])


def _layers(cache: Any) -> Past:
    """Keys and values of every layer, (b, heads, tokens, size) each, or nothing where there are
    others."""
    layers = getattr(cache, "layers", None) or []
    pairs = [(getattr(x, "keys", None), getattr(x, "values", None)) for x in layers]
    plain = all(isinstance(x, Tensor) and x.dim() == 4 for pair in pairs for x in pair)
    return pairs if plain else []  # type: ignore[return-value]


def onnx(
    model: PreTrainedModel,
    destination: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> float:
    """Write `model.onnx`, its weights beside it, the configuration and the tokenizer.

    One graph for the prompt and for what follows, with a KV cache (`_Step`), for every batch and
    length up to the context. Factors stay apart, but for layers that keep W in inference: the graph
    has W. It is run in onnxruntime on several shapes and compared before anything is left at
    `destination`.

    Returns:
        The largest absolute difference between the logits of onnxruntime and of torch.
    Raises:
        KronyError: packages that are missing, a model that is not in float32 or is quantized, a
            graph that can't be made or differs by more than `TOLERANCE`.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise KronyError(
                f"an ONNX graph needs {name}; install it with pip install 'krony[onnx]'"
            ) from error
    check_present(model, "write a graph of the model")
    if (quantized := quantized_of(model)) is not None:
        raise KronyError(
            f"the model is quantized to {quantized.to}, for which ONNX has other forms; "
            "export the one that it was made from and quantize the graph with onnxruntime"
        )
    if model.dtype != torch.float32:
        raise KronyError(
            f"the graph is written in float32, and the model is in {model.dtype}; load it in "
            "float32 (onnxruntime has tools for half precision)"
        )
    traced = sharing(model)  # what is given is not changed
    form(traced)
    with new_directory(destination) as folder:
        with _for_export(traced), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            past, free = _past(traced), torch.export.Dim.DYNAMIC
            ids, mask = _ids(model, TRACED), torch.ones(TRACED, dtype=torch.long)
            each = {0: free, 2: free}
            try:
                program = torch.onnx.export(
                    _Step(traced).eval(),
                    (ids[:, CACHED:] if past else ids, mask, past),
                    dynamo=True,
                    dynamic_shapes=(*[{0: free, 1: free}] * 2, [(each, each) for _ in past]),
                    input_names=["input_ids", "attention_mask", *_names("past_key_values", past)],
                    output_names=["logits", *_names("present", past)],
                    verbose=False,
                )
            except torch.onnx.errors.OnnxExporterError as error:
                reason = str(error.__cause__ or error).strip().splitlines()[0]
                raise KronyError(
                    f"torch can't export this {type(model).__name__} to ONNX: {reason}"
                ) from error
        assert program is not None
        program.save(folder / "model.onnx", external_data=True)
        difference = _difference(model, folder / "model.onnx", past)
        model.config.save_pretrained(folder)
        companions(model, folder, tokenizer)
    return difference


@contextmanager
def _for_export(model: PreTrainedModel) -> Iterator[None]:
    """Attention in plain operations, no gradients, and torch's exporter quiet."""
    logger = logging.getLogger("torch.onnx")
    attention, level = model.config._attn_implementation, logger.level
    logger.setLevel(logging.ERROR)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(attention)
        logger.setLevel(level)


def _ids(model: PreTrainedModel, shape: tuple[int, int]) -> Tensor:
    batch, length = shape
    size = batch, min(length, context_length(model))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.get_text_config().vocab_size, size, generator=generator)


def _past(model: PreTrainedModel) -> Past:
    """What the model caches of `CACHED` tokens of `TRACED`."""
    ids = _ids(model, TRACED)[:, :CACHED].to(model.device)
    return _layers(model(input_ids=ids, use_cache=True).get(cache_name(model)))


def _names(prefix: str, past: Past) -> list[str]:
    """Of keys and values, layer by layer, as optimum calls them."""
    return [f"{prefix}.{i}.{kind}" for i in range(len(past)) for kind in ("key", "value")]


@torch.no_grad()
def _difference(model: PreTrainedModel, path: Path, past: Past) -> float:
    """The largest absolute difference over `CHECKED`. Raises `KronyError` beyond the tolerance.

    With a cache, the tokens come in three pieces: from nothing, one, and the rest.
    """
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    largest = 0.0
    for shape in CHECKED:
        ids = _ids(model, shape)
        expected = model(input_ids=ids.to(model.device), use_cache=False).logits.cpu()
        logits, seen = [], 0
        held = [torch.zeros(len(ids), x.shape[1], 0, x.shape[3]) for pair in past for x in pair]
        for piece in (
            ids.split([ids.shape[1] // 2, 1, (ids.shape[1] - 1) // 2], 1) if past else [ids]
        ):
            if not (length := piece.shape[1]):
                continue
            seen += length
            mask = torch.ones(len(ids), seen, dtype=torch.long)
            names = ["input_ids", "attention_mask", *_names("past_key_values", past)]
            feed = dict(zip(names, (x.numpy() for x in (piece, mask, *held)), strict=True))
            found, *held = (torch.from_numpy(x) for x in session.run(None, feed))
            logits.append(found)
        difference = float((torch.cat(logits, 1) - expected).abs().max())
        limit = TOLERANCE * max(1.0, float(expected.abs().max()))
        if not difference <= limit:
            raise KronyError(
                f"logits in onnxruntime and torch differ by {difference:.1e} on {shape[0]} x "
                f"{shape[1]} tokens, and {limit:.1e} is allowed; nothing was written, please "
                "report the model and the versions of torch, onnxscript and onnxruntime"
            )
        largest = max(largest, difference)
    return largest
