// float16 and bfloat16 in plain C++, for packing. Kernels have load_f16 and load_bf16 in simd.h.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace hl {

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}

inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}

inline float bf16_to_float(uint16_t b) { return bits_to_float(static_cast<uint32_t>(b) << 16); }

// To nearest even; NaN stays NaN.
inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_to_bits(f);
  if (f != f) return static_cast<uint16_t>(u >> 16 | 0x40);
  return static_cast<uint16_t>((u + 0x7FFF + (u >> 16 & 1)) >> 16);
}

inline float half_to_float(uint16_t h) {
  const uint32_t magnitude = h & 0x7FFFu;
  // Shifted into place the exponent is 112 too small; multiplying by 2^112 sets it right, subnormals included.
  uint32_t out = float_to_bits(bits_to_float(magnitude << 13) * bits_to_float((112u + 127u) << 23));
  if (magnitude >= 0x7C00u) out = 0x7F800000u | (magnitude & 0x3FFu) << 13;
  return bits_to_float(out | static_cast<uint32_t>(h & 0x8000u) << 16);
}

// To nearest even; too large becomes infinity, NaN stays NaN.
inline uint16_t float_to_half(float f) {
  const uint32_t u = float_to_bits(f);
  const uint16_t sign = static_cast<uint16_t>(u >> 16 & 0x8000u);
  const float magnitude = bits_to_float(u & 0x7FFFFFFFu);
  if (magnitude != magnitude) return static_cast<uint16_t>(sign | 0x7E00u);
  if (magnitude >= 65520.0f) return static_cast<uint16_t>(sign | 0x7C00u);
  if (magnitude < bits_to_float(113u << 23))  // below 2^-14: a whole number of 2^-24
    return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyintf(magnitude * 16777216.0f)));
  const uint32_t m = u & 0x7FFFFFFFu;
  return static_cast<uint16_t>(sign | static_cast<uint16_t>((m - (112u << 23) + 0xFFFu + (m >> 13 & 1)) >> 13));
}

}  // namespace hl
