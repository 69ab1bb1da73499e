"""GGUF files read back through transformers, and run in llama.cpp where it is installed."""

import json

import numpy as np
import pytest
import torch
import transformers as hf

import krony
from helpers import tiny
from krony.export.gguf import gguf
from krony.hf.gguf import PRE, pre_tokenizer_name
from older import IDS, PLAIN, TEXT, configurations

# Of the largest logit: what rounding of the matrices does to tiny random models.
ROUNDING = {"f16": 2e-3, "bf16": 1e-2, "q8_0": 3e-2, "q4_0": 0.2}


def made(family: str) -> hf.PreTrainedModel:
    torch.manual_seed(0)
    config = configurations()[family]
    if family == "llama":
        config.rope_parameters = PLAIN  # transformers reads no scaled frequencies from GGUF
    return hf.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_it_comes_back(family, tmp_path):
    model, tokenizer = made(family), krony.load_tokenizer("demo")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with torch.inference_mode():
        wanted = model(IDS).logits
    for to, rounding in ROUNDING.items():
        # Words take a second to read: one file has them, and GPT-2's, of which they are counted.
        words = tokenizer if to == "q4_0" or family == "gpt2" else None
        assert gguf(model, tmp_path / f"{to}.gguf", words, to) == []
        again = krony.load_model(tmp_path / f"{to}.gguf", torch.float32)
        with torch.inference_mode():
            found = again(IDS).logits
        assert float((found - wanted).abs().max() / wanted.abs().max()) < rounding, to
    again, words = krony.load(tmp_path / "q4_0.gguf", torch.float32)
    assert words(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert words.chat_template == tokenizer.chat_template
    assert krony.save(again, tmp_path / "dir", words).is_dir()
    assert "quantization_config" not in json.loads((tmp_path / "dir/config.json").read_text())


@pytest.mark.slow
def test_a_smaller_one_from_a_file(tmp_path, run):
    gguf(made("llama"), tmp_path / "a.gguf", krony.load_tokenizer("demo"))
    (tmp_path / "text.txt").write_text("Return the number of items in the list. " * 400)
    small, smaller = tmp_path / "small", tmp_path / "small.gguf"
    code, _, err = run(
        "compress", tmp_path / "a.gguf", small, "--structure", "plain", "--budget", "0.7",
        "--calibration", tmp_path / "text.txt", "--windows", "16",
    )  # fmt: skip
    assert code == 0, err
    code, _, err = run("export", small, smaller, "--to", "gguf", "--type", "q8_0")
    assert code == 0, err
    assert smaller.stat().st_size < (tmp_path / "a.gguf").stat().st_size
    assert krony.load_model(smaller).config.num_hidden_layers <= 2


def changed(source, target, without=(), added=None, keys=None):
    """A GGUF file again, with a tensor less or more, or another key."""
    package = pytest.importorskip("gguf")
    reader = package.GGUFReader(source)
    writer = package.GGUFWriter(target, reader.get_field("general.architecture").contents())
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind = field.types[0]
        if kind == package.GGUFValueType.ARRAY:
            writer.add_array(name, field.contents())
        else:
            writer.add_key_value(name, field.contents(), kind)
    for name, value in (keys or {}).items():
        writer.add_string(name, value)
    for tensor in reader.tensors:
        if tensor.name not in without:
            writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    if added:
        writer.add_tensor(added, np.ones(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def test_a_file_is_whole_or_refused(tmp_path):
    """transformers makes up what is missing, and passes over what it can't read, in silence."""
    gguf(made("llama"), tmp_path / "a.gguf", krony.load_tokenizer("demo"))
    again = lambda **change: changed(tmp_path / "a.gguf", tmp_path / "b.gguf", **change)  # noqa: E731
    with pytest.raises(krony.KronyError, match=r"lacks 1 tensors .*mlp\.down_proj"):
        krony.load_model(again(without=["blk.1.ffn_down.weight"]))
    for change in ({"added": "rope_freqs.weight"}, {"keys": {"llama.rope.scaling.type": "yarn"}}):
        with pytest.raises(krony.KronyError, match="scaled rotary frequencies"):
            krony.load_model(again(**change))
    krony.load_model(again(keys={"llama.rope.scaling.type": "none"}))
    with pytest.warns(UserWarning, match=r"left out: blk\.0\.attn_q\.bias"):
        krony.load_model(again(added="blk.0.attn_q.bias"))


def test_what_is_refused(tmp_path):
    with pytest.raises(krony.KronyError, match="a GGUF file of a phi can't be written"):
        gguf(tiny("phi"), tmp_path / "a.gguf")
    model = tiny("llama")
    krony.compress(model, krony.make_plan(model, small=(2, 2)), init="van-loan")
    with pytest.raises(krony.KronyError, match="GGUF has no factored layers"):
        gguf(model, tmp_path / "a.gguf")
    (tmp_path / "b.gguf").write_bytes(b"GGUF and no more")
    with pytest.raises(krony.KronyError, match=r"can't load the model.*get the file again"):
        krony.load_model(tmp_path / "b.gguf")
    with pytest.raises(krony.KronyError, match=r"end it in \.gguf"):
        gguf(tiny("llama"), tmp_path / "a")
    assert not (tmp_path / "a.gguf").exists()


@pytest.mark.parametrize("name", PRE)
def test_ways_to_split_texts_have_names(name):
    assert pre_tokenizer_name(json.loads(PRE[name]().__getstate__())) == name


def test_no_other_has():
    with pytest.raises(krony.KronyError, match="Metaspace"):
        pre_tokenizer_name({"type": "Metaspace"})


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2"])
def test_llama_cpp_agrees(family, tmp_path):
    """The same greedy tokens, and logits within rounding; scaled frequencies of Llama 3 too."""
    llama_cpp = pytest.importorskip("llama_cpp")
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(configurations()[family]).eval()
    gguf(model, tmp_path / "a.gguf", krony.load_tokenizer("demo"))
    other = llama_cpp.Llama(
        str(tmp_path / "a.gguf"), n_ctx=64, n_threads=1, logits_all=True, verbose=False
    )
    ids = IDS[0].tolist()
    assert (
        other.tokenize(TEXT.encode(), add_bos=False, special=False)
        == (krony.load_tokenizer("demo")(TEXT)["input_ids"])
    )
    other.eval(ids)
    found = torch.tensor(other.scores[: len(ids)])
    with torch.inference_mode():
        wanted = model(IDS[:1]).logits[0]
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 2e-2
    assert (found.argmax(-1) == wanted.argmax(-1)).float().mean() > 0.9
