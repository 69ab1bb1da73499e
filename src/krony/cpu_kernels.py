"""decode.c, compiled for this processor when it is first needed, and called through ctypes.

As Triton compiles for a GPU, the system's C compiler does here: in about a second, once; the
library is kept in the user's cache. Without a compiler, or where it fails, `library` is None and
everything takes the torch form.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")
SECONDS = 60  # that compiling may take
# Beyond so many rows that meet the large factor (tokens times slices), products of BLAS are faster,
# those of bfloat16 sooner: they have instructions of their own.
MOST_ROWS = {torch.float32: 16, torch.bfloat16: 8}
# Of small factors, which are applied in plain loops.
MOST_ENTRIES = 2**16
# The same for many tokens, where BLAS would do; and slices that are worth a loop.
MOST_MIXED, LEAST_SLICE = 64, 16
# How the names of the functions end.
NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
_POINTER, _SIZE, _FLAG = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_ARGUMENTS: dict[str, list[Any]] = {
    "decode": [_POINTER] * 5 + [_SIZE] * 6 + [_FLAG] * 3,
    "mix_many": [_POINTER] * 4 + [_SIZE] * 8 + [_FLAG],
    "gelu": [_POINTER] * 3 + [_SIZE, _FLAG],
}


def cache() -> Path:
    """The user's cache folder for compiled kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "krony"


def processor() -> str:
    """What `-march=native` depends on: the library of one machine may not run on another."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


@lru_cache(maxsize=1)
def library() -> dict[tuple[str, torch.dtype], Callable[..., int]] | None:
    """The compiled functions by name and dtype, or None where they can't be had."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or platform.system() != "Linux":
        return None
    try:
        loaded = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, RuntimeError, subprocess.SubprocessError):  # no home, no right to write, …
        return None
    found = {}
    for name, arguments in _ARGUMENTS.items():
        for dtype, ending in NAMES.items():
            function = getattr(loaded, f"{name}_{ending}")
            function.argtypes, function.restype = arguments, ctypes.c_int
            found[name, dtype] = function
    return found


def _compiled(compiler: str) -> Path:
    """The library's file, compiled if it is not there. Raises `OSError`, `SubprocessError`."""
    code = Path(__file__).with_name("decode.c").read_text(encoding="utf-8")
    parts = [code, *FLAGS, compiler, processor()]
    path = cache() / f"decode-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, source = Path(folder) / path.name, Path(folder) / "decode.c"
        source.write_text(code, encoding="utf-8")
        command = [compiler, *FLAGS, "-o", str(made), str(source)]
        subprocess.run(command, capture_output=True, check=True, timeout=SECONDS)
        os.replace(made, path)
    return path


def _can_take(x: Tensor) -> bool:
    """Whether x is a plain tensor of a dtype that is compiled, and nothing is being traced."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dtype in NAMES
        and not torch._C._are_functorch_transforms_active()
    )


def as_they_are(x: Tensor, small: Tensor, weight: Tensor) -> bool:
    """Whether input and factors are on the CPU (not offloaded, say) in one dtype, and neither
    autocast would change that nor anything watches or counts the operations on them."""
    return (
        x.dtype == small.dtype == weight.dtype
        and x.is_cpu
        and small.is_cpu
        and weight.is_cpu
        and not torch.is_autocast_enabled("cpu")
        and not _get_current_dispatch_mode_stack()
    )


def run(group: Any, x: Tensor) -> Tensor | None:
    """The product of a `KroneckerGroup` with a few tokens (..., n), or None where this is no help.

    It helps on a CPU, for plain factors of one dtype that is compiled, outside of autograd,
    autocast and tracing, and as long as reading the large factor is what takes the time.
    """
    small, weight = group.small, group.large.weight
    if not _can_take(x):
        return None
    tokens = x.numel() // x.shape[-1]
    (m1, n1), (m2, n2) = group.large_shape, group.small_shape
    slices = m2 if group.mix_first else n2
    low_rank = group.mix_first and n1 == m2 == 1
    if (
        not 0 < tokens * slices <= MOST_ROWS[x.dtype]
        or (group.terms * m2 * n2 > MOST_ENTRIES and not low_rank)
        or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        or not as_they_are(x, small, weight)
    ):
        return None
    functions = library()
    if functions is None:
        return None
    if group.scalars is not None:
        small = group.scaled_small
    x, small, weight = x.contiguous(), small.contiguous(), weight.contiguous()
    order = group.order
    y = x.new_empty(*x.shape[:-1], m1 * m2)
    failed = functions["decode", x.dtype](
        x.data_ptr(),
        small.data_ptr(),
        None if order is None else order.data_ptr(),
        weight.data_ptr(),
        y.data_ptr(),
        tokens,
        group.terms,
        m1,
        n1,
        m2,
        n2,
        group.layout == "small-outer",
        group.mix_first,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(f"no memory for the intermediate results of {tokens} tokens")
    return y


def mix(mixing: Tensor, x: Tensor, bias: Tensor | None, apart: bool) -> Tensor | None:
    """`kron.mix`, or None where this is no help.

    It helps on a CPU, for small factors with few entries, outside of autograd, autocast and
    tracing: a product of tiny matrices for every token takes BLAS several times as long.
    """
    if not _can_take(x):
        return None
    (tokens, q, k), p = x.shape, len(mixing)
    if (
        p * q > MOST_MIXED
        or k < LEAST_SLICE
        or x.stride(2) != 1
        or torch.is_grad_enabled()
        or not as_they_are(x, mixing, mixing if bias is None else bias)
        or (functions := library()) is None
    ):
        return None
    mixing, bias = mixing.float().contiguous(), None if bias is None else bias.contiguous()
    y = x.new_empty((p, tokens, k)).transpose(0, 1) if apart else x.new_empty((tokens, p, k))
    functions["mix_many", x.dtype](
        x.data_ptr(),
        mixing.data_ptr(),
        None if bias is None else bias.data_ptr(),
        y.data_ptr(),
        *(tokens, p, q, k, *x.stride()[:2], *y.stride()[:2]),
        torch.get_num_threads(),
    )
    return y


def has_gelu(x: Tensor) -> bool:
    """Whether `gelu` can be called on x: on a CPU, in a dtype that is compiled, not traced."""
    return (
        _can_take(x)
        and x.is_cpu
        and not _get_current_dispatch_mode_stack()
        and library() is not None
    )


def gelu(x: Tensor, gradient: Tensor | None = None) -> Tensor:
    """x/2 (1 + tanh(√(2/π) (x + 0.044715 x³))), or with the gradient of that the one of x.

    torch's takes several times as long, and in bfloat16 no less than in float32. Outside of
    autograd, and only where `has_gelu` says so.
    """
    functions = library()
    assert functions is not None
    x, gradient = x.contiguous(), None if gradient is None else gradient.contiguous()
    y = torch.empty_like(x)
    functions["gelu", x.dtype](
        x.data_ptr(),
        None if gradient is None else gradient.data_ptr(),
        y.data_ptr(),
        x.numel(),
        torch.get_num_threads(),
    )
    return y
