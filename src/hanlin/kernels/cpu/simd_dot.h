// Sums of four byte products: sixteen outputs times one quad of inputs at a time.
//
// B holds 64 bytes: the quads of 16 outputs. dot_u4 takes codes 0..15, dot_u8 codes q + 128; both add codes * x to
// sixteen int32, where x is one signed quad in every lane, each of its bytes in -127..127. Where the CPU has no
// unsigned * signed product, dot_u8 adds q * x instead, and `signed_u8` says that the offset of 128 need not be taken
// back. All are exact.
//
// Up to eight dot_u4 in a row may go faster in another form: N n = begin(sum), n = add_u4(n, w, x) ..., finish(n, sum).
#pragma once

#include "simd.h"

namespace hl::HL_VARIANT {

#if defined(__AVX512F__)

struct B {
  __m512i v;
};
HL_INLINE B load_b(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
HL_INLINE B low_nibbles(B b) { return {_mm512_and_si512(b.v, _mm512_set1_epi8(15))}; }
HL_INLINE B high_nibbles(B b) { return {_mm512_and_si512(_mm512_srli_epi16(b.v, 4), _mm512_set1_epi8(15))}; }
HL_INLINE I quad(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return set1i(x);
}
#if defined(__AVX512VNNI__)
constexpr bool signed_u8 = false;
HL_INLINE I dot_u4(I sum, B w, I x) { return {_mm512_dpbusd_epi32(sum.v, w.v, x.v)}; }
HL_INLINE I dot_u8(I sum, B w, I x) { return dot_u4(sum, w, x); }
using N = I;
HL_INLINE N begin(I sum) { return sum; }
HL_INLINE N add_u4(N n, B w, I x) { return dot_u4(n, w, x); }
HL_INLINE I finish(N n, I) { return n; }
#else
constexpr bool signed_u8 = true;
struct N {
  __m512i v;  // int16: 8 * 2 * 15 * 127 fits
};
HL_INLINE N begin(I) { return {_mm512_setzero_si512()}; }
HL_INLINE N add_u4(N n, B w, I x) { return {_mm512_add_epi16(n.v, _mm512_maddubs_epi16(w.v, x.v))}; }
HL_INLINE I finish(N n, I sum) { return addi(sum, {_mm512_madd_epi16(n.v, _mm512_set1_epi16(1))}); }
HL_INLINE I dot_u4(I sum, B w, I x) { return finish({_mm512_maddubs_epi16(w.v, x.v)}, sum); }
HL_INLINE I dot_u8(I sum, B w, I x) {  // |q| * (x with q's sign): 2 * 128 * 127 fits int16
  const __m512i q = _mm512_xor_si512(w.v, _mm512_set1_epi8(-128));
  const __m512i turned = _mm512_mask_sub_epi8(x.v, _mm512_movepi8_mask(q), _mm512_setzero_si512(), x.v);
  return dot_u4(sum, {_mm512_abs_epi8(q)}, {turned});
}
#endif

#elif defined(__AVX2__)

struct B {
  __m256i lo, hi;
};
HL_INLINE B load_b(const uint8_t* p) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32))};
}
HL_INLINE B low_nibbles(B b) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(b.lo, mask), _mm256_and_si256(b.hi, mask)};
}
HL_INLINE B high_nibbles(B b) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(_mm256_srli_epi16(b.lo, 4), mask), _mm256_and_si256(_mm256_srli_epi16(b.hi, 4), mask)};
}
HL_INLINE I quad(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return set1i(x);
}
#if defined(__AVXVNNI__)
constexpr bool signed_u8 = false;
HL_INLINE I dot_u4(I sum, B w, I x) {
  return {_mm256_dpbusd_avx_epi32(sum.lo, w.lo, x.lo), _mm256_dpbusd_avx_epi32(sum.hi, w.hi, x.hi)};
}
HL_INLINE I dot_u8(I sum, B w, I x) { return dot_u4(sum, w, x); }
using N = I;
HL_INLINE N begin(I sum) { return sum; }
HL_INLINE N add_u4(N n, B w, I x) { return dot_u4(n, w, x); }
HL_INLINE I finish(N n, I) { return n; }
#else
constexpr bool signed_u8 = true;
struct N {
  __m256i lo, hi;  // int16: 8 * 2 * 15 * 127 fits
};
HL_INLINE N begin(I) { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
HL_INLINE N add_u4(N n, B w, I x) {
  return {_mm256_add_epi16(n.lo, _mm256_maddubs_epi16(w.lo, x.lo)),
          _mm256_add_epi16(n.hi, _mm256_maddubs_epi16(w.hi, x.hi))};
}
HL_INLINE I finish(N n, I sum) {
  const __m256i ones = _mm256_set1_epi16(1);
  return addi(sum, {_mm256_madd_epi16(n.lo, ones), _mm256_madd_epi16(n.hi, ones)});
}
HL_INLINE __m256i dot_u4(__m256i sum, __m256i w, __m256i x) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
}
HL_INLINE I dot_u4(I sum, B w, I x) { return {dot_u4(sum.lo, w.lo, x.lo), dot_u4(sum.hi, w.hi, x.hi)}; }
HL_INLINE __m256i dot_u8(__m256i sum, __m256i w, __m256i x) {
  const __m256i q = _mm256_xor_si256(w, _mm256_set1_epi8(-128));
  return dot_u4(sum, _mm256_abs_epi8(q), _mm256_sign_epi8(x, q));
}
HL_INLINE I dot_u8(I sum, B w, I x) { return {dot_u8(sum.lo, w.lo, x.lo), dot_u8(sum.hi, w.hi, x.hi)}; }
#endif

