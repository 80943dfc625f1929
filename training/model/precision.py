"""bf16 for the towers' matrix products, where the device has it."""

from typing import Any, Literal

import torch
from torch import nn

from shardline.shards.core.errors import ConfigError

Precision = Literal["fp32", "bf16"]


class Autocast(nn.Module):
    """A model whose forward pass runs in bf16; weights, gradients and the loss stay fp32."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: Any) -> Any:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, dtype=torch.bfloat16):
            return self.model(*inputs)


def resolve(precision: Literal["auto", "fp32", "bf16"], device: torch.device) -> Precision:
    """What to compute in. auto takes bf16 on a GPU that computes in it.

    Raises:
        ConfigError: bf16 on a GPU without it.
    """
    if precision == "fp32" or (precision == "auto" and device.type == "cpu"):
        return "fp32"
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        if precision == "bf16":
            raise ConfigError(
                "this GPU does not compute in bf16",
                field="precision",
                expected="fp32, or another device",
                hint="a run that is resumed keeps the precision it began with, also under auto",
            )
        return "fp32"
    return "bf16"
