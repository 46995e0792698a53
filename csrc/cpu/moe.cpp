// The ops `w4a16_cpu::moe` and `moe_mxfp4`: they check every argument, then call the code for the best instruction set of this
// machine.
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

// What both ops have in common: tokens, routing and how an expert's MLP goes.
struct Arguments {
  const Tensor &x, &topk_weights, &topk_ids;
  const std::optional<Tensor>&w13_bias, &w2_bias;
  const std::string &activation, &gate_up;
  double alpha;
  std::optional<double> limit;
  bool apply_router_weight_on_input;
  double routed_scaling;

  void fill(MoeCall& call) const {
    check_layout(x, "x", 2);
    check_x(x, "H");
    check_layout(topk_ids, "topk_ids", 2);
    if (!wide_ids() && topk_ids.scalar_type() != ScalarType::Int) fail_dtype(topk_ids, "topk_ids", "int32 or int64");
    check_layout(topk_weights, "topk_weights", 2);
    if (topk_weights.scalar_type() != ScalarType::Float) fail_dtype(topk_weights, "topk_weights", "float32");
    call.T = x.size(0);
    call.top_k = topk_ids.size(1);
    if (call.top_k < 1) fail("topk_ids must have at least one choice a token, [T, k]; its shape is ", shape(topk_ids), ".");
    check_shape(topk_ids, "topk_ids", {call.T, call.top_k}, "[T, k]");
    check_shape(topk_weights, "topk_weights", {call.T, call.top_k}, "[T, k]");
    call.activation = find(kActivations, "activation", activation);
    call.gate_up = find(kGateUps, "gate_up", gate_up);
    if (call.activation == Activation::swigluoai && call.gate_up == GateUp::none)
      fail("swigluoai needs a gate: gate_up must be \"halves\" or \"interleaved\"; it is \"none\".");
    call.x_dtype = dtype_of(x);
    call.alpha = static_cast<float>(alpha);
    call.limit = limit ? static_cast<float>(*limit) : INFINITY;
    call.weight_on_input = apply_router_weight_on_input;
    call.routed_scaling = static_cast<float>(routed_scaling);
    call.x_scale = call.h_scale = 1.0f;
  }

  // With the weights in the call.
  Tensor run(MoeCall& call, int64_t E) const {
    call.bias13 = check_bias(w13_bias, "w13_bias", {E, call.w13.N}, "[E, N]", call.x_dtype, call.bias13_dtype);
    call.bias2 = check_bias(w2_bias, "w2_bias", {E, call.w2.N}, "[E, H]", call.x_dtype, call.bias2_dtype);
    Tensor out = torch::stable::new_empty(x, {call.T, call.w2.N});
    if (call.T == 0) return out;
    const std::vector<int32_t> ids = wide_ids() ? narrow_ids<int64_t>(topk_ids, E) : narrow_ids<int32_t>(topk_ids, E);
    call.ids = ids.data();
    call.x = x.const_data_ptr();
    call.weights = static_cast<const float*>(topk_weights.const_data_ptr());
    call.out = out.mutable_data_ptr();
    call.E = E;
    chosen_isa().moe(call);
    return out;
  }

  bool wide_ids() const { return topk_ids.scalar_type() == ScalarType::Long; }
};

Tensor moe(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids, const Tensor& w13_codes, const Tensor& w13_scales,
           const std::optional<Tensor>& w13_zeros, const std::optional<Tensor>& w13_bias, const Tensor& w2_codes,
           const Tensor& w2_scales, const std::optional<Tensor>& w2_zeros, const std::optional<Tensor>& w2_bias,
           int64_t w13_group_size, int64_t w2_group_size, std::string activation, std::string gate_up, double alpha,
           std::optional<double> limit, bool apply_router_weight_on_input, double routed_scaling) {
  MoeCall call{};
  const Arguments arguments{x,       topk_weights, topk_ids, w13_bias, w2_bias, activation,
                            gate_up, alpha,        limit,    apply_router_weight_on_input, routed_scaling};
  arguments.fill(call);
  check_layout(w13_codes, "w13_codes", 3);
  check_layout(w2_codes, "w2_codes", 3);
  const int64_t H = x.size(1), E = w13_codes.size(0), I = w2_codes.size(2) * 8;
  if (I == 0) fail("w2_codes must have at least one word a row; its shape is ", shape(w2_codes), ".");
  int bad13 = 0, bad2 = 0;
  call.w13 = WeightArguments{"w13_", w13_codes, w13_scales, w13_zeros, w13_group_size}.check(
      "H", H, {E, call.gate_up == GateUp::none ? I : 2 * I});
  call.w13.partner = call.gate_up == GateUp::halves ? I : 0;
  call.w13.bad_zero = &bad13;
  call.w2 = WeightArguments{"w2_", w2_codes, w2_scales, w2_zeros, w2_group_size}.check("I", I, {E, H});
  call.w2.bad_zero = &bad2;
  Tensor out = arguments.run(call, E);
  check_zeros_met("w13_", bad13);
  check_zeros_met("w2_", bad2);
  return out;
}

