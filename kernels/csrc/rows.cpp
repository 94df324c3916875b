// Dispatch of the row operations: checks the arguments, chooses the instruction set at run time, shares rows over
// torch's threads. Schemas and the meaning of every argument stand in copd_kernels/_rows.py.

#include <algorithm>
#include <atomic>
#include <optional>
#include <string>
#include <string_view>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "rows.h"

namespace {

using copd::Matrix;
using copd::RowArgs;
using copd::RowKernel;
using copd::RowKernels;

// The machine that built the library says nothing about this one.
bool runs_here([[maybe_unused]] const RowKernels &kernels) {
#if defined(COPD_ROWS_AVX512)
  if (&kernels == &copd::rows_avx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
  }
#endif
#if defined(COPD_ROWS_AVX2)
  if (&kernels == &copd::rows_avx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return true;
}

// Best first.
constexpr const RowKernels *kBuilt[] = {
#if defined(COPD_ROWS_AVX512)
    &copd::rows_avx512,
#endif
#if defined(COPD_ROWS_AVX2)
    &copd::rows_avx2,
#endif
    &copd::rows_portable,
};

// nullptr if `isa` is unknown, not built or not what this CPU has.
const RowKernels *find_kernels(std::string_view isa) {
  for (const RowKernels *kernels : kBuilt) {
    if ((isa == "auto" || isa == kernels->isa) && runs_here(*kernels)) {
      return kernels;
    }
  }
  return nullptr;
}

std::atomic<const RowKernels *> &active() {
  static std::atomic<const RowKernels *> kernels = find_kernels("auto");
  return kernels;
}

std::string get_isa() { return active().load()->isa; }

std::string set_isa(std::string_view isa) {
  const RowKernels *kernels = find_kernels(isa);
  std::string names = "'auto'";
  for (const RowKernels *built : kBuilt) {
    if (runs_here(*built)) {
      names += std::string(", '") + built->isa + "'";
    }
  }
  TORCH_CHECK_VALUE(kernels != nullptr, "isa must be one of ", names, " on this machine, was '", isa, "'");
  active() = kernels;
  return kernels->isa;
}

// How many of torch's threads a loop over rows is really shared by: 1 in a build without OpenMP.
int64_t num_row_threads() {
  std::atomic<int64_t> highest = 0;
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const int64_t mine = at::get_thread_num();
    for (int64_t seen = highest; seen < mine && !highest.compare_exchange_weak(seen, mine);) {
    }
  });
  return highest + 1;
}

// Rows of a thread: enough for a thread to be worth waking.
void for_rows(RowKernel RowKernels::*member, const RowArgs &args, int64_t num_rows) {
  if (num_rows == 0 || args.columns == 0) {
    return;
  }
  const RowKernel kernel = active().load()->*member;
  const int64_t grain = std::max<int64_t>(1, 16384 / args.columns);
  at::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

void check_matrix(const at::Tensor &x, const char *name, at::ScalarType dtype) {
  TORCH_CHECK_VALUE(x.dim() == 2, name, " must have 2 dimensions, was ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == dtype, name, " must be ", dtype, ", was ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " must be on the CPU, was on ", x.device());
  TORCH_CHECK_VALUE(x.stride(1) == 1 || x.size(1) <= 1, name, " must have adjacent columns, had strides ", x.strides());
}

void check_sizes(const at::Tensor &x, const char *name, int64_t rows, int64_t columns) {
  TORCH_CHECK_VALUE(x.size(0) == rows && x.size(1) == columns, name, " must be [", rows, ", ", columns, "], was ",
                    x.sizes());
}

Matrix<float> writable(const at::Tensor &x) { return {x.mutable_data_ptr<float>(), x.stride(0)}; }
Matrix<const float> readable(const at::Tensor &x) { return {x.const_data_ptr<float>(), x.stride(0)}; }
// For operations that only read what RowArgs holds as writable.
Matrix<float> unwritten(const at::Tensor &x) { return {const_cast<float *>(x.const_data_ptr<float>()), x.stride(0)}; }

void check_vector(const at::Tensor &x, const char *name, at::ScalarType dtype, int64_t size) {
  TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == size, name, " must be [", size, "], was ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == dtype, name, " must be ", dtype, ", was ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " must be on the CPU, was on ", x.device());
  TORCH_CHECK_VALUE(x.stride(0) == 1 || size <= 1, name, " must be contiguous, had strides ", x.strides());
}

void set_target(RowArgs &args, const at::Tensor &target, int64_t v_begin, int64_t num_rows) {
  check_vector(target, "target", at::kLong, num_rows);
  TORCH_CHECK_VALUE(v_begin >= 0, "v_begin must not be negative, was ", v_begin);
  args.target = target.const_data_ptr<int64_t>();
  args.v_begin = v_begin;
}

