"""Healing: it learns, it resumes to the same numbers, it stops cleanly, it never loses work."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import krony
from helpers import logits, scaled_logits, tiny
from krony.errors import KronyError
from krony.healing import losses
from krony.healing.heal import HealConfig, heal
from krony.healing.losses import PARTS
from krony.healing.objective import Objective, returning_loss
from krony.healing.optimizers import parameter_groups
from krony.healing.recipe import RECIPES, Recipe
from krony.healing.training import COMPLETE, HealTrainer, Stopped, last_checkpoint
from krony.hf.families import blocks, find_targets
from krony.hf.plan import matrix_plan
from krony.hf.replay import captured
from krony.text.blocks import from_ids

WINDOW = 16
CONFIG = HealConfig(
    tokens=WINDOW * 4 * 12, batch_tokens=WINDOW * 4, dtype="float32", eval_every=128
)


def small(family="gpt2", **changes):
    """A factored model and its teacher, the dense one."""
    # Weights large enough that the teacher's predictions differ from chance.
    changes = {"initializer_range": 0.2, "init_std": 0.2, **changes}
    model, teacher = tiny(family, **changes), tiny(family, **changes)
    krony.compress(model, krony.make_plan(model, small=(2, 2)), init="van-loan")
    return model, teacher


def text(count=64, seed=0):
    """Blocks with something to learn: each token follows from the one before."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randint(0, 90, (count, 1), generator=generator)
    return from_ids((start + 7 * torch.arange(WINDOW)) % 90)


def train(model, config, run, teacher=None, **options):
    return heal(
        model, text(), config, run=run, evaluation=text(5, seed=1), teacher=teacher, **options
    )


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(first, second):
    return all(torch.equal(a, second[name]) for name, a in first.items())


@pytest.mark.slow
def test_a_compiled_model_learns_the_same(tmp_path, monkeypatch):
    plain, compiled, (wanted, teacher) = [], [], small()
    model, _ = small()
    compile_with, calls = torch.compile, []

    def traced(model, **options):
        calls.append(options["backend"])
        # The graphs of the forward and the backward pass, without a minute of code generation.
        return compile_with(model, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", traced)
    for one, settings, points in ((wanted, {}, plain), (model, {"compile": True}, compiled)):
        record = train(one, replace(CONFIG, **settings), tmp_path / str(settings), teacher)
        points += [point["held_out"] for point in record.curve]
    assert calls == ["inductor"]
    assert len(plain) > 1
    assert compiled == pytest.approx(plain, rel=1e-4)
    assert not any("_orig_mod" in name for name in model.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "dtype"),
    [
        ("ce", "float32"),
        ("kl", "float32"),
        ("features", "float32"),
        ("ce+kl+features", "float32"),
        ("kl+features", "bfloat16"),
    ],
)
def test_it_learns_and_saves_what_it_learned(loss, dtype, tmp_path):
    model, teacher = small()
    before = logits(teacher)
    config = replace(CONFIG, loss=loss, dtype=dtype, learning_rate=1e-2)
    if loss == "ce":
        teacher = None
    record = train(model, config, tmp_path / "run", teacher)
    trained = [point["training"] for point in record.curve if "training" in point]
    assert trained[-1] < trained[0]
    assert record.best == min(point["held_out"] for point in record.curve)
    assert record.curve[-1]["tokens"] == config.tokens
    assert record.settings["loss"] == loss
    if teacher is not None:
        assert torch.equal(logits(teacher), before)
    assert "forward" not in model.__dict__
    assert all(p.requires_grad for p in model.parameters())
    saved = krony.save_model(model, tmp_path / "saved")
    assert torch.equal(logits(krony.load_model(saved)), logits(model))


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt"])
def test_the_loss_is_that_of_the_model(family):
    model, teacher = small(family)
    ids = torch.arange(24).reshape(2, 12) % 90
    wanted = model(input_ids=ids, labels=ids).loss
    objective = Objective(model, ("ce",))
    with returning_loss(model, objective):
        torch.testing.assert_close(model(input_ids=ids)["loss"], wanted, rtol=1e-5, atol=1e-6)
    both = Objective(model, ("ce", "kl"), teacher)
    model.train()
    with returning_loss(model, both):
        found = model(input_ids=ids)["loss"]
    p, q = (m(input_ids=ids).logits[:, :-1].log_softmax(-1) for m in (teacher, model.eval()))
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    torch.testing.assert_close(found, wanted + divergence, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "opt"])
def test_features_are_the_hidden_states_after_every_block(family):
    model, teacher = small(family)
    ids = torch.arange(24).reshape(2, 12) % 90
    objective = Objective(model.train(), ("features",), teacher)
    with returning_loss(model, objective):
        found = model(input_ids=ids)["loss"]
    states = []
    for m in (model.eval(), teacher):
        layers = [block for _, _, block in blocks(m)]
        with captured(dict(enumerate(layers)), outputs=True) as seen:
            hidden = m(input_ids=ids, output_hidden_states=True).hidden_states
        # All but the last, which comes after the last norm, are in what transformers returns.
        for i in range(len(layers) - 1):
            torch.testing.assert_close(seen[i], hidden[i + 1])
        states.append([seen[i] for i in range(len(layers))])
    errors = [
        (f - w).square().sum() / (w - w.mean((0, 1))).square().sum()
        for f, w in zip(*states, strict=True)
    ]
    wanted = losses.FEATURE_WEIGHT * torch.stack(errors).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_models_that_scale_their_logits_go_the_long_way():
    model = scaled_logits()
    ids = torch.arange(24).reshape(2, 12) % 90
    wanted = model(input_ids=ids, labels=ids).loss
    with returning_loss(model, Objective(model, ("ce",))):
        torch.testing.assert_close(model(input_ids=ids)["loss"], wanted, rtol=1e-5, atol=1e-6)


