// Everything of a step that is not a matrix product: one instruction set's table of kernels.
#pragma once

#include <cstdint>

#include "hanlin_cpu.h"

namespace hl {

struct OpKernels {};

}  // namespace hl
