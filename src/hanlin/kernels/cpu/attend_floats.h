// Attention over float32 and bfloat16: an engine, see attend_blocks.h.
#pragma once

#include "attend_blocks.h"

namespace hl::HL_VARIANT {
namespace {

#if defined(__AVX512F__)
constexpr int wide = 4;  // 6 rows x 4 vectors of sums, in 32 registers
#else
constexpr int wide = 1;
#endif

// A float a unit.
struct Floats {
  static constexpr int per_unit = 1;
  HL_INLINE F madd(F sum, I vector, I unit) { return fma(from_bits(vector), from_bits(unit), sum); }
  // Puts sixteen numbers into a row of units, and returns what they have become.
  HL_INLINE F put(uint8_t* to, int64_t index, F a) {
    store(reinterpret_cast<float*>(to) + index, a);
    return a;
  }
};

#if defined(__AVX512BF16__)
// A pair of bfloat16 a unit.
struct Pairs {
  static constexpr int per_unit = 2;
  HL_INLINE F madd(F sum, I vector, I unit) { return {_mm512_dpbf16_ps(sum.v, (__m512bh)vector.v, (__m512bh)unit.v)}; }
  HL_INLINE F put(uint8_t* to, int64_t index, F a) {
    const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(a.v);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 2 * index), rounded);
    return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded), 16))};
  }
};
#endif

// All blocks of rows by groups of keys, of `steps` shared units each; all blocks of rows by dimensions.
template <class Engine>
void score_blocks(int rows, const Groups& groups, int n_groups, int64_t steps, const uint8_t* q, int64_t stride,
                  float* scores) {
  by_rows<group_rows>(rows, [&](auto height, int r) {
    constexpr int M = decltype(height)::value;
    const auto at = [&](int g) { return scores + r * HL_SPAN + g * HL_SLOTS; };
    int g = 0;
    for (; g + wide <= n_groups; g += wide)
      Engine::template score_block<M, wide>(groups.keys + g, steps, q + r * stride, stride, at(g));
    for (; g < n_groups; g++) Engine::template score_block<M, 1>(groups.keys + g, steps, q + r * stride, stride, at(g));
  });
}

template <class Engine>
void value_blocks(int rows, const Groups& groups, int64_t count, int64_t padded, const uint8_t* weights, float* out) {
  by_rows<group_rows>(rows, [&](auto height, int r) {
    constexpr int M = decltype(height)::value;
    const uint8_t* from = weights + r * Engine::weight_bytes;
    const auto at = [&](int64_t n) { return out + r * padded + n * lanes; };
    int64_t n = 0;
    for (; n + wide <= padded / lanes; n += wide)
      Engine::template value_block<M, wide>(groups.values, 64 * n, count, padded * 4, from, at(n), padded);
    for (; n < padded / lanes; n++)
      Engine::template value_block<M, 1>(groups.values, 64 * n, count, padded * 4, from, at(n), padded);
  });
}

template <class D>
struct FloatEngine {
  static int64_t query_bytes(int64_t padded) { return padded * 4 / D::per_unit; }
  static constexpr int64_t weight_bytes = HL_SPAN * 4;

  static void put_query(const float* q, int32_t n, uint8_t* to, int64_t bytes) {
    memset(to, 0, static_cast<size_t>(bytes));
    for (int32_t i = 0; i < n; i += lanes) D::put(to, i, n - i < lanes ? load(q + i, n - i) : load(q + i));
  }

  template <int M, int N>
  HL_APART void score_block(const uint8_t* const* keys, int64_t steps, const uint8_t* q, int64_t stride,
                            float* scores) {
    F sums[M][N];
    HL_UNROLL for (int m = 0; m < M; m++) HL_UNROLL for (int n = 0; n < N; n++) sums[m][n] = zero();
    for (int64_t step = 0; step < steps; step++) {
      I vector[N];
      HL_UNROLL for (int n = 0; n < N; n++) vector[n] = load_bits(keys[n] + 64 * step);
      HL_UNROLL for (int m = 0; m < M; m++) {
        const I a = unit(q + m * stride + 4 * step);
        HL_UNROLL for (int n = 0; n < N; n++) sums[m][n] = D::madd(sums[m][n], vector[n], a);
      }
    }
    HL_UNROLL for (int m = 0; m < M; m++) HL_UNROLL for (int n = 0; n < N; n++)
        store(scores + m * HL_SPAN + n * HL_SLOTS, sums[m][n]);
  }

  static void score(int rows, const Groups& groups, int n_groups, int32_t head_size, const uint8_t* q, int64_t stride,
                    float* scores) {
    score_blocks<FloatEngine>(rows, groups, n_groups, head_size / D::per_unit, q, stride, scores);
  }

  // The sum is that of the weights as they are rounded, so that rounding does not change what they add up to.
  static float weigh(const float* scores, int count, int filled, const Softmax& softmax, const Groups&, uint8_t* to) {
    F sums = zero();
    int i = 0;
    for (; i + lanes <= count; i += lanes) sums = add(sums, D::put(to, i, weight(softmax, load(scores + i))));
    if (i < count) {
      float t[lanes];
      store(t, weight(softmax, load(scores + i)));
      sums = add(sums, D::put(to, i, load(t, count - i)));
      i += lanes;
    }
    constexpr int bytes = 4 / D::per_unit;
    if (i < filled) memset(to + i * bytes, 0, static_cast<size_t>((filled - i) * bytes));
    return sum(sums);
  }

