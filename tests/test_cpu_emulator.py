"""The CPU emulator: what it computes, what it counts, and what it refuses.

The counts are worked out by hand from the addresses; a warp has 32 lanes, a sector 32 bytes, shared
memory 32 banks of 4 bytes.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from asymconv import cpu
from asymconv.kernels import ptx

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build with")

# A kernel takes x and y; LAUNCH gives it a launcher of its own. `// @name` marks lines.
PRELUDE = r"""
#include <cuda_runtime.h>
#include <cuda_fp16.h>
#include <cassert>

#define LAUNCH(kernel, grid, block, smem)                        \
  extern "C" int run_##kernel(const float* x, float* y) {        \
    kernel<<<grid, block, smem>>>(x, y);                         \
    return (int)cudaGetLastError();                              \
  }
"""

TURNS = {
    "skipped": """
  for (int i = 0; i < 4; ++i) {
    if ((i + lane) % 2) sum += x[i * 32 + lane];  // @skipped
  }""",
    "skipped_by_continue": """
  for (int i = 0; i < 4; ++i) {
    if (i == lane % 4) continue;
    sum += x[i * 32 + lane];  // @skipped_by_continue
  }""",
    "skipped_in_while": """
  int i = 0;
  while (i < 4) {
    ++i;
    if ((i + lane) % 2) sum += x[i * 32 + lane];  // @skipped_in_while
  }""",
    "skipped_in_do": """
  int i = 0;
  do {
    if ((i + lane) % 2) continue;
    sum += x[i * 32 + lane];  // @skipped_in_do
  } while (++i < 4);""",
    "skipped_in_forever": """
  int next = 0;
  for (;;) {
    if (next == 4) break;
    const int i = next++;
    if ((i + lane) % 2) continue;
    sum += x[i * 32 + lane];  // @skipped_in_forever
  }""",
    "skipped_in_switch": """
  for (int i = 0; i < 4; ++i) {
    switch ((i + lane) % 4) {
      case 0: continue;
      case 1: break;
      default: sum += x[i * 32 + lane];  // @skipped_in_switch
    }
  }""",
    "two_conditions": """
  for (int i = 0; i < lane % 2 * 4 || i < 4; ++i) {
    if ((i + lane) % 2) sum += x[i * 32 + lane];  // @two_conditions
  }""",
    "fewer_turns": """
  for (int i = lane; i < 80; i += 32) {
    sum += x[i];  // @fewer_turns
  }""",
    "later_start": """
  for (int i = lane < 16 ? 0 : 1; i < 3; ++i) {
    sum += x[i * 32 + lane];  // @later_start
  }""",
    "left_early": """
  for (int i = 0; i < 4; ++i) {
    if (i == lane / 8) break;
    sum += x[i * 32 + lane];  // @left_early
  }""",
    "nested": """
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j < 3; ++j) {
      if (lane < 8 * (1 + (i + j) % 4)) sum += x[(3 * i + j) * 32 + lane];  // @nested
    }
  }""",
    "nested_turns": """
  for (int i = 0; i < 3; ++i) {
    for (int j = 0; j <= (lane + i) % 3; ++j) {
      sum += x[(3 * i + j) * 32 + lane];  // @nested_turns
    }
  }""",
    "nested_whiles": """
  int i = 0, n = 0;
  while (++i <= 3) while (n < i + lane % 2) sum += x[32 * n++ + lane];  // @nested_whiles
  """,
    "do_in_forever": """
  int i = 0, n = 0;
  for (;;) {
    if (++i > 3) break;
    do sum += x[32 * n++ + lane];  // @do_in_forever
    while (n < i + lane % 2);
  }""",
    "turns_without_access": """
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < lane; ++j) {
      for (int k = 0; k < 3; ++k) sum += j;
    }
    if ((i + lane) % 2) sum += x[i * 32 + lane];  // @turns_without_access
  }""",
    "called": """
  for (int i = 0; i < 4; ++i) {
    if ((i + lane) % 2) {
      sum += read(x + i * 32 + lane);
    } else if (i < 2) {
      sum += read(x + 512 + i * 32 + lane);
    }
  }""",
    "skipped_for_long": """
  for (int i = 0; i < 9000; ++i) {
    if ((i + lane) % 2) sum += x[lane];  // @skipped_for_long
  }""",
}

COUNTED = (
    PRELUDE
    + r"""
__global__ void coalesced(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x];  // @coalesced
}
LAUNCH(coalesced, 1, 32, 0)

__global__ void strided(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x * 32];  // @strided
}
LAUNCH(strided, 1, 32, 0)

__global__ void vector4(const float* x, float* y) {
  ((float4*)y)[threadIdx.x] = reinterpret_cast<const float4*>(x)[threadIdx.x];  // @vector4
}
LAUNCH(vector4, 1, 32, 0)

// 16 bytes into a sector: a quarter of a warp, 128 bytes, touches 5
__global__ void vector4_shifted(const float* x, float* y) {
  ((float4*)y)[threadIdx.x] = ((const float4*)x)[threadIdx.x + 1];  // @vector4_shifted
}
LAUNCH(vector4_shifted, 1, 32, 0)

__global__ void vector2(const float* x, float* y) {
  const float2 v = __ldg(reinterpret_cast<const float2*>(x) + threadIdx.x);  // @vector2
  y[threadIdx.x] = v.x + v.y;
}
LAUNCH(vector2, 1, 32, 0)

__global__ void offset(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x + 1];  // @offset
}
LAUNCH(offset, 1, 32, 0)

__global__ void broadcast(const float* x, float* y) {
  y[threadIdx.x] = min(x[blockIdx.x], 1.0f);  // @broadcast
}
LAUNCH(broadcast, 3, 32, 0)

// 40 threads: the second warp has 8 lanes
__global__ void ragged(const float* x, float* y) {
  y[threadIdx.x] = x[threadIdx.x];  // @ragged
}
LAUNCH(ragged, 1, 40, 0)

__global__ void predicated(const float* x, float* y) {
  float sum = 0.0f;
  for (int i = 0; i < 5; ++i) {
    if (threadIdx.x < 16) sum += x[i * 32 + threadIdx.x];  // @predicated
  }
  y[threadIdx.x] = sum;
}
LAUNCH(predicated, 1, 32, 0)

// the invariant load stands in the loop, and is executed there; += is a load and a store
__global__ void as_written(const float* x, float* y) {
  for (int i = 0; i < 4; ++i) {
    y[threadIdx.x] += x[0] * x[0];  // @as_written
  }
}
LAUNCH(as_written, 1, 32, 0)

__global__ void three_floats(const float* x, float* y) {
  const float3 v = reinterpret_cast<const float3*>(x)[threadIdx.x];  // @three_floats
  y[threadIdx.x] = v.x + v.y + v.z;
}
LAUNCH(three_floats, 1, 32, 0)

template <int Pitch>
__device__ void transpose(const float* x, float* y) {
  __shared__ float tile[32][Pitch];
  for (int r = 0; r < 32; ++r) tile[r][threadIdx.x] = x[r * 32 + threadIdx.x];  // @rows
  __syncthreads();
  for (int c = 0; c < 32; ++c) y[c * 32 + threadIdx.x] = tile[threadIdx.x][c];  // @columns
}
__global__ void column32(const float* x, float* y) { transpose<32>(x, y); }
__global__ void column33(const float* x, float* y) { transpose<33>(x, y); }
LAUNCH(column32, 1, 32, 0)
LAUNCH(column33, 1, 32, 0)

__global__ void shared4(const float* x, float* y) {
  extern __shared__ __align__(16) float4 room[];
  const int lane = threadIdx.x;
  room[lane] = make_float4(x[lane], 0.0f, 1.0f, 2.0f);  // @shared4_contiguous
  room[32 + lane * 2] = room[lane];                     // @shared4_stride2
  room[lane * 8] = make_float4(x[lane], 0, 0, 0);       // @shared4_stride8
  y[lane] = room[0].x;                                  // @shared4_broadcast
  const float4 same = room[2];                          // @shared4_broadcast16
  y[lane] += same.x;
}
LAUNCH(shared4, 1, 32, 256 * sizeof(float4))

__global__ void shared2(const float* x, float* y) {
  extern __shared__ float2 pairs[];
  const int lane = threadIdx.x;
  pairs[lane] = make_float2(x[lane], x[lane]);  // @shared2_contiguous
  pairs[lane * 2] = make_float2(0.0f, 0.0f);    // @shared2_stride2
  y[lane] = pairs[0].y;
}
LAUNCH(shared2, 1, 32, 64 * sizeof(float2))

__global__ void halves(const float* x, float* y) {
  __shared__ __half row[64];
  row[threadIdx.x] = __float2half_rn(x[threadIdx.x]);  // @half_store
  __syncthreads();
  y[threadIdx.x] = __half2float(row[threadIdx.x ^ 1]);
}
LAUNCH(halves, 1, 64, 0)

__constant__ float scale[4] = {1.0f, 2.0f, 3.0f, 4.0f};
__device__ __forceinline__ float helped(const float* p) {
  return *p * scale[threadIdx.x & 3];  // @helped
}
__global__ void forceinline_helper(const float* x, float* y) {
  y[threadIdx.x] = helped(x + threadIdx.x);
}
LAUNCH(forceinline_helper, 1, 32, 0)

__global__ void atomics(const float* x, float* y) {
  atomicAdd(y + threadIdx.x % 8, x[0]);  // @atomics
}
LAUNCH(atomics, 1, 32, 0)

__device__ __forceinline__ void cp_async16(void* shared, const void* global, int bytes) {
#ifdef __CUDACC__
#error "PTX for nvcc"
#else
  emu::cp_async<16>(shared, global, bytes);
#endif
}
__global__ void copies(const float* x, float* y) {
  __shared__ float4 row[32];
  const int lane = threadIdx.x;
  cp_async16(row + lane, x + 4 * lane, lane < 30 ? 16 : lane == 30 ? 8 : 0);  // @cp_async
  emu::cp_async_commit();
  emu::cp_async_wait<0>();
  reinterpret_cast<float4*>(y)[lane] = row[lane];
}
LAUNCH(copies, 1, 32, 0)

__global__ void matrices(const float* x, float* y) {
  __shared__ __align__(16) __half tile[16][16];
  for (int i = threadIdx.x; i < 256; i += 32) tile[i / 16][i % 16] = __half((float)i);
  __syncthreads();
  uint32_t all[4], turned[4], two[2];
  const int lane = threadIdx.x;
  const void* row = &tile[lane % 16][lane / 16 * 8];
  emu::ldmatrix(all, row);  // @ldmatrix4
  emu::ldmatrix<true>(turned, row);
  emu::ldmatrix(two, row);  // @ldmatrix2
  for (int m = 0; m < 4; ++m) {
    reinterpret_cast<uint32_t*>(y)[m * 32 + lane] = all[m];
    reinterpret_cast<uint32_t*>(y)[(4 + m) * 32 + lane] = turned[m];
  }
  for (int m = 0; m < 2; ++m) reinterpret_cast<uint32_t*>(y)[(8 + m) * 32 + lane] = two[m];
}
LAUNCH(matrices, 1, 32, 0)

