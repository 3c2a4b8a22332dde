"""Batch normalization by the samples of all ranks together."""

from __future__ import annotations

from typing import Any

import torch

from mpidl.errors import InvalidArgument
from mpidl.refuse import whole
from mpidl.torch import arguments
from mpidl.torch import session as sessions
from mpidl.torch.arguments import dense, flag, number, refuses
from mpidl.torch.begin import beginning
from mpidl.torch.ops import allgather_async, allreduce_, synchronize
from mpidl.torch.process_sets import global_process_set
from mpidl.torch.reduce_op import Sum

Tensor = Any
#: that torch computes moments of: not of its floats of 8 bits
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class SyncBatchNorm(torch.nn.modules.batchnorm._BatchNorm):  # type: ignore[misc]
    """As torch.nn.BatchNorm1d, 2d and 3d, but mean and variance are those of all ranks' samples.

    In training, forward and backward are collective, and every rank takes part, with no samples
    if it has none; inputs are (n, channels, ...) on any device, and n may differ from rank to
    rank. Outputs, gradients of inputs and running statistics are those of one process with the
    whole batch; the gradients of weight and bias add up to it, as those of other layers do. In
    evaluation, and on one rank, it is torch's own.

    Ioffe and Szegedy 2015. Moments of the ranks are merged as Chan, Golub and LeVeque (1983) do.
    Raises InvalidArgument for options that cannot be.
    """

    @refuses
    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        whole("num_features", num_features, 1)
        if number("eps", eps) <= 0:
            raise InvalidArgument(f"{eps=}: expected more than 0")
        if momentum is not None:
            number("momentum", momentum)
        flag("affine", affine)
        flag("track_running_stats", track_running_stats)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self.path = ""  #: in the model that it was converted with, for errors

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        dense(input)
        who = f"{self.path + ': ' * bool(self.path)}{self}"
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise InvalidArgument(
                f"{who}: input of shape "
                f"{tuple(input.shape)}: expected (samples, {self.num_features}, ...)"
            )
        if input.dtype not in FLOATING:
            raise InvalidArgument(f"{who}: input of {input.dtype}: expected floating-point numbers")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Return the output, shaped like the input. Collective in training."""
        if not self.training or sessions.size() == 1:
            self._check_input_dim(input)
            return super().forward(input)
        session = sessions.active()
        name = session.layer(self)
        with beginning(session, "allgather", f"{name}.forward", global_process_set):
            self._check_input_dim(input)
        output, count, mean, var = _Normalize.apply(input, self.weight, self.bias, self.eps, name)
        if self.track_running_stats and self.running_mean is not None:
            self._move(count, mean, var)
        return output

    def _move(self, count: Tensor, mean: Tensor, var: Tensor) -> None:
        """Let the running statistics follow; the variance is the unbiased one."""
        if count <= 1:
            return
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            share = self.momentum
            if share is None:  # the mean over all batches so far
                share = 1 / float(self.num_batches_tracked)
            for running, value in (
                (self.running_mean, mean),
                (self.running_var, var * (count / (count - 1))),
            ):
                running.lerp_(value.to(running.dtype), share)

    @classmethod
    def convert_sync_batchnorm(cls, module: Any) -> Any:
        """Return a model with its layers of torch.nn.BatchNorm replaced, parameters kept.

        Raises InvalidArgument for what is no module.
        """
        arguments.module("convert_sync_batchnorm", module)
        return cls._converted(module, "")

    @classmethod
    def _converted(cls, module: Any, path: str) -> Any:
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            made = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
            )
            for name, value in (*module._parameters.items(), *module._buffers.items()):
                setattr(made, name, value)
            made.path = path
            return made.train(module.training)
        for name, child in module.named_children():
            setattr(module, name, cls._converted(child, f"{path}.{name}" if path else name))
        return module


class _Normalize(torch.autograd.Function):  # type: ignore[misc]
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float, name: str) -> Any:
        count, mean, var = _moments(x, name)
        invstd = torch.rsqrt(var + eps)
        hat = (x - _along(mean, x)) * _along(invstd, x)
        ctx.save_for_backward(hat, weight, invstd)
        ctx.count, ctx.name = count, name
        out = hat if weight is None else torch.addcmul(_along(bias, x), hat, _along(weight, x))
        ctx.mark_non_differentiable(count, mean, var)
        return out.to(x.dtype), count, mean, var

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Any) -> Any:
        hat, weight, invstd = ctx.saved_tensors
        grad = grad.to(hat.dtype)
        sums = torch.stack([_sums(grad), _sums(grad * hat)])
        to_x = to_weight = to_bias = None
        if weight is not None:
            to_bias, to_weight = sums.to(weight.dtype)
        if ctx.needs_input_grad[0]:
            total = allreduce_(sums.clone(), name=f"{ctx.name}.backward", op=Sum)
            g, gh = total / ctx.count.clamp(min=1)
            to_x = grad - _along(g, grad) - hat * _along(gh, grad)
            to_x *= _along(invstd if weight is None else invstd * weight, grad)
        return to_x, to_weight, to_bias, None, None


def _moments(x: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return elements per channel (), mean and variance (channels,) of all ranks, in float64.

    Collective: one message, of the moments of each rank, for each forward.
    """
    channels = x.shape[1]
    count = x.numel() // channels
    mean = _sums(x) / max(1, count)
    squares = _sums((x - _along(mean, x)).square_())
    mine = torch.cat([mean.new_tensor([count]), mean, squares])
    found = synchronize(allgather_async(mine[None], f"{name}.forward"))  # (ranks, 1 + 2 channels)
    counts, means, squares = found[:, :1], found[:, 1 : 1 + channels], found[:, 1 + channels :]
    total = counts.sum()
    mean = (counts * means).sum(0) / total.clamp(min=1)
    squares = squares.sum(0) + (counts * (means - mean).square()).sum(0)
    return total, mean, squares / total.clamp(min=1)


def _sums(x: Tensor) -> Tensor:
    """Return the sum over all but axis 1 (channels,), in float64."""
    return x.sum([axis for axis in range(x.dim()) if axis != 1], dtype=torch.float64)


def _along(values: Tensor, x: Tensor) -> Tensor:
    """Return `values` (channels,) as they are multiplied with x: (1, channels, 1, ...).

    In the dtype of x, or in float32 if that is half as wide.
    """
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    return values.to(dtype).view(1, -1, *(1,) * (x.dim() - 2))
