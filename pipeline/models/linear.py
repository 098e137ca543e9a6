"""Linear layers in float32 on a CPU, computed by oneDNN.

torch gives a float32 matrix product to MKL, which on the AMD processor measured reaches half the speed of
oneDNN; a 1x1 convolution is the same product, and on two threads or more torch gives that to oneDNN
(BENCHMARKS.md, "A step offline and online, on a CPU").
"""

import torch
from torch import nn
from torch.nn.functional import conv2d


class OneDNNLinear(nn.Linear):
    """nn.Linear, equal but for rounding; another device, another type or autocast takes torch's own way."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (N, T, in) to (N, T, out); inputs of other dimensions (heads: N, in) go torch's own way."""
        if not uses_onednn(x):
            return super().forward(x)
        pictures = x.unsqueeze(2).permute(0, 3, 1, 2)  # (N, in, T, 1), channels last: a view
        return conv2d(pictures, self.weight[:, :, None, None], self.bias).permute(0, 2, 3, 1).squeeze(2)


def uses_onednn(x: torch.Tensor) -> bool:
    """Whether this input goes to oneDNN."""
    ours = x.ndim == 3 and x.device.type == "cpu" and x.dtype == torch.float32
    return ours and not torch.is_autocast_enabled("cpu")


def convert_linear(model: nn.Module) -> None:
    """Make all of a model's linear layers OneDNNLinear, in place; weights and their names stay as they are.

    Where torch was built without oneDNN the model stays as it is.
    """
    for part in model.modules():
        if type(part) is nn.Linear and torch.backends.mkldnn.is_available():
            part.__class__ = OneDNNLinear  # a replaced module would lose hooks and other references