__device__ __noinline__ float read(const float* p) {
  return *p;  // @called
}

// a loop long enough that lanes must be let catch up; one lane alone goes on for as long again
__global__ void long_loop(const float* x, float* y) {
  float sum = 0.0f;
  for (int i = 0; i < 3000; ++i) sum += x[threadIdx.x];  // @long_loop
  if (threadIdx.x == 7) {
    for (int i = 0; i < 3000; ++i) sum += x[0];  // @long_lane
  }
  y[threadIdx.x] = sum;
}
LAUNCH(long_loop, 1, 32, 0)
"""
    # what each lane does in a loop; the lanes of a warp meet again at the end of every turn
    + "".join(
        f"""
__global__ void {name}(const float* x, float* y) {{
  const int lane = threadIdx.x;
  float sum = 0.0f;
  {text}
  y[lane] = sum;
}}
LAUNCH({name}, 1, 32, 0)
"""
        for name, text in TURNS.items()
    )
)

CHECKED = (
    PRELUDE
    + r"""
__global__ void fresh_shared(const float* x, float* y) {
  __shared__ float fixed[32];
  extern __shared__ float sized[];
  y[blockIdx.x * 64 + threadIdx.x] = fixed[threadIdx.x];
  y[blockIdx.x * 64 + 32 + threadIdx.x] = sized[threadIdx.x];
  __syncthreads();
  fixed[threadIdx.x] = sized[threadIdx.x] = 1.0f;
}
LAUNCH(fresh_shared, 2, 32, 128)

// Sums 256 values in shared memory; SYNC is what stands between the steps.
#define SUM(name, SYNC)                                                     \
  __global__ void name(const float* x, float* y) {                          \
    __shared__ float part[256];                                             \
    const int t = threadIdx.x;                                              \
    part[t] = x[t];                                                         \
    for (int step = 128; step; step >>= 1) {                                \
      SYNC;                                                                 \
      if (t < step) part[t] += part[t + step];                              \
    }                                                                       \
    if (t == 0) y[0] = part[0];                                             \
  }                                                                         \
  LAUNCH(name, 1, 256, 0)
SUM(sum_with_barriers, __syncthreads())
SUM(sum_without_barriers, (void)0)

__global__ void sum_in_warp(const float* x, float* y) {
  __shared__ float part[32];
  const int t = threadIdx.x;
  part[t] = x[t];
  for (int step = 16; step; step >>= 1) {
    __syncwarp();
    const float other = part[(t + step) % 32];
    __syncwarp();
    if (t < step) part[t] += other;
  }
  if (t == 0) y[0] = part[0];
}
LAUNCH(sum_in_warp, 1, 32, 0)

__global__ void two_warps_syncwarp(const float* x, float* y) {
  __shared__ float part[64];
  part[threadIdx.x] = x[threadIdx.x];        // @stored
  __syncwarp();
  y[threadIdx.x] = part[threadIdx.x ^ 32];   // @loaded
}
LAUNCH(two_warps_syncwarp, 1, 64, 0)

// lanes 0 to 15 synchronize among themselves, then read what lane 20 wrote
__global__ void half_warp_sync(const float* x, float* y) {
  __shared__ float part[32];
  part[threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x < 16) {
    __syncwarp(0x0000ffffu);
    y[threadIdx.x] = part[threadIdx.x == 3 ? 20 : threadIdx.x ^ 1];
  } else {
    __syncwarp(0xffff0000u);
  }
}
LAUNCH(half_warp_sync, 1, 32, 0)

__global__ void shared_atomics(const float* x, float* y) {
  __shared__ int count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, 1);
  __syncthreads();
  y[threadIdx.x] = (float)count;
}
LAUNCH(shared_atomics, 1, 64, 0)

__global__ void exit_before_barrier(const float* x, float* y) {
  if (blockIdx.x == 1 && threadIdx.x >= 40) return;
  __syncthreads();  // @missed
  y[threadIdx.x] = x[threadIdx.x];
}
LAUNCH(exit_before_barrier, 2, 64, 0)

__global__ void two_barriers(const float* x, float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();  // @first
  } else {
    __syncthreads();  // @second
  }
  y[threadIdx.x] = x[threadIdx.x];
}
LAUNCH(two_barriers, 1, 64, 0)

__global__ void barrier_and_shuffle(const float* x, float* y) {
  float v = x[threadIdx.x];
  if (threadIdx.x == 5) {
    __syncthreads();
  } else {
    v = __shfl_xor_sync(0xffffffffu, v, 1);
  }
  y[threadIdx.x] = v;
}
LAUNCH(barrier_and_shuffle, 1, 32, 0)

__global__ void not_in_mask(const float* x, float* y) {
  y[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 0);
}
LAUNCH(not_in_mask, 1, 32, 0)

__global__ void past_the_end(const float* x, float* y) {
  const int i = blockIdx.x * 32 + threadIdx.x;
  y[0] = x[i + 1];  // @past
}
LAUNCH(past_the_end, 2, 32, 0)

__global__ void past_shared(const float* x, float* y) {
  extern __shared__ float room[];
  room[threadIdx.x + 1] = x[threadIdx.x];  // @past_shared
}
LAUNCH(past_shared, 1, 32, 128)

__global__ void misaligned(const float* x, float* y) {
  const char* odd = (const char*)x + 2;
  y[threadIdx.x] = *(const float*)odd;  // @misaligned
}
LAUNCH(misaligned, 1, 32, 0)

__global__ void wild(const float* x, float* y) {
  y[0] = *(const volatile float*)(size_t)(64 + threadIdx.x);
}
LAUNCH(wild, 1, 32, 0)

__device__ __noinline__ float deep(const float* x, int depth) {
  volatile float room[256];
  room[depth % 256] = x[0];
  return depth == 0 ? room[0] : deep(x, depth - 1) + room[depth % 256];
}
__global__ void stack_overflow(const float* x, float* y) { y[0] = deep(x, 1 << 20); }
LAUNCH(stack_overflow, 1, 32, 0)

__global__ void frame_too_large(const float* x, float* y) {
  volatile float room[1 << 20];
  room[threadIdx.x] = x[0];
  y[threadIdx.x] = room[threadIdx.x];
}
LAUNCH(frame_too_large, 1, 32, 0)

__global__ void asserting(const float* x, float* y) {
  assert(x[threadIdx.x] < 0.0f);  // @assert
}
LAUNCH(asserting, 1, 32, 0)

__global__ void large_locals(const float* x, float* y) {
  float room[24 * 1024];
  for (int i = 0; i < 24 * 1024; ++i) room[i] = x[(threadIdx.x + i) % 32];
  __syncthreads();
  y[threadIdx.x] = room[threadIdx.x * 100];
}
LAUNCH(large_locals, 1, 64, 0)

