"""How Triton kernels are tested: where they can be, in Triton's interpreter, and compiled without a GPU."""
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


def why_not() -> str | None:
    """Why the kernels cannot be compiled here."""
    if importlib.util.find_spec("triton") is None:
        return "needs Triton"
    if torch.__version__ < "2.8":
        return f"needs torch 2.8 and the Triton that came with it, got torch {torch.__version__}"
    return None


def why_not_interpreted() -> str | None:
    """Why the kernels cannot run here in Triton's interpreter."""
    if why_not() is not None:
        return why_not()
    version = tuple(int(part) for part in importlib.metadata.version("triton").split(".")[:2])
    if version < (3, 7) and np.lib.NumpyVersion(np.__version__) >= "2.4.0":
        return "the interpreter of Triton before 3.7 needs NumPy before 2.4"
    return None


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
needs_interpreter = pytest.mark.skipif(why_not_interpreted() is not None, reason=str(why_not_interpreted()))
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available() or INTERPRETED, reason="needs a CUDA device")


class Interpreted:
    """Base of the tests that run on CPU tensors in Triton's interpreter, and there alone."""

    __test__ = INTERPRETED

    @pytest.fixture(autouse=True)
    def poisoned(self) -> Iterator[None]:
        """Memory that nothing was written to holds NaN."""
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


def run_interpreted(*options: str) -> None:
    """Run `TestKernels` of all files in one process, as Triton decides at its import whether it interprets."""
    folder = Path(__file__).parent
    files = [folder / "test_kernels.py", *sorted(folder.glob("test_*triton.py"))]
    run = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider",
            *(f"{file}::TestKernels" for file in files), *options,
        ],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=folder.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


class Launches:
    """In place of a kernel: keeps what Triton would compile its launches for, on a GPU that is not here."""

    def __init__(self, kernel: Any, capability: int = 90) -> None:
        from triton.backends.compiler import GPUTarget
        from triton.compiler import make_backend
        from triton.runtime.jit import create_function_from_signature

        self.kernel = kernel
        self.target = GPUTarget("cuda", capability, 32)
        self.backend = make_backend(self.target)
        self.bind = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        self.variants: dict[str, tuple[Any, Any, Any]] = {}  # what a launch is compiled for once

    def __getitem__(self, grid: Any) -> Any:
        assert 0 < grid[0] < 2 ** 31 and all(0 < count < 2 ** 16 for count in grid[1:])
        return self.launch

    def launch(self, *args: Any, **named: Any) -> None:
        bound, specialization, options = self.bind(*args, **named)
        self.variants[f"{specialization} {options}"] = bound, specialization, options

    def compiled(self) -> Iterator[Any]:
        """Every variant as machine code, by Triton's own ptxas."""
        import triton
        from triton.compiler import ASTSource

        for bound, specialization, options in self.variants.values():
            kinds = dict(zip(bound, specialization, strict=True))
            signature = {name: kind[0] for name, kind in kinds.items()}
            constants = {name: bound[name] for name, kind in kinds.items() if kind[0] == "constexpr"}
            attributes = {
                (n,): self.backend.parse_attr(kind[1])
                for n, kind in enumerate(kinds.values()) if kind[0] != "constexpr" and isinstance(kind[1], str)
            }
            source = ASTSource(self.kernel, signature, constants, attributes)
            yield triton.compile(source, self.target, options)


def spilled(program: Any, binary: Path) -> tuple[int, int, str]:
    """Bytes of stack and of local memory that a compiled kernel takes, and all that is told of it.

    Args:
        program: What `triton.compile` returned.
        binary: File that the machine code is written to.
    """
    import triton

    binary.write_bytes(program.asm["cubin"])
    told = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)],
        capture_output=True, text=True, check=True,
    ).stdout
    stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+) ", told).groups()
    return int(stack), int(local), told
