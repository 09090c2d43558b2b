// emu_runtime.cpp: runs a launch. One block at a time; its threads take turns on one operating
// system thread, each on a fiber (a stack of its own) once it has to wait for others.
//
// A thread runs until it waits or exits. One that exits hands its fiber to the next that has not
// begun, so a kernel without barriers is a plain loop over its threads on a single fiber.
//
// Nothing on a fiber's stack may own memory: after an error the fibers are simply left.
#include "emu_runtime.h"

#include <link.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdarg>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emu {

static_assert(kSharedStride >= kMaxDynamicShared + 2 * kSharedMargin && kSharedStride % 1024 == 0);
unsigned char dynamic_shared_room[kMaxCluster * kSharedStride + kSharedMargin];
unsigned cluster_rank;

Block block;
Thread* self;
Fiber* fiber;
Range static_shared, library;

namespace {

// One call from Python, from emu_begin to emu_end.
struct CallState {
  unsigned long long random = 0;  // state of the generator; 0: threads run in order
  bool failed = false;
  char error[4096];
  const char* kernel = "";
  void (*body)(const void*) = nullptr;
  const void* arguments = nullptr;
  unsigned first_block = 0;            // blockIdx.x of the cluster's first
  void* main_stack_pointer = nullptr;  // of launch(), while a block runs
  pthread_t thread{};
};
CallState call;

cudaError_t last_error = cudaSuccess;

// ------------------------------------------------------------------------------ context switch

// Saves the registers that a function must preserve on the running stack, stores its stack pointer
// in *save, and goes on where the stack `to` was left.
extern "C" void emu_switch(void** save, void* to);

#if defined(__x86_64__)
asm(R"(
.text
.type emu_switch, @function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");
constexpr int kSavedWords = 6;
void** fresh_frame(void** top, void (*entry)()) {
  *--top = nullptr;  // the return address of entry, which never returns; keeps the ABI's alignment
  *--top = reinterpret_cast<void*>(entry);
  return top - kSavedWords;
}
#elif defined(__aarch64__)
asm(R"(
.text
.type emu_switch, %function
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emu_switch, .-emu_switch
)");
constexpr int kSavedWords = 20;
constexpr int kLinkRegister = 11;
void** fresh_frame(void** top, void (*entry)()) {
  top -= kSavedWords;
  top[kLinkRegister] = reinterpret_cast<void*>(entry);
  return top;
}
#else
#error "asymconv.cpu switches fibers on x86-64 and aarch64 only"
#endif

// --------------------------------------------------------------------------------------- fibers

std::vector<Fiber*> all_fibers, free_fibers;
std::size_t page_size;

void fiber_main();

void reset(Fiber* f, std::size_t number) {
  // Stacks that all begin at the same offset in a page would compete for the same cache sets.
  const std::size_t stagger = number * 448 % 16384 / 64 * 64;
  void** top = reinterpret_cast<void**>(f->stack + kStackBytes - 64 - stagger);
  f->stack_pointer = fresh_frame(top, fiber_main);
}

// Whether there was memory for one more.
bool add_fiber() {
  page_size = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  void* memory = mmap(nullptr, page_size + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
  if (memory == MAP_FAILED) return false;
  mprotect(memory, page_size, PROT_NONE);  // the stack grows down into this page, and faults
  Fiber* f = new Fiber{nullptr, static_cast<unsigned char*>(memory) + page_size};
  reset(f, all_fibers.size());
  all_fibers.push_back(f);
  free_fibers.push_back(f);
  return true;
}

Fiber* take_fiber() {
  if (free_fibers.empty() && !add_fiber()) fail("no memory for the stack of a thread");
  Fiber* f = free_fibers.back();
  free_fibers.pop_back();
  return f;
}

// After an error, fibers stand anywhere: all begin anew.
void reset_fibers() {
  free_fibers.clear();
  for (std::size_t i = all_fibers.size(); i-- > 0;) {
    reset(all_fibers[i], i);
    free_fibers.push_back(all_fibers[i]);
  }
}

// Once no thread runs: gives back all but some. Each is two mappings, of which a process has 65,530
// (vm.max_map_count) for all of its libraries, and holds the pages that it has touched.
void trim_fibers() {
  constexpr std::size_t kKept = 64;
  if (all_fibers.size() <= kKept) return;
  while (all_fibers.size() > kKept) {
    Fiber* f = all_fibers.back();
    munmap(f->stack - page_size, page_size + kStackBytes);
    delete f;
    all_fibers.pop_back();
  }
  reset_fibers();
}

void enter(Fiber* next, void** save) {
  fiber = next;
  emu_switch(save, next->stack_pointer);
}

[[noreturn]] void leave_kernel() {
  void* unused;
  emu_switch(&unused, call.main_stack_pointer);
  __builtin_unreachable();
}

// ------------------------------------------------------------------------------------ scheduler

// Threads that may go on, first come first served.
std::vector<Thread*> ready;
std::size_t ready_first;

void make_ready(Thread* thread) {
  thread->wait = {};
  ready.push_back(thread);
}

Thread* next_ready() {
  if (ready_first == ready.size()) return nullptr;
  Thread* thread = ready[ready_first++];
  if (ready_first == ready.size()) {
    ready.clear();
    ready_first = 0;
  }
  return thread;
}

unsigned random_below(unsigned n) {  // xorshift64*
  call.random ^= call.random >> 12;
  call.random ^= call.random << 25;
  call.random ^= call.random >> 27;
  return static_cast<unsigned>((call.random * 0x2545f4914f6cdd1dull >> 32) % n);
}

template <class T>
void shuffle_order(T* items, int n) {
  for (int i = n - 1; i > 0; --i) {
    const int j = static_cast<int>(random_below(static_cast<unsigned>(i) + 1));
    const T item = items[i];
    items[i] = items[j];
    items[j] = item;
  }
}

// Frees all who wait, and with a shuffled order the running thread (if it takes part) among them.
void release(std::vector<Thread*>& waiting, bool self_too) {
  const bool shuffled = call.random != 0;
  if (shuffled && self_too) waiting.push_back(self);
  if (shuffled) shuffle_order(waiting.data(), static_cast<int>(waiting.size()));
  for (Thread* thread : waiting) make_ready(thread);
  waiting.clear();
  if (shuffled && self_too) suspend();
}

[[noreturn]] void report_deadlock();

// The fiber to go on with, for one that cannot.
Fiber* next_fiber() {
  if (block.started < block.size) return take_fiber();
  Thread* thread = next_ready();
  if (!thread) report_deadlock();
  return thread->fiber;
}

void warp_lane_exited(Thread* thread);

void become(Thread* thread) {
  self = thread;
  threadIdx = thread->index;
  blockIdx.x = call.first_block + thread->rank;
  cluster_rank = thread->rank;
}

void run_thread(Thread* thread) {
  become(thread);
  call.body(call.arguments);
  thread->exited = true;
  --block.alive;
  end_asynchronous(*thread, block.alive == 0);
  warp_lane_exited(thread);
}

// What every fiber does: it runs threads that have not begun, then waits to be needed again.
void fiber_main() {
  for (;;) {
    while (block.started < block.size) {
      run_thread(&block.threads[block.start_order[block.started++]]);
    }
    Fiber* own = fiber;
    if (block.alive == 0) {
      free_fibers.push_back(own);
      emu_switch(&own->stack_pointer, call.main_stack_pointer);
    } else {
      Fiber* next = next_fiber();
      free_fibers.push_back(own);
      enter(next, &own->stack_pointer);
    }
  }
}

// ------------------------------------------------------------------------------ what went wrong

struct Text {  // appends to call.error; owns nothing
  std::size_t length = 0;

  void add(const char* format, ...) __attribute__((format(printf, 2, 3))) {
    va_list values;
    va_start(values, format);
    add(format, values);
    va_end(values);
  }
  void add(const char* format, va_list values) {
    const std::size_t room = sizeof call.error - length;
    const int n = std::vsnprintf(call.error + length, room, format, values);
    length += static_cast<std::size_t>(n) < room ? static_cast<std::size_t>(n) : room - 1;
  }
};

Text begin_error() {
  call.failed = true;
  Text text;
  text.add("%s: block (%u, %u, %u): ", call.kernel, blockIdx.x, blockIdx.y, blockIdx.z);
  return text;
}

bool same_wait(const Wait& a, const Wait& b) {
  return a.what == b.what && a.line == b.line && a.mbarrier == b.mbarrier &&
         a.named_barrier == b.named_barrier;
}

// No thread can go on: says how many wait where.
void report_deadlock() {
  Text text = begin_error();
  int exited = 0;
  bool told[kMaxThreads] = {};
  const char* separator = "";
  text.add("deadlock: ");
  for (int i = 0; i < block.size; ++i) {
    const Thread& thread = block.threads[i];
    exited += thread.exited;
    if (thread.exited || told[i]) continue;
    int same = 0;
    for (int j = i; j < block.size; ++j) {
      const Thread& other = block.threads[j];
      if (other.exited || !same_wait(other.wait, thread.wait)) continue;
      told[j] = true;
      ++same;
    }
    char more[160] = "";
    describe_wait(thread.wait, more, sizeof more);
    text.add("%s%d of %d threads wait in %s at line %d%s", separator, same, block.size,
             thread.wait.what, thread.wait.line, more);
    separator = ", ";
  }
  if (exited) text.add(", %d exited without reaching it", exited);
  leave_kernel();
}

// A fault in a kernel (a wild pointer, a full stack, a division by zero) ends the call, not the
// process. Faults elsewhere go to whoever handled them before.
struct sigaction previous_actions[3];
constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGFPE};
stack_t previous_alternate_stack;
unsigned char alternate_stack[64 * 1024];

void on_fault(int signal, siginfo_t* info, void*) {
  const bool ours = self && pthread_equal(pthread_self(), call.thread);
  if (!ours) {
    for (int i = 0; i < 3; ++i) {
      if (kSignals[i] == signal) sigaction(signal, &previous_actions[i], nullptr);
    }
    return;  // the instruction runs again, and faults again
  }
  const auto* address = static_cast<const unsigned char*>(info->si_addr);
  const uint3 t = self->index;
  Text text = begin_error();
  if (signal == SIGFPE) {
    text.add("thread (%u, %u, %u) divides by zero", t.x, t.y, t.z);
  } else if (address >= fiber->stack - page_size && address < fiber->stack) {
    text.add("thread (%u, %u, %u) overflows its stack of %zu KiB", t.x, t.y, t.z,
             kStackBytes / 1024);
  } else {
    text.add("thread (%u, %u, %u) faults at address %p: out of bounds, or misaligned for a vector",
             t.x, t.y, t.z, info->si_addr);
  }
  leave_kernel();
}

void catch_faults() {
  stack_t own{};
  own.ss_sp = alternate_stack;  // the fiber's own may be full
  own.ss_size = sizeof alternate_stack;
  sigaltstack(&own, &previous_alternate_stack);
  struct sigaction action {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;  // the handler is left sideways
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &action, &previous_actions[i]);
}

void stop_catching_faults() {
  for (int i = 0; i < 3; ++i) sigaction(kSignals[i], &previous_actions[i], nullptr);
  sigaltstack(&previous_alternate_stack, nullptr);
}

// --------------------------------------------------------------------------------------- blocks

void prepare_launch(const LaunchConfig& config, void (*body)(const void*), const void* arguments) {
  call.kernel = config.name;
  call.body = body;
  call.arguments = arguments;
  gridDim = config.grid;
  blockDim = config.block;
  const int block_size = static_cast<int>(config.block.x * config.block.y * config.block.z);
  const int size = block_size * static_cast<int>(config.cluster);
  block.size = size;
  block.block_size = block_size;
  block.dynamic_shared = config.dynamic_shared;
  for (BlockBarrier* barrier : {&block.barriers[0], &block.barriers[1], &block.all}) {
    barrier->arrived = 0;
    barrier->predicates = 0;
    barrier->waiting.clear();
  }
  ready.clear();
  ready_first = 0;
  for (int i = 0; i < size; ++i) {
    const unsigned n = static_cast<unsigned>(i % block_size);
    const dim3& b = config.block;
    block.threads[i].number = i;
    block.threads[i].rank = static_cast<unsigned>(i / block_size);
    block.threads[i].index = {n % b.x, n / b.x % b.y, n / (b.x * b.y)};
    block.threads[i].wait = {};
    block.start_order[i] = i;
  }
  for (Warp& warp : block.warps) {
    for (WarpBarrier* barrier : warp.barriers) {
      barrier->arrived = 0;
      barrier->waiting.clear();
    }
  }
}

void poison_shared_memory() {
  for (int first = 0; first < block.size; first += block.block_size) {
    cluster_rank = static_cast<unsigned>(first / block.block_size);
    std::memset(dynamic_shared(), 0xff, block.dynamic_shared);
  }
  if (static_shared.size) std::memset(static_shared.begin, 0xff, static_shared.size);
}

void run_block() {
  for (int i = 0; i < block.size; ++i) {
    Thread& thread = block.threads[i];
    thread.exited = false;
    thread.copies.clear();
    thread.group_ends.clear();
    begin_asynchronous(thread);
  }
  begin_barriers();
  for (int w = 0; w * kWarp < block.size; ++w) {
    const int lanes = block.size - w * kWarp;
    block.warps[w].live = lanes >= kWarp ? 0xffffffffu : (1u << lanes) - 1;
  }
  if (call.random) shuffle_order(block.start_order, block.size);
  block.alive = block.size;
  block.started = 0;
  poison_shared_memory();
  if constexpr (EMU_TRACED) trace::begin_block();

  enter(take_fiber(), &call.main_stack_pointer);

  self = nullptr;
  if (call.failed) return;
  if constexpr (EMU_TRACED) trace::end_block();
}

// ------------------------------------------------------------------------ what CUDA would refuse

struct SharedLimit {
  const void* kernel;
  std::size_t bytes;
};
std::vector<SharedLimit> shared_limits;  // set by cudaFuncSetAttribute

std::size_t dynamic_shared_limit(const void* kernel) {
  for (const SharedLimit& limit : shared_limits) {
    if (limit.kernel == kernel) return limit.bytes;
  }
  return kDefaultDynamicShared;
}

cudaError_t refusal(const LaunchConfig& config) {
  const dim3 &g = config.grid, &b = config.block;
  const bool empty = !g.x || !g.y || !g.z || !b.x || !b.y || !b.z;
  const bool wide_grid = g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535;
  const bool wide_block = b.x > 1024 || b.y > 1024 || b.z > 64;
  const unsigned size = b.x * b.y * b.z, blocks = config.cluster;
  if (empty || wide_grid || wide_block || size > kMaxThreads) return cudaErrorInvalidConfiguration;
  const bool clusters = blocks >= 1 && blocks <= kMaxCluster && g.x % blocks == 0;
  const bool whole = blocks == 1 || (size % 128 == 0 && size * blocks <= kMaxThreads);
  if (!clusters || !whole) return cudaErrorInvalidConfiguration;
  if (config.dynamic_shared > dynamic_shared_limit(config.function)) return cudaErrorInvalidValue;
  return cudaSuccess;
}

// -------------------------------------------------------------------------- where memory stands

thread_local volatile char in_thread_local_segment;  // touched so that the segment exists

int find_segments(dl_phdr_info* info, std::size_t, void*) {
  const auto address_of = [&](const ElfW(Phdr) & segment) {
    return reinterpret_cast<unsigned char*>(info->dlpi_addr + segment.p_vaddr);
  };
  unsigned char *begin = nullptr, *end = nullptr;
  Range thread_local_segment{};
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& segment = info->dlpi_phdr[i];
    if (segment.p_type == PT_TLS) {
      thread_local_segment = {static_cast<unsigned char*>(info->dlpi_tls_data), segment.p_memsz};
    }
    if (segment.p_type != PT_LOAD) continue;
    if (!begin) begin = address_of(segment);
    end = address_of(segment) + segment.p_memsz;
  }
  const Range all{begin, static_cast<std::size_t>(end - begin)};
  if (!all.contains(dynamic_shared())) return 0;  // another library
  library = all;
  static_shared = thread_local_segment;
  return 1;
}

// ------------------------------------------------------------------------------------- barriers

WarpBarrier& warp_barrier(Warp& warp, unsigned mask) {
  for (WarpBarrier* barrier : warp.barriers) {
    if (barrier->mask == mask) return *barrier;
  }
  WarpBarrier* barrier = new WarpBarrier;
  barrier->mask = mask;
  warp.barriers.push_back(barrier);
  return *barrier;
}

bool complete(const WarpBarrier& barrier, const Warp& warp) {
  const unsigned needed = barrier.mask & warp.live;
  return (barrier.arrived & needed) == needed;
}

void open(WarpBarrier& barrier, int warp, bool self_too) {
  Slot* slots = barrier.slots[barrier.turn & 1];
  for (int l = 0; l < kWarp; ++l) {
    if (!(barrier.arrived >> l & 1)) std::memset(slots[l], 0xff, sizeof(Slot));
  }
  if constexpr (EMU_TRACED) {
    const bool orders_memory = std::strcmp(barrier.at.what, "__syncwarp()") == 0;
    trace::warp_synchronized(warp, barrier.arrived, orders_memory);
  }
  barrier.arrived = 0;
  ++barrier.turn;
  release(barrier.waiting, self_too);
}

// CUDA: every calling lane is in its own mask, and all lanes of the mask that have not exited
// execute the same operation with the same mask.
void meet(WarpBarrier& barrier, const char* what, int line) {
  const int warp = self->number / kWarp;
  const uint3 t = self->index;
  if (!(barrier.mask >> lane() & 1)) {
    fail("thread (%u, %u, %u), lane %d, is not in its own mask 0x%08x of %s at line %d", t.x, t.y,
         t.z, lane(), barrier.mask, what, line);
  }
  if (barrier.arrived && std::strcmp(barrier.at.what, what) != 0) {
    fail("divergent warp: thread (%u, %u, %u) reaches %s at line %d, other lanes wait in %s at "
         "line %d",
         t.x, t.y, t.z, what, line, barrier.at.what, barrier.at.line);
  }
  barrier.at = {what, line};
  barrier.arrived |= 1u << lane();
  if (complete(barrier, block.warps[warp])) {
    open(barrier, warp, true);
    return;
  }
  self->wait = {what, line};
  barrier.waiting.push_back(self);
  suspend();
}

// Nobody waits for a lane that has exited.
void warp_lane_exited(Thread* thread) {
  const int number = thread->number / kWarp;
  Warp& warp = block.warps[number];
  warp.live &= ~(1u << thread->number % kWarp);
  for (WarpBarrier* barrier : warp.barriers) {
    if (barrier->arrived && complete(*barrier, warp)) open(*barrier, number, false);
  }
}

}  // namespace

