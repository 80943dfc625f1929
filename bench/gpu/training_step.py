"""One training step of two towers in torch: examples per second beside the step's floor.

The shape of ours (id tables, a hidden layer, unit vectors, softmax over the batch, AdamW with dense
gradients, bf16 products), not our loop: that needs Ray and a data set. A step over several cards is
not measured.
"""

import torch
from torch import nn
from torch.nn import functional

from shardline.bench.gpu.card import time_calls, timing
from shardline.bench.gpu.floors import step_floor
from shardline.bench.gpu.part_findings import Findings, Work

TEMPERATURE = 0.05


class Towers(nn.Module):
    """Users and items by id, each through a table and two layers, to (n, dim) unit vectors."""

    def __init__(self, users: int, items: int, dim: int, hidden: int) -> None:
        super().__init__()
        self.users, self.items = nn.Embedding(users, dim), nn.Embedding(items, dim)
        self.user_layers, self.item_layers = self._layers(dim, hidden), self._layers(dim, hidden)

    @staticmethod
    def _layers(dim: int, hidden: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim))

    def forward(self, users: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """(n, n) logits of all pairs of n users and n items."""
        left = functional.normalize(self.user_layers(self.users(users)), dim=1)
        right = functional.normalize(self.item_layers(self.items(items)), dim=1)
        logits: torch.Tensor = left @ right.T / TEMPERATURE
        return logits


def training_step(work: Work, findings: Findings) -> None:
    """Times steps; checks that the loss falls, and that bf16 gradients agree with float32's."""
    sizes, card = work.sizes, work.card
    torch.manual_seed(0)
    towers = Towers(sizes.users, sizes.items, sizes.dim, sizes.hidden).to(card.device)
    generator = torch.Generator(device=card.device).manual_seed(1)

    def draw(among: int) -> torch.Tensor:
        return torch.randint(among, (sizes.train_batch,), generator=generator, device=card.device)

    users, items = draw(sizes.users), torch.randperm(sizes.items, device=card.device)
    items = items[: sizes.train_batch]
    findings.check(
        "training step: bf16 gradients as float32's",
        (agreement := _agreement(card.device, towers, users, items)) >= 0.98,
        expected="cosine >= 0.98",
        got=f"{agreement:.4f}",
    )
    optimiser = torch.optim.AdamW(towers.parameters(), lr=1e-3, fused=not card.fake)
    losses: list[torch.Tensor] = []

    def step(number: int) -> None:
        optimiser.zero_grad(set_to_none=True)
        loss = _loss(card.device, towers, users, items, half=True)
        torch.autograd.backward(loss)
        optimiser.step()
        losses.append(loss.detach())
        card.synchronize()

    taken = time_calls(step, seconds=sizes.seconds, fewest=sizes.fewest)
    first, last = float(losses[0]), float(losses[-1])
    findings.check(
        "training step: the loss falls",
        last < first,
        expected=f"below {first:.4f}",
        got=f"{last:.4f}",
    )
    linear = [each.weight.numel() for each in towers.modules() if isinstance(each, nn.Linear)]
    floor = step_floor(
        batch=sizes.train_batch,
        dim=sizes.dim,
        weights=sum(linear),
        parameters=sum(each.numel() for each in towers.parameters()),
        rates=work.rates,
    )
    findings.time(
        timing(
            taken,
            what="training step",
            rows=sizes.users + sizes.items,
            batch=sizes.train_batch,
            k=0,
            recall=None,
            floor_ms=floor.ms,
            bound_by=floor.bound_by,
        )
    )


def _loss(
    device: torch.device, towers: Towers, users: torch.Tensor, items: torch.Tensor, *, half: bool
) -> torch.Tensor:
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=half):
        logits = towers(users, items)
    return functional.cross_entropy(logits.float(), torch.arange(len(users), device=device))


def _agreement(
    device: torch.device, towers: Towers, users: torch.Tensor, items: torch.Tensor
) -> float:
    """Cosine of the two gradients of the item tower's first layer."""
    weight = next(towers.item_layers.parameters())
    found = []
    for half in (True, False):
        loss = _loss(device, towers, users, items, half=half)
        found.append(torch.autograd.grad(loss, weight)[0].flatten().float())
    return float(functional.cosine_similarity(found[0], found[1], dim=0))
