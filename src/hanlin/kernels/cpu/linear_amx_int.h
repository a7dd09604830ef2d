// Integer kinds on AMX's tiles: sixteen rows x sixteen outputs x 64 bytes of inputs at a time. Part of linear_amx.h.
//
// Tiles multiply bytes, and whole numbers of 16 bits are two bytes each: four products, which add up over all of the
// inputs without leaving the tiles. They are exact, so a row's bits do not depend on how many rows there are.
//
// Results are made of complete sums while tiles multiply the next rows. Weights are unpacked before: for some 200 cycles
// behind a tile instruction half of what unpacks them stands still.
#pragma once

#include "amx_tiles.h"

namespace hl::HL_VARIANT {
namespace {

// A slab is half of a tile's outputs by most_blocks * 64 inputs at most, unpacked: it stays in L1 while rows pass by. The
// sums of rows_at_once rows stay in L2, and so do their inputs; where those do not fit, what is read of them serves
// tiles_at_once tiles.
constexpr int most_blocks = 9, rows_at_once = 256, tiles_at_once = 4;
constexpr int64_t bytes_that_fit = 1 << 20;
// Inputs whose products add up within 32 bits: 2 * 32768 * 127 * 255 < 2^31.
constexpr int64_t most_on_tiles = 32768;

// Of 16 rows by 16 outputs: high bytes of x times high ones of W, high times low, low times high, low times low. Low
// bytes of W are unsigned. With HL_INT8_ROW a weight is one byte, and products are two.
constexpr int products = 4;
using BlockSums = int32_t[products][tile_rows][16];

template <int Kind>
constexpr bool one_byte = Kind == HL_INT8_ROW;

struct alignas(4096) Desk {
  uint8_t weights[2][most_blocks][1024];  // high, low
  BlockSums whole[2];  // of the latest two blocks of rows whose sums are complete
  float results[rows_at_once][HL_TILE];
  BlockSums sums[tiles_at_once][2][rows_at_once / tile_rows];
};

// ---- weights --------------------------------------------------------------------------------------------------------

// W = scale * code + rest, with unsigned codes; 64 codes at a time are 16 outputs by 4 inputs.
struct ByGroup {
  __m512i scale[2], rest[2];  // of outputs 0, 1 and of 2, 3 in every four
};

HL_INLINE ByGroup by_group(I scale, I rest) {
  const auto twice = [](I v) {
    return _mm512_or_si512(_mm512_and_si512(v.v, _mm512_set1_epi32(0xFFFF)), _mm512_slli_epi32(v.v, 16));
  };
  const __m512i s = twice(scale), r = twice(rest);
  return {{_mm512_unpacklo_epi32(s, s), _mm512_unpackhi_epi32(s, s)},
          {_mm512_unpacklo_epi32(r, r), _mm512_unpackhi_epi32(r, r)}};
}

HL_INLINE void put_weights(const ByGroup& by, __m512i codes, uint8_t* high, uint8_t* low) {
  const __m512i none = _mm512_setzero_si512(), bytes = _mm512_set1_epi16(255);
  const __m512i a = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_unpacklo_epi8(codes, none), by.scale[0]), by.rest[0]);
  const __m512i b = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_unpackhi_epi8(codes, none), by.scale[1]), by.rest[1]);
  _mm512_store_si512(high, _mm512_packs_epi16(_mm512_srai_epi16(a, 8), _mm512_srai_epi16(b, 8)));
  _mm512_store_si512(low, _mm512_packus_epi16(_mm512_and_si512(a, bytes), _mm512_and_si512(b, bytes)));
}

// Which weights: blocks [block0, block0 + n) of 64 inputs, of one half of a tile.
struct Slab {
  const uint8_t* tile;
  int64_t block0;
  int n, half;
};

