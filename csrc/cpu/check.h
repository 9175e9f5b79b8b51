// The native boundary: every number that could lead a kernel astray is checked here, whoever filled it in.
#pragma once

#include "longattn/params.h"

namespace longattn {

void check_forward(const AttentionParams& params);
void check_decode(const AttentionParams& params);
void check_backward(const AttentionParams& params);
void check_angles(const AngleParams& params);
void check_rope(const RopeParams& params);

}  // namespace longattn
