"""decode.c, hidden.c and tiles.c, compiled for this processor when first needed, and called.

As Triton compiles for a GPU, the system's C compiler does here: in a few seconds, once; the library
is kept in the user's cache. Without a compiler, or where it fails, `library` is None and everything
takes the torch form. They are called through ctypes: what is element by element from here, products
from cpu_decode.py and cpu_tiles.py.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack

from krony.nn import switches

FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fopenmp", "-shared", "-fPIC", "-std=gnu11")
SECONDS = 60  # that compiling may take
# Of small factors that are applied in plain loops, where BLAS would do (MOST_SLICES of hidden.c is
# as many), and slices that are worth a loop.
MOST_MIXED, LEAST_SLICE = 64, 16
# How the names of the functions end.
NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
POINTER, SIZE, FLAG = ctypes.c_void_p, ctypes.c_long, ctypes.c_int
_ARGUMENTS: dict[str, list[Any]] = {
    "decode": [POINTER, SIZE, FLAG, POINTER, POINTER, POINTER, SIZE, FLAG],
    "hidden": [POINTER, POINTER, FLAG, POINTER, POINTER] + [SIZE] * 6 + [FLAG],
    "gelu": [POINTER] * 3 + [SIZE, FLAG],
    "fill": [POINTER] * 3 + [SIZE, SIZE, FLAG],
}
_TILES: list[Any] = [
    *(POINTER, FLAG, POINTER, POINTER, FLAG, FLAG, POINTER, SIZE),
    *(POINTER, POINTER, POINTER, SIZE, SIZE, FLAG),
]
# As vectors.h numbers them.
NONE, TANH_GELU, SILU = range(3)


class _Written(ctypes.Structure):
    """Of hidden.c."""

    _fields_: ClassVar = [(name, POINTER) for name in ("x", "b", "bias")] + [
        (name, SIZE) for name in ("q", "token", "slice")
    ]


def cache() -> Path:
    """The user's cache folder for compiled kernels."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "krony"


@lru_cache(maxsize=1)
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
    if loaded.tiles_allowed():  # bfloat16 is the only dtype of the unit
        loaded.tiles.argtypes, loaded.tiles.restype = _TILES, ctypes.c_int
        found["tiles", torch.bfloat16] = loaded.tiles
    return found


def _compiled(compiler: str) -> Path:
    """The library's file, compiled if it is not there. Raises `OSError`, `SubprocessError`."""
    code = {
        "vectors.h": Path(__file__).with_name("vectors.h").read_text(encoding="utf-8"),
        "decode.c": Path(__file__).with_name("decode.c").read_text(encoding="utf-8"),
        "hidden.c": Path(__file__).with_name("hidden.c").read_text(encoding="utf-8"),
        "tiles.c": Path(__file__).with_name("tiles.c").read_text(encoding="utf-8"),
    }
    parts = [*code.values(), *FLAGS, compiler, processor()]
    path = cache() / f"decode-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made, sources = Path(folder) / path.name, [Path(folder) / name for name in code]
        for source, text in zip(sources, code.values(), strict=True):
            source.write_text(text, encoding="utf-8")
        command = [compiler, *FLAGS, "-o", str(made), *map(str, sources[1:])]
        subprocess.run(command, capture_output=True, check=True, timeout=SECONDS)
        os.replace(made, path)
    return path


