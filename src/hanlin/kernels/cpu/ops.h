// Everything of a step that is not a matrix product: one instruction set's table of kernels.
//
// Helpers here are `static`: files compiled for different instruction sets include them, and must not share one copy.
#pragma once

#include <cstdint>

#include "hanlin_cpu.h"

namespace hl {

// ---- the pool's layout, see hl_kv ----------------------------------------------------------------------------------

static inline int64_t padded_head(int32_t head_size) { return (head_size + 31) / 32 * int64_t{32}; }
static inline bool kv_has_params(int32_t kind) { return kind >= HL_KV_INT8; }

// What the keys of a pool are stored as; its values are of its own kind.
static inline int32_t key_kind(int32_t kind) { return kind == HL_KV_INT4 ? HL_KV_INT8 : kind; }

static inline int64_t kv_part_bytes(int32_t kind, int32_t head_size) {
  const int64_t elements = padded_head(head_size) * HL_SLOTS;
  return kind == HL_KV_F32    ? elements * 4
         : kind == HL_KV_BF16 ? elements * 2
         : kind == HL_KV_INT8 ? elements
                              : elements / 2;
}

// Bytes of the keys, of the values, and of all that HL_SLOTS slots of one head have.
static inline int64_t kv_keys_bytes(const hl_kv& kv) { return kv_part_bytes(key_kind(kv.kind), kv.head_size); }
static inline int64_t kv_values_bytes(const hl_kv& kv) { return kv_part_bytes(kv.kind, kv.head_size); }
static inline int64_t kv_slots_bytes(const hl_kv& kv) {
  return kv_keys_bytes(kv) + kv_values_bytes(kv) + (kv_has_params(kv.kind) ? 4 * HL_SLOTS * 2 : 0);
}

static inline int64_t kv_block_bytes(const hl_kv& kv) {
  return kv_slots_bytes(kv) * (kv.block_size / HL_SLOTS) * kv.heads;
}

// Where the HL_SLOTS slots that hold `offset` of a block begin.
static inline uint8_t* kv_slots(const hl_kv& kv, int64_t block, int64_t head, int64_t offset) {
  const int64_t groups = kv.block_size / HL_SLOTS;
  return static_cast<uint8_t*>(kv.data) +
         ((block * kv.heads + head) * groups + offset / HL_SLOTS) * kv_slots_bytes(kv);
}

// Asks for the memory that writing a slot of one head will touch: all lines of the keys beside it, as they lie by
// dimensions, and its values.
static inline void kv_fetch(const hl_kv& kv, int64_t slot, int64_t head) {
  const int64_t offset = slot % kv.block_size, keys = kv_keys_bytes(kv), values = kv_values_bytes(kv);
  const uint8_t* part = kv_slots(kv, slot / kv.block_size, head, offset);
  for (int64_t i = 0; i < keys; i += 64) __builtin_prefetch(part + i, 1);
  const int64_t unit = kv.kind == HL_KV_F32 ? 1 : kv.kind == HL_KV_BF16 ? 2 : 4, a_unit = values / (HL_SLOTS / unit);
  const uint8_t* mine = part + keys + offset % HL_SLOTS / unit * a_unit;
  for (int64_t i = 0; i < a_unit; i += 64) __builtin_prefetch(mine + i, 1);
  if (kv_has_params(kv.kind)) __builtin_prefetch(part + keys + values, 1);
}

// Keys and values of one head of some tokens, ldk and ldv floats apart.
struct KvRows {
  const float *k, *v;
  int64_t ldk, ldv;
};

// ---- attention -----------------------------------------------------------------------------------------------------

// One attention over a pool. A "row" of a sequence and a kv head is one query of one of the heads that share the kv
// head: row = query * (heads / kv->heads) + head, so that rows which read the same keys lie together.
struct Attention {
  const hl_kv* kv;
  const hl_step* step;
  int32_t heads;
  float scale;
  const float* q;
  int64_t ldq;
  float* out;
  int64_t ldo;
  float* partials;  // where tasks that leave merging to others put their results
};

// Rows [row0, row1) of one kv head over the spans [span0, span1). With partial < 0 the spans are all there are, and
// `out` is written; else every span's result goes to its record, record (span - span0) * (row1 - row0) + row - row0
// behind `partial`.
struct AttendTask {
  int32_t sequence, kv_head, row0, row1, span0, span1;
  int64_t partial;
};

constexpr int attend_rows = 48;  // that one task takes at most
constexpr int most_head = 512;   // the largest head_size

// Floats of a partial result: a row's unfinished output, its maximum, its sum.
static inline int64_t partial_floats(int32_t head_size) { return padded_head(head_size) + 16; }

// How many of a sequence's first tokens token number `place` sees.
static inline int64_t visible(const hl_step& step, int32_t sequence, int64_t place) {
  const int64_t prefix = step.prefix_len == nullptr ? 0 : step.prefix_len[sequence];
  return place < prefix ? prefix : place + 1;
}

// The largest values of some columns of a row, for merging.
struct Top {
  float* values;  // (k,) falling
  int32_t* ids;
  float maximum;  // of the columns
  float sum;      // of exp(x - maximum)
};

// One instruction set's kernels; all noexcept, callable from any thread. See the functions of hanlin_cpu.h for what
// they compute.
struct OpKernels {
  void (*norm)(int32_t kind, const float* x, int64_t width, const float* gain, const float* bias, float eps, float* y);
  void (*map)(int32_t function, const float* x, int64_t n, float* y);
  void (*gate)(int32_t function, const float* gate, const float* up, int64_t n, float* y);
  void (*add)(const float* a, float scale, const float* b, int64_t n, float* y);  // scale * a + b; b may be nullptr
  void (*widen)(int32_t source, const void* x, int64_t n, float* y);              // HL_SRC_F32, F16, BF16
  void (*rope)(int32_t style, float* head, int32_t rotary, const float* cos, const float* sin);
  void (*top)(const float* x, int64_t n, int32_t first_id, int32_t k, Top* out);

  // `count` slots one after another, of the same HL_SLOTS.
  void (*kv_write)(const hl_kv& kv, int64_t slot, int64_t count, int32_t head, const KvRows& rows);
  void (*kv_read)(const hl_kv& kv, int64_t slot, int32_t head, float* k, float* v);
  int64_t (*attend_scratch)(const hl_kv& kv);  // bytes that `attend` needs for itself, aligned to 64
  void (*attend)(const Attention& what, const AttendTask& task, void* scratch);
  void (*merge)(const Attention& what, const AttendTask& spans,
                int32_t row);  // one row of all records of `spans` into `out`
};

}  // namespace hl
