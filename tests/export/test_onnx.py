"""Models as ONNX graphs."""

import re
import sys
from pathlib import Path

import pytest
import torch

from helpers import healing_inputs, tiny
from krony import KroneckerGroup, KroneckerLinear, KronyError, compress, load_model, make_plan
from krony.export.onnx import onnx as export_onnx
from krony.export.quantize import quantize

pytestmark = pytest.mark.slow


def compressed(family):
    made = tiny(family)
    return compress(made, make_plan(made, small=(2, 2), terms=2), init="van-loan")


def test_no_token_count_is_fixed_in_an_exported_graph():
    """The factors of many terms, which a long batch would make one matrix of in eager mode."""
    layer = KroneckerLinear(32, 32, [KroneckerGroup((8, 8), (4, 4), 9)]).requires_grad_(False)
    assert layer.groups[0].forms_dense(10_000)
    batch, length = torch.export.Dim("batch", max=4096), torch.export.Dim("length", max=4096)
    program = torch.export.export(
        layer, (torch.randn(2, 600, 32),), dynamic_shapes=({0: batch, 1: length},)
    )
    for shape in ((1, 1), (3, 5), (2, 2000)):
        x = torch.randn(*shape, 32)
        torch.testing.assert_close(program.module()(x), layer(x), rtol=1e-4, atol=1e-5)
    assert layer.groups[0].forms_dense(10_000), "eager mode is as it was"


def test_onnx(run, tmp_path):
    """One export, the only one that is fast enough for a test; checked on other shapes."""
    inputs = healing_inputs(tmp_path)
    code, out, err = run("export", inputs / "small", inputs / "onnx", "--to", "onnx")
    assert code == 0, err
    assert "logits in onnxruntime and torch differ by" in out
    names = {p.name for p in (inputs / "onnx").iterdir()}
    assert {"model.onnx", "model.onnx.data", "config.json", "tokenizer.json"} <= names
    import onnx
    import onnxruntime

    stored = onnx.load(inputs / "onnx" / "model.onnx")
    model = load_model(inputs / "small")
    sizes = sum(torch.Size(i.dims).numel() for i in stored.graph.initializer)
    assert sizes < 1.1 * model.num_parameters(), "the factors stay apart, tied weights one"
    session = onnxruntime.InferenceSession(inputs / "onnx" / "model.onnx")
    cached = [f"{i}.{kind}" for i in range(2) for kind in ("key", "value")]
    given = ["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in cached)]
    assert [i.name for i in session.get_inputs()] == given
    assert [i.name for i in session.get_outputs()] == ["logits", *(f"present.{n}" for n in cached)]
    for shape in ((1, 1), (1, 32), (5, 7)):
        ids = torch.randint(4096, shape)
        nothing = torch.zeros(shape[0], 2, 0, 8)
        feed = dict(zip(given, [ids, torch.ones_like(ids), *[nothing] * 4], strict=True))
        found, *_ = session.run(None, {name: x.numpy() for name, x in feed.items()})
        with torch.inference_mode():
            expected = model(input_ids=ids).logits
        torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    # The loop of docs/export.md, on a batch padded on the left, against transformers' own.
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text(encoding="utf-8")
    scope: dict = {}
    exec(re.search(r"```python\n(import numpy.*?)```", text, re.DOTALL)[1], scope)
    ids, mask = torch.randint(1, 4096, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    ids[0, :4], mask[0, :4] = 0, 0
    wanted = model.generate(
        ids, attention_mask=mask, max_new_tokens=12, min_new_tokens=12, do_sample=False
    )
    made = scope["generate"](session, ids.numpy(), mask.numpy(), 12)
    assert made.tolist() == wanted.tolist()


class Wrong:
    """A program that is not the model: its logits are all zero."""

    def save(self, path, **_):
        path.write_bytes(b"")


def test_an_onnx_graph_that_differs_is_not_written(monkeypatch, tmp_path):
    import onnxruntime

    class Session:
        def __init__(self, *_, **__):
            pass

        def run(self, _, feed):
            cached = [x for name, x in feed.items() if name.startswith("past")]
            return [torch.zeros(*feed["input_ids"].shape, 96).numpy(), *cached]

    monkeypatch.setattr(torch.onnx, "export", lambda *_, **__: Wrong())
    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    model = compressed("gpt2")
    attention = model.config._attn_implementation
    with pytest.raises(KronyError, match=r"differ by .* on 2 x 12 tokens, and 1\.0e-04 is allowed"):
        export_onnx(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert model.config._attn_implementation == attention


def test_what_onnx_refuses(monkeypatch, tmp_path):
    with pytest.raises(KronyError, match=r"in torch\.bfloat16; load it in float32"):
        export_onnx(compressed("gpt2").to(torch.bfloat16), tmp_path / "out")
    with pytest.raises(KronyError, match="quantized to int8, for which ONNX has other forms"):
        export_onnx(quantize(compressed("gpt2"), "int8"), tmp_path / "out")

    def fails(*_, **__):
        raise torch.onnx.errors.OnnxExporterError("no such operation\nand more")

    monkeypatch.setattr(torch.onnx, "export", fails)
    with pytest.raises(KronyError, match="can't export this GPT2LMHeadModel to ONNX: no such oper"):
        export_onnx(compressed("gpt2"), tmp_path / "out")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(KronyError, match=r"needs onnxruntime; install it with pip .*krony\[onnx\]"):
        export_onnx(compressed("gpt2"), tmp_path / "out")
    assert not list(tmp_path.iterdir())