def test_dropout_is_off_while_healing_and_back_afterwards():
    model, _ = small(resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    rates = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    ids = torch.arange(12)[None]
    model.train()
    with returning_loss(model, Objective(model, ("ce",))):
        first, second = (model(input_ids=ids)["loss"] for _ in range(2))
    assert torch.equal(first, second)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == rates
    assert max(rates) == 0.5


def test_accumulation_does_not_change_the_run(tmp_path):
    first, _ = small()
    second, _ = small()
    one = train(first, CONFIG, tmp_path / "one")
    few = HealConfig(**{**CONFIG.__dict__, "micro_tokens": WINDOW})
    two = train(second, few, tmp_path / "two")
    for a, b in zip(one.curve, two.curve, strict=True):
        assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-4)


@pytest.mark.parametrize("loss", ["kl", pytest.param("ce", marks=pytest.mark.slow)])
def test_gradient_checkpointing_does_not_change_the_run(loss, tmp_path):
    (first, teacher), (second, _) = small(), small()
    config = {**CONFIG.__dict__, "loss": loss}
    one = train(first, HealConfig(**config), tmp_path / "one", teacher)
    less = HealConfig(**{**config, "gradient_checkpointing": True})
    two = train(second, less, tmp_path / "two", teacher)
    for a, b in zip(one.curve, two.curve, strict=True):
        assert a["held_out"] == pytest.approx(b["held_out"], rel=1e-4)


class _Killed(BaseException):
    pass


@pytest.mark.slow
@pytest.mark.parametrize(
    ("when", "dtype"),
    [
        ("after the checkpoint", "float32"),
        ("while it is written", "float32"),
        ("after the checkpoint", "bfloat16"),  # with Muon
    ],
)
def test_a_killed_run_resumes_to_the_same_numbers(when, dtype, tmp_path, monkeypatch):
    config = replace(CONFIG, save_minutes=0.0, dtype=dtype)  # a checkpoint every step
    whole, _ = small()
    wanted = train(whole, config, tmp_path / "whole")

    model, _ = small()
    complete = HealTrainer._save_checkpoint

    def kill(self, *arguments):
        if self.state.global_step == 7 and when == "while it is written":
            self.save_model(f"{self.args.output_dir}/checkpoint-7")
            raise _Killed
        complete(self, *arguments)
        if self.state.global_step == 7:
            raise _Killed

    with monkeypatch.context() as patched:
        patched.setattr(HealTrainer, "_save_checkpoint", kill)
        with pytest.raises(_Killed):
            train(model, config, tmp_path / "run")
    stage = tmp_path / "run" / "stage-0"
    left = last_checkpoint(stage)
    assert left is not None
    assert left.name == ("checkpoint-6" if when == "while it is written" else "checkpoint-7")
    assert (stage / "checkpoint-7").is_dir()

    with pytest.raises(KronyError, match="has an unfinished run; continue it with --resume"):
        train(small()[0], config, tmp_path / "run")
    again, _ = small()
    found = train(again, config, tmp_path / "run", resume=True)
    assert found.curve == wanted.curve
    assert found.best == wanted.best
    assert same(weights(again), weights(whole))
    kept = sorted(stage.glob("checkpoint-*"))
    assert len(kept) == 2
    assert all((folder / COMPLETE).exists() for folder in kept)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_after_the_step_and_the_run_goes_on(number, tmp_path):
    whole, _ = small()
    wanted = train(whole, CONFIG, tmp_path / "whole")
    model, _ = small()
    before = signal.getsignal(number)

    def send(what, step, steps):
        if step == 5 and not sent:
            sent.append(step)
            os.kill(os.getpid(), number)

    sent: list[int] = []
    with pytest.raises(Stopped, match=r"after step [56] of 12; .* go on with --resume") as stop:
        train(model, CONFIG, tmp_path / "run", progress=send)
    assert stop.value.exit_code == 128 + number
    assert signal.getsignal(number) is before
    again, _ = small()
    assert train(again, CONFIG, tmp_path / "run", resume=True).curve == wanted.curve
    assert same(weights(again), weights(whole))