def can_take(x: Tensor) -> bool:
    """Whether x is a plain tensor of a dtype that is compiled, and nothing is being traced."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.dtype in NAMES
        and not _are_functorch_transforms_active()
        and _get_tracing_state() is None
    )


def undisturbed(x: Tensor) -> bool:
    """Whether x is outside of autocast, and nothing watches or counts operations."""
    autocast = torch.is_autocast_enabled(x.device.type)
    return not autocast and not _len_torch_dispatch_stack()


def unwatched(x: Tensor) -> bool:
    """Whether that is so and x on the CPU."""
    return x.is_cpu and undisturbed(x)


def as_they_are(x: Tensor, small: Tensor, weight: Tensor) -> bool:
    """Whether input and factors are on the CPU (not offloaded, say) in one dtype, and neither
    autocast would change that nor anything watches or counts the operations on them."""
    same = x.dtype == small.dtype == weight.dtype
    return same and small.is_cpu and weight.is_cpu and unwatched(x)


def mix(mixing: Tensor, x: Tensor, bias: Tensor | None, apart: bool) -> Tensor | None:
    """`products.mix`, or None where this is no help.

    It helps on a CPU, for small factors with few entries, outside of autograd, autocast and
    tracing: a product of tiny matrices for every token takes BLAS several times as long.
    """
    if not can_take(x) or not switches.allows("mix"):
        return None
    p, q, k = *mixing.shape, x.shape[2]
    if (
        p * q > MOST_MIXED
        or k < LEAST_SLICE
        or x.stride(2) != 1
        or torch.is_grad_enabled()
        or not as_they_are(x, mixing, mixing if bias is None else bias)
        or library() is None
    ):
        return None
    return hidden([(x, mixing, bias)], NONE, None, room(x, p, apart))


def hidden(
    written: Sequence[tuple[Tensor, Tensor | None, Tensor | None]],
    activation: int,
    mixing: Tensor | None,
    out: Tensor,
) -> Tensor:
    """The hidden axis of an MLP, from the large products that write it to the one that reads it.

    Only where `library` is, for tensors of one dtype that is compiled, outside of autograd.

    Args:
        written: of one matrix or of two, the second a factor of the activation of the first: x (T,
            q, k), the last stride 1; the matrix (m2, q) that mixes its slices, or None; the bias
            (m2, k), or None. No more than `MOST_MIXED` slices.
        mixing: (p, m2), to mix the result's slices with, or None.
        out: (T, p, k), or (T, m2, k), for the result, the last stride 1; may be the first x where
            nothing is mixed.
    Returns:
        out.
    """
    functions = library()
    assert functions is not None
    kept, parts = [], []
    for x, b, bias in written:
        b = None if b is None else b.float().contiguous()
        bias = None if bias is None else bias.contiguous()
        kept += [b, bias]
        sizes = (x.shape[1], *x.stride()[:2])
        parts.append(_Written(x.data_ptr(), _pointer(b), _pointer(bias), *sizes))
    tokens, p, k = out.shape
    mixing = None if mixing is None else mixing.float().contiguous()
    functions["hidden", out.dtype](
        ctypes.byref(parts[0]),
        ctypes.byref(parts[1]) if len(parts) > 1 else None,
        activation,
        _pointer(mixing),
        out.data_ptr(),
        *(tokens, k, p if mixing is None else mixing.shape[1], p, *out.stride()[:2]),
        torch.get_num_threads(),
    )
    return out


def room(x: Tensor, p: int, apart: bool) -> Tensor:
    """For p slices of as many tokens as x (T, q, k) has: (T, p, k), each slice or each token in one
    piece of memory."""
    tokens, _, k = x.shape
    return x.new_empty((p, tokens, k)).transpose(0, 1) if apart else x.new_empty((tokens, p, k))


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()


def has_tiles() -> bool:
    """Whether there is a tile unit, and this process may use it."""
    functions = library()
    return functions is not None and ("tiles", torch.bfloat16) in functions


def tiles(*arguments: Any) -> bool:
    """tiles.c's, only where `has_tiles`: whether there was no memory for it."""
    functions = library()
    assert functions is not None
    return functions["tiles", torch.bfloat16](*arguments) != 0


def has_gelu(x: Tensor) -> bool:
    """Whether `gelu` can be called on x: on a CPU, in a dtype that is compiled, not traced."""
    return (
        can_take(x)
        and x.is_cpu
        and not _len_torch_dispatch_stack()
        and switches.allows("gelu")
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
    threads = torch.get_num_threads()
    pointers = (x.data_ptr(), _pointer(gradient), y.data_ptr())
    functions["gelu", x.dtype](*pointers, x.numel(), threads)
    return y


def fill(free: Tensor, order: Tensor) -> Tensor | None:
    """`runtime.products.fill`, or None where this is no help.

    It helps on a CPU, outside of autograd, autocast and tracing: torch picks columns one by one.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not order.is_cpu:
        return None
    free = free.detach()  # of a parameter, its tensor
    if not can_take(free) or not unwatched(free) or not switches.allows("fill"):
        return None
    if not free.is_contiguous() or not order.is_contiguous() or order.dtype != torch.int32:
        return None
    functions = library()
    if functions is None:
        return None
    (terms, given), threads = free.shape, torch.get_num_threads()
    full = free.new_empty((terms, given + terms))
    pointers = (free.data_ptr(), order.data_ptr(), full.data_ptr())
    functions["fill", free.dtype](*pointers, terms, given + terms, threads)
    return full
