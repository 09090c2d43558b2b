// emu_ptx.cpp: the twins of emu_ptx.h that touch memory or other lanes.
#include "emu_runtime.h"

namespace emu {
namespace {

void finish(const Copy& copy) {
  auto* to = static_cast<unsigned char*>(copy.shared);
  std::memcpy(to, copy.global, static_cast<std::size_t>(copy.source_bytes));
  std::memset(to + copy.source_bytes, 0, static_cast<std::size_t>(copy.bytes - copy.source_bytes));
}

constexpr unsigned kAllLanes = 0xffffffffu;

// The registers a and b of every lane, as exchanged.
struct Fragments {
  std::uint32_t a[4], b[2];
};

struct Matrices {
  const Slot* slots;

  Fragments of(int lane) const {
    Fragments f;
    std::memcpy(&f, slots[lane], sizeof f);
    return f;
  }
};

Matrices exchange_fragments(const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                            const char* what, int line) {
  const Fragments own{{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  return {exchange(kAllLanes, &own, sizeof own, what, line)};
}

float half_of(std::uint32_t pair, int which) {
  return half_bits_to_float(static_cast<std::uint16_t>(pair >> (16 * which)));
}

float tf32_of(std::uint32_t bits) {
  return bit_cast<float>(bits & 0xffffe000u);
}

// The lane's four elements of D: with g = lane / 4 and q = lane % 4, rows g and g + 8, columns 2q
// and 2q + 1.
template <class ElementA, class ElementB>
void multiply(float (&d)[4], const float (&c)[4], int depth, ElementA a, ElementB b) {
  const int g = lane() / 4, q = lane() % 4;
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * q + i % 2;
    double sum = c[i];
    for (int k = 0; k < depth; ++k) sum += static_cast<double>(a(row, k)) * b(k, column);
    sums[i] = static_cast<float>(sum);
  }
  std::memcpy(d, sums, sizeof sums);  // d may be c
}

}  // namespace

void copy_async(void* shared, const void* global, int bytes, int source_bytes, int line) {
  const auto misaligned = [=](const void* p) {
    return reinterpret_cast<std::uintptr_t>(p) % static_cast<std::uintptr_t>(bytes) != 0;
  };
  const uint3 t = self->index;
  if (source_bytes < 0 || source_bytes > bytes) {
    fail("thread (%u, %u, %u): cp.async of %d bytes cannot read %d, at line %d", t.x, t.y, t.z,
         bytes, source_bytes, line);
  }
  if (misaligned(shared) || misaligned(global)) {
    fail("thread (%u, %u, %u): cp.async of %d bytes at a misaligned address, at line %d", t.x, t.y,
         t.z, bytes, line);
  }
  const Copy copy{shared, global, bytes, source_bytes, __builtin_return_address(0)};
  if constexpr (EMU_TRACED) trace::copy_begins(copy);
  self->copies.push_back(copy);
}

void commit_copies() {
  self->group_ends.push_back(self->copies.size());
}

void wait_for_copies(int groups_left) {
  Thread& t = *self;
  const std::size_t left = static_cast<std::size_t>(groups_left);
  if (t.group_ends.size() <= left) return;
  const std::size_t groups = t.group_ends.size() - left;
  const std::size_t copies = t.group_ends[groups - 1];
  for (std::size_t i = 0; i < copies; ++i) {
    if constexpr (EMU_TRACED) trace::copy_ends(t.copies[i]);
    finish(t.copies[i]);
  }
  t.copies.erase(t.copies.begin(), t.copies.begin() + static_cast<std::ptrdiff_t>(copies));
  t.group_ends.erase(t.group_ends.begin(),
                     t.group_ends.begin() + static_cast<std::ptrdiff_t>(groups));
  for (std::size_t& end : t.group_ends) end -= copies;
}

void load_matrices(std::uint32_t* fragment, int count, bool transposed, const void* row, int line) {
  constexpr int kRowBytes = 16;
  unsigned char own[kRowBytes] = {};
  if (lane() < 8 * count) {  // the addresses of the other lanes are not used
    const uint3 t = self->index;
    if (reinterpret_cast<std::uintptr_t>(row) % kRowBytes) {
      fail("thread (%u, %u, %u): ldmatrix from a row that is not 16-byte aligned, at line %d", t.x,
           t.y, t.z, line);
    }
    if constexpr (EMU_TRACED) {
      trace::wrapped_access(row, kRowBytes, trace::kLoad, __builtin_return_address(0));
    }
    std::memcpy(own, row, sizeof own);
  }
  const Slot* rows = exchange(kAllLanes, own, sizeof own, "ldmatrix", line);
  const auto element = [&](int matrix, int r, int column) {
    std::uint16_t value;
    std::memcpy(&value, rows[8 * matrix + r] + 2 * column, sizeof value);
    return static_cast<std::uint32_t>(value);
  };
  const int r = lane() / 4, c = 2 * (lane() % 4);
  for (int m = 0; m < count; ++m) {
    const std::uint32_t low = transposed ? element(m, c, r) : element(m, r, c);
    const std::uint32_t high = transposed ? element(m, c + 1, r) : element(m, r, c + 1);
    fragment[m] = low | high << 16;
  }
}

void mma_m16n8k16_f16(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                      const float (&c)[4], int line) {
  const Matrices all = exchange_fragments(a, b, "mma.sync.m16n8k16", line);
  const auto element_a = [&](int row, int k) {
    const Fragments f = all.of(row % 8 * 4 + k % 8 / 2);
    return half_of(f.a[row / 8 + 2 * (k / 8)], k % 2);
  };
  const auto element_b = [&](int k, int column) {
    const Fragments f = all.of(column * 4 + k % 8 / 2);
    return half_of(f.b[k / 8], k % 2);
  };
  multiply(d, c, 16, element_a, element_b);
}

void mma_m16n8k8_tf32(float (&d)[4], const std::uint32_t (&a)[4], const std::uint32_t (&b)[2],
                      const float (&c)[4], int line) {
  const Matrices all = exchange_fragments(a, b, "mma.sync.m16n8k8", line);
  const auto element_a = [&](int row, int k) {
    const Fragments f = all.of(row % 8 * 4 + k % 4);
    return tf32_of(f.a[row / 8 + 2 * (k / 4)]);
  };
  const auto element_b = [&](int k, int column) {
    const Fragments f = all.of(column * 4 + k % 4);
    return tf32_of(f.b[k / 4]);
  };
  multiply(d, c, 8, element_a, element_b);
}

}  // namespace emu