// Asks for what lies `ahead` bytes further on in memory, lest it be waited for.
template <int Kind>
HL_APART void unpack(const hl_weight& w, const Slab& slab, int64_t ahead, Desk& to) {
  constexpr int64_t header = one_byte<Kind> ? 0 : group_header(Kind);
  const int64_t a_group = one_byte<Kind> ? 1 : w.group / 32, bytes = header + a_group * sub_bytes(Kind);
  const int64_t first = 2 * slab.block0, end = first + 2 * slab.n, there = end < subs_of(w.in) ? end : subs_of(w.in);
  const F inverse = inverse_units(slab.tile, slab.half);
  const __m512i low4 = _mm512_set1_epi8(15);
  uint8_t *high = to.weights[0][0], *low = to.weights[1][0];
  for (int64_t sub = first; sub < there;) {
    const uint8_t* group = slab.tile + units_bytes + sub / a_group * bytes;
    const uint8_t* codes = group + header + sub % a_group * sub_bytes(Kind);
    ByGroup by = {};
    if constexpr (!one_byte<Kind>) {
      const Factors f = factors_of<Kind>(group, slab.half, inverse);
      by = by_group(f.scale, mul_add(f.rest, f.scale, set1i(is_int4(Kind) ? -8 : -128)));
    }
    const int64_t group_end = (sub / a_group + 1) * a_group;
    for (; sub < (there < group_end ? there : group_end); sub++, codes += sub_bytes(Kind), high += 512, low += 512) {
      // Both halves of a tile's outputs are in the same memory.
      for (int64_t i = slab.half * 64; i < sub_bytes(Kind) + header; i += 128) prefetch(codes + ahead + i);
      for (int i = 0; i < (is_int4(Kind) ? 4 : 8); i++) {
        const __m512i from = _mm512_loadu_si512(codes + (2 * i + slab.half) * 64);
        if (one_byte<Kind>) {
          _mm512_store_si512(high + 64 * i, _mm512_xor_si512(from, _mm512_set1_epi8(-128)));
        } else if (!is_int4(Kind)) {
          put_weights(by, from, high + 64 * i, low + 64 * i);
        } else {
          put_weights(by, _mm512_and_si512(from, low4), high + 128 * i, low + 128 * i);
          put_weights(by, _mm512_and_si512(_mm512_srli_epi16(from, 4), low4), high + 128 * i + 64, low + 128 * i + 64);
        }
      }
    }
  }
  if (there < end) memset(high, 0, 512), memset(low, 0, 512);  // the other half of the last 64 inputs
  settle();
}

// ---- results --------------------------------------------------------------------------------------------------------

// Rows whose sums are complete, and where their results go.
struct Finished {
  const BlockSums* sums;
  const uint8_t* x;
  float (*to)[HL_TILE];
  int n_rows;
};

template <int Kind>
HL_INLINE void finish(const Finished& rows, int begin, int end, int64_t in, const Slab& slab) {
  for (int r = begin; r < end; r++) {
    const auto sum_of = [&](int product) { return I{_mm512_load_si512((*rows.sums)[product][r])}; };
    const Exact none = {set1i(0), set1i(0)};
    const Exact total = one_byte<Kind> ? add(none, set1i(0), sum_of(0), sum_of(1))
                                       : add(none, sum_of(0), addi(sum_of(1), sum_of(2)), sum_of(3));
    store(rows.to[r] + 16 * slab.half, in_units(total, slab.tile, slab.half, unit_at(rows.x + r * cell, in)));
  }
}

// Asks for the places of a block's results, which come too slowly when they are written.
HL_INLINE void fetch_results(const Epilogue& out, int64_t row, int n_rows, int64_t tile) {
  const int64_t columns = out.flags & HL_SILU_MUL ? HL_TILE / 2 : HL_TILE;
  for (int64_t r = row; r < row + n_rows; r++)
    for (int64_t c = 0; c < columns; c += 16) __builtin_prefetch(out.y + r * out.ldy + tile * columns + c, 1, 3);
}

// ---- products -------------------------------------------------------------------------------------------------------

