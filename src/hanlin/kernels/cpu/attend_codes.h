// Attention over int8 and int4 codes: an engine, see attend_blocks.h.
#pragma once

#include "attend_blocks.h"
#include "simd_dot.h"

namespace hl::HL_VARIANT {
namespace {

// Rows of q and of weights become whole numbers of 14 or 15 bits, 128 * high + low, with one scale a row; their
// products with codes are exact sums of bytes, the same on every CPU.
struct CodeRow {
  float scale;   // of the numbers
  float offset;  // queries: scale * the numbers' sum, which minima multiply; weights: what minima add to every output
  int32_t sum;   // of the numbers
  int32_t unused[13];
};
static_assert(sizeof(CodeRow) == 64, "units start on a cache line");

#if defined(__AVX512F__)
constexpr int code_rows = 6;  // x 2 vectors x high and low
#else
constexpr int code_rows = 2;
#endif

// `Kind` is the values'; keys are of eight bits always.
template <int Kind>
struct CodeEngine {
  static constexpr int per_unit = 4;
  static constexpr int64_t unit_bytes = 8;  // four high bytes, four low ones
  static int64_t query_bytes(int64_t padded) {
    return static_cast<int64_t>(sizeof(CodeRow)) + padded / per_unit * unit_bytes;
  }
  static constexpr int64_t weight_bytes = sizeof(CodeRow) + HL_SPAN / per_unit * unit_bytes;

  HL_INLINE CodeRow* head(uint8_t* row) { return reinterpret_cast<CodeRow*>(row); }
  HL_INLINE const CodeRow& head(const uint8_t* row) { return *reinterpret_cast<const CodeRow*>(row); }

  // Sixteen numbers as units from `index` on, low bytes counted from `bias` below zero.
  HL_INLINE void put(uint8_t* row, int64_t index, I numbers, int bias) {
    const I shifted = addi(numbers, set1i(bias));
    int8_t high[lanes], low[lanes];
    store_i8(high, shr<7>(shifted));
    store_i8(low, addi(andi(shifted, set1i(127)), set1i(-bias)));
    uint8_t* to = row + sizeof(CodeRow) + index / per_unit * unit_bytes;
#if defined(__AVX2__)
    const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(high)),
                  l = _mm_loadu_si128(reinterpret_cast<const __m128i*>(low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi32(h, l));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm_unpackhi_epi32(h, l));
#else
    for (int u = 0; u < lanes / per_unit; u++) {
      memcpy(to + u * unit_bytes, high + u * per_unit, per_unit);
      memcpy(to + u * unit_bytes + per_unit, low + u * per_unit, per_unit);
    }
#endif
  }

  static void put_query(const float* q, int32_t n, uint8_t* to, int64_t bytes) {
    constexpr float most = 16256.0f;  // 128 * 127
    memset(to, 0, static_cast<size_t>(bytes));
    const auto take = [&](int32_t i) { return n - i < lanes ? load(q + i, n - i) : load(q + i); };
    I magnitude = set1i(0);
    for (int32_t i = 0; i < n; i += lanes) magnitude = maxi(magnitude, andi(bits(take(i)), set1i(0x7FFFFFFF)));
    const int32_t top_bits = hmax(magnitude);
    float largest;
    memcpy(&largest, &top_bits, 4);
    if (!(largest < INFINITY)) {
      head(to)->scale = head(to)->offset = NAN;
      return;
    }
    if (largest < 1e-30f) return;
    const F inverse = set1(most / largest);
    I sums = set1i(0);
    for (int32_t i = 0; i < n; i += lanes) {
      const I numbers = to_int(mul(take(i), inverse));
      sums = addi(sums, numbers);
      put(to, i, numbers, 64);
    }
    head(to)->scale = largest / most;
    head(to)->sum = sum(sums);
    head(to)->offset = head(to)->scale * static_cast<float>(head(to)->sum);
  }

  template <int Of>
  HL_INLINE I dot(I sum, B codes, I x) {
#if defined(__AVX512VNNI__) && defined(__GNUC__)
    // The same as dot_u8. GCC 12 keeps a second copy of every sum in memory when the intrinsic's sums live on through a
    // loop.
    __asm__("vpdpbusd %2, %1, %0" : "+v"(sum.v) : "v"(codes.v), "v"(x.v));
    return sum;
#else
    return Of == HL_KV_INT4 ? dot_u4(sum, codes, x) : dot_u8(sum, codes, x);
#endif
  }

