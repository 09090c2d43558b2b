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
