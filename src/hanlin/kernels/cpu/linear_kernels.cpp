// Matrix products, compiled once a variant. linear_amx.h has those of many rows on matrix units.
//
// One output tile at a time: `R` rows of inputs against 32 outputs, all of the inputs in order, sums in registers. The
// tile stays in the cache while the panels of R rows pass by, so each weight is read from memory once. The order in
// which one output's products are added does not depend on R, so neither does its value.
#include "linear.h"
#include "simd_dot.h"
#include "simd_exact.h"

namespace hl::HL_VARIANT {

// lora_kernels.cpp
void low_products(const hl_adapter& adapter, int32_t op, const LowPiece& x, Range inner, float* low, int64_t stride);
void add_low_rank(const LowRows& extra, int64_t row, int64_t tile, float* y);

namespace {

#if defined(__AVX512F__)
constexpr int halves = 2, int_rows = 6, float_rows = 12;  // 32 registers of 16 lanes
#elif defined(__ARM_FEATURE_DOTPROD)
constexpr int halves = 1, int_rows = 2, float_rows = 4;  // 32 registers of 4 lanes
#else
constexpr int halves = 1, int_rows = 2, float_rows = 4;  // 16 registers of 8 lanes
#endif

// The widest panel's results: R rows of 32 outputs.
using Results = float[float_rows][HL_TILE];

struct Panel {
  const uint8_t* rows[float_rows];  // prepared rows
  const uint8_t* ahead;  // what to fetch while this tile is multiplied: as many bytes as it has, from here on
  int64_t turn,
      every;  // which subs' worth of it this panel fetches: number `turn` (-1: none) and every `every`th after it
};

// Asks for the `bytes` that lie ahead of those at `at`.
HL_INLINE void fetch_ahead(const Panel& x, const uint8_t* tile, const uint8_t* at, int64_t bytes) {
  const uint8_t* p = x.ahead + (at - tile);
  for (int64_t i = 0; i < bytes; i += 64) prefetch(p + i);
}

// ---- a panel's results, written -------------------------------------------------------------------------------------

// Where results of one tile go.
struct Target {
  const Epilogue& out;
  int64_t tile;
  int low, high;  // of the tile's 32 outputs, how many of each half there are
  F bias[2];
};

HL_INLINE Target target_of(const Epilogue& out, int64_t tile, int64_t outs) {
  const int64_t first_out = tile * HL_TILE;
  const int n = static_cast<int>(outs - first_out < HL_TILE ? outs - first_out : HL_TILE);
  Target to = {out, tile, n < 16 ? n : 16, n < 16 ? 0 : n - 16, {zero(), zero()}};
  if (out.bias != nullptr) {
    to.bias[0] = load(out.bias + first_out, to.low);
    if (to.high > 0) to.bias[1] = load(out.bias + first_out + 16, to.high);
  }
  return to;
}

HL_INLINE void write_row(F first, F second, int64_t row, const Target& target) {
  const Epilogue& out = target.out;
  const int low = target.low, high = target.high;
  F y[2] = {first, second};
  if (out.extra.of != nullptr) {
    float sums[HL_TILE];
    store(sums, first), store(sums + 16, second);
    add_low_rank(out.extra, row, target.tile, sums);
    y[0] = load(sums), y[1] = load(sums + 16);
  }
  if (out.bias != nullptr)
    for (int h = 0; h < 2; h++) y[h] = add(y[h], target.bias[h]);
  float* to = out.y + row * out.ldy;
  if (out.flags & HL_SILU_MUL) {
    to += target.tile * (HL_TILE / 2);
    F z = mul(silu(y[0]), y[1]);
    if (out.flags & HL_ADD) z = add(load(to), z);
    return store(to, z);
  }
  to += target.tile * HL_TILE;
  if (out.flags & HL_GELU)
    for (int h = 0; h < 2; h++) y[h] = gelu(y[h]);
  if (out.flags & HL_ADD) {
    y[0] = add(load(to, low), y[0]);
    if (high > 0) y[1] = add(load(to + 16, high), y[1]);
  }
  store(to, y[0], low);
  if (high > 0) store(to + 16, y[1], high);
}

void write_panel(float (*results)[HL_TILE], int64_t rows, int64_t row0, int64_t tile, int64_t outs, const Epilogue& out) {
  const Target target = target_of(out, tile, outs);
  for (int64_t r = 0; r < rows; r++) write_row(load(results[r]), load(results[r] + 16), row0 + r, target);
}

// ---- integer kinds --------------------------------------------------------------------------------------------------

// dots[r][h] += sum over 32 inputs of code * x, of the high or the low bytes of x.
template <int Kind, int R>
HL_INLINE void plane_dots(const uint8_t* w, const Panel& x, int64_t at, int half0, I (&dots)[R][halves]) {
  const auto codes_of = [&](int r) { return reinterpret_cast<const int8_t*>(x.rows[r] + at); };
  if (is_int4(Kind)) {
    N sums[R][halves];
    HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < halves; h++) sums[r][h] = begin(dots[r][h]);
    HL_UNROLL for (int pair = 0; pair < 4; pair++) {
      B first[halves], second[halves];
      HL_UNROLL for (int h = 0; h < halves; h++) {
        const B both = load_b(w + (2 * pair + half0 + h) * 64);
        first[h] = low_nibbles(both);
        second[h] = high_nibbles(both);
      }
      HL_UNROLL for (int r = 0; r < R; r++) {
        const int8_t* q = codes_of(r) + 8 * pair;
        const I a = quad(q), b = quad(q + 4);
        HL_UNROLL for (int h = 0; h < halves; h++) sums[r][h] = add_u4(sums[r][h], first[h], a);
        HL_UNROLL for (int h = 0; h < halves; h++) sums[r][h] = add_u4(sums[r][h], second[h], b);
      }
    }
    HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < halves; h++) dots[r][h] =
        finish(sums[r][h], dots[r][h]);
  } else {
    HL_UNROLL for (int quads = 0; quads < 8; quads++) {
      B codes[halves];
      HL_UNROLL for (int h = 0; h < halves; h++) codes[h] = load_b(w + (2 * quads + half0 + h) * 64);
      HL_UNROLL for (int r = 0; r < R; r++) {
        const I a = quad(codes_of(r) + 4 * quads);
        HL_UNROLL for (int h = 0; h < halves; h++) dots[r][h] = dot_u8(dots[r][h], codes[h], a);
      }
    }
  }
}