  // Codes of two vectors in a row; `index` is even.
  template <int Of>
  HL_INLINE void read(const uint8_t* from, int64_t index, B (&codes)[2]) {
    if (Of == HL_KV_INT4) {
      const B both = load_b(from + 64 * (index / 2));
      codes[0] = low_nibbles(both);
      codes[1] = high_nibbles(both);
    } else {
      codes[0] = load_b(from + 64 * index);
      codes[1] = load_b(from + 64 * (index + 1));
    }
  }

  // 128 * high + low, and what a dot of signed codes leaves out.
  template <int Of>
  HL_INLINE F whole(I high, I low, const CodeRow& row) {
    I all = addi(shl<7>(high), low);
    if (Of == HL_KV_INT8 && signed_u8) all = addi(all, shl<7>(set1i(row.sum)));
    return to_float(all);
  }

  template <int M, int N>
  HL_APART void score_block(const uint8_t* const* keys, const uint16_t* const* params, int64_t units, const uint8_t* q,
                            int64_t stride, float* scores) {
    I high[M][N], low[M][N];
    HL_UNROLL for (int m = 0; m < M; m++) HL_UNROLL for (int n = 0; n < N; n++) high[m][n] = low[m][n] = set1i(0);
    for (int64_t u = 0; u < units; u += 2) {
      B codes[N][2];
      HL_UNROLL for (int n = 0; n < N; n++) read<HL_KV_INT8>(keys[n], u, codes[n]);
      HL_UNROLL for (int m = 0; m < M; m++) {
        const uint8_t* x = q + m * stride + sizeof(CodeRow) + u * unit_bytes;
        HL_UNROLL for (int i = 0; i < 2; i++) {
          const I a = unit(x + i * unit_bytes), b = unit(x + i * unit_bytes + per_unit);
          HL_UNROLL for (int n = 0; n < N; n++) {
            high[m][n] = dot<HL_KV_INT8>(high[m][n], codes[n][i], a);
            low[m][n] = dot<HL_KV_INT8>(low[m][n], codes[n][i], b);
          }
        }
      }
    }
    HL_UNROLL for (int n = 0; n < N; n++) {
      const F scale = load_f16(params[n]), minimum = load_f16(params[n] + HL_SLOTS);
      HL_UNROLL for (int m = 0; m < M; m++) {
        const CodeRow& row = head(q + m * stride);
        const F s = fma(whole<HL_KV_INT8>(high[m][n], low[m][n], row), mul(scale, set1(row.scale)), mul(minimum, set1(row.offset)));
        store(scores + m * HL_SPAN + n * HL_SLOTS, s);
      }
    }
  }

  // The keys of two groups further on, and the values of two groups. (Measured on Zen 5, from memory: a quarter to a
  // third less time. Floats, which take more bytes for the same arithmetic, gain nothing.)
  // Inline, because GCC takes calls of a function that only prefetches for useless.
  HL_INLINE void ask(const Groups& groups, int g, int n_groups, int32_t head_size) {
    const int64_t keys = kv_part_bytes(HL_KV_INT8, head_size), values = kv_part_bytes(Kind, head_size);
    for (int i = g; i < g + 2; i++) {
      if (i + 4 < n_groups) ask_for(groups.keys[i + 4], keys);
      ask_for(groups.values[i], values);
      ask_for(groups.params[i], 4 * HL_SLOTS * 2);
    }
  }

  static void score(int rows, const Groups& groups, int n_groups, int32_t head_size, const uint8_t* q, int64_t stride,
                    float* scores) {
    by_rows<code_rows>(rows, [&](auto height, int r) {
      constexpr int M = decltype(height)::value;
      const int64_t units = (head_size + per_unit - 1) / per_unit;
      int g = 0;
      for (; g + 2 <= n_groups; g += 2) {
        if (groups.fresh) ask(groups, g, n_groups, head_size);
        score_block<M, 2>(groups.keys + g, groups.params + g, units, q + r * stride, stride,
                          scores + r * HL_SPAN + g * HL_SLOTS);
      }
      if (g < n_groups)
        score_block<M, 1>(groups.keys + g, groups.params + g, units, q + r * stride, stride,
                          scores + r * HL_SPAN + g * HL_SLOTS);
    });
  }

