"""AloraLinear: a drop-in for nn.Linear."""

from __future__ import annotations

import asyncio
import copy
import io
import math
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from alora_kernels import Activation, AloraLinear, activate, alora_linear_reference


def make(**options) -> AloraLinear:
    layer = AloraLinear(24, 20, r=4, lora_alpha=8, **options)
    nn.init.normal_(layer.lora_B)
    if layer.lora_bias is not None:
        nn.init.normal_(layer.lora_bias)
    return layer


def expected(layer: AloraLinear, x: torch.Tensor, activation: Activation) -> torch.Tensor:
    return alora_linear_reference(
        x,
        layer.weight,
        layer.bias,
        layer.lora_A,
        layer.lora_B,
        activation.mask,
        layer.scaling,
        lora_bias=layer.lora_bias,
    )


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"lora_bias": True}], ids=str)
def test_forward_is_the_reference(options) -> None:
    layer, x = make(**options), torch.randn(2, 6, 24)
    activation = Activation.from_starts([3, None], 6)
    torch.testing.assert_close(layer(x, activation), expected(layer, x, activation))


def test_without_an_activation_it_is_the_base_layer() -> None:
    layer, x = make(), torch.randn(2, 6, 24)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


def test_the_argument_wins_over_the_ambient_activation() -> None:
    layer, x = make(), torch.randn(6, 24)
    some, every = Activation.from_starts([3], 6), Activation.all(6)
    with activate(every):
        assert torch.equal(layer(x), layer(x, every))
        torch.testing.assert_close(layer(x, some), expected(layer, x, some))
        assert not torch.equal(layer(x, some), layer(x))


@pytest.mark.parametrize("rslora", [False, True])
def test_scaling(rslora) -> None:
    layer = AloraLinear(8, 8, r=16, lora_alpha=8, use_rslora=rslora)
    assert layer.scaling == (2.0 if rslora else 0.5)


def test_initialisation_is_pefts() -> None:
    layer = AloraLinear(300, 20, r=7, lora_alpha=8)
    assert (layer.lora_B == 0).all()
    bound = math.sqrt(6 / (6 * 300))  # kaiming_uniform with a = √5
    assert layer.lora_A.abs().max() <= bound and layer.lora_A.std() > bound / 3
    x, activation = torch.randn(5, 300), Activation.all(5)
    assert torch.equal(layer(x, activation), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype) -> None:
    layer = AloraLinear(24, 20, r=4, lora_alpha=8, dtype=dtype)
    assert layer.weight.dtype == dtype and layer.lora_A.dtype == torch.float32
    same = AloraLinear(24, 20, r=4, lora_alpha=8, dtype=dtype, adapter_dtype=dtype)
    assert same.lora_A.dtype == dtype
    x = torch.randn(5, 24, dtype=dtype)
    assert layer(x, Activation.all(5)).dtype == dtype


def test_from_linear_shares_the_weight() -> None:
    linear = nn.Linear(24, 20).eval()
    layer = AloraLinear.from_linear(linear, r=4)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.weight.requires_grad and layer.lora_A.requires_grad
    assert layer.scaling == 1.0 and not layer.training
    with pytest.raises(TypeError, match="Conv1d"):
        AloraLinear.from_linear(nn.Conv1d(1, 1, 1), r=4)  # type: ignore[arg-type]


def test_trains() -> None:
    layer = AloraLinear(24, 20, r=4, lora_alpha=8)
    x, target = torch.randn(64, 24), torch.randn(64, 20)
    activation = Activation.from_starts([32], 64)
    trained = [p for p in layer.parameters() if p.requires_grad]
    assert len(trained) == 2
    optimizer = torch.optim.Adam(trained, 0.02)
    frozen = layer.weight.clone()
    losses = []
    for _ in range(60):
        loss = F.mse_loss(layer(x, activation)[32:], target[32:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(layer.weight, frozen)


def test_dropout_in_training_alone() -> None:
    layer, x, activation = make(lora_dropout=0.5), torch.randn(9, 24), Activation.all(9)
    assert not torch.equal(layer(x, activation), layer(x, activation))
    layer.eval()
    assert torch.equal(layer(x, activation), layer(x, activation))


def test_state_dict_deepcopy_and_pickle() -> None:
    layer = make(lora_bias=True)
    assert set(layer.state_dict()) == {"weight", "bias", "lora_A", "lora_B", "lora_bias"}
    x, activation = torch.randn(5, 24), Activation.all(5)
    want = layer(x, activation)
    other = AloraLinear(24, 20, r=4, lora_alpha=8, lora_bias=True)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x, activation), want)
    assert torch.equal(copy.deepcopy(layer)(x, activation), want)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x, activation), want)


def test_to_moves_and_casts() -> None:
    layer = make().to(torch.bfloat16)
    assert layer.lora_A.dtype == layer.weight.dtype == torch.bfloat16
    assert layer(torch.randn(3, 24).bfloat16(), Activation.all(3)).dtype == torch.bfloat16
    assert make().to("meta").weight.device.type == "meta"


def test_peft_tensors_load_by_name() -> None:
    peft = pytest.importorskip("peft")
    base = nn.Sequential(nn.Linear(24, 20))
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], init_lora_weights=False)
    model = peft.get_peft_model(base, config)
    found = {
        name.split(".")[-3 if "default" in name else -2]: tensor
        for name, tensor in model.state_dict().items()
        if "lora_" in name
    }
    layer = AloraLinear.from_linear(model.base_model.model[0].base_layer, r=4, lora_alpha=8)
    layer.load_state_dict({k.split(".")[0]: v for k, v in found.items()}, strict=False)
    x = torch.randn(3, 24)
    torch.testing.assert_close(layer(x, Activation.all(3)), model(x))


