#pragma once

#include "hopper/platform.h"

namespace longattn::hopper {

constexpr uint32_t kDescriptorHigh = 0x40000040u;

inline uint32_t descriptor(uint32_t address, uint32_t leading) {
  return ((address & 0x3ffffu) >> 4) | ((leading >> 4) << 16);
}
inline constexpr uint32_t descriptor_step(uint32_t bytes) { return bytes >> 4; }

inline void wgmma_fence() { emulator::wgmma_fence(); }
inline void wgmma_commit() { emulator::wgmma_commit(); }
template <int N>
void wgmma_wait(Location at = Location::here()) {
  emulator::wgmma_wait(N, at);
}

enum Major : int { kAlongK = 0, kAlongMN = 1 };

template <class Element, int N>
struct Wgmma {
  static constexpr bool kBFloat16 = std::is_same_v<Element, BFloat16>;
  static uint64_t whole(uint32_t low) { return static_cast<uint64_t>(kDescriptorHigh) << 32 | low; }

  template <int MajorA, int MajorB>
  static void multiply(float (&d)[N / 2], uint32_t a, uint32_t b, Location at = Location::here()) {
    emulator::wgmma(d, {N, kBFloat16, false, nullptr, whole(a), whole(b), MajorA, MajorB}, at);
  }
  template <int MajorA, int MajorB>
  static void multiply_add(float (&d)[N / 2], uint32_t a, uint32_t b, Location at = Location::here()) {
    emulator::wgmma(d, {N, kBFloat16, true, nullptr, whole(a), whole(b), MajorA, MajorB}, at);
  }
  template <int MajorB>
  static void multiply_add(float (&d)[N / 2], const uint32_t* fragment, uint32_t b, Location at = Location::here()) {
    emulator::wgmma(d, {N, kBFloat16, true, fragment, 0, whole(b), 0, MajorB}, at);
  }
};

}  // namespace longattn::hopper
