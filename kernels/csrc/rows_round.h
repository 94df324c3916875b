// The gradient of rows, rounded to bf16 for the products that follow, and what rounding took from its large entries.
// Compiled once per instruction set, see rows_vector.h.
#pragma once

#include "rows_vector.h"

namespace {

typedef uint32_t UintVec __attribute__((vector_size(kLanes * 4)));
typedef uint16_t ShortVec __attribute__((vector_size(kLanes * 2)));

// To the nearest, ties to even, in the low half. NaN stays NaN: its low bits alone may carry it.
COPD_INLINE UintVec to_bf16(Vec x) {
  const UintVec bits = (UintVec)x;
  const UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const UintVec is_number = (UintVec)(x == x);
  return (is_number & rounded) | (~is_number & 0x7fc0u);
}

COPD_INLINE Vec from_bf16(UintVec x) { return (Vec)(x << 16); }

// What rounding takes from an entry, in every lane.
COPD_INLINE Vec lost_of(float entry) {
  const Vec x = splat(entry);
  return x - from_bf16(to_bf16(x));
}

COPD_INLINE void store_halves(uint16_t *to, UintVec x, Full) {
  const ShortVec halves = __builtin_convertvector(x, ShortVec);
  __builtin_memcpy(to, &halves, sizeof(ShortVec));
}

COPD_INLINE void store_halves(uint16_t *to, UintVec x, Part part) {
  for (int i = 0; i < part.count; ++i) {
    to[i] = static_cast<uint16_t>(x[i]);
  }
}

// Rows [begin, end) of `s`, rounded; and in `hits` the columns of each row's entries that are no smaller than its
// threshold and not exact in bf16, in order, as many as there is room for, then -1.
void round_rows(const copd::RowArgs &args, int64_t begin, int64_t end) {
  constexpr int64_t kBlock = 128;
  for (int64_t row = begin; row < end; ++row) {
    const float *z = args.s.row(row);
    uint16_t *to = args.rounded.row(row);
    int32_t *hits = args.hits.row(row);
    const float threshold = args.threshold[row];
    int64_t num_hits = 0;
    for (int64_t first = 0; first < args.columns; first += kBlock) {
      const int64_t count = args.columns - first < kBlock ? args.columns - first : kBlock;
      Vec most = {};
      for_columns(count, [&](int64_t i, auto part) COPD_INLINE_LAMBDA {
        const Vec value = load(z + first + i, part, 0.0f);
        store_halves(to + first + i, to_bf16(value), part);
        most = max(abs(value), most);
      });
      if (!(largest(most) >= threshold)) {
        continue;
      }
      for (int64_t i = first; i < first + count && num_hits < args.max_hits; ++i) {
        if ((z[i] < 0.0f ? -z[i] : z[i]) >= threshold && lost_of(z[i])[0] != 0.0f) {
          hits[num_hits++] = static_cast<int32_t>(i);
        }
      }
    }
    if (num_hits < args.max_hits) {
      hits[num_hits] = -1;
    }
  }
}

// to += scale * from, bf16.
COPD_INLINE void add_scaled(float *to, const uint16_t *from, Vec scale, int64_t size) {
  int64_t d = 0;
  for (; d + kLanes <= size; d += kLanes) {
    ShortVec halves;
    __builtin_memcpy(&halves, from + d, sizeof(ShortVec));
    const Vec value = from_bf16(__builtin_convertvector(halves, UintVec));
    store(to + d, load(to + d, Full{}) + scale * value, Full{});
  }
  for (; d < size; ++d) {
    to[d] += scale[0] * from_bf16(UintVec{} + static_cast<uint32_t>(from[d]))[0];
  }
}

// What rounding took from the hits of the rows [begin, end): out[row] += lost * factor[column].
void correct_rows(const copd::RowArgs &args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const int32_t *hits = args.hits.row(row);
    for (int64_t i = 0; i < args.max_hits && hits[i] >= 0; ++i) {
      add_scaled(args.out.row(row), args.factor.row(hits[i]), lost_of(args.s.row(row)[hits[i]]), args.hidden_size);
    }
  }
}

// The same for the columns [begin, end): out[column] += lost * factor[row].
void correct_columns(const copd::RowArgs &args, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < args.num_rows; ++row) {
    const int32_t *hits = args.hits.row(row);
    for (int64_t i = 0; i < args.max_hits && hits[i] >= 0; ++i) {
      if (hits[i] >= begin && hits[i] < end) {
        add_scaled(args.out.row(hits[i]), args.factor.row(row), lost_of(args.s.row(row)[hits[i]]), args.hidden_size);
      }
    }
  }
}

} // namespace
