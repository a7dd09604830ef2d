// Products of many rows on AMX's tiles. Part of linear_kernels.cpp in variants that have AMX.
//
// Integer kinds are in linear_amx_int.h. bfloat16: a tile instruction adds up the even and the odd ones of 32 inputs
// apart, then both to what was there, and takes denormals for zero. With few rows the same is done in float32, so that
// a row's bits do not depend on how many there are.
#pragma once

#include "amx_tiles.h"
#include "linear_amx_int.h"

namespace hl::HL_VARIANT {
namespace {

// ---- bfloat16 -------------------------------------------------------------------------------------------------------

constexpr int64_t step_inputs = 32;  // of one instruction
constexpr int64_t most_steps = 16;   // whose weights stay in L1 while the rows pass by

// Rows of Blocks x 16 by 32 outputs: adds `steps` steps to `sums`.
template <int Blocks>
HL_INLINE void bf16_blocks(const uint8_t* rows, int64_t stride, const uint8_t* weights, int64_t steps,
                           float (*sums)[HL_TILE]) {
  constexpr int64_t pitch = HL_TILE * 4, pair_bytes = HL_TILE * 4;
  load_tile<0>(sums[0], pitch);
  load_tile<1>(sums[0] + 16, pitch);
  if (Blocks == 2) {
    load_tile<2>(sums[tile_rows], pitch);
    load_tile<3>(sums[tile_rows] + 16, pitch);
  }
  for (int64_t step = 0; step < steps; step++) {
    load_tile<6>(weights, pair_bytes);
    load_tile<4>(rows, stride);
    dot_bf16_tiles<0, 4, 6>();
    load_tile<7>(weights + 64, pair_bytes);
    dot_bf16_tiles<1, 4, 7>();
    if (Blocks == 2) {
      load_tile<5>(rows + tile_rows * stride, stride);
      dot_bf16_tiles<2, 5, 6>();
      dot_bf16_tiles<3, 5, 7>();
    }
    rows += step_inputs * 2;
    weights += step_inputs / 2 * pair_bytes;
  }
  store_tile<0>(sums[0], pitch);
  store_tile<1>(sums[0] + 16, pitch);
  if (Blocks == 2) {
    store_tile<2>(sums[tile_rows], pitch);
    store_tile<3>(sums[tile_rows] + 16, pitch);
  }
}

void bf16_tiles(const hl_weight& w, const uint8_t* rows, int64_t stride, int64_t n_rows, int64_t tile0, int64_t tile1,
                const Epilogue& out) {
  constexpr int64_t step_bytes = step_inputs * HL_TILE * 2;
  const int64_t whole = w.in / step_inputs, steps = (w.in + step_inputs - 1) / step_inputs, bytes = tile_bytes(w);
  alignas(64) float sums[rows_at_once][HL_TILE];
  alignas(64) uint8_t last[step_bytes];  // the last step, filled up with zeros
  int shaped = 0;
  for (int64_t row0 = 0; row0 < n_rows; row0 += rows_at_once) {
    const int64_t end = n_rows - row0 < rows_at_once ? n_rows - row0 : rows_at_once;
    for (int64_t tile = tile0; tile < tile1; tile++) {
      const uint8_t* data = static_cast<const uint8_t*>(w.data) + tile * bytes;
      memset(sums, 0, sizeof sums[0] * static_cast<size_t>((end + tile_rows - 1) / tile_rows * tile_rows));
      if (whole < steps) {
        memset(last, 0, sizeof last);
        memcpy(last, data + whole * step_bytes, static_cast<size_t>(bytes - whole * step_bytes));
      }
      settle();
      for (int64_t step = 0; step < steps;) {
        const int64_t left = step < whole ? whole - step : 1, n = left < most_steps ? left : most_steps;
        const uint8_t* weights = step < whole ? data + step * step_bytes : last;
        for (int64_t row = 0; row < end;) {
          const int height = static_cast<int>(end - row < tile_rows ? end - row : tile_rows);
          if (height != shaped) shape_tiles(shaped = height, 64);
          const uint8_t* from = rows + (row0 + row) * stride + step * step_inputs * 2;
          const bool two = end - row >= 2 * tile_rows;
          if (two) bf16_blocks<2>(from, stride, weights, n, sums + row);
          else bf16_blocks<1>(from, stride, weights, n, sums + row);
          row += two ? 2 * tile_rows : tile_rows;
        }
        step += n;
      }
      settle();
      write_panel(sums, end, row0, tile, w.out, out);
    }
  }
  release_tiles();
}

// Denormals are zero while it lives.
class FlushedFloats {
 public:
  FlushedFloats() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushedFloats() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
};

// What tiles compute, for few rows.
template <int R>
void bf16_panel(const hl_weight& weight, const uint8_t* tile, const Panel& x, Results& results) {
  const FlushedFloats flushed;
  const int64_t pairs = (weight.in + 1) / 2;
  const I second = set1i(static_cast<int32_t>(0xFFFF0000u));
  F sums[R][2];
  HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < 2; h++) sums[r][h] = zero();
  const uint8_t* w = tile;
  int64_t until_fetch = x.turn;
  for (int64_t k = 0; k < pairs;) {
    if (until_fetch-- == 0) {
      fetch_ahead(x, tile, w, step_inputs * HL_TILE * 2);
      until_fetch = x.every - 1;
    }
    F evens[R][2], odds[R][2];
    HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < 2; h++) evens[r][h] = odds[r][h] = zero();
    const int64_t end = k + step_inputs / 2 < pairs ? k + step_inputs / 2 : pairs;
    for (; k < end; k++, w += HL_TILE * 4) {
      F even[2], odd[2];
      HL_UNROLL for (int h = 0; h < 2; h++) {
        const I both = bits(load(reinterpret_cast<const float*>(w) + 16 * h));
        even[h] = from_bits(shl<16>(both));
        odd[h] = from_bits(andi(both, second));
      }
      HL_UNROLL for (int r = 0; r < R; r++) {
        const I both = quad(reinterpret_cast<const int8_t*>(x.rows[r] + 4 * k));
        const F a = from_bits(shl<16>(both)), b = from_bits(andi(both, second));
        HL_UNROLL for (int h = 0; h < 2; h++) {
          evens[r][h] = fma(even[h], a, evens[r][h]);
          odds[r][h] = fma(odd[h], b, odds[r][h]);
        }
      }
    }
    HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < 2; h++) sums[r][h] =
        add(sums[r][h], add(evens[r][h], odds[r][h]));
  }
  HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < 2; h++) store(results[r] + 16 * h, sums[r][h]);
}

// From how many rows on tiles are faster (measured on a Xeon of the fourth generation).
template <int Kind>
bool wants_tiles(int64_t rows, int64_t in) {
  if (Kind == HL_F32 || Kind == HL_BF16) return Kind == HL_BF16 && rows > 4;
  return rows > 7 && in <= most_on_tiles;
}

template <int Kind>
void product_on_tiles(const hl_weight& w, const uint8_t* rows, int64_t stride, int64_t n_rows, int64_t tile0,
                      int64_t tile1, const Epilogue& out) {
  if constexpr (Kind == HL_BF16) bf16_tiles(w, rows, stride, n_rows, tile0, tile1, out);
  else if constexpr (Kind != HL_F32)
    int_tiles<Kind>(w, rows, stride, n_rows, tile0, tile1, out);
}

}  // namespace
}  // namespace hl::HL_VARIANT
