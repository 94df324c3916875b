// Products of bf16 matrices with fp32 results, by libtorch's brgemm: the logits keep the digits that torch.mm would
// round away, and the gradients are summed up in fp32.
//
// brgemm takes its right-hand side B [K, N] in VNNI layout: panels of 64 columns, and within a panel pairs of rows side
// by side, [N / 64, K / 2, 64, 2]; what is missing to whole panels and pairs is 0. There is a kernel where the CPU has
// AMX or avx512_bf16.

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <exception>

#if defined(__x86_64__)
#include <cpuid.h>
#include <emmintrin.h>
#endif

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace {

namespace blas = at::native::cpublas;

constexpr int64_t kPanel = 64; // columns of a packed panel
// Entries of the left-hand side in one call of brgemm: half of a second-level cache of 512 KiB.
constexpr int64_t kLeftEntries = 1 << 17;

void check_matrix(const at::Tensor &x, const char *name, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x.dim() == 2, name, " must have 2 dimensions, was ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == dtype, name, " must be ", dtype, ", was ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " must be on the CPU, was on ", x.device());
  TORCH_CHECK_VALUE(x.stride(1) == 1 || x.size(1) <= 1, name, " must have adjacent columns, had strides ", x.strides());
}

bool has_avx512_bf16() {
#if defined(__x86_64__)
  unsigned a = 0, b = 0, c = 0, d = 0;
  // Leaf 7, second page: AVX512_BF16 is bit 5 of eax. That the system saves the registers is what the builtin says.
  return __builtin_cpu_supports("avx512f") && __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1U << 5)) != 0;
#else
  return false;
#endif
}

// Whether brgemm multiplies here, found by multiplying: a oneDNN held back by its environment may refuse.
bool multiplies() {
  std::array<at::BFloat16, 2 * kPanel> right;
  std::array<at::BFloat16, 2> left = {2.0F, 3.0F};
  std::array<float, kPanel> out;
  right.fill(0.5F);
  try {
    blas::brgemm(1, kPanel, 2, 2, kPanel, kPanel, false, left.data(), right.data(), out.data());
    blas::brgemm_release();
  } catch (const std::exception &) {
    return false;
  }
  return std::all_of(out.begin(), out.end(), [](float x) { return x == 2.5F; });
}

bool bf16_available() {
  static const bool has_kernel = (blas::could_pack(at::kBFloat16) || has_avx512_bf16()) && multiplies();
  return has_kernel && at::globalContext().userEnabledMkldnn();
}

#if defined(__x86_64__)
inline __m128i load_4(const at::BFloat16 *from) { return _mm_loadu_si128(reinterpret_cast<const __m128i *>(from)); }
inline void store_4(at::BFloat16 *to, __m128i x) { _mm_storeu_si128(reinterpret_cast<__m128i *>(to), x); }
#endif

// 64 rows of `matrix`, of which `count` exist, become the columns of a panel: pairs of their entries are transposed.
void pack_transposed(const at::BFloat16 *matrix, int64_t stride, int64_t count, int64_t depth, at::BFloat16 *panel) {
  const int64_t num_pairs = depth / 2;
  int64_t first_row = 0;
#if defined(__x86_64__)
  for (; first_row + 4 <= count; first_row += 4) {
    const at::BFloat16 *rows = matrix + first_row * stride;
    at::BFloat16 *to = panel + 2 * first_row;
    int64_t pair = 0;
    for (; pair + 4 <= num_pairs; pair += 4) {
      const __m128i a = load_4(rows + 2 * pair), b = load_4(rows + stride + 2 * pair);
      const __m128i c = load_4(rows + 2 * stride + 2 * pair), d = load_4(rows + 3 * stride + 2 * pair);
      const __m128i ab = _mm_unpacklo_epi32(a, b), cd = _mm_unpacklo_epi32(c, d);
      const __m128i ab_high = _mm_unpackhi_epi32(a, b), cd_high = _mm_unpackhi_epi32(c, d);
      store_4(to + (pair + 0) * 2 * kPanel, _mm_unpacklo_epi64(ab, cd));
      store_4(to + (pair + 1) * 2 * kPanel, _mm_unpackhi_epi64(ab, cd));
      store_4(to + (pair + 2) * 2 * kPanel, _mm_unpacklo_epi64(ab_high, cd_high));
      store_4(to + (pair + 3) * 2 * kPanel, _mm_unpackhi_epi64(ab_high, cd_high));
    }
    for (; pair < num_pairs; ++pair) {
      for (int64_t row = 0; row < 4; ++row) {
        std::memcpy(to + pair * 2 * kPanel + 2 * row, rows + row * stride + 2 * pair, 2 * sizeof(at::BFloat16));
      }
    }
  }
#endif
  for (int64_t row = first_row; row < kPanel; ++row) {
    for (int64_t pair = 0; pair < num_pairs; ++pair) {
      at::BFloat16 *to = panel + (pair * kPanel + row) * 2;
      if (row < count) {
        std::memcpy(to, matrix + row * stride + 2 * pair, 2 * sizeof(at::BFloat16));
      } else {
        to[0] = to[1] = 0.0F;
      }
    }
  }
}

