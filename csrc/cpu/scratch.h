// Scratch memory of a call: one aligned piece per thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace longattn {

class Scratch {
 public:
  Scratch(int64_t threads, int64_t bytes) : bytes_((bytes + 4095) / 4096 * 4096) {
    memory_.reset(static_cast<char*>(std::aligned_alloc(4096, static_cast<size_t>(bytes_ * threads + 4096))));
    if (!memory_) throw std::bad_alloc();
  }
  char* of(int64_t thread) const { return memory_.get() + thread * bytes_; }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  int64_t bytes_;
  std::unique_ptr<char, Free> memory_;
};

}  // namespace longattn
