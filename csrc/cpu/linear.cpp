// The ops `w4a16_cpu::linear` and `linear_mxfp4`: they check every argument, then call the code for the best instruction set of
// this machine.
#include "check.h"
#include "dispatch.h"

namespace w4a16_cpu {
namespace {

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
              const std::optional<Tensor>& bias, int64_t group_size) {
  check_x(x, "K");
  check_layout(codes, "codes", 2);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const int64_t K = sizes.back(), M = x.numel() / K, N = codes.size(0);
  sizes.back() = N;
  int bad_zero = 0;
  LinearCall call{};
  call.weight = WeightArguments{"", codes, scales, zeros, group_size}.check("K", K, {N});
  call.weight.bad_zero = &bad_zero;
  call.x_dtype = dtype_of(x);
  call.bias = check_bias(bias, "bias", {N}, "[N]", call.x_dtype, call.bias_dtype);

  Tensor out = torch::stable::new_empty(x, sizes);
  if (M == 0 || N == 0) return out;
  call.M = M;
  call.x = x.const_data_ptr();
  call.out = out.mutable_data_ptr();
  chosen_isa().linear(call);
  check_zeros_met("", bad_zero);
  return out;
}

Tensor linear_mxfp4(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& bias) {
  check_x(x, "K");
  check_layout(codes, "codes", 2);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  const int64_t K = sizes.back(), N = codes.size(0);
  sizes.back() = N;
  LinearCall call{};
  call.weight = check_mxfp4("", codes, scales, "K", K, {N});
  call.x_dtype = dtype_of(x);
  call.bias = check_bias(bias, "bias", {N}, "[N]", call.x_dtype, call.bias_dtype);
  Tensor out = torch::stable::new_empty(x, sizes);
  call.M = x.numel() / K;
  if (call.M == 0 || N == 0) return out;
  call.x = x.const_data_ptr();
  call.out = out.mutable_data_ptr();
  chosen_isa().linear(call);
  return out;
}

}  // namespace
}  // namespace w4a16_cpu

STABLE_TORCH_LIBRARY_FRAGMENT(w4a16_cpu, m) {
  m.def("linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int group_size) -> Tensor");
  m.def("linear_mxfp4(Tensor x, Tensor codes, Tensor scales, Tensor? bias) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(w4a16_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&w4a16_cpu::linear));
  m.impl("linear_mxfp4", TORCH_BOX(&w4a16_cpu::linear_mxfp4));
}
