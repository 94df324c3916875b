// From the raw product to logits, the second pass, and the gradients of rows. Compiled once per instruction set, see
// rows_vector.h.
#pragma once

#include "rows_merge.h"
#include "rows_vector.h"

namespace {

// How far ahead of the arithmetic memory is asked for.
constexpr int64_t kAhead = 1024;

void prepare(const copd::RowArgs &args, int64_t begin, int64_t end) {
  const auto inverse_cap = static_cast<float>(args.softcap == 0.0 ? 0.0 : 1.0 / args.softcap);
  const auto scale = static_cast<float>((args.softcap == 0.0 ? 1.0 : args.softcap) / args.temperature);
  for (int64_t row = begin; row < end; ++row) {
    float *z = args.s.row(row);
    for_columns(args.columns, [&](int64_t i, auto part) COPD_INLINE_LAMBDA {
      __builtin_prefetch(z + i + kAhead, 1, 2);
      Vec value = load(z + i, part);
      if (args.bias != nullptr) {
        value += load(args.bias + i, part);
      }
      if (args.softcap != 0.0) {
        // An excluded token stays excluded; tanh would bring it back as -softcap.
        value = value == -kInfinity ? value : tanh(value * inverse_cap);
      }
      store(z + i, value * scale, part);
    });
  }
}

// What the gradient and the second pass need of one head's statistics.
struct Softmax {
  double max, log_mass, mean;
  float reference, inverse_mass;

  explicit Softmax(const HeadSums &head)
      : max(head.max), log_mass(__builtin_log1p(head.tail)), mean(head.mean),
        reference(static_cast<float>(head.empty() ? 0.0 : head.max)),
        inverse_mass(static_cast<float>(head.empty() ? 0.0 : 1.0 / (1.0 + head.tail))) {}
  double lse() const { return max + log_mass; }
  COPD_INLINE Vec operator()(Vec z) const { return exp(z - reference) * inverse_mass; }
};

// log p - log q = ((s - t) - gap) + log_excess, kept apart because s - t is close to the gap.
struct LogRatio {
  double gap, log_excess;

  LogRatio(const DualSums &sums, const Softmax &s, const Softmax &t)
      : gap(sums.gap.gap), log_excess(__builtin_log1p(sums.gap.excess)) {
    if (!(sums.gap.excess < 1e4) || gap - gap != 0.0) {
      gap = s.lse() - t.lse();
      log_excess = 0.0;
    }
  }
};

// log(p / m) and log(q / m) of the mixture m = beta q + (1 - beta) p, from v = log q - log p. Only exponentials of
// -|v| are needed, so v may be infinite.
struct MixtureLogs {
  Vec p, q;

  COPD_INLINE MixtureLogs(Vec v, float beta) {
    const auto toward = expm1(-abs(v));
    const Vec share = v > 0.0f ? splat(1.0f - beta) : splat(beta);
    const Vec near = -log1p_nonpositive(max(share * toward, splat(-1.0f + 6e-8f)));
    // m over the larger of p and q is exp(-near).
    p = v > 0.0f ? near - v : near;
    q = v > 0.0f ? near : near + v;
  }
};

// JSD of an entry over p m: M K' v - M K = sum_n kappa_n v^n (n - 1) / n! with the cumulants of Bernoulli(beta).
struct CumulantSeries {
  static constexpr int kOrder = 8;
  static constexpr float kNear = 0.3f;
  float coefficients[kOrder + 1];

  explicit CumulantSeries(double beta) {
    // kappa_n is a polynomial in beta, and kappa_{n+1} = beta (1 - beta) d kappa_n / d beta.
    double kappa[kOrder + 2] = {0.0, 1.0};
    double factorial = 1.0;
    for (int n = 1; n <= kOrder; ++n) {
      factorial *= n;
      double value = 0.0;
      for (int i = kOrder + 1; i >= 0; --i) {
        value = value * beta + kappa[i];
      }
      coefficients[n] = static_cast<float>(value * (n - 1) / factorial);
      double next[kOrder + 2] = {};
      for (int i = 1; i <= kOrder; ++i) {
        next[i] += i * kappa[i];
        next[i + 1] -= i * kappa[i];
      }
      __builtin_memcpy(kappa, next, sizeof(kappa));
    }
  }

