// Vectors of fp32 and the few functions of them that the row kernels need.
//
// This header and the other rows_*.h are compiled once per instruction set. Everything in them has internal linkage,
// and they call no inline function of the standard library: a shared symbol compiled for AVX-512 could be the one that
// the linker keeps for the portable unit.
#pragma once

#include <cstdint>

#include "rows.h"

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t IntVec __attribute__((vector_size(kLanes * 4)));

#define COPD_INLINE inline __attribute__((always_inline))
#define COPD_INLINE_LAMBDA __attribute__((always_inline))

constexpr float kInfinity = __builtin_inff();

COPD_INLINE Vec splat(float value) { return value - Vec{}; }

// Which columns a step of a loop covers: a full vector, or the last few of the row, where the rest reads as `fill`.
struct Full {};
struct Part {
  int64_t count;
};

COPD_INLINE Vec load(const float *from, Full, float = -kInfinity) {
  Vec value;
  __builtin_memcpy(&value, from, sizeof(Vec));
  return value;
}

COPD_INLINE Vec load(const float *from, Part part, float fill = -kInfinity) {
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    lanes[i] = i < part.count ? from[i] : fill;
  }
  return load(lanes, Full{});
}

COPD_INLINE void store(float *to, Vec value, Full) { __builtin_memcpy(to, &value, sizeof(Vec)); }

COPD_INLINE void store(float *to, Vec value, Part part) {
  for (int i = 0; i < part.count; ++i) {
    to[i] = value[i];
  }
}

// step(column, Full or Part) over the columns [0, count).
template <typename Step> COPD_INLINE void for_columns(int64_t count, Step step) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    step(i, Full{});
  }
  if (i < count) {
    step(i, Part{count - i});
  }
}

// NaN in x is passed over, NaN in y wins: the caller's running maximum must survive a NaN.
COPD_INLINE Vec max(Vec x, Vec y) { return x > y ? x : y; }
COPD_INLINE Vec min(Vec x, Vec y) { return x < y ? x : y; }
COPD_INLINE Vec abs(Vec x) { return (Vec)((IntVec)x & 0x7fffffff); }

// Over the lanes, halves first: short chains, and always the same order.
COPD_INLINE double sum(Vec x) {
  double lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) {
    lanes[i] = static_cast<double>(x[i]);
  }
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lanes[i] += lanes[i + half];
    }
  }
  return lanes[0];
}

COPD_INLINE int32_t sum(IntVec x) {
  int32_t total = 0;
  for (int i = 0; i < kLanes; ++i) {
    total += x[i];
  }
  return total;
}

COPD_INLINE float largest(Vec x) {
  float lanes[kLanes];
  store(lanes, x, Full{});
  for (int half = kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
    }
  }
  return lanes[0];
}

// e^x = scale (1 + rest): scale a power of two, rest = expm1 of the remainder in [-ln2 / 2, ln2 / 2]. For x within
// [-87.3, 88]; callers replace what they get outside. NaN gives NaN.
struct Exponential {
  Vec scale, rest;
};

COPD_INLINE Exponential exponential(Vec x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const Vec rounded = x * 1.44269504088896341f + 12582912.0f;
  const Vec n = rounded - 12582912.0f;
  const Vec scale = (Vec)(((IntVec)rounded << 23) + 0x3f800000);
  // ln 2 in two parts; n times the first is exact without FMA, too.
  const Vec r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
  // (expm1(r) - r) / r^2, minimax with weight r^2: error 4.5e-9.
  Vec poly = r * 0x1.6db47cp-10f + 0x1.123b92p-7f;
  poly = r * poly + 0x1.55545ep-5f;
  poly = r * poly + 0x1.55548ep-3f;
  poly = r * poly + 0.5f;
  return {scale, r * r * poly + r};
}

// Below it e^x is subnormal; taken as 0.
constexpr float kSmallestExponent = -87.33f;
// The largest that exp() below is wanted for.
constexpr float kLargestExponent = 80.0f;

// exp(x) for x <= 88; exp(-inf) = 0.
COPD_INLINE Vec exp(Vec x) {
  const Exponential e = exponential(x);
  return x < kSmallestExponent ? splat(0.0f) : e.scale * e.rest + e.scale;
}

// expm1(x) for x <= 88; expm1(-inf) = -1.
COPD_INLINE Vec expm1(Vec x) {
  const Exponential e = exponential(x);
  return x < kSmallestExponent ? splat(-1.0f) : e.scale * e.rest + (e.scale - 1.0f);
}

// log1p(x) for -1 < x <= 0, and NaN. The rounding error of 1 + x is put back at the end (as in fdlibm).
COPD_INLINE Vec log1p_nonpositive(Vec x) {
  const Vec y = 1.0f + x;
  const Vec lost = (x - (y - 1.0f)) / y;
  const IntVec bits = (IntVec)y - 0x3f3504f3; // sqrt(1/2): the mantissa f below lies in [sqrt(1/2), sqrt(2))
  const Vec n = __builtin_convertvector(bits >> 23, Vec);
  const Vec f = (Vec)((bits & 0x7fffff) + 0x3f3504f3) - 1.0f;
  Vec poly = f * 7.0376836292e-2f - 1.1514610310e-1f; // Cephes logf
  poly = f * poly + 1.1676998740e-1f;
  poly = f * poly - 1.2420140846e-1f;
  poly = f * poly + 1.4249322787e-1f;
  poly = f * poly - 1.6668057665e-1f;
  poly = f * poly + 2.0000714765e-1f;
  poly = f * poly - 2.4999993993e-1f;
  poly = f * poly + 3.3333331174e-1f;
  const Vec square = f * f;
  const Vec low = lost + n * -2.12194440e-4f + (square * f * poly - 0.5f * square);
  const Vec result = n * 0.693359375f + (f + low);
  return x == x ? result : x; // the exponent of a NaN is a number
}

COPD_INLINE Vec tanh(Vec x) {
  const Vec e = expm1(-2.0f * abs(x));
  const Vec size = -e / (2.0f + e);
  return x < 0.0f ? -size : size;
}

// Even and odd part of expm1(u) - u, over u^2: (expm1(u) - u) / u^2 = even + u odd, (expm1(-u) + u) / u^2 = even - u
// odd. Taylor; at |u| = 0.5 the next terms are 1e-8 of the whole.
struct SecondOrder {
  Vec even, odd;
};
constexpr float kNear = 0.5f;

COPD_INLINE SecondOrder second_order(Vec square) {
  Vec even = square * (1.0f / 40320) + 1.0f / 720;
  even = square * even + 1.0f / 24;
  even = square * even + 0.5f;
  Vec odd = square * (1.0f / 5040) + 1.0f / 120;
  odd = square * odd + 1.0f / 6;
  return {even, odd};
}

// expm1(u) where |u| < kNear.
COPD_INLINE Vec expm1_near(Vec u) {
  const SecondOrder order = second_order(u * u);
  return u * u * (order.even + u * order.odd) + u;
}

} // namespace