// What a group of weights is multiplied by, see hl_linear: W = scale * q + rest, where q of int4 kinds is in -8..7.
struct Factors {
  I scale, rest;
};

HL_INLINE F inverse_units(const uint8_t* tile, int half) {
  return div(set1(1.0f), max(load(reinterpret_cast<const float*>(tile) + 16 * half), set1(1e-37f)));
}

template <int Kind>
HL_INLINE Factors factors_of(const uint8_t* group, int half, F inverse) {
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(group) + 16 * half;
  const F scale = load_f16(scales);
  Factors f = {to_int(mul(scale, inverse)), set1i(0)};
  if (!has_offsets(Kind)) return f;
  const F offset = load_f16(scales + HL_TILE), eight = set1(8.0f);
  const F middle = Kind == HL_INT4_MIN ? fma(scale, eight, offset) : mul(scale, sub(eight, offset));
  f.rest = to_int(mul(middle, inverse));
  return f;
}

// Subs whose products add up within 32 bits: 16 * 32 * 32512 * 127 and 2048 * 32 * 128 * 127 are less than 2^31 - 2^16.
template <int Kind>
constexpr int64_t subs_at_once = Kind == HL_INT8_ROW ? 2048 : 16;

// The sum of whole products as what it stands for.
HL_INLINE F in_units(Exact total, const uint8_t* tile, int half, float x_unit) {
  return mul(to_float(total), mul(load(reinterpret_cast<const float*>(tile) + 16 * half), set1(x_unit)));
}

