// emu_trace.cpp: watches the memory accesses of a traced library.
//
// The kernel's object file is compiled with -fsanitize=thread, which calls a hook (__tsan_read4 and
// so on, at the end of this file) before every load and store. The sanitizer's own library is not
// linked: these hooks check bounds and alignment, look for races in shared memory, and count what
// the memory system of a GPU would do.
//
// A GPU executes a load for a warp at once: one request. Here the lanes of a warp come one after the
// other; each leaves a track, and `follow` puts the warp together again.
#include <pthread.h>

#include <algorithm>
#include <limits>
#include <unordered_map>

#include "emu_runtime.h"

namespace emu {
namespace trace {
namespace {

constexpr int kSectorBytes = 32;
constexpr int kBanks = 32;
constexpr int kBankBytes = 4;
constexpr std::size_t kKeptRequests = 32;  // of a site, to be looked at
constexpr std::size_t kTrackEvents = 2048; // of a lane, before others are let catch up
constexpr int kPatience = 64;              // how often they are at a time

enum Space { kIgnored, kGlobal, kShared };

// The accesses of a warp that hardware would issue together.
struct Request {
  int warp;
  uint3 block_index;
  unsigned lanes = 0;
  unsigned char bytes[kWarp];
  std::uintptr_t address[kWarp];
};

// An instruction: a place in the code that accesses one space with one width.
struct Site {
  const void* pc;
  Space space;
  Op op;
  bool wrapped;  // made by a twin of emu_ptx.h
  int bytes;     // a lane's access
  long long requests = 0, lanes = 0, sectors = 0, wavefronts = 0, ideal_wavefronts = 0;
  std::vector<Request> kept;
};

struct Buffer {
  std::uintptr_t begin;
  std::size_t size;
  int index;  // as Python numbers them
};

bool counting, checking_races;
std::vector<Buffer> buffers;  // by address
Range main_stack;             // of the thread that calls: launch arguments live there
std::vector<Site> sites;
std::unordered_map<std::uint64_t, int> site_of_key;

// --------------------------------------------------------------------------------------- counts

// Lanes of a global access take one sector for every 32 bytes that they touch together.
int sectors_of(const Request& r, int first, int lanes) {
  std::uintptr_t touched[kWarp * 2];
  int n = 0;
  for (int l = first; l < first + lanes; ++l) {
    if (!(r.lanes >> l & 1)) continue;
    const std::uintptr_t last = (r.address[l] + r.bytes[l] - 1) / kSectorBytes;
    for (std::uintptr_t s = r.address[l] / kSectorBytes; s <= last; ++s) touched[n++] = s;
  }
  std::sort(touched, touched + n);
  return static_cast<int>(std::unique(touched, touched + n) - touched);
}

// Loads of 16 bytes go by quarter warps, and a sector at the seam of two counts twice: where rows
// start in the middle of a sector, an H100 counts 20 for 512 bytes in a row and not 17
// (figures/data/counters_k05_first.json; "four memory requests, one for each quarter-warp", said the
// CUDA C Programming Guide of compute capability 2.x).
int lanes_loaded_at_once(int bytes) {
  return bytes == 16 ? kWarp / 4 : kWarp;
}

// Shared memory serves 32 words a wavefront, one from each bank. Accesses wider than a word go by
// half warps: an H100 serves 16 bytes that are the same for a whole warp in two wavefronts
// (figures/data/counters.json, k04 and k05).
int lanes_at_once(int bytes) {
  return bytes <= kBankBytes ? kWarp : kWarp / 2;
}

struct Wavefronts {
  int taken, ideal;
};

// A part of a warp takes as many wavefronts as the worst bank has different words to give; at best
// the words are spread evenly over the banks.
Wavefronts wavefronts_of(const Request& r, int first, int lanes) {
  std::uintptr_t words[kWarp * 4];
  int n = 0;
  for (int l = first; l < first + lanes; ++l) {
    if (!(r.lanes >> l & 1)) continue;
    const std::uintptr_t last = (r.address[l] + r.bytes[l] - 1) / kBankBytes;
    for (std::uintptr_t w = r.address[l] / kBankBytes; w <= last; ++w) words[n++] = w;
  }
  std::sort(words, words + n);
  const auto end = std::unique(words, words + n);
  int in_bank[kBanks] = {}, worst = 0;
  for (auto w = words; w != end; ++w) worst = std::max(worst, ++in_bank[*w % kBanks]);
  return {worst, static_cast<int>(end - words + kBanks - 1) / kBanks};
}

void count(Site& site, const Request& request) {
  ++site.requests;
  site.lanes += __builtin_popcount(request.lanes);
  if (site.space == kGlobal) {
    const int lanes = site.op == kLoad ? lanes_loaded_at_once(site.bytes) : kWarp;
    for (int first = 0; first < kWarp; first += lanes) {
      site.sectors += sectors_of(request, first, lanes);
    }
  } else {
    const int lanes = lanes_at_once(site.bytes);
    for (int first = 0; first < kWarp; first += lanes) {
      const Wavefronts wavefronts = wavefronts_of(request, first, lanes);
      site.wavefronts += wavefronts.taken;
      site.ideal_wavefronts += wavefronts.ideal;
    }
  }
  if (site.kept.size() < kKeptRequests) site.kept.push_back(request);
}

// ----------------------------------------------------------------- the warp, put together again

// Hardware keeps the lanes of a warp together where it can: after a branch they meet again, and with
// every turn of a loop. What a lane did stands in its track: accesses, and jumps back to the head of
// a loop. From the tracks of a warp, the lanes whose next event is the earliest in the code go first,
// and together if it is the same one (S. Collange, "Stack-less SIMT reconvergence at low cost", 2011,
// hal-00622654). One that jumps back waits at the loop's end for those that are still in that turn.
// Calls count as if they were inlined, as nvcc does it: what happens in one happens where it is made.
//
// For this the compiler calls a hook in every basic block (-fsanitize-coverage=trace-pc), whose
// addresses are in the order of the source (-O0), and at both ends of every function.

std::uint32_t in_library(const void* pc) {
  return static_cast<std::uint32_t>(static_cast<const unsigned char*>(pc) - library.begin);
}

// Calls that a lane is in: the last made at address `call`, within the calls `parent`.
struct Calls {
  std::uint32_t parent, call, depth;
};
std::vector<Calls> all_calls = {{0, 0, 0}};
std::unordered_map<std::uint64_t, std::uint32_t> number_of_calls;

struct Place {
  std::uint32_t calls, pc;  // number in all_calls; address in the innermost function

