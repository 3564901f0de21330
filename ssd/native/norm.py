"""Batch normalisation on a CPU together with the addition and the ReLU that follow it, by compiled code; see norm.c."""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssd.native.build import library

NUMBER, POINTER = ctypes.c_int64, ctypes.c_void_p
ROWS_APART = 64  # threads get multiples of so many rows, so that rows of few channels fill whole tiles
SMALLEST_SHARE = 2**17  # values that are worth a thread
KINDS = (torch.float32, torch.bfloat16)


SUMS, APPLY, GRADIENT = range(3)


class Part(ctypes.Structure):
    """What one thread does of a map: norm.c's struct of the same name."""

    _fields_ = [(name, NUMBER) for name in ("kind", "first", "last", "channels", "half", "relu")] + [
        (name, POINTER) for name in ("x", "other", "output", "a", "b", "c", "out", "masked", "sums")
    ]


@cache
def functions() -> ctypes.CDLL | None:
    code = library()
    if code is not None:
        code.ssd_norm_fits.argtypes = [NUMBER, NUMBER]
        code.ssd_norm_fits.restype = NUMBER
        code.ssd_norm_run.argtypes = [ctypes.POINTER(Part), NUMBER, POINTER, POINTER, POINTER]
        code.ssd_norm_run.restype = None
    return code


@cache
def team() -> tuple[Any, Any, Any]:
    """Of the OpenMP that torch came with: GOMP_parallel, omp_get_thread_num, omp_get_num_threads; None without one."""
    folder = Path(torch.__file__).parent / "lib"
    for file in sorted([*folder.glob("lib*omp*.so*"), *folder.glob("lib*omp*.dylib")]):
        try:
            openmp = ctypes.CDLL(str(file))
            names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
            first, second, third = (ctypes.cast(getattr(openmp, name), POINTER) for name in names)
            return first, second, third
        except (OSError, AttributeError):
            continue
    return None, None, None


def share_out(
    kind: int, x: Tensor, found: np.ndarray | None = None, relu: bool = False, **pointers: int | None
) -> None:
    """A map's rows in as many parts as torch has threads and the work is worth; sums of part i go to found[i]."""
    rows, channels = x.numel() // x.shape[1], x.shape[1]
    count = parts_of(x) if found is None else len(found)
    edges = [rows * part // count // ROWS_APART * ROWS_APART for part in range(count)] + [rows]
    parts = (Part * count)()
    for number, part in enumerate(parts):
        part.kind, part.first, part.last = kind, edges[number], edges[number + 1]
        part.channels, part.half, part.relu, part.x = channels, x.dtype == torch.bfloat16, relu, x.data_ptr()
        for name, place in pointers.items():
            setattr(part, name, place)
        if found is not None:
            part.sums = found[number].ctypes.data
    functions().ssd_norm_run(parts, count, *team())  # type: ignore[union-attr]


def parts_of(x: Tensor) -> int:
    return max(1, min(torch.get_num_threads(), x.numel() // SMALLEST_SHARE))


def sums(x: Tensor, gradient: Tensor | None, output: Tensor | None) -> np.ndarray:
    """(2, C) float64: sums over (B, H, W) of x and x squared, or of g and g x with the gradient where output is not 0."""
    found = np.zeros((parts_of(x), 2, x.shape[1]))
    share_out(SUMS, x, found, other=at(gradient), output=at(output))
    return found.sum(0)


def at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


class NormAct(torch.autograd.Function):
    """relu(normalised x + residual); statistics of the batch come out beside it, (2, C) float64: mean and variance."""

    @staticmethod
    def forward(ctx, x, weight, bias, residual, eps: float, relu: bool):
        rows = x.numel() // x.shape[1]
        total, squares = sums(x, None, None) / rows
        variance = np.maximum(squares - total**2, 0)
        inverse = 1 / np.sqrt(variance + eps)
        scale = weight.detach().double().numpy() * inverse
        shift = bias.detach().double().numpy() - total * scale
        scale, shift = scale.astype(np.float32), shift.astype(np.float32)
        out = torch.empty_like(x)
        places = {"a": scale.ctypes.data, "b": shift.ctypes.data, "out": out.data_ptr()}
        share_out(APPLY, x, relu=relu, other=at(residual), **places)
        ctx.save_for_backward(x, weight, out if relu else None)
        ctx.statistics, ctx.with_residual = (total, inverse), residual is not None
        found = torch.from_numpy(np.stack([total, variance]))
        ctx.mark_non_differentiable(found)
        return out, found

    @staticmethod
    def backward(ctx, gradient, _):
        x, weight, out = ctx.saved_tensors
        mean, inverse = ctx.statistics
        rows = x.numel() // x.shape[1]
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
        places = {"a": a.ctypes.data, "b": b.ctypes.data, "c": c.ctypes.data, "out": result.data_ptr()}
        share_out(GRADIENT, x, other=gradient.data_ptr(), output=at(out), masked=at(apart), **places)
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
        norm.num_batches_tracked.data.add_(1)
        # by .data, as torch's own does it: where that has seen views of another size, its backward pass keeps these
        norm.running_mean.data.lerp_(mean, norm.momentum)
        norm.running_var.data.lerp_(variance * (rows / (rows - 1)), norm.momentum)
    return out
