// The op `w4a16_cpu::moe`: checks every argument, then calls the code for the best instruction set of this machine.
#include <cmath>

#include "check.h"
#include "dispatch.h"

namespace w4a16_cpu {
namespace {

using torch::headeronly::ScalarType;

template <class T>
struct Named {
  const char* name;
  T value;
};

const Named<Activation> kActivations[] = {{"silu", Activation::silu},
                                          {"gelu", Activation::gelu},
                                          {"gelu_tanh", Activation::gelu_tanh},
                                          {"relu", Activation::relu},
                                          {"swigluoai", Activation::swigluoai}};
const Named<GateUp> kGateUps[] = {{"halves", GateUp::halves}, {"interleaved", GateUp::interleaved}, {"none", GateUp::none}};

template <class T, size_t count>
T find(const Named<T> (&all)[count], const char* argument, const std::string& name) {
  std::string names;
  for (const Named<T>& one : all) {
    if (name == one.name) return one.value;
    names += (names.empty() ? "\"" : ", \"") + std::string(one.name) + '"';
  }
  fail(argument, " must be one of ", names, "; it is \"", name, "\".");
}

template <class T>
std::vector<int32_t> narrow_ids(const Tensor& ids, int64_t E) {
  const T* given = static_cast<const T*>(ids.const_data_ptr());
  std::vector<int32_t> narrow(ids.size(0) * ids.size(1));
  for (size_t i = 0; i < narrow.size(); ++i) {
    if (given[i] < -1 || given[i] >= E) fail("topk_ids must be -1 or 0..", E - 1, ", there is ", given[i], " in it.");
    narrow[i] = static_cast<int32_t>(given[i]);
  }
  return narrow;
}

Tensor moe(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids, const Tensor& w13_codes, const Tensor& w13_scales,
           const std::optional<Tensor>& w13_zeros, const std::optional<Tensor>& w13_bias, const Tensor& w2_codes,
           const Tensor& w2_scales, const std::optional<Tensor>& w2_zeros, const std::optional<Tensor>& w2_bias,
           int64_t w13_group_size, int64_t w2_group_size, std::string activation, std::string gate_up, double alpha,
           std::optional<double> limit, bool apply_router_weight_on_input, double routed_scaling) {
  MoeCall call{};
  check_layout(x, "x", 2);
  check_x(x, "H");
  check_layout(topk_ids, "topk_ids", 2);
  const bool wide_ids = topk_ids.scalar_type() == ScalarType::Long;
  if (!wide_ids && topk_ids.scalar_type() != ScalarType::Int) fail_dtype(topk_ids, "topk_ids", "int32 or int64");
  check_layout(topk_weights, "topk_weights", 2);
  if (topk_weights.scalar_type() != ScalarType::Float) fail_dtype(topk_weights, "topk_weights", "float32");
  const int64_t T = x.size(0), H = x.size(1), k = topk_ids.size(1);
  check_shape(topk_ids, "topk_ids", {T, k}, "[T, k]");
  check_shape(topk_weights, "topk_weights", {T, k}, "[T, k]");

  call.activation = find(kActivations, "activation", activation);
  call.gate_up = find(kGateUps, "gate_up", gate_up);
  if (call.activation == Activation::swigluoai && call.gate_up == GateUp::none)
    fail("swigluoai needs a gate: gate_up must be \"halves\" or \"interleaved\"; it is \"none\".");
  check_layout(w13_codes, "w13_codes", 3);
  check_layout(w2_codes, "w2_codes", 3);
  const int64_t E = w13_codes.size(0), I = w2_codes.size(2) * 8;
  if (I == 0) fail("w2_codes must have at least one word a row; its shape is ", shape(w2_codes), ".");
  int bad13 = 0, bad2 = 0;
  call.w13 = WeightArguments{"w13_", w13_codes, w13_scales, w13_zeros, w13_group_size}.check(
      "H", H, {E, call.gate_up == GateUp::none ? I : 2 * I});
  call.w13.partner = call.gate_up == GateUp::halves ? I : 0;
  call.w13.bad_zero = &bad13;
  call.w2 = WeightArguments{"w2_", w2_codes, w2_scales, w2_zeros, w2_group_size}.check("I", I, {E, H});
  call.w2.bad_zero = &bad2;
  call.x_dtype = dtype_of(x);
  call.bias13 = check_bias(w13_bias, "w13_bias", {E, call.w13.N}, "[E, N]", call.x_dtype, call.bias13_dtype);
  call.bias2 = check_bias(w2_bias, "w2_bias", {E, H}, "[E, H]", call.x_dtype, call.bias2_dtype);

  Tensor out = torch::stable::new_empty(x, {T, H});
  if (T == 0) return out;
  const std::vector<int32_t> ids = wide_ids ? narrow_ids<int64_t>(topk_ids, E) : narrow_ids<int32_t>(topk_ids, E);
  call.ids = ids.data();
  call.x = x.const_data_ptr();
  call.weights = static_cast<const float*>(topk_weights.const_data_ptr());
  call.out = out.mutable_data_ptr();
  call.T = T;
  call.top_k = k;
  call.E = E;
  call.alpha = static_cast<float>(alpha);
  call.limit = limit ? static_cast<float>(*limit) : INFINITY;
  call.weight_on_input = apply_router_weight_on_input;
  call.routed_scaling = static_cast<float>(routed_scaling);
  chosen_isa().moe(call);
  check_zeros_met("w13_", bad13);
  check_zeros_met("w2_", bad2);
  return out;
}

}  // namespace
}  // namespace w4a16_cpu

STABLE_TORCH_LIBRARY_FRAGMENT(w4a16_cpu, m) {
  m.def(
      "moe(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w13_codes, Tensor w13_scales, Tensor? w13_zeros, "
      "Tensor? w13_bias, Tensor w2_codes, Tensor w2_scales, Tensor? w2_zeros, Tensor? w2_bias, int w13_group_size, "
      "int w2_group_size, str activation, str gate_up, float alpha, float? limit, bool apply_router_weight_on_input, "
      "float routed_scaling) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(w4a16_cpu, CPU, m) { m.impl("moe", TORCH_BOX(&w4a16_cpu::moe)); }
