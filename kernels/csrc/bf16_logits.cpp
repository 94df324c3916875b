// hidden @ weight.T for bf16 inputs with fp32 results: the logits keep the digits that torch.mm would round away.
//
// brgemm wants the weights in VNNI layout: blocks of 64 vocabulary entries, within a block pairs of hidden dimensions
// side by side, [D / 2, 64, 2]. The kernel itself exists only where the CPU has AMX (or avx512_bf16); on a machine
// without them the operation returns false, and the tests, which check the packing everywhere, have not run brgemm.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace {

namespace blas = at::native::cpublas;

constexpr int64_t kBlockV = 64;  // vocabulary entries of a packed block
constexpr int64_t kBlockC = 128; // tokens of one call of brgemm

void check_bf16(const at::Tensor &x, const char *name) {
  TORCH_CHECK_VALUE(x.dim() == 2, name, " must have 2 dimensions, was ", x.sizes());
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16, name, " must be BFloat16, was ", x.scalar_type());
  TORCH_CHECK_VALUE(x.device().is_cpu(), name, " must be on the CPU, was on ", x.device());
  TORCH_CHECK_VALUE(x.stride(1) == 1 || x.size(1) <= 1, name, " must have adjacent columns, had strides ", x.strides());
}

// `count` rows of the weight, D even, into a block [D / 2, 64, 2]; rows beyond are zeros.
void pack_block(const at::BFloat16 *weight, int64_t stride, int64_t count, int64_t num_hidden, at::BFloat16 *packed) {
  constexpr int64_t kPairs = 16; // a cache line of every row at a time
  const int64_t num_pairs = num_hidden / 2;
  for (int64_t first = 0; first < num_pairs; first += kPairs) {
    const int64_t end = std::min(first + kPairs, num_pairs);
    for (int64_t v = 0; v < kBlockV; ++v) {
      for (int64_t pair = first; pair < end; ++pair) {
        at::BFloat16 *to = packed + (pair * kBlockV + v) * 2;
        if (v < count) {
          std::memcpy(to, weight + v * stride + pair * 2, 2 * sizeof(at::BFloat16));
        } else {
          std::memset(to, 0, 2 * sizeof(at::BFloat16));
        }
      }
    }
  }
}

at::Tensor pack_vnni(const at::Tensor &weight) {
  check_bf16(weight, "weight");
  TORCH_CHECK_VALUE(weight.size(1) % 2 == 0, "weight must have an even number of columns, was ", weight.sizes());
  const int64_t vocab = weight.size(0), num_hidden = weight.size(1);
  const int64_t num_blocks = (vocab + kBlockV - 1) / kBlockV;
  at::Tensor packed = at::empty({num_blocks, num_hidden / 2, kBlockV, 2}, weight.options());
  const auto *from = weight.const_data_ptr<at::BFloat16>();
  auto *to = packed.mutable_data_ptr<at::BFloat16>();
  at::parallel_for(0, num_blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlockV;
      pack_block(from + first * weight.stride(0), weight.stride(0), std::min(kBlockV, vocab - first), num_hidden,
                 to + block * kBlockV * num_hidden);
    }
  });
  return packed;
}

// out [C, Vt] = hidden [C, D] @ weight [Vt, D].T; false, and out as it was, where the CPU has no kernel for it.
bool bf16_logits_(const at::Tensor &hidden, const at::Tensor &weight, const at::Tensor &out) {
  check_bf16(hidden, "hidden");
  check_bf16(weight, "weight");
  const int64_t num_tokens = hidden.size(0), num_hidden = hidden.size(1), vocab = weight.size(0);
  TORCH_CHECK_VALUE(weight.size(1) == num_hidden, "weight must be [Vt, ", num_hidden, "] like hidden ", hidden.sizes(),
                    ", was ", weight.sizes());
  TORCH_CHECK_VALUE(out.dim() == 2 && out.size(0) == num_tokens && out.size(1) == vocab, "out must be [", num_tokens,
                    ", ", vocab, "], was ", out.sizes());
  TORCH_CHECK_VALUE(out.scalar_type() == at::kFloat, "out must be Float, was ", out.scalar_type());
  TORCH_CHECK_VALUE(out.device().is_cpu(), "out must be on the CPU, was on ", out.device());
  TORCH_CHECK_VALUE(out.stride(1) == 1 || vocab <= 1, "out must have adjacent columns, had strides ", out.strides());
  if (num_hidden == 0 || num_hidden % 2 != 0 || !blas::could_pack(at::kBFloat16)) {
    return false;
  }
  const auto *h = hidden.const_data_ptr<at::BFloat16>();
  const auto *w = weight.const_data_ptr<at::BFloat16>();
  float *logits = out.mutable_data_ptr<float>();
  const int64_t num_blocks = (vocab + kBlockV - 1) / kBlockV;
  at::parallel_for(0, num_tokens == 0 ? 0 : num_blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<at::BFloat16> packed(kBlockV * num_hidden);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t v = block * kBlockV, count = std::min(kBlockV, vocab - v);
      pack_block(w + v * weight.stride(0), weight.stride(0), count, num_hidden, packed.data());
      for (int64_t row = 0; row < num_tokens; row += kBlockC) {
        blas::brgemm(std::min(kBlockC, num_tokens - row), count, num_hidden, hidden.stride(0), kBlockV, out.stride(0),
                     false, h + row * hidden.stride(0), packed.data(), logits + row * out.stride(0) + v);
      }
    }
    blas::brgemm_release();
  });
  return true;
}

} // namespace

TORCH_LIBRARY_FRAGMENT(copd_kernels, m) {
  m.def("bf16_logits_(Tensor hidden, Tensor weight, Tensor(a!) out) -> bool");
  m.def("pack_vnni(Tensor weight) -> Tensor");
}

TORCH_LIBRARY_IMPL(copd_kernels, CPU, m) {
  m.impl("bf16_logits_", &bf16_logits_);
  m.impl("pack_vnni", &pack_vnni);
}
