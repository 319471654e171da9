"""Imports the released torch_npu where there is neither CANN nor an NPU, to check calls.

The wheel is linked against a few CANN libraries, of which the loader needs some dozens of plain C symbols; kernels
(`aclnn*`) are looked up by name when they are called. So `load` reads which symbols are missing, compiles libraries
that have them and do nothing, and imports torch_npu. Then all schemas, metas, autograd formulas and host checks are
there, tensors lie in host memory, and a call ends where it would start a kernel, with that kernel's name.

A process that did this says that NPUs are available: it is only for a test's subprocess.
"""

import ctypes
import hashlib
import importlib.util
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

SOC, CANN = "Ascend910B1", "9.1.0"
NO_DEVICE = 207004  # what every function of the runtime answers unless it is listed below
RUNTIME, KERNELS = "libascendcl.so", "libopapi.so"
ENVIRONMENT = {"TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "TASK_QUEUE_ENABLE": "0"}  # errors arrive at the call

PRELUDE = f"""
#include <stdlib.h>
#include <string.h>
static _Thread_local int current = 0;
static int token = 0;
static int devices(void) {{ const char *s = getenv("NPU_STUB_DEVICES"); return s ? atoi(s) : 0; }}
const char *aclrtGetSocName(void) {{ return "{SOC}"; }}
const char *aclGetRecentErrMsg(void) {{ return "there is no CANN and no NPU on this machine"; }}
int aclrtGetDeviceCount(unsigned int *n) {{ if (n) *n = (unsigned)devices(); return 0; }}
void aclAppLog(void) {{ }}
int aclFinalize(void) {{ return 0; }}
"""
POINTERS = {"aclCreateTensorDesc", "aclCreateDataBuffer", "aclopCreateAttr"}  # these return none
NOTHING = (
    "aclInit",
    "aclrtResetDevice",
    "aclrtSetCurrentContext",
    "aclrtDestroyStream",
    "aclrtSynchronizeStream",
    "aclrtStreamWaitEvent",
    "aclrtDestroyEvent",
    "aclrtRecordEvent",
    "aclrtResetEvent",
    "aclrtSynchronizeEvent",
    "aclrtSetDeviceSatMode",
    "aclrtSynchronizeDevice",
    "aclrtSynchronizeDeviceWithTimeout",
    "aclrtSetOpWaitTimeout",
    "aclrtSetOpExecuteTimeOut",
    "aclrtDestroyStreamForce",
    "aclSetCompileopt",
    "aclrtCtxSetSysParamOpt",
    "aclrtSetSysParamOpt",
)
"""Succeed, and do nothing: there is nothing to wait for."""
BODIES = {
    "aclrtSetDevice": ("int d", "current = d;"),
    "aclrtGetDevice": ("int *d", "if (d) *d = current;"),
    "aclrtGetCurrentContext": ("void **c", "if (c) *c = &token;"),
    "aclrtCreateStream": ("void **s", "if (s) *s = &token;"),
    "aclrtCreateStreamWithConfig": ("void **s, unsigned p, unsigned f", "if (s) *s = &token;"),
    "aclrtCreateEventExWithFlag": ("void **e, unsigned f", "if (e) *e = &token;"),
    "aclrtCreateEventWithFlag": ("void **e, unsigned f", "if (e) *e = &token;"),
    "aclrtQueryEventStatus": ("void *e, int *s", "if (s) *s = 1;"),
    "aclrtQueryEventWaitStatus": ("void *e, int *s", "if (s) *s = 1;"),
    "aclrtStreamQuery": ("void *s, int *v", "if (v) *v = 1;"),
    "aclrtGetSysParamOpt": ("int o, long *v", "if (v) *v = 0;"),
    "aclrtGetPrimaryCtxState": ("int d, unsigned *f, int *a", "if (a) *a = 1;"),
    "aclrtGetMemInfo": ("int a, size_t *f, size_t *t", "if (f) *f = 1UL << 34; if (t) *t = 1UL << 34;"),
    "aclrtMalloc": ("void **p, size_t n, int how", "*p = malloc(n ? n : 1);"),
    "aclrtMallocAlign32": ("void **p, size_t n, int how", "*p = malloc(n ? n : 1);"),
    "aclrtFree": ("void *p", "free(p);"),
    "aclrtMallocHost": ("void **p, size_t n", "*p = malloc(n ? n : 1);"),
    "aclrtFreeHost": ("void *p", "free(p);"),
    "aclrtMemcpy": ("void *d, size_t m, const void *s, size_t n, int k", "memcpy(d, s, n);"),
    "aclrtMemcpyAsync": ("void *d, size_t m, const void *s, size_t n, int k, void *q", "memcpy(d, s, n);"),
    "aclrtMemset": ("void *d, size_t m, int v, size_t n", "memset(d, v, n);"),
    "aclsysGetVersionStr": ("char *name, char *out", f'strcpy(out, "{CANN}");'),
    "aclsysGetCANNVersion": ("int name, char *out", f'strcpy(out, "{CANN}");'),
}
"""Parameters and body of what is more than that."""
HANDLES = ("Tensor", "TensorList", "Scalar", "ScalarList", "IntArray", "BoolArray", "FloatArray")


def package() -> Path:
    """The folder of torch_npu, which is not imported. Raises ModuleNotFoundError where it is not installed."""
    spec = importlib.util.find_spec("torch_npu")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("torch_npu is not installed; make test-npu", name="torch_npu")
    return Path(spec.origin).parent


def load(num_devices: int = 8) -> Any:
    """torch_npu, imported with this many NPUs that are none. To be called before anything imports it."""
    os.environ |= {**ENVIRONMENT, "NPU_STUB_DEVICES": str(num_devices)}
    folder, libraries = build()
    for library in sorted(libraries, key=lambda name: name != RUNTIME):  # by their names, they serve the wheel's too
        ctypes.CDLL(str(folder / library), mode=ctypes.RTLD_GLOBAL)
    ctypes.CDLL(str(folder / KERNELS), mode=ctypes.RTLD_LOCAL)
    return importlib.import_module("torch_npu")


def build() -> tuple[Path, list[str]]:
    """The folder of the compiled libraries, kept from run to run, and the names of those the wheel is linked to."""
    libraries, symbols = survey()
    sources = {RUNTIME: runtime_source(symbols), KERNELS: kernels_source()}
    sources |= {name: "extern int nothing; int nothing = 0;\n" for name in libraries if name not in sources}
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise RuntimeError("there is no C compiler; install one, or set CC")
    key = hashlib.sha256(repr(sorted(sources.items())).encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"mmfn-npu-{os.getuid()}-{key}"
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir=folder.parent) as made:
            for name in sorted(sources, key=lambda name: name != RUNTIME):
                source = Path(made) / f"{name}.c"
                source.write_text(sources[name], encoding="utf-8")
                base = (
                    []
                    if name in (RUNTIME, KERNELS)
                    else ["-Wl,--no-as-needed", "-Wl,-rpath,$ORIGIN", f"{made}/{RUNTIME}"]
                )
                command = [
                    compiler,
                    "-shared",
                    "-fPIC",
                    "-w",
                    f"-Wl,-soname,{name}",
                    "-o",
                    f"{made}/{name}",
                    source,
                    *base,
                ]
                subprocess.run(command, check=True)
            shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder, libraries


def survey() -> tuple[list[str], list[str]]:
    """Libraries that the wheel is linked to and this machine does not have, and the symbols that nobody has."""
    import torch

    root, torch_lib = package(), Path(torch.__file__).parent / "lib"
    names = ("libtorch_npu.so", "libtensorpipe.so", "libnpu_profiler.so")
    files = [*root.glob("_C*.so"), *(path for path in (root / "lib" / name for name in names) if path.exists())]
    tables = [elf_tables(path) for path in files]
    undefined = {symbol for _, symbols, _ in tables for symbol in symbols}
    defined = {symbol for *_, symbols in tables for symbol in symbols}
    own = {path.name for folder in (root / "lib", torch_lib) for path in folder.glob("*.so*")}
    libraries = sorted({name for needed, *_ in tables for name in needed} - own)
    handles = [ctypes.CDLL(None), ctypes.CDLL(str(torch_lib / "libtorch_python.so"))]
    symbols = [s for s in sorted(undefined - defined) if not any(_has(lambda h=h, s=s: h[s]) for h in handles)]
    return [name for name in libraries if not _has(lambda name=name: ctypes.CDLL(name))], symbols


def _has(look: Callable[[], Any]) -> bool:
    try:
        look()
    except (AttributeError, OSError):
        return False
    return True


def elf_tables(path: Path) -> tuple[list[str], set[str], set[str]]:
    """Libraries a shared object needs, global symbols it lacks (weak ones may stay so) and symbols it has."""
    data = path.read_bytes()
    offset, (size, number) = struct.unpack_from("<Q", data, 0x28)[0], struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, offset + i * size) for i in range(number)]

    def text(table: int, place: int) -> str:
        start = sections[table][4] + place
        return data[start : data.index(b"\0", start)].decode()

    needed, undefined, defined = [], set(), set()
    for _, kind, _, _, start, length, link, _, _, entry in sections:
        if kind == 6:  # dynamic
            tags = (struct.unpack_from("<qQ", data, place) for place in range(start, start + length, 16))
            needed += [text(link, value) for tag, value in tags if tag == 1]
        elif kind == 11:  # symbols
            for place in range(start + entry, start + length, entry):
                name, info, _, section, *_ = struct.unpack_from("<IBBHQQ", data, place)
                if section:
                    defined.add(text(link, name))
                elif info >> 4 == 1:
                    undefined.add(text(link, name))
    return needed, undefined, defined