__global__ void identity(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
LAUNCH(identity, 1, 32, 0)
// what CUDA answers to a launch of g blocks of b threads with smem bytes, after asking for limit
extern "C" int run_limits(const float* x, float* y, const int* g, const int* b, int smem,
                          int limit) {
  if (limit) {
    const cudaError_t error =
        cudaFuncSetAttribute(identity, cudaFuncAttributeMaxDynamicSharedMemorySize, limit);
    if (error != cudaSuccess) return (int)cudaGetLastError();
  }
  identity<<<dim3(g[0], g[1], g[2]), dim3(b[0], b[1], b[2]), smem>>>(x, y);
  const int error = (int)cudaGetLastError();
  return cudaGetLastError() == cudaSuccess ? error : -1;
}

__global__ void late_copy(const float* x, float* y) {
  __shared__ float a[32], b[32], c[32];
  const int t = threadIdx.x;
  emu::cp_async<4>(a + t, x + t);
  emu::cp_async_commit();
  emu::cp_async<4>(b + t, x + t, t < 30 ? 4 : 0);
  emu::cp_async_commit();
  emu::cp_async<4>(c + t, x + t);
  y[t] = a[t];
  emu::cp_async_wait<1>();
  y[32 + t] = a[t];
  y[64 + t] = b[t];
  emu::cp_async_wait<0>();
  y[96 + t] = b[t];
  y[128 + t] = c[t];  // never committed
  emu::cp_async_wait_all();
  y[160 + t] = c[t];
}
LAUNCH(late_copy, 1, 32, 0)

// Reads its neighbour's copy after its own wait, with or without the barrier that makes it visible.
template <bool Barrier>
__global__ void copied_by_neighbour(const float* x, float* y) {
  __shared__ float row[64];
  emu::cp_async<4>(row + threadIdx.x, x + threadIdx.x);
  emu::cp_async_wait_all();
  if (Barrier) __syncthreads();
  y[threadIdx.x] = row[threadIdx.x ^ 33];
}
extern "C" int run_neighbour(const float* x, float* y, int barrier) {
  if (barrier) {
    copied_by_neighbour<true><<<1, 64>>>(x, y);
  } else {
    copied_by_neighbour<false><<<1, 64>>>(x, y);
  }
  return (int)cudaGetLastError();
}

// The copy may still be on its way at the first barrier, where other threads read its target.
__global__ void read_while_copied(const float* x, float* y) {
  __shared__ float row[64];
  row[threadIdx.x] = 0.0f;
  __syncthreads();
  emu::cp_async<4>(row + threadIdx.x, x + threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = row[threadIdx.x ^ 1];
  __syncthreads();
  emu::cp_async_wait_all();
}
LAUNCH(read_while_copied, 1, 64, 0)

__global__ void exchanges(const float* x, float* y) {
  const unsigned all = 0xffffffffu;
  const int t = threadIdx.x;
  const float v = x[t];
  y[t] = __shfl_sync(all, v, t + 3);
  y[32 + t] = __shfl_xor_sync(all, v, 5);
  y[64 + t] = __shfl_up_sync(all, v, 2, 8);
  y[96 + t] = __shfl_down_sync(all, v, 2, 8);
  y[128 + t] = (float)__ballot_sync(all, t % 4 == 0);
  y[160 + t] = (float)(__any_sync(all, t == 9) * 2 + __all_sync(all, t < 31));
  y[192 + t] = (float)__syncthreads_count(t < 10);
  y[224 + t] = (float)(__syncthreads_or(t == 3) * 2 + __syncthreads_and(t < 32));
}
LAUNCH(exchanges, 1, 32, 0)

// lanes 24 to 31 exit; the others name them in the mask all the same
__global__ void exited_lanes(const float* x, float* y) {
  if (threadIdx.x >= 24) return;
  y[threadIdx.x] = __shfl_down_sync(0xffffffffu, x[threadIdx.x], 1);
}
LAUNCH(exited_lanes, 1, 32, 0)

extern "C" int run_halves(const unsigned short* bits, float* floats, int n, int to_half) {
  for (int i = 0; i < n; ++i) {
    if (to_half) {
      const_cast<unsigned short*>(bits)[i] = __half_as_ushort(__float2half_rn(floats[i]));
    } else {
      floats[i] = __half2float(__ushort_as_half(bits[i]));
    }
  }
  return 0;
}

// x: A (16 x 16), B (16 x 8), C (16 x 8), row by row. y: A * B + C with halves, and with tf32 in
// two steps of 8.
__global__ void multiply(const float* x, float* y) {
  const float *A = x, *B = x + 256, *C = x + 384;
  const int g = threadIdx.x / 4, q = threadIdx.x % 4;
  float c[4], d[4];
  for (int i = 0; i < 4; ++i) c[i] = C[(g + i / 2 * 8) * 8 + 2 * q + i % 2];

  const auto pair = [](float low, float high) {
    const __half2 h = __floats2half2_rn(low, high);
    uint32_t bits;
    memcpy(&bits, &h, 4);
    return bits;
  };
  uint32_t a[4], b[2];
  for (int i = 0; i < 4; ++i) {
    const float* row = A + (g + i % 2 * 8) * 16 + i / 2 * 8 + 2 * q;
    a[i] = pair(row[0], row[1]);
  }
  for (int i = 0; i < 2; ++i) {
    const float* column = B + (i * 8 + 2 * q) * 8 + g;
    b[i] = pair(column[0], column[8]);
  }
  emu::mma_m16n8k16_f16(d, a, b, c);
  for (int i = 0; i < 4; ++i) y[(g + i / 2 * 8) * 8 + 2 * q + i % 2] = d[i];

  for (int k0 = 0; k0 < 16; k0 += 8) {
    for (int i = 0; i < 4; ++i) a[i] = emu::to_tf32(A[(g + i % 2 * 8) * 16 + k0 + i / 2 * 4 + q]);
    for (int i = 0; i < 2; ++i) b[i] = emu::to_tf32(B[(k0 + i * 4 + q) * 8 + g]);
    emu::mma_m16n8k8_tf32(c, a, b, c);
  }
  for (int i = 0; i < 4; ++i) y[128 + (g + i / 2 * 8) * 8 + 2 * q + i % 2] = c[i];
}
LAUNCH(multiply, 1, 32, 0)
"""
)


HOPPER_CHECKED = (
    PRELUDE
    + ptx.MAX_NAN
    + ptx.HOPPER
    + ptx.BULK
    + ptx.MMA
    + "".join(text(columns) for columns in (24, 56) for text in (ptx.wgmma_f16, ptx.wgmma_f16_ra))
    + r"""
// What a warpgroup does with two matrices of halves, 72 and N + 16 rows of 64, in x.
enum { RIGHT, OVERWRITTEN, READ_EARLY, WRITTEN_EARLY, DIVERGENT, UNORDERED, UNFENCED, NO_FENCE };

template <int N, int How>
__device__ void multiply(const float* x, float* y, int shift_a, int shift_b, int from_registers) {
  extern __shared__ __align__(1024) unsigned char shared[];
  constexpr int ROWS_A = 72, ROWS_B = N + 16;
  const int t = threadIdx.x, lane = t % 32;
  for (int i = t; i < (ROWS_A + ROWS_B) * 64; i += 128) {
    const int row = i / 64, channel = i % 64;
    const int at = row * 128 + (channel / 8 ^ row % 8) * 16 + channel % 8 * 2;
    *reinterpret_cast<__half*>(shared + at) = __float2half(x[i]);  // @operand
  }
  if (How != UNFENCED) fence_async_proxy();
  if (How != UNORDERED) __syncthreads();
  const unsigned a = shared_address(shared) + shift_a * 128;
  const unsigned b = shared_address(shared) + ROWS_A * 128 + shift_b * 128;
  float sum[N / 2];
  if (How != NO_FENCE) wgmma_fence();
  for (int part = 0; part < 4; ++part) {
    const int wrong = How == DIVERGENT && t == 37 ? 16 : 0;
    const unsigned long long of_b = swizzled_rows(b + part * 32 + wrong);
    if (from_registers) {
      const int row = shift_a + t / 32 * 16 + lane % 16, chunk = part * 2 + lane / 16;
      unsigned fragment[4];
      ldmatrix_x4(fragment, shared + row * 128 + (chunk ^ row % 8) * 16);
      if (N == 24) {
        wgmma_m64n24k16_f16_ra(reinterpret_cast<float(&)[12]>(sum), fragment, of_b, part);
      } else {
        wgmma_m64n56k16_f16_ra(reinterpret_cast<float(&)[28]>(sum), fragment, of_b, part);
      }
    } else {
      const unsigned long long of_a = swizzled_rows(a + part * 32);
      if (N == 24) {
        wgmma_m64n24k16_f16(reinterpret_cast<float(&)[12]>(sum), of_a, of_b, part);  // @wgmma
      } else {
        wgmma_m64n56k16_f16(reinterpret_cast<float(&)[28]>(sum), of_a, of_b, part);
      }
    }
  }
  wgmma_commit();
  if (How == OVERWRITTEN) {
    for (int i = t; i < ROWS_B * 32; i += 128) {
      reinterpret_cast<unsigned*>(shared + ROWS_A * 128)[i] = 0;  // @too_early
    }
    __syncthreads();
  }
  if (How == WRITTEN_EARLY && t == 5) sum[3] = 0;
  if (How != READ_EARLY) wgmma_wait<0>();  // @wait
  for (int i = 0; i < N / 2; ++i) {
    const int row = t / 32 * 16 + lane / 4 + i / 2 % 2 * 8;
    y[row * N + i / 4 * 8 + lane % 4 * 2 + i % 2] = sum[i];
  }
  if (How == READ_EARLY) wgmma_wait<0>();
}
template <int N, int How>
__global__ void products(const float* x, float* y, int shift_a, int shift_b, int from_registers) {
  multiply<N, How>(x, y, shift_a, shift_b, from_registers);
}
#define PRODUCTS(name, N, How)                                                                    \
  extern "C" int run_##name(const float* x, float* y, int shift_a, int shift_b, int registers) {  \
    products<N, How><<<1, 128, (72 + N + 16) * 128>>>(x, y, shift_a, shift_b, registers);         \
    return (int)cudaGetLastError();                                                               \
  }
PRODUCTS(products24, 24, RIGHT)
PRODUCTS(products56, 56, RIGHT)
PRODUCTS(overwritten, 24, OVERWRITTEN)
PRODUCTS(read_early, 24, READ_EARLY)
PRODUCTS(written_early, 24, WRITTEN_EARLY)
PRODUCTS(divergent, 24, DIVERGENT)
PRODUCTS(unordered, 24, UNORDERED)
PRODUCTS(unfenced, 24, UNFENCED)
PRODUCTS(no_fence, 24, NO_FENCE)

// Two groups of products, the second waited for after the first.
__global__ void two_groups(const float* x, float* y) {
  extern __shared__ __align__(1024) unsigned char shared[];
  for (int i = threadIdx.x; i < 64 * 64; i += 128) {
    reinterpret_cast<__half*>(shared)[i] = __float2half(1.0f);
  }
  fence_async_proxy();
  __syncthreads();
  const unsigned long long ones = swizzled_rows(shared_address(shared));
  float first[12], second[12];
  wgmma_fence();
  wgmma_m64n24k16_f16(first, ones, ones, 0);
  wgmma_commit();
  wgmma_m64n24k16_f16(second, ones, ones, 0);
  wgmma_m64n24k16_f16(second, ones, ones, 1);
  wgmma_commit();
  wgmma_wait<1>();
  y[threadIdx.x] = first[11];
  y[128 + threadIdx.x] = second[11];
  wgmma_wait<0>();
  y[256 + threadIdx.x] = second[11];
}
LAUNCH(two_groups, 1, 128, 8192)

__global__ void half_a_warpgroup(const float* x, float* y) {
  float sum[12];
  wgmma_fence();
  wgmma_m64n24k16_f16(sum, swizzled_rows(1024), swizzled_rows(1024), 0);
}
LAUNCH(half_a_warpgroup, 1, 64, 0)

__global__ void beyond_shared(const float* x, float* y) {
  extern __shared__ __align__(1024) unsigned char shared[];
  float sum[12];
  const unsigned long long at = swizzled_rows(shared_address(shared) + 1024);
  wgmma_fence();
  wgmma_m64n24k16_f16(sum, at, at, 0);
  wgmma_commit();
  wgmma_wait<0>();
}
LAUNCH(beyond_shared, 1, 128, 8192)

// A warp hands 8 rows to another through two places; WAIT_FULL and WAIT_EMPTY may be left out.
#define PIPE(name, EMPTY_COUNT, WAIT_FULL, WAIT_EMPTY)                             \
  __global__ void name(const float* x, float* y) {                                 \
    __shared__ float row[2][32];                                                   \
    __shared__ unsigned long long full[2], empty[2];                               \
    const int lane = threadIdx.x % 32;                                             \
    if (threadIdx.x == 0) {                                                        \
      for (int i = 0; i < 2; ++i) {                                                \
        mbarrier_init(shared_address(&full[i]), 32);                               \
        mbarrier_init(shared_address(&empty[i]), EMPTY_COUNT);                     \
      }                                                                            \
    }                                                                              \
    __syncthreads();                                                               \
    for (int i = 0; i < 8; ++i) {                                                  \
      const unsigned parity = i / 2 & 1;                                           \
      if (threadIdx.x < 32) {                                                      \
        if (WAIT_EMPTY) mbarrier_wait(shared_address(&empty[i % 2]), parity ^ 1);  \
        row[i % 2][lane] = x[i * 32 + lane];                                       \
        mbarrier_arrive(shared_address(&full[i % 2]));                             \
      } else {                                                                     \
        if (WAIT_FULL) mbarrier_wait(shared_address(&full[i % 2]), parity);        \
        y[i * 32 + lane] = row[i % 2][lane ^ 1];                                   \
        __syncwarp();                                                              \
        if (lane == 0) mbarrier_arrive(shared_address(&empty[i % 2]), 4);          \
      }                                                                            \
    }                                                                              \
  }                                                                                \
  LAUNCH(name, 1, 64, 0)
PIPE(pipe, 4, true, true)
PIPE(pipe_full_unheeded, 4, false, true)
PIPE(pipe_empty_unheeded, 4, true, false)
PIPE(pipe_too_many, 3, true, true)

__global__ void one_arrival_short(const float* x, float* y) {
  __shared__ unsigned long long barrier;
  if (threadIdx.x == 0) mbarrier_init(shared_address(&barrier), 33);
  __syncthreads();
  if (threadIdx.x < 32) {
    mbarrier_arrive(shared_address(&barrier));
    mbarrier_wait(shared_address(&barrier), 0);  // @short
  } else {
    named_barrier<96>(3);  // @named_short
  }
}
LAUNCH(one_arrival_short, 1, 96, 0)

__global__ void not_initialized(const float* x, float* y) {
  __shared__ unsigned long long barrier;
  mbarrier_wait(shared_address(&barrier), 0);  // @not_initialized
}
LAUNCH(not_initialized, 1, 32, 0)

__global__ void initialized_twice(const float* x, float* y) {
  __shared__ unsigned long long barrier;
  for (int i = 0; i < 2; ++i) mbarrier_init(shared_address(&barrier), 1);
}
LAUNCH(initialized_twice, 1, 1, 0)

__global__ void unsynchronized_init(const float* x, float* y) {
  __shared__ unsigned long long barrier;
  if (threadIdx.x == 0) mbarrier_init(shared_address(&barrier), 2);
  __syncwarp();
  if (threadIdx.x % 32 == 0) mbarrier_arrive(shared_address(&barrier));
}
LAUNCH(unsynchronized_init, 1, 64, 0)

__global__ void not_shared(const float* x, float* y) { y[0] = (float)shared_address(x); }
LAUNCH(not_shared, 1, 1, 0)

__global__ void addresses(const float* x, float* y) {
  extern __shared__ __align__(1024) unsigned char dynamic[];
  __shared__ float fixed[4];
  unsigned* const to = reinterpret_cast<unsigned*>(y);
  to[0] = shared_address(dynamic);
  to[1] = shared_address(dynamic + 100);
  to[2] = (shared_address(fixed) - (unsigned)(size_t)fixed) % 1024;
  to[3] = shared_address(fixed + 1) - shared_address(fixed);
}
LAUNCH(addresses, 1, 1, 200)

// Two pairs of warps each reverse their 64 values, twice, without waiting for the other pair.
template <bool Synchronize>
__device__ void reverse_in_pairs(const float* x, float* y) {
  __shared__ float part[128];
  const int pair = threadIdx.x / 64, first = pair * 64, t = threadIdx.x % 64;
  part[first + t] = x[threadIdx.x];  // @pair_stores
  for (int turn = 0; turn < 2; ++turn) {
    if (Synchronize) named_barrier<64>(1 + pair);
    const float other = part[first + 63 - t];
    if (Synchronize) named_barrier<64>(1 + pair);
    part[first + t] = other + turn;
  }
  y[threadIdx.x] = part[first + t];
}
__global__ void pairs(const float* x, float* y) { reverse_in_pairs<true>(x, y); }
__global__ void pairs_unsynchronized(const float* x, float* y) { reverse_in_pairs<false>(x, y); }
LAUNCH(pairs, 1, 128, 0)
LAUNCH(pairs_unsynchronized, 1, 128, 0)

__global__ void unequal_barrier(const float* x, float* y) {
  if (threadIdx.x < 32) {
    named_barrier<64>(1);  // @for64
  } else {
    named_barrier<96>(1);  // @for96
  }
}
LAUNCH(unequal_barrier, 1, 96, 0)

__global__ void barrier_zero(const float* x, float* y) { named_barrier<32>(0); }
LAUNCH(barrier_zero, 1, 32, 0)

// 4 floats of x by each lane of the first warp; EARLY reads them before the barrier says so.
template <bool Early>
__device__ void load_in_bulk(const float* x, float* y) {
  __shared__ float4 row[32];
  __shared__ unsigned long long landed;
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) mbarrier_init(shared_address(&landed), 32);
  __syncthreads();
  if (threadIdx.x < 32) {
    mbarrier_arrive_expect(shared_address(&landed), 16);
    bulk_load(shared_address(row + lane), x + 4 * lane, 16, shared_address(&landed));  // @bulk_load
  }
  if (!Early) mbarrier_wait(shared_address(&landed), 0);
  reinterpret_cast<float4*>(y)[threadIdx.x] = row[lane ^ 1];
  if (Early) mbarrier_wait(shared_address(&landed), 0);
}
__global__ void bulk_loads(const float* x, float* y) { load_in_bulk<false>(x, y); }
__global__ void bulk_loads_early(const float* x, float* y) { load_in_bulk<true>(x, y); }
LAUNCH(bulk_loads, 1, 64, 0)
LAUNCH(bulk_loads_early, 1, 64, 0)

