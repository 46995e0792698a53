// The choice of an instruction set.
#pragma once

#include "calls.h"

namespace w4a16_cpu {

// The best one of this machine, or what `set_isa` chose.
const Isa& chosen_isa();

}  // namespace w4a16_cpu
