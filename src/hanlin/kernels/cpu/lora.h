// Low-rank additions to the products of a step: y += up (down x), each row with the adapter of its sequence.
//
// The small product down x comes first, on all threads; the other half is added to the results of the large product
// where those are written (see Epilogue), so that activations and residuals behind it see the sum.
#pragma once

#include <vector>

#include "context.h"
#include "linear.h"

namespace hl {

// The adapters of a running step.
struct StepAdapters {
  std::vector<const hl_adapter*> tokens, wanted;  // of every token, of every wanted token; empty: nobody has one
  int64_t stride = 0;                             // floats of a row of `low`
  float* low = nullptr;                           // (tokens, stride), the rows times `down`

  // HL_OK, or a failure with its message. The step has been checked otherwise.
  int32_t take(const hl_step& step, int32_t n_ops);

  bool any() const { return !tokens.empty(); }

 private:
  Scratch memory_;
};

// A team's work before the product of operation `op`: what its epilogue adds to `rows` rows of x. Contains a barrier
// when there is anything to add; otherwise the result says that there is nothing.
struct LowInput {
  const float* x;
  int64_t ldx, in, rows;
  bool wanted;
};
LowRows low_rows(const Team& team, const LinearKernels& kernels, const StepAdapters& adapters, int32_t op,
                 const LowInput& input);

}  // namespace hl