__global__ void bulk_load_unheeded(const float* x, float* y) {
  __shared__ float4 row;
  __shared__ unsigned long long landed;
  mbarrier_init(shared_address(&landed), 1);
  mbarrier_arrive_expect(shared_address(&landed), 16);
  bulk_load(shared_address(&row), x, 16, shared_address(&landed));
}
LAUNCH(bulk_load_unheeded, 1, 1, 0)

__global__ void bulk_load_short(const float* x, float* y) {
  __shared__ float4 row[2];
  __shared__ unsigned long long landed;
  mbarrier_init(shared_address(&landed), 1);
  mbarrier_arrive_expect(shared_address(&landed), 32);
  bulk_load(shared_address(row), x, 16, shared_address(&landed));
  mbarrier_wait(shared_address(&landed), 0);  // @bytes_short
}
LAUNCH(bulk_load_short, 1, 1, 0)

enum { WAITED, ONLY_READ, TOO_EARLY, NOT_WAITED, NOT_FENCED, ODD_BYTES };
template <int How>
__device__ void store_in_bulk(const float* x, float* y) {
  __shared__ float4 row[32];
  const int lane = threadIdx.x;
  row[lane] = reinterpret_cast<const float4*>(x)[lane];  // @staged
  if (How != NOT_FENCED) fence_async_proxy();
  __syncwarp();
  if (lane == 0) {
    bulk_store(y, shared_address(row), How == ODD_BYTES ? 250 : 256);  // @bulk_store
    bulk_commit();
    bulk_store(y + 64, shared_address(row + 16), 256);
    bulk_commit();
    if (How == TOO_EARLY) row[3].x = -1.0f;
    if (How == TOO_EARLY) row[30].x = -1.0f;
    if (How != NOT_WAITED) bulk_wait_read<1>();
    row[0].y = -2.0f;
    if (How == ONLY_READ) bulk_wait_read();
    if (How != NOT_WAITED && How != ONLY_READ) bulk_wait();
    y[256] = y[0];
  }
}
#define STORES(name, How)                                                                  \
  __global__ void name(const float* x, float* y) { store_in_bulk<How>(x, y); }             \
  LAUNCH(name, 1, 32, 0)
STORES(bulk_stores, WAITED)
STORES(bulk_stores_read, ONLY_READ)
STORES(bulk_stores_overwritten, TOO_EARLY)
STORES(bulk_stores_unheeded, NOT_WAITED)
STORES(bulk_stores_unfenced, NOT_FENCED)
STORES(bulk_stores_of_250_bytes, ODD_BYTES)

__global__ void small_twins(const float* x, float* y) {
  const int lane = threadIdx.x;
  registers_up_to<240>();
  const float4 four = lane < 8 ? reinterpret_cast<const float4*>(x)[lane] : float4{};
  __stcs(reinterpret_cast<float4*>(y) + lane, four);  // @streamed
  y[128 + lane] = larger_magnitude(lane == 3 ? NAN : -2.0f, lane == 4 ? NAN : lane - 16.0f);
  __nanosleep(20);
}
LAUNCH(small_twins, 1, 32, 0)
"""
)


CLUSTER_CHECKED = (
    PRELUDE
    + ptx.HOPPER
    + ptx.BULK
    + ptx.CLUSTER
    + r"""
// Launched by cudaLaunchKernelEx, in clusters.
#define LAUNCH_CLUSTERS(kernel)                                                               \
  extern "C" int run_##kernel(const float* x, float* y, const unsigned* cluster, int grid,    \
                              int block) {                                                    \
    cudaLaunchAttribute attribute = {};                                                       \
    attribute.id = cudaLaunchAttributeClusterDimension;                                       \
    attribute.val.clusterDim.x = cluster[0];                                                  \
    attribute.val.clusterDim.y = cluster[1];                                                  \
    attribute.val.clusterDim.z = cluster[2];                                                  \
    cudaLaunchConfig_t config = {};                                                           \
    config.gridDim = grid;                                                                    \
    config.blockDim = block;                                                                  \
    config.dynamicSmemBytes = sizeof(Exchanged);                                              \
    config.attrs = &attribute;                                                                \
    config.numAttrs = 1;                                                                      \
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, x, y);                      \
    return (int)(error ? error : cudaGetLastError());                                         \
  }

struct Exchanged {
  float own[128], others[128];
  unsigned long long landed, read;
  int least, most;
};
enum { WAITED, TOO_EARLY, NOT_FENCED, OVERWRITTEN, NOT_EXPECTED, OWN_BARRIER, NO_SUCH_BLOCK };

// Each block of a cluster gets the other's 128 values, in 2 turns.
template <int How>
__device__ void exchange(const float* x, float* y) {
  extern __shared__ __align__(1024) unsigned char shared[];
  Exchanged& here = *reinterpret_cast<Exchanged*>(shared);
  const int lane = threadIdx.x % 32, rank = cluster_rank();
  const unsigned mine = shared_address(shared);
  const unsigned there = map_shared(mine, How == NO_SUCH_BLOCK ? 2 : 1 - rank);
  const auto in_other = [&](void* place) { return there + (shared_address(place) - mine); };
  if (threadIdx.x == 0) {
    mbarrier_init(shared_address(&here.landed), 1);
    mbarrier_init(shared_address(&here.read), 1);
    here.least = 1000;
    here.most = -1000;
  }
  cluster_barrier();
  for (int turn = 0; turn < 2; ++turn) {
    if (threadIdx.x < 32) {
      if (turn) mbarrier_wait(shared_address(&here.read), 0);
      const float4 four = reinterpret_cast<const float4*>(x)[blockIdx.x * 32 + lane];
      reinterpret_cast<float4*>(here.own)[lane] =
          make_float4(four.x + turn, four.y, four.z, four.w);  // @sent
      if (How != NOT_FENCED) fence_async_proxy();
      __syncwarp();
      if (lane == 0) {
        if (How != NOT_EXPECTED) mbarrier_arrive_expect(shared_address(&here.landed), 512);
        if (How == NOT_EXPECTED) mbarrier_arrive(shared_address(&here.landed));
        cluster_copy(in_other(here.others), shared_address(here.own), 512,
                     How == OWN_BARRIER ? mine + 1024 : in_other(&here.landed));  // @copied
        cluster_min(in_other(&here.least), 10 * blockIdx.x + turn);
        cluster_max(in_other(&here.most), 10 * blockIdx.x + turn);
      }
      if (How == OVERWRITTEN) here.own[lane] = -1.0f;  // @overwritten
    }
    if (How != TOO_EARLY) mbarrier_wait(shared_address(&here.landed), turn);
    if (threadIdx.x / 32 == turn) {
      reinterpret_cast<float4*>(y)[(2 * blockIdx.x + turn) * 32 + lane] =
          reinterpret_cast<const float4*>(here.others)[lane];
    }
    if (How == TOO_EARLY) mbarrier_wait(shared_address(&here.landed), turn);
    __syncthreads();
    if (threadIdx.x == 0) cluster_mbarrier_arrive(in_other(&here.read));
  }
  cluster_barrier();
  if (threadIdx.x == 0) {
    y[1024 + 2 * blockIdx.x] = here.least;
    y[1025 + 2 * blockIdx.x] = here.most;
    y[1032 + blockIdx.x] = 10 * cluster_blocks() + rank;
  }
}
#define EXCHANGE(name, How)                                                                   \
  __global__ void name(const float* x, float* y) { exchange<How>(x, y); }                     \
  LAUNCH_CLUSTERS(name)
EXCHANGE(exchanged, WAITED)
EXCHANGE(exchanged_early, TOO_EARLY)
EXCHANGE(exchanged_unfenced, NOT_FENCED)
EXCHANGE(exchanged_overwritten, OVERWRITTEN)
EXCHANGE(exchanged_unexpected, NOT_EXPECTED)
EXCHANGE(exchanged_by_own_barrier, OWN_BARRIER)
EXCHANGE(exchanged_with_none, NO_SUCH_BLOCK)

