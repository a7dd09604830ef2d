// The two products of attention: what attend_floats.h and attend_codes.h share. Compiled once a variant.
//
// Both products have one form: 64 bytes that hold a unit (a float, a pair of bfloat16, four codes) for each of 16 sums,
// times a unit that all sums share. For scores the sums are keys, the steps head dimensions, the shared units q; for
// outputs the sums are head dimensions, the steps keys, the shared units weights. Every sum is one chain over the steps
// in order (or exact, for codes), however many rows and sums are computed beside it: that is what makes a row's bits
// independent of its company.
//
// An engine has
//   query_bytes(padded), put_query(q, n, to, bytes): a row of q in the form of shared units;
//   score(rows, groups, n_groups, head_size, queries, stride, scores): rows of HL_SPAN scores;
//   weight_bytes, weigh(scores, count, filled, softmax, groups, to): a row of weights in the form of shared units, with
//     zeros from `count` to `filled`; returns what they add up to, and leaves nothing of use in `scores`;
//   value(rows, groups, count, padded, weights, out): rows of `padded` floats, over the first `count` keys.
#pragma once

#include "ops.h"
#include "simd_dot.h"

namespace hl::HL_VARIANT {
namespace {

constexpr int span_groups = HL_SPAN / HL_SLOTS;

// Where the keys, values and parameters of a span's groups of HL_SLOTS slots are.
struct Groups {
  const uint8_t *keys[span_groups], *values[span_groups];
  const uint16_t* params[span_groups];
  bool fresh;  // nobody has read them yet
};

// Asks for what will be read soon: groups of slots lie far apart, so the CPU cannot guess where the next one is.
HL_INLINE void ask_for(const void* from, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) prefetch(static_cast<const uint8_t*>(from) + at);
}

HL_INLINE I load_bits(const void* p) { return bits(load(static_cast<const float*>(p))); }
HL_INLINE I unit(const uint8_t* p) { return quad(reinterpret_cast<const int8_t*>(p)); }

// Calls block(Height<M>, row) for rows 0, M, 2 M ..., and for what is left with the M that fits.
template <int M>
struct Height {
  static constexpr int value = M;
};
template <int M, class Block>
HL_INLINE void by_rows(int rows, const Block& block, int first = 0) {
  for (; first + M <= rows; first += M) block(Height<M>{}, first);
  if constexpr (M > 1)
    if (first < rows) by_rows<M - 1>(rows, block, first);
}

#if defined(__AVX512F__)
constexpr int group_rows = 6;  // whose scores and weights are at hand together
HL_INLINE float top_lane(F a) { return _mm512_reduce_max_ps(a.v); }
#else
constexpr int group_rows = 4;
HL_INLINE float top_lane(F a) { return hmax(a); }
#endif

// ---- softmax -------------------------------------------------------------------------------------------------------

// 2^x for x <= 0, within 2e-7 of the true value; 0 below -100, where nothing is left of it beside a weight of 1: products
// with numbers that have no leading digit (denormals) take the CPU a hundred times as long. NaN gives NaN.
HL_INLINE F power(F x) {
#if defined(__AVX512F__)
  const F n = {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
#else
  x = max(set1(-126.0f), x);
  const F n = floor(add(x, set1(0.5f)));
#endif
  const F r = sub(x, n);
  F p = set1(0.001326472731307149f);  // the polynomial of degree 5 with the least relative error that is 1 at 0
  p = fma(p, r, set1(0.009671512991189957f));
  p = fma(p, r, set1(0.05550733581185341f));
  p = fma(p, r, set1(0.24022242426872253f));
  p = fma(p, r, set1(0.6931470036506653f));
  p = fma(p, r, set1(1.0f));
#if defined(__AVX512F__)
  return {_mm512_maskz_scalef_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(-100.0f), _CMP_NLT_UQ), p.v, n.v)};
#else
  const I seen = addi(shr<31>(bits(add(x, set1(100.0f)))), set1i(1));  // 0 below -100, else 1
  const F y = mul(p, from_bits(shl<23>(addi(to_int(n), set1i(127)))));
  return from_bits(ori(andi(bits(y), shr<31>(shl<31>(seen))), nan_lanes(x)));
#endif
}

// A score's weight is 2^(factor * score - shift), at most 1.
struct Softmax {
  float factor, shift;
};
HL_INLINE F weight(const Softmax& s, F score) { return power(fma(score, set1(s.factor), set1(-s.shift))); }

// The largest of `count` scores; NaN is passed over here, and comes back with its weight.
HL_INLINE float highest(const float* scores, int count) {
  F best = set1(-3.0e38f);
  int i = 0;
  for (; i + lanes <= count; i += lanes) best = max(load(scores + i), best);
  if (i < count) {
    float t[lanes];
    store(t, set1(-3.0e38f));
    memcpy(t, scores + i, sizeof(float) * static_cast<size_t>(count - i));
    best = max(load(t), best);
  }
  return top_lane(best);
}

}  // namespace
}  // namespace hl::HL_VARIANT
