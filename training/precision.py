"""bf16 for the towers' matrix products, where the device has it."""

from typing import Any, Literal

import torch
from torch import nn

from shards.errors import ConfigError


class Autocast(nn.Module):
    """A model whose forward pass runs under autocast; weights, gradients and the loss stay fp32."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model = model
        self.dtype = dtype

    def forward(self, *inputs: Any) -> Any:
        device = next(self.model.parameters()).device.type
        with torch.autocast(device, dtype=self.dtype):
            return self.model(*inputs)


def autocast_type(
    precision: Literal["auto", "fp32", "bf16"], device: torch.device
) -> torch.dtype | None:
    """bfloat16, or None for plain fp32. auto takes bf16 on a GPU that computes in it.

    Raises:
        ConfigError: bf16 on a GPU without it.
    """
    if precision == "fp32" or (precision == "auto" and device.type == "cpu"):
        return None
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        if precision == "bf16":
            raise ConfigError(
                "this GPU does not compute in bf16", field="precision", expected="auto or fp32"
            )
        return None
    return torch.bfloat16
