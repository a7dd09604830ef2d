// The key/value pool and attention over it, compiled once a variant. See hl_kv and hl_attend for layouts and arithmetic.
//
// Both products of attention have one form: 64 bytes that hold one number (or a pair of bfloat16) for each of 16 sums, times a 4-byte unit
// that all lanes share. For scores the lanes are keys, the steps head dimensions and the units q; for outputs the lanes are head
// dimensions, the steps keys and the units the softmax's weights. Every sum is one chain over the steps in order, however many rows and
// lanes are computed beside it: that is what makes a row's bits independent of its company.
#include "ops.h"
#include "simd.h"

namespace hl::HL_VARIANT {
namespace {

#if defined(__AVX512F__)
constexpr int group_rows = 6, wide = 4;  // 24 sums in 32 registers
#else
constexpr int group_rows = 4, wide = 1;
#endif

constexpr int span_groups = HL_SPAN / HL_SLOTS;

#if defined(__GNUC__) && !defined(__clang__)
#define HL_UNROLL _Pragma("GCC unroll 16")
#else
#define HL_UNROLL _Pragma("unroll")
#endif

HL_INLINE I load_bits(const void* p) { return bits(load(static_cast<const float*>(p))); }
HL_INLINE I unit(const uint8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return set1i(x);
}

// One float a unit.
struct Floats {
  static constexpr int per_unit = 1;
  HL_INLINE F madd(F sum, I vector, I unit) { return fma(from_bits(vector), from_bits(unit), sum); }
  // What a span's weights become when they are stored.
  HL_INLINE F put(uint8_t* to, int64_t index, F a) {
    store(reinterpret_cast<float*>(to) + index, a);
    return a;
  }
  // Two rows of floats, `apart` bytes from each other.
  HL_INLINE void put_both(uint8_t* to, int64_t apart, F low, F high) {
    store(reinterpret_cast<float*>(to), low);
    store(reinterpret_cast<float*>(to + apart), high);
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
  // One row of pairs.
  HL_INLINE void put_both(uint8_t* to, int64_t, F low, F high) {
    alignas(64) static constexpr uint16_t zip[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                     8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high.v, low.v);
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(_mm512_load_si512(zip), both));
  }
};
using Narrow = Pairs;
HL_INLINE float top_lane(F a) { return _mm512_reduce_max_ps(a.v); }
#else
using Narrow = Floats;
HL_INLINE float top_lane(F a) { return hmax(a); }
#endif

// ---- float16, for the parameters of codes -----------------------------------------------------------------------------------------

// To nearest even; too large becomes the largest.
uint16_t to_half(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t sign = u >> 16 & 0x8000u, m = u & 0x7FFFFFFFu;
  if (m > 0x7F800000u) return 0x7E00u;
  if (m >= 0x477FF000u) return static_cast<uint16_t>(sign | 0x7BFFu);
  if (m < 113u << 23) {  // below 2^-14: a whole number of 2^-24, found by letting an addition round it
    const float shifted = fabsf(x) * 16777216.0f + 8388608.0f;
    memcpy(&u, &shifted, 4);
    return static_cast<uint16_t>(sign | (u & 0x7FFFFFu));
  }
  return static_cast<uint16_t>(sign | ((m - (112u << 23) + 0xFFFu + (m >> 13 & 1)) >> 13));
}

float from_half(uint16_t h) {
  const uint16_t t[lanes] = {h};
  float f[lanes];
  store(f, load_f16(t));
  return f[0];
}

// ---- reading the pool ---------------------------------------------------------------------------------------------------------------

// Codes to numbers for a vector of pairs: what scales and minima the first and the second of each pair have.
struct Codes {
  F low_scale, low_min, high_scale, high_min;
};

// `count` vectors of pairs (32 numbers each) at `from`, one after the other, as D wants them at `to`, `step` bytes a vector; where a vector
// becomes two rows of floats these are `apart` bytes from each other.
template <int Kind, class D>
HL_INLINE void widen_pairs(const uint8_t* from, int64_t count, uint8_t* to, int64_t step, int64_t apart, const Codes& codes) {
  for (int64_t j = 0; j < count; j++, to += step) {
    if (Kind == HL_KV_BF16) {
      const I pairs = load_bits(from + 64 * j);
      D::put_both(to, apart, from_bits(shl<16>(pairs)), from_bits(andi(pairs, set1i(static_cast<int32_t>(0xFFFF0000u)))));
      continue;
    }
    I low, high;
    if (Kind == HL_KV_INT8) {
      const I words = bits(load_bf16(reinterpret_cast<const uint16_t*>(from + 32 * j)));  // in the upper halves
      low = andi(shr<16>(words), set1i(255));
      high = andi(shr<24>(words), set1i(255));
    } else {
      const I words = bits(load_bf16(reinterpret_cast<const uint16_t*>(from + 32 * (j / 2))));
      low = andi(j % 2 ? shr<20>(words) : shr<16>(words), set1i(15));
      high = andi(j % 2 ? shr<28>(words) : shr<24>(words), set1i(15));
    }
    D::put_both(to, apart, fma(to_float(low), codes.low_scale, codes.low_min), fma(to_float(high), codes.high_scale, codes.high_min));
  }
}

// Bytes of the keys, or of the values, of HL_SLOTS slots in D's form.
template <class D>
HL_INLINE int64_t part_bytes(int32_t head_size) {
  return padded_head(head_size) * HL_SLOTS * 4 / D::per_unit;
}

// The keys and values of HL_SLOTS slots in D's form.
template <int Kind, class D>
void widen_slots(const uint8_t* from, int32_t head_size, uint8_t* keys, uint8_t* values) {
  const int64_t padded = padded_head(head_size), part = kv_part_bytes(Kind, head_size), row = padded * 4;
  const uint16_t* params = reinterpret_cast<const uint16_t*>(from + 2 * part);
  Codes codes = {zero(), zero(), zero(), zero()};
  float scales[HL_SLOTS], minima[HL_SLOTS];
  if (kv_has_params(Kind)) {
    codes.low_scale = codes.high_scale = load_f16(params);
    codes.low_min = codes.high_min = load_f16(params + HL_SLOTS);
    store(scales, load_f16(params + 2 * HL_SLOTS));
    store(minima, load_f16(params + 3 * HL_SLOTS));
  }
  widen_pairs<Kind, D>(from, padded / 2, keys, 128 / D::per_unit, 64, codes);
  for (int pair = 0; pair < HL_SLOTS / 2; pair++) {
    if (kv_has_params(Kind))
      codes = {set1(scales[2 * pair]), set1(minima[2 * pair]), set1(scales[2 * pair + 1]), set1(minima[2 * pair + 1])};
    widen_pairs<Kind, D>(from + part + pair * part / (HL_SLOTS / 2), padded / 16, values + pair * row * 2 / D::per_unit, 64, row, codes);
  }
}

template <class D>
void widen_slots(const hl_kv& kv, const uint8_t* from, uint8_t* keys, uint8_t* values) {
  if (kv.kind == HL_KV_BF16) return widen_slots<HL_KV_BF16, D>(from, kv.head_size, keys, values);
  if (kv.kind == HL_KV_INT8) return widen_slots<HL_KV_INT8, D>(from, kv.head_size, keys, values);
  return widen_slots<HL_KV_INT4, D>(from, kv.head_size, keys, values);
}

// ---- writing and reading single slots ---------------------------------------------------------------------------------------------

// Puts n elements of a row where HL_KV_BF16's order has them: keys [d/2][slot][2], values [slot/2][d][2].
template <class Element>
HL_INLINE void scatter(const Element* row, int64_t n, bool keys, int64_t slot, int64_t padded, Element* part) {
  if (keys) {
    Element* to = part + 2 * slot;
    for (int64_t d = 0; d < n; d += 2) memcpy(to + d * HL_SLOTS, row + d, 2 * sizeof(Element));
  } else {
    Element* to = part + slot / 2 * padded * 2 + slot % 2;
    for (int64_t d = 0; d < n; d++) to[2 * d] = row[d];
  }
}

// Scale and minimum of a row, and its codes.
void encode(const float* x, int32_t n, float steps, uint8_t (&codes)[most_head], uint16_t* scale_to, uint16_t* min_to) {
  const auto take = [&](int32_t i) { return n - i < lanes ? load(x + i, n - i) : load(x + i); };
  const F inside = set1(x[0]);
  F lows = inside, highs = inside;
  I exponents = set1i(0);
  for (int32_t i = 0; i < n; i += lanes) {
    F v = take(i);
    if (n - i < lanes) {  // lanes beyond the row must not count
      float t[lanes];
      store(t, inside);
      memcpy(t, x + i, sizeof(float) * static_cast<size_t>(n - i));
      v = load(t);
    }
    lows = min(v, lows);
    highs = max(v, highs);
    exponents = maxi(exponents, andi(bits(v), set1i(0x7F800000)));
  }
  memset(codes, 0, sizeof codes);
  if (hmax(exponents) == 0x7F800000) {  // NaN or infinity
    *scale_to = *min_to = 0x7E00u;
    return;
  }
  float low = -hmax(sub(zero(), lows));
  const float high = hmax(highs);
  *min_to = to_half(low);
  low = from_half(*min_to);
  const float ideal = (high - low) / steps;
  uint16_t half = to_half(ideal > 0 ? ideal : 0.0f);
  if (from_half(half) < ideal && half < 0x7BFFu) half++;
  *scale_to = half;
  const float scale = from_half(half);
  if (scale == 0) return;
  const F inverse = set1(1.0f / scale), minimum = set1(low);
  for (int32_t i = 0; i < n; i += lanes) {
    F q = floor(fma(sub(take(i), minimum), inverse, set1(0.5f)));
    q = max(zero(), min(set1(steps), q));
    store_i8(codes + i, to_int(q));  // up to 15 codes more than there are dimensions, which nobody looks at
  }
}

// Codes d and d + apart in the nibbles of one byte; returns how many bytes.
template <int apart>
HL_INLINE int64_t join(const uint8_t* codes, int64_t n, uint8_t* both) {
  int64_t bytes = 0;
  for (int64_t d = 0; d < n; d += 2 * apart, bytes += apart)
    for (int i = 0; i < apart; i++) both[bytes + i] = static_cast<uint8_t>(codes[d + i] | codes[d + apart + i] << 4);
  return bytes;
}

void write_row(const hl_kv& kv, uint8_t* part, uint16_t* params, bool keys, int64_t slot, const float* x) {
  const int64_t padded = padded_head(kv.head_size);
  const int32_t n = kv.head_size;
  if (kv.kind == HL_KV_F32) {
    float* to = reinterpret_cast<float*>(part);
    for (int32_t d = 0; d < n; d++) to[keys ? d * HL_SLOTS + slot : slot * padded + d] = x[d];
    return;
  }
  if (kv.kind == HL_KV_BF16) {
    uint16_t rounded[most_head];
    for (int32_t d = 0; d < n; d += lanes) store_u16(rounded + d, to_bf16(n - d < lanes ? load(x + d, n - d) : load(x + d)));
    return scatter(rounded, n, keys, slot, padded, reinterpret_cast<uint16_t*>(part));
  }
  uint8_t codes[most_head];
  encode(x, n, kv.kind == HL_KV_INT8 ? 255.0f : 15.0f, codes, params + slot, params + HL_SLOTS + slot);
  if (kv.kind == HL_KV_INT8) return scatter(codes, n, keys, slot, padded, part);
  // Two vectors of 32 elements share 32 bytes: for keys those of d and d + 2, for values those of d and d + 16.
  uint8_t both[most_head / 2];
  const int64_t bytes = keys ? join<2>(codes, n, both) : join<lanes>(codes, n, both);
  scatter(both, bytes, keys, slot, padded / 2, part);
}

// ---- the two products ---------------------------------------------------------------------------------------------------------------

// Scores of M rows against N groups of HL_SLOTS keys: `steps` units of q.
template <class D, int M, int N>
void score_block(const uint8_t* const* keys, int64_t steps, const uint8_t* q, int64_t q_stride, float* scores) {
  F sums[M][N];
  HL_UNROLL for (int m = 0; m < M; m++)
    HL_UNROLL for (int n = 0; n < N; n++) sums[m][n] = zero();
  for (int64_t step = 0; step < steps; step++) {
    I vector[N];
    HL_UNROLL for (int n = 0; n < N; n++) vector[n] = load_bits(keys[n] + 64 * step);
    HL_UNROLL for (int m = 0; m < M; m++) {
      const I a = unit(q + m * q_stride + 4 * step);
      HL_UNROLL for (int n = 0; n < N; n++) sums[m][n] = D::madd(sums[m][n], vector[n], a);
    }
  }
  HL_UNROLL for (int m = 0; m < M; m++)
    HL_UNROLL for (int n = 0; n < N; n++) store(scores + m * HL_SPAN + n * HL_SLOTS, sums[m][n]);
}

// Outputs of M rows, N vectors of dimensions from byte `column` of the rows of values on, over the first `count` keys of the span.
template <class D, int M, int N>
void value_block(const uint8_t* const* values, int64_t count, int64_t row, int64_t column, const uint8_t* weights, float* out,
                 int64_t padded) {
  constexpr int64_t units_of_group = HL_SLOTS / D::per_unit;
  F sums[M][N];
  HL_UNROLL for (int m = 0; m < M; m++)
    HL_UNROLL for (int n = 0; n < N; n++) sums[m][n] = zero();
  const int64_t units = (count + D::per_unit - 1) / D::per_unit, whole = count / D::per_unit;
  for (int64_t first = 0; first < units; first += units_of_group) {
    const uint8_t* from = values[first / units_of_group] + column;
    const int64_t end = first + units_of_group < units ? first + units_of_group : units;
    for (int64_t u = first; u < end; u++, from += row) {
      I vector[N];
      HL_UNROLL for (int n = 0; n < N; n++) {
        vector[n] = load_bits(from + 64 * n);
        // The other half of the last pair is nobody's, or not of this sequence's past: it may hold anything, NaN included.
        if (D::per_unit == 2 && u >= whole) vector[n] = andi(vector[n], set1i(0xFFFF));
      }
      HL_UNROLL for (int m = 0; m < M; m++) {
        const I a = unit(weights + m * HL_SPAN * 4 + 4 * u);
        HL_UNROLL for (int n = 0; n < N; n++) sums[m][n] = D::madd(sums[m][n], vector[n], a);
      }
    }
  }
  HL_UNROLL for (int m = 0; m < M; m++)
    HL_UNROLL for (int n = 0; n < N; n++) store(out + m * padded + n * lanes, sums[m][n]);
}

template <class D, int M = group_rows>
void score_rows(int rows, const uint8_t* const* keys, int64_t groups, int64_t steps, const uint8_t* q, int64_t q_stride, float* scores) {
  if constexpr (M > 1)
    if (rows < M) return score_rows<D, M - 1>(rows, keys, groups, steps, q, q_stride, scores);
  int64_t g = 0;
  for (; g + wide <= groups; g += wide) score_block<D, M, wide>(keys + g, steps, q, q_stride, scores + g * HL_SLOTS);
  for (; g < groups; g++) score_block<D, M, 1>(keys + g, steps, q, q_stride, scores + g * HL_SLOTS);
}

template <class D, int M = group_rows>
void value_rows(int rows, const uint8_t* const* values, int64_t count, const uint8_t* weights, float* out, int64_t padded) {
  if constexpr (M > 1)
    if (rows < M) return value_rows<D, M - 1>(rows, values, count, weights, out, padded);
  int64_t n = 0;
  for (; n + wide <= padded / lanes; n += wide)
    value_block<D, M, wide>(values, count, padded * 4, 64 * n, weights, out + n * lanes, padded);
  for (; n < padded / lanes; n++) value_block<D, M, 1>(values, count, padded * 4, 64 * n, weights, out + n * lanes, padded);
}

// ---- softmax ------------------------------------------------------------------------------------------------------------------------

// Weights exp(scale * (score - maximum)) of the first `count` scores, and zeros up to `filled`. The sum is that of the weights as they were
// rounded, so that rounding does not change what they add up to.
template <class D>
HL_INLINE void soften(float* scores, int count, int filled, float scale, uint8_t* weights, float* maximum, float* total) {
  const int whole = count / lanes * lanes, rest = count - whole;
  const F factor = set1(scale);
  F best = set1(-3.0e38f);
  for (int i = 0; i < whole; i += lanes) {
    const F s = mul(load(scores + i), factor);
    store(scores + i, s);
    best = max(s, best);  // NaN is passed over here, and comes back with its weight
  }
  if (rest > 0) {
    store(scores + whole, mul(load(scores + whole), factor));
    for (int i = count; i < whole + lanes; i++) scores[i] = -3.0e38f;
    best = max(load(scores + whole), best);
  }
  *maximum = top_lane(best);
  const F shift = set1(*maximum);
  F sums = zero();
  for (int i = 0; i < whole; i += lanes) sums = add(sums, D::put(weights, i, exp(sub(load(scores + i), shift))));
  if (rest > 0) {
    float t[lanes];
    store(t, exp(sub(load(scores + whole), shift)));
    sums = add(sums, D::put(weights, whole, load(t, rest)));
  }
  *total = sum(sums);
  const int written = rest > 0 ? whole + lanes : whole, unit_bytes = 4 / D::per_unit;
  if (filled > written) memset(weights + written * unit_bytes, 0, static_cast<size_t>((filled - written) * unit_bytes));
}

// A record, see partial_floats: [0, padded) the sum of weights times values, then the maximum, then the sum of weights.
void fold(float* record, const float* more, int64_t padded) {
  const float before = record[padded], here = more[padded], maximum = before > here ? before : here;
  const F shifts = exp(sub(load(record + padded, 1), set1(maximum))), other = exp(sub(load(more + padded, 1), set1(maximum)));
  float a[lanes], b[lanes];
  store(a, shifts);
  store(b, other);
  const F keep = set1(a[0]), take = set1(b[0]);
  for (int64_t i = 0; i < padded; i += lanes) store(record + i, fma(load(more + i), take, mul(load(record + i), keep)));
  record[padded] = maximum;
  record[padded + 1] = record[padded + 1] * a[0] + more[padded + 1] * b[0];
}

// Which query and head a row is, how many keys it sees, and where its output goes.
struct Row {
  Row(const Attention& what, int32_t sequence, int32_t kv_head, int64_t row) {
    const hl_step& step = *what.step;
    const int64_t share = what.heads / what.kv->heads, query = row / share;
    token = step.query_start[sequence] + query;
    head = kv_head * share + row % share;
    const int64_t queries = step.query_start[sequence + 1] - step.query_start[sequence];
    keys = visible(step, sequence, step.context[sequence] - queries + query);
  }
  int64_t token, head, keys;
};

void finish(const Attention& what, const Row& row, const float* record) {
  const int32_t n = what.kv->head_size;
  const F total = set1(record[padded_head(n) + 1]);
  float* to = what.out + row.token * what.ldo + row.head * n;
  for (int32_t i = 0; i < n; i += lanes) store(to + i, div(load(record + i), total), n - i < lanes ? n - i : lanes);
}

// ---- a task -------------------------------------------------------------------------------------------------------------------------

// What a task keeps beside it. Each part starts on a multiple of 64 bytes.
template <class D>
struct Desk {
  Desk(const hl_kv& kv, void* memory) {
    const int64_t padded = padded_head(kv.head_size);
    uint8_t* at = static_cast<uint8_t*>(memory);
    const auto take = [&](int64_t bytes) {
      uint8_t* here = at;
      at += bytes;
      return here;
    };
    q_stride = padded * 4 / D::per_unit;
    q = take(q_stride * attend_rows);
    scores = reinterpret_cast<float*>(take(int64_t{4} * HL_SPAN * group_rows));
    weights = take(int64_t{4} * HL_SPAN * group_rows);
    parts = reinterpret_cast<float*>(take(padded * 4 * group_rows));
    record = reinterpret_cast<float*>(take(partial_floats(kv.head_size) * 4));
    records = reinterpret_cast<float*>(take(partial_floats(kv.head_size) * 4 * attend_rows));
    wide_slots = take(own_form(kv) ? 0 : 2 * part_bytes<D>(kv.head_size) * span_groups);
    bytes = at - static_cast<uint8_t*>(memory);
  }

