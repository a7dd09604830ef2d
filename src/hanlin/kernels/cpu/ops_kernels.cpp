// Norms, activations, rotations, selections: rows of floats, compiled once a variant. attend_kernels.cpp has the pool.
#include "ops.h"

#include "simd.h"

namespace hl::HL_VARIANT {

// attend_kernels.cpp
void kv_write(const hl_kv& kv, int64_t slot, int64_t count, int32_t head, const KvRows& rows);
void kv_read(const hl_kv& kv, int64_t slot, int32_t head, float* k, float* v);
int64_t attend_scratch(const hl_kv& kv);
void attend(const Attention& what, const AttendTask& task, void* scratch);
void merge(const Attention& what, const AttendTask& spans, int32_t row);

namespace {

// Calls body(offset, count) for every 16 of n, the last time with fewer.
template <class Body>
HL_INLINE void each(int64_t n, const Body& body) {
  for (int64_t i = 0; i < n; i += lanes) body(i, static_cast<int>(n - i < lanes ? n - i : lanes));
}

// Loads that know when they are whole: a masked load costs more.
HL_INLINE F take(const float* p, int count) { return count == lanes ? load(p) : load(p, count); }
HL_INLINE void put(float* p, F a, int count) {
  if (count == lanes)
    store(p, a);
  else
    store(p, a, count);
}

// Sum of term(x) over a row, in one fixed order: four running sums, so that additions need not wait for one another.
template <class Term>
HL_INLINE float total(const float* x, int64_t n, const Term& term) {
  F sums[4] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + 4 * lanes <= n; i += 4 * lanes)
    for (int j = 0; j < 4; j++) sums[j] = add(sums[j], term(load(x + i + j * lanes), lanes));
  each(n - i, [&](int64_t at, int count) { sums[0] = add(sums[0], term(take(x + i + at, count), count)); });
  return sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

void norm(int32_t kind, const float* x, int64_t width, const float* gain, const float* bias, float eps, float* y) {
  const float n = static_cast<float>(width);
  float mean = 0;
  if (kind == HL_NORM_LAYER) mean = total(x, width, [](F v, int) { return v; }) / n;
  const F center = set1(mean);
  float squares;
  if (kind == HL_NORM_LAYER)
    squares = total(x, width, [&](F v, int count) {
      F d = sub(v, center);
      if (count < lanes) {  // lanes beyond the row hold -mean
        float t[lanes];
        store(t, d);
        d = load(t, count);
      }
      return mul(d, d);
    });
  else
    squares = total(x, width, [](F v, int) { return mul(v, v); });
  const F factor = set1(1.0f / sqrtf(squares / n + eps));
  each(width, [&](int64_t i, int count) {
    F v = take(x + i, count);
    if (kind == HL_NORM_LAYER) v = sub(v, center);
    v = mul(v, factor);
    if (gain != nullptr) v = mul(v, take(gain + i, count));
    if (bias != nullptr) v = add(v, take(bias + i, count));
    put(y + i, v, count);
  });
}

HL_INLINE F apply(int32_t function, F x) {
  return function == HL_FN_EXP ? exp(x) : function == HL_FN_SILU ? silu(x) : gelu(x);
}

void map(int32_t function, const float* x, int64_t n, float* y) {
  each(n, [&](int64_t i, int count) { put(y + i, apply(function, take(x + i, count)), count); });
}

void gate(int32_t function, const float* gates, const float* ups, int64_t n, float* y) {
  each(n, [&](int64_t i, int count) {
    put(y + i, mul(apply(function, take(gates + i, count)), take(ups + i, count)), count);
  });
}

void add_rows(const float* a, float scale, const float* b, int64_t n, float* y) {
  const F factor = set1(scale);
  each(n, [&](int64_t i, int count) {
    const F scaled = mul(take(a + i, count), factor);
    put(y + i, b == nullptr ? scaled : add(scaled, take(b + i, count)), count);
  });
}

void widen(int32_t source, const void* x, int64_t n, float* y) {
  if (source == HL_SRC_F32) {
    memcpy(y, x, static_cast<size_t>(n) * 4);
    return;
  }
  const uint16_t* from = static_cast<const uint16_t*>(x);
  each(n, [&](int64_t i, int count) {
    uint16_t t[lanes] = {};
    memcpy(t, from + i, sizeof(uint16_t) * static_cast<size_t>(count));
    put(y + i, source == HL_SRC_F16 ? load_f16(t) : load_bf16(t), count);
  });
}

// a[i], b[i] turned by the angles i, i < n.
HL_INLINE void turn(float* a, float* b, int64_t n, const float* cosines, const float* sines) {
  each(n, [&](int64_t i, int count) {
    const F x = take(a + i, count), y = take(b + i, count), c = take(cosines + i, count), s = take(sines + i, count);
    put(a + i, sub(mul(x, c), mul(y, s)), count);
    put(b + i, add(mul(y, c), mul(x, s)), count);
  });
}

void rope(int32_t style, float* head, int32_t rotary, const float* cosines, const float* sines) {
  const int half = rotary / 2, quarter = rotary / 4;
  if (style == HL_ROPE_HALVES) {
    turn(head, head + half, half, cosines, sines);
  } else if (style == HL_ROPE_QUARTERS) {
    turn(head, head + quarter, quarter, cosines, sines);
    turn(head + half, head + half + quarter, quarter, cosines + quarter, sines + quarter);
  } else {
    for (int i = 0; i < half; i++) {
      const float a = head[2 * i], b = head[2 * i + 1];
      head[2 * i] = a * cosines[i] - b * sines[i];
      head[2 * i + 1] = b * cosines[i] + a * sines[i];
    }
  }
}

// Puts a value into the falling list of `kept` (at most k); equal ones stay behind those with lower ids.
HL_INLINE int insert(Top* out, int kept, int k, float value, int32_t id) {
  int at = kept < k ? kept : k - 1;
  for (; at > 0 && out->values[at - 1] < value; at--) {
    out->values[at] = out->values[at - 1];
    out->ids[at] = out->ids[at - 1];
  }
  out->values[at] = value;
  out->ids[at] = id;
  return kept < k ? kept + 1 : k;
}

void top(const float* x, int64_t n, int32_t first_id, int32_t k, Top* out) {
  constexpr int64_t stretch = 4 * lanes;
  int kept = 0;
  F highest = set1(-INFINITY);
  for (int64_t i = 0; i < n; i += stretch) {
    const int64_t count = n - i < stretch ? n - i : stretch;
    F best = set1(-INFINITY);
    if (count == stretch)
      for (int j = 0; j < 4; j++) best = max(load(x + i + j * lanes), best);  // NaN is passed over
    else
      for (int64_t j = 0; j < count; j++) best = max(set1(x[i + j]), best);
    highest = max(best, highest);
    if (k == 0 || (kept == k && !(hmax(best) > out->values[k - 1]))) continue;
    for (int64_t j = i; j < i + count; j++) {
      const float value = x[j];
      if (value > -INFINITY && (kept < k || value > out->values[k - 1]))
        kept = insert(out, kept, k, value, first_id + static_cast<int32_t>(j));
    }
  }
  for (; kept < k; kept++) {
    out->values[kept] = -INFINITY;
    out->ids[kept] = -1;
  }
  out->maximum = hmax(highest);
  const F shift = set1(out->maximum > -INFINITY ? out->maximum : 0.0f);
  out->sum = total(x, n, [&](F v, int count) {
    F e = exp(sub(v, shift));
    if (count < lanes) {
      float t[lanes];
      store(t, e);
      e = load(t, count);
    }
    return e;
  });
}

}  // namespace

extern const OpKernels op_table;
const OpKernels op_table = {norm, map,      gate,    add_rows,       widen,  rope,
                            top,  kv_write, kv_read, attend_scratch, attend, merge};

}  // namespace hl::HL_VARIANT
