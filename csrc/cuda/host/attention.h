// The calls of the library; each unit of csrc/cuda/units holds some. They return nullptr, or what went wrong.
#pragma once

#include "call.h"

namespace longattn::cuda {

template <int Width>
const char* forward_of_width(const LongattnCall& call);

template <int Width>
const char* backward_of_width(const LongattnCall& call);

// Attention of few queries to a cache, of heads of at most Width.
template <int Width>
const char* decode_of_width(const LongattnCall& call);

}  // namespace longattn::cuda