// ------------------------------------------------------------------------- what the header names

void fail(const char* format, ...) {
  Text text = begin_error();
  va_list values;
  va_start(values, format);
  text.add(format, values);
  va_end(values);
  leave_kernel();
}

int lane() {
  return self->number % kWarp;
}

void suspend() {
  Thread* thread = self;
  Fiber* own = fiber;
  thread->fiber = own;
  Fiber* next = next_fiber();
  if (next != own) enter(next, &own->stack_pointer);
  become(thread);
}

void yield() {
  make_ready(self);
  suspend();
}

void yield_at_random() {
  if (call.random && random_below(2)) yield();
}

void wake(std::vector<Thread*>& waiting, bool self_too) {
  release(waiting, self_too);
}

// CUDA C++ Programming Guide: __syncthreads() "waits until all threads in the thread block have
// reached this point", and in conditional code is allowed only "if the conditional evaluates
// identically across the entire thread block". So a thread that has exited is missing here (from
// sm_70 on the hardware does not wait for it, but the guide's rule is not kept), and threads that
// meet at two different calls are an error although the hardware may let them pass.
int sync_block(int predicate, const char* what, int line) {
  return meet_at(block.barriers[self->rank], block.block_size, predicate, what, line);
}

int meet_at(BlockBarrier& barrier, int threads, int predicate, const char* what, int line) {
  if (barrier.arrived && barrier.at.line != line) {
    const uint3 t = self->index;
    fail("divergent barrier: thread (%u, %u, %u) reaches %s at line %d, %d threads wait in %s at "
         "line %d",
         t.x, t.y, t.z, what, line, barrier.arrived, barrier.at.what, barrier.at.line);
  }
  barrier.at = {what, line};
  barrier.predicates += predicate != 0;
  if (++barrier.arrived < threads) {
    self->wait = {what, line};
    barrier.waiting.push_back(self);
    suspend();
  } else {
    barrier.result = barrier.predicates;
    barrier.arrived = 0;
    barrier.predicates = 0;
    if constexpr (EMU_TRACED) {
      if (threads == block.size) {
        trace::block_synchronized();
      } else {
        View together;
        trace::hand_on(*self, together);
        for (Thread* thread : barrier.waiting) trace::hand_on(*thread, together);
        trace::take_over(*self, together);
        for (Thread* thread : barrier.waiting) trace::take_over(*thread, together);
      }
    }
    release(barrier.waiting, true);
  }
  return barrier.result;
}

