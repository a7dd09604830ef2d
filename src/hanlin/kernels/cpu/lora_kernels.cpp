// Low-rank additions, compiled once a variant. Every number is one sum in one fixed order, however many rows, inner
// dimensions or outputs are computed beside it.
#include "linear.h"
#include "simd.h"

namespace hl::HL_VARIANT {

// Also called by linear_kernels.cpp.
void add_low_rank(const LowRows& extra, int64_t row, int64_t tile, float* y);
void low_products(const hl_adapter& adapter, int32_t op, const LowPiece& x, Range inner, float* low, int64_t stride);

namespace {

#if defined(__AVX512F__)
constexpr int most_rows = 4, most_inner = 8;
#else
constexpr int most_rows = 1, most_inner = 4;
#endif

HL_INLINE F take(const float* p) { return load(p); }
HL_INLINE F take(const uint16_t* p) { return load_bf16(p); }
HL_INLINE F take(const float* p, int n) { return load(p, n); }
HL_INLINE F take(const uint16_t* p, int n) {
  uint16_t t[lanes] = {};
  memcpy(t, p, sizeof(uint16_t) * static_cast<size_t>(n));
  return load_bf16(t);
}

// low[r][k] = x[r] . down[k] for R rows and K inner dimensions.
template <int R, int K, class T>
HL_INLINE void dots(const LowPiece& x, int64_t row, const T* down, float* low, int64_t stride) {
  F sums[R][K];
  for (int r = 0; r < R; r++)
    for (int k = 0; k < K; k++) sums[r][k] = zero();
  const float* from = x.x + row * x.ldx;
  int64_t i = 0;
  for (; i + lanes <= x.in; i += lanes)
    for (int k = 0; k < K; k++) {
      const F d = take(down + k * x.in + i);
      for (int r = 0; r < R; r++) sums[r][k] = fma(d, load(from + r * x.ldx + i), sums[r][k]);
    }
  if (i < x.in) {
    const int rest = static_cast<int>(x.in - i);
    for (int k = 0; k < K; k++) {
      const F d = take(down + k * x.in + i, rest);
      for (int r = 0; r < R; r++) sums[r][k] = fma(d, load(from + r * x.ldx + i, rest), sums[r][k]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int k = 0; k < K; k++) low[(row + r) * stride + k] = sum(sums[r][k]);
}

template <int R, class T>
HL_INLINE void all_dots(const LowPiece& x, int64_t row, const T* down, Range inner, float* low, int64_t stride) {
  constexpr int K = R > 1 ? 4 : most_inner;
  int64_t k = inner.begin;
  for (; k + K <= inner.end; k += K) dots<R, K>(x, row, down + k * x.in, low + k, stride);
  for (; k < inner.end; k++) dots<R, 1>(x, row, down + k * x.in, low + k, stride);
}

template <class T>
void products(const LowPiece& x, const T* down, Range inner, float* low, int64_t stride) {
  int64_t row = 0;
  for (; row + most_rows <= x.rows; row += most_rows) all_dots<most_rows>(x, row, down, inner, low, stride);
  for (; row < x.rows; row++) all_dots<1>(x, row, down, inner, low, stride);
}

template <class T>
HL_INLINE void add_groups(const hl_low_rank& part, const float* low, int64_t tile, float* y) {
  for (int64_t h = 0; h < 2; h++) {
    const int64_t group = 2 * tile + h;
    const int32_t first = part.first[group];
    if (first < 0) continue;
    const T* up = static_cast<const T*>(part.up) + group * part.taken * lanes;
    F delta = zero();
    for (int32_t k = 0; k < part.taken; k++) delta = fma(take(up + k * lanes), set1(low[first + k]), delta);
    store(y + h * lanes, add(load(y + h * lanes), delta));
  }
}

}  // namespace

void low_products(const hl_adapter& adapter, int32_t op, const LowPiece& x, Range inner, float* low, int64_t stride) {
  const void* down = adapter.ops[op].down;
  if (adapter.bf16 != 0) return products(x, static_cast<const uint16_t*>(down), inner, low, stride);
  products(x, static_cast<const float*>(down), inner, low, stride);
}

void add_low_rank(const LowRows& extra, int64_t row, int64_t tile, float* y) {
  const hl_adapter* adapter = extra.of[row];
  if (adapter == nullptr || adapter->ops[extra.op].rank == 0) return;
  const hl_low_rank& part = adapter->ops[extra.op];
  const float* low = extra.low + row * extra.stride;
  if (adapter->bf16 != 0) return add_groups<uint16_t>(part, low, tile, y);
  add_groups<float>(part, low, tile, y);
}

}  // namespace hl::HL_VARIANT
