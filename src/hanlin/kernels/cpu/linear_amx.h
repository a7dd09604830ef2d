// Products of many rows on AMX's tiles: sixteen rows x sixteen outputs x 64 bytes of inputs at a time. Part of
// linear_kernels.cpp in variants that have AMX.
//
// Integer kinds: tiles multiply bytes, and whole numbers of 16 bits are two bytes each: four products, which add up over
// all of the inputs without leaving the tiles. They are exact, so a row's bits do not depend on how many rows there are.
// bfloat16: a tile instruction adds up the even and the odd ones of 32 inputs apart, then both to what was there, and
// takes denormals for zero. With few rows the same is done in float32, so that a row's bits do not depend on how many
// there are.
#pragma once

#include "linear.h"
#include "simd.h"

namespace hl::HL_VARIANT {
namespace {

constexpr int tile_rows = act_rows;  // of inputs, and of a tile register

// ---- tile registers -------------------------------------------------------------------------------------------------

// In assembly, because GCC 12's intrinsics do not tell it what they read: it drops stores to the shapes.
struct alignas(64) TileShapes {
  uint8_t palette, start, unused[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

// Sums in 0..3, inputs in 4 and 5, weights in 6 and 7: `rows` inputs of `depth` bytes each.
HL_INLINE void shape_tiles(int rows, int depth) {
  TileShapes s = {};
  s.palette = 1;
  for (int t = 0; t < 8; t++) {
    s.bytes[t] = static_cast<uint16_t>(t == 4 || t == 5 ? depth : 64);
    s.rows[t] = static_cast<uint8_t>(t < 6 ? rows : depth / 4);
  }
  __asm__ volatile("ldtilecfg %0" : : "m"(s));
}
HL_INLINE void release_tiles() { __asm__ volatile("tilerelease" : :); }

// What was written to `from` by ordinary stores must be followed by settle().
template <int T>
HL_INLINE void load_tile(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(T));
}
HL_INLINE void settle() { __asm__ volatile("" : : : "memory"); }

template <int T>
HL_INLINE void store_tile(int32_t (*to)[16]) {
  __asm__ volatile("tilestored %%tmm%c3, (%1,%2,1)"
                   : "=m"(*reinterpret_cast<int32_t(*)[tile_rows][16]>(to))
                   : "r"(to), "r"(int64_t{64}), "i"(T));
}
template <int T>
HL_INLINE void store_tile(float* to, int64_t stride) {  // settle() before `to` is read
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(T));
}
template <int T>
HL_INLINE void zero_tile() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(T));
}
template <int C, int A, int B, bool SignedWeights>
HL_INLINE void dot_tiles() {
  if (SignedWeights) __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
  else __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}
template <int C, int A, int B>
HL_INLINE void dot_bf16_tiles() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(C), "i"(A), "i"(B));
}

// ---- integer kinds --------------------------------------------------------------------------------------------------

// What is worked on at a time: weights of 16 outputs by most_blocks * 64 inputs fit into L1 while rows pass by, the sums
// of rows_at_once rows into L2.
constexpr int most_blocks = 12, rows_at_once = 256;
// Inputs whose products add up within 32 bits: 2 * 32768 * 127 * 255 < 2^31.
constexpr int64_t most_on_tiles = 32768;

// Of 16 rows by 16 outputs: high bytes of x times high ones of W, high times low, low times high, low times low. Low
// bytes of W are unsigned. With HL_INT8_ROW a weight is one byte, and products are two.
constexpr int products = 4;
using BlockSums = int32_t[products][tile_rows][16];

struct alignas(4096) Desk {
  uint8_t weights[2][most_blocks][1024];  // high, low
  BlockSums sums[2][rows_at_once / tile_rows];
  float results[rows_at_once][HL_TILE];
};

// W = scale * code + rest, with unsigned codes; 64 codes at a time are 16 outputs by 4 inputs.
struct Unpacker {
  __m512i scale[2], rest[2];  // of outputs 0, 1 and of 2, 3 in every four
};

HL_INLINE Unpacker unpacker_of(I scale, I rest) {
  const auto twice = [](I v) {
    return _mm512_or_si512(_mm512_and_si512(v.v, _mm512_set1_epi32(0xFFFF)), _mm512_slli_epi32(v.v, 16));
  };
  const __m512i s = twice(scale), r = twice(rest);
  return {{_mm512_unpacklo_epi32(s, s), _mm512_unpackhi_epi32(s, s)},
          {_mm512_unpacklo_epi32(r, r), _mm512_unpackhi_epi32(r, r)}};
}

