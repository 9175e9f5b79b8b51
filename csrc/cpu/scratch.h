// Scratch memory of a call: one aligned piece per thread.
#pragma once

#include <cstdint>

namespace longattn {

// Fresh memory would cost a page fault per 4 KiB in every call, so each calling thread keeps what its last calls used.
class Scratch {
 public:
  Scratch(int64_t pieces, int64_t bytes);
  ~Scratch();
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  char* of(int64_t piece) const { return memory_ + piece * piece_bytes_; }

 private:
  int64_t piece_bytes_, bytes_;
  char* memory_;
};

}  // namespace longattn