// A [rows, C] buffer of one number per token and row.
void check_rows(const at::Tensor &x, const char *name, int64_t rows, int64_t num_tokens) {
  check_matrix(x, name, at::kFloat);
  check_sizes(x, name, rows, num_tokens);
}

void set_chain(RowArgs &args, double temperature, double softcap) {
  TORCH_CHECK_VALUE(temperature > 0.0, "temperature must be positive, was ", temperature);
  TORCH_CHECK_VALUE(softcap >= 0.0, "softcap must not be negative (0: none), was ", softcap);
  args.temperature = temperature;
  args.softcap = softcap;
}

void set_beta(RowArgs &args, double beta) {
  TORCH_CHECK_VALUE(beta >= 0.0 && beta <= 1.0, "beta must be between 0 and 1, was ", beta);
  args.beta = beta;
}

void set_teacher(RowArgs &args, const at::Tensor &s, const at::Tensor &t) {
  check_matrix(t, "t", at::kFloat);
  check_sizes(t, "t", s.size(0), s.size(1));
  args.t = readable(t);
}

void prepare_(const at::Tensor &z, const std::optional<at::Tensor> &bias, double temperature, double softcap) {
  RowArgs args;
  check_matrix(z, "z", at::kFloat);
  set_chain(args, temperature, softcap);
  if (bias.has_value()) {
    check_vector(*bias, "bias", at::kFloat, z.size(1));
    args.bias = bias->const_data_ptr<float>();
  }
  if (args.bias == nullptr && temperature == 1.0 && softcap == 0.0) {
    return;
  }
  args.s = writable(z);
  args.columns = z.size(1);
  for_rows(&RowKernels::prepare, args, z.size(0));
}

void single_stats_(const at::Tensor &z, int64_t v_begin, const at::Tensor &target, const at::Tensor &stats) {
  RowArgs args;
  check_matrix(z, "z", at::kFloat);
  set_target(args, target, v_begin, z.size(0));
  check_rows(stats, "stats", 4, z.size(0));
  args.s = unwritten(z);
  args.stats = writable(stats);
  args.columns = z.size(1);
  for_rows(&RowKernels::single_stats, args, z.size(0));
}

void dual_stats_(const at::Tensor &s, const at::Tensor &t, int64_t v_begin, const at::Tensor &target,
                 const at::Tensor &stats) {
  RowArgs args;
  check_matrix(s, "s", at::kFloat);
  set_teacher(args, s, t);
  set_target(args, target, v_begin, s.size(0));
  check_rows(stats, "stats", 12, s.size(0));
  args.s = unwritten(s);
  args.stats = writable(stats);
  args.columns = s.size(1);
  for_rows(&RowKernels::dual_stats, args, s.size(0));
}

void second_(const at::Tensor &s, const at::Tensor &t, const at::Tensor &stats, double beta, const at::Tensor &second) {
  RowArgs args;
  check_matrix(s, "s", at::kFloat);
  set_teacher(args, s, t);
  check_rows(stats, "stats", 12, s.size(0));
  check_rows(second, "second", 3, s.size(0));
  set_beta(args, beta);
  args.s = unwritten(s);
  args.stats = unwritten(stats);
  args.second = writable(second);
  args.columns = s.size(1);
  for_rows(&RowKernels::second, args, s.size(0));
}

void single_grad_(const at::Tensor &z, int64_t v_begin, const at::Tensor &target, const at::Tensor &stats,
                  const at::Tensor &coefs, double temperature, double softcap) {
  RowArgs args;
  check_matrix(z, "z", at::kFloat);
  set_target(args, target, v_begin, z.size(0));
  check_rows(stats, "stats", 4, z.size(0));
  check_rows(coefs, "coefs", 3, z.size(0));
  set_chain(args, temperature, softcap);
  args.s = writable(z);
  args.stats = unwritten(stats);
  args.coefs = readable(coefs);
  args.columns = z.size(1);
  for_rows(&RowKernels::single_grad, args, z.size(0));
}

void dual_grad_(const at::Tensor &s, const at::Tensor &t, int64_t v_begin, const at::Tensor &target,
                const at::Tensor &stats, const at::Tensor &second, const at::Tensor &coefs, double beta,
                double temperature, double softcap) {
  RowArgs args;
  check_matrix(s, "s", at::kFloat);
  set_teacher(args, s, t);
  set_target(args, target, v_begin, s.size(0));
  check_rows(stats, "stats", 12, s.size(0));
  check_rows(second, "second", 3, s.size(0));
  check_rows(coefs, "coefs", 6, s.size(0));
  set_beta(args, beta);
  set_chain(args, temperature, softcap);
  args.s = writable(s);
  args.stats = unwritten(stats);
  args.second = unwritten(second);
  args.coefs = readable(coefs);
  args.columns = s.size(1);
  for_rows(&RowKernels::dual_grad, args, s.size(0));
}

