// Products of many rows on AMX's tiles: sixteen rows x sixteen outputs x 32 inputs at a time. Part of
// linear_kernels.cpp in variants that have AMX.
//
// Integer kinds: the tiles' sums of whole numbers are exact, and become floats in the same order as with few rows.
// bfloat16: a tile instruction adds up the even and the odd ones of 32 inputs apart, then both to what was there, and
// takes denormals for zero. With few rows the same is done in float32, so that a row's bits do not depend on how many
// there are.
#pragma once

#include <type_traits>

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

// What is worked on at a time: inputs of 16 rows and weights of 32 outputs by most_subs subs fit into L1, the weights of
// most_tiles output tiles and the sums of rows_at_once rows into L2.
constexpr int most_subs = 20, most_tiles = 4, rows_at_once = 256;

// Weights as tile registers want them, what scales the inputs, and the sums so far.
//
// With inputs of 12 bits, 16 * q + low, a tile of int4 weights has 16 times each code and then the codes themselves,
// and the two products are one. 16 times an int8 code is no byte: they take two.
//
// Sums and weights start a page, and registers are filled with weights from, and emptied to, the same quarter of a page
// in turn: a load waits for earlier stores to addresses that differ from its own in whole pages only, and these come
// late.
struct alignas(4096) Desk {
  int32_t dots[4][tile_rows][16], lows[4][tile_rows][16];
  uint8_t weights[most_tiles][2][most_subs][1024];
  float x_scales[most_subs][tile_rows], x_sums[most_subs][tile_rows];
  float scales[most_tiles][2][most_subs][16], offsets[most_tiles][2][most_subs][16];
  float sums[most_tiles][rows_at_once][HL_TILE];
};

template <int Kind>
constexpr bool signed_weights = !has_offsets(Kind);
template <int Kind, bool Wide>
constexpr bool in_one = Wide && is_int4(Kind);  // product
template <int Kind, bool Wide>
constexpr bool in_two = Wide && !is_int4(Kind);

template <int Kind, bool Wide>
HL_INLINE void unpack_sub(const uint8_t* codes, int half, uint8_t* to) {
  const auto put = [&](int row, __m512i v) { _mm512_store_si512(to + 64 * row, v); };
  const __m512i sign = _mm512_set1_epi8(-128);
  for (int i = 0; i < (is_int4(Kind) ? 4 : 8); i++) {
    const __m512i from = _mm512_loadu_si512(codes + (2 * i + half) * 64);
    if (!is_int4(Kind)) {
      put(i, _mm512_xor_si512(from, sign));
      continue;
    }
    const __m512i low4 = _mm512_set1_epi8(15), high4 = _mm512_set1_epi8(-16), middle = _mm512_set1_epi8(8);
    __m512i codes_of[2] = {_mm512_and_si512(from, low4), _mm512_and_si512(_mm512_srli_epi16(from, 4), low4)};
    __m512i times_16[2] = {_mm512_and_si512(_mm512_slli_epi16(from, 4), high4), _mm512_and_si512(from, high4)};
    for (int j = 0; j < 2; j++) {
      if (signed_weights<Kind>) {
        codes_of[j] = _mm512_sub_epi8(codes_of[j], middle);
        times_16[j] = _mm512_xor_si512(times_16[j], sign);
      }
      if (Wide) put(2 * i + j, times_16[j]);
      put((Wide ? 8 : 0) + 2 * i + j, codes_of[j]);
    }
  }
}

template <int Kind, bool Wide>
void unpack(const hl_weight& w, const uint8_t* tile, int64_t sub0, int subs, int64_t number, Desk& to) {
  const int64_t a_group = Kind == HL_INT8_ROW ? 1 : w.group / 32;
  const int64_t bytes = Kind == HL_INT8_ROW ? sub_bytes(Kind) : group_bytes(Kind, w.group);
  const int64_t header = Kind == HL_INT8_ROW ? 0 : group_header(Kind);
  if (Kind == HL_INT8_ROW) tile += HL_TILE * 4;
  for (int s = 0; s < subs; s++) {
    const uint8_t* group = tile + (sub0 + s) / a_group * bytes;
    const uint8_t* codes = group + header + (sub0 + s) % a_group * sub_bytes(Kind);
    for (int h = 0; h < 2; h++) {
      unpack_sub<Kind, Wide>(codes, h, to.weights[number][h][s]);
      if (Kind == HL_INT8_ROW) continue;
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(group) + 16 * h;
      const F scale = load_f16(scales);
      store(to.scales[number][h][s], scale);
      if (!has_offsets(Kind)) continue;
      F offset = load_f16(scales + HL_TILE);
      if (Kind == HL_INT4_ZERO) offset = mul(offset, mul(scale, set1(-1.0f)));
      store(to.offsets[number][h][s], offset);
    }
  }
  settle();
}

