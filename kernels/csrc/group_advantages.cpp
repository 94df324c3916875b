// Group advantages over ragged groups: (GRPO-ADV), arXiv 2604.27083. The schema and the meaning of every argument
// stand in copd_kernels/advantages.py; this is the body for CPU tensors.

#include <cmath>
#include <cstdint>
#include <string_view>
#include <tuple>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace {

enum class Scale { population, sample, none, rloo };

Scale parse_scale(std::string_view mode) {
  if (mode == "population") {
    return Scale::population;
  }
  if (mode == "sample") {
    return Scale::sample;
  }
  if (mode == "rloo") {
    return Scale::rloo;
  }
  TORCH_CHECK_VALUE(mode == "none", "mode must be 'population', 'sample', 'none' or 'rloo', was '", mode, "'");
  return Scale::none;
}

// One group, rewards[begin, end). Two passes, because sum(r^2) - n mean^2 cancels for nearly equal rewards.
// Returns whether the rewards are all the same finite number; the advantages are then 0 and not a rounding error
// divided by eps.
bool write_group(const double *rewards, double *advantages, int64_t begin, int64_t end, Scale scale, double eps) {
  const int64_t size = end - begin;
  bool equal = std::isfinite(rewards[begin]);
  double sum = 0.0;
  for (int64_t i = begin; i < end; ++i) {
    equal = equal && rewards[i] == rewards[begin];
    sum += rewards[i];
  }
  if (equal) {
    for (int64_t i = begin; i < end; ++i) {
      advantages[i] = 0.0;
    }
    return true;
  }
  const double mean = sum / static_cast<double>(size);
  double squares = 0.0;
  for (int64_t i = begin; i < end; ++i) {
    advantages[i] = rewards[i] - mean;
    squares += advantages[i] * advantages[i];
  }
  if (scale == Scale::rloo) {
    // r - mean of the others = (r - mean) G / (G - 1); a group of one was equal to itself above, or is not finite.
    const double factor = static_cast<double>(size) / static_cast<double>(size > 1 ? size - 1 : 1);
    for (int64_t i = begin; i < end; ++i) {
      advantages[i] *= factor;
    }
  } else if (scale != Scale::none) {
    const auto count = static_cast<double>(scale == Scale::sample ? size - 1 : size);
    const double divisor = std::sqrt(squares / count) + eps;
    for (int64_t i = begin; i < end; ++i) {
      advantages[i] /= divisor;
    }
  }
  return false;
}

std::tuple<at::Tensor, at::Tensor> group_advantages(const at::Tensor &rewards_B, const at::Tensor &group_ids_B,
                                                    std::string_view mode, double eps) {
  TORCH_CHECK_VALUE(rewards_B.dim() == 1, "rewards_B must be [B], was ", rewards_B.sizes());
  TORCH_CHECK_VALUE(rewards_B.is_floating_point(), "rewards_B must be a floating dtype, was ", rewards_B.dtype());
  TORCH_CHECK_VALUE(!rewards_B.requires_grad(), "rewards_B must not require grad: advantages have no gradient");
  TORCH_CHECK_VALUE(group_ids_B.dtype() == at::kLong, "group_ids_B must be int64, was ", group_ids_B.dtype());
  TORCH_CHECK_VALUE(group_ids_B.sizes() == rewards_B.sizes(), "group_ids_B must be [B] like rewards_B ",
                    rewards_B.sizes(), ", was ", group_ids_B.sizes());
  const Scale scale = parse_scale(mode);
  TORCH_CHECK_VALUE(eps >= 0.0 && std::isfinite(eps), "eps must be >= 0 and finite, was ", eps);

  const int64_t num_rewards = rewards_B.numel();
  const at::Tensor rewards = rewards_B.to(at::kDouble).contiguous();
  const at::Tensor ids = group_ids_B.contiguous();
  const at::Tensor advantages = at::empty({num_rewards}, rewards.options());
  const at::Tensor zero_variance = at::empty({num_rewards}, rewards.options().dtype(at::kBool));
  const double *reward = rewards.const_data_ptr<double>();
  const int64_t *id = ids.const_data_ptr<int64_t>();
  double *advantage = advantages.mutable_data_ptr<double>();
  bool *zero = zero_variance.mutable_data_ptr<bool>();

  int64_t begin = 0;
  while (begin < num_rewards) {
    const int64_t previous = begin == 0 ? 0 : id[begin - 1];
    TORCH_CHECK_VALUE(id[begin] >= previous,
                      "group_ids_B must be non-negative and non-decreasing, so that a group is one run; position ",
                      begin, " holds ", id[begin], " after ", previous);
    int64_t end = begin + 1;
    while (end < num_rewards && id[end] == id[begin]) {
      ++end;
    }
    const bool equal = write_group(reward, advantage, begin, end, scale, eps);
    for (int64_t i = begin; i < end; ++i) {
      zero[i] = equal;
    }
    begin = end;
  }
  const auto dtype = rewards_B.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  return {advantages.to(dtype), zero_variance};
}

} // namespace

TORCH_LIBRARY_IMPL(copd_kernels, CPU, m) { m.impl("group_advantages", &group_advantages); }
