// AMX's tile registers. Part of linear_kernels.cpp in variants that have AMX.
#pragma once

#include "linear.h"
#include "simd.h"

namespace hl::HL_VARIANT {
namespace {

constexpr int tile_rows = act_rows;  // of inputs, and of a tile register

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

}  // namespace
}  // namespace hl::HL_VARIANT
