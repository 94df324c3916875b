// Products of fp32 matrices by libtorch's brgemm, for CPUs whose AVX-512 the BLAS behind torch.mm leaves idle: MKL does
// on other vendors' (benchmarks/RESULTS.md, scoring in fp32). Every entry is one sum in a fixed order, whatever the
// threads.
//
// brgemm takes its right-hand side as panels [K, 64]; those whose rows lie far apart in memory are copied into one of
// the thread's own.

#include <algorithm>
#include <array>
#include <cstdint>
#include <exception>
#include <vector>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace {

namespace blas = at::native::cpublas;

constexpr int64_t kPanel = 64; // columns of a panel
constexpr int64_t kRows = 128; // rows of the result in one call of brgemm
// Products that one sum runs over: partial sums begin at 0, because one over thousands loses a digit, and the
// divergence of close policies is made of the last digits of the logits.
constexpr int64_t kDepth = 128, kVocabDepth = 256;
// Rows of a power of two apart share a few sets of the cache.
constexpr int64_t kPad = 16;

void check_matrix(const at::Tensor &x, const char *name) {
  TORCH_CHECK_VALUE(x.dim() == 2, name, " must have 2 dimensions, was ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kFloat, name, " must be Float, was ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " must be on the CPU, was on ", x.device());
  TORCH_CHECK_VALUE(x.stride(1) == 1 || x.size(1) <= 1, name, " must have adjacent columns, had strides ", x.strides());
}

void check_sizes(const at::Tensor &x, const char *name, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(x.size(0) == rows && x.size(1) == columns, name, " must be [", rows, ", ", columns, "], was ",
                    x.sizes());
}

// Whether brgemm multiplies here, found by multiplying: a oneDNN held back by its environment may refuse.
bool multiplies() {
  std::array<float, kPanel> right, out;
  const float left = 3.0F;
  right.fill(0.5F);
  try {
    blas::brgemm(1, kPanel, 1, 1, kPanel, kPanel, false, &left, right.data(), out.data());
    blas::brgemm_release(false);
  } catch (const std::exception &) {
    return false;
  }
  return std::all_of(out.begin(), out.end(), [](float x) { return x == 1.5F; });
}

bool fp32_available() {
#if defined(__x86_64__)
  static const bool is_faster = __builtin_cpu_supports("avx512f") && !__builtin_cpu_is("intel") && multiplies();
  return is_faster && at::globalContext().userEnabledMkldnn();
#else
  return false;
#endif
}

// to[column, row] = from[row, column], `count` rows of `depth`; rows of `to` are to_stride apart.
void transpose(const float *from, int64_t stride, int64_t count, int64_t depth, float *to, int64_t to_stride) {
  int64_t row = 0;
#if defined(__x86_64__)
  for (; row + 4 <= count; row += 4) {
    const float *rows = from + row * stride;
    int64_t i = 0;
    for (; i + 4 <= depth; i += 4) {
      __m128 a = _mm_loadu_ps(rows + i), b = _mm_loadu_ps(rows + stride + i);
      __m128 c = _mm_loadu_ps(rows + 2 * stride + i), d = _mm_loadu_ps(rows + 3 * stride + i);
      _MM_TRANSPOSE4_PS(a, b, c, d);
      _mm_storeu_ps(to + (i + 0) * to_stride + row, a);
      _mm_storeu_ps(to + (i + 1) * to_stride + row, b);
      _mm_storeu_ps(to + (i + 2) * to_stride + row, c);
      _mm_storeu_ps(to + (i + 3) * to_stride + row, d);
    }
    for (; i < depth; ++i) {
      for (int64_t k = 0; k < 4; ++k) {
        to[i * to_stride + row + k] = rows[k * stride + i];
      }
    }
  }
#endif
  for (; row < count; ++row) {
    for (int64_t i = 0; i < depth; ++i) {
      to[i * to_stride + row] = from[row * stride + i];
    }
  }
}

// The panel [depth, count] of a matrix, copied.
void copy_panel(const float *from, int64_t stride, int64_t depth, int64_t count, float *panel) {
  for (int64_t row = 0; row < depth; ++row) {
    std::copy_n(from + row * stride, count, panel + row * kPanel);
  }
}

// out [C, V] = hidden [C, D] @ weight [V, D].T
void fp32_logits_(const at::Tensor &hidden, const at::Tensor &weight, const at::Tensor &out) {
  check_matrix(hidden, "hidden");
  check_matrix(weight, "weight");
  check_matrix(out, "out");
  const int64_t num_tokens = hidden.size(0), depth = hidden.size(1), width = weight.size(0);
  check_sizes(weight, "weight", width, depth);
  check_sizes(out, "out", num_tokens, width);
  TORCH_CHECK(fp32_available(), "fp32_logits_ needs a CPU whose AVX-512 brgemm uses better than torch.mm");
  if (depth == 0) {
    out.zero_();
    return;
  }
  const auto *left = hidden.const_data_ptr<float>();
  const auto *right = weight.const_data_ptr<float>();
  auto *result = out.mutable_data_ptr<float>();
  const int64_t num_panels = num_tokens == 0 ? 0 : (width + kPanel - 1) / kPanel;
  at::parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> panel(std::min(kDepth, depth) * kPanel);
    for (int64_t first = begin * kPanel; first < std::min(end * kPanel, width); first += kPanel) {
      const int64_t count = std::min(kPanel, width - first);
      for (int64_t d = 0; d < depth; d += kDepth) {
        const int64_t part = std::min(kDepth, depth - d);
        transpose(right + first * weight.stride(0) + d, weight.stride(0), count, part, panel.data(), kPanel);
        for (int64_t row = 0; row < num_tokens; row += kRows) {
          blas::brgemm(std::min(kRows, num_tokens - row), count, part, hidden.stride(0), kPanel, out.stride(0), d > 0,
                       left + row * hidden.stride(0) + d, panel.data(), result + row * out.stride(0) + first);
        }
      }
    }
    blas::brgemm_release(false);
  });
}

