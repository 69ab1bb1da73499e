"""What lies beside the weights comes out as it went in, and older readers understand it."""

import json
import shutil

import pytest
import torch
import transformers as hf

import krony
from helpers import LLAMA, SMALL, TOKENS, tiny
from krony.compression.calibrate import sample
from krony.hf.checkpoints import load_model, load_tokenizer, save_model
from krony.hf.companions import source_folder
from krony.measure.evaluate import generate


def rope(rope_type="default", **more):
    return {"rope_type": rope_type, "rope_theta": 500000.0, **more}


def llama(**changes):
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMALL, **LLAMA, **TOKENS, **changes)).eval()


def gemma3():
    config = hf.Gemma3TextConfig(
        **SMALL, **LLAMA, **TOKENS, head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 3e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        },
    )  # fmt: skip
    torch.manual_seed(0)
    return hf.Gemma3ForCausalLM(config).eval()


def neox():
    torch.manual_seed(0)
    config = hf.GPTNeoXConfig(
        **SMALL, intermediate_size=64, max_position_embeddings=64, **TOKENS,
        rope_parameters=rope(partial_rotary_factor=0.5),
    )  # fmt: skip
    return hf.GPTNeoXForCausalLM(config).eval()


LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: llama(rope_parameters=rope()), {"rope_theta": 500000.0}),
        (
            lambda: llama(rope_parameters=rope("llama3", **LLAMA3)),
            {
                "rope_theta": 500000.0,
                "rope_scaling": {"rope_type": "llama3", **LLAMA3},
            },
        ),
        (gemma3, {"rope_theta": 3e6, "rope_local_base_freq": 2e4}),
        (neox, {"rotary_emb_base": 500000.0, "rotary_pct": 0.5}),
    ],
    ids=["default", "llama3", "layered", "gpt-neox"],
)
def test_rotary_settings_stand_under_both_names_in_all_we_write(make, wanted, tmp_path):
    make().save_pretrained(tmp_path / "source")
    model = load_model(tmp_path / "source")
    before = model.config.rope_parameters
    krony.compress(model, krony.make_plan(model, small=(2, 2)), init="van-loan")
    save_model(model, tmp_path / "small")
    save_model(load_model(tmp_path / "small").dequantize(), tmp_path / "dense")
    for name in ("small", "dense"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert {key: config[key] for key in wanted} == wanted
        assert config["rope_parameters"] == before
        assert config["torch_dtype"] == config["dtype"]
        again = load_model(tmp_path / name).config
        assert again.rope_parameters == before
        assert again.get_text_config().rope_parameters == before


def test_what_transformers_leaves_out_of_a_configuration_stays(tmp_path):
    llama().save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "config.json"
    source = json.loads(path.read_text())
    del source["rope_parameters"]
    source |= {
        "rope_theta": 250000.0,  # the older form alone
        "use_cache": True,
        "pretraining_tp": 1,
        "someone's own": {"kept": [1, 2]},
        "temperature": 0.7,  # a setting of generation where it does not belong
    }
    path.write_text(json.dumps(source))
    model = load_model(tmp_path / "source")
    krony.compress(model, krony.make_plan(model, small=(2, 2)), init="van-loan")
    save_model(model, tmp_path / "small")
    written = json.loads((tmp_path / "small" / "config.json").read_text())
    for key in ("rope_theta", "use_cache", "pretraining_tp", "someone's own", "temperature"):
        assert written[key] == source[key]
    assert load_model(tmp_path / "small").config.rope_parameters["rope_theta"] == 250000.0


@pytest.fixture
def source(tmp_path):
    """A model with the packaged tokenizer and every kind of companion."""
    folder = tmp_path / "source"
    tiny("gpt2", vocab_size=4096).save_pretrained(folder)
    home = source_folder(load_tokenizer("demo").name_or_path)
    for path in home.glob("token*"):
        shutil.copy(path, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    # As transformers 4 wrote it, and in a form that it would never write.
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=7))
    for name in ("tokenizer.model", "LICENSE", "Notice.txt", "USE_POLICY.md", "vocab.json"):
        (folder / name).write_bytes(b"\x00\xff of " + name.encode())
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ documents }}")
    (folder / "generation_config.json").write_text(
        '{"do_sample": true, "temperature": 0.0, "eos_token_id": [1, 2], "top_p": 7}'
    )
    for name in ("README.md", "pytorch_model.bin", "training_args.bin", "data.parquet"):
        (folder / name).write_bytes(b"not ours")
    return folder


KEPT = [
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "LICENSE", "Notice.txt",
    "USE_POLICY.md", "vocab.json", "additional_chat_templates/rag.jinja", "generation_config.json",
]  # fmt: skip


def companions_of(folder):
    return {name: (folder / name).read_bytes() for name in KEPT}


