// The state of the emulated machine, shared by the emulator's files.
#pragma once

#include <array>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "emulator.h"

namespace longattn::emulator {

constexpr uint32_t kSharedStart = 1024, kSharedLimit = 232448, kSharedBytes = 1 << 18;
constexpr uint32_t kGranule = 16;           // bytes: what asynchronous accesses are tracked by
constexpr uint32_t kInFlight = 0x7fc0dead;  // a NaN: what an accumulator holds while a product is on its way

struct Thread;
struct Block;
using Waiters = std::vector<Thread*>;

struct Mbarrier {
  uint32_t arrivals = 0, pending = 0;
  long long bytes = 0;
  uint64_t phase = 0;
  bool fenced = false;  // its init is visible to asynchronous units
  Waiters waiters;
};

struct NamedBarrier {
  int threads = 0, arrived = 0;
  uint64_t generation = 0;
  std::map<int, int> of_warp;
  Location first{};
  Waiters waiters;
};

// Where the lanes of a warp meet; two, because fast lanes may be at the next one already.
struct Rendezvous {
  int kind = 0, arrived = 0;
  Location first{};
  std::array<uint64_t, 32> value{};
  std::array<uint32_t, 32> address{};
  std::array<std::array<uint32_t, 4>, 32> words{};
};
struct Warp {
  Rendezvous meeting[2];
  uint64_t done = 0;
  Waiters waiters;
};

// An accumulator with products in flight: its numbers, and where each thread keeps its share.
struct Accumulator {
  int n;
  std::array<float*, 128> registers{};
  std::array<uint32_t, 128> last{};  // the newest product on it, counted from 1
  int users = 0;
  std::vector<float> numbers;  // [64][n]
};
struct PendingProduct {
  Product product;
  Location at;
  int arrived = 0;
  std::shared_ptr<Accumulator> accumulator;
  std::array<const uint32_t*, 128> fragments{};
  std::array<std::array<uint32_t, 4>, 128> seen{};  // the fragments' contents when the product was issued
  std::vector<uint32_t> granules;
};
struct Warpgroup {
  std::deque<std::shared_ptr<PendingProduct>> products;
  uint32_t done = 0;
  std::vector<std::shared_ptr<Accumulator>> live;
  Waiters waiters;
};

struct BulkCopy {
  bool read = false, done = false;
};

// An array of registers that wgmma has used: hashes of its contents at the last fence, and when wgmma last wrote it.
struct RegisterArray {
  const void* data;
  int count;
  uint64_t at_fence = 0, at_result = 0;
  bool fenced = false, written = false;
};

struct Thread {
  Block* block = nullptr;
  Place place{};
  int index = 0;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  bool done = false;
  // What it waits for.
  const char* waits_for = nullptr;
  uint32_t object = 0;
  long long operand = 0;
  Location at{};

  uint32_t products = 0;                 // issued
  std::vector<uint32_t> product_groups;  // `products` at each commit
  int fences = 0, registers = 0;
  std::vector<RegisterArray> arrays;
  uint64_t meetings = 0;
  std::vector<uint32_t> unfenced;  // words of shared memory
  std::vector<uint32_t> initialised;
  std::vector<std::shared_ptr<BulkCopy>> copies;
  std::deque<std::vector<std::shared_ptr<BulkCopy>>> copy_groups;
};

struct Block {
  int3 index;
  std::vector<uint8_t> memory;
  uint32_t first, end;  // of its shared memory
  std::vector<Thread> threads;
  int running = 0;
  long long free_registers = 0;
  Waiters register_waiters, copy_waiters;
  std::unordered_map<uint32_t, Mbarrier> mbarriers;
  std::map<uint32_t, std::string> names;
  NamedBarrier named[16];
  std::vector<Warp> warps;
  std::vector<Warpgroup> warpgroups;
  std::vector<uint16_t> writer;        // of each word: 1 + the thread that wrote it without a proxy fence since
  std::vector<uint8_t> reads, writes;  // asynchronous ones in flight, of each granule
  std::vector<uint8_t> holds_barrier;  // of each granule
  int loads_in_flight = 0;
};

// The scheduler and the engine.
extern Thread* current;
extern std::vector<std::unique_ptr<Block>> blocks;
void wait_in(Waiters& waiters, const char* what, uint32_t object, long long operand, Location at);
void wake(Waiters& waiters);
void post(Block* block, bool is_store, std::function<void()> work);  // asynchronous work other than products
bool first_product_ready(const Warpgroup& group);
void run_first_product(Block& block, Warpgroup& group);

// Reports. Each place and kind of fault is told once.
void report(Location at, const char* format, ...) __attribute__((format(printf, 2, 3)));
const char* base_name(const char* path);
std::string name_of(const Block& block, uint32_t barrier);

// Shared memory.
bool inside(const Block& block, uint32_t address, uint32_t bytes, Location at, const char* what);
void begin_async_read(Block& block, uint32_t granule, Location at, const char* what);
void write_shared(uint32_t address, const void* from, uint32_t bytes, Location at);

// Warps.
Rendezvous& meet(int kind, uint64_t value, const std::array<uint32_t, 4>& words, uint32_t address, Location at);

}  // namespace longattn::emulator
