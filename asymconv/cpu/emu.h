// emu.h: what nvcc gives a CUDA text without being asked, for g++.
//
// The translator (translate.py) puts `#include "emu.h"` before the text, so this header plays the
// part of cuda_runtime.h and of the compiler: keywords, built-in variables, vector types, launches,
// barriers, shuffles, atomics, and as much of the runtime API as a launcher needs.
//
// Everything that may wait (barriers, shuffles) is a call into emu_runtime.cpp. Two rules hold here:
//
// - Helpers that touch the caller's memory are EMU_INLINE. The tracer names a source line by the
//   address that an access comes from; a helper of its own would be named instead of its caller.
// - Helpers that may wait end in a parameter `int line = __builtin_LINE()`: the line of the call,
//   for error messages. Callers leave it alone.
#pragma once

#ifdef __CUDACC__
#error "emu.h stands in for nvcc; nvcc itself must not see it"
#endif

#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>

// ------------------------------------------------------------------------------------- keywords

#define EMU_INLINE inline __attribute__((always_inline))

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __maxnreg__(...)
#define __forceinline__ EMU_INLINE
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))

// Static shared memory lives in the library's thread-local segment: unlike a named section it takes
// the variables of templates too, it is one block of memory that can be poisoned and told apart
// from the rest, and nothing else is in it. 128: so that the bank of a word does not depend on the
// variables declared before it.
#define __shared__ static thread_local __attribute__((aligned(128)))

// From here to the matching pop: hidden symbols, reached without the indirection that -fPIC gives
// to symbols that another library could replace.
#pragma GCC visibility push(hidden)

// ---------------------------------------------------------------------------------------- types

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
  constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};

// Plain structs with CUDA's alignments: g++ copies them with one access of 8 or 16 bytes, as nvcc
// does, and the tracer counts that.
#define EMU_VECTOR_TYPES(T, name, align2, align4)             \
  struct name##1 {                                            \
    T x;                                                      \
  };                                                          \
  struct alignas(align2) name##2 {                            \
    T x, y;                                                   \
  };                                                          \
  struct name##3 {                                            \
    T x, y, z;                                                \
  };                                                          \
  struct alignas(align4) name##4 {                            \
    T x, y, z, w;                                             \
  };                                                          \
  EMU_INLINE name##1 make_##name##1(T x) {                    \
    return {x};                                               \
  }                                                           \
  EMU_INLINE name##2 make_##name##2(T x, T y) {               \
    return {x, y};                                            \
  }                                                           \
  EMU_INLINE name##3 make_##name##3(T x, T y, T z) {          \
    return {x, y, z};                                         \
  }                                                           \
  EMU_INLINE name##4 make_##name##4(T x, T y, T z, T w) {     \
    return {x, y, z, w};                                      \
  }

EMU_VECTOR_TYPES(float, float, 8, 16)
EMU_VECTOR_TYPES(double, double, 16, 16)
EMU_VECTOR_TYPES(int, int, 8, 16)
EMU_VECTOR_TYPES(short, short, 4, 8)
EMU_VECTOR_TYPES(unsigned short, ushort, 4, 8)
EMU_VECTOR_TYPES(unsigned char, uchar, 2, 4)
EMU_VECTOR_TYPES(signed char, char, 2, 4)
#undef EMU_VECTOR_TYPES

struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
EMU_INLINE uint2 make_uint2(unsigned x, unsigned y) {
  return {x, y};
}
EMU_INLINE uint3 make_uint3(unsigned x, unsigned y, unsigned z) {
  return {x, y, z};
}
EMU_INLINE uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}

// --------------------------------------------------------------------------- built-in variables

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---------------------------------------------------------------------- what the runtime offers

namespace emu {

constexpr int kWarp = 32;

// Dynamic shared memory; `extern __shared__ T name[];` becomes a pointer to it.
// The margins on both sides let the tracer tell an access that is just out of bounds.
constexpr std::size_t kSharedMargin = 4096;  // bytes
// From a block's to the next one's of its cluster.
constexpr std::size_t kSharedStride = 240 * 1024;
alignas(1024) extern unsigned char dynamic_shared_room[];
extern unsigned cluster_rank;  // in its cluster, of the block whose thread runs
EMU_INLINE unsigned char* dynamic_shared() {
  return dynamic_shared_room + kSharedMargin + cluster_rank * kSharedStride;
}

// Ends the call with an EmulationError that names kernel and block. Only in a CUDA thread.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Waits for all threads of the block; returns how many came with a predicate that is not 0.
int sync_block(int predicate, const char* what, int line);
// Waits for the lanes of mask; orders their memory accesses.
void sync_warp(unsigned mask, int line);
// Replaces the n bytes at value (at most 64) by those that lane `source` brought to the same call.
// From a lane that did not come: 0xff. Waits for the lanes of mask; does not order memory.
void shuffle(unsigned mask, void* value, std::size_t n, int source, const char* what, int line);
struct Votes {
  unsigned yes, here;  // lanes
};
Votes vote(unsigned mask, int predicate, const char* what, int line);
int lane();  // the calling thread's place in its warp
void yield();  // others go first

// Plain copies that no tracer sees, around the arithmetic of an atomic operation: it is counted as
// one access of its own kind, and does not race with another one.
void atomic_read(const void* address, void* value, std::size_t n);
void atomic_write(void* address, const void* value, std::size_t n);

}  // namespace emu

