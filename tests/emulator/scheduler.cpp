// Fibers, the engine that does asynchronous work when it likes, launches, and reports.
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <set>

#include "machine.h"

// Saves the callee-saved registers on the stack, the stack pointer in *save, and continues where `load` was saved.
asm(R"(
.text
.globl longattn_switch
.type longattn_switch,@function
longattn_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
extern "C" void longattn_switch(void** save, void* load);

namespace longattn::emulator {

Options options;
const Place* place;
Thread* current;
std::vector<std::unique_ptr<Block>> blocks;

namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kMostReports = 20;

struct Work {
  Block* block;
  bool is_store;
  std::function<void()> run;
};
struct Spinner {
  Thread* thread;
  std::function<bool()> ready;
};

void* scheduler_stack;
std::vector<Thread*> ready;
std::vector<Work> pending;
std::vector<Spinner> spinners;
std::vector<char*> free_stacks;
std::function<void()>* body;
bool stuck;
uint64_t random_state;

int faults;
std::string reports;
std::set<std::string> told;

uint32_t random_number() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return static_cast<uint32_t>(random_state >> 16);
}

std::string describe(const Thread* thread) {
  if (!thread) return "the engine";
  char text[128];
  const int3& b = thread->block->index;
  snprintf(text, sizeof text, "block (%d, %d, %d) thread %d (warp %d lane %d)", b.x, b.y, b.z, thread->index,
           thread->index / 32, thread->index % 32);
  return text;
}

void check_exit(const Thread& thread) {
  const Location at{"(end of a thread)", 0};
  for (const auto& accumulator : thread.block->warpgroups[thread.index / 128].live)
    if (accumulator->registers[thread.index % 128]) {
      report(at, "a thread ends with a product in flight (no wgmma.wait_group)");
      break;
    }
  for (const auto& group : thread.copy_groups)
    for (const auto& copy : group)
      if (!copy->read) {
        report(at, "a thread ends while a bulk reduction reads its shared memory (no wait_group.read)");
        return;
      }
  if (!thread.copies.empty()) report(at, "a thread ends with a bulk reduction that was not committed");
}

void fiber() {
  (*body)();
  Thread* thread = current;
  check_exit(*thread);
  thread->done = true;
  thread->block->running--;
  longattn_switch(&thread->stack_pointer, scheduler_stack);
  abort();
}

void start(Thread* thread) {
  if (free_stacks.empty()) {
    void* stack =
        mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    free_stacks.push_back(static_cast<char*>(stack));
  }
  thread->stack = free_stacks.back();
  free_stacks.pop_back();
  void** top = reinterpret_cast<void**>(thread->stack + kStackBytes - 64);
  *--top = nullptr;  // fiber's return address, at the alignment that a call leaves
  *--top = reinterpret_cast<void*>(fiber);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  thread->stack_pointer = top;
  ready.push_back(thread);
}

// Does one piece of asynchronous work; false if there is none. The seed chooses what is always late: nothing,
// reductions, loads, products, or the products of one warpgroup.
bool work_once() {
  struct Choice {
    Block* block;
    Warpgroup* group;
    int at;
    bool late;
  };
  static std::vector<Choice> choices;
  choices.clear();
  const int bias = options.mode == kEarly ? 0 : static_cast<int>(options.seed % 6);
  bool some_in_time = false;
  for (auto& block : blocks)
    for (size_t i = 0; i < block->warpgroups.size(); ++i) {
      if (!first_product_ready(block->warpgroups[i])) continue;
      const bool late = bias == 3 || (bias == 4 && i == 1) || (bias == 5 && i + 1 == block->warpgroups.size());
      choices.push_back({block.get(), &block->warpgroups[i], -1, late});
      some_in_time |= !late;
    }
  for (size_t i = 0; i < pending.size(); ++i) {
    const bool late = bias == (pending[i].is_store ? 1 : 2);
    choices.push_back({nullptr, nullptr, static_cast<int>(i), late});
    some_in_time |= !late;
  }
  if (choices.empty()) return false;
  Choice choice;
  do choice = choices[random_number() % choices.size()];
  while (some_in_time && choice.late);
  if (choice.group) {
    run_first_product(*choice.block, *choice.group);
  } else {
    const auto run = std::move(pending[choice.at].run);
    pending[choice.at] = std::move(pending.back());
    pending.pop_back();
    run();
  }
  return true;
}

void report_deadlock() {
  stuck = true;
  ++faults;
  reports += "DEADLOCK: no thread can run, and no work is pending\n";
  for (const auto& block : blocks) {
    std::map<std::string, std::vector<int>> places;
    for (const Thread& thread : block->threads) {
      if (thread.done || !thread.waits_for) continue;
      char text[256];
      const char* file = base_name(thread.at.file);
      if (!strcmp(thread.waits_for, "mbarrier")) {
        const Mbarrier& barrier = block->mbarriers[thread.object];
        snprintf(text, sizeof text,
                 "mbarrier %s, parity %lld, at %s:%d [phase %llu, %u of %u arrivals and %lld bytes missing]",
                 name_of(*block, thread.object).c_str(), thread.operand, file, thread.at.line,
                 static_cast<unsigned long long>(barrier.phase), barrier.pending, barrier.arrivals, barrier.bytes);
      } else {
        snprintf(text, sizeof text, "%s %u (%lld) at %s:%d", thread.waits_for, thread.object, thread.operand, file,
                 thread.at.line);
      }
      places[text].push_back(thread.index);
    }
    for (const auto& [text, threads] : places) {
      std::string line = "  block (" + std::to_string(block->index.x) + ", " + std::to_string(block->index.y) + ", " +
                         std::to_string(block->index.z) + ") threads";
      for (size_t i = 0, j; i < threads.size(); i = j) {
        for (j = i + 1; j < threads.size() && threads[j] == threads[j - 1] + 1; ++j) {
        }
        line += " " + std::to_string(threads[i]) + (j - i > 1 ? "-" + std::to_string(threads[j - 1]) : "");
      }
      reports += line + ": " + text + "\n";
    }
  }
}

// Tests put a page without access behind each tensor: says who touched it. The process ends.
void on_bad_access(int, siginfo_t* info, void*) {
  char text[256];
  const int n =
      snprintf(text, sizeof text, "access outside a tensor at %p by %s, which last waited at %s:%d\n", info->si_addr,
               describe(current).c_str(), current ? base_name(current->at.file) : "?", current ? current->at.line : 0);
  if (write(2, text, n)) {
  }
  _exit(139);
}

void catch_bad_accesses() {
  static bool done = false;
  if (done) return;
  done = true;
  static char handler_stack[65536];
  stack_t stack{};
  stack.ss_sp = handler_stack;
  stack.ss_size = sizeof handler_stack;
  sigaltstack(&stack, nullptr);
  struct sigaction action{};
  action.sa_sigaction = on_bad_access;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigaction(SIGSEGV, &action, nullptr);
  sigaction(SIGBUS, &action, nullptr);
}

std::unique_ptr<Block> make_block(uint64_t number, dim3 count, int threads, size_t shared_bytes) {
  auto block = std::make_unique<Block>();
  const int3 all{static_cast<int>(count.x), static_cast<int>(count.y), static_cast<int>(count.z)};
  block->index = {static_cast<int>(number % count.x), static_cast<int>(number / count.x % count.y),
                  static_cast<int>(number / count.x / count.y)};
  block->memory.assign(kSharedBytes, 0xff);
  block->first = kSharedStart + static_cast<uint32_t>(options.skew);
  block->end = block->first + static_cast<uint32_t>(shared_bytes);
  const size_t granules = kSharedBytes / kGranule;
  block->writer.assign(granules * 4, 0);
  block->reads.assign(granules, 0);
  block->writes.assign(granules, 0);
  block->holds_barrier.assign(granules, 0);
  block->warps.resize((threads + 31) / 32);
  block->warpgroups.resize((threads + 127) / 128);
  block->threads.resize(threads);
  block->running = threads;
  for (int t = 0; t < threads; ++t) {
    Thread& thread = block->threads[t];
    thread.block = block.get();
    thread.index = t;
    thread.place = {t, block->index, all};
    thread.registers = std::min(256, 65536 / threads / 8 * 8);
    start(&thread);
  }
  return block;
}

void retire(Block* block) {
  const Location at{"(end of a block)", 0};
  current = nullptr;
  if (block->loads_in_flight) report(at, "a block ends with %d loads in flight", block->loads_in_flight);
  for (size_t i = 0; i < pending.size();) {
    if (pending[i].block != block) {
      ++i;
      continue;
    }
    const auto run = std::move(pending[i].run);
    pending[i] = std::move(pending.back());
    pending.pop_back();
    run();
    i = 0;
  }
  for (const auto& [address, barrier] : block->mbarriers)
    if (barrier.bytes)
      report(at, "mbarrier %s ends with %lld bytes missing", name_of(*block, address).c_str(), barrier.bytes);
  blocks.erase(std::find_if(blocks.begin(), blocks.end(), [&](const auto& other) { return other.get() == block; }));
}

void poll_spinners() {
  for (size_t i = 0; i < spinners.size();) {
    if (!spinners[i].ready()) {
      ++i;
      continue;
    }
    ready.push_back(spinners[i].thread);
    spinners[i] = std::move(spinners.back());
    spinners.pop_back();
  }
}

// Any thread that can run; the seed may name a warpgroup whose threads run only when no others can.
Thread* choose_thread() {
  size_t chosen = random_number() % ready.size();
  const int slow = static_cast<int>(options.seed / 6 % 4) - 1;
  if (slow >= 0 && ready[chosen]->index / 128 == slow)
    for (size_t i = 0; i < ready.size(); ++i)
      if (ready[i]->index / 128 != slow) {
        chosen = i;
        break;
      }
  Thread* thread = ready[chosen];
  ready[chosen] = ready.back();
  ready.pop_back();
  return thread;
}

}  // namespace