// A stretch of sixteen prepared rows or fewer.
struct Rows {
  const uint8_t* codes;
  int64_t stride;
};

template <int Kind, bool Wide>
void gather_scales(const Rows& rows, int64_t in, int n_rows, int64_t sub0, int subs, Desk& to) {
  constexpr int64_t bytes = code_bytes(Wide ? Act::int12 : Act::int8);
  for (int r = 0; r < n_rows; r++) {
    const uint8_t* row = rows.codes + r * rows.stride - sub0 * bytes;
    const ActParams* params = reinterpret_cast<const ActParams*>(row + subs_of(in) * bytes) + sub0;
    for (int s = 0; s < subs; s++) {
      to.x_scales[s][r] = params[s].scale;
      if (has_offsets(Kind)) to.x_sums[s][r] = params[s].scaled_sum;
    }
  }
}

// Whole numbers below 2^22 as floats, times 2^Shift. Near tile instructions only one of two ports converts and
// multiplies, but both add: bits that are added to those of 1.5 * 2^23 stand for numbers that are.
template <int Shift = 0>
HL_INLINE F float_of(I whole) {
  const I base = set1i(0x4B400000 + (Shift << 23));
  return sub(from_bits(addi(whole, base)), from_bits(base));
}

// Sub number `s` of a stretch, s % 4 == J: begins its product, and stores the one that began last but one, or last with
// two products a sub; storing at once would wait for the product's end.
template <int Kind, bool Wide, int J>
HL_INLINE void tile_step(Desk& desk, const Rows& rows, int64_t tile, int half, int s, int subs) {
  constexpr bool is_signed = signed_weights<Kind>;
  constexpr int w = 6 + J % 2, x = 4 + J % 2, before = (J + 2) % 4, pair = J % 2 * 2;
  if constexpr (in_two<Kind, Wide>) {
    if (s < subs) {
      load_tile<w>(desk.weights[tile][half][s], 64);
      load_tile<4>(rows.codes + s * 64, rows.stride);
      load_tile<5>(rows.codes + s * 64 + 32, rows.stride);
    }
    if (s >= 1 && s <= subs) {
      store_tile<2 - pair>(desk.dots[(J + 3) % 4]);
      store_tile<3 - pair>(desk.lows[(J + 3) % 4]);
    }
    if (s >= subs) return;
    zero_tile<pair>();
    dot_tiles<pair, 4, w, is_signed>();
    zero_tile<pair + 1>();
    dot_tiles<pair + 1, 5, w, is_signed>();
  } else {
    if (s < subs) {
      load_tile<w>(desk.weights[tile][half][s], 64);
      load_tile<x>(rows.codes + s * code_bytes(Wide ? Act::int12 : Act::int8), rows.stride);
    }
    if (s >= 2 && s < subs + 2) store_tile<before>(desk.dots[before]);
    if (s >= subs) return;
    zero_tile<J>();
    dot_tiles<J, x, w, is_signed>();
  }
}

// R rows x 16 outputs: adds a stretch's products to `sums`. Products are scaled four subs behind the tiles' beginning,
// which take that long.
template <int Kind, bool Wide, int R>
HL_APART void int_block(Desk& desk, const Rows& rows, int64_t tile, int half, int subs, float (*sums_of)[HL_TILE]) {
  constexpr int behind = 4;
  F sums[R];
  HL_UNROLL for (int r = 0; r < R; r++) sums[r] = load(sums_of[r]);
  const auto step = [&](auto place, int s) {
    constexpr int J = decltype(place)::value;
    tile_step<Kind, Wide, J>(desk, rows, tile, half, s, subs);
    const int done = s - behind;
    if (done < 0 || done >= subs) return;
    const F scale = Kind == HL_INT8_ROW ? zero() : load(desk.scales[tile][half][done]);
    const F offset = has_offsets(Kind) ? load(desk.offsets[tile][half][done]) : zero();
    const float *x_scales = desk.x_scales[done], *x_sums = desk.x_sums[done];
    HL_UNROLL for (int r = 0; r < R; r++) {
      const I dots = {_mm512_load_si512(desk.dots[J][r])};
      F whole;
      if constexpr (in_two<Kind, Wide>)
        whole = add(float_of<4>(dots), float_of({_mm512_load_si512(desk.lows[J][r])}));
      else
        whole = float_of(dots);
      const F x_scale = set1(x_scales[r]);
      sums[r] = fma(whole, Kind == HL_INT8_ROW ? x_scale : mul(scale, x_scale), sums[r]);
      if (has_offsets(Kind)) sums[r] = fma(offset, set1(x_sums[r]), sums[r]);
    }
  };
  for (int s = 0; s < subs + behind; s += 4) {
    step(std::integral_constant<int, 0>{}, s);
    step(std::integral_constant<int, 1>{}, s + 1);
    step(std::integral_constant<int, 2>{}, s + 2);
    step(std::integral_constant<int, 3>{}, s + 3);
  }
  HL_UNROLL for (int r = 0; r < R; r++) store(sums_of[r], sums[r]);
}