  COPD_INLINE Vec operator()(Vec v) const {
    Vec result = splat(coefficients[kOrder]);
    for (int n = kOrder - 1; n >= 2; --n) {
      result = v * result + coefficients[n];
    }
    return v * v * result;
  }
};

// Short sums in fp32, their total in fp64.
constexpr int64_t kSumBlock = 2048;

void second(const copd::RowArgs &args, int64_t begin, int64_t end) {
  const auto beta = static_cast<float>(args.beta);
  const CumulantSeries series(args.beta);
  for (int64_t row = begin; row < end; ++row) {
    const DualSums sums = read_dual(args.stats, row);
    const Softmax p_of(sums.s), q_of(sums.t);
    const LogRatio ratio(sums, p_of, q_of);
    const auto gap = static_cast<float>(ratio.gap), log_excess = static_cast<float>(ratio.log_excess);
    double smaller = 0.0, jsd = 0.0, log_p_over_m = 0.0;
    for (int64_t first = 0; first < args.columns; first += kSumBlock) {
      const float *s = args.s.row(row) + first;
      const float *t = args.t.row(row) + first;
      Vec smaller_part = {}, jsd_part = {}, log_part = {};
      const int64_t count = args.columns - first < kSumBlock ? args.columns - first : kSumBlock;
      for_columns(count, [&](int64_t i, auto part) COPD_INLINE_LAMBDA {
        __builtin_prefetch(s + i + kAhead, 0, 2);
        __builtin_prefetch(t + i + kAhead, 0, 2);
        const Vec a = load(s + i, part), b = load(t + i, part);
        const Vec p = p_of(a), q = q_of(b);
        const Vec v = gap - (a - b) - log_excess;
        const MixtureLogs logs(v, beta);
        const Vec of_p = p == 0.0f ? splat(0.0f) : p * logs.p;
        const Vec of_q = q == 0.0f ? splat(0.0f) : q * logs.q;
        const Vec mixture = beta * q + (1.0f - beta) * p;
        smaller_part += min(p, q);
        jsd_part += abs(v) < CumulantSeries::kNear ? mixture * series(v) : beta * of_q + (1.0f - beta) * of_p;
        log_part += of_p;
      });
      smaller += sum(smaller_part);
      jsd += sum(jsd_part);
      log_p_over_m += sum(log_part);
    }
    const bool broken = sums.s.broken() || sums.t.broken();
    args.second.at(0, row) += static_cast<float>(broken ? kNaN : smaller);
    args.second.at(1, row) += static_cast<float>(broken ? kNaN : jsd);
    args.second.at(2, row) += static_cast<float>(broken ? kNaN : log_p_over_m);
  }
}

// d logit / d raw product.
struct Chain {
  float inverse_temperature, to_tanh;
  bool capped;

  explicit Chain(const copd::RowArgs &args)
      : inverse_temperature(static_cast<float>(1.0 / args.temperature)),
        to_tanh(static_cast<float>(args.softcap == 0.0 ? 0.0 : args.temperature / args.softcap)),
        capped(args.softcap != 0.0) {}

  COPD_INLINE Vec operator()(Vec grad, Vec z) const {
    if (capped) {
      const Vec t = max(z * to_tanh, splat(-1.0f)); // -inf: excluded, and 0 * inf would be NaN
      grad *= 1.0f - t * t;
    }
    return grad * inverse_temperature;
  }

  double operator()(double grad, double z) const {
    if (capped) {
      const double t = z * to_tanh > -1.0 ? z * to_tanh : -1.0;
      grad *= 1.0 - t * t;
    }
    return grad * inverse_temperature;
  }
};

// p (a + e (log p + entropy)) + o, in fp64 at the target: a confident token's p a + o cancels, and 1 - p does not.
inline double at_target(const Softmax &softmax, double z, double a, double e, double o) {
  if (z == -__builtin_inf()) {
    return o + (softmax.mean - softmax.mean); // NaN in a broken row
  }
  const double x = z - softmax.max, logp = x - softmax.log_mass;
  return (o + a) + a * __builtin_expm1(logp) + e * __builtin_exp(logp) * (x - softmax.mean);
}

void single_grad(const copd::RowArgs &args, int64_t begin, int64_t end) {
  const Chain chain(args);
  for (int64_t row = begin; row < end; ++row) {
    float *z = args.s.row(row);
    const Softmax softmax(read_head(args.stats, 0, row));
    const double a = args.coefs.at(0, row), e = args.coefs.at(1, row), o = args.coefs.at(2, row);
    const int64_t target = target_column(args, row);
    const double at = target < 0 ? 0.0 : chain(at_target(softmax, z[target], a, e, o), z[target]);
    const auto slope = static_cast<float>(e), constant = static_cast<float>(a - e * softmax.mean);
    for_columns(args.columns, [&](int64_t i, auto part) COPD_INLINE_LAMBDA {
      __builtin_prefetch(z + i + kAhead, 1, 2);
      const Vec value = load(z + i, part);
      const Vec x = max(value - softmax.reference, splat(-200.0f)); // not 0 * -inf
      store(z + i, chain(softmax(value) * (slope * x + constant), value), part);
    });
    if (target >= 0) {
      z[target] = static_cast<float>(at);
    }
  }
}

template <bool chosen> struct Constant {
  static constexpr bool value = chosen;
};

struct DualCoefs {
  double a, e, o, reverse, forward, jsd;
  bool needs_ratio() const { return forward != 0.0 || jsd != 0.0; }
};

// The terms of forward KL and JSD: -forward p expm1(-delta) + jsd p (log(p / m) - E_p[log(p / m)]).
struct RatioTerms {
  float gap, log_excess, beta, forward, jsd, mean_log;
  Softmax q_of;

