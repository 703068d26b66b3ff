"""Kernels written in CUDA C++, compiled by NVRTC on the machine that runs them. Both come with torch's CUDA build.

Only what Triton cannot say is written this way. Where NVRTC or the driver's bindings are missing, `available` is False
and Triton's kernels do the work.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_HERE = Path(__file__).parent


class CompileError(Exception):
    """NVRTC refused a source of ours; the text is its log."""


@functools.cache
def compilable() -> bool:
    """Whether NVRTC is here."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except Exception:  # the bindings raise several kinds where the library is missing
        return False
    return True


class _Refused:
    by_anyone = False


def refuse(refused: bool = True) -> None:
    """From now on `available` is False, and Triton's kernels do the work."""
    _Refused.by_anyone = refused


def available() -> bool:
    """Whether kernels can be compiled and launched here, and nobody has refused them."""
    return not _Refused.by_anyone and _present()


@functools.cache
def _present() -> bool:
    return torch.cuda.is_available() and compilable()


def compiled(name: str, constants: Sequence[tuple[str, int]], capability: tuple[int, int]) -> bytes:
    """Machine code (a cubin) of `name`.cu beside this file with these constants defined; needs no GPU.

    Raises `CompileError`.
    """
    from cuda.bindings import nvrtc

    source = (_HERE / f"{name}.cu").read_bytes()
    # 9.0 in full has instructions that later cards lack; what is compiled here runs on this card alone.
    architecture = f"sm_{capability[0]}{capability[1]}" + ("a" if capability == (9, 0) else "")
    options = [f"--gpu-architecture={architecture}".encode(), b"--std=c++17"]
    options += [f"--include-path={_HERE}".encode(), *(f"-D{key}={value}".encode() for key, value in constants)]
    program = _checked(nvrtc.nvrtcCreateProgram(source, f"{name}.cu".encode(), 0, [], []))
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
            nvrtc.nvrtcGetProgramLog(program, log)
            raise CompileError(log.decode(errors="replace").rstrip("\0 \n"))
        code: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
        _checked(nvrtc.nvrtcGetCUBIN(program, code))
    finally:
        nvrtc.nvrtcDestroyProgram(program)
    return code


class Wide(int):
    """An argument of 64 bits."""


class Function:
    """One kernel of one source on one device.

    name: of the source file and of the `extern "C"` kernel in it. shared: bytes of dynamic shared memory.
    """

    def __init__(self, name: str, constants: Sequence[tuple[str, int]], shared: int, device: torch.device) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self.shared = shared
        with torch.cuda.device(device):
            # torch's context, in whichever thread this is.
            context = _checked(driver.cuDevicePrimaryCtxRetain(torch.cuda.current_device()))
            _checked(driver.cuCtxSetCurrent(context))
            code = compiled(name, constants, torch.cuda.get_device_capability(device))
            self._module = _checked(driver.cuModuleLoadData(code))
            self._function = _checked(driver.cuModuleGetFunction(self._module, name.encode()))
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _checked(driver.cuFuncSetAttribute(self._function, attribute, shared))
        self._overlap = driver.CUlaunchAttribute()
        self._overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        self._overlap.value.programmaticStreamSerializationAllowed = 1

    def __call__(
        self, grid: tuple[int, int], threads: int, *arguments: Tensor | int | None, early: bool = False
    ) -> None:
        """Launch on the current stream.

        A Tensor is passed as its address, None as a null pointer, an int as 32 bits, a `Wide` as 64. `early`: before
        the kernel in front of it has ended (programmatic dependent launch); it must wait itself for what it reads.
        """
        values = tuple(a.data_ptr() if isinstance(a, Tensor) else int(a or 0) for a in arguments)
        types = tuple(ctypes.c_int if type(a) is int else ctypes.c_void_p for a in arguments)
        stream = torch.cuda.current_stream().cuda_stream
        if not early:
            _checked(
                self._driver.cuLaunchKernel(
                    self._function, *grid, 1, threads, 1, 1, self.shared, stream, (values, types), 0
                )
            )
            return
        config = self._driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes, config.hStream = self.shared, stream
        config.attrs, config.numAttrs = [self._overlap], 1
        _checked(self._driver.cuLaunchKernelEx(config, self._function, (values, types), 0))


def _checked(answer: tuple[Any, ...]) -> Any:
    """The value of a driver's or NVRTC's answer; raises RuntimeError where it is an error."""
    code, *values = answer
    if int(code) != 0:
        raise RuntimeError(f"CUDA: {code!r}")
    return values[0] if values else None
