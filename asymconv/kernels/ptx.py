"""Named wrappers, one for each PTX instruction, as CUDA text that rungs put before their own.

Under nvcc they are the instruction; under g++ their twin in `asymconv.cpu` (namespace emu).
"""

CP_ASYNC = r"""
// PTX ISA 9.7.9.25.3.1, cp.async (sm_80): global to shared memory without a register in between.
// Copies `bytes` (0 or 4) and fills the rest of the 4 with zeros.
__device__ __forceinline__ void cp_async_4(float* shared, const float* global, int bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;\n" ::"r"(
                   (unsigned)__cvta_generic_to_shared(shared)),
               "l"(global), "r"(bytes));
#else
  emu::cp_async<4>(shared, global, bytes);
#endif
}

// The same for 16 bytes, both addresses multiples of 16; .cg goes past L1.
__device__ __forceinline__ void cp_async_16(float* shared, const float* global, int bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(
                   (unsigned)__cvta_generic_to_shared(shared)),
               "l"(global), "r"(bytes));
#else
  emu::cp_async<16>(shared, global, bytes);
#endif
}

// The same with ignore-src: copies, or without reading writes zeros.
__device__ __forceinline__ void cp_async_4_if(bool copy, float* shared, const float* global) {
#ifdef __CUDACC__
  asm volatile("{ .reg .pred zeros; setp.eq.s32 zeros, %2, 0;\n"
               "  cp.async.ca.shared.global [%0], [%1], 4, zeros; }\n" ::"r"(
                   (unsigned)__cvta_generic_to_shared(shared)),
               "l"(global), "r"((int)copy));
#else
  emu::cp_async<4>(shared, global, copy ? 4 : 0);
#endif
}
__device__ __forceinline__ void cp_async_16_if(bool copy, float* shared, const float* global) {
#ifdef __CUDACC__
  asm volatile("{ .reg .pred zeros; setp.eq.s32 zeros, %2, 0;\n"
               "  cp.async.cg.shared.global [%0], [%1], 16, zeros; }\n" ::"r"(
                   (unsigned)__cvta_generic_to_shared(shared)),
               "l"(global), "r"((int)copy));
#else
  emu::cp_async<16>(shared, global, copy ? 16 : 0);
#endif
}

// PTX ISA 9.7.9.25.3.2: the copies so far, since the last commit, are a group.
__device__ __forceinline__ void cp_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;\n" ::);
#else
  emu::cp_async_commit();
#endif
}

// PTX ISA 9.7.9.25.3.3: wait until at most `pending` of this thread's groups are under way.
template <int pending>
__device__ __forceinline__ void cp_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;\n" ::"n"(pending) : "memory");
#else
  emu::cp_async_wait<pending>();
#endif
}
"""

MMA = r"""
// PTX ISA 9.7.14.5.15, ldmatrix (sm_75): four 8x8 matrices of halves from shared memory. Lane
// 8 * m + r points at row r of matrix m, 16 bytes; lane l receives, of each matrix, row l / 4,
// columns 2 * (l % 4) and + 1.
__device__ __forceinline__ void ldmatrix_x4(unsigned (&d)[4], const void* row) {
#ifdef __CUDACC__
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"((unsigned)__cvta_generic_to_shared(row))
               : "memory");
#else
  emu::ldmatrix(d, row);
#endif
}

// PTX ISA 9.7.14.5.8, mma.m16n8k16 (sm_80): d += a * b of a warp, halves in, fp32 sums. Lane l has
// of d rows l / 4 and + 8, columns 2 * (l % 4) and + 1.
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const unsigned (&a)[4], unsigned b0,
                                             unsigned b1) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const unsigned b[2] = {b0, b1};
  emu::mma_m16n8k16_f16(d, a, b, d);
#endif
}
"""

