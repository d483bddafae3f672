"""Batch norm whose statistics and affine parameters are constants, as detectron2's FrozenBN."""

import torch
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """A batch norm that is only a scale and a shift for each channel, in training too.

    Names in the state dict are those of `nn.BatchNorm2d`. PyTorch's own keeps its input for the backward, which a constant scale
    does not need: half of what a frozen backbone would store for each convolution.
    """

    def forward(self, maps: Tensor) -> Tensor:
        """Normalise maps (B, C, h, w)."""
        if not torch.is_grad_enabled():
            # One pass over memory instead of two.
            return nn.functional.batch_norm(
                maps, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
            )
        mean, variance = self.running_mean, self.running_var
        assert mean is not None and variance is not None  # noqa: PT018 - for the type checker; `replace_in` has looked
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        shape = (1, -1, 1, 1)
        return (maps * scale.to(maps.dtype).view(shape)).add_(shift.to(maps.dtype).view(shape))

    @classmethod
    def replace_in(cls, module: nn.Module) -> None:
        """Replace the batch norms inside a module; parameters and buffers stay the same objects.

        Classes of others that derive from `nn.BatchNorm2d` (some of timm include an activation) are left as they are.
        """
        for parent in module.modules():
            for name, child in parent.named_children():
                if type(child) is nn.BatchNorm2d and child.affine and child.track_running_stats:
                    setattr(parent, name, cls._freeze(child))

    @classmethod
    def _freeze(cls, norm: nn.BatchNorm2d) -> "FrozenBatchNorm2d":
        frozen = cls(norm.num_features, eps=norm.eps, momentum=norm.momentum, device="meta")
        frozen.load_state_dict(norm.state_dict(keep_vars=True), assign=True)
        return frozen.train(norm.training)
