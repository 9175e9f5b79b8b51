// A panel: up to 64 query rows of one tile, side by side in the lanes of vectors, and what each of them may see.
#pragma once

#include "cpu/kernels.h"
#include "cpu/kernels/rows.h"

namespace longattn {
namespace {

inline int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

struct Row {
  int64_t head, token;  // token: place in memory
};

// Keys a panel sees: [sinks_start, sinks_stop) + [start, stop), of which [full_start, full_stop) for every row.
struct PanelRange {
  int64_t sinks_start, sinks_stop, start, stop, full_start, full_stop;
};

struct Panel {
  const AttentionParams* params;
  Sequence sequence;
  int64_t kv_head, group;
  int64_t first_row;  // of all rows (query, head in group) of the sequence
  int64_t rows;
  PanelRange range;
};

// Lanes in use: whole vectors on every instruction set.
inline int64_t panel_lanes(const Panel& panel) { return round_up(panel.rows, 16); }

// Drops the keys outside [first, last).
inline void restrict(int64_t first, int64_t last, PanelRange* range) {
  range->sinks_start = larger(range->sinks_start, first);
  range->sinks_stop = smaller(range->sinks_stop, last);
  range->start = larger(range->start, first);
  range->stop = smaller(range->stop, last);
}

inline int64_t query_of(const Panel& panel, int64_t row) { return (panel.first_row + row) / panel.group; }

inline Row locate(const Panel& panel, int64_t row) {
  const int64_t r = panel.first_row + row;
  return {panel.kv_head * panel.group + r % panel.group, panel.sequence.q_start + r / panel.group};
}

inline int64_t bound(const AttentionParams& p, const int32_t* which, const Sequence& s, int64_t query) {
  return which[s.index * p.bounds_batch + query];
}

inline PanelRange panel_range(const Panel& panel) {
  const AttentionParams& p = *panel.params;
  const Sequence& s = panel.sequence;
  const int64_t first = query_of(panel, 0), last = query_of(panel, panel.rows - 1);
  const KeyRange keys = kv_range(p, s, first, last);
  PanelRange range{0, keys.sinks, keys.start, keys.stop, keys.full_start, keys.full_stop};
  if (p.lo) {
    int64_t lo_min = INT64_MAX, lo_max = 0, hi_min = INT64_MAX, hi_max = 0;
    for (int64_t query = first; query <= last; ++query) {
      const int64_t lo = bound(p, p.lo, s, query), hi = bound(p, p.hi, s, query);
      lo_max = larger(lo_max, lo);
      hi_min = smaller(hi_min, hi);
      if (lo >= hi) continue;
      lo_min = smaller(lo_min, lo);
      hi_max = larger(hi_max, hi);
    }
    range.sinks_start = larger(range.sinks_start, lo_min);
    range.sinks_stop = smaller(range.sinks_stop, hi_max);
    range.start = larger(range.start, lo_min);
    range.stop = smaller(range.stop, hi_max);
    range.full_start = larger(range.full_start, lo_max);
    range.full_stop = smaller(range.full_stop, hi_min);
  }
  return range;
}

inline Panel make_panel(const AttentionParams& p, const Sequence& s, int64_t kv_head, int64_t group, int64_t first_row,
                        int64_t rows) {
  Panel panel{&p, s, kv_head, group, first_row, rows, {}};
  panel.range = panel_range(panel);
  return panel;
}

// For each lane: keys of [low, upper] are visible, or of [floor, upper] if they are sinks. Lanes without a row see
// everything.
template <class T>
struct LaneLimits {
  alignas(64) Int<T> low[kPanelRows], floor[kPanelRows], upper[kPanelRows];
};

// Limits relative to key `base`, cut to [-1, keys].
template <class T>
inline void lane_limits(const Panel& panel, int64_t base, int64_t keys, LaneLimits<T>* out) {
  const AttentionParams& p = *panel.params;
  const Sequence& s = panel.sequence;
  for (int64_t r = 0; r < kPanelRows; ++r) {
    int64_t low = 0, floor = 0, upper = INT64_MAX;
    if (r < panel.rows) {
      const int64_t query = query_of(panel, r), position = position_of(p, s, query);
      upper = s.lk - 1;
      if (p.right >= 0) upper = smaller(upper, position + p.right);
      if (p.left >= 0) low = position - p.left;
      if (p.lo) {
        floor = bound(p, p.lo, s, query);
        upper = smaller(upper, bound(p, p.hi, s, query) - 1);
      }
      low = larger(low, floor);
    } else {
      low = floor = INT64_MIN / 2;
    }
    out->low[r] = static_cast<Int<T>>(larger(-1, smaller(low - base, keys)));
    out->floor[r] = static_cast<Int<T>>(larger(-1, smaller(floor - base, keys)));
    out->upper[r] = static_cast<Int<T>>(upper == INT64_MAX ? keys : larger(-1, smaller(upper - base, keys)));
  }
}

// Whether each of 4 vectors' lanes sees key `base + key`: all ones where it does.
template <class T>
inline IntVec<T> sees(const LaneLimits<T>& limits, int64_t lane, Int<T> key, bool sink) {
  const IntVec<T> low = load_ints<T>((sink ? limits.floor : limits.low) + lane);
  const IntVec<T> upper = load_ints<T>(limits.upper + lane);
  return (key >= low) & (key <= upper);
}

// Rows of `x` at a panel's places, row-major with padding zeroed: dst[kPanelRows][width], rotated, times factor.
// `against_sinks`: as queries turn against sinks, in a cache whose keys turn at their place.
template <class T>
inline void load_panel(const Panel& panel, const Tensor4& x, int64_t columns, int64_t width, T factor, bool rotated,
                       T* dst, bool against_sinks = false) {
  const AttentionParams& p = *panel.params;
  for (int64_t r = 0; r < panel.rows; ++r) {
    const Row row = locate(panel, r);
    T* to = dst + r * width;
    load_row(row_address(x, p.dtype, panel.sequence.row, row.head, row.token), p.dtype, columns, to);
    if (rotated) {
      const int64_t last = p.frame + p.pages.sinks - 1;
      const int64_t at = against_sinks ? smaller(position_of(p, panel.sequence, query_of(panel, r)), last) : row.token;
      rotate_row(to, p.rotated, against_sinks ? p.k_angles : p.q_angles, panel.sequence.index, at, p.interleaved,
                 false);
    }
    if (factor != T(1))
      for (int64_t c = 0; c < columns; ++c) to[c] *= factor;
    for (int64_t c = columns; c < width; ++c) to[c] = T(0);
  }
  std::memset(dst + panel.rows * width, 0, (kPanelRows - panel.rows) * width * sizeof(T));
}

// The rows of keys, or of values, of one head: in a tensor, or in the pages of a cache.
class KeyRows {
 public:
  KeyRows(const AttentionParams& p, const Sequence& s, const Tensor4& x, int64_t kv_head)
      : p_(p), s_(s), x_(x), kv_head_(kv_head), dtype_(p.pages.table ? p.pages.dtype : p.dtype) {
    if (!p.pages.table) {
      row_ = row_address(x, dtype_, s.row, kv_head, s.k_start);
      stop_ = INT64_MAX;
    }
    stride_ = x.token * element_bytes(dtype_);
  }

