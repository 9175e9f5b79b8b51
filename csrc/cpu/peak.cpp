#include "cpu/peak.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "errors.h"

namespace longattn {

namespace {

using Clock = std::chrono::steady_clock;

// Waits until all threads have come, so that they share what they share (a core, its clock) while they are timed; not
// for ever, as there may be fewer of them than were asked for.
void meet(std::atomic<int64_t>* missing) {
  missing->fetch_sub(1);
  const auto late = Clock::now() + std::chrono::milliseconds(20);
  while (missing->load() > 0 && Clock::now() < late) std::this_thread::yield();
}

// The usual rate of this thread. A burst is short: other processes take a core for longer, and between most bursts
// nobody does. A mean over a long run, or the best of a few, would be theirs on a busy machine.
double usual_rate(const Kernels& isa, DType dtype) {
  constexpr int64_t kRounds = 2000;
  constexpr int kBursts = 501;
  std::vector<double> rates(kBursts);
  for (double& rate : rates) {
    const auto start = Clock::now();
    const double operations = isa.burst(dtype, kRounds);
    rate = operations / std::chrono::duration<double>(Clock::now() - start).count();
  }
  std::nth_element(rates.begin(), rates.begin() + kBursts / 2, rates.end());
  return rates[kBursts / 2];
}

}  // namespace

double peak_gflops(DType dtype, int64_t threads, const std::string& name) {
  if (threads < 1 || threads > 4096) throw InvalidInput("threads", "1 to 4096", std::to_string(threads));
  const Kernels& isa = kernels(name);
  if (isa.burst(dtype, 1) == 0.0) return 0.0;
  std::vector<double> rates(threads);
  std::atomic<int64_t> missing{threads};
  parallel_for(threads, threads, [&](int64_t, int64_t n) {
    meet(&missing);
    rates[n] = usual_rate(isa, dtype);
  });
  double sum = 0.0;
  for (double rate : rates) sum += rate;
  const double cores = std::max(1u, std::thread::hardware_concurrency());
  return sum * std::min(1.0, cores / static_cast<double>(threads)) / 1e9;
}

}  // namespace longattn
