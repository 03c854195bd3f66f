"""Cython extensions. Everything else about the build is in pyproject.toml."""

import hashlib
import importlib.util
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

# Found without importing it: importing would load UCX into the build process.
_spec = importlib.util.find_spec("libucx")
if _spec is None or _spec.origin is None:
    raise SystemExit("building needs the libucx-cu12 package: pip install libucx-cu12==1.21.0")
UCX = Path(_spec.origin).parent

FAST = ["-O3", "-fno-math-errno", "-ffp-contract=off"]


def sources_digest(*paths: str) -> list[tuple[str, str]]:
    """The macro KF_SOURCES: what an extension whose arithmetic decides tokens was built from, and how. Its nodes
    register it (dataplane/numerics.py), so that those of another build do not take their KV."""
    digest = hashlib.blake2b(" ".join(FAST).encode(), digest_size=8)
    for path in sorted(paths):
        content = Path(path).read_bytes()
        digest.update(f"{path}\0{len(content)}\0".encode())
        digest.update(content)
    return [("KF_SOURCES", f'"{digest.hexdigest()}"')]


SAMPLING = [
    *(f"dataplane/_fast/{name}.h" for name in ("draw", "estimate", "passes", "weights")),
    "kernels/cpu/denormals.h",
    "kernels/cpu/team.h",
]
KERNELS = [f"kernels/cpu/{name}.c" for name in ("dispatch", "experts", "quantised", "rank", "stage", "team")]
CODING = [f"kernels/coding/{name}.c" for name in ("dispatch", "rs", "rdp")]
RANKS = [f"kernels/ranks/{name}.c" for name in ("exchange", "sums")]
KERNELS += RANKS  # a rank's step waits for the others within it
KERNEL_HEADERS = [
    str(header) for folder in ("cpu", "ranks") for header in Path("kernels", folder).glob("*.h")
]

extensions = [
    Extension("dataplane._fast.blocktable", ["dataplane/_fast/blocktable.pyx"], extra_compile_args=FAST),
    Extension(
        "dataplane._fast.sampling",
        ["dataplane/_fast/sampling.pyx"],
        include_dirs=["kernels/cpu"],
        depends=SAMPLING,
        define_macros=sources_digest("dataplane/_fast/sampling.pyx", *SAMPLING),
        extra_compile_args=FAST,
    ),
    Extension(
        "dataplane._fast.checksum",
        ["dataplane/_fast/checksum.pyx"],
        depends=["dataplane/_fast/crc32.h"],
        extra_compile_args=FAST,
    ),
    Extension("dataplane._fast.hashing", ["dataplane/_fast/hashing.pyx"], extra_compile_args=FAST),
    Extension("dataplane._fast.lifeline", ["dataplane/_fast/lifeline.pyx"], extra_compile_args=["-O2"]),
    Extension("dataplane._fast.outbox", ["dataplane/_fast/outbox.pyx"], extra_compile_args=["-O2"]),
    Extension("dataplane._fast.stream", ["dataplane/_fast/stream.pyx"], extra_compile_args=["-O2"]),
    Extension(
        "dataplane._fast.ucp",
        ["dataplane/_fast/ucp.pyx"],
        include_dirs=[str(UCX / "include")],
        library_dirs=[str(UCX / "lib")],
        libraries=["ucp", "ucs"],
        # The libraries are found by soname: transport/libucp.py loads them from the libucx package first.
        extra_compile_args=["-O2"],
    ),
    Extension(
        "kernels.cpu._native",
        ["kernels/cpu/_native.pyx", *KERNELS],
        include_dirs=["kernels/ranks"],
        depends=KERNEL_HEADERS,
        define_macros=sources_digest("kernels/cpu/_native.pyx", *KERNELS, *KERNEL_HEADERS),
        extra_compile_args=FAST,
    ),
    Extension(
        "kernels.coding._native",
        ["kernels/coding/_native.pyx", *CODING],
        depends=[str(header) for header in Path("kernels/coding").glob("*.h")],
        extra_compile_args=FAST,
    ),
    Extension(
        "kernels.ranks._native",
        ["kernels/ranks/_native.pyx", *RANKS],
        depends=[str(header) for header in Path("kernels/ranks").glob("*.h")],
        extra_compile_args=FAST,
    ),
]
setup(ext_modules=cythonize(extensions, language_level=3))