  bool operator==(Place other) const { return calls == other.calls && pc == other.pc; }
};

// The same place in terms of the caller.
Place outward(Place p) {
  return {all_calls[p.calls].parent, all_calls[p.calls].call};
}

// -1, 0, 1: a comes before b in the code, is b, comes after it.
__attribute__((noinline)) int compare(Place a, Place b) {
  while (a.calls != b.calls) {  // to the function that both are in
    const std::uint32_t depth = all_calls[a.calls].depth, other = all_calls[b.calls].depth;
    if (depth >= other) a = outward(a);
    if (other >= depth) b = outward(b);
  }
  return a.pc < b.pc ? -1 : a.pc > b.pc;
}

struct Loop {
  std::uint32_t head, end;  // addresses: of the first block, of the last jump back to it
};
std::vector<Loop> loops;
std::unordered_map<std::uint32_t, std::size_t> loop_with_head;

struct Event {
  Place at;
  int site;                // of an access; kTurn: jumps back, `at` is the loop's first block
  int count;               // bytes touched; jumps with no access between
  std::uintptr_t address;  // number in loops

  Event(Place at, int site, int count, std::uintptr_t address)
      : at(at), site(site), count(count), address(address) {}
};
constexpr int kTurn = -1;

struct Track {
  std::uint32_t calls = 0;
  Place last{};  // access or block
  std::vector<Event> events;
  std::size_t done = 0;
};
Track tracks[kMaxThreads];

// -1, 1: a comes before b, after it; 0: they are executed together.
int compare(const Event& a, const Event& b) {
  if (a.site == b.site && a.at == b.at) return 0;
  const bool turns[] = {a.site == kTurn, b.site == kTurn};
  const Place place_a = turns[0] ? Place{a.at.calls, loops[a.address].end} : a.at;
  const Place place_b = turns[1] ? Place{b.at.calls, loops[b.address].end} : b.at;
  if (const int order = compare(place_a, place_b)) return order;
  if (turns[0] && turns[1]) return a.at.pc > b.at.pc ? -1 : a.at.pc < b.at.pc;  // the inner loop's
  if (turns[0] || turns[1]) return turns[0] - turns[1];
  // one instruction that is two accesses: a copy loads, then stores
  const Op op_a = sites[static_cast<std::size_t>(a.site)].op;
  const Op op_b = sites[static_cast<std::size_t>(b.site)].op;
  return op_a != op_b ? (op_a < op_b ? -1 : 1) : (a.site > b.site) - (a.site < b.site);
}

void count_together(int warp, unsigned lanes, const Event& event) {
  Request request;
  request.warp = warp;
  request.block_index = blockIdx;
  request.lanes = lanes;
  for (int l = 0; l < kWarp; ++l) {
    if (!(lanes >> l & 1)) continue;
    const Track& track = tracks[warp * kWarp + l];
    request.address[l] = track.events[track.done].address;
    request.bytes[l] = static_cast<unsigned char>(track.events[track.done].count);
  }
  count(sites[static_cast<std::size_t>(event.site)], request);
}

// Until the first of them makes an access again, or leaves the loop.
void turn_together(int warp, unsigned lanes) {
  const auto next = [&](int l) -> Event& {
    Track& track = tracks[warp * kWarp + l];
    return track.events[track.done];
  };
  int turns = std::numeric_limits<int>::max();
  for (int l = 0; l < kWarp; ++l) {
    if (lanes >> l & 1) turns = std::min(turns, next(l).count);
  }
  for (int l = 0; l < kWarp; ++l) {
    if ((lanes >> l & 1) && !(next(l).count -= turns)) ++tracks[warp * kWarp + l].done;
  }
}

// Takes a warp along its tracks: as far as they go, or else until a lane that could run on has
// nothing more in its own, since it may be the one to go first.
void follow(int warp, bool to_the_end) {
  const int first_thread = warp * kWarp, n = std::min(block.size - first_thread, kWarp);
  for (;;) {
    const Event* earliest = nullptr;
    unsigned lanes = 0;
    bool unknown = false;
    for (int l = 0; l < n; ++l) {
      const Track& track = tracks[first_thread + l];
      if (track.done == track.events.size()) {
        const Thread& thread = block.threads[first_thread + l];
        unknown |= !thread.exited && !thread.wait.what;
        continue;
      }
      const Event& event = track.events[track.done];
      const int order = earliest ? compare(event, *earliest) : -1;
      if (order < 0) {
        earliest = &event;
        lanes = 0;
      }
      if (order <= 0) lanes |= 1u << l;
    }
    if (!earliest || (unknown && !to_the_end)) break;
    if (earliest->site == kTurn) {
      turn_together(warp, lanes);
    } else {
      count_together(warp, lanes, *earliest);
      for (int l = 0; l < n; ++l) tracks[first_thread + l].done += lanes >> l & 1;
    }
  }
  for (int l = 0; l < n; ++l) {
    Track& track = tracks[first_thread + l];
    track.events.erase(track.events.begin(),
                       track.events.begin() + static_cast<std::ptrdiff_t>(track.done));
    track.done = 0;
  }
}

void close_block() {
  for (int warp = 0; warp * kWarp < block.size; ++warp) follow(warp, true);
}

// A lane that runs far ahead of its warp lets the others catch up, so that tracks stay bounded.
void let_others_catch_up(const Track& track) {
  for (int turn = 1; track.events.size() >= kTrackEvents; ++turn) {
    yield();
    follow(self->number / kWarp, turn == kPatience);
  }
}

void add_event(Track& track, Place at, int site, int count, std::uintptr_t address) {
  if (track.events.size() >= kTrackEvents) let_others_catch_up(track);
  track.events.emplace_back(at, site, count, address);
}

void add_access(int site, const void* pc, std::uintptr_t address, int bytes) {
  Track& track = tracks[self->number];
  track.last = {track.calls, in_library(pc)};
  add_event(track, track.last, site, bytes, address);
}

std::size_t loop_number(std::uint32_t head) {
  static std::size_t last[1024];  // most turns are of few loops
  std::size_t& number = last[head % 1024];
  if (number >= loops.size() || loops[number].head != head) {
    const auto [found, is_new] = loop_with_head.emplace(head, loops.size());
    if (is_new) loops.push_back({head, 0});
    number = found->second;
  }
  return number;
}

// Whether the lane that jumps from `from` back to `to` has left the loop of an event, made no access
// after its last turn there, and so keeps nobody waiting by it.
bool is_over(const Event& turn, Place from, Place to) {
  return turn.site == kTurn && turn.at.calls == to.calls && turn.at.pc > to.pc &&
         loops[turn.address].end < from.pc;
}

// The running lane comes to a basic block that lies before the last one, or is it.
__attribute__((noinline)) void jump_back(Track& track, Place from, Place to) {
  while (all_calls[from.calls].depth > all_calls[to.calls].depth) from = outward(from);
  std::vector<Event>& events = track.events;
  while (!events.empty() && is_over(events.back(), from, to)) events.pop_back();
  const bool again = !events.empty() && events.back().site == kTurn && events.back().at == to;
  const std::size_t loop = again ? events.back().address : loop_number(to.pc);
  loops[loop].end = std::max(loops[loop].end, from.pc);
  if (again) {
    ++events.back().count;
  } else {
    add_event(track, to, kTurn, 1, loop);
  }
}

// Forward jumps leave no trace: where a lane waits for others is told by its next access.
void enter_basic_block(const void* pc) {
  Track& track = tracks[self->number];
  const Place from = track.last, at{track.calls, in_library(pc)};
  track.last = at;
  const bool forward = from.calls == at.calls ? from.pc < at.pc : compare(from, at) < 0;
  if (!forward) jump_back(track, from, at);
}

void enter_function(const void* call) {
  Track& track = tracks[self->number];
  const std::uint32_t caller = track.calls, pc = in_library(call);
  static std::uint32_t last[1024];  // most calls are a few
  std::uint32_t& number = last[(pc ^ caller << 4) % 1024];
  if (!number || all_calls[number].parent != caller || all_calls[number].call != pc) {
    const std::uint64_t key = std::uint64_t{caller} << 32 | pc;
    const auto next = static_cast<std::uint32_t>(all_calls.size());
    const auto [found, is_new] = number_of_calls.emplace(key, next);
    if (is_new) all_calls.push_back({caller, pc, all_calls[caller].depth + 1});
    number = found->second;
  }
  track.calls = number;
}

void leave_function() {
  Track& track = tracks[self->number];
  track.calls = all_calls[track.calls].parent;
}

// ------------------------------------------------------------------------- where an address lies

int site_number(const void* pc, Space space, Op op, int bytes, bool wrapped) {
  const auto offset = static_cast<std::uint64_t>(static_cast<const unsigned char*>(pc) -
                                                 library.begin);
  const std::uint64_t key = offset << 16 | static_cast<std::uint64_t>(bytes) << 8 |
                            static_cast<std::uint64_t>(op) << 4 | static_cast<std::uint64_t>(space);
  static std::uint64_t last_key[1024];  // most accesses come from few sites
  static int last_site[1024];
  const std::size_t slot = (key >> 16 ^ key >> 4) % 1024;
  const auto index = static_cast<std::size_t>(last_site[slot]);
  if (last_key[slot] == key && index < sites.size() && sites[index].pc == pc) {
    return last_site[slot];
  }
  const auto [found, is_new] = site_of_key.emplace(key, static_cast<int>(sites.size()));
  if (is_new) sites.push_back(Site{pc, space, op, wrapped, bytes, 0, 0, 0, 0, 0, {}});
  last_key[slot] = key;
  last_site[slot] = found->second;
  return found->second;
}

const char* verb(Op op) {
  return op == kLoad ? "loads" : op == kStore ? "stores" : "updates";
}

// Python puts the line for `{pc:...}` (1: of the caller of the wrapper) and a name for `{buffer:}`.
#define EMU_PC "line {pc:%x:%d}"

[[noreturn]] void out_of_shared(std::uintptr_t address, int bytes, Op op, const void* pc,
                                bool wrapped) {
  const uint3 t = self->index;
  const auto offset =
      static_cast<long long>(address - reinterpret_cast<std::uintptr_t>(dynamic_shared()));
  fail("out of bounds: thread (%u, %u, %u) %s %d bytes at offset %lld of the %zu bytes of dynamic "
       "shared memory, " EMU_PC,
       t.x, t.y, t.z, verb(op), bytes, offset, block.dynamic_shared, in_library(pc), wrapped);
}

[[noreturn]] void out_of_buffers(std::uintptr_t address, int bytes, Op op, const void* pc,
                                 bool wrapped) {
  const uint3 t = self->index;
  const Buffer* nearest = nullptr;
  std::uintptr_t least = ~std::uintptr_t{0};
  for (const Buffer& b : buffers) {
    const std::uintptr_t distance = address < b.begin ? b.begin - address : address - b.begin;
    const std::uintptr_t beyond =
        address < b.begin ? distance : distance - std::min(distance, b.size);
    if (beyond < least) {
      least = beyond;
      nearest = &b;
    }
  }
  if (!nearest) {
    fail("out of bounds: thread (%u, %u, %u) %s %d bytes at %#zx, and no buffer is known, " EMU_PC,
         t.x, t.y, t.z, verb(op), bytes, address, in_library(pc), wrapped);
  }
  fail("out of bounds: thread (%u, %u, %u) %s %d bytes at offset %lld of buffer {buffer:%d} of %zu "
       "bytes, " EMU_PC,
       t.x, t.y, t.z, verb(op), bytes, static_cast<long long>(address - nearest->begin),
       nearest->index, nearest->size, in_library(pc), wrapped);
}

// The registered buffer that holds the address, or null.
const Buffer* buffer_of(std::uintptr_t address) {
  auto after = std::upper_bound(
      buffers.begin(), buffers.end(), address,
      [](std::uintptr_t a, const Buffer& b) { return a < b.begin; });
  if (after == buffers.begin()) return nullptr;
  const Buffer& b = *--after;
  return address - b.begin < b.size ? &b : nullptr;
}

bool is_local(const void* p) {
  return Range{fiber->stack, kStackBytes}.contains(p);
}

// Ends the call if no memory of the kernel's lies there.
Space space_of(const void* p, int bytes, Op op, const void* pc, bool wrapped) {
  if (is_local(p)) return kIgnored;

  const auto address = reinterpret_cast<std::uintptr_t>(p);
  const Range room{dynamic_shared_room, kSharedMargin + kMaxCluster * kSharedStride};
  if (room.contains(p)) {
    const Range all = all_dynamic_shared();
    const auto from = static_cast<std::size_t>(static_cast<const unsigned char*>(p) - all.begin);
    const std::size_t rank = all.contains(p) ? from / kSharedStride : cluster_rank;
    const bool there = static_cast<int>(rank) * block.block_size < block.size;
    const Range launched{all.begin + rank * kSharedStride, there ? block.dynamic_shared : 0};
    const auto* last = static_cast<const unsigned char*>(p) + bytes - 1;
    if (!launched.contains(p) || !launched.contains(last)) {
      out_of_shared(address, bytes, op, pc, wrapped);
    }
    return kShared;
  }
  if (library.contains(p)) return kIgnored;  // threadIdx, __constant__, string literals
  if (static_shared.contains(p)) return kShared;
  if (const Buffer* b = buffer_of(address)) {
    const std::size_t offset = address - b->begin;
    if (offset + static_cast<std::size_t>(bytes) <= b->size) return kGlobal;
  } else if (main_stack.contains(p)) {
    return kIgnored;  // launch arguments
  }
  out_of_buffers(address, bytes, op, pc, wrapped);
}

// ---------------------------------------------------------------------------------------- races

// Two accesses of one byte of shared memory, at least one of them a store, race unless a barrier
// stands between them. Each thread has a clock, which moves on whenever it hands on what it has
// done; clocks[a][b] is how far a has seen b. __syncwarp(), named barriers and mbarriers pass that
// on; __syncthreads() shows everything to everybody. Shuffles and votes order nothing: "they do not
// imply a memory barrier".
//
// wgmma and bulk copies access shared memory through the asynchronous proxy. An ordinary store is
// ordered before them only if a fence.proxy.async stands between: fenced[a][b] is how far a has
// seen b by way of such a fence.
struct Toucher {
  short thread = -1;
  bool async = false;  // through the asynchronous proxy
  unsigned stamp = 0;  // of its own clock
  int site = 0;
};

struct Cell {
  unsigned epoch = 0;  // older readers are forgotten, and writers of another block
  Toucher writer;    // the last ordinary store
  Toucher atomic;    // the last atomic operation since
  Toucher reader;    // the last
  Toucher mate;      // the last of the same warp, but another lane
  Toucher stranger;  // the last of another warp
  unsigned touched = 0, written = 0;  // moments of the last access, the last store
};

unsigned epoch;        // grows at every barrier of a block, and with every block
unsigned first_epoch;  // of this block
unsigned clocks[kMaxThreads][kMaxThreads], fenced[kMaxThreads][kMaxThreads];
unsigned clocks_at_barrier[kMaxThreads], fenced_at_barrier[kMaxThreads];  // the block's last
unsigned moments;         // accesses to bytes of shared memory so far
bool fences;              // whether there was one in this block
std::vector<Cell> cells;  // dynamic, then static shared memory, a byte each

bool ordered(const Toucher& before, const Thread& now) {
  if (before.thread < 0 || before.thread == now.number) return true;
  return std::max(clocks[now.number][before.thread], clocks_at_barrier[before.thread]) >=
         before.stamp;
}

bool ordered_by_fence(const Toucher& before, const Thread& now) {
  if (before.thread < 0 || before.async) return true;
  return std::max(fenced[now.number][before.thread], fenced_at_barrier[before.thread]) >=
         before.stamp;
}

// to = the later of both, thread by thread
void join(unsigned* to, const unsigned* from) {
  for (int t = 0; t < block.size; ++t) to[t] = std::max(to[t], from[t]);
}

[[noreturn]] void report_race(const Toucher& before, bool before_wrote, const Thread& now, Op op,
                              int site, std::size_t cell, const char* missing = "barrier") {
  const uint3 a = now.index;
  const uint3 b = block.threads[before.thread].index;
  const Site& here = sites[static_cast<std::size_t>(site)];
  const Site& there = sites[static_cast<std::size_t>(before.site)];
  const std::size_t in_dynamic = all_dynamic_shared().size;
  const bool dynamic = cell < in_dynamic;
  fail("race in shared memory: thread (%u, %u, %u) %s at " EMU_PC
       " what thread (%u, %u, %u) %s at " EMU_PC
       " with no %s between (%s shared memory, byte %zu)",
       a.x, a.y, a.z, verb(op), in_library(here.pc), here.wrapped, b.x, b.y, b.z,
       before_wrote ? "stores" : "loads", in_library(there.pc), there.wrapped, missing,
       dynamic ? "dynamic" : "static", dynamic ? cell % kSharedStride : cell - in_dynamic);
}

void remember_reader(Cell& cell, const Toucher& reader) {
  const int warp = reader.thread / kWarp;
  if (cell.reader.thread >= 0 && cell.reader.thread != reader.thread) {
    if (cell.reader.thread / kWarp == warp) {
      cell.mate = cell.reader;
    } else {
      cell.stranger = cell.reader;
      cell.mate = {};
    }
  }
  cell.reader = reader;
}

void check_cell(std::size_t index, Op op, const Thread& thread, int site, bool async = false) {
  Cell& cell = cells[index];
  if (cell.epoch != epoch) {
    if (cell.epoch < first_epoch) cell.writer = {};
    cell.atomic = cell.reader = cell.mate = cell.stranger = {};
    cell.epoch = epoch;
  }
  if (!ordered(cell.writer, thread)) report_race(cell.writer, true, thread, op, site, index);
  if (op != kAtomic && !ordered(cell.atomic, thread)) {
    report_race(cell.atomic, true, thread, op, site, index);
  }
  for (const Toucher* before : {&cell.writer, &cell.atomic}) {
    if (!async || ordered_by_fence(*before, thread)) continue;
    report_race(*before, true, thread, op, site, index, "fence.proxy.async and barrier");
  }
  cell.touched = ++moments;
  if (op != kLoad) cell.written = moments;
  const unsigned stamp = clocks[thread.number][thread.number];
  const Toucher now{static_cast<short>(thread.number), async, stamp, site};
  if (op == kLoad) {
    remember_reader(cell, now);
    return;
  }
  for (const Toucher* reader : {&cell.reader, &cell.mate, &cell.stranger}) {
    if (!ordered(*reader, thread)) report_race(*reader, false, thread, op, site, index);
  }
  if (op == kAtomic) {
    cell.atomic = now;
  } else {
    cell.writer = now;
    cell.atomic = {};
  }
  cell.reader = cell.mate = cell.stranger = {};
}

std::size_t cell_number(const void* p) {
  const Range dynamic = all_dynamic_shared();
  const bool in_dynamic = dynamic.contains(p);
  const auto* begin = in_dynamic ? dynamic.begin : static_shared.begin;
  return (in_dynamic ? 0 : dynamic.size) +
         static_cast<std::size_t>(static_cast<const unsigned char*>(p) - begin);
}

void check_race(const void* p, int bytes, Op op, const Thread& thread, int site, int step = 1,
                bool async = false) {
  const std::size_t cell = cell_number(p);
  for (int i = 0; i < bytes; i += step) {
    check_cell(cell + static_cast<std::size_t>(i), op, thread, site, async);
  }
}

// An asynchronous operation may take place at any time until it was waited for: whoever has touched
// its bytes (for a read: has stored there) since it began races with it, whatever barriers there
// were.
void check_undisturbed(const void* p, int bytes, Op op, const Thread& thread, int site,
                       unsigned begun, int step) {
  const std::size_t first = cell_number(p);
  for (int i = 0; i < bytes; i += step) {
    const Cell& cell = cells[first + static_cast<std::size_t>(i)];
    if ((op == kLoad ? cell.written : cell.touched) <= begun) continue;
    const bool wrote = cell.written > begun;
    const Toucher& writer = cell.atomic.thread >= 0 ? cell.atomic : cell.writer;
    const Toucher& other = wrote ? writer : cell.reader;
    if (other.thread < 0) continue;  // forgotten at a barrier
    report_race(other, wrote, thread, op, site, first + static_cast<std::size_t>(i),
                "wait for the asynchronous copy or product");
  }
}

// -------------------------------------------------------------------------------------- accesses

// bytes: of the instruction, a power of two; touched: of them, those really accessed.
void note(const void* p, int bytes, int touched, Op op, const void* pc, bool wrapped) {
  const Space space = space_of(p, touched, op, pc, wrapped);
  if (space == kIgnored) return;
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  if (address % static_cast<std::uintptr_t>(bytes)) {
    const uint3 t = self->index;
    fail("misaligned: thread (%u, %u, %u) %s %d bytes at an address that is no multiple of %d, "
         EMU_PC, t.x, t.y, t.z, verb(op), bytes, bytes, in_library(pc), wrapped);
  }
  const int site = site_number(pc, space, op, bytes, wrapped);
  if (checking_races && space == kShared) check_race(p, touched, op, *self, site);
  if (counting) add_access(site, pc, address, touched);
}

bool watching() {
  return self && (counting || checking_races);
}

// A struct that is no vector type: nvcc copies it in pieces of its alignment, up to 16 bytes.
void note_range(const void* p, std::size_t bytes, Op op, const void* pc) {
  const auto address = reinterpret_cast<std::uintptr_t>(p);
  const std::size_t both = address | bytes | 16;
  const std::size_t piece = both & (~both + 1);
  for (std::size_t at = 0; at < bytes; at += piece) {
    note(static_cast<const unsigned char*>(p) + at, static_cast<int>(piece),
         static_cast<int>(piece), op, pc, false);
  }
}

void find_main_stack() {
  pthread_attr_t attributes;
  void* low = nullptr;
  std::size_t size = 0;
  pthread_getattr_np(pthread_self(), &attributes);
  pthread_attr_getstack(&attributes, &low, &size);
  pthread_attr_destroy(&attributes);
  main_stack = {static_cast<unsigned char*>(low), size};
}

// A bulk copy in global memory: counted as one request of one lane, with all the sectors that it
// moves.
void note_bulk(const void* global, int bytes, Op op, const void* pc) {
  if (bytes == 0) return;
  constexpr int kUnit = 16;
  if (space_of(global, bytes, op, pc, true) != kGlobal) {
    fail("a bulk copy of memory that is not global, " EMU_PC, in_library(pc), 1);
  }
  if (!counting) return;
  const auto address = reinterpret_cast<std::uintptr_t>(global);
  Site& site = sites[static_cast<std::size_t>(site_number(pc, kGlobal, op, kUnit, true))];
  const auto end = address + static_cast<std::uintptr_t>(bytes);
  ++site.requests;
  ++site.lanes;
  site.sectors += static_cast<long long>((end - 1) / kSectorBytes - address / kSectorBytes + 1);
}

int bulk_site(const BulkLoad& load) {
  return site_number(load.pc, kShared, kStore, 16, true);
}

int copy_store_site(const Copy& copy) {
  return site_number(copy.pc, kShared, kStore, copy.bytes, true);
}

}  // namespace

void access(const void* p, int bytes, Op op, const void* pc) {
  if (watching() && !is_local(p)) note(p, bytes, bytes, op, pc, false);
}

void copy_begins(const Copy& copy) {
  if (!watching()) return;
  if (copy.source_bytes) {
    note(copy.global, copy.bytes, copy.source_bytes, kLoad, copy.pc, true);
  }
  note(copy.shared, copy.bytes, copy.bytes, kStore, copy.pc, true);
}

void copy_ends(const Copy& copy) {
  if (!self || !checking_races) return;
  check_race(copy.shared, copy.bytes, kStore, *self, copy_store_site(copy));
}

void wrapped_access(const void* address, int bytes, Op op, const void* pc) {
  if (watching()) note(address, bytes, bytes, op, pc, true);
}

void barrier_word(const void* address, int bytes, Op op, const void* pc) {
  if (checking_races) {
    check_race(address, bytes, op, *self, site_number(pc, kShared, op, bytes, true));
  }
}

unsigned moment() {
  return moments;
}

// Of asynchronous reads each half is checked, not each byte: there are many, and nothing smaller is
// stored.
constexpr int kHalf = 2;

void async_read_begins(const void* shared, int bytes, const Thread& thread, const void* pc) {
  if (!checking_races) return;
  const int site = site_number(pc, kShared, kLoad, 16, true);
  check_race(shared, bytes, kLoad, thread, site, kHalf, true);
}

void async_read_ends(const void* shared, int bytes, const Thread& thread, const void* pc,
                     unsigned begun) {
  if (!checking_races) return;
  const int site = site_number(pc, kShared, kLoad, 16, true);
  check_undisturbed(shared, bytes, kLoad, thread, site, begun, kHalf);
  check_race(shared, bytes, kLoad, thread, site, kHalf, true);
}

void bulk_load_begins(const BulkLoad& load) {
  if (!watching()) return;
  if (load.from_shared) {
    async_read_begins(load.from, load.bytes, *self, load.pc);
  } else {
    note_bulk(load.from, load.bytes, kLoad, load.pc);
  }
  if (checking_races) check_race(load.shared, load.bytes, kStore, *self, bulk_site(load), 1, true);
}

void bulk_load_ends(const BulkLoad& load) {
  if (!checking_races) return;
  if (load.from_shared) {
    async_read_ends(load.from, load.bytes, *load.thread, load.pc, load.moment);
  }
  const int site = bulk_site(load);
  check_undisturbed(load.shared, load.bytes, kStore, *load.thread, site, load.moment, 1);
  check_race(load.shared, load.bytes, kStore, *load.thread, site, 1, true);
}

void bulk_store_begins(const BulkStore& store) {
  if (!watching()) return;
  note_bulk(store.global, store.bytes, kStore, store.pc);
  async_read_begins(store.shared, store.bytes, *self, store.pc);
}

void proxy_fence() {
  if (!checking_races) return;
  const int t = self->number;
  fences = true;
  join(fenced[t], clocks[t]);
  join(fenced[t], clocks_at_barrier);
  ++clocks[t][t];
}

void hand_on(const Thread& thread, View& to) {
  if (!checking_races) return;
  const auto size = static_cast<std::size_t>(block.size);
  to.seen.resize(size);
  to.fenced.resize(size);
  join(to.seen.data(), clocks[thread.number]);
  if (fences) join(to.fenced.data(), fenced[thread.number]);
  ++clocks[thread.number][thread.number];
}

void take_over(const Thread& thread, const View& from) {
  if (!checking_races || from.seen.empty()) return;
  join(clocks[thread.number], from.seen.data());
  if (fences) join(fenced[thread.number], from.fenced.data());
}

void begin_block() {
  first_epoch = ++epoch;
  for (int t = 0; t < block.size; ++t) {  // after an error, tracks end anywhere
    tracks[t].calls = 0;
    tracks[t].last = {};
    tracks[t].events.clear();
    tracks[t].done = 0;
  }
  if (!checking_races) return;
  for (int t = 0; t < block.size; ++t) {
    std::fill(clocks[t], clocks[t] + block.size, 0u);
    std::fill(fenced[t], fenced[t] + block.size, 0u);
    clocks[t][t] = 1;
    clocks_at_barrier[t] = fenced_at_barrier[t] = 0;
  }
  fences = false;
}

void end_block() {
  if (counting) close_block();
}

void block_synchronized() {
  if (counting) close_block();
  ++epoch;
  if (!checking_races) return;
  for (int t = 0; t < block.size; ++t) {
    clocks_at_barrier[t] = clocks[t][t]++;
    if (fences) join(fenced_at_barrier, fenced[t]);
  }
  for (int t = 0; t < block.size; ++t) {
    const Thread& thread = block.threads[t];
    for (const Copy& copy : thread.copies) {
      check_race(copy.shared, copy.bytes, kStore, thread, copy_store_site(copy));
    }
    trace_reads_under_way(thread);
  }
}

void warp_synchronized(int warp, unsigned lanes, bool orders_memory) {
  if (counting && lanes == block.warps[warp].live) follow(warp, true);
  if (!checking_races || !orders_memory) return;
  static View together;  // what any of them has seen, all of them have now
  together.seen.clear();
  together.fenced.clear();
  for (int l = 0; l < kWarp; ++l) {
    if (lanes >> l & 1) hand_on(block.threads[warp * kWarp + l], together);
  }
  for (int l = 0; l < kWarp; ++l) {
    if (lanes >> l & 1) take_over(block.threads[warp * kWarp + l], together);
  }
}

}  // namespace trace
}  // namespace emu

