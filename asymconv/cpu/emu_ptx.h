// emu_ptx.h: CPU twins of PTX instructions. A CUDA text wraps an instruction once, by name:
//
//   __device__ __forceinline__ void cp_async16(void* shared, const void* global, int bytes) {
//   #ifdef __CUDACC__
//     asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" :: ...);
//   #else
//     emu::cp_async<16>(shared, global, bytes);
//   #endif
//   }
//
// The tracer books what a twin does on the line that calls the wrapper, if the wrapper is
// __forceinline__ (else on the line inside it).
#pragma once

#include <cstdint>

#pragma GCC visibility push(hidden)

namespace emu {

void copy_async(void* shared, const void* global, int bytes, int source_bytes, int line);
void commit_copies();
void wait_for_copies(int groups_left);

// cp.async: copies `Bytes` to shared memory, of which only the first `source_bytes` are read and
// the rest become 0. The copy happens as late as the program allows, when the thread waits for its
// group: whoever reads before that finds what was there, which is NaN in fresh shared memory.
template <int Bytes>
EMU_INLINE void cp_async(void* shared, const void* global, int source_bytes = Bytes,
                         int line = __builtin_LINE()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "cp.async copies 4, 8 or 16 bytes");
  copy_async(shared, global, Bytes, source_bytes, line);
}
// cp.async.commit_group: the copies since the last one are a group.
EMU_INLINE void cp_async_commit() {
  commit_copies();
}
// cp.async.wait_group: waits until at most the Pending newest groups are under way.
template <int Pending>
EMU_INLINE void cp_async_wait() {
  wait_for_copies(Pending);
}
// cp.async.wait_all: commits and waits for everything.
EMU_INLINE void cp_async_wait_all() {
  commit_copies();
  wait_for_copies(0);
}

void load_matrices(std::uint32_t* fragment, int count, bool transposed, const void* row, int line);

// ldmatrix.sync.aligned.m8n8.x{1,2,4}{.trans}.shared.b16. Lane 8 * m + r gives the address of row r
// of the 8x8 matrix m (16 bytes, 16-byte aligned). Every lane l receives of each matrix the two
// neighbours (row l / 4, columns 2 * (l % 4) and + 1), or with Transposed those of its transpose.
template <bool Transposed = false, int Count>
EMU_INLINE void ldmatrix(std::uint32_t (&fragment)[Count], const void* row,
                         int line = __builtin_LINE()) {
  static_assert(Count == 1 || Count == 2 || Count == 4, "x1, x2 or x4");
  load_matrices(fragment, Count, Transposed, row, line);
}

// D = A * B + C with fragments as the PTX ISA lays them out over the warp. The sum over k is made in
// double and rounded once: the hardware's own order and width of accumulation are not documented.

// mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32: two halves a register.
void mma_m16n8k16_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                      const float (&c)[4], int line = __builtin_LINE());
// mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32: reads the upper 19 bits of each float.
void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                      const float (&c)[4], int line = __builtin_LINE());

// cvt.rna.tf32.f32: rounds to 10 mantissa bits, ties away from zero; the lower 13 bits become 0.
EMU_INLINE std::uint32_t to_tf32(float value) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;  // inf, NaN
  return (bits + 0x1000u) & 0xffffe000u;
}

}  // namespace emu

#pragma GCC visibility pop