MAX_NAN = r"""
// PTX ISA 9.7.3.12, max.NaN: the larger magnitude; NaN if one is NaN.
__device__ __forceinline__ float larger_magnitude(float a, float b) {
#ifdef __CUDACC__
  float larger;
  asm("max.NaN.f32 %0, %1, %2;\n" : "=f"(larger) : "f"(fabsf(a)), "f"(fabsf(b)));
  return larger;
#else
  return emu::max_nan(fabsf(a), fabsf(b));
#endif
}
"""

HOPPER = r"""
// ---- sm_90a: barriers in shared memory, warpgroup matrix products. Where an error of the CPU twin
// is to name the line of the call, the twin is a function of its own.
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return (unsigned)__cvta_generic_to_shared(p);
}

// PTX ISA 9.7.13.15.9, mbarrier.init: a barrier that `count` arrivals complete.
__device__ __forceinline__ void mbarrier_init(unsigned barrier, int count) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(count));
#else
  emu::mbarrier_init(barrier, count);
#endif
}

// PTX ISA 9.7.13.15.13, mbarrier.arrive (release): what this thread wrote is seen by who waits.
#ifdef __CUDACC__
__device__ __forceinline__ void mbarrier_arrive(unsigned barrier, int count = 1) {
  asm volatile("{ .reg .b64 state; mbarrier.arrive.shared::cta.b64 state, [%0], %1; }\n" ::"r"(
                   barrier),
               "r"(count)
               : "memory");
}
#else
__device__ __forceinline__ void mbarrier_arrive(unsigned barrier, int count = 1,
                                                int line = __builtin_LINE()) {
  emu::mbarrier_arrive(barrier, count, line);
}
#endif

// PTX ISA 9.7.13.15.16, mbarrier.try_wait: until the phase of this parity is complete.
#ifdef __CUDACC__
__device__ __forceinline__ void mbarrier_wait(unsigned barrier, unsigned parity) {
  asm volatile("{ .reg .pred done;\n"
               "  again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "  @!done bra again; }\n" ::"r"(barrier), "r"(parity)
               : "memory");
}
#else
__device__ __forceinline__ void mbarrier_wait(unsigned barrier, unsigned parity,
                                              int line = __builtin_LINE()) {
  emu::mbarrier_wait(barrier, parity, line);
}
#endif

// PTX ISA 9.7.13.4, fence.proxy.async: ordinary writes to shared memory before it are seen, after
// the next barrier, by wgmma, which reads through another proxy.
__device__ __forceinline__ void fence_async_proxy() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;\n" ::: "memory");
#else
  emu::fence_async_proxy();
#endif
}

// PTX ISA 9.7.13.1, barrier.sync: for some of a block's warps.
#ifdef __CUDACC__
template <int threads>
__device__ __forceinline__ void named_barrier(int id) {
  asm volatile("barrier.sync %0, %1;\n" ::"r"(id), "n"(threads) : "memory");
}
#else
template <int threads>
__device__ __forceinline__ void named_barrier(int id, int line = __builtin_LINE()) {
  emu::named_barrier(id, threads, line);
}
#endif

// PTX ISA 9.7.16.7.1 to .3: order the registers before the first product; close a group; wait.
__device__ __forceinline__ void wgmma_fence() {
#ifdef __CUDACC__
  asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory");
#else
  emu::wgmma_fence();
#endif
}
__device__ __forceinline__ void wgmma_commit() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory");
#else
  emu::wgmma_commit();
#endif
}
#ifdef __CUDACC__
template <int pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(pending) : "memory");
}
#else
template <int pending>
__device__ __forceinline__ void wgmma_wait(int line = __builtin_LINE()) {
  emu::wgmma_wait(pending, line);
}
#endif

// PTX ISA 9.7.16.5.1, matrix descriptor: rows of 128 bytes, swizzled over groups of 8 rows, the
// groups 1024 bytes apart. The address may start in the middle of a group: the swizzle goes by the
// bits of the address itself, and the base offset stays 0.
__device__ __forceinline__ unsigned long long swizzled_rows(unsigned address) {
  return (unsigned long long)((address & 0x3ffff) >> 4) | 1ull << 16 | (1024ull >> 4) << 32 |
         1ull << 62;
}
"""

