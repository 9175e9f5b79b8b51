// What an instruction set provides: plain functions over one tile of work. The drivers (attention_forward.cpp,
// attention_backward.cpp, rope.cpp) cut a call into tiles and hand them to threads; they know nothing of vectors.
#pragma once

#include <cstdint>

#include "longattn/mask.h"
#include "longattn/params.h"

namespace longattn {

// Rows of a query tile run over queries first and heads of the group fastest: row r is query first_query + r / group,
// head kv_head * group + r % group. 64 rows make a panel, the unit of the kernels: its rows lie in the lanes of
// vectors.
constexpr int64_t kPanelRows = 64;
constexpr int64_t kTilePanels = 4;  // of a query tile, unless the heads of one query fill more
constexpr int64_t kKeyBlock = 128;  // keys held in a tile
constexpr int64_t kMaxWidth = 512;  // of a head

// Queries of a tile, but for the last of a sequence.
static inline int64_t queries_of_tile(const AttentionParams& p) {
  const int64_t group = larger(1, p.q_heads / p.kv_heads);
  return larger(1, kTilePanels * kPanelRows / group);
}

struct QueryTile {
  Sequence sequence;
  int64_t kv_head;
  int64_t first_query, queries;
  int64_t first_key = 0, last_key = INT64_MAX;  // attend to these keys only,
  char* partial =
      nullptr;  // and leave the result here: [rows][v_head_dim + 1], accumulation type, lse last; no sink counted
};

struct KeyTile {
  Sequence sequence;
  int64_t kv_head;
  int64_t first_key, keys;
};

// A tile of the gradient of bias, and everything that reads it: wider than one panel and block of keys where bias is
// broadcast.
struct BiasTile {
  int64_t first_batch, last_batch, first_head, last_head, first_query, last_query, first_key, last_key;
};

// Called by the backward before it adds to dq rows of a query panel, and after.
struct Turn {
  void (*wait)(void* state, int64_t panel);
  void (*pass)(void* state, int64_t panel);
  void* state;
};

struct Kernels {
  bool (*multiplies)(DType);  // numbers as they are stored: rounding them to this type first changes no product

  int64_t (*forward_scratch)(const AttentionParams&, int64_t panels);  // bytes
  void (*forward)(const AttentionParams&, const QueryTile&, char* scratch);

  // The whole of a tile from `pieces` partial results over disjoint keys, one after another.
  void (*forward_merge)(const AttentionParams&, const QueryTile&, const char* partials, int64_t pieces);

  // delta_i = rowsum(dO * O) - dLSE_i. True if some lse is so large that its last digits hide the number of keys: then
  // shares are wanted.
  bool (*backward_delta)(const AttentionParams&, const QueryTile&);
  int64_t (*backward_scratch)(const AttentionParams&);
  void (*backward_shares)(const AttentionParams&, const QueryTile&, char* scratch);
  void (*backward)(const AttentionParams&, const KeyTile&, const Turn&, char* scratch);
  void (*backward_finish)(const AttentionParams&, const QueryTile&, char* scratch);  // dq_sum -> dq, turned back

  void (*backward_bias)(const AttentionParams&, const BiasTile&, char* scratch);

  double (*burst)(DType, int64_t rounds);  // for peak.h

  int64_t (*append_scratch)(const AttentionParams&);
  void (*append)(const AttentionParams&, const KeyTile&, char* scratch);  // a tile of new keys and values

  void (*angles)(const AngleParams&);  // of all tokens, by one thread

  int64_t (*rope_scratch)(const RopeParams&);
  // `tokens` tokens from `first` on, by row 0 of the tables on.
  void (*rope)(const RopeParams&, const Angles&, int64_t batch, int64_t head, int64_t first, int64_t tokens,
               char* scratch);
};

}  // namespace longattn
