// What hl_attend and programs share: checking steps, planning attention, selecting among logits.
#pragma once

#include <vector>

#include "context.h"
#include "linear.h"
#include "ops.h"
#include "share.h"

namespace hl {

// nullptr, or what is wrong with the description of a pool.
const char* kv_problem(const hl_kv& kv);

// nullptr, or what is wrong with a rotation.
const char* rope_problem(int32_t style, int32_t head_size, int32_t rotary);

// What an attention over the pools reads of a step; `block_size` and `blocks` are the pools'. HL_OK, or a failure with
// its message.
int32_t check_attention(const hl_step& step, int32_t blocks, int32_t block_size);

// How the attention of a step is shared out. The same for all layers of a step.
struct AttendPlan {
  struct MergeRow {
    int32_t task, row;  // of `merges`
  };
  std::vector<AttendTask> tasks;   // in as many parts as there are threads, each of them with the costly ones first
  std::vector<AttendTask> merges;  // sequences and kv heads whose spans several tasks compute: all their spans and rows
  std::vector<MergeRow> merge_rows;
  int64_t partial_floats = 0;

  void make(const hl_step& step, int32_t heads, const hl_kv& kv, int threads);
};

// The largest values of rows, and log(sum(exp)), see hl_top: first all chunks, then all rows. `parts` holds
// top_scratch() bytes.
struct TopRows {
  const float* x;
  int64_t ldx, rows, columns;
  int32_t k;
  float* values;
  int32_t* ids;
  float* log_sum_exp;
  void* parts;
};
int64_t top_scratch(int64_t rows, int64_t columns, int32_t k);
int64_t top_chunks(const TopRows& what);  // of all rows
void top_chunk(const OpKernels& kernels, const TopRows& what, int64_t chunk);
void top_merge(const TopRows& what, int64_t row);

}  // namespace hl