// Columns [0, count) of `matrix` as they are: pairs of its rows side by side.
void pack_plain(const at::BFloat16 *matrix, int64_t stride, int64_t num_rows, int64_t count, at::BFloat16 *panel) {
  for (int64_t row = 0; row < num_rows; row += 2) {
    const at::BFloat16 *even = matrix + row * stride;
    const at::BFloat16 *odd = row + 1 < num_rows ? even + stride : nullptr;
    at::BFloat16 *to = panel + row * kPanel;
    int64_t i = 0;
#if defined(__x86_64__)
    for (; i + 8 <= count; i += 8) {
      const __m128i a = load_4(even + i), b = odd == nullptr ? _mm_setzero_si128() : load_4(odd + i);
      store_4(to + 2 * i, _mm_unpacklo_epi16(a, b));
      store_4(to + 2 * i + 8, _mm_unpackhi_epi16(a, b));
    }
#endif
    for (; i < kPanel; ++i) {
      to[2 * i] = i < count ? even[i] : at::BFloat16(0.0F);
      to[2 * i + 1] = i < count && odd != nullptr ? odd[i] : at::BFloat16(0.0F);
    }
  }
}

// The right-hand side `matrix` [K, N], or its transpose if the rows of `matrix` are the columns of B (K even then).
at::Tensor bf16_pack(const at::Tensor &matrix, bool transposed) {
  check_matrix(matrix, "matrix", at::kBFloat16);
  const int64_t depth = matrix.size(transposed ? 1 : 0), width = matrix.size(transposed ? 0 : 1);
  TORCH_CHECK_VALUE(!transposed || depth % 2 == 0, "matrix must have an even number of columns, was ", matrix.sizes());
  const int64_t num_panels = (width + kPanel - 1) / kPanel, num_pairs = (depth + 1) / 2;
  at::Tensor packed = at::empty({num_panels, num_pairs, kPanel, 2}, matrix.options());
  const auto *from = matrix.const_data_ptr<at::BFloat16>();
  auto *to = packed.mutable_data_ptr<at::BFloat16>();
  const int64_t stride = matrix.stride(0);
  at::parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      const int64_t first = panel * kPanel, count = std::min(kPanel, width - first);
      at::BFloat16 *out = to + panel * num_pairs * 2 * kPanel;
      if (transposed) {
        pack_transposed(from + first * stride, stride, count, depth, out);
      } else {
        pack_plain(from + first, stride, depth, count, out);
      }
    }
  });
  return packed;
}

// out [M, N] = a [M, K] @ B, or += with `add`. Every entry is one sum in the order of K, whatever the threads.
void bf16_product_(const at::Tensor &a, const at::Tensor &packed, const at::Tensor &out, bool add) {
  check_matrix(a, "a", at::kBFloat16);
  check_matrix(out, "out", at::kFloat);
  const int64_t num_rows = out.size(0), width = out.size(1), num_panels = (width + kPanel - 1) / kPanel;
  TORCH_CHECK_VALUE(packed.dim() == 4 && packed.is_contiguous() && packed.scalar_type() == at::kBFloat16 &&
                        packed.size(0) == num_panels && packed.size(2) == kPanel && packed.size(3) == 2,
                    "packed must be BFloat16 [", num_panels, ", K / 2, ", kPanel, ", 2], was ", packed.scalar_type(),
                    " ", packed.sizes());
  const int64_t depth = 2 * packed.size(1);
  TORCH_CHECK_VALUE(a.size(0) == num_rows && a.size(1) == depth, "a must be [", num_rows, ", ", depth, "], was ",
                    a.sizes());
  TORCH_CHECK(bf16_available(), "bf16_product_ needs a CPU with AMX or avx512_bf16");
  if (num_rows == 0 || width == 0) {
    return;
  }
  if (depth == 0) {
    if (!add) {
      out.zero_();
    }
    return;
  }
  const int64_t block = std::clamp<int64_t>(kLeftEntries / depth / 16 * 16, 32, 128);
  const int64_t num_blocks = (num_rows + block - 1) / block;
  const auto *left = a.const_data_ptr<at::BFloat16>();
  const auto *right = packed.const_data_ptr<at::BFloat16>();
  auto *result = out.mutable_data_ptr<float>();
  // Neighbours share a panel.
  at::parallel_for(0, num_panels * num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t panel = task / num_blocks, row = task % num_blocks * block, column = panel * kPanel;
      blas::brgemm(std::min(block, num_rows - row), std::min(kPanel, width - column), depth, a.stride(0), kPanel,
                   out.stride(0), add, left + row * a.stride(0), right + panel * depth * kPanel,
                   result + row * out.stride(0) + column);
    }
    blas::brgemm_release();
  });
}

