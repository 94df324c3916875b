// Statistics of rows, and the running top k. Compiled once per instruction set, see rows_vector.h.
#pragma once

#include "rows_merge.h"
#include "rows_vector.h"

namespace {

// Columns of a block: both heads and the two buffers of exponentials stay in the first-level cache (32 KiB), and sums
// in fp32 are short. Blocks merge in fp64.
constexpr int64_t kBlock = 2048;
// While a block is computed the next one comes into the second-level cache: memory is about as slow as the arithmetic.
constexpr int kSecondLevel = 2;

inline void note_target(const copd::RowArgs &args, const float *z, int64_t stats_row, int64_t row) {
  const int64_t column = target_column(args, row);
  if (column >= 0) {
    args.stats.at(stats_row, row) = z[column];
  }
}

// Sums of one head over a block, relative to its largest entry.
struct HeadVecs {
  Vec mass = {}, mean = {};
  IntVec num_largest = {};

  // `reference` is the maximum, or any finite number where all entries are -inf: x = z - reference, e = exp(x).
  // The entries equal to the maximum are counted and not summed: a small tail keeps its digits.
  COPD_INLINE void add(Vec z, Vec x, Vec e, float reference) {
    const IntVec is_largest = z == reference;
    num_largest -= is_largest;
    mass += is_largest ? splat(0.0f) : e;
    mean += e * max(x, splat(-200.0f)); // not 0 * -inf
  }

  HeadSums finish(float largest) const {
    HeadSums head;
    // An all -inf block has no entry equal to the reference (0), which gives the empty set: tail -1. NaN stays.
    head.tail = sum(mass) + static_cast<double>(sum(num_largest) - 1);
    head.max = largest;
    head.mean = head.tail == -1.0 ? 0.0 : sum(mean) / (1.0 + head.tail);
    return head.broken() ? broken_head() : head;
  }
};

HeadSums single_block(const float *z, int64_t count) {
  Vec running = splat(-kInfinity);
  for_columns(count, [&](int64_t i, auto part) COPD_INLINE_LAMBDA { running = max(load(z + i, part), running); });
  const float top = largest(running);
  const float reference = top == -kInfinity ? 1.0f : top;
  HeadVecs head;
  for_columns(count, [&](int64_t i, auto part) COPD_INLINE_LAMBDA {
    __builtin_prefetch(z + i + kBlock, 0, kSecondLevel);
    const Vec value = load(z + i, part);
    const Vec x = value - reference;
    head.add(value, x, exp(x), reference);
  });
  return head.finish(top);
}

void single_stats(const copd::RowArgs &args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float *z = args.s.row(row);
    HeadSums total = read_head(args.stats, 0, row);
    for (int64_t first = 0; first < args.columns; first += kBlock) {
      const int64_t count = args.columns - first < kBlock ? args.columns - first : kBlock;
      Shares shares;
      total = merge(total, single_block(z + first, count), shares);
    }
    write_head(total, args.stats, 0, row);
    note_target(args, z, 3, row);
  }
}

// Excess of one side of a block. `first` and `second` are E[u] and E[u + expm1(-u)] around the centre that was used.
double block_excess(double first, double second, double gap, const HeadSums &p, const HeadSums &q) {
  // E[exp(-(u - first))] - 1; first is the centre's rounding error for the student, of the order of the KL for the
  // teacher, and the last term is of second order in it.
  const double excess =
      (1.0 + first + expm1_minus(first)) * second - (first * __builtin_expm1(first) - expm1_minus(first));
  if (first > -0.5 && first < 0.5 && excess < 1.0) {
    return excess > 0.0 ? excess : 0.0;
  }
  const double direct = direct_excess(gap, p.lse(), q.lse());
  return direct > 0.0 ? direct : 0.0;
}