const char* base_name(const char* path) {
  const char* slash = path ? strrchr(path, '/') : nullptr;
  return slash ? slash + 1 : (path ? path : "?");
}

std::string name_of(const Block& block, uint32_t barrier) {
  const auto found = block.names.find(barrier);
  char text[32];
  snprintf(text, sizeof text, "0x%x", barrier);
  return found == block.names.end() ? text : found->second;
}

void report(Location at, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  ++faults;
  const std::string where = std::string(base_name(at.file)) + ":" + std::to_string(at.line);
  if (told.size() >= kMostReports || !told.insert(where + format).second) return;
  reports += "FAULT " + where + " " + describe(current) + ": " + text + "\n";
}

void wake(Waiters& waiters) {
  ready.insert(ready.end(), waiters.begin(), waiters.end());
  waiters.clear();
}

void wait_in(Waiters& waiters, const char* what, uint32_t object, long long operand, Location at) {
  Thread* thread = current;
  thread->waits_for = what;
  thread->object = object;
  thread->operand = operand;
  thread->at = at;
  waiters.push_back(thread);
  longattn_switch(&thread->stack_pointer, scheduler_stack);
}

void wait_until(std::function<bool()> is_ready, const void* what, Location at) {
  while (!is_ready()) {
    Thread* thread = current;
    thread->waits_for = "a counter in global memory";
    thread->object = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(what));
    thread->at = at;
    spinners.push_back({thread, is_ready});
    longattn_switch(&thread->stack_pointer, scheduler_stack);
  }
}

