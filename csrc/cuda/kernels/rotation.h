// Rotary positions, and new tokens of a cache. Angles are float32 products, their sines exact to float32.
#pragma once

#include "call.h"
#include "kernels/tile.h"
#include "kernels/visibility.h"

namespace longattn::cuda {

constexpr int kRotationThreads = 128;

template <class Element>
LONGATTN_DEVICE float widened(uint16_t x) {
  return unpack<Element>(x).x;
}
template <class Element>
LONGATTN_DEVICE uint16_t narrowed(float x) {
  return static_cast<uint16_t>(pack<Element>(x, 0.0f));
}

struct Rotation {
  const float* inv_freq;  // nullptr: none
  int rotated, interleaved;
  float factor, sign;  // sign -1: the other way round

  // Writes `width` entries of a row, those of `first`, first + step, ... among pairs and entries; `to` may be `from`.
  template <class Element>
  LONGATTN_DEVICE void turn(const uint16_t* from, uint16_t* to, int width, float position, int first, int step) const {
    const int pairs = inv_freq ? rotated / 2 : 0;
    for (int i = first; i < pairs; i += step) {
      const float angle = position * inv_freq[i];
      const float c = cosf(angle) * factor, s = sinf(angle) * factor * sign;
      const int a = interleaved ? 2 * i : i, b = interleaved ? a + 1 : a + pairs;
      const float x = widened<Element>(from[a]), y = widened<Element>(from[b]);
      to[a] = narrowed<Element>(x * c - y * s);
      to[b] = narrowed<Element>(y * c + x * s);
    }
    for (int i = 2 * pairs + first; i < width; i += step) to[i] = from[i];
  }
};

struct RopeParams {
  LongattnRows x, out;
  Rotation rotation;
  const float* positions;
  int64_t positions_batch;
  int width;
};

// A block per token, head and sequence.
template <class Element>
LONGATTN_KERNEL(kRotationThreads)
rope_kernel(LONGATTN_PARAMS RopeParams p) {
  const int3 at = block_index();
  p.rotation.template turn<Element>(row_of(p.x, at.z, at.y, at.x), row_of(p.out, at.z, at.y, at.x), p.width,
                                    p.positions[at.z * p.positions_batch + at.x], thread_index(), kRotationThreads);
}

struct AppendParams {
  LongattnRows q, new_k, new_v, k, v;
  uint16_t* packed_q;  // [batch, kv_heads, nq * group, head_dim]
  Rotation rotation;
  int64_t inv_freq_batch, positions_batch;
  const float* positions;
  const int32_t *key_lens, *query_lens, *table;
  int nq, q_heads, kv_heads, head_dim, v_head_dim, table_width, pages, page_size;
};

// A block per new token, head and sequence: query heads first, if there are queries; then those of keys and values.
template <class Element>
LONGATTN_KERNEL(kRotationThreads)
append_kernel(LONGATTN_PARAMS AppendParams p) {
  const int3 at = block_index();
  const int i = at.x, b = at.z, queries = clamped(p.query_lens[b], 0, p.nq);
  if (i >= queries) return;
  const int j = p.key_lens[b] - queries + i;
  const float position = p.positions ? p.positions[b * p.positions_batch + i] : static_cast<float>(j);
  Rotation rotation = p.rotation;
  if (rotation.inv_freq) rotation.inv_freq += b * p.inv_freq_batch;
  const int q_heads = p.packed_q ? p.q_heads : 0;
  if (at.y < q_heads) {
    const int group = p.q_heads / p.kv_heads, kv_head = at.y / group;
    const int64_t row = (static_cast<int64_t>(b) * p.kv_heads + kv_head) * p.nq * group + i * group + at.y % group;
    rotation.template turn<Element>(row_of(p.q, b, at.y, i), p.packed_q + row * p.head_dim, p.head_dim, position,
                                    thread_index(), kRotationThreads);
    return;
  }
  const int head = at.y - q_heads;
  if (j < 0 || j >= p.table_width * static_cast<int64_t>(p.page_size)) return;
  const int page = p.table[static_cast<int64_t>(b) * p.table_width + j / p.page_size], slot = j % p.page_size;
  if (page < 0 || page >= p.pages) return;
  rotation.template turn<Element>(row_of(p.new_k, b, head, i), row_of(p.k, page, head, slot), p.head_dim, position,
                                  thread_index(), kRotationThreads);
  const uint16_t* from = row_of(p.new_v, b, head, i);
  uint16_t* to = row_of(p.v, page, head, slot);
  for (int c = thread_index(); c < p.v_head_dim; c += kRotationThreads) to[c] = from[c];
}

}  // namespace longattn::cuda
