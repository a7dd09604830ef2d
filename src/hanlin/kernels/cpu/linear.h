// Matrix products over packed weights. See hanlin_cpu.h for the layouts and the promise.
//
// Helpers here are `static`: files compiled for different instruction sets include them, and must not share one copy.
#pragma once

#include <cstddef>
#include <cstdint>

#include "hanlin_cpu.h"
#include "pool.h"

namespace hl {

// In what form a weight kind wants its input rows.
enum class Act : int32_t { f32, bf16, int16 };
static constexpr int acts = 3;

static constexpr Act act_of(const hl_weight& w) {
  return w.kind == HL_F32 ? Act::f32 : w.kind == HL_BF16 ? Act::bf16 : Act::int16;
}

// Prepared rows of floats follow one another. Whole numbers (x = unit * (256 * high + low), both in -127..127) are in
// cells of 64 bytes, those of sixteen rows side by side as tile registers want them: for every 64 inputs one of high and
// one of low, filled up with zeros; then for every 8 subs one of the sums of their 32 inputs, negated, which let weights
// be stored unsigned; then one for the unit.
struct ActSums {
  int32_t minus_high, minus_low;
};

// A buffer of rows has room for a multiple of so many: what stands behind the last row may be read, and is not used.
static constexpr int act_rows = 16;
static constexpr int64_t whole_rows(int64_t rows) { return (rows + act_rows - 1) / act_rows * act_rows; }

// Inputs whose whole products, of 2^30 at most, add up exactly: 65536 * 2^30 = 2^31 * 2^15.
static constexpr int64_t most_whole = 65536;

static constexpr int64_t subs_of(int64_t in) { return (in + 31) / 32; }
static constexpr int64_t cell = 64, next_cell = act_rows * cell;
static constexpr int64_t code_cells(int64_t in) { return (in + 63) / 64 * 2; }
static constexpr int64_t sums_cells(int64_t in) { return (subs_of(in) + 7) / 8; }
// From where a row begins: the high bytes of a sub (the low ones are in the next cell), its sums, the unit.
static constexpr int64_t at_sub(int64_t sub) { return sub / 2 * 2 * next_cell + sub % 2 * 32; }
static inline const ActSums& sums_at(const uint8_t* row, int64_t in, int64_t sub) {
  return reinterpret_cast<const ActSums*>(row + (code_cells(in) + sub / 8) * next_cell)[sub % 8];
}
static inline const float& unit_at(const uint8_t* row, int64_t in) {
  return *reinterpret_cast<const float*>(row + (code_cells(in) + sums_cells(in)) * next_cell);
}

// Bytes of one prepared row. Floats are aligned to 64, and an odd number of times 64 bytes apart: with a power of two
// they would all be wanted in the same places of the cache.
static constexpr int64_t act_stride(Act act, int64_t in) {
  return act == Act::int16 ? (code_cells(in) + sums_cells(in) + 1) * cell
                           : ((act == Act::f32 ? in * 4 : (in + 1) / 2 * 4) + 63) / 64 * 64 | 64;
}
template <class Byte>
static inline Byte* act_row(Act act, Byte* rows, int64_t stride, int64_t row) {
  return rows + (act == Act::int16 ? row / act_rows * act_rows * stride + row % act_rows * cell : row * stride);
}

static constexpr bool is_grouped(int32_t kind) { return kind >= HL_INT8; }
static constexpr bool is_int4(int32_t kind) { return kind >= HL_INT4; }
static constexpr bool has_offsets(int32_t kind) { return kind >= HL_INT4_MIN; }

static constexpr int64_t tiles_of(const hl_weight& w) { return (w.out + HL_TILE - 1) / HL_TILE; }

// Bytes of 32 inputs x 32 outputs of codes, of a tile's units, of the scales (and zeros) before a group's codes, of a
// group, and of a tile.
static constexpr int64_t sub_bytes(int32_t kind) { return is_int4(kind) ? 512 : 1024; }
static constexpr int64_t units_bytes = HL_TILE * 4;
static constexpr int64_t group_header(int32_t kind) { return has_offsets(kind) ? 128 : 64; }
static constexpr int64_t group_bytes(int32_t kind, int32_t group) {
  return group_header(kind) + group / 32 * sub_bytes(kind);
}
static constexpr int64_t tile_bytes(const hl_weight& w) {
  switch (w.kind) {
    case HL_F32:
      return w.in * HL_TILE * 4;
    case HL_BF16:
      return (w.in + 1) / 2 * HL_TILE * 4;
    case HL_INT8_ROW:
      return units_bytes + subs_of(w.in) * sub_bytes(w.kind);
    default:
      return units_bytes + w.in / w.group * group_bytes(w.kind, w.group);
  }
}

// What adapters add to the rows of a product, see lora.h; `of` is nullptr where they add nothing.
struct LowRows {
  const hl_adapter* const* of = nullptr;  // of every row, nullptr for none
  int32_t op = 0;
  const float* low = nullptr;  // (rows, stride)
  int64_t stride = 0;
};

// Rows of floats that are multiplied by the `down` of an adapter.
struct LowPiece {
  const float* x;
  int64_t ldx, in, rows;
};

// What happens to a product before it is written; see HL_ADD and friends.
struct Epilogue {
  float* y;  // row r starts at y + r * ldy
  int64_t ldy;
  const float* bias;  // (out,) or nullptr
  int32_t flags;
  LowRows extra = {};  // added first
};

// One instruction set's kernels; all noexcept, callable from any thread.
struct LinearKernels {
  // Inputs [begin, end) of a row of `in`, of which x[0] is the first, into their place in a prepared row; begin is a
  // multiple of 32, and so is end unless it is `in`. Whoever writes the last ones fills up the row with zeros. Writes
  // nothing of other inputs, so threads may share a row; whole numbers (Act::int16) need the whole row.
  void (*prepare)(Act act, const float* x, int64_t begin, int64_t end, int64_t in, void* row);

  // Output tiles [tile0, tile1) of a product of `rows` prepared rows, see act_row. The caller shares tiles out
  // among threads (Team::split(tiles_of(w))); any split, and any split of the rows, gives the same bits.
  void (*product)(const hl_weight& w, const void* rows, int64_t stride, int64_t n_rows, int64_t tile0, int64_t tile1,
                  const Epilogue& out);

  // Dimensions `inner` of x times the `down` of an adapter's operation `op`: low (rows, stride).
  void (*low)(const hl_adapter& adapter, int32_t op, const LowPiece& x, Range inner, float* low, int64_t stride);
};

// The whole product as one piece of a team's work: prepares x into `scratch` (whole_rows(rows) * act_stride bytes), meets at
// a barrier, multiplies. No barrier at the end.
void linear(const Team& team, const LinearKernels& k, const hl_weight& w, const float* x, int64_t ldx, int64_t rows,
            void* scratch, const Epilogue& out);

// Row `out` of a weight as `in` floats.
void unpack_row(const hl_weight& w, int64_t out, float* x);

// nullptr, or what is wrong with the description of a weight (not its contents).
const char* weight_problem(const hl_weight& w);

}  // namespace hl
