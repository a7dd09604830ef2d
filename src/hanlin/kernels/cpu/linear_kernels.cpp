// Matrix products, compiled once a variant. linear_amx.h has those of many rows on matrix units.
//
// One output tile at a time: `R` rows of inputs against 32 outputs, all of the inputs in order, sums in registers. The
// tile stays in the cache while the panels of R rows pass by, so each weight is read from memory once. The order in
// which one output's products are added does not depend on R, so neither does its value.
#include "linear.h"
#include "simd_dot.h"

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
  const uint8_t* rows;  // prepared rows
  int64_t stride;
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

void write_panel(float (*results)[HL_TILE], int64_t rows, int64_t row0, int64_t tile, int64_t outs, const Epilogue& out) {
  const int64_t first_out = tile * HL_TILE;
  const int n = static_cast<int>(outs - first_out < HL_TILE ? outs - first_out : HL_TILE);
  const int low = n < 16 ? n : 16, high = n - low;
  F bias[2] = {zero(), zero()};
  if (out.bias != nullptr) {
    bias[0] = load(out.bias + first_out, low);
    if (high > 0) bias[1] = load(out.bias + first_out + 16, high);
  }
  for (int64_t r = 0; r < rows; r++) {
    if (out.extra.of != nullptr) add_low_rank(out.extra, row0 + r, tile, results[r]);
    F y[2] = {load(results[r]), load(results[r] + 16)};
    if (out.bias != nullptr)
      for (int h = 0; h < 2; h++) y[h] = add(y[h], bias[h]);
    float* to = out.y + (row0 + r) * out.ldy;
    if (out.flags & HL_SILU_MUL) {
      to += tile * (HL_TILE / 2);
      F z = mul(silu(y[0]), y[1]);
      if (out.flags & HL_ADD) z = add(load(to), z);
      store(to, z);
      continue;
    }
    to += first_out;
    if (out.flags & HL_GELU)
      for (int h = 0; h < 2; h++) y[h] = gelu(y[h]);
    if (out.flags & HL_ADD) {
      y[0] = add(load(to, low), y[0]);
      if (high > 0) y[1] = add(load(to + 16, high), y[1]);
    }
    store(to, y[0], low);
    if (high > 0) store(to + 16, y[1], high);
  }
}

// ---- integer kinds --------------------------------------------------------------------------------------------------

template <bool Wide>
constexpr int64_t code_size = code_bytes(Wide ? Act::int12 : Act::int8);

