// The calls of the library by head width; each unit of csrc/cuda/units holds one instance.
#pragma once

#include "call.h"

namespace longattn::cuda {

// nullptr, or what went wrong.
template <int Width>
const char* forward_of_width(const LongattnCall& call);

}  // namespace longattn::cuda
