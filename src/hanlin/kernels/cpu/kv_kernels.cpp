// Single slots of the key/value pool, written and read; compiled once a variant. See hl_kv for the layouts.
#include "ops.h"
#include "simd.h"

namespace hl::HL_VARIANT {
namespace {

// ---- float16, for the parameters of codes --------------------------------------------------------------------------

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

// ---- places --------------------------------------------------------------------------------------------------------

// Where element d of a slot's keys, or of its values, is. `Unit` of them lie together: dimensions of keys, slots of
// values.
template <int Unit>
HL_INLINE int64_t place_of(bool keys, int64_t slot, int64_t d, int64_t padded) {
  return keys ? (d / Unit * HL_SLOTS + slot) * Unit + d % Unit : (slot / Unit * padded + d) * Unit + slot % Unit;
}

// `count` rows, `ld` elements apart, into slots one after another. Whole units of slots are written as they lie: a row at a
// time, each line of the cache would be fetched for one element.
template <int Unit, class Element>
HL_INLINE void scatter(const Element* rows, int64_t ld, int64_t count, int64_t n, bool keys, int64_t slot, int64_t padded,
                       Element* part) {
  if (keys) {
    int64_t d = 0;
    for (; d + Unit <= n; d += Unit)
      for (int64_t i = 0; i < count; i++)
        memcpy(part + place_of<Unit>(true, slot + i, d, padded), rows + i * ld + d, Unit * sizeof(Element));
    for (; d < n; d++)
      for (int64_t i = 0; i < count; i++) part[place_of<Unit>(true, slot + i, d, padded)] = rows[i * ld + d];
    return;
  }
  for (int64_t i = 0; i < count;) {
    Element* to = part + place_of<Unit>(false, slot + i, 0, padded);
    const Element* from = rows + i * ld;
    if (Unit > 1 && (slot + i) % Unit == 0 && count - i >= Unit) {
      for (int64_t d = 0; d < n; d++)
        HL_UNROLL for (int u = 0; u < Unit; u++) to[Unit * d + u] = from[u * ld + d];
      i += Unit;
    } else {
      for (int64_t d = 0; d < n; d++) to[Unit * d] = from[d];
      i++;
    }
  }
}

// In int4 two vectors of 64 codes share 64 bytes: those of dimensions d and d + 16.
constexpr int nibbles_apart = 16;

HL_INLINE int64_t join(const uint8_t* codes, int64_t n, uint8_t* both) {
  int64_t bytes = 0;
  for (int64_t d = 0; d < n; d += 2 * nibbles_apart, bytes += nibbles_apart)
    for (int i = 0; i < nibbles_apart; i++)
      both[bytes + i] = static_cast<uint8_t>(codes[d + i] | codes[d + nibbles_apart + i] << 4);
  return bytes;
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// Scale and minimum of a row, and its codes; zeros (or whatever, up to a multiple of 16) behind them.
void encode(const float* x, int32_t n, float steps, uint8_t (&codes)[most_head], uint16_t* scale_to, uint16_t* min_to) {
  const F inside = set1(x[0]);
  F lows = inside, highs = inside;
  I exponents = set1i(0);
  for (int32_t i = 0; i < n; i += lanes) {
    F v;
    if (n - i < lanes) {  // lanes beyond the row must not count
      float t[lanes];
      store(t, inside);
      memcpy(t, x + i, sizeof(float) * static_cast<size_t>(n - i));
      v = load(t);
    } else {
      v = load(x + i);
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
  *min_to = to_half(-hmax(sub(zero(), lows)));
  const float low = from_half(*min_to), ideal = (hmax(highs) - low) / steps;
  uint16_t half = to_half(ideal > 0 ? ideal : 0.0f);
  if (from_half(half) < ideal && half < 0x7BFFu) half++;
  *scale_to = half;
  const float scale = from_half(half);
  if (scale == 0) return;
  const F inverse = set1(1.0f / scale), minimum = set1(low);
  for (int32_t i = 0; i < n; i += lanes) {
    const F v = n - i < lanes ? load(x + i, n - i) : load(x + i);
    const F q = floor(fma(sub(v, minimum), inverse, set1(0.5f)));
    store_i8(codes + i, to_int(max(zero(), min(set1(steps), q))));
  }
}

void write_rows(const hl_kv& kv, uint8_t* part, uint16_t* params, bool keys, int64_t slot, int64_t count, const float* x,
                int64_t ld) {
  const int64_t padded = padded_head(kv.head_size);
  const int32_t n = kv.head_size, kind = keys ? key_kind(kv.kind) : kv.kind;
  if (kind == HL_KV_F32) return scatter<1>(x, ld, count, n, keys, slot, padded, reinterpret_cast<float*>(part));
  if (kind == HL_KV_BF16) {
    uint16_t rounded[HL_SLOTS][most_head];
    for (int64_t i = 0; i < count; i++, x += ld)
      for (int32_t d = 0; d < n; d += lanes)
        store_u16(rounded[i] + d, to_bf16(n - d < lanes ? load(x + d, n - d) : load(x + d)));
    return scatter<2>(rounded[0], most_head, count, n, keys, slot, padded, reinterpret_cast<uint16_t*>(part));
  }
  uint8_t codes[HL_SLOTS][most_head];
  for (int64_t i = 0; i < count; i++)
    encode(x + i * ld, n, kind == HL_KV_INT8 ? 255.0f : 15.0f, codes[i], params + slot + i, params + HL_SLOTS + slot + i);
  if (kind == HL_KV_INT8) return scatter<4>(codes[0], most_head, count, n, keys, slot, padded, part);
  uint8_t both[HL_SLOTS][most_head / 2];
  int64_t bytes = 0;
  for (int64_t i = 0; i < count; i++) bytes = join(codes[i], n, both[i]);
  scatter<4>(both[0], most_head / 2, count, bytes, false, slot, padded / 2, part);
}

void read_row(const hl_kv& kv, const uint8_t* part, const uint16_t* params, bool keys, int64_t slot, float* x) {
  const int64_t padded = padded_head(kv.head_size);
  const int32_t kind = keys ? key_kind(kv.kind) : kv.kind;
  const bool codes = kv_has_params(kind);
  const float scale = codes ? from_half(params[slot]) : 0, low = codes ? from_half(params[HL_SLOTS + slot]) : 0;
  for (int64_t d = 0; d < kv.head_size; d++) {
    if (kind == HL_KV_F32) {
      x[d] = reinterpret_cast<const float*>(part)[place_of<1>(keys, slot, d, padded)];
    } else if (kind == HL_KV_BF16) {
      const uint32_t u = uint32_t{reinterpret_cast<const uint16_t*>(part)[place_of<2>(keys, slot, d, padded)]} << 16;
      memcpy(x + d, &u, 4);
    } else if (kind == HL_KV_INT8) {
      x[d] = static_cast<float>(part[place_of<4>(keys, slot, d, padded)]) * scale + low;
    } else {
      const int64_t at = d / (2 * nibbles_apart) * nibbles_apart + d % nibbles_apart;
      const int both = part[place_of<4>(false, slot, at, padded / 2)];
      x[d] = static_cast<float>(d / nibbles_apart % 2 ? both >> 4 : both & 15) * scale + low;
    }
  }
}

}  // namespace

void kv_write(const hl_kv& kv, int64_t slot, int64_t count, int32_t head, const KvRows& rows) {
  const int64_t offset = slot % kv.block_size, keys = kv_keys_bytes(kv), values = kv_values_bytes(kv);
  uint8_t* slots = kv_slots(kv, slot / kv.block_size, head, offset);
  uint16_t* params = reinterpret_cast<uint16_t*>(slots + keys + values);
  write_rows(kv, slots, params, true, offset % HL_SLOTS, count, rows.k, rows.ldk);
  write_rows(kv, slots + keys, params + 2 * HL_SLOTS, false, offset % HL_SLOTS, count, rows.v, rows.ldv);
}

void kv_read(const hl_kv& kv, int64_t slot, int32_t head, float* k, float* v) {
  const int64_t offset = slot % kv.block_size, keys = kv_keys_bytes(kv), values = kv_values_bytes(kv);
  const uint8_t* slots = kv_slots(kv, slot / kv.block_size, head, offset);
  const uint16_t* params = reinterpret_cast<const uint16_t*>(slots + keys + values);
  read_row(kv, slots, params, true, offset % HL_SLOTS, k);
  read_row(kv, slots + keys, params + 2 * HL_SLOTS, false, offset % HL_SLOTS, v);
}

}  // namespace hl::HL_VARIANT
