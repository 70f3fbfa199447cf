"""Train an AloraLinear in a few seconds on a CPU.

A frozen layer gets an adapter. The adapter must learn a low-rank change of the layer, which applies
to active tokens only. The five lines that use the package are numbered. The others make the task
and show the result.

    python examples/train_layer.py
"""

from __future__ import annotations

import torch
from torch import nn

from alora_kernels import Activation, AloraLinear

VOCABULARY, INVOCATION = 50, [7, 3]
BATCH, SEQ_LEN, FEATURES, RANK = 8, 64, 96, 4


def make_batch(
    generator: torch.Generator, teacher: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids `[B, T]` with one invocation in each row, inputs `[B, T, K]`, wanted change."""
    input_ids = torch.randint(10, VOCABULARY, (BATCH, SEQ_LEN), generator=generator)
    for row in input_ids:
        start = int(torch.randint(SEQ_LEN // 2, SEQ_LEN - 8, (), generator=generator))
        row[start : start + len(INVOCATION)] = torch.tensor(INVOCATION)
    x = torch.randn(BATCH, SEQ_LEN, FEATURES, generator=generator)
    return input_ids, x, x @ teacher.T


def main(steps: int = 200, seed: int = 0) -> tuple[float, float]:
    """Train, and print the loss as it falls. Returns the first and the last loss."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    base = nn.Linear(FEATURES, FEATURES)
    teacher = torch.randn(FEATURES, RANK) @ torch.randn(RANK, FEATURES) / FEATURES**0.5

    layer = AloraLinear.from_linear(base, r=RANK, lora_alpha=2 * RANK)  # 1
    optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], lr=2e-2, weight_decay=0.0)
    losses = []
    for step in range(steps):
        input_ids, x, change = make_batch(generator, teacher)
        activation = Activation.from_input_ids(input_ids, INVOCATION)  # 2
        y = layer(x, activation)  # 3
        active = activation.mask.view(BATCH, SEQ_LEN)
        loss = nn.functional.mse_loss(y[active], (base(x) + change)[active])
        optimizer.zero_grad()
        loss.backward()  # 4
        optimizer.step()  # 5
        losses.append(loss.item())
        if step % 40 == 0 or step == steps - 1:
            print(f"step {step:3d}  loss on active tokens {loss.item():.1e}")

    with torch.no_grad():
        unchanged = torch.equal(y[~active], base(x)[~active])
    print(f"tokens before the invocation equal the base layer bit for bit: {unchanged}")
    trained = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    print(f"{layer}\ntrained {trained} of {sum(p.numel() for p in layer.parameters())} values")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