void post(Block* block, bool is_store, std::function<void()> work) {
  if (options.mode == kEarly)
    work();
  else
    pending.push_back({block, is_store, std::move(work)});
}

const char* launch(dim3 count, int threads, size_t shared_bytes, const char* name, std::function<void()> function) {
  catch_bad_accesses();
  const int faults_before = faults;
  const uint64_t total = static_cast<uint64_t>(count.x) * count.y * count.z;
  uint64_t next = 0;
  body = &function;
  stuck = false;
  random_state = 88172645463325252ull ^ (options.seed * 0x9E3779B97F4A7C15ull);
  current = nullptr;
  if (shared_bytes > kSharedLimit) {
    report({name, 0}, "%zu bytes of shared memory, of %u", shared_bytes, kSharedLimit);
    return "the emulator reports faults";
  }
  while (!stuck) {
    while (static_cast<int>(blocks.size()) < options.resident && next < total)
      blocks.push_back(make_block(next++, count, threads, shared_bytes));
    if (blocks.empty()) break;
    if (ready.empty() || (!spinners.empty() && random_number() % 16 == 0)) poll_spinners();
    if (ready.empty()) {
      current = nullptr;
      if (!work_once()) report_deadlock();
      continue;
    }
    if (options.mode == kRandom && random_number() % 64 == 0) {
      current = nullptr;
      work_once();
    }
    Thread* thread = choose_thread();
    current = thread;
    place = &thread->place;
    thread->waits_for = nullptr;
    longattn_switch(&scheduler_stack, thread->stack_pointer);
    if (thread->done) {
      free_stacks.push_back(thread->stack);
      if (!thread->block->running) retire(thread->block);
    }
  }
  for (auto& block : blocks)
    for (Thread& thread : block->threads)
      if (!thread.done) free_stacks.push_back(thread.stack);
  blocks.clear();
  ready.clear();
  pending.clear();
  spinners.clear();
  current = nullptr;
  return faults == faults_before ? nullptr : "the emulator reports faults";
}

}  // namespace longattn::emulator

using longattn::emulator::options;

extern "C" {

void emulator_configure(int mode, unsigned seed, int resident, int skew, int processors) {
  options = {static_cast<longattn::emulator::Mode>(mode), seed, resident, skew, processors};
}

// The faults since the last call, one a line.
const char* emulator_take_reports() {
  static std::string taken;
  taken = std::move(longattn::emulator::reports);
  longattn::emulator::reports.clear();
  longattn::emulator::told.clear();
  return taken.c_str();
}
}