// dots[r][h] += sum over 32 inputs of code * x; `low`: of the second eight bits, which stand behind the first.
template <int Kind, int R, bool Wide>
HL_INLINE void plane_dots(const uint8_t* w, const Panel& x, int64_t sub, int half0, bool low, I (&dots)[R][halves]) {
  const int64_t at = sub * code_size<Wide> + (low ? 32 : 0);
  const auto codes_of = [&](int r) { return reinterpret_cast<const int8_t*>(x.rows + r * x.stride + at); };
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

// One sub, less the offset that symmetric kinds store their codes with.
template <int Kind, int R, bool Wide>
HL_INLINE void sub_dots(const uint8_t* w, const Panel& x, int64_t sub, int half0, const ActParams* const (&params)[R],
                        I (&dots)[R][halves]) {
  constexpr bool offset4 = Kind == HL_INT4, offset8 = !is_int4(Kind) && !signed_u8;
  const auto offset = [&](int r) {
    const I neg_sum = set1i(params[r][sub].neg_sum);
    return offset4 ? shl<3>(neg_sum) : offset8 ? shl<7>(neg_sum) : set1i(0);
  };
  HL_UNROLL for (int r = 0; r < R; r++) {
    const I start = Wide ? set1i(0) : offset(r);
    HL_UNROLL for (int h = 0; h < halves; h++) dots[r][h] = start;
  }
  plane_dots<Kind, R, Wide>(w, x, sub, half0, false, dots);
  if (!Wide) return;
  HL_UNROLL for (int r = 0; r < R; r++) {
    const I more = offset(r);
    HL_UNROLL for (int h = 0; h < halves; h++) dots[r][h] = addi(shl<4>(dots[r][h]), more);
  }
  plane_dots<Kind, R, Wide>(w, x, sub, half0, true, dots);
}

template <int Kind, int R, bool Wide>
void int_panel(const hl_weight& weight, const uint8_t* tile, const Panel& x, Results& results) {
  const int64_t subs = subs_of(weight.in), subs_per_group = Kind == HL_INT8_ROW ? subs : weight.group / 32;
  const ActParams* params[R];
  HL_UNROLL for (int r = 0; r < R; r++) params[r] =
      reinterpret_cast<const ActParams*>(x.rows + r * x.stride + subs * code_size<Wide>);
  for (int half0 = 0; half0 < 2; half0 += halves) {
    F sums[R][halves];
    HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < halves; h++) sums[r][h] = zero();
    const uint8_t* w = tile + (Kind == HL_INT8_ROW ? HL_TILE * 4 : 0);
    int64_t until_fetch = x.turn;
    for (int64_t sub = 0; sub < subs;) {
      const uint16_t* scales = reinterpret_cast<const uint16_t*>(w);
      if (Kind != HL_INT8_ROW) w += group_header(Kind);
      const int64_t end = sub + subs_per_group;
      for (; sub < end; sub++, w += sub_bytes(Kind)) {
        if (until_fetch-- == 0) {
          constexpr int64_t header = Kind == HL_INT8_ROW ? HL_TILE * 4 : group_header(Kind);
          fetch_ahead(x, tile, w - header, header + sub_bytes(Kind));
          until_fetch = x.every - 1;
        }
        I dots[R][halves];
        sub_dots<Kind, R, Wide>(w, x, sub, half0, params, dots);
        F scale[halves], offset[halves];
        HL_UNROLL for (int h = 0; h < halves && Kind != HL_INT8_ROW; h++) {
          scale[h] = load_f16(scales + 16 * (half0 + h));
          if (has_offsets(Kind)) offset[h] = load_f16(scales + HL_TILE + 16 * (half0 + h));
          if (Kind == HL_INT4_ZERO) offset[h] = mul(offset[h], mul(scale[h], set1(-1.0f)));
        }
        HL_UNROLL for (int r = 0; r < R; r++) {
          const F x_scale = set1(params[r][sub].scale);
          HL_UNROLL for (int h = 0; h < halves; h++) {
            const F factor = Kind == HL_INT8_ROW ? x_scale : mul(scale[h], x_scale);
            sums[r][h] = fma(to_float(dots[r][h]), factor, sums[r][h]);
            if (has_offsets(Kind)) sums[r][h] = fma(offset[h], set1(params[r][sub].scaled_sum), sums[r][h]);
          }
        }
      }
    }
    HL_UNROLL for (int r = 0; r < R; r++) HL_UNROLL for (int h = 0; h < halves; h++) {
      F y = sums[r][h];
      if (Kind == HL_INT8_ROW) y = mul(y, load(reinterpret_cast<const float*>(tile) + 16 * (half0 + h)));
      store(results[r] + 16 * (half0 + h), y);
    }
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
          const F a = set1(reinterpret_cast<const float*>(x.rows + r * x.stride)[k]);
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
          const I a = quad(reinterpret_cast<const int8_t*>(x.rows + r * x.stride + 4 * k));
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
bool wants_tiles(int64_t) {
  return false;
}
template <int Kind>
void product_on_tiles(const hl_weight&, const uint8_t*, int64_t, int64_t, int64_t, int64_t, const Epilogue&) {}
#endif

// ---- from kinds and row counts to the functions above ---------------------------------------------------------------

using PanelFunction = void (*)(const hl_weight&, const uint8_t*, const Panel&, Results&);

template <int Kind, int R>
constexpr PanelFunction panel_function(bool wide) {
  if constexpr (Kind == HL_F32) return f32_panel<R>;
  else if constexpr (Kind == HL_BF16) return bf16_panel<R>;
  else return wide ? int_panel<Kind, R, true> : int_panel<Kind, R, false>;
}

constexpr int most_rows(int kind) { return kind == HL_F32 ? float_rows : kind == HL_BF16 ? bf16_rows : int_rows; }

template <int Kind, int R = most_rows(Kind)>
PanelFunction choose(int64_t rows, bool wide) {
  if constexpr (R > 1) return rows == R ? panel_function<Kind, R>(wide) : choose<Kind, R - 1>(rows, wide);
  else return panel_function<Kind, 1>(wide);
}

// As few panels as there can be, as even as they can be: 8 rows are 4 + 4, not 6 + 2.
//
// Fetching ahead: where a tile has several panels they fetch the next tile together; otherwise the first one would wait
// for memory, and memory for all the others. A single panel that computes long enough for each byte (int4 codes, inputs
// of 12 bits) outlasts the CPU's own prefetching and fetches too (measured on Zen 5: twice as fast at 6 rows); all other
// single panels run at the speed of memory without help.
template <int Kind>
void product_of(const hl_weight& w, const uint8_t* rows, int64_t stride, int64_t n_rows, int64_t tile0, int64_t tile1,
                const Epilogue& out) {
  if (wants_tiles<Kind>(n_rows)) return product_on_tiles<Kind>(w, rows, stride, n_rows, tile0, tile1, out);
  const int64_t bytes = tile_bytes(w), panels = (n_rows + most_rows(Kind) - 1) / most_rows(Kind);
  const int64_t distance = panels == 1 && bytes > 16384 ? 16384 : bytes;
  const bool wide = act_of(w) == Act::int12, fetch = panels > 1 || wide || (is_int4(Kind) && n_rows >= 3);
  for (int64_t tile = tile0; tile < tile1; tile++) {
    const uint8_t* data = static_cast<const uint8_t*>(w.data) + tile * bytes;
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t row0 = n_rows * panel / panels, height = n_rows * (panel + 1) / panels - row0;
      const Panel x = {rows + row0 * stride, stride, data + distance, fetch && tile + 1 < tile1 ? panel : -1, panels};
      Results results;
      choose<Kind>(height, wide)(w, data, x, results);
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

// A sub of zeros, or of values too small to divide by, has scale 0; one with a value that is not finite has scale NaN.
template <bool Wide>
void prepare_int(const float* x, int n, int8_t* codes, ActParams* params) {
  const F a = load(x, n < 16 ? n : 16), b = n > 16 ? load(x + 16, n - 16) : zero();
  const I magnitude = set1i(0x7FFFFFFF);
  const int32_t top = hmax(maxi(andi(bits(a), magnitude), andi(bits(b), magnitude)));
  float largest;
  memcpy(&largest, &top, 4);
  *params = {0, 0, 0, 0};
  if (!(largest < INFINITY) || largest < 1e-30f) {
    memset(codes, 0, code_size<Wide>);
    if (!(largest < INFINITY)) params->scale = params->scaled_sum = NAN;
    return;
  }
  const float inverse = 127.0f / largest;
  const I qa = to_int(mul(a, set1(inverse))), qb = to_int(mul(b, set1(inverse)));
  store_i8(codes, qa);
  store_i8(codes + 16, qb);
  int32_t total = sum(addi(qa, qb));
  params->scale = largest / 127.0f;
  if (Wide) {  // what the eight bits leave, in steps of 1 / 16 of theirs: -8..8, and no more where rounding was off
    const F back = set1(-params->scale), finer = set1(16.0f * inverse), top = set1(8.0f), bottom = set1(-8.0f);
    const I la = to_int(max(min(mul(fma(to_float(qa), back, a), finer), top), bottom));
    const I lb = to_int(max(min(mul(fma(to_float(qb), back, b), finer), top), bottom));
    store_i8(codes + 32, la);
    store_i8(codes + 48, lb);
    total = 16 * total + sum(addi(la, lb));
    params->scale /= 16.0f;
  }
  params->neg_sum = -total;
  params->scaled_sum = params->scale * static_cast<float>(total);
}

template <bool Wide>
void prepare_ints(const float* x, int64_t begin, int64_t end, int64_t in, uint8_t* row) {
  int8_t* codes = reinterpret_cast<int8_t*>(row);
  ActParams* params = reinterpret_cast<ActParams*>(row + subs_of(in) * code_size<Wide>);
  for (int64_t k = begin; k < end; k += 32)
    prepare_int<Wide>(x + k - begin, static_cast<int>(end - k < 32 ? end - k : 32), codes + k / 32 * code_size<Wide>,
                      params + k / 32);
}

void prepare(Act act, const float* x, int64_t begin, int64_t end, int64_t in, void* row) {
  uint8_t* to = static_cast<uint8_t*>(row);
  int64_t used = act_bytes(act, in);
  if (act == Act::f32) {
    memcpy(to + 4 * begin, x, static_cast<size_t>(end - begin) * 4);
  } else if (act == Act::bf16) {
    uint16_t* b = static_cast<uint16_t*>(row);
    int64_t k = begin;
    for (; k + 16 <= end; k += 16) store_u16(b + k, to_bf16(load(x + k - begin)));
    if (k < end) {
      uint16_t t[16];
      store_u16(t, to_bf16(load(x + k - begin, static_cast<int>(end - k))));
      memcpy(b + k, t, static_cast<size_t>(end - k) * 2);
    }
    used = in * 2;
  } else if (act == Act::int12) {
    prepare_ints<true>(x, begin, end, in, to);
  } else {
    prepare_ints<false>(x, begin, end, in, to);
  }
  if (end == in) memset(to + used, 0, static_cast<size_t>(act_stride(act, in) - used));
}

}  // namespace

extern const LinearKernels linear_table;
const LinearKernels linear_table = {prepare, product, low_products};

}  // namespace hl::HL_VARIANT