void sync_warp(unsigned mask, int line) {
  meet(warp_barrier(block.warps[self->number / kWarp], mask), "__syncwarp()", line);
}

const Slot* exchange(unsigned mask, const void* data, std::size_t n, const char* what, int line) {
  WarpBarrier& barrier = warp_barrier(block.warps[self->number / kWarp], mask);
  const Slot* slots = barrier.slots[barrier.turn & 1];
  std::memcpy(barrier.slots[barrier.turn & 1][lane()], data, n);
  meet(barrier, what, line);
  return slots;
}

void shuffle(unsigned mask, void* value, std::size_t n, int source, const char* what, int line) {
  const Slot* slots = exchange(mask, value, n, what, line);
  std::memcpy(value, slots[source], n);
}

Votes vote(unsigned mask, int predicate, const char* what, int line) {
  enum : unsigned char { kNo = 0, kYes = 1 };  // 0xff: not here
  const unsigned char own = predicate ? kYes : kNo;
  const Slot* slots = exchange(mask, &own, 1, what, line);
  Votes votes{0, 0};
  for (int l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1) || slots[l][0] == 0xff) continue;
    votes.here |= 1u << l;
    if (slots[l][0] == kYes) votes.yes |= 1u << l;
  }
  return votes;
}

void atomic_read(const void* address, void* value, std::size_t n) {
  if constexpr (EMU_TRACED) {
    trace::access(address, static_cast<int>(n), trace::kAtomic, __builtin_return_address(0));
  }
  std::memcpy(value, address, n);
}

