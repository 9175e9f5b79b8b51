// wgmma: operands by their descriptors, accumulators that may not be touched while a product is in flight.
#include <cmath>
#include <cstring>

#include "machine.h"

namespace longattn::emulator {

namespace {

uint64_t hash(const void* data, int words) {
  const uint32_t* word = static_cast<const uint32_t*>(data);
  uint64_t h = 1469598103934665603ull;
  for (int i = 0; i < words; ++i) h = (h ^ word[i]) * 1099511628211ull;
  return h;
}

RegisterArray& array_of(Thread& thread, const void* data, int count) {
  for (RegisterArray& array : thread.arrays)
    if (array.data == data && array.count == count) return array;
  thread.arrays.push_back({data, count});
  return thread.arrays.back();
}

void check_fenced(Thread& thread, const void* data, int count, Location at, const char* what) {
  if (!thread.fences) report(at, "a product without any wgmma.fence before it");
  const RegisterArray& array = array_of(thread, data, count);
  if (!array.fenced && !array.written) return;
  const uint64_t now = hash(data, count);
  if ((array.written && now == array.at_result) || (array.fenced && now == array.at_fence)) return;
  report(at, "registers of %s were written after the last wgmma.fence", what);
}

// The address of 8 elements of an operand. K-major: `row` along M or N, `chunk` of 8 along K; MN-major: `row` along K,
// `chunk` along M or N. PTX: Shared Memory Matrix Layout, canonical layouts of 128-byte swizzle.
uint32_t chunk_address(uint64_t descriptor, bool along_mn, int row, int chunk) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  const uint32_t leading = static_cast<uint32_t>(descriptor >> 16 & 0x3fff) << 4;
  const uint32_t stride = static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4;
  uint32_t address = start + (row >> 3) * stride + (row & 7) * 128;
  address += along_mn ? (chunk % 8) * 16 + (chunk / 8) * leading : chunk * 16;
  return (address ^ ((address >> 7 & 7) << 4)) & 0x3ffff;
}

void check_descriptor(uint64_t descriptor, bool along_mn, Location at, const char* what) {
  const uint32_t start = static_cast<uint32_t>(descriptor & 0x3fff) << 4;
  if (descriptor >> 62 != 1) report(at, "operand %s is not in 128-byte swizzle", what);
  if (descriptor & 0x3fffc000c000c000ull) report(at, "operand %s: bits of the descriptor are set that must be 0", what);
  if (start & 1023 & ~127u) report(at, "operand %s starts at 0x%x, inside a swizzle pattern", what, start);
  if (!along_mn && (start & 127) + 32 > 128) report(at, "operand %s crosses a swizzled row at 0x%x", what, start);
}

// f(address, row, chunk) for all of an operand with `size` rows along M or N.
template <class F>
void each_chunk(uint64_t descriptor, bool along_mn, int size, F f) {
  for (int row = 0; row < (along_mn ? 16 : size); ++row)
    for (int chunk = 0; chunk < (along_mn ? size / 8 : 2); ++chunk)
      f(chunk_address(descriptor, along_mn, row, chunk), row, chunk);
}

float widen(uint16_t bits, bool bfloat16) {
  if (bfloat16) {
    const uint32_t word = static_cast<uint32_t>(bits) << 16;
    float x;
    memcpy(&x, &word, 4);
    return x;
  }
  _Float16 x;
  memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}

int row_of(int thread, int i) { return 16 * (thread / 32) + thread % 32 / 4 + 8 * (i / 2 % 2); }
int column_of(int thread, int i) { return 8 * (i / 4) + 2 * (thread % 4) + i % 2; }

// a[64][16] or, as b, transposed [16][n].
void read_operand(const Block& block, uint64_t descriptor, bool along_mn, int size, bool bfloat16, bool is_b,
                  float* to) {
  each_chunk(descriptor, along_mn, size, [&](uint32_t address, int row, int chunk) {
    uint16_t elements[8];
    memcpy(elements, &block.memory[address], 16);
    for (int e = 0; e < 8; ++e) {
      const int mn = along_mn ? chunk * 8 + e : row, k = along_mn ? row : chunk * 8 + e;
      to[is_b ? k * size + mn : mn * 16 + k] = widen(elements[e], bfloat16);
    }
  });
}

void read_fragments(const PendingProduct& pending, Block& block, int first_thread, float* a) {
  for (int t = 0; t < 128; ++t)
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = pending.fragments[t][i];
      if (word != pending.seen[t][i]) {
        Thread* running = current;
        current = &block.threads[first_thread + t];
        report(pending.at, "a register of A was written while the product was in flight");
        current = running;
      }
      const int row = 16 * (t / 32) + t % 32 / 4 + 8 * (i & 1), k = 2 * (t % 4) + 8 * (i >> 1);
      a[row * 16 + k] = widen(static_cast<uint16_t>(word), pending.product.bfloat16);
      a[row * 16 + k + 1] = widen(static_cast<uint16_t>(word >> 16), pending.product.bfloat16);
    }
}