NAP = r"""
// mbarrier_wait with a nap between tries (PTX ISA 9.7.20.2, nanosleep; at most twice as long): who
// waits takes less of others' issue slots, and less power.
#ifdef __CUDACC__
__device__ __forceinline__ void mbarrier_wait_napping(unsigned barrier, unsigned parity) {
  asm volatile("{ .reg .pred done;\n"
               "  again: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
               "  @done bra ready;\n"
               "  nanosleep.u32 20;\n"
               "  bra again;\n"
               "  ready: }" ::"r"(barrier), "r"(parity)
               : "memory");
}
#else
__device__ __forceinline__ void mbarrier_wait_napping(unsigned barrier, unsigned parity,
                                                      int line = __builtin_LINE()) {
  emu::mbarrier_wait(barrier, parity, line);
}
#endif
"""

BULK = r"""
// A matrix descriptor so many bytes further on; only the address changes, which has 14 of 64 bits.
__device__ __forceinline__ unsigned long long moved(unsigned long long descriptor, int bytes) {
  return (descriptor & 0xffffffff00000000ull) | ((unsigned)descriptor + bytes / 16);
}

// ---- sm_90: bulk copies, which a thread starts and a copy engine makes, and registers that warps
// hand over. Addresses and sizes are multiples of 16 bytes.

// PTX ISA 9.7.13.15.13, mbarrier.arrive.expect_tx: arrives, and the phase waits for `bytes` more.
__device__ __forceinline__ void mbarrier_arrive_expect(unsigned barrier, int bytes) {
#ifdef __CUDACC__
  asm volatile("{ .reg .b64 state;\n"
               "  mbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1; }\n" ::"r"(barrier),
               "r"(bytes)
               : "memory");
#else
  emu::mbarrier_arrive_expect(barrier, bytes);
#endif
}

// PTX ISA 9.7.9.25.4.1, cp.async.bulk: global to shared memory; its bytes count at the barrier.
__device__ __forceinline__ void bulk_load(unsigned shared, const void* global, int bytes,
                                          unsigned barrier) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];\n" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
#else
  emu::bulk_load(shared, global, bytes, barrier);
#endif
}

// The same, shared to global memory; the thread's stores since the last commit are a group.
__device__ __forceinline__ void bulk_store(void* global, unsigned shared, int bytes) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\n" ::"l"(global),
               "r"(shared), "r"(bytes)
               : "memory");
#else
  emu::bulk_store(global, shared, bytes);
#endif
}
__device__ __forceinline__ void bulk_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.commit_group;\n" ::: "memory");
#else
  emu::bulk_commit();
#endif
}

// PTX ISA 9.7.9.25.4.3: until at most `pending` of this thread's groups have not read shared
// memory; or are not done.
template <int pending = 0>
__device__ __forceinline__ void bulk_wait_read() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group.read %0;\n" ::"n"(pending) : "memory");
#else
  emu::bulk_wait_read(pending);
#endif
}
template <int pending = 0>
__device__ __forceinline__ void bulk_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.wait_group %0;\n" ::"n"(pending) : "memory");
#else
  emu::bulk_wait(pending);
#endif
}

// PTX ISA 9.7.20.5, setmaxnreg: all warps of a warpgroup give registers back, or wait for more.
template <int registers>
__device__ __forceinline__ void registers_down_to() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;\n" ::"n"(registers));
#endif
}
template <int registers>
__device__ __forceinline__ void registers_up_to() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;\n" ::"n"(registers));
#endif
}
"""