template <int Kind, bool Wide>
HL_INLINE void int_halves(Desk& desk, const Rows& rows, int64_t tile, int height, int subs, float (*sums)[HL_TILE]) {
  for (int h = 0; h < 2; h++) {
    float(*half)[HL_TILE] = reinterpret_cast<float(*)[HL_TILE]>(sums[0] + 16 * h);
    if (height > 12) int_block<Kind, Wide, 16>(desk, rows, tile, h, subs, half);
    else if (height > 8) int_block<Kind, Wide, 12>(desk, rows, tile, h, subs, half);
    else int_block<Kind, Wide, 8>(desk, rows, tile, h, subs, half);
  }
}

template <int Kind, bool Wide>
void int_tiles(const hl_weight& w, const uint8_t* rows, int64_t stride, int64_t n_rows, int64_t tile0, int64_t tile1,
               const Epilogue& out) {
  constexpr int depth = in_one<Kind, Wide> ? 64 : 32;
  const int64_t subs = subs_of(w.in), stretches = (subs + most_subs - 1) / most_subs, bytes = tile_bytes(w);
  const uint8_t* data = static_cast<const uint8_t*>(w.data);
  Desk desk;
  int shaped = 0;
  for (int64_t row0 = 0; row0 < n_rows; row0 += rows_at_once) {
    const int64_t height = n_rows - row0 < rows_at_once ? n_rows - row0 : rows_at_once;
    for (int64_t first = tile0; first < tile1; first += most_tiles) {
      const int64_t n_tiles = tile1 - first < most_tiles ? tile1 - first : most_tiles;
      for (int64_t tile = 0; tile < n_tiles; tile++)
        memset(desk.sums[tile], 0, static_cast<size_t>(whole_rows(height)) * sizeof desk.sums[0][0]);
      for (int64_t stretch = 0; stretch < stretches; stretch++) {
        const int64_t sub0 = subs * stretch / stretches;
        const int n = static_cast<int>(subs * (stretch + 1) / stretches - sub0);
        for (int64_t tile = 0; tile < n_tiles; tile++)
          unpack<Kind, Wide>(w, data + (first + tile) * bytes, sub0, n, tile, desk);
        for (int64_t row = 0; row < height; row += tile_rows) {
          const int block_rows = static_cast<int>(height - row < tile_rows ? height - row : tile_rows);
          if (block_rows != shaped) shape_tiles(shaped = block_rows, depth);
          const Rows block = {rows + (row0 + row) * stride + sub0 * code_bytes(Wide ? Act::int12 : Act::int8), stride};
          gather_scales<Kind, Wide>(block, w.in, block_rows, sub0, n, desk);
          for (int64_t tile = 0; tile < n_tiles; tile++)
            int_halves<Kind, Wide>(desk, block, tile, block_rows, n, desk.sums[tile] + row);
        }
      }
      for (int64_t tile = 0; tile < n_tiles; tile++) {
        const float* scales = reinterpret_cast<const float*>(data + (first + tile) * bytes);
        for (int64_t r = 0; Kind == HL_INT8_ROW && r < height; r++)
          for (int h = 0; h < 2; h++) {
            float* y = desk.sums[tile][r] + 16 * h;
            store(y, mul(load(y), load(scales + 16 * h)));
          }
        write_panel(desk.sums[tile], height, row0, first + tile, w.out, out);
      }
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
        const I both = quad(reinterpret_cast<const int8_t*>(x.rows + r * x.stride + 4 * k));
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
bool wants_tiles(int64_t rows) {
  return Kind != HL_F32 && rows > (Kind == HL_BF16 ? 4 : 12);
}

template <int Kind>
void product_on_tiles(const hl_weight& w, const uint8_t* rows, int64_t stride, int64_t n_rows, int64_t tile0,
                      int64_t tile1, const Epilogue& out) {
  if constexpr (Kind == HL_BF16) bf16_tiles(w, rows, stride, n_rows, tile0, tile1, out);
  else if constexpr (Kind != HL_F32)
    (act_of(w) == Act::int12 ? int_tiles<Kind, true> : int_tiles<Kind, false>)(w, rows, stride, n_rows, tile0, tile1,
                                                                                 out);
}

}  // namespace
}  // namespace hl::HL_VARIANT
