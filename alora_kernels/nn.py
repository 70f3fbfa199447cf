"""AloraLinear: the masked-LoRA linear as a module. The mathematics is in `functional`."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .activation import Activation, current_activation
from .contract import Options, Projection
from .functional import run


class AloraLinear(nn.Module):
    """A frozen linear layer with an Activated LoRA adapter; a drop-in for `nn.Linear`.

    y = x Wᵀ + b + scaling · mask ⊙ ((dropout(x) Aᵀ) Bᵀ + lora_bias), with
    scaling = lora_alpha / r, or lora_alpha / √r with `use_rslora`.

    `weight` and `bias` are frozen. `lora_A` `[r, in_features]` starts as kaiming_uniform(a=√5),
    `lora_B` `[out_features, r]` as zeros (PEFT's initialisation and names).

    Args:
        in_features, out_features: K and N.
        r: rank, at least 1.
        lora_alpha: numerator of the scaling.
        lora_dropout: probability in [0, 1) that an element of the adapter's input is dropped in
            training.
        bias: whether the base has a bias.
        use_rslora: divide lora_alpha by √r instead of r.
        lora_bias: whether the adapter has a bias, added on active rows.
        device, dtype: device of the layer, dtype of the base.
        adapter_dtype: dtype of the adapter; by default float32 over a 16-bit base, else `dtype`.

    Attributes:
        backend, strategy, adapter_precision, prefix_grad: options of `alora_linear`. You may set
            them at any time.
    """

    weight: Tensor
    bias: nn.Parameter | None
    lora_bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        bias: bool = True,
        use_rslora: bool = False,
        lora_bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        adapter_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._adopt(base, r, lora_alpha, lora_dropout, use_rslora, lora_bias, adapter_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        r: int,
        lora_alpha: float | None = None,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        lora_bias: bool = False,
        adapter_dtype: torch.dtype | None = None,
    ) -> AloraLinear:
        """An AloraLinear that shares the parameters of `linear` and freezes them.

        `lora_alpha` is `r` by default (scaling 1).
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(
                f"AloraLinear.from_linear: expected an nn.Linear, got {type(linear).__name__}"
            )
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        alpha = r if lora_alpha is None else lora_alpha
        self._adopt(linear, r, alpha, lora_dropout, use_rslora, lora_bias, adapter_dtype)
        self.train(linear.training)
        return self

    def _adopt(
        self,
        base: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float,
        use_rslora: bool,
        lora_bias: bool,
        adapter_dtype: torch.dtype | None,
    ) -> None:
        if r < 1:
            raise ValueError(f"AloraLinear: r must be at least 1, got {r}")
        if not math.isfinite(lora_alpha):
            raise ValueError(f"AloraLinear: lora_alpha must be finite, got {lora_alpha}")
        if not 0.0 <= lora_dropout < 1.0:
            raise ValueError(f"AloraLinear: lora_dropout must be in [0, 1), got {lora_dropout}")
        self.in_features, self.out_features = base.in_features, base.out_features
        self.r, self.lora_alpha, self.lora_dropout = r, lora_alpha, lora_dropout
        self.use_rslora = use_rslora
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.backend, self.strategy, self.adapter_precision = "auto", "auto", "compute"
        self.prefix_grad = True
        self.weight = base.weight.requires_grad_(False)
        self.register_parameter("bias", base.bias)
        if self.bias is not None:
            self.bias.requires_grad_(False)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        options: dict[str, Any] = {
            "device": self.weight.device,
            "dtype": wide if adapter_dtype is None else adapter_dtype,
        }
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **options))
        added = nn.Parameter(torch.empty(self.out_features, **options)) if lora_bias else None
        self.register_parameter("lora_bias", added)
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Initialise the adapter as PEFT does. The layer then computes the same as its base."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        nn.init.zeros_(self.lora_B)
        if self.lora_bias is not None:
            nn.init.zeros_(self.lora_bias)

    def forward(self, x: Tensor, activation: Activation | None = None) -> Tensor:
        """Apply the layer to x `[..., K]`; returns `[..., N]`.

        If `activation` is None, the layer uses that of `with activate(activation):`. Without such a
        block it computes its base layer alone.
        """
        if activation is None:
            activation = current_activation()
        if activation is None:
            return nn.functional.linear(x, self.weight, self.bias)
        own = self._parameters
        try:  # five times as fast as reading the attributes
            tensors: Any = (
                own["weight"], own["bias"], own["lora_A"], own["lora_B"], own["lora_bias"]
            )  # fmt: skip
        except KeyError:  # a parametrization or a plain tensor has replaced one of them
            tensors = (self.weight, self.bias, self.lora_A, self.lora_B, self.lora_bias)
        (y,) = run(
            "alora_linear",
            x,
            [Projection(*tensors)],
            [self.scaling],
            activation,
            Options(
                dropout_p=self.lora_dropout if self.training else 0.0,
                prefix_grad=self.prefix_grad,
                adapter_precision=self.adapter_precision,
                strict_inactive=False,
                backend=self.backend,
                strategy=self.strategy,
            ),
        )
        return y

    def merge(self) -> None:
        """Always raises: a merged weight would run the adapter on every token."""
        raise NotImplementedError(
            "AloraLinear.merge: an activated LoRA is off before its invocation, so it cannot be "
            "folded into the weight, which all tokens share"
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, r={self.r}, lora_alpha={self.lora_alpha}, "
            f"lora_dropout={self.lora_dropout}, backend={self.backend}"
        )