DualSums dual_block(const float *s, const float *t, int64_t count) {
  // Three passes over a block in cache: the maxima; exponentials, masses and mean gaps; the second order around them.
  Vec s_max = splat(-kInfinity), t_max = s_max, gap_there = {};
  for_columns(count, [&](int64_t i, auto part) COPD_INLINE_LAMBDA {
    const Vec a = load(s + i, part), b = load(t + i, part);
    gap_there = a > s_max ? a - b : gap_there;
    s_max = max(a, s_max);
    t_max = max(b, t_max);
  });
  const float s_top = largest(s_max), t_top = largest(t_max);
  const float s_reference = s_top == -kInfinity ? 1.0f : s_top, t_reference = t_top == -kInfinity ? 1.0f : t_top;
  // Gaps are taken from the one at the student's most likely token, so that an offset between the heads costs no
  // digits.
  float origin = 0.0f;
  for (int i = 0; i < kLanes; ++i) {
    if (s_max[i] == s_top && gap_there[i] - gap_there[i] == 0.0f) {
      origin = gap_there[i];
    }
  }

  alignas(64) float s_exp[kBlock + kLanes], t_exp[kBlock + kLanes];
  HeadVecs s_head, t_head;
  Vec gaps = {}, t_gaps = {};
  for_columns(count, [&](int64_t i, auto part) COPD_INLINE_LAMBDA {
    __builtin_prefetch(s + i + kBlock, 0, kSecondLevel);
    const Vec a = load(s + i, part), b = load(t + i, part);
    const Vec x = a - s_reference, y = b - t_reference;
    const Vec p = exp(x), q = exp(y);
    store(s_exp + i, p, Full{});
    store(t_exp + i, q, Full{});
    s_head.add(a, x, p, s_reference);
    t_head.add(b, y, q, t_reference);
    const Vec u = (a - b) - origin;
    gaps += p == 0.0f ? splat(0.0f) : p * u;
    t_gaps += q == 0.0f ? splat(0.0f) : q * u;
  });

  DualSums out;
  out.s = s_head.finish(s_top);
  out.t = t_head.finish(t_top);
  if (out.s.broken() || out.t.broken()) {
    out.gap = out.t_gap = {kNaN, kNaN};
    return out;
  }
  const double s_mass = 1.0 + out.s.tail, t_mass = 1.0 + out.t.tail;
  const double gap = out.s.empty() ? 0.0 : origin + sum(gaps) / s_mass;
  const double t_gap = out.t.empty() ? 0.0 : -(origin + sum(t_gaps) / t_mass);
  const bool finite = gap - gap == 0.0;
  const auto centre = static_cast<float>(finite ? gap : 0.0);
  // q relative to the student's maximum and centre, and back; bounded, so that 0 times it is 0.
  double ratio = static_cast<double>(t_reference) - static_cast<double>(s_reference) + static_cast<double>(centre);
  ratio = ratio > 80.0 ? 80.0 : (ratio < -80.0 ? -80.0 : ratio);
  const auto to_p = static_cast<float>(__builtin_exp(ratio));
  const auto to_q = static_cast<float>(__builtin_exp(-ratio));

  Vec seconds = {}, t_seconds = {};
  for_columns(count, [&](int64_t i, auto part) COPD_INLINE_LAMBDA {
    __builtin_prefetch(t + i + kBlock, 0, kSecondLevel);
    const Vec u = (load(s + i, part) - load(t + i, part)) - centre;
    const Vec p = load(s_exp + i, Full{}), q = load(t_exp + i, Full{});
    const Vec square = u * u;
    const SecondOrder order = second_order(square);
    const Vec odd = u * order.odd;
    // Far from the centre p exp(-u) is the other head's mass, which cannot overflow.
    const Vec far = q * to_p + (p == 0.0f ? splat(0.0f) : p * (u - 1.0f));
    const Vec t_far = p * to_q - (q == 0.0f ? splat(0.0f) : q * (u + 1.0f));
    const IntVec near = abs(u) < kNear;
    seconds += near ? p * (square * (order.even - odd)) : far;
    t_seconds += near ? q * (square * (order.even + odd)) : t_far;
  });
  if (!out.s.empty()) {
    out.gap.gap = gap;
    out.gap.excess = finite ? block_excess(gap - centre, sum(seconds) / s_mass, gap, out.s, out.t) : 0.0;
  }
  if (!out.t.empty()) {
    out.t_gap.gap = t_gap;
    const bool t_finite = t_gap - t_gap == 0.0;
    out.t_gap.excess = t_finite ? block_excess(t_gap + centre, sum(t_seconds) / t_mass, t_gap, out.t, out.s) : 0.0;
  }
  return out;
}

void dual_stats(const copd::RowArgs &args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const float *s = args.s.row(row);
    const float *t = args.t.row(row);
    DualSums total = read_dual(args.stats, row);
    for (int64_t first = 0; first < args.columns; first += kBlock) {
      const int64_t count = args.columns - first < kBlock ? args.columns - first : kBlock;
      total = merge(total, dual_block(s + first, t + first, count));
    }
    write_dual(total, args.stats, row);
    note_target(args, s, 3, row);
    note_target(args, t, 7, row);
  }
}

// Whether (value, index) stands before the entry at `place`; an index of -1 marks an empty place.
inline bool stands_before(float value, int64_t index, const float *values, const int64_t *indices, int64_t place) {
  return value > values[place] || (value == values[place] && (indices[place] < 0 || index < indices[place]));
}

void topk(const copd::RowArgs &args, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 8 * kLanes;
  const int64_t last = args.top_k - 1;
  for (int64_t row = begin; row < end; ++row) {
    const float *z = args.s.row(row);
    float *values = args.values.row(row);
    int64_t *indices = args.indices.row(row);
    for (int64_t first = 0; first < args.columns; first += kChunk) {
      const int64_t count = args.columns - first < kChunk ? args.columns - first : kChunk;
      Vec running = splat(-kInfinity);
      for_columns(count,
                  [&](int64_t i, auto part) COPD_INLINE_LAMBDA { running = max(load(z + first + i, part), running); });
      if (largest(running) < values[last]) {
        continue;
      }
      for (int64_t i = first; i < first + count; ++i) {
        const float value = z[i] == z[i] ? z[i] : -kInfinity;
        const int64_t index = args.v_begin + i;
        if (!stands_before(value, index, values, indices, last)) {
          continue;
        }
        int64_t place = last;
        for (; place > 0 && stands_before(value, index, values, indices, place - 1); --place) {
          values[place] = values[place - 1];
          indices[place] = indices[place - 1];
        }
        values[place] = value;
        indices[place] = index;
      }
    }
  }
}

} // namespace
