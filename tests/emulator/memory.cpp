// Shared memory, who wrote what and whether asynchronous units may see it; copies by those units.
#include <cstring>

#include "machine.h"

namespace longattn::emulator {

namespace {

void begin_async_write(Block& block, uint32_t granule, Location at) {
  const uint32_t address = granule * kGranule;
  if (block.reads[granule]) report(at, "a load overwrites 0x%x, which a product or a reduction still reads", address);
  if (block.writes[granule]) report(at, "two loads to 0x%x at once", address);
  if (block.holds_barrier[granule]) report(at, "a load overwrites the mbarrier at 0x%x", address);
  for (int i = 0; i < 4; ++i)
    if (block.writer[granule * 4 + i]) {
      report(at, "a load overwrites what thread %d stored at 0x%x, without fence.proxy.async between",
             block.writer[granule * 4 + i] - 1, address);
      break;
    }
  block.writes[granule]++;
  memset(&block.memory[address], 0xff, kGranule);
}

void end_async_write(Block& block, uint32_t granule) {
  block.writes[granule]--;
  for (int i = 0; i < 4; ++i) block.writer[granule * 4 + i] = 0;
}

Mbarrier* find(uint32_t address, Location at, const char* what) {
  const auto found = current->block->mbarriers.find(address);
  if (found != current->block->mbarriers.end()) return &found->second;
  report(at, "%s on 0x%x, which is not an mbarrier", what, address);
  return nullptr;
}

void finish_phase_if_complete(Mbarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase++;
  barrier.pending = barrier.arrivals;
  wake(barrier.waiters);
}

void complete(Block& block, uint32_t address, uint32_t bytes) {
  Mbarrier& barrier = block.mbarriers[address];
  barrier.bytes -= bytes;
  finish_phase_if_complete(barrier);
}

bool is_ready_for_copies(uint32_t address, Location at) {
  const Mbarrier* barrier = find(address, at, "a copy counts down");
  if (barrier && !barrier->fenced)
    report(at, "the init of mbarrier %s was not followed by fence.mbarrier_init",
           name_of(*current->block, address).c_str());
  return barrier != nullptr;
}

// Calls f(address in shared memory, column, address of the row or nullptr) for each 16 bytes of a box.
template <class F>
void walk(const TensorMap& map, uint32_t to, const std::array<int, 4>& corner, F f) {
  uint32_t row = 0;
  for (uint32_t b = 0; b < map.box[3]; ++b)
    for (uint32_t h = 0; h < map.box[2]; ++h)
      for (uint32_t r = 0; r < map.box[1]; ++r, ++row) {
        const uint32_t inner[4] = {0, r, h, b};
        uint8_t* data = map.data;
        for (int i = 1; i < 4 && data; ++i) {
          const long long x = static_cast<long long>(corner[i]) + inner[i];
          if (x < 0 || x >= static_cast<long long>(map.sizes[i]))
            data = nullptr;
          else
            data += x * map.strides[i];
        }
        for (uint32_t c = 0; c < map.box[0]; c += 8) {
          const uint32_t address = to + (row * map.box[0] + c) * 2;
          f(address ^ ((address >> 7 & 7) << 4), corner[0] + static_cast<int>(c), data);
        }
      }
}

}  // namespace

bool inside(const Block& block, uint32_t address, uint32_t bytes, Location at, const char* what) {
  if (address >= block.first && address + bytes <= block.end) return true;
  report(at, "%s outside shared memory: 0x%x + %u, of 0x%x to 0x%x", what, address, bytes, block.first, block.end);
  return false;
}

void begin_async_read(Block& block, uint32_t granule, Location at, const char* what) {
  const uint32_t address = granule * kGranule;
  if (block.writes[granule]) report(at, "%s reads 0x%x, which a load still writes", what, address);
  for (int i = 0; i < 4; ++i)
    if (block.writer[granule * 4 + i]) {
      report(at, "%s reads what thread %d stored at 0x%x, without fence.proxy.async by that thread", what,
             block.writer[granule * 4 + i] - 1, address + 4 * i);
      break;
    }
  block.reads[granule]++;
}

void write_shared(uint32_t address, const void* from, uint32_t bytes, Location at) {
  Block& block = *current->block;
  if (!inside(block, address, bytes, at, "a store")) return;
  for (uint32_t granule = address / kGranule; granule <= (address + bytes - 1) / kGranule; ++granule) {
    if (block.reads[granule]) report(at, "a store to 0x%x, which a product or a reduction still reads", address);
    if (block.writes[granule]) report(at, "a store to 0x%x, which a load still writes", address);
    if (block.holds_barrier[granule]) report(at, "a store over the mbarrier at 0x%x", address);
  }
  for (uint32_t word = address / 4; word <= (address + bytes - 1) / 4; ++word) {
    block.writer[word] = static_cast<uint16_t>(current->index + 1);
    current->unfenced.push_back(word);
  }
  memcpy(&block.memory[address], from, bytes);
}

uint32_t shared_base() { return (current->block->first + 1023) & ~1023u; }

void load_shared(uint32_t address, void* to, uint32_t bytes, Location at) {
  const Block& block = *current->block;
  memset(to, 0xff, bytes);
  if (address % bytes) report(at, "a misaligned load from 0x%x", address);
  if (!inside(block, address, bytes, at, "a load")) return;
  if (block.writes[address / kGranule]) report(at, "a load from 0x%x, which a copy still writes", address);
  memcpy(to, &block.memory[address], bytes);
}

void store_shared(uint32_t address, const void* from, uint32_t bytes, Location at) {
  if (address % bytes) report(at, "a misaligned store to 0x%x", address);
  write_shared(address, from, bytes, at);
}

void store_matrices(uint32_t address, const uint32_t (&words)[4], Location at) {
  constexpr int kKind = 4;
  const Rendezvous& meeting = meet(kKind, 0, {words[0], words[1], words[2], words[3]}, address, at);
  const std::array<uint32_t, 32> rows = meeting.address;
  const int lane = current->index % 32;
  for (int m = 0; m < 4; ++m) {
    if (rows[8 * m + lane / 4] % 16) return report(at, "stmatrix to 0x%x: rows stand at multiples of 16", rows[8 * m]);
    write_shared(rows[8 * m + lane / 4] + 4 * (lane % 4), &words[m], 4, at);
  }
}

void fence_proxy_async_shared() {
  Block& block = *current->block;
  for (const uint32_t word : current->unfenced)
    if (block.writer[word] == current->index + 1) block.writer[word] = 0;
  current->unfenced.clear();
}

void mbarrier_init(uint32_t address, uint32_t arrivals, Location at) {
  Block& block = *current->block;
  if (address % 8) report(at, "an mbarrier stands at a multiple of 8, not at 0x%x", address);
  if (!inside(block, address, 8, at, "an mbarrier")) return;
  if (arrivals < 1 || arrivals >= 1u << 20) report(at, "an mbarrier of %u arrivals", arrivals);
  if (block.mbarriers.count(address)) report(at, "mbarrier %s is initialised twice", name_of(block, address).c_str());
  Mbarrier& barrier = block.mbarriers[address];
  barrier = {};
  barrier.arrivals = barrier.pending = arrivals;
  block.holds_barrier[address / kGranule] = 1;
  current->initialised.push_back(address);
}

void fence_mbarrier_init() {
  for (const uint32_t address : current->initialised) current->block->mbarriers[address].fenced = true;
}

void mbarrier_name(uint32_t barrier, const char* name, int index) {
  current->block->names[barrier] = index < 0 ? name : std::string(name) + "[" + std::to_string(index) + "]";
}

void mbarrier_arrive(uint32_t address, uint32_t expected_bytes, Location at) {
  Mbarrier* barrier = find(address, at, "an arrival");
  if (!barrier) return;
  if (expected_bytes >= 1u << 20) report(at, "an mbarrier counts less than 2^20 bytes, not %u", expected_bytes);
  if (!barrier->pending) {
    report(at, "more than %u arrivals on mbarrier %s", barrier->arrivals, name_of(*current->block, address).c_str());
    return;
  }
  barrier->bytes += expected_bytes;
  barrier->pending--;
  finish_phase_if_complete(*barrier);
}

void mbarrier_wait(uint32_t address, uint32_t parity, Location at) {
  Mbarrier* barrier = find(address, at, "a wait");
  if (!barrier) return;
  if (parity > 1) report(at, "a parity is 0 or 1, not %u", parity);
  while ((barrier->phase & 1) == (parity & 1)) wait_in(barrier->waiters, "mbarrier", address, parity, at);
}

void load_tile(uint32_t to, const TensorMap& map, uint32_t barrier, const int (&corner_)[4], Location at) {
  Block* block = current->block;
  if (!map.valid) return report(at, "a tensor map that was not encoded");
  uint32_t bytes = 2;
  for (const uint32_t size : map.box) bytes *= size;
  if (to % 1024) report(at, "a swizzled tile stands at a multiple of 1024, not at 0x%x", to);
  if (!inside(*block, to, bytes, at, "a tile") || !is_ready_for_copies(barrier, at)) return;
  const std::array<int, 4> corner{corner_[0], corner_[1], corner_[2], corner_[3]};
  walk(map, to, corner, [&](uint32_t address, int, uint8_t*) { begin_async_write(*block, address / kGranule, at); });
  block->loads_in_flight++;
  post(block, false, [=] {
    walk(map, to, corner, [&](uint32_t address, int column, const uint8_t* row) {
      for (int i = 0; i < 8; ++i, ++column) {
        uint8_t* element = &block->memory[address + 2 * i];
        if (row && column >= 0 && column < static_cast<long long>(map.sizes[0]))
          memcpy(element, row + 2 * column, 2);
        else
          memset(element, 0, 2);
      }
      end_async_write(*block, address / kGranule);
    });
    block->loads_in_flight--;
    complete(*block, barrier, bytes);
  });
}

void bulk_load(uint32_t to, const void* from, uint32_t bytes, uint32_t barrier, Location at) {
  Block* block = current->block;
  if (to % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(from) % 16)
    return report(at, "bulk copies need multiples of 16 bytes");
  if (!inside(*block, to, bytes, at, "a bulk copy") || !is_ready_for_copies(barrier, at)) return;
  for (uint32_t i = 0; i < bytes; i += kGranule) begin_async_write(*block, (to + i) / kGranule, at);
  block->loads_in_flight++;
  post(block, false, [=] {
    memcpy(&block->memory[to], from, bytes);
    for (uint32_t i = 0; i < bytes; i += kGranule) end_async_write(*block, (to + i) / kGranule);
    block->loads_in_flight--;
    complete(*block, barrier, bytes);
  });
}

// In two steps, as a thread may wait for either: shared memory is read, then global memory is written.
void bulk_reduce_add(float* to, uint32_t from, uint32_t bytes, Location at) {
  Block* block = current->block;
  if (from % 16 || bytes % 16 || reinterpret_cast<uintptr_t>(to) % 16)
    return report(at, "bulk copies need multiples of 16 bytes");
  if (!inside(*block, from, bytes, at, "a bulk reduction")) return;
  for (uint32_t i = 0; i < bytes; i += kGranule)
    begin_async_read(*block, (from + i) / kGranule, at, "a bulk reduction");
  const auto copy = std::make_shared<BulkCopy>();
  current->copies.push_back(copy);
  post(block, true, [=] {
    const auto read = std::make_shared<std::vector<float>>(bytes / 4);
    memcpy(read->data(), &block->memory[from], bytes);
    for (uint32_t i = 0; i < bytes; i += kGranule) block->reads[(from + i) / kGranule]--;
    copy->read = true;
    wake(block->copy_waiters);
    post(block, true, [=] {
      for (size_t i = 0; i < read->size(); ++i) to[i] += (*read)[i];
      copy->done = true;
      wake(block->copy_waiters);
    });
  });
}

void bulk_commit() {
  current->copy_groups.push_back(std::move(current->copies));
  current->copies.clear();
}

void bulk_wait(int groups, bool only_read, Location at) {
  Thread* thread = current;
  const auto finished = [&](const std::vector<std::shared_ptr<BulkCopy>>& group, bool read) {
    for (const auto& copy : group)
      if (!(read ? copy->read : copy->done)) return false;
    return true;
  };
  const auto waiting = [&] {
    for (int i = 0; i < static_cast<int>(thread->copy_groups.size()) - groups; ++i)
      if (!finished(thread->copy_groups[i], only_read)) return true;
    return false;
  };
  while (waiting())
    wait_in(thread->block->copy_waiters, only_read ? "bulk wait_group.read" : "bulk wait_group", 0, groups, at);
  while (static_cast<int>(thread->copy_groups.size()) > groups && finished(thread->copy_groups.front(), false))
    thread->copy_groups.pop_front();
}

}  // namespace longattn::emulator
