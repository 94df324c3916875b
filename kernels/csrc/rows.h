// Operations on rows of fp32 logits: what the dispatcher (rows.cpp) hands to one instruction set's unit.
// What the rows of statistics mean stands in copd_kernels/statistics.py, what each operation does in _rows.py.
#pragma once

#include <cstdint>

namespace copd {

// A matrix whose columns are adjacent; a slice of a wider one is welcome.
template <typename T> struct Matrix {
  T *data = nullptr;
  int64_t stride = 0;
  T *row(int64_t index) const { return data + index * stride; }
  T &at(int64_t row_index, int64_t column) const { return data[row_index * stride + column]; }
};

// The union of the arguments of all operations: [C, columns] logits, [F, C] statistics, coefficients and sums.
struct RowArgs {
  Matrix<float> s;       // the student's logits, or those of a single head
  Matrix<const float> t; // the teacher's
  int64_t columns = 0;
  int64_t v_begin = 0;
  const int64_t *target = nullptr;
  Matrix<float> stats;
  Matrix<float> second;
  Matrix<const float> coefs;
  const float *bias = nullptr;
  double beta = 0.0;
  double temperature = 1.0;
  double softcap = 0.0;
  Matrix<float> values; // [C, top_k]
  Matrix<int64_t> indices;
  int64_t top_k = 0;
  // Rounding to bf16, and its correction.
  int64_t num_rows = 0;
  Matrix<uint16_t> rounded;
  const float *threshold = nullptr;
  Matrix<int32_t> hits; // [num_rows, max_hits] columns, then -1
  int64_t max_hits = 0;
  Matrix<const uint16_t> factor; // bf16 [columns or num_rows, hidden_size]
  Matrix<float> out;             // [num_rows or columns, hidden_size]
  int64_t hidden_size = 0;
};

// Each works through the rows [begin, end) alone, so that threads change nothing in the result.
using RowKernel = void (*)(const RowArgs &args, int64_t begin, int64_t end);

struct RowKernels {
  const char *isa;
  RowKernel prepare, single_stats, dual_stats, second, single_grad, dual_grad, topk, round_rows, correct_rows,
      correct_columns;
};

extern const RowKernels rows_portable;
extern const RowKernels rows_avx2;
extern const RowKernels rows_avx512;

} // namespace copd
