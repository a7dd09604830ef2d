// Which instruction sets were compiled, which the CPU has, and the kernels of each.
#pragma once

#include <cstdint>

namespace hl {

struct LinearKernels;  // linear.h
struct OpKernels;      // ops.h

struct Isa {
  const char* name;
  bool (*supported)();
  const LinearKernels* linear;
  const OpKernels* ops;
};

// Best first; `count` of them. Every list ends with "portable".
const Isa* isa_list(int* count);

// By name, or the best one for nullptr. Returns nullptr when unknown or not supported here, and says which in
// `*problem`.
const Isa* isa_find(const char* name, const char** problem);

}  // namespace hl