  template <int M, int N>
  HL_APART void value_block(const uint8_t* const* values, int64_t column, int64_t count, int64_t row,
                            const uint8_t* weights, float* out, int64_t padded) {
    constexpr int64_t units_of_group = HL_SLOTS / D::per_unit;
    F sums[M][N];
    HL_UNROLL for (int m = 0; m < M; m++) HL_UNROLL for (int n = 0; n < N; n++) sums[m][n] = zero();
    const int64_t units = (count + D::per_unit - 1) / D::per_unit, whole = count / D::per_unit;
    for (int64_t first = 0; first < units; first += units_of_group) {
      const uint8_t* from = values[first / units_of_group] + column;
      const int64_t end = first + units_of_group < units ? first + units_of_group : units;
      for (int64_t u = first; u < end; u++, from += row) {
        I vector[N];
        HL_UNROLL for (int n = 0; n < N; n++) {
          vector[n] = load_bits(from + 64 * n);
          // The other half of the last pair is nobody's, or not of this past: it may hold anything, NaN included.
          if (D::per_unit == 2 && u >= whole) vector[n] = andi(vector[n], set1i(0xFFFF));
        }
        HL_UNROLL for (int m = 0; m < M; m++) {
          const I a = unit(weights + m * weight_bytes + 4 * u);
          HL_UNROLL for (int n = 0; n < N; n++) sums[m][n] = D::madd(sums[m][n], vector[n], a);
        }
      }
    }
    HL_UNROLL for (int m = 0; m < M; m++) HL_UNROLL for (int n = 0; n < N; n++)
        store(out + m * padded + n * lanes, sums[m][n]);
  }

  static void value(int rows, const Groups& groups, int64_t count, int64_t padded, const uint8_t* weights, float* out) {
    value_blocks<FloatEngine>(rows, groups, count, padded, weights, out);
  }
};

// bfloat16 as floats, for a few rows: pairs are widened in registers as they are read. The same sums in the same order as
// FloatEngine<Floats> makes of slots that were widened before, so the same bits.
struct WidenedPairs : FloatEngine<Floats> {
  // Every sum plus one half of the pairs times what they share.
  template <bool Second, int M, int N>
  HL_INLINE void add_half(const I (&pairs)[N], const uint8_t* shared, int64_t stride, F (&sums)[M][N]) {
    F vector[N];
    HL_UNROLL for (int n = 0; n < N; n++) vector[n] =
        from_bits(Second ? andi(pairs[n], set1i(static_cast<int32_t>(0xFFFF0000u))) : shl<16>(pairs[n]));
    HL_UNROLL for (int m = 0; m < M; m++) {
      const F a = from_bits(unit(shared + m * stride));
      HL_UNROLL for (int n = 0; n < N; n++) sums[m][n] = fma(vector[n], a, sums[m][n]);
    }
  }

  template <int M, int N>
  HL_APART void score_block(const uint8_t* const* keys, int64_t head_size, const uint8_t* q, int64_t stride,
                            float* scores) {
    F sums[M][N];
    HL_UNROLL for (int m = 0; m < M; m++) HL_UNROLL for (int n = 0; n < N; n++) sums[m][n] = zero();
    for (int64_t d = 0; d < head_size; d += 2) {
      I pairs[N];
      HL_UNROLL for (int n = 0; n < N; n++) pairs[n] = load_bits(keys[n] + 32 * d);
      add_half<false>(pairs, q + 4 * d, stride, sums);
      if (d + 1 < head_size) add_half<true>(pairs, q + 4 * d + 4, stride, sums);
    }
    HL_UNROLL for (int m = 0; m < M; m++) HL_UNROLL for (int n = 0; n < N; n++)
        store(scores + m * HL_SPAN + n * HL_SLOTS, sums[m][n]);
  }

  static void score(int rows, const Groups& groups, int n_groups, int32_t head_size, const uint8_t* q, int64_t stride,
                    float* scores) {
    score_blocks<WidenedPairs>(rows, groups, n_groups, head_size, q, stride, scores);
  }

  template <int M, int N>
  HL_APART void value_block(const uint8_t* const* values, int64_t column, int64_t count, int64_t row,
                            const uint8_t* weights, float* out, int64_t padded) {
    F sums[M][N];
    HL_UNROLL for (int m = 0; m < M; m++) HL_UNROLL for (int n = 0; n < N; n++) sums[m][n] = zero();
    for (int64_t slot = 0; slot < count; slot += 2) {
      const uint8_t* from = values[slot / HL_SLOTS] + column + slot % HL_SLOTS / 2 * row;
      I pairs[N];
      HL_UNROLL for (int n = 0; n < N; n++) pairs[n] = load_bits(from + 64 * n);
      add_half<false>(pairs, weights + 4 * slot, weight_bytes, sums);
      if (slot + 1 < count) add_half<true>(pairs, weights + 4 * slot + 4, weight_bytes, sums);
    }
    HL_UNROLL for (int m = 0; m < M; m++) HL_UNROLL for (int n = 0; n < N; n++)
        store(out + m * padded + n * lanes, sums[m][n]);
  }

  static void value(int rows, const Groups& groups, int64_t count, int64_t padded, const uint8_t* weights, float* out) {
    value_blocks<WidenedPairs>(rows, groups, count, padded, weights, out);
  }
};

}  // namespace
}  // namespace hl::HL_VARIANT