def test_nan_stops_before_the_weights_take_it_up(tmp_path, monkeypatch):
    model, _ = small()
    config = HealConfig(**{**CONFIG.__dict__, "save_minutes": 0.0})
    step = HealTrainer.training_step

    def poisoned(self, *arguments, **options):
        loss = step(self, *arguments, **options)
        if self.state.global_step == 4:
            next(iter(self.model.parameters())).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr(HealTrainer, "training_step", poisoned)
    with pytest.raises(KronyError, match=r"became nan at step 5.*the last good .*checkpoint-4"):
        train(model, config, tmp_path / "run")
    good = krony.load_model(tmp_path / "run" / "stage-0" / "checkpoint-4")
    assert same(weights(good), weights(model))
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_best_weights_are_kept_not_the_last(tmp_path):
    model, _ = small()
    # Far too fast: the loss rises after some steps.
    config = HealConfig(**{**CONFIG.__dict__, "learning_rate": 1.0})
    record = train(model, config, tmp_path / "run")
    assert record.best < record.curve[-1]["held_out"]
    with returning_loss(model, Objective(model, ("ce",))), torch.no_grad():
        ids = torch.tensor(text(5, seed=1)["input_ids"])
        assert model(input_ids=ids)["loss"].item() == pytest.approx(record.best, rel=1e-5)


def test_settings_of_a_resumed_run_must_be_the_same(tmp_path):
    train(small()[0], CONFIG, tmp_path / "run")
    other = HealConfig(**{**CONFIG.__dict__, "seed": 3})
    with pytest.raises(KronyError, match="had seed = 0, not 3"):
        train(small()[0], other, tmp_path / "run", resume=True)


def test_freeze_dense_trains_the_factors_only(tmp_path):
    model, _ = small()
    before = weights(model)
    config = HealConfig(**{**CONFIG.__dict__, "freeze": "dense", "learning_rate": 1e-2})
    train(model, config, tmp_path / "run")
    changed = {
        name for name, value in weights(model).items() if not torch.equal(value, before[name])
    }
    assert changed
    assert all(".mlp." in name for name in changed)
    assert any(name.endswith("small") for name in changed)
    with pytest.raises(KronyError, match="no factored layer"):
        train(tiny("gpt2"), config, tmp_path / "other")


