// emu_runtime.h: what emu_runtime.cpp, emu_ptx.cpp and emu_trace.cpp share. No kernel sees it.
#pragma once

#include <vector>

#include "emu.h"

#pragma GCC visibility push(hidden)

namespace emu {

constexpr int kMaxThreads = 1024;                        // of a block
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
};

// One cp.async that was not yet waited for.
struct Copy {
  void* shared;
  const void* global;
  int bytes, source_bytes;
  const void* pc;  // of the call, for the tracer
};

struct Thread {
  int number;  // in the block, x fastest
  uint3 index;
  Fiber* fiber = nullptr;  // where it stands while it waits
  bool exited = false;
  Wait wait;
  std::vector<Copy> copies;             // cp.async, oldest first
  std::vector<std::size_t> group_ends;  // sizes of `copies` at each commit
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

struct Block {
  int size = 0;     // threads
  int alive = 0;    // that have not exited
  int started = 0;  // that have begun, in the order of start_order
  std::size_t dynamic_shared = 0;  // bytes
  Thread threads[kMaxThreads];
  Warp warps[kMaxWarps];
  int start_order[kMaxThreads];
  BlockBarrier barrier;
};

extern Block block;
extern Thread* self;   // the thread that runs; null outside of kernels
extern Fiber* fiber;   // the stack that it runs on

// Lets other threads run; returns when this one is ready again.
void suspend();
// The same, ready at once: others go first.
void yield();

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
// Notes one row of an ldmatrix.
void matrix_row(const void* address, int bytes, const void* pc);

void begin_block();
void end_block();
void block_synchronized();  // all threads are at a barrier, none has left it
void warp_synchronized(int warp, unsigned lanes, bool orders_memory);

}  // namespace trace
}  // namespace emu

#pragma GCC visibility pop
