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
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import psutil
import xxhash

import outlast
from outlast.cluster.errors import Misuse
from outlast.launch.config import host_and_port
from outlast.launch.interface import Interface

EXAMINATION_S = 90.0  # importing torch on a busy disk is what takes longest
GEMM_SIZE, GEMM_SUM = 1024, "60f881009cdb6f28"  # of whole numbers: exact in any order of sums
GEMM_S = 0.5  # the quickest of many says what the processor can do, not who else is on it
JOB_PORTS = (10000, 32000)
TOO_HOT_OR_HUNGRY = 0xE8  # of NVML's reasons: slowed by hardware, heat (two kinds), power brake

Result = TypeVar("Result")
Measure = tuple[float | None, str]  # value, None where there is none to judge, and what to show


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """A node, and what a job would want of it."""

    node: str
    nodes: tuple[str, ...]
    endpoints: tuple[str, ...]
    workers: int
    worker_bytes: int
    log_dir: Path


def within(limit_s: float, work: Callable[[], Result]) -> Result:
    """The result of `work`, or TimeoutError; what hangs is left to the end of the process."""
    result: Future[Result] = Future()

    def run() -> None:
        if result.set_running_or_notify_cancel():
            try:
                result.set_result(work())
            except (OSError, RuntimeError, Misuse, ImportError, ValueError) as error:
                result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result.result(limit_s)


def examine(patient: Patient, way: Interface | Misuse) -> dict[str, Measure]:
    """All measurements of this node."""
    checks: dict[str, Callable[[], Measure]] = {
        "clock": _clock,
        "host name": _host_name,
        "interface": lambda: _interface(way),
        "ports": lambda: _ports(patient, way),
        "open files": lambda: _limit(resource.RLIMIT_NOFILE),
        "processes": lambda: _limit(resource.RLIMIT_NPROC),
        "memory": lambda: _memory(patient.workers * patient.worker_bytes),
        "/dev/shm": _shared_memory,
        "log disk": lambda: _disk(patient.log_dir),
        "load": _load,
        "governor": _governor,
        "torch": _torch,
        "gemm": lambda: _gemm("cpu"),
        "gpu memory errors": lambda: _nvml(_memory_errors),
        "gpu slowdown": lambda: _nvml(_slowdown),
        "gpu in use": lambda: _nvml(_in_use),  # before we are on it
        "gpu": _gpus,
    }
    measures: dict[str, Measure] = {}
    deadline = time.monotonic() + EXAMINATION_S
    for name, check in checks.items():
        try:
            measures[name] = within(max(1.0, deadline - time.monotonic()), check)
        except TimeoutError:
            measures[name] = None, "failed: no answer; it hangs"
        except (OSError, RuntimeError, Misuse, ImportError, ValueError) as error:
            measures[name] = None, f"failed: {' '.join(str(error).split())}"
    return measures


def _clock() -> Measure:
    """Seconds by which it is before the installation of this program, which was in the past."""
    behind = Path(outlast.__file__).stat().st_mtime - time.time()
    return max(0.0, behind), time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())


def _host_name() -> Measure:
    name = socket.gethostname()
    try:
        address = socket.gethostbyname(name)
    except OSError:
        return 1, f"{name} is not known here"
    return float(address.startswith("127.")), f"{name} is {address} here"


def _interface(way: Interface | Misuse) -> Measure:
    if isinstance(way, Misuse):
        raise way
    speed = psutil.net_if_stats()[way.name].speed if way.name else 0
    text = f"{way.name or 'loopback'} {way.address}"
    return speed or None, f"{text}, {speed} Mbit/s" if speed else text


def _ports(patient: Patient, way: Interface | Misuse) -> Measure:
    for port in {host_and_port(text)[1] for text in patient.endpoints}:
        host = "" if isinstance(way, Misuse) else way.address
        try:
            socket.create_server((host, port), family=socket.AF_INET6 if ":" in host
                                 else socket.AF_INET).close()  # fmt: skip
        except OSError as error:
            raise RuntimeError(f"the job's port {port}: {error.strerror}; does it run?") from error
    low, high = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    return float(max(0, JOB_PORTS[1] - int(low))), f"the kernel gives out {low} to {high}"


