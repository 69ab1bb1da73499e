"""The side on which small factors stand is that of less harm."""

import torch
import transformers

import krony
from krony.compression import calibrate
from krony.compression.layout import choose_layouts


def tiny() -> transformers.PreTrainedModel:
    transformers.set_seed(0)
    config = transformers.GPT2Config(
        vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0,
        eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def test_each_matrix_gets_the_order_that_it_was_made_in():
    model = tiny()
    generator = torch.Generator().manual_seed(1)
    made = {}
    with torch.no_grad():
        for number, matrix in enumerate(krony.make_plan(model, small=(2, 2)).matrices):
            (factors,) = matrix.groups
            large = torch.randn(factors.large, generator=generator)
            small = torch.randn(factors.small, generator=generator)
            first = number % 2 == 0
            made[matrix.name] = "large-outer" if first else "small-outer"
            weight = torch.kron(large, small) if first else torch.kron(small, large)
            model.get_submodule(matrix.name).weight.copy_(weight.T)
    windows = torch.randint(0, 50, (8, 32), generator=generator)
    moments = calibrate.calibrate(model, windows, list(made))
    for planned in ("small-outer", "large-outer"):
        plan = krony.make_plan(model, small=(2, 2), layout=planned)
        found = choose_layouts(model, plan, moments)
        assert {m.name: m.groups[0].layout for m in found.matrices} == made
        assert found.parameters == plan.parameters


def test_low_rank_and_matrices_without_moments_stay_as_they_are():
    model = tiny()
    plan = krony.make_plan(model, small=(2, 2), layout="large-outer")
    assert choose_layouts(model, plan, {}) == plan
    low_rank = krony.make_plan(model, shape=(64, 1), terms=4, target="*.mlp.c_fc")
    windows = torch.randint(0, 50, (4, 32), generator=torch.Generator().manual_seed(1))
    moments = calibrate.calibrate(model, windows, [m.name for m in low_rank.matrices])
    assert choose_layouts(model, low_rank, moments) == low_rank
