// Sixteen floats at a time, the same on every instruction set, so that kernels are written once.
//
// A file that includes this is compiled once a variant, with -DHL_VARIANT=<name> and that variant's machine flags, and
// puts everything into namespace hl::HL_VARIANT. Such a file must not instantiate inline functions or templates of the
// standard library (use C headers, `static` functions and the helpers here): the linker keeps one copy of each, and
// might keep the one that needs AVX-512.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_FEATURE_DOTPROD)
#include <arm_neon.h>
#endif

#if defined(__GNUC__)
#define HL_INLINE static inline __attribute__((always_inline))
#else
#define HL_INLINE static inline
#endif

#if defined(__GNUC__) && !defined(__clang__)
#define HL_UNROLL _Pragma("GCC unroll 16")
#else
#define HL_UNROLL _Pragma("unroll")
#endif

// Innermost loops may be functions of their own: within a large one the compiler runs out of registers for their sums.
#if defined(__GNUC__)
#define HL_APART static __attribute__((noinline))
#else
#define HL_APART static
#endif

namespace hl::HL_VARIANT {

constexpr int lanes = 16;

// Asks for a cache line, into the second level cache.
HL_INLINE void prefetch(const void* p) {
#if defined(__GNUC__)
  __builtin_prefetch(p, 0, 2);
#else
  (void)p;
#endif
}

// ---- the vector: F holds 16 floats, I 16 int32 ----------------------------------------------------------------------

#if defined(__AVX512F__)

struct F {
  __m512 v;
};
struct I {
  __m512i v;
};

HL_INLINE __mmask16 first(int n) { return static_cast<__mmask16>(n >= 16 ? 0xFFFFu : (1u << n) - 1u); }

HL_INLINE F set1(float x) { return {_mm512_set1_ps(x)}; }
HL_INLINE F load(const float* p) { return {_mm512_loadu_ps(p)}; }
HL_INLINE F load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first(n), p)}; }  // lanes n.. are 0
HL_INLINE void store(float* p, F a) { _mm512_storeu_ps(p, a.v); }
HL_INLINE void store(float* p, F a, int n) { _mm512_mask_storeu_ps(p, first(n), a.v); }
HL_INLINE F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
HL_INLINE F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
HL_INLINE F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
HL_INLINE F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
HL_INLINE F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
HL_INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }  // b where either is NaN
HL_INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
HL_INLINE F floor(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)}; }
HL_INLINE I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }  // to nearest even
HL_INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }
HL_INLINE I bits(F a) { return {_mm512_castps_si512(a.v)}; }
HL_INLINE F from_bits(I a) { return {_mm512_castsi512_ps(a.v)}; }
HL_INLINE I set1i(int32_t x) { return {_mm512_set1_epi32(x)}; }
HL_INLINE I addi(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
HL_INLINE I andi(I a, I b) { return {_mm512_and_si512(a.v, b.v)}; }
HL_INLINE I ori(I a, I b) { return {_mm512_or_si512(a.v, b.v)}; }
HL_INLINE I maxi(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
HL_INLINE I nan_lanes(F a) {  // all ones where NaN, else 0
  return {_mm512_maskz_set1_epi32(_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q), -1)};
}
template <int N>
HL_INLINE I shl(I a) {
  return {_mm512_slli_epi32(a.v, N)};
}
template <int N>
HL_INLINE I shr(I a) {
  return {_mm512_srai_epi32(a.v, N)};
}  // arithmetic
HL_INLINE I load_i8(const int8_t* p) {
  return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
HL_INLINE I load_u8(const uint8_t* p) {
  return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
HL_INLINE void store_i8(void* p, I a) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}  // low bytes
HL_INLINE F load_f16(const uint16_t* p) {
  return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
HL_INLINE F load_bf16(const uint16_t* p) {
  return {_mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
HL_INLINE void store_u16(uint16_t* p, I a) {  // low halves
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(a.v));
}

#elif defined(__AVX2__)

struct F {
  __m256 lo, hi;
};
struct I {
  __m256i lo, hi;
};

HL_INLINE F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
HL_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
HL_INLINE F load(const float* p, int n) {
  float t[16] = {};
  memcpy(t, p, sizeof(float) * static_cast<size_t>(n));
  return load(t);
}
HL_INLINE void store(float* p, F a) {
  _mm256_storeu_ps(p, a.lo);
  _mm256_storeu_ps(p + 8, a.hi);
}
HL_INLINE void store(float* p, F a, int n) {
  float t[16];
  store(t, a);
  memcpy(p, t, sizeof(float) * static_cast<size_t>(n));
}
#define HL_2(op, a, b) {op((a).lo, (b).lo), op((a).hi, (b).hi)}
HL_INLINE F add(F a, F b) { return HL_2(_mm256_add_ps, a, b); }
HL_INLINE F sub(F a, F b) { return HL_2(_mm256_sub_ps, a, b); }
HL_INLINE F mul(F a, F b) { return HL_2(_mm256_mul_ps, a, b); }
HL_INLINE F div(F a, F b) { return HL_2(_mm256_div_ps, a, b); }
HL_INLINE F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)}; }
HL_INLINE F max(F a, F b) { return HL_2(_mm256_max_ps, a, b); }
HL_INLINE F min(F a, F b) { return HL_2(_mm256_min_ps, a, b); }
HL_INLINE F floor(F a) { return {_mm256_floor_ps(a.lo), _mm256_floor_ps(a.hi)}; }
HL_INLINE I to_int(F a) { return {_mm256_cvtps_epi32(a.lo), _mm256_cvtps_epi32(a.hi)}; }
HL_INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
HL_INLINE I bits(F a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
HL_INLINE F from_bits(I a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
HL_INLINE I set1i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
HL_INLINE I addi(I a, I b) { return HL_2(_mm256_add_epi32, a, b); }
HL_INLINE I andi(I a, I b) { return HL_2(_mm256_and_si256, a, b); }
HL_INLINE I ori(I a, I b) { return HL_2(_mm256_or_si256, a, b); }
HL_INLINE I maxi(I a, I b) { return HL_2(_mm256_max_epi32, a, b); }
#undef HL_2
HL_INLINE I nan_lanes(F a) {
  return {_mm256_castps_si256(_mm256_cmp_ps(a.lo, a.lo, _CMP_UNORD_Q)),
          _mm256_castps_si256(_mm256_cmp_ps(a.hi, a.hi, _CMP_UNORD_Q))};
}
template <int N>
HL_INLINE I shl(I a) {
  return {_mm256_slli_epi32(a.lo, N), _mm256_slli_epi32(a.hi, N)};
}
template <int N>
HL_INLINE I shr(I a) {
  return {_mm256_srai_epi32(a.lo, N), _mm256_srai_epi32(a.hi, N)};
}
HL_INLINE __m128i load8(const void* p) { return _mm_loadl_epi64(static_cast<const __m128i*>(p)); }
HL_INLINE __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
HL_INLINE I load_i8(const int8_t* p) { return {_mm256_cvtepi8_epi32(load8(p)), _mm256_cvtepi8_epi32(load8(p + 8))}; }
HL_INLINE I load_u8(const uint8_t* p) { return {_mm256_cvtepu8_epi32(load8(p)), _mm256_cvtepu8_epi32(load8(p + 8))}; }
HL_INLINE void store_i8(void* p, I a) {
  int32_t t[16];
  int8_t b[16];
  memcpy(t, &a, sizeof t);
  for (int i = 0; i < 16; i++) b[i] = static_cast<int8_t>(t[i]);
  memcpy(p, b, sizeof b);
}
HL_INLINE F load_f16(const uint16_t* p) { return {_mm256_cvtph_ps(load16(p)), _mm256_cvtph_ps(load16(p + 8))}; }
HL_INLINE F load_bf16(const uint16_t* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p)), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load16(p + 8)), 16))};
}
HL_INLINE void store_u16(uint16_t* p, I a) {
  int32_t t[16];
  memcpy(t, &a, sizeof t);
  for (int i = 0; i < 16; i++) p[i] = static_cast<uint16_t>(t[i]);
}

