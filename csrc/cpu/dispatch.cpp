// The instruction sets of this machine, and the library `w4a16_cpu`.
#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <atomic>
#include <utility>
#include <vector>

#include "check.h"

namespace w4a16_cpu {

void parallel_for(int64_t count, int64_t grain, void (*body)(int64_t, int64_t, void*), void* context) {
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, count, grain, body, context));
}

int64_t num_threads() { return torch::stable::get_num_threads(); }

namespace {

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

// All that this file was compiled for, best first.
std::vector<Isa> all_isas() {
  std::vector<Isa> isas{
#if defined(__x86_64__)
      {"avx512_bf16", has_avx512_bf16, linear_avx512_bf16, moe_avx512_bf16},
      {"avx512", has_avx512, linear_avx512, moe_avx512},
      {"avx2", has_avx2, linear_avx2, moe_avx2},
#endif
      {"portable", [] { return true; }, linear_portable, moe_portable},
  };
#if defined(__x86_64__)
  // There a bfloat16 dot product takes as long as four float32 multiplications: half of what it does in that time.
  if (__builtin_cpu_is("intel")) std::swap(isas[0], isas[1]);
#endif
  return isas;
}

const std::vector<Isa> kIsas = all_isas();

const Isa* best_isa() {
  for (const Isa& isa : kIsas)
    if (isa.supported()) return &isa;
  return nullptr;
}

std::atomic<const Isa*> chosen{best_isa()};

std::string usable_isas() {
  std::string names;
  for (const Isa& isa : kIsas)
    if (isa.supported()) names += (names.empty() ? "" : ",") + std::string(isa.name);
  return names;
}

std::string set_isa(std::string name) {
  const std::string before = chosen.load()->name;
  for (const Isa& isa : kIsas) {
    if (name == isa.name && isa.supported()) {
      chosen = &isa;
      return before;
    }
  }
  fail("there is no instruction set \"", name, "\" on this machine; there are ", usable_isas(), ".");
}

}  // namespace

const Isa& chosen_isa() { return *chosen.load(); }

}  // namespace w4a16_cpu

STABLE_TORCH_LIBRARY(w4a16_cpu, m) {
  // The instruction sets of this machine, best first; and, for tests and benchmarks, the choice of one (returns the one before).
  m.def("usable_isas() -> str");
  m.def("set_isa(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(w4a16_cpu, CompositeExplicitAutograd, m) {
  m.impl("usable_isas", TORCH_BOX(&w4a16_cpu::usable_isas));
  m.impl("set_isa", TORCH_BOX(&w4a16_cpu::set_isa));
}
