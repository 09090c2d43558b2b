// emu_hopper.h: CPU twins of what sm_90 adds: barriers in shared memory, barriers of some warps,
// matrix products of a warpgroup, bulk copies. What is asynchronous there happens here as late as
// the program allows: a program that does not wait, or overwrites too early, goes wrong.
//
// `line` is the line that error messages name: a wrapper that passes its own caller's is told apart
// from other calls of it.
#pragma once

#include <cstdint>

#pragma GCC visibility push(hidden)

namespace emu {

// Shared addresses are 32 bits, as on the GPU, and agree with pointers modulo 1024: the first
// KiB is the system's, then comes dynamic, then static shared memory.
unsigned shared_address(const void* p);

// mbarrier.init, .arrive with a count, .arrive.expect_tx, and .try_wait until the phase of that
// parity is complete. An arrival releases what the thread has done, a wait acquires it.
void mbarrier_init(unsigned barrier, int count, int line = __builtin_LINE());
void mbarrier_arrive(unsigned barrier, int count, int line = __builtin_LINE());
void mbarrier_arrive_expect(unsigned barrier, int bytes, int line = __builtin_LINE());
void mbarrier_wait(unsigned barrier, unsigned parity, int line = __builtin_LINE());

// barrier.sync of `threads` threads, a multiple of 32; barriers 1 to 15.
void named_barrier(int id, int threads, int line = __builtin_LINE());

// fence.proxy.async: found missing by the race check of a traced library.
void fence_async_proxy();

// wgmma.mma_async.m64nNk16.f32.f16.f16, with B and perhaps A in shared memory, K-major with the
// 128-byte swizzle. The products are made, and shared memory read for them, when the warpgroup
// waits; until then the sums' registers hold NaN, and writing to them is an error. 16 products and
// the sum so far are added in double and rounded towards zero once. A in registers is taken at
// once: that it is overwritten before the wait is not found.
void wgmma(float* sum, int columns, const std::uint32_t* a_registers, std::uint64_t a,
           std::uint64_t b, bool add, int line);
template <int Columns>
EMU_INLINE void wgmma_f16(float (&sum)[Columns / 2], std::uint64_t a, std::uint64_t b, int add,
                          int line = __builtin_LINE()) {
  wgmma(sum, Columns, nullptr, a, b, add != 0, line);
}
template <int Columns>
EMU_INLINE void wgmma_f16(float (&sum)[Columns / 2], const std::uint32_t (&a)[4], std::uint64_t b,
                          int add, int line = __builtin_LINE()) {
  wgmma(sum, Columns, a, 0, b, add != 0, line);
}
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups_left, int line = __builtin_LINE());

// cp.async.bulk, multiples of 16 bytes. To shared memory: arrives when somebody waits for the
// barrier's phase. To global memory: is read when the thread waits for its group to have been read
// (.wait_group.read), and arrives when it waits for the group, or when the block ends.
void bulk_load(unsigned shared, const void* global, int bytes, unsigned barrier,
               int line = __builtin_LINE());
void bulk_store(void* global, unsigned shared, int bytes, int line = __builtin_LINE());
void bulk_commit();
void bulk_wait_read(int groups_left = 0);
void bulk_wait(int groups_left = 0);

// mapa: what stands at a shared address of this block's, in another one's of its cluster. The result
// is an address for cluster_copy, cluster_atomic and mbarrier_arrive alone.
unsigned map_shared(unsigned address, unsigned rank);
// cp.async.bulk from the block's shared memory to another's; is read and arrives when somebody waits
// for the phase of the barrier there.
void cluster_copy(unsigned there, unsigned shared, int bytes, unsigned barrier_there,
                  int line = __builtin_LINE());
// red.shared::cluster: change(what is there).
int* cluster_word(unsigned address, int line);
template <class F>
EMU_INLINE void cluster_atomic(unsigned address, F change, int line = __builtin_LINE()) {
  int* const word = cluster_word(address, line);
  int value;
  atomic_read(word, &value, sizeof value);
  value = change(value);
  atomic_write(word, &value, sizeof value);
}
int cluster_blocks();  // %cluster_nctarank
// barrier.cluster.arrive and .wait, of all threads of all blocks of a cluster.
void cluster_barrier(int line = __builtin_LINE());

// %globaltimer: moves on when it is looked at, so that whoever waits for a time is not slow.
unsigned long long nanoseconds();

// max.NaN.f32
EMU_INLINE float max_nan(float a, float b) {
  if (a != a || b != b) return bit_cast<float>(0x7fffffffu);
  return a < b ? b : a;
}

}  // namespace emu

#pragma GCC visibility pop