std::shared_ptr<PendingProduct> issue(Block& block, Warpgroup& group, int thread, const float* d,
                                      const Product& product, Location at) {
  auto pending = std::make_shared<PendingProduct>();
  pending->product = product;
  pending->at = at;
  const auto mark = [&](uint64_t descriptor, bool along_mn, int size, const char* what) {
    check_descriptor(descriptor, along_mn, at, what);
    each_chunk(descriptor, along_mn, size, [&](uint32_t address, int, int) {
      if (!inside(block, address, kGranule, at, "an operand")) return;
      begin_async_read(block, address / kGranule, at, "a product");
      pending->granules.push_back(address / kGranule);
    });
  };
  if (!product.fragment) mark(product.a, product.major_a, 64, "A");
  mark(product.b, product.major_b, product.n, "B");
  for (const auto& live : group.live)
    if (live->registers[thread] == d) pending->accumulator = live;
  if (!pending->accumulator) {
    pending->accumulator = std::make_shared<Accumulator>();
    pending->accumulator->n = product.n;
    pending->accumulator->numbers.resize(64 * product.n);
    group.live.push_back(pending->accumulator);
  } else if (pending->accumulator->n != product.n) {
    report(at, "an accumulator in flight is used with another width");
  }
  return pending;
}

bool same(const Product& a, const Product& b) {
  return a.n == b.n && a.a == b.a && a.b == b.b && a.major_a == b.major_a && a.major_b == b.major_b && a.add == b.add &&
         !a.fragment == !b.fragment;
}

}  // namespace

bool first_product_ready(const Warpgroup& group) {
  return !group.products.empty() && group.products.front()->arrived == 128;
}

void run_first_product(Block& block, Warpgroup& group) {
  static float a[64 * 16], b[16 * 256];
  const PendingProduct& pending = *group.products.front();
  const Product& product = pending.product;
  const int n = product.n, first_thread = 128 * static_cast<int>(&group - block.warpgroups.data());
  if (product.fragment)
    read_fragments(pending, block, first_thread, a);
  else
    read_operand(block, product.a, product.major_a, 64, product.bfloat16, false, a);
  read_operand(block, product.b, product.major_b, n, product.bfloat16, true, b);
  for (int i = 0; i < 64; ++i) {
    float* __restrict__ d = pending.accumulator->numbers.data() + i * n;
    if (!product.add) memset(d, 0, sizeof(float) * n);
    for (int k = 0; k < 16; ++k) {
      const float x = a[i * 16 + k];
      const float* __restrict__ row = b + k * n;
      for (int j = 0; j < n; ++j) d[j] += x * row[j];
    }
  }
  for (const uint32_t granule : pending.granules) block.reads[granule]--;
  group.products.pop_front();
  group.done++;
  wake(group.waiters);
}

void wgmma_fence() {
  Thread& thread = *current;
  const Warpgroup& group = thread.block->warpgroups[thread.index / 128];
  thread.fences++;
  for (RegisterArray& array : thread.arrays) {
    bool in_flight = false;
    for (const auto& live : group.live) in_flight |= live->registers[thread.index % 128] == array.data;
    if (in_flight) continue;
    array.at_fence = hash(array.data, array.count);
    array.fenced = true;
  }
}