// ---------------------------------------------------------------------------- the runtime's API

struct CUstream_st;
using cudaStream_t = CUstream_st*;

enum cudaError_t {  // the codes of driver_types.h
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
  cudaMemcpyDefault
};
enum cudaFuncAttribute {
  cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
  cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaDeviceAttr {
  cudaDevAttrMaxThreadsPerBlock = 1,
  cudaDevAttrMaxSharedMemoryPerBlock = 8,
  cudaDevAttrWarpSize = 10,
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrMemoryClockRate = 36,
  cudaDevAttrGlobalMemoryBusWidth = 37,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxThreadsPerMultiProcessor = 39,
  cudaDevAttrComputeCapabilityMajor = 75,
  cudaDevAttrComputeCapabilityMinor = 76,
  cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};

cudaError_t cudaGetLastError();   // and forgets it
cudaError_t cudaPeekAtLastError();
const char* cudaGetErrorString(cudaError_t error);
const char* cudaGetErrorName(cudaError_t error);
// An imaginary GPU: compute capability 9.0 (but no tensor maps, and clusters of two blocks along x
// at most, whose static shared memory is one), 4 SMs so that persistent kernels loop on small
// shapes, 227 KiB of dynamic shared memory, an H100's memory, and L2 that is small, so that what is
// meant for more than it holds runs.
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);
EMU_INLINE cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
EMU_INLINE cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}
// Launches have run when they return: nothing is left to wait for.
EMU_INLINE cudaError_t cudaDeviceSynchronize() {
  return cudaPeekAtLastError();
}
EMU_INLINE cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return cudaPeekAtLastError();
}
EMU_INLINE cudaError_t cudaMemsetAsync(void* to, int value, std::size_t n, cudaStream_t = 0) {
  std::memset(to, value, n);
  return cudaSuccess;
}
EMU_INLINE cudaError_t cudaMemset(void* to, int value, std::size_t n) {
  return cudaMemsetAsync(to, value, n);
}
EMU_INLINE cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t n,
                                       cudaMemcpyKind = cudaMemcpyDefault, cudaStream_t = 0) {
  std::memmove(to, from, n);
  return cudaSuccess;
}
EMU_INLINE cudaError_t cudaMemcpy(void* to, const void* from, std::size_t n,
                                  cudaMemcpyKind kind = cudaMemcpyDefault) {
  return cudaMemcpyAsync(to, from, n, kind);
}
template <class T>
cudaError_t cudaMemcpyToSymbolAsync(T& symbol, const void* from, std::size_t n,
                                    std::size_t offset = 0,
                                    cudaMemcpyKind = cudaMemcpyHostToDevice, cudaStream_t = 0) {
  std::memmove(reinterpret_cast<char*>(&symbol) + offset, from, n);
  return cudaSuccess;
}
template <class T>
cudaError_t cudaMemcpyToSymbol(T& symbol, const void* from, std::size_t n, std::size_t offset = 0,
                               cudaMemcpyKind kind = cudaMemcpyHostToDevice) {
  return cudaMemcpyToSymbolAsync(symbol, from, n, offset, kind);
}

namespace emu {

cudaError_t set_dynamic_shared_limit(const void* kernel, int bytes);

struct LaunchConfig {
  const char* name;      // of the kernel, as the text spells it
  const void* function;  // its address: the key of its attributes
  dim3 grid, block;
  std::size_t dynamic_shared;  // bytes
  unsigned cluster = 1;        // blocks along x that run together and see each other's memory
};

// Runs body(arguments) once for every thread of every block, or notes why CUDA would not.
void launch(const LaunchConfig& config, void (*body)(const void*), const void* arguments);

// `k<3><<<grid, block, smem, stream>>>(a, b)` is translated to
// `EMU_KERNEL(k<3>).at(grid, block, smem, stream)(a, b)`: the pieces keep their order, and with it
// their lines. As in CUDA, arguments are converted to the parameters' types once.
#define EMU_KERNEL(...) emu::kernel(__VA_ARGS__, #__VA_ARGS__)

template <class... P>
class Launch {
 public:
  Launch(void (*kernel)(P...), const LaunchConfig& config) : kernel_(kernel), config_(config) {}

