#include "check.h"

namespace w4a16_cpu {

namespace {

using torch::headeronly::ScalarType;

bool is_float(Dtype d) { return d == Dtype::f32 || d == Dtype::f16 || d == Dtype::bf16; }

std::string listed(const std::vector<int64_t>& sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

}  // namespace

std::string shape(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return listed(sizes);
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

void fail_dtype(const Tensor& t, const std::string& name, const char* allowed) {
  fail(name, " must be ", allowed, "; it is ", torch::headeronly::toString(t.scalar_type()), ".");
}

void check_layout(const Tensor& t, const std::string& name, int64_t dim) {
  if (!t.is_cpu()) fail(name, " must be on the CPU; it is not.");
  if (t.dim() != dim) fail(name, " must have ", dim, dim == 1 ? " dimension" : " dimensions", "; its shape is ", shape(t), ".");
  check_dense(t, name);
}

void check_dense(const Tensor& t, const std::string& name) {
  if (!t.is_cpu()) fail(name, " must be on the CPU; it is not.");
  if (!t.is_contiguous()) fail(name, " must be contiguous; it is not (shape ", shape(t), "). Call .contiguous() first.");
}

void check_shape(const Tensor& t, const std::string& name, const std::vector<int64_t>& sizes, const char* meaning) {
  for (size_t i = 0; i < sizes.size(); ++i)
    if (t.size(i) != sizes[i]) fail(name, " must be ", meaning, " = ", listed(sizes), "; its shape is ", shape(t), ".");
}

void check_x(const Tensor& x, const char* columns) {
  if (x.dim() < 1) fail("x must have at least one dimension; it is a scalar.");
  check_dense(x, "x");
  if (!is_float(dtype_of(x))) fail_dtype(x, "x", "bfloat16, float16 or float32");
  if (x.size(-1) <= 0 || x.size(-1) % 8 != 0)
    fail("x must have a positive multiple of 8 columns (", columns, "); its shape is ", shape(x), ".");
}

Weight WeightArguments::check(const char* columns, int64_t K, const std::vector<int64_t>& rows) const {
  if (group_size <= 0 || group_size % 8 != 0 || K % group_size != 0)
    fail(prefix, "group_size must be a positive multiple of 8 that divides ", columns, " = ", K, "; it is ", group_size, ".");
  const int64_t dim = rows.size() + 1;
  const bool experts = dim == 3;
  std::vector<int64_t> words = rows, groups = rows;
  words.push_back(K / 8);
  groups.push_back(K / group_size);
  const char* per_group = experts ? "[E, N, K/group_size]" : "[N, K/group_size]";

  Weight weight{};
  check_layout(codes, prefix + "codes", dim);
  if (codes.scalar_type() != ScalarType::Int) fail_dtype(codes, prefix + "codes", "int32");
  check_shape(codes, prefix + "codes", words, experts ? "[E, N, K/8]" : "[N, K/8]");

  check_layout(scales, prefix + "scales", dim);
  weight.scale_dtype = dtype_of(scales);
  if (!is_float(weight.scale_dtype)) fail_dtype(scales, prefix + "scales", "bfloat16, float16 or float32");
  check_shape(scales, prefix + "scales", groups, per_group);

  if (zeros) {
    check_layout(*zeros, prefix + "zeros", dim);
    weight.zero_dtype = dtype_of(*zeros);
    if (weight.zero_dtype == Dtype::none) fail_dtype(*zeros, prefix + "zeros", "uint8, bfloat16, float16 or float32");
    check_shape(*zeros, prefix + "zeros", groups, per_group);
    weight.zeros = zeros->const_data_ptr();
  }
  weight.codes = static_cast<const int32_t*>(codes.const_data_ptr());
  weight.scales = scales.const_data_ptr();
  weight.N = rows.back();
  weight.K = K;
  weight.group = group_size;
  return weight;
}

Weight check_mxfp4(const std::string& prefix, const Tensor& codes, const Tensor& scales, const char* columns, int64_t K,
                   const std::vector<int64_t>& rows) {
  if (K <= 0 || K % 32 != 0) fail(columns, " must be a positive multiple of 32; it is ", K, ".");
  const int64_t dim = rows.size() + 1;
  std::vector<int64_t> bytes = rows, groups = rows;
  bytes.push_back(K / 2);
  groups.push_back(K / 32);
  for (const auto& [name, tensor] : {std::pair<const char*, const Tensor&>{"codes", codes}, {"scales", scales}}) {
    check_layout(tensor, prefix + name, dim);
    if (tensor.scalar_type() != ScalarType::Byte) fail_dtype(tensor, prefix + name, "uint8");
  }
  check_shape(codes, prefix + "codes", bytes, dim == 3 ? "[E, N, K/2]" : "[N, K/2]");
  check_shape(scales, prefix + "scales", groups, dim == 3 ? "[E, N, K/32]" : "[N, K/32]");
  if (reinterpret_cast<uintptr_t>(codes.const_data_ptr()) % 4 != 0) fail(prefix, "codes must lie at a multiple of 4 bytes.");
  Weight weight{};
  weight.codes = static_cast<const int32_t*>(codes.const_data_ptr());
  weight.scales = scales.const_data_ptr();
  weight.scale_dtype = Dtype::e8m0;
  weight.N = rows.back();
  weight.K = K;
  weight.group = 32;
  return weight;
}

const void* check_bias(const std::optional<Tensor>& bias, const std::string& name, const std::vector<int64_t>& sizes,
                       const char* meaning, Dtype x_dtype, Dtype& dtype) {
  if (!bias) return nullptr;
  check_layout(*bias, name, sizes.size());
  dtype = dtype_of(*bias);
  if (dtype != x_dtype && dtype != Dtype::f32) fail_dtype(*bias, name, "of x's dtype or float32");
  check_shape(*bias, name, sizes, meaning);
  return bias->const_data_ptr();
}

void check_zeros_met(const char* prefix, int bad_zero) {
  if (bad_zero != 0) fail(prefix, "zeros of uint8 must be in 0..16; one of them is ", bad_zero, ".");
}

}  // namespace w4a16_cpu
