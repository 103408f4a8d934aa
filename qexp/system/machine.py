"""The machine: its processor, memory and limits, which CPUs a process may use, and which processes run."""

from __future__ import annotations

import math
import os
import platform
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from qexp.system.cpu_load import load_average

UNKNOWN = "unknown"

# The space of process ids outside of containers (PROC_PID_INIT_INO in Linux's include/linux/proc_ns.h).
FIRST_PID_SPACE = "pid:[4026531836]"

# Seconds; Linux rounds the time of the system's start to a whole second, not always to the same one.
SAME_START = 2.0

# From the most to the least capable: the tag of the first whose flags (Linux's names) are all there.
ISA: tuple[tuple[str, frozenset[str]], ...] = (
    ("amx", frozenset({"amx_int8"})),
    ("avx512_vnni", frozenset({"avx512_vnni"})),
    ("avx_vnni", frozenset({"avx_vnni"})),
    ("avx512", frozenset({"avx512f", "avx512bw", "avx512vl"})),
    ("avx2", frozenset({"avx2"})),
    ("sve", frozenset({"sve"})),
    ("neon_dotprod", frozenset({"asimddp"})),
    ("neon", frozenset({"asimd"})),
    ("neon", frozenset({"neon"})),
    ("sse4", frozenset({"sse4_1"})),
)


@dataclass(frozen=True)
class Machine:
    """The machine that a measurement holds for. memory in bytes; load: runnable tasks, mean of the last minute."""

    cpu: str
    isa: str
    flags: tuple[str, ...]
    architecture: str
    logical_cores: int
    physical_cores: int | None
    smt: str
    governor: str
    turbo: str
    memory: int | None
    memory_limit: int | None
    cpu_limit: float | None
    allowed_cores: int
    load: float | None
    virtual: str
    system: str
    python: str