// Sixteen rows by a slab of `n` blocks: adds their products to `from`, or to 0 if there is none.
template <int Kind>
HL_APART void add_blocks(const uint8_t* x, const uint8_t* w, int n, const BlockSums* from, BlockSums& to,
                         const Finished& before, int64_t in, const Slab& slab) {
  if (from == nullptr) {
    zero_tile<0>(), zero_tile<1>();
    if (!one_byte<Kind>) zero_tile<2>(), zero_tile<3>();
  } else {
    load_tile<0>((*from)[0], 64), load_tile<1>((*from)[1], 64);
    if (!one_byte<Kind>) load_tile<2>((*from)[2], 64), load_tile<3>((*from)[3], 64);
  }
  constexpr int64_t low = most_blocks * 1024;
  constexpr int behind = 3;  // steps that the sums of before take to get where they can be read
  for (int b = 0, done = 0; b < n; b++, x += 2 * next_cell, w += 1024) {
    load_tile<4>(x, cell);
    load_tile<6>(w, 64);
    dot_tiles<0, 4, 6, true>();
    load_tile<5>(x + next_cell, cell);
    if (one_byte<Kind>) {
      dot_tiles<1, 5, 6, true>();
    } else {
      load_tile<7>(w + low, 64);
      dot_tiles<1, 4, 7, false>();
      dot_tiles<2, 5, 6, true>();
      dot_tiles<3, 5, 7, false>();
    }
    const int until = b + 1 == n ? before.n_rows : b < behind ? 0 : before.n_rows * (b + 1 - behind) / (n - behind);
    finish<Kind>(before, done, until, in, slab);
    done = until;
  }
  store_tile<0>(to[0]), store_tile<1>(to[1]);
  if (!one_byte<Kind>) store_tile<2>(to[2]), store_tile<3>(to[3]);
}

template <int Kind>
void int_tiles(const hl_weight& w, const uint8_t* rows, int64_t stride, int64_t n_rows, int64_t tile0, int64_t tile1,
               const Epilogue& out) {
  const int64_t blocks = (w.in + 63) / 64, stretches = (blocks + most_blocks - 1) / most_blocks, bytes = tile_bytes(w);
  const int64_t most_rows = n_rows < rows_at_once ? n_rows : rows_at_once;
  const int64_t together = stretches == 1 || most_rows * stride <= bytes_that_fit ? 1 : tiles_at_once;
  const int64_t ahead = together == 1 ? 16384 : bytes;
  Desk desk;
  int shaped = 0;
  // Half h of `tile`, one stretch of the inputs, rows row0 to `end`.
  const auto multiply = [&](int64_t row0, int64_t end, int64_t tile, int64_t stretch, int h, BlockSums* sums) {
    const int64_t block0 = blocks * stretch / stretches;
    const int n = static_cast<int>(blocks * (stretch + 1) / stretches - block0);
    const Slab slab = {static_cast<const uint8_t*>(w.data) + tile * bytes, block0, n, h};
    const bool last = stretch + 1 == stretches;
    Finished before = {};
    unpack<Kind>(w, slab, ahead, desk);
    for (int64_t row = row0; row < end; row += tile_rows, sums++) {
      const int here = static_cast<int>(end - row < tile_rows ? end - row : tile_rows);
      if (here != shaped) shape_tiles(shaped = here, 64);
      if (h == 1 && last) fetch_results(out, row, here, tile);
      const uint8_t* x = rows + row * stride;
      BlockSums& to = last ? desk.whole[row / tile_rows % 2] : *sums;
      add_blocks<Kind>(x + block0 * 2 * next_cell, desk.weights[0][0], n, stretch == 0 ? nullptr : sums, to, before, w.in,
                       slab);
      if (last) before = {&to, x, desk.results + (row - row0), here};
    }
    finish<Kind>(before, 0, before.n_rows, w.in, slab);
    if (h == 1 && last) write_panel(desk.results, end - row0, row0, tile, w.out, out);
  };
  for (int64_t row0 = 0; row0 < n_rows; row0 += rows_at_once) {
    const int64_t end = n_rows - row0 < rows_at_once ? n_rows : row0 + rows_at_once;
    for (int64_t batch = tile0; batch < tile1; batch += together)
      for (int64_t stretch = 0; stretch < stretches; stretch++)
        for (int64_t tile = batch; tile < tile1 && tile < batch + together; tile++)
          for (int h = 0; h < 2; h++) multiply(row0, end, tile, stretch, h, desk.sums[tile - batch][h]);
  }
  release_tiles();
}

}  // namespace
}  // namespace hl::HL_VARIANT