#elif defined(__ARM_FEATURE_DOTPROD)

struct F {
  float32x4_t v[4];
};
struct I {
  int32x4_t v[4];
};

#define HL_EACH(T, expression)                       \
  T r;                                               \
  for (int i = 0; i < 4; i++) r.v[i] = (expression); \
  return r
HL_INLINE F set1(float x) { HL_EACH(F, vdupq_n_f32(x)); }
HL_INLINE F load(const float* p) { HL_EACH(F, vld1q_f32(p + 4 * i)); }
HL_INLINE void store(float* p, F a) {
  for (int i = 0; i < 4; i++) vst1q_f32(p + 4 * i, a.v[i]);
}
HL_INLINE F load(const float* p, int n) {
  float t[16] = {};
  memcpy(t, p, sizeof(float) * static_cast<size_t>(n));
  return load(t);
}
HL_INLINE void store(float* p, F a, int n) {
  float t[16];
  store(t, a);
  memcpy(p, t, sizeof(float) * static_cast<size_t>(n));
}
HL_INLINE F add(F a, F b) { HL_EACH(F, vaddq_f32(a.v[i], b.v[i])); }
HL_INLINE F sub(F a, F b) { HL_EACH(F, vsubq_f32(a.v[i], b.v[i])); }
HL_INLINE F mul(F a, F b) { HL_EACH(F, vmulq_f32(a.v[i], b.v[i])); }
HL_INLINE F div(F a, F b) { HL_EACH(F, vdivq_f32(a.v[i], b.v[i])); }
HL_INLINE F fma(F a, F b, F c) { HL_EACH(F, vfmaq_f32(c.v[i], a.v[i], b.v[i])); }
HL_INLINE F max(F a, F b) { HL_EACH(F, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
HL_INLINE F min(F a, F b) { HL_EACH(F, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i])); }
HL_INLINE F floor(F a) { HL_EACH(F, vrndmq_f32(a.v[i])); }
HL_INLINE I to_int(F a) { HL_EACH(I, vcvtnq_s32_f32(a.v[i])); }
HL_INLINE F to_float(I a) { HL_EACH(F, vcvtq_f32_s32(a.v[i])); }
HL_INLINE I bits(F a) { HL_EACH(I, vreinterpretq_s32_f32(a.v[i])); }
HL_INLINE F from_bits(I a) { HL_EACH(F, vreinterpretq_f32_s32(a.v[i])); }
HL_INLINE I set1i(int32_t x) { HL_EACH(I, vdupq_n_s32(x)); }
HL_INLINE I addi(I a, I b) { HL_EACH(I, vaddq_s32(a.v[i], b.v[i])); }
HL_INLINE I andi(I a, I b) { HL_EACH(I, vandq_s32(a.v[i], b.v[i])); }
HL_INLINE I ori(I a, I b) { HL_EACH(I, vorrq_s32(a.v[i], b.v[i])); }
HL_INLINE I maxi(I a, I b) { HL_EACH(I, vmaxq_s32(a.v[i], b.v[i])); }
HL_INLINE I nan_lanes(F a) { HL_EACH(I, vreinterpretq_s32_u32(vmvnq_u32(vceqq_f32(a.v[i], a.v[i])))); }
template <int N>
HL_INLINE I shl(I a) {
  HL_EACH(I, vshlq_n_s32(a.v[i], N));
}
template <int N>
HL_INLINE I shr(I a) {
  HL_EACH(I, vshrq_n_s32(a.v[i], N));
}
#undef HL_EACH
HL_INLINE I load_i8(const int8_t* p) {
  const int8x16_t b = vld1q_s8(p);
  const int16x8_t lo = vmovl_s8(vget_low_s8(b)), hi = vmovl_s8(vget_high_s8(b));
  return {{vmovl_s16(vget_low_s16(lo)), vmovl_s16(vget_high_s16(lo)), vmovl_s16(vget_low_s16(hi)),
           vmovl_s16(vget_high_s16(hi))}};
}
HL_INLINE I load_u8(const uint8_t* p) {
  const uint8x16_t b = vld1q_u8(p);
  const int16x8_t lo = vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(b))),
                  hi = vreinterpretq_s16_u16(vmovl_u8(vget_high_u8(b)));
  return {{vmovl_s16(vget_low_s16(lo)), vmovl_s16(vget_high_s16(lo)), vmovl_s16(vget_low_s16(hi)),
           vmovl_s16(vget_high_s16(hi))}};
}
HL_INLINE void store_u16(uint16_t* p, I a) {
  for (int i = 0; i < 4; i++) vst1_u16(p + 4 * i, vmovn_u32(vreinterpretq_u32_s32(a.v[i])));
}
HL_INLINE void store_i8(void* p, I a) {
  uint16_t t[16];
  store_u16(t, a);
  vst1_u8(static_cast<uint8_t*>(p), vmovn_u16(vld1q_u16(t)));
  vst1_u8(static_cast<uint8_t*>(p) + 8, vmovn_u16(vld1q_u16(t + 8)));
}
HL_INLINE F load_f16(const uint16_t* p) {
  F r;
  for (int i = 0; i < 4; i++) r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
  return r;
}
HL_INLINE F load_bf16(const uint16_t* p) {
  F r;
  for (int i = 0; i < 4; i++) r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
  return r;
}