// ------------------------------------------------------------------------- what Python calls

#pragma GCC visibility push(default)

extern "C" {

// After emu_begin, before every launcher: what to watch in its kernels.
void emu_watch(int count, int races, int n, const std::uintptr_t* addresses,
               const std::size_t* sizes) {
  using namespace emu;
  using namespace emu::trace;
  counting = count;
  checking_races = races;
  buffers.clear();
  for (int i = 0; i < n; ++i) {
    if (sizes[i]) buffers.push_back({addresses[i], sizes[i], i});
  }
  std::sort(buffers.begin(), buffers.end(),
            [](const auto& a, const auto& b) { return a.begin < b.begin; });
  if (!count && !races) return;
  find_main_stack();
  sites.clear();
  site_of_key.clear();
  moments = 0;
  if (races) cells.assign(all_dynamic_shared().size + static_shared.size, Cell{});
}

struct EmuSite {
  std::uint64_t pc;  // from the start of the library
  std::int32_t wrapped, shared, op, bytes;
  std::int64_t requests, lanes, sectors, wavefronts, ideal_wavefronts;
  std::int32_t kept;  // requests that emu_request can show
};

int emu_site_count() {
  return static_cast<int>(emu::trace::sites.size());
}

void emu_site(int i, EmuSite* to) {
  using namespace emu::trace;
  const Site& s = sites[static_cast<std::size_t>(i)];
  *to = {in_library(s.pc), s.wrapped, s.space == kShared, s.op, s.bytes, s.requests, s.lanes,
         s.sectors, s.wavefronts, s.ideal_wavefronts, static_cast<std::int32_t>(s.kept.size())};
}

struct EmuRequest {
  std::uint32_t block[3], lanes;
  std::int32_t warp;
  std::int32_t where[32];   // number of the buffer; -1 dynamic, -2 static shared memory
  std::int64_t offset[32];  // bytes
};

void emu_request(int site, int i, EmuRequest* to) {
  using namespace emu;
  using namespace emu::trace;
  const Request& r = sites[static_cast<std::size_t>(site)].kept[static_cast<std::size_t>(i)];
  const Range dynamic = all_dynamic_shared();
  *to = {};
  to->block[0] = r.block_index.x;
  to->block[1] = r.block_index.y;
  to->block[2] = r.block_index.z;
  to->lanes = r.lanes;
  to->warp = r.warp;
  for (int l = 0; l < kWarp; ++l) {
    if (!(r.lanes >> l & 1)) continue;
    const auto* p = reinterpret_cast<const unsigned char*>(r.address[l]);
    if (const Buffer* b = buffer_of(r.address[l])) {
      to->where[l] = b->index;
      to->offset[l] = static_cast<std::int64_t>(r.address[l] - b->begin);
    } else {
      to->where[l] = dynamic.contains(p) ? -1 : -2;
      to->offset[l] = p - (dynamic.contains(p) ? dynamic.begin : static_shared.begin);
    }
  }
}

// The hooks. The compiler calls them before the access; the return address tells it apart.
#define EMU_HOOK(name, bytes, op)                                                 \
  void __tsan_##name(void* p) {                                                   \
    emu::trace::access(p, bytes, emu::trace::op, __builtin_return_address(0));    \
  }