def test_lora_trains_adapters_and_leaves_none(tmp_path):
    model, _ = small()
    before = weights(model)
    config = HealConfig(**{**CONFIG.__dict__, "recipe": "lora", "learning_rate": 1e-2})
    record = train(model, config, tmp_path / "run")
    assert record.best < record.curve[0]["held_out"]
    after = weights(model)
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed
    assert all(name.endswith("large.weight") for name in changed)
    assert len(changed) == 4
    saved = krony.save_model(model, tmp_path / "saved")
    assert torch.equal(logits(krony.load_model(saved)), logits(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*calibration tokens are few", "ignore:fan_in_fan_out")
@pytest.mark.parametrize("changes", [{}, {"freeze": "dense"}, {"recipe": "lora"}])
def test_a_model_that_only_lost_hidden_units_heals(changes, tmp_path):
    model = tiny("gpt2")
    fewer = [matrix_plan(t.narrowed(64), ()) for t in find_targets(model, "mlp")]
    windows = torch.stack([row["input_ids"] for row in text(16).with_format("torch")])
    krony.compress(model, krony.Plan(tuple(fewer)), init="data", calibration=windows)
    before = weights(model)
    config = HealConfig(**{**CONFIG.__dict__, "learning_rate": 1e-2, **changes})
    record = train(model, config, tmp_path / "run")
    assert record.best < record.curve[0]["held_out"]
    changed = {n for n, value in weights(model).items() if not torch.equal(value, before[n])}
    matrices = {f"{m.name}.weight" for m in fewer}
    assert changed >= matrices
    if changes:
        assert changed <= matrices | {f"{m.name}.bias" for m in fewer}
    saved = krony.save_model(model, tmp_path / "saved")
    assert torch.equal(logits(krony.load_model(saved)), logits(model))


@pytest.mark.slow
def test_the_paper_recipe_has_two_stages(tmp_path):
    recipe = RECIPES["krony-pt"](768, 10**9)
    assert [s.batch_tokens for s in recipe.stages] == [122_880, 327_680]
    assert [s.learning_rate for s in recipe.stages] == [6e-5, 6e-6]
    model, _ = small()
    config = HealConfig(tokens=CONFIG.tokens, recipe="krony-pt", batch_tokens=WINDOW * 4)
    record = train(model, config, tmp_path / "run")
    assert record.curve[-1]["tokens"] == CONFIG.tokens
    tokens = [point["tokens"] for point in record.curve]
    assert tokens == sorted(tokens)
    assert (tmp_path / "run" / "stage-1").is_dir()


@pytest.mark.parametrize(
    ("recipe", "middle", "last"), [("default", 0.5, 0.0), ("krony-pt", 0.55, 0.1)]
)
def test_learning_rates_fall_on_a_line_or_a_cosine(recipe, middle, last, tmp_path, monkeypatch):
    steps, logs = 100, []
    stage = RECIPES[recipe](32, CONFIG.tokens).stages[0]
    stage = replace(stage, learning_rate=1.0, warmup=0, share=1.0)
    monkeypatch.setitem(RECIPES, recipe, lambda *_: Recipe((stage,)))
    monkeypatch.setattr(krony.healing.curves, "points", lambda log, *_: logs.extend(log) or [])
    tokens = WINDOW * steps
    config = replace(CONFIG, recipe=recipe, tokens=tokens, batch_tokens=WINDOW, eval_every=tokens)
    train(small()[0], config, tmp_path / "run")
    rates = [entry["learning_rate"] for entry in logs if "learning_rate" in entry]
    assert len(rates) == steps
    assert rates[0] == pytest.approx(1, abs=0.02)
    assert rates[50] == pytest.approx(middle, abs=0.02)
    assert rates[-1] == pytest.approx(last, abs=0.02)
    # The line falls evenly, the cosine less at its beginning.
    fallen = (rates[0] - rates[25]) / (rates[0] - rates[50])
    assert fallen == pytest.approx(0.5 if recipe == "default" else 0.29, abs=0.02)


def test_groups_of_parameters(gpt2):
    krony.compress(gpt2, krony.make_plan(gpt2, small=(2, 2)), init="van-loan")
    recipe = krony.recipe.Recipe(stages=(), factors=3.0, decay=0.1)
    matrices, groups = parameter_groups(gpt2, recipe, 1e-3)
    assert not matrices
    assert sum(len(g["params"]) for g in groups) == len(list(gpt2.parameters()))
    rates = {(round(g["lr"], 6), g["weight_decay"]) for g in groups}
    assert rates == {(1e-3, 0.1), (1e-3, 0.0), (3e-3, 0.1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "magic"}, "no recipe 'magic'; there are default, krony-pt, lora"),
        ({"loss": "mse"}, "no loss 'mse'"),
        ({"loss": "kl"}, "the loss kl needs a teacher"),
        ({"reconstruct": 3}, "reconstruction needs a teacher"),
        ({"dtype": "float16"}, "no autocast to 'float16'; give bfloat16 or float32"),
        ({"tokens": 0}, "0 tokens of training can't be"),
        ({"batch_tokens": 10**6}, "makes 64 blocks, fewer than the 62500 of one step"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_left(changes, message, tmp_path):
    config = HealConfig(**{**CONFIG.__dict__, **changes})
    with pytest.raises(KronyError, match=message):
        train(small()[0], config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_features_need_the_same_blocks(tmp_path):
    model, teacher = small()
    config = replace(CONFIG, loss="kl+features")
    deeper = tiny("gpt2", n_layer=len(blocks(teacher)) + 1)
    with pytest.raises(KronyError, match=r"teacher has . blocks of width .* use the loss kl"):
        train(model, config, tmp_path / "run", deeper)
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_another_vocabulary_is_refused(tmp_path):
    model, _ = small()
    with pytest.raises(KronyError, match="vocabulary of 50 tokens and the model one of 96"):
        train(model, CONFIG, tmp_path / "run", tiny("gpt2", vocab_size=50))


def test_every_part_of_the_loss_is_documented():
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text()
    for name in (*PARTS, *RECIPES):
        assert f"`{name}`" in guide, name


def test_reconstruction_comes_first(tmp_path):
    model, teacher = small()
    plain = train(small()[0], CONFIG, tmp_path / "plain", teacher)
    config = HealConfig(**{**CONFIG.__dict__, "reconstruct": 15})
    record = train(model, config, tmp_path / "run", teacher)
    assert len(record.reconstruction) == 2
    assert all(after < before for before, after in record.reconstruction.values())
    assert record.curve[0] != plain.curve[0]
    with pytest.raises(KronyError, match="reconstruction needs a teacher"):
        train(small()[0], config, tmp_path / "other")