@pytest.mark.slow
def test_companions_are_copied_byte_for_byte_through_every_command(source, tmp_path, run):
    wanted = companions_of(source)
    text = tmp_path / "text.txt"
    text.write_text("def area(width, height):\n    return width * height\n" * 60)
    chain = [
        (
            "compress",
            source,
            tmp_path / "a",
            "--small",
            "2x2",
            "--init",
            "van-loan",
            "--layout",
            "small-outer",
        ),
        (
            *("heal", tmp_path / "a", tmp_path / "b", "--data", text, "--tokens", "256"),
            *("--batch-tokens", "64", "--window", "16", "--dtype", "float32"),
        ),
        ("export", tmp_path / "b", tmp_path / "c", "--to", "self-contained"),
        ("export", tmp_path / "b", tmp_path / "d"),
        ("compress", tmp_path / "d", tmp_path / "e", "--budget", "0.5", "--windows", "2"),
    ]
    for command in chain:
        code, _, err = run(*command)
        assert code == 0, err
        assert companions_of(command[2]) == wanted
        foreign = ("README.md", "pytorch_model.bin", "training_args.bin", "data.parquet")
        assert not any((command[2] / name).exists() for name in foreign)


def test_a_tokenizer_that_was_changed_is_written_as_it_is(source, tmp_path):
    model, tokenizer = load_model(source), load_tokenizer(source)
    tokenizer("one", truncation=True, max_length=2)  # leaves a trace in it, and changes nothing
    save_model(model, tmp_path / "same", tokenizer)
    assert companions_of(tmp_path / "same") == companions_of(source)
    tokenizer.add_tokens(["<new>"])
    save_model(model, tmp_path / "other", tokenizer)
    assert "<new>" in load_tokenizer(tmp_path / "other").get_vocab()
    assert not (tmp_path / "other" / "tokenizer.model").exists()  # would say something else
    assert (tmp_path / "other" / "LICENSE").exists()


def test_changed_generation_settings_are_written_valid_or_not(source, tmp_path):
    model = load_model(source)
    model.generation_config.repetition_penalty = 1.5
    save_model(model, tmp_path / "copy")
    written = json.loads((tmp_path / "copy" / "generation_config.json").read_text())
    assert written["repetition_penalty"] == 1.5
    assert written["temperature"] == 0.0


SETTINGS = [
    {"repetition_penalty": 1.3, "suppress_tokens": [5, 6, 7]},
    {"do_sample": True, "temperature": 0.0},
    {"do_sample": False, "temperature": 0.3, "top_p": 0.1, "top_k": 1},
    {"num_beams": 4, "no_repeat_ngram_size": 1},
    {"eos_token_id": [1, 2, 3], "min_new_tokens": 40, "forced_eos_token_id": 1},
    {"max_length": 3, "max_new_tokens": 2, "bad_words_ids": [[4]]},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_model_writes_its_own_text_whatever_its_generation_settings_say(settings):
    model = tiny("llama")
    plain = sample(model, 3, 32, 0)
    assert plain.shape == (3, 32)
    model.generation_config.update(**settings)
    assert sample(model, 3, 32, 0).equal(plain)
    assert model.generation_config.to_dict().items() >= settings.items()  # left as they were


@pytest.mark.slow
def test_samples_have_the_models_own_frequencies():
    """Of an untrained head that prefers the end of text: it comes as often as the model says."""
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    tokens = sample(model, 16, 64, 0)[:, 1:]
    share = float((tokens == model.config.eos_token_id).float().mean())
    assert share == pytest.approx(1 / 96, abs=4 * (1 / 96 / tokens.numel()) ** 0.5)


def test_generation_settings_that_are_invalid_end_no_generation(source):
    model, tokenizer = load_model(source), load_tokenizer(source)
    assert generate(model, tokenizer, "def", 4) == generate(model, tokenizer, "def", 4)
    assert generate(model, tokenizer, "def", 4, temperature=0.5)


def test_a_tokenizer_has_a_class_that_version_4_knows(tmp_path):
    tokenizer = load_tokenizer("demo")
    tokenizer.save_pretrained(tmp_path / "source")
    path = tmp_path / "source" / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "TokenizersBackend", "note": "ö"}
    path.write_text(json.dumps(config, ensure_ascii=False, indent=1))
    source = hf.AutoTokenizer.from_pretrained(tmp_path / "source")
    krony.save(llama(), tmp_path / "made", source)
    made = (tmp_path / "made" / "tokenizer_config.json").read_text(encoding="utf-8")
    assert made == path.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    again = load_tokenizer(tmp_path / "made")
    assert again("a word")["input_ids"] == tokenizer("a word")["input_ids"]


def test_who_may_read_the_configuration_may_read_the_weights(tmp_path):
    save_model(tiny("llama"), tmp_path / "small", max_shard_size="20KB")
    modes = {path.suffix: path.stat().st_mode for path in (tmp_path / "small").iterdir()}
    assert len(list((tmp_path / "small").glob("*.safetensors"))) > 1
    assert modes[".safetensors"] == modes[".json"]
