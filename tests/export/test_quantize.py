"""Quantized models: torchao's own arithmetic, exact round trips, what is refused."""

import json
import sys
from dataclasses import asdict

import pytest
import torch
import transformers as hf
from safetensors.torch import load_file
from torch import nn
from torchao.quantization import Int8Tensor, IntxUnpackedToInt8Tensor
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from helpers import FAMILIES, healing_inputs, logits, tiny
from krony import Factors, HealConfig, KroneckerLinear, KronyError, compress, make_plan
from krony.export.quantize import quantize
from krony.healing.heal import heal
from krony.hf.families import dense_weight, find_targets
from krony.hf.modeling import config_of
from krony.hf.plan import Plan, matrix_plan
from krony.measure.info import model_bytes
from krony.nn import packing
from krony.nn.packing import FORMS
from krony.runtime.layers import is_quantized
from krony.runtime.quantized import StoredLinear, quantize_weight, tensors

STEPS = {"int8": 255, "int8-dynamic": 255, "int4": 15}  # levels of a range, less one


def model(family="gpt2", factored=True, dtype=torch.float32, **choices):
    made = tiny(family)
    if factored:
        compress(
            made, make_plan(made, **({"small": (2, 2), "terms": 2} | choices)), init="van-loan"
        )
    return made.to(dtype)


def load(path, **options):
    return hf.AutoModelForCausalLM.from_pretrained(path, **options).eval()


