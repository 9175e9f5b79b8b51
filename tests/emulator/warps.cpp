// What threads do together: named barriers, collectives of a warp, the register pool.
#include "machine.h"

namespace longattn::emulator {

void named_barrier(int id, int threads, bool wait, Location at) {
  Thread* thread = current;
  if (id < 0 || id > 15 || threads % 32 || threads < 32) return report(at, "barrier %d of %d threads", id, threads);
  NamedBarrier& barrier = thread->block->named[id];
  if (!barrier.arrived) {
    barrier.threads = threads;
    barrier.first = at;
    barrier.of_warp.clear();
  } else if (barrier.threads != threads) {
    report(at, "barrier %d is used with %d and with %d threads (%s:%d)", id, threads, barrier.threads,
           base_name(barrier.first.file), barrier.first.line);
  }
  barrier.arrived++;
  barrier.of_warp[thread->index / 32]++;
  const uint64_t generation = barrier.generation;
  if (barrier.arrived >= barrier.threads) {
    for (const auto& [warp, count] : barrier.of_warp)
      if (count % 32) report(at, "barrier %d is completed by %d threads of warp %d", id, count, warp);
    barrier.arrived = 0;
    barrier.generation++;
    wake(barrier.waiters);
  } else if (wait) {
    while (barrier.generation == generation) wait_in(barrier.waiters, "named barrier", id, threads, at);
  }
}

void set_registers(int count, bool more, Location at) {
  Thread* thread = current;
  Block& block = *thread->block;
  if (count % 8 || count < 24 || count > 256) report(at, "setmaxnreg to %d registers", count);
  if (more ? count < thread->registers : count > thread->registers)
    report(at, "setmaxnreg.%s from %d to %d registers", more ? "inc" : "dec", thread->registers, count);
  if (!more) {
    block.free_registers += thread->registers - count;
    wake(block.register_waiters);
  } else {
    while (block.free_registers < count - thread->registers)
      wait_in(block.register_waiters, "setmaxnreg", 0, count, at);
    block.free_registers -= count - thread->registers;
  }
  thread->registers = count;
}

Rendezvous& meet(int kind, uint64_t value, const std::array<uint32_t, 4>& words, uint32_t address, Location at) {
  Thread* thread = current;
  Warp& warp = thread->block->warps[thread->index / 32];
  const uint64_t number = thread->meetings++;
  Rendezvous& meeting = warp.meeting[number & 1];
  if (!meeting.arrived) {
    meeting.kind = kind;
    meeting.first = at;
  } else if (meeting.kind != kind || meeting.first.line != at.line) {
    report(at, "lanes of a warp meet in different collectives (%s:%d)", base_name(meeting.first.file),
           meeting.first.line);
  }
  const int lane = thread->index % 32;
  meeting.value[lane] = value;
  meeting.address[lane] = address;
  meeting.words[lane] = words;
  if (++meeting.arrived == 32) {
    meeting.arrived = 0;
    warp.done = number + 1;
    wake(warp.waiters);
  } else {
    while (warp.done <= number) wait_in(warp.waiters, "a collective of the warp", kind, 0, at);
  }
  return meeting;
}

void sync_warp(Location at) { meet(0, 0, {}, 0, at); }

uint64_t from_lane(uint64_t value, int lane, Location at) { return meet(1, value, {}, 0, at).value[lane & 31]; }

uint64_t from_lane_xor(uint64_t value, int bits, Location at) {
  return meet(2, value, {}, 0, at).value[(current->index ^ bits) & 31];
}

uint32_t ballot(bool predicate, Location at) {
  const Rendezvous& meeting = meet(3, predicate, {}, 0, at);
  uint32_t bits = 0;
  for (int i = 0; i < 32; ++i) bits |= static_cast<uint32_t>(meeting.value[i] != 0) << i;
  return bits;
}

}  // namespace longattn::emulator