def describe(root: Path = Path("/")) -> Machine:
    """The machine as it is now. root: the folder of `proc` and `sys`, for tests."""
    text = _read(root / "proc/cpuinfo")
    flags = _flags(text)
    siblings = core_siblings(root)
    return Machine(
        cpu=_cpu(text),
        isa=isa(flags),
        flags=tuple(sorted(flag for flag in flags if any(flag in wanted for _, wanted in ISA))),
        architecture=platform.machine(),
        logical_cores=os.cpu_count() or 1,
        physical_cores=len(siblings) or None,
        smt=_smt(root, siblings),
        governor=_read(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor") or UNKNOWN,
        turbo=_turbo(root),
        memory=_memory(_read(root / "proc/meminfo")),
        memory_limit=memory_limit(root),
        cpu_limit=cpu_limit(root),
        allowed_cores=allowed_cores(root),
        load=load_average(),
        virtual=UNKNOWN if not text else "yes" if "hypervisor" in flags else "no",
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
    )


# Beginnings of the names of flags that a compiler can make use of when it compiles for one CPU.
_COMPILED = (
    "ssse3", "sse4_", "avx", "fma", "f16c", "bmi", "abm", "popcnt", "movbe", "gfni", "vaes", "vpclmulqdq", "amx",
    "asimd", "neon", "sve", "sme", "i8mm", "bf16",
)  # fmt: skip


def features(root: Path = Path("/")) -> frozenset[str]:
    """The CPU's instruction sets that code compiled for it can contain, by Linux's names."""
    return frozenset(flag for flag in _flags(_read(root / "proc/cpuinfo")) if flag.startswith(_COMPILED))


def isa(flags: set[str]) -> str:
    """The tag of the most capable instruction set among the flags of /proc/cpuinfo; "unknown" where none is known."""
    return next((tag for tag, wanted in ISA if wanted <= flags), UNKNOWN)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _field(text: str, *names: str) -> str:
    """The first value of `name : value` in a file of /proc."""
    for name in names:
        found = re.search(rf"^{re.escape(name)}\s*:\s*(.+)$", text, re.MULTILINE)
        if found:
            return found.group(1).strip()
    return ""


def _flags(cpuinfo: str) -> set[str]:
    # "flags" on x86, "Features" on ARM. macOS has no such file; every 64-bit ARM processor has NEON.
    flags = set(_field(cpuinfo, "flags", "Features").split())
    return flags or ({"neon"} if platform.machine() in ("arm64", "aarch64") else set())


def _cpu(cpuinfo: str) -> str:
    name = _field(cpuinfo, "model name", "Model", "Hardware", "cpu model") or platform.processor()
    family, model = _field(cpuinfo, "cpu family"), _field(cpuinfo, "model")
    # Virtual machines hide the model's name ("AMD EPYC"); family and model still tell the generation.
    return f"{name} (family {family}, model {model})" if name and family and model else name or UNKNOWN


def core_siblings(root: Path = Path("/")) -> tuple[tuple[int, ...], ...]:
    """The hardware threads of each physical core, in order; empty where the system doesn't say."""
    folder = root / "sys/devices/system/cpu"
    cores: dict[tuple[str, str], list[int]] = {}
    for path in sorted(folder.glob("cpu[0-9]*"), key=lambda path: int(path.name[3:])):
        core, package = _read(path / "topology/core_id"), _read(path / "topology/physical_package_id")
        if core:
            cores.setdefault((package, core), []).append(int(path.name[3:]))
    return tuple(tuple(threads) for threads in cores.values())


def _smt(root: Path, siblings: tuple[tuple[int, ...], ...]) -> str:
    control = _read(root / "sys/devices/system/cpu/smt/active")
    if control in ("0", "1"):
        return "on" if control == "1" else "off"
    return UNKNOWN if not siblings else "on" if any(len(threads) > 1 for threads in siblings) else "off"


def _turbo(root: Path) -> str:
    cpu = root / "sys/devices/system/cpu"
    intel, other = _read(cpu / "intel_pstate/no_turbo"), _read(cpu / "cpufreq/boost")
    if intel in ("0", "1"):
        return "off" if intel == "1" else "on"
    return {"0": "off", "1": "on"}.get(other, UNKNOWN)


def _memory(meminfo: str) -> int | None:
    found = re.search(r"^MemTotal:\s*(\d+) kB", meminfo, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _cgroups(root: Path, controller: str) -> list[Path]:
    """The folders of this process's control group and of all above it, for version 2 and for version 1."""
    folders = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / (controller if controllers else "")
        relative = Path(name.lstrip("/"))
        # In a container the name is often that of the host, and only the root of the mount is there.
        folders += [base / part for part in (relative, *relative.parents)]
    return list(dict.fromkeys(folder for folder in folders if folder.is_dir()))


def cpu_limit(root: Path = Path("/")) -> float | None:
    """Processors' worth of time that the control groups of this process allow; None where they set no limit."""
    limits = []
    for folder in _cgroups(root, "cpu"):
        words = _read(folder / "cpu.max").split() or [
            _read(folder / "cpu.cfs_quota_us") or "max",
            _read(folder / "cpu.cfs_period_us") or "100000",
        ]
        if words[0] not in ("max", "-1"):
            limits.append(int(words[0]) / int(words[1]))
    return min(limits, default=None)


def memory_limit(root: Path = Path("/")) -> int | None:
    """Bytes that the control groups of this process allow; None where they set no limit."""
    values = [
        _read(folder / name) for folder in _cgroups(root, "memory") for name in ("memory.max", "memory.limit_in_bytes")
    ]
    # Version 1 says "no limit" with the largest page-aligned number of 63 bits.
    limits = [int(value) for value in values if value.isdigit() and int(value) < 2**62]
    return min(limits, default=None)


def allowed_cpus() -> tuple[int, ...]:
    """The numbers of the logical processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def allowed_cores(root: Path = Path("/")) -> int:
    """The number of threads that can run at the same time, by affinity and by the control groups' share of time."""
    limit = cpu_limit(root)
    count = len(allowed_cpus())
    return count if limit is None else max(1, min(count, math.floor(limit)))


def separate_cores(count: int, root: Path = Path("/")) -> list[int]:
    """The numbers of `count` logical processors that this process may use, on as many physical cores as possible.

    Taken from the last core on, since the system tends to serve interrupts on the first; fewer where fewer are
    allowed.
    """
    allowed = set(allowed_cpus())
    cores = [[cpu for cpu in threads if cpu in allowed] for threads in core_siblings(root)]
    cores = [cpus for cpus in cores if cpus] or [[cpu] for cpu in sorted(allowed)]
    # One thread of each core first, then the second ones.
    ordered = [cpus[turn] for turn in range(max(map(len, cores))) for cpus in reversed(cores) if turn < len(cpus)]
    return sorted(ordered[:count])


def pin(cores: Sequence[int]) -> None:
    """Bind all threads of this process, present and future, to these processors, where the system supports it."""
    if hasattr(os, "sched_setaffinity"):
        for thread in psutil.Process().threads():
            with suppress(ProcessLookupError):  # it has just ended
                os.sched_setaffinity(thread.id, cores)


def host() -> str:
    """The machine's name, with the space of process ids within a container: processes of one host see each other."""
    name = platform.node() or UNKNOWN
    with suppress(OSError):
        space = str(Path("/proc/self/ns/pid").readlink())
        return name if space == FIRST_PID_SPACE else f"{name} {space}"
    return name


def boot() -> str:
    """The identifier of this start of the system, which no other start and no other machine has."""
    return _read(Path("/proc/sys/kernel/random/boot_id")) or UNKNOWN


def this_process() -> str:
    """The number, the host and the boot of this process, by which others on a shared folder know it."""
    return f"process {os.getpid()} on {host()}, boot {boot()[:8]}"


def since_boot(process: psutil.Process) -> float:
    """Seconds from the start of the system to that of a process, which don't change when the clock is set."""
    return float(process.create_time() - psutil.boot_time())


def is_running(pid: int, started: float) -> bool:
    """True if the process that had this id and this `since_boot` still runs, or where the system doesn't say.

    A zombie, whose parent has not waited for it, counts as ended.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, and perhaps hidden, which psutil reports as ended
    try:
        process = psutil.Process(pid)
        return process.status() != psutil.STATUS_ZOMBIE and abs(since_boot(process) - started) < SAME_START
    except psutil.Error:
        return True


# Prefixes of environment variables that change how libraries compute or wait.
_LIBRARIES = ("OMP_", "GOMP_", "KMP_", "MKL_", "ONEDNN_", "DNNL_", "FBGEMM_", "ATEN_", "TORCHINDUCTOR_", "LD_PRELOAD")


def numerics_environment() -> dict[str, str]:
    """The environment variables that change how numerical libraries compute or wait, by name."""
    # torch sets TORCHINDUCTOR_CACHE_DIR itself, when its compiler is first imported.
    names = (n for n in sorted(os.environ) if n.startswith(_LIBRARIES) and not n.endswith("_CACHE_DIR"))
    return {name: os.environ[name] for name in names}