// One sub of one half of the bytes of x: its products with weights, added to sums.
template <int Kind, int R>
HL_INLINE void add_sub(const uint8_t* w, const Panel& x, int64_t at, int half0, const I (&minus)[R], const I (&by)[halves],
                       I (&sums)[R][halves]) {
  constexpr bool adds_up = Kind == HL_INT8_ROW, offset8 = !is_int4(Kind) && !signed_u8;
  I dots[R][halves];
  HL_UNROLL for (int r = 0; r < R; r++) {
    const I start = is_int4(Kind) ? shl<3>(minus[r]) : offset8 ? shl<7>(minus[r]) : set1i(0);
    HL_UNROLL for (int h = 0; h < halves; h++) dots[r][h] = adds_up ? addi(sums[r][h], start) : start;
  }
  plane_dots<Kind, R>(w, x, at, half0, dots);
  HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < halves; h++) {
    if (adds_up) sums[r][h] = dots[r][h];
    else if (!is_int4(Kind)) sums[r][h] = mul_add(sums[r][h], dots[r][h], by[h]);
    else if (!has_offsets(Kind)) sums[r][h] = pair_dot(sums[r][h], dots[r][h], by[h]);
    else
      sums[r][h] = pair_dot(sums[r][h], ori(andi(dots[r][h], set1i(0xFFFF)), shl<16>(minus[r])), by[h]);
  }
}

template <int Kind, int R>
void int_panel(const hl_weight& weight, const uint8_t* tile, const Panel& x, Results& results) {
  const int64_t subs = subs_of(weight.in), subs_per_group = Kind == HL_INT8_ROW ? 1 : weight.group / 32;
  for (int half0 = 0; half0 < 2; half0 += halves) {
    Exact totals[R][halves];
    F inverse[halves];
    HL_UNROLL for (int h = 0; h < halves; h++) inverse[h] = inverse_units(tile, half0 + h);
    HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < halves; h++) totals[r][h] = {set1i(0), set1i(0)};
    const uint8_t* w = tile + units_bytes;
    int64_t until_fetch = x.turn;
    for (int64_t sub = 0; sub < subs;) {
      const int64_t stop = subs - sub < subs_at_once<Kind> ? subs : sub + subs_at_once<Kind>;
      I highs[R][halves], lows[R][halves];
      HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < halves; h++) highs[r][h] = lows[r][h] = set1i(0);
      while (sub < stop) {
        constexpr int64_t header = Kind == HL_INT8_ROW ? 0 : group_header(Kind);
        I by[halves];
        HL_UNROLL for (int h = 0; h < halves && Kind != HL_INT8_ROW; h++) {
          const Factors f = factors_of<Kind>(w, half0 + h, inverse[h]);
          const I low = set1i(0xFFFF);
          // Sums come negated, and so do what they are multiplied by: rest is never -2^15.
          by[h] = !is_int4(Kind)       ? f.scale
                  : !has_offsets(Kind) ? andi(f.scale, low)
                                       : ori(andi(f.scale, low), shl<16>(mul_add(set1i(0), f.rest, set1i(-1))));
        }
        w += header;
        for (const int64_t end = sub + subs_per_group; sub < end; sub++, w += sub_bytes(Kind)) {
          if (until_fetch-- == 0) {
            fetch_ahead(x, tile, w - header, header + sub_bytes(Kind));
            until_fetch = x.every - 1;
          }
          const int64_t at = at_sub(sub);
          I minus[R];
          HL_UNROLL for (int r = 0; r < R; r++) minus[r] = set1i(sums_at(x.rows[r], weight.in, sub).minus_high);
          add_sub<Kind, R>(w, x, at, half0, minus, by, highs);
          HL_UNROLL for (int r = 0; r < R; r++) minus[r] = set1i(sums_at(x.rows[r], weight.in, sub).minus_low);
          add_sub<Kind, R>(w, x, at + next_cell, half0, minus, by, lows);
        }
      }
      HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < halves; h++) totals[r][h] =
          add(totals[r][h], set1i(0), highs[r][h], lows[r][h]);
    }
    HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < halves; h++)
        store(results[r] + 16 * (half0 + h), in_units(totals[r][h], tile, half0 + h, unit_at(x.rows[r], weight.in)));
  }
}

