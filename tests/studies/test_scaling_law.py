from __future__ import annotations

import numpy as np
import pytest

from configs.errors import InputError
from engine.modernbert.config import parameter_count, resolve_architecture
from studies.scaling_law import fit, frontier
from studies.sizes import count, model_shape

NAMES = ("parameters", "tokens")
SIZES, TOKENS = (17e6, 32e6, 68e6, 150e6, 400e6), (1e8, 3e8, 1e9, 3e9, 1e10)
PLANTED = (0.34, 0.28)
GRID = np.array([(size, tokens) for size in SIZES for tokens in TOKENS])


def curve(seed: int, noise: float = 0.005) -> np.ndarray:
    """Losses by the law of Hoffmann et al. 2022, with noise of half a per cent."""
    exact = 1.69 + 406.4 * GRID[:, 0] ** -PLANTED[0] + 410.7 * GRID[:, 1] ** -PLANTED[1]
    return exact * np.exp(noise * np.random.default_rng(seed).normal(size=len(GRID)))


def test_planted_exponents_lie_in_their_intervals() -> None:
    """Each of the two exponents, in 90 or more of 100 draws."""
    covered = np.zeros(2, int)
    for seed in range(100):
        law = fit(NAMES, GRID, curve(seed), draws=100, seed=seed)
        covered += [e.low <= planted <= e.high for e, planted in zip(law.exponents, PLANTED, strict=True)]
    assert (covered >= 90).all(), covered


def test_exact_curves_are_found_exactly() -> None:
    law = fit(NAMES, GRID, curve(0, noise=0.0), draws=20)
    assert [e.mean for e in law.exponents] == pytest.approx(PLANTED, rel=1e-4)
    assert law.irreducible.mean == pytest.approx(1.69, rel=1e-4)
    assert max(map(abs, law.residuals)) < 1e-6
    assert law.predict(1e9, 1e12) == pytest.approx(1.69 + 406.4 * 1e9**-0.34 + 410.7 * 1e12**-0.28, rel=1e-4)


def test_one_quantity_and_its_noise() -> None:
    x = np.geomspace(1e7, 1e9, 9)[:, None]
    loss = (2 + 300 * x[:, 0] ** -0.4) * np.exp(0.002 * np.random.default_rng(3).normal(size=9))
    law = fit(["parameters"], x, loss, draws=100)
    assert law.exponents[0].low < 0.4 < law.exponents[0].high
    assert not law.inside(1e10)
    assert law.inside(1e8)


def test_the_frontier_is_the_best_division_of_compute() -> None:
    law = fit(NAMES, GRID, curve(1), draws=20)
    for best in frontier(law, [1e18, 1e22]):
        assert 6 * best.parameters * best.tokens == pytest.approx(best.flops)
        for factor in (0.9, 1.1):
            assert law.predict(best.parameters * factor, best.tokens / factor) > best.loss
    assert [best.extrapolated for best in frontier(law, [1e18, 1e22])] == [False, True]


def test_too_few_points_are_refused() -> None:
    with pytest.raises(InputError, match=r"7 .* 5") as error:
        fit(NAMES, GRID[:5], np.ones(5))
    assert error.value.code == "too-few-points"


def test_losses_that_rise_are_refused() -> None:
    with pytest.raises(InputError) as error:
        fit(NAMES, GRID, 2 + 0.01 * np.log(GRID.prod(1)), draws=2)
    assert error.value.code == "no-power-law"


@pytest.mark.parametrize("name", ["17M", "32M", "68M", "150M", "400M", "1B"])
def test_sizes_suit_fp8(name: str) -> None:
    from configs.schema import Model
    from configs.units import parse_count
    from datapipe.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("package://tokenizer/modernbert")
    wanted = parse_count(name)
    shape = model_shape(wanted, tokenizer.vocab_size)
    assert shape["hidden_size"] % 16 == shape["intermediate_size"] % 16 == 0, "FP8"
    assert shape["hidden_size"] == 64 * shape["num_attention_heads"]
    architecture = resolve_architecture(Model(**shape), tokenizer)
    assert parameter_count(architecture) == count(shape, tokenizer.vocab_size) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize(
    ("count_", "shape"),
    [("17M", (256, 7, 4)), ("150M", (768, 22, 12)), ("400M", (1024, 28, 16)), ("1B", (1792, 28, 28))],
)
def test_sizes_of_the_family_have_its_shapes(count_: str, shape: tuple[int, ...]) -> None:
    from configs.units import parse_count

    found = model_shape(parse_count(count_), 50_368)
    assert (found["hidden_size"], found["num_hidden_layers"], found["num_attention_heads"]) == shape


def test_a_size_the_vocabulary_does_not_allow_is_refused() -> None:
    with pytest.raises(InputError, match="50,368") as error:
        model_shape(1_000_000, 50_368)
    assert error.value.key == "parameters"
