// Registers move between the warpgroups of a block.
#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

// From here on this warpgroup has Count registers a thread: waits until others have released them. PTX: setmaxnreg.
template <int Count>
LONGATTN_DEVICE void allocate_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Count));
}

// PTX: setmaxnreg.
template <int Count>
LONGATTN_DEVICE void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Count));
}

// Keeps the compiler from moving uses of registers across this point: wgmma writes them behind its back.
template <int N>
LONGATTN_DEVICE void pin(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}
template <int N>
LONGATTN_DEVICE void pin(uint32_t (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+r"(x[i])::"memory");
}

// A branch that is never taken, on a sum that is never negative, ends the basic block: what the sum is made of is
// computed here, and not below the next wait, where ptxas would move it.
LONGATTN_DEVICE void compute_before(float a, float b) {
  asm volatile(
      "{\n.reg .pred stay;\n.reg .f32 sum;\nadd.f32 sum, %0, %1;\nAGAIN:\n"
      "setp.geu.f32 stay, sum, 0f00000000;\nvote.sync.any.pred stay, stay, 0xffffffff;\n"
      "@stay bra.uni ON;\nnanosleep.u32 20;\nbra AGAIN;\nON:\n}\n" ::"f"(a),
      "f"(b)
      : "memory");
}

}  // namespace longattn::hopper