// ---- float kinds ----------------------------------------------------------------------------------------------------

// Inputs that are multiplied between two looks at whether to fetch ahead.
constexpr int64_t stretch = 32;

template <int R>
void f32_panel(const hl_weight& weight, const uint8_t* tile, const Panel& x, Results& results) {
  for (int half0 = 0; half0 < 2; half0 += halves) {
    F sums[R][halves];
    HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < halves; h++) sums[r][h] = zero();
    const uint8_t* w = tile;
    int64_t until_fetch = x.turn;
    for (int64_t k = 0; k < weight.in;) {
      if (until_fetch-- == 0) {
        fetch_ahead(x, tile, w, stretch * HL_TILE * 4);
        until_fetch = x.every - 1;
      }
      for (const int64_t end = k + stretch < weight.in ? k + stretch : weight.in; k < end; k++, w += HL_TILE * 4) {
        F part[halves];
        HL_UNROLL for (int h = 0; h < halves; h++) part[h] = load(reinterpret_cast<const float*>(w) + 16 * (half0 + h));
        HL_UNROLL for (int r = 0; r < R; r++) {
          const F a = set1(reinterpret_cast<const float*>(x.rows[r])[k]);
          HL_UNROLL for (int h = 0; h < halves; h++) sums[r][h] = fma(part[h], a, sums[r][h]);
        }
      }
    }
    HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < halves; h++)
        store(results[r] + 16 * (half0 + h), sums[r][h]);
  }
}

#if !defined(__AMX_BF16__)  // which has its own in linear_amx.h

// sum + both products of a pair of bfloat16, the first one first where they are added one by one.
HL_INLINE F dot_bf16(F sum, I w, I x) {
#if defined(__AVX512BF16__)
  return {_mm512_dpbf16_ps(sum.v, (__m512bh)w.v, (__m512bh)x.v)};
#else
  const I second = set1i(static_cast<int32_t>(0xFFFF0000u));
  sum = fma(from_bits(shl<16>(w)), from_bits(shl<16>(x)), sum);
  return fma(from_bits(andi(w, second)), from_bits(andi(x, second)), sum);
#endif
}

template <int R>
void bf16_panel(const hl_weight& weight, const uint8_t* tile, const Panel& x, Results& results) {
  const int64_t pairs = (weight.in + 1) / 2;
  for (int half0 = 0; half0 < 2; half0 += halves) {
    F sums[R][halves];
    HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < halves; h++) sums[r][h] = zero();
    const uint8_t* w = tile;
    int64_t until_fetch = x.turn;
    for (int64_t k = 0; k < pairs;) {
      if (until_fetch-- == 0) {
        fetch_ahead(x, tile, w, stretch / 2 * HL_TILE * 4);
        until_fetch = x.every - 1;
      }
      for (const int64_t end = k + stretch / 2 < pairs ? k + stretch / 2 : pairs; k < end; k++, w += HL_TILE * 4) {
        I part[halves];
        HL_UNROLL for (int h = 0; h < halves; h++) part[h] =
            bits(load(reinterpret_cast<const float*>(w) + 16 * (half0 + h)));
        HL_UNROLL for (int r = 0; r < R; r++) {
          const I a = quad(reinterpret_cast<const int8_t*>(x.rows[r] + 4 * k));
          HL_UNROLL for (int h = 0; h < halves; h++) sums[r][h] = dot_bf16(sums[r][h], part[h], a);
        }
      }
    }
    HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < halves; h++)
        store(results[r] + 16 * (half0 + h), sums[r][h]);
  }
}