def test_merge_is_refused_with_the_reason() -> None:
    with pytest.raises(NotImplementedError, match="before its invocation"):
        make().merge()


def test_repr_says_what_matters() -> None:
    text = repr(make())
    assert "r=4" in text and "lora_alpha=8" in text and "backend=auto" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"r": 0}, "r must be at least 1, got 0"),
        ({"lora_dropout": 1.0}, r"in \[0, 1\), got 1.0"),
        ({"lora_alpha": math.inf}, "finite, got inf"),
    ],
)
def test_bad_arguments(options, words) -> None:
    with pytest.raises(ValueError, match=words):
        AloraLinear(8, 8, **{"r": 4, "lora_alpha": 8, **options})


@pytest.mark.parametrize("compiled", [False, True])
def test_two_threads_with_their_own_activation(compiled) -> None:
    layer = make().eval()
    forward = torch.compile(layer, fullgraph=True, backend="eager") if compiled else layer
    x = torch.randn(6, 24)
    activations = [Activation.from_starts([1], 6), Activation.none(6)]
    with torch.no_grad():
        want = [layer(x, a) for a in activations]
        with activate(activations[0]):
            forward(x)  # compile once, on one thread
    wrong: list[int] = []
    barrier = threading.Barrier(2)

    def work(i: int) -> None:
        with activate(activations[i]), torch.no_grad():
            for _ in range(20):
                barrier.wait()
                if not torch.equal(forward(x), want[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong


def test_two_interleaved_tasks_with_their_own_activation() -> None:
    layer, x = make(), torch.randn(6, 24)
    activations = [Activation.from_starts([1], 6), Activation.none(6)]
    want = [layer(x, a) for a in activations]

    async def work(i: int) -> bool:
        right = True
        with activate(activations[i]):
            for _ in range(5):
                right &= torch.equal(layer(x), want[i])
                await asyncio.sleep(0)
        return right

    async def main() -> list[bool]:
        return await asyncio.gather(work(0), work(1))

    assert asyncio.run(main()) == [True, True]


def changes() -> dict[str, object]:
    def data(layer: AloraLinear) -> None:
        layer.lora_A.data = torch.randn_like(layer.lora_A)

    def lower_rank(layer: AloraLinear) -> None:
        layer.lora_A.data = layer.lora_A.data[:2]
        layer.lora_B.data = layer.lora_B.data[:, :2]

    def in_place(layer: AloraLinear) -> None:
        with torch.no_grad():
            layer.lora_B.mul_(2)

    return {
        "parameter": lambda layer: setattr(layer, "lora_A", nn.Parameter(layer.lora_A * 2)),
        "data": data,
        "in place": in_place,
        "scaling": lambda layer: setattr(layer, "scaling", 3.0),
        "double": lambda layer: layer.double(),
        "less of the same memory": lower_rank,
        "a parametrization": lambda layer: nn.utils.parametrize.register_parametrization(
            layer, "lora_A", nn.Tanh()
        ),
        "backend": lambda layer: setattr(layer, "backend", "reference"),
    }


@pytest.mark.parametrize("name", changes())
def test_a_changed_layer_computes_with_what_it_has_now(name) -> None:
    layer, x, activation = make(), torch.randn(5, 24), Activation.from_starts([2], 5)
    with torch.no_grad():
        layer(x, activation)
        changes()[name](layer)
        x = x.to(layer.weight.dtype)
        torch.testing.assert_close(layer(x, activation), expected(layer, x, activation))


def test_a_layer_that_has_run_still_refuses_bad_input() -> None:
    layer, activation = make(), Activation.all(5)
    with torch.no_grad():
        layer(torch.randn(5, 24), activation)
        with pytest.raises(ValueError, match="describes 5 rows but x has 4"):
            layer(torch.randn(4, 24), activation)
        with pytest.raises(ValueError, match="K=24 but x has K=25"):
            layer(torch.randn(5, 25), activation)
        with pytest.raises(TypeError, match="float64"):
            layer(torch.randn(5, 24, dtype=torch.float64), activation)
        layer.scaling = math.inf
        with pytest.raises(ValueError, match="scaling must be finite"):
            layer(torch.randn(5, 24), activation)


def test_copies_and_pickles_are_apart() -> None:
    layer, x, activation = make(), torch.randn(5, 24), Activation.all(5)
    with torch.no_grad():
        layer(x, activation)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            nn.init.ones_(other.lora_A)
            torch.testing.assert_close(other(x, activation), expected(other, x, activation))
        assert not torch.equal(layer(x, activation), other(x, activation))


def test_functional_call_without_a_gradient() -> None:
    layer, x, activation = make(), torch.randn(5, 24), Activation.all(5)
    other = {name: torch.randn_like(p) for name, p in layer.named_parameters()}
    with torch.no_grad():
        before = layer(x, activation)
        swapped = torch.func.functional_call(layer, other, (x, activation))
        assert torch.equal(layer(x, activation), before)
        layer.load_state_dict(other)
        torch.testing.assert_close(swapped, layer(x, activation))