BULK_EVICT_FIRST = r"""
// PTX ISA 9.7.9.18, createpolicy, and .L2::cache_hint: the same bulk copies, but L2 lets go of
// their lines before others.
__device__ __forceinline__ void bulk_load_evict_first(unsigned shared, const void* global,
                                                      int bytes, unsigned barrier) {
#ifdef __CUDACC__
  asm volatile("{ .reg .b64 policy;\n"
               "  createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
               "  cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1], %2, [%3], policy; }\n" ::"r"(shared),
               "l"(global), "r"(bytes), "r"(barrier)
               : "memory");
#else
  emu::bulk_load(shared, global, bytes, barrier);
#endif
}
__device__ __forceinline__ void bulk_store_evict_first(void* global, unsigned shared, int bytes) {
#ifdef __CUDACC__
  asm volatile("{ .reg .b64 policy;\n"
               "  createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
               "  cp.async.bulk.global.shared::cta.bulk_group.L2::cache_hint "
               "[%0], [%1], %2, policy; }\n" ::"l"(global),
               "r"(shared), "r"(bytes)
               : "memory");
#else
  emu::bulk_store(global, shared, bytes);
#endif
}
"""

CLUSTER = r"""
// ---- sm_90: clusters, blocks that run together and see each other's shared memory.
__device__ __forceinline__ int cluster_blocks() {  // PTX ISA 10, %cluster_nctarank
#ifdef __CUDACC__
  int blocks;
  asm volatile("mov.u32 %0, %%cluster_nctarank;\n" : "=r"(blocks));
  return blocks;
#else
  return emu::cluster_blocks();
#endif
}
__device__ __forceinline__ int cluster_rank() {  // of this block, PTX ISA 10, %cluster_ctarank
#ifdef __CUDACC__
  int rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;\n" : "=r"(rank));
  return rank;
#else
  return emu::cluster_rank;
#endif
}

// PTX ISA 9.7.9.22, mapa: the same place in another block of the cluster.
__device__ __forceinline__ unsigned map_shared(unsigned address, int rank) {
#ifdef __CUDACC__
  unsigned there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(address), "r"(rank));
  return there;
#else
  return emu::map_shared(address, rank);
#endif
}

// PTX ISA 9.7.9.25.4.1, cp.async.bulk: from this block's shared memory to another's, as map_shared
// gives it; its bytes count at a barrier there. Multiples of 16 bytes.
__device__ __forceinline__ void cluster_copy(unsigned there, unsigned shared, int bytes,
                                             unsigned barrier_there) {
#ifdef __CUDACC__
  asm volatile("cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes "
               "[%0], [%1], %2, [%3];\n" ::"r"(there),
               "r"(shared), "r"(bytes), "r"(barrier_there)
               : "memory");
#else
  emu::cluster_copy(there, shared, bytes, barrier_there);
#endif
}

// PTX ISA 9.7.13.6, red: a word of another block's shared memory, as map_shared gives it.
__device__ __forceinline__ void cluster_min(unsigned address, int value) {
#ifdef __CUDACC__
  asm volatile("red.relaxed.cluster.shared::cluster.min.s32 [%0], %1;\n" ::"r"(address),
               "r"(value)
               : "memory");
#else
  emu::cluster_atomic(address, [&](int old) { return value < old ? value : old; });
#endif
}
__device__ __forceinline__ void cluster_max(unsigned address, int value) {
#ifdef __CUDACC__
  asm volatile("red.relaxed.cluster.shared::cluster.max.s32 [%0], %1;\n" ::"r"(address),
               "r"(value)
               : "memory");
#else
  emu::cluster_atomic(address, [&](int old) { return value > old ? value : old; });
#endif
}

// PTX ISA 9.7.13.15.13, mbarrier.arrive at another block's barrier, as map_shared gives it. It
// orders what this thread did within its own block only.
__device__ __forceinline__ void cluster_mbarrier_arrive(unsigned barrier) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];\n" ::"r"(barrier) : "memory");
#else
  emu::mbarrier_arrive(barrier, 1);
#endif
}

// PTX ISA 9.7.13.3, barrier.cluster: for all threads of the cluster.
#ifdef __CUDACC__
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release;\n"
               "barrier.cluster.wait.acquire;\n" ::: "memory");
}
#else
__device__ __forceinline__ void cluster_barrier(int line = __builtin_LINE()) {
  emu::cluster_barrier(line);
}
#endif
"""