// The blocks of a cluster pass their own barriers, and no other's.
__global__ void alone(const float* x, float* y) {
  extern __shared__ __align__(1024) unsigned char shared[];
  float* const row = reinterpret_cast<float*>(shared);
  const int t = threadIdx.x;
  row[t] = x[blockIdx.x * 128 + t];
  if (cluster_rank() == 1) __syncthreads();
  named_barrier<128>(1);
  float other = row[127 - t];
  named_barrier<128>(1);
  row[t] = other + 1.0f;
  __syncthreads();
  y[blockIdx.x * 128 + t] = row[127 - t];
}
LAUNCH_CLUSTERS(alone)

__global__ void many_stacks(const float* x, float* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  cluster_barrier();
  y[i] = x[i] + 1.0f;
}
LAUNCH_CLUSTERS(many_stacks)

__global__ void one_leaves(const float* x, float* y) {
  if (cluster_rank() == 0) cluster_barrier();  // @left_alone
}
LAUNCH_CLUSTERS(one_leaves)
"""
)


def line_of(source: str, mark: str) -> int:
    """The line of a text that ends in ``// @mark``, from 1."""
    (number,) = (
        i for i, line in enumerate(source.splitlines(), 1) if re.search(rf"// @{mark}\b", line)
    )
    return number


def build(source: str, folder: Path, *, traced: bool, cxx: str = "g++") -> cpu.Program:
    def run(command: list[str]) -> None:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr

    folder.mkdir()
    run(cpu.runtime_command(folder, traced=traced, cxx=cxx))
    cpu.write_sources(source, folder)
    for command in cpu.commands(folder, folder, traced=traced, cxx=cxx):
        run(command)
    return cpu.Program(folder / "kernel.so")


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., cpu.Program]:
    """counted or checked, plain or traced: each built once, at first use."""
    folder = tmp_path_factory.mktemp("emulator")
    built: dict[tuple[str, bool, str], cpu.Program] = {}

    def get(source: str, traced: bool = True, cxx: str = "g++") -> cpu.Program:
        key = (source, traced, cxx)
        if key not in built:
            built[key] = build(source, folder / str(len(built)), traced=traced, cxx=cxx)
        return built[key]

    return get


N = 4096


def run(program: cpu.Program, kernel: str, x: torch.Tensor | None = None, **how) -> torch.Tensor:
    """y, N floats that start as NaN; x counts 0, 1, 2, ... unless given."""
    if x is None:
        x = torch.arange(N, dtype=torch.float32)
    x = cpu.aligned_empty(x.numel()).copy_(x)
    y = cpu.aligned_empty(N).fill_(float("nan"))
    if kernel == "as_written":
        y.zero_()
    buffers = [cpu.Buffer(n, t.data_ptr(), t.numel() * 4) for n, t in (("x", x), ("y", y))]
    extra = how.pop("extra", ())
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (x, y)]
    code = program.call(f"run_{kernel}", *pointers, *extra, buffers=buffers, **how)
    assert code == 0
    return y


def count_of(
    program: cpu.Program, source: str, kernel: str, mark: str, space: str, op: str
) -> cpu.LineCount:
    run(program, kernel, trace=True)
    line = line_of(source, mark)
    (count,) = (c for c in program.counts() if (c.line, c.space, c.op) == (line, space, op))
    return count


@pytest.mark.parametrize(
    ("kernel", "op", "width", "requests", "sectors", "lanes"),
    [
        ("coalesced", "load", 4, 1, 4, 32),
        ("coalesced", "store", 4, 1, 4, 32),
        ("strided", "load", 4, 1, 32, 32),
        ("vector4", "load", 16, 1, 16, 32),
        ("vector4", "store", 16, 1, 16, 32),
        ("vector4_shifted", "load", 16, 1, 20, 32),
        ("vector2", "load", 8, 1, 8, 32),
        ("offset", "load", 4, 1, 5, 32),
        ("broadcast", "load", 4, 3, 3, 96),
        ("ragged", "load", 4, 2, 5, 40),
        ("predicated", "load", 4, 5, 10, 80),
        ("as_written", "load", 4, 12, 24, 384),  # y, x[0] and x[0] again, 4 times
        ("as_written", "store", 4, 4, 16, 128),
        ("three_floats", "load", 4, 3, 36, 96),  # 384 bytes = 12 sectors, seen by each of 3 loads
        ("helped", "load", 4, 1, 4, 32),  # __constant__ memory is no global access
        ("atomics", "atomic", 4, 1, 1, 32),
        ("cp_async", "load", 16, 1, 16, 31),  # 30 * 16 + 8 bytes; the lane of 0 bytes reads nothing
        ("long_loop", "load", 4, 3000, 12000, 96000),
        ("long_lane", "load", 4, 3000, 3000, 3000),
        # a lane that skips a turn does not join its next one with the others' present one
        ("skipped", "load", 4, 4, 16, 64),
        ("skipped_by_continue", "load", 4, 4, 16, 96),
        ("skipped_in_while", "load", 4, 4, 16, 64),
        ("skipped_in_do", "load", 4, 4, 16, 64),
        ("skipped_in_forever", "load", 4, 4, 16, 64),
        ("skipped_in_switch", "load", 4, 4, 16, 64),
        ("two_conditions", "load", 4, 4, 16, 64),
        ("fewer_turns", "load", 4, 3, 10, 80),
        ("later_start", "load", 4, 3, 10, 80),  # i = 0 for one half, 1 for the other, together
        ("left_early", "load", 4, 3, 6, 48),
        ("nested", "load", 4, 9, 23, 184),
        ("nested_turns", "load", 4, 9, 36, 192),
        # 1, 1 and 1 turns for even lanes, 2, 1 and 1 for odd ones, which are one n ahead then
        ("nested_whiles", "load", 4, 4, 24, 112),
        ("do_in_forever", "load", 4, 4, 24, 112),
        ("turns_without_access", "load", 4, 4, 16, 64),
        ("called", "load", 4, 6, 24, 96),  # a request for each of the two calls
        ("skipped_for_long", "load", 4, 9000, 36000, 144000),
    ],
)
def test_global_counts(programs, kernel, op, width, requests, sectors, lanes):
    launcher = {"helped": "forceinline_helper", "cp_async": "copies", "long_lane": "long_loop"}
    count = count_of(programs(COUNTED), COUNTED, launcher.get(kernel, kernel), kernel, "global", op)
    assert count == cpu.LineCount(
        line_of(COUNTED, kernel), "global", op, width, requests, sectors, 0, 0, lanes
    )
    assert count.sectors_per_request == sectors / requests
    assert count.lanes_per_request == lanes / requests


@pytest.mark.parametrize(
    ("kernel", "mark", "op", "requests", "wavefronts", "ideal"),
    [
        ("column32", "rows", "store", 32, 1, 1),
        ("column32", "columns", "load", 32, 32, 1),
        ("column33", "columns", "load", 32, 1, 1),
        ("shared4", "shared4_contiguous", "store", 1, 4, 4),
        ("shared4", "shared4_stride2", "load", 1, 4, 4),
        ("shared4", "shared4_stride2", "store", 1, 8, 4),
        ("shared4", "shared4_stride8", "store", 1, 32, 4),
        ("shared4", "shared4_broadcast", "load", 1, 1, 1),  # .x alone: 4 bytes
        ("shared4", "shared4_broadcast16", "load", 1, 2, 2),  # as an H100 counts it
        ("shared2", "shared2_contiguous", "store", 1, 2, 2),
        ("shared2", "shared2_stride2", "store", 1, 4, 2),
        ("halves", "half_store", "store", 2, 1, 1),
        ("copies", "cp_async", "store", 1, 4, 4),
        ("matrices", "ldmatrix4", "load", 1, 8, 4),  # rows 32 bytes apart: 2-way conflicts
        ("matrices", "ldmatrix2", "load", 1, 4, 2),
    ],
)
def test_shared_counts(programs, kernel, mark, op, requests, wavefronts, ideal):
    count = count_of(programs(COUNTED), COUNTED, kernel, mark, "shared", op)
    assert count.requests == requests
    assert count.wavefronts_per_request == wavefronts
    assert count.ideal_wavefronts == ideal * requests
    assert count.sectors == 0


def test_counts_are_sorted_and_forgotten_by_the_next_call(programs):
    program = programs(COUNTED)
    run(program, "column33", trace=True)
    lines = [c.line for c in program.counts()]
    assert lines == sorted(lines)
    run(program, "coalesced", trace=True)
    assert {c.line for c in program.counts()} == {line_of(COUNTED, "coalesced")}


def test_counts_do_not_depend_on_the_order_of_threads(programs):
    program = programs(COUNTED)
    for kernel in ("column32", "long_loop", "matrices", "ragged", "predicated", *TURNS):
        run(program, kernel, trace=True)
        expected = program.counts()
        run(program, kernel, trace=True, order_seed=3)
        assert program.counts() == expected


def kernels_of(source: str) -> list[str]:
    return re.findall(r"^LAUNCH\((\w+)", source, re.MULTILINE)


def other_compilers() -> list[str]:
    """g++ 11 and 12 that are installed, other than the default g++."""

    def version(cxx: str) -> str:
        return subprocess.run([cxx, "-dumpversion"], capture_output=True, text=True).stdout.strip()

    found = [c for c in ("g++-11", "g++-12") if shutil.which(c)]
    return [c for c in found if version(c) != version("g++")]


def test_counts_are_the_same_with_another_compiler(programs):
    others = other_compilers()
    if not others:
        pytest.skip("only one g++ is installed; apt-get install g++-11 or g++-12")
    for cxx in others:
        for kernel in kernels_of(COUNTED):
            results = []
            for program in (programs(COUNTED), programs(COUNTED, cxx=cxx)):
                run(program, kernel, trace=True)
                results.append(program.counts())
            assert results[0] == results[1], (cxx, kernel)
            assert results[0]


