#include "cpu/scratch.h"

#include <cstdlib>
#include <new>

namespace longattn {

namespace {

constexpr int64_t kPage = 4096;
constexpr int64_t kMostKept = int64_t{64} << 20;  // bytes of a block

struct Block {
  char* memory = nullptr;
  int64_t bytes = 0;
};

// As many as a call holds at once.
struct Kept {
  Block blocks[4];
  ~Kept() {
    for (Block& block : blocks) std::free(block.memory);
  }
};

thread_local Kept kept;

int64_t whole_pages(int64_t bytes) { return (bytes + kPage - 1) / kPage * kPage; }

}  // namespace

Scratch::Scratch(int64_t pieces, int64_t bytes)
    : piece_bytes_(whole_pages(bytes)), bytes_(whole_pages(piece_bytes_ * pieces + kPage)), memory_(nullptr) {
  for (Block& block : kept.blocks)
    if (block.bytes >= bytes_) {
      memory_ = block.memory;
      bytes_ = block.bytes;
      block = Block{};
      return;
    }
  memory_ = static_cast<char*>(std::aligned_alloc(kPage, static_cast<size_t>(bytes_)));
  if (!memory_) throw std::bad_alloc();
}

Scratch::~Scratch() {
  // Takes the place of the smallest block, if it is larger and not too large to keep.
  Block* smallest = kept.blocks;
  for (Block& block : kept.blocks)
    if (block.bytes < smallest->bytes) smallest = &block;
  if (bytes_ > kMostKept || bytes_ <= smallest->bytes) {
    std::free(memory_);
    return;
  }
  std::free(smallest->memory);
  *smallest = Block{memory_, bytes_};
}

}  // namespace longattn