// Which bytes of two vectors, made by unpacking the lower and the upper eight bytes of every sixteen, are the first (or
// the second) of their int16, in order.
struct Places {
  __m512i low, high;
};
HL_INLINE Places places() {
  alignas(64) uint8_t at[64];
  for (int i = 0; i < 64; i++) at[i] = static_cast<uint8_t>(i / 16 * 16 + i % 8 * 2 + (i % 16 < 8 ? 0 : 64));
  const __m512i low = _mm512_load_si512(at);
  return {low, _mm512_add_epi8(low, _mm512_set1_epi8(1))};
}

HL_INLINE void put_weights(const Unpacker& by, const Places& places, __m512i codes, uint8_t* high, uint8_t* low) {
  const __m512i none = _mm512_setzero_si512();
  const __m512i a = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_unpacklo_epi8(codes, none), by.scale[0]), by.rest[0]);
  const __m512i b = _mm512_add_epi16(_mm512_mullo_epi16(_mm512_unpackhi_epi8(codes, none), by.scale[1]), by.rest[1]);
  _mm512_store_si512(high, _mm512_permutex2var_epi8(a, places.high, b));
  _mm512_store_si512(low, _mm512_permutex2var_epi8(a, places.low, b));
}

// One sub and half of the outputs: eight rows of a tile register, high and low.
template <int Kind>
HL_INLINE void unpack_sub(const uint8_t* codes, int half, const Unpacker& by, const Places& places, uint8_t* high,
                          uint8_t* low) {
  for (int i = 0; i < (is_int4(Kind) ? 4 : 8); i++) {
    const __m512i from = _mm512_loadu_si512(codes + (2 * i + half) * 64), low4 = _mm512_set1_epi8(15);
    if (Kind == HL_INT8_ROW) {
      _mm512_store_si512(high + 64 * i, _mm512_xor_si512(from, _mm512_set1_epi8(-128)));
    } else if (!is_int4(Kind)) {
      put_weights(by, places, from, high + 64 * i, low + 64 * i);
    } else {
      put_weights(by, places, _mm512_and_si512(from, low4), high + 128 * i, low + 128 * i);
      put_weights(by, places, _mm512_and_si512(_mm512_srli_epi16(from, 4), low4), high + 128 * i + 64,
                  low + 128 * i + 64);
    }
  }
}

// Blocks [block0, block0 + n) of 64 inputs of half a tile. Asks for what lies behind them in memory, lest it be waited
// for.
template <int Kind>
HL_APART void unpack(const hl_weight& w, const uint8_t* tile, int half, int64_t block0, int n, Desk& to) {
  constexpr int middle = is_int4(Kind) ? 8 : 128;
  constexpr int64_t distance = 16384;
  const int64_t a_group = Kind == HL_INT8_ROW ? 1 : w.group / 32, subs = subs_of(w.in);
  const int64_t header = Kind == HL_INT8_ROW ? 0 : group_header(Kind);
  const int64_t bytes = header + a_group * sub_bytes(Kind);
  const Places at = places();
  const F inverse = inverse_units(tile, half);
  for (int64_t s = 0; s < 2 * n; s++) {
    const int64_t sub = 2 * block0 + s;
    uint8_t *high = to.weights[0][s / 2] + s % 2 * 512, *low = to.weights[1][s / 2] + s % 2 * 512;
    if (sub >= subs) {
      memset(high, 0, 512);
      memset(low, 0, 512);
      continue;
    }
    const uint8_t* group = tile + units_bytes + sub / a_group * bytes;
    const uint8_t* codes = group + header + sub % a_group * sub_bytes(Kind);
    for (int64_t i = 0; i < sub_bytes(Kind) + header && half == 0; i += 64) prefetch(codes + distance + i);
    Factors f = {set1i(0), set1i(0)};
    if constexpr (Kind != HL_INT8_ROW) f = factors_of<Kind>(group, half, inverse);
    const Unpacker by = unpacker_of(f.scale, mul_add(f.rest, f.scale, set1i(-middle)));
    unpack_sub<Kind>(codes, half, by, at, high, low);
  }
  settle();
}

template <int Kind>
constexpr bool one_byte = Kind == HL_INT8_ROW;

// A block whose sums are complete, and where its results go.
struct Finished {
  const BlockSums* sums;
  const uint8_t* rows;
  int n_rows;
  float (*to)[HL_TILE];
};