def _limit(kind: int) -> Measure:
    soft = resource.getrlimit(kind)[0]
    return (None, "unlimited") if soft == resource.RLIM_INFINITY else (float(soft), f"{soft:,}")


def _memory(needed: int) -> Measure:
    free = min(psutil.virtual_memory().available, _group_memory())
    text = f"{free / 1e9:.1f} GB free"
    if not needed:
        return None, text
    return free / needed, f"{text}, {needed / 1e9:.1f} GB needed"


def _group_memory() -> float:
    """Bytes that the control groups of this process still allow; version 2 and 1."""
    free = math.inf
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        root = Path("/sys/fs/cgroup", "memory" if "memory" in kinds else "")
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if "memory" in kinds else (
            "memory.max", "memory.current")  # fmt: skip
        for group in (root / path.lstrip("/"), *(root / path.lstrip("/")).parents):
            with contextlib.suppress(OSError, ValueError):  # "max", or not ours to see
                limit, used = (int((group / name).read_text()) for name in names)
                free = min(free, limit - used)
    return free


def _shared_memory() -> Measure:
    free = shutil.disk_usage("/dev/shm").free
    return free / 2**20, f"{free / 2**20:,.0f} MiB free"


def _disk(directory: Path) -> Measure:
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / f".doctor-{socket.gethostname()}-{os.getpid()}"
    probe.write_bytes(b"x")
    probe.unlink()
    free = shutil.disk_usage(directory).free / 1e9
    return free, f"{free:,.0f} GB free in {directory}"


def _load() -> Measure:
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
    return load / (os.cpu_count() or cores), f"{load:.1f} on {cores} cores of this job"


def _governor() -> Measure:
    file = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    name = file.read_text().strip() if file.exists() else "none"
    return float(name in ("powersave", "conservative")), name


def _torch() -> Measure:
    began = time.monotonic()
    import torch

    return time.monotonic() - began, f"{torch.__version__}"


def _gemm(device: str) -> Measure:
    """Seconds of a product of whole numbers, whose bits are known."""
    import torch

    line = torch.arange(GEMM_SIZE, dtype=torch.float32, device=device)
    a, b = (line[:, None] * 7 + line * 13) % 17 - 8, (line[:, None] * 5 + line * 11) % 19 - 9
    took, until = math.inf, time.monotonic() + GEMM_S
    while took == math.inf or time.monotonic() < until:
        began = time.monotonic()
        product = (a @ b).cpu()
        took = min(took, time.monotonic() - began)
        if xxhash.xxh3_64_hexdigest(product.numpy().tobytes()) != GEMM_SUM:
            raise RuntimeError(f"wrong product on {device}: this processor computes wrongly")
    return took, f"{1e3 * took:.1f} ms"


def numerics() -> str:
    """What decides the bits of results here."""
    from outlast.runtime import determinism

    return determinism.numerics()


def _driven() -> bool:
    return any(Path("/proc/driver/nvidia/gpus").glob("*"))


def _gpus() -> Measure:
    """Every GPU multiplies rightly and adds over NCCL with the others of the node."""
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



def _nvml(read: Callable[[Any, Any], int]) -> Measure:
    """The largest count that `read` (of the library and a GPU) finds."""
    if not _driven():
        return None, ""
    try:
        import pynvml as nvml
    except ImportError:
        return None, "not read: pip install 'outlast[gpu]'"
    try:
        nvml.nvmlInit()
        gpus = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        found = max(read(nvml, gpu) for gpu in gpus)
    except nvml.NVMLError as error:
        return None, f"not read: {error}"
    return float(found), str(found)


def _memory_errors(nvml: Any, gpu: Any) -> int:
    kind, since = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    return int(nvml.nvmlDeviceGetTotalEccErrors(gpu, kind, since))


def _slowdown(nvml: Any, gpu: Any) -> int:
    return int(bool(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(gpu) & TOO_HOT_OR_HUNGRY))


def _in_use(nvml: Any, gpu: Any) -> int:
    return len(nvml.nvmlDeviceGetComputeRunningProcesses(gpu))
