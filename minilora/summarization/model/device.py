"""Where and in which precision the model computes, and when memory runs out."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import UserError, one_line


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA, then Apple's MPS, then the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails on the meta device
    except (RuntimeError, AssertionError, ImportError) as error:
        why = one_line(error, name=True)
        raise UserError(f"--device {name}: {why}; --device auto chooses one that works") from None
    return device


def choose_precision(name: str, device: torch.device) -> torch.dtype | None:
    """The dtype of autocast, or None for float32.

    `auto` is bf16 where the hardware multiplies it faster, fp16 on older GPUs, fp32 otherwise.
    """
    if name != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device) >= (8, 0)
        return torch.bfloat16 if native else torch.float16
    if device.type == "cpu" and _cpu_multiplies_bf16():
        return torch.bfloat16
    return None


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Mixed precision in `dtype` on the device; None: none."""
    return torch.autocast(device.type, dtype, enabled=dtype is not None)


def _cpu_multiplies_bf16() -> bool:
    flags = Path("/proc/cpuinfo")
    if not flags.exists() or "AVX512" not in torch.backends.cpu.get_cpu_capability():
        return False
    return multiplies_bf16_faster(flags.read_text(errors="replace"))


def multiplies_bf16_faster(cpuinfo: str) -> bool:
    """Whether bf16 is faster than float32 on the processor that /proc/cpuinfo describes.

    It is with AMX and with AMD's AVX512-BF16. Intel's AVX512-BF16 without AMX multiplies bf16 at
    0.55 of float32's rate (docs/log.md, 2026-11-26).
    """
    return "amx_bf16" in cpuinfo or ("avx512_bf16" in cpuinfo and "AuthenticAMD" in cpuinfo)


def peak_bytes(device: torch.device) -> int:
    """Peak memory: of the GPU's allocator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource  # POSIX only
    except ImportError:
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def is_out_of_memory(error: BaseException) -> bool:
    """Whether GPU or main memory ran out; for the latter torch has no class of error."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    signs = ("out of memory", "can't allocate memory", "not enough memory")
    said = str(error).lower()
    return isinstance(error, RuntimeError) and any(sign in said for sign in signs)


@contextmanager
def out_of_memory(where: str, instead: str) -> Iterator[None]:
    """Inside the block an allocation that fails ends in one line: "out of memory", where, instead.

    Raises:
        UserError: memory ran out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"out of memory {where}: {instead}") from None