template <int Kind>
HL_INLINE void finish(const Finished& block, int64_t begin, int64_t end, int64_t in, const uint8_t* tile, int half) {
  for (int64_t r = begin; r < end; r++) {
    const auto sum_of = [&](int product) { return I{_mm512_load_si512((*block.sums)[product][r])}; };
    const Exact none = {set1i(0), set1i(0)};
    const Exact total = one_byte<Kind> ? add(none, set1i(0), sum_of(0), sum_of(1))
                                       : add(none, sum_of(0), addi(sum_of(1), sum_of(2)), sum_of(3));
    store(block.to[r] + 16 * half, in_units(total, tile, half, unit_at(block.rows + r * cell, in)));
  }
}

// `n` blocks of 64 inputs: adds their products to `sums`, which begin at 0 if `fresh`. Results of the block before are
// made meanwhile: that is done by other parts of the CPU, but it does not look far enough ahead to see that.
template <int Kind>
HL_APART void add_blocks(const uint8_t* x, const uint8_t* w, int n, bool fresh, BlockSums& sums, const Finished& before,
                         int64_t in, const uint8_t* tile, int half) {
  if (fresh) {
    zero_tile<0>(), zero_tile<1>();
    if (!one_byte<Kind>) zero_tile<2>(), zero_tile<3>();
  } else {
    load_tile<0>(sums[0], 64), load_tile<1>(sums[1], 64);
    if (!one_byte<Kind>) load_tile<2>(sums[2], 64), load_tile<3>(sums[3], 64);
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
    finish<Kind>(before, done, until, in, tile, half);
    done = until;
  }
  store_tile<0>(sums[0]), store_tile<1>(sums[1]);
  if (!one_byte<Kind>) store_tile<2>(sums[2]), store_tile<3>(sums[3]);
}

// Asks for the places of a block's results, which come too slowly when they are written.
HL_INLINE void fetch_results(const Epilogue& out, int64_t row, int n_rows, int64_t tile) {
  const int64_t columns = out.flags & HL_SILU_MUL ? HL_TILE / 2 : HL_TILE;
  for (int64_t r = row; r < row + n_rows; r++)
    for (int64_t c = 0; c < columns; c += 16) __builtin_prefetch(out.y + r * out.ldy + tile * columns + c, 1, 3);
}

template <int Kind>
void int_tiles(const hl_weight& w, const uint8_t* rows, int64_t stride, int64_t n_rows, int64_t tile0, int64_t tile1,
               const Epilogue& out) {
  const int64_t blocks = (w.in + 63) / 64, stretches = (blocks + most_blocks - 1) / most_blocks, bytes = tile_bytes(w);
  Desk desk;
  int shaped = 0;
  for (int64_t row0 = 0; row0 < n_rows; row0 += rows_at_once) {
    const int64_t height = n_rows - row0 < rows_at_once ? n_rows - row0 : rows_at_once;
    for (int64_t tile = tile0; tile < tile1; tile++) {
      const uint8_t* data = static_cast<const uint8_t*>(w.data) + tile * bytes;
      for (int64_t stretch = 0; stretch < stretches; stretch++) {
        const int64_t block0 = blocks * stretch / stretches;
        const int n = static_cast<int>(blocks * (stretch + 1) / stretches - block0);
        for (int h = 0; h < 2; h++) {
          unpack<Kind>(w, data, h, block0, n, desk);
          Finished before = {};
          for (int64_t row = 0; row < height; row += tile_rows) {
            const int here = static_cast<int>(height - row < tile_rows ? height - row : tile_rows);
            if (here != shaped) shape_tiles(shaped = here, 64);
            const uint8_t* x = rows + (row0 + row) * stride;
            BlockSums& sums = desk.sums[h][row / tile_rows];
            if (h == 1 && stretch + 1 == stretches) fetch_results(out, row0 + row, here, tile);
            add_blocks<Kind>(x + block0 * 2 * next_cell, desk.weights[0][0], n, stretch == 0, sums, before, w.in, data, h);
            if (stretch + 1 == stretches) before = {&sums, x, here, desk.results + row};
          }
          finish<Kind>(before, 0, before.n_rows, w.in, data, h);
        }
      }
      write_panel(desk.results, height, row0, tile, w.out, out);
    }
  }
  release_tiles();
}

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
  return rows > 8 && in <= most_on_tiles;
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