#endif

#if defined(__AMX_INT8__) && defined(__AMX_BF16__)
}  // namespace
}  // namespace hl::HL_VARIANT
#include "linear_amx.h"
namespace hl::HL_VARIANT {
namespace {
constexpr int bf16_rows = 4;
#else
constexpr int bf16_rows = float_rows;
template <int Kind>
bool wants_tiles(int64_t, int64_t) {
  return false;
}
template <int Kind>
void product_on_tiles(const hl_weight&, const uint8_t*, int64_t, int64_t, int64_t, int64_t, const Epilogue&) {}
#endif

// ---- from kinds and row counts to the functions above ---------------------------------------------------------------

using PanelFunction = void (*)(const hl_weight&, const uint8_t*, const Panel&, Results&);

template <int Kind, int R>
constexpr PanelFunction panel_function() {
  if constexpr (Kind == HL_F32) return f32_panel<R>;
  else if constexpr (Kind == HL_BF16) return bf16_panel<R>;
  else return int_panel<Kind, R>;
}

constexpr int most_rows(int kind) { return kind == HL_F32 ? float_rows : kind == HL_BF16 ? bf16_rows : int_rows; }

template <int Kind, int R = most_rows(Kind)>
PanelFunction choose(int64_t rows) {
  if constexpr (R > 1) return rows == R ? panel_function<Kind, R>() : choose<Kind, R - 1>(rows);
  else return panel_function<Kind, 1>();
}

// As few panels as there can be, as even as they can be: 8 rows are 4 + 4, not 6 + 2.
//
// Fetching ahead: where a tile has several panels they fetch the next tile together; otherwise the first one would wait
// for memory, and memory for all the others. A single panel that computes long enough for each byte (integer kinds)
// outlasts the CPU's own prefetching and fetches too (measured on Zen 5: twice as fast at 6 rows); all other single
// panels run at the speed of memory without help.
template <int Kind>
void product_of(const hl_weight& w, const uint8_t* rows, int64_t stride, int64_t n_rows, int64_t tile0, int64_t tile1,
                const Epilogue& out) {
  if (wants_tiles<Kind>(n_rows, w.in)) return product_on_tiles<Kind>(w, rows, stride, n_rows, tile0, tile1, out);
  const int64_t bytes = tile_bytes(w), panels = (n_rows + most_rows(Kind) - 1) / most_rows(Kind);
  const int64_t distance = panels == 1 && bytes > 16384 ? 16384 : bytes;
  const bool fetch = panels > 1 || Kind >= HL_INT8_ROW;
  for (int64_t tile = tile0; tile < tile1; tile++) {
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + tile * bytes;
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t row0 = n_rows * panel / panels, height = n_rows * (panel + 1) / panels - row0;
      Panel x = {{}, data + distance, fetch && tile + 1 < tile1 ? panel : -1, panels};
      for (int64_t r = 0; r < height; r++) x.rows[r] = act_row(act_of(w), rows, stride, row0 + r);
      Results results;
      choose<Kind>(height)(w, data, x, results);
      write_panel(results, height, row0, tile, w.out, out);
    }
  }
}

void product(const hl_weight& w, const void* rows, int64_t stride, int64_t n_rows, int64_t tile0, int64_t tile1,
             const Epilogue& out) {
  const uint8_t* x = static_cast<const uint8_t*>(rows);
  switch (w.kind) {
    case HL_F32:
      return product_of<HL_F32>(w, x, stride, n_rows, tile0, tile1, out);
    case HL_BF16:
      return product_of<HL_BF16>(w, x, stride, n_rows, tile0, tile1, out);
    case HL_INT8_ROW:
      return product_of<HL_INT8_ROW>(w, x, stride, n_rows, tile0, tile1, out);
    case HL_INT8:
      return product_of<HL_INT8>(w, x, stride, n_rows, tile0, tile1, out);
    case HL_INT4:
      return product_of<HL_INT4>(w, x, stride, n_rows, tile0, tile1, out);
    case HL_INT4_MIN:
      return product_of<HL_INT4_MIN>(w, x, stride, n_rows, tile0, tile1, out);
    default:
      return product_of<HL_INT4_ZERO>(w, x, stride, n_rows, tile0, tile1, out);
  }
}

// ---- preparing inputs -----------------------------------------------------------------------------------------------

// A row of zeros, or of values too small to divide by, has unit 0; one with a value that is not finite has unit NaN.
void prepare_int(const float* x, int64_t in, uint8_t* row) {
  const I magnitude = set1i(0x7FFFFFFF);
  I tops = set1i(0);
  int64_t k = 0;
  for (; k + 16 <= in; k += 16) tops = maxi(tops, andi(bits(load(x + k)), magnitude));
  if (k < in) tops = maxi(tops, andi(bits(load(x + k, static_cast<int>(in - k))), magnitude));
  const int32_t top = hmax(tops);
  float largest;
  memcpy(&largest, &top, 4);
  float& unit = const_cast<float&>(unit_at(row, in));
  if (!(largest < INFINITY) || largest < 1e-30f) {
    for (int64_t c = 0; c < code_cells(in) + sums_cells(in); c++) memset(row + c * next_cell, 0, cell);
    unit = largest < INFINITY ? 0.0f : NAN;
    return;
  }
  unit = largest / 32512.0f;
  const F inverse = set1(32512.0f / largest);
  for (int64_t sub = 0; sub < subs_of(in); sub++) {
    const int n = static_cast<int>(in - sub * 32 < 32 ? in - sub * 32 : 32);
    int32_t highs = 0, lows = 0;
    for (int part = 0; part < 2; part++) {
      const int left = n - 16 * part;
      const F values = left >= 16 ? load(x + sub * 32 + 16 * part) : left > 0 ? load(x + sub * 32 + 16 * part, left) : zero();
      I q = to_int(mul(values, inverse));
      const I half = set1i(128), below_0 = addi(andi(addi(q, half), set1i(255)), set1i(-1));  // below 0 where q % 256 == 128
      q = addi(q, andi(shr<31>(below_0), set1i(1)));
      const I high = shr<8>(addi(q, half)), low = shr<24>(shl<24>(q));
      int8_t* to = reinterpret_cast<int8_t*>(row + at_sub(sub) + 16 * part);
      store_i8(to, high);
      store_i8(to + next_cell, low);
      highs += sum(high);
      lows += sum(low);
    }
    const_cast<ActSums&>(sums_at(row, in, sub)) = {-highs, -lows};
  }
  if (subs_of(in) % 2 != 0) {  // the other half of the last 64
    memset(row + at_sub(subs_of(in)), 0, 32);
    memset(row + at_sub(subs_of(in)) + next_cell, 0, 32);
  }
}

void prepare(Act act, const float* x, int64_t begin, int64_t end, int64_t in, void* row) {
  uint8_t* to = static_cast<uint8_t*>(row);
  if (act == Act::int16) return prepare_int(x, in, to);
  if (act == Act::f32) {
    memcpy(to + 4 * begin, x, static_cast<size_t>(end - begin) * 4);
  } else {
    uint16_t* b = static_cast<uint16_t*>(row);
    int64_t k = begin;
    for (; k + 16 <= end; k += 16) store_u16(b + k, to_bf16(load(x + k - begin)));
    if (k < end) {
      uint16_t t[16];
      store_u16(t, to_bf16(load(x + k - begin, static_cast<int>(end - k))));
      memcpy(b + k, t, static_cast<size_t>(end - k) * 2);
    }
  }
  const int64_t used = in * (act == Act::f32 ? 4 : 2);
  if (end == in) memset(to + used, 0, static_cast<size_t>(act_stride(act, in) - used));
}

}  // namespace

extern const LinearKernels linear_table;
const LinearKernels linear_table = {prepare, product, low_products};

}  // namespace hl::HL_VARIANT