// out [C, D] = grad [C, V] @ weight [V, D], or += with `add`. Partial sums over kVocabDepth entries of the vocabulary
// begin at 0: one sum over all of it would lose a digit.
void fp32_hidden_grad_(const at::Tensor &grad, const at::Tensor &weight, const at::Tensor &out, bool add) {
  check_matrix(grad, "grad");
  check_matrix(weight, "weight");
  check_matrix(out, "out");
  const int64_t num_tokens = grad.size(0), depth = grad.size(1), width = weight.size(1);
  check_sizes(weight, "weight", depth, width);
  check_sizes(out, "out", num_tokens, width);
  TORCH_CHECK(fp32_available(), "fp32_hidden_grad_ needs a CPU whose AVX-512 brgemm uses better than torch.mm");
  if (!add && depth == 0) {
    out.zero_();
    return;
  }
  const auto *left = grad.const_data_ptr<float>();
  const auto *right = weight.const_data_ptr<float>();
  auto *result = out.mutable_data_ptr<float>();
  const int64_t num_panels = num_tokens == 0 ? 0 : (width + kPanel - 1) / kPanel;
  at::parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> panel(kVocabDepth * kPanel);
    // The vocabulary outside: a block of the gradient serves all panels from the cache.
    for (int64_t v = 0; v < depth; v += kVocabDepth) {
      const int64_t part = std::min(kVocabDepth, depth - v);
      for (int64_t first = begin * kPanel; first < std::min(end * kPanel, width); first += kPanel) {
        const int64_t count = std::min(kPanel, width - first);
        copy_panel(right + v * weight.stride(0) + first, weight.stride(0), part, count, panel.data());
        for (int64_t row = 0; row < num_tokens; row += kRows) {
          blas::brgemm(std::min(kRows, num_tokens - row), count, part, grad.stride(0), kPanel, out.stride(0),
                       add || v > 0, left + row * grad.stride(0) + v, panel.data(),
                       result + row * out.stride(0) + first);
        }
      }
    }
    blas::brgemm_release(false);
  });
}

// out [V, D] = grad [C, V].T @ hidden [C, D], or += with `add`.
void fp32_weight_grad_(const at::Tensor &grad, const at::Tensor &hidden, const at::Tensor &out, bool add) {
  check_matrix(grad, "grad");
  check_matrix(hidden, "hidden");
  check_matrix(out, "out");
  const int64_t num_tokens = grad.size(0), num_rows = grad.size(1), width = hidden.size(1);
  check_sizes(hidden, "hidden", num_tokens, width);
  check_sizes(out, "out", num_rows, width);
  TORCH_CHECK(fp32_available(), "fp32_weight_grad_ needs a CPU whose AVX-512 brgemm uses better than torch.mm");
  if (num_tokens == 0) {
    if (!add) {
      out.zero_();
    }
    return;
  }
  const auto *left = grad.const_data_ptr<float>();
  const auto *right = hidden.const_data_ptr<float>();
  auto *result = out.mutable_data_ptr<float>();
  const int64_t num_panels = (width + kPanel - 1) / kPanel;
  const at::Tensor packed = at::empty({num_panels, num_tokens, kPanel}, hidden.options());
  auto *panels = packed.mutable_data_ptr<float>();
  at::parallel_for(0, num_panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      copy_panel(right + panel * kPanel, hidden.stride(0), num_tokens, std::min(kPanel, width - panel * kPanel),
                 panels + panel * num_tokens * kPanel);
    }
  });
  const int64_t stride = (num_tokens + kPad - 1) / kPad * kPad + kPad;
  at::parallel_for(0, (num_rows + kRows - 1) / kRows, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> transposed(kRows * stride);
    for (int64_t first = begin * kRows; first < std::min(end * kRows, num_rows); first += kRows) {
      const int64_t count = std::min(kRows, num_rows - first);
      transpose(left + first, grad.stride(0), num_tokens, count, transposed.data(), stride);
      for (int64_t panel = 0; panel < num_panels; ++panel) {
        const int64_t column = panel * kPanel;
        blas::brgemm(count, std::min(kPanel, width - column), num_tokens, stride, kPanel, out.stride(0), add,
                     transposed.data(), panels + panel * num_tokens * kPanel, result + first * out.stride(0) + column);
      }
    }
    blas::brgemm_release(false);
  });
}

} // namespace

TORCH_LIBRARY_FRAGMENT(copd_kernels, m) {
  m.def("fp32_available() -> bool", &fp32_available);
  m.def("fp32_logits_(Tensor hidden, Tensor weight, Tensor(a!) out) -> ()");
  m.def("fp32_hidden_grad_(Tensor grad, Tensor weight, Tensor(a!) out, bool add) -> ()");
  m.def("fp32_weight_grad_(Tensor grad, Tensor hidden, Tensor(a!) out, bool add) -> ()");
}

TORCH_LIBRARY_IMPL(copd_kernels, CPU, m) {
  m.impl("fp32_logits_", &fp32_logits_);
  m.impl("fp32_hidden_grad_", &fp32_hidden_grad_);
  m.impl("fp32_weight_grad_", &fp32_weight_grad_);
}