  // A weight is multiplied by its token's scale, so that codes of different tokens can be added up.
  static float weigh(float* scores, int count, int filled, const Softmax& softmax, const Groups& groups, uint8_t* to) {
    constexpr float most = 16383.0f;  // 128 * 127 + 127
    F sums = zero(), offsets = zero(), best = zero();
    for (int i = 0; i < count; i += lanes) {
      const uint16_t* params = groups.params[i / HL_SLOTS] + 2 * HL_SLOTS;
      F w = weight(softmax, load(scores + i));
      F scaled = mul(w, load_f16(params)), shifted = mul(w, load_f16(params + HL_SLOTS));
      if (count - i < lanes) {  // parameters of slots beyond may be anything
        float t[lanes];
        const auto cut = [&](F a) {
          store(t, a);
          return load(t, count - i);
        };
        w = cut(w);
        scaled = cut(scaled);
        shifted = cut(shifted);
      }
      sums = add(sums, w);
      offsets = add(offsets, shifted);
      best = max(scaled, best);
      store(scores + i, scaled);
    }
    const float largest = top_lane(best);
    const bool nothing = !(largest > 1e-30f);
    const F inverse = set1(nothing ? 0.0f : most / largest);
    I total = set1i(0);
    int i = 0;
    for (; i < count; i += lanes) {
      const I numbers = to_int(mul(load(scores + i), inverse));
      total = addi(total, numbers);
      put(to, i, numbers, 0);
    }
    if (i < filled)
      memset(to + sizeof(CodeRow) + i / per_unit * unit_bytes, 0,
             static_cast<size_t>((filled - i) / per_unit * unit_bytes));
    head(to)->scale = nothing ? 0.0f : largest / most;
    head(to)->offset = sum(offsets);
    head(to)->sum = sum(total);
    return sum(sums);
  }

  template <int M>
  HL_APART void value_block(const uint8_t* const* values, int64_t index, int64_t count, int64_t row,
                            const uint8_t* weights, float* out, int64_t padded) {
    constexpr int64_t units_of_group = HL_SLOTS / per_unit;
    I high[M][2], low[M][2];
    HL_UNROLL for (int m = 0; m < M; m++) HL_UNROLL for (int n = 0; n < 2; n++) high[m][n] = low[m][n] = set1i(0);
    const int64_t units = (count + per_unit - 1) / per_unit;
    for (int64_t u = 0; u < units; u++) {
      B codes[2];
      read<Kind>(values[u / units_of_group] + u % units_of_group * row, index, codes);
      HL_UNROLL for (int m = 0; m < M; m++) {
        const uint8_t* x = weights + m * weight_bytes + sizeof(CodeRow) + u * unit_bytes;
        const I a = unit(x), b = unit(x + per_unit);
        HL_UNROLL for (int n = 0; n < 2; n++) {
          high[m][n] = dot<Kind>(high[m][n], codes[n], a);
          low[m][n] = dot<Kind>(low[m][n], codes[n], b);
        }
      }
    }
    HL_UNROLL for (int i = 0; i < 2 * M; i++) {
      const int m = i / 2, n = i % 2;
      const CodeRow& of = head(weights + m * weight_bytes);
      store(out + m * padded + n * lanes, fma(whole<Kind>(high[m][n], low[m][n], of), set1(of.scale), set1(of.offset)));
    }
  }

  static void value(int rows, const Groups& groups, int64_t count, int64_t padded, const uint8_t* weights, float* out) {
    const int64_t row = Kind == HL_KV_INT4 ? padded * 2 : padded * 4;
    by_rows<code_rows>(rows, [&](auto height, int r) {
      for (int64_t n = 0; n < padded / lanes; n += 2)
        value_block<decltype(height)::value>(groups.values, n, count, row, weights + r * weight_bytes,
                                             out + r * padded + n * lanes, padded);
    });
  }
};

}  // namespace
}  // namespace hl::HL_VARIANT