  DType dtype() const { return dtype_; }

  // Where key j is stored. Fast while j grows.
  char* at(int64_t j) {
    if (j < start_ || j >= stop_) seek(j);
    return row_ + (j - start_) * stride_;
  }

  // Rows of keys [first, first + keys) if they lie one after another in memory, else nullptr.
  char* run(int64_t first, int64_t keys) {
    char* row = at(first);
    return first + keys <= stop_ ? row : nullptr;
  }

  // Asks for a later key's row, if it lies in one run of memory with the latest.
  void prefetch(int64_t j, int64_t bytes) const {
    if (j < stop_)
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row_ + (j - start_) * stride_ + i);
  }

  float& scale(int64_t j) {
    at(j);
    return scales_[j - start_];
  }

  template <class T>
  void load(int64_t j, int64_t columns, T* dst) {
    load_row(at(j), dtype_, columns, dst);
    if (dtype_ == DType::kInt8) {
      const T factor = scale(j);
      for (int64_t c = 0; c < columns; ++c) dst[c] *= factor;
    }
  }

 private:
  // The keys [start_, stop_) around j that lie in one page, one after another.
  void seek(int64_t j) {
    const Pages& pages = p_.pages;
    int64_t slot = j, rest = INT64_MAX;
    if (pages.ring) {
      slot = j < pages.sinks ? j : pages.sinks + (j - pages.sinks) % pages.ring;
      rest = (j < pages.sinks ? pages.sinks : pages.sinks + pages.ring) - slot;
    }
    const int64_t page = pages.table[s_.index * pages.width + slot / pages.slots], place = slot % pages.slots;
    start_ = j;
    stop_ = j + smaller(rest, pages.slots - place);
    row_ = row_address(x_, dtype_, page, kv_head_, place);
    scales_ = x_.scales ? x_.scales + (page * p_.kv_heads + kv_head_) * pages.slots + place : nullptr;
  }

