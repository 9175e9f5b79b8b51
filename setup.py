"""Builds ``longattn._C``, the CPU kernels, with a C++17 compiler and pybind11 alone: torch is not needed.

``setup.py build_check`` builds tests/native/check.cpp instead, a program that runs the kernels without Python.

Each file of csrc/cpu/targets is one instruction set and is compiled with the flags of that set; no other object sees
them, and the library picks among the sets at run time. With ninja only what changed is rebuilt; without it everything
is compiled, a few files at a time.

Where the kernels cannot be built the package installs all the same and runs on the reference backend;
longattn/_build.json then says why, with what was wrong with each compiler (longattn/_build_info.py reads it). The
environment may set

    CXX, CXXFLAGS, LDFLAGS        as for any C++ project
    LONGATTN_REQUIRE_NATIVE=1     fail instead of installing without the kernels
    LONGATTN_WERROR=1             warnings are errors
    LONGATTN_DEBUG=1              no optimisation that hides variables, debug symbols
    LONGATTN_SANITIZE=LIST        instrument for these sanitizers, such as address,undefined
    MAX_JOBS                      compilers to run at once
    LONGATTN_CUDA=auto|0|1        the CUDA kernels of csrc/cuda, longattn/_cuda.so: if nvcc 12.4 and a GPU's driver are
                                  found; never; or whatever is found, failing where they cannot be built
    NVCC                          the CUDA compiler

The CUDA kernels are compiled for compute capability 9.0 alone. Their library is linked with the static CUDA runtime: it
needs neither torch nor libcuda, and loads on machines without a GPU.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

CSRC = Path("csrc")
CHECK = Path("tests/native/check.cpp")

# Machine -> instruction sets, each with the flags that its one file in csrc/cpu/targets is compiled with.
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", *AVX2)
AVX512_BF16 = (*AVX512, "-mavx512bf16")
TARGETS: dict[str, dict[str, tuple[str, ...]]] = {
    "x86_64": {
        "baseline": (),
        "avx2": AVX2,
        "avx512": AVX512,
        "avx512_bf16": AVX512_BF16,
        "amx_bf16": (*AVX512_BF16, "-mamx-tile", "-mamx-bf16"),
    },
    "aarch64": {"baseline": (), "neon": ()},
}
PORTABLE: dict[str, tuple[str, ...]] = {"baseline": ()}

# Nothing reads errno or the floating-point exception flags; infinities and NaN keep their meaning (no -ffast-math).
COMMON = (
    *("-std=c++17", "-fPIC", "-pthread", "-fvisibility=hidden"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-Wall", "-Wextra"),
)

# Kernels throw nothing: the tables of the exceptions' runtime would be symbols shared between instruction sets.
KERNELS = ("-fno-exceptions",)

# For Hopper, with its own instructions (the "a"). -arch=sm_90a would also compile for plain sm_90, which lacks them.
CUDA = CSRC / "cuda"
NVCC_FLAGS = (
    *("-O3", "-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", f"-I{CUDA}"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden"),
)
NVCC_LINK = ("-shared", "-cudart", "static", "-Xlinker", "--exclude-libs=ALL")
NVCC_OLDEST = (12, 4)

# Links a library that Python loads, not a program.
EXTENSION = ("-bundle", "-undefined", "dynamic_lookup") if sys.platform == "darwin" else ("-shared",)


class NativeBuildError(Exception):
    """Why the kernels cannot be built, in one line."""


def switch(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def run(command: list[str], shown: bool = True) -> str:
    """Return the command's output, shown if it warns; NativeBuildError, the output shown, if the command fails."""
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env={**os.environ, "LC_ALL": "C"},  # errors are looked for by their English names
        )
    except OSError as error:
        raise NativeBuildError(f"{command[0]}: {error.strerror}") from error
    if shown and (done.returncode or "warning:" in done.stdout):
        sys.stderr.write(done.stdout)
    if done.returncode:
        raise NativeBuildError(first_error(Path(command[0]).name, done))
    return done.stdout


