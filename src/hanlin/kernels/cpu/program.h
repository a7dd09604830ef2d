// A program as it is run: every operation with its buffers found, its inputs prepared by whoever makes them, its
// barriers known.
#pragma once

#include <memory>
#include <vector>

#include "step.h"

namespace hl {

// Rows in the form that products want, see Act.
struct Prepared {
  Act act = Act::f32;
  char* rows = nullptr;
  int64_t stride = 0;
};

constexpr int32_t op_prepare = -1;  // prepares `out`, where the operation before cannot do that itself

struct Stage {
  hl_op op;
  int32_t number;       // of the operation in the program
  bool wanted = false;  // one row for every wanted token, not for every token
  const hl_weight* weight = nullptr;
  int64_t in_width = 0, out_width = 0;
  float *in = nullptr, *in2 = nullptr, *out = nullptr;
  Prepared from;                // LINEAR, HEAD: the input
  std::vector<Prepared> ready;  // forms of `out` (ROPE: none) that later products want
};

// Whether a stage's rows need nothing but the same rows of what it reads.
inline bool row_by_row(int32_t code) {
  return code == HL_OP_EMBED || code == HL_OP_NORM || code == HL_OP_GATE || code == HL_OP_ADD || code == op_prepare;
}

// Work that threads share out chunk by chunk, all of it done before the next part begins.
enum class Work : uint8_t { rows, linear, rope, attend, merge, head, top, top_merge };
struct Part {
  Work work;
  size_t first, last;  // stages; more than one are done row by row
  int64_t unit = 1;    // of the running step: rows, tiles ... of a chunk
  int64_t n = 0;       // and of them all
};

}  // namespace hl

struct hl_program {
  ~hl_program() { hl_free(memory, bytes); }

  hl_ctx* ctx = nullptr;
  std::vector<hl_weight> weights;
  std::vector<hl_kv> pools;
  std::vector<hl::Stage> stages;
  std::vector<hl::Part> parts;
  int32_t n_ops = 0, max_tokens = 0, vocabulary = 0, rotary = 0, heads = 0;
  int64_t head_in = 0, head_out = 0;
  void* memory = nullptr;
  int64_t bytes = 0;
  char* attend_scratch = nullptr;  // attend_bytes a thread
  int64_t attend_bytes = 0;

  // Of the running step.
  hl::AttendPlan plan;
  std::unique_ptr<hl::Shares[]> shares;  // one for every part
  hl::Scratch partials, top;
  std::vector<double> seconds;  // empty: nobody wants them
};