#define EMU_HOOKS(bytes)                        \
  EMU_HOOK(read##bytes, bytes, kLoad)           \
  EMU_HOOK(write##bytes, bytes, kStore)         \
  EMU_HOOK(unaligned_read##bytes, bytes, kLoad) \
  EMU_HOOK(unaligned_write##bytes, bytes, kStore)
EMU_HOOKS(1)
EMU_HOOKS(2)
EMU_HOOKS(4)
EMU_HOOKS(8)
EMU_HOOKS(16)

void __tsan_read_range(void* p, std::size_t bytes) {
  using namespace emu::trace;
  if (watching()) note_range(p, bytes, kLoad, __builtin_return_address(0));
}
void __tsan_write_range(void* p, std::size_t bytes) {
  using namespace emu::trace;
  if (watching()) note_range(p, bytes, kStore, __builtin_return_address(0));
}
void __tsan_init() {}
void __tsan_func_entry(void* call) {
  if (emu::self && emu::trace::counting) emu::trace::enter_function(call);
}
void __tsan_func_exit() {
  if (emu::self && emu::trace::counting) emu::trace::leave_function();
}
void __sanitizer_cov_trace_pc() {
  if (!emu::self || !emu::trace::counting) return;
  emu::trace::enter_basic_block(__builtin_return_address(0));
}
// std::atomic: a launcher's, on the host.
unsigned __tsan_atomic32_load(const volatile unsigned* p, int) {
  return __atomic_load_n(p, __ATOMIC_SEQ_CST);
}
void __tsan_atomic32_store(volatile unsigned* p, unsigned value, int) {
  __atomic_store_n(p, value, __ATOMIC_SEQ_CST);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}

}  // extern "C"

#pragma GCC visibility pop
