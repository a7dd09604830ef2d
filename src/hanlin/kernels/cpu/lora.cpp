#include "lora.h"

#include <algorithm>

#include "program.h"

namespace hl {

int32_t StepAdapters::take(const hl_step& step, int32_t n_ops) {
  tokens.clear();
  wanted.clear();
  if (step.adapters == nullptr) return HL_OK;
  int64_t widest = 0;
  for (int32_t s = 0; s < step.sequences; s++) {
    const hl_adapter* adapter = step.adapters[s];
    if (adapter == nullptr) continue;
    if (adapter->n_ops != n_ops)
      return fail(HL_ERR_ARGUMENT, "step: the adapter of sequence %d is for %d operations, the program has %d", s,
                  adapter->n_ops, n_ops);
    widest = std::max<int64_t>(widest, adapter->widest);
  }
  if (widest == 0) return HL_OK;
  tokens.resize(static_cast<size_t>(step.tokens));
  for (int32_t s = 0; s < step.sequences; s++)
    std::fill(tokens.begin() + step.query_start[s], tokens.begin() + step.query_start[s + 1], step.adapters[s]);
  for (int32_t r = 0; r < step.rows; r++) wanted.push_back(tokens[static_cast<size_t>(step.row_index[r])]);
  stride = (widest + 15) / 16 * 16;
  low = static_cast<float*>(memory_.reserve(int64_t{step.tokens} * stride * 4));
  return HL_OK;
}

LowRows low_rows(const Team& team, const LinearKernels& kernels, const StepAdapters& adapters, int32_t op,
                 const LowInput& input) {
  const hl_adapter* const* of = input.wanted ? adapters.wanted.data() : adapters.tokens.data();
  bool any = false;
  for (int64_t row = 0, end; row < input.rows; row = end) {
    const hl_adapter* adapter = of[row];
    for (end = row + 1; end < input.rows && of[end] == adapter;) end++;
    if (adapter == nullptr || adapter->ops[op].rank == 0) continue;
    any = true;
    // Few rows: every thread takes some of the inner dimensions of all; many: all of those of some rows.
    const int32_t rank = adapter->ops[op].rank;
    const bool many = end - row >= 8 * team.size;
    const Range rows = many ? team.split(end - row) : Range{0, end - row};
    const Range inner = many ? Range{0, rank} : team.split(rank, 8);
    if (rows.begin == rows.end || inner.begin == inner.end) continue;
    const int64_t first = row + rows.begin;
    kernels.low(*adapter, op, {input.x + first * input.ldx, input.ldx, input.in, rows.end - rows.begin}, inner,
                adapters.low + first * adapters.stride, adapters.stride);
  }
  if (!any) return {};
  team.barrier();
  return {of, op, adapters.low, adapters.stride};
}

}  // namespace hl

extern "C" int32_t hl_adapter_check(const hl_program* program, const hl_adapter* adapter) {
  using hl::fail;
  if (program == nullptr || adapter == nullptr || adapter->ops == nullptr)
    return fail(HL_ERR_ARGUMENT, "adapter: a null pointer");
  if (adapter->n_ops != program->n_ops)
    return fail(HL_ERR_ARGUMENT, "adapter: %d operations, the program has %d", adapter->n_ops, program->n_ops);
  for (const hl::Stage& stage : program->stages) {
    if (stage.op.code < 0) continue;
    const hl_low_rank& part = adapter->ops[stage.number];
    if (part.rank == 0) continue;
    const bool product = stage.op.code == HL_OP_LINEAR || stage.op.code == HL_OP_HEAD;
    if (!product || part.rank < 0 || part.rank > adapter->widest || part.taken < 1 || part.taken > part.rank ||
        part.down == nullptr || part.up == nullptr || part.first == nullptr)
      return fail(HL_ERR_ARGUMENT, "adapter: operation %d: rank %d, %d taken at once, the widest is %d, or no product",
                  stage.number, part.rank, part.taken, adapter->widest);
    for (int64_t group = 0; group < 2 * hl::tiles_of(*stage.weight); group++)
      if (part.first[group] < -1 || part.first[group] > part.rank - part.taken)
        return fail(HL_ERR_ARGUMENT, "adapter: operation %d: outputs %lld take from %d on, of rank %d", stage.number,
                    static_cast<long long>(group * 16), part.first[group], part.rank);
  }
  return HL_OK;
}