  void operator()(P... args) const {
    const Call call{kernel_, std::tuple<P...>(args...)};
    launch(config_, &Launch::run, &call);
  }

 private:
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> args;
  };
  static void run(const void* call) {
    const Call& c = *static_cast<const Call*>(call);
    std::apply(c.kernel, c.args);
  }
  void (*kernel_)(P...);
  LaunchConfig config_;
};

template <class... P>
class Kernel {
 public:
  Kernel(void (*kernel)(P...), const char* name) : kernel_(kernel), name_(name) {}

  Launch<P...> at(dim3 grid, dim3 block, std::size_t dynamic_shared = 0,
                  cudaStream_t = nullptr) const {
    return {kernel_, {name_, reinterpret_cast<const void*>(kernel_), grid, block, dynamic_shared}};
  }

 private:
  void (*kernel_)(P...);
  const char* name_;
};

template <class... P>
Kernel<P...> kernel(void (*function)(P...), const char* name) {
  return {function, name};
}

}  // namespace emu

enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension = 4 };
struct cudaLaunchAttributeValue {
  struct {
    unsigned x, y, z;
  } clusterDim;
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  cudaLaunchAttributeValue val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(P...),
                               A&&... args) {
  const void* function = reinterpret_cast<const void*>(kernel);
  emu::LaunchConfig launched{"kernel", function, config->gridDim, config->blockDim,
                             config->dynamicSmemBytes};
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const auto& cluster = config->attrs[i].val.clusterDim;
    if (cluster.y != 1 || cluster.z != 1) return cudaErrorInvalidValue;
    launched.cluster = cluster.x;
  }
  emu::Launch<P...>(kernel, launched)(std::forward<A>(args)...);
  return cudaPeekAtLastError();
}

template <class... P>
cudaError_t cudaFuncSetAttribute(void (*kernel)(P...), cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  return emu::set_dynamic_shared_limit(reinterpret_cast<const void*>(kernel), value);
}
template <class... P>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, void (*)(P...), int,
                                                          std::size_t) {
  *blocks = 1;  // blocks run one after the other
  return cudaSuccess;
}

// ------------------------------------------------------------------------------------- barriers

EMU_INLINE void __syncthreads(int line = __builtin_LINE()) {
  emu::sync_block(0, "__syncthreads()", line);
}
EMU_INLINE int __syncthreads_count(int predicate, int line = __builtin_LINE()) {
  return emu::sync_block(predicate, "__syncthreads_count()", line);
}
EMU_INLINE int __syncthreads_or(int predicate, int line = __builtin_LINE()) {
  return emu::sync_block(predicate, "__syncthreads_or()", line) != 0;
}
EMU_INLINE int __syncthreads_and(int predicate, int line = __builtin_LINE()) {
  return emu::sync_block(!predicate, "__syncthreads_and()", line) == 0;
}
EMU_INLINE void __syncwarp(unsigned mask = 0xffffffffu, int line = __builtin_LINE()) {
  emu::sync_warp(mask, line);
}
// One operating-system thread runs all: its own accesses are in order already.
EMU_INLINE void __threadfence() {}
EMU_INLINE void __threadfence_block() {}
EMU_INLINE void __threadfence_system() {}

EMU_INLINE void __nanosleep(unsigned) {
  emu::yield();
}

#define assert(condition) \
  ((condition) ? (void)0 : emu::fail("assertion `%s' failed at line %d", #condition, __LINE__))
EMU_INLINE void __trap(int line = __builtin_LINE()) {
  emu::fail("__trap() at line %d", line);
}

// ------------------------------------------------------------------------------- warp exchanges

namespace emu {

template <class T>
T shuffled(unsigned mask, T value, int source, const char* what, int line) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) <= 16, "a register or a few");
  shuffle(mask, &value, sizeof value, source & 31, what, line);
  return value;
}

}  // namespace emu

