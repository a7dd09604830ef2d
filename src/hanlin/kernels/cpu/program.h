// A program as it is run: every operation with its buffers found, its inputs prepared by whoever makes them, its
// barriers known.
#pragma once

#include <memory>
#include <vector>

#include "lora.h"
#include "step.h"

namespace hl {

// Rows in the form that products want, see Act.
struct Prepared {
  Act act = Act::f32;
  char* rows = nullptr;
  int64_t stride = 0;
};

// Rows of floats lie an odd number of 64 bytes apart: with a power of two they would all be wanted in the same places of
// the cache.
constexpr int64_t row_stride(int64_t width) { return ((width + 15) / 16 | 1) * 16; }

constexpr int32_t op_prepare = -1;  // prepares `out`, where the operation before cannot do that itself

struct Stage {
  hl_op op;
  int32_t number;       // of the operation in the program
  bool wanted = false;  // one row for every wanted token, not for every token
  bool barrier = true;  // behind it
  const hl_weight* weight = nullptr;
  int64_t in_width = 0, out_width = 0, in_stride = 0, out_stride = 0;  // floats of a row, and from row to row
  float *in = nullptr, *in2 = nullptr, *out = nullptr;
  Prepared from;                // LINEAR, HEAD: the input
  std::vector<Prepared> ready;  // forms of `out` (ROPE: none) that later products want
};

// Whether a stage touches only the rows that Team::split gives it, when it reads and when it writes.
inline bool reads_own_rows(int32_t code) {
  return code == HL_OP_EMBED || code == HL_OP_NORM || code == HL_OP_GATE || code == HL_OP_ADD || code == op_prepare;
}
inline bool writes_own_rows(int32_t code) { return reads_own_rows(code) || code == HL_OP_GATHER; }

}  // namespace hl

struct hl_program {
  ~hl_program() { hl_free(memory, bytes); }

  hl_ctx* ctx = nullptr;
  std::vector<hl_weight> weights;
  std::vector<hl_kv> pools;
  std::vector<hl::Stage> stages;
  int32_t n_ops = 0, max_tokens = 0, vocabulary = 0, rotary = 0, heads = 0;
  int64_t head_in = 0, head_out = 0;
  void* memory = nullptr;
  int64_t bytes = 0;
  char* attend_scratch = nullptr;  // attend_bytes a thread
  int64_t attend_bytes = 0;

  // Of the running step.
  hl::AttendPlan plan;
  std::unique_ptr<std::atomic<int32_t>[]> next;  // one for every stage, see attend_some
  hl::Scratch partials, top;
  hl::StepAdapters adapters;
  std::vector<double> seconds;  // empty: nobody wants them
};
