// A Hopper GPU on a CPU: one function for each primitive of csrc/cuda/hopper, whose headers here call them.
//
// Every CUDA thread is a fiber. Asynchronous work (products, copies) waits in an engine, which does it early, late, or
// at random under a seed; what the hardware leaves undefined is reported. See README.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

struct int3 {
  int x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

namespace longattn::emulator {

// Where a kernel calls a primitive.
struct Location {
  const char* file;
  int line;
  static constexpr Location here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// Of 16-bit elements, in 128-byte swizzle. In place of CUtensorMap.
struct alignas(64) TensorMap {
  uint8_t* data = nullptr;
  uint64_t sizes[4] = {};
  uint64_t strides[4] = {};  // bytes; the first is that of an element
  uint32_t box[4] = {};
  bool valid = false;
};

enum Mode { kEarly = 0, kLate = 1, kRandom = 2 };

struct Options {
  Mode mode = kLate;
  unsigned seed = 1;
  int resident = 1;    // blocks that run at the same time
  int skew = 0;        // bytes by which shared memory is moved
  int processors = 3;  // that a launch believes to have
};
extern Options options;

// Of the running thread.
struct Place {
  int thread;
  int3 block, blocks;
};
extern const Place* place;

// Runs `body` once per thread; nullptr, or the text "the emulator reports faults".
const char* launch(dim3 blocks, int threads, size_t shared_bytes, const char* name, std::function<void()> body);

uint32_t shared_base();
void load_shared(uint32_t address, void* to, uint32_t bytes, Location at);
void store_shared(uint32_t address, const void* from, uint32_t bytes, Location at);
void store_matrices(uint32_t address, const uint32_t (&words)[4], Location at);

void mbarrier_init(uint32_t barrier, uint32_t arrivals, Location at);
void mbarrier_arrive(uint32_t barrier, uint32_t expected_bytes, Location at);
void mbarrier_wait(uint32_t barrier, uint32_t parity, Location at);
void mbarrier_name(uint32_t barrier, const char* name, int index);
void fence_mbarrier_init();

void fence_proxy_async_shared();
void load_tile(uint32_t to, const TensorMap& map, uint32_t barrier, const int (&corner)[4], Location at);
void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, Location at);
void bulk_reduce_add(float* to, uint32_t from, uint32_t bytes, Location at);
void bulk_commit();
void bulk_wait(int groups, bool only_read, Location at);

void named_barrier(int id, int threads, bool wait, Location at);
void set_registers(int count, bool more, Location at);
void sync_warp(Location at);
uint64_t from_lane(uint64_t value, int lane, Location at);
uint64_t from_lane_xor(uint64_t value, int bits, Location at);
uint32_t ballot(bool predicate, Location at);
void wait_until(std::function<bool()> ready, const void* what, Location at);

// A product; `fragment` is nullptr where A lies in shared memory. Registers are read when the product really runs.
struct Product {
  int n;
  bool bfloat16, add;
  const uint32_t* fragment;
  uint64_t a, b;  // descriptors
  int major_a, major_b;
};
void wgmma(float* d, const Product& product, Location at);
void wgmma_fence();
void wgmma_commit();
void wgmma_wait(int groups, Location at);

// Reports a number that an unfinished product will overwrite.
void check_used(float x, Location at);

}  // namespace longattn::emulator