def first_error(name: str, done: subprocess.CompletedProcess[str]) -> str:
    """The first error in what a compiler, a linker or ninja printed, in one line; else how it ended."""
    lines = [" ".join(line.split())[:500] for line in done.stdout.splitlines() if line.strip()]
    for line in lines:
        if re.search(r"\b(error|fatal|undefined reference|cannot find)\b[ :]", line, re.IGNORECASE):
            return line
    status = done.returncode
    ended = f"{name} was ended by signal {-status}" if status < 0 else f"{name} ended with exit status {status}"
    return f"{ended}: {lines[0]}" if lines else ended


@dataclass(frozen=True)
class Toolchain:
    """The C++ compiler and the flags of this kind of build."""

    cxx: list[str]
    version: str
    mode: str  # release, debug, or the sanitizers
    flags: list[str]

    @classmethod
    def find(cls) -> Toolchain:
        cxx, version = cls.working()
        sanitizers = os.environ.get("LONGATTN_SANITIZE", "")
        if sanitizers:
            mode = sanitizers
            kind = ["-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
        elif switch("LONGATTN_DEBUG"):
            mode, kind = "debug", ["-Og", "-g"]
        else:
            mode, kind = "release", ["-O3", "-DNDEBUG"]
        if switch("LONGATTN_WERROR"):
            kind.append("-Werror")
        return cls(cxx, version, mode, [*COMMON, *kind, *shlex.split(os.environ.get("CXXFLAGS", ""))])

    @classmethod
    def working(cls) -> tuple[list[str], str]:
        """The first compiler that compiles, and its version line; NativeBuildError says what was wrong with each."""
        named = os.environ.get("CXX")
        candidates = [named] if named else [sysconfig.get_config_var("CXX") or "c++", "c++", "g++", "clang++"]
        wrong = []
        for candidate in dict.fromkeys(candidates):
            try:
                cxx = shlex.split(candidate)
                if not cxx or shutil.which(cxx[0]) is None:
                    raise NativeBuildError(f"{candidate}: not found")
                version = run([*cxx, "--version"], shown=False).strip().partition("\n")[0]
                cls.try_out(cxx)
                return cxx, version or candidate
            except (NativeBuildError, ValueError) as error:  # ValueError: quotes in CXX that do not close
                wrong.append(str(error))
        raise NativeBuildError(f"no C++ compiler works: {'; '.join(wrong)}")

    @staticmethod
    def try_out(cxx: list[str]) -> None:
        """Compile a small program of C++17 with a header of its library."""
        with tempfile.TemporaryDirectory() as folder:
            source, made = Path(folder, "try.cpp"), Path(folder, "try.o")
            source.write_text("#include <optional>\nint main() { return std::optional<int>(0).value(); }\n")
            run([*cxx, "-std=c++17", "-c", str(source), "-o", str(made)], shown=False)
            if not made.is_file():
                raise NativeBuildError(f"{Path(cxx[0]).name}: it compiles without an error, and writes no object")

    def machine(self) -> str:
        """The machine that it compiles for, by Linux's names."""
        name = run([*self.cxx, "-dumpmachine"]).partition("-")[0].strip().lower()
        return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)

    def accepts(self, flags: tuple[str, ...]) -> bool:
        probe = [*self.cxx, *flags, "-Werror", "-x", "c++", "-fsyntax-only", os.devnull]
        return subprocess.run(probe, capture_output=True).returncode == 0

    def compile(self, source: Path, extra: list[str], obj: Path) -> list[str]:
        return [*self.cxx, *self.flags, *extra, "-MD", "-MF", f"{obj}.d", "-c", str(source), "-o", str(obj)]

    def link(self, objects: list[Path], extra: Sequence[str], output: Path) -> list[str]:
        tail = shlex.split(os.environ.get("LDFLAGS", ""))
        return [*self.cxx, *self.flags, *extra, *map(str, objects), "-o", str(output), *tail]


@dataclass(frozen=True)
class Step:
    """One command that makes ``output`` from ``inputs``."""

    rule: str  # compile or link
    inputs: list[Path]
    output: Path
    command: list[str]