def test_requests_show_the_addresses_of_a_warp(programs):
    program = programs(COUNTED)
    run(program, "column33", trace=True)
    line = line_of(COUNTED, "columns")
    store, load = program.requests(line)
    assert (store.space, store.op, store.block, store.warp) == ("global", "store", (0, 0, 0), 0)
    assert store.lanes == tuple(("y", 4 * lane) for lane in range(32))
    names, offsets = zip(*load.lanes, strict=True)
    assert set(names) == {"static shared"}
    assert [o - offsets[0] for o in offsets] == [33 * 4 * lane for lane in range(32)]
    assert len({o // 4 % 32 for o in offsets}) == 32  # banks

    second = program.requests(line, limit=2)[1]
    assert second.lanes == tuple(("y", 128 + 4 * lane) for lane in range(32))

    run(program, "predicated", trace=True)
    (load,) = program.requests(line_of(COUNTED, "predicated"))
    assert load.lanes[16:] == (None,) * 16
    assert {r.line for r in program.requests()} == {c.line for c in program.counts()}
    with pytest.raises(ValueError, match="limit"):
        program.requests(limit=0)


def test_ldmatrix_layout(programs):
    y = run(programs(COUNTED), "matrices").view(torch.float16)[: 10 * 64].view(10, 32, 2)
    tile = torch.arange(256, dtype=torch.float16).view(16, 16)
    # lanes 0 to 15 address the left half, 16 to 31 the right: matrices in column order
    parts = [tile[:8, :8], tile[8:, :8], tile[:8, 8:], tile[8:, 8:]]
    for m, part in enumerate(parts):
        assert torch.equal(y[m].reshape(8, 8), part)
        assert torch.equal(y[4 + m].reshape(8, 8), part.T)
    for m in range(2):
        assert torch.equal(y[8 + m].reshape(8, 8), parts[m])


@pytest.mark.parametrize("traced", [False, True])
def test_shared_memory_begins_as_nan_in_every_block(programs, traced):
    y = run(programs(CHECKED, traced), "fresh_shared")
    assert y[:128].view(torch.int32).eq(-1).all()  # bytes 0xff


@pytest.mark.parametrize("order_seed", [0, 1, 2, -5])
def test_reduction_with_barriers_is_right_in_every_order(programs, order_seed):
    y = run(programs(CHECKED, False), "sum_with_barriers", order_seed=order_seed)
    assert y[0] == 255 * 256 / 2


def test_a_missing_barrier_shows(programs):
    program = programs(CHECKED, False)
    sums = {run(program, "sum_without_barriers", order_seed=s)[0].item() for s in range(4)}
    assert sums != {255 * 256 / 2}
    with pytest.raises(cpu.EmulationError, match=r"race in shared memory"):
        run(programs(CHECKED), "sum_without_barriers", racecheck=True)


@pytest.mark.parametrize("kernel", ["sum_with_barriers", "sum_in_warp", "shared_atomics"])
@pytest.mark.parametrize("order_seed", [0, 7])
def test_no_race_is_reported_where_there_is_none(programs, kernel, order_seed):
    run(programs(CHECKED), kernel, racecheck=True, order_seed=order_seed)


def test_race_names_threads_lines_and_block(programs):
    program = programs(CHECKED)
    with pytest.raises(cpu.EmulationError) as caught:
        run(program, "two_warps_syncwarp", racecheck=True)
    message = str(caught.value)
    assert message.startswith("two_warps_syncwarp: block (0, 0, 0): race in shared memory: ")
    stored, loaded = line_of(CHECKED, "stored"), line_of(CHECKED, "loaded")
    pair = re.search(
        rf"thread \((\d+), 0, 0\) stores at line {stored} "
        rf"what thread \((\d+), 0, 0\) loads at line {loaded} with no barrier between",
        message,
    )
    assert pair, message
    assert int(pair[1]) == int(pair[2]) ^ 32


def test_syncwarp_orders_only_the_lanes_of_its_mask(programs):
    with pytest.raises(cpu.EmulationError, match=r"race .*thread \((20|3), 0, 0\)"):
        run(programs(CHECKED), "half_warp_sync", racecheck=True)


@pytest.mark.parametrize("traced", [False, True])
def test_barrier_that_some_threads_never_reach(programs, traced):
    with pytest.raises(cpu.EmulationError) as caught:
        run(programs(CHECKED, traced), "exit_before_barrier")
    line = line_of(CHECKED, "missed")
    assert str(caught.value) == (
        "exit_before_barrier: block (1, 0, 0): deadlock: 40 of 64 threads wait in __syncthreads() "
        f"at line {line}, 24 exited without reaching it"
    )


def test_threads_at_two_barriers(programs):
    first, second = line_of(CHECKED, "first"), line_of(CHECKED, "second")
    with pytest.raises(cpu.EmulationError, match="divergent barrier") as caught:
        run(programs(CHECKED, False), "two_barriers")
    assert f"line {first}" in str(caught.value)
    assert f"line {second}" in str(caught.value)


def test_barrier_against_shuffle_is_a_deadlock(programs):
    with pytest.raises(cpu.EmulationError, match="deadlock") as caught:
        run(programs(CHECKED, False), "barrier_and_shuffle")
    assert "1 of 32 threads wait in __syncthreads()" in str(caught.value)
    assert "31 of 32 threads wait in __shfl_xor_sync()" in str(caught.value)


@pytest.mark.parametrize(
    ("kernel", "traced", "message"),
    [
        ("not_in_mask", False, r"thread \(16, 0, 0\), lane 16, is not in its own mask 0x0000ffff"),
        ("wild", False, r"thread \(0, 0, 0\) faults at address 0x40"),
        ("stack_overflow", False, r"thread \(0, 0, 0\) overflows its stack of 256 KiB"),
        ("frame_too_large", False, r"thread \(0, 0, 0\) overflows its stack of 256 KiB"),
        ("asserting", False, r"assertion `x\[threadIdx.x\] < 0.0f' failed at line {assert}"),
        (
            "past_shared",
            True,
            r"thread \(31, 0, 0\) stores 4 bytes at offset 128 of the 128 .*"
            r"line {past_shared}",
        ),
        ("misaligned", True, r"misaligned: thread \(0, 0, 0\) loads 4 bytes.*line {misaligned}"),
        ("wild", True, r"out of bounds: thread \(0, 0, 0\) loads 4 bytes"),
    ],
)
def test_faults_are_errors_and_the_next_call_works(programs, kernel, traced, message):
    program = programs(CHECKED, traced)
    message = re.sub(r"\{(\w+)\}", lambda m: str(line_of(CHECKED, m[1])), message)
    with pytest.raises(cpu.EmulationError, match=rf"^{kernel}: block \(0, 0, 0\): .*{message}"):
        run(program, kernel, trace=traced)
    assert run(program, "sum_with_barriers")[0] == 255 * 256 / 2


def test_out_of_bounds_names_the_place(programs):
    x = torch.arange(64, dtype=torch.float32)
    with pytest.raises(cpu.EmulationError) as caught:
        run(programs(CHECKED), "past_the_end", x, trace=True)
    assert str(caught.value) == (
        "past_the_end: block (1, 0, 0): out of bounds: thread (31, 0, 0) loads 4 bytes at offset "
        f"256 of buffer x of 256 bytes, line {line_of(CHECKED, 'past')}"
    )
    run(programs(CHECKED), "past_the_end", torch.arange(65.0), trace=True)


def test_many_errors_leave_no_memory_behind(programs):
    program = programs(CHECKED, False)

    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    run(program, "sum_with_barriers")
    before = mappings()
    for _ in range(50):
        with pytest.raises(cpu.EmulationError):
            run(program, "two_barriers")
    assert mappings() <= before + 10


def test_stacks_are_given_back(programs):
    """A process may have 65,530 mappings, for all libraries together; a stack is two of them."""
    mappings = Path("/proc/self/maps")
    before = len(mappings.read_text().splitlines())
    y = run(programs(CLUSTER_CHECKED, False), "many_stacks", extra=in_clusters(grid=2, block=512))
    assert torch.equal(y[:1024], torch.arange(1024.0) + 1)
    assert len(mappings.read_text().splitlines()) <= before + 2 * 64 + 100


def test_large_local_arrays_fit(programs):
    y = run(programs(CHECKED, False), "large_locals")
    t = torch.arange(64)
    assert torch.equal(y[:64], ((t + t * 100) % 32).float())


@pytest.mark.parametrize(
    ("grid", "block", "smem", "limit", "error"),
    [
        ((1, 1, 1), (32, 1, 1), 0, 0, 0),
        ((0, 1, 1), (32, 1, 1), 0, 0, 9),
        ((1, 1, 1), (0, 1, 1), 0, 0, 9),
        ((1, 1, 1), (1025, 1, 1), 0, 0, 9),
        ((1, 1, 1), (32, 33, 1), 0, 0, 9),
        ((1, 1, 1), (1, 1, 65), 0, 0, 9),
        ((1, 65536, 1), (1, 1, 1), 0, 0, 9),
        ((1, 1, 65536), (1, 1, 1), 0, 0, 9),
        ((1, 1, 1), (32, 1, 1), 48 * 1024 + 4, 0, 1),
        ((1, 1, 1), (32, 1, 1), 0, 227 * 1024 + 1, 1),
        ((1, 1, 1), (32, 1, 1), 227 * 1024, 227 * 1024, 0),
        ((1, 1, 1), (32, 1, 1), 64 * 1024 + 4, 64 * 1024, 1),
    ],
)
def test_launches_that_cuda_refuses(programs, grid, block, smem, limit, error):
    y = cpu.aligned_empty(N).fill_(-1.0)
    x = torch.arange(N, dtype=torch.float32)
    code = programs(CHECKED, False).call(
        "run_limits",
        *(ctypes.c_void_p(t.data_ptr()) for t in (x, y)),
        *((ctypes.c_int * 3)(*v) for v in (grid, block)),
        ctypes.c_int(smem),
        ctypes.c_int(limit),
    )
    assert code == error
    ran = torch.arange(32.0) if error == 0 else torch.full((32,), -1.0)
    assert torch.equal(y[:32], ran)


@pytest.mark.parametrize("traced", [False, True])
def test_cp_async_comes_as_late_as_it_may(programs, traced):
    y = run(programs(CHECKED, traced), "late_copy")[:192].view(6, 32)
    x = torch.arange(32.0)
    zero_filled = torch.where(x < 30, x, 0.0)
    nothing = [y[i].isnan().all() for i in (0, 2, 4)]  # not waited for, or not committed
    assert all(nothing)
    assert torch.equal(y[1], x)
    assert torch.equal(y[3], zero_filled)
    assert torch.equal(y[5], x)


def test_cp_async_is_seen_by_others_after_a_barrier(programs):
    y = run(programs(CHECKED), "neighbour", extra=[ctypes.c_int(1)], racecheck=True)
    assert torch.equal(y[:64], (torch.arange(64) ^ 33).float())
    with pytest.raises(cpu.EmulationError, match="race"):
        run(programs(CHECKED), "neighbour", extra=[ctypes.c_int(0)], racecheck=True)
    with pytest.raises(cpu.EmulationError, match="race"):
        run(programs(CHECKED), "read_while_copied", racecheck=True)


@pytest.mark.parametrize("order_seed", [0, 11])
def test_warp_exchanges(programs, order_seed):
    y = run(programs(CHECKED, False), "exchanges", order_seed=order_seed)[:256].view(8, 32)
    t = torch.arange(32)
    assert torch.equal(y[0], ((t + 3) % 32).float())
    assert torch.equal(y[1], (t ^ 5).float())
    assert torch.equal(y[2], torch.where(t % 8 >= 2, t - 2, t).float())
    assert torch.equal(y[3], torch.where(t % 8 < 6, t + 2, t).float())
    assert y[4].eq(float(0x11111111)).all()
    assert y[5].eq(2).all()
    assert y[6].eq(10).all()
    assert y[7].eq(3).all()


def test_exited_lanes_are_not_waited_for(programs):
    y = run(programs(CHECKED, False), "exited_lanes")
    assert torch.equal(y[:23], torch.arange(1.0, 24.0))
    assert y[23:32].isnan().all()  # lane 23 reads from a lane that is gone


def convert_halves(program: cpu.Program, bits: torch.Tensor, floats: torch.Tensor, to_half: bool):
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in (bits, floats)]
    program.call("run_halves", *pointers, ctypes.c_int(bits.numel()), ctypes.c_int(to_half))


def test_every_half_to_float(programs):
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    floats = torch.empty(65536)
    convert_halves(programs(CHECKED, False), bits, floats, False)
    expected = bits.view(torch.float16).float()
    nan = expected.isnan()
    assert torch.equal(floats.isnan(), nan)
    assert torch.equal(floats[~nan].view(torch.int32), expected[~nan].view(torch.int32))


def test_float_to_half_rounds_to_nearest_even(programs):
    generator = torch.Generator().manual_seed(1)
    anything = torch.randint(-(2**31), 2**31, (400_000,), generator=generator)
    every_half = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float()
    finite = every_half[every_half.isfinite()].sort().values
    ties = (finite[1:].double() + finite[:-1].double()).div(2).float()
    infinity = torch.tensor(float("inf"))
    floats = torch.cat(
        [
            anything.to(torch.int32).view(torch.float32),
            torch.randn(100_000, generator=generator) * 1e-5,  # around the subnormals
            torch.randn(100_000, generator=generator) * 4e4,  # around the largest
            every_half,
            ties,
            ties.nextafter(infinity),
            ties.nextafter(-infinity),
            torch.tensor([65519.996, 65520.0, -65520.0, 2.0**-25, 2.0**-24, 0.0, -0.0]),
        ]
    ).contiguous()
    bits = torch.empty(floats.numel(), dtype=torch.int16)
    convert_halves(programs(CHECKED, False), bits, floats, True)
    expected = floats.half()
    nan = expected.isnan()
    assert torch.equal(bits.view(torch.float16).isnan(), nan)
    assert torch.equal(bits[~nan], expected[~nan].view(torch.int16))


@pytest.mark.parametrize("traced", [False, True])
def test_mma_twins_on_integers(programs, traced):
    generator = torch.Generator().manual_seed(2)
    x = torch.randint(-9, 10, (512,), generator=generator).float()
    a, b, c = x[:256].view(16, 16), x[256:384].view(16, 8), x[384:].view(16, 8)
    y = run(programs(CHECKED, traced), "multiply", x)
    assert torch.equal(y[:128].view(16, 8), a @ b + c)
    assert torch.equal(y[128:256].view(16, 8), a @ b + c)


def two_matrices(columns: int, integers: bool) -> torch.Tensor:
    """72 rows of A and columns + 16 of B, 64 each, exact as halves."""
    generator = torch.Generator().manual_seed(columns)
    size = (72 + columns + 16, 64)
    if integers:
        return torch.randint(-9, 10, size, generator=generator).float()
    return torch.randn(size, generator=generator).half().float()


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("from_registers", [0, 1])
@pytest.mark.parametrize(("shift_a", "shift_b"), [(0, 0), (3, 5), (8, 1), (7, 16)])
@pytest.mark.parametrize("columns", [24, 56])
def test_wgmma_on_windows(programs, columns, shift_a, shift_b, from_registers, traced):
    """Against float64; windows start anywhere in a group of 8 swizzled rows."""
    how = {"extra": [ctypes.c_int(v) for v in (shift_a, shift_b, from_registers)]}
    if traced:
        how |= {"racecheck": True, "order_seed": 3}
    for integers in (True, False):
        x = two_matrices(columns, integers)
        program = programs(HOPPER_CHECKED, traced)
        y = run(program, f"products{columns}", x.flatten(), **how)[: 64 * columns]
        a = x[shift_a : shift_a + 64].double()
        b = x[72 + shift_b : 72 + shift_b + columns].double()
        error = (y.view(64, columns).double() - a @ b.T).abs()
        allowed = 0.0 if integers else 4 * 2.0**-23 * (a.abs() @ b.abs().T)  # 4 roundings
        assert bool((error <= allowed).all())


def test_wgmma_rounds_towards_zero(programs):
    """2^24 + 3 lies between 2^24 + 2 and 2^24 + 4, nearer to neither."""
    x = torch.zeros(72 + 40, 64)
    x[:72, 0] = 4096.0
    x[:72, 16] = 1.0
    x[72:, 0] = 4096.0
    x[72:, 16] = 3.0
    extra = [ctypes.c_int(0)] * 3
    for sign in (1.0, -1.0):
        x[72:] *= sign
        y = run(programs(HOPPER_CHECKED, False), "products24", x.flatten(), extra=extra)
        assert y[: 64 * 24].eq(sign * (2**24 + 2)).all()


def test_wgmma_is_under_way_until_waited_for(programs):
    x = two_matrices(24, integers=True).flatten()
    extra = [ctypes.c_int(0)] * 3
    program, traced = programs(HOPPER_CHECKED, False), programs(HOPPER_CHECKED)
    right = run(program, "products24", x, extra=extra)[: 64 * 24]
    assert right.isfinite().all()
    # an operand that is overwritten before the wait
    assert run(program, "overwritten", x, extra=extra)[: 64 * 24].eq(0).all()
    with pytest.raises(cpu.EmulationError, match=rf"race.*{line_of(HOPPER_CHECKED, 'too_early')} "):
        run(traced, "overwritten", x, extra=extra, racecheck=True)
    # sums that are read, or written, before the wait
    assert run(program, "read_early", x, extra=extra)[: 64 * 24].isnan().all()
    line = line_of(HOPPER_CHECKED, "wait")
    with pytest.raises(
        cpu.EmulationError, match=rf"\(5, 0, 0\) writes to the sums .* line {line}$"
    ):
        run(program, "written_early", x, extra=extra)
    y = run(program, "two_groups")
    assert y[:128].eq(16).all()
    assert y[128:256].isnan().all()
    assert y[256:384].eq(32).all()


def test_wgmma_refuses_what_hardware_leaves_undefined(programs):
    x = two_matrices(24, integers=True).flatten()
    extra = [ctypes.c_int(0)] * 3
    program = programs(HOPPER_CHECKED, False)
    line = line_of(HOPPER_CHECKED, "wgmma")
    with pytest.raises(cpu.EmulationError, match=rf"divergent warpgroup: .*\(37, .* {line} and"):
        run(program, "divergent", x, extra=extra)
    with pytest.raises(cpu.EmulationError, match=rf"line {line} without a wgmma.fence"):
        run(program, "no_fence", x, extra=extra)
    with pytest.raises(cpu.EmulationError, match="a whole warpgroup of 128 threads"):
        run(program, "half_a_warpgroup")
    with pytest.raises(cpu.EmulationError, match="wgmma of 16 bytes at shared address 0x2400, "):
        run(program, "beyond_shared")


def test_wgmma_needs_a_proxy_fence_and_a_barrier_after_stores(programs):
    x = two_matrices(24, integers=True).flatten()
    extra = [ctypes.c_int(0)] * 3
    program = programs(HOPPER_CHECKED)
    wgmma, operand = (line_of(HOPPER_CHECKED, mark) for mark in ("wgmma", "operand"))
    stores_late = rf"stores at line {operand} what .* loads at line {wgmma} with no barrier between"
    with pytest.raises(cpu.EmulationError, match=stores_late):
        run(program, "unordered", x, extra=extra, racecheck=True)
    unseen = rf"loads at line {wgmma} what .* stores at line {operand} with no fence.proxy.async"
    with pytest.raises(cpu.EmulationError, match=unseen):
        run(program, "unfenced", x, extra=extra, racecheck=True)


@pytest.mark.parametrize("order_seed", [0, 1, 2, 3])
def test_mbarriers_hand_rows_over(programs, order_seed):
    expected = torch.arange(256).view(8, 32)[:, torch.arange(32) ^ 1].float().flatten()
    for traced in (False, True):
        how = {"racecheck": traced, "order_seed": order_seed}
        assert torch.equal(run(programs(HOPPER_CHECKED, traced), "pipe", **how)[:256], expected)


@pytest.mark.parametrize("kernel", ["pipe_full_unheeded", "pipe_empty_unheeded"])
@pytest.mark.parametrize("order_seed", [0, 1])
def test_a_missing_mbarrier_wait_is_found(programs, kernel, order_seed):
    with pytest.raises(cpu.EmulationError, match="race in shared memory"):
        run(programs(HOPPER_CHECKED), kernel, racecheck=True, order_seed=order_seed)


def test_faults_of_mbarriers(programs):
    program = programs(HOPPER_CHECKED, False)
    with pytest.raises(cpu.EmulationError) as caught:
        run(program, "one_arrival_short")
    short, named = (line_of(HOPPER_CHECKED, mark) for mark in ("short", "named_short"))
    assert re.fullmatch(
        r"one_arrival_short: block \(0, 0, 0\): deadlock: 32 of 96 threads wait in "
        rf"mbarrier.try_wait at line {short} \(shared address 0x\w+, parity 0: 32 of 33 arrivals "
        rf"are there\), 64 of 96 threads wait in barrier.sync at line {named} \(barrier 3: 64 of "
        r"96 threads are there\)",
        str(caught.value),
    )
    message = r"mbarrier.arrive of 4 at line \d+: the mbarrier .* expects 3 more of 3 arrivals"
    with pytest.raises(cpu.EmulationError, match=message):
        run(program, "pipe_too_many")
    line = line_of(HOPPER_CHECKED, "not_initialized")
    with pytest.raises(cpu.EmulationError, match=rf"try_wait at line {line}: there is no mbarrier"):
        run(program, "not_initialized")
    with pytest.raises(cpu.EmulationError, match="mbarrier that is in use"):
        run(program, "initialized_twice")
    with pytest.raises(cpu.EmulationError, match="not in shared memory"):
        run(program, "not_shared")
    with pytest.raises(cpu.EmulationError, match="race"):
        run(programs(HOPPER_CHECKED), "unsynchronized_init", racecheck=True)


def test_shared_addresses(programs):
    y = run(programs(HOPPER_CHECKED, False), "addresses").view(torch.int32)
    assert y[:4].tolist() == [1024, 1124, 0, 4]  # 1 KiB is the system's


@pytest.mark.parametrize("order_seed", [0, 1, 2])
def test_named_barriers(programs, order_seed):
    x = torch.arange(128.0)
    for traced in (False, True):
        how = {"racecheck": traced, "order_seed": order_seed}
        assert torch.equal(run(programs(HOPPER_CHECKED, traced), "pairs", **how)[:128], x + 1)
    with pytest.raises(cpu.EmulationError, match="race"):
        run(programs(HOPPER_CHECKED), "pairs_unsynchronized", racecheck=True)
    program = programs(HOPPER_CHECKED, False)
    for64, for96 = (line_of(HOPPER_CHECKED, mark) for mark in ("for64", "for96"))
    both = rf"for 96 threads at line {for96}, others wait there for 64 at line {for64}"
    with pytest.raises(cpu.EmulationError, match=both):
        run(program, "unequal_barrier")
    with pytest.raises(cpu.EmulationError, match=r"0 is __syncthreads\(\)"):
        run(program, "barrier_zero")


def test_bulk_loads_come_as_late_as_they_may(programs):
    expected = torch.arange(128).view(32, 4)[torch.arange(32) ^ 1].float().flatten()
    program, traced = programs(HOPPER_CHECKED, False), programs(HOPPER_CHECKED)
    for order_seed in (0, 1):
        y = run(traced, "bulk_loads", racecheck=True, trace=True, order_seed=order_seed)
        assert torch.equal(y[:256], expected.repeat(2))
    (count,) = (c for c in traced.counts() if c.line == line_of(HOPPER_CHECKED, "bulk_load"))
    assert (count.space, count.op, count.requests, count.sectors) == ("global", "load", 32, 32)
    early = run(program, "bulk_loads_early")[:124]  # the last lane's arrival lets all copies end
    assert early.isnan().all()
    with pytest.raises(cpu.EmulationError, match="race"):
        run(traced, "bulk_loads_early", racecheck=True)
    with pytest.raises(cpu.EmulationError, match="the block ends while bulk copies"):
        run(program, "bulk_load_unheeded")
    line = line_of(HOPPER_CHECKED, "bytes_short")
    with pytest.raises(cpu.EmulationError, match=rf"deadlock: .*line {line} .*16 of 32 bytes"):
        run(program, "bulk_load_short")


def test_bulk_stores_read_as_late_as_they_may(programs):
    program, traced = programs(HOPPER_CHECKED, False), programs(HOPPER_CHECKED)
    x = torch.arange(128.0)
    for order_seed in (0, 1):
        y = run(traced, "bulk_stores", racecheck=True, trace=True, order_seed=order_seed)
        assert torch.equal(y[:128], x)
        assert y[256] == 0
    (count,) = (c for c in traced.counts() if c.line == line_of(HOPPER_CHECKED, "bulk_store"))
    assert (count.space, count.op, count.requests, count.sectors) == ("global", "store", 1, 8)
    y = run(program, "bulk_stores_read")  # arrives some time, but not for who does not wait
    assert torch.equal(y[:128], x)
    assert y[256].isnan()
    y = run(program, "bulk_stores_overwritten")[:128]
    assert y[12] == y[120] == -1
    with pytest.raises(cpu.EmulationError, match="no wait for the asynchronous copy or product"):
        run(traced, "bulk_stores_overwritten", racecheck=True)
    with pytest.raises(cpu.EmulationError, match="exits while its bulk copy"):
        run(program, "bulk_stores_unheeded")
    message = (
        rf"loads at line {line_of(HOPPER_CHECKED, 'bulk_store')} .* stores at line "
        rf"{line_of(HOPPER_CHECKED, 'staged')} with no fence.proxy.async"
    )
    with pytest.raises(cpu.EmulationError, match=message):
        run(traced, "bulk_stores_unfenced", racecheck=True)
    with pytest.raises(cpu.EmulationError, match="no multiple of 16 bytes"):
        run(program, "bulk_stores_of_250_bytes")


def in_clusters(blocks: int = 2, grid: int = 4, block: int = 128, y: int = 1, z: int = 1) -> tuple:
    return ((ctypes.c_uint * 3)(blocks, y, z), ctypes.c_int(grid), ctypes.c_int(block))


@pytest.mark.parametrize("order_seed", [0, 1, 2, 3])
def test_clusters_exchange(programs, order_seed):
    x = torch.arange(512.0)
    expected = x.view(4, 1, 32, 4)[[1, 0, 3, 2]].repeat(1, 2, 1, 1)
    expected[:, 1, :, 0] += 1
    for traced in (False, True):
        how = {"order_seed": order_seed, "racecheck": traced, "trace": traced}
        program = programs(CLUSTER_CHECKED, traced)
        y = run(program, "exchanged", extra=in_clusters(), **how)
        assert torch.equal(y[:1024], expected.flatten())
        assert y[1024:1032].tolist() == [10, 11, 0, 1, 30, 31, 20, 21]
        assert y[1032:1036].tolist() == [20, 21, 20, 21]
        assert torch.equal(run(program, "alone", extra=in_clusters(), **how)[:512], x + 1)
    how = {"order_seed": order_seed, "extra": in_clusters(blocks=1)}
    assert torch.equal(run(programs(CLUSTER_CHECKED, False), "alone", **how)[:512], x + 1)


def test_copies_between_blocks_come_as_late_as_they_may(programs):
    program, traced = programs(CLUSTER_CHECKED, False), programs(CLUSTER_CHECKED)
    marks = ("sent", "copied", "overwritten", "left_alone")
    sent, copied, overwritten, alone = (line_of(CLUSTER_CHECKED, mark) for mark in marks)
    how = {"extra": in_clusters(grid=2)}
    assert run(program, "exchanged_early", **how)[:128].isnan().all()
    for kernel, message in {
        "exchanged_early": "race in shared memory",
        "exchanged_unfenced": rf"line {sent} with no fence.proxy.async",
        "exchanged_overwritten": rf"line {copied - 1} what .* stores at line {overwritten} ",
    }.items():
        with pytest.raises(cpu.EmulationError, match=message):
            run(traced, kernel, racecheck=True, **how)
    for kernel, message in {
        "exchanged_unexpected": r"expects 0 bytes in this phase, but bulk copies bring 512",
        "exchanged_by_own_barrier": "its barrier is not in the block that it writes to",
        "exchanged_with_none": "the cluster has no block 2",
        "one_leaves": rf"deadlock: 128 of 256 .*line {alone}",
    }.items():
        with pytest.raises(cpu.EmulationError, match=message):
            run(program, kernel, **how)


@pytest.mark.parametrize(
    ("sizes", "error"),
    [
        ({}, 0),
        ({"blocks": 1, "grid": 3}, 0),
        ({"grid": 3}, 9),
        ({"blocks": 4}, 9),  # the emulator's limit, not CUDA's
        ({"blocks": 0}, 9),
        ({"y": 2}, 1),
        ({"block": 1024}, 9),  # the emulator's, likewise
    ],
)
def test_clusters_that_are_refused(programs, sizes, error):
    x, y = (cpu.aligned_empty(N).fill_(v) for v in (1.0, -1.0))
    code = programs(CLUSTER_CHECKED, False).call(
        "run_alone", *(ctypes.c_void_p(t.data_ptr()) for t in (x, y)), *in_clusters(**sizes)
    )
    assert code == error
    assert y[0].item() == (2.0 if error == 0 else -1.0)


def test_small_twins_of_hopper(programs):
    program = programs(HOPPER_CHECKED)
    y = run(program, "small_twins", trace=True)
    x = torch.arange(128.0)
    assert torch.equal(y[:128], torch.where(x < 32, x, 0.0))
    lane = torch.arange(32.0)
    larger = torch.maximum(torch.tensor(2.0), (lane - 16).abs())
    either = (lane == 3) | (lane == 4)
    assert torch.equal(y[128:160].isnan(), either)
    assert torch.equal(y[128:160][~either], larger[~either])
    counts = {(c.line, c.op): c for c in program.counts()}
    assert counts[line_of(HOPPER_CHECKED, "streamed"), "store"].sectors == 16


def test_calls_from_several_threads_take_turns(programs):
    program = programs(CHECKED, False)
    with ThreadPoolExecutor(8) as pool:
        sums = list(pool.map(lambda _: run(program, "sum_with_barriers")[0].item(), range(64)))
    assert set(sums) == {255 * 256 / 2}


def test_call_refuses_what_it_cannot_do(programs):
    program = programs(CHECKED, False)
    with pytest.raises(ValueError, match="traced=True"):
        run(program, "identity", trace=True)
    with pytest.raises(TypeError, match="ctypes"):
        program.call("run_identity", 1, 2)
    with pytest.raises(AttributeError):
        program.call("run_nothing")
    with pytest.raises(OSError, match="nothing"):
        cpu.Program(Path("/nothing.so"))


def test_compile_errors_name_the_line_of_the_text(tmp_path):
    cpu.write_sources("\n\n__global__ void k(float* y) { y[0] = unknown; }\n", tmp_path)
    command, _ = cpu.commands(tmp_path, tmp_path, traced=False)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert re.search(r"^kernel\.cu:3:\d+: error: .*unknown", done.stderr, re.MULTILINE)


def test_fingerprint_tells_compilers_apart():
    assert re.fullmatch(r"[0-9a-f]{32}", cpu.fingerprint())
    assert cpu.fingerprint() == cpu.fingerprint()
    for cxx in other_compilers():
        assert cpu.fingerprint(cxx) != cpu.fingerprint()
    with pytest.raises(OSError, match="no-such-compiler"):
        cpu.fingerprint("no-such-compiler")


def translated(source: str) -> str:
    return cpu.translate(source).split("\n", 2)[2]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("k<<<g, b>>>(x);", "EMU_KERNEL(k).at(g, b)(x);"),
        (
            "k<A, (B > 2)><<<dim3(1, 2), f(3)>>>(x);",
            "EMU_KERNEL(k<A, (B > 2)>).at(dim3(1, 2), f(3))(x);",
        ),
        ("ns::k<T<2>> <<<g, b, n, s>>> (x);", "EMU_KERNEL(ns::k<T<2>> ).at(g, b, n, s) (x);"),
        ("if (a < b) k\n<<<\ng,\nb>>>\n(x);", "if (a < b) EMU_KERNEL(k\n).at(\ng,\nb)\n(x);"),
        ("f(); // k<<<1, 2>>>(x)", "f(); // k<<<1, 2>>>(x)"),
        (
            's = "k<<<1, 2>>>(x)"; c = \'"\'; k<<<1, 2>>>();',
            's = "k<<<1, 2>>>(x)"; c = \'"\'; EMU_KERNEL(k).at(1, 2)();',
        ),
        ("n = 1'000; k<<<1, 2>>>(); m = 1'0;", "n = 1'000; EMU_KERNEL(k).at(1, 2)(); m = 1'0;"),
        ("#include <cuda_fp16.h>\n", "// #include <cuda_fp16.h>\n"),
        ("#include <vector>\n", "#include <vector>\n"),
    ],
)
def test_translation(source, expected):
    assert translated(source) == expected


