"""Which cards this process can use, and why not: wheel, driver, number of cards, free memory.

``faiss.get_num_gpus`` says 0 for no card, for a driver that is too old, and for the CPU wheel
(faiss/gpu/utils/DeviceUtils.cu, getNumDevices), and faiss tells nobody how much memory is free. So
the driver itself is asked, through libcuda, which comes with it and knows CUDA_VISIBLE_DEVICES.
"""

import ctypes
import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass

import faiss

from shardline.shards.core.errors import ConfigError

# The wheels that install the module faiss, and the CUDA that each needs of the driver (major x
# 1000); a driver runs programs of every minor version of its major version.
WHEELS: Mapping[str, int] = {"faiss-cpu": 0, "faiss-gpu": 12_000, "faiss-gpu-cuvs": 13_000}
GPU_WHEELS = "faiss-gpu or faiss-gpu-cuvs"
LIBRARY = "libcuda.so.1"


@dataclass(frozen=True, slots=True)
class Memory:
    """Of a card, in bytes."""

    free: int
    total: int


def gpu_count() -> int:
    """Cards that this build of faiss can use; 0 for the CPU wheel."""
    return int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0


def installed_wheels() -> dict[str, str]:
    """The wheels of faiss that are installed, with their versions."""
    found = {}
    for name in WHEELS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver_cuda() -> int | None:
    """The CUDA version of the driver, as 12040 for 12.4; None: there is no driver."""
    version = ctypes.c_int()
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError:
        return None
    return version.value if library.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def memory_of(card: int) -> Memory:
    """What the driver says of a card that exists.

    Raises:
        ConfigError: the driver does not answer.
    """
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    library = ctypes.CDLL(LIBRARY)
    for code in (
        library.cuInit(0),
        library.cuDeviceGet(ctypes.byref(device), card),
        library.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        library.cuCtxPushCurrent_v2(context),
        library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
        library.cuCtxPopCurrent_v2(ctypes.byref(context)),
    ):
        if code:
            raise ConfigError(
                f"the memory of card {card} is not known",
                field="index.device",
                expected="an answer of the driver",
                got=f"CUDA error {code}",
                hint="check the card with nvidia-smi, or set index.device to cpu",
            )
    return Memory(free=free.value, total=total.value)


def trouble_of_wheels(wheels: Mapping[str, str]) -> ConfigError | None:
    """What is wrong with the installed wheels, whatever the device."""
    if len(wheels) == 1:
        return None
    return ConfigError(
        "more than one faiss wheel is installed" if wheels else "no faiss wheel is installed",
        field="index.device",
        expected=f"exactly one of {', '.join(WHEELS)}",
        got=", ".join(f"{name} {version}" for name, version in wheels.items()) or "none",
        hint="install the cpu or the gpu extra into a fresh environment",
    )


def why_no_card(card: int = 0) -> ConfigError | None:
    """Why a card cannot be used by this process, in one line; None: it can."""
    wheels = installed_wheels()
    count = gpu_count()
    if hasattr(faiss, "StandardGpuResources") and card < count and len(wheels) <= 1:
        return None
    wrong = trouble_of_wheels(wheels)
    if wrong is not None:
        return wrong
    ((name, version),) = wheels.items()
    if not WHEELS[name] or not hasattr(faiss, "StandardGpuResources"):
        return _no_card(
            "no GPU can be used here: this faiss has no GPU code",
            expected=f"the wheel {GPU_WHEELS}",
            got=f"{name} {version}",
            hint="make install FAISS=gpu, or set index.device to cpu",
        )
    cuda = driver_cuda()
    if cuda is not None and cuda < WHEELS[name]:
        return _no_card(
            "no GPU can be used here: the NVIDIA driver is too old",
            expected=f"a driver for CUDA {WHEELS[name] // 1000} ({name} {version})",
            got=f"CUDA {cuda // 1000}.{cuda % 1000 // 10}",
            hint="install a newer driver, or set index.device to cpu",
        )
    if count:
        return _no_card(
            f"there is no card {card}",
            expected=f"cuda:0 to cuda:{count - 1}" if count > 1 else "cuda:0",
            got=f"cuda:{card}",
            hint="cards are counted among those that the process sees, and Ray shows a shard the "
            "cluster.gpus_per_shard that it reserves",
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return _no_card(
        "no GPU can be used here: there is no card",
        expected="a CUDA device that this process sees",
        got="no driver" if cuda is None else f"0 cards, CUDA_VISIBLE_DEVICES {visible!r}",
        hint="or set index.device to cpu",
    )


def _no_card(message: str, *, expected: str, got: str, hint: str) -> ConfigError:
    return ConfigError(message, field="index.device", expected=expected, got=got, hint=hint)
