"""What this machine has: devices, memory, compilers, and folders of what is kept between runs."""

from __future__ import annotations

import getpass
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch

from finetune.kernels.triton import remembered
from finetune.planning.device import machine_memory_gib

_GIB = 2**30


def describe() -> dict[str, Any]:
    """Facts for --json. memory_gib: of the machine or the limit that this process is held to."""
    devices = [_device(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "devices": devices,
        "why_no_gpu": None if devices else _why_no_gpu(),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": machine_memory_gib(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "compiler": next(filter(shutil.which, (os.environ.get("CXX") or "g++", "clang++", "gcc")), None),
        "interpreted": os.environ.get("TRITON_INTERPRET") == "1",
    }


def _device(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    free, total = torch.cuda.mem_get_info(index)
    capability = f"{properties.major}.{properties.minor}"
    return {
        "name": properties.name, "memory_gib": total / _GIB, "free_gib": free / _GIB, "compute_capability": capability,
    }  # fmt: skip


def _why_no_gpu() -> str:
    """Why torch sees none."""
    other = torch.accelerator.current_accelerator(check_available=True)
    if other is not None:
        return f"torch sees no CUDA device, but {other}"
    if shutil.which("nvidia-smi") is None and not Path("/proc/driver/nvidia").exists():
        return "no NVIDIA driver is installed"
    if torch.version.cuda is None:
        return "there is a driver, but this torch was built without CUDA: install a CUDA build"
    return f"there is a driver, but torch built for CUDA {torch.version.cuda} sees no device: is the driver too old?"


def _driver() -> str | None:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip().partition("\n")[0] or None


def caches() -> list[dict[str, Any]]:
    """Folders and files of what is compiled or measured once, with their sizes in GiB."""
    tiles = remembered.default_path()
    inductor = os.environ.get("TORCHINDUCTOR_CACHE_DIR") or Path(tempfile.gettempdir(), f"torchinductor_{_user()}")
    triton = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    places = {
        "kernels, by Triton": Path(triton),
        "layers, by torch.compile": Path(inductor),
        "chosen tiles": tiles,
    }
    return [{"what": what, "path": str(path), "gib": _size(path) / _GIB} for what, path in places.items()]


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "user"


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                total += Path(folder, name).stat().st_size
            except OSError:  # compiled by another process meanwhile
                continue
    return total
