// Statistics of one row in fp64, and how they merge: copd_kernels/statistics.py has the derivation. Compiled once per
// instruction set, see rows_vector.h.
#pragma once

#include <cstdint>

#include "rows.h"

namespace {

struct HeadSums {
  double max = -__builtin_inf();
  double tail = -1.0;
  double mean = 0.0;
  bool empty() const { return max == -__builtin_inf() && tail == -1.0; }
  bool broken() const { return tail != tail; }
  double lse() const { return empty() ? -__builtin_inf() : max + __builtin_log1p(tail); }
};

struct GapSums {
  double gap = 0.0;
  double excess = 0.0;
};

struct DualSums {
  HeadSums s, t;
  GapSums gap, t_gap;
};

constexpr double kNaN = __builtin_nan("");

inline HeadSums broken_head() { return {kNaN, kNaN, kNaN}; }

// Shares of the two sets in the mass of their union.
struct Shares {
  double a, b;
};

inline HeadSums merge(const HeadSums &a, const HeadSums &b, Shares &shares) {
  shares = {0.0, 0.0};
  if (a.broken() || b.broken()) {
    return broken_head();
  }
  if (a.empty() || b.empty()) {
    shares = {a.empty() ? 0.0 : 1.0, b.empty() ? 0.0 : 1.0};
    return a.empty() ? b : a;
  }
  const bool a_wins = a.max >= b.max;
  const HeadSums &winner = a_wins ? a : b;
  const HeadSums &other = a_wins ? b : a;
  const double offset = other.max - winner.max;
  const double mass = (offset == 0.0 ? 1.0 : __builtin_exp(offset)) * (1.0 + other.tail);
  HeadSums out;
  out.max = winner.max;
  out.tail = winner.tail + mass;
  const double share = mass / (1.0 + out.tail);
  out.mean = (1.0 - share) * winner.mean + share * (other.mean + offset);
  shares = a_wins ? Shares{1.0 - share, share} : Shares{share, 1.0 - share};
  return out;
}

// expm1(k) - k >= 0.
inline double expm1_minus(double k) {
  if (k > -0.01 && k < 0.01) {
    return k * k * (1.0 / 2 + k * (1.0 / 6 + k * (1.0 / 24 + k * (1.0 / 120 + k / 720))));
  }
  return __builtin_expm1(k) - k;
}

// The excess of a set from its gap and log-sums: no cancellation matters once it is of order 1. Held below exp(80).
inline double direct_excess(double gap, double lse_p, double lse_q) {
  const double log_total = gap + lse_q - lse_p;
  return __builtin_expm1(log_total < 80.0 ? log_total : 80.0);
}

// What a set with share, gap and excess adds to the excess around `gap`.
inline double excess_part(double share, const GapSums &part, double gap, const HeadSums &p, const HeadSums &part_q) {
  const double shift = gap - part.gap;
  if (share > 0.0 && shift > -1.0 && shift < 1.0 && part.excess < 1.0) {
    const double second = expm1_minus(shift);
    return share * ((1.0 + shift + second) * part.excess + second);
  }
  // The same in other words: the set's mass under q, weighed as under p, less share (1 + shift). It also holds where
  // the set has no mass under p and its excess says nothing.
  const double mass = 1.0 + direct_excess(gap, p.lse(), part_q.lse());
  const double first = share > 0.0 ? share * (1.0 + shift) : 0.0;
  return mass > first ? mass - first : 0.0;
}

// p: the union's; qa, qb: the other head's sums of the two sets.
inline GapSums merge(const GapSums &a, const GapSums &b, Shares shares, const HeadSums &p, const HeadSums &qa,
                     const HeadSums &qb) {
  if (shares.a == 0.0 && shares.b == 0.0) {
    return {};
  }
  GapSums out;
  if (shares.a == 0.0) {
    out.gap = b.gap;
  } else if (shares.b == 0.0) {
    out.gap = a.gap;
  } else if (a.gap == __builtin_inf() || b.gap == __builtin_inf()) {
    out.gap = __builtin_inf();
  } else {
    out.gap = shares.a >= shares.b ? a.gap + shares.b * (b.gap - a.gap) : b.gap + shares.a * (a.gap - b.gap);
  }
  // The teacher excludes a token that the student allows: the divergence is infinite, and the gap says so.
  if (out.gap == __builtin_inf()) {
    return out;
  }
  out.excess = (shares.a == 0.0 && qa.empty() ? 0.0 : excess_part(shares.a, a, out.gap, p, qa)) +
               (shares.b == 0.0 && qb.empty() ? 0.0 : excess_part(shares.b, b, out.gap, p, qb));
  return out;
}

inline DualSums merge(const DualSums &a, const DualSums &b) {
  DualSums out;
  Shares of_s, of_t;
  out.s = merge(a.s, b.s, of_s);
  out.t = merge(a.t, b.t, of_t);
  if (out.s.broken() || out.t.broken()) {
    out.gap = out.t_gap = {kNaN, kNaN};
    return out;
  }
  out.gap = merge(a.gap, b.gap, of_s, out.s, a.t, b.t);
  out.t_gap = merge(a.t_gap, b.t_gap, of_t, out.t, a.s, b.s);
  return out;
}

// Column of the row's target in this tile, -1 if it is elsewhere.
inline int64_t target_column(const copd::RowArgs &args, int64_t row) {
  const int64_t column = args.target[row] - args.v_begin;
  return args.target[row] >= 0 && column >= 0 && column < args.columns ? column : -1;
}

inline HeadSums read_head(const copd::Matrix<float> &stats, int64_t first, int64_t row) {
  return {stats.at(first, row), stats.at(first + 1, row), stats.at(first + 2, row)};
}

inline void write_head(const HeadSums &head, const copd::Matrix<float> &stats, int64_t first, int64_t row) {
  // NaN in the row leaves no statistic that looks like a number.
  stats.at(first, row) = static_cast<float>(head.broken() ? kNaN : head.max);
  stats.at(first + 1, row) = static_cast<float>(head.tail);
  stats.at(first + 2, row) = static_cast<float>(head.mean);
}

inline GapSums read_gap(const copd::Matrix<float> &stats, int64_t first, int64_t row) {
  return {stats.at(first, row), stats.at(first + 1, row)};
}

inline void write_gap(const GapSums &sums, const copd::Matrix<float> &stats, int64_t first, int64_t row) {
  stats.at(first, row) = static_cast<float>(sums.gap);
  // Finite, so that it can still be multiplied by a share of 0.
  stats.at(first + 1, row) = static_cast<float>(sums.excess > 1e38 ? 1e38 : sums.excess);
}

inline DualSums read_dual(const copd::Matrix<float> &stats, int64_t row) {
  return {read_head(stats, 0, row), read_head(stats, 4, row), read_gap(stats, 8, row), read_gap(stats, 10, row)};
}

inline void write_dual(const DualSums &sums, const copd::Matrix<float> &stats, int64_t row) {
  write_head(sums.s, stats, 0, row);
  write_head(sums.t, stats, 4, row);
  write_gap(sums.gap, stats, 8, row);
  write_gap(sums.t_gap, stats, 10, row);
}

} // namespace
