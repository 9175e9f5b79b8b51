// Dropout's random numbers: the mirror of longattn/backends/philox.py.
#pragma once

#include "cpu/kernels/panel.h"

namespace longattn {
namespace {

struct PhiloxLanes {
  uint32_t word[4][kPanelRows];
};

// Philox4x32-10 (Salmon et al. 2011) with the counter (quad, query, head, batch) of each lane; its words belong to keys
// 4 quad..4 quad + 3.
inline void philox(uint64_t seed, uint32_t quad, const uint32_t* query, const uint32_t* head, uint32_t batch,
                   PhiloxLanes* out) {
  uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
  uint32_t *c0 = out->word[0], *c1 = out->word[1], *c2 = out->word[2], *c3 = out->word[3];
  for (int lane = 0; lane < kPanelRows; ++lane) {
    c0[lane] = quad;
    c1[lane] = query[lane];
    c2[lane] = head[lane];
    c3[lane] = batch;
  }
  for (int round = 0; round < 10; ++round) {
    for (int lane = 0; lane < kPanelRows; ++lane) {
      const uint64_t product0 = uint64_t{0xD2511F53u} * c0[lane], product1 = uint64_t{0xCD9E8D57u} * c2[lane];
      c0[lane] = static_cast<uint32_t>(product1 >> 32) ^ c1[lane] ^ key0;
      c1[lane] = static_cast<uint32_t>(product1);
      c2[lane] = static_cast<uint32_t>(product0 >> 32) ^ c3[lane] ^ key1;
      c3[lane] = static_cast<uint32_t>(product0);
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// The multipliers of weights of keys [base, base + keys): 0 where dropped, else 1 / (1 - p); keep[keys][64].
template <class T>
void dropout_multipliers(const Panel& panel, int64_t base, int64_t keys, T* keep) {
  const AttentionParams& p = *panel.params;
  uint32_t query[kPanelRows] = {}, head[kPanelRows] = {};
  for (int64_t r = 0; r < panel.rows; ++r) {
    query[r] = static_cast<uint32_t>(p.first_query + query_of(panel, r));
    head[r] = static_cast<uint32_t>(p.first_head + locate(panel, r).head);
  }
  const uint64_t dropped = static_cast<uint64_t>(p.dropout_p * 4294967296.0 + 0.5);  // of 2^32 numbers
  const T kept = static_cast<T>(1.0 / (1.0 - p.dropout_p));
  const uint32_t sequence = static_cast<uint32_t>(p.first_sequence + panel.sequence.index);
  PhiloxLanes lanes;
  for (int64_t j = 0; j < keys; ++j) {
    const int64_t key = p.first_key + base + j;
    if (j == 0 || key % 4 == 0) philox(p.seed, static_cast<uint32_t>(key / 4), query, head, sequence, &lanes);
    for (int lane = 0; lane < kPanelRows; ++lane)
      keep[j * kPanelRows + lane] = lanes.word[key % 4][lane] < dropped ? T(0) : kept;
  }
}

}  // namespace
}  // namespace longattn
