"""Linear layers by another library: the same products and gradients, and only where nothing else is meant."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from families import tiny
from mnemoscope.interventions import SteeringVector
from mnemoscope.models import core_of, products, quick_products
from mnemoscope.models.products import LEAST

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="torch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes of the products that oneDNN made, on any processor and of any size."""
    shapes: list[tuple[int, ...]] = []
    plain = products._product

    def product(states: Tensor, weight_ED: Tensor, bias_E: Tensor | None = None) -> Tensor:
        shapes.append((*states.shape, len(weight_ED)))
        return plain(states, weight_ED, bias_E)

    monkeypatch.setattr(products, "_product", product)
    monkeypatch.setattr(products, "_is_quicker", lambda: True)
    monkeypatch.setattr(products, "LEAST", 0)
    return shapes


class Turned(Conv1D):
    """GPT-2's layer, which takes no part of a tensor itself."""

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = super().forward(x.contiguous())
        return found


LAYERS = {
    "biased": lambda: nn.Linear(48, 80),
    "without a bias": lambda: nn.Linear(48, 80, bias=False),
    "weight turned": lambda: Turned(80, 48),
}


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("whole", [True, False], ids=["in one piece", "a part of a tensor"])
def test_products_and_gradients_are_those_of_float64(kind: str, whole: bool, used: list[tuple[int, ...]]) -> None:
    torch.manual_seed(0)
    layer = LAYERS[kind]().requires_grad_(False)
    states = torch.randn(3, 7, 48)[:, 0 if whole else 2 :].requires_grad_()
    towards = torch.randn(*states.shape[:2], 80)
    with quick_products():
        found = layer(states)
        (gradient,) = torch.autograd.grad(found, states, towards)
        with torch.no_grad():
            assert torch.equal(layer(states), found)
            assert layer(states[:0]).shape == (0, states.shape[1], 80)
    assert len(used) == 4
    double, exact = states.detach().double().requires_grad_(), layer.double()
    wanted = exact(double)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient.double(), torch.autograd.grad(wanted, double, towards.double())[0], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_what_is_trained_or_of_another_precision_is_left_to_torch(
    kind: Callable[[int, int], nn.Module], used: list[tuple[int, ...]]
) -> None:
    layer, states = kind(16, 16), torch.randn(4, 16)
    plain = layer(states)
    with quick_products():
        assert torch.equal(layer(states), plain)
        layer(states).sum().backward()
        assert layer.weight.grad is not None
        assert used == []
        with torch.no_grad():
            assert layer(states).shape == plain.shape
        assert used.pop() == (4, 16, 16)
        layer.requires_grad_(False)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(states).dtype == torch.bfloat16
        layer.double()(states.double())
        layer.bfloat16()(states.bfloat16())
    assert used == []


@pytest.mark.parametrize(("width", "calls"), [(64, 0), (128, 2)])
def test_the_library_does_not_depend_on_the_number_of_rows(
    width: int, calls: int, used: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "LEAST", LEAST)
    layer, states = Conv1D(width, width).requires_grad_(False), torch.randn(300, width)
    with quick_products():
        torch.testing.assert_close(layer(states[:2]), layer(states)[:2])
    assert len(used) == calls


def test_what_is_no_layer_and_what_other_threads_do_is_left_to_torch(used: list[tuple[int, ...]]) -> None:
    layers = [nn.Linear(16, 5).requires_grad_(False), Conv1D(5, 16).requires_grad_(False)]
    states, forwards = torch.randn(4, 16), [nn.Linear.forward, Conv1D.forward]
    plain = [layer(states) for layer in layers]
    with quick_products(), ThreadPoolExecutor(1) as elsewhere:
        torch.testing.assert_close(torch.addmm(torch.ones(5), states, layers[1].weight), 1 + states @ layers[1].weight)
        for layer, found in zip(layers, plain, strict=True):
            assert torch.equal(elsewhere.submit(layer, states).result(), found)
            assert torch.equal(nn.functional.linear(states, layers[0].weight, layers[0].bias), plain[0])
        assert used == []
        with quick_products():
            layers[0](states)
        layers[1](states)
    assert used == [(4, 16, 5)] * 2
    assert [nn.Linear.forward, Conv1D.forward] == forwards
    assert all(torch.equal(layer(states), found) for layer, found in zip(layers, plain, strict=True))


def test_a_gradient_of_a_gradient_is_refused() -> None:
    layer, states = nn.Linear(8, 8).requires_grad_(False), torch.randn(2, 8, requires_grad=True)
    with quick_products():
        (first,) = torch.autograd.grad((layer(states) ** 2).sum(), states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "gemma"])
def test_a_model_answers_as_before_and_alpha_0_changes_no_bit(family: str, used: list[tuple[int, ...]]) -> None:
    model = tiny(family).requires_grad_(False)
    ids = torch.arange(24).reshape(2, 12) % 40
    width = core_of(model).config.hidden_size
    vector = SteeringVector("generalized", {1: torch.randn(width)}, positions="all")

    def logits() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(ids).logits
        return found

    before = logits()
    with quick_products():
        inside = logits()
        with vector.apply(model, alpha=0.0):
            assert torch.equal(logits(), inside)
    assert used
    torch.testing.assert_close(inside, before, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(), before)