#if defined(__x86_64__)
// A block of 8 by 8.
void transpose_8(const at::BFloat16 *from, int64_t from_stride, at::BFloat16 *to, int64_t to_stride) {
  __m128i x[8], y[8];
  for (int i = 0; i < 8; ++i) {
    x[i] = load_4(from + i * from_stride);
  }
  for (int i = 0; i < 4; ++i) {
    y[2 * i] = _mm_unpacklo_epi16(x[2 * i], x[2 * i + 1]);
    y[2 * i + 1] = _mm_unpackhi_epi16(x[2 * i], x[2 * i + 1]);
  }
  for (int half = 0; half < 8; half += 4) {
    x[half] = _mm_unpacklo_epi32(y[half], y[half + 2]);
    x[half + 1] = _mm_unpackhi_epi32(y[half], y[half + 2]);
    x[half + 2] = _mm_unpacklo_epi32(y[half + 1], y[half + 3]);
    x[half + 3] = _mm_unpackhi_epi32(y[half + 1], y[half + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    store_4(to + 2 * i * to_stride, _mm_unpacklo_epi64(x[i], x[i + 4]));
    store_4(to + (2 * i + 1) * to_stride, _mm_unpackhi_epi64(x[i], x[i + 4]));
  }
}
#endif

// out [N, M] = x [M, N] transposed.
void bf16_transpose_(const at::Tensor &x, const at::Tensor &out) {
  check_matrix(x, "x", at::kBFloat16);
  check_matrix(out, "out", at::kBFloat16);
  const int64_t num_rows = x.size(0), width = x.size(1);
  TORCH_CHECK_VALUE(out.size(0) == width && out.size(1) == num_rows, "out must be [", width, ", ", num_rows, "], was ",
                    out.sizes());
  constexpr int64_t kBlock = 32; // a cache line of bf16
  const auto *from = x.const_data_ptr<at::BFloat16>();
  auto *to = out.mutable_data_ptr<at::BFloat16>();
  const int64_t from_stride = x.stride(0), to_stride = out.stride(0);
  at::parallel_for(0, (width + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(end * kBlock, width);
    for (int64_t column = begin * kBlock; column < last; column += 8) {
      int64_t row = 0;
#if defined(__x86_64__)
      for (; column + 8 <= last && row + 8 <= num_rows; row += 8) {
        transpose_8(from + row * from_stride + column, from_stride, to + column * to_stride + row, to_stride);
      }
#endif
      for (; row < num_rows; ++row) {
        for (int64_t i = column; i < std::min(column + 8, last); ++i) {
          to[i * to_stride + row] = from[row * from_stride + i];
        }
      }
    }
  });
}

} // namespace

TORCH_LIBRARY_FRAGMENT(copd_kernels, m) {
  m.def("bf16_available() -> bool", &bf16_available);
  m.def("bf16_pack(Tensor matrix, bool transposed) -> Tensor");
  m.def("bf16_product_(Tensor a, Tensor packed, Tensor(a!) out, bool add) -> ()");
  m.def("bf16_transpose_(Tensor x, Tensor(a!) out) -> ()");
}

TORCH_LIBRARY_IMPL(copd_kernels, CPU, m) {
  m.impl("bf16_pack", &bf16_pack);
  m.impl("bf16_product_", &bf16_product_);
  m.impl("bf16_transpose_", &bf16_transpose_);
}