  COPD_INLINE Vec operator()(Vec s, Vec t, Vec p) const {
    const Vec v = gap - (s - t) - log_excess;
    const Vec q = q_of(t);
    // q - p, where close as a multiple of p.
    const Vec difference = abs(v) < kNear ? p * expm1_near(v) : q - p;
    Vec grad = -forward * difference;
    if (jsd != 0.0f) {
      const Vec centred = MixtureLogs(v, beta).p - mean_log;
      grad += p == 0.0f ? splat(0.0f) : jsd * p * centred;
    }
    return s == -kInfinity ? splat(0.0f) : grad;
  }
};

void dual_row(const copd::RowArgs &args, const Chain &chain, const DualCoefs &coefs, int64_t row) {
  float *s = args.s.row(row);
  const float *t = args.t.row(row);
  const DualSums sums = read_dual(args.stats, row);
  const Softmax p_of(sums.s), q_of(sums.t);
  const LogRatio ratio(sums, p_of, q_of);
  const auto gap = static_cast<float>(sums.gap.gap);
  const double mean_log = coefs.jsd == 0.0 ? 0.0 : args.second.at(2, row);
  const auto reverse = static_cast<float>(coefs.reverse), slope = static_cast<float>(coefs.e);
  double shift = coefs.a - coefs.e * p_of.mean;
  if ((coefs.reverse != 0.0 && gap - gap != 0.0f) ||
      ((coefs.reverse != 0.0 || coefs.needs_ratio()) && sums.t.broken())) {
    // NaN in the teacher, or an infinite reverse KL: no gradient that looks like one.
    shift = kNaN;
  }
  const auto constant = static_cast<float>(shift);
  const RatioTerms terms = {static_cast<float>(ratio.gap),
                            static_cast<float>(ratio.log_excess),
                            static_cast<float>(args.beta),
                            static_cast<float>(coefs.forward),
                            static_cast<float>(coefs.jsd),
                            static_cast<float>(mean_log),
                            q_of};

  const int64_t target = target_column(args, row);
  double at = 0.0;
  if (target >= 0) {
    // As at_target; the other terms need no second look.
    const double z = s[target];
    at = at_target(p_of, z, coefs.a, coefs.e, coefs.o);
    if (z != -__builtin_inf()) {
      const Vec a = splat(s[target]), b = splat(t[target]), p = p_of(a);
      const Vec w = min(max(a - b - gap, splat(-1e30f)), splat(1e30f));
      const Vec rest = p * (reverse * w) + (coefs.needs_ratio() ? terms(a, b, p) : splat(0.0f));
      at += static_cast<double>(rest[0]);
    }
    at += shift - shift;
    at = chain(at, z);
  }
  const auto step = [&](int64_t i, auto part, auto with_ratio) COPD_INLINE_LAMBDA {
    __builtin_prefetch(s + i + kAhead, 1, 2);
    __builtin_prefetch(t + i + kAhead, 0, 2);
    const Vec a = load(s + i, part), b = load(t + i, part);
    const Vec x = max(a - p_of.reference, splat(-200.0f));
    // Bounded: 0 times it is 0, also where one head or both exclude the token.
    const Vec w = min(max((a - b) - gap, splat(-1e30f)), splat(1e30f));
    const Vec p = p_of(a);
    Vec grad = p * (reverse * w + (slope * x + constant));
    if constexpr (with_ratio.value) {
      grad += terms(a, b, p);
    }
    store(s + i, chain(grad, a), part);
  };
  if (coefs.needs_ratio()) {
    for_columns(args.columns, [&](int64_t i, auto part) COPD_INLINE_LAMBDA { step(i, part, Constant<true>{}); });
  } else {
    for_columns(args.columns, [&](int64_t i, auto part) COPD_INLINE_LAMBDA { step(i, part, Constant<false>{}); });
  }
  if (target >= 0) {
    s[target] = static_cast<float>(at);
  }
}

void dual_grad(const copd::RowArgs &args, int64_t begin, int64_t end) {
  const Chain chain(args);
  for (int64_t row = begin; row < end; ++row) {
    const auto &c = args.coefs;
    dual_row(args, chain, {c.at(0, row), c.at(1, row), c.at(2, row), c.at(3, row), c.at(4, row), c.at(5, row)}, row);
  }
}

} // namespace
