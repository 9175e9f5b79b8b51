#include "cpu/peak.h"

#include <algorithm>
#include <chrono>
#include <vector>

#include "cpu/isa.h"
#include "cpu/thread_pool.h"
#include "errors.h"

namespace longattn {

double peak_gflops(DType dtype, int64_t threads, const std::string& name) {
  if (threads < 1 || threads > 4096) throw InvalidInput("threads", "1 to 4096", std::to_string(threads));
  const Kernels& isa = kernels(name);
  if (isa.burst(dtype, 1) == 0.0) return 0.0;
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 200000;
  constexpr int kTries = 10;  // the best of them: what disturbs a try only slows it
  double best = 0.0;
  for (int i = 0; i < kTries; ++i) {
    std::vector<double> operations(threads);
    const auto start = Clock::now();
    parallel_for(threads, threads, [&](int64_t, int64_t n) { operations[n] = isa.burst(dtype, kRounds); });
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    double sum = 0.0;
    for (double part : operations) sum += part;
    best = std::max(best, sum / seconds / 1e9);
  }
  return best;
}

}  // namespace longattn
