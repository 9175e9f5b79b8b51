#include "cpu/thread_pool.h"

#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

#include "cpu/torch_threads.h"

namespace longattn {

namespace {

using Task = std::function<void(int64_t, int64_t)>;

// In PyTorch's threads.
class Team {
 public:
  Team(int64_t count, const Task& task) : count_(count), task_(task) {}

  void run(ParallelRegion region, int64_t threads) {
    region([](void* team) { static_cast<Team*>(team)->work(); }, this, static_cast<unsigned>(threads), 0);
  }

 private:
  void work() {
    const int64_t thread = started_.fetch_add(1, std::memory_order_relaxed);
    for (int64_t index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) task_(thread, index);
  }

  const int64_t count_;
  const Task& task_;
  std::atomic<int64_t> started_{0}, next_{0};
};

// Calls of several threads take turns.
class Pool {
 public:
  void run(int64_t threads, int64_t count, const Task& task) {
    const std::lock_guard<std::mutex> turn(callers_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      task_ = &task;
      count_ = count;
      next_.store(0, std::memory_order_relaxed);
      while (started_ < threads - 1) start(started_ + 1);
      wanted_ = threads - 1;
      busy_ = wanted_;
      ++generation_;
    }
    wake_.notify_all();
    work(0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [&] { return busy_ == 0; });
  }

 private:
  void start(int64_t thread) {
    std::thread(&Pool::loop, this, thread, generation_)
        .detach();  // lives as long as the process: the pool is never destroyed
    ++started_;
  }

  void loop(int64_t thread, uint64_t seen) {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (thread > wanted_) continue;
      lock.unlock();
      work(thread);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void work(int64_t thread) {
    for (int64_t index; (index = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) (*task_)(thread, index);
  }

  std::mutex callers_;  // held for a whole run
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  const Task* task_ = nullptr;
  int64_t count_ = 0;
  std::atomic<int64_t> next_{0};
  int64_t started_ = 0, wanted_ = 0, busy_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: its threads may outlive static destructors. A forked child has none of them, so it takes a new one.
Pool* pool = nullptr;

Pool& shared_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return *pool;
}

}  // namespace

void parallel_for(int64_t threads, int64_t count, const Task& task) {
  if (threads <= 1 || count <= 1) {
    for (int64_t index = 0; index < count; ++index) task(0, index);
  } else if (const ParallelRegion region = torch_parallel_region()) {
    Team(count, task).run(region, threads);  // never fewer threads: libgomp would end the others
  } else {
    shared_pool().run(std::min(threads, count), count, task);
  }
}

}  // namespace longattn
