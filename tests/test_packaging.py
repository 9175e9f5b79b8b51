"""The package as it is installed: its metadata, its objects, and what happens without a compiler."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import longattn
from longattn._build_info import BuildInfo, build_info
from longattn._version import __version__

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / "build"


def setup_py(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs setup.py with nothing of the caller's build settings but what is given."""
    ours = ("CXX", "CXXFLAGS", "LDFLAGS", "MAX_JOBS")
    inherited = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("LONGATTN_")}
    return subprocess.run(
        [sys.executable, "setup.py", "--quiet", *arguments],
        cwd=ROOT,
        env=inherited | environment,
        capture_output=True,
        text=True,
    )


def test_version_has_one_source() -> None:
    assert longattn.__version__ == __version__


def test_installed_metadata_matches_the_package() -> None:
    try:
        installed = importlib.metadata.distribution("longattn")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("longattn runs from the checkout without being installed")
    assert installed.version == __version__
    assert [script.value for script in installed.entry_points if script.name == "longattn"] == [
        "longattn.__main__:main"
    ]


def test_the_types_are_public() -> None:
    assert (Path(longattn.__file__).parent / "py.typed").is_file()


def test_a_tree_that_was_not_built_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("longattn._build_info._RECORD", tmp_path / "_build.json")
    info = build_info()
    assert info.reason is not None and "not built" in info.reason
    assert info.targets == ()


@pytest.mark.native
def test_the_build_under_test_is_the_one_asked_for() -> None:
    info = build_info()
    if info.reason is not None:
        pytest.skip(info.reason)
    sanitizers = os.environ.get("LONGATTN_SANITIZE")
    assert info.mode == sanitizers if sanitizers else info.mode in ("release", "debug")
    assert "baseline" in info.targets


def built_objects(info: BuildInfo) -> list[Path]:
    """The objects of the instruction sets that the extension in this checkout was linked from."""
    folder = f"temp.*-{sys.implementation.cache_tag}/csrc/cpu/targets"
    return [path for target in info.targets for path in OBJECTS.glob(f"{folder}/{target}.o")]


