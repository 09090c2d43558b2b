// emu_hopper.cpp: the twins of emu_hopper.h.
#include "emu_runtime.h"

#include <atomic>

namespace emu {
namespace {

// ------------------------------------------------------------------------------ shared addresses

constexpr unsigned kSystemShared = 1024;  // bytes before dynamic shared memory, as on sm_90
constexpr unsigned kGap = 8192;           // bytes after it: who goes too far meets no static arrays

unsigned static_shared_address() {
  const unsigned end = kSystemShared + static_cast<unsigned>(block.dynamic_shared);
  const auto begin = reinterpret_cast<std::uintptr_t>(static_shared.begin);
  return (end + 1023) / 1024 * 1024 + kGap + static_cast<unsigned>(begin % 1024);
}

// Addresses of a cluster's blocks, as mapa gives them: from here on, so far apart.
constexpr unsigned kWindow = 1u << 24;

// A shared address as mapa gives it for the block that it is of.
unsigned in_cluster(unsigned address) {
  return address >= kWindow ? address : address + (self->rank + 1) * kWindow;
}

// The memory of `bytes` bytes from a shared address on, or null.
unsigned char* shared_memory(unsigned address, std::size_t bytes) {
  const unsigned rank = address >= kWindow ? address / kWindow - 1 : self->rank;
  address %= kWindow;
  const std::size_t in_dynamic = address - std::size_t{kSystemShared};
  if (address >= kSystemShared && in_dynamic + bytes <= block.dynamic_shared) {
    return all_dynamic_shared().begin + rank * kSharedStride + in_dynamic;
  }
  if (rank != self->rank) return nullptr;
  const unsigned first = static_shared_address();
  const std::size_t in_static = address - std::size_t{first};
  if (address >= first && in_static + bytes <= static_shared.size) {
    return static_shared.begin + in_static;
  }
  return nullptr;
}

unsigned char* shared_memory(unsigned address, std::size_t bytes, const char* what, int line) {
  if (unsigned char* memory = shared_memory(address, bytes)) return memory;
  const uint3 t = self->index;
  fail("out of bounds: thread (%u, %u, %u): %s of %zu bytes at shared address %#x, where no shared "
       "memory is, at line %d",
       t.x, t.y, t.z, what, bytes, address, line);
}

void check_alignment(bool aligned, const char* what, int alignment, int line) {
  if (aligned) return;
  const uint3 t = self->index;
  fail("thread (%u, %u, %u): %s with an address or size that is no multiple of %d bytes, at line "
       "%d",
       t.x, t.y, t.z, what, alignment, line);
}

// ------------------------------------------------------------------------------------- mbarriers

// What stands in the 64 bits of a barrier: this, and its number among block.mbarriers.
constexpr std::uint64_t kMBarrierMark = 0x6d626172ull << 32;

// The barrier at an address, or null if none was initialized or it was overwritten.
MBarrier* find_mbarrier(unsigned address, const unsigned char* memory) {
  std::uint64_t word;
  std::memcpy(&word, memory, sizeof word);
  const std::uint64_t number = word ^ kMBarrierMark;
  const bool known = number < block.mbarriers.size() &&
                     in_cluster(address) == block.mbarriers[number].in_cluster;
  return known ? &block.mbarriers[number] : nullptr;
}

MBarrier& mbarrier_at(unsigned address, const char* what, int line, const void* pc) {
  check_alignment(address % 8 == 0, what, 8, line);
  const unsigned char* memory = shared_memory(address, 8, what, line);
  MBarrier* barrier = find_mbarrier(address, memory);
  if (!barrier) {
    const uint3 t = self->index;
    fail("thread (%u, %u, %u): %s at line %d: there is no mbarrier at shared address %#x; it was "
         "not initialized, or was overwritten",
         t.x, t.y, t.z, what, line, address);
  }
  if constexpr (EMU_TRACED) trace::barrier_word(memory, 8, trace::kAtomic, pc);
  return *barrier;
}

void finish(const BulkLoad& load) {
  if constexpr (EMU_TRACED) trace::bulk_load_ends(load);
  std::memcpy(load.shared, load.from, static_cast<std::size_t>(load.bytes));
}

// Completes the phase if all arrivals and bytes are there. Copies that are under way arrive now.
void complete_if_due(MBarrier& barrier, int line) {
  if (barrier.pending != 0) return;
  long long bytes = 0;
  for (const BulkLoad& load : barrier.loads) bytes += load.bytes;
  if (bytes < barrier.expected_bytes) return;
  if (bytes > barrier.expected_bytes) {
    fail("the mbarrier at shared address %#x expects %lld bytes in this phase, but bulk copies "
         "bring %lld, at line %d",
         barrier.address, barrier.expected_bytes, bytes, line);
  }
  for (const BulkLoad& load : barrier.loads) {
    finish(load);
    if constexpr (EMU_TRACED) trace::hand_on(*load.thread, barrier.arrived);
  }
  barrier.loads.clear();
  barrier.expected_bytes = 0;
  barrier.pending = barrier.count;
  ++barrier.phase;
  if constexpr (EMU_TRACED) {
    barrier.completed = barrier.arrived;
    for (Thread* thread : barrier.waiting) trace::take_over(*thread, barrier.completed);
  }
  wake(barrier.waiting, false);
}

// Of a copy to shared memory, once its begin is checked.
void begin(BulkLoad load, MBarrier& barrier, int line) {
  if constexpr (EMU_TRACED) {
    trace::bulk_load_begins(load);
    load.moment = trace::moment();
  }
  barrier.loads.push_back(load);
  if (!barrier.waiting.empty()) complete_if_due(barrier, line);
}

void arrive(unsigned address, int count, long long bytes, const char* what, int line,
            const void* pc) {
  MBarrier& barrier = mbarrier_at(address, what, line, pc);
  complete_if_due(barrier, line);
  if (count < 1 || count > barrier.pending) {
    const uint3 t = self->index;
    fail("thread (%u, %u, %u): %s of %d at line %d: the mbarrier at shared address %#x expects %d "
         "more of %d arrivals in this phase",
         t.x, t.y, t.z, what, count, line, address, barrier.pending, barrier.count);
  }
  barrier.expected_bytes += bytes;
  barrier.pending -= count;
  if constexpr (EMU_TRACED) trace::hand_on(*self, barrier.arrived);
  // with copies under way, the phase ends when somebody wants it
  if (barrier.loads.empty() || !barrier.waiting.empty()) complete_if_due(barrier, line);
  yield_at_random();
}

// ----------------------------------------------------------------------------------------- wgmma

constexpr int kWarpgroup = 128, kRows = 64, kDepth = 16, kMaxColumns = 256;
constexpr const char* kWgmmaWait = "wgmma.wait_group";
constexpr std::uint32_t kUnderWay = 0x7fe0c0deu;  // a NaN

int first_of_warpgroup(const Thread& thread) {
  return thread.number / kWarpgroup * kWarpgroup;
}

// PTX ISA 9.7.16.5.1: a matrix descriptor, as far as it is emulated.
struct Matrix {
  unsigned start, stride;  // shared address; bytes from 8 rows to the next 8
};

Matrix matrix_of(std::uint64_t descriptor, int line) {
  const auto layout = static_cast<unsigned>(descriptor >> 62);
  const auto base_offset = static_cast<unsigned>(descriptor >> 49 & 7);
  if (layout != 1 || base_offset != 0) {
    fail("wgmma at line %d: matrix descriptor %#llx has layout %u and base offset %u; emulated are "
         "1 (128-byte swizzle) and 0",
         line, static_cast<unsigned long long>(descriptor), layout, base_offset);
  }
  return {static_cast<unsigned>(descriptor & 0x3fff) << 4,
          static_cast<unsigned>(descriptor >> 32 & 0x3fff) << 4};
}

// Where chunk (of 8 halves) of a row stands: the swizzle XORs bits of the address itself.
unsigned chunk_address(const Matrix& m, int row, int chunk) {
  const unsigned r = static_cast<unsigned>(row), c = static_cast<unsigned>(chunk);
  const unsigned linear = m.start + r / 8 * m.stride + r % 8 * 128 + c * 16;
  return linear ^ (linear >> 7 & 7) << 4;
}

template <class Visit>
void for_each_chunk(std::uint64_t descriptor, int rows, int line, Visit visit) {
  const Matrix matrix = matrix_of(descriptor, line);
  for (int row = 0; row < rows; ++row) {
    for (int chunk = 0; chunk < 2; ++chunk) {
      visit(row, chunk, shared_memory(chunk_address(matrix, row, chunk), 16, "wgmma", line));
    }
  }
}

// Without branches, so that loops of it become vector instructions.
float exact_float(std::uint16_t half) {
  const std::uint32_t magnitude = half & 0x7fffu;
  const std::uint32_t finite = bit_cast<std::uint32_t>(bit_cast<float>(magnitude << 13) * 0x1p112f);
  const std::uint32_t bits = magnitude >= 0x7c00u ? magnitude << 13 | 0x7f800000u : finite;
  return bit_cast<float>(bits | static_cast<std::uint32_t>(half & 0x8000u) << 16);
}

using Rows = float[kMaxColumns][kDepth];

void read_rows(std::uint64_t descriptor, int rows, int line, Rows& to) {
  for_each_chunk(descriptor, rows, line, [&](int row, int chunk, const unsigned char* memory) {
    std::uint16_t halves[8];
    std::memcpy(halves, memory, sizeof halves);
    float* const eight = to[row] + 8 * chunk;
    for (int i = 0; i < 8; ++i) eight[i] = exact_float(halves[i]);
  });
}

// A's fragments (PTX ISA 9.7.16.5.1.1): lane l of warp w has, of rows 16 w + l / 4 and 8 below, the
// columns 2 * (l % 4) and + 1, then those 8 further right.
void gather_fragments(int first, std::size_t op, Rows& to) {
  for (int t = 0; t < kWarpgroup; ++t) {
    const Product& product = block.threads[first + t].products[op];
    for (int i = 0; i < 4; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8, column = t % 4 * 2 + i / 2 * 8;
      to[row][column] = exact_float(static_cast<std::uint16_t>(product.a_registers[i]));
      to[row][column + 1] = exact_float(static_cast<std::uint16_t>(product.a_registers[i] >> 16));
    }
  }
}

// Towards zero, as tensor cores round when they add to a sum (Fasi et al. 2021,
// 10.7717/peerj-cs.330). No branch: the last place goes back by one where nearest was too far.
float truncated(double value) {
  const float nearest = static_cast<float>(value);
  const bool too_far = std::fabs(static_cast<double>(nearest)) > std::fabs(value);  // not for NaN
  return bit_cast<float>(bit_cast<std::uint32_t>(nearest) - static_cast<std::uint32_t>(too_far));
}

Rows rows_a, rows_b;
float sums[kRows][kMaxColumns];

// sums (+)= A * B^T. 16 products and the sum so far are added in double, then rounded: what
// hardware does in between is not documented.
void multiply(int columns, bool add) {
  for (int j0 = 0; j0 < columns; j0 += 8) {
    double b[kDepth][8];
    for (int k = 0; k < kDepth; ++k) {
      for (int j = 0; j < 8; ++j) b[k][j] = rows_b[j0 + j][k];
    }
    for (int i = 0; i < kRows; ++i) {
      double sum[8];
      for (int j = 0; j < 8; ++j) sum[j] = add ? sums[i][j0 + j] : 0.0;
      for (int k = 0; k < kDepth; ++k) {
        const double a = rows_a[i][k];
        for (int j = 0; j < 8; ++j) sum[j] += a * b[k][j];
      }
      for (int j = 0; j < 8; ++j) sums[i][j0 + j] = truncated(sum[j]);
    }
  }
}

// visit(a thread's value, its place in sums): lane l of warp w has rows 16 w + l / 4 and 8 below.
template <class Visit>
void for_each_sum(int first, std::size_t accumulator, Visit visit) {
  for (int t = 0; t < kWarpgroup; ++t) {
    Accumulator& own = block.threads[first + t].accumulators[accumulator];
    const int row = t / 32 * 16 + t % 32 / 4, column = t % 4 * 2;
    for (int i = 0; i < own.count; ++i) {
      visit(own.value[i], sums[row + i / 2 % 2 * 8][column + i / 4 * 8 + i % 2]);
    }
  }
}

void check_same_products(const Thread& one, const Thread& other, std::size_t count, int line) {
  const uint3 a = one.index, b = other.index;
  if (other.products.size() < count || other.product_groups != one.product_groups) {
    fail("divergent warpgroup: thread (%u, %u, %u) has %zu wgmma under way, thread (%u, %u, %u) "
         "%zu, or they are grouped otherwise, at the wait at line %d",
         a.x, a.y, a.z, one.products.size(), b.x, b.y, b.z, other.products.size(), line);
  }
  for (std::size_t i = 0; i < count; ++i) {
    const Product &p = one.products[i], &q = other.products[i];
    if (p.a != q.a || p.b != q.b || p.columns != q.columns || p.add != q.add ||
        p.a_in_registers != q.a_in_registers || p.accumulator != q.accumulator) {
      fail("divergent warpgroup: threads (%u, %u, %u) and (%u, %u, %u) execute wgmma at lines %d "
           "and %d with different descriptors, shapes or sums",
           a.x, a.y, a.z, b.x, b.y, b.z, p.line, q.line);
    }
  }
}

#if EMU_TRACED
void trace_operands(const Thread& thread, const Product& product, bool ends) {
  const auto visit = [&](int, int, const unsigned char* memory) {
    if (ends) {
      trace::async_read_ends(memory, 16, thread, product.pc, product.moment);
    } else {
      trace::async_read_begins(memory, 16, thread, product.pc);
    }
  };
  if (!product.a_in_registers) for_each_chunk(product.a, kRows, product.line, visit);
  for_each_chunk(product.b, product.columns, product.line, visit);
}
#else
void trace_operands(const Thread&, const Product&, bool) {}
#endif

// The first `count` products of a warpgroup, all of whose threads wait.
void make_products(int first, std::size_t count, int line) {
  const Thread& one = block.threads[first];
  for (int t = 1; t < kWarpgroup; ++t) {
    check_same_products(one, block.threads[first + t], count, line);
  }
  for (std::size_t i = 0; i < count; ++i) {
    const Product& p = one.products[i];
    if constexpr (EMU_TRACED) {
      for (int w = 0; w < kWarpgroup; w += kWarp) {
        trace_operands(block.threads[first + w], block.threads[first + w].products[i], true);
      }
    }
    if (p.a_in_registers) {
      gather_fragments(first, i, rows_a);
    } else {
      read_rows(p.a, kRows, p.line, rows_a);
    }
    read_rows(p.b, p.columns, p.line, rows_b);
    if (i == 0 || one.products[i - 1].accumulator != p.accumulator) {
      for_each_sum(first, p.accumulator, [](float& own, float& sum) { sum = own; });
    }
    multiply(p.columns, p.add);
    if (i + 1 == count || one.products[i + 1].accumulator != p.accumulator) {
      for_each_sum(first, p.accumulator, [](float& own, float& sum) { own = sum; });
    }
  }
}

void check_untouched(const Accumulator& accumulator, const Thread& thread, int line) {
  for (int i = 0; i < accumulator.count; ++i) {
    if (bit_cast<std::uint32_t>(accumulator.registers[i]) == kUnderWay) continue;
    const uint3 t = thread.index;
    fail("thread (%u, %u, %u) writes to the sums of a wgmma that is under way, before the wait at "
         "line %d",
         t.x, t.y, t.z, line);
  }
}

// Gives a thread its finished sums, and forgets the first `count` products and their groups.
void deliver(Thread& thread, std::size_t count, std::size_t groups, int line) {
  auto& products = thread.products;
  for (std::size_t i = 0; i < thread.accumulators.size(); ++i) {
    Accumulator& accumulator = thread.accumulators[i];
    if (!accumulator.registers) continue;
    check_untouched(accumulator, thread, line);
    bool under_way = false;
    for (std::size_t p = count; p < products.size(); ++p) {
      under_way = under_way || products[p].accumulator == i;
    }
    if (under_way) continue;
    std::memcpy(accumulator.registers, accumulator.value,
                static_cast<std::size_t>(accumulator.count) * sizeof(float));
    accumulator.registers = nullptr;
  }
  products.erase(products.begin(), products.begin() + static_cast<std::ptrdiff_t>(count));
  auto& ends = thread.product_groups;
  ends.erase(ends.begin(), ends.begin() + static_cast<std::ptrdiff_t>(groups));
  for (std::size_t& end : ends) end -= count;
}

// The number of a thread's accumulator at these registers. New ones are taken over: their value is
// kept, and the registers say that they are not to be read.
std::size_t accumulator_at(float* registers, int count, int line) {
  auto& all = self->accumulators;
  std::size_t free = all.size();
  for (std::size_t i = 0; i < all.size(); ++i) {
    if (!all[i].registers) free = free == all.size() ? i : free;
    if (all[i].registers == registers) {
      if (all[i].count == count) return i;
      fail("wgmma at line %d: its sums are under way in another shape", line);
    }
  }
  if (free == all.size()) all.emplace_back();
  Accumulator& own = all[free];
  own.registers = registers;
  own.count = count;
  std::memcpy(own.value, registers, static_cast<std::size_t>(count) * sizeof(float));
  for (int i = 0; i < count; ++i) registers[i] = bit_cast<float>(kUnderWay);
  return free;
}

// -------------------------------------------------------------------- bulk copies to global memory

// How many of a thread's groups, the oldest, a wait for all but `left` is for.
std::size_t waited_groups(const Thread& thread, int left) {
  const std::size_t all = thread.bulk_groups.size(), stay = static_cast<std::size_t>(left);
  return all > stay ? all - stay : 0;
}

void read_bulk_stores(Thread& thread, std::size_t groups) {
  const std::size_t count = groups ? thread.bulk_groups[groups - 1] : 0;
  for (std::size_t i = 0; i < count; ++i) {
    BulkStore& store = thread.bulk_stores[i];
    if (store.read) continue;
    if constexpr (EMU_TRACED) {
      trace::async_read_ends(store.shared, store.bytes, thread, store.pc, store.moment);
    }
    store.read = true;
    store.data.assign(store.shared, store.shared + store.bytes);
  }
}

void arrive_in_global(const BulkStore& store) {
  std::memcpy(store.global, store.data.data(), static_cast<std::size_t>(store.bytes));
}

}  // namespace

// ------------------------------------------------------------------------- what the header names

unsigned shared_address(const void* p) {
  const auto* address = static_cast<const unsigned char*>(p);
  const Range dynamic{dynamic_shared(), kMaxDynamicShared};
  if (dynamic.contains(p) || address == dynamic.begin + dynamic.size) {
    return kSystemShared + static_cast<unsigned>(address - dynamic.begin);
  }
  if (static_shared.contains(p)) {
    return static_shared_address() + static_cast<unsigned>(address - static_shared.begin);
  }
  const uint3 t = self->index;
  fail("thread (%u, %u, %u) asks for the shared address of %p, which is not in shared memory", t.x,
       t.y, t.z, p);
}

void mbarrier_init(unsigned address, int count, int line) {
  constexpr int kMostArrivals = (1 << 20) - 1;
  check_alignment(address % 8 == 0, "mbarrier.init", 8, line);
  unsigned char* memory = shared_memory(address, 8, "mbarrier.init", line);
  const uint3 t = self->index;
  if (count < 1 || count > kMostArrivals) {
    fail("thread (%u, %u, %u): mbarrier.init for %d arrivals at line %d", t.x, t.y, t.z, count,
         line);
  }
  if (find_mbarrier(address, memory)) {
    fail("thread (%u, %u, %u): mbarrier.init at line %d of an mbarrier that is in use", t.x, t.y,
         t.z, line);
  }
  if constexpr (EMU_TRACED) {
    trace::barrier_word(memory, 8, trace::kStore, __builtin_return_address(0));
  }
  MBarrier barrier;
  barrier.address = address;
  barrier.in_cluster = in_cluster(address);
  barrier.number = block.mbarriers.size();
  barrier.count = barrier.pending = count;
  const std::uint64_t word = kMBarrierMark ^ barrier.number;
  std::memcpy(memory, &word, sizeof word);
  block.mbarriers.push_back(barrier);
}

void mbarrier_arrive(unsigned barrier, int count, int line) {
  arrive(barrier, count, 0, "mbarrier.arrive", line, __builtin_return_address(0));
}

void mbarrier_arrive_expect(unsigned barrier, int bytes, int line) {
  arrive(barrier, 1, bytes, "mbarrier.arrive.expect_tx", line, __builtin_return_address(0));
}

void mbarrier_wait(unsigned address, unsigned parity, int line) {
  constexpr const char* kWhat = "mbarrier.try_wait";
  MBarrier& barrier = mbarrier_at(address, kWhat, line, __builtin_return_address(0));
  if (parity > 1) fail("%s at line %d: parity %u is not 0 or 1", kWhat, line, parity);
  complete_if_due(barrier, line);
  if ((barrier.phase & 1) != parity) {
    if constexpr (EMU_TRACED) trace::take_over(*self, barrier.completed);
    return;
  }
  self->wait = {kWhat, line};
  self->wait.mbarrier = static_cast<int>(barrier.number);
  barrier.waiting.push_back(self);
  suspend();
}

void named_barrier(int id, int threads, int line) {
  constexpr const char* kWhat = "barrier.sync";
  const uint3 t = self->index;
  if (id < 1 || id >= kNamedBarriers || threads < 1 || threads % kWarp ||
      threads > block.block_size) {
    fail("thread (%u, %u, %u): %s of barrier %d and %d threads at line %d: barriers are 1 to %d (0 "
         "is __syncthreads()), threads a multiple of %d, at most the block's %d",
         t.x, t.y, t.z, kWhat, id, threads, line, kNamedBarriers - 1, kWarp, block.block_size);
  }
  const int place = static_cast<int>(self->rank) * kNamedBarriers + id;
  NamedBarrier& barrier = block.named_barriers[place];
  if (barrier.arrived && barrier.threads != threads) {
    fail("thread (%u, %u, %u) reaches barrier %d for %d threads at line %d, others wait there for "
         "%d at line %d",
         t.x, t.y, t.z, id, threads, line, barrier.threads, barrier.line);
  }
  barrier.threads = threads;
  barrier.line = line;
  if constexpr (EMU_TRACED) trace::hand_on(*self, barrier.brought);
  if (++barrier.arrived < threads) {
    self->wait = {kWhat, line};
    self->wait.named_barrier = place;
    barrier.waiting.push_back(self);
    suspend();
    return;
  }
  if constexpr (EMU_TRACED) {
    for (Thread* thread : barrier.waiting) trace::take_over(*thread, barrier.brought);
    trace::take_over(*self, barrier.brought);
    barrier.brought = {};
  }
  barrier.arrived = 0;
  wake(barrier.waiting, true);
}

unsigned map_shared(unsigned address, unsigned rank) {
  if (rank * static_cast<unsigned>(block.block_size) >= static_cast<unsigned>(block.size)) {
    fail("mapa: the cluster has no block %u", rank);
  }
  return address % kWindow + (rank + 1) * kWindow;
}

int* cluster_word(unsigned address, int line) {
  check_alignment(address % 4 == 0, "red.shared::cluster", 4, line);
  return reinterpret_cast<int*>(shared_memory(address, 4, "red.shared::cluster", line));
}

int cluster_blocks() {
  return block.size / block.block_size;
}

void cluster_barrier(int line) {
  meet_at(block.all, block.size, 0, "barrier.cluster", line);
}

void fence_async_proxy() {
  if constexpr (EMU_TRACED) trace::proxy_fence();
}

void wgmma(float* sum, int columns, const std::uint32_t* a_registers, std::uint64_t a,
           std::uint64_t b, bool add, int line) {
  Thread& thread = *self;
  const uint3 t = thread.index;
  if (first_of_warpgroup(thread) + kWarpgroup > block.size) {
    fail("thread (%u, %u, %u): wgmma at line %d needs a whole warpgroup of %d threads", t.x, t.y,
         t.z, line, kWarpgroup);
  }
  if (!thread.products_fenced) {
    fail("thread (%u, %u, %u): wgmma at line %d without a wgmma.fence before it", t.x, t.y, t.z,
         line);
  }
  Product product{};
  product.a = a;
  product.b = b;
  product.a_in_registers = a_registers != nullptr;
  if (a_registers) std::memcpy(product.a_registers, a_registers, sizeof product.a_registers);
  product.columns = columns;
  product.add = add;
  product.line = line;
  product.pc = __builtin_return_address(0);
  product.accumulator = accumulator_at(sum, columns / 2, line);
  if constexpr (EMU_TRACED) {
    if (lane() == 0) trace_operands(thread, product, false);
    product.moment = trace::moment();
  }
  thread.products.push_back(product);
}

void wgmma_fence() {
  self->products_fenced = true;
}

void wgmma_commit() {
  self->product_groups.push_back(self->products.size());
}

void wgmma_wait(int groups_left, int line) {
  const std::size_t left = static_cast<std::size_t>(groups_left);
  if (self->product_groups.size() <= left) return;
  const std::size_t groups = self->product_groups.size() - left;
  const std::size_t count = self->product_groups[groups - 1];

  const int first = first_of_warpgroup(*self);
  WarpgroupBarrier& barrier = block.warpgroups[first / kWarpgroup];
  if (barrier.arrived && barrier.groups_left != groups_left) {
    const uint3 t = self->index;
    fail("divergent warpgroup: thread (%u, %u, %u) waits for all but %d groups of wgmma at line "
         "%d, others for all but %d at line %d",
         t.x, t.y, t.z, groups_left, line, barrier.groups_left, barrier.line);
  }
  barrier.groups_left = groups_left;
  barrier.line = line;
  if (++barrier.arrived < kWarpgroup) {
    self->wait = {kWgmmaWait, line};
    barrier.waiting.push_back(self);
    suspend();
    return;
  }
  barrier.arrived = 0;
  make_products(first, count, line);
  for (int t = 0; t < kWarpgroup; ++t) deliver(block.threads[first + t], count, groups, line);
  wake(barrier.waiting, true);
}

void bulk_load(unsigned shared, const void* global, int bytes, unsigned address, int line) {
  constexpr const char* kWhat = "cp.async.bulk to shared memory";
  const auto from = reinterpret_cast<std::uintptr_t>(global);
  check_alignment(shared % 16 == 0 && from % 16 == 0 && bytes % 16 == 0 && bytes >= 0, kWhat, 16,
                  line);
  unsigned char* to = shared_memory(shared, static_cast<std::size_t>(bytes), kWhat, line);
  MBarrier& barrier = mbarrier_at(address, kWhat, line, __builtin_return_address(0));
  begin({to, global, bytes, false, self, __builtin_return_address(0), 0}, barrier, line);
}

void cluster_copy(unsigned there, unsigned shared, int bytes, unsigned barrier_there, int line) {
  constexpr const char* kWhat = "cp.async.bulk between shared memories";
  const auto size = static_cast<std::size_t>(bytes);
  check_alignment(there % 16 == 0 && shared % 16 == 0 && bytes % 16 == 0 && bytes >= 0, kWhat, 16,
                  line);
  if (there / kWindow != barrier_there / kWindow) {
    fail("%s at line %d: its barrier is not in the block that it writes to", kWhat, line);
  }
  unsigned char* to = shared_memory(there, size, kWhat, line);
  const unsigned char* from = shared_memory(shared, size, kWhat, line);
  MBarrier& barrier = mbarrier_at(barrier_there, kWhat, line, __builtin_return_address(0));
  begin({to, from, bytes, true, self, __builtin_return_address(0), 0}, barrier, line);
}

void bulk_store(void* global, unsigned shared, int bytes, int line) {
  constexpr const char* kWhat = "cp.async.bulk to global memory";
  const auto to = reinterpret_cast<std::uintptr_t>(global);
  check_alignment(shared % 16 == 0 && to % 16 == 0 && bytes % 16 == 0 && bytes >= 0, kWhat, 16,
                  line);
  const unsigned char* from = shared_memory(shared, static_cast<std::size_t>(bytes), kWhat, line);
  BulkStore store{global, from, bytes, line, __builtin_return_address(0), 0, false, {}};
  if constexpr (EMU_TRACED) {
    trace::bulk_store_begins(store);
    store.moment = trace::moment();
  }
  self->bulk_stores.push_back(store);
}

void bulk_commit() {
  self->bulk_groups.push_back(self->bulk_stores.size());
}

void bulk_wait_read(int groups_left) {
  read_bulk_stores(*self, waited_groups(*self, groups_left));
}

void bulk_wait(int groups_left) {
  Thread& t = *self;
  const std::size_t groups = waited_groups(t, groups_left);
  if (groups == 0) return;
  read_bulk_stores(t, groups);
  const std::size_t count = t.bulk_groups[groups - 1];
  for (std::size_t i = 0; i < count; ++i) arrive_in_global(t.bulk_stores[i]);
  t.bulk_stores.erase(t.bulk_stores.begin(),
                      t.bulk_stores.begin() + static_cast<std::ptrdiff_t>(count));
  t.bulk_groups.erase(t.bulk_groups.begin(),
                      t.bulk_groups.begin() + static_cast<std::ptrdiff_t>(groups));
  for (std::size_t& end : t.bulk_groups) end -= count;
}

// ------------------------------------------------------------------------ what the runtime calls

void begin_asynchronous(Thread& thread) {
  thread.products.clear();
  thread.product_groups.clear();
  thread.products_fenced = false;
  for (Accumulator& accumulator : thread.accumulators) accumulator.registers = nullptr;
  thread.bulk_stores.clear();
  thread.bulk_groups.clear();
}

void begin_barriers() {
  block.mbarriers.clear();
  for (NamedBarrier& barrier : block.named_barriers) barrier = NamedBarrier{};
  for (WarpgroupBarrier& barrier : block.warpgroups) barrier = WarpgroupBarrier{};
}

void end_asynchronous(const Thread& thread, bool last) {
  const uint3 t = thread.index;
  if (!thread.products.empty()) {
    fail("thread (%u, %u, %u) exits without having waited for its wgmma of line %d", t.x, t.y, t.z,
         thread.products.front().line);
  }
  for (const BulkStore& store : thread.bulk_stores) {
    if (store.read) continue;
    fail("thread (%u, %u, %u) exits while its bulk copy of line %d reads shared memory", t.x, t.y,
         t.z, store.line);
  }
  if (!last) return;
  for (int i = 0; i < block.size; ++i) {
    for (const BulkStore& store : block.threads[i].bulk_stores) arrive_in_global(store);
  }
  for (const MBarrier& barrier : block.mbarriers) {
    if (barrier.loads.empty()) continue;
    fail("the block ends while bulk copies to its shared memory are under way: nobody waited for "
         "the mbarrier at shared address %#x",
         barrier.address);
  }
}

#if EMU_TRACED
void trace_reads_under_way(const Thread& thread) {
  if (thread.number % kWarp == 0) {
    for (const Product& product : thread.products) trace_operands(thread, product, true);
  }
  for (const BulkStore& store : thread.bulk_stores) {
    if (store.read) continue;
    trace::async_read_ends(store.shared, store.bytes, thread, store.pc, store.moment);
  }
}
#endif

int describe_wait(const Wait& wait, char* to, std::size_t room) {
  if (wait.mbarrier >= 0) {
    const MBarrier& b = block.mbarriers[static_cast<std::size_t>(wait.mbarrier)];
    long long bytes = 0;
    for (const BulkLoad& load : b.loads) bytes += load.bytes;
    if (b.pending == 0) {
      return std::snprintf(to, room,
                           " (shared address %#x, parity %u: %lld of %lld bytes are there)",
                           b.address, b.phase & 1, bytes, b.expected_bytes);
    }
    return std::snprintf(to, room, " (shared address %#x, parity %u: %d of %d arrivals are there)",
                         b.address, b.phase & 1, b.count - b.pending, b.count);
  }
  if (wait.named_barrier >= 0) {
    const NamedBarrier& b = block.named_barriers[wait.named_barrier];
    return std::snprintf(to, room, " (barrier %d: %d of %d threads are there)",
                         wait.named_barrier % kNamedBarriers, b.arrived, b.threads);
  }
  return 0;
}

unsigned long long nanoseconds() {
  static std::atomic<unsigned long long> now;
  return now += 64;
}

}  // namespace emu