def runtime_source(symbols: list[str]) -> str:
    """C of the runtime: what is listed above works, all else answers that there is no device."""
    bodies = BODIES | dict.fromkeys(NOTHING, ("void", ""))
    lines = [
        f"int {name}({args}) {{ if (!devices()) return {NO_DEVICE}; {body} return 0; }}"
        for name, (args, body) in bodies.items()
    ]
    known = {*bodies, *re.findall(r"(\w+)\(", PRELUDE)}
    for name in sorted({*symbols} - known):
        is_fine = name in POINTERS or name.startswith("Msprof")
        lines.append(f"long {name}(void) {{ return {0 if is_fine else NO_DEVICE}; }}")
    return "\n".join([PRELUDE, *lines, ""])


def kernels_source() -> str:
    """C of the library of kernels: every name that the wheel may look up, none of which computes."""
    data = (package() / "lib" / "libtorch_npu.so").read_bytes()
    found = {match.decode().removesuffix("GetWorkspaceSize") for match in re.findall(rb"\0(aclnn[A-Z]\w*)(?=\0)", data)}
    names = sorted(found | {f"{name}GetWorkspaceSize" for name in found})
    handles = [
        f"void *aclCreate{k}(void) {{ return &token; }} int aclDestroy{k}(void *p) {{ return 0; }}" for k in HANDLES
    ]
    return "\n".join(
        ["static int token = 0;", *handles, *(f"int {n}(void) {{ return {NO_DEVICE}; }}" for n in names), ""]
    )


def calls_of(source: str) -> set[str]:
    """Names of the operators that Python code calls."""
    return set(re.findall(r"torch\.ops\.npu\.(\w+)", source))


@cache
def schemas() -> dict[str, str]:
    """Schemas of the wheel's operators by name, out of its library's text, as torch's parser prints them."""
    import torch

    data, found = (package() / "lib" / "libtorch_npu.so").read_bytes(), {}
    for arrow in re.finditer(rb"\) -> ", data):
        start, end = data.rfind(b"\0", 0, arrow.start()) + 1, data.find(b"\0", arrow.end())
        text = data[start:end].decode("ascii", errors="replace")
        if re.fullmatch(r"[\w.]+\([ -~]*\) -> [ -~]+", text):
            try:
                schema = torch._C.parse_schema(f"npu::{text}")
            except RuntimeError:  # text that looks like one
                continue
            name = schema.name.removeprefix("npu::") + (f".{schema.overload_name}" if schema.overload_name else "")
            found[name] = str(schema).removeprefix("npu::")
    return found
