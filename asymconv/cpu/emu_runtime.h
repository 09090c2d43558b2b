// emu_runtime.h: what emu_runtime.cpp, emu_ptx.cpp and emu_trace.cpp share. No kernel sees it.
#pragma once

#include <deque>
#include <vector>

#include "emu.h"

#pragma GCC visibility push(hidden)

namespace emu {

constexpr int kMaxThreads = 1024;                        // of a block, and of a cluster
constexpr unsigned kMaxCluster = 2;                      // blocks
constexpr int kMaxWarps = kMaxThreads / kWarp;
constexpr std::size_t kMaxDynamicShared = 227 * 1024;    // bytes, as on sm_90
constexpr std::size_t kDefaultDynamicShared = 48 * 1024; // without cudaFuncSetAttribute
constexpr std::size_t kStackBytes = 256 * 1024;          // of a fiber; pages come as they are used

// A lane's part in an exchange: the fragments of an mma.sync fit.
using Slot = unsigned char[64];

// A stack and, while it does not run, where to go on.
struct Fiber {
  void* stack_pointer;
  unsigned char* stack;  // lowest address
};

// What a thread waits for; `what` is null while it waits for nothing.
struct Wait {
  const char* what = nullptr;
  int line = 0;
  int mbarrier = -1, named_barrier = -1;  // which, of the block's
};

// One cp.async that was not yet waited for.
struct Copy {
  void* shared;
  const void* global;
  int bytes, source_bytes;
  const void* pc;  // of the call, for the tracer
};

struct Thread;

// What a barrier hands on in a traced library: how far each thread of the block has been seen, and
// how far by way of a proxy fence. See emu_trace.cpp.
struct View {
  std::vector<unsigned> seen, fenced;
};

// One wgmma of a thread that was not yet waited for.
struct Product {
  std::uint64_t a, b;  // descriptors
  std::uint32_t a_registers[4];
  bool a_in_registers, add;
  int columns, line;
  std::size_t accumulator;  // of the thread's
  const void* pc;           // of the call, for the tracer
  unsigned moment;          // of the call, in the tracer's count
};

// Sums of wgmma under way: their value, while the thread's registers hold NaN.
struct Accumulator {
  float* registers = nullptr;  // null: not in use
  int count;
  float value[128];
};

struct BulkLoad {
  unsigned char* shared;
  const void* from;
  int bytes;
  bool from_shared;  // memory of a block of the cluster, not global
  Thread* thread;  // that began it
  const void* pc;
  unsigned moment;
};

struct BulkStore {
  void* global;
  const unsigned char* shared;
  int bytes, line;
  const void* pc;
  unsigned moment;
  bool read = false;  // then `data` is what was read
  std::vector<unsigned char> data;
};

struct Thread {
  int number;  // in the cluster: block by block, x fastest
  uint3 index;
  unsigned rank;  // of its block in the cluster
  Fiber* fiber = nullptr;  // where it stands while it waits
  bool exited = false;
  Wait wait;
  std::vector<Copy> copies;                 // cp.async, oldest first
  std::vector<std::size_t> group_ends;      // sizes of `copies` at each commit
  std::vector<Product> products;            // wgmma, oldest first
  std::vector<std::size_t> product_groups;  // sizes of `products` at each commit
  std::vector<Accumulator> accumulators;    // of these products
  bool products_fenced = false;             // a wgmma.fence was executed
  std::vector<BulkStore> bulk_stores;       // oldest first
  std::vector<std::size_t> bulk_groups;     // sizes of `bulk_stores` at each commit
};

// A meeting of the lanes of one mask. Two tables of slots take turns: whoever is still reading the
// last one cannot be overtaken by more than one exchange.
struct WarpBarrier {
  unsigned mask;
  unsigned arrived = 0;
  unsigned turn = 0;
  Wait at;
  std::vector<Thread*> waiting;
  Slot slots[2][kWarp];
};

struct Warp {
  unsigned live = 0;  // lanes that exist and have not exited
  std::vector<WarpBarrier*> barriers;  // one for every mask met; kept
};

struct BlockBarrier {
  int arrived = 0;
  int predicates = 0;  // that were not 0
  int result = 0;      // of the barrier before, until all have left it
  Wait at;
  std::vector<Thread*> waiting;
};

// A barrier in shared memory, whose word there names it.
struct MBarrier {
  unsigned address = 0;     // shared
  unsigned in_cluster = 0;  // the same, as mapa gives it
  std::size_t number = 0;
  int count = 0, pending = 0;  // arrivals: of a phase; that are missing
  unsigned phase = 0;
  long long expected_bytes = 0;
  std::vector<BulkLoad> loads;  // that count at it, under way
  std::vector<Thread*> waiting;
  View arrived, completed;
};

constexpr int kNamedBarriers = 16;

struct NamedBarrier {
  int arrived = 0, threads = 0, line = 0;
  std::vector<Thread*> waiting;
  View brought;
};

// Where the threads of a warpgroup wait for wgmma.
struct WarpgroupBarrier {
  int arrived = 0, groups_left = 0, line = 0;
  std::vector<Thread*> waiting;
};

// A block, or a cluster of them: their threads one after the other, whole warpgroups each.
struct Block {
  int size = 0;        // threads
  int block_size = 0;  // of a block of these
  int alive = 0;    // that have not exited
  int started = 0;  // that have begun, in the order of start_order
  std::size_t dynamic_shared = 0;  // bytes
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  int start_order[kMaxThreads];
  BlockBarrier barriers[kMaxCluster], all;  // of a block; of the cluster
  std::deque<MBarrier> mbarriers;
  NamedBarrier named_barriers[kMaxCluster * kNamedBarriers];
  WarpgroupBarrier warpgroups[kMaxThreads / 128];
};

extern Block block;
extern Thread* self;   // the thread that runs; null outside of kernels
extern Fiber* fiber;   // the stack that it runs on

// Lets other threads run; returns when this one is ready again.
void suspend();
// Waits for `threads` threads there, of the block or the cluster; returns how many came with a
// predicate that is not 0.
int meet_at(BlockBarrier& barrier, int threads, int predicate, const char* what, int line);
// The same, ready at once: others go first.
void yield();
// The same, half of the time, where threads run in a drawn order.
void yield_at_random();
// Frees all who wait; where threads run in a drawn order, they and (if it waited too) the running
// one go on in any.
void wake(std::vector<Thread*>& waiting, bool self_too);

// Waits for the lanes of mask, each with n bytes; returns what all 32 brought, of those that did
// not come 0xff. Valid until the thread waits again.
const Slot* exchange(unsigned mask, const void* data, std::size_t n, const char* what, int line);

// Static shared memory, as of this call's operating-system thread.
struct Range {
  unsigned char* begin;
  std::size_t size;
  bool contains(const void* p) const {
    return static_cast<std::size_t>(static_cast<const unsigned char*>(p) - begin) < size;
  }
};
extern Range static_shared;  // the library's thread-local segment
extern Range library;        // all it has mapped

// Dynamic shared memory of all blocks of a cluster, and what lies between.
EMU_INLINE Range all_dynamic_shared() {
  return {dynamic_shared_room + kSharedMargin,
          (kMaxCluster - 1) * kSharedStride + kMaxDynamicShared};
}

// emu_hopper.cpp: what a thread, a block begins with; what a thread may not leave behind.
void begin_asynchronous(Thread& thread);
void begin_barriers();
void end_asynchronous(const Thread& thread, bool last_of_block);
// Notes again, for the tracer, what the thread's asynchronous operations may be reading.
void trace_reads_under_way(const Thread& thread);
// More about what a thread waits for, as snprintf.
int describe_wait(const Wait& wait, char* to, std::size_t room);

// What the tracer (emu_trace.cpp, part of traced libraries only) wants to know.
#ifndef EMU_TRACED
#define EMU_TRACED 0
#endif
namespace trace {

enum Op { kLoad, kStore, kAtomic };

// Notes an access of the running thread from the code at pc.
void access(const void* address, int bytes, Op op, const void* pc);
// Notes a copy that the running thread begins: a global load, a shared store.
void copy_begins(const Copy& copy);
// Until it was waited for, a copy may write at any time: again at its end.
void copy_ends(const Copy& copy);
// Notes an access that a twin makes for the code at pc.
void wrapped_access(const void* address, int bytes, Op op, const void* pc);
// Checks an access to the word of an mbarrier, which is not counted.
void barrier_word(const void* address, int bytes, Op op, const void* pc);
// The count of accesses to shared memory so far.
unsigned moment();
// Checks a read of shared memory by the asynchronous proxy for a thread: when it begins; and, since
// it may happen at any time until then, when it has been waited for.
void async_read_begins(const void* shared, int bytes, const Thread& thread, const void* pc);
void async_read_ends(const void* shared, int bytes, const Thread& thread, const void* pc,
                     unsigned begun);
void bulk_load_begins(const BulkLoad& load);
void bulk_load_ends(const BulkLoad& load);
void bulk_store_begins(const BulkStore& store);

// fence.proxy.async of the running thread.
void proxy_fence();
// What a thread has done and seen, it adds to a view; another thread takes it over.
void hand_on(const Thread& thread, View& to);
void take_over(const Thread& thread, const View& from);

void begin_block();
void end_block();
void block_synchronized();  // all threads are at a barrier, none has left it
void warp_synchronized(int warp, unsigned lanes, bool orders_memory);

}  // namespace trace
}  // namespace emu

#pragma GCC visibility pop
