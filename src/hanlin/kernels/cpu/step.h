// What hl_attend and programs share: checking steps, planning attention, selecting among logits.
#pragma once

#include <atomic>
#include <vector>

#include "context.h"
#include "linear.h"
#include "ops.h"

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
  std::vector<AttendTask> tasks;  // the costly ones first
  std::vector<AttendTask>
      merges;  // sequences and kv heads whose spans several tasks compute: all their spans, all their rows
  int64_t merged_rows = 0;
  int64_t partial_floats = 0;

  void make(const hl_step& step, int32_t heads, const hl_kv& kv, int threads);
};

// This thread's part of an attention: takes tasks by `next` (0 when the team begins), calls done(task) behind each one
// whose rows are finished. When the plan has merges, a barrier must follow, then merge_some.
template <class Done>
void attend_some(const OpKernels& kernels, const Attention& what, const AttendPlan& plan, std::atomic<int32_t>& next,
                 void* scratch, const Done& done) {
  const int32_t n = static_cast<int32_t>(plan.tasks.size());
  for (int32_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < n;) {
    const AttendTask& task = plan.tasks[static_cast<size_t>(i)];
    kernels.attend(what, task, scratch);
    if (task.partial < 0) done(task);
  }
}

template <class Done>
void merge_some(const Team& team, const OpKernels& kernels, const Attention& what, const AttendPlan& plan,
                const Done& done) {
  const Range mine = team.split(plan.merged_rows);
  int64_t first = 0;  // number of the task's first row among all merged rows
  for (AttendTask task : plan.merges) {
    const int64_t end = first + task.row1 - task.row0;
    const int64_t from = mine.begin > first ? mine.begin : first, to = mine.end < end ? mine.end : end;
    const int32_t row0 = task.row0;
    for (int64_t row = from; row < to; row++) kernels.merge(what, task, row0 + static_cast<int32_t>(row - first));
    if (from < to) {
      task.row0 = row0 + static_cast<int32_t>(from - first);
      task.row1 = row0 + static_cast<int32_t>(to - first);
      done(task);
    }
    first = end;
  }
}

// The largest values of rows, and log(sum(exp)), see hl_top. `parts` holds top_scratch() bytes. Contains a barrier;
// none at the end.
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
void top_rows(const Team& team, const OpKernels& kernels, const TopRows& what);

}  // namespace hl
