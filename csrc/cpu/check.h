// The ops' doors. What does not fit raises a sentence: what was given, what is allowed.
#pragma once

#include "stable.h"

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "calls.h"

namespace w4a16_cpu {

using torch::stable::Tensor;

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  text << "w4a16_cpu: ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

std::string shape(const Tensor& t);
Dtype dtype_of(const Tensor& t);
[[noreturn]] void fail_dtype(const Tensor& t, const std::string& name, const char* allowed);
// On the CPU and contiguous.
void check_dense(const Tensor& t, const std::string& name);
// And with so many dimensions.
void check_layout(const Tensor& t, const std::string& name, int64_t dim);
// meaning: the sizes in words.
void check_shape(const Tensor& t, const std::string& name, const std::vector<int64_t>& sizes, const char* meaning);
// x [..., K] of a float dtype.
void check_x(const Tensor& x, const char* columns);

// Codes, scales and zeros as in Weight, maybe of several experts: with one more dimension in front. The names of the arguments
// begin with `prefix`; `columns` is what the op calls K.
struct WeightArguments {
  const std::string prefix;
  const Tensor& codes;
  const Tensor& scales;
  const std::optional<Tensor>& zeros;
  int64_t group_size;

  Weight check(const char* columns, int64_t K, const std::vector<int64_t>& rows) const;
};

// Codes and scales of experts' MXFP4 weights [E, N, K], K whole groups.
Weight check_mxfp4(const std::string& prefix, const Tensor& codes, const Tensor& scales, const char* columns, int64_t K,
                   const std::vector<int64_t>& rows);

// A bias of these sizes, or none. Its dtype is left in `dtype`.
const void* check_bias(const std::optional<Tensor>& bias, const std::string& name, const std::vector<int64_t>& sizes,
                       const char* meaning, Dtype x_dtype, Dtype& dtype);

// After the call: has it met a uint8 zero above 16?
void check_zeros_met(const char* prefix, int bad_zero);

}  // namespace w4a16_cpu