// x_scale, h_scale: both, or none.
float scale_of(const Tensor& scale, const char* name) {
  if (!scale.is_cpu() || scale.scalar_type() != ScalarType::Float || scale.numel() != 1)
    fail(name, " must be one float32 on the CPU; its shape is ", shape(scale), ".");
  return *static_cast<const float*>(scale.const_data_ptr());
}

Tensor moe_mxfp4(const Tensor& x, const Tensor& topk_weights, const Tensor& topk_ids, const Tensor& w13_codes,
                 const Tensor& w13_scales, const std::optional<Tensor>& w13_bias, const Tensor& w2_codes, const Tensor& w2_scales,
                 const std::optional<Tensor>& w2_bias, const std::optional<Tensor>& x_scale, const std::optional<Tensor>& h_scale,
                 std::string activation, std::string gate_up, double alpha, std::optional<double> limit,
                 bool apply_router_weight_on_input, double routed_scaling) {
  MoeCall call{};
  const Arguments arguments{x,       topk_weights, topk_ids, w13_bias, w2_bias, activation,
                            gate_up, alpha,        limit,    apply_router_weight_on_input, routed_scaling};
  arguments.fill(call);
  check_layout(w13_codes, "w13_codes", 3);
  check_layout(w2_codes, "w2_codes", 3);
  const int64_t E = w13_codes.size(0), rows = w13_codes.size(1), gates = call.gate_up == GateUp::none ? 1 : 2;
  call.mxfp4 = true;
  call.I = rows / gates;
  if (call.I == 0 || rows % gates != 0)
    fail("w13_codes must have ", gates, " rows for each of I; its shape is ", shape(w13_codes), ".");
  if (call.gate_up == GateUp::halves && call.I % 8 != 0)
    fail("I must be a multiple of 8 with gate_up \"halves\"; it is ", call.I, ".");
  call.w13 = check_mxfp4("w13_", w13_codes, w13_scales, "H", x.size(1), {E, rows});
  call.w13.partner = call.gate_up == GateUp::halves ? call.I : 0;
  const int64_t whole = (call.I + 31) / 32 * 32;
  call.w2 = check_mxfp4("w2_", w2_codes, w2_scales, "I, rounded up to whole groups,", whole, {E, w2_codes.size(1)});
  if (x_scale.has_value() != h_scale.has_value()) fail("x_scale and h_scale go together.");
  if (x_scale) {
    if (call.weight_on_input) fail("the router's weight on the input does not go together with fp8.");
    call.fp8 = true;
    call.x_scale = scale_of(*x_scale, "x_scale");
    call.h_scale = scale_of(*h_scale, "h_scale");
  }
  return arguments.run(call, E);
}

}  // namespace
}  // namespace w4a16_cpu

STABLE_TORCH_LIBRARY_FRAGMENT(w4a16_cpu, m) {
  m.def(
      "moe(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w13_codes, Tensor w13_scales, Tensor? w13_zeros, "
      "Tensor? w13_bias, Tensor w2_codes, Tensor w2_scales, Tensor? w2_zeros, Tensor? w2_bias, int w13_group_size, "
      "int w2_group_size, str activation, str gate_up, float alpha, float? limit, bool apply_router_weight_on_input, "
      "float routed_scaling) -> Tensor");
  m.def(
      "moe_mxfp4(Tensor x, Tensor topk_weights, Tensor topk_ids, Tensor w13_codes, Tensor w13_scales, Tensor? w13_bias, "
      "Tensor w2_codes, Tensor w2_scales, Tensor? w2_bias, Tensor? x_scale, Tensor? h_scale, str activation, str gate_up, "
      "float alpha, float? limit, bool apply_router_weight_on_input, float routed_scaling) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(w4a16_cpu, CPU, m) {
  m.impl("moe", TORCH_BOX(&w4a16_cpu::moe));
  m.impl("moe_mxfp4", TORCH_BOX(&w4a16_cpu::moe_mxfp4));
}
