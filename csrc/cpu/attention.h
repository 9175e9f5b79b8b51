// Attention on the CPU: a call is checked, cut into tiles, and handed to threads. Results do not depend on the number
// of threads.
#pragma once

#include "longattn/params.h"

namespace longattn {

// All throw InvalidInput before they touch a tensor.
void attention_forward(const AttentionParams& params);   // writes out and lse
void attention_backward(const AttentionParams& params);  // writes dq, dk, dv
void attention_append(const AttentionParams& params);    // writes new_k and new_v into pages
void attention_decode(const AttentionParams& params);    // appends, then writes out and lse
void angles(const AngleParams& params);                  // writes cos and sin
void rope(const RopeParams& params);                     // writes out

}  // namespace longattn
