"""Tokens: BOS as the tokenizer has it, everywhere; text is text; no token without a row."""

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors

import krony
from helpers import tiny
from krony import KronyError
from krony.compression.calibrate import calibration_windows
from krony.measure import evaluate
from krony.text import data, tokens
from krony.text.blocks import load_blocks

WORDS = " ".join(f"w{(i * i + 7 * i) % 90}" for i in range(600))


def words(bos: bool) -> hf.PreTrainedTokenizerFast:
    """96 words; with `bos`, <s> stands in front of every text."""
    vocabulary = {"<s>": 0, "</s>": 1, "<unk>": 2, **{f"w{i}": i + 3 for i in range(93)}}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 0)]
        )
    return hf.PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def text(tmp_path):
    (tmp_path / "t.txt").write_text(WORDS)
    return str(tmp_path / "t.txt")


@pytest.mark.parametrize(
    ("bos", "policy", "wanted"),
    [
        (True, "auto", 0),
        (True, "never", None),
        (False, "auto", None),
        (False, "always", 0),
    ],
)
def test_every_window_begins_as_the_tokenizer_or_the_flag_says(text, bos, policy, wanted):
    tokenizer, model = words(bos), tiny("llama")
    assert tokens.bos_of(tokenizer, policy) == wanted
    ids = evaluate.tokenize(tokenizer, data.load_text(text), policy)
    windows = calibration_windows(text, model, tokenizer, 4, 32, bos=policy)
    blocks = load_blocks([text], tokenizer, 32, bos=policy)["input_ids"]
    first = {int(ids[0]), *windows[:, 0].tolist(), *(row[0] for row in blocks)}
    assert (first == {0}) == (wanted is not None)
    assert windows.shape == (4, 32)
    assert all(len(row) == 32 for row in blocks)
    # Nothing of the text is lost to it, or doubled.
    plain = tokenizer(WORDS, add_special_tokens=False)["input_ids"]
    assert ids.tolist() == [0] * (wanted is not None) + plain
    assert windows[0].tolist() == ids[:32].tolist()


def test_a_word_that_is_no_policy_and_a_bos_that_is_not_there():
    with pytest.raises(KronyError, match="--bos 'maybe' can't be; give auto, always, never"):
        tokens.bos_of(words(True), "maybe")
    bare = words(False)
    bare.bos_token = None
    assert tokens.bos_of(bare) is None
    with pytest.raises(KronyError, match="no token that begins a text"):
        tokens.bos_of(bare, "always")


@pytest.mark.parametrize(("window", "stride"), [(16, None), (16, 8), (64, None)])
def test_perplexity_with_bos_predicts_every_token(text, window, stride):
    """Against a plain loop: windows of text, each behind BOS, every token predicted once."""
    model, tokenizer = tiny("llama"), words(True)
    ids = evaluate.tokenize(tokenizer, data.load_text(text))
    found = evaluate.perplexity(model, ids, None, window, stride, bos=0)
    plain, losses, start = ids[1:], [], 0
    size, step = window - 1, stride or window - 1
    while True:
        piece = plain[start : start + size]
        row = torch.cat([torch.tensor([0]), piece])[None]
        with torch.inference_mode():
            logits = model(input_ids=row).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, piece, reduction="none")
        losses += loss[len(losses) - start :].tolist()
        if start + size >= len(plain):
            break
        start += step
    assert found.predicted == len(plain) == len(losses)
    assert found.nats == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found.protocol.endswith("with BOS")
    assert found.window == window


def test_control_tokens_in_a_text_are_text_and_lines_of_end_of_text_are_not():
    tokenizer = krony.load_tokenizer("demo")
    end = tokenizer.eos_token
    inside = tokens.encode_text(tokenizer, f"say {end} here")
    assert tokenizer.eos_token_id not in inside
    assert tokenizer.decode(inside) == f"say {end} here"
    ids = tokens.encode_text(tokenizer, f"one\n{end}\ntwo")
    one, two = tokens.encode(tokenizer, ["one", "two"])
    assert ids == [*one, tokenizer.eos_token_id, *two]


def test_a_token_beyond_the_embedding_is_named_everywhere(tmp_path):
    tokenizer, model = words(False), tiny("llama")
    tokenizer.add_tokens(["<x>"])  # 96, and the embedding has rows 0 to 95
    (tmp_path / "x.txt").write_text(WORDS + " <x> " + WORDS)
    name = str(tmp_path / "x.txt")
    said = r"has the token 96.*embedding has 96 rows"
    ids = evaluate.tokenize(tokenizer, data.load_text(name))
    with pytest.raises(KronyError, match=said):
        evaluate.perplexity(model, ids, window=32)
    with pytest.raises(KronyError, match=said):
        calibration_windows(name, model, tokenizer, 99, 32)
    with pytest.raises(KronyError, match=said):
        load_blocks([name], tokenizer, 32, vocabulary=96)
    with pytest.raises(KronyError, match=said):
        evaluate.generate(model, tokenizer, "w1 <x>")
    with pytest.raises(KronyError, match=said):
        evaluate.last_word(model, tokenizer, ["w1 w2 <x>"], "passages")


def test_what_a_model_was_made_on_is_said_where_it_is_measured(text):
    tokenizer, model = words(False), tiny("llama")
    windows = calibration_windows(text, model, tokenizer, 8, 32)
    plan = krony.make_plan(model, small=(2, 2))
    krony.compress(model, plan, init="data", calibration=windows)
    (record,) = model.config.quantization_config.provenance["texts"]
    assert (record["use"], len(record["sha256"])) == ("calibration", 64)
    read = data.load_text(text)
    ids = evaluate.tokenize(tokenizer, read)
    with pytest.warns(UserWarning, match="is the text of the calibration of this model"):
        assert evaluate.perplexity(model, ids, read, 32).seen == "calibration"
    other = data.Text("other", WORDS[:-2], "elsewhere", "0" * 64)
    assert evaluate.perplexity(model, ids, other, 32).seen is None