void topk_(const at::Tensor &z, int64_t v_begin, const at::Tensor &values, const at::Tensor &indices) {
  RowArgs args;
  check_matrix(z, "z", at::kFloat);
  TORCH_CHECK_VALUE(v_begin >= 0, "v_begin must not be negative, was ", v_begin);
  check_matrix(values, "values", at::kFloat);
  check_matrix(indices, "indices", at::kLong);
  check_sizes(values, "values", z.size(0), values.size(1));
  check_sizes(indices, "indices", z.size(0), values.size(1));
  args.s = unwritten(z);
  args.v_begin = v_begin;
  args.values = writable(values);
  args.indices = {indices.mutable_data_ptr<int64_t>(), indices.stride(0)};
  args.top_k = values.size(1);
  args.columns = args.top_k == 0 ? 0 : z.size(1);
  for_rows(&RowKernels::topk, args, z.size(0));
}

void set_hits(RowArgs &args, const at::Tensor &hits, int64_t num_rows) {
  check_matrix(hits, "hits", at::kInt);
  check_sizes(hits, "hits", num_rows, hits.size(1));
  args.hits = {const_cast<int32_t *>(hits.const_data_ptr<int32_t>()), hits.stride(0)};
  args.max_hits = hits.size(1);
}

uint16_t *bf16_data(const at::Tensor &x) {
  return reinterpret_cast<uint16_t *>(const_cast<at::BFloat16 *>(x.const_data_ptr<at::BFloat16>()));
}

void round_bf16_(const at::Tensor &grad, const at::Tensor &threshold, const at::Tensor &rounded,
                 const at::Tensor &hits) {
  RowArgs args;
  check_matrix(grad, "grad", at::kFloat);
  check_vector(threshold, "threshold", at::kFloat, grad.size(0));
  check_matrix(rounded, "rounded", at::kBFloat16);
  check_sizes(rounded, "rounded", grad.size(0), grad.size(1));
  set_hits(args, hits, grad.size(0));
  args.s = unwritten(grad);
  args.threshold = threshold.const_data_ptr<float>();
  args.rounded = {bf16_data(rounded), rounded.stride(0)};
  args.columns = grad.size(1);
  for_rows(&RowKernels::round_rows, args, grad.size(0));
}

void correct_bf16_(const at::Tensor &grad, const at::Tensor &hits, const at::Tensor &factor, const at::Tensor &out,
                   bool transposed) {
  RowArgs args;
  check_matrix(grad, "grad", at::kFloat);
  check_matrix(factor, "factor", at::kBFloat16);
  check_matrix(out, "out", at::kFloat);
  set_hits(args, hits, grad.size(0));
  check_sizes(factor, "factor", grad.size(transposed ? 0 : 1), factor.size(1));
  check_sizes(out, "out", grad.size(transposed ? 1 : 0), factor.size(1));
  args.s = unwritten(grad);
  args.factor = {bf16_data(factor), factor.stride(0)};
  args.out = writable(out);
  args.num_rows = grad.size(0);
  args.columns = grad.size(1);
  args.hidden_size = factor.size(1);
  if (!transposed) {
    for_rows(&RowKernels::correct_rows, args, args.num_rows);
    return;
  }
  // Shared by columns: two rows may add to one of them, and the order is that of the rows.
  const RowKernel kernel = active().load()->correct_columns;
  at::parallel_for(0, args.columns, 64, [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

} // namespace

TORCH_LIBRARY_FRAGMENT(copd_kernels, m) {
  // For tests and reports: which instruction set the row operations use, and to choose another; how many
  // threads share the rows.
  m.def("get_isa() -> str", &get_isa);
  m.def("num_row_threads() -> int", &num_row_threads);
  m.def("set_isa(str isa) -> str", [](std::string_view isa) { return set_isa(isa); });
  // The gradient rounded to bf16, and what that took from its large entries: see rows_round.h.
  m.def("round_bf16_(Tensor grad, Tensor threshold, Tensor(a!) rounded, Tensor(b!) hits) -> ()");
  m.def("correct_bf16_(Tensor grad, Tensor hits, Tensor factor, Tensor(a!) out, bool transposed) -> ()");
}

TORCH_LIBRARY_IMPL(copd_kernels, CPU, m) {
  m.impl("prepare_", &prepare_);
  m.impl("single_stats_", &single_stats_);
  m.impl("dual_stats_", &dual_stats_);
  m.impl("second_", &second_);
  m.impl("single_grad_", &single_grad_);
  m.impl("dual_grad_", &dual_grad_);
  m.impl("topk_", &topk_);
  m.impl("round_bf16_", &round_bf16_);
  m.impl("correct_bf16_", &correct_bf16_);
}
