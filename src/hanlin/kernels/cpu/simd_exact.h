// Sums of whole numbers that are exact in 32 bits, or in 48.
#pragma once

#include "simd.h"

namespace hl::HL_VARIANT {

// In every lane: sum + a * b, and sum + the products of the lower and of the upper int16 of a and b.
#if defined(__AVX512F__)

HL_INLINE I mul_add(I sum, I a, I b) { return addi(sum, {_mm512_mullo_epi32(a.v, b.v)}); }
#if defined(__AVX512VNNI__)
HL_INLINE I pair_dot(I sum, I a, I b) { return {_mm512_dpwssd_epi32(sum.v, a.v, b.v)}; }
#else
HL_INLINE I pair_dot(I sum, I a, I b) { return addi(sum, {_mm512_madd_epi16(a.v, b.v)}); }
#endif

#elif defined(__AVX2__)

HL_INLINE I mul_add(I sum, I a, I b) {
  return addi(sum, {_mm256_mullo_epi32(a.lo, b.lo), _mm256_mullo_epi32(a.hi, b.hi)});
}
HL_INLINE I pair_dot(I sum, I a, I b) {
  return addi(sum, {_mm256_madd_epi16(a.lo, b.lo), _mm256_madd_epi16(a.hi, b.hi)});
}

#elif defined(__ARM_FEATURE_DOTPROD)

HL_INLINE I mul_add(I sum, I a, I b) {
  for (int i = 0; i < 4; i++) sum.v[i] = vmlaq_s32(sum.v[i], a.v[i], b.v[i]);
  return sum;
}
HL_INLINE I pair_dot(I sum, I a, I b) {
  return mul_add(mul_add(sum, shr<16>(shl<16>(a)), shr<16>(shl<16>(b))), shr<16>(a), shr<16>(b));
}

#else

HL_INLINE I mul_add(I sum, I a, I b) {
  for (int i = 0; i < 16; i++) sum.v[i] += a.v[i] * b.v[i];
  return sum;
}
HL_INLINE I pair_dot(I sum, I a, I b) {
  for (int i = 0; i < 16; i++)
    sum.v[i] += static_cast<int16_t>(a.v[i]) * static_cast<int16_t>(b.v[i]) + (a.v[i] >> 16) * (b.v[i] >> 16);
  return sum;
}

#endif

// 65536 * high + low, with low in 0..65535.
struct Exact {
  I high, low;
};

// total + 65536 * a + 256 * b + c, where c < 2^31 - 2^16.
HL_INLINE Exact add(Exact total, I a, I b, I c) {
  const I half = set1i(0xFFFF), first = addi(total.low, c);
  const I low = addi(andi(first, half), shl<8>(andi(b, set1i(255))));
  return {addi(addi(addi(total.high, a), addi(shr<8>(b), shr<16>(first))), shr<16>(low)), andi(low, half)};
}
HL_INLINE F to_float(Exact total) { return fma(to_float(total.high), set1(65536.0f), to_float(total.low)); }

}  // namespace hl::HL_VARIANT
