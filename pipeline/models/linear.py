"""Linear layers computed by oneDNN on a CPU in float32.

They make a CPU's training step faster (BENCHMARKS.md, "A step offline and online, on a CPU"): on two threads or more torch
computes a 1x1 convolution with oneDNN, but the same matrix product with MKL, which is slower on the AMD processor measured.
"""

import torch
from torch import nn
from torch.nn.functional import conv2d


class OneDNNLinear(nn.Linear):
    """nn.Linear up to rounding; on other devices, with other types and under autocast it is nn.Linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map tokens (N, T, in) to (N, T, out)."""
        if not uses_onednn(x):
            return super().forward(x)
        pictures = x.unsqueeze(2).permute(0, 3, 1, 2)  # (N, in, T, 1), channels last: a view
        return conv2d(pictures, self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1).squeeze(2)


def uses_onednn(x: torch.Tensor) -> bool:
    """Whether the layer for this input is computed by oneDNN; inputs without a token dimension are not."""
    ours = x.ndim == 3 and x.device.type == "cpu" and x.dtype == torch.float32
    return ours and not torch.is_autocast_enabled("cpu")


def convert_linear(model: nn.Module) -> None:
    """Convert all linear layers of a model to OneDNNLinear, in place, keeping weights and their names.

    Does nothing if torch was built without oneDNN.
    """
    for part in model.modules():
        if type(part) is nn.Linear and torch.backends.mkldnn.is_available():
            part.__class__ = OneDNNLinear  # a replaced module would lose hooks and other references
