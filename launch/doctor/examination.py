"""What a doctor measures on one node; nothing here judges, see `diagnosis`.

Invariant: every measurement has a deadline and is written down as what it found, so that a node
with a broken disk, driver or clock still says so.
"""

import contextlib
import math
import os
import resource
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import xxhash

import outlast
from outlast.cluster.errors import Misuse, PeerLost
from outlast.launch.doctor.diagnosis import FAILED
from outlast.launch.interface import Interface

EXAMINATION_S = 90.0  # importing torch on a busy disk is what takes longest
GEMM_SIZE, GEMM_SUM = 1024, "60f881009cdb6f28"  # of whole numbers: exact in any order of sums
GEMM_S = 0.5
JOB_PORTS_STOP = 32000  # see `surroundings` and `torch_environment`
TOO_HOT_OR_HUNGRY = 0xE8  # of NVML's reasons: slowed by hardware, heat (two kinds), power brake
FAILURES = (OSError, RuntimeError, ValueError, KeyError, ImportError, Misuse, PeerLost)
THREADS = ThreadPoolExecutor(64)  # what hangs in one is left to the end of the process

Measure = tuple[float | None, str]  # value, None where there is none to judge, and what to show


def examine(
    way: Interface | Misuse, ports: Sequence[int], needed: int, log_dir: Path
) -> dict[str, Measure]:
    """All measurements of this node, for a job with these ports that needs so many bytes."""
    checks: dict[str, Callable[[], Measure]] = {
        "clock": _clock,
        "host name": _host_name,
        "interface": lambda: _interface(way),
        "ports": lambda: _ports(way, ports),
        "open files": lambda: _limit(resource.RLIMIT_NOFILE),
        "processes": lambda: _limit(resource.RLIMIT_NPROC),
        "memory": lambda: _memory(needed),
        "/dev/shm": lambda: _free(Path("/dev/shm"), 2**20, "MiB"),
        "log disk": lambda: _disk(log_dir),
        "load": _load,
        "governor": _governor,
        "torch": _torch,
        "gemm": lambda: _gemm("cpu"),
        # Before we use it ourselves.
        **{name: lambda read=read: _nvml(read) for name, read in NVML.items()},
        "gpu": _gpus,
    }
    measures: dict[str, Measure] = {}
    deadline = time.monotonic() + EXAMINATION_S
    for name, check in checks.items():
        try:
            limit_s = max(1.0, deadline - time.monotonic())
            measures[name] = THREADS.submit(check).result(limit_s)
        except FAILURES as error:
            measures[name] = None, FAILED + failure_text(error)
    return measures


def failure_text(error: BaseException) -> str:
    """One line."""
    silent = "no answer" if isinstance(error, TimeoutError) else type(error).__name__
    return " ".join(str(error).split())[:200] or silent


def _clock() -> Measure:
    """Seconds by which it is before the installation of this program, which was in the past."""
    behind = Path(outlast.__file__).stat().st_mtime - time.time()
    return max(0.0, behind), time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def _host_name() -> Measure:
    name = socket.gethostname()
    with contextlib.suppress(OSError):
        address = socket.gethostbyname(name)
        return float(address.startswith("127.")), f"{name} is {address} here"
    return 1, f"{name} is not known here"


def _interface(way: Interface | Misuse) -> Measure:
    if isinstance(way, Misuse):
        raise way
    speed = psutil.net_if_stats()[way.name].speed if way.name else 0
    text = f"{way.name or 'loopback'} {way.address}"
    return (speed, f"{text}, {speed} Mbit/s") if speed else (None, text)


def _ports(way: Interface | Misuse, ports: Sequence[int]) -> Measure:
    host = "" if isinstance(way, Misuse) else way.address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for port in ports:
        try:
            socket.create_server((host, port), family=family).close()
        except OSError as error:
            raise RuntimeError(f"the job's port {port}: {error.strerror}; does it run?") from error
    low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return float(max(0, JOB_PORTS_STOP - int(low))), f"the kernel gives out {low} to {high}"


def _limit(kind: int) -> Measure:
    soft = resource.getrlimit(kind)[0]
    return (None, "unlimited") if soft == resource.RLIM_INFINITY else (float(soft), f"{soft:,}")


def _memory(needed: int) -> Measure:
    free = min(psutil.virtual_memory().available, _group_memory())
    text = f"{free / 1e9:.1f} GB free"
    return (free / needed, f"{text}, {needed / 1e9:.1f} GB needed") if needed else (None, text)