CLOCK = r"""
// PTX ISA 10, %globaltimer: nanoseconds, the same on all of a device's multiprocessors.
__device__ __forceinline__ unsigned long long nanoseconds() {
#ifdef __CUDACC__
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;\n" : "=l"(now));
  return now;
#else
  return emu::nanoseconds();
#endif
}
"""


def _wgmma_sums(columns: int) -> tuple[int, str, str]:
    """A thread's sums of 64 x columns: how many, their places in the text, their constraints."""
    if columns % 8 or not 8 <= columns <= 256:
        raise ValueError(f"wgmma has N = 8, 16, ... 256, not {columns}")
    count = columns // 2
    places = ", ".join(f"%{i}" for i in range(count))
    registers = ", ".join(f'"+f"(sum[{i}])' for i in range(count))
    return count, places, registers


def wgmma_f16(columns: int) -> str:
    """The wrapper of wgmma.mma_async m64nNk16, fp16 operands from shared memory, fp32 sums.

    PTX ISA 9.7.16.5.2. A warpgroup's thread holds N / 2 of the 64 x N sums: of rows
    ``16 * warp + lane / 4`` and 8 below, the columns ``8 * j + 2 * (lane % 4)`` and one right of
    it, as ``sum[4 * j]``, ``[4 * j + 1]``, and ``[4 * j + 2]``, ``[4 * j + 3]`` for the lower row.

    Args:
        columns: N, a multiple of 8 from 8 to 256.
    """
    count, places, registers = _wgmma_sums(columns)
    return f"""
// PTX ISA 9.7.16.5.2: sum = a * b, plus sum if `add`; under way until wgmma_wait.
#ifdef __CUDACC__
__device__ __forceinline__ void wgmma_m64n{columns}k16_f16(float (&sum)[{count}],
                                                    unsigned long long a, unsigned long long b,
                                                    int add) {{
  asm volatile("{{ .reg .pred add; setp.ne.b32 add, %{count + 2}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {{{places}}}, "
               "%{count}, %{count + 1}, add, 1, 1, 0, 0; }}\\n"
               : {registers}
               : "l"(a), "l"(b), "r"(add));
}}
#else
__device__ __forceinline__ void wgmma_m64n{columns}k16_f16(float (&sum)[{count}],
                                                    unsigned long long a, unsigned long long b,
                                                    int add, int line = __builtin_LINE()) {{
  emu::wgmma_f16<{columns}>(sum, a, b, add, line);
}}
#endif
"""


def wgmma_f16_ra(columns: int) -> str:
    """The same with a in registers, as mma.m16n8k16 has it (PTX ISA 9.7.16.5.1.1).

    Warp i of the warpgroup has rows ``16 * i`` on: lane l of row l / 4 the columns
    ``2 * (l % 4)`` and + 1 in ``a[0]``, of row + 8 in ``a[1]``, columns + 8 in ``a[2]``, ``a[3]``.

    Args:
        columns: N, a multiple of 8 from 8 to 256.
    """
    count, places, registers = _wgmma_sums(columns)
    return f"""
// PTX ISA 9.7.16.5.2: sum = a * b, plus sum if `add`; under way until wgmma_wait.
#ifdef __CUDACC__
__device__ __forceinline__ void wgmma_m64n{columns}k16_f16_ra(float (&sum)[{count}],
                                                       const unsigned (&a)[4],
                                                       unsigned long long b, int add) {{
  asm volatile("{{ .reg .pred add; setp.ne.b32 add, %{count + 5}, 0;\\n"
               "wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.f16.f16 {{{places}}}, "
               "{{%{count}, %{count + 1}, %{count + 2}, %{count + 3}}}, %{count + 4}, "
               "add, 1, 1, 0; }}\\n"
               : {registers}
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}}
#else
__device__ __forceinline__ void wgmma_m64n{columns}k16_f16_ra(float (&sum)[{count}],
                                                       const unsigned (&a)[4],
                                                       unsigned long long b, int add,
                                                       int line = __builtin_LINE()) {{
  emu::wgmma_f16<{columns}>(sum, a, b, add, line);
}}
#endif
"""
