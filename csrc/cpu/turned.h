// Rotation before a product, where it would be repeated in it.
#pragma once

#include "cpu/scratch.h"
#include "longattn/params.h"

namespace longattn {

// Queries or keys [batch, heads, tokens, head_dim] as they turn, in storage type, each head's rows dense.
class Turned {
 public:
  Turned(const AttentionParams& params, const Tensor4& x, const Angles& angles, int64_t heads, int64_t tokens);

  Tensor4 view() const { return view_; }

 private:
  Scratch memory_;
  Tensor4 view_;
};

}  // namespace longattn