#elif defined(__ARM_FEATURE_DOTPROD)

struct B {
  uint8x16_t v[4];
};
constexpr bool signed_u8 = true;
HL_INLINE B load_b(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
HL_INLINE B low_nibbles(B b) {
  for (int i = 0; i < 4; i++) b.v[i] = vandq_u8(b.v[i], vdupq_n_u8(15));
  return b;
}
HL_INLINE B high_nibbles(B b) {
  for (int i = 0; i < 4; i++) b.v[i] = vshrq_n_u8(b.v[i], 4);
  return b;
}
HL_INLINE I quad(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return set1i(x);
}
HL_INLINE I dot_u4(I sum, B w, I x) {
  for (int i = 0; i < 4; i++) sum.v[i] = vdotq_s32(sum.v[i], vreinterpretq_s8_u8(w.v[i]), vreinterpretq_s8_s32(x.v[i]));
  return sum;
}
HL_INLINE I dot_u8(I sum, B w, I x) {
  for (int i = 0; i < 4; i++) w.v[i] = veorq_u8(w.v[i], vdupq_n_u8(128));
  return dot_u4(sum, w, x);
}
using N = I;
HL_INLINE N begin(I sum) { return sum; }
HL_INLINE N add_u4(N n, B w, I x) { return dot_u4(n, w, x); }
HL_INLINE I finish(N n, I) { return n; }

#else

struct B {
  uint8_t v[64];
};
constexpr bool signed_u8 = false;
HL_INLINE B load_b(const uint8_t* p) {
  B b;
  memcpy(b.v, p, 64);
  return b;
}
HL_INLINE B low_nibbles(B b) {
  for (int i = 0; i < 64; i++) b.v[i] &= 15;
  return b;
}
HL_INLINE B high_nibbles(B b) {
  for (int i = 0; i < 64; i++) b.v[i] >>= 4;
  return b;
}
HL_INLINE I quad(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return set1i(x);
}
HL_INLINE I dot_u4(I sum, B w, I x) {
  int8_t q[64];
  memcpy(q, x.v, 64);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < 4; j++) sum.v[i] += w.v[4 * i + j] * q[4 * i + j];
  return sum;
}
HL_INLINE I dot_u8(I sum, B w, I x) { return dot_u4(sum, w, x); }
using N = I;
HL_INLINE N begin(I sum) { return sum; }
HL_INLINE N add_u4(N n, B w, I x) { return dot_u4(n, w, x); }
HL_INLINE I finish(N n, I) { return n; }

#endif

}  // namespace hl::HL_VARIANT
