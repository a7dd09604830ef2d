// Everything of a step that is not a matrix product, compiled once a variant.
#include "ops.h"
#include "simd.h"

namespace hl::HL_VARIANT {

extern const OpKernels op_table;
const OpKernels op_table = {};

}  // namespace hl::HL_VARIANT