  // Whether the pool holds what D multiplies.
  static bool own_form(const hl_kv& kv) { return kv.kind == (D::per_unit == 1 ? HL_KV_F32 : HL_KV_BF16); }

  uint8_t *q, *weights, *wide_slots;
  float *scores, *parts, *record, *records;
  int64_t q_stride, bytes;
};

// q of a row as units, filled up with zeros.
template <class D>
void put_query(const float* q, int32_t n, uint8_t* to, int64_t bytes) {
  memset(to, 0, static_cast<size_t>(bytes));
  for (int32_t i = 0; i < n; i += lanes) D::put(to, i, load(q + i, n - i < lanes ? n - i : lanes));
}

template <class D>
void attend_with(const Attention& what, const AttendTask& task, void* scratch) {
  const hl_kv& kv = *what.kv;
  const hl_step& step = *what.step;
  const Desk<D> desk(kv, scratch);
  const int64_t padded = padded_head(kv.head_size), record_floats = partial_floats(kv.head_size);
  const int rows = task.row1 - task.row0;
  const int32_t* blocks = step.block_table + static_cast<int64_t>(task.sequence) * step.max_blocks;

  int64_t keys[attend_rows], most = 0;
  for (int r = 0; r < rows; r++) {
    const Row row(what, task.sequence, task.kv_head, task.row0 + r);
    put_query<D>(what.q + row.token * what.ldq + row.head * kv.head_size, kv.head_size, desk.q + r * desk.q_stride, desk.q_stride);
    keys[r] = row.keys;
    most = most > keys[r] ? most : keys[r];
  }

  for (int32_t span = task.span0; span < task.span1; span++) {
    const int64_t first = int64_t{span} * HL_SPAN, last = first + HL_SPAN < most ? first + HL_SPAN : most;
    const uint8_t *key_groups[span_groups], *value_groups[span_groups];
    for (int64_t at = first; at < last; at += HL_SLOTS) {
      const int64_t g = (at - first) / HL_SLOTS;
      const uint8_t* slots = kv_slots(kv, blocks[at / kv.block_size], task.kv_head, at % kv.block_size);
      if (desk.own_form(kv)) {
        key_groups[g] = slots;
        value_groups[g] = slots + kv_part_bytes(kv.kind, kv.head_size);
      } else {
        const int64_t part = part_bytes<D>(kv.head_size);
        uint8_t* to = desk.wide_slots + 2 * part * g;
        widen_slots<D>(kv, slots, to, to + part);
        key_groups[g] = to;
        value_groups[g] = to + part;
      }
    }
    for (int r0 = 0; r0 < rows; r0 += group_rows) {
      const int height = rows - r0 < group_rows ? rows - r0 : group_rows;
      int counts[group_rows], longest = 0;
      for (int r = 0; r < height; r++) {
        const int64_t left = keys[r0 + r] - first;
        counts[r] = static_cast<int>(left < 0 ? 0 : left < HL_SPAN ? left : HL_SPAN);
        longest = longest > counts[r] ? longest : counts[r];
      }
      if (longest == 0) continue;
      const int groups = (longest + HL_SLOTS - 1) / HL_SLOTS;
      score_rows<D>(height, key_groups, groups, kv.head_size / D::per_unit, desk.q + r0 * desk.q_stride, desk.q_stride, desk.scores);
      float maxima[group_rows], totals[group_rows];
      for (int r = 0; r < height; r++)
        soften<D>(desk.scores + r * HL_SPAN, counts[r], groups * HL_SLOTS, what.scale, desk.weights + r * HL_SPAN * 4, maxima + r, totals + r);
      value_rows<D>(height, value_groups, longest, desk.weights, desk.parts, padded);
      for (int r = 0; r < height; r++) {
        if (counts[r] == 0) continue;
        float* to = desk.records + (r0 + r) * record_floats;
        if (task.partial >= 0) to = what.partials + task.partial + ((span - task.span0) * int64_t{rows} + r0 + r) * record_floats;
        float* record = span == 0 || task.partial >= 0 ? to : desk.record;
        memcpy(record, desk.parts + r * padded, static_cast<size_t>(padded) * 4);
        record[padded] = maxima[r];
        record[padded + 1] = totals[r];
        if (record != to) fold(to, record, padded);
      }
    }
  }
  if (task.partial >= 0) return;
  for (int r = 0; r < rows; r++) finish(what, Row(what, task.sequence, task.kv_head, task.row0 + r), desk.records + r * record_floats);
}

}  // namespace

void kv_write(const hl_kv& kv, int64_t slot, int32_t head, const float* k, const float* v) {
  const int64_t offset = slot % kv.block_size, part = kv_part_bytes(kv.kind, kv.head_size);
  uint8_t* slots = kv_slots(kv, slot / kv.block_size, head, offset);
  uint16_t* params = reinterpret_cast<uint16_t*>(slots + 2 * part);
  write_row(kv, slots, params, true, offset % HL_SLOTS, k);
  write_row(kv, slots + part, params + 2 * HL_SLOTS, false, offset % HL_SLOTS, v);
}

void kv_read(const hl_kv& kv, int64_t slot, int32_t head, float* k, float* v) {
  const int64_t offset = slot % kv.block_size, lane = offset % HL_SLOTS, padded = padded_head(kv.head_size);
  const uint8_t* slots = kv_slots(kv, slot / kv.block_size, head, offset);
  alignas(64) float keys[most_head * HL_SLOTS], values[most_head * HL_SLOTS];
  if (kv.kind == HL_KV_F32) {
    memcpy(keys, slots, static_cast<size_t>(padded) * HL_SLOTS * 4);
    memcpy(values, slots + padded * HL_SLOTS * 4, static_cast<size_t>(padded) * HL_SLOTS * 4);
  } else {
    widen_slots<Floats>(kv, slots, reinterpret_cast<uint8_t*>(keys), reinterpret_cast<uint8_t*>(values));
  }
  for (int32_t d = 0; d < kv.head_size; d++) {
    k[d] = keys[d * HL_SLOTS + lane];
    v[d] = values[lane * padded + d];
  }
}

int64_t attend_scratch(const hl_kv& kv) {
  return kv.kind == HL_KV_F32 ? Desk<Floats>(kv, nullptr).bytes : Desk<Narrow>(kv, nullptr).bytes;
}

void attend(const Attention& what, const AttendTask& task, void* scratch) {
  if (what.kv->kind == HL_KV_F32)
    attend_with<Floats>(what, task, scratch);
  else
    attend_with<Narrow>(what, task, scratch);
}

void merge(const Attention& what, const AttendTask& spans, int32_t row) {
  const int64_t padded = padded_head(what.kv->head_size), record_floats = partial_floats(what.kv->head_size);
  const int64_t rows = spans.row1 - spans.row0;
  const Row which(what, spans.sequence, spans.kv_head, row);
  float* first = what.partials + spans.partial + (row - spans.row0) * record_floats;
  for (int64_t span = 1; span < spans.span1 && span * HL_SPAN < which.keys; span++) fold(first, first + span * rows * record_floats, padded);
  finish(what, which, first);
}

}  // namespace hl::HL_VARIANT