def test_no_instruction_set_leaks_out_of_its_object() -> None:
    """A weak (COMDAT) symbol compiled for AVX-512 could be the copy that the linker keeps for every machine."""
    info = build_info()
    objects = built_objects(info)
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("nm is not installed")
    if info.mode != "release" or not objects:
        pytest.skip("the objects of a release build are not in build/: run `make build`")

    listing = subprocess.run([nm, "-A", "-P", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    symbols = [line.split()[:3] for line in listing.splitlines()]
    # W and V are weak definitions, u is one for all libraries of the process; lower case w and v are only references.
    weak = [f"{path} {name}" for path, name, kind in symbols if kind in "WVu"]
    assert weak == []


def test_install_without_a_compiler_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = ("egg_info", "--egg-base", str(tmp_path), "build", "--build-base", str(tmp_path))
    done = setup_py(*build, "--build-lib", str(tmp_path / "lib"), CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr

    package = tmp_path / "lib" / "longattn"
    assert (package / "py.typed").is_file()
    assert list(package.glob("_C*")) == []
    record = json.loads((package / "_build.json").read_text(encoding="utf-8"))
    assert "no C++ compiler" in record["reason"] and "/nonexistent/c++" in record["reason"]

    monkeypatch.setattr("longattn._build_info._RECORD", package / "_build.json")
    assert build_info().reason == record["reason"]


COMPILERS = {
    "missing": ("/nonexistent/c++", "/nonexistent/c++: not found"),
    "fails": ("#!/bin/sh\necho 'sorry, no licence'; exit 3", "cxx ended with exit status 3: sorry, no licence"),
    "does nothing": ("#!/bin/sh\nexit 0", "cxx: it compiles without an error, and writes no object"),
    "knows no C++17": (
        "#!/bin/sh\necho 'In file included from error.h:1:'; echo 'a.cpp:1:2: error: no optional'; echo '1 error'\n"
        'case "$1" in --version) exit 0;; *) exit 1;; esac',
        "a.cpp:1:2: error: no optional",
    ),
    "quotes that do not close": ("c++ '", "No closing quotation"),
}


@pytest.mark.parametrize("kind", COMPILERS)
def test_the_record_says_why_no_compiler_worked(tmp_path: Path, kind: str) -> None:
    compiler, reason = COMPILERS[kind]
    if compiler.startswith("#!"):
        script = tmp_path / "cxx"
        script.write_text(compiler)
        script.chmod(0o755)
        compiler = str(script)
    library = tmp_path / "lib"
    done = setup_py("build_ext", "--build-lib", str(library), "--build-temp", str(tmp_path / "temp"), CXX=compiler)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    record = json.loads((library / "longattn" / "_build.json").read_text(encoding="utf-8"))
    assert record["reason"] == f"no C++ compiler works: {reason}" and record["targets"] == []


def test_an_instruction_set_that_the_compiler_does_not_know_is_left_out_alone(tmp_path: Path) -> None:
    """A compiler that refuses the flags of AVX-512 and whose objects are empty."""
    script = tmp_path / "cxx"
    script.write_text(
        "#!/bin/sh\n"
        'case "$*" in *-mavx512bf16*) echo "error: unknown argument: -mavx512bf16"; exit 1;; esac\n'
        'case "$1" in -dumpmachine) echo x86_64-linux-gnu; exit 0;; esac\n'
        'while [ $# -gt 1 ]; do [ "$1" = -o ] && : > "$2"; shift; done\n'
    )
    script.chmod(0o755)
    library = tmp_path / "lib"
    done = setup_py("build_ext", "--build-lib", str(library), "--build-temp", str(tmp_path / "temp"), CXX=str(script))
    assert done.returncode == 0, done.stderr
    record = json.loads((library / "longattn" / "_build.json").read_text(encoding="utf-8"))
    assert record["targets"] == ["baseline", "avx2", "avx512"] and record["dropped"] == ["avx512_bf16", "amx_bf16"]


def test_a_module_that_is_gone_is_not_packed_again(tmp_path: Path) -> None:
    library = tmp_path / "lib"
    gone = library / "longattn" / "gone.py"
    gone.parent.mkdir(parents=True)
    gone.touch()
    done = setup_py("egg_info", "--egg-base", str(tmp_path), "build_py", "--build-lib", str(library))
    assert done.returncode == 0, done.stderr
    assert not gone.exists() and (library / "longattn" / "cli" / "__init__.py").is_file()


def test_install_without_a_compiler_fails_where_the_kernels_are_required(tmp_path: Path) -> None:
    build = ("build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path))
    done = setup_py(*build, CXX="/nonexistent/c++", LONGATTN_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert "no C++ compiler" in done.stderr


def test_the_source_distribution_is_complete_and_installs(tmp_path: Path) -> None:
    """It holds every source that the checkout builds from; here it installs without a compiler, which is quick."""
    pytest.importorskip("pip")
    made = setup_py("egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path / "dist"))
    assert made.returncode == 0, made.stderr
    (archive,) = (tmp_path / "dist").iterdir()
    with tarfile.open(archive) as contents:
        names = {name.partition("/")[2] for name in contents.getnames()}
    needed = [path for folder in ("csrc", "docs", "examples") for path in (ROOT / folder).rglob("*.*")]
    missing = {str(path.relative_to(ROOT)) for path in needed if "__pycache__" not in path.parts} - names
    assert missing == set()
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "longattn/py.typed"} <= names
    assert not any(name.endswith((".so", "_build.json")) for name in names)

    target = tmp_path / "installed"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "--no-index"]
    done = subprocess.run(
        [*pip, "--target", str(target), str(archive)],
        env=os.environ | {"CXX": "/nonexistent/c++", "LONGATTN_REQUIRE_NATIVE": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    program = "import longattn, torch; q = torch.ones(1, 1, 2, 8); print(longattn.attention(q, q, q).sum().item())"
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
    )
    assert ran.stdout.strip() == "16.0", ran.stderr