// A shuffle that would leave its segment of `width` lanes gives the caller's own value.
template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, int line = __builtin_LINE()) {
  const int first = emu::lane() & ~(width - 1);
  return emu::shuffled(mask, value, first | (source & (width - 1)), "__shfl_sync()", line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, int width = 32, int line = __builtin_LINE()) {
  const int own = emu::lane();
  const int last = own | (width - 1);
  const int source = (own ^ flip) <= last ? own ^ flip : own;
  return emu::shuffled(mask, value, source, "__shfl_xor_sync()", line);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32,
                 int line = __builtin_LINE()) {
  const int own = emu::lane();
  const int source = own - static_cast<int>(delta);
  const int first = own & ~(width - 1);
  return emu::shuffled(mask, value, source >= first ? source : own, "__shfl_up_sync()", line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   int line = __builtin_LINE()) {
  const int own = emu::lane();
  const int source = own + static_cast<int>(delta);
  const int last = own | (width - 1);
  return emu::shuffled(mask, value, source <= last ? source : own, "__shfl_down_sync()", line);
}

EMU_INLINE unsigned __ballot_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return emu::vote(mask, predicate, "__ballot_sync()", line).yes;
}
EMU_INLINE int __any_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  return emu::vote(mask, predicate, "__any_sync()", line).yes != 0;
}
EMU_INLINE int __all_sync(unsigned mask, int predicate, int line = __builtin_LINE()) {
  const emu::Votes votes = emu::vote(mask, predicate, "__all_sync()", line);
  return votes.yes == votes.here;
}

// ------------------------------------------------------------------- loads, stores with a hint

template <class T>
EMU_INLINE T __ldg(const T* p) {
  return *p;
}
template <class T>
EMU_INLINE T __ldca(const T* p) {
  return *p;
}
template <class T>
EMU_INLINE T __ldcg(const T* p) {
  return *p;
}
template <class T>
EMU_INLINE T __ldcs(const T* p) {
  return *p;
}
template <class T>
EMU_INLINE void __stwb(T* p, std::common_type_t<T> value) {
  *p = value;
}
template <class T>
EMU_INLINE void __stcg(T* p, std::common_type_t<T> value) {
  *p = value;
}
template <class T>
EMU_INLINE void __stcs(T* p, std::common_type_t<T> value) {
  *p = value;
}
template <class T>
EMU_INLINE void __stwt(T* p, std::common_type_t<T> value) {
  *p = value;
}

// -------------------------------------------------------------------------------------- atomics

namespace emu {

// *p = change(*p); returns what was there. Threads take turns, so nobody comes in between.
template <class T, class F>
EMU_INLINE T atomic(T* p, F change) {
  T old, changed;
  atomic_read(p, &old, sizeof old);
  changed = change(old);
  atomic_write(p, &changed, sizeof changed);
  return old;
}

}  // namespace emu

template <class T>
EMU_INLINE T atomicAdd(T* p, std::common_type_t<T> value) {
  return emu::atomic(p, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
EMU_INLINE T atomicSub(T* p, std::common_type_t<T> value) {
  return emu::atomic(p, [&](T old) { return static_cast<T>(old - value); });
}
template <class T>
EMU_INLINE T atomicMax(T* p, std::common_type_t<T> value) {
  return emu::atomic(p, [&](T old) { return old < value ? value : old; });
}
template <class T>
EMU_INLINE T atomicMin(T* p, std::common_type_t<T> value) {
  return emu::atomic(p, [&](T old) { return value < old ? value : old; });
}
template <class T>
EMU_INLINE T atomicExch(T* p, std::common_type_t<T> value) {
  return emu::atomic(p, [&](T) { return value; });
}
template <class T>
EMU_INLINE T atomicCAS(T* p, std::common_type_t<T> expected, std::common_type_t<T> value) {
  return emu::atomic(p, [&](T old) { return old == expected ? value : old; });
}

// --------------------------------------------------------------------------------- arithmetic

namespace emu {

template <class To, class From>
EMU_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

}  // namespace emu

// By value, unlike std::min: its references would move the loads of `min(a[i], b[i])` out of the
// caller's line.
template <class A, class B>
EMU_INLINE constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
EMU_INLINE constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
EMU_INLINE unsigned __float_as_uint(float f) {
  return emu::bit_cast<unsigned>(f);
}
EMU_INLINE int __float_as_int(float f) {
  return emu::bit_cast<int>(f);
}
EMU_INLINE float __uint_as_float(unsigned u) {
  return emu::bit_cast<float>(u);
}
EMU_INLINE float __int_as_float(int i) {
  return emu::bit_cast<float>(i);
}
EMU_INLINE float __fmaf_rn(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
EMU_INLINE float __fadd_rn(float a, float b) {
  return a + b;
}
EMU_INLINE float __fmul_rn(float a, float b) {
  return a * b;
}
EMU_INLINE int __popc(unsigned u) {
  return __builtin_popcount(u);
}
EMU_INLINE int __clz(int i) {
  return i ? __builtin_clz(static_cast<unsigned>(i)) : 32;
}
EMU_INLINE int __ffs(int i) {
  return __builtin_ffs(i);
}

#pragma GCC visibility pop

#include "emu_half.h"
#include "emu_ptx.h"
#include "emu_hopper.h"

EMU_INLINE std::size_t __cvta_generic_to_shared(const void* p) {
  return emu::shared_address(p);
}