def carry_out(steps: list[Step], directory: Path) -> None:
    """Runs the compile steps, then the link step."""
    jobs = max(1, int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1))
    for step in steps:
        step.output.parent.mkdir(parents=True, exist_ok=True)
    ninja = shutil.which("ninja", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if ninja:
        plan = directory / "build.ninja"
        plan.write_text(ninja_file(steps, directory))
        run([ninja, "-f", str(plan), "-j", str(jobs)])
        return
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(run, [step.command for step in steps if step.rule == "compile"]))
    for step in steps:
        if step.rule == "link":
            run(step.command)


def ninja_file(steps: list[Step], directory: Path) -> str:
    def path(name: Path) -> str:
        return re.sub(r"([$ :])", r"$\1", str(name))

    lines = [
        f"builddir = {path(directory)}",
        *("rule compile", "  command = $run", "  description = $out", "  depfile = $out.d", "  deps = gcc"),
        *("rule link", "  command = $run", "  description = $out"),
    ]
    for step in steps:
        lines.append(f"build {path(step.output)}: {step.rule} {' '.join(map(path, step.inputs))}")
        lines.append(f"  run = {shlex.join(step.command).replace('$', '$$')}")
    return "\n".join(lines) + "\n"


def targets_of(tools: Toolchain) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The instruction sets to build with their flags, and those that the compiler does not know."""
    wanted = TARGETS.get(tools.machine(), PORTABLE)
    targets = {name: flags for name, flags in wanted.items() if tools.accepts(flags)}
    return targets, [name for name in wanted if name not in targets]


def steps_of(
    tools: Toolchain,
    targets: dict[str, tuple[str, ...]],
    entry: Path,
    output: Path,
    entry_flags: Sequence[str] = (),
    link_flags: Sequence[str] = (),
) -> list[Step]:
    """What builds `output`, its objects beside it, from the core and `entry`, the source that uses the core."""
    include = [f"-I{CSRC / 'include'}", f"-I{CSRC}"]
    have = [f"-DLONGATTN_HAVE_{name.upper()}=1" for name in targets]
    sources = [
        (entry, entry_flags),
        *((source, have) for source in sorted((CSRC / "cpu").glob("*.cpp"))),
        *((CSRC / "cpu" / "targets" / f"{name}.cpp", [*KERNELS, *flags]) for name, flags in targets.items()),
    ]
    steps = []
    for source, flags in sources:
        obj = output.parent / source.with_suffix(".o")
        steps.append(Step("compile", [source], obj, tools.compile(source, [*include, *flags], obj)))
    objects = [step.output for step in steps]
    return [*steps, Step("link", objects, output, tools.link(objects, link_flags, output))]


def find_nvcc() -> str:
    """The CUDA compiler; NativeBuildError if there is none that is new enough."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    named = os.environ.get("NVCC")
    candidates = [named] if named else ["nvcc", f"{home}/bin/nvcc"]
    nvcc = next((path for path in map(shutil.which, candidates) if path), None)
    if nvcc is None:
        raise NativeBuildError(f"no nvcc found (looked for {', '.join(candidates)})")
    release = re.search(r"release (\d+)\.(\d+)", run([nvcc, "--version"]))
    if release is None or (int(release[1]), int(release[2])) < NVCC_OLDEST:
        found = f"{nvcc} is of release {release[0][8:]}" if release else f"{nvcc} names no release"
        raise NativeBuildError(f"nvcc {'.'.join(map(str, NVCC_OLDEST))} or newer is needed, and {found}")
    return nvcc


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or ctypes.util.find_library("cuda") is not None


def cuda_steps(nvcc: str, library: Path) -> list[Step]:
    steps = []
    for source in sorted((CUDA / "units").glob("*.cu")):
        obj = library.parent / source.with_suffix(".o")
        command = [nvcc, *NVCC_FLAGS, "-MD", "-MF", f"{obj}.d", "-c", str(source), "-o", str(obj)]
        steps.append(Step("compile", [source], obj, command))
    objects = [step.output for step in steps]
    return [*steps, Step("link", objects, library, [nvcc, *NVCC_LINK, *map(str, objects), "-o", str(library)])]