def quantized_names(found):
    return [name for name, p in found.named_parameters() if is_quantized(p)]


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip_is_exact(to, factored, dtype, tmp_path):
    made = quantize(model(factored=factored, dtype=dtype), to)
    expected = logits(made)
    made.save_pretrained(tmp_path / "a", max_shard_size="40KB")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1 or dtype == torch.float16
    again = load(tmp_path / "a")
    assert again.dtype == dtype
    assert quantized_names(again) == quantized_names(made)
    assert torch.equal(logits(again), expected)
    assert again.generate(torch.tensor([[2, 3]]), max_new_tokens=3, min_new_tokens=3).shape == (
        1,
        5,
    )
    again.save_pretrained(tmp_path / "b")
    assert torch.equal(logits(load(tmp_path / "b")), expected)
    # A half-precision file runs in float32 too, as krony evaluate does on a CPU.
    wide = load(tmp_path / "b", dtype=torch.float32)
    torch.testing.assert_close(logits(wide), expected.float(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("to", FORMS)
@pytest.mark.parametrize("shape", [(48, 32), (33, 51), (7, 96)])
def test_no_weight_is_off_by_more_than_half_a_step(to, shape):
    weight = torch.randn(shape) * torch.logspace(-6, 0, shape[0])[:, None]
    group = packing.group_size(shape[1], to)
    made = quantize_weight(weight, to, group)
    parts = tensors(made, to)
    entry = asdict(packing.Packed("x", shape, group))
    stored = StoredLinear(entry, to, torch.float32, torch.device("cpu"))
    stored.load_state_dict(parts)
    back = stored.restored().weight.dequantize()
    assert torch.equal(back, made.dequantize())
    rows = weight.reshape(shape[0], -1, group)
    span = rows.amax(-1).clamp(min=0) - rows.amin(-1).clamp(max=0)
    if to != "int4":  # symmetric about zero
        span = 2 * rows.abs().amax(-1)
    step = span / STEPS[to]
    # Rounding half a step, and half a step where the zero point is rounded or the range cut.
    error = (back - weight).reshape(rows.shape).abs().amax(-1)
    assert bool((error <= step * 1.01 + 1e-7).all())
    assert float(error.max()) > 0


def test_int4_takes_half_a_byte_a_number(tmp_path):
    before = model(factored=False, dtype=torch.float16)
    dense = 2 * sum(p.numel() for p in before.parameters())
    made = quantize(before, "int4")
    numbers = sum(t.shape[0] * t.shape[1] for t in find_targets(tiny("gpt2"), "mlp"))
    scales = numbers // 32
    expected = dense - 2 * numbers + numbers // 2 + 2 * scales + scales // 2
    assert model_bytes(made) == expected
    made.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(t.nbytes for t in tensors.values()) == expected
    assert tensors["transformer.h.0.mlp.c_fc.qdata"].dtype == torch.uint8


@pytest.mark.parametrize(
    ("columns", "group"),
    [
        (32, 32),
        (96, 32),
        (768, 32),
        (48, 24),
        (33, 33),
        (53, 53),
        (130, 26),
        (131, None),
        (4, None),
    ],
)
def test_groups_divide_the_columns(columns, group):
    assert packing.group_size(columns, "int4") == group
    assert packing.group_size(columns, "int8") == columns


def test_what_no_group_divides_is_kept_and_listed(tmp_path):
    made = tiny("gpt2")
    first, second = find_targets(made, "mlp")[:2]
    plan = Plan(
        (
            matrix_plan(first, (Factors((64, 16), (2, 2), 1), Factors((128, 1), (1, 32), 9))),
            matrix_plan(second, (Factors((8, 4), (4, 32), 1),)),
        )
    )
    quantize(compress(made, plan, init="van-loan"), "int4")
    kept = config_of(made).quantized["kept"]
    assert list(kept) == [f"{first.name}.groups.1.large", f"{second.name}.groups.0.large"]
    assert "divides its 9 columns" in kept[f"{first.name}.groups.1.large"]
    # The second block's MLP was dense, and is quantized like the factors.
    assert "transformer.h.1.mlp.c_fc.weight" in quantized_names(made)
    made.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(made))
    assert config_of(load(tmp_path)).quantized["kept"] == kept


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_dense_and_factored(family, tmp_path):
    for factored in (True, False):
        made, expected = model(family, factored), logits(model(family, factored))
        quantize(made, "int8")
        names = quantized_names(made)
        inside = ".groups.0.large.weight" if factored else ".weight"
        assert names == [t.name + inside for t in find_targets(tiny(family), "mlp")]
        assert isinstance(made.get_parameter(names[0]), Int8Tensor)
        torch.testing.assert_close(logits(made), expected, rtol=0.1, atol=0.02)
        assert not torch.equal(logits(made), expected)
        made.save_pretrained(tmp_path / str(factored))
        assert torch.equal(logits(load(tmp_path / str(factored))), logits(made))


@pytest.mark.parametrize("factored", [True, False])
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_folds_to_an_ordinary_model(to, factored, tmp_path):
    made = quantize(model(factored=factored), to)
    expected = logits(made)
    made.dequantize()
    assert not quantized_names(made)
    assert config_of(made) is None
    torch.testing.assert_close(logits(made), expected, rtol=1e-4, atol=1e-5)
    made.save_pretrained(tmp_path)
    assert type(load(tmp_path).transformer.h[0].mlp.c_fc) is hf.pytorch_utils.Conv1D
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_embeddings_attention_and_small_factors_stay():
    made = tiny("llama", tie_word_embeddings=True)
    compress(made, make_plan(made, small=(2, 2), target="embedding,mlp"), init="van-loan")
    quantize(made, "int4")
    for name, parameter in made.named_parameters():
        quantized = ".mlp." in name and name.endswith(".large.weight")
        assert is_quantized(parameter) == quantized, name
        if quantized:
            assert isinstance(parameter, IntxUnpackedToInt8Tensor)
            assert not parameter.requires_grad
        else:
            assert type(parameter) is nn.Parameter
    layer = made.model.layers[0].mlp.up_proj
    assert isinstance(layer, KroneckerLinear)
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(layer(x), x @ layer.weight.T, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("to", ["int8", "int4"])
def test_compiles_whole(to):
    made = quantize(model(), to)
    compiled = torch.compile(made, backend="eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled), logits(made))


def test_dynamic_inputs_are_close_to_weights_alone():
    expected = logits(quantize(model(), "int8"))
    found = logits(quantize(model(), "int8-dynamic"))
    assert not torch.equal(found, expected)
    assert float((found - expected).abs().max()) < 0.02 * float(expected.abs().max())


def test_the_base_model_loads_too(tmp_path):
    made = quantize(model(factored=False), "int4")
    made.save_pretrained(tmp_path)
    base = hf.AutoModel.from_pretrained(tmp_path)
    mine, its = made.transformer.h[0].mlp.c_fc, base.h[0].mlp.c_fc
    assert torch.equal(its.weight.dequantize(), mine.weight.dequantize())


@pytest.mark.slow
def test_without_krony_a_quantized_dense_model_stops_instead_of_loading_noise(
    monkeypatch, tmp_path
):
    quantize(model("llama", factored=False), "int8").save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "kronecker")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "kronecker")
    with pytest.raises(RuntimeError, match="mismatch"):
        load(tmp_path)


def test_what_is_refused(monkeypatch, tmp_path):
    with pytest.raises(KronyError, match="can't quantize to 'int3'; there are int8, int8-dynamic"):
        quantize(model(), "int3")
    made = quantize(model(factored=False), "int8")
    with pytest.raises(KronyError, match="quantized to int8 already"):
        quantize(made, "int4")
    with pytest.raises(KronyError, match="the mlp matrices of this GPT2LMHeadModel are quantized"):
        find_targets(made, "mlp")
    with pytest.raises(KronyError, match="quantized to int8; compress it first"):
        compress(made, make_plan(made, small=(2, 2), target="attention"), init="van-loan")
    narrow = model(small=(16, 8), terms=1)
    with pytest.raises(KronyError, match=r"nothing to quantize to int4.*divides its 4 columns"):
        quantize(narrow, "int4")
    assert not quantized_names(narrow)
    broken = model(factored=False)
    with torch.no_grad():
        dense_weight(broken.transformer.h[1].mlp.c_proj)[0, 0] = torch.nan
    with pytest.raises(KronyError, match=r"h.1.mlp.c_proj has NaN or Inf"):
        quantize(broken, "int8")
    assert not quantized_names(broken)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(KronyError, match=r"need torchao 0\.18 or later; install it with pip"):
        quantize(model(), "int8")


def test_a_quantized_model_is_not_healed(tmp_path):
    blocks = [{"input_ids": list(range(8))}]
    with pytest.raises(KronyError, match="heal it first, then quantize"):
        heal(
            quantize(model(), "int8"), blocks, HealConfig(tokens=8), run=tmp_path, evaluation=blocks
        )


@pytest.mark.slow
def test_the_command_line(run, tmp_path):
    inputs = healing_inputs(tmp_path)
    for source in ("small", "dense"):
        small = inputs / f"{source}-int8"
        code, out, err = run("quantize", inputs / source, small, "--to", "int8")
        assert code == 0, err
        assert "4 matrices in int8" in out
        assert (small / "tokenizer.json").is_file()
        code, out, err = run("evaluate", small, "--against", inputs / source, "--data",
                             inputs / "text.txt")  # fmt: skip
        assert code == 0, err
        assert "protocol krony-pt" in out
        code, out, _ = run("info", small)
        assert (code, "float32 and int8" in out) == (0, True)
        code, out, _ = run("info", small, "--json")
        figures = json.loads(out)
        assert figures["quantized"] == "int8"
        assert figures["factored"] == (source == "small")
        assert figures["bytes"] < 4 * figures["parameters"]
        code, out, _ = run("generate", small, "Return", "--max-new-tokens", 3)
        assert (code, out.startswith("Return")) == (0, True)
        code, out, err = run("export", small, inputs / f"{source}-dense", "--to", "dense")
        assert code == 0, err
        assert not quantized_names(load(inputs / f"{source}-dense"))
    code, out, _ = run("info", inputs / "dense-int8")
    assert " int8 " in next(line for line in out.splitlines() if "h.0.mlp.c_fc" in line)
    code, _, err = run("quantize", inputs / "small-int8", inputs / "dst")
    assert (code, "quantized to int8 already" in err) == (2, True)
    code, _, err = run("heal", inputs / "small-int8", inputs / "dst", "--data",
                       inputs / "text.txt", "--window", 16, "--tokens", 64)  # fmt: skip
    assert (code, "heal it first, then quantize" in err) == (2, True)
    assert not (inputs / "dst").exists()