@pytest.mark.parametrize(
    ("declaration", "element"),
    [
        ("extern __shared__ float t[];", "float"),
        ("extern __shared__ __align__(16) float4 t[];", "float4"),
        ("extern __shared__ alignas(1024) unsigned char t [ ] ;", "unsigned char"),
        ("__align__(16) extern __shared__ T t[];", "T"),
        ("extern __align__(16) __shared__ uint8_t\nt[];", "uint8_t"),
        ("extern volatile __shared__ float t[];", "volatile float"),
    ],
)
def test_translation_of_dynamic_shared_memory(declaration, element):
    result = translated(declaration)
    pointer = f"{element}* const t = reinterpret_cast<{element}*>(emu::dynamic_shared());"
    assert result.rstrip("\n") == pointer
    assert result.count("\n") == declaration.count("\n")


def test_translation_of_what_it_cannot_read_names_the_line():
    for source in ("\n1 <<< 2;", "\nk<<<1, 2>>>;", "\n(f())<<<1, 2>>>(x);"):
        with pytest.raises(cpu.TranslationError, match=r"^kernel\.cu:2: "):
            cpu.translate(source)


def test_line_count_is_a_value(programs):
    run(programs(COUNTED), "coalesced", trace=True)
    count = programs(COUNTED).counts()[0]
    assert replace(count, line=1) != count
    assert count.lanes * count.bytes_per_lane == 32 * count.sectors
