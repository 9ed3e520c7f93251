"""The machine and its memory: what figures were taken on, how large files are, how much memory the process has had."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["file_size", "machine", "peak_rss_bytes", "timed_load"]

T = TypeVar("T")


def timed_load(load: Callable[[], T], *, clock: Callable[[], float] = time.perf_counter) -> tuple[T, float]:
    """Call `load` and return what it loads with the seconds it took."""
    start = clock()
    loaded = load()
    return loaded, clock() - start


def file_size(path: Path | str) -> int:
    """Bytes of a file, or of all files in a directory and below; links are followed."""
    path = Path(path)
    if path.is_dir():
        return sum(child.stat().st_size for child in path.rglob("*") if child.is_file())
    return path.stat().st_size


def peak_rss_bytes() -> int:
    """The most physical memory this process has had since it started, in bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage on Linux: a process there begins with the peak of the one that started it.
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    import resource  # noqa: PLC0415 - the module exists on Unix only

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, Any]:
    """Describe where the figures were taken, JSON-able; what cannot be found out is absent."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(logical=True),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "os": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onnxruntime": _version("onnxruntime"),
        "onnxruntime_genai": _version("onnxruntime-genai"),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_average": round(psutil.getloadavg()[0], 2),
    }
    if torch.accelerator.is_available() and torch.cuda.is_available():
        facts["accelerator"] = torch.cuda.get_device_name()
    return {name: value for name, value in facts.items() if value}


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in {"model name", "Model", "Hardware"} and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
