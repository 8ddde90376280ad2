"""Triton's own launcher, in C, over a CUDA driver that only tells what it was asked to launch: pointers go as numbers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
CC = os.environ.get("CC") or shutil.which("gcc") or shutil.which("cc")
pytestmark = pytest.mark.skipif(CC is None or not sys.platform.startswith("linux"), reason="no C compiler")
ROOT = Path(__file__).parent.parent

DRIVER = r"""
#include <stdint.h>
#include <stdio.h>
typedef struct { unsigned grid[3], block[3], shared; void *stream, *attrs; unsigned count; } Config;
int cuGetErrorString(int e, const char **s) { *s = "none"; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuCtxSetCurrent(void *c) { return 0; }
int cuDeviceGet(int *d, int o) { *d = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return 0; }
int cuPointerGetAttribute(void *d, int a, uint64_t p) { *(uint64_t *)d = p; return 0; }
int cuFuncSetAttribute(void *f, int a, int v) { return 0; }
int cuLaunchKernelEx(const Config *c, void *f, void **p, void **e) {
  printf("%u %llu", c->grid[0], (unsigned long long)c->stream);
  for (int i = 0; i < 5; i++) printf(" %llu", *(unsigned long long *)p[i]);
  printf(" %d\n", *(int *)p[5]);
  fflush(stdout);
  return 0;
}
"""
CALLS = """
import ctypes, os
ctypes.CDLL(os.environ["TRITON_LIBCUDA_PATH"] + "/libcuda.so.1", mode=ctypes.RTLD_GLOBAL)
import torch
from triton.backends.nvidia.driver import CudaLauncher
import psmc
from benchmarks.no_device import no_device
agg = psmc.load("examples/mingru.psm")
with no_device(agg, writes=True) as device:
    device.launcher_cls = CudaLauncher
    z, x = torch.zeros(2, 3, 4, 48).unbind(0)
    state = agg.init_state(3, (48,))
    for device.stream in (0, 7, 9):
        y, after = agg.step(state, z[:, 1], x[:, 1])
        print(3, device.stream, *(t.data_ptr() for t in (z[:, 1], x[:, 1], y, state["h"], after["h"])), 48 // 4, flush=True)
"""


def test_a_step_reaches_the_driver(tmp_path) -> None:
    (tmp_path / "driver.c").write_text(DRIVER)
    library = tmp_path / "libcuda.so.1"
    built = subprocess.run([CC, "-shared", "-fPIC", "-o", library, tmp_path / "driver.c"], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (tmp_path / "libcuda.so").symlink_to(library)
    env = {**os.environ, "TRITON_LIBCUDA_PATH": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(ROOT)}
    env |= {"TRITON_CACHE_DIR": str(tmp_path / "triton"), "PSMC_CACHE_DIR": str(tmp_path / "psmc")}
    env.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", CALLS], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 6
    assert lines[::2] == lines[1::2], "what was launched, and what should have been"
