// The op `w4a16_cpu::linear`: checks every argument, then calls the code for the best instruction set of this machine.
// Built against LibTorch's stable ABI of 2.11, so that one build serves every later version.
#define TORCH_TARGET_VERSION (((0ULL + 2) << 56) | ((0ULL + 11) << 48))

#include "linear.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace w4a16_cpu {

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#if defined(__x86_64__)
// CPUID leaf 7 says avx512_bf16, leaf 1 f16c; not every compiler that we serve knows these names.
bool has_avx2() {
  unsigned a, b, c, d;
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __get_cpuid(1, &a, &b, &c, &d) && (c >> 29 & 1);
}
bool has_avx512() { return has_avx2() && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"); }
bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return has_avx512() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
}
#endif

// Best first.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {"avx512_bf16", has_avx512_bf16, linear_avx512_bf16},
    {"avx512", has_avx512, linear_avx512},
    {"avx2", has_avx2, linear_avx2},
#endif
    {"portable", [] { return true; }, linear_portable},
};

const Isa* best_isa() {
  for (const Isa& isa : kIsas)
    if (isa.supported()) return &isa;
  return nullptr;
}

std::atomic<const Isa*> chosen_isa{best_isa()};

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "w4a16_cpu: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string shape(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

Dtype dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Half: return Dtype::f16;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Byte: return Dtype::u8;
    default: return Dtype::none;
  }
}

bool is_float(Dtype d) { return d == Dtype::f32 || d == Dtype::f16 || d == Dtype::bf16; }

void check_layout(const Tensor& t, const char* name, int64_t dim) {
  if (!t.is_cpu()) fail(name, " must be on the CPU; it is not.");
  if (t.dim() != dim) fail(name, " must have ", dim, dim == 1 ? " dimension" : " dimensions", "; its shape is ", shape(t), ".");
  if (!t.is_contiguous()) fail(name, " must be contiguous; it is not (shape ", shape(t), "). Call .contiguous() first.");
}

void check_shape(const Tensor& t, const char* name, int64_t rows, int64_t cols, const char* meaning) {
  if (t.size(0) != rows || t.size(1) != cols)
    fail(name, " must be ", meaning, " = [", rows, ", ", cols, "]; its shape is ", shape(t), ".");
}

[[noreturn]] void fail_dtype(const Tensor& t, const char* name, const char* allowed) {
  fail(name, " must be ", allowed, "; it is ", torch::headeronly::toString(t.scalar_type()), ".");
}

Call check(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
           const std::optional<Tensor>& bias, int64_t group) {
  Call call{};
  check_layout(x, "x", 2);
  call.x_dtype = dtype_of(x);
  if (!is_float(call.x_dtype)) fail_dtype(x, "x", "bfloat16, float16 or float32");
  call.M = x.size(0);
  call.K = x.size(1);
  if (call.K <= 0 || call.K % 8 != 0) fail("x must have a positive multiple of 8 columns (K); its shape is ", shape(x), ".");
  if (group <= 0 || group % 8 != 0 || call.K % group != 0)
    fail("group_size must be a positive multiple of 8 that divides K = ", call.K, "; it is ", group, ".");
  call.group = group;

  check_layout(codes, "codes", 2);
  if (codes.scalar_type() != ScalarType::Int) fail_dtype(codes, "codes", "int32");
  call.N = codes.size(0);
  check_shape(codes, "codes", call.N, call.K / 8, "[N, K/8]");

  check_layout(scales, "scales", 2);
  call.scale_dtype = dtype_of(scales);
  if (!is_float(call.scale_dtype)) fail_dtype(scales, "scales", "bfloat16, float16 or float32");
  check_shape(scales, "scales", call.N, call.K / group, "[N, K/group_size]");

  if (zeros) {
    check_layout(*zeros, "zeros", 2);
    call.zero_dtype = dtype_of(*zeros);
    if (call.zero_dtype == Dtype::none) fail_dtype(*zeros, "zeros", "uint8, bfloat16, float16 or float32");
    check_shape(*zeros, "zeros", call.N, call.K / group, "[N, K/group_size]");
    call.zeros = zeros->const_data_ptr();
  }
  if (bias) {
    check_layout(*bias, "bias", 1);
    call.bias_dtype = dtype_of(*bias);
    if (call.bias_dtype != call.x_dtype && call.bias_dtype != Dtype::f32) fail_dtype(*bias, "bias", "of x's dtype or float32");
    if (bias->size(0) != call.N) fail("bias must be [N] = [", call.N, "]; its shape is ", shape(*bias), ".");
    call.bias = bias->const_data_ptr();
  }
  call.x = x.const_data_ptr();
  call.codes = static_cast<const int32_t*>(codes.const_data_ptr());
  call.scales = scales.const_data_ptr();
  return call;
}

Tensor linear(const Tensor& x, const Tensor& codes, const Tensor& scales, const std::optional<Tensor>& zeros,
              const std::optional<Tensor>& bias, int64_t group_size) {
  Call call = check(x, codes, scales, zeros, bias, group_size);
  Tensor out = torch::stable::new_empty(x, {call.M, call.N});
  if (call.M == 0 || call.N == 0) return out;
  call.out = out.mutable_data_ptr();
  int bad_zero = 0;
  call.bad_zero = &bad_zero;
  chosen_isa.load()->linear(call);
  if (bad_zero != 0) fail("zeros of uint8 must be in 0..16; one of them is ", bad_zero, ".");
  return out;
}

std::string usable_isas() {
  std::string names;
  for (const Isa& isa : kIsas)
    if (isa.supported()) names += (names.empty() ? "" : ",") + std::string(isa.name);
  return names;
}

std::string set_isa(std::string name) {
  const std::string before = chosen_isa.load()->name;
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.supported()) {
      chosen_isa = &isa;
      return before;
    }
  }
  fail("there is no instruction set \"", name, "\" on this machine; there are ", usable_isas(), ".");
}

}  // namespace
}  // namespace w4a16_cpu

STABLE_TORCH_LIBRARY(w4a16_cpu, m) {
  m.def("linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, int group_size) -> Tensor");
  // The instruction sets of this machine, best first; and, for tests and benchmarks, the choice of one (returns the one before).
  m.def("usable_isas() -> str");
  m.def("set_isa(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(w4a16_cpu, CPU, m) { m.impl("linear", TORCH_BOX(&w4a16_cpu::linear)); }

STABLE_TORCH_LIBRARY_IMPL(w4a16_cpu, CompositeExplicitAutograd, m) {
  m.impl("usable_isas", TORCH_BOX(&w4a16_cpu::usable_isas));
  m.impl("set_isa", TORCH_BOX(&w4a16_cpu::set_isa));
}