void atomic_write(void* address, const void* value, std::size_t n) {
  std::memcpy(address, value, n);
}

void launch(const LaunchConfig& config, void (*body)(const void*), const void* arguments) {
  if (call.failed) return;  // an earlier launch of this call
  if (const cudaError_t error = refusal(config)) {
    last_error = error;
    return;
  }
  if (free_fibers.empty() && !add_fiber()) {
    last_error = cudaErrorMemoryAllocation;
    return;
  }
  prepare_launch(config, body, arguments);
  const dim3 grid = config.grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; x += config.cluster) {
        blockIdx = {x, y, z};
        call.first_block = x;
        run_block();
        if (call.failed) {
          last_error = cudaErrorLaunchFailure;
          reset_fibers();
          trim_fibers();
          return;
        }
      }
    }
  }
  trim_fibers();
}

cudaError_t set_dynamic_shared_limit(const void* kernel, int bytes) {
  if (bytes < 0 || static_cast<std::size_t>(bytes) > kMaxDynamicShared) {
    return last_error = cudaErrorInvalidValue;
  }
  for (SharedLimit& limit : shared_limits) {
    if (limit.kernel == kernel) {
      limit.bytes = static_cast<std::size_t>(bytes);
      return cudaSuccess;
    }
  }
  shared_limits.push_back({kernel, static_cast<std::size_t>(bytes)});
  return cudaSuccess;
}

}  // namespace emu

