"""Batch normalisation on a CPU together with the addition and the ReLU that follow it, by compiled code; see norm.c."""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssd.native.build import library

NUMBER, POINTER = ctypes.c_int64, ctypes.c_void_p
ROWS_APART = 64  # threads get multiples of so many rows, so that rows of few channels fill whole tiles
SMALLEST_SHARE = 2**17  # values that are worth a thread
KINDS = (torch.float32, torch.bfloat16)


@cache
def functions() -> ctypes.CDLL | None:
    code = library()
    if code is not None:
        code.ssd_norm_fits.argtypes = [NUMBER, NUMBER]
        code.ssd_norm_fits.restype = NUMBER
        code.ssd_norm_sums.argtypes = [POINTER] * 3 + [NUMBER] * 4 + [POINTER]
        code.ssd_norm_apply.argtypes = [POINTER] * 2 + [NUMBER] * 4 + [POINTER] * 2 + [NUMBER, POINTER]
        code.ssd_norm_gradient.argtypes = [POINTER] * 3 + [NUMBER] * 4 + [POINTER] * 5
        for function in (code.ssd_norm_sums, code.ssd_norm_apply, code.ssd_norm_gradient):
            function.restype = None
    return code


@cache
def threads(process: int, count: int) -> ThreadPoolExecutor:
    """Of this process: a forked one has none of its parent's."""
    return ThreadPoolExecutor(count, thread_name_prefix="ssd-norm")


def share_out(rows: int, channels: int, work: Callable[[int, int], Any]) -> list[Any]:
    """`work(first, last)` on parts of the rows, in as many threads as torch has and the work is worth."""
    count = max(1, min(torch.get_num_threads(), rows * channels // SMALLEST_SHARE))
    edges = [rows * part // count // ROWS_APART * ROWS_APART for part in range(count)] + [rows]
    parts = list(zip(edges, edges[1:]))
    others = [threads(os.getpid(), torch.get_num_threads()).submit(work, *part) for part in parts[1:]]
    return [work(*parts[0]), *(other.result() for other in others)]


def sums(x: Tensor, gradient: Tensor | None, output: Tensor | None) -> np.ndarray:
    """(2, C) float64: sums over (B, H, W) of x and x squared, or of g and g x with the gradient where output is not 0."""
    rows, channels = x.numel() // x.shape[1], x.shape[1]

    def part(first: int, last: int) -> np.ndarray:
        found = np.zeros((2, channels))
        functions().ssd_norm_sums(  # type: ignore[union-attr]
            x.data_ptr(), at(gradient), at(output), first, last, channels, half(x), found.ctypes.data
        )
        return found

    return np.sum(share_out(rows, channels, part), axis=0)


def at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def half(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


class NormAct(torch.autograd.Function):
    """relu(normalised x + residual); statistics of the batch come out beside it, (2, C) float64: mean and variance."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps: float, relu: bool):
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        total, squares = sums(x, None, None) / rows
        variance = np.maximum(squares - total**2, 0)
        inverse = 1 / np.sqrt(variance + eps)
        scale = weight.detach().double().numpy() * inverse
        shift = bias.detach().double().numpy() - total * scale
        scale, shift = scale.astype(np.float32), shift.astype(np.float32)
        out = torch.empty_like(x)
        share_out(
            rows,
            channels,
            lambda first, last: functions().ssd_norm_apply(  # type: ignore[union-attr]
                x.data_ptr(), at(residual), first, last, channels, half(x), scale.ctypes.data, shift.ctypes.data,
                int(relu), out.data_ptr(),
            ),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, out if relu else None)
        ctx.statistics, ctx.with_residual = (total, inverse), residual is not None
        found = torch.from_numpy(np.stack([total, variance]))
        ctx.mark_non_differentiable(found)
        return out, found

    @staticmethod
    def backward(ctx, gradient, _):
        x, weight, out = ctx.saved_tensors
        mean, inverse = ctx.statistics
        rows, channels = x.numel() // x.shape[1], x.shape[1]
        gradient = gradient.to(x.dtype).contiguous(memory_format=torch.channels_last)
        of_g, of_gx = sums(x, gradient, out)
        # with n rows, xhat = (x - mean) inverse: the gradient of x is w inverse (g - mean g - xhat mean(g xhat))
        of_xhat = (of_gx - mean * of_g) * inverse
        a = weight.detach().double().numpy() * inverse
        b = -a * inverse * of_xhat / rows
        c = -a * of_g / rows - b * mean
        a, b, c = (values.astype(np.float32) for values in (a, b, c))
        result = torch.empty_like(x)
        apart = torch.empty_like(x) if ctx.with_residual and out is not None else None
        share_out(
            rows,
            channels,
            lambda first, last: functions().ssd_norm_gradient(  # type: ignore[union-attr]
                x.data_ptr(), gradient.data_ptr(), at(out), first, last, channels, half(x), a.ctypes.data,
                b.ctypes.data, c.ctypes.data, result.data_ptr(), at(apart),
            ),
        )  # fmt: skip
        of_residual = (gradient if apart is None else apart) if ctx.with_residual else None
        of_weight, of_bias = (torch.from_numpy(values).to(weight.dtype) for values in (of_xhat, of_g))
        return result, of_weight, of_bias, of_residual, None, None


def fits(x: Tensor, norm: nn.Module, residual: Tensor | None = None) -> bool:
    """Whether `norm_act` can do it: in training, on a CPU, channels last, with plain batch normalisation."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or functions() is None:
        return False
    plain = isinstance(norm, nn.BatchNorm2d) and norm.training and norm.affine and norm.momentum is not None
    if not plain or norm._forward_hooks or norm._forward_pre_hooks or norm.weight.dtype != torch.float32:
        return False
    if x.dtype not in KINDS or x.ndim != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        return False
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype or not same_order(residual, x)):
        return False
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    return pixels > 1 and pixels % ROWS_APART == 0 and bool(functions().ssd_norm_fits(ROWS_APART, channels))  # type: ignore[union-attr]


def same_order(residual: Tensor, x: Tensor) -> bool:
    return residual.is_contiguous(memory_format=torch.channels_last) and residual.stride() == x.stride()


def norm_act(x: Tensor, norm: Any, residual: Tensor | None = None, *, relu: bool = True) -> Tensor:
    """What norm(x), plus `residual`, then ReLU would answer in training, running statistics included.

    Maps (B, C, H, W) for which `fits` holds.
    """
    out, statistics = NormAct.apply(x, norm.weight, norm.bias, residual, norm.eps, relu)
    if norm.track_running_stats:
        rows = x.numel() // x.shape[1]
        mean, variance = statistics.to(norm.running_mean.dtype)
        with torch.no_grad():
            norm.num_batches_tracked.add_(1)
            norm.running_mean.lerp_(mean, norm.momentum)
            norm.running_var.lerp_(variance * (rows / (rows - 1)), norm.momentum)
    return out