void wgmma(float* d, const Product& product, Location at) {
  Thread& thread = *current;
  Block& block = *thread.block;
  Warpgroup& group = block.warpgroups[thread.index / 128];
  const int t = thread.index % 128, count = product.n / 2;
  const uint32_t number = thread.products++;
  if (number - group.done >= group.products.size()) group.products.push_back(issue(block, group, t, d, product, at));
  PendingProduct& pending = *group.products[number - group.done];
  Accumulator& accumulator = *pending.accumulator;
  if (!same(pending.product, product) || pending.at.line != at.line)
    report(at, "operands differ between the threads of a warpgroup (%s:%d)", base_name(pending.at.file),
           pending.at.line);
  uint32_t* words = reinterpret_cast<uint32_t*>(d);
  if (!accumulator.registers[t]) {
    if (product.add) check_fenced(thread, d, count, at, "the accumulator");
    for (int i = 0; i < count; ++i) {
      memcpy(&accumulator.numbers[row_of(t, i) * accumulator.n + column_of(t, i)], &d[i], 4);
      words[i] = kInFlight;
    }
    accumulator.registers[t] = d;
    accumulator.users++;
  } else if (accumulator.registers[t] != d) {
    report(at, "threads of a warpgroup use different accumulators");
  } else {
    for (int i = 0; i < count; ++i)
      if (words[i] != kInFlight) {
        report(at, "register %d of an accumulator was written while a product was in flight", i);
        break;
      }
  }
  accumulator.last[t] = number + 1;
  if (product.fragment) {
    pending.fragments[t] = product.fragment;
    memcpy(pending.seen[t].data(), product.fragment, 16);
    array_of(thread, product.fragment, 4);
    check_fenced(thread, product.fragment, 4, at, "A");
  }
  if (++pending.arrived == 128 && options.mode == kEarly)
    while (first_product_ready(group)) run_first_product(block, group);
}

void wgmma_commit() { current->product_groups.push_back(current->products); }

void wgmma_wait(int groups, Location at) {
  Thread& thread = *current;
  Warpgroup& group = thread.block->warpgroups[thread.index / 128];
  const int t = thread.index % 128, finished = static_cast<int>(thread.product_groups.size()) - groups;
  if (finished <= 0) return;
  const uint32_t until = thread.product_groups[finished - 1];
  while (static_cast<int32_t>(group.done - until) < 0) wait_in(group.waiters, "wgmma.wait_group", 0, groups, at);
  thread.product_groups.erase(thread.product_groups.begin(), thread.product_groups.begin() + finished);
  for (size_t i = 0; i < group.live.size();) {
    Accumulator& accumulator = *group.live[i];
    bool unused = false;
    if (accumulator.registers[t] && static_cast<int32_t>(accumulator.last[t] - until) <= 0) {
      float* d = accumulator.registers[t];
      uint32_t* words = reinterpret_cast<uint32_t*>(d);
      bool touched = false;
      for (int r = 0; r < accumulator.n / 2; ++r) {
        touched |= words[r] != kInFlight;
        memcpy(&words[r], &accumulator.numbers[row_of(t, r) * accumulator.n + column_of(t, r)], 4);
      }
      if (touched) report(at, "an accumulator was written between its product and this wait");
      RegisterArray& array = array_of(thread, d, accumulator.n / 2);
      array.at_result = hash(d, accumulator.n / 2);
      array.written = true;
      accumulator.registers[t] = nullptr;
      unused = --accumulator.users == 0;
    }
    if (unused)
      group.live.erase(group.live.begin() + static_cast<long>(i));
    else
      ++i;
  }
}

void check_used(float x, Location at) {
  uint32_t word;
  memcpy(&word, &x, 4);
  if ((word & 0x7fffffff) == kInFlight) report(at, "a number is used before wgmma.wait_group gives it");
}

}  // namespace longattn::emulator