def _group_memory() -> float:
    """Bytes that the control groups of this process still allow; version 2 and 1."""
    free = math.inf
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        old = "memory" in kinds
        group = Path("/sys/fs/cgroup", "memory" if old else "", path.lstrip("/"))
        names = ("limit_in_bytes", "usage_in_bytes") if old else ("max", "current")
        for part in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # "max", or not ours to see
                limit, used = (int((part / f"memory.{name}").read_text()) for name in names)
                free = min(free, limit - used)
    return free


def _free(directory: Path, unit: float, name: str) -> Measure:
    free = shutil.disk_usage(directory).free / unit
    return free, f"{free:,.0f} {name} free in {directory}"


def _disk(directory: Path) -> Measure:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".doctor-{socket.gethostname()}-{os.getpid()}"
    probe.write_bytes(b"x")
    probe.unlink()
    return _free(directory, 1e9, "GB")


def _load() -> Measure:
    load, cores = os.getloadavg()[0], len(os.sched_getaffinity(0))
    return load / (os.cpu_count() or cores), f"{load:.1f} on {cores} cores of this job"


def _governor() -> Measure:
    file = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    name = file.read_text().strip() if file.exists() else "none"
    return float(name in ("powersave", "conservative")), name


def _torch() -> Measure:
    began = time.monotonic()
    from outlast.runtime.determinism import numerics

    return time.monotonic() - began, numerics()


def _gemm(device: str) -> Measure:
    """Processor seconds of a product of whole numbers, whose bits are known: on all cores once,
    then on one, which is timed: how fast it is, and not who else is on it."""
    import torch

    line = torch.arange(GEMM_SIZE, dtype=torch.float32, device=device)
    a, b = (line[:, None] * 7 + line * 13) % 17 - 8, (line[:, None] * 5 + line * 11) % 19 - 9
    times, until = list[float](), time.monotonic() + GEMM_S
    while len(times) < 3 or time.monotonic() < until:
        began = time.thread_time()
        product = (a @ b).cpu()
        times.append(time.thread_time() - began)
        torch.set_num_threads(1)
        if xxhash.xxh3_64_hexdigest(product.numpy().tobytes()) != GEMM_SUM:
            raise RuntimeError(f"wrong product on {device}: this processor computes wrongly")
    took = min(times[1:])
    return took, f"{1e3 * took:.1f} ms"


def _driven() -> bool:
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))


def _gpus() -> Measure:
    """Every GPU multiplies rightly, and adds over NCCL with the others of the node."""
    import torch

    count = torch.cuda.device_count()
    if not count and not _driven():
        return None, "no GPU"
    if not count:
        raise RuntimeError("the driver has GPUs, torch has none")
    for index in range(count):
        _gemm(f"cuda:{index}")
    ones = [torch.ones(1 << 20, device=f"cuda:{index}") for index in range(count)]
    torch.cuda.nccl.all_reduce(ones)
    if any(float(one.min()) != count or float(one.max()) != count for one in ones):
        raise RuntimeError("NCCL adds wrongly between the GPUs of this node")
    return None, f"{count} x {torch.cuda.get_device_name(0)}"


NVML: dict[str, Callable[[Any, Any], float]] = {
    "gpu memory errors": lambda nvml, gpu: nvml.nvmlDeviceGetTotalEccErrors(
        gpu, nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC),
    "gpu slowdown": lambda nvml, gpu: bool(
        nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu) & TOO_HOT_OR_HUNGRY),
    "gpu in use": lambda nvml, gpu: len(nvml.nvmlDeviceGetComputeRunningProcesses(gpu)),
}  # fmt: skip


def _nvml(read: Callable[[Any, Any], float]) -> Measure:
    """The largest that `read` (of the library and a GPU) finds."""
    if not _driven():
        return None, ""
    try:
        import pynvml as nvml
    except ImportError:
        return None, "not read: pip install 'outlast[gpu]'"
    try:
        nvml.nvmlInit()
        gpus = map(nvml.nvmlDeviceGetHandleByIndex, range(nvml.nvmlDeviceGetCount()))
        found = max(read(nvml, gpu) for gpu in gpus)
    except nvml.NVMLError as error:
        return None, f"not read: {error}"
    return found, f"{found:g}"