#else  // plain loops, which compilers turn into the vectors they know

struct F {
  float v[16];
};
struct I {
  int32_t v[16];
};

#define HL_EACH(T, expression)                        \
  T r;                                                \
  for (int i = 0; i < 16; i++) r.v[i] = (expression); \
  return r
HL_INLINE F set1(float x) { HL_EACH(F, x); }
HL_INLINE F load(const float* p) { HL_EACH(F, p[i]); }
HL_INLINE F load(const float* p, int n) { HL_EACH(F, i < n ? p[i] : 0.0f); }
HL_INLINE void store(float* p, F a) { memcpy(p, a.v, sizeof a.v); }
HL_INLINE void store(float* p, F a, int n) { memcpy(p, a.v, sizeof(float) * static_cast<size_t>(n)); }
HL_INLINE F add(F a, F b) { HL_EACH(F, a.v[i] + b.v[i]); }
HL_INLINE F sub(F a, F b) { HL_EACH(F, a.v[i] - b.v[i]); }
HL_INLINE F mul(F a, F b) { HL_EACH(F, a.v[i] * b.v[i]); }
HL_INLINE F div(F a, F b) { HL_EACH(F, a.v[i] / b.v[i]); }
HL_INLINE F fma(F a, F b, F c) { HL_EACH(F, fmaf(a.v[i], b.v[i], c.v[i])); }
HL_INLINE F max(F a, F b) { HL_EACH(F, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
HL_INLINE F min(F a, F b) { HL_EACH(F, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
HL_INLINE F floor(F a) { HL_EACH(F, floorf(a.v[i])); }
HL_INLINE I to_int(F a) { HL_EACH(I, static_cast<int32_t>(rintf(a.v[i]))); }
HL_INLINE F to_float(I a) { HL_EACH(F, static_cast<float>(a.v[i])); }
HL_INLINE I bits(F a) {
  I r;
  memcpy(&r, &a, sizeof r);
  return r;
}
HL_INLINE F from_bits(I a) {
  F r;
  memcpy(&r, &a, sizeof r);
  return r;
}
HL_INLINE I set1i(int32_t x) { HL_EACH(I, x); }
HL_INLINE I addi(I a, I b) { HL_EACH(I, a.v[i] + b.v[i]); }
HL_INLINE I andi(I a, I b) { HL_EACH(I, a.v[i] & b.v[i]); }
HL_INLINE I ori(I a, I b) { HL_EACH(I, a.v[i] | b.v[i]); }
HL_INLINE I maxi(I a, I b) { HL_EACH(I, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
HL_INLINE I nan_lanes(F a) { HL_EACH(I, a.v[i] != a.v[i] ? -1 : 0); }
template <int N>
HL_INLINE I shl(I a) {
  HL_EACH(I, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << N));
}
template <int N>
HL_INLINE I shr(I a) {
  HL_EACH(I, a.v[i] >> N);
}
HL_INLINE I load_i8(const int8_t* p) { HL_EACH(I, p[i]); }
HL_INLINE I load_u8(const uint8_t* p) { HL_EACH(I, p[i]); }
HL_INLINE void store_i8(void* p, I a) {
  int8_t b[16];
  for (int i = 0; i < 16; i++) b[i] = static_cast<int8_t>(a.v[i]);
  memcpy(p, b, sizeof b);
}
HL_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, magnitude = h & 0x7FFFu;
  // Shifted into place the exponent is 112 too small; a multiplication by 2^112 sets it right, subnormals included.
  const uint32_t shifted = magnitude << 13, scale_bits = (112u + 127u) << 23;
  float value, scale;
  memcpy(&value, &shifted, 4);
  memcpy(&scale, &scale_bits, 4);
  value *= scale;
  uint32_t out;
  memcpy(&out, &value, 4);
  if (magnitude >= 0x7C00u) out = 0x7F800000u | (magnitude & 0x3FFu) << 13;
  out |= sign;
  memcpy(&value, &out, 4);
  return value;
}
HL_INLINE F load_f16(const uint16_t* p) { HL_EACH(F, half_to_float(p[i])); }
HL_INLINE F load_bf16(const uint16_t* p) {
  I r;
  for (int i = 0; i < 16; i++) r.v[i] = static_cast<int32_t>(static_cast<uint32_t>(p[i]) << 16);
  return from_bits(r);
}
HL_INLINE void store_u16(uint16_t* p, I a) {
  for (int i = 0; i < 16; i++) p[i] = static_cast<uint16_t>(a.v[i]);
}
#undef HL_EACH

#endif

// ---- what follows is built from the above ---------------------------------------------------------------------------

HL_INLINE F zero() { return set1(0.0f); }

// To bfloat16 in the low half of each lane, nearest even; NaN stays NaN.
HL_INLINE I to_bf16(F a) {
  const I u = bits(a);
  const I rounded = shr<16>(addi(addi(u, andi(shr<16>(u), set1i(1))), set1i(0x7FFF)));
  return ori(rounded, andi(nan_lanes(a), set1i(0x7FC0)));
}

// Over the lanes. Sums are always added in the same order: the upper half to the lower, again and again.
#if defined(__AVX2__)

#if defined(__AVX512F__)
HL_INLINE __m256 lower(F a) { return _mm512_castps512_ps256(a.v); }
HL_INLINE __m256 upper(F a) { return _mm512_extractf32x8_ps(a.v, 1); }
HL_INLINE __m256i lower(I a) { return _mm512_castsi512_si256(a.v); }
HL_INLINE __m256i upper(I a) { return _mm512_extracti64x4_epi64(a.v, 1); }
#else
HL_INLINE __m256 lower(F a) { return a.lo; }
HL_INLINE __m256 upper(F a) { return a.hi; }
HL_INLINE __m256i lower(I a) { return a.lo; }
HL_INLINE __m256i upper(I a) { return a.hi; }
#endif

HL_INLINE float sum(F a) {
  const __m256 eight = _mm256_add_ps(lower(a), upper(a));
  __m128 t = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  t = _mm_add_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_add_ss(t, _mm_movehdup_ps(t)));
}
HL_INLINE float hmax(F a) {
  const __m256 eight = _mm256_max_ps(lower(a), upper(a));
  __m128 t = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  t = _mm_max_ps(t, _mm_movehl_ps(t, t));
  return _mm_cvtss_f32(_mm_max_ss(t, _mm_movehdup_ps(t)));
}
HL_INLINE int32_t sum(I a) {
  const __m256i eight = _mm256_add_epi32(lower(a), upper(a));
  __m128i t = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  t = _mm_add_epi32(t, _mm_shuffle_epi32(t, 0x4E));
  return _mm_cvtsi128_si32(_mm_add_epi32(t, _mm_shuffle_epi32(t, 0xB1)));
}
HL_INLINE int32_t hmax(I a) {
  const __m256i eight = _mm256_max_epi32(lower(a), upper(a));
  __m128i t = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  t = _mm_max_epi32(t, _mm_shuffle_epi32(t, 0x4E));
  return _mm_cvtsi128_si32(_mm_max_epi32(t, _mm_shuffle_epi32(t, 0xB1)));
}

#else

HL_INLINE float sum(F a) {
  float t[16];
  store(t, a);
  for (int width = 8; width > 0; width /= 2)
    for (int i = 0; i < width; i++) t[i] += t[i + width];
  return t[0];
}
HL_INLINE float hmax(F a) {
  float t[16];
  store(t, a);
  float m = t[0];
  for (int i = 1; i < 16; i++) m = t[i] > m ? t[i] : m;
  return m;
}
HL_INLINE int32_t sum(I a) {
  int32_t t[16], s = 0;
  memcpy(t, &a, sizeof t);
  for (int i = 0; i < 16; i++) s += t[i];
  return s;
}
HL_INLINE int32_t hmax(I a) {
  int32_t t[16];
  memcpy(t, &a, sizeof t);
  int32_t m = t[0];
  for (int i = 1; i < 16; i++) m = t[i] > m ? t[i] : m;
  return m;
}

#endif

// e^x to about 1 unit in the last place (Cephes' polynomial). Clamped: 1.2e-38 below -87.3, 2.4e38 above 88.3. NaN
// gives NaN.
HL_INLINE F exp(F x) {
  const F high = set1(88.3762626647949f), low = set1(-87.3365478515625f);
  const F c = max(low, min(high, x));  // x last: NaN passes
  const F n = floor(fma(c, set1(1.44269504088896341f), set1(0.5f)));
  F r = fma(n, set1(-0.693359375f), c);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), set1(1.0f));
  return mul(p, from_bits(shl<23>(addi(to_int(n), set1i(127)))));
}

HL_INLINE F silu(F x) { return div(x, add(set1(1.0f), exp(sub(zero(), x)))); }

// 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))), written as x * sigmoid of twice the argument.
HL_INLINE F gelu(F x) {
  const F inner = mul(x, fma(mul(x, x), set1(0.044715f), set1(1.0f)));
  return div(x, add(set1(1.0f), exp(mul(inner, set1(-1.5957691216057308f)))));
}

}  // namespace hl::HL_VARIANT