cudaError_t cudaPeekAtLastError() {
  return emu::last_error;
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = emu::last_error;
  emu::last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration: return "cudaErrorInvalidConfiguration";
    case cudaErrorLaunchFailure: return "cudaErrorLaunchFailure";
  }
  return "cudaErrorUnknown";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorLaunchFailure: return "unspecified launch failure";
  }
  return "unknown error";
}

static int multiprocessors;  // that cudaDeviceGetAttribute tells of

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = emu::kMaxThreads; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = emu::kDefaultDynamicShared; break;
    case cudaDevAttrWarpSize: *value = emu::kWarp; break;
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;      // kHz
    case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;    // bits
    case cudaDevAttrL2CacheSize: *value = 16 * 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrComputeCapabilityMajor: *value = 9; break;
    case cudaDevAttrComputeCapabilityMinor: *value = 0; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = emu::kMaxDynamicShared + 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = emu::kMaxDynamicShared; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

// ------------------------------------------------------------------------- what Python calls

#pragma GCC visibility push(default)

extern "C" {

// Before the launcher, on the same operating-system thread. order_seed 0: threads run in order.
void emu_begin(int order_seed, int device_multiprocessors) {
  using namespace emu;
  multiprocessors = device_multiprocessors;
  in_thread_local_segment = 1;
  dl_iterate_phdr(find_segments, nullptr);
  call.failed = false;
  call.error[0] = 0;
  constexpr unsigned long long kSpread = 0x9e3779b97f4a7c15ull;  // odd: only a seed of 0 gives 0
  call.random = static_cast<unsigned long long>(order_seed) * kSpread;
  call.thread = pthread_self();
  last_error = cudaSuccess;
  catch_faults();
}

// After the launcher. Null, or why the run was given up; valid until the next emu_begin.
const char* emu_end() {
  emu::stop_catching_faults();
  return emu::call.failed ? emu::call.error : nullptr;
}

}  // extern "C"

#pragma GCC visibility pop