  const AttentionParams& p_;
  const Sequence& s_;
  const Tensor4& x_;
  int64_t kv_head_, stride_, start_ = 0, stop_ = 0;
  DType dtype_;
  char* row_ = nullptr;
  float* scales_ = nullptr;
};

// Whether queries, and keys, turn when they are read.
inline bool turns_queries(const AttentionParams& p) { return p.rotated > 0 && !p.q_turned; }
inline bool turns_keys(const AttentionParams& p) { return p.rotated > 0 && p.k_angles.cos && !p.k_turned; }

// The row of k_angles by which a key turns.
inline int64_t angle_of(const AttentionParams& p, const Sequence& s, int64_t j) {
  return p.frame == 0 || j < p.sinks ? s.k_start + j : j - s.shift + p.frame - 1;
}

// Keys [first, first + keys) of a sequence: dst[keys][width], hidden ones zeroed, so that what they hold never matters.
template <class T>
inline void load_keys(const AttentionParams& p, const Sequence& s, int64_t kv_head, const Tensor4& x, int64_t first,
                      int64_t keys, int64_t columns, int64_t width, bool rotated, T* dst) {
  KeyRows rows(p, s, x, kv_head);
  for (int64_t j = 0; j < keys; ++j) {
    T* to = dst + j * width;
    if (p.key_mask && !p.key_mask[s.index * p.nk + first + j]) {
      std::memset(to, 0, width * sizeof(T));
      continue;
    }
    rows.load(first + j, columns, to);
    if (rotated) rotate_row(to, p.rotated, p.k_angles, s.index, angle_of(p, s, first + j), p.interleaved, false);
    for (int64_t c = columns; c < width; ++c) to[c] = T(0);
  }
}

template <class T>
inline T* at(char* base, int64_t row) {
  return reinterpret_cast<T*>(base) + row;
}

// lse and its like: [batch, q_heads, nq].
inline int64_t row_index(const Panel& panel, const Row& row) {
  const AttentionParams& p = *panel.params;
  return (panel.sequence.row * p.q_heads + row.head) * p.nq + row.token;
}

// Hands out aligned pieces of a scratch area; with a null base it only counts.
struct Arena {
  char* base;
  int64_t used = 0;

  template <class T>
  T* take(int64_t count) {
    char* piece = base ? base + used : nullptr;
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64) +
            64;  // 64 more: tiles of 2^n bytes would share cache sets
    return reinterpret_cast<T*>(piece);
  }
};

}  // namespace
}  // namespace longattn