class BuildPython(build_py):
    """Copies the package to where nothing of an earlier build is left: a module that is gone is not installed."""

    def run(self) -> None:
        copied = Path(self.build_lib) / "longattn"
        if not self.editable_mode and copied.resolve() != Path("longattn").resolve():
            shutil.rmtree(copied, ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Builds the extension and the record of how that went."""

    def finalize_options(self) -> None:
        super().finalize_options()
        if self.editable_mode:  # setuptools names a temporary folder here, and the next build would start from nothing
            self.build_temp = f"build/temp.{self.plat_name}-{sys.implementation.cache_tag}"

    def run(self) -> None:
        library = Path(self.get_ext_fullpath("longattn._C"))  # in the source tree when in place, else in build_lib
        library.parent.mkdir(parents=True, exist_ok=True)
        record: dict[str, object] = {"reason": None, "compiler": None, "mode": None, "targets": [], "dropped": []}
        try:
            self.build_native(library, record)
        except NativeBuildError as error:
            if switch("LONGATTN_REQUIRE_NATIVE"):
                raise CompileError(f"the CPU kernels were not built: {error}") from error
            library.unlink(missing_ok=True)
            record["reason"] = str(error)
            self.warn(f"longattn installs without its CPU kernels: {error}")
        record.update(cuda_reason=self.build_cuda(library.with_name("_cuda.so")))
        (library.parent / "_build.json").write_text(json.dumps(record, indent=2) + "\n")

    def build_native(self, library: Path, record: dict[str, object]) -> None:
        try:
            import pybind11
        except ImportError as error:
            raise NativeBuildError(f"pybind11 cannot be imported: {error}") from error
        tools = Toolchain.find()
        record.update(compiler=tools.version, mode=tools.mode)
        targets, dropped = targets_of(tools)
        record.update(dropped=dropped)

        python = [f"-isystem{path}" for path in (pybind11.get_include(), *self.include_dirs)]
        linked = Path(self.build_temp) / "_C.so"
        carry_out(steps_of(tools, targets, CSRC / "bindings.cpp", linked, python, EXTENSION), linked.parent)
        put_in_place(linked, library)
        record.update(targets=list(targets))

    def build_cuda(self, library: Path) -> str | None:
        """Why the CUDA kernels are not built, or None."""
        wanted = os.environ.get("LONGATTN_CUDA", "auto")
        try:
            if wanted == "0":
                raise NativeBuildError("LONGATTN_CUDA=0 left the CUDA kernels out")
            if wanted != "1" and not has_driver():
                raise NativeBuildError("no GPU driver was found when longattn was built (LONGATTN_CUDA=1 needs none)")
            linked = Path(self.build_temp) / "cuda" / "_cuda.so"
            carry_out(cuda_steps(find_nvcc(), linked), linked.parent)
        except NativeBuildError as error:
            if wanted == "1":
                raise CompileError(f"the CUDA kernels were not built: {error}") from error
            library.unlink(missing_ok=True)
            return str(error)
        put_in_place(linked, library)
        return None


def put_in_place(made: Path, library: Path) -> None:
    """Replaced, never written through: a process may have the old one mapped."""
    shutil.copy2(made, f"{library}.new")
    os.replace(f"{library}.new", library)


class BuildCheck(Command):
    """Builds the stand-alone check of the core, for the machine that the compiler compiles for."""

    description = "build the check of the C++ core that needs no Python: BUILD_TEMP/check"
    user_options = [("build-temp=", "t", "folder of the objects and the program; as for build_ext, whose it shares")]

    def initialize_options(self) -> None:
        self.build_temp: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build_ext", ("build_temp", "build_temp"))

    def run(self) -> None:
        assert self.build_temp is not None
        program = Path(self.build_temp) / "check"
        try:
            tools = Toolchain.find()
            targets, _ = targets_of(tools)
            carry_out(steps_of(tools, targets, CHECK, program), program.parent)
        except NativeBuildError as error:
            raise CompileError(f"the check of the core was not built: {error}") from error


setup(
    ext_modules=[Extension("longattn._C", sources=[])],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative, "build_check": BuildCheck},
)
